"""Predict, before a run, how long a fleet's steps are with each codec, and say which codecs ``auto`` would choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from raytrain_het.balance.codec_choice import MIN_GAIN, Fleet, Prediction, choose, predict

_SLOWEST, _FASTEST = 1e3, 1e12
"""Bytes per second: the break-even bandwidth is searched between these."""


@dataclass(frozen=True)
class CodecAdvice:
    """The predictions for a fleet. They assume that nothing else uses its links, and that no message overlaps with the
    backward pass."""

    fleet: Fleet
    by_codec: dict[str, Prediction]
    """By codec: the prediction, if all workers use it."""
    break_even: dict[str, float | None]
    """By codec: the codec makes steps shorter if the slowest link has less than this bandwidth, in bytes per second,
    and all other links are slower or faster by the same factor. None if it never does."""
    chosen: tuple[str, ...]
    """By worker: the codec that ``auto`` would choose."""
    step_s: float
    """Seconds of a step with the chosen codecs."""
    why: str


def codec_advice(fleet: Fleet, codecs: Sequence[str], error: float) -> CodecAdvice:
    """Predict every codec, and choose as ``auto`` does.

    Args:
        fleet: The workers, with the costs of these codecs.
        codecs: The codecs, the one that loses nothing first.
        error: How much of a message ``auto`` may lose.
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
