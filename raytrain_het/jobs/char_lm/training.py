"""The language-model job's training: a small GPT predicts the next character in the source text of Python's standard
library.

The text is on every machine that runs Python, so a real language model needs no download. Workers whose Pythons have
different versions have different texts: the run says so and does not start.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import ray.train.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import raytrain_het as het
from raytrain_het.jobs.char_lm.text import library_text, window_starts
from raytrain_het.jobs.optimizer import make_optimizer
from raytrain_het.jobs.training_step import TrainingStep

VOCABULARY = 128
"""ASCII; anything else is read as a question mark."""


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Non-overlapping windows of a text: the input is ``context`` characters, the target begins one character later."""

    def __init__(self, text: Tensor, starts: np.ndarray, context: int) -> None:
        self.text, self.starts, self.context = text, starts, context
        self.fingerprint = hashlib.sha256(text.numpy().tobytes()).hexdigest()[:8]
        """Workers whose texts differ refuse to train together."""

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = int(self.starts[index])
        window = self.text[start : start + self.context + 1].long()
        return window[:-1], window[1:]


def windows(config: dict[str, Any]) -> tuple[Windows, Windows]:
    """The training part and the held-out fifth; the seed says which windows are in which."""
    text = torch.frombuffer(bytearray(library_text(config["max_characters"])), dtype=torch.uint8)
    context = config["context"]
    order, num_train = window_starts(len(text), context, config["seed"])
    return Windows(text, order[:num_train], context), Windows(text, order[num_train:], context)


class Block(nn.Module):
    """Causal self-attention and a two-layer network, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_a, self.norm_b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, length, width) to the same."""
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm_a(x)).split(width, dim=2)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_b(x))


class CharGPT(nn.Module):
    """A decoder-only transformer over characters; the output layer shares the embedding's weights."""

    def __init__(self, *, context: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        """Characters (batch, length) to scores (batch, length, vocabulary)."""
        x = self.embedding(characters) + self.position[: characters.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.embedding.weight)


def build_model(config: dict[str, Any]) -> CharGPT:
    """No dropout: what a worker computes for a sample depends on that sample alone."""
    return CharGPT(**{name: config[name] for name in ("context", "layers", "heads", "width")})


def loss_of(scores: Tensor, following: Tensor) -> Tensor:
    """Mean cross-entropy over all characters: scores (batch, length, vocabulary), following (batch, length)."""
    return F.cross_entropy(scores.flatten(0, 1), following.flatten())


def make_step(config: dict[str, Any], device: torch.device) -> TrainingStep:
    """The job's training step by itself."""
    model = build_model(config).to(device)
    train_set, _ = windows(config)
    return TrainingStep(train_set, model, make_optimizer(config, model), loss_of, device)


def train_char_lm(config: dict[str, Any]) -> None:
    """The training function: the fields of :class:`CharLMJob`, and ``seed``, as a dict."""
    torch.manual_seed(config["seed"])
    device = ray.train.torch.get_device()
    train_set, test_set = windows(config)
    model = het.prepare_model(build_model(config))
    optimizer = het.prepare_optimizer(make_optimizer(config, model))
    loader = het.prepare_data_loader(DataLoader(train_set, shuffle=True), global_batch_size=config["global_batch_size"])

    def held_out(batch: Any) -> dict[str, float | Tensor]:
        seen, following = (part.to(device) for part in batch)
        loss = F.cross_entropy(model(seen).flatten(0, 1), following.flatten(), reduction="sum")
        return {"bits_per_character": loss.double() / (config["context"] * math.log(2))}

    for _ in loader.epochs(config["epochs"]):
        losses = []
        for seen, following in loader:
            loss = loss_of(model(seen), following)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        train_loss = torch.stack(losses).mean().item() if losses else 0.0
        het.report({"train_bits_per_character": train_loss / math.log(2), **het.evaluate(held_out, test_set)})
