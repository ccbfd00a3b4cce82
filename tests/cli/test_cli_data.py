"""The `vlm data` commands from end to end: what a person types, what is there afterwards, what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm.cli import run
from vlm.data_tools.scenes import generate_scenes
from vlm.data_tools.text import restore
from vlm.shards import Shards


@pytest.fixture
def cli(capsys):
    """Runs the command line; gives exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    generate_scenes(folder, train=30, val=2, test=3)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, make_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_text_is_cut_into_blocks_and_comes_back(cli, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One sentence after the other. " * 300)
    (tmp_path / "b.jsonl").write_text('{"text": "short"}\n{"text": "shorter"}\n')
    arguments = ("data", "text", tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "out", "--tokenizer", tokenizer)
    code, out, _ = cli(*arguments, "--length", 128, "--overlap", 16)
    assert code == 0 and out.startswith(f"{tmp_path}/out: ") and "3 documents" in out
    blocks = [json.loads(entry.read()["json"]) for entry in Shards.open(tmp_path / "out").entries]
    found = restore(blocks)
    assert found[str(tmp_path / "a.txt")] == (tmp_path / "a.txt").read_bytes()
    assert sorted(found.values())[1:] == [b"short", b"shorter"]


def test_text_does_not_depend_on_the_processes(cli, tokenizer: Path, tmp_path: Path, monkeypatch) -> None:
    for size in ("PIECE", "WINDOW"):
        monkeypatch.setattr(f"vlm.data_tools.text.{size}", 100_000)
    (tmp_path / "a.txt").write_text("".join(f"Sentence {number} of the text. " for number in range(15_000)))
    for processes in (1, 2):
        arguments = ("data", "text", tmp_path / "a.txt", tmp_path / str(processes), "--tokenizer", tokenizer)
        code, _, error = cli(*arguments, "--length", 64, "--overlap", 8, "--processes", processes)
        assert code == 0, error
    assert len(contents(tmp_path / "1")) > 3 and contents(tmp_path / "1") == contents(tmp_path / "2")


def test_samples_are_added_in_other_words(cli, scenes: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        arguments = ("data", "augment", scenes / "train", tmp_path / str(processes), "--with", "synonyms")
        code, out, _ = cli(*arguments, "--seed", 3, "--no-wordnet", "--processes", processes)
        assert code == 0 and "30 samples and " in out and "in other words" in out
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    told = {entry.key: json.loads(entry.read()["json"]) for entry in Shards.open(tmp_path / "1").entries}
    added = {key: fields for key, fields in told.items() if "augmented" in fields}
    assert added and len(told) == 30 + len(added)
    for fields in added.values():
        original = told[fields["original"]]
        assert [one["answer"] for one in fields["qa"]] == [one["answer"] for one in original["qa"]]
        assert fields["caption"] != original["caption"] or fields["qa"] != original["qa"]


def test_cleaning_says_what_went_and_why(cli, scenes: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("images: {min_side: 65}\n")
    code, out, _ = cli("data", "clean", scenes / "train", tmp_path / "none", "--rules", rules)
    assert code == 0 and "30 small image" in out and "0 samples kept, 30 dropped" in out
    code, out, _ = cli("data", "clean", scenes / "train", tmp_path / "all", "--set", "duplicates.by=none")
    assert code == 0 and "30 samples kept, 0 dropped" in out
    assert [sample.images for sample in Shards.open(tmp_path / "all")] == [
        sample.images for sample in Shards.open(scenes / "train")
    ]


def test_printed_rules_are_rules(cli, scenes: Path, tmp_path: Path) -> None:
    code, out, _ = cli("data", "clean", "--print-rules")
    assert code == 0 and "# " in out
    (tmp_path / "rules.yaml").write_text(out)
    code, again, _ = cli("data", "clean", "--print-rules", "--rules", tmp_path / "rules.yaml")
    assert code == 0 and again == out


def test_inspection_as_numbers_and_as_a_page(cli, scenes: Path, tokenizer: Path, tmp_path: Path) -> None:
    arguments = ("data", "inspect", scenes / "train", "--tokenizer", tokenizer, "--json", tmp_path / "n.json")
    code, out, _ = cli(*arguments, "--html", tmp_path / "page.html", "--processes", 1)
    assert code == 0 and "tokens" in out
    assert json.loads((tmp_path / "n.json").read_text())["samples"] == 30
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("text", "only-one", "--tokenizer", "t"), "no text is given with only-one; write vlm data text FILE"),
        (("text", "no.txt", "out", "--tokenizer", "nowhere"), "nowhere"),
        (("clean", "in"), "IN and OUT are missing"),
        (("clean", "nowhere", "out"), "nowhere: no such shard"),
        (("clean", "in", "out", "--set", "captions.mni_words=3"), "did you mean min_words?"),
        (("augment", "in", "out", "--with", "magic"), "--with magic is not known; use synonyms or back-translation"),
        (("augment", "in", "out", "--with", "back-translation"), "needs two models; give --there MODEL --back MODEL"),
        (("convert", "a", "b", "--column", "caption"), "--column caption is no pair; write FIELD=COLUMN"),
        (("convert", "a", "b", "--engine", "spark"), "engine 'spark' is not known; use one of local, ray"),
        (("convert", "a", "b", "--processes", "0"), "0 processes; give at least 1"),
        (("convert", "a.jsonl", "b", "--template", "a {}"), "--template: not for jsonl"),
    ],
)
def test_bad_usage_is_one_line(cli, arguments: tuple[str, ...], says: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = cli("data", *arguments)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert list(tmp_path.iterdir()) == []
