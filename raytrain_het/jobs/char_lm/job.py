"""The keys of the language-model job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.config import JobConfig, OptimizerChoice, check_batch_size

if TYPE_CHECKING:
    import torch

    from raytrain_het.jobs.training_step import TrainingStep


@dataclass(frozen=True, kw_only=True)
class CharLMJob(JobConfig):
    """A small GPT on the source text of Python's standard library, character by character.

    Raises:
        ConfigError: Two fields contradict each other.
    """

    model_keys = ("context", "layers", "heads", "width", "max_characters")
    optimizer_keys = ("lr", "optimizer")

    kind: Literal["char_lm"] = "char_lm"

    context: Annotated[int, pydantic.Field(ge=2)] = 64
    """Characters that the model sees; a sample is one more."""

    layers: Annotated[int, pydantic.Field(ge=1)] = 2
    """Transformer blocks."""

    heads: Annotated[int, pydantic.Field(ge=1)] = 4
    """Attention heads in each."""

    width: Annotated[int, pydantic.Field(ge=1)] = 64
    """Size of the embeddings."""

    max_characters: Annotated[int, pydantic.Field(ge=10_000)] | None = 400_000
    """So much of the text is used; ``null`` is all of it, 25 million in Python 3.11."""

    epochs: Annotated[int, pydantic.Field(ge=1)] = 1
    """Passes over the training part of the text."""

    global_batch_size: Annotated[int, pydantic.Field(ge=1)] = 128
    """Samples of ``context`` characters in one step, over all workers."""

    lr: Annotated[float, pydantic.Field(gt=0)] = 2e-3
    """Learning rate, before the schedule."""

    optimizer: OptimizerChoice = "adamw"
    """``sgd``, ``adagrad``, ``rmsprop``, ``adam`` or ``adamw``, or one with options (docs/training.md has them all),
    such as ``{adamw: {weight_decay: 0.1}}``. Biases and norms do not decay, unless ``decay_all``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_batch_size(self.global_batch_size, self.num_workers)
        if self.width % self.heads:
            raise ConfigError(
                f"width={self.width} cannot be split among heads={self.heads}: allowed is a multiple of it. "
                f"Write --set width={-(-self.width // self.heads) * self.heads}"
            )

    @staticmethod
    def train(config: dict[str, Any]) -> None:
        from raytrain_het.jobs.char_lm.training import train_char_lm

        train_char_lm(config)

    @staticmethod
    def make_step(config: dict[str, Any], device: torch.device) -> TrainingStep:
        from raytrain_het.jobs.char_lm.training import make_step

        return make_step(config, device)

    def metrics(self) -> dict[str, Literal["min", "max"]]:
        return {"bits_per_character": "min", "train_bits_per_character": "min"}

    def check_data(self) -> list[str]:
        self.num_samples()  # Raises where the text is not there, or too short. There is nothing to warn of.
        return []

    def num_samples(self) -> int:
        from raytrain_het.jobs.char_lm.text import num_characters, window_starts

        return window_starts(num_characters(self.max_characters), self.context, seed=0)[1]
