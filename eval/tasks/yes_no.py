"""Yes or no: POPE (objects that are or are not there), MME (fourteen subtasks), NLVR2 and NLVR (true or false sentences).

Knows these layouts:

* `pope`, https://github.com/RUCAIBox/POPE (output/coco): coco_pope_random.json, coco_pope_popular.json,
  coco_pope_adversarial.json, JSON lines each, and val2014/ of COCO.
* `mme`, https://github.com/BradyFu/Awesome-Multimodal-Large-Language-Models/tree/Evaluation: a folder a subtask, with
  ID.txt (two lines, question TAB answer) beside ID.jpg or ID.png, or in questions_answers_YN/ and images/.
* `nlvr2`, https://github.com/lil-lab/nlvr/tree/master/nlvr2: data/dev.json or dev.json, JSON lines, and
  dev/dev-0-0-img0.png, dev/dev-0-0-img1.png.
* `nlvr`, https://github.com/lil-lab/nlvr/tree/master/nlvr: dev/dev.json, JSON lines, and dev/images/DIRECTORY/dev-0-0-0.png
  to -5.png, six orders of the boxes, each of which is a picture to judge.

Replies are read as each benchmark's own script reads them; a reply that is neither counts as no in POPE, as wrong
elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlm.errors import UsageError

from .base import Item, Scored
from .benchmark import Benchmark, Example, written
from .choosing import mean, mean_by
from .reading import check_there, files, first_named, first_of, read_lines
from .vqa import SHORT

# ------------------------------------------------------------------------------------------------------------- POPE

POPE_SETS = ("random", "popular", "adversarial")


def _read_pope(folder: Path) -> Iterator[Example]:
    names = files(folder, *(f"coco_pope_{name}.json" for name in POPE_SETS))
    for kind, path in zip(POPE_SETS, names, strict=True):
        for entry in read_lines(path):
            picture = folder / "val2014" / entry["image"]
            identity = f"{kind}-{entry['question_id']}"
            yield Example(identity, (picture,), entry["text"], (entry["label"],), type=kind)


def _pope_answers(items: Sequence[Item], outputs: Sequence[str]) -> list[str]:
    """evaluate.py of POPE: no if the first sentence has a no or a not in it, else yes."""
    firsts = [said.split(".")[0].replace(",", "").split(" ") for said in outputs]
    return ["no" if {"No", "not", "no"} & set(words) else "yes" for words in firsts]


def _pope_metric(items: Sequence[Item], answers: Sequence[str]) -> Scored:
    pairs = [(item.type, item.references[0], said) for item, said in zip(items, answers, strict=True)]
    metrics = binary_metrics([(right, said) for _, right, said in pairs])
    kinds = dict.fromkeys(kind for kind, _, _ in pairs)
    each = {str(kind): binary_metrics([(right, said) for own, right, said in pairs if own == kind]) for kind in kinds}
    return Scored(metrics | each, answers, [float(right == said) for _, right, said in pairs])


def binary_metrics(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of yes, and the share of yes, of (right, said); what is undefined is 0."""
    right_yes = sum(right == said == "yes" for right, said in pairs)
    said_yes, true_yes = (sum(pair[side] == "yes" for pair in pairs) for side in (1, 0))
    precision, recall = (right_yes / count if count else 0.0 for count in (said_yes, true_yes))
    return {
        "accuracy": mean([float(right == said) for right, said in pairs]),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if right_yes else 0.0,
        "yes_share": said_yes / len(pairs),
    }


# -------------------------------------------------------------------------------------------------------------- MME

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


def _read_mme(folder: Path) -> Iterator[Example]:
    check_there(folder, [folder / name for name in (*PERCEPTION, *COGNITION)], "subtasks")
    for name in (*PERCEPTION, *COGNITION):
        told, shown = folder / name / "questions_answers_YN", folder / name / "images"
        texts = sorted((told if told.is_dir() else folder / name).glob("*.txt"))
        if not texts:
            raise UsageError(f"{folder / name}: 0 questions (.txt) are in it; finish the download")
        for path in texts:
            picture = _mme_picture(shown if shown.is_dir() else folder / name, path.stem)
            for place, line in enumerate(path.read_text("utf-8").strip().split("\n")):
                question, right = line.rsplit("\t", 1)
                identity = f"{name}/{path.stem}/{place}"
                yield Example(
                    identity, (picture,), question, (right.strip().lower(),), type=name, key=f"{name}/{path.stem}"
                )


def _mme_picture(folder: Path, stem: str) -> Path:
    return next(
        (folder / f"{stem}{end}" for end in (".jpg", ".png") if (folder / f"{stem}{end}").is_file()),
        folder / f"{stem}.jpg",
    )


def yes_or_no(items: Sequence[Item], outputs: Sequence[str]) -> list[str]:
    """calculation.py of MME: the whole reply, or what its first four letters hold; "" for neither."""
    answers = []
    for said in outputs:
        start = said.strip().lower()[:4]
        answers.append("yes" if "yes" in start else "no" if "no" in start else "")
    return answers


def _mme_metric(items: Sequence[Item], answers: Sequence[str]) -> Scored:
    """Per subtask accuracy and accuracy+ (both questions on a picture right) in percent; scores are their sums."""
    scores = [float(said == item.references[0]) for item, said in zip(items, answers, strict=True)]
    by_picture: dict[tuple[str, str], list[float]] = {}
    for item, score in zip(items, scores, strict=True):
        by_picture.setdefault((str(item.type), item.key), []).append(score)
    plain = mean_by([str(item.type) for item in items], scores)
    plus = mean_by([kind for kind, _ in by_picture], [min(both) for both in by_picture.values()])
    each = {
        kind: {
            "accuracy": 100 * plain[kind],
            "accuracy_plus": 100 * plus[kind],
            "score": 100 * (plain[kind] + plus[kind]),
        }
        for kind in plain
    }
    totals = [sum(each[kind]["score"] for kind in names if kind in each) for names in (PERCEPTION, COGNITION)]
    metrics: dict[str, Any] = {"score": sum(totals), "perception": totals[0], "cognition": totals[1], "subtasks": each}
    return Scored(metrics, answers, scores)


# ------------------------------------------------------------------------------------------------------------- NLVR

SENTENCE = "Is this sentence true of {what}? {{question}}\nAnswer with yes or no."


def _read_nlvr2(folder: Path, split: str) -> Iterator[Example]:
    for entry in read_lines(first_of(folder, f"data/{split}.json", f"{split}.json")):
        pair, _, _ = entry["identifier"].rpartition("-")
        pictures = tuple(folder / split / f"{pair}-img{side}.png" for side in (0, 1))
        yield Example(
            entry["identifier"], pictures, entry["sentence"], (_truth(entry),), about={"sentence": _set_of(entry)}
        )


def _set_of(entry: dict[str, Any]) -> str:
    """What all pairs shown with one sentence share: SPLIT-SET-PAIR-SENTENCE without the pair."""
    split, chosen, _, sentence = entry["identifier"].split("-")
    return f"{split}-{chosen}-{sentence}"


def _read_nlvr(folder: Path, split: str) -> Iterator[Example]:
    for entry in read_lines(*files(folder, f"{split}/{split}.json")):
        place = folder / split / "images" / str(entry["directory"])
        sentence, _, _ = entry["identifier"].partition("-")
        for order in range(6):
            name = f"{split}-{entry['identifier']}-{order}.png"
            yield Example(name, (place / name,), entry["sentence"], (_truth(entry),), about={"sentence": sentence})


def _truth(entry: dict[str, Any]) -> str:
    told = str(entry["label"]).lower()
    if told not in ("true", "false"):
        raise UsageError(
            f"{first_named([entry['identifier']])}: label {told!r} is neither true nor false; download it again"
        )
    return "yes" if told == "true" else "no"


def _nlvr_metric(items: Sequence[Item], answers: Sequence[str]) -> Scored:
    """Accuracy, and consistency: the share of sentences judged right wherever they are shown."""
    scores = [float(said == item.references[0]) for item, said in zip(items, answers, strict=True)]
    sentences: dict[str, float] = {}
    for item, score in zip(items, scores, strict=True):
        sentences[item.about["sentence"]] = min(score, sentences.get(item.about["sentence"], 1.0))
    return Scored({"accuracy": mean(scores), "consistency": mean(list(sentences.values()))}, answers, scores)


BENCHMARKS = (
    Benchmark(
        name="pope",
        headline="f1",
        read=_read_pope,
        ways=written(SHORT, 16, read=_pope_answers),
        metric=_pope_metric,
    ),
    Benchmark(
        name="mme",
        headline="score",
        read=_read_mme,
        ways=written("{question}", 16, read=yes_or_no),
        metric=_mme_metric,
    ),
    Benchmark(
        name="nlvr2",
        headline="accuracy",
        read=partial(_read_nlvr2, split="dev"),
        ways=written(SENTENCE.format(what="the two pictures"), 8, read=yes_or_no),
        metric=_nlvr_metric,
    ),
    Benchmark(
        name="nlvr",
        headline="accuracy",
        read=partial(_read_nlvr, split="dev"),
        train=partial(_read_nlvr, split="train"),
        ways=written(SENTENCE.format(what="the picture"), 8, read=yes_or_no),
        metric=_nlvr_metric,
    ),
)
