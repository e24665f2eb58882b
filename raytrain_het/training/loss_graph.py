"""What autograd's graph shows of a loss: the reductions over samples that it consists of, from the loss downwards.

A loss is a *linear* function of some reductions (sums, views, factors), and each of them is over samples or over
something that is the same on all workers (a penalty on parameters). What lies below a reduction are samples by
themselves, unless an operation puts them together (:meth:`LossGraph.mixing`).

Nothing here unpacks a saved tensor that has hooks: activation checkpointing would compute its block once more.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PASS_THROUGH = _words(
    "Neg View UnsafeView ReshapeAlias Squeeze Unsqueeze ToCopy Alias Clone Select Expand NanToNum Slice Permute "
    "Transpose T Split Unbind Lerp Contiguous"
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
_SUMS = _words("Sum Nansum Cumsum Trace")
_PRODUCTS = _words("Mm Bmm Mv Dot Vdot Addmm Addmv Baddbmm")
"""Sums of products over one dimension."""
_ELEMENTWISE = _PASS_THROUGH | _NOT_LINEAR | _words(
    "Add Sub Rsub Mul Div Where MaskedFill Sign Addcmul Addcdiv Softmax LogSoftmax MseLoss L1Loss SmoothL1Loss "
    "HuberLoss BinaryCrossEntropyWithLogits"
)  # fmt: skip
"""A constant that one of these takes besides a parameter holds samples if it makes the result larger."""
_OVER_A_DIMENSION = _words(
    "Topk Sort Kthvalue Sum Mean Std StdMean Var VarMean Logsumexp Max Amax Min Amin Norm LinalgVectorNorm Softmax "
    "LogSoftmax SafeSoftmax Prod Median Cumsum Logcumsumexp Roll Flip"
)
_MOST_NODES = 5000
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
    """One over what it is multiplied by, where that is known."""
    size: int = 0
    """How many numbers are reduced."""
    divisor: float | None = None
    """Of a quotient: what stands below the line, where nothing is multiplied."""
    weighted: bool = False
    """Whether classes have weights, or some of the targets were left out."""
    by_samples: bool = False
    """Whether a multiple of the number of samples is among what a sum is divided by."""

    @property
    def is_finite(self) -> bool:
        """Whether its numbers are: those of a loss that overflowed say nothing."""
        return all(math.isfinite(x) for x in (self.count, self.factor, self.divisor) if x is not None)


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
        self, root: Any, scale: float = 1.0, *, samples: int = 0, known: dict[tuple[str, ...], bool] | None = None,
        numbers: int = 1,
    ) -> None:  # fmt: skip
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
            name, children = _name(at.node), _children(at.node)
            below = [
                dataclasses.replace(at, node=child, path=(*at.path, name, str(k))) for k, child in enumerate(children)
            ]
            if name in ("Add", "Sub", "Rsub") or name in _PASS_THROUGH:
                stack += below
            elif name in ("Mul", "Div"):
                stack += self._of_a_product(at, name, below)
            elif name in _NOT_LINEAR:
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
        number = _scalar(at.node, "_saved_other" if below[0].node is not None else "_saved_self")
        divided_by, divisor = at.divided_by, at.divisor
        if name == "Div":
            divided_by, divisor = _times(divided_by, number), _times(divisor, number)
        else:
            divided_by = divided_by / number if divided_by is not None and number else None
            divisor = divisor if number == self._scale else None
        by = number if name == "Div" or not number else 1 / number
        new = dataclasses.replace(
            at, divided_by=divided_by, divisor=divisor, is_divided=at.is_divided or name == "Div",
            by_samples=at.by_samples or self._is_multiple(by),
        )  # fmt: skip
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
        if name in _BENT_REDUCTIONS:
            return Reduction("bent", None, name, size=math.prod(_shape_below(node, 0) or ()))
        if name in _PRODUCTS:
            return self._product(node, name, below)
        if name not in _SUMS and name != "Mean":
            return None
        if name == "Trace":
            self._linear.update(_children(node))  # Of a product of all samples with all, those of each with itself.
        shape = _shape_below(node, 0) or ()
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
        over, n = _added_up(node, name), self._samples
        flat = math.prod(_shape(node) or (0,)) == 1
        if n > 1 and (over == n or flat and over and over % n == 0):
            weights = _saved(node, "_saved_vec") if name == "Mv" else _saved(node, "_saved_tensor")
            return Reduction("sum", None, name, size=over, factor=_same_for_all(weights, n))
        return [dataclasses.replace(b, divided_by=None, divisor=None) for b in below]

    def _several(self, node: Any, size: int) -> tuple[list[Any], bool] | None:
        """Several losses that were stacked, one number of each, and whether nothing was done with them since."""
        as_they_are = True
        for _ in range(8):
            if node is None:
                return None
            name = _name(node)
            if name in ("Stack", "Cat"):
                losses = _children(node)
                numbers = sum(math.prod(_shape_below(node, k) or ()) for k in range(len(losses)))
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
            name = _name(node)
            if name in ("Sum", "Mean") and hasattr(node, "_saved_dim"):
                sizes = _shape_below(node, 0) or ()
                dims = _dims(node, len(sizes))
                if not self._has_samples_dim(sizes, dims):
                    return None
                self._linear.update([*passed, node])
                self.constants += _norms(passed)
                return name, math.prod(sizes[d] for d in dims)
            passed.append(node)
            if name in _PASS_THROUGH and len(_children(node)) == 1:
                node = _children(node)[0]
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
        data = [child for child in _children(node) if child is not None and self._looks(child)]
        return data[0] if len(data) == 1 and not (_name(node) == "Div" and data[0] is not _children(node)[0]) else None

    def _divided_within(self, node: Any) -> float:
        """By what each number was divided before a sum, if that is a multiple of the samples."""
        number = _scalar(node, "_saved_other") if node is not None and _name(node) in ("Mul", "Div") else None
        if not number or None not in _children(node):
            return 1.0
        by = number if _name(node) == "Div" else 1 / number
        return by if self._is_multiple(by) else 1.0

    # ---------------------------------------------------------------- samples that see each other

    def mixing(self) -> str | None:
        """An operation by which one sample's loss depends on other samples, in words; None if none is found.

        Batch norms are none: a pass has its own statistics. What is told by a size alone needs passes of three samples
        or more, since a dimension of two may be anything.
        """
        if self._samples < 2:
            return None
        nodes = list(_children_first(self._root))
        comes: dict[Any, bool] = {}
        for node in nodes:
            comes[node] = _is_source(node, self._samples) or any(comes.get(c, False) for c in _children(node))
        found = [
            how for node in reversed(nodes)
            if comes[node] and node not in self._linear and (how := self._mixes(node, comes)) is not None
        ]  # fmt: skip
        # As many as there are samples, or twice as many: a loop over samples, of which each has as many rows.
        return found[0] if len(found) % self._samples else None

    def _mixes(self, node: Any, comes: dict[Any, bool]) -> str | None:
        name, n, out = _name(node), self._samples, _shape(node) or ()
        children = _children(node)
        data = [child is not None and comes[child] for child in children]
        if name in ("Mm", "Bmm", "Addmm", "Baddbmm"):
            return self._product_mixes(node, data, out)
        if name == "Cdist" and all(data) and (_shape_below(node, 0) or (0,))[0] == n:
            return f"{node.name()}, distances between samples"
        if name.startswith("ScaledDotProduct") and any(data):
            query = _shape_below(node, 0) or (n, 0)
            return f"{node.name()}, of samples" if query[-2] in (n, 2 * n) and query[0] % n else None
        if "RnnLayer" in name or "CudnnRnn" in name:
            return f"{node.name()} over samples" if n > 2 and out[:1] == (n,) and out[1:2] != (n,) else None
        if name in ("Sub", "Add", "Mul", "Div") and len(children) == 2 and all(data):
            shapes = {(_shape_below(node, k) or ())[:2] for k in (0, 1)}
            if shapes == {(1, n), (n, 1)}:
                return f"{node.name()}, of each sample and each other"
        if name not in _OVER_A_DIMENSION or n < 3 or _name(children[0]) in ("Stack", "Unsqueeze"):
            return None
        sizes = _shape_below(node, 0) or ()
        if sizes[:1] == (n,) and sizes[1:2] != (n,) and 0 in _dims(node, len(sizes)):
            return f"{node.name()} over the first dimension, that of samples"
        return None

    def _product_mixes(self, node: Any, data: list[bool], out: tuple[int, ...]) -> str | None:
        """Of matrices (r, c) and (c, k): rows of samples with rows of samples, or a sum over them."""
        n, few = self._samples, (self._samples, 2 * self._samples)
        first, second = data[-2:]
        if len(out) < 2 or len(out) == 3 and out[0] % n == 0:
            return None
        over = _added_up(node, _name(node))
        if first and second and out[-2] in few and out[-1] in few:
            return f"{node.name()}, a product of samples with samples"
        constant = None in _children(node)[-2:]
        rows_are_samples = out[-2] % n == 0 and (first or not constant)
        if n > 2 and over in few and not rows_are_samples and (second or first):
            return f"{node.name()}, a sum over samples"
        return None

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
            if len(seen) > _MOST_NODES or _is_source(node, self._samples):
                return True
            seen.add(node)
            stack += _children(node)
        return False


def _is_source(node: Any, samples: int) -> bool:
    """Whether samples come in here: as a tensor that is no parameter, or as a constant."""
    if (variable := getattr(node, "variable", None)) is not None:
        return not isinstance(variable, torch.nn.Parameter)
    name = _name(node)
    if name.startswith("Embedding"):
        return True
    if name in ("Index", "IndexSelect", "Gather"):
        return (_shape(node) or (0,))[0] == samples
    if None not in _children(node):
        return False
    if name in ("Dot", "Vdot"):
        return any(hasattr(child, "variable") for child in _children(node))  # Else of a weight's own vectors.
    if name not in _ELEMENTWISE:
        return name not in _SUMS and name not in _BENT_REDUCTIONS and name not in ("Mean", "Mv", "Addmv")
    shape = _shape(node)
    return all(_shape_below(node, k) != shape for k, child in enumerate(_children(node)) if child is not None)


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
    size = math.prod(_shape_below(node, 0) or ())
    if node._saved_reduction == 2:
        return Reduction("sum", None, name, size=size)
    total = _saved(node, "_saved_total_weight")
    if total is None:
        return Reduction("mean", float(size) if not hasattr(node, "_saved_total_weight") else None, name, size=size)
    target = _saved(node, "_saved_target")
    targets = target.numel() if target is not None else 0
    exact = total.dtype in (torch.float32, torch.float64)
    weighted = _saved(node, "_saved_weight") is not None or float(total) != targets
    return Reduction("mean", float(total), name, exact, size=targets, weighted=weighted)


# ---------------------------------------------------------------- nodes


def _name(node: Any) -> str:
    if node is None:
        return ""
    name: str = node.name()
    return name.partition("Backward")[0]


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


def _shape(node: Any, output: int = 0) -> tuple[int, ...] | None:
    """Of what a node has computed; None where that is not known."""
    if (variable := getattr(node, "variable", None)) is not None:
        return tuple(variable.shape)
    try:
        return tuple(node._input_metadata[output].shape)
    except (AttributeError, IndexError, RuntimeError):
        return None


def _shape_below(node: Any, k: int) -> tuple[int, ...] | None:
    """Of a node's operand; None where it is a constant that was not kept."""
    child, output = node.next_functions[k]
    if child is not None:
        return _shape(child, output)
    kept = _saved(node, "_saved_self")
    return None if kept is None else tuple(kept.shape)


def _saved(node: Any, key: str) -> torch.Tensor | None:
    """A tensor that a node has kept, unless hooks would have to unpack it."""
    raw = getattr(node, f"_raw{key}", None)
    if raw is None or isinstance(raw, tuple | list) or getattr(raw, "unpack_hook", None) is not None:
        return None
    value = getattr(node, key, None)
    return value if isinstance(value, torch.Tensor) else None


def _scalar(node: Any, key: str) -> float | None:
    value = _saved(node, key)
    return float(value) if value is not None and value.numel() == 1 else None


def _norms(nodes: list[Any]) -> list[float]:
    """Of the constants, of more than one number, that nodes have kept."""
    keys = ("_saved_other", "_saved_self", "_saved_vec", "_saved_tensor", "_saved_mat2")
    kept = [t for node in nodes for key in keys if (t := _saved(node, key)) is not None]
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


def _added_up(node: Any, name: str) -> int:
    """Over how many numbers each of a node's products is a sum; 0 if that is not known."""
    first = _shape_below(node, 1 if name in ("Addmm", "Addmv", "Baddbmm") else 0)
    second = _shape_below(node, 2 if name in ("Addmm", "Addmv", "Baddbmm") else 1)
    if first is None and second is None:
        return 0
    if first is not None and node.next_functions[1 if name.startswith(("Add", "Badd")) else 0][0] is not None:
        return first[-1]
    return second[-2 if second is not None and len(second) > 1 else -1] if second else 0


def _dims(node: Any, num: int) -> set[int]:
    """The dimensions that a node goes over, from 0; all where it names none."""
    dims = getattr(node, "_saved_dim", getattr(node, "_saved_dims", None))
    if dims is None or dims == () or not num:
        return set(range(num))
    every: list[int] = list(dims) if isinstance(dims, tuple | list) else [dims]
    return {(d - 2**64 if d >= 2**63 else d) % num for d in every}


def _times(number: float | None, factor: float | None) -> float | None:
    return None if number is None or factor is None else number * factor
