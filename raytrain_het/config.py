"""HetConfig: the settings of a run that are neither Ray's nor the model's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from raytrain_het.codec_options import AUTO_CODECS, AutoOptions, one_word, options_of, used_together
from raytrain_het.errors import ConfigError
from raytrain_het.named_options import ABOVE_0, FINITE, TRUE_OR_FALSE, Allowed, one_of, whole_number_from
from raytrain_het.optim import Schedule, schedule_of
from raytrain_het.plain import is_number, nearest, plain
from raytrain_het.score_policies import SCORE_POLICIES


def _require(condition: bool, field: str, value: object, allowed: str, fix: str) -> None:
    if not condition:
        raise ConfigError(f"{field}={value!r} is not valid: allowed is {allowed}. {fix}")


Config = TypeVar("Config")


def refuse_unknown(owner: str, named: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse keywords that a class does not have.

    Args:
        owner: The class's name, for the message.
        named: The keywords that were given, with their values.
        known: The keywords that there are.

    Raises:
        ConfigError: A keyword is unknown; the message has the nearest right one.
    """
    for name in sorted(named.keys() - set(known)):
        near = nearest(name, known)
        fix = f"Write {near}={named[name]!r}" if near else "Leave it out"
        raise ConfigError(
            f"{owner}({name}={named[name]!r}): there is no such setting. {fix}. Allowed: {', '.join(known)}."
        )


def names_unknown_fields(cls: type[Config]) -> type[Config]:
    """Decorate a dataclass: a misspelt field raises a :class:`ConfigError` that has the nearest right one."""
    init = cls.__init__

    @functools.wraps(init)
    def checked(self: Config, *values: Any, **named: Any) -> None:
        refuse_unknown(cls.__name__, named, [f.name for f in dataclasses.fields(cls) if f.init])  # type: ignore[arg-type]
        init(self, *values, **named)

    cls.__init__ = checked  # type: ignore[assignment, method-assign]
    return cls


@names_unknown_fields
@dataclass(frozen=True, kw_only=True)
class HetConfig:
    """Settings of the step protocol and of membership.

    Raises:
        ConfigError: A value is not allowed; the message says which, and what to write.
    """

    shares: Literal["auto"] | tuple[float, ...] | None = "auto"
    """Batch shares. ``"auto"``: from kept step times or the hardware at first, then as fast as each
    worker turns out to be.

    Or relative shares by world rank (any non-negative numbers, they are normalised); a worker
    with share 0 takes part but trains on nothing. ``None`` is equal shares."""

    score_policy: str | Callable[[Any], float] = "train_step"
    """How a worker's measurements become its score. ``train_step``: samples per second of the real
    model, learnt from the run's own steps, which start from kept step times or the hardware. With
    ``flops`` or ``memory_bandwidth``, or with a function from a
    ``raytrain_het.balance.profile.Profile`` to a number above 0, scores come from the hardware alone,
    and ``shares="auto"`` is in proportion to them; given shares stay, and scores are shown beside
    them."""

    warm_spares: bool = False
    """Whether ``shares="auto"`` may hold a worker that costs more than it gives at a share of 0. It
    still receives every update, and is there when another one dies."""

    alpha: float = 0.0
    """Exponent of the gradient weight ``r_i = p_i^-alpha``, with ``p_i`` the worker's measured
    speed over the mean. Synchronous training has one learning rate: ``r_i`` weighs worker ``i``'s
    gradient, ``g = sum b_i r_i g_i / sum b_i r_i``. 0 is the plain mean over all samples."""

    lr_scale_normalisation: Literal["mean", "none"] = "mean"
    """``mean`` divides by the sum of weights. ``none`` is the literal sum ``sum r_i g_i`` over
    workers, with ``g_i`` the mean over the worker's own samples."""

    compression: str | dict[str, dict[str, Any] | None] | tuple[str | dict[str, dict[str, Any] | None], ...] = "none"
    """How gradients travel: a codec's name (``none`` is fp32; ``bf16``, ``fp16``, ``int8``, ``int4``,
    ``sign``, ``topk``, ``randomk``, ``lowrank``), one with options (docs/compression.md has them all),
    such as ``{"topk": {"density": 0.01, "warmup_epochs": 2}}``, or one of these for each worker.
    ``auto`` measures links and codecs, and chooses one for each worker where that makes steps shorter;
    it leaves out those that lose more of a message than ``{"auto": {"error": 0.2}}``, the default.
    Read back, a codec is one word, options at their defaults left out."""

    hierarchy: bool | Literal["auto"] = "auto"
    """Whether gradients of workers on one machine are added up there, uncompressed, so that only their
    sum crosses the machine's link. ``auto``: with ``compression="auto"`` where steps become shorter,
    else not."""

    backend: Literal["tcp", "nccl"] = "tcp"
    """What carries the messages.

    ``tcp`` works for any mix of CPU and GPU workers, from the CPU. ``nccl`` keeps them on
    the GPUs, where every worker has one of its own; it is untested for want of a machine with several."""

    schedule: str | dict[str, dict[str, Any] | None] | None = None
    """How the learning rate decays: ``constant``, ``step``, ``exponential``, ``inverse_time``, ``cosine`` or
    ``linear``, or one with options (docs/training.md has them all), such as
    ``{"cosine": {"floor": 0.01, "warmup_epochs": 1}}``. It multiplies the
    optimizer's own rate, before each step. None leaves the rate alone; a torch scheduler of your own goes through
    ``register_state``."""

    clip: dict[str, float] | None = None
    """``{"norm": 1.0}`` clips the mean gradient of all workers to that norm, ``{"value": 0.5}`` each of
    its elements, and both may be given; just before the update. None clips nothing."""

    bucket_mib: float = 4.0
    """Target size of a gradient bucket. Smaller overlaps more, larger has less overhead."""

    micro_batch_size: int | None = None
    """Most samples in one forward pass. A larger share is handed out in several, summed exactly."""

    seed: int = 0
    """Seed of the data order and of the randomness that belongs to a sample."""

    replica_check_steps: int = 50
    """Within so many steps everything that updates depend on is compared between workers, a part of it in each step:
    parameters, buffers, optimizer and registered state, settings. A difference is an error that names it. On unlike
    devices, which round differently, parameters are sent anew from one worker every so many steps. 0 never."""

    check: Literal["rolling", "every_step"] = "rolling"
    """``every_step`` compares all of it at every step, and the first steps' gradients with those of one process that
    has the whole batch: slow, to find what goes wrong."""

    max_skipped_steps: int = 10
    """So many updates in a row may be skipped for non-finite gradients before the run fails."""

    silence_s: float = 0.5
    """A worker that leaves a ping unanswered for so long, while its peers wait, is suspended: the others go on without
    it, and it catches up when it is heard again. Where answers usually take longer, so is the wait."""

    hang_limit_s: float = 600.0
    """A worker that answers pings but makes its peers wait for so long is dropped, and so is a suspended one that
    nothing was heard of for so long."""

    storage_limit_s: float = 3600.0
    """A checkpoint that the storage has not taken after so long is skipped, and the last good one stays. Until then
    nobody is dropped for it."""

    start_timeout_s: float = 120.0
    """How long the first step waits for all workers before it starts with those that are there."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        if self.shares is not None and self.shares != "auto":
            object.__setattr__(self, "shares", _checked_shares(self.shares))
        each = isinstance(self.compression, Sequence) and not isinstance(self.compression, str)
        object.__setattr__(self, "compression", self.codecs if each else self.codecs[0])
        if self.schedule is not None:
            schedule_of(self.schedule)
        for name, (allowed, fix) in _RULES.items():
            _require(allowed.holds(getattr(self, name)), name, getattr(self, name), allowed.words, fix)
        _require(
            not self.warm_spares or self.shares == "auto",
            "warm_spares",
            self.warm_spares,
            "true or false, and true with shares='auto' only",
            "Write warm_spares=False.",
        )

    @property
    def codecs(self) -> tuple[str, ...]:
        """``compression`` in words: one for all workers, or one for each; or ``auto``."""
        if isinstance(self.compression, Sequence) and not isinstance(self.compression, str):
            _require(
                len(self.compression) > 0,
                "compression",
                self.compression,
                "one codec, or one for each worker",
                "Write compression='none'.",
            )
            words = tuple(map(one_word, self.compression))
            together = [word for word in words if used_together(word)]
            _require(
                not together or len(set(words)) == 1,
                "compression",
                self.compression,
                f"{' or '.join(together)} for all workers or for none: its messages take another way",
                f"Write compression={(together or words)[0]!r}.",
            )
            return words
        return (one_word(self.compression, auto=True),)

    @property
    def compression_error(self) -> float | None:
        """How much of a message ``auto`` may lose; None if codecs are given."""
        options = options_of(self.codecs[0])
        return float(options.error) if isinstance(options, AutoOptions) else None

    @property
    def decay(self) -> Schedule | None:
        """``schedule``, parsed."""
        return schedule_of(self.schedule) if self.schedule is not None else None

    @property
    def given_hierarchy(self) -> bool | None:
        """``hierarchy`` as true or false; None if ``auto`` chooses it together with the codecs."""
        if isinstance(self.hierarchy, bool):
            return self.hierarchy
        return None if self.compression_error is not None else False

    def codecs_for(self, num_workers: int) -> tuple[str, ...]:
        """The codecs that a run of so many workers starts with: one for all of them, or one for each.

        Raises:
            ConfigError: There are several codecs, but not one for each worker.
        """
        codecs = self.codecs if self.compression_error is None else AUTO_CODECS[:1]
        _require(
            len(codecs) in (1, num_workers),
            "compression",
            self.compression,
            f"one codec, or one for each of the run's {num_workers} workers",
            f"Write compression={[codecs[0]] * num_workers}.",
        )
        return codecs if len(codecs) == num_workers else codecs * num_workers

    @property
    def possible_codecs(self) -> tuple[str, ...]:
        """Every codec that some worker may come to use."""
        return self.codecs if self.compression_error is None else AUTO_CODECS

    @property
    def follows_speeds(self) -> bool:
        """Whether any setting depends on how fast workers are."""
        by_speed = self.shares == "auto" or self.alpha != 0 or self.score_policy != "train_step"
        return by_speed or self.compression_error is not None

    @property
    def given_shares(self) -> tuple[float, ...] | None:
        """The relative shares that were given; None if shares are equal, or follow speeds."""
        return None if self.shares == "auto" else self.shares


def _checked_shares(given: Any) -> tuple[float, ...]:
    # A dictionary would give its keys, and a set has no order.
    ordered = isinstance(given, Iterable) and not isinstance(given, Mapping | Set)
    shares = tuple(map(plain, given)) if ordered else ()
    _require(
        all(is_number(s) and s >= 0 for s in shares) and sum(shares) > 0,
        "shares",
        given,
        "'auto', None, or non-negative numbers, at least one above 0",
        "Write one number per worker, such as shares=[3, 1].",
    )
    return tuple(float(s) for s in shares)


def _is_clip(clip: Any) -> bool:
    if not isinstance(clip, Mapping):
        return clip is None
    limits = clip.values()
    return len(clip) > 0 and set(clip) <= {"norm", "value"} and all(is_number(x) and x > 0 for x in limits)


def _is_micro_batch_size(value: Any) -> bool:
    return value is None or whole_number_from(1).holds(value)


def _by_default(name: str, allowed: Allowed) -> tuple[Allowed, str]:
    (default,) = (f.default for f in dataclasses.fields(HetConfig) if f.name == name)
    return allowed, f"The default is {default}."


_RULES: dict[str, tuple[Allowed, str]] = {
    "alpha": (FINITE, "The default is 0.0: the plain mean."),
    "lr_scale_normalisation": (one_of("mean", "none"), "Write lr_scale_normalisation='mean'."),
    "hierarchy": (
        Allowed("true, false or 'auto'", lambda value: isinstance(value, bool) or value == "auto"),
        "Write hierarchy='auto'.",
    ),
    "backend": (one_of("tcp", "nccl"), "Write backend='tcp'."),
    "micro_batch_size": (
        Allowed("a whole number from 1, or None", _is_micro_batch_size),
        "Leave it out for one batch.",
    ),
    "clip": (Allowed("None, or a 'norm' or 'value' above 0, or both", _is_clip), "Write clip={'norm': 1.0}."),
    "score_policy": (
        Allowed(
            f"{', '.join(map(repr, SCORE_POLICIES))}, or a function from a Profile to a number",
            lambda value: callable(value) or (isinstance(value, str) and value in SCORE_POLICIES),
        ),
        "Write score_policy='train_step'.",
    ),
    "warm_spares": (
        Allowed("true or false, and true with shares='auto' only", TRUE_OR_FALSE.holds),
        "Write warm_spares=False.",
    ),
    "check": (one_of("rolling", "every_step"), "Write check='every_step' to look for an error."),
    **{
        name: _by_default(name, ABOVE_0)
        for name in ("bucket_mib", "silence_s", "hang_limit_s", "storage_limit_s", "start_timeout_s")
    },
    **{name: _by_default(name, whole_number_from(0)) for name in ("replica_check_steps", "max_skipped_steps", "seed")},
}
"""By field: what is allowed, and what to write instead."""
