"""Which codec each worker had best use, from what codecs cost and what links carry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytrain_het.balance.owner_shards import owner_parts
from raytrain_het.codec_options import used_together

MIN_GAIN = 0.05
"""Compression is worth it if steps become shorter by this part."""
ALIKE = 0.01
"""Of choices that promise the same step but for this part, that which loses least is taken."""


INSIDE_BYTE_S = 1.5e-9
"""What a byte takes that goes from one worker to another on the same machine, to be sent, received and added; about,
and much more than a slow link's part of it where anything depends on that."""


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
    hosts: Sequence[str] = ()
    """The machine that each is on, with a link in common; empty: each on one of its own."""
    byte_cpu_s: Sequence[float] = ()
    """CPU time that each takes for a byte that it sends or receives, twice that; empty: nothing."""
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
    cpu_s: float = 0.0
    """What of ``exchange_s`` is work, and not waiting for a link."""


def predict(fleet: Fleet, choice: Sequence[str], *, by_machine: bool = False) -> Prediction:
    """A step's time if each worker encodes by this codec.

    Worker ``i`` of ``N``, which owns the part ``o_i`` of ``n`` elements, sends ``(1 - o_i) n`` of its own, encodes the
    means of ``o_i n`` and sends them ``N - 1`` times; it receives ``o_i n`` from each other one, and the means of all
    parts. With ``e_i`` the bytes of an element in its codec and ``l_i`` the seconds of a byte,

        ``wire_i = l_i n max((1 + (N - 2) o_i) e_i, sum_{j != i} (o_i + o_j) e_j)``,

    and encoding and decoding take their time before and after, as does the system's part in sending and receiving. The
    slowest worker counts:
    ``step = compute + max((1 - hidden) T, T - compute)`` with ``T = max_i (wire_i + coding_i)``. What goes from one
    worker to another on the same machine does not count.

    Args:
        fleet: the workers.
        choice: a codec for each.
        by_machine: whether a machine's gradients are added up there, and one worker sends them on: it has the link to
            itself then, and takes 4 bytes of each element from each other one, and gives them back.
    """
    if by_machine:
        return _predict_by_machine(fleet, choice)
    size, n = len(choice), fleet.num_elements
    own = [costs[word] for costs, word in zip(fleet.costs, choice, strict=True)]
    parts, hosts = _owners(fleet, own), fleet.hosts if len(set(fleet.hosts)) > 1 else range(size)
    slowest, cpu_s, sent = 0.0, 0.0, []
    of_byte = fleet.byte_cpu_s or [0.0] * size
    for i, (costs, part, byte_s) in enumerate(zip(fleet.costs, parts, fleet.byte_s, strict=True)):
        elsewhere = [j for j in range(size) if hosts[j] != hosts[i]]
        out = own[i].num_bytes * sum(part + parts[j] for j in elsewhere)
        into = sum((part + parts[j]) * own[j].num_bytes for j in elsewhere)
        there = sum((part + parts[j]) * costs[choice[j]].decode_s for j in range(size) if j != i)
        work_s = n * (own[i].encode_s + there + part * own[i].decode_s + of_byte[i] / 2 * (out + into))
        exchange_s = byte_s * n * max(out, into) + work_s
        if exchange_s >= slowest:
            slowest, cpu_s = exchange_s, work_s
        sent.append(n * out)
    return Prediction(_step_s(fleet, slowest), slowest, sent, cpu_s)


def _step_s(fleet: Fleet, exchange_s: float) -> float:
    return fleet.compute_s + max((1 - fleet.hidden) * exchange_s, exchange_s - fleet.compute_s)


def _predict_by_machine(fleet: Fleet, choice: Sequence[str]) -> Prediction:
    places = _machines(fleet)
    leaders = [workers[0] for workers in places]
    across = predict(_leaders(fleet), [choice[k] for k in leaders])
    most = max(map(len, places)) - 1
    inside_s = 2 * most * 4 * fleet.num_elements * INSIDE_BYTE_S
    exchange_s = across.exchange_s + inside_s
    sent = dict(zip(leaders, across.num_bytes, strict=True))
    num_bytes = [sent.get(k, 0.0) for k in range(len(choice))]
    return Prediction(_step_s(fleet, exchange_s), exchange_s, num_bytes, across.cpu_s + inside_s)


def _machines(fleet: Fleet) -> list[list[int]]:
    """By machine, its workers, the fastest first."""
    found: dict[str, list[int]] = {}
    for k in sorted(range(len(fleet.hosts)), key=lambda k: -fleet.speeds[k]):
        found.setdefault(fleet.hosts[k], []).append(k)
    return list(found.values())


def _leaders(fleet: Fleet) -> Fleet:
    places = _machines(fleet)
    first = [workers[0] for workers in places]
    return dataclasses.replace(
        fleet,
        costs=[_worst(fleet, workers) for workers in places],
        hosts=(),
        speeds=[sum(fleet.speeds[k] for k in workers) for workers in places],
        byte_s=[fleet.byte_s[workers[0]] / len(workers) for workers in places],
        byte_cpu_s=[fleet.byte_cpu_s[k] for k in first] if fleet.byte_cpu_s else (),
    )


def _worst(fleet: Fleet, workers: Sequence[int]) -> Costs:
    """The first one's; the errors are those of whoever loses most: any of them may be the one that encodes."""
    return {
        word: dataclasses.replace(cost, error=max(fleet.costs[k][word].error for k in workers))
        for word, cost in fleet.costs[workers[0]].items()
    }


def choose_way(fleet: Fleet, allowed: Sequence[str], error: float) -> tuple[tuple[str, ...], bool]:
    """As :func:`choose`, and whether gradients had better be added up on each machine first: where that makes steps
    shorter by 5 %."""
    flat = choose(fleet, allowed, error)
    if not 1 < len(set(fleet.hosts)) < len(fleet.costs):
        return flat, False
    by_machine = choose_by_machine(fleet, allowed, error)
    shorter = predict(fleet, by_machine, by_machine=True).step_s < (1 - MIN_GAIN) * predict(fleet, flat).step_s
    return (by_machine, True) if shorter else (flat, False)


def choose_by_machine(fleet: Fleet, allowed: Sequence[str], error: float) -> tuple[str, ...]:
    """As :func:`choose`, where gradients are added up on each machine first: by worker its machine's codec."""
    chosen = zip(_machines(fleet), choose(_leaders(fleet), allowed, error), strict=True)
    by_worker = {k: word for workers, word in chosen for k in workers}
    return tuple(by_worker[k] for k in range(len(fleet.costs)))


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
