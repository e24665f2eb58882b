"""The state that heals, is checkpointed and moves only on commit: model, optimizer, registered objects."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from raytrain_het.errors import CheckpointError
from raytrain_het.worker.state import snapshots
from raytrain_het.worker.state.buffers import put
from raytrain_het.worker.state.registered import RegisteredState
from raytrain_het.worker.state.tensor_copies import cpu, cpu_clone, deep_copy

Hyperparameters = list[dict[str, Any]]

ROW = 2**16
"""Words of 64 bits that a digest adds up at once."""
_COMBINE = 0x9E3779B97F4A7C15


class Replica:
    """This worker's copy of what all workers share.

    Args:
        model: the user's.
        optimizer: the user's.
        registered: objects whose state is part of it.
        update: the optimizer's own step, without the engine's; by default its ``step``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        registered: RegisteredState | None = None,
        update: Callable[[], Any] | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.registered = registered or RegisteredState()
        self.update = update or optimizer.step

    @property
    def loss_scale(self) -> float:
        """What this worker's loss is multiplied by. Others may have another: a CPU beside GPUs has none."""
        scaler = self.registered.scaler
        return float(scaler.get_scale()) if scaler is not None else 1.0

    # ---------------------------------------------------------------- the light part, copied at every step's opening

    def light(self) -> dict[str, Any]:
        """Buffers, registered objects and the optimizer's settings: what a step done again has to start from."""
        return {
            "buffers": self.buffers(),
            "registered": self.registered.copies(),
            "hyperparameters": self.hyperparameters(),
            "scalers": [name for name, obj in self.registered.objects.items() if isinstance(obj, torch.amp.GradScaler)],
            "trained": [p.requires_grad for p in self._parts[0]],
            "with_gradient": [p.grad is not None for p in self._parts[0]],
            "training": [module.training for module in self._parts[1]],
        }

    def offered(self, light: dict[str, Any]) -> dict[str, Any]:
        """What :meth:`light` returned, on the CPU, for a peer."""
        return deep_copy(light, cpu_clone)

    def restore_light(self, light: dict[str, Any], *, buffers: bool = True) -> None:
        """Go back to what :meth:`light` returned."""
        self.registered.load_copies(light["registered"])
        self.set_hyperparameters(light["hyperparameters"])
        if "trained" in light:
            for p, flag in zip(self._parts[0], light["trained"], strict=True):
                if p.requires_grad != flag:
                    p.requires_grad_(flag)
            for module, flag in zip(self._parts[1], light["training"], strict=True):
                module.training = flag
        if buffers:
            self.set_buffers(light["buffers"])

    def set_gradients(self, light: dict[str, Any]) -> None:
        """Zeros where others have a gradient and this worker has none: an optimizer takes zeros for a gradient, and
        passes over None. It matters where ``zero_grad(set_to_none=False)`` leaves them at a parameter that rests."""
        for p, flag in zip(self._parts[0], light.get("with_gradient", ()), strict=False):
            if flag and p.grad is None:
                p.grad = torch.zeros_like(p, memory_format=torch.preserve_format)

    @functools.cached_property
    def _parts(self) -> tuple[list[nn.Parameter], list[nn.Module]]:
        """The model's parameters and modules, which stay the same while it trains."""
        return list(self.model.parameters()), list(self.model.modules())

    @functools.cached_property
    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.model.named_parameters())

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The model's, without a walk through it."""
        return self._named

    @property
    def device(self) -> torch.device:
        """That of the first parameter."""
        return self._named[0][1].device

    @functools.cached_property
    def _buffer_places(self) -> list[tuple[str, nn.Module, str]]:
        return [
            (f"{path}.{name}" if path else name, module, name)
            for path, module in self.model.named_modules()
            for name in module._buffers
        ]

    def set_buffers(self, values: dict[str, torch.Tensor]) -> None:
        """Give the buffers these values, by name."""
        with torch.no_grad():
            for name, module, attribute in self._buffer_places:
                if name in values and module._buffers.get(attribute) is not None:
                    put((name, module, attribute), values[name])

    def buffers(self) -> dict[str, torch.Tensor]:
        """Copies of the buffers that heal, by name."""
        return {name: b.detach().clone() for name, b in self._buffers()}

    def _buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As the model's ``named_buffers()``, without a walk through the model at every step.

        Those that the modules had at the first one, also if they were None then.
        """
        for name, module, attribute in self._buffer_places:
            buffer = getattr(module, attribute)
            if buffer is not None and buffer.layout is torch.strided and not buffer.is_quantized:
                yield name, buffer

    def learning_rate(self) -> float | None:
        """That of the first parameter group now; None where the optimizer has none."""
        rate = self.optimizer.param_groups[0].get("lr")
        return float(rate) if isinstance(rate, int | float | torch.Tensor) else None

    def hyperparameters(self) -> Hyperparameters:
        """The optimizer's settings by parameter group (rate, momentum, ...)."""
        return [
            {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]

    def set_hyperparameters(self, values: Hyperparameters) -> None:
        """The inverse of :meth:`hyperparameters`."""
        for group, new in zip(self.optimizer.param_groups, values, strict=True):
            for key, value in new.items():
                if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value

    # ---------------------------------------------------------------- the whole

    def snapshot(self, *, copy_tensors: bool = True) -> dict[str, Any]:
        """Everything, on the CPU. With ``copy_tensors=False`` it shares memory with the live state where it can."""
        keep = cpu_clone if copy_tensors else cpu
        return {**snapshots.take(self.model, self.optimizer, keep), "registered": self.registered.cpu_copies()}

    def check_storable(self) -> None:
        """Try at the beginning whether the optimizer and what is registered can be sent to a peer and stored.

        Raises:
            CheckpointError: something in it cannot be; the message names it.
        """
        try:
            self.optimizer.state_dict()
        except Exception as error:
            raise CheckpointError(
                f"the optimizer's state_dict() raises {type(error).__name__}: {error}. Call super().__init__(params, "
                f"defaults) in {type(self.optimizer).__name__.removeprefix('Het')}, or write its state_dict() and "
                "load_state_dict()."
            ) from error
        self.registered.check_storable()

    def load(self, snapshot: dict[str, Any]) -> None:
        """Take over a snapshot.

        Raises:
            CheckpointError: it is from another model or optimizer, or has other registered objects than this worker;
                nothing has changed then.
        """
        self.registered.check_names(snapshot["registered"])
        snapshots.check(self.model, self.optimizer, snapshot)
        snapshots.put_back(self.model, self.optimizer, snapshot)
        self.registered.load(snapshot["registered"])

    def digest(self, *, optimizer: bool = False) -> int:
        """A number from 1 to 2^63 - 1 that differs if any parameter's bits differ (about surely).

        With ``optimizer`` also if the tensors of the optimizer's state differ. Buffers are not part of it: they are
        averaged at every commit, and ones that are not may be a worker's own.

        Values are read as 64-bit words, each weighed by its place with a pseudo-random odd ``a_j``, and rows of ``ROW``
        words are added up: ``s_i = sum_j h(a_j x_ij)`` with ``h(y) = y xor (y >> 32)``, all of it mod 2^64. Through
        ``h`` a word's highest bits, signs among them, reach lower ones too; without it two signs would cancel. The
        rows of all tensors, in order, make ``sum_i c^(n-i) s_i``.
        """
        tensors: list[torch.Tensor] = [p.detach() for p in self.model.parameters()]
        if optimizer:
            for state in self.optimizer.state_dict()["state"].values():
                tensors += [v for _, v in sorted(state.items()) if isinstance(v, torch.Tensor)]
        total = 0
        for t in tensors:
            for row in row_sums(t).tolist():
                total = (total * _COMBINE + row) % 2**64
        return max(total >> 1, 1)  # Headers carry it as a signed number, and 0 there means that none was due.

    def parameter_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def pack_parameters(self) -> torch.Tensor:
        """All parameters as one uint8 tensor on the CPU."""
        return torch.cat([p.detach().cpu().contiguous().view(-1).view(torch.uint8) for p in self.model.parameters()])

    def unpack_parameters(self, data: torch.Tensor) -> float:
        """Take over packed parameters; returns the largest absolute difference there was."""
        drift, place = 0.0, 0
        with torch.no_grad():
            for p in self.model.parameters():
                size = p.numel() * p.element_size()
                new = data[place : place + size].clone().view(p.dtype).view(p.shape).to(p.device)
                drift = max(drift, float((new - p).abs().max()) if p.numel() else 0.0)
                p.copy_(new)
                place += size
        return drift


@functools.cache
def _weights(device: torch.device) -> torch.Tensor:
    """``a_j``: odd numbers (ROW,) int64 that are the same with every version of numpy, on every device."""
    bits = np.random.PCG64(np.random.SeedSequence(0)).random_raw(ROW) | np.uint64(1)
    return torch.from_numpy(bits.view(np.int64)).to(device)


def row_sums(t: torch.Tensor) -> torch.Tensor:
    """``s_i`` of one tensor (rows,) int64; see :meth:`Replica.digest`."""
    data = t.detach().contiguous().view(-1).view(torch.uint8)
    if data.numel() % 8 or data.storage_offset() % 8:
        data = torch.cat([data, data.new_zeros(-data.numel() % 8)])
    words, weights = data.view(torch.int64), _weights(t.device)
    whole = words.numel() // ROW * ROW
    # A row at a time stays in a CPU's cache; a GPU has better use for more at once.
    parts = [*words[:whole].view(-1, ROW).split(64 if t.is_cuda else 1), words[None, whole:]]
    sums = []
    for part in parts:
        y = part * weights[: part.shape[1]]
        y ^= y >> 32
        sums.append(y.sum(dim=1))
    return torch.cat(sums)
