"""Whether replicas are the same: pure comparison of what members have said of theirs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raytrain_het.membership.message_parts import ReplicaAudit
from raytrain_het.membership.protocol import Audit

ROUNDING = 1e-5
"""Unlike machines may differ by so much from rounding alone, relative to a tensor's largest sample."""
PART_OF_UPDATES = 0.02
"""Unlike machines may differ by such a part of what updates have changed. Another gradient makes a difference of the
size of the update."""


def difference(audits: Mapping[int, ReplicaAudit]) -> str | None:
    """The first thing that is not the same on all members, in words; None where everything is.

    Args:
        audits: by slot, of one step and one part of the replica.
    """
    return _other_number(audits) or _other_tensor(audits)


def _other_number(audits: Mapping[int, ReplicaAudit]) -> str | None:
    unlike = len({a.kind for a in audits.values()}) > 1
    for name in _names(dict(a.numbers) for a in audits.values()):
        values = {slot: dict(a.numbers).get(name, "missing") for slot, a in audits.items()}
        first = next(iter(values.values()))
        if all(v == first or v != v and first != first or unlike and _close(v, first) for v in values.values()):
            continue
        listed = ", ".join(f"{value!r} on worker {slot}" for slot, value in sorted(values.items()))
        return f"{name} is {listed}"
    return None


def _close(a: Any, b: Any) -> bool:
    return isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-9)


def _other_tensor(audits: Mapping[int, ReplicaAudit]) -> str | None:
    tensors = {slot: dict(a.tensors) for slot, a in audits.items()}
    kinds = {slot: a.kind for slot, a in audits.items()}
    for name in _names(tensors.values()):
        missing = [slot for slot in audits if name not in tensors[slot]]
        if missing:
            return f"{name} is not there on {_workers(missing)}"
        for kind in set(kinds.values()):
            alike = {slot: tensors[slot][name] for slot in audits if kinds[slot] == kind}
            if len(set(alike.values())) > 1:
                return _who(name, alike)
        if len(set(kinds.values())) > 1 and (far := _far_apart(name, audits)):
            return far
    return None


def _far_apart(name: str, audits: Mapping[int, ReplicaAudit]) -> str | None:
    """Of members of unlike kinds: whether they differ by more than rounding."""
    sampled = {slot: a.samples[name] for slot, a in audits.items() if name in a.samples}
    slots = sorted(sampled)
    for other in slots[1:]:
        (one, moved), (two, moved_too) = sampled[slots[0]], sampled[other]
        largest = max((abs(v) for v in (*one, *two) if math.isfinite(v)), default=0.0)
        update = max(moved, moved_too) if moved is not None and moved_too is not None else largest
        bound = PART_OF_UPDATES * update + ROUNDING * largest
        off = max((abs(a - b) for a, b in zip(one, two, strict=False) if a != b and not math.isnan(a - b)), default=0.0)
        if len(one) != len(two) or any(map(math.isnan, one)) != any(map(math.isnan, two)) or off > bound:
            return (
                f"{name} of worker {other} is off by {off:.3g} from worker {slots[0]}'s; rounding explains {bound:.3g}"
            )
    return None


def _who(name: str, digests: Mapping[int, Any]) -> str:
    usual, count = Counter(digests.values()).most_common(1)[0]
    others = [slot for slot, digest in sorted(digests.items()) if digest != usual]
    same = [slot for slot, digest in sorted(digests.items()) if digest == usual]
    if count == 1:
        return f"{name} is another one on each of {_workers(sorted(digests))}"
    return f"{name} of {_workers(others)} is not that of {_workers(same)}"


def _workers(slots: list[int]) -> str:
    if len(slots) == 1:
        return f"worker {slots[0]}"
    return f"workers {', '.join(map(str, slots[:-1]))} and {slots[-1]}"


def _names(named: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for one in named for name in one))


def message(step: int, what: str) -> str:
    """What the run fails with."""
    return (
        f"replicas differ: after step {step} {what}. Every worker must make the same updates: between backward() and "
        "the next batch, use only what is the same on all of them (p.grad after backward(), the model, the epoch), "
        "and not a worker's own loss, samples or random numbers. HetConfig(check='every_step') finds the first step "
        "in which they differ."
    )


Terms = Sequence[Sequence[float]]
"""What a loss consists of. For each mean: over how many numbers it is, in all and for each unit of weight. For
constants by which means are multiplied: 0 and their norm."""


def agree(one: Terms, other: Terms) -> bool:
    """Whether two passes' losses are means over as many numbers for each sample.

    If one has more terms than the other (a loop makes some for each sample), each term must have one like it in the
    other. Nothing is known of a loss without terms.
    """
    if len(one) == len(other):
        return all(_near(a[-1], b[-1]) for a, b in zip(one, other, strict=True))
    if not one or not other:
        return True
    return all(any(_near(a[-1], b[-1]) for b in there) for here, there in ((one, other), (other, one)) for a in here)


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4)


def message_of_losses(what: str) -> str:
    """What the run fails with if workers' losses are means over other things."""
    return (
        f"workers' losses differ: {what}: their gradients do not make that of the whole batch. Make the loss a mean "
        "over samples; or say what it is a mean over, for example prepare_data_loader(..., weight=lambda batch: "
        "float(batch['mask'].sum())); or write loss='local'."
    )


class AuditCollector:
    """Collects audits of one step until all members have given theirs, and claims that each member makes once."""

    def __init__(self) -> None:
        self._claims: dict[str, tuple[int, Any]] = {}
        self._open: dict[tuple[int, int, int], dict[int, ReplicaAudit]] = {}

    def add(self, slot: int, said: Audit, expected: Iterable[int]) -> str | None:
        """A member's audit. Returns what differs, once all expected slots have given theirs."""
        key = (said.generation, said.step, said.part)
        audits = self._open.setdefault(key, {})
        audits[slot] = said.audit
        if not set(expected) <= audits.keys():
            return None
        self._open = {k: v for k, v in self._open.items() if k > key}
        return difference(audits)

    def claim(self, slot: int, name: str, value: Any) -> str | None:
        """Something that each member says once, and that must be the same on all. Returns what differs."""
        first, other = self._claims.setdefault(name, (slot, value))
        self._claims = dict(list(self._claims.items())[-8:])
        lists = isinstance(value, list) and isinstance(other, list)
        if agree(value, other) if lists else value == other:
            return None
        return f"{name} is {other!r} on worker {first}, {value!r} on worker {slot}"
