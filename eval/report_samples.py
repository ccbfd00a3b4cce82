"""The best and the worst answers of every task, with their pictures. Knows a run's record and HTML; nothing of how scores
are made.

Bounded whatever the evaluation's size: so many samples of a task, so many thumbnails of a sample, so much of a text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from html import escape

from vlm.page import data_uri, none, section

from .album import Album
from .report_run import Fields, RunRecord, number
from .tasks import TASKS

SHOWN = 6  # best, and as many worst, of each task
PICTURES = 4  # of each sample
SIDE, BYTES = 256, 20_000  # of each picture: the most pixels on a side, and the most bytes that are left as they are
TEXT, REFERENCES = 400, 5  # characters of each text, and right answers
OTHER_LOOKS = ("blind", "shuffled")

STYLE = """
.sample { display: flex; flex-direction: column; padding: 0; }
.sample figcaption { flex: 1; display: flex; flex-direction: column; }
.sample .shot img { height: 148px; }
.sample .asked { margin: 0 0 10px; font-weight: 600; white-space: pre-line; overflow-wrap: anywhere; }
.sample table { font-size: 13.5px; } .sample th, .sample td { padding: 4px 0 4px 12px; vertical-align: top; }
.sample th { padding-left: 0; } .sample td.n { padding: 4px 0 4px 12px; }
.sample th, .sample td.n { width: 1%; white-space: nowrap; }
.sample .id { color: var(--soft); font-size: 12px; margin: auto 0 0; padding-top: 8px; overflow-wrap: anywhere; }
.samples h3 { margin: 30px 0 2px; font-size: 18px; } .samples h4 { margin: 16px 0 8px; font-size: 14px; font-weight: 600; }
"""


def extremes(run: RunRecord) -> str:
    """The best and the worst samples of every task."""
    title = "At its best and at its worst"
    lead = (
        f"Of every task the {SHOWN} worst samples and the {SHOWN} best, by score, each with what the model "
        "said of its own picture, and, where it was asked, blind and of another sample’s; the score is on the right. "
        "Of equal scores first those where the picture made the difference: right only with it among the best, right only "
        "without it among the worst."
    )
    tasks: dict[str, list[Fields]] = {}
    for line in run.samples:
        tasks.setdefault(str(line.get("task")), []).append(line)
    if not tasks:
        return section(title, lead, none("There are no samples, so none are shown."))
    album = Album(run.results)
    body = "".join(_task(name, lines, album) for name, lines in tasks.items())
    missing = "".join(none(sentence) for sentence in album.missing)
    return section(title, lead, f'{missing}<div class="samples">{body}</div>')


def _task(name: str, lines: Sequence[Fields], album: Album) -> str:
    groups = choose(lines, less_is_better(name))
    count = f"{len(lines):,} sample{'s' if len(lines) != 1 else ''}"
    heading = f'<h3>{escape(name)}</h3><p class="quiet" style="margin:0">{count}</p>'
    if not groups:
        return heading + none("No sample has a score of its own, so there is neither a best nor a worst.")
    parts = [heading]
    for words, chosen in groups:
        figures = "".join(_figure(line, album) for line in chosen)
        parts.append(f'<h4>{words}</h4><div class="pictures">{figures}</div>')
    return "".join(parts)


def less_is_better(name: str) -> bool:
    """Whether a task's scores are the better the lower they are."""
    task = TASKS.get(name.partition("@")[0])
    return task is not None and task.less_is_better


def choose(lines: Sequence[Fields], less_is_better: bool = False) -> list[tuple[str, list[Fields]]]:
    """What is shown of a task's lines, under a heading each: the best and the worst, or some if all are worth the same.

    A sample is never among both, none with the best score is called worst, and none with the worst score best.
    """
    worth = {place: _worth(line, less_is_better) for place, line in enumerate(lines)}
    scored = [place for place in worth if not math.isnan(worth[place])]
    if not scored:
        return []
    top, bottom = max(worth[place] for place in scored), min(worth[place] for place in scored)
    if top == bottom:
        words = f"All are worth {_score(lines[scored[0]].get('score'))}; some of them"
        return [(words, [lines[place] for place in _first(scored, lines, worth, less_is_better, 1)])]
    best = _first([p for p in scored if worth[p] > bottom], lines, worth, less_is_better, -1)
    left = [p for p in scored if worth[p] < top and p not in best]
    worst = _first(left, lines, worth, less_is_better, 1)
    groups = [("The worst", worst), ("The best", best)]
    return [(words, [lines[place] for place in places]) for words, places in groups if places]


def _first(
    places: Sequence[int], lines: Sequence[Fields], worth: dict[int, float], less_is_better: bool, sign: int
) -> list[int]:
    """The first of the places by worth (sign 1: the lowest), of equals those where blind went the other way, then those
    of samples that are not shown yet."""

    def blind(place: int) -> float:
        found = _worth(lines[place].get("blind") or {}, less_is_better)
        return 0.0 if math.isnan(found) else -sign * found

    ordered = sorted(places, key=lambda place: (sign * worth[place], blind(place), place))
    seen: Counter[tuple[float, str]] = Counter()
    again = {}
    for place in ordered:
        again[place] = seen[worth[place], str(lines[place].get("key"))]
        seen[worth[place], str(lines[place].get("key"))] += 1
    return sorted(ordered, key=lambda place: (sign * worth[place], again[place], blind(place), place))[:SHOWN]


def _worth(line: Fields, less_is_better: bool) -> float:
    """A line's score, the higher the better; NaN where it has none. Infinity and NaN stand in the file as words."""
    try:
        score = float(line.get("score"))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
    return -score if less_is_better else score


def _figure(line: Fields, album: Album) -> str:
    sources = album.of(line)
    shots = "".join(_shot(line, data) for data in sources[:PICTURES])
    more = f'<p class="quiet">and {len(sources) - PICTURES} more</p>' if len(sources) > PICTURES else ""
    shown = f'<div class="shot">{shots}{more}</div>' if sources else ""
    asked = f'<p class="asked">{_text(line["prompt"])}</p>' if line.get("prompt") else ""
    says = line.get("prediction") is not None  # else its answer is no text, but how likely it finds one
    rows = [_row("it says" if says else "score", line, _verdict(line))]
    rows += [_row(look, line[look]) for look in OTHER_LOOKS if isinstance(line.get(look), dict)]
    references = list(dict.fromkeys(str(one) for one in line.get("references") or []))
    told = "<br>".join(_text(one) for one in references[:REFERENCES])
    told += f"<br>and {len(references) - REFERENCES} more" if len(references) > REFERENCES else ""
    right = f'<tr><th>{"right" if says else "text"}</th><td colspan="2">{told}</td></tr>'
    key = _text(f"{line.get('key')}" if line.get("type") is None else f"{line.get('key')}, {line['type']}")
    table = f"<table>{''.join(rows)}{right if references else ''}</table>"
    return f'<figure class="card sample">{shown}<figcaption>{asked}{table}<p class="id">{key}</p></figcaption></figure>'


def _shot(line: Fields, data: bytes | None) -> str:
    address = data_uri(data, BYTES, SIDE) if data else ""
    if not address:
        return f'<p class="none">The picture of sample {_text(line.get("key"))} can no longer be read.</p>'
    return f'<img src="{address}" alt="picture of sample {_text(line.get("key"))}">'


def _row(words: str, said: Fields, verdict: str = "") -> str:
    prediction = said.get("prediction")
    told = "" if prediction is None else _text(prediction) or "(nothing)"
    score = f'<td class="n">{_score(said.get("score"))}</td>'
    return f'<tr class="{verdict}"><th>{words}</th><td><span class="{"said" if verdict else ""}">{told}</span></td>{score}</tr>'


def _verdict(line: Fields) -> str:
    """How what was said is coloured: only a score of exactly 1 or 0 is taken to be right or wrong."""
    if less_is_better(str(line.get("task"))):
        return "plain"
    return {1.0: "right", 0.0: "wrong"}.get(_worth(line, False), "partly")


def _score(value: object) -> str:
    found = number(value)
    return escape(str(value)) if found is None else f"{found:.3g}"


def _text(value: object) -> str:
    """A text, escaped, of at most `TEXT` characters."""
    whole = str(value).strip()
    return escape(whole if len(whole) <= TEXT else f"{whole[:TEXT].rstrip()} …")
