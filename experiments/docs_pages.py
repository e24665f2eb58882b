"""Pages of the docs site that are made of the code and of the log: a hook of mkdocs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from raytrain_het.jobs.keys import key_rows
from raytrain_het.jobs.table import KINDS, config_class

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs when it has found the pages that are files."""
    files.append(File.generated(config, "settings.md", content=settings_page()))
    files.append(File.generated(config, "log.md", content=log_page()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Files outside of the docs have no page on the site: their names stay, without a link."""
    folder = (DOCS / page.file.src_uri).parent

    def without_link(link: re.Match[str]) -> str:
        inside = (folder / link[2]).resolve().is_relative_to(DOCS)
        return link[0] if inside else link[1]

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)#]*)[^)]*\)", without_link, markdown)


def settings_page() -> str:
    """Every key of each kind of job, ``het.*`` being the fields of ``HetConfig``."""
    parts = [
        "# Settings and job keys\n",
        "`raytrain-het train --keys [JOB.yaml]` prints the same. `het.*` are the fields of `HetConfig`.\n",
    ]
    for kind in KINDS:
        parts.append(f"## kind: {kind}\n\n| key | default | meaning |\n|---|---|---|")
        parts += [
            f"| `{key}` | `{default}` | {_cell(meaning)} |" for key, default, meaning in key_rows(config_class(kind))
        ]
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
