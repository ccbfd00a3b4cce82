"""The house itself: imports point down the floors, the loop is one hop from the command, what is shipped works alone."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = ("train", "eval", "data_tools")
PACKAGES = ("generation", "serve", "shards", "together")  # parts of `vlm/` that are more than a file
# What each module of `vlm/` stands on: an import may go down or stay on its floor, never up.
FLOORS = {
    "benchmark charts configuration errors files garbage image_structure lime machine processes samples settings "
    "settings_faults storage wording": 0,
    "adapters augmentation documents fusion images linear_cross_entropy lora losses packed_linear page quantization "
    "quantized_linear reading routing shards tensor_parallel vision": 1,
    "generation inputs likelihood model processing quantization_bench saving": 2,
    "api captioning demo explain explain_page looking serve together": 3,
    "__init__": 3,
    "cli cli_ask cli_bench cli_data": 5,
}
FLOOR = {name: floor for names, floor in FLOORS.items() for name in names.split()} | dict.fromkeys(PROGRAMS, 4)


def sources() -> Iterator[tuple[str, Path]]:
    """Module name as FLOOR knows it, and file, of everything that is shipped."""
    for path in sorted((ROOT / "vlm").glob("*.py")):
        yield path.stem, path
    for package in PACKAGES:
        for path in sorted((ROOT / "vlm" / package).rglob("*.py")):
            yield package, path
    for program in PROGRAMS:
        for path in sorted((ROOT / program).rglob("*.py")):
            yield program, path


def imported(path: Path) -> set[str]:
    """What a file imports of the package, as FLOOR knows it; relative imports stay within their program."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "vlm" else {node.module}
    inside = {name.split(".")[1] if "." in name else "__init__" for name in names if name.split(".")[0] == "vlm"}
    return inside | {name for name in names if name.split(".")[0] in PROGRAMS}


def test_every_module_has_a_floor():
    assert {name for name, _ in sources()} == set(FLOOR)


def test_imports_point_down_the_floors():
    for name, path in sources():
        for other in imported(path) - {name}:
            assert FLOOR[other] <= FLOOR[name], f"{path.relative_to(ROOT)} imports {other} from the floor above"


def test_programs_do_not_import_each_other():
    for name, path in sources():
        if name in PROGRAMS:
            assert not imported(path) & (set(PROGRAMS) - {name}), path


def test_no_import_goes_in_a_circle():
    graph: dict[str, set[str]] = {}
    for name, path in sources():
        graph.setdefault(name, set()).update(imported(path) - {name, "__init__"})
    assert list(TopologicalSorter(graph).static_order())


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    """Every top-level function of a file."""
    return {node.name: node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}


def calls(function: ast.FunctionDef) -> set[str]:
    """What a function calls, by the last part of the name."""
    called = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {getattr(name, "attr", getattr(name, "id", "")) for name in called}


def test_one_hop_from_the_command_to_backward():
    """`vlm train` and `python -m vlm.train` call `train`; what it calls, calls `engine.backward`."""
    loop = functions(ROOT / "train" / "loop.py")
    (steps,) = [name for name, function in loop.items() if "backward" in calls(function)]
    assert steps in calls(loop["train"])
    assert "train" in calls(functions(ROOT / "vlm" / "cli.py")["train_model"])
    assert "train" in calls(functions(ROOT / "train" / "__main__.py")["main"])


def test_an_objective_is_a_page():
    classes = [
        node
        for node in ast.parse((ROOT / "train" / "objectives.py").read_text("utf-8")).body
        if isinstance(node, ast.ClassDef)
    ]
    assert len(classes) >= 5
    for node in classes:
        assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


@pytest.mark.parametrize("part", ["vlm", *PROGRAMS])
def test_a_file_says_what_it_knows(part):
    for path in sorted((ROOT / part).rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
        assert docstring and len(docstring) > 30, path


# What is shipped


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """A virtual environment with the wheel in it, and everything else borrowed; nothing of the checkout."""
    folder = tmp_path_factory.mktemp("clean")
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "runs", "tests", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(checkout)]
    subprocess.run([*pip, *build], check=True)
    shutil.rmtree(checkout)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    # Packages in there are found; its own .pth files, with the editable checkout among them, are not read.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin"


# One start for three commands; the script itself starts once more.
TRAINED_AND_EVALUATED = """
import vlm.train, vlm.eval, vlm.data_tools
from vlm.cli import run
print(vlm.train.__file__)
tiny = "vision.width=32 vision.depth=1 vision.heads=2 text.width=32 text.depth=1 text.heads=2 precision=fp32"
few = "stages.0.steps=1 stages.0.batch=4 stages.1.steps=1 stages.1.batch=4 data.workers=0"
assert run("data scenes scenes --train 8 --val 2 --test 2".split()) == 0
assert run(f"train scratch data.train=scenes/train out=run {tiny} {few}".split()) == 0
assert run("eval run/model vqa --data scenes --out run/eval".split()) == 0
"""


def test_the_wheel_works_beside_other_peoples_train_and_eval(clean, tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong train')\n")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "__init__.py").write_text("raise SystemExit('the wrong eval')\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    here = run(str(clean / "python"), "-c", TRAINED_AND_EVALUATED)
    assert here.startswith(str(clean.parent)) and "accuracy" in here
    vlm = str(clean / "vlm")
    assert run(vlm, "report", "run").strip() == "run/report.html"


def test_no_file_names_a_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".toml", "") and path.is_file():
            found = re.search(r"(?<![\w./])/(home|Users|root|mnt|data)/\w+", path.read_text("utf-8"))
            assert not found, f"{name}: {found[0] if found else ''}"
