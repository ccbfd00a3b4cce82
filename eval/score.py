"""`vlm score`: the official numbers for a file of predictions. Knows the official file layouts; nothing of models.

VQA: github.com/GT-Vision-Lab/VQA (questions, annotations, results). Captions: COCO's annotation and result layouts.
No number is given for a file that does not answer exactly what was asked: ids that are missing, extra or given twice
are counted and the first few named.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlm.errors import UsageError
from vlm.files import atomic_write

from .metrics.caption import caption_metrics
from .metrics.vqa import vqa_accuracy

NAMED = 3
VQA_ANNOTATION = ("question_id", "answers", "question_type", "answer_type")


def score_vqa(
    results: str | Path, questions: str | Path, annotations: str | Path, out: str | Path | None = None
) -> dict[str, Any]:
    """`{"accuracy": {"overall", "perQuestionType", "perAnswerType"}, …}` of `[{"question_id": int, "answer": str}]`.

    Percentages to two decimals, as the official program prints them. out: a file to write the same to.
    Raises UsageError for a file of another kind and for question ids that do not match.
    """
    said = _predictions(Path(results), "question_id", "answer")
    asked = _ids(Path(questions), _section(Path(questions), "questions", ("question_id",)), "question_id")
    truths = _section(Path(annotations), "annotations", VQA_ANNOTATION)
    _check_answers(Path(annotations), truths)
    _match(Path(annotations), _ids(Path(annotations), truths, "question_id"), asked, f"question ids of {questions}")
    _match(Path(results), list(said), asked, f"question ids of {questions}")
    return _written({"accuracy": vqa_accuracy(said, truths), "mode": "official", "n": len(truths)}, out)


def score_caption(results: str | Path, annotations: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """`{"metrics": {"Bleu_1", …, "Bleu_4", "ROUGE_L", "CIDEr"}, …}` of `[{"image_id": int, "caption": str}]`.

    On the scale of coco-caption: 0 to 1, CIDEr 0 to 10. out: a file to write the same to.
    Raises UsageError for a file of another kind and for image ids that do not match.
    """
    said = _predictions(Path(results), "image_id", "caption")
    references: dict[int, list[str]] = {}
    for place, entry in enumerate(_section(Path(annotations), "annotations", ("image_id", "caption"))):
        if not isinstance(entry["caption"], str):
            raise UsageError(f"{annotations}: annotations[{place}] has no caption in words; give the official file")
        references.setdefault(entry["image_id"], []).append(entry["caption"])
    _match(Path(results), list(said), list(references), f"image ids of {annotations}")
    return _written({"metrics": caption_metrics(said, references), "n": len(references)}, out)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise UsageError(f"{path}: can not be opened ({error.strerror}); give a readable file") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON ({error}); a download that was cut short? fetch it again") from None


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
    content = _read(path)
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
