"""ScienceQA, MMBench, MMStar, SEED-Bench and AI2D in the layout they are downloaded in; the ways of choosing."""

from __future__ import annotations

import base64
import csv
from pathlib import Path

import pytest

from vlm.errors import UsageError
from vlm.eval.run import evaluate
from vlm.eval.tasks import TASKS
from vlm.eval.tasks.choosing import letter_of
from vlm.eval.tasks.reading import read_table

# ------------------------------------------------------------------------------------------------ the ways of choosing


@pytest.mark.parametrize(
    ("reply", "picked"),
    [
        ("B", "B"),
        ("b", ""),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. a dog", "B"),
        ("(C) whatever", "C"),
        ("a dog", "B"),
        ("A dog.", "B"),
        ("A red thing", ""),
        ("The answer is C", "C"),
        ("Answer: (A) because", "A"),
        ("It must be a dog I think", "B"),
        ("a cat or a dog", ""),
        ("E", ""),
        ("", ""),
    ],
)
def test_the_letter_is_read_off_a_reply(reply: str, picked: str) -> None:
    assert letter_of(reply, ("a cat", "a dog", "two cows")) == picked


@pytest.mark.parametrize("reply", ["{}", "({})", "{}.", "{}:", "The answer is {}", "({}) {text}", "{}. {text}"])
@pytest.mark.parametrize("texts", ["EDCA", "BADC", "DEAB"])
def test_a_letter_that_is_also_the_text_of_another_option_is_a_letter(reply: str, texts: str) -> None:
    said = [reply.format(letter, text=text) for letter, text in zip("ABCD", texts, strict=True)]
    assert [letter_of(one, texts) for one in said] == list("ABCD")


def test_a_letter_that_no_option_bears_is_the_text_of_one() -> None:
    assert letter_of("E", "EDCA") == letter_of("E.", "EDCA") == "A"


@pytest.mark.parametrize("word", ["cat", "bird", "dog"])
@pytest.mark.parametrize("article", ["", "a "])
@pytest.mark.parametrize(
    "reply", ["The answer is a {}.", "The answer is A {}", "ANSWER: A {}", "the correct answer is a {}", "It is a {}"]
)
def test_an_article_is_no_letter(reply: str, article: str, word: str) -> None:
    texts = [f"{article}{one}" for one in ("cat", "bird", "dog")]
    assert letter_of(reply.format(word), texts) == "ABC"[["cat", "bird", "dog"].index(word)]


@pytest.mark.parametrize(
    ("reply", "picked"),
    [
        ("The answer is B because no dog is there", "B"),
        ("The Answer Is (A), not a dog", "A"),
        ("OPTION C", "C"),
        ("The answer is A because it is red", "A"),
        ("The answer is a red thing", ""),
        ("The answer is a dog, option A", "A"),
        ("The answer is c", ""),
    ],
)
def test_a_capital_that_is_told_is_a_letter(reply: str, picked: str) -> None:
    assert letter_of(reply, ("a cat", "a bird", "a dog")) == picked


@pytest.fixture
def mmbench(tmp_path: Path, picture):
    """Three questions, the last on the picture of the first."""

    def write(name: str = "MMBench_DEV_EN.tsv") -> Path:
        images = [base64.b64encode(picture(tmp_path / f"{n}.png", n).read_bytes()).decode() for n in (1, 2)]
        columns = "index question hint A B C D answer category image source l2-category comment split".split()
        rows = [
            ["1", "Which animal?", "", "cat", "dog", "cow", "hen", "C", "ocr", images[0], "s", "reasoning", "", "dev"],
            [
                "2",
                'Is it\t"big"?',
                "It is\nnear.",
                "yes",
                "no",
                "",
                "",
                "A",
                "size",
                images[1],
                "s",
                "seeing",
                "",
                "dev",
            ],
            ["3", "Which one?", "", "left", "right", "none", "", "B", "ocr", "1", "s", "reasoning", "", "dev"],
        ]
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        with open(folder / name, "w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([columns, *rows])
        return folder

    return write


@pytest.mark.parametrize("name", ["MMBench_DEV_EN.tsv", "mmbench_dev_20230712.tsv"])
def test_mmbench_by_generation(name: str, mmbench, run_task, puppet) -> None:
    model = puppet(lambda numbers, prompt: {1: "C. cow", 2: "who knows"}[numbers[0]])
    metrics = run_task(model, "mmbench", mmbench(name))
    # The third is on picture 1, whose reply names option C of it: wrong.
    assert metrics["accuracy"] == pytest.approx(1 / 3) and metrics["unread"] == pytest.approx(1 / 3)
    assert metrics["accuracy_by_category"] == {"ocr": 0.5, "size": 0.0}
    assert metrics["accuracy_by_group"] == {"reasoning": 0.5, "seeing": 0.0}
    prompts = {model._asked(turns[-1])[1] for turns in model.conversations}
    assert 'It is\nnear.\nIs it\t"big"?\nA. yes\nB. no\nAnswer with the option\'s letter' in "".join(prompts)


def test_mmbench_by_likelihood_of_letters_and_of_texts(mmbench, run_task, puppet) -> None:
    def weigh(numbers: tuple[int, ...], prompt: str, said: str) -> tuple[float, int]:
        # Per token "cow" is likeliest (−1), in sum "dog" (−2).
        weights = {
            "cat": (-9.0, 3),
            "dog": (-2.0, 1),
            "cow": (-4.0, 4),
            "hen": (-9.0, 2),
            "yes": (-1.0, 1),
            "no": (-2.0, 1),
        }
        return weights.get(said, (-float("DBAC".find(said)), 2) if said in "ABCD" else (-3.0, 1))

    folder = mmbench()
    model = puppet(weigh=weigh)
    metrics = run_task(model, "mmbench", folder, choice="letters")
    assert metrics["choice"] == "letters"
    # D, B, A, C from likeliest on: D of four is wrong for C, B of two for A, B of three is right.
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert {len(turns) for turns in model.conversations} == {2} and len(model.conversations) == 4 + 2 + 3
    model = puppet(weigh=weigh)
    metrics = run_task(model, "mmbench", folder, choice="texts")
    # cow and yes are right; of left, right and none, all alike, the first is taken.
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert not any("A." in model._asked(turns[0])[1] for turns in model.conversations), "the options are not listed"


def test_circular_counts_a_question_only_if_every_rotation_is_right(mmbench, run_task, puppet) -> None:
    def reply(numbers: tuple[int, ...], prompt: str) -> str:
        if "animal" in prompt:
            return "cow"  # right wherever it stands
        return "A"  # right where the right one stands first

    metrics = run_task(puppet(reply), "mmbench-circular", mmbench())
    assert metrics["n"] == 4 + 2 + 3 and metrics["questions"] == 3
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["accuracy_single"] == pytest.approx((4 + 1 + 1) / 9)
    assert metrics["accuracy_by_category"] == {"ocr": 0.5, "size": 0.0}


def test_a_table_without_the_published_columns_is_named(tmp_path: Path, run_task, puppet) -> None:
    (tmp_path / "MMBench_DEV_EN.tsv").write_text("index\tquestion\n1\tWhat?\n")
    with pytest.raises(UsageError, match=r"an entry of mmbench is not as published \(KeyError: 'image'\)"):
        run_task(puppet(), "mmbench", tmp_path)


def test_fields_may_be_long_in_tables_of_benchmarks_alone(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = "x" * (before + 1)
    (tmp_path / "table.tsv").write_text(f"index\timage\n1\t{long}\n")
    assert read_table(tmp_path / "table.tsv") == [{"index": "1", "image": long}]
    assert csv.field_size_limit() == before


def test_a_way_that_a_task_does_not_have_is_named(mmbench, puppet) -> None:
    with pytest.raises(UsageError, match="task mmbench has no way 'luck' of choosing; it has generate, letters, texts"):
        evaluate(puppet(), ["mmbench"], mmbench(), choice="luck")
    with pytest.raises(UsageError, match="task vqav2 has no way 'letters' of choosing; it has generate"):
        evaluate(puppet(), ["vqav2"], mmbench(), choice="letters")
    with pytest.raises(UsageError, match="task vqa has no choice to set"):
        evaluate(puppet(), ["vqa"], mmbench(), choice="letters")
    with pytest.raises(UsageError, match="prompt '{frage}' is no template"):
        evaluate(puppet(), ["mmbench"], mmbench(), prompt="{frage}")


# ----------------------------------------------------------------------------------------------------- the benchmarks


@pytest.mark.parametrize("images", ["images/test", "test"])
def test_scienceqa_takes_the_test_problems_with_a_picture(
    images: str, tmp_path: Path, picture, as_json, run_task, puppet
) -> None:
    def problem(question: str, image: str | None, subject: str, grade: str) -> dict:
        choices = {"choices": ["north", "south"], "answer": 1, "hint": "Look.", "image": image, "subject": subject}
        return {"question": question, "grade": grade, "split": "test", **choices}

    problems = {
        "4": problem("Where?", "image.png", "natural science", "grade3"),
        "5": problem("Why?", None, "natural science", "grade3"),
        "6": problem("Whither?", "image.png", "social science", "grade11"),
        "7": problem("When?", "image.png", "social science", "grade2"),
    }
    as_json(tmp_path / "data" / "problems.json", problems)
    as_json(tmp_path / "data" / "pid_splits.json", {"test": ["4", "5", "6"], "train": ["7"]})
    for number in (4, 6):
        picture(tmp_path / "data" / images / str(number) / "image.png", number)
    metrics = run_task(puppet(lambda numbers, prompt: "B" if numbers[0] == 4 else "A"), "scienceqa", tmp_path / "data")
    assert metrics["accuracy_by_subject"] == {"natural science": 1.0, "social science": 0.0}
    assert metrics["accuracy_by_grade"] == {"grade 1-6": 1.0, "grade 7-12": 0.0}
    assert (metrics["accuracy"], metrics["n"]) == (0.5, 2)


@pytest.mark.parametrize("as_struct", [False, True])
def test_mmstar_reads_options_and_pictures_from_parquet(
    as_struct: bool, tmp_path: Path, picture, run_task, puppet
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pictures = [picture(tmp_path / f"{n}.png", n).read_bytes() for n in (1, 2)]
    columns = {
        "index": [0, 1],
        "question": [
            "What is on the book?\nOptions: A: A cat., B: The case, B-side: blue, C: None, D: A: pen",
            "Which?\nOptions: A: 1, B: 2, C: 3, D: 4",
        ],
        "image": [{"bytes": data, "path": None} for data in pictures] if as_struct else pictures,
        "answer": ["B", "D"],
        "category": ["math", "logic"],
        "l2_category": ["count", "order"],
        "meta_info": [{"source": "x"}, {"source": "y"}],
    }
    (tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.table(columns), tmp_path / "data" / "mmstar.parquet")
    model = puppet(lambda numbers, prompt: {1: "B", 2: "C"}[numbers[0]])
    metrics = run_task(model, "mmstar", tmp_path / "data")
    assert metrics["accuracy_by_category"] == {"logic": 0.0, "math": 1.0}
    assert metrics["accuracy_by_subcategory"] == {"count": 1.0, "order": 0.0}
    (example, _) = TASKS["mmstar"].examples(tmp_path / "data")
    assert example.question == "What is on the book?"
    assert example.options == ("A cat.", "The case, B-side: blue", "None", "A: pen")


def test_seed_takes_the_questions_on_pictures(tmp_path: Path, picture, as_json, run_task, puppet) -> None:
    def question(identity: str, kind: int, data_type: str, answer: str) -> dict:
        choices = {f"choice_{name}": f"{name}{name}" for name in "abcd"}
        told = {"question": "Which?", "question_id": identity, "question_type_id": kind, "data_id": f"p{identity}"}
        return {"answer": answer, "data_type": data_type, **choices, **told}

    asked = [question("1", 1, "image", "A"), question("2", 2, "image", "D"), question("3", 9, "video", "A")]
    types = {"Scene Understanding": 1, "Instance Identity": 2, "Action Prediction": 9}
    as_json(tmp_path / "data" / "SEED-Bench.json", {"questions": asked, "question_type": types})
    for number in (1, 2):
        picture(tmp_path / "data" / "SEED-Bench-image" / f"p{number}", number)
    metrics = run_task(puppet(lambda numbers, prompt: "A"), "seed", tmp_path / "data")
    assert metrics["accuracy_by_type"] == {"Instance Identity": 0.0, "Scene Understanding": 1.0}
    assert metrics["n"] == 2


def test_ai2d_takes_the_pictures_of_the_test_split(tmp_path: Path, picture, as_json, run_task, puppet) -> None:
    for number in (1, 2, 3):
        questions = {
            f"Which part is {number}?": {
                "abcLabel": number == 2,
                "answerTexts": ["root", "leaf", "stem", number],
                "correctAnswer": number,
                "questionId": f"{number}.png-0",
            }
        }
        as_json(
            tmp_path / "data" / "questions" / f"{number}.png.json",
            {"imageName": f"{number}.png", "questions": questions},
        )
    (tmp_path / "data" / "ai2d_test_ids.csv").write_text("1\n2\n")
    picture(tmp_path / "data" / "images" / "1.png", 1)
    picture(tmp_path / "data" / "abc_images" / "2.png", 2)
    metrics = run_task(puppet(lambda numbers, prompt: {1: "B", 2: "B"}[numbers[0]]), "ai2d", tmp_path / "data")
    assert metrics["accuracy"] == 0.5 and metrics["n"] == 2
