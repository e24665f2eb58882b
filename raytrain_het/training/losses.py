"""What a loss is of its samples: a mean, a sum, or neither, as far as autograd's graph shows.

Workers' gradients are put together by the number of their samples. That is the gradient of the whole batch where each
worker's loss is the mean over its samples; where it is a sum, a mean over something else (tokens), or a function of
such a mean (a root), it is not. The graph is looked at from the loss down to the first reduction over samples: some
twenty nodes, ten microseconds.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raytrain_het.errors import ConfigError
from raytrain_het.training.unsupported import refuse

logger = logging.getLogger("raytrain_het")

LOSSES = ("mean", "sum", "local")
_PASS_THROUGH = (
    "Neg", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "ToCopy", "Alias", "Clone", "Select", "Expand",
    "NanToNum",
)  # fmt: skip
_NOT_LINEAR = (
    "Sqrt", "Log", "Log1p", "Log2", "Exp", "Expm1", "Pow", "Reciprocal", "Rsqrt", "Sigmoid", "Tanh", "Abs", "Relu",
    "Clamp", "ClampMin", "ClampMax", "Maximum", "Minimum", "Softplus", "Atan",
)  # fmt: skip
_BENT_REDUCTIONS = (
    "Std", "StdMean", "Var", "VarMean", "Norm", "LinalgVectorNorm", "LinalgMatrixNorm", "Logsumexp", "Max", "Amax",
    "Min", "Amin", "Median", "Nanmedian", "Prod",
)  # fmt: skip
"""Reductions that are no means."""
_TAKES_DATA = ("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Linear", "Mv", "Dot", "Addmv")
"""Operations of a model by which samples come in: one of their inputs needs no gradient."""
_MOST_NODES = 400
"""Penalties on parameters are smaller than this."""


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
    factor: float | None = None
    """Of a mean: one over what it is multiplied by, where that is known."""
    size: int = 0
    """Of a sum: how many numbers were added up."""
    divisor: float | None = None
    """Of a quotient: what stands below the line, where nothing is multiplied."""
    weighted: bool = False
    """Whether classes have weights, or some of the targets were left out."""


def reductions(
    root: Any, scale: float = 1.0, *, samples: int = 0, known: dict[tuple[str, ...], bool] | None = None
) -> list[Reduction]:
    """Those that a loss's node leads to by sums, factors and views; none where the graph does not tell.

    Args:
        root: the loss's ``grad_fn``.
        scale: by which a loss scaler has multiplied it.
        samples: of the pass, as far as known.
        known: by the names from the root down to a node, whether samples come into it; to look once only.
    """
    found: list[Reduction] = []
    data = _Data(samples, {} if known is None else known)
    stack: list[tuple[Any, float | None, float | None, bool]] = [(root, scale, 1.0, False)]
    paths: dict[Any, tuple[str, ...]] = {root: ()}
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
        path = (*paths.get(node, ()), name)
        paths.update(dict.fromkeys(children, path))
        if name == "Div" or node in divided:
            divided.update(children)
        if name in ("Add", "Sub", "Rsub") or name in _PASS_THROUGH:
            stack += [(child, divided_by, divisor, bent) for child in children]
        elif name in ("Mul", "Div"):
            if len(children) == 2 and None not in children:  # A product or a quotient of two things that are trained.
                quotient = bent or name == "Div" and data.comes_into(children[1], (*path, "below"))
                stack += [(child, None, None, quotient) for child in children]
                continue
            factor = _scalar(node, "_saved_other" if children[0] is not None else "_saved_self")
            part = None
            if divided_by is not None and factor:
                part = divided_by * factor if name == "Div" else divided_by / factor
            if name == "Div":
                divisor = divisor * factor if divisor is not None and factor is not None else None
            elif factor != scale:
                divisor = None
            stack += [(child, part, divisor, bent) for child in children]
        elif name in _NOT_LINEAR:
            stack += [(child, None, None, True) for child in children]
        elif (reduction := _reduction(node, name, children, data, path)) is not None:
            if isinstance(reduction, list):
                stack += [(child, None, None, bent) for child in reduction]
            elif bent:
                found.append(Reduction("bent", None, name))
            elif reduction.kind == "sum" and divided_by is None:
                continue  # By what it is divided is not known.
            elif reduction.kind == "sum" and (divided_by != 1 or node in divided):
                found.append(Reduction("quotient", divided_by, name, size=reduction.size, divisor=divisor))
            else:
                found.append(dataclasses.replace(reduction, factor=divided_by))
    return found


def _reduction(
    node: Any, name: str, children: list[Any], data: _Data, path: tuple[str, ...]
) -> Reduction | list[Any] | None:
    """What a node reduces; the nodes below it where it puts several losses together."""
    if hasattr(node, "_saved_reduction"):
        if node._saved_reduction not in (1, 2):
            return None
        count, exact, weighted = _count(node)
        if node._saved_reduction == 2:
            return Reduction("sum", None, name, size=node._saved_self.numel())
        return Reduction("mean", count, name, exact, weighted=weighted)
    if name in _BENT_REDUCTIONS and data.comes_into(children[0], path):
        return Reduction("bent", None, name)
    if name in ("Dot", "Nansum") and any(data.comes_into(child, (*path, str(k))) for k, child in enumerate(children)):
        return Reduction("sum", None, name)
    if name not in ("Sum", "Mean"):
        return None
    child = children[0]
    if child is not None and child.name().partition("Backward")[0] in ("Stack", "Cat"):
        return [below for below, _ in child.next_functions]
    if not data.comes_into(child, path):
        return None  # A penalty on parameters, which is the same on all.
    size = math.prod(node._saved_self_sym_sizes)
    first = _over_samples(child)
    if first is not None:  # Samples were put together before: what is reduced here are features.
        name, size = first
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


def _over_samples(node: Any) -> tuple[str, int] | None:
    """Sum or Mean, and over how many, if a node below by views reduces the first dimension, that of samples."""
    for _ in range(8):
        if node is None:
            return None
        name = node.name().partition("Backward")[0]
        dims = getattr(node, "_saved_dim", None)
        if name in ("Sum", "Mean") and dims is not None:
            sizes = node._saved_self_sym_sizes
            every = [d - 2**64 if d >= 2**63 else d for d in (dims if isinstance(dims, tuple | list) else [dims])]
            reduced = {d % len(sizes) for d in every} or set(range(len(sizes)))
            return (name, math.prod(sizes[d] for d in reduced)) if 0 in reduced else None
        if name not in _PASS_THROUGH or len(node.next_functions) != 1:
            return None
        node = node.next_functions[0][0]
    return None


class _Data:
    """Whether samples come into what a node stands for."""

    def __init__(self, samples: int, known: dict[tuple[str, ...], bool]) -> None:
        self._samples, self._known = samples, known

    def comes_into(self, node: Any, path: tuple[str, ...]) -> bool:
        """Looked at once for all nodes that are reached by the same names."""
        if path not in self._known:
            if len(self._known) > 256:
                self._known.clear()
            self._known[path] = self._looks(node)
        return self._known[path]

    def _looks(self, node: Any) -> bool:
        seen: set[Any] = set()
        stack = [node]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            if len(seen) > _MOST_NODES:
                return True
            seen.add(node)
            children = [child for child, _ in node.next_functions]
            name = node.name().partition("Backward")[0]
            if name.startswith("Embedding") or None in children and (name in _TAKES_DATA or self._has_samples(node)):
                return True
            stack += children
        return False

    def _has_samples(self, node: Any) -> bool:
        """Whether a constant that the node goes by has as many rows as there are samples."""
        saved = (getattr(node, name, None) for name in ("_saved_other", "_saved_self"))
        return any(isinstance(t, torch.Tensor) and t.ndim > 0 and len(t) == self._samples > 1 for t in saved)


Terms = list[tuple[float, float]]
"""Of each mean that a loss consists of: over how many numbers it is, in all and for each unit of weight."""


def agree(one: Terms, other: Terms) -> bool:
    """Whether two passes' losses are means over as many numbers for each sample. Of other terms nothing is known."""
    same = functools.partial(math.isclose, rel_tol=1e-4)
    pairs = zip(one, other, strict=False)
    return len(one) != len(other) or all(same(a[1], b[1]) for a, b in pairs)


class LossCheck:
    """Compares what a loss is with what the program says that it is, at each pass.

    Args:
        loss: ``mean`` over samples, or over what ``weight`` counts; ``sum`` over samples; ``local``, a function of a
            pass's own samples that is not looked at.
        weighed: whether the program says what counts.
    """

    def __init__(self, loss: str, *, weighed: bool) -> None:
        self._loss, self._weighed = loss, weighed
        self._seen: Terms = []
        self._of_step: Terms | None = None
        self._known: dict[tuple[str, ...], bool] = {}

    @property
    def is_local(self) -> bool:
        """Whether it is said to be a function of a pass's own samples."""
        return self._loss == "local"

    @property
    def is_sum(self) -> bool:
        """Whether it is said to be a sum over samples."""
        return self._loss == "sum"

    @property
    def terms(self) -> Terms:
        """Those of the step under way. They :func:`agree` on all workers, or gradients do not make the whole
        batch's."""
        return self._of_step or []

    @property
    def mark(self) -> int:
        """From 1 to 65535, a digest of :attr:`terms`, for a header; 0 where there are none."""
        text = ",".join(f"{ratio:.3g}" for _, ratio in self.terms)
        return zlib.crc32(text.encode()) % 65535 + 1 if text else 0

    def begin_step(self) -> None:
        """What comes from here on belongs to another step: its loss may be over other numbers."""
        self._of_step = None

    def look(
        self, roots: Sequence[Any], weight: float, scale: float = 1.0, *, samples: int = 0, alike: bool = True
    ) -> Exception | None:
        """Look at a pass before it is done.

        Args:
            roots: what ``backward()`` was called on.
            weight: of the pass: its samples, or what the program says.
            scale: by which a loss scaler has multiplied the loss.
            samples: of the pass.
            alike: whether all passes of the step, on all workers, have as many.

        Returns:
            An error, if the loss is none of what the program says and the pass is one of the step's.
        """
        self._seen = []
        if self._loss == "local" or weight <= 0:
            return None
        try:
            found = [r for root in roots for r in self._reductions(root, scale, samples)]
        except Exception:
            logger.debug("a loss's graph could not be read", exc_info=True)
            return None
        told = (number for r in found for number in (r.count, r.factor, r.divisor) if number is not None)
        if not all(map(math.isfinite, told)):
            return None  # Such a loss's step is skipped.
        for r in found:
            if r.kind == "bent":
                return refuse("loss that is no mean", f"this one is a function of a {r.name.lower()}")
            if r.kind not in (self._loss, "quotient"):
                return _other_kind(r, self._loss)
            if r.divisor is not None and self._loss == "mean" and not self._weighed and not _divides(r, weight, alike):
                return _by_a_constant(r, weight)
            if r.kind == "mean" and r.weighted and not self._weighed:
                return _weighted(r, weight)
        per = weight if self._loss == "mean" else 1.0
        self._seen = [(r.count, r.count / per * (r.factor or 1.0)) for r in found if r.count is not None and r.exact]
        return None

    def fired(self) -> Exception | None:
        """The pass that was looked at is one of the step's. An error, if it is another mean than the one before."""
        if self._of_step is None:
            self._of_step = self._seen
        elif self._seen and not agree(self._seen, self._of_step):
            return _other_count(self._seen, self._of_step, self._loss, self._weighed)
        return None

    def _reductions(self, root: Any, scale: float, samples: int) -> list[Reduction]:
        if isinstance(root, torch.Tensor) and root.numel() > 1:
            return [Reduction("sum", None, "a backward() of several numbers")]
        return reductions(getattr(root, "grad_fn", None), scale, samples=samples, known=self._known)


def _divides(found: Reduction, samples: float, alike: bool) -> bool:
    """Whether a sum over a pass is divided by its samples, or by its numbers of some dimensions.

    Where passes differ in size, a whole number times the samples is no constant, or it would not be one in all.
    """
    each = (found.divisor or 0.0) / samples
    return each >= 1 and each == int(each) and (not alike or found.size / samples % each == 0)


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


def _other_count(now: Terms, before: Terms, loss: str, weighed: bool) -> ConfigError:
    pairs = [pair for pair in zip(now, before, strict=False) if not agree([pair[0]], [pair[1]])]
    (_, a), (_, b) = pairs[0]
    if loss == "sum":
        return ConfigError(
            f"loss='sum': the sum is divided by {a:g} in this pass, and was by {b:g} before: it is no sum over "
            "samples. Divide it by a constant, or by the number of samples and write loss='mean'."
        )
    unit = "unit of prepare_data_loader(weight=...)" if weighed else "sample"
    return ConfigError(
        f"the loss is a mean over {a:g} numbers for each {unit} in this pass, and was one over {b:g} before: it is "
        "no mean over samples. Say what it is a mean over, for example prepare_data_loader(..., weight=lambda batch: "
        "float(batch['mask'].sum())), make it a mean over samples, or write loss='local'."
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
