"""`vlm score`: the official numbers for a file of predictions. Knows the official file layouts; nothing of models.

VQA: github.com/GT-Vision-Lab/VQA (questions, annotations, results). Captions: COCO's annotation and result layouts.
No number is given for a file that does not answer exactly what was asked: ids that are missing, extra or given twice
are counted and the first few named.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlm.errors import UsageError
from vlm.files import atomic_write
from vlm.garbage import uncollected

from .metrics.caption import CIDER_NAME, caption_scores, tokenized
from .metrics.java import JAVA_METRICS, java_scores
from .metrics.vqa import MODES, Mode, vqa_accuracy

NAMED = 3
VQA_ANNOTATION = ("question_id", "answers", "question_type", "answer_type")


def score_vqa(
    results: str | Path,
    questions: str | Path,
    annotations: str | Path,
    out: str | Path | None = None,
    mode: Mode = "official",
) -> dict[str, Any]:
    """`{"accuracy": {"overall", "perQuestionType", "perAnswerType"}, "mode", "n"}` of `[{"question_id", "answer"}]`.

    Percentages to two decimals, as the official program prints them. out: a file to write the same to. mode: `official`,
    or `lmms` for answers that are always normalised (see `metrics.vqa`).
    Raises UsageError for an unknown mode, a file of another kind and question ids that do not match.
    """
    _choose("mode", mode, MODES)
    with uncollected():
        said = _predictions(Path(results), "question_id", "answer")
        asked = _ids(Path(questions), _section(Path(questions), "questions", ("question_id",)), "question_id")
        truths = _section(Path(annotations), "annotations", VQA_ANNOTATION)
        _check_answers(Path(annotations), truths)
        _match(Path(annotations), _ids(Path(annotations), truths, "question_id"), asked, f"question ids of {questions}")
        _match(Path(results), list(said), asked, f"question ids of {questions}")
        accuracy = vqa_accuracy(said, truths, mode)
    return _written({"accuracy": accuracy, "mode": mode, "n": len(truths)}, out)


def score_caption(
    results: str | Path, annotations: str | Path, out: str | Path | None = None, java: Sequence[str] = ()
) -> dict[str, Any]:
    """`{"metrics": {"Bleu_1", …, "Bleu_4", "ROUGE_L", "CIDEr"}, "CIDEr_is", "n"}` of `[{"image_id", "caption"}]`.

    On the scale of coco-caption: 0 to 1, CIDEr 0 to 10. out: a file to write the same to. java: of METEOR and SPICE
    those wanted too; they need Java and the package pycocoevalcap.
    Raises UsageError for a file of another kind, image ids that do not match, and metrics that can not be had here.
    """
    for name in java:
        _choose("metric", name, JAVA_METRICS)
    with uncollected():
        said = _predictions(Path(results), "image_id", "caption")
        references = _references(Path(annotations))
        _match(Path(results), list(said), list(references), f"image ids of {annotations}")
        captions = tokenized(said, references)
        scores = caption_scores(captions) | java_scores(captions, java)
    metrics = {name: score for name, (score, _) in scores.items()}
    return _written({"metrics": metrics, "CIDEr_is": CIDER_NAME, "n": len(references)}, out)


def _choose(what: str, given: str, names: Sequence[str]) -> None:
    if given not in names:
        raise UsageError(f"{what} {given!r} is unknown; choose of {', '.join(names)}")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise UsageError(f"{path}: can not be opened ({error.strerror}); give a readable file") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON ({error}); a download that was cut short? fetch it again") from None


def _references(path: Path) -> dict[int, list[str]]:
    """image_id -> captions, in the order in which the official program goes through them: that of "images"."""
    content = _read(path)
    references: dict[int, list[str]] = {}
    for place, entry in enumerate(_entries(path, content, "annotations", ("image_id", "caption"))):
        if type(entry["image_id"]) is not int or not isinstance(entry["caption"], str):
            raise UsageError(f"{path}: annotations[{place}] has no caption in words; give the official file")
        references.setdefault(entry["image_id"], []).append(entry["caption"])
    listed = content.get("images")
    if isinstance(listed, list):
        ids = [image.get("id") for image in listed if isinstance(image, dict)]
        order = {one: place for place, one in enumerate(ids) if type(one) is int}
        return dict(sorted(references.items(), key=lambda pair: order.get(pair[0], len(order))))
    return references


def _predictions(path: Path, key: str, value: str) -> dict[int, str]:
    """id -> text of a result file. Raises UsageError if it is empty, has entries of another form, or an id twice."""
    entries = _read(path)
    form = f'[{{"{key}": int, "{value}": str}}, …]'
    if not isinstance(entries, list):
        raise UsageError(f"{path}: holds a {type(entries).__name__}, not a list of predictions; write {form}")
    if not entries:
        raise UsageError(f"{path}: holds 0 predictions; write {form}")
    for place, entry in enumerate(entries):
        fits = isinstance(entry, dict) and type(entry.get(key)) is int and isinstance(entry.get(value), str)
        if not fits:
            raise UsageError(f"{path}: entry {place} is {json.dumps(entry)[:60]}; write {form}")
    _refuse_twice(path, key, [entry[key] for entry in entries])
    return {entry[key]: entry[value] for entry in entries}


def _section(path: Path, name: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """The list `name` of an official file, each entry with `fields`. Raises UsageError for a file of another kind."""
    return _entries(path, _read(path), name, fields)


def _entries(path: Path, content: Any, name: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UsageError(f'{path}: no list "{name}" is in it; give the official file of {name}')
    for place, entry in enumerate(entries):
        missing = [field for field in fields if not isinstance(entry, dict) or field not in entry]
        if missing:
            raise UsageError(f"{path}: {name}[{place}] has no {missing[0]}; give the official file of {name}")
    return entries


def _check_answers(path: Path, annotations: list[dict[str, Any]]) -> None:
    for annotation in annotations:
        answers = annotation["answers"]
        fits = isinstance(answers, list) and all(
            isinstance(a, dict) and isinstance(a.get("answer"), str) for a in answers
        )
        if not fits or not answers:
            at = f"{path}: question {annotation['question_id']}"
            raise UsageError(f'{at} has no list of answers [{{"answer": str, …}}]; give the official annotations')


def _ids(path: Path, entries: Iterable[dict[str, Any]], key: str) -> list[int]:
    ids = [entry[key] for entry in entries]
    odd = [one for one in ids if type(one) is not int]
    if odd:
        raise UsageError(f"{path}: {key} {json.dumps(odd[0])[:60]} is not a whole number; give the official file")
    _refuse_twice(path, key, ids)
    return ids


def _refuse_twice(path: Path, key: str, ids: list[int]) -> None:
    twice = [one for one, count in Counter(ids).items() if count > 1]
    if twice:
        raise UsageError(f"{path}: {len(twice)} {key}s are given more than once ({_first(twice)}); keep one of each")


def _match(path: Path, given: list[int], wanted: list[int], what: str) -> None:
    missing, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    faults = [f"{len(missing)} of {len(wanted)} missing ({_first(missing)})"] if missing else []
    faults += [f"{len(extra)} extra ({_first(extra)})"] if extra else []
    if faults:
        raise UsageError(f"{path}: does not match the {what}: {', '.join(faults)}; give one entry for each")


def _first(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:NAMED])) + (", …" if len(ids) > NAMED else "")


def _written(scores: dict[str, Any], out: str | Path | None) -> dict[str, Any]:
    if out is not None:
        with atomic_write(out, "w") as file:
            json.dump(scores, file, indent=2, ensure_ascii=False)
            file.write("\n")
    return scores
