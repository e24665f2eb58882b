"""Which codec each worker had best use, from what codecs cost and what links carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytrain_het.allocation.owner_shards import owner_parts
from raytrain_het.codec_options import used_together

MIN_GAIN = 0.05
"""Compression is worth it if steps become shorter by this part."""
ALIKE = 0.01
"""Of choices that promise the same step but for this part, that which loses least is taken."""


@dataclass(frozen=True)
class CodecCost:
    """What one codec takes on one worker, by element of the gradient."""

    num_bytes: float
    """On the wire."""
    encode_s: float
    decode_s: float
    error: float
    """``|x - decoded(x)| / |x|`` of one message; what error feedback sends later counts as lost here."""


Costs = Mapping[str, CodecCost]
"""By codec."""


@dataclass(frozen=True)
class Fleet:
    """What a choice is made for. Sequences are by worker."""

    num_elements: int
    """Of the gradient, without those that are never compressed."""
    costs: Sequence[Costs]
    byte_s: Sequence[float]
    """Seconds that a worker's link takes for a byte, one way; both ways are used at once."""
    speeds: Sequence[float]
    compute_s: float = 0.0
    """A step without its messages."""
    hidden: float = 0.0
    """The part of the messages' time that costs nothing, because it passes beside the backward pass; no more than
    ``compute_s`` can."""


@dataclass(frozen=True)
class Prediction:
    """Of a step with one choice. Seconds."""

    step_s: float
    exchange_s: float
    """The messages, of whoever takes longest for them."""
    num_bytes: list[float]
    """That each worker sends."""


def predict(fleet: Fleet, choice: Sequence[str]) -> Prediction:
    """A step's time if each worker encodes by this codec.

    Worker ``i`` of ``N``, which owns the part ``o_i`` of ``n`` elements, sends ``(1 - o_i) n`` of its own, encodes the
    means of ``o_i n`` and sends them ``N - 1`` times; it receives ``o_i n`` from each other one, and the means of all
    parts. With ``e_i`` the bytes of an element in its codec and ``l_i`` the seconds of a byte,

        ``wire_i = l_i n max((1 + (N - 2) o_i) e_i, sum_{j != i} (o_i + o_j) e_j)``,

    and encoding and decoding take their time before and after. The slowest worker counts:
    ``step = compute + max((1 - hidden) T, T - compute)`` with ``T = max_i (wire_i + coding_i)``.

    Args:
        fleet: the workers.
        choice: a codec for each.
    """
    size, n = len(choice), fleet.num_elements
    own = [costs[word] for costs, word in zip(fleet.costs, choice, strict=True)]
    parts = _owners(fleet, own)
    slowest, sent = 0.0, []
    for i, (costs, part, byte_s) in enumerate(zip(fleet.costs, parts, fleet.byte_s, strict=True)):
        out = (1 + (size - 2) * part) * own[i].num_bytes if size > 1 else 0.0
        into = sum((part + parts[j]) * own[j].num_bytes for j in range(size) if j != i)
        there = sum((part + parts[j]) * costs[choice[j]].decode_s for j in range(size) if j != i)
        coding_s = n * (own[i].encode_s + there + part * own[i].decode_s)
        slowest = max(slowest, byte_s * n * max(out, into) + coding_s)
        sent.append(n * out)
    return Prediction(fleet.compute_s + max((1 - fleet.hidden) * slowest, slowest - fleet.compute_s), slowest, sent)


def choose(fleet: Fleet, allowed: Sequence[str], error: float) -> tuple[str, ...]:
    """By worker the codec with which steps are shortest; of those that are alike in that, the one that loses least.

    The best single codec for all comes first. Then each worker in turn takes the codec of least error that leaves the
    step as short (but for 1 %), or a better one, until nobody changes. Codecs that all use together stand against that.

    Args:
        fleet: the workers; each has costs of all codecs that are allowed.
        allowed: codecs, the one that loses nothing first.
        error: codecs that lose more on any worker are left out, see :attr:`CodecCost.error`.

    Returns:
        A codec by worker: ``allowed[0]`` for all where others do not make steps shorter by 5 %.
    """
    size = len(fleet.costs)
    within = [word for word in allowed if all(costs[word].error <= error for costs in fleet.costs)] or [allowed[0]]
    plain = (allowed[0],) * size
    apart = [word for word in within if not used_together(word)] or [allowed[0]]
    best = min(((word,) * size for word in apart), key=lambda choice: predict(fleet, choice).step_s)
    for _ in range(size):
        before = best
        for i in range(size):
            best = _mildest(fleet, [(*best[:i], word, *best[i + 1 :]) for word in apart], [i])
        if best == before:
            break
    best = _mildest(fleet, [best, *((word,) * size for word in within if used_together(word))], range(size))
    return best if predict(fleet, best).step_s < (1 - MIN_GAIN) * predict(fleet, plain).step_s else plain


def _mildest(fleet: Fleet, choices: Sequence[tuple[str, ...]], slots: Sequence[int]) -> tuple[str, ...]:
    """Of those with which steps are as short as with any, that with which these workers lose least."""
    took = {choice: predict(fleet, choice).step_s for choice in choices}
    limit_s = (1 + ALIKE) * min(took.values())
    lost = {choice: max(fleet.costs[i][choice[i]].error for i in slots) for choice in choices}
    return min((c for c in choices if took[c] <= limit_s), key=lambda c: (lost[c], took[c]))


def _owners(fleet: Fleet, own: Sequence[CodecCost]) -> list[float]:
    """As a table will cut the gradient that has been issued for such links."""
    links_s = [fleet.num_elements * cost.num_bytes * s for cost, s in zip(own, fleet.byte_s, strict=True)]
    return owner_parts(fleet.speeds, links_s if min(links_s) > 0 else ())
