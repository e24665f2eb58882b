"""Densities that fall from epoch to epoch, for codecs that keep a part of the elements."""

from __future__ import annotations

FIRST_DENSITY = 0.25


def warm_densities(density: float, warmup_epochs: int) -> list[float]:
    """The densities of the first ``E`` epochs: ``d_e = d_0 (d / d_0)^(e/E)`` with ``d_0 = max(d, 1/4)``.

    Early gradients change fast, so what is sent late is of little use then. For ``d = 0.001`` and ``E = 4`` they are
    0.25, 0.063, 0.016, 0.004.

    Source: Deep Gradient Compression (Lin et al. 2018, arXiv:1712.01887), section 3.3.

    Args:
        density: ``d``, after the warm-up.
        warmup_epochs: ``E``.
    """
    first = max(density, FIRST_DENSITY)
    return [first * (density / first) ** (epoch / warmup_epochs) for epoch in range(warmup_epochs)]
