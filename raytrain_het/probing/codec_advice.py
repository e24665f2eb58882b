"""What each codec would do to a fleet's steps, before a run: for who has to choose one, or wants to know why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from raytrain_het.balance.codec_choice import MIN_GAIN, Fleet, Prediction, choose, predict

_SLOWEST, _FASTEST = 1e3, 1e12
"""Bytes per second: a break-even is looked for between them."""


@dataclass(frozen=True)
class CodecAdvice:
    """Of a fleet whose links are not shared with anything else, and where nothing passes beside the backward pass."""

    fleet: Fleet
    by_codec: dict[str, Prediction]
    """If all workers used it."""
    break_even: dict[str, float | None]
    """By codec: the bandwidth, bytes per second, of the slowest link below which it makes steps shorter, if all links
    were as much slower or faster; None where it never does."""
    chosen: tuple[str, ...]
    """By worker what ``auto`` would choose."""
    step_s: float
    """With that."""
    why: str


def codec_advice(fleet: Fleet, codecs: Sequence[str], error: float) -> CodecAdvice:
    """Predict every codec, and choose as ``auto`` does.

    Args:
        fleet: the workers, with costs of these codecs.
        codecs: what loses nothing first.
        error: how much ``auto`` may lose of a message.
    """
    size, plain = len(fleet.costs), codecs[0]
    by_codec = {word: predict(fleet, [word] * size) for word in codecs}
    chosen = choose(fleet, codecs, error)
    step_s, plain_s = predict(fleet, chosen).step_s, by_codec[plain].step_s
    if size < 2:
        why = "a single worker sends nothing"
    elif fleet.num_elements == 0:
        why = "every parameter is too small to be worth it, and travels as it is"
    elif set(chosen) == {plain}:
        best = min(by_codec, key=lambda word: by_codec[word].step_s)
        why = (
            f"none that may be used makes steps shorter by {MIN_GAIN:.0%}; the best of all, {best}, would by "
            f"{1 - by_codec[best].step_s / plain_s:.0%}"
        )
    else:
        factor = plain_s / step_s
        why = f"steps become {factor:.3g} times as short: {1000 * step_s:.4g} ms instead of {1000 * plain_s:.4g}"
    break_even = {word: _break_even(fleet, plain, word) for word in codecs[1:]}
    return CodecAdvice(fleet, by_codec, break_even, chosen, step_s, why)


def _break_even(fleet: Fleet, plain: str, word: str) -> float | None:
    size, slowest = len(fleet.costs), max(fleet.byte_s)
    if size < 2:
        return None

    def pays(bandwidth: float) -> bool:
        ratios = [byte_s / slowest if slowest > 0 else 1.0 for byte_s in fleet.byte_s]
        scaled = dataclasses.replace(fleet, byte_s=[ratio / bandwidth for ratio in ratios])
        return predict(scaled, [word] * size).step_s < predict(scaled, [plain] * size).step_s

    low, high = _SLOWEST, _FASTEST
    if not pays(low):
        return None
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low
