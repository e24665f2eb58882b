"""Objects whose state heals, is checkpointed and moves on commit only: schedulers, loss scalers, the user's own."""

from __future__ import annotations

import math
from typing import Any

import torch

from raytrain_het.errors import CheckpointError, ConfigError, LoopOrderError
from raytrain_het.worker.state import parts
from raytrain_het.worker.state.tensor_copies import clone, cpu_clone, deep_copy


class RegisteredState:
    """One worker's registered objects, by name."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}

    def add(self, name: str, obj: Any) -> None:
        """Keep an object's ``state_dict`` in step with the model.

        Raises:
            ConfigError: it has none, or the name is taken.
        """
        if not (hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict")):
            raise ConfigError(
                f"register_state({name!r}, ...) got a {type(obj).__name__}, which has no state_dict() and "
                "load_state_dict(): give it both, or register an object that has them."
            )
        if self.objects.get(name, obj) is not obj:
            raise ConfigError(f"register_state({name!r}, ...): the name is taken. Use one name per object.")
        if isinstance(obj, torch.amp.GradScaler):
            self._check_scaler(name, obj)
        self.objects[name] = obj

    def _check_scaler(self, name: str, scaler: torch.amp.GradScaler) -> None:
        if self.scaler not in (None, scaler):
            raise ConfigError(
                f"register_state({name!r}, ...): a second GradScaler. Allowed is one for a run: use the one that is "
                "registered for all losses."
            )
        if not scaler.is_enabled():
            return
        for what, value in (
            ("init_scale", scaler.get_scale()),
            ("growth_factor", scaler.get_growth_factor()),
            ("backoff_factor", scaler.get_backoff_factor()),
        ):
            if math.frexp(value)[0] != 0.5:
                raise ConfigError(
                    f"register_state({name!r}, ...): GradScaler({what}={value:g}): allowed are powers of 2, which "
                    f"leave the same bits on every worker. Write {what}={2.0 ** round(math.log2(value)):g}."
                )

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler that is registered."""
        return next((obj for obj in self.objects.values() if isinstance(obj, torch.amp.GradScaler)), None)

    def copies(self) -> dict[str, Any]:
        """By name: a copy of each object's state, on its device."""
        return {name: deep_copy(obj.state_dict(), clone) for name, obj in self.objects.items()}

    def cpu_copies(self) -> dict[str, Any]:
        """By name: a copy of each object's state, on the CPU.

        Raises:
            CheckpointError: a state cannot be copied.
        """
        states = {}
        for name, obj in self.objects.items():
            try:
                states[name] = deep_copy(obj.state_dict(), cpu_clone)
            except Exception as error:
                raise CheckpointError(
                    f"the state of {name!r} cannot be copied ({type(error).__name__}: {error}). Return tensors and "
                    "plain values from its state_dict()."
                ) from error
        return states

    def check_storable(self) -> None:
        """Try whether the states can be sent to a peer and stored.

        Raises:
            CheckpointError: one cannot be; the message names it.
        """
        for name, state in self.cpu_copies().items():
            parts.pickled(parts.split(state, f"registered state {name!r}: it")[1])

    def load_copies(self, states: dict[str, Any]) -> None:
        """Go back to what :meth:`copies` returned.

        Raises:
            LoopOrderError: an object was registered since.
        """
        for name in self.objects:
            if name not in states:
                raise LoopOrderError(
                    f"state {name!r} was registered after the first step: call register_state() before loader.epochs()."
                )
        self.load(states)

    def check_names(self, states: dict[str, Any]) -> None:
        """
        Raises:
            CheckpointError: a saved state has other objects than this worker has registered.
        """
        theirs, mine = set(states), set(self.objects)
        if theirs != mine:
            raise CheckpointError(
                f"the saved state has registered objects {sorted(theirs)}, here they are {sorted(mine)}: "
                f"{sorted(theirs ^ mine)} would not be restored. Register the same names with register_state() before "
                "loader.epochs(), or start anew with another name: RunConfig(name=...), or --name."
            )

    def load(self, states: dict[str, Any]) -> None:
        """Give every object its state; a copy, for some keep what they are given."""
        for name, obj in self.objects.items():
            if isinstance(obj, torch.amp.GradScaler) and not states[name]:
                continue  # From a worker that does not scale its loss: this one's scale is its own affair.
            obj.load_state_dict(deep_copy(states[name], clone))
