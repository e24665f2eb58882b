"""Nodes of autograd's graph: what each has computed, of what, and whether samples come in there.

Nothing here unpacks a saved tensor that has hooks: activation checkpointing would compute its block once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def words(text: str) -> frozenset[str]:
    """Names, as autograd calls operations, from a text."""
    return frozenset(text.split())


PASS_THROUGH = words(
    "Neg View UnsafeView ReshapeAlias Squeeze Unsqueeze ToCopy Alias Clone Select Expand NanToNum Slice Permute "
    "Transpose T Split Unbind Lerp Contiguous"
)
NOT_LINEAR = words(
    "Sqrt Log Log1p Log2 Exp Expm1 Pow Reciprocal Rsqrt Sigmoid Tanh Abs Relu Clamp ClampMin ClampMax Maximum "
    "Minimum Softplus Atan Sin Cos LogSigmoid Gelu Silu Elu LeakyRelu"
)
BENT_REDUCTIONS = words(
    "Std StdMean Var VarMean Norm LinalgVectorNorm LinalgMatrixNorm Logsumexp Max Amax Min Amin Median Nanmedian "
    "Prod Dist Cdist LinalgSvd LinalgSlogdet LinalgDet"
)
"""Reductions that are no means."""
SUMS = words("Sum Nansum Cumsum Trace")
PRODUCTS = words("Mm Bmm Mv Dot Vdot Addmm Addmv Baddbmm")
"""Sums of products over one dimension."""
_ELEMENTWISE = (
    PASS_THROUGH
    | NOT_LINEAR
    | words(
        "Add Sub Rsub Mul Div Where MaskedFill Sign Addcmul Addcdiv Softmax LogSoftmax MseLoss L1Loss SmoothL1Loss "
        "HuberLoss BinaryCrossEntropyWithLogits"
    )
)
"""A constant that one of these takes besides a parameter holds samples if it makes the result larger."""


def name_of(node: Any) -> str:
    """The operation, as in ``Mul`` for ``MulBackward0``."""
    if node is None:
        return ""
    name: str = node.name()
    return name.partition("Backward")[0]


def children_of(node: Any) -> list[Any]:
    """The nodes of its operands; None for each that needs no gradient."""
    return [child for child, _ in node.next_functions]


def children_first(root: Any) -> Iterator[Any]:
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
            stack += [(child, False) for child in children_of(node)]


def shape_of(node: Any, output: int = 0) -> tuple[int, ...] | None:
    """Of what a node has computed; None where that is not known."""
    if (variable := getattr(node, "variable", None)) is not None:
        return tuple(variable.shape)
    try:
        return tuple(node._input_metadata[output].shape)
    except (AttributeError, IndexError, RuntimeError):
        return None


def shape_below(node: Any, k: int) -> tuple[int, ...] | None:
    """Of a node's operand; None where it is a constant that was not kept."""
    child, output = node.next_functions[k]
    if child is not None:
        return shape_of(child, output)
    kept = saved(node, "_saved_self")
    return None if kept is None else tuple(kept.shape)


def saved(node: Any, key: str) -> torch.Tensor | None:
    """A tensor that a node has kept, unless hooks would have to unpack it."""
    raw = getattr(node, f"_raw{key}", None)
    if raw is None or isinstance(raw, tuple | list) or getattr(raw, "unpack_hook", None) is not None:
        return None
    value = getattr(node, key, None)
    return value if isinstance(value, torch.Tensor) else None


def scalar(node: Any, key: str) -> float | None:
    """A number that a node has kept."""
    value = saved(node, key)
    return float(value) if value is not None and value.numel() == 1 else None


def added_up(node: Any, name: str) -> int:
    """Over how many numbers each of a node's products is a sum; 0 if that is not known."""
    first = shape_below(node, 1 if name in ("Addmm", "Addmv", "Baddbmm") else 0)
    second = shape_below(node, 2 if name in ("Addmm", "Addmv", "Baddbmm") else 1)
    if first is None and second is None:
        return 0
    if first is not None and node.next_functions[1 if name.startswith(("Add", "Badd")) else 0][0] is not None:
        return first[-1]
    return second[-2 if second is not None and len(second) > 1 else -1] if second else 0


def dims_of(node: Any, num: int) -> set[int]:
    """The dimensions that a node goes over, from 0; all where it names none."""
    dims = getattr(node, "_saved_dim", getattr(node, "_saved_dims", None))
    if dims is None or dims == () or not num:
        return set(range(num))
    every: list[int] = list(dims) if isinstance(dims, tuple | list) else [dims]
    return {(d - 2**64 if d >= 2**63 else d) % num for d in every}


def is_source(node: Any, samples: int) -> bool:
    """Whether samples come in here: as a tensor that is no parameter, or as a constant."""
    if (variable := getattr(node, "variable", None)) is not None:
        return not isinstance(variable, torch.nn.Parameter)
    name = name_of(node)
    if name.startswith("Embedding"):
        return True
    if name in ("Index", "IndexSelect", "Gather"):
        return (shape_of(node) or (0,))[0] == samples
    if None not in children_of(node):
        return False
    if name in ("Dot", "Vdot"):
        return any(hasattr(child, "variable") for child in children_of(node))  # Else of a weight's own vectors.
    if name not in _ELEMENTWISE:
        return name not in SUMS and name not in BENT_REDUCTIONS and name not in ("Mean", "Mv", "Addmv")
    shape = shape_of(node)
    return all(shape_below(node, k) != shape for k, child in enumerate(children_of(node)) if child is not None)
