"""A run that was killed goes on where it stopped, and several processes give the results of one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from seeing import ALL, SeeingModel, write_pictures

from vlm import packed_linear
from vlm.errors import UsageError
from vlm.eval import run
from vlm.eval.plan import Plan
from vlm.eval.resume import Kept
from vlm.eval.run import Effort, answer, evaluate
from vlm.packed_linear import lay_out
from vlm.processes import Share
from vlm.quantization import quantize
from vlm.saving import save


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


def killed(*arguments: Any) -> None:
    raise Killed


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
        torch.nn.init.ones_(other.weights[0])
    data = write_pictures(tmp_path / "other") if change == "data" else data
    options = {"batch": {"batch": 4}, "limit": {"limit": 7}}.get(change, {})
    evaluate(other, ["vqa"], data, out, **{"batch": 3} | options)
    alone = SeeingModel()
    evaluate(alone, ["vqa"], data, **{"batch": 3} | options)
    assert other.asked == alone.asked


def test_other_weights_are_told_apart_however_they_are_kept(make_model, monkeypatch) -> None:
    monkeypatch.setattr(packed_linear, "LEAST_WEIGHTS", 1)

    def weights(at_once: int = 0, scheme: str | None = None, more: float = 0.0) -> int:
        model = make_model(gate_init=1.0)
        with torch.no_grad():
            model.language_model.model.layers[0].mlp.up_proj.weight[0] += more
        if scheme:
            quantize(model, scheme)
        if at_once:
            lay_out(at_once, model.language_model, model.adapters)
        return Kept.of(Path("answers"), SimpleNamespace(model=model)).weights

    kinds = {(more, scheme): weights(0, scheme, more) for more in (0, 1) for scheme in (None, "int8", "int4")}
    assert len(set(kinds.values())) == 6, "in one linear layer is a difference enough"
    for (more, scheme), found in kinds.items():
        assert found == weights(1, scheme, more) == weights(64, scheme, more), "another layout is no other model"


def test_an_int4_model_does_not_go_on_with_the_answers_of_an_int8_one(
    tmp_path: Path, make_model, make_processor, monkeypatch
) -> None:
    (tmp_path / "data.txt").write_text("hello there " * 20)
    for scheme in ("int8", "int4"):
        model = make_model(gate_init=1.0)
        quantize(model, scheme)
        save(model, make_processor(), tmp_path / scheme)

    def evaluated(scheme: str, out: str) -> Any:
        return scores(evaluate(tmp_path / scheme, ["text"], tmp_path / "data.txt", tmp_path / out))

    straight = {scheme: evaluated(scheme, f"{scheme}-out") for scheme in ("int8", "int4")}
    assert straight["int8"] != straight["int4"]
    with monkeypatch.context() as patch:
        patch.setattr("vlm.eval.run._write", killed)
        with pytest.raises(Killed):
            evaluated("int8", "out")
    assert (tmp_path / ".out.answers").is_dir()
    assert evaluated("int4", "out") == straight["int4"]


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
    assert shown == [2, 2, 2, 0, 2, 1, 2, 2], "8 pictures, one blank, 4 that differ: the first three parts once"


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
    memory = [results["environment"]["peak_memory_gib"] for results in (one, two)]
    assert memory[1] > memory[0], "of all processes"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_time_and_memory_are_those_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they told them: the slowest one's time, and the memory of them all."""
    spent = [Effort({name: 100.0 * (1 + process) for name in ALL}, 50.0) for process in range(2)]
    monkeypatch.setattr(run, "answer_in_processes", lambda *_: spent)
    results = evaluate(SeeingModel(), ALL, write_pictures(tmp_path / "data"), tmp_path / "out", processes=2)
    seconds, memory = (results["environment"][name] for name in ("seconds", "peak_memory_gib"))
    assert set(seconds) == set(ALL) and all(200.0 <= each < 300.0 for each in seconds.values())
    assert memory > 100.0


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

    def in_this_process(ask: Any, model: SeeingModel, plan: Plan, folder: Path, processes: int) -> list[Effort]:
        folders.append(folder)
        return [ask(model, plan, folder, Share(process, processes)) for process in range(processes)]

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
