"""Tasks, ways of looking and what `evaluate` writes, with a model that sees colours and nothing else."""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from vlm.data_tools.scene_world import LEVELS
from vlm.data_tools.scenes import make_sample
from vlm.errors import UsageError
from vlm.eval import pictures
from vlm.eval.metrics.attributes import Vocabulary
from vlm.eval.plan import Plan
from vlm.eval.run import answer, evaluate, find_splits, summary
from vlm.eval.tasks import TASKS
from vlm.eval.tasks.shards import _things
from vlm.processes import Share
from vlm.samples import Sample, parse_sample
from vlm.shards import Shards, ShardWriter

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
PROMPT = "Describe the picture."


def png(colour: tuple[int, int, int], size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


class SeeingModel:
    """Has the surface of what `vlm.load` returns, needs no training: it reads the answer off the pixels.

    So it knows what it is shown and nothing else: it names the picture's colour, and is "unsure" of one it does not know.
    """

    def __init__(self) -> None:
        self.processor = SimpleNamespace(caption_prompt=PROMPT, image_processor=SimpleNamespace(mean=[0.5, 0.5, 0.5]))
        self.model = SimpleNamespace(
            name_or_path="seeing", gates=lambda: {"0": (0.5, 0.25)}, parameters=lambda: [torch.zeros(3)], modules=list
        )
        self.asked: Counter[tuple[bytes, str]] = Counter()
        self.questions: list[int] = []  # the batch that each was asked in

    def generate_each(
        self, conversations: Iterable[Any], *, batch_size: int, max_new_tokens: int, temperature: float
    ) -> Iterator[tuple[int, str]]:
        assert temperature == 0 and batch_size >= 1
        for place, (turn,) in enumerate(conversations):
            *pictures, text = turn["content"]
            self.asked[pictures[0]["image"].tobytes(), text["text"]] += 1
            self.questions.append(batch_size)
            seen = self._name(pictures[0]["image"])
            yield place, f"a small {seen} circle" if text["text"] == PROMPT else seen

    def embed_image(self, images: Sequence[Image.Image], *, batch_size: int) -> torch.Tensor:
        return torch.stack([self._vector(self._name(image)) for image in images])

    def embed_text(self, texts: Sequence[str], *, batch_size: int) -> torch.Tensor:
        return torch.stack([self._vector(next((c for c in COLOURS if c in text), "unsure")) for text in texts])

    def loglikelihood(self, conversations: Sequence[Any], *, batch_size: int) -> list[tuple[float, int]]:
        weighed = []
        for messages in conversations:
            parts = [part for message in messages for part in message["content"]]
            told = messages[-1]["content"][0]["text"]
            seen = {self._name(part["image"]) for part in parts if part["type"] == "image"}
            weighed.append((-0.1 if any(one in told for one in seen) else -4.0, 2))
        return weighed

    def _name(self, image: Image.Image) -> str:
        return next((name for name, rgb in COLOURS.items() if image.getpixel((0, 0)) == rgb), "unsure")

    def _vector(self, name: str) -> torch.Tensor:
        return torch.eye(5)[[*COLOURS, "unsure"].index(name)]


@pytest.fixture
def model() -> SeeingModel:
    return SeeingModel()


def write_pictures(folder: Path, number: int = 8, **more: Any) -> Path:
    """Shards of one-coloured pictures, each with a caption, two questions, its object and a label."""
    with ShardWriter(folder, samples_per_shard=3) as writer:
        for place in range(number):
            name = list(COLOURS)[place % 4]
            fields = {
                "caption": f"a small {name} circle",
                "qa": [
                    {"question": "What colour is it?", "answer": name, "type": "colour"},
                    {"question": f"Is it {name}?", "answer": "yes", "type": "existence"},
                ],
                "objects": [{"size": "small", "colour": name, "shape": "circle", "x": 0.5}],
                "label": name,
            }
            writer.write(f"{place:03d}", {"png": png(COLOURS[name]), "json": json.dumps(fields | more).encode()})
    return folder


ALL = ["vqa", "caption", "retrieval", "classification", "perplexity"]


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


# ------------------------------------------------------------------------------------ going on, and several processes


class Killed(BaseException):
    """What stops a run as a signal does."""


def killed_after(questions: int, model: SeeingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the model answer so many questions, and no more."""
    ask = model.generate_each

    def generate_each(*args: Any, **options: Any) -> Iterator[tuple[int, str]]:
        for told in ask(*args, **options):
            if len(model.questions) > questions:
                raise Killed
            yield told

    monkeypatch.setattr(model, "generate_each", generate_each)


def scores(results: dict[str, Any]) -> Any:
    return json.loads(json.dumps(results["tasks"]))


def test_a_killed_run_goes_on_where_it_stopped(model: SeeingModel, tmp_path: Path, monkeypatch) -> None:
    data, out = write_pictures(tmp_path / "data"), tmp_path / "out"
    straight = evaluate(SeeingModel(), ALL, data, batch=3)
    with monkeypatch.context() as patch:
        killed_after(14, model, patch)
        with pytest.raises(Killed):
            evaluate(model, ALL, data, out, batch=3)
    assert (tmp_path / ".out.answers").is_dir() and not (out / "results.json").exists()
    # A kill in the middle of a line: that part is asked again, and the next line is not swallowed.
    (last,) = (tmp_path / ".out.answers").glob("vqa.0.jsonl")
    last.write_bytes(last.read_bytes()[:-20])
    again = evaluate(model, ALL, data, out, batch=3)
    assert scores(again) == scores(straight)
    whole = SeeingModel()
    evaluate(whole, ALL, data, batch=3)
    assert len(model.questions) == len(whole.questions) + 3 + 3, "the part that was cut and the one begun, no other"
    assert not (tmp_path / ".out.answers").exists()


@pytest.mark.parametrize("change", ["weights", "batch", "data", "limit"])
def test_answers_to_something_else_are_not_taken(change: str, model: SeeingModel, tmp_path: Path, monkeypatch) -> None:
    data, out = write_pictures(tmp_path / "data"), tmp_path / "out"
    with monkeypatch.context() as patch:
        killed_after(6, model, patch)
        with pytest.raises(Killed):
            evaluate(model, ["vqa"], data, out, batch=3)
    other = SeeingModel()
    if change == "weights":
        other.model.parameters = lambda: [torch.ones(3)]
    data = write_pictures(tmp_path / "other") if change == "data" else data
    options = {"batch": {"batch": 4}, "limit": {"limit": 7}}.get(change, {})
    evaluate(other, ["vqa"], data, out, **{"batch": 3} | options)
    alone = SeeingModel()
    evaluate(alone, ["vqa"], data, **{"batch": 3} | options)
    assert other.asked == alone.asked


def test_embeddings_are_kept_too(model: SeeingModel, tmp_path: Path, monkeypatch) -> None:
    data, out = write_pictures(tmp_path / "data"), tmp_path / "out"
    straight = evaluate(SeeingModel(), ["retrieval"], data)
    shown: list[int] = []

    def embed(images: Sequence[Image.Image], *, batch_size: int) -> torch.Tensor:
        if len(shown) == 3:
            shown.append(0)
            raise Killed
        shown.append(len(images))
        return SeeingModel.embed_image(model, images, batch_size=batch_size)

    monkeypatch.setattr(model, "embed_image", embed)
    with pytest.raises(Killed):
        evaluate(model, ["retrieval"], data, out, batch=2)
    assert scores(evaluate(model, ["retrieval"], data, out, batch=2)) == scores(straight)
    assert shown == [2, 2, 2, 0, 2, 1, 2, 2, 2, 2], "8 pictures, one blank, 8 of others: the first three parts once"


def test_several_processes_give_the_results_of_one(tmp_path: Path, make_model, make_processor) -> None:
    folder = tmp_path / "model"
    make_model(gate_init=1.0).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    data = write_pictures(tmp_path / "data", 6)
    one = evaluate(folder, ALL, data, tmp_path / "one", batch=2, shuffled=False)
    two = evaluate(folder, ALL, data, tmp_path / "two", batch=2, shuffled=False, processes=2)
    assert scores(one) == scores(two)
    lines = [(tmp_path / name / "samples.jsonl").read_text() for name in ("one", "two")]
    assert lines[0] == lines[1]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_each_process_answers_its_share_and_nothing_twice(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data")
    plan = Plan(tuple(ALL), data, batch=3)
    models = [SeeingModel() for _ in range(3)]
    for process, model in enumerate(models):
        answer(model, plan, tmp_path / ".out.answers", Share(process, 3))
    asked = sum((model.asked for model in models), Counter())
    alone = SeeingModel()
    straight = evaluate(alone, ALL, data, batch=3)
    assert asked == alone.asked and all(model.asked for model in models)
    last = SeeingModel()
    assert scores(evaluate(last, ALL, data, tmp_path / "out", batch=3)) == scores(straight)
    assert not last.asked, "all was answered already"


def test_without_a_folder_for_results_processes_share_one_for_now(
    model: SeeingModel, tmp_path: Path, monkeypatch
) -> None:
    folders = []

    def in_this_process(ask: Any, model: SeeingModel, plan: Plan, folder: Path, processes: int) -> None:
        folders.append(folder)
        for process in range(processes):
            ask(model, plan, folder, Share(process, processes))

    monkeypatch.setattr("vlm.eval.run.answer_in_processes", in_this_process)
    data = write_pictures(tmp_path / "data")
    straight = evaluate(SeeingModel(), ALL, data)
    assert scores(evaluate(model, ALL, data, processes=2)) == scores(straight)
    alone = SeeingModel()
    evaluate(alone, ALL, data)
    assert model.asked == alone.asked and not folders[0].exists()


def test_processes_need_a_model_with_a_path(model: SeeingModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="processes is 2 and the model is in memory; give its path"):
        evaluate(model, ["vqa"], write_pictures(tmp_path / "data", 2), processes=2)
    with pytest.raises(UsageError, match="processes is 0"):
        evaluate(model, ["vqa"], tmp_path / "data", processes=0)
