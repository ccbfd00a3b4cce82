"""`vlm report`: one HTML file that shows a run. Knows the order of the sections and the page around them; nothing of charts.

The file needs no network and no script: the style, the charts and the pictures are in it.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from vlm.charts import duration
from vlm.files import atomic_write
from vlm.page import document, none

from . import report_sections as sections
from .report_pictures import gallery
from .report_run import REPORT, RunRecord, read_run
from .report_samples import STYLE, extremes


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a training run and return its path; default: RUN_DIR/report.html.

    Reads config.yaml, log.jsonl, eval/results.json and eval/samples.jsonl, and the pictures from the data that was
    evaluated; says so in the report where one of them is missing. Raises UsageError for a folder that holds no run.
    """
    run = read_run(Path(run_dir))
    path = Path(out) if out is not None else run.folder / REPORT
    with atomic_write(path) as file:
        # Half a character that the data may hold is no reason to have no report.
        file.write(page(run).encode("utf-8", "replace"))
    return path


def page(run: RunRecord) -> str:
    """The whole file."""
    parts = [
        gallery(run),
        sections.looking(run),
        sections.by_type(run),
        extremes(run),
        sections.learning(run),
        sections.losses(run),
        sections.gates(run),
        sections.effort(run),
        sections.commands(run),
        sections.glossary(run),
    ]
    missing = "".join(none(sentence) for sentence in run.missing)
    head = f"<header><p class='kicker'>{escape(run.folder.resolve().name)}</p><h1>{_title(run)}</h1><p>{_opening(run)}</p></header>"
    body = "".join([head, sections.headline(run), missing, *parts, sections.footer(run)])
    return document(f"{run.folder.resolve().name}: report", body, STYLE)


def _title(run: RunRecord) -> str:
    metrics = run.tasks().get("vqa", {})
    return "What the model learned to see" if metrics or run.results else "How the training went"


def _opening(run: RunRecord) -> str:
    sentences = []
    parameters = run.results.get("parameters")
    size = f" of {parameters / 1e6:,.1f} million parameters" if parameters else ""
    seconds = sum(run.seconds(stage) for stage in range(len(run.stages)))
    if seconds:
        names = " and ".join(f"<b>{escape(run.objective(stage))}</b>" for stage in range(len(run.stages)))
        stages = f"{len(run.stages)} stage{'s' if len(run.stages) > 1 else ''} ({names})"
        sentences.append(f"A vision-language model{size}, trained in {stages} for {duration(seconds)}.")
    else:
        sentences.append(f"A vision-language model{size}.")
    cpu, gpus = run.environment().get("cpu"), run.environment().get("gpus")
    if cpu:
        where = ", ".join(gpus) if gpus else f"{run.environment().get('cores')} CPU cores ({cpu})"
        sentences.append(f"Measured on {escape(where)}.")
    sentences.append(
        "This page shows what it says about pictures it never saw, and how much of that comes from looking."
    )
    return " ".join(sentences)
