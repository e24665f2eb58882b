"""A codec with a state, for tests: for every element it counts the steps that used what it had sent."""

from __future__ import annotations

import torch

from raytrain_het.allreduce.codecs import Codec, Stamp, State
from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.codec_options import CODECS, CodecEntry


class Counting(Codec):
    """Values travel as they are, in fp32 or fp64."""

    name = "counting"

    def init(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> State:
        return {"count": torch.zeros(num_elements, device=device)}

    def capacity_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        return num_elements * dtype.itemsize

    def encode(self, x: torch.Tensor, payload: torch.Tensor, stamp: Stamp, state: State, new_state: State) -> None:
        payload.copy_(x.contiguous().view(torch.uint8))
        if state:
            torch.add(state["count"], 1, out=new_state["count"])

    @classmethod
    def register(cls) -> None:
        """Put it into this process's table of codecs."""
        CODECS[cls.name] = CodecEntry(f"{cls.__module__}:{cls.__name__}")

    @staticmethod
    def counts(states: ErrorFeedback) -> list[float]:
        """The different counts of all elements: one, if all goes well."""
        return torch.cat([state["count"] for state in states.by_parameter().values()]).unique().tolist()

    def decode(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(payload.view(out.dtype))
