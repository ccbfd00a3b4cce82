"""The built-in set: every caption and answer is true of the objects, and no words give an answer away.

The judge below is written apart from the generator: it reads the English again and looks at the stored objects only.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm.data_tools.engines import LocalEngine
from vlm.data_tools.scene_world import EASY, HARD, Level
from vlm.data_tools.scenes import COMPOSITIONAL, generate_scenes, make_sample, make_scene
from vlm.errors import UsageError
from vlm.images import open_image
from vlm.samples import parse_sample
from vlm.shards import Shards

Fields = dict[str, Any]
LEVELS = pytest.mark.parametrize("level", [EASY, HARD], ids=lambda level: level.name)
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def fields_of(level: Level, split: str, number: int) -> list[Fields]:
    return [make_scene(level, split, 0, index)[1] for index in range(number)]


# ------------------------------------------------------------------------------------------------- the judge


def fitting(phrase: str, objects: list[Fields]) -> list[Fields]:
    """The objects that `small red circles` or `striped thing` names."""
    words = [re.sub(r"(?<=cross)es$|(?<!s)s$", "", word) for word in phrase.split()]
    named = [word for word in words if word not in ("object", "thing", "a", "an", "the")]
    return [found for found in objects if all(word in found.values() for word in named)]


def the(phrase: str, objects: list[Fields]) -> Fields:
    (only,) = fitting(phrase, objects)
    return only


def side(first: Fields, second: Fields, word: str) -> bool:
    axis = "x" if word in ("left", "right") else "y"
    assert abs(first[axis] - second[axis]) > 0.1, "asked of things that are level"
    return (first[axis] < second[axis]) == (word in ("left", "above"))


def judge(text: str, objects: list[Fields], level: Level) -> str:
    """The answer to a question, by brute force."""
    if found := re.fullmatch(r"(?:Is there|Do you see) (an? .+)\?", text):
        return "yes" if fitting(found[1], objects) else "no"
    if found := re.fullmatch(r"(?:What|Which) (colour|shape) is the (.+)\?", text):
        return the(found[2], objects)[found[1]]
    if found := re.fullmatch(r"How many (.+) (?:are there|do you see)\?", text):
        return str(len(fitting(found[1], objects)))
    if found := re.fullmatch(r"Are there (more|fewer) (.+) than (.+)\?", text):
        difference = len(fitting(found[2], objects)) - len(fitting(found[3], objects))
        return "yes" if difference * (1 if found[1] == "more" else -1) > 0 else "no"
    if found := re.fullmatch(r"Is the (.+) (larger|smaller) than the (.+)\?", text):
        first, second = (list(level.sizes).index(the(found[group], objects)["size"]) for group in (1, 3))
        assert first != second
        return "yes" if (first > second) == (found[2] == "larger") else "no"
    if found := re.fullmatch(r"Is the (.+) (left|right|above|below) or (\w+)(?: of)? the (.+)\?", text):
        assert found[3] == OPPOSITE[found[2]]
        return found[2] if side(the(found[1], objects), the(found[4], objects), found[2]) else found[3]
    found = re.fullmatch(r"Is the (.+) (left|right|above|below)(?: of)? the (.+)\?", text)
    assert found, text
    return "yes" if side(the(found[1], objects), the(found[3], objects), found[2]) else "no"


def in_place(found: Fields, place: str) -> bool:
    rows = {"top": (0, 1 / 3), "bottom": (2 / 3, 1)}
    columns = {"left": (0, 1 / 3), "right": (2 / 3, 1)}
    words = place.split()
    row = next((rows[word] for word in words if word in rows), (1 / 3, 2 / 3))
    column = next((columns[word] for word in words if word in columns), (1 / 3, 2 / 3))
    return row[0] < found["y"] < row[1] and column[0] < found["x"] < column[1]


def check_caption(caption: str, objects: list[Fields]) -> None:
    """Everything is named, as often as it is there, and every place and relation holds."""
    caption = re.sub(r"^(a picture of|there is|you see) ", "", caption)
    pieces = re.split(r", | and (?=(?:an?|two|three|four|five|six) )", caption)
    named: list[Fields] = []
    for piece in pieces:
        related = re.fullmatch(r"(.+?) (left of|right of|above|below) (.+)", piece)
        placed = re.fullmatch(r"(.+?) ((?:at|on|in) the .+)", piece)
        if related:
            first, second = the(related[1], objects), the(related[3], objects)
            assert side(first, second, related[2].split()[0]), caption
            named += [first, second]
        elif placed:
            assert in_place(the(placed[1], objects), placed[2]), caption
            named.append(the(placed[1], objects))
        else:
            count, phrase = piece.split(" ", 1)
            assert len(fitting(phrase, objects)) == NUMBERS[count], caption
            named += fitting(phrase, objects)
    assert sorted(map(id, named)) == sorted(map(id, objects)), caption


# --------------------------------------------------------------------------------------------------- truth


@LEVELS
@pytest.mark.parametrize("split", ["train", "test", COMPOSITIONAL])
def test_every_caption_and_answer_is_true(level: Level, split: str) -> None:
    for fields in fields_of(level, split, 600):
        check_caption(fields["caption"], fields["objects"])
        for asked in fields["qa"]:
            assert judge(asked["question"], fields["objects"], level) == asked["answer"], (asked, fields["objects"])


@LEVELS
def test_objects_keep_to_the_level(level: Level) -> None:
    numbers = Counter()
    for fields in fields_of(level, "train", 600):
        numbers[len(fields["objects"])] += 1
        for found in fields["objects"]:
            assert found["shape"] in level.shapes and found["colour"] in level.colours
            low, high = level.sizes[found["size"]]
            assert low - 1e-3 <= found["radius"] <= high + 1e-3
            assert found["radius"] < found["x"] < 1 - found["radius"]
            assert found["radius"] < found["y"] < 1 - found["radius"]
        for one in fields["objects"]:
            for two in fields["objects"]:
                apart = np.hypot(one["x"] - two["x"], one["y"] - two["y"])
                assert one is two or apart > (one["radius"] + two["radius"]) * (1 + level.gap) - 1e-3
    assert set(numbers) == set(range(1, len(level.things_given_count[0]) + 1))


def test_easy_pictures_have_one_two_and_three_things_as_announced() -> None:
    numbers = Counter(len(fields["objects"]) for fields in fields_of(EASY, "train", 2000))
    assert [numbers[n] / 2000 for n in (1, 2, 3)] == pytest.approx([0.2, 0.4, 0.4], abs=0.03)


@LEVELS
def test_pixels_show_the_colour_at_the_centre(level: Level) -> None:
    plain = dataclasses.replace(
        level,
        textures=("plain",),
        counts={("colour",): 1},
        comparisons={("colour",): 1},
        noise=0.0,
        gap=0.1,
        shapes=("circle", "square"),
        held_out=(),
    )
    for index in range(20):
        sample = parse_sample("k", make_sample(plain, "train", 0, index))
        pixels = np.asarray(open_image(sample.images[0])).astype(int)
        assert pixels.shape == (level.picture_size, level.picture_size, 3)
        for found in sample.extra["objects"]:
            shown = pixels[int(found["y"] * level.picture_size), int(found["x"] * level.picture_size)]
            distances = {name: np.abs(shown - colour).sum() for name, colour in level.colours.items()}
            assert min(distances, key=distances.__getitem__) == found["colour"]


# -------------------------------------------------------------------------------------------- held-out pairs


@LEVELS
def test_held_out_pairs_are_neither_shown_nor_asked_for_in_training(level: Level) -> None:
    held_out = set(level.held_out)
    words = [f"{colour} {shape}" for colour, shape in held_out]
    for split in ("train", "val", "test"):
        for fields in fields_of(level, split, 500):
            assert not any((found["colour"], found["shape"]) in held_out for found in fields["objects"])
            assert not any(word in json.dumps(fields) for word in words)


@LEVELS
def test_compositional_pictures_show_one_and_ask_about_it(level: Level) -> None:
    held_out = set(level.held_out)
    for fields in fields_of(level, COMPOSITIONAL, 500):
        shown = [found for found in fields["objects"] if (found["colour"], found["shape"]) in held_out]
        assert shown
        for asked in fields["qa"]:
            if asked["type"] in ("existence", "count"):
                assert any(f"{colour} {shape}" in asked["question"] for colour, shape in held_out)
            if asked["type"] in ("colour", "shape"):
                phrase = re.fullmatch(r".* is the (.+)\?", asked["question"])
                assert phrase and the(phrase[1], fields["objects"]) in shown


@LEVELS
def test_every_colour_and_shape_is_trained_in_several_pairs(level: Level) -> None:
    assert len(level.pairs) >= 6 and len(level.shapes) >= 4
    assert all(len(shapes) >= 3 for shapes in level.pairs.values())
    assert all(sum(shape in shapes for shapes in level.pairs.values()) >= 4 for shape in level.shapes)


# --------------------------------------------------------------------------------------------------- balance


def feasible(level: Level, kind: str) -> float:
    """How often a guesser is right that knows all there is to know but the picture."""
    answers = {"existence": 2, "comparison": 2, "relation": 2, "count": level.largest_count + 1}
    # Whoever reads "circle" knows the colours that circles never have.
    answers["colour"] = min(sum(shape in shapes for shapes in level.pairs.values()) for shape in level.shapes)
    answers["shape"] = min(len(shapes) for shapes in level.pairs.values())
    return 1 / answers[kind]


def features(text: str) -> set[str]:
    words = ["^", *text.rstrip("?").lower().split()]
    return {*words, *(" ".join(pair) for pair in zip(words, words[1:], strict=False))}


@LEVELS
@pytest.mark.parametrize("split", ["test", COMPOSITIONAL])
def test_answers_are_even_within_each_type(level: Level, split: str) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for fields in fields_of(level, split, 2000):
        for asked in fields["qa"]:
            answers[asked["type"]][asked["answer"]] += 1
    assert set(answers) == {"existence", "colour", "shape", "count", "comparison", "relation"}
    for kind, counted in answers.items():
        assert counted.total() >= 750, kind
        for answer, number in counted.items():
            assert number / counted.total() == pytest.approx(1 / len(counted), abs=0.035), (kind, answer)


@LEVELS
def test_a_guesser_that_remembers_texts_gains_nothing(level: Level) -> None:
    memory: dict[str, Counter[str]] = defaultdict(Counter)
    for fields in fields_of(level, "train", 3000):
        for asked in fields["qa"]:
            memory[asked["question"]][asked["answer"]] += 1
            memory[asked["type"]][asked["answer"]] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for fields in fields_of(level, "test", 2000):
        for asked in fields["qa"]:
            known = memory.get(asked["question"]) or memory[asked["type"]]
            right[asked["type"]].append(known.most_common(1)[0][0] == asked["answer"])
    for kind, hits in right.items():
        assert np.mean(hits) < feasible(level, kind) + 0.03, kind


@LEVELS
def test_a_guesser_that_weighs_words_gains_nothing(level: Level) -> None:
    """Naive Bayes over words and pairs of words, which finds biases that single texts are too rare to show."""
    seen: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    prior: dict[str, Counter[str]] = defaultdict(Counter)
    for fields in fields_of(level, "train", 3000):
        for asked in fields["qa"]:
            prior[asked["type"]][asked["answer"]] += 1
            for feature in features(asked["question"]):
                seen[asked["type"], feature][asked["answer"]] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for fields in fields_of(level, "test", 2000):
        for asked in fields["qa"]:
            counts = prior[asked["type"]]
            scores = {
                answer: np.log(number)
                + sum(
                    np.log((seen[asked["type"], feature][answer] + 1) / (number + 2))
                    for feature in features(asked["question"])
                )
                for answer, number in counts.items()
            }
            right[asked["type"]].append(max(scores, key=scores.__getitem__) == asked["answer"])
    for kind, hits in right.items():
        assert np.mean(hits) < feasible(level, kind) + 0.03, kind


@LEVELS
def test_captions_are_nearly_unique_and_answers_are_one_word(level: Level) -> None:
    made = fields_of(level, "test", 500)
    assert len({fields["caption"] for fields in made}) >= 475
    assert all(" " not in asked["answer"] for fields in made for asked in fields["qa"])
    assert all(len(fields["caption"].split()) <= 20 for fields in made if len(fields["objects"]) <= 3 and level is EASY)


# ---------------------------------------------------------------------------------------------------- writing


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bytes_depend_on_the_seed_and_not_on_the_processes(tmp_path: Path) -> None:
    sizes = {"train": 250, "val": 10, "test": 110}
    for name, processes, seed in (("one", 1, 3), ("three", 3, 3), ("other", 1, 4)):
        generate_scenes(tmp_path / name, engine=LocalEngine(processes), seed=seed, **sizes)
    one, three, other = (bytes_of(tmp_path / name) for name in ("one", "three", "other"))
    assert one == three and one != other
    opened = {split: len(Shards.open(tmp_path / "one" / split)) for split in (*sizes, COMPOSITIONAL)}
    assert opened == {**sizes, COMPOSITIONAL: 110}


def test_no_picture_is_in_two_splits(tmp_path: Path) -> None:
    generate_scenes(tmp_path / "s", train=200, val=200, test=200)
    pictures = [
        sample.images[0] for split in ("train", "val", "test") for sample in Shards.open(tmp_path / "s" / split)
    ]
    assert len(set(pictures)) == len(pictures) == 600


def test_hard_scenes_are_written(tmp_path: Path) -> None:
    generate_scenes(tmp_path / "s", level="hard", train=3, val=1, test=1)
    sample = Shards.open(tmp_path / "s" / "train")[0]
    assert open_image(sample.images[0]).size == (224, 224) and sample.caption and len(sample.questions) >= 7
    assert all(found["texture"] in HARD.textures for found in sample.extra["objects"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"level": "medium"}, "level 'medium' does not exist; use one of easy, hard"), ({"val": 0}, "val is 0 pictures")],
)
def test_wrong_arguments_leave_nothing(tmp_path: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        generate_scenes(tmp_path / "s", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_set_is_not_written_over(tmp_path: Path) -> None:
    generate_scenes(tmp_path / "s", train=1, val=1, test=1)
    before = bytes_of(tmp_path / "s")
    with pytest.raises(UsageError, match="already there"):
        generate_scenes(tmp_path / "s", train=2, val=1, test=1)
    assert bytes_of(tmp_path / "s") == before


def test_a_failure_half_way_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> dict[str, bytes]:
        raise MemoryError if arguments[1] == "test" else KeyboardInterrupt

    monkeypatch.setattr("vlm.data_tools.scenes.make_sample", fails)
    with pytest.raises(KeyboardInterrupt):
        generate_scenes(tmp_path / "s", train=1, val=1, test=1)
    assert all(path.name.startswith(".s.") for path in tmp_path.iterdir()) and not list(tmp_path.rglob("index.json"))
