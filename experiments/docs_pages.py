"""Pages of the docs site that are made of the code and of the log: a hook of mkdocs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from raytrain_het.jobs.keys import key_rows
from raytrain_het.jobs.table import JOBS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LOG = ROOT / "experiments" / "LOG.md"


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs when it has found the pages that are files."""
    files.append(File.generated(config, "settings.md", content=settings_page()))
    files.append(File.generated(config, "log.md", content=log_page()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page. Of the files outside of the docs only the log has a page: other names lose their
    link."""
    folder = (DOCS / page.file.src_uri).parent

    def on_the_site(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if target == LOG:
            return f"[{link[1]}]({os.path.relpath(DOCS / 'log.md', folder)})"
        return link[0] if target.is_relative_to(DOCS) else link[1]

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)#]*)[^)]*\)", on_the_site, markdown)


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


ENTRY = re.compile(r"^- (\d{4}-\d\d-\d\d)\. \*\*(Positive|Negative|Bug): (.*)\*\*$", flags=re.M)
"""The first line of an entry of the log: its day, its kind and its verdict."""

_LOOKS = {"Positive": "success", "Negative": "failure", "Bug": "bug"}
"""How an entry looks on the site."""


def log_page() -> str:
    """The log, newest day first: of each entry the verdict, and the text when one opens it."""
    head, *parts = ENTRY.split(LOG.read_text())
    days: dict[str, list[str]] = {}
    for day, kind, verdict, text in zip(*(parts[k::4] for k in range(4)), strict=True):
        title = f"{kind}: {verdict}".replace('"', "'")
        days.setdefault(day, []).append(f'??? {_LOOKS[kind]} "{title}"\n\n    {" ".join(text.split())}\n')
    lines = [head.strip()]
    for day in sorted(days, reverse=True):
        lines += [f"\n## {day}\n", *reversed(days[day])]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("``", "`")
