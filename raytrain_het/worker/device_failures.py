"""Errors of a device that are not the program's: the others go on, and the slot gets another process.

CUDA's error codes are those of ``cudaError_t`` in the CUDA Runtime API. What a program does wrong (an assertion in a
kernel, an address out of bounds, memory that runs out) is raised like any other error of it.
"""

from __future__ import annotations

import torch

CODES = {
    46: "devices unavailable",
    101: "invalid device",
    214: "uncorrectable ECC error",
    220: "uncorrectable NVLink error",
    714: "hardware stack error",
}
TEXTS = (
    "uncorrectable ecc error",
    "uncorrectable nvlink error",
    "fallen off the bus",
    "is lost",
    "busy or unavailable",
    "hardware stack error",
)


def device_has_failed(error: BaseException) -> bool:
    """Whether a worker's device is to blame, and not its program.

    Example:
        >>> device_has_failed(RuntimeError("CUDA error: uncorrectable ECC error encountered"))
        True
        >>> device_has_failed(RuntimeError("CUDA error: device-side assert triggered"))
        False
    """
    accelerator_error = getattr(torch, "AcceleratorError", None)
    if accelerator_error is not None and isinstance(error, accelerator_error):
        code = getattr(error, "error_code", None)
        if code in CODES:
            return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and "cuda error" in text and any(part in text for part in TEXTS)
