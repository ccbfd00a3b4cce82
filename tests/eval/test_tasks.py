"""What all tasks share: the table, examples shown first, half-downloaded data, the page that shows how one is added."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from vlm.cli import run as cli
from vlm.errors import UsageError
from vlm.eval.pictures import Gallery, as_it_is
from vlm.eval.run import Shots, evaluate
from vlm.eval.tasks import FAMILIES, TASKS, Benchmark, Item, ShardTask

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "eval" / "TASKS.md").read_text("utf-8")

# ----------------------------------------------------------------------------------------------------------- the table


def test_every_name_is_there_once_and_in_the_help_and_on_the_page(capsys) -> None:
    names = [benchmark.name for family in FAMILIES for benchmark in family.BENCHMARKS]
    assert len(set(names)) == len(names) and set(names) < set(TASKS)
    assert cli(["eval", "--help"]) == 0
    told = set(re.findall(r"[\w-]+", capsys.readouterr().out))
    for name in TASKS:
        assert name in told, f"{name} is not in vlm eval --help"
        assert f"`{name}`" in PAGE, f"{name} is not on eval/TASKS.md"


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if isinstance(task, Benchmark)])
def test_a_benchmark_states_its_layout_with_a_link_and_runs_in_a_test(name: str) -> None:
    (family,) = [family for family in FAMILIES if name in {benchmark.name for benchmark in family.BENCHMARKS}]
    assert f"`{name}`" in (family.__doc__ or "") or name in (family.__doc__ or "").lower()
    assert "https://" in (family.__doc__ or "")
    tests = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_official_*.py"))
    stem = name.removesuffix("-retrieval")
    assert f'"{name}"' in tests or f'("{stem}", ' in tests


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if isinstance(task, Benchmark)])
def test_nothing_downloaded_is_one_line_with_the_numbers_and_no_score(name: str, puppet, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError) as caught:
        evaluate(puppet(), [name], tmp_path / "data", tmp_path / "out")
    assert re.search(r"\b(1 of 1|2 of 2|3 of 3|14 of 14|0 of|0 examples)", str(caught.value)), caught.value
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="no such folder"):
        evaluate(puppet(), [name], tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------------ half downloads


@pytest.fixture
def textvqa(tmp_path: Path, picture, as_json):
    """Questions 1 … on pictures of their numbers, with a training split of other pictures."""

    def write(questions: int = 4, training: int = 6) -> Path:
        folder = tmp_path / "textvqa"
        for split, numbers in (("val", range(1, questions + 1)), ("train", range(101, 101 + training))):
            entries = [
                {"question_id": n, "image_id": str(n), "question": f"Which, {n}?", "answers": [f"it is {n}"] * 10}
                for n in numbers
            ]
            as_json(folder / f"TextVQA_0.5.1_{split}.json", {"data": entries})
            for number in numbers:
                picture(folder / "train_images" / f"{number}.jpg", number)
        return folder

    return write


def test_missing_pictures_are_counted_and_the_first_named(textvqa, puppet, tmp_path: Path) -> None:
    folder = textvqa(6)
    for number in (2, 3, 5, 6):
        (folder / "train_images" / f"{number}.jpg").unlink()
    said = r"4 of 6 pictures of textvqa are missing \(train_images/2.jpg, train_images/3.jpg, train_images/5.jpg, …\); finish"
    with pytest.raises(UsageError, match=said):
        evaluate(puppet(), ["textvqa"], folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert evaluate(puppet(), ["textvqa"], folder, limit=1)["tasks"]["textvqa"]["n"] == 1, (
        "only what is asked must be there"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"data": [{"question_id": 1', "not JSON .*cut short"),
        (b'{"questions": []}', 'no list "data" is in it'),
        (b'{"data": [{"question_id": 1, "image_id": "1"}]}', r"not as published \(KeyError: 'question'\)"),
        (b'{"data": [7]}', "not as published"),
        (b"\xff\xfe\x00", "not JSON"),
    ],
)
def test_files_that_are_cut_short_or_of_another_kind(content: bytes, said: str, textvqa, puppet) -> None:
    folder = textvqa()
    (folder / "TextVQA_0.5.1_val.json").write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        evaluate(puppet(), ["textvqa"], folder)
    assert "\n" not in str(caught.value)


def test_a_folder_of_the_tasks_name_is_found_in_data(textvqa, puppet) -> None:
    folder = textvqa()
    results = evaluate(puppet(), ["textvqa"], folder.parent)
    assert results["data"] == {"textvqa": str(folder)}


def test_several_benchmarks_and_tasks_on_shards_in_one_run(textvqa, puppet, tmp_path: Path, as_json, picture) -> None:
    textvqa()
    picture(tmp_path / "folder" / "cat" / "1.jpg", 1)
    model = puppet()
    model.vectors = {1: np.ones(3, dtype=np.float32), 128: np.ones(3, dtype=np.float32)}
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    model.vectors |= {template("cat"): np.ones(3, dtype=np.float32) for template in OPENAI_IMAGENET_TEMPLATES}
    results = evaluate(model, ["folder", "textvqa"], tmp_path)
    assert list(results["tasks"]) == ["folder", "textvqa"] and set(results["data"]) == {"folder", "textvqa"}


def test_blind_and_shuffled_stand_beside_the_true_score(textvqa, puppet) -> None:
    reply = lambda numbers, prompt: f"it is {numbers[0]}"  # noqa: E731
    metrics = evaluate(puppet(reply), ["textvqa"], textvqa())["tasks"]["textvqa"]
    assert (metrics["accuracy"], metrics["blind"]["accuracy"], metrics["shuffled"]["accuracy"]) == (1.0, 0.0, 0.0)


def test_a_prompt_of_ones_own(textvqa, puppet) -> None:
    model = puppet()
    results = evaluate(model, ["textvqa"], textvqa(1), prompt="Q: {question}", blind=False, shuffled=False)
    assert model._asked(model.conversations[0][-1])[1] == "Q: Which, 1?"
    assert results["settings"] == {"prompt": "Q: {question}"}


# ---------------------------------------------------------------------------------------------------------- few shots


def shown(model) -> dict[int, list[tuple[tuple[int, ...], str, str]]]:
    """Picture asked about -> pictures, prompt and reply of each example before it."""
    found = {}
    for turns in model.conversations:
        *before, asked = turns
        pairs = [
            (*model._asked(user), told["content"][0]["text"])
            for user, told in zip(before[::2], before[1::2], strict=True)
        ]
        found[model._asked(asked)[0][0]] = pairs
    return found


def test_shots_at_random_come_from_the_training_split_with_their_answers(textvqa, puppet) -> None:
    folder, models = textvqa(), [puppet() for _ in range(4)]
    settings = [Shots(2, seed=0), Shots(2, seed=0), Shots(2, seed=1), Shots(2, seed=0)]
    for model, shots, limit in zip(models, settings, (None, None, None, 2), strict=True):
        evaluate(model, ["textvqa"], folder, shots=shots, blind=False, shuffled=False, limit=limit)
    first, again, other, fewer = map(shown, models)
    assert first == again != other
    assert fewer == {number: first[number] for number in (1, 2)}, "a question's examples depend on no other question"
    for pairs in first.values():
        assert len(pairs) == 2 == len({numbers for numbers, _, _ in pairs})
        for (number,), prompt, told in pairs:
            assert number > 100 and prompt.startswith(f"Which, {number}?") and told == f"it is {number}"


def test_similar_shots_are_the_nearest_pictures_the_most_alike_last(textvqa, puppet) -> None:
    model = puppet()
    # On a circle: a training picture of number n lies where the question n − 100 does, and further round as n grows.
    for number in (*range(1, 5), *range(101, 107)):
        angle = 0.1 * (number % 100)
        model.vectors[number] = np.array([np.cos(angle), np.sin(angle)], dtype=np.float32)
    results = evaluate(model, ["textvqa"], textvqa(), shots=Shots(2, "similar"), blind=False, shuffled=False)
    assert {number: [numbers for numbers, *_ in pairs] for number, pairs in shown(model).items()} == {
        1: [(102,), (101,)],
        2: [(101,), (102,)],
        3: [(102,), (103,)],
        4: [(103,), (104,)],
    }
    assert results["settings"]["shots"]["by"] == "similar"


def test_an_example_never_shows_the_picture_that_is_asked_about(textvqa, puppet) -> None:
    folder = textvqa(4)
    model = puppet()
    evaluate(model, ["textvqa"], folder, shots=Shots(3, source=folder), blind=False, shuffled=False)
    assert {number: sorted(n for (n,), *_ in pairs) for number, pairs in shown(model).items()} == {
        number: [n for n in range(1, 5) if n != number] for number in range(1, 5)
    }
    with pytest.raises(UsageError, match="4 shots are wanted, 4 examples are there, too few .* for 4 of 4 questions"):
        evaluate(model, ["textvqa"], folder, shots=Shots(4, source=folder))


def test_examples_of_a_choice_say_what_the_way_of_choosing_wants(tmp_path: Path, picture, as_json, puppet) -> None:
    told = {
        "choices": ["north", "south"],
        "answer": 1,
        "hint": "",
        "image": "image.png",
        "subject": "x",
        "grade": "grade1",
    }
    problems = {str(n): {"question": f"Where is {n}?", **told} for n in (1, 2)}
    as_json(tmp_path / "problems.json", problems)
    as_json(tmp_path / "pid_splits.json", {"test": ["1"], "train": ["2"]})
    picture(tmp_path / "images" / "test" / "1" / "image.png", 1)
    picture(tmp_path / "images" / "train" / "2" / "image.png", 2)
    for choice, reply in (("generate", "B"), ("letters", "B"), ("texts", "south")):
        model = puppet()
        evaluate(model, ["scienceqa"], tmp_path, choice=choice, shots=1, blind=False, shuffled=False)
        for turns in model.conversations:
            assert turns[1]["content"][0]["text"] == reply and len(turns) == (3 if choice == "generate" else 4)


@pytest.mark.parametrize(
    ("task", "shots", "said"),
    [
        ("textvqa", lambda: Shots(-1), "shots is -1"),
        ("textvqa", lambda: Shots(1, "luck"), "shots by 'luck' is unknown; choose of random, similar"),
        ("vqa", lambda: Shots(1), "task vqa has no shots to set"),
        ("pope", lambda: Shots(1), "task pope has no training split; give --shots-from"),
        ("folder", lambda: Shots(1), "task folder asks no questions"),
    ],
)
def test_shots_that_can_not_be(task: str, shots, said: str, puppet, tmp_path: Path, picture) -> None:
    picture(tmp_path / "folder" / "cat" / "1.jpg", 1)
    for kind in ("random", "popular", "adversarial"):
        entry = {"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "yes"}
        (tmp_path / f"coco_pope_{kind}.json").write_text(json.dumps(entry))
    picture(tmp_path / "val2014" / "a.jpg", 1)
    with pytest.raises(UsageError, match=said):
        evaluate(puppet(), [task], tmp_path, shots=shots())


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_example_on_the_page_works_and_is_short(tmp_path: Path, picture, monkeypatch, puppet) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(code.splitlines()) <= 40
    namespace: dict = {"__name__": "vlm.eval.tasks.birds", "__package__": "vlm.eval.tasks"}
    exec(compile(code, "birds.py", "exec"), namespace)
    (birds,) = namespace["BENCHMARKS"]
    monkeypatch.setitem(TASKS, birds.name, birds)
    lines = ["file,question,answer", "1.jpg,Which bird?,robin", "2.jpg,Which bird?,great tit"]
    (tmp_path / "birds.csv").write_text("\n".join(lines))
    for number in (1, 2):
        picture(tmp_path / "photos" / f"{number}.jpg", number)
    reply = lambda numbers, prompt: {1: "It is a robin.", 2: "a tit"}.get(numbers[0], "no idea")  # noqa: E731
    metrics = evaluate(puppet(reply), [birds.name], tmp_path)["tasks"][birds.name]
    assert (metrics["accuracy"], metrics["blind"]["accuracy"], metrics["n"]) == (0.5, 0.0, 2)


def test_shard_tasks_say_what_they_need() -> None:
    assert [name for name, task in TASKS.items() if isinstance(task, ShardTask)] == [
        "vqa",
        "caption",
        "retrieval",
        "classification",
        "perplexity",
    ]


def test_the_command_takes_every_setting(textvqa, puppet, tmp_path: Path, monkeypatch, capsys) -> None:
    model = puppet(lambda numbers, prompt: f"it is {numbers[0]}")
    model.vectors = {number: np.ones(2, dtype=np.float32) for number in range(1, 110)}
    monkeypatch.setattr("vlm.eval.run.load", lambda path, **options: model)
    shots = ["--shots", "2", "--shots-by", "similar", "--seed", "3", "--prompt", "{question}"]
    arguments = ["eval", "m", "textvqa", "--data", str(textvqa()), "--out", str(tmp_path / "out"), "--no-shuffled"]
    assert cli([*arguments, *shots, "--choice", "generate"]) == 0
    assert capsys.readouterr().out == "textvqa: accuracy 1.000  blind 0.000  (n = 4)\n"
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert settings == {
        "choice": "generate",
        "prompt": "{question}",
        "shots": {"count": 2, "by": "similar", "source": None, "seed": 3},
    }
    assert (
        cli(["eval", "m", "textvqa", "--data", str(tmp_path), "--shots-from", str(tmp_path / "no"), "--shots", "1"])
        == 2
    )
    assert "no such folder" in capsys.readouterr().err


def test_equal_texts_tie_to_the_last_bit() -> None:
    """Where in a product a column stands may decide its last bit, and equal captions would rank by that."""
    rng = np.random.default_rng(0)
    asking = TASKS["retrieval"].asking
    for number in range(2, 40):
        items = [Item(n, n, str(n), references=(f"text {rng.integers(3)}",)) for n in range(number)]
        look = as_it_is([Gallery(str(n)) for n in range(number)])
        requests = [request for part in asking.parts(items, look, 8) for request in part]
        answered = {request: rng.normal(size=64).astype(np.float32) for request in requests}
        similarity = asking.gather(items, look, answered)
        assert similarity.shape == (number, number)
        for text in {item.references for item in items}:
            (equal,) = np.nonzero([item.references == text for item in items])
            assert (similarity[:, equal] == similarity[:, equal[:1]]).all()
