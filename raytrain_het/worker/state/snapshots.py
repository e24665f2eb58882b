"""Everything that a replica is, as one dictionary, and the way back: exact, or refused by name before it changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from raytrain_het.errors import CheckpointError
from raytrain_het.worker.data import strides

MAX_NAMED = 4
"""So many differences are named."""
_OUTSIDE = "(not in the model)"
_FLAGS = {"maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay", "initial_lr"}
"""Settings that torch gives to older states by itself, or that a scheduler writes."""


def take(model: nn.Module, optimizer: torch.optim.Optimizer, keep: Callable[[Any], Any]) -> dict[str, Any]:
    """Model and optimizer. ``keep`` makes of each tensor what is kept."""
    state = model.state_dict()
    kept = OrderedDict((name, keep(value)) for name, value in state.items())
    if hasattr(state, "_metadata"):  # The versions of its modules: without them torch reads some as old ones.
        kept._metadata = OrderedDict((k, dict(v)) for k, v in state._metadata.items())  # type: ignore[attr-defined]
    return {
        "model": kept,
        "buffers": {name: keep(buffer) for name, _, _, buffer in _unsaved_buffers(model)},
        "optimizer": _map(optimizer.state_dict(), keep),
        "optimizer_class": class_name(optimizer),
        "groups": group_names(model, optimizer),
    }


def check(model: nn.Module, optimizer: torch.optim.Optimizer, snapshot: dict[str, Any]) -> None:
    """Raises:
    CheckpointError: the snapshot is from another model or optimizer; the message names the differences.
    """
    found = [*_of_model(model, snapshot), *_of_optimizer(model, optimizer, snapshot)]
    if found:
        more = f"; and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
        raise CheckpointError(
            f"the saved state is from another program: {'; '.join(found[:MAX_NAMED])}{more}. Build the same model and "
            "optimizer, or start anew with another name: RunConfig(name=...), or --name."
        )


def put_back(model: nn.Module, optimizer: torch.optim.Optimizer, snapshot: dict[str, Any]) -> None:
    """Take over what :func:`take` returned, and :func:`check` accepted.

    Raises:
        CheckpointError: torch does not take it.
    """
    overlapping: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (owner, name, t)
        for module in model.modules()
        for owner in (module._parameters, module._buffers)
        for name, t in owner.items()
        if t is not None and strides.overlaps(t)
    ]
    for owner, name, t in overlapping:
        dense = t.detach().contiguous()
        owner[name] = nn.Parameter(dense, t.requires_grad) if isinstance(t, nn.Parameter) else dense
    try:
        model.load_state_dict(snapshot["model"])
    except RuntimeError as error:
        raise CheckpointError(f"the saved state does not fit the model: {' '.join(str(error).split())}") from error
    finally:
        with torch.no_grad():
            for owner, name, t in overlapping:
                loaded = owner[name]
                if loaded is not None and strides.put(t.data, loaded.detach()):
                    owner[name] = t
    saved = snapshot.get("buffers")
    if saved is not None:
        with torch.no_grad():
            for name, module, attribute, buffer in _unsaved_buffers(model):
                if buffer is not None and not strides.put(buffer, saved[name].to(buffer.device)):
                    module._buffers[attribute] = strides.copy(saved[name], buffer.device)
    try:
        optimizer.load_state_dict(snapshot["optimizer"])
    except Exception as error:
        raise CheckpointError(
            f"the saved state does not fit the optimizer: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if getattr(type(optimizer), "load_state_dict", None) is torch.optim.Optimizer.load_state_dict:
        _settle(optimizer, snapshot["optimizer"])


def class_name(optimizer: torch.optim.Optimizer) -> str:
    """The name of the user's class; :func:`~raytrain_het.worker.step.optimizer.make_het` puts one of ours before it."""
    ours = "raytrain_het.worker.step.optimizer"
    return next(c.__name__ for c in type(optimizer).__mro__ if c.__module__ != ours)


def group_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the parameters of each group."""
    names: dict[int, str] = {}
    for name, p in model.named_parameters():
        names.setdefault(id(p), name)
    return [[names.get(id(p), _OUTSIDE) for p in group["params"]] for group in optimizer.param_groups]


# ---------------------------------------------------------------- differences


def _of_model(model: nn.Module, snapshot: dict[str, Any]) -> Iterator[str]:
    theirs, here = snapshot["model"], model.state_dict()
    buffers = dict(snapshot.get("buffers") or {})
    mine = {name: buffer for name, _, _, buffer in _unsaved_buffers(model)} if "buffers" in snapshot else {}
    empty = {name for name, b in _all_buffers(model) if b is None}
    translated = any(module._load_state_dict_pre_hooks for module in model.modules())
    for name in () if translated else (n for n in (*here, *mine) if n not in theirs and n not in buffers):
        if mine.get(name, 0) is not None:
            yield f"it has no {name!r}"
    for name, there in (*theirs.items(), *buffers.items()):
        value = here.get(name, mine.get(name))
        if name in empty and there is not None:
            yield f"buffer {name!r} is None here and {_form(there)} there"
        elif name not in here and name not in mine:
            if not translated:
                yield f"it has a {name!r} that the model lacks"
        elif there is None and name in mine and value is not None:
            yield f"buffer {name!r} is None there and {_form(value)} here"
        elif None not in (_shape(value), _shape(there)) and _shape(value) != _shape(there):
            yield f"{name!r} has shape {_shape(there)} there and {_shape(value)} here"


def _of_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, snapshot: dict[str, Any]) -> Iterator[str]:
    state, mine = snapshot["optimizer"], optimizer.param_groups
    there = snapshot.get("optimizer_class", class_name(optimizer))
    if there != class_name(optimizer):
        yield f"its optimizer is {there}, here it is {class_name(optimizer)}"
        return
    theirs = state.get("param_groups")
    if theirs is None:
        return  # An optimizer with a state_dict of its own kind.
    if [len(g["params"]) for g in theirs] != [len(g["params"]) for g in mine]:
        yield (
            f"its optimizer has parameter groups of {[len(g['params']) for g in theirs]} parameters, here they have "
            f"{[len(g['params']) for g in mine]}"
        )
        return
    if "optimizer_class" not in snapshot:
        missing = sorted(set(optimizer.defaults) - _FLAGS - set(theirs[0]) if theirs else ())
        if missing:
            yield f"its optimizer is another one, without {', '.join(missing)}"
    for k, (names, here) in enumerate(zip(snapshot.get("groups") or (), group_names(model, optimizer), strict=False)):
        other = next(((a, b) for a, b in zip(names, here, strict=True) if a != b), None)
        if other is not None:
            yield f"parameter group {k} of its optimizer has {other[0]!r} where there is {other[1]!r} here"


def _shape(value: Any) -> list[int] | None:
    """None for what has none yet, as in lazy modules."""
    return list(value.shape) if isinstance(value, torch.Tensor) and not is_lazy(value) else None


def _form(value: Any) -> str:
    return f"of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def _all_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            yield (f"{path}.{name}" if path else name), buffer


def _unsaved_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor | None]]:
    """Those that the model's ``state_dict`` leaves out: registered with ``persistent=False``."""
    for path, module in model.named_modules():
        for name in module._buffers:
            if name in module._non_persistent_buffers_set:
                yield (f"{path}.{name}" if path else name), module, name, module._buffers[name]


# ---------------------------------------------------------------- the optimizer's state


def _settle(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """What torch has cast to the parameter's type is again of its own; what has the parameter's shape has its strides.

    torch casts each tensor of the state, so that an average in fp32 of a parameter in bf16 would become bf16.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [i for group in saved["param_groups"] for i in group["params"]]
    for index, p in zip(indices, params, strict=True):
        values = saved["state"].get(index)
        if isinstance(values, dict) and p in optimizer.state:
            optimizer.state[p] = {
                key: _settled(optimizer.state[p].get(key), value, p, key) for key, value in values.items()
            }


def _settled(loaded: Any, saved: Any, p: torch.Tensor, key: Any = None) -> Any:
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor):
        if key == "step":  # Its type and device are what a fused optimizer wants.
            return loaded if loaded is not saved else strides.copy(saved)
        value = strides.aligned(saved.to(loaded.device), p)
        return value if value is not saved else strides.copy(saved)
    if isinstance(saved, dict):
        inner = loaded if isinstance(loaded, dict) else {}
        return {k: _settled(inner.get(k), v, p, k) for k, v in saved.items()}
    if type(saved) in (list, tuple):
        items = loaded if type(loaded) is type(saved) and len(loaded) == len(saved) else [None] * len(saved)
        return type(saved)(_settled(a, b, p) for a, b in zip(items, saved, strict=True))
    if isinstance(saved, torch.Tensor):
        return strides.copy(saved)
    return saved if loaded is None or isinstance(saved, str | bytes) else loaded


def _map(value: Any, fn: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {k: _map(v, fn) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map(v, fn) for v in value)
    return fn(value)
