"""The whole text of a program: what runs, and what a report of a fault shows."""

from __future__ import annotations

from raytrain_het.testing.programs.program import Program
from raytrain_het.testing.programs.text_data import data_text
from raytrain_het.testing.programs.text_loop import train_text
from raytrain_het.testing.programs.text_model import model_text

HEADER = """import collections
import copy

import numpy
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import *
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import *
from torch.utils.data.distributed import DistributedSampler

torch.set_default_dtype(torch.float64)
"""
"""Given are ``het``, which is raytrain_het in a worker and its stand-in in the reference, and RANK and WORLD."""

_OWN_ERROR = """class OwnError(Exception):
    def __init__(self, what, code):
        super().__init__(what)
"""


def text_of(program: Program) -> str:
    """The program's source."""
    run = f"# {program.workers} workers with shares={program.shares}, {config_words(program)}"
    parts = [f"{run}\n{HEADER}"]
    if program.odd in ("raise", "raise_on_one", "evaluate_raises"):
        parts.append(_OWN_ERROR)
    parts += [model_text(program), data_text(program), train_text(program)]
    return "\n\n".join(part for part in parts if part)


def config_words(program: Program) -> str:
    """The run's other settings and its fault, in words."""
    words = [f"bucket_mib={program.bucket_mib}", f"replica_check_steps={program.check_steps}"]
    words += [f"check={program.check}"] if program.check != "rolling" else []
    words += [f"clip={program.clip.removeprefix('config_')}"] if program.clip.startswith("config") else []
    words += ["schedule=cosine"] if program.scheduler == "config" else []
    return ", ".join(words) + (f"; fault: {program.fault}" if program.fault != "none" else "")
