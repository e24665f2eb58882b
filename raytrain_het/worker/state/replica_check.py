"""Whether this worker's replica is the one that the others have: what is looked at when, and what is said of it.

The whole state that an update depends on is looked at in turn: parameters, buffers, the optimizer's state and
registered tensors by digests; rates and other settings of each parameter group, which parameters are trained,
registered numbers and the order of samples at every step. A digest travels in the step's first header. Where two
differ each member tells the hub what it has looked at, by name (:mod:`raytrain_het.membership.audit`).

After each change of members the first ``EAGER_STEPS`` steps look at up to ``EAGER_BYTES`` each. Then a part of the
bytes is looked at in every step, so that all of them are within ``every`` steps, or within as many as there are
``STEADY_BYTES``: a look reads memory that is in no cache.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from raytrain_het.worker.state.replica import Replica, row_sums

EAGER_BYTES = 5_000_000
STEADY_BYTES = 1_000_000
EAGER_STEPS = 20
MOST_PIECES = 64
"""So many tensors a look has at most, after the first steps."""
SAMPLES = 8
"""So many values of a tensor are told where machines are unlike."""

Light = dict[str, Any]
Keys = tuple[Any, ...]
Tensors = list[tuple[str, Callable[[Light], torch.Tensor | None]]]


@dataclass
class Look:
    """One look at a part of the replica, when a step was opened."""

    step: int
    part: int
    light: Light
    extra: dict[str, Any]
    pieces: list[tuple[str, int | torch.Tensor]] = field(default_factory=list)
    """By piece: the tensor's name, and its digest; or what that will be made of, on a GPU that is still at it."""
    numbers: int = 0

    def digest(self) -> int:
        """Of all pieces: from 1 to 2^63 - 1."""
        self.pieces = [(name, _folded(piece)) for name, piece in self.pieces]
        return _positive(xxhash.xxh3_64_intdigest(struct.pack(f"<{len(self.pieces)}Q", *(p for _, p in self.pieces))))


class ReplicaCheck:
    """Looks at one worker's replica. Used by the training thread; all members look at the same part in the same step.

    Args:
        replica: whose.
        every: within so many steps everything is looked at; 0 never looks.
        everything: whether all of it is, at each step.
    """

    def __init__(self, replica: Replica, *, every: int, everything: bool) -> None:
        self._replica, self._every, self._everything = replica, every, everything
        self.kind = kind_of_machine(replica.device)
        self._tensors: Tensors = []
        self._total = 0
        self._at = 0
        """Index of the tensor at which the next look begins."""
        self._offset = 0
        """Bytes of it that were looked at."""
        self._eager = EAGER_STEPS
        self._sent: dict[str, torch.Tensor] = {}
        """Samples of parameters when all had the same."""

    @property
    def looks(self) -> bool:
        """Whether replicas are compared at all."""
        return self._every > 0

    def restart(self) -> None:
        """The members have changed: begin with the first tensor, and look at much for some steps."""
        self._tensors, self._at, self._eager = [], -1, EAGER_STEPS

    def replicas_are_the_same(self) -> None:
        """All members have the same parameters now: updates are measured from here."""
        self._sent = {name: _samples(p) for name, p in self._replica.named_parameters()}

    def look(self, step: int, light: Light, extra: dict[str, Any]) -> Look | None:
        """Look at what comes next in turn; None where nothing is to be looked at.

        Args:
            step: that is opened.
            light: the replica's light part at this moment.
            extra: numbers besides, by name, that must be the same on all members.
        """
        if not self._every and not self._everything:
            return None
        look = Look(step, 0, light, extra)
        look.numbers = _positive(xxhash.xxh3_64_intdigest(_numbers_text(light, extra).encode()))
        if not self._tensors or self._at >= len(self._tensors):
            self._begin_round(step, light)
        left = self._total
        if not self._everything:
            usual = min(STEADY_BYTES, -(-self._total // max(self._every, 1)))
            left = min(EAGER_BYTES, self._total) if self._eager > 0 else usual
        self._eager -= 1
        look.part = self._at
        most = MOST_PIECES if self._eager < 0 and not self._everything else len(self._tensors) + 8
        while self._at < len(self._tensors) and left > 0 and len(look.pieces) < most:
            name, get = self._tensors[self._at]
            data = _bytes_of(get(light))
            piece = data[self._offset : self._offset + max(left // 8 * 8, 8)]
            look.pieces.append((name, _digest(piece)))
            left -= len(piece)
            self._offset += len(piece)
            if self._offset >= len(data):
                self._at, self._offset = self._at + 1, 0
        return look

    def _begin_round(self, step: int, light: Light) -> None:
        """All tensors anew; from the first one on, or after a change of members from a place that the step gives.

        So no tensor is always the last."""
        self._tensors = self._all_tensors(light)
        sizes = [t.numel() * t.element_size() if (t := get(light)) is not None else 0 for _, get in self._tensors]
        self._total = sum(sizes)
        begin = step * STEADY_BYTES % max(self._total, 1) if self._at < 0 and self._total > EAGER_BYTES else 0
        self._at, self._offset = 0, 0
        while begin >= sizes[self._at] and self._at < len(sizes) - 1:
            begin -= sizes[self._at]
            self._at += 1

    def audit(self, look: Look) -> dict[str, Any]:
        """What a member tells of a look that has found a difference."""
        look.digest()
        named = {name for name, _ in look.pieces}
        samples = {
            name: self._told(name, t)
            for name, get in self._tensors
            if name in named and (t := get(look.light)) is not None
        }
        return self._audit(look.light, look.extra, [[name, f"{piece:x}"] for name, piece in look.pieces], samples)

    def whole_audit(self, light: Light, extra: dict[str, Any]) -> dict[str, Any]:
        """Of everything: for a checkpoint."""
        tensors, samples = [], {}
        for name, get in self._all_tensors(light):
            t = get(light)
            tensors.append([name, f"{_folded(_digest(_bytes_of(t))):x}"])
            if t is not None:
                samples[name] = self._told(name, t)
        return self._audit(light, extra, tensors, samples)

    def _audit(
        self, light: Light, extra: dict[str, Any], tensors: list[Any], samples: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "numbers": [[name, value] for name, value in numbers(light, extra)],
            "tensors": tensors,
            "samples": samples,
        }

    def _told(self, name: str, t: torch.Tensor) -> tuple[list[float], float | None]:
        values, before = _samples(t), self._sent.get(name)
        moved = float((values - before).abs().max()) if before is not None and before.shape == values.shape else None
        return [float(f"{v:.9g}") for v in values.tolist()], moved

    def _all_tensors(self, light: Light) -> Tensors:
        replica = self._replica
        tensors: Tensors = [(name, functools.partial(_parameter, p)) for name, p in replica.named_parameters()]
        tensors += [(f"buffer {name}", functools.partial(_buffer, name)) for name in light["buffers"]]
        names = {id(p): name for name, p in replica.named_parameters()}
        state = replica.optimizer.state
        for group in replica.optimizer.param_groups:
            for p in group["params"]:
                for key in sorted(state.get(p, {})):
                    if isinstance(state[p][key], torch.Tensor):
                        tensors.append(
                            (f"{key} of {names.get(id(p), '?')}", functools.partial(_of_state, state, p, key))
                        )
        for name, registered in light["registered"].items():
            for keys, value in _leaves(registered):
                if isinstance(value, torch.Tensor) and name not in light["scalers"]:
                    tensors.append(
                        (f"registered {_dotted(name, *keys)}", functools.partial(_registered, (name, *keys)))
                    )
        return tensors


def _parameter(p: torch.Tensor, _: Light) -> torch.Tensor:
    return p.detach()


def _buffer(name: str, light: Light) -> torch.Tensor:
    buffer: torch.Tensor = light["buffers"][name]
    return buffer


def _of_state(state: dict[Any, Any], p: torch.Tensor, key: str, _: Light) -> torch.Tensor | None:
    value = state.get(p, {}).get(key)
    return value if isinstance(value, torch.Tensor) else None


def _registered(keys: Keys, light: Light) -> torch.Tensor | None:
    value: Any = light["registered"]
    for key in keys:
        if isinstance(value, dict) and key not in value or isinstance(value, list | tuple) and key >= len(value):
            return None
        value = value[key]
    return value if isinstance(value, torch.Tensor) else None


_SIMPLE = (int, float, str, bool, tuple, type(None))


def _numbers_text(light: Light, extra: dict[str, Any]) -> str:
    """All values of :func:`numbers`, without their names, in a tenth of the time."""
    groups = light["hyperparameters"]
    if not all(isinstance(v, _SIMPLE) for group in groups for v in group.values()):
        groups = [[_plain(v) for _, v in _leaves(group)] for group in groups]
    registered = [
        [_plain(v) for _, v in _leaves(values) if not isinstance(v, torch.Tensor)]
        for name, values in light["registered"].items()
        if name not in light["scalers"]
    ]
    return f"{groups}{registered}{bytes(light['trained'])!r}{bytes(light['training'])!r}{extra}"


def numbers(light: Light, extra: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything that is no tensor."""
    for number, group in enumerate(light["hyperparameters"]):
        for keys, value in _leaves(group):
            yield f"{_dotted(*keys)} of parameter group {number}", _plain(value)
    for name, registered in light["registered"].items():
        if name in light["scalers"]:
            continue  # Each worker has its own scale.
        for keys, value in _leaves(registered):
            if not isinstance(value, torch.Tensor):
                yield f"registered {_dotted(name, *keys)}", _plain(value)
    yield "which parameters have requires_grad", "".join("01"[flag] for flag in light["trained"])
    yield "which modules are in training mode", "".join("01"[flag] for flag in light["training"])
    for name, value in extra.items():
        yield name, _plain(value)


def _leaves(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield keys, value
        return
    for key, item in items:
        yield from _leaves(item, (*keys, key))


def _dotted(*keys: Any) -> str:
    return ".".join(map(str, keys))


def _plain(value: Any) -> Any:
    """As JSON can say it, the same on all workers if the value is."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = (
            value.tolist() if getattr(value, "size", 1) == 1 or getattr(value, "ndim", 1) == 0 else str(value.tolist())
        )
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, int | float | str | bool | None):
        return value
    return repr(value) if isinstance(value, bytes | complex | list) else type(value).__name__


def _bytes_of(t: torch.Tensor | None) -> torch.Tensor:
    """All of a tensor's elements in order, as uint8 (n,)."""
    if t is None or t.layout is not torch.strided or t.is_quantized:
        return torch.zeros(1, dtype=torch.uint8)
    t = t.detach().resolve_conj().resolve_neg()
    return (torch.view_as_real(t) if t.is_complex() else t).reshape(-1).view(torch.uint8)


def _digest(piece: torch.Tensor) -> int | torch.Tensor:
    return row_sums(piece) if piece.is_cuda else xxhash.xxh3_64_intdigest(piece.numpy().data)


def _folded(piece: int | torch.Tensor) -> int:
    return piece if isinstance(piece, int) else xxhash.xxh3_64_intdigest(piece.cpu().numpy().tobytes())


def _positive(digest: int) -> int:
    """Headers carry it as a signed number, and 0 there means that none was due."""
    return max(digest >> 1, 1)


def _samples(t: torch.Tensor) -> torch.Tensor:
    """Some values, spread over the tensor: fp64 (at most SAMPLES,), on the CPU."""
    if t.layout is not torch.strided or t.is_quantized:
        return torch.zeros(0, dtype=torch.float64)
    flat = (torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t.detach()).reshape(-1)
    num = min(SAMPLES, len(flat))
    where = torch.arange(num, device=t.device) * (len(flat) - 1) // max(num - 1, 1)
    return flat[where].double().cpu()


def kind_of_machine(device: torch.device) -> str:
    """What arithmetic depends on, in words: machines of one kind round alike."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith(("model name", "Model"))), "CPU"
    )
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {capability}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
