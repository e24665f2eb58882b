"""What autograd's graph shows of a loss: the reductions over samples that it consists of, from the loss downwards.

A loss is a *linear* function of some reductions (sums, views, factors), and each of them is over samples or over
something that is the same on all workers (a penalty on parameters). What lies below a reduction are samples by
themselves, unless an operation puts them together (:meth:`LossGraph.mixing`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PASS_THROUGH = _words(
    "Neg View UnsafeView ReshapeAlias Squeeze Unsqueeze ToCopy Alias Clone Select Expand NanToNum Slice Permute "
    "Transpose T Split Unbind Where MaskedFill Index Lerp Contiguous"
)
_NOT_LINEAR = _words(
    "Sqrt Log Log1p Log2 Exp Expm1 Pow Reciprocal Rsqrt Sigmoid Tanh Abs Relu Clamp ClampMin ClampMax Maximum "
    "Minimum Softplus Atan Sin Cos LogSigmoid Gelu Silu Elu LeakyRelu"
)
_BENT_REDUCTIONS = _words(
    "Std StdMean Var VarMean Norm LinalgVectorNorm LinalgMatrixNorm Logsumexp Max Amax Min Amin Median Nanmedian "
    "Prod Dist Cdist LinalgSvd LinalgSlogdet LinalgDet"
)
"""Reductions that are no means."""
_SUMS = frozenset(["Sum", "Nansum", "Cumsum", "Trace"])
_PRODUCTS = _words("Mm Bmm Mv Dot Addmm Addmv Baddbmm Addbmm")
"""Sums of products over one dimension."""
_SAME_ON_ALL = (
    _PASS_THROUGH | _NOT_LINEAR | _BENT_REDUCTIONS | _SUMS | _PRODUCTS
    | _words(
        "Add Sub Rsub Mul Div Mean Cat Stack Diagonal AsStrided Tril Triu Flip Roll Repeat Copy Softmax LogSoftmax "
        "MseLoss L1Loss SmoothL1Loss HuberLoss Sign Addcmul Addcdiv WeightNormInterface LinalgQr LinalgEigh "
        "LinalgInvEx LinalgSolveEx LinalgCholeskyEx"
    )
)  # fmt: skip
"""Of parameters alone these make something that is the same on all workers. Of any other operation it is supposed that
samples come in."""
_MOST_NODES = 400
"""Penalties on parameters are smaller than this."""
_LONGEST_LOSS = 2000
"""Nodes from a loss down to its reductions: a loop over samples makes some for each."""


SEVERAL_NUMBERS = "a backward() of several numbers"


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

    @property
    def is_finite(self) -> bool:
        """Whether its numbers are: those of a loss that overflowed say nothing."""
        return all(math.isfinite(x) for x in (self.count, self.factor, self.divisor) if x is not None)


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
    """

    def __init__(
        self, root: Any, scale: float = 1.0, *, samples: int = 0, known: dict[tuple[str, ...], bool] | None = None,
        numbers: int = 1,
    ) -> None:  # fmt: skip
        self._root, self._scale, self._samples = root, scale, samples
        self._data = _Data(samples, {} if known is None else known)
        self._linear: set[Any] = set()
        """Nodes of which the loss is a linear function, and its reductions."""
        self.hidden: list[str] = []
        if numbers == 1:
            self.reductions = _of_a_loop(list(self._read()), samples)
        else:
            kind, divisor = ("sum", None) if scale == 1 else ("quotient", scale)
            self.reductions = [Reduction(kind, divisor, SEVERAL_NUMBERS, size=numbers, divisor=divisor)]

    def _read(self) -> Iterator[Reduction]:
        stack: list[tuple[Any, float | None, float | None, bool]] = [(self._root, self._scale, 1.0, False)]
        paths: dict[Any, tuple[str, ...]] = {self._root: ()}
        divided: set[Any] = set()
        """Nodes below a division."""
        for _ in range(_LONGEST_LOSS):
            if not stack:
                return
            node, divided_by, divisor, bent = stack.pop()
            if node is None:
                continue
            self._linear.add(node)
            name, children = _name(node), _children(node)
            path = (*paths.get(node, ()), name)
            paths.update(dict.fromkeys(children, path))
            if name == "Div" or node in divided:
                divided.update(children)
            if name in ("Add", "Sub", "Rsub") or name in _PASS_THROUGH:
                stack += [(child, divided_by, divisor, bent) for child in children]
            elif name in ("Mul", "Div"):
                if len(children) == 2 and None not in children:  # A product or a quotient of two that are trained.
                    both = all(self._data.comes_into(c, (*path, str(k))) for k, c in enumerate(children))
                    below = name == "Div" and self._data.comes_into(children[1], (*path, "1"))
                    stack += [(child, None, None, bent or both or below) for child in children]
                    continue
                factor = _scalar(node, "_saved_other" if children[0] is not None else "_saved_self")
                part = None
                if divided_by is not None and factor:
                    part = divided_by * factor if name == "Div" else divided_by / factor
                if name == "Div":
                    divisor = divisor * factor if divisor is not None and factor is not None else None
                elif factor != self._scale:
                    divisor = None
                stack += [(child, part, divisor, bent) for child in children]
            elif name in _NOT_LINEAR:
                stack += [(child, None, None, True) for child in children]
            elif (reduction := self._reduction(node, name, children, path)) is not None:
                if isinstance(reduction, list):
                    as_they_are = name not in _PRODUCTS and _stacked(children[0]) is not None
                    num = len(reduction) if name == "Mean" else 1
                    by = (_times(divided_by, num), _times(divisor, num)) if as_they_are else (None, None)
                    stack += [(child, *by, bent) for child in reduction]
                elif bent:
                    yield Reduction("bent", None, name)
                elif reduction.kind == "sum" and divided_by is None:
                    continue  # By what it is divided is not known.
                elif reduction.kind == "sum" and (divided_by != 1 or node in divided):
                    yield Reduction("quotient", divided_by, name, size=reduction.size, divisor=divisor)
                else:
                    yield dataclasses.replace(reduction, factor=divided_by)
            elif not hasattr(node, "variable") and name not in _SAME_ON_ALL:
                self.hidden.append(node.name())
        if stack:
            self.hidden.append(f"some {_LONGEST_LOSS} operations")

    def _reduction(
        self, node: Any, name: str, children: list[Any], path: tuple[str, ...]
    ) -> Reduction | list[Any] | None:
        """What a node reduces; the nodes below it where it puts several losses together."""
        comes_in = any(self._data.comes_into(child, (*path, str(k))) for k, child in enumerate(children))
        if not comes_in and name in _SAME_ON_ALL:
            return None  # A penalty on parameters, which is the same on all.
        if hasattr(node, "_saved_reduction"):
            if node._saved_reduction not in (1, 2):
                return None
            count, exact, weighted = _count(node)
            if node._saved_reduction == 2:
                return Reduction("sum", None, name, size=node._saved_self.numel())
            return Reduction("mean", count, name, exact, weighted=weighted)
        if name in _BENT_REDUCTIONS:
            return Reduction("bent", None, name)
        if name in _PRODUCTS:
            over = _added_up(node)
            is_over_samples = self._samples > 1 and over and over % self._samples == 0
            return Reduction("sum", None, name, size=over) if is_over_samples else children
        if name not in _SUMS and name != "Mean":
            return None
        if name == "Trace":
            self._linear.update(children)  # Of a product of all samples with all, those of each with itself.
        below = _combined(children[0]) or _stacked(children[0])
        if below is not None:
            return below
        sizes = getattr(node, "_saved_self_sym_sizes", ())
        size = math.prod(sizes)
        first = self._over_samples(children[0])
        if first is not None:  # Samples were put together before: what is reduced here are features.
            name, size = first
        if name != "Mean":
            return Reduction("sum", None, name, size=size)
        return Reduction("mean", float(size), name)

    def _over_samples(self, node: Any) -> tuple[str, int] | None:
        """Sum or Mean, and over how many, if a node below by views reduces the first dimension, that of samples."""
        for _ in range(8):
            if node is None:
                return None
            name = _name(node)
            if name in ("Sum", "Mean") and hasattr(node, "_saved_dim"):
                sizes, reduced = node._saved_self_sym_sizes, _dims(node)
                if 0 not in reduced:
                    return None
                self._linear.add(node)
                return name, math.prod(sizes[d] for d in reduced)
            if name not in _PASS_THROUGH or len(node.next_functions) != 1:
                return None
            node = node.next_functions[0][0]
        return None

    # ---------------------------------------------------------------- samples that see each other

    def mixing(self) -> str | None:
        """An operation by which one sample's loss depends on other samples, in words; None if none is found.

        Batch norms are none: a pass has its own statistics. What is told by a size alone needs passes of three samples
        or more, since a dimension of two may be anything.
        """
        if self._samples < 2:
            return None
        nodes = ((node, name) for node, name in self._of_data() if node not in self._linear)
        found = [how for node, name in nodes if (how := self._mixes(node, name))]
        # As many as there are samples, or twice as many: a loop over samples, of which each has as many rows.
        return found[0] if len(found) % self._samples else None

    def _of_data(self) -> Iterator[tuple[Any, str]]:
        """All nodes into which samples come, and their names."""
        order, seen, stack = [], set(), [self._root]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            order.append(node)
            stack += _children(node)
        comes: dict[Any, bool] = {}
        for node in _children_first(self._root):
            name = _name(node)
            comes[node] = self._data.is_source(node, name) or any(comes.get(c, False) for c in _children(node))
        return ((node, _name(node)) for node in order if comes[node])

    def _mixes(self, node: Any, name: str) -> str | None:
        children, n = _children(node), self._samples
        if name in ("Mm", "Bmm", "Addmm", "Baddbmm") and _both(children[-2:], self._data):
            first, second = (_sizes(node, key) for key in _OPERANDS[name])
            if first and second and (len(first) == 2 or first[0] % n) and _of_samples(first[-2:], second[-2:], n):
                return f"{node.name()}, a product of two things that are made of samples"
        if name == "Cdist" and _both(children, self._data) and _sizes(node, "_saved_x1")[0] == n:
            return f"{node.name()}, distances between samples"
        if name in ("Sub", "Add", "Mul", "Div") and len(children) == 2:
            dims = sorted(c._saved_dim for c in children if c is not None and _name(c) == "Unsqueeze")
            if dims == [0, 1] and _both(children, self._data):
                return f"{node.name()}, of each sample and each other"
        if n < 3 or name not in _OVER_A_DIMENSION or not children or _name_of(children[0]) in ("Stack", "Unsqueeze"):
            return None
        sizes = next((s for key in _SIZES if (s := _sizes(node, key))), ())
        whole = not any(hasattr(node, key) for key in ("_saved_dim", "_saved_dims"))
        time_first = len(sizes) > 2 and sizes[1] == n
        if sizes and sizes[0] == n and not time_first and (whole or 0 in _dims(node, len(sizes))):
            return f"{node.name()} over the first dimension, that of samples"
        return None


_OPERANDS = {
    "Mm": ("_saved_self", "_saved_mat2"), "Bmm": ("_saved_self", "_saved_mat2"),
    "Addmm": ("_saved_mat1", "_saved_mat2"), "Baddbmm": ("_saved_batch1", "_saved_batch2"),
}  # fmt: skip
_SIZES = ("_saved_self", "_saved_self_sym_sizes", "_saved_result")
_OVER_A_DIMENSION = _words(
    "Topk Sort Kthvalue Sum Mean Std StdMean Var VarMean Logsumexp Max Amax Min Amin Norm LinalgVectorNorm Softmax "
    "LogSoftmax SafeSoftmax Prod Median Cumsum"
)


def _both(children: list[Any], data: _Data) -> bool:
    return len(children) == 2 and all(c is not None and data.looks(c) for c in children)


def _of_samples(first: tuple[int, ...], second: tuple[int, ...], n: int) -> bool:
    """Whether a matrix product (r, c) (c, k) is of samples with samples, or a sum over them."""
    few = (n, 2 * n)
    return first[0] in few and second[1] in few or first[1] in few and n > 2


def _of_a_loop(found: list[Reduction], samples: int) -> list[Reduction]:
    """Means that a loop has made of one sample each, as the sum that they are together."""
    first = found[0] if found else None
    if first is None or first.kind != "mean" or len(found) != samples or samples < 2 or first.count is None:
        return found
    if first.count % samples == 0 or any(dataclasses.replace(r, name=first.name) != first for r in found):
        return found
    size = int(first.count) * samples
    if first.factor in (None, 1.0):
        return [Reduction("sum", None, first.name, size=size)] if first.factor else found
    return [Reduction("quotient", first.factor, first.name, size=size, divisor=first.factor)]


def _name(node: Any) -> str:
    name: str = node.name()
    return name.partition("Backward")[0]


def _name_of(node: Any) -> str:
    return "" if node is None else _name(node)


def _children(node: Any) -> list[Any]:
    return [child for child, _ in node.next_functions]


def _children_first(root: Any) -> Iterator[Any]:
    """All nodes, each after those that it leads to."""
    seen: set[Any] = set()
    stack = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child in _children(node)]


def _stacked(node: Any) -> list[Any] | None:
    """What was stacked: several losses."""
    return _children(node) if node is not None and _name(node) in ("Stack", "Cat") else None


def _combined(node: Any) -> list[Any] | None:
    """What was stacked and weighted with constants: one number for each of several losses."""
    if node is None or _name(node) not in ("Mul", "Div"):
        return None
    others = [c for c in _children(node) if c is not None]
    if len(others) != 1 or (below := _stacked(others[0])) is None:
        return None
    weights = getattr(node, "_saved_other", None)
    return below if isinstance(weights, torch.Tensor) and tuple(weights.shape) == (len(below),) else None


def _added_up(node: Any) -> int:
    """Over how many numbers each of a node's products is a sum; 0 if that is not known."""
    for key in ("_saved_mat1", "_saved_batch1", "_saved_vec", "_saved_tensor", "_saved_self"):
        if sizes := _sizes(node, key):
            return sizes[-1]
    for key in ("_saved_mat2", "_saved_batch2"):
        if sizes := _sizes(node, key):
            return sizes[-2]
    return 0


def _sizes(node: Any, key: str) -> tuple[int, ...]:
    """Of a tensor that a node has kept, or the sizes that it has kept of one."""
    value = getattr(node, key, None)
    if value is None:
        value = getattr(node, f"{key}_sym_sizes", None)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else tuple(value or ())


def _dims(node: Any, num: int | None = None) -> set[int]:
    """The dimensions that a node reduces, from 0."""
    num = len(node._saved_self_sym_sizes) if num is None else num
    dims = getattr(node, "_saved_dim", None)
    if dims is None or dims == ():
        return set(range(num))
    every: list[int] = list(dims) if isinstance(dims, tuple | list) else [dims]
    return {(d - 2**64 if d >= 2**63 else d) % num for d in every}


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


def _times(number: float | None, factor: int) -> float | None:
    return None if number is None else number * factor


class _Data:
    """Whether samples come into what a node stands for."""

    def __init__(self, samples: int, known: dict[tuple[str, ...], bool]) -> None:
        self._samples, self._known = samples, known

    def comes_into(self, node: Any, path: tuple[str, ...]) -> bool:
        """Looked at once for all nodes that are reached by the same names."""
        if path not in self._known:
            if len(self._known) > 256:
                self._known.clear()
            self._known[path] = self.looks(node)
        return self._known[path]

    def looks(self, node: Any) -> bool:
        """Go through all that the node leads to."""
        seen: set[Any] = set()
        stack = [node]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            if len(seen) > _MOST_NODES or self.is_source(node, _name(node)):
                return True
            seen.add(node)
            stack += _children(node)
        return False

    def is_source(self, node: Any, name: str) -> bool:
        """Whether samples come in here."""
        if (variable := getattr(node, "variable", None)) is not None:
            return not isinstance(variable, torch.nn.Parameter)
        if name not in _SAME_ON_ALL:
            return True
        return None in _children(node) and (name in _PRODUCTS or self._has_samples(node))

    def _has_samples(self, node: Any) -> bool:
        """Whether a constant that the node goes by has as many rows as there are samples."""
        saved = (getattr(node, name, None) for name in ("_saved_other", "_saved_self"))
        return any(isinstance(t, torch.Tensor) and t.ndim > 0 and len(t) == self._samples > 1 for t in saved)
