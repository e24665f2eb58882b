"""Operations by which one sample's loss depends on other samples of the pass, as far as autograd's graph shows them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from raytrain_het.worker.checks.autograd_nodes import (
    added_up,
    children_first,
    children_of,
    dims_of,
    is_source,
    name_of,
    shape_below,
    shape_of,
    words,
)

_OVER_A_DIMENSION = words(
    "Topk Sort Kthvalue Sum Mean Std StdMean Var VarMean Logsumexp Max Amax Min Amin Norm LinalgVectorNorm Softmax "
    "LogSoftmax SafeSoftmax Prod Median Cumsum Logcumsumexp Roll Flip"
)


def mixing(root: Any, samples: int, linear: Collection[Any]) -> str | None:
    """An operation by which one sample's loss depends on other samples, in words; None if none is found.

    Batch norms are none: a pass has its own statistics. What is told by a size alone needs passes of three samples
    or more, since a dimension of two may be anything.
    """
    if samples < 2:
        return None
    nodes = list(children_first(root))
    comes: dict[Any, bool] = {}
    for node in nodes:
        comes[node] = is_source(node, samples) or any(comes.get(c, False) for c in children_of(node))
    found = [
        how
        for node in reversed(nodes)
        if comes[node] and node not in linear and (how := _mixes(node, comes, samples)) is not None
    ]
    # As many as there are samples, or twice as many: a loop over samples, of which each has as many rows.
    return found[0] if len(found) % samples else None


def _mixes(node: Any, comes: Mapping[Any, bool], samples: int) -> str | None:
    name, n, out = name_of(node), samples, shape_of(node) or ()
    children = children_of(node)
    data = [child is not None and comes[child] for child in children]
    if "BackwardBackward" in node.name() and getattr(node, "_saved_reduction", 0) == 1:
        return f"{node.name()}, the gradient of a mean over samples, of which each has its part by their number"
    if name in ("Mm", "Bmm", "Addmm", "Baddbmm"):
        return _product_mixes(node, data, out, samples)
    if name == "Cdist" and all(data) and (shape_below(node, 0) or (0,))[0] == n:
        return f"{node.name()}, distances between samples"
    if name.startswith("ScaledDotProduct") and any(data):
        query = shape_below(node, 0) or (n, 0)
        return f"{node.name()}, of samples" if query[-2] in (n, 2 * n) and query[0] % n else None
    if "RnnLayer" in name or "CudnnRnn" in name:
        return f"{node.name()} over samples" if n > 2 and out[:1] == (n,) and out[1:2] != (n,) else None
    if name in ("Sub", "Add", "Mul", "Div") and len(children) == 2 and all(data):
        shapes = {(shape_below(node, k) or ())[:2] for k in (0, 1)}
        if shapes == {(1, n), (n, 1)}:
            return f"{node.name()}, of each sample and each other"
    if name not in _OVER_A_DIMENSION or n < 3 or name_of(children[0]) in ("Stack", "Unsqueeze"):
        return None
    sizes = shape_below(node, 0) or ()
    if sizes[:1] == (n,) and sizes[1:2] != (n,) and 0 in dims_of(node, len(sizes)):
        return f"{node.name()} over the first dimension, that of samples"
    return None


def _product_mixes(node: Any, data: list[bool], out: tuple[int, ...], samples: int) -> str | None:
    """Of matrices (r, c) and (c, k): rows of samples with rows of samples, or a sum over them."""
    n, few = samples, (samples, 2 * samples)
    first, second = data[-2:]
    if len(out) < 2 or len(out) == 3 and out[0] % n == 0:
        return None
    over = added_up(node, name_of(node))
    if first and second and out[-2] in few and out[-1] in few:
        return f"{node.name()}, a product of samples with samples"
    constant = None in children_of(node)[-2:]
    rows_are_samples = out[-2] % n == 0 and (first or not constant)
    if n > 2 and over in few and not rows_are_samples and (second or first):
        return f"{node.name()}, a sum over samples"
    return None
