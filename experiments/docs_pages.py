"""Pages of the docs site that are made of the code and of the log: a hook of mkdocs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from raytrain_het.jobs.keys import key_rows
from raytrain_het.jobs.table import JOBS

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs when it has found the pages that are files."""
    files.append(File.generated(config, "settings.md", content=settings_page()))
    files.append(File.generated(config, "log.md", content=log_page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Files beside the docs have no page here: their names stay, without a link."""
    return re.sub(r"\[([^\]]+)\]\(\.\./(?!docs/)[^)]*\)", r"\1", markdown)


def settings_page() -> str:
    """Every key of each kind of job, ``het.*`` being the fields of ``HetConfig``."""
    parts = [
        "# Settings and job keys\n",
        "`raytrain-het train --keys [JOB.yaml]` prints the same. `het.*` are the fields of `HetConfig`.\n",
    ]
    for kind, job in JOBS.items():
        parts.append(f"## kind: {kind}\n\n| key | default | meaning |\n|---|---|---|")
        parts += [f"| `{key}` | `{default}` | {_cell(meaning)} |" for key, default, meaning in key_rows(job)]
        parts.append("")
    return "\n".join(parts)


def log_page() -> str:
    """The log, newest first, a heading a day."""
    text = (ROOT / "experiments" / "LOG.md").read_text()
    head, *entries = re.split(r"^- (?=\d{4}-\d\d-\d\d\. )", text, flags=re.M)
    days: dict[str, list[str]] = {}
    for entry in entries:
        day, rest = entry[:10], " ".join(entry[12:].split())
        days.setdefault(day, []).append(rest)
    parts = [head.strip()]
    for day in sorted(days, reverse=True):
        parts.append(f"\n## {day}\n")
        parts += [f"- {entry}" for entry in reversed(days[day])]
    return "\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("``", "`")
