"""What a loss is of its samples: a mean, a sum, or neither, as far as autograd's graph shows.

Workers' gradients are put together by the number of their samples. That is the gradient of the whole batch where each
worker's loss is the mean over its samples; where it is a sum, a mean over something else (tokens), or a function of
such a mean (a root), it is not. Each pass's graph is read from the loss down to the first reduction over samples, some
nodes in a tenth of a millisecond; that of the first pass to its end, for operations that put samples together.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from raytrain_het.errors import ConfigError
from raytrain_het.membership.audit import Terms, agree
from raytrain_het.worker.checks.loss_graph import LossGraph
from raytrain_het.worker.checks.reduction import Reduction
from raytrain_het.worker.checks.unsupported import refuse

logger = logging.getLogger("raytrain_het")

LOSSES = ("mean", "sum", "local")
OF_A_CONSTANT = 0.0
"""Stands in :data:`~raytrain_het.membership.audit.Terms` where others say over how many numbers a mean is."""
ENOUGH_SAMPLES = 4
"""In a pass of so many a dimension of that size is that of samples."""
Root = tuple[Any, torch.Tensor | None]
"""A tensor, or an edge of the graph, and the gradient that a backward pass begins with there."""


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
        self.warn: Callable[[str], None] = logger.warning
        """Where people read it."""
        self._has_warned = False
        self._read_with: dict[tuple[tuple[str, str], ...], int] = {}
        """By what a loss consists of: the samples of the largest pass whose whole graph was read."""

    @property
    def is_local(self) -> bool:
        """Whether it is said to be a function of a pass's own samples."""
        return self._loss == "local"

    @property
    def is_weighed(self) -> bool:
        """Whether the program says what counts."""
        return self._weighed

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
        places = {_place(ratio) for _, ratio in self.terms}
        return zlib.crc32(repr(sorted(places)).encode()) % 65535 + 1 if places else 0

    def begin_step(self) -> None:
        """What comes from here on belongs to another step: its loss may be over other numbers."""
        self._of_step = None

    def look(
        self, roots: Sequence[Root], weight: float, scale: float = 1.0, *, samples: int = 0, alike: bool = True
    ) -> Exception | None:
        """Look at a pass before it is done.

        Args:
            roots: what ``backward()`` was called on, and the gradients that it was given.
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
            graphs = list(self._graphs(roots, scale, samples))
            how = self._mixing(graphs, samples)
        except Exception as error:  # Of a graph of another kind than any that was seen.
            logger.debug("a loss's graph could not be read", exc_info=True)
            self._taken_for_granted(f"({error!r})")
            return None
        if how is not None:
            return refuse("samples that see each other", f"here by {how}")
        self._warn_of_hidden(graphs)
        found = [r for graph in graphs for r in graph.reductions]
        if not all(r.is_finite for r in found):
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
        if self._loss == "mean" and alike and not self._weighed:
            self._warn_of_factors(found, samples)
        per = weight if self._loss == "mean" else 1.0
        means = [(r.count, r.count / per * (r.factor or 1.0)) for r in found if r.count is not None and r.exact]
        self._seen = means + [(OF_A_CONSTANT, norm) for graph in graphs for norm in graph.constants]
        return None

    def fired(self) -> Exception | None:
        """The pass that was looked at is one of the step's. An error, if it is another mean than the one before."""
        if self._of_step is None:
            self._of_step = self._seen
        elif self._seen and not agree(self._seen, self._of_step):
            return _other_count(self._seen, self._of_step, self._loss, self._weighed)
        return None

    def _mixing(self, graphs: list[LossGraph], samples: int) -> str | None:
        """Of each kind of loss the whole graph is read once, and again in a larger pass if that was a small one."""
        kinds = tuple((r.kind, r.name) for graph in graphs for r in graph.reductions)
        largest = self._read_with.get(kinds, 0)
        if samples <= min(largest, ENOUGH_SAMPLES - 1) or largest >= ENOUGH_SAMPLES or len(self._read_with) > 64:
            return None
        self._read_with[kinds] = samples
        return next(filter(None, (graph.mixing() for graph in graphs)), None)

    def _warn_of_hidden(self, graphs: list[LossGraph]) -> None:
        hidden = next((name for graph in graphs for name in graph.hidden), None)
        if hidden is not None:
            self._taken_for_granted(f"below {hidden}")

    def _taken_for_granted(self, where: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            self.warn(
                f"what the loss is of its samples can't be read {where}: it is taken for a {self._loss} over them. "
                "HetConfig(check='every_step') compares the first steps with one process."
            )

    def _warn_of_factors(self, found: list[Reduction], samples: int) -> None:
        """Where all passes are of one size, a sum times a constant can't be told from a mean times one."""
        for r in found:
            is_sum = r.kind == "quotient" and r.divisor is None and not r.by_samples and r.count
            times = 1 / r.count if is_sum and r.count else 1 / r.factor if r.kind == "mean" and r.factor else 0.0
            if self._has_warned or not (is_sum or samples > 2 and times and times % samples == 0):
                continue
            self._has_warned = True
            self.warn(
                f"the loss is a {'sum' if is_sum else 'mean'} over samples ({r.name}) times {times:g}, and is taken "
                f"for a mean times a constant. If it is a sum, write prepare_data_loader(..., loss='sum')."
            )

    def _graphs(self, roots: Sequence[Root], scale: float, samples: int) -> Iterator[LossGraph]:
        for value, gradient in roots:
            node = getattr(value, "grad_fn", None)
            if node is not None:
                by = _factor(value, gradient)
                numbers = value.numel() if isinstance(value, torch.Tensor) else 1
                yield LossGraph(node, scale / by, samples=samples, known=self._known, numbers=numbers)


def _factor(value: Any, gradient: torch.Tensor | None) -> float:
    """By what ``backward(gradient)`` multiplies; 1 where it is not the same for all numbers, or not to be had without
    waiting for a GPU."""
    if gradient is None or gradient.numel() == 0 or gradient.is_cuda and gradient.numel() == 1:
        return 1.0
    if gradient.numel() == 1:
        return float(gradient) or 1.0
    first = gradient.flatten()[0]
    return float(first) or 1.0 if bool((gradient == first).all()) else 1.0


def _place(ratio: float) -> tuple[bool, int]:
    """The same for numbers that differ by rounding: steps of half a thousandth, of whose limits none is a simple
    fraction."""
    return ratio < 0, round(2000 * math.log(abs(ratio)) + 0.3711) if ratio else -(2**31)


def _divides(found: Reduction, samples: float, alike: bool) -> bool:
    """Whether a sum over a pass is divided by its samples, or by its numbers of some dimensions.

    Where passes differ in size, a whole number times the samples is no constant, or it would not be one in all.
    """
    each = (found.divisor or 0.0) / samples
    whole = round(each)
    if whole < 1 or not math.isclose(each, whole, rel_tol=1e-6):  # A factor of fp32 was rounded.
        return False
    return not alike or found.size / samples % whole == 0


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


def _other_count(now: Terms, before: Terms, loss: str, weighed: bool) -> Exception:
    unlike = [(x, y) for x, y in zip(now, before, strict=False) if not agree([x], [y])]
    unlike += [(x, y) for x in now for y in before if not agree([x], [y])]
    (kind, a), (_, b) = unlike[0]
    if kind == OF_A_CONSTANT:
        return refuse("loss that is no mean", "it is multiplied by numbers that are others in each pass")
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
