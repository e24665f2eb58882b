"""What the benchmarks share: the model, its data, a bootstrap interval, and how results are printed and kept."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het

INPUTS, CLASSES = 256, 10


def make_model(size: str = "1.3M") -> nn.Module:
    """A plain network of 18 parameter tensors with 1.30 million parameters, or a tiny one of 4 tensors with 2.2
    thousand."""
    torch.manual_seed(0)
    widths = {"1.3M": [INPUTS, *[412] * 8], "tiny": [INPUTS, 8]}[size]
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def make_data(samples: int) -> TensorDataset:
    """Random samples with random labels."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(samples, INPUTS, generator=generator), torch.randint(0, CLASSES, (samples,), generator=generator)
    )


def het_steps(model: nn.Module, data: TensorDataset, total: int) -> Iterator[None]:
    """A model that raytrain_het trains with a global batch of ``total`` samples, a step at a time, without an end."""
    model = het.prepare_model(model)
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    loader = het.prepare_data_loader(DataLoader(data, shuffle=True, drop_last=True), global_batch_size=total)
    for _ in loader.epochs(10**6):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def bootstrap_interval(
    values: Sequence[float], statistic: Callable[..., Any] = np.median, *, confidence: float = 0.95, draws: int = 10_000
) -> tuple[float, float]:
    """Percentile bootstrap of a statistic over independent values (blocks, not steps: neighbouring steps are alike)."""
    samples = np.random.default_rng(0).choice(np.asarray(values, dtype=float), size=(draws, len(values)))
    low, high = np.percentile(statistic(samples, axis=1), [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and number of some measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def arguments(module_doc: str | None, add: Callable[[argparse.ArgumentParser], None] = lambda parser: None) -> Any:
    """Parse the command line: ``--json`` and whatever the benchmark adds."""
    parser = argparse.ArgumentParser(
        description=module_doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the result there")
    add(parser)
    return parser.parse_args()


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table; the first row's keys are the columns."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=None if os.isatty(1) else 140).print(table)


def keep(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result as JSON, with what it was measured on."""
    if path is not None:
        machine = {"cpus": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()}
        path.write_text(json.dumps({"machine": machine | {"torch": torch.__version__}} | result, indent=1) + "\n")


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory for a run's files."""
    with tempfile.TemporaryDirectory(prefix="het_benchmark_") as directory:
        yield Path(directory)
