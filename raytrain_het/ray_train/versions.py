"""The Ray versions that this package supports.

The worker group of unlike workers needs private modules of Ray Train, which change between minor versions. Only
``raytrain_het/ray_train`` imports them, after this check.
"""

from __future__ import annotations

from importlib import metadata

from raytrain_het.errors import ConfigError

SUPPORTED_RAY = ">=2.60,<2.61"


def check_ray(installed: str | None = None) -> None:
    """Refuse a Ray that this package does not support.

    Args:
        installed: The version to check; None looks it up.

    Raises:
        ConfigError: The message has the installed and the supported versions, and the command to type.
    """
    fix = f'Write: pip install "ray[default,train,tune]{SUPPORTED_RAY}"'
    if installed is None:
        try:
            installed = metadata.version("ray")
        except metadata.PackageNotFoundError:
            raise ConfigError(f"ray is not installed; raytrain_het supports ray{SUPPORTED_RAY}. {fix}") from None
    if installed.split(".")[:2] != ["2", "60"]:
        raise ConfigError(f"ray=={installed} is installed, raytrain_het supports ray{SUPPORTED_RAY}. {fix}")


check_ray()
