"""Perplexity of WikiText and plain files, and the likelihoods beneath every task against a reference in float64."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

import vlm
from vlm.api import user_turn
from vlm.errors import UsageError
from vlm.eval.run import Shots, evaluate
from vlm.eval.tasks import TASKS
from vlm.eval.tasks.base import reply_turn

RAW = """ 
 = Robert Boulter = 
 
 Robert Boulter is an English film @-@ maker , born in 1 @,@ 980 ( in " London " ) . 
 
 = = Career = = 
 
 He had a role 's end . 
 = Du Fu = 
 
 Du Fu was a poet . 
"""  # noqa: W291, W293


@pytest.mark.parametrize(
    ("task", "place"),
    [
        ("wikitext2", "wikitext-2-raw/wiki.test.raw"),
        ("wikitext103", "wikitext-103-raw/wiki.test.raw"),
        ("wikitext103", "wiki.test.raw"),
    ],
)
def test_wikitext_is_read_by_article_and_counted_by_word_and_byte(
    task: str, place: str, tmp_path: Path, run_task, puppet
) -> None:
    path = tmp_path / "data" / place
    path.parent.mkdir(parents=True)
    path.write_text(RAW)
    first, second = TASKS[task].examples(tmp_path / "data")
    assert (first.key, second.key) == ("Robert Boulter", "Du Fu")
    assert 'is an English film-maker, born in 1,980 (in "London").\n' in first.question
    assert "role's end." in first.question and "== Career ==" in first.question
    metrics = run_task(puppet(), task, tmp_path / "data", blind=True, shuffled=True)
    assert "blind" not in metrics, "there is nothing to blind"
    # The stub finds every byte of the plain English half as likely as not.
    told = -math.log(2) * sum(len(one.question.encode()) for one in (first, second))
    articles = [" = Robert" + RAW.partition(" = Robert")[2].partition(" = Du")[0], " = Du" + RAW.partition(" = Du")[2]]
    words, size = sum(len(a.split()) + 2 for a in articles), sum(len(a.encode()) for a in articles)
    assert metrics["word_perplexity"] == pytest.approx(math.exp(-told / words))
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(-told / size))
    assert metrics["perplexity"] == pytest.approx(math.exp(-told / metrics["tokens"]))


def test_plain_files_one_or_a_folder(tmp_path: Path, run_task, puppet) -> None:
    (tmp_path / "b.txt").write_text("two words", "utf-8")
    (tmp_path / "a.txt").write_text("größer", "utf-8")
    (tmp_path / "empty.txt").write_text(" \n")
    metrics = run_task(puppet(), "text", tmp_path)
    assert metrics["n"] == 2 and metrics["byte_perplexity"] == pytest.approx(2.0)
    assert metrics["word_perplexity"] == pytest.approx(2.0 ** ((9 + 8) / 3))
    assert run_task(puppet(), "text", tmp_path / "b.txt")["n"] == 1
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"c.txt: not UTF-8 at byte 0"):
        run_task(puppet(), "text", tmp_path)


# --------------------------------------------------------------------------------------------------------- likelihoods


@pytest.fixture(scope="module")
def model(make_model, make_processor) -> vlm.VLM:
    return vlm.VLM(make_model(gate_init=1.0), make_processor())


def reference(model: vlm.VLM, ids: list[int], targets: list[bool], pictures: list) -> float:
    """The sum of log p by the definition, one row, no padding, all in float64."""
    wide = copy.deepcopy(model.model).double()
    inputs: dict = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if pictures:
        inputs["pixel_values"] = model.processor.pixels(pictures).double()
        inputs["image_slots"] = torch.arange(len(pictures))[None]
    with torch.no_grad():
        logits = wide(**inputs).logits[0].double()
    told = logits.log_softmax(dim=-1)
    return sum(float(told[place - 1, ids[place]]) for place in range(1, len(ids)) if targets[place])


def test_likelihoods_are_the_reference_in_float64_however_they_are_batched(model: vlm.VLM, make_picture) -> None:
    replies = ["A", "a rather long option with many words in it", "no"]
    conversations = []
    for place, reply in enumerate(replies):
        shown = [make_picture(seed) for seed in range(place % 2 + 1)]
        conversations.append([*user_turn(shown, "Which one?" * (place + 1)), reply_turn(reply)])
    wanted = []
    for turns in conversations:
        ids, targets = model.processor.encode_dialogue(turns)
        pictures = [part["image"] for part in turns[0]["content"] if part["type"] == "image"]
        wanted.append(reference(model, ids, targets, pictures))
    for size in (1, 2, 3):
        told = [log_p for log_p, _ in model.loglikelihood(conversations, batch_size=size)]
        assert told == pytest.approx(wanted, rel=1e-5)


def test_rolling_likelihood_predicts_every_token_once(model: vlm.VLM) -> None:
    tokenizer = model.processor.tokenizer
    for text in ("short", "a text that is longer than any of the windows it is read in"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        for window in (1000, 16, 7, 1):
            wanted, done = 0.0, 0
            row = [tokenizer.eos_token_id, *ids]
            while done < len(ids):  # the windows of lm-evaluation-harness, written out
                end = min(done + window, len(ids))
                start = max(0, end - window)
                piece = row[start : end + 1]
                wanted += reference(model, piece, [start + place > done for place in range(len(piece))], [])
                done = end
            for size in (1, 4):
                ((told, count),) = model.loglikelihood_rolling([text], window=window, batch_size=size)
                assert count == len(ids) and told == pytest.approx(wanted, rel=1e-5)


def test_a_long_text_is_read_within_what_the_model_takes(make_model, make_processor) -> None:
    model = vlm.VLM(make_model("gpt2"), make_processor())
    ((told, count),) = model.loglikelihood_rolling(["word " * 200], window=4096)
    assert count == 1000 and math.isfinite(told) and model.model.max_tokens == 256
    with pytest.raises(UsageError, match="window is 0"):
        model.loglikelihood_rolling(["a"], window=0)


def test_batching_changes_no_answer(model: vlm.VLM, tmp_path: Path, picture, as_json) -> None:
    """A real model on every kind of asking: written, chosen by likelihood, matched, rolled."""
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(1, 6)]
    annotations = [{"image_id": n, "caption": f"number {n}"} for n in range(1, 6)]
    told = {"images": images, "annotations": annotations}
    for split in ("val2017", "train2017"):
        as_json(tmp_path / "coco-captions" / "annotations" / f"captions_{split}.json", told)
    for number in range(1, 6):
        picture(tmp_path / "coco-captions" / "val2017" / f"{number}.jpg", 40 * number)
        picture(tmp_path / "coco-captions" / "train2017" / f"{number}.jpg", 40 * number + 7)
        picture(tmp_path / "folder" / f"class_{number % 2}" / f"{number}.jpg", 40 * number)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some words " * 30)
    tasks = ["coco-captions", "folder", "text"]
    one, many = (evaluate(model, tasks, tmp_path, batch=size)["tasks"] for size in (1, 4))
    assert one["coco-captions"] == many["coco-captions"]
    assert one["folder"] == many["folder"]
    assert one["text"] == pytest.approx(many["text"], rel=1e-5)
    for by in ("random", "similar"):  # examples with their pictures before the one that is asked about
        shots = Shots(2, by)
        one, many = (evaluate(model, ["coco-captions"], tmp_path, batch=size, shots=shots)["tasks"] for size in (1, 4))
        assert one == many
