"""Tasks, ways of looking and what `evaluate` writes, with a model that sees colours and nothing else."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from seeing import ALL, COLOURS, PROMPT, SeeingModel, png, write_pictures

from vlm.data_tools.scene_world import LEVELS
from vlm.data_tools.scenes import make_sample
from vlm.errors import UsageError
from vlm.eval import pictures
from vlm.eval.metrics.attributes import Vocabulary
from vlm.eval.run import evaluate, find_splits, summary
from vlm.eval.tasks import TASKS
from vlm.eval.tasks.shards import _things
from vlm.samples import Sample, parse_sample
from vlm.shards import Shards, ShardWriter


def test_what_the_model_sees_decides_every_score(model: SeeingModel, tmp_path: Path) -> None:
    results = evaluate(model, ALL, write_pictures(tmp_path / "data"))["tasks"]
    # Colour questions are answered off the pixels; "Is it red?" gets a colour, which is wrong.
    assert results["vqa"]["accuracy_by_type"] == {"colour": 1.0, "existence": 0.0}
    assert results["vqa"]["blind"]["accuracy"] == 0.0
    assert results["vqa"]["majority"] == 0.5 and results["vqa"]["majority_answer"] == "yes"
    assert results["caption"]["attributes"] == 1.0
    assert results["caption"]["blind"]["attributes"] == pytest.approx(2 / 3)
    assert results["classification"]["accuracy"] == 1.0
    assert results["classification"]["blind"]["accuracy"] == pytest.approx(1 / 4)
    # Eight pictures of four colours: each caption belongs to two.
    assert results["retrieval"]["image_to_text_R@1"] == results["retrieval"]["ceiling_R@1"] == 0.5
    assert results["retrieval"]["blind"]["image_to_text_R@1"] == pytest.approx(1 / 8)
    assert results["perplexity"]["perplexity"] < results["perplexity"]["blind"]["perplexity"]
    for name in ALL:
        headline = TASKS[name].headline
        worse = results[name]["shuffled"][headline] < results[name][headline]
        assert worse != (name == "perplexity"), name


def test_each_picture_and_question_is_asked_once(model: SeeingModel, tmp_path: Path) -> None:
    evaluate(model, ["vqa"], write_pictures(tmp_path / "data", 4), batch=3)
    # Four pictures with two questions each, as they are and exchanged: no two are the same. Blind, "What colour is it?"
    # is one question for all, and each "Is it …?" another.
    assert sum(model.asked.values()) == 8 + 8 + 5
    assert set(model.questions) == {3}


def test_a_scene_is_asked_what_its_shard_says(tmp_path: Path) -> None:
    sample = parse_sample("a", make_sample(LEVELS["easy"], "test", 0, 0))
    items = TASKS["vqa"].items([sample], PROMPT)
    assert [(item.prompt, item.references) for item in items] == [(q.text, q.answers) for q in sample.questions]
    assert len({item.id for item in items}) == len(items)


@pytest.mark.parametrize("level", LEVELS)
def test_true_captions_of_scenes_name_every_attribute_right(level: str) -> None:
    samples = [parse_sample(str(i), make_sample(LEVELS[level], "test", 3, i)) for i in range(25)]
    vocabulary = Vocabulary(thing for sample in samples for thing in _things(sample))
    for sample in samples:
        count = vocabulary.count(sample.caption or "", _things(sample))
        assert count.right == count.possible == count.true, sample.caption


def test_several_human_answers_get_the_official_accuracy(model: SeeingModel, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data") as writer:
        for key, answers in (("a", ["red"] * 4 + ["pink"] * 6), ("b", ["red"] * 2 + ["pink"] * 8)):
            fields = {"question": "What colour?", "answers": answers, "question_id": 7 if key == "a" else 9}
            writer.write(key, {"png": png(COLOURS["red"]), "json": json.dumps(fields).encode()})
    evaluate(model, ["vqa"], tmp_path / "data", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [line["score"] for line in lines] == pytest.approx([1.0, (2 * 1 / 3 + 8 * 2 / 3) / 10])
    official = json.loads((tmp_path / "out" / "vqa_results.json").read_text("utf-8"))
    assert official == [{"question_id": 7, "answer": "red"}, {"question_id": 9, "answer": "red"}]


# ------------------------------------------------------------------------------------------------------- looking


def samples_of(*sizes: tuple[int, ...]) -> list[Sample]:
    """One sample a tuple, with that many pictures of these widths."""
    return [Sample(str(i), tuple(png((i, 0, 0), (w, 2)) for w in widths)) for i, widths in enumerate(sizes)]


def test_shuffled_gives_every_sample_another_ones_pictures() -> None:
    samples = samples_of(*[(2,)] * 9, *[(2, 3)] * 3, (5, 5, 5))
    look, again = pictures.shuffled(samples), pictures.shuffled(samples)
    given = [look.key(i) for i in range(len(samples))]
    assert sorted(given) == list(range(13)) and given == [again.key(i) for i in range(13)]
    assert all(given[i] != i for i in range(12))
    assert all(len(samples[i].images) == len(samples[given[i]].images) for i in range(13))
    assert given[12] == 12  # nobody else has three


def test_shuffled_shows_no_sample_its_own_picture_again() -> None:
    repeated = [place for place in range(6) for _ in range(4)]  # a line a question: four on each of six pictures
    samples = [Sample(str(i), (png((place, 0, 0)),)) for i, place in enumerate(repeated)]
    for seed in range(20):
        look = pictures.shuffled(samples, seed)
        given = [look.key(i) for i in range(len(samples))]
        assert all(samples[other].images != samples[i].images for i, other in enumerate(given))
        assert len(set(given)) == 6 and {repeated[other] for other in given} == set(range(6)), "each is encoded once"
        assert given == [pictures.shuffled(samples, seed).key(i) for i in range(len(samples))]


def test_shuffled_takes_a_picture_for_what_it_is_wherever_it_is_kept() -> None:
    path, made = Path("a.png"), functools.partial(png, (1, 0, 0))
    kept = [(source(),) for source in (lambda: path, lambda: made, lambda: png((2, 0, 0))) for _ in range(2)]
    kept += [(path, made), (path, path)]
    galleries = [pictures.Gallery(str(i), images) for i, images in enumerate(kept)]
    look = pictures.shuffled(galleries)
    assert all(kept[look.key(i)] != kept[i] and len(kept[look.key(i)]) == len(kept[i]) for i in range(len(kept)))


def test_where_all_pictures_are_the_same_none_is_shuffled_and_that_is_told(model: SeeingModel, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data") as writer:
        for key in "ab":
            fields = {"question": "What colour?", "answer": "red"}
            writer.write(key, {"png": png(COLOURS["red"]), "json": json.dumps(fields).encode()})
    assert pictures.shuffled(samples_of((2,))) is None and pictures.shuffled(samples_of((), ())) is not None
    results = evaluate(model, ["vqa"], tmp_path / "data", tmp_path / "out")
    assert results["unshuffled"] == ["vqa"] and "shuffled" not in results["tasks"]["vqa"]
    line = "vqa: accuracy 1.000  blind 0.000  not shuffled: there are no other pictures  (n = 2)"
    assert summary(results) == line
    results = evaluate(model, ["vqa"], tmp_path / "data", shuffled=False)
    assert results["unshuffled"] == [] and "shuffled" not in summary(results)


def test_blind_pictures_have_the_size_and_one_colour() -> None:
    look = pictures.blind(samples_of((3,), (3,), (4, 6)), (1, 2, 3))
    assert look.key(0) == look.key(1) != look.key(2)
    assert [image.size for image in look.load(look.key(2))] == [(4, 2), (6, 2)]
    assert {image.getpixel((1, 1)) for image in look.load(look.key(2))} == {(1, 2, 3)}
    assert look.load(look.key(0))[0] is look.load(look.key(1))[0]  # so that a batch encodes it once


def test_the_blind_colour_is_what_normalisation_makes_zero(model: SeeingModel) -> None:
    assert pictures.zero_colour(model.processor) == (128, 128, 128)
    model.processor.image_processor.mean = [0.0, 0.481, 1.0]
    assert pictures.zero_colour(model.processor) == (0, 123, 255)
    assert pictures.zero_colour(object()) == pictures.GREY


def test_a_damaged_picture_is_named_by_its_sample(model: SeeingModel, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data") as writer:
        fields = json.dumps({"question": "What?", "answer": "red"}).encode()
        writer.write("broken", {"png": png(COLOURS["red"])[:40], "json": fields})
    for blind in (True, False):
        with pytest.raises(UsageError, match="sample broken"):
            evaluate(model, ["vqa"], tmp_path / "data", blind=blind)


# -------------------------------------------------------------------------------------------- splits and files


def test_every_split_beside_test_is_a_task_of_its_own(model: SeeingModel, tmp_path: Path) -> None:
    write_pictures(tmp_path / "test", 4)
    write_pictures(tmp_path / "test-compositional", 6)
    write_pictures(tmp_path / "train", 2)
    results = evaluate(model, ["vqa", "caption"], tmp_path, tmp_path / "out", shuffled=False)
    assert list(results["tasks"]) == ["vqa", "caption", "vqa@test-compositional", "caption@test-compositional"]
    assert results["tasks"]["vqa@test-compositional"]["n"] == 12
    assert "shuffled" not in results["tasks"]["vqa"] and "blind" in results["tasks"]["vqa"]
    assert set(results["data"]) == {"main", "test-compositional"}
    assert (tmp_path / "out" / "caption@test-compositional_results.json").exists()


def test_what_is_written_is_what_is_returned(model: SeeingModel, tmp_path: Path) -> None:
    results = evaluate(model, ALL, write_pictures(tmp_path / "data"), tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert stored == json.loads(json.dumps(results))
    assert stored["model"] == "seeing" and stored["gates"] == {"0": [0.5, 0.25]}
    environment = stored["environment"]
    assert {"command", "versions", "cpu", "cores", "memory_gib", "peak_memory_gib", "seconds"} <= set(environment)
    assert set(environment["seconds"]) == set(ALL) and environment["versions"]["torch"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text("utf-8").splitlines()]
    for name in ALL:
        mine = [line for line in lines if line["task"] == name]
        assert len(mine) == stored["tasks"][name]["n"]
        assert all(
            {"id", "key", "prediction", "references", "score", "blind", "shuffled"} <= set(line) for line in mine
        )
    captions = json.loads((tmp_path / "out" / "caption_results.json").read_text("utf-8"))
    assert captions[:2] == [
        {"image_id": 0, "caption": "a small red circle"},
        {"image_id": 1, "caption": "a small green circle"},
    ]
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_the_summary_has_a_line_a_task(model: SeeingModel, tmp_path: Path) -> None:
    text = summary(evaluate(model, ["vqa", "perplexity"], write_pictures(tmp_path / "data")))
    assert re.fullmatch(r"vqa: accuracy 0\.500  blind 0\.000  shuffled 0\.\d{3}  \(n = 16\)", text.splitlines()[0])
    assert len(text.splitlines()) == 2


def test_limit_takes_the_first_samples(model: SeeingModel, tmp_path: Path) -> None:
    results = evaluate(model, ["vqa", "retrieval"], write_pictures(tmp_path / "data"), limit=3)
    assert results["tasks"]["vqa"]["n"] == 6 and results["tasks"]["retrieval"]["n"] == 3


def test_text_only_samples_have_a_perplexity_and_nothing_to_blind(model: SeeingModel, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data") as writer:
        writer.write("a", {"json": json.dumps({"text": "Once upon a time."}).encode()})
    perplexity = evaluate(model, ["perplexity"], tmp_path / "data")["tasks"]["perplexity"]
    assert perplexity["perplexity"] == perplexity["blind"]["perplexity"] == perplexity["shuffled"]["perplexity"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ["vqq"]}, "task 'vqq' is unknown"),
        ({"tasks": []}, "no task is given"),
        ({"batch": 0}, "batch is 0"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_bad_usage_is_one_clear_line(model: SeeingModel, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    data = write_pictures(tmp_path / "data", 2)
    with pytest.raises(UsageError, match=said) as caught:
        evaluate(model, **{"tasks": ["vqa"], "data": data} | options)
    assert "\n" not in str(caught.value)


def test_a_file_in_the_way_of_the_results_is_told_before_the_work(model: SeeingModel, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("thesis")
    with pytest.raises(UsageError, match="out: a file is there already; give another folder for the results"):
        evaluate(model, ["vqa"], write_pictures(tmp_path / "data", 2), tmp_path / "out")
    assert not model.asked and (tmp_path / "out").read_text() == "thesis"


def test_numbers_that_are_none_are_still_json(model: SeeingModel, tmp_path: Path, monkeypatch) -> None:
    """A model that went NaN in training: its files can be read by whatever reads JSON."""
    monkeypatch.setattr(model, "loglikelihood", lambda asked, batch_size: [(-math.inf, 2)] * len(asked))
    monkeypatch.setattr(model.model, "gates", lambda: {"0": (math.nan, 0.5)})
    evaluate(model, ["perplexity"], write_pictures(tmp_path / "data", 2), tmp_path / "out")

    def refuse(word: str) -> None:
        raise ValueError(word)

    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"), parse_constant=refuse)
    assert results["gates"] == {"0": ["nan", 0.5]} and results["tasks"]["perplexity"]["perplexity"] == "inf"


def test_data_without_anything_for_a_task_is_an_error(model: SeeingModel, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data") as writer:
        writer.write("a", {"png": png(COLOURS["red"]), "txt": b"a red picture"})
    with pytest.raises(UsageError, match="no questions about images for task vqa"):
        evaluate(model, ["vqa"], tmp_path / "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_data_names_what_could_be_meant(tmp_path: Path) -> None:
    write_pictures(tmp_path / "scenes" / "dev", 1)
    with pytest.raises(UsageError, match="name one of them: dev"):
        find_splits(tmp_path / "scenes")
    with pytest.raises(UsageError, match="vlm data convert"):
        find_splits(tmp_path)
    assert find_splits(tmp_path / "scenes" / "dev") == {"": tmp_path / "scenes" / "dev"}
    with pytest.raises(UsageError, match="no such shard"):
        Shards.open(find_splits(tmp_path / "nowhere")[""])
