"""The `vlm` command: every command has help, every error is one line with its exit code, results reach the screen."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vlm.cli import run
from vlm.errors import RunError, UsageError
from vlm.saving import save

COMMANDS = [
    "data",
    "data scenes",
    "data convert",
    "data text",
    "data clean",
    "data augment",
    "data inspect",
    "bench",
    "bench data",
    "bench score",
    "bench train",
    "bench serve",
    "bench decode",
    "bench kernels",
    "bench eval",
    "train",
    "eval",
    "score",
    "score vqa",
    "score caption",
    "report",
    "caption",
    "ask",
    "explain",
    "complete",
    "fill",
    "quantize",
    "serve",
    "demo",
]


@pytest.fixture
def cli(capsys):
    """Runs the command line; gives exit code, standard output and standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, make_model, make_processor) -> str:
    """A saved tiny model."""
    folder = tmp_path_factory.mktemp("run") / "model"
    save(make_model(gate_init=0.5), make_processor(), folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, make_picture) -> list[str]:
    """Two picture files."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(2):
        make_picture(index).save(folder / f"{index}.png")
    return [str(folder / "0.png"), str(folder / "1.png")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(cli, command):
    code, out, err = cli(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert f"Usage: vlm {command}" in out
    assert command in ("bench", "data", "score") or f"Example: vlm {command}" in out


def test_help_names_all_commands_and_nothing_else(cli):
    _, out, _ = cli("--help")
    listed = [line.split()[0] for line in out.split("Commands:")[1].splitlines() if line.strip()]
    assert sorted(listed) == sorted({command.split()[0] for command in COMMANDS})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "No such command 'nonsense'; see vlm --help"),
        (["train"], "Missing argument 'CONFIG.yaml'; see vlm train --help"),
        (["train", "no-such.yaml"], "config no-such.yaml does not exist"),
        (["train", "demo", "stages.0.stpes=1"], "command line: stages.0.stpes is not a known key; did you mean steps?"),
        (["train", "demo", "--gpus", "2", "--processes", "2"], "are both given; give one"),
        (["train", "demo", "--processes", "0"], "--processes is 0; it must be at least 1"),
        (["train", "demo", "--gpus", "99"], "--gpus is 99, and"),
        (["data", "scenes", "x", "--train", "many"], "Invalid value for '--train'"),
        (["data", "scenes", "x", "--level", "harder"], "level 'harder' does not exist"),
        (["data", "convert", "no.jsonl", "x"], "no.jsonl: no such file"),
        (["data", "inspect", "no-shards"], "no-shards"),
        (["eval", "m", "vqa"], "Missing option '--data'; see vlm eval --help"),
        (["score", "vqa", "r.json"], "Missing option '--questions'"),
        (["ask", "model", "What?"], "no picture is given with 'What?'"),
        (["caption", "./no-model", "a.png"], "no-model"),
        (["caption", "m", "a.png", "--frobnicate"], "No such option: --frobnicate"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(cli, arguments, words):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("a is b;\n mend c"), 2, "error: a is b; mend c\n"),
        (RunError("it broke"), 1, "error: it broke\n"),
        (OSError(28, "No space left on device", "/out/x"), 1, "error: /out/x: no space left on the disk; free some"),
        (PermissionError(13, "Permission denied", "/out"), 1, "error: /out: Permission denied\n"),
    ],
)
def test_exit_codes(cli, monkeypatch, tmp_path, error, code, line):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("vlm.data_tools.scenes.generate_scenes", fail)
    got, _, err = cli("data", "scenes", str(tmp_path / "x"))
    assert got == code and err.startswith(line.rstrip("\n")) and err.count("\n") == 1


def test_interrupted(cli, monkeypatch, tmp_path):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlm.data_tools.scenes.generate_scenes", stop)
    assert cli("data", "scenes", str(tmp_path / "x"))[0] == 130


def test_nothing_given_is_help_and_exit_2(cli):
    code, out, err = cli()
    assert code == 2 and "Usage: vlm" in err and out == ""


def test_a_fault_of_ours_is_not_hidden(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("vlm.data_tools.scenes.generate_scenes", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("data", "scenes", str(tmp_path / "x"))


def test_data_from_generation_to_inspection(cli, tmp_path):
    out = str(tmp_path / "scenes")
    code, printed, _ = cli("data", "scenes", out, "--train", "6", "--val", "2", "--test", "2", "--seed", "3")
    assert code == 0 and f"{out}/train: 6 pictures" in printed
    code, printed, _ = cli("data", "inspect", f"{out}/train")
    assert code == 0 and "6" in printed
    tar = next(Path(out, "train").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-3000])
    code, printed, err = cli("data", "inspect", f"{out}/train")
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert cli("data", "scenes", out)[0] == 2, "what is there is not written over"


def test_data_convert(cli, tmp_path, pictures):
    rows = [{"image": Path(picture).name, "caption": "noise"} for picture in pictures]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = str(Path(pictures[0]).parent)
    code, out, err = cli("data", "convert", str(source), str(tmp_path / "shards"), "--images", images)
    assert (code, err) == (0, "") and "2 samples" in out


def test_print_config_is_a_config(cli, tmp_path):
    code, out, _ = cli("train", "demo", "out=elsewhere", "minutes=3", "--print-config")
    assert code == 0
    copy = tmp_path / "copy.yaml"
    copy.write_text(out)
    assert cli("train", str(copy), "--print-config")[1] == out


def test_captions(cli, model_folder, pictures):
    code, one, err = cli("caption", model_folder, pictures[0], "--max-new-tokens", "4")
    assert (code, err) == (0, "")
    code, two, _ = cli("caption", model_folder, *pictures, "--max-new-tokens", "4")
    assert code == 0 and two.startswith(f"{pictures[0]}: {one.rstrip(chr(10))}")


def test_ask_about_one_or_several(cli, model_folder, pictures):
    for images in (pictures[:1], pictures):
        code, _, err = cli("ask", model_folder, *images, "What is it?", "--max-new-tokens", "3", "--num-beams", "2")
        assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("question", "options", "words"),
    [
        (" ", [], "empty"),
        ("What? " * 100, [], "the text has 6"),
        ("What?", ["--temperature", "-1"], "temperature is -1"),
        ("What?", ["--device", "cudda"], "device 'cudda'"),
    ],
)
def test_ask_refuses(cli, model_folder, pictures, question, options, words):
    code, _, err = cli("ask", model_folder, pictures[0], question, *options)
    assert code == 2 and words in err and err.count("\n") == 1


def test_explain_writes_a_page(cli, model_folder, pictures, tmp_path):
    options = ["--grid", "2", "--samples", "12", "--max-new-tokens", "3"]
    code, told, err = cli(
        "explain", model_folder, pictures[0], "What is it?", "--out", str(tmp_path / "why.html"), *options
    )
    assert (code, err) == (0, "") and told.endswith(f"{tmp_path / 'why.html'}\n")
    assert "4 regions, 12 samples" in (tmp_path / "why.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("picture", "question", "options", "words"),
    [
        (None, "What?", ["--samples", "4", "--grid", "2"], "4 samples do not tell 4 regions apart; take at least 5"),
        (None, " ", [], "the question is empty"),
        ("none.png", "What?", [], "none.png: no such image file; check the path"),
    ],
)
def test_explain_refuses(cli, model_folder, pictures, tmp_path, picture, question, options, words):
    out = tmp_path / "why.html"
    code, _, err = cli("explain", model_folder, picture or pictures[0], question, "--out", str(out), *options)
    assert code == 2 and words in err and err.count("\n") == 1 and not out.exists()


def test_complete_goes_on_from_the_prompt(cli, model_folder):
    arguments = ["complete", model_folder, "red", "--max-new-tokens", "5", "--temperature", "1", "--seed", "1"]
    code, out, _ = cli(*arguments)
    assert code == 0 and out.startswith("red")
    assert cli(*arguments)[1] == out


def test_fill_ranks(cli, model_folder):
    code, out, _ = cli("fill", model_folder, "The <mask> is shining.", "--top-k", "3")
    probabilities = [float(line.split()[0]) for line in out.splitlines()]
    assert code == 0 and len(probabilities) == 3 and probabilities == sorted(probabilities, reverse=True)
    assert "1 <mask>" in cli("fill", model_folder, "none")[2] or "places" in cli("fill", model_folder, "none")[2]


def test_scores_of_files(cli, tmp_path):
    def written(name: str, value: object) -> str:
        (tmp_path / name).write_text(json.dumps(value))
        return str(tmp_path / name)

    people = [{"answer": "red", "answer_id": index, "answer_confidence": "yes"} for index in range(1, 11)]
    about = {"question_id": 1, "image_id": 1, "question_type": "what", "answer_type": "other"}
    answer = {**about, "answers": people, "multiple_choice_answer": "red"}
    out = str(tmp_path / "scores.json")
    code, printed, err = cli(
        *("score", "vqa", written("r.json", [{"question_id": 1, "answer": "red"}])),
        *("--questions", written("q.json", {"questions": [{"question_id": 1, "image_id": 1, "question": "what?"}]})),
        *("--annotations", written("a.json", {"annotations": [answer]}), "--out", out),
    )
    assert (code, err) == (0, "")
    assert json.loads(printed)["accuracy"]["overall"] == 100.0
    assert json.loads(Path(out).read_text())["accuracy"]["overall"] == 100.0
    captions = {"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1, "caption": "a red square"}]}
    code, printed, err = cli(
        *("score", "caption", written("c.json", [{"image_id": 1, "caption": "a red square"}])),
        *("--annotations", written("t.json", captions)),
    )
    assert (code, err) == (0, "") and json.loads(printed)["metrics"]["Bleu_1"] == pytest.approx(1.0)


def test_evaluation_is_printed_and_written(cli, model_folder, tmp_path):
    scenes = str(tmp_path / "scenes")
    cli("data", "scenes", scenes, "--train", "2", "--val", "2", "--test", "3")
    out = tmp_path / "eval"
    arguments = ["eval", model_folder, "retrieval", "--data", scenes, "--out", str(out), "--no-shuffled"]
    code, printed, err = cli(*arguments)
    assert code == 0 and "retrieval" in printed
    assert "retrieval" in json.loads((out / "results.json").read_text())["tasks"]


def test_a_port_in_use_is_one_line_with_the_mend(tmp_path):
    """A rank as torchrun and deepspeed start it, where another run has the port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "vlm.train", "--config", "scratch", "data.train=x", f"out={tmp_path}/run"]
        done = subprocess.run(command, env=os.environ | ranks, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: port {port} is in use; start with another --master_port"
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
