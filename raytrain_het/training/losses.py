"""What a loss is of its samples: a mean, a sum, or neither, as far as autograd's graph shows.

Workers' gradients are put together by the number of their samples. That is the gradient of the whole batch where each
worker's loss is the mean over its samples; where it is a sum, a mean over something else (tokens), or a function of
such a mean (a root), it is not. The graph is looked at from the loss down to the first reduction over samples: some
twenty nodes, ten microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raytrain_het.errors import ConfigError
from raytrain_het.training.unsupported import refuse

LOSSES = ("mean", "sum", "local")
_PASS_THROUGH = (
    "Neg", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "ToCopy", "Alias", "Clone", "Select", "Expand",
)  # fmt: skip
_NOT_LINEAR = ("Sqrt", "Log", "Log1p", "Log2", "Exp", "Expm1", "Pow", "Reciprocal", "Rsqrt", "Sigmoid", "Tanh")
_BENT_REDUCTIONS = (
    "Std", "StdMean", "Var", "VarMean", "Norm", "LinalgVectorNorm", "LinalgMatrixNorm", "Logsumexp", "Max", "Amax",
    "Min", "Amin", "Median", "Nanmedian", "Prod",
)  # fmt: skip
"""Reductions that are no means."""
_TAKES_DATA = ("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Linear", "Mv", "Dot", "Addmv")
"""Operations of a model by which samples come in: one of their inputs needs no gradient."""
_MOST_NODES = 400


@dataclass(frozen=True)
class Reduction:
    """One reduction over samples that a loss consists of."""

    kind: str
    """mean; sum; quotient, of a sum and a number; or bent, a function that is not linear in a reduction."""
    count: float | None
    """What a mean is over, or a sum was divided by."""
    name: str
    """As autograd calls it."""
    exact: bool = True
    """Whether the count was not rounded."""
    size: int = 0
    """Of a sum: how many numbers were added up."""
    divisor: float | None = None
    """Of a quotient: what stands below the line, where nothing is multiplied."""
    weighted: bool = False
    """Whether classes have weights, or some of the targets were left out."""


def reductions(root: Any, scale: float = 1.0) -> list[Reduction]:
    """Those that a loss's node leads to by sums, factors and views; none where the graph does not tell.

    Args:
        root: the loss's ``grad_fn``.
        scale: by which a loss scaler has multiplied it.
    """
    found: list[Reduction] = []
    stack: list[tuple[Any, float | None, float | None, bool]] = [(root, scale, 1.0, False)]
    divided: set[Any] = set()
    """Nodes below a division."""
    for _ in range(64):
        if not stack:
            break
        node, divided_by, divisor, bent = stack.pop()
        if node is None:
            continue
        name = node.name().partition("Backward")[0]
        children = [child for child, _ in node.next_functions]
        if name == "Div" or node in divided:
            divided.update(children)
        if name in ("Add", "Sub", "Rsub") or name in _PASS_THROUGH:
            stack += [(child, divided_by, divisor, bent) for child in children]
        elif name in ("Mul", "Div"):
            both = all(child is not None for child in children)
            if both:  # A product or a quotient of two things that are trained.
                quotient = bent or name == "Div" and _is_of_data(children[1])
                stack += [(child, None, None, quotient) for child in children]
                continue
            factor = _scalar(node, "_saved_other" if children[0] is not None else "_saved_self")
            known = divided_by is not None and factor is not None and factor != 0
            part = (divided_by * factor if name == "Div" else divided_by / factor) if known else None  # type: ignore
            if name == "Div":
                divisor = divisor * factor if divisor is not None and factor is not None else None
            elif factor != scale:
                divisor = None
            stack += [(child, part, divisor, bent) for child in children]
        elif name in _NOT_LINEAR and len(children) == 1:
            stack.append((children[0], None, None, True))
        elif (reduction := _reduction(node, name, children)) is not None:
            if isinstance(reduction, list):
                stack += [(child, None, None, bent) for child in reduction]
            elif bent:
                found.append(Reduction("bent", None, name))
            elif reduction.kind == "sum" and divided_by is None:
                continue  # By what it is divided is not known.
            elif reduction.kind == "sum" and (divided_by != 1 or node in divided):
                found.append(Reduction("quotient", divided_by, name, size=reduction.size, divisor=divisor))
            else:
                found.append(reduction)
    return found


def _reduction(node: Any, name: str, children: list[Any]) -> Reduction | list[Any] | None:
    """What a node reduces; the nodes below it where it puts several losses together."""
    if hasattr(node, "_saved_reduction"):
        if node._saved_reduction not in (1, 2):
            return None
        count, exact, weighted = _count(node)
        if node._saved_reduction == 2:
            return Reduction("sum", None, name, size=node._saved_self.numel())
        return Reduction("mean", count, name, exact, weighted=weighted)
    if name in _BENT_REDUCTIONS and _is_of_data(children[0]):
        return Reduction("bent", None, name)
    if name not in ("Sum", "Mean"):
        return None
    child = children[0]
    if child is not None and child.name().partition("Backward")[0] in ("Stack", "Cat"):
        return [below for below, _ in child.next_functions]
    if not _is_of_data(child):
        return None  # A penalty on parameters, which is the same on all.
    size = math.prod(node._saved_self_sym_sizes)
    if name == "Sum":
        return Reduction("sum", None, name, size=size)
    return Reduction("mean", float(size), name)


def _count(node: Any) -> tuple[float | None, bool, bool]:
    """What a loss of torch's is the mean over; whether that is exact, and whether it differs from the targets'
    number."""
    total = getattr(node, "_saved_total_weight", None)
    if total is not None:
        targets = node._saved_target.numel()
        value = float(total)
        weighted = node._saved_weight is not None or value != targets
        return value, total.dtype in (torch.float32, torch.float64), weighted
    return float(node._saved_self.numel()), True, False


def _scalar(node: Any, name: str) -> float | None:
    value = getattr(node, name, None)
    return float(value) if isinstance(value, torch.Tensor) and value.numel() == 1 else None


def _is_of_data(node: Any) -> bool:
    """Whether samples come into what a node stands for."""
    return any(
        name.startswith("Embedding") or name in _TAKES_DATA and any(child is None for child in children)
        for name, children in _below(node)
    )


def _below(node: Any) -> Iterator[tuple[str, list[Any]]]:
    seen: set[Any] = set()
    stack = [node]
    while stack and len(seen) < _MOST_NODES:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        children = [child for child, _ in node.next_functions]
        yield node.name().partition("Backward")[0], children
        stack += children


class LossCheck:
    """Compares what a loss is with what the program says that it is, at each pass.

    Args:
        loss: ``mean`` over samples, or over what ``weight`` counts; ``sum`` over samples; ``local``, a function of a
        pass's
            own samples that is not looked at.
        weighed: whether the program says what counts.
    """

    def __init__(self, loss: str, *, weighed: bool) -> None:
        self._loss, self._weighed = loss, weighed
        self._ratios: tuple[float, ...] | None = None

    @property
    def is_local(self) -> bool:
        """Whether it is said to be a function of a pass's own samples."""
        return self._loss == "local"

    @property
    def is_sum(self) -> bool:
        """Whether it is said to be a sum over samples."""
        return self._loss == "sum"

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of each mean that the loss consists of: over how many numbers it is for each unit of weight; of a sum, what
        it is divided by. The same on all workers and in all passes, or their gradients do not make the whole
        batch's."""
        return self._ratios or ()

    def look(self, roots: Sequence[Any], weight: float, scale: float = 1.0) -> Exception | None:
        """Look at a pass before it is done.

        Args:
            roots: what ``backward()`` was called on.
            weight: of the pass: its samples, or what the program says.
            scale: by which a loss scaler has multiplied the loss.

        Returns:
            An error, if the loss is none of what the program says.
        """
        if self._loss == "local" or weight <= 0:
            return None
        found = [r for root in roots for r in reductions(getattr(root, "grad_fn", None), scale)]
        for r in found:
            if r.kind == "bent":
                return refuse("loss that is no mean", f"this one is a function of a {r.name.lower()}")
            if r.kind not in (self._loss, "quotient"):
                return _other_kind(r, self._loss)
            if r.divisor is not None and self._loss == "mean" and not self._weighed and not _divides(r, weight):
                return _by_a_constant(r, weight)
            if r.kind == "mean" and r.weighted and not self._weighed:
                return _weighted(r, weight)
        per = weight if self._loss == "mean" else 1.0
        ratios = tuple(r.count / per for r in found if r.count is not None and r.exact)
        if self._ratios is None or len(ratios) != len(self._ratios):
            self._ratios = ratios
        elif any(not math.isclose(a, b, rel_tol=1e-6) for a, b in zip(ratios, self._ratios, strict=True)):
            return _other_count(ratios, self._ratios, self._loss, self._weighed)
        return None


def _divides(found: Reduction, samples: float) -> bool:
    """Whether a sum over a pass is divided by its samples, or by its numbers of some dimensions."""
    each = (found.divisor or 0.0) / samples
    return each >= 1 and each == int(each) and found.size / samples % each == 0


def _by_a_constant(found: Reduction, samples: float) -> ConfigError:
    return ConfigError(
        f"the loss is a sum ({found.name}) over {found.size} numbers of {samples:g} samples, divided by "
        f"{found.divisor:g}: that is neither their number nor that of the samples. If it is a constant, write "
        "prepare_data_loader(..., loss='sum'); if it counts something in the batch, write weight=lambda batch: with "
        "what it counts."
    )


def _other_kind(found: Reduction, said: str) -> ConfigError:
    return ConfigError(
        f"the loss is a {found.kind} over samples ({found.name}), and prepare_data_loader(loss={said!r}) says that "
        f"it is a {said}: workers' gradients would be put together wrongly. Write prepare_data_loader(..., "
        f"loss={found.kind!r}), or make it a {said}."
    )


def _weighted(found: Reduction, weight: float) -> ConfigError:
    return ConfigError(
        f"the loss ({found.name}) is a mean over a weight of {found.count:g}, by class weights or targets that are "
        f"left out, and not over the {weight:g} samples of the pass. Say what counts: prepare_data_loader(..., "
        "weight=lambda batch: float((batch[1] != -100).sum())), or with class weights, weight=lambda batch: "
        "float(class_weights[batch[1]].sum())."
    )


def _other_count(now: Sequence[float], before: Sequence[float], loss: str, weighed: bool) -> ConfigError:
    a, b = next((a, b) for a, b in zip(now, before, strict=True) if a != b)
    if loss == "sum":
        return ConfigError(
            f"loss='sum': the sum is divided by {a:g} in this pass, and was by {b:g} before: it is no sum over "
            "samples. Divide it by a constant, or by the number of samples and write loss='mean'."
        )
    unit = "unit of prepare_data_loader(weight=...)" if weighed else "sample"
    return ConfigError(
        f"the loss is a mean over {a:g} numbers for each {unit} in this pass, and was one over {b:g} before: it is "
        "no mean over samples. Say what it is a mean over, for example prepare_data_loader(..., weight=lambda batch: "
        "float(batch['mask'].sum())), or make it a mean over samples."
    )


def checked_loss(loss: Any, *, weighed: bool) -> str:
    """``prepare_data_loader(loss=)``.

    Raises:
        ConfigError: it is none of :data:`LOSSES`, or it is a sum and ``weight`` is given too.
    """
    if loss not in LOSSES:
        raise ConfigError(f"loss={loss!r} is not valid: allowed are 'mean', 'sum' and 'local'. The default is 'mean'.")
    if loss == "sum" and weighed:
        raise ConfigError(
            "loss='sum' and weight= were both given: a sum needs no weight. Leave weight= out, or write loss='mean'."
        )
    return str(loss)
