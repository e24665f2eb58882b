"""A run that goes on under its name with other settings: which are in force, and which the program asked for."""

from __future__ import annotations

from typing import Any

import torch

from raytrain_het.worker.step.rates import OWN

_OF_TORCH = ("params", "initial_lr", OWN)
"""Not settings by themselves: a scheduler's, or this run's own."""
MAX_TOLD = 8


def asked_for(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """By parameter group: what the program has set, before a checkpoint is loaded."""
    return [
        {name: _plain(value) for name, value in group.items() if name not in _OF_TORCH} | {"lr": _own_rate(group)}
        for group in optimizer.param_groups
    ]


def told_of(asked: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> str | None:
    """What a checkpoint has brought back in place of it, in a sentence; None where it is the same."""
    in_force = asked_for(optimizer)
    said = []
    for k, (wanted, now) in enumerate(zip(asked, in_force, strict=False)):
        of = f" of group {k}" * (len(in_force) > 1)
        for name in sorted(wanted.keys() & now.keys(), key=lambda name: (name != "lr", name)):
            if wanted[name] != now[name]:
                what = "the learning rate" if name == "lr" else name
                said.append(f"{what}{of} in force is {now[name]!r}, the program asked for {wanted[name]!r}")
    if not said:
        return None
    more = f"; and {len(said) - MAX_TOLD} more" if len(said) > MAX_TOLD else ""
    return (
        f"the checkpoint that this run goes on from has brought its optimizer's settings back: "
        f"{'; '.join(said[:MAX_TOLD])}{more}. To train with the program's, set them in the loop over epochs "
        "(optimizer.param_groups[0]['lr'] = ...), or give the run another name"
    )


def _own_rate(group: dict[str, Any]) -> Any:
    """Without what a schedule has made of it."""
    return _plain(group.get(OWN, group.get("initial_lr", group.get("lr"))))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value
