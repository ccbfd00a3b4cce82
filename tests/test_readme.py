"""The README is true: every command in it runs, its Python runs, its recipe is a recipe, its links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml

from vlm.cli import run
from vlm.data_tools.scenes import generate_scenes
from vlm.saving import save
from vlm.train.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BIN = Path(sys.executable).parent
# What makes a recipe of minutes one of seconds.
TINY = "vision.width=32 vision.depth=1 vision.heads=2 text.width=32 text.depth=1 text.heads=2".split()
FEW = "stages.0.steps=1 stages.0.batch=4 precision=fp32 data.workers=0".split()
FEW_JOINT = "stages.1.steps=1 stages.1.batch=4".split()


def blocks(language: str) -> list[str]:
    """The README's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_model, make_processor, make_picture, make_towers) -> Path:
    """A folder with everything that the README's commands speak of, tiny."""
    folder = tmp_path_factory.mktemp("readme")
    generate_scenes(folder / "runs" / "scenes", train=4, val=2, test=2)
    save(make_model(gate_init=0.5), make_processor(), folder / "runs" / "demo" / "model")
    shutil.copytree(ROOT / "configs", folder / "configs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (folder / "pictures").mkdir()
    for index, name in enumerate(
        ["cat.jpg", "dog.jpg", *(f"pictures/{n}" for n in ("0001.jpg", "0002.jpg", "a.png", "b.png"))]
    ):
        make_picture(index).save(folder / name)
    (folder / "pairs.jsonl").write_text(blocks("json")[0])
    (folder / "sheet.csv").write_text("file,title\n0001.jpg,a large dog in the park\n0002.jpg,a small cat on a mat\n")
    (folder / "corpus.txt").write_text("A sentence of the corpus. " * 100)
    answers = [{"answer": "red"}] * 10
    official = {
        "results.json": [{"question_id": 1, "answer": "red", "image_id": 1, "caption": "a red circle"}],
        "questions.json": {"questions": [{"question_id": 1, "question": "What colour?"}]},
        "annotations.json": {
            "annotations": [{"question_id": 1, "answers": answers, "question_type": "what", "answer_type": "other"}]
        },
        "captions.json": {"annotations": [{"image_id": 1, "caption": "a red circle"}]},
    }
    for name, content in official.items():
        (folder / name).write_text(json.dumps(content))
    make_towers(folder)
    return folder


def smaller(words: list[str]) -> list[str]:
    """The same command on a tiny model, for one step a stage."""
    if "train" not in words and "vlm.train" not in words:
        return words
    if any("pretrained.yaml" in word for word in words):
        towers = {"vision": "vision=vision", "text": "text=text"}
        words = [towers.get(word.partition("=")[0], word) for word in words]
        return words + FEW + FEW_JOINT + ["stages.1.micro_batch=4"]
    if any("text_" in word for word in words):
        return words + TINY + FEW
    words = ["2" if words[index - 1] == "--num_gpus" else word for index, word in enumerate(words)]
    return words + TINY + FEW + FEW_JOINT


def test_readme_has_commands():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize(
    "command", [line for line in COMMANDS if line.startswith("vlm ") and not line.startswith("vlm serve ")]
)
def test_a_vlm_command_runs(command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert run(smaller(shlex.split(command))[1:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("vlm serve ")])
def test_a_server_serves(command, place):
    words = [*shlex.split(command)[1:], "--port", "0"]
    code = "import sys; from vlm.cli import main; main(sys.argv[1:])"
    with subprocess.Popen([sys.executable, "-c", code, *words], cwd=place, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = re.search(r"at (http://\S+)/v1", server.stdout.readline())
            assert address is not None
            with urllib.request.urlopen(f"{address[1]}/health") as answer:
                assert json.load(answer) == {"status": "ok"}
        finally:
            server.terminate()
        assert server.wait(timeout=60) == 0


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.split()[0] in ("torchrun", "deepspeed")])
def test_a_launch_runs(command, place):
    program, *words = smaller(shlex.split(command))
    done = subprocess.run([str(BIN / program), *words], cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    out = next(word.partition("=")[2] for word in words if word.startswith("out="))
    assert (place / out / "model" / "config.json").is_file()


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_a_make_target_exists(command):
    """`make demo` itself is run in `test_demo.py`, `make test` runs this."""
    done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_command_is_left_out():
    assert {line.split()[0] for line in COMMANDS} <= {"vlm", "make", "torchrun", "deepspeed"}


def test_python_runs(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    (snippet,) = blocks("python")
    exec(compile(snippet, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 5


def test_recipe_is_one(tmp_path):
    (recipe,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    config = load_config(tmp_path / "recipe.yaml")
    assert [stage.objective for stage in config.stages] == ["contrastive", "joint"]
    assert set(yaml.safe_load(recipe)) <= set(type(config).model_fields)


def test_links_and_files_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for name in re.findall(r"`((?:vlm|train|eval|data_tools|configs|tests)/[\w./-]*)`", README):
        assert (ROOT / name).exists(), name
