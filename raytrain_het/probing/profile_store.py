"""Profiles that outlive a run: known hardware, and known models on it, are not measured again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from raytrain_het.balance.batch_shares import StepCost
from raytrain_het.balance.profile import Profile
from raytrain_het.files import write_whole
from raytrain_het.plain import is_number

_keeps_nothing = False


def keep_nothing() -> None:
    """From now on, stores in this process keep nothing and know nothing, unless they name a folder.

    A process calls this if it is slowed down in a way that the key of its hardware does not show: its measurements are
    not those of the machine.
    """
    global _keeps_nothing
    _keeps_nothing = True


class ProfileStore:
    """A folder with a small JSON file per key.

    A store that is missing, damaged or not writable knows nothing, and never raises an error. Files are replaced as a
    whole, so several processes may use the store at once.

    Args:
        folder: The default is ``raytrain_het/profiles`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``; after
            :func:`keep_nothing` there is no default.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or _default_folder()
        self._keeps = folder is not None or not _keeps_nothing

    def profile(self, hardware: str) -> Profile | None:
        """The profile of a hardware by its key (``probes.hardware_key``), or None."""
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            data = self._read(hardware)
            profile = Profile.from_json(data) if data is not None else None
            return profile if profile is not None and _is_sound(profile) else None
        return None

    def keep_profile(self, hardware: str, profile: Profile) -> None:
        """Keep the profile of a hardware. Its step cost belongs to a model, and is left out."""
        self._write(hardware, dataclasses.replace(profile, step=None).to_json())

    def step(self, hardware: str, model: str) -> StepCost | None:
        """The cost of a model's training step on a hardware by the model's fingerprint, or None."""
        with contextlib.suppress(TypeError):
            data = self._read(f"{hardware}, model {model}")
            cost = StepCost(**data) if data is not None else None
            if cost is not None and _is_number(cost.fixed_s, or_zero=True) and _is_number(cost.per_sample_s):
                return cost
        return None

    def keep_step(self, hardware: str, model: str, cost: StepCost) -> None:
        """Keep the cost of a model's training step on a hardware."""
        self._write(f"{hardware}, model {model}", dataclasses.asdict(cost))

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"

    def _read(self, key: str) -> dict[str, Any] | None:
        if not self._keeps:
            return None
        try:
            kept = json.loads(self._path(key).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(kept, dict) or kept.get("key") != key or not isinstance(kept.get("value"), dict):
            return None
        value: dict[str, Any] = kept["value"]
        return value

    def _write(self, key: str, value: dict[str, Any]) -> None:
        if not self._keeps:
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(key), json.dumps({"key": key, "value": value}, indent=1))


def _is_number(value: Any, *, or_zero: bool = False) -> bool:
    """A finite number above 0."""
    return is_number(value) and (value > 0 or or_zero and value == 0)


def _is_sound(profile: Profile) -> bool:
    """Whether a profile that was read holds possible measurements."""
    measured = [*profile.flops.values(), profile.memory_bandwidth, profile.host_to_device]
    texts = (profile.hardware, profile.device)
    return (
        all(isinstance(text, str) for text in texts)
        and _is_number(profile.cores)
        and _is_number(profile.num_threads)
        and isinstance(profile.num_threads, int)
        and all(isinstance(m.repeats, int) for m in measured if m is not None)
        and all(_is_number(m.median) and _is_number(m.spread, or_zero=True) for m in measured if m is not None)
    )


def _default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        # A relative one counts as none, by the specification of these folders.
        base = Path(cache) if cache and Path(cache).is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # No home.
        base = Path(tempfile.gettempdir())
    return base / "raytrain_het" / "profiles"
