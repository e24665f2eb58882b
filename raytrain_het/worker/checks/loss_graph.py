"""What autograd's graph shows of a loss: the reductions over samples that it consists of, from the loss downwards.

A loss is a *linear* function of some reductions (sums, views, factors), and each of them is over samples or over
something that is the same on all workers (a penalty on parameters). What lies below a reduction are samples by
themselves, unless an operation puts them together (:meth:`LossGraph.mixing`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from raytrain_het.worker.checks.autograd_nodes import (
    BENT_REDUCTIONS,
    NOT_LINEAR,
    PASS_THROUGH,
    PRODUCTS,
    SUMS,
    added_up,
    children_of,
    dims_of,
    is_source,
    name_of,
    saved,
    scalar,
    shape_below,
    shape_of,
)
from raytrain_het.worker.checks.reduction import Reduction
from raytrain_het.worker.checks.sample_mixing import mixing

_MOST_NODES = 5000
"""Penalties on parameters are smaller than this."""
_LONGEST_LOSS = 2000
"""Nodes from a loss down to its reductions: a loop over samples makes some for each."""
SEVERAL_NUMBERS = "a backward() of several numbers"


@dataclass
class _Place:
    """A node on the way down, and what the loss is of it."""

    node: Any
    path: tuple[str, ...] = ()
    divided_by: float | None = 1.0
    """What the loss's part below here is divided by; None if that is not known."""
    divisor: float | None = 1.0
    """The same, where nothing is multiplied."""
    is_divided: bool = False
    by_samples: bool = False
    """Whether it is divided by a multiple of the samples."""
    bent: bool = False


class LossGraph:
    """One pass's loss.

    Args:
        root: the loss's ``grad_fn``.
        scale: by which a loss scaler has multiplied it, over what ``backward(gradient)`` multiplies it by.
        samples: of the pass, as far as known.
        known: by the names from the root down to a node, whether samples come into it; to look once only.
        numbers: how many ``backward()`` was called on; more than one are added up.

    Attributes:
        reductions: those that the root leads to; none where the graph does not tell.
        hidden: operations, as autograd calls them, below which nothing is known.
        constants: norms of what means over samples are multiplied by, feature by feature: it has to be the same for
            all passes.
    """

    def __init__(
        self,
        root: Any,
        scale: float = 1.0,
        *,
        samples: int = 0,
        known: dict[tuple[str, ...], bool] | None = None,
        numbers: int = 1,
    ) -> None:
        self._root, self._scale, self._samples = root, scale, samples
        self._known = {} if known is None else known
        self._linear: set[Any] = set()
        """Nodes of which the loss is a linear function, and its reductions."""
        self.hidden: list[str] = []
        self.constants: list[float] = []
        if numbers == 1:
            self.reductions = _loops_as_one(list(self._read()), samples)
        else:
            kind, divisor = ("sum", None) if scale == 1 else ("quotient", scale)
            self.reductions = [Reduction(kind, divisor, SEVERAL_NUMBERS, size=numbers, divisor=divisor)]

    # ---------------------------------------------------------------- down to the reductions

    def _read(self) -> Iterator[Reduction]:
        stack = [_Place(self._root, divided_by=self._scale)]
        for _ in range(_LONGEST_LOSS):
            if not stack:
                return
            at = stack.pop()
            if at.node is None:
                continue
            self._linear.add(at.node)
            name, children = name_of(at.node), children_of(at.node)
            below = [
                dataclasses.replace(at, node=child, path=(*at.path, name, str(k))) for k, child in enumerate(children)
            ]
            if name in ("Add", "Sub", "Rsub") or name in PASS_THROUGH:
                stack += below
            elif name in ("Mul", "Div"):
                stack += self._of_a_product(at, name, below)
            elif name in NOT_LINEAR:
                stack += [dataclasses.replace(b, divided_by=None, divisor=None, bent=True) for b in below]
            elif not any(self._comes_into(b.node, b.path) for b in below):
                continue  # A penalty on parameters, which is the same on all.
            elif (found := self._reduction(at.node, name, below)) is None:
                self.hidden.append(at.node.name())
            elif isinstance(found, list):
                stack += found
            elif at.bent or found.kind == "bent":
                yield Reduction("bent", None, name, size=found.size)
            elif found.kind == "mean":
                yield dataclasses.replace(found, factor=at.divided_by)
            elif at.divided_by is not None:  # Else it is not known by what the sum is divided.
                yield self._as_divided(found, at)
        if stack:
            self.hidden.append(f"some {_LONGEST_LOSS} operations")

    def _of_a_product(self, at: _Place, name: str, below: list[_Place]) -> list[_Place]:
        """What is multiplied, or divided, by a constant or by something else that is trained."""
        if len(below) == 2 and None not in (below[0].node, below[1].node):
            data = [self._comes_into(b.node, b.path) for b in below]
            bent = at.bent or all(data) or name == "Div" and data[1]
            return [dataclasses.replace(b, divided_by=None, divisor=None, bent=bent) for b in below]
        number = scalar(at.node, "_saved_other" if below[0].node is not None else "_saved_self")
        divided_by, divisor = at.divided_by, at.divisor
        if name == "Div":
            divided_by, divisor = _times(divided_by, number), _times(divisor, number)
        else:
            divided_by = divided_by / number if divided_by is not None and number else None
            divisor = divisor if number == self._scale else None
        by = number if name == "Div" or not number else 1 / number
        new = dataclasses.replace(
            at,
            divided_by=divided_by,
            divisor=divisor,
            is_divided=at.is_divided or name == "Div",
            by_samples=at.by_samples or self._is_multiple(by),
        )
        return [dataclasses.replace(new, node=b.node, path=b.path) for b in below]

    def _is_multiple(self, number: float | None) -> bool:
        """Whether a number is one of times the samples of the pass."""
        whole = round(number / self._samples) if number and self._samples and math.isfinite(number) else 0
        return whole >= 1 and math.isclose(number or 0.0, whole * self._samples, rel_tol=1e-6)

    def _as_divided(self, found: Reduction, at: _Place) -> Reduction:
        """A sum, and what it is divided by above it, and below it by a multiple of the samples."""
        within = found.factor or 1.0
        if at.divided_by == 1 and within == 1 and not at.is_divided:
            return dataclasses.replace(found, factor=None)
        divided_by, divisor = _times(at.divided_by, within), _times(at.divisor, within)
        by_samples = at.by_samples or within != 1
        return dataclasses.replace(
            found, kind="quotient", count=divided_by, factor=None, divisor=divisor, by_samples=by_samples
        )

    def _reduction(self, node: Any, name: str, below: list[_Place]) -> Reduction | list[_Place] | None:
        """What a node reduces; what is below it where it puts several losses together, or features of samples that were
        reduced before."""
        first = below[0].node
        if hasattr(node, "_saved_reduction"):
            return _of_torch(node, name)
        if name in BENT_REDUCTIONS:
            return Reduction("bent", None, name, size=math.prod(shape_below(node, 0) or ()))
        if name in PRODUCTS:
            return self._product(node, name, below)
        if name not in SUMS and name != "Mean":
            return None
        if name == "Trace":
            self._linear.update(children_of(node))  # Of a product of all samples with all, those of each with itself.
        shape = shape_below(node, 0) or ()
        size, factor = math.prod(shape), 1.0
        several = self._several(first, size)
        if several is not None:
            losses, as_they_are = several
            number = len(losses) if name == "Mean" else 1
            by = (_times(below[0].divided_by, number), _times(below[0].divisor, number))
            divided_by, divisor = by if as_they_are else (None, None)
            return [
                dataclasses.replace(
                    below[0], node=one, divided_by=divided_by, divisor=divisor, path=(*below[0].path, str(k))
                )
                for k, one in enumerate(losses)
            ]
        before = self._over_samples(first)
        if before is not None:  # Samples were put together before: what is reduced here are features.
            name, size = before
        elif name != "Mean":
            factor = self._divided_within(first)
        if name == "Mean":
            return Reduction("mean", float(size), name, size=size)
        return Reduction("sum", None, name, size=size, factor=factor)

    def _product(self, node: Any, name: str, below: list[_Place]) -> Reduction | list[_Place]:
        """A product on the way to a loss: over samples it is a sum of them."""
        data = [b for b in below if self._comes_into(b.node, b.path)]
        of_features = [self._over_samples(b.node) is not None for b in data]
        if any(of_features):
            if len(data) > 1:
                return Reduction("bent", None, name)
            self.constants += _norms([node])
            return [dataclasses.replace(b, divided_by=None, divisor=None) for b in below]
        over, n = added_up(node, name), self._samples
        flat = math.prod(shape_of(node) or (0,)) == 1
        if n > 1 and (over == n or flat and over and over % n == 0):
            weights = saved(node, "_saved_vec") if name == "Mv" else saved(node, "_saved_tensor")
            return Reduction("sum", None, name, size=over, factor=_same_for_all(weights, n))
        return [dataclasses.replace(b, divided_by=None, divisor=None) for b in below]

    def _several(self, node: Any, size: int) -> tuple[list[Any], bool] | None:
        """Several losses that were stacked, one number of each, and whether nothing was done with them since."""
        as_they_are = True
        for _ in range(8):
            if node is None:
                return None
            name = name_of(node)
            if name in ("Stack", "Cat"):
                losses = children_of(node)
                numbers = sum(math.prod(shape_below(node, k) or ()) for k in range(len(losses)))
                return (losses, as_they_are) if size in (len(losses), numbers) and numbers == len(losses) else None
            if name not in ("Mul", "Div", "Add", "Sub") or (node := self._only_child_of_data(node)) is None:
                return None
            as_they_are = False
        return None

    def _over_samples(self, node: Any) -> tuple[str, int] | None:
        """Sum or Mean, and over how many, if a node below, of which this is a linear function, reduces the dimension
        of samples."""
        passed: list[Any] = []
        for _ in range(12):
            if node is None:
                return None
            name = name_of(node)
            if name in ("Sum", "Mean") and hasattr(node, "_saved_dim"):
                sizes = shape_below(node, 0) or ()
                dims = dims_of(node, len(sizes))
                if not self._has_samples_dim(sizes, dims):
                    return None
                self._linear.update([*passed, node])
                self.constants += _norms(passed)
                return name, math.prod(sizes[d] for d in dims)
            passed.append(node)
            if name in PASS_THROUGH and len(children_of(node)) == 1:
                node = children_of(node)[0]
            elif name not in ("Mul", "Div", "Add", "Sub") or (node := self._only_child_of_data(node)) is None:
                return None
        return None

    def _has_samples_dim(self, sizes: tuple[int, ...], dims: set[int]) -> bool:
        """Whether samples are along one of the dimensions: the first, unless it is of another size."""
        n = self._samples
        if n <= 1 or sizes and sizes[0] == n:
            return 0 in dims
        return n > 2 and any(sizes[d] == n for d in dims)

    def _only_child_of_data(self, node: Any) -> Any:
        """Of a sum or product of something with what is the same on all: the something."""
        data = [child for child in children_of(node) if child is not None and self._looks(child)]
        return (
            data[0] if len(data) == 1 and not (name_of(node) == "Div" and data[0] is not children_of(node)[0]) else None
        )

    def _divided_within(self, node: Any) -> float:
        """By what each number was divided before a sum, if that is a multiple of the samples."""
        number = scalar(node, "_saved_other") if node is not None and name_of(node) in ("Mul", "Div") else None
        if not number or None not in children_of(node):
            return 1.0
        by = number if name_of(node) == "Div" else 1 / number
        return by if self._is_multiple(by) else 1.0

    def mixing(self) -> str | None:
        """An operation that puts samples together: see :func:`~raytrain_het.worker.checks.sample_mixing.mixing`."""
        return mixing(self._root, self._samples, self._linear)

    # ---------------------------------------------------------------- where samples come in

    def _comes_into(self, node: Any, path: tuple[str, ...]) -> bool:
        """Looked at once for all nodes that are reached by the same names."""
        if path not in self._known:
            if len(self._known) > 4096:
                self._known.clear()
            self._known[path] = self._looks(node)
        return self._known[path]

    def _looks(self, node: Any) -> bool:
        """Whether samples come into what a node stands for."""
        seen: set[Any] = set()
        stack = [node]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            if len(seen) > _MOST_NODES or is_source(node, self._samples):
                return True
            seen.add(node)
            stack += children_of(node)
        return False


def _loops_as_one(found: list[Reduction], samples: int) -> list[Reduction]:
    """Reductions that a loop has made of one sample each, as what they are together.

    With two or three samples a loop may be two or three losses of all samples: sizes that are multiples of them decide.
    """
    alike: dict[tuple[str, str], list[Reduction]] = defaultdict(list)
    for r in found:
        alike[r.kind, r.name].append(r)
    return [r for group in alike.values() for r in (_loop(group, samples) if samples > 1 else group)]


def _loop(group: list[Reduction], samples: int) -> list[Reduction]:
    first = group[0]
    whole = all(r.size % samples == 0 for r in group)
    if len(group) % samples or first.kind == "sum" or samples < 4 and whole:
        return group
    if first.kind != "mean" or any(r.factor != first.factor for r in group) or first.factor is None:
        return []  # Of each sample something of its own: nothing is known.
    size = sum(r.size for r in group)
    if first.factor == 1:
        return [Reduction("sum", None, first.name, size=size)]
    return [Reduction("quotient", first.factor, first.name, size=size, divisor=first.factor)]


def _of_torch(node: Any, name: str) -> Reduction | None:
    """A loss function of torch's."""
    if node._saved_reduction not in (1, 2):
        return None
    size = math.prod(shape_below(node, 0) or ())
    if node._saved_reduction == 2:
        return Reduction("sum", None, name, size=size)
    total = saved(node, "_saved_total_weight")
    if total is None:
        return Reduction("mean", float(size) if not hasattr(node, "_saved_total_weight") else None, name, size=size)
    target = saved(node, "_saved_target")
    targets = target.numel() if target is not None else 0
    exact = total.dtype in (torch.float32, torch.float64)
    weighted = saved(node, "_saved_weight") is not None or float(total) != targets
    return Reduction("mean", float(total), name, exact, size=targets, weighted=weighted)


def _norms(nodes: list[Any]) -> list[float]:
    """Of the constants, of more than one number, that nodes have kept."""
    keys = ("_saved_other", "_saved_self", "_saved_vec", "_saved_tensor", "_saved_mat2")
    kept = [t for node in nodes for key in keys if (t := saved(node, key)) is not None]
    return [float(t.double().norm()) for t in kept if t.numel() > 1 and not t.requires_grad]


def _same_for_all(weights: torch.Tensor | None, samples: int) -> float:
    """One over what each sample is multiplied by, if that is the same for all and a multiple of the samples."""
    if (
        weights is None
        or weights.requires_grad
        or weights.numel() != samples
        or not bool((weights == weights[0]).all())
    ):
        return 1.0
    by = 1 / float(weights[0]) if float(weights[0]) else 1.0
    return by if math.isclose(by, round(by), rel_tol=1e-6) and round(by) % samples == 0 else 1.0


def _times(number: float | None, factor: float | None) -> float | None:
    return None if number is None or factor is None else number * factor
