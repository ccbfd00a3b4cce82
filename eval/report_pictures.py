"""Held-out pictures with what the model said and what is true. Knows a run's record and picture files; nothing of scores."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vlm.page import data_uri, none, section
from vlm.samples import Sample

from .report_run import Fields, RunRecord, number, pictured

FIRST, MISTAKEN = 9, 6
MARKS = {"right": "✓", "partly": "~", "wrong": "✗"}


def gallery(run: RunRecord) -> str:
    """The first held-out pictures, as they come, and then some that the model got wrong."""
    title = "What it sees"
    lead = (
        "Pictures that the model never saw in training, the first of the held-out set as they come, not chosen. "
        '<span class="right"><span class="mark">✓</span></span> marks a right answer, '
        '<span class="wrong"><span class="mark">✗</span></span> a wrong one with the truth beside it.'
    )
    first: list[tuple[Sample, list[Fields]]] = []
    mistaken: list[tuple[Sample, list[Fields]]] = []
    for sample, lines in pictured(run):
        if not sample.images or not _shown(lines):
            continue
        if len(first) < FIRST:
            first.append((sample, lines))
        elif any(_verdict(line) == "wrong" for line in _shown(lines)):
            mistaken.append((sample, [line for line in lines if _verdict(line) != "right"]))
        if len(mistaken) == MISTAKEN:
            break
    if not first:
        lost = run.missing and (_shown(run.samples) or not run.samples)
        gone = run.missing[-1] if lost else "No pictures were asked about in the evaluation, so none are shown."
        return section(title, lead, none(gone))
    body = [_grid(first)]
    if mistaken:
        body.append(
            '<h3 style="margin-top:30px">Where it still errs</h3><p class="quiet">The next held-out pictures with a '
        )
        body.append(f"wrong answer; right answers about them are left out.</p>{_grid(mistaken)}")
    return section(title, lead, *body)


def _grid(shown: Sequence[tuple[Sample, list[Fields]]]) -> str:
    return f'<div class="pictures">{"".join(_figure(sample, lines) for sample, lines in shown)}</div>'


def _shown(lines: Sequence[Fields]) -> list[Fields]:
    return [line for line in lines if line.get("task") in ("vqa", "caption", "classification")]


def _figure(sample: Sample, lines: Sequence[Fields]) -> str:
    shots = "".join(_shot(sample.key, data) for data in sample.images)
    asked = [_answer(line) for line in _shown(lines) if line["task"] != "caption"]
    told = [_caption(line) for line in lines if line.get("task") == "caption"]
    listed = f"<ul>{''.join(asked)}</ul>" if asked else ""
    return (
        f'<figure class="card"><div class="shot">{shots}</div><figcaption>{listed}{"".join(told)}</figcaption></figure>'
    )


def _shot(key: str, data: bytes) -> str:
    address = data_uri(data)
    if not address:
        return f'<p class="none">The picture of sample {escape(key)} can no longer be read.</p>'
    return f'<img src="{address}" alt="held-out picture {escape(key)}">'


def _verdict(line: Fields) -> str:
    score = number(line.get("score"))
    if line.get("task") == "caption":
        return "right" if score is not None and score >= 0.999 else "partly"
    return "wrong" if not score else "right" if score >= 0.999 else "partly"


def _answer(line: Fields) -> str:
    verdict = _verdict(line)
    question = line.get("prompt") or "What is it?"
    truth = "" if verdict == "right" else f' <span class="truth">truth: {escape(_truth(line))}</span>'
    said = f'<span class="said">{escape(str(line.get("prediction")) or "(nothing)")}</span>'
    return f'<li class="{verdict}"><span class="mark">{MARKS[verdict]}</span><span>{escape(question)} {said}{truth}</span></li>'


def _truth(line: Fields) -> str:
    """The references, each once, the most frequent first."""
    references = [str(reference) for reference in line.get("references", [])]
    return ", ".join(sorted(set(references), key=lambda one: (-references.count(one), references.index(one))))


def _caption(line: Fields) -> str:
    said, truth = escape(str(line.get("prediction")) or "(nothing)"), escape(_truth(line))
    told = f"<div><small>it says</small>{said}</div>"
    return f'<div class="told">{told}<div class="truth"><small>the true caption</small>{truth}</div></div>'
