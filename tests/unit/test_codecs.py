"""What every codec holds to, by being registered: compiled and with tensors' own operations.

But for ``lowrank``, which encodes no worker's gradient by itself: see ``test_lowrank.py``."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
import re

import pytest
import torch

from raytrain_het.allreduce.codecs import Codec, Stamp, State, codec_of, compiled, mix
from raytrain_het.allreduce.codecs.base import RESIDUAL
from raytrain_het.allreduce.codecs.packed import PackedCodec
from raytrain_het.codec_options import AUTO_CODECS, CODECS, one_word, options_of, used_together
from raytrain_het.config import HetConfig
from raytrain_het.errors import ConfigError, ProtocolError

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = [
    *(name for name in CODECS if not used_together(name)),
    "int8(error_feedback=true)",
    "int4(error_feedback=true)",
    "topk(density=0.3)",
    "randomk(density=1.0)",
]
PACKED = [word for word in WORDS if isinstance(codec_of(word), PackedCodec)]
STAMP = Stamp(5, 6)
FED_BACK = [word for word in PACKED if codec_of(word).init(1, torch.float32, torch.device("cpu"))]
UNBIASED = [word for word in WORDS if not codec_of(word).biased]
SIZES = [1, 2, 15, 16, 127, 128, 129, 255, 257, 511, 513, 4099, 65536, 70001]
ROUNDING = {"none": 0.0, "bf16": 2**-8, "fp16": 2**-11}
"""By codec that rounds to nearest: the most that is lost of a value."""
SPACING = {"int8": 1 / 127, "int4": 1 / 7}
"""By codec that rounds by chance: a step of the scale, of a block's largest value."""


@pytest.fixture(params=["compiled", "eager"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "eager":
        monkeypatch.setattr(compiled, "kernels", lambda: None)
    else:
        assert compiled.kernels() is not None, "numba works wherever these tests run"
    return request.param


def gradient(n: int, seed: int = 0) -> torch.Tensor:
    """Values of very different sizes, some exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * torch.randn(n, generator=generator).mul(2).exp()
    return values * (torch.rand(n, generator=generator) > 0.1)


_FILLS = itertools.cycle((171, 84))
"""What lies in memory before: another thing each time."""


def one_large_column(width: int) -> torch.Tensor:
    """A matrix as it lies in a bucket: its first column a hundred times as large."""
    values = torch.randn(40_000 // width, width, generator=torch.Generator().manual_seed(4))
    values[:, 0] *= 100
    return values.view(-1)


def encoded(codec: Codec, x: torch.Tensor, stamp: Stamp = STAMP, state: State | None = None) -> torch.Tensor:
    """The payload; what lies behind it must stay as it is. ``state`` becomes the new one."""
    capacity = codec.capacity_bytes(x.numel(), x.dtype)
    fill = next(_FILLS)
    memory = torch.full((capacity + 32,), fill, dtype=torch.uint8)
    state = {} if state is None else state
    following = {name: torch.empty_like(values) for name, values in state.items()}
    codec.encode(x.clone(), memory[:capacity], stamp, state, following)
    assert bool((memory[capacity:] == fill).all()), "it wrote behind its payload"
    state.update(following)
    return memory[:capacity]


def decoded(codec: Codec, payload: torch.Tensor, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full((n,), torch.nan, dtype=dtype)
    codec.decode(payload, out)
    return out


def there_and_back(word: str, x: torch.Tensor, stamp: Stamp = STAMP) -> torch.Tensor:
    return decoded(codec_of(word), encoded(codec_of(word), x, stamp), x.numel(), x.dtype)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_size_fits_its_capacity_and_comes_back_whole(word: str, dtype: torch.dtype, path: str) -> None:
    for n in SIZES:
        x = gradient(n).to(dtype)
        out = there_and_back(word, x)
        assert out.isfinite().all()
        assert (out - x).norm() <= x.norm() * (1 + 1e-6), "no codec makes it worse than sending nothing"
        if not codec_of(word).biased and n > 128:
            assert (out - x).norm() <= (0.4 if "int4" in word else 0.05) * x.norm()


@pytest.mark.parametrize("word", WORDS)
def test_zeros_stay_zeros_and_denormal_numbers_are_lost_at_most(word: str, path: str) -> None:
    assert not there_and_back(word, torch.zeros(1000)).any()
    for size in (1e-45, 1e-40, 1e-37):
        out = there_and_back(word, torch.full((1000,), size))
        assert out.isfinite().all()
        assert (out - size).abs().max() <= max(2 * size, 2.0**-119)
    assert there_and_back(word, torch.full((300,), torch.finfo(torch.float32).max / 2)).isfinite().all()


@pytest.mark.parametrize("word", WORDS)
def test_what_is_not_finite_breaks_nothing(word: str, path: str) -> None:
    """Its step is skipped by all, and what was to be remembered of it is dropped."""
    for bad in (math.nan, math.inf, -math.inf):
        x = gradient(1000)
        x[500] = bad
        codec = codec_of(word)
        decoded(codec, encoded(codec, x, state=codec.init(1000, x.dtype, x.device)), 1000)
    assert there_and_back(word, gradient(1000)).isfinite().all()


@pytest.mark.parametrize("word", UNBIASED)
def test_the_expectation_of_what_comes_back_is_what_was_sent(word: str, path: str) -> None:
    """Rounding by chance: within five standard errors for every element; rounding to nearest: within its bound."""
    x, repeats = gradient(1500), 400
    name = word.partition("(")[0]
    outs = torch.stack([there_and_back(word, x, Stamp(mix(k), 1)) for k in range(repeats)]).double()
    if name in ROUNDING:
        assert ((outs[0] - x).abs() <= ROUNDING[name] * x.abs() + 2.0**-39 * x.abs().max()).all()
        return
    block = codec_of(word).block  # type: ignore[attr-defined]
    largest = torch.stack([part.abs().max() for part in x.split(block)]).repeat_interleave(block)[: len(x)].double()
    spacing = SPACING[name] * largest
    assert ((outs - x).abs() <= spacing * (1 + 1e-4)).all()
    assert ((outs.mean(0) - x).abs() <= 5 * 0.5 * spacing / math.sqrt(repeats) + 2.0**-17 * spacing).all()
    assert abs(float(((outs.mean(0) - x) / spacing).mean())) <= 5 * 0.5 / math.sqrt(repeats * len(x))


@pytest.mark.parametrize("word", WORDS)
def test_the_same_stamp_gives_the_same_bytes(word: str, path: str) -> None:
    codec, x = codec_of(word), gradient(5000)
    first, again = encoded(codec, x, Stamp(7, 8)), encoded(pickle.loads(pickle.dumps(codec)), x, Stamp(7, 8))
    assert torch.equal(first, again)
    if "int" in word or word == "topk":
        assert not torch.equal(first, encoded(codec, x, Stamp(9, 8))), "another key draws other numbers"


@pytest.mark.parametrize("word", PACKED)
def test_compiled_and_eager_send_the_same_but_for_the_last_bit(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = gradient(5000)
    payload = encoded(codec_of(word), x)
    fast = decoded(codec_of(word), payload, 5000)
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    assert torch.equal(decoded(codec_of(word), payload, 5000), fast), "decoding is the same to the bit"
    slow = there_and_back(word, x)
    differ = ((slow - fast).abs() > 1e-5 * (x.abs() + fast.abs())).float().mean()
    assert differ <= 1e-3, "rounding may go the other way where a number lies at the edge"


@pytest.mark.parametrize("word", FED_BACK)
def test_what_was_decoded_and_what_is_left_are_all_there_was(word: str, path: str) -> None:
    """``decoded + W r' = x + W r``, step after step."""
    codec, n = codec_of(word), 5003
    state = codec.init(n, torch.float32, torch.device("cpu"))
    assert not state[RESIDUAL].any()
    for step in range(5):
        weight = 64.0 + step
        x, before = gradient(n, step), state[RESIDUAL].clone()
        out = decoded(codec, encoded(codec, x, Stamp(step, step, weight), state), n)
        whole = x + weight * before
        torch.testing.assert_close(
            out + weight * state[RESIDUAL], whole, rtol=2e-6, atol=2e-6 * float(whole.abs().max())
        )
    assert state[RESIDUAL].any() or word == "randomk(density=1.0)"


@pytest.mark.parametrize("word", FED_BACK)
def test_the_residual_stays_bounded(word: str, path: str) -> None:
    """Over 300 steps of the same gradient what is sent on average is the gradient, in every element."""
    codec, x = codec_of(word), torch.randn(700, generator=torch.Generator().manual_seed(1))
    state, total = codec.init(700, torch.float32, x.device), torch.zeros(700)
    for step in range(300):
        total += decoded(codec, encoded(codec, x, Stamp(mix(step), mix(step)), state), 700)
    torch.testing.assert_close(total / 300 + state[RESIDUAL] / 300, x, rtol=1e-3, atol=1e-3)
    assert (total / 300 - x).norm() <= 0.5 * x.norm()


def test_sign_keeps_what_the_mean_absolute_value_holds(path: str) -> None:
    """``|y - d|^2 = |y|^2 - |y|_1^2 / n`` for a block."""
    y = torch.randn(512, generator=torch.Generator().manual_seed(2))
    left = (y - there_and_back("sign", y)).square().sum()
    torch.testing.assert_close(left, y.square().sum() - y.abs().sum() ** 2 / 512, rtol=1e-4, atol=0)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.2, 1.0])
@pytest.mark.parametrize("n", [5, 1000, 70001, 300_000])
def test_topk_keeps_nearly_what_the_largest_hold(density: float, n: int, path: str) -> None:
    word = f"topk(density={density})"
    y = gradient(n, 3)
    out, k = there_and_back(word, y), math.ceil(density * n)
    assert int((out != 0).sum()) <= k
    best = y.abs().topk(k).values.square().sum()
    kept = y.square().sum() - (y - out).square().sum()
    assert kept >= 0.97 * best


@pytest.mark.parametrize(
    "y",
    [
        torch.ones(40_000),
        torch.cat((torch.zeros(39_990), torch.ones(10))),
        torch.cat((torch.ones(20), torch.zeros(39_980))),
        torch.arange(40_000.0),
        torch.where(torch.arange(40_000) % 11 == 0, 1.0, 2.0),
        torch.where(torch.arange(40_000) % 11 == 0, 2.0, 1.0),
        torch.cat((torch.ones(50), torch.full((39_949,), 0.5), torch.tensor([100.0]))),
        one_large_column(64),
        one_large_column(16),
    ],
    ids=[
        "equal",
        "few last",
        "few first",
        "in order",
        "sample too small",
        "sample too large",
        "ties",
        "column of 64",
        "column of 16",
    ],
)
def test_topk_finds_the_largest_where_a_sample_misleads(y: torch.Tensor, path: str) -> None:
    out = there_and_back("topk(density=0.02)", y)
    best = y.abs().topk(800).values.square().sum()
    assert y.square().sum() - (y - out).square().sum() >= 0.98 * best


@pytest.mark.parametrize("word", ["randomk", "randomk(density=0.3)"])
def test_randomk_sends_the_same_places_whoever_sends_and_all_in_the_end(word: str) -> None:
    codec, n = codec_of(word), 1003
    places = [codec.places(n, mix(step), torch.device("cpu")) for step in range(2000)]  # type: ignore[attr-defined]
    seen = torch.zeros(n)
    for some in places:
        assert len(some.unique()) == len(some) == codec.body_bytes(n) // 4  # type: ignore[attr-defined]
        seen[some] += 1
    expected = torch.full((n,), 2000 / codec.group)  # type: ignore[attr-defined]
    tail = n % codec.group  # type: ignore[attr-defined]
    expected[n - tail :] = 2000 / max(tail, 1)
    assert ((seen - expected).abs() <= 5.5 * expected.sqrt()).all()
    assert torch.equal(
        there_and_back(word, torch.ones(n), Stamp(1, 77)), there_and_back(word, torch.ones(n), Stamp(2, 77))
    )


@pytest.mark.parametrize("word", PACKED)
def test_a_damaged_payload_is_an_error(word: str, path: str) -> None:
    codec, x = codec_of(word), gradient(3000)
    payload = encoded(codec, x)
    damaged = [
        torch.zeros_like(payload),
        torch.full_like(payload, 255),
        encoded(codec, gradient(3000, 1))[: len(payload)],
    ]
    damaged[2][16:] = payload[16:]
    for place in [*range(24), len(payload) // 2, len(payload) - 1]:
        damaged.append(payload.clone())
        damaged[-1][place] ^= 64
    words = payload.view(torch.int64).clone()
    words[[3, -1]] = words[[-1, 3]]
    damaged.append(words.view(torch.uint8))
    for bad in damaged:
        if not torch.equal(bad, payload):
            with pytest.raises(ProtocolError, match="does not decode"):
                decoded(codec, bad, 3000)
    if word != "randomk(density=1.0)":
        with pytest.raises(ProtocolError, match="does not decode"):
            decoded(codec, payload, 2000), decoded(codec, payload, 300)  # type: ignore[func-returns-value]


@pytest.mark.parametrize("word", ["topk", "topk(density=0.3)"])
def test_a_topk_payload_of_elements_that_are_not_there_is_an_error(word: str) -> None:
    """Even if nothing was damaged on the way."""
    codec, x = codec_of(word), gradient(3000)
    assert isinstance(codec, PackedCodec)
    body = encoded(codec, x)[16:]
    length = codec.body_bytes(3000)
    for wrong in (body[: length - 2], body[:4], torch.zeros(length, dtype=torch.uint8)):
        with pytest.raises(ProtocolError, match="does not decode"):
            codec.unpack(wrong, 0, torch.empty(3000))
    far = body[:length].clone()
    far[-2:] = 255
    with pytest.raises(ProtocolError, match="does not decode"):
        codec.unpack(far, 0, torch.empty(2990))


@pytest.mark.parametrize("word", PACKED)
def test_values_for_another_device_are_decoded_where_the_payload_is(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a GPU's model, whose messages travel from the CPU."""
    codec, devices = codec_of(word), []
    assert isinstance(codec, PackedCodec)
    unpack, payload = codec.unpack, encoded(codec, gradient(3000))

    def seen(body: torch.Tensor, shared_key: int, out: torch.Tensor) -> None:
        devices.append(out.device.type)
        unpack(body, shared_key, out)

    monkeypatch.setattr(codec, "unpack", seen)
    codec.decode(payload, torch.empty(3000, device="meta"))
    assert devices == ["cpu"]


@pytest.mark.parametrize("word", WORDS)
def test_the_default_dtype_of_the_users_program_changes_nothing(word: str, path: str) -> None:
    expected, n = there_and_back(word, gradient(3000)), 3000
    torch.set_default_dtype(torch.float64)
    try:
        x = gradient(n).float()
        state = codec_of(word).init(n, x.dtype, x.device)
        assert all(values.dtype == torch.float32 for values in state.values())
        got = decoded(codec_of(word), encoded(codec_of(word), x, state=state), n)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.isfinite().all()
    assert expected.dtype == got.dtype


@pytest.mark.parametrize(
    ("word", "bits"),
    [
        ("none", 32),
        ("bf16", 16),
        ("fp16", 16),
        ("int8", 8 + 32 / 256),
        ("int4", 4 + 32 / 128),
        ("sign", 1 + 32 / 512),
        ("topk", 0.01 * (24 + 32 / 256)),
        ("topk(density=0.25)", 1 + 0.25 * (8 + 32 / 256)),
        ("randomk", 0.32),
    ],
)
def test_bytes_are_those_of_the_formula(word: str, bits: float) -> None:
    n = 1 << 20
    assert codec_of(word).capacity_bytes(n, torch.float32) == pytest.approx(n * bits / 8, rel=0.003)


# ---------------------------------------------------------------- how they are written


@pytest.mark.parametrize(
    ("written", "word"),
    [
        ("int8", "int8"),
        ({"int8": {}}, "int8"),
        ({"int8": None}, "int8"),
        ({"topk": {"density": 0.01}}, "topk"),
        ({"topk": {"density": 0.002}}, "topk(density=0.002)"),
        ("topk(density=0.002)", "topk(density=0.002)"),
        ({"int4": {"error_feedback": True}}, "int4(error_feedback=true)"),
        ({"topk": {"density": 1}}, "topk(density=1.0)"),
    ],
)
def test_a_codec_is_one_word_in_a_record(written: object, word: str) -> None:
    assert one_word(written) == word  # type: ignore[arg-type]
    assert one_word(word) == word
    assert codec_of(word) is codec_of(one_word(word))


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("int9", "Write compression='int8'"),
        ({"topk": {"densitiy": 0.1}}, "no option 'densitiy'; allowed is density"),
        ({"topk": {"density": 0}}, "for 'density' is a number from 1e-6 to 1"),
        ({"topk": {"density": 1.5}}, "the kept fraction"),
        ({"topk": {"density": True}}, "'density': True"),
        ({"topk": {"density": math.nan}}, "'density': nan"),
        ({"bf16": {"density": 0.1}}, "allowed is none. Write compression='bf16'"),
        ({"int8": {"error_feedback": 1}}, "true or false"),
        ({"int8": {}, "int4": {}}, "one codec"),
        (3, "compression=3"),
        ({"topk": 0.1}, "one codec"),
        ("topk(density=", "is not valid"),
        ("int8)", "is not valid"),
        ({"topk": {1: 2}}, "one codec"),
        ({"topk": {"density": 1e-9}}, "1e-6"),
    ],
)
def test_what_is_no_codec_is_told_with_the_nearest_right_one(written: object, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        one_word(written)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["topk", "randomk"])
def test_a_density_that_warms_up_falls_by_the_same_factor_every_epoch(name: str) -> None:
    codec = codec_of(f"{name}(density=0.001, warmup_epochs=4)")
    densities = [codec.at_epoch(epoch).density for epoch in range(6)]  # type: ignore[attr-defined]
    assert densities == pytest.approx([0.25, 0.25 * 0.004**0.25, 0.25 * 0.004**0.5, 0.25 * 0.004**0.75, 0.001, 0.001])
    assert codec.at_epoch(2) is codec.at_epoch(2) and codec.at_epoch(4) is codec
    assert codec_of(f"{name}(density=0.5, warmup_epochs=2)").at_epoch(0).density == 0.5  # type: ignore[attr-defined]


def test_each_worker_may_have_a_codec_of_its_own() -> None:
    config = HetConfig(compression=["none", {"topk": {"density": 0.1}}])  # type: ignore[arg-type]
    assert config.compression == config.codecs == ("none", "topk(density=0.1)")
    assert config.codecs_for(2) == dataclasses.replace(config, seed=1).codecs_for(2) == ("none", "topk(density=0.1)")
    assert HetConfig(compression="int8").codecs_for(3) == ("int8",) * 3
    for wrong, said in ((["none", "int9"], "compression='int9'"), ([], "one codec, or one for each worker")):
        with pytest.raises(ConfigError, match=said):
            HetConfig(compression=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one codec, or one for each of the run's 3 workers"):
        config.codecs_for(3)


@pytest.mark.parametrize("word", [*CODECS, *AUTO_CODECS])
def test_an_entry_of_the_table_leads_to_the_codec_of_that_name_with_its_options(word: str) -> None:
    codec = codec_of(word)
    assert codec.name == word.partition("(")[0]
    assert codec.options == options_of(word) and type(codec.options) is CODECS[codec.name].options
