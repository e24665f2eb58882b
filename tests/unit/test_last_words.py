"""A user's exception on its way: itself where that can be, and its text and traceback in any case."""

from __future__ import annotations

import pickle
import threading

import pytest

from raytrain_het.errors import ForeignError
from raytrain_het.worker.state.last_words import MAX_TEXT, packed, portable, text_of, traceback_of, unpacked


class TwoArguments(Exception):
    def __init__(self, code: int, detail: str) -> None:
        super().__init__(f"{code}: {detail}")


class Locked(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class WithoutText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class NoReduce(Exception):
    def __reduce__(self) -> tuple:
        raise RuntimeError("no")


class OtherText(Exception):
    """Unpickles, but says something else then."""

    def __init__(self, number: object) -> None:
        super().__init__(f"n={number}")


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


@pytest.mark.parametrize("error", [ValueError("good"), KeyError("k"), OSError(2, "no such file"), Locked], ids=str)
def test_an_exception_that_can_be_sent_is_sent(error: BaseException) -> None:
    if error is Locked:
        assert packed(Locked("x")) is None
        return
    assert portable(raised(error)) is error
    again = unpacked(packed(error))
    assert (type(again), str(again)) == (type(error), str(error))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TwoArguments(404, "no labels"), "TwoArguments: 404: no labels"),
        (Locked("held"), "Locked: held"),
        (NoReduce("broken"), "NoReduce: broken"),
        (OtherText(5), "OtherText: n=5"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_one_that_cannot_be_sent_is_replaced_by_one_that_says_the_same(error: BaseException, said: str) -> None:
    sent = portable(raised(error))
    assert isinstance(sent, ForeignError)
    assert said in str(sent)
    assert str(pickle.loads(pickle.dumps(sent))) == str(sent)


def test_a_text_that_cannot_be_made_costs_nothing_else() -> None:
    assert "WithoutText" in text_of(WithoutText())
    assert "raise error from cause" in traceback_of(raised(WithoutText()))


@pytest.mark.parametrize("where", ["itself", "its cause"])
def test_of_a_text_of_megabytes_both_ends_arrive(where: str) -> None:
    long = ValueError("BEGIN " + "x" * 10**7 + " END")
    error = raised(long) if where == "itself" else raised(TypeError("small"), raised(long))
    sent = portable(error)
    text = f"{text_of(sent)}{traceback_of(sent)}"
    assert len(text) < 3 * MAX_TEXT
    assert "BEGIN" in text and "characters are left out here" in text
    assert ("END" if where == "itself" else "small") in text
    assert len(traceback_of(error)) < 2 * MAX_TEXT
