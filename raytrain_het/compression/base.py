"""What a codec is: tensors -> bytes of a fixed capacity -> tensors."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch

State = dict[str, torch.Tensor]
"""Element-aligned state: every tensor's first dimension is the bucket's element count, so that it can be cut into
whatever shards are in force and be kept by parameter name."""


class Codec(abc.ABC):
    """Encodes a one-dimensional shard into a payload and back.

    The payload's *capacity* is a pure function of the element count and dtype, known to both sides without running:
    a message of another length than expected is an error. What varies is packed inside with its true length.

    State (error feedback and the like) is explicit: ``encode`` reads ``state`` and writes ``new_state``; the caller
    keeps the old one until the step is confirmed, and goes back to it if the step is done again.
    """

    name: ClassVar[str]
    rounds: ClassVar[int] = 1
    """Exchanges per step; low-rank codecs need two."""
    biased: ClassVar[bool] = False
    """Whether the decoded value's expectation differs from the input's (then it needs error feedback)."""

    def init(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> State:
        """State for a bucket of so many elements; empty for a stateless codec."""
        return {}

    @abc.abstractmethod
    def capacity_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        """Bytes of the payload of so many elements."""

    def in_place(self, payload: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """The payload (capacity,) uint8 seen as values of ``dtype``, sharing its memory, where encoding changes no bit;
        else None.

        Then sums are made where they are sent from, and added from where they arrive: at a gigabyte a second, copies
        are what the all-reduce costs.
        """
        return None

    @abc.abstractmethod
    def encode(self, x: torch.Tensor, payload: torch.Tensor, state: State, new_state: State) -> None:
        """Encode ``x`` (n,) into ``payload`` (capacity,) uint8; write the state that follows into ``new_state``.

        All are on one device, but that a codec without state may be given ``x`` from another one than the payload's.
        """

    @abc.abstractmethod
    def decode(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        """Decode ``payload`` (capacity,) uint8 into ``out`` (n,). Deterministic, on every device.

        Raises:
            ProtocolError: the payload does not decode.
        """
