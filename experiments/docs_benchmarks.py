"""The benchmark pages of the docs site get their plots and tables from the raw data: a hook of mkdocs."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from experiments.docs_plots import PLOTS
from experiments.docs_plots.raw import Shown
from experiments.docs_plots.svg import drawing, to_svg

PLACE = "<!-- plot and table -->"
"""The line of a page in place of which its plot and its table stand on the site."""


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page."""
    path = PurePosixPath(page.file.src_uri)
    if path.parent.name != "benchmarks" or path.stem not in PLOTS:
        return markdown
    with drawing():
        return markdown.replace(PLACE, plot_and_table(PLOTS[path.stem]()))


def plot_and_table(shown: Shown) -> str:
    """What a page shows, as HTML and markdown."""
    svg = to_svg(shown.figure, shown.caption.replace("`", ""))
    columns = list(shown.rows[0])
    lines = [
        f'<figure class="plot" data-search-exclude>{svg}</figure>',
        "",
        f"*{shown.caption}*",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(row[column] for column in columns)} |" for row in shown.rows),
    ]
    return "\n".join(lines)
