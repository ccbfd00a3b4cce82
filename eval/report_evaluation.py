"""`report.html` beside results.json: one HTML file that shows an evaluation of any model. Knows the order of its sections.

The file needs no network and no script: the style, the charts and the pictures are in it.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from vlm.files import atomic_write
from vlm.page import document, none, section

from . import report_sections as sections
from .report_run import REPORT, RunRecord, read_evaluation
from .report_samples import STYLE, extremes


def write_evaluation(folder: Path) -> Path:
    """Write the report of the evaluation in a folder and return its path.

    Reads results.json and samples.jsonl, and the pictures from the data that was evaluated.
    """
    path = folder / REPORT
    with atomic_write(path) as file:
        # Half a character that the data may hold is no reason to have no report.
        file.write(page(read_evaluation(folder)).encode("utf-8", "replace"))
    return path


def page(run: RunRecord) -> str:
    """The whole file."""
    model = escape(str(run.results.get("model", "")))
    parameters = run.results.get("parameters")
    size = f", {parameters / 1e6:,.1f} million parameters" if parameters else ""
    opening = f"{', '.join(escape(name) for name in run.tasks())}; <code>{model}</code>{size}."
    head = f"<header><p class='kicker'>Evaluation</p><h1>What the model answered</h1><p>{opening}</p></header>"
    parts = [sections.headline(run), *map(none, run.missing), sections.looking(run)]
    if run.tasks().get("vqa"):
        parts.append(sections.by_type(run))
    parts += [extremes(run), _command(run), sections.glossary(run)]
    return document("Evaluation", "".join([head, *parts, sections.footer(run)]), STYLE)


def _command(run: RunRecord) -> str:
    rows = [("command", run.environment().get("command")), ("model", run.results.get("model"))]
    rows += [(f"data, {place}", folder) for place, folder in (run.results.get("data") or {}).items()]
    rows += [("limit", run.results.get("limit"))]
    rows += [(str(name), value) for name, value in (run.results.get("settings") or {}).items()]
    table = "".join(
        f"<tr><th>{escape(name)}</th><td><code>{escape(str(value))}</code></td></tr>" for name, value in rows if value
    )
    return section("What was asked of what", "", f'<div class="card"><table>{table}</table></div>')
