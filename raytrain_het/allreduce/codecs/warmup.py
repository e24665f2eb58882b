"""Densities that fall from epoch to epoch, for codecs that keep a part of the elements."""

from __future__ import annotations

FIRST_DENSITY = 0.25


def warm_densities(density: float, warmup_epochs: int) -> list[float]:
    """Of the first ``E`` epochs: ``d_e = d_0 (d / d_0)^(e/E)`` with ``d_0 = 1/4``; no less than ``d``.

    Early gradients change fast, and what is sent late then is of little use. For 0.001 after four epochs these are
    0.25, 0.063, 0.016, 0.004. (Lin et al. 2018, section 3.3.)

    Args:
        density: ``d``, after the warm-up.
        warmup_epochs: ``E``.
    """
    first = max(density, FIRST_DENSITY)
    return [first * (density / first) ** (epoch / warmup_epochs) for epoch in range(warmup_epochs)]
