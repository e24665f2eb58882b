"""The language-model job: its text, its model, and that it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.char_lm import text as char_lm_text
from raytrain_het.jobs.char_lm import training as char_lm
from raytrain_het.jobs.job_data import check_data
from raytrain_het.jobs.table import load_job

JOB = Path(__file__).parents[2] / "experiments" / "jobs" / "char_lm.yaml"
SMALL = ["max_characters=20000", "context=16", "width=32", "layers=1"]


def config(*overrides: str) -> dict:
    return load_job(JOB, overrides).train_loop_config()


def test_windows_are_disjoint_shifted_by_one_and_split_by_seed() -> None:
    train, test = char_lm.windows(config(*SMALL))
    starts = np.concatenate([train.starts, test.starts])
    assert len(set(starts)) == len(starts) == (20000 - 17) // 16 + 1
    assert abs(len(test) / len(starts) - 0.2) < 0.01
    seen, following = train[7]
    assert torch.equal(seen[1:], following[:-1])
    assert not np.array_equal(test.starts, char_lm.windows(config(*SMALL, "het.seed=1"))[1].starts)


def test_texts_that_differ_have_another_fingerprint() -> None:
    one, other = (char_lm.windows(config(*SMALL, f"max_characters={n}"))[0].fingerprint for n in (20000, 20001))
    assert one != other


def test_a_context_that_leaves_no_windows_is_found_before_any_worker_is_started() -> None:
    for context in (9999, 20000):
        with pytest.raises(ConfigError, match=f"context={context} leaves [01] windows of 10000.*--set context=999"):
            check_data(load_job(JOB, ["max_characters=10000", f"context={context}"]))
    (note,) = check_data(load_job(JOB, ["max_characters=10000", "context=999"]))
    assert "more than the 8 samples to train on: 2 are taken" in note
    assert check_data(load_job(JOB, SMALL)) == []


def test_what_differs_between_builds_of_a_python_is_not_in_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(char_lm_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    for name in ("a.py", "_sysconfigdata__linux_x86_64-linux-gnu.py", "b/c.py", "config-3.11/python-config.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    assert char_lm_text.library_text(None) == b"# a.py\n# b/c.py\n"


def test_no_character_is_predicted_from_what_follows() -> None:
    torch.manual_seed(0)
    model = char_lm.build_model(config(*SMALL))
    a = torch.randint(0, 128, (1, 16))
    b = a.clone()
    b[0, 10:] = (b[0, 10:] + 1) % 128
    with torch.no_grad():
        assert torch.allclose(model(a)[0, :10], model(b)[0, :10], atol=1e-6)
        assert not torch.allclose(model(a)[0, 10:], model(b)[0, 10:], atol=1e-3)


def test_a_few_steps_beat_the_frequencies_of_characters() -> None:
    torch.manual_seed(0)
    settings = config(*SMALL)
    train, test = char_lm.windows(settings)
    model = char_lm.build_model(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = [torch.stack([train[i][0] for i in range(k, k + 64)]) for k in range(0, 960, 64)]
    for _ in range(10):
        for x in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
            optimizer.step()
    counts = torch.bincount(train.text.long(), minlength=128).float()
    frequency = counts / counts.sum()
    entropy = -(frequency * frequency.clamp_min(1e-9).log()).sum()
    x = torch.stack([test[i][0] for i in range(len(test))])
    with torch.no_grad():
        assert F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()) < 0.85 * entropy


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="width=64 cannot be split among heads=5.*--set width=65"):
        config("heads=5")
