"""`vlm bench score` and `vlm bench eval`: how long scoring takes, and what `vlm eval` costs beside the decoding itself.

Knows what to measure; nothing of scoring, nor of decoding. It calls what a user calls. Scoring is of files made here, and
reading them is part of the time; an evaluation is of a model and of shards that are given.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from vlm.api import load
from vlm.benchmark import Row, interleaved, seconds
from vlm.errors import UsageError
from vlm.shards import Shards

from .pictures import as_it_is
from .run import evaluate
from .score import score_caption, score_vqa
from .tasks.shards import VQA

PEOPLE, REFERENCES = 10, 5
COLOURS = "red blue green black white yellow brown grey".split()
NOUNS = """
    man woman dog cat horse surfer giraffe train bus pizza sandwich table kitchen bathroom street sign clock tower
    beach umbrella kite laptop bench bear sheep plane truck car boat ocean field fence tree mountain
""".split()
VERBS = "sitting standing riding holding eating walking playing looking flying parked".split()
PLACES = "on in at near under behind beside with by".split()


def bench_score(questions: int = 200_000, pictures: int = 40_000) -> list[Row]:
    """`score_vqa` of so many questions with ten human answers each, and `score_caption` with five references each."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="vlm-bench-") as folder:
        vqa, captions = _vqa_files(Path(folder), questions, rng), _caption_files(Path(folder), pictures, rng)
        vqa_seconds = seconds(lambda: score_vqa(*vqa))
        caption_seconds = seconds(lambda: score_caption(*captions))
    answers, references = questions * PEOPLE, pictures * REFERENCES
    return [
        _row("score vqa", vqa_seconds, f"{questions} answers, {answers} of people, read from JSON", "≤ 20 s"),
        _row("score caption", caption_seconds, f"{pictures} captions, {references} references", "≤ 60 s"),
    ]


def bench_eval(model: str | Path, data: str | Path, batch: int = 32, limit: int = 64, rounds: int = 3) -> list[Row]:
    """`evaluate` on the questions of the first `limit` samples of shards, beside a bare `VLM.generate` of the same prompts.

    The peer's pictures are open and its conversations made before the clock runs; both put each prompt once, in the same
    order, with the same batch. Ours opens the data, asks, scores and reports, once, without blind and shuffled.
    Raises UsageError for data without questions about pictures.
    """
    loaded, task = load(model, at_once=batch), VQA()
    samples = Shards.open(data).first(limit)
    items, look = task.items(samples, loaded.processor.caption_prompt), as_it_is(samples)
    if not items:
        raise UsageError(f"{data}: no {task.needs} in the first {limit} samples; give other data")
    asking = task.asking
    conversations = list(asking.conversations(asking.parts(items, look, batch), look))

    def evaluated() -> None:
        evaluate(loaded, [task.name], data, batch=batch, limit=limit, blind=False, shuffled=False)

    def generated() -> None:
        loaded.generate(conversations, batch_size=batch, max_new_tokens=asking.max_new_tokens, temperature=0.0)

    generated()  # the first call of all is slower
    speeds = interleaved(
        lambda: len(conversations) / seconds(evaluated), lambda: len(conversations) / seconds(generated), rounds
    )
    conditions = (
        f"{len(conversations)} questions on {len(samples)} samples of {data}, batch {batch}; peer: VLM.generate"
    )
    return [Row("vlm eval, vqa", *speeds, "questions/s", conditions, "≥ 0.9")]


def _row(name: str, took: float, conditions: str, target: str) -> Row:
    return Row(name, took, None, "s", conditions, target, less_is_better=True)


def _vqa_files(folder: Path, questions: int, rng: random.Random) -> tuple[Path, Path, Path]:
    answers = [*COLOURS, *NOUNS, "yes", "no", "two", "1,000", "t-shirt", "the beach", "isnt", "on a table."]
    answers += [f"{colour} {noun}" for colour in COLOURS for noun in NOUNS] + [str(n) for n in range(100)]
    asked = [{"question_id": n, "image_id": n, "question": "What is it?"} for n in range(questions)]
    annotations = [
        {
            "question_id": n,
            "question_type": rng.choice(["what is", "how many", "is the"]),
            "answer_type": rng.choice(["yes/no", "number", "other"]),
            "answers": [{"answer": rng.choice(answers), "answer_id": i} for i in range(1, PEOPLE + 1)],
        }
        for n in range(questions)
    ]
    said = [{"question_id": n, "answer": rng.choice(answers)} for n in range(questions)]
    return (
        _written(folder / "said.json", said),
        _written(folder / "questions.json", {"questions": asked}),
        _written(folder / "annotations.json", {"annotations": annotations}),
    )


def _caption_files(folder: Path, pictures: int, rng: random.Random) -> tuple[Path, Path]:
    references = [{"image_id": n, "caption": _caption(rng)} for n in range(pictures) for _ in range(REFERENCES)]
    said = [{"image_id": n, "caption": _caption(rng)} for n in range(pictures)]
    return (
        _written(folder / "captions_said.json", said),
        _written(folder / "captions.json", {"annotations": references}),
    )


def _caption(rng: random.Random) -> str:
    """Some ten words, as long as the captions of COCO; one in twenty with something for the tokenizer to do."""
    words = ["A", rng.choice(COLOURS), rng.choice(NOUNS), rng.choice(VERBS), rng.choice(PLACES), "a", rng.choice(NOUNS)]
    words += [rng.choice(PLACES), "the", rng.choice(COLOURS), rng.choice(NOUNS)]
    words += rng.choice([[], [], ["that", "isn't", "it's", "2-story"]]) if rng.random() < 0.15 else []
    return " ".join(words) + "."


def _written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), "utf-8")
    return path
