"""The report of a run that really trained and was really evaluated: one safe file that shows what was logged and scored."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections import Counter
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vlm.charts import duration, percent
from vlm.cli import run as cli
from vlm.data_tools.scenes import generate_scenes
from vlm.errors import UsageError
from vlm.eval.report import write_report
from vlm.eval.run import evaluate
from vlm.files import atomic_write
from vlm.shards import Shards, ShardWriter
from vlm.train.config import load_config
from vlm.train.loop import train

TINY = "vision.width=32 vision.depth=1 vision.heads=2 text.width=32 text.depth=2 text.heads=2 precision=fp32".split()
STAGES = ["stages.0.steps=4", "stages.0.batch=4", "stages.1.steps=3", "stages.1.batch=4", "validation.every=2"]
COMMAND = 'vlm train scratch "data.train=<my data>" out=run'
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """A parsed report: its elements with their attributes, and the text inside each section."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, str] = {}
        self.text = ""
        self._section = ""
        self.source = text
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        assert len(dict(attributes)) == len(attributes), f"an attribute comes twice in {tag} {attributes}"
        if tag == "section":
            self._section = ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        if self.open[-1:] == ["h2"]:
            self._section = data
        self.text += data
        self.sections[self._section] = self.sections.get(self._section, "") + data

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        """The attributes of every such element."""
        found = [attributes for name, attributes in self.elements if name == tag]
        return [one for one in found if wanted.items() <= one.items()]

    def hints(self) -> set[str]:
        """What the bars say when pointed at."""
        return {attributes["title"] for _, attributes in self.elements if "title" in attributes}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with `scenes` and a `run` on it: both stages, evaluated on every kind of task."""
    folder = tmp_path_factory.mktemp("report")
    generate_scenes(folder / "scenes", train=12, val=4, test=5)
    data = [f"data.train={folder}/scenes/train", f"data.val={folder}/scenes/val", "data.workers=0"]
    config = load_config("scratch", [*data, *TINY, *STAGES, "model.tokenizer.vocab_size=300", f"out={folder}/run"])
    train(config, command=COMMAND)
    evaluate(folder / "run" / "model", ["vqa", "caption", "retrieval"], folder / "scenes", folder / "run" / "eval")
    shutil.rmtree(folder / "run" / "checkpoints")
    return folder


@pytest.fixture(scope="module")
def page(finished) -> Page:
    """Its report."""
    return Page(write_report(finished / "run").read_text("utf-8"))


@pytest.fixture(scope="module")
def results(finished) -> dict[str, Any]:
    """What was scored."""
    return json.loads((finished / "run" / "eval" / "results.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def log(finished) -> list[dict[str, Any]]:
    """What was logged."""
    return [json.loads(line) for line in (finished / "run" / "log.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the run, to be damaged."""
    return shutil.copytree(finished / "run", tmp_path / "run", ignore=shutil.ignore_patterns("model", "tensorboard"))


# One safe file


def test_it_is_one_whole_page(page):
    assert page.source.startswith("<!doctype html>") and Counter(tag for tag, _ in page.elements)["html"] == 1
    assert [name for name in page.sections if name][:2] == ["What it sees", "Is it really looking?"]


def test_it_loads_nothing_and_runs_nothing(page):
    names = {tag for tag, _ in page.elements}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"}
    addresses = {"src", "srcset", "href", "xlink:href", "action", "poster", "data", "background"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in addresses & set(attributes):
            assert re.match(r"data:image/|#", attributes[name]), (tag, name, attributes[name][:60])
        assert "url(" not in attributes.get("style", "")
    (style,) = re.findall(r"<style>(.*?)</style>", page.source, re.DOTALL)
    assert "url(" not in style and "@import" not in style


def test_it_is_written_whole_where_asked(finished, tmp_path, monkeypatch):
    out = tmp_path / "deep" / "page.html"
    assert write_report(finished / "run", out) == out and out.read_text("utf-8").endswith("</html>\n")
    before = out.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm.files.os.fsync", full)
    with pytest.raises(OSError, match=re.escape(str(out))):
        write_report(finished / "run", out)
    assert out.read_bytes() == before and [path.name for path in out.parent.iterdir()] == ["page.html"]


# What it shows


def test_both_stages_have_their_curves(page, log):
    charts = page.source.split('aria-label="loss of stage ')[1:]
    assert len(charts) == 2
    for stage, (chart, name) in enumerate(zip(charts, ("contrastive", "joint"), strict=True)):
        raw, smoothed, held_out = re.findall(
            r'<path class="line s(\d)( faint)?" d="M([^"]+)"', chart.split("</svg>")[0]
        )
        steps = [line["step"] for line in log if "event" not in line and line["stage"] == stage]
        assert len(raw[2].split("L")) == len(smoothed[2].split("L")) == len(steps) == (4, 3)[stage]
        validated = [line for line in log if line.get("event") == "validation" and line["stage"] == stage]
        assert len(held_out[2].split("L")) == len(validated) == 2
        places = [float(point.split()[0]) for point in raw[2].split("L")]
        assert raw[1] and places == sorted(set(places))
        said = page.sections["How the training went"]
        assert f"Stage {stage + 1}, {name}" in said and f"{len(steps)} steps in " in said


def test_every_score_stands_beside_blind_and_shuffled(page, results):
    words = {
        "vqa": ("accuracy", "Questions answered right"),
        "retrieval": ("image_to_text_R@1", "Picture finds its caption (R@1)"),
    }
    for task, (metric, name) in words.items():
        metrics = results["tasks"][task]
        for look, value in (
            ("with its own picture", metrics),
            ("blind", metrics["blind"]),
            ("shuffled", metrics["shuffled"]),
        ):
            assert f"{name}, {look}: {percent(value[metric])}" in page.hints()
    vqa = results["tasks"]["vqa"]
    gain = 100 * (vqa["accuracy"] - max(vqa["blind"]["accuracy"], vqa["majority"]))
    assert f"{gain:+.0f} points come from looking" in page.sections["Is it really looking?"]  # fmt: skip


def test_every_type_of_question_has_its_accuracy_on_every_split(page, results):
    for task in ("vqa", "vqa@test-compositional"):
        metrics = results["tasks"][task]
        assert len(metrics["accuracy_by_type"]) >= 4
        for kind, share in metrics["accuracy_by_type"].items():
            label = f"{kind} ({metrics['n_by_type'][kind]:,})"
            assert f"{label}, with its own picture: {percent(share)}" in page.hints()
            assert f"{label}, blind: {percent(metrics['blind']['accuracy_by_type'][kind])}" in page.hints()
    assert "The same on the split “test-compositional”" in page.sections["Which questions it can answer"]
    learnt = page.source.split('aria-label="accuracy"')[1].split("</svg>")[0]
    assert all(f">{kind} " in learnt for kind in ("colour", "count", "existence"))


def test_every_layer_has_its_gates(page, results):
    assert len(results["gates"]) == 2
    said = page.sections["How far the picture is let in"]
    for layer, (attention, feed_forward) in results["gates"].items():
        assert f"layer {layer}, attention: {attention:.3f}" in said
        assert f"layer {layer}, feed-forward: {feed_forward:.3f}" in said


def test_time_memory_and_machine(page, results, log):
    said = page.sections["Time, memory and machine"]
    for stage in (0, 1):
        seconds = max(line["seconds"] for line in log if "event" not in line and line["stage"] == stage)
        assert f"stage {stage + 1}, {('contrastive', 'joint')[stage]}{duration(seconds)}" in said
    environment = results["environment"]
    trained = max(line["peak_memory_gib"] for line in log if line.get("event") == "trained")
    assert f"most memory in training{trained:.2f} GiB" in said
    assert f"most memory in evaluation{environment['peak_memory_gib']:.2f} GiB" in said
    assert f"processor{environment['cpu']}, {environment['cores']} cores" in said
    assert f"memory{environment['memory_gib']} GiB" in said and "training processes1" in said
    assert f"torch {environment['versions']['torch']}" in said


def test_the_exact_commands_and_settings(page, results, finished):
    said = page.sections["The exact commands"]
    typed = [COMMAND, results["environment"]["command"], f"vlm report {finished / 'run'}"]
    assert [said.index(command) for command in typed] == sorted(said.index(command) for command in typed)
    assert (finished / "run" / "config.yaml").read_text("utf-8").strip() in said


def test_held_out_pictures_with_what_was_said_and_what_is_true(page, finished):
    samples = list(Shards.open(finished / "scenes" / "test"))
    lines = [json.loads(line) for line in (finished / "run" / "eval" / "samples.jsonl").read_text("utf-8").splitlines()]
    gallery = page.source.split("<h2>What it sees</h2>")[1].split("</section>")[0]
    shown = [base64.b64decode(data) for data in re.findall(r'<img src="data:image/png;base64,([^"]+)"', gallery)]
    assert shown == [sample.images[0] for sample in samples]
    figures = re.findall(r"<figure.*?</figure>", gallery)
    for sample, figure in zip(samples, figures, strict=True):
        mine = [line for line in lines if line["key"] == sample.key and "@" not in line["task"]]
        asked = [line for line in mine if line["task"] == "vqa"]
        (told,) = [line for line in mine if line["task"] == "caption"]
        assert len(asked) == figure.count("<li") == len(sample.questions)
        for line in asked:
            assert escape(line["prompt"]) in figure and escape(line["prediction"] or "(nothing)") in figure
            assert line["score"] == 1 or f"truth: {escape(line['references'][0])}" in figure
        assert escape(told["prediction"] or "(nothing)") in figure and escape(told["references"][0]) in figure


# What is missing, damaged or hostile


def data_gone(copy: Path) -> None:
    results = json.loads((copy / "eval" / "results.json").read_text("utf-8"))
    results["data"] = dict.fromkeys(results["data"], str(copy / "gone"))
    (copy / "eval" / "results.json").write_text(json.dumps(results))


def no_validation(copy: Path) -> None:
    lines = (copy / "log.jsonl").read_text("utf-8").splitlines(keepends=True)
    (copy / "log.jsonl").write_text("".join(line for line in lines if '"event"' not in line))


def no_steps(copy: Path) -> None:
    lines = (copy / "log.jsonl").read_text("utf-8").splitlines(keepends=True)
    (copy / "log.jsonl").write_text("".join(line for line in lines if '"event"' in line))


MISSING = {
    "log": (lambda c: (c / "log.jsonl").unlink(), "There is no log.jsonl in the run's folder, so there are no curves"),
    "eval": (lambda c: shutil.rmtree(c / "eval"), "There is no eval/results.json in the run's folder, so there are no scores"),
    "config": (lambda c: (c / "config.yaml").unlink(), "There is no config.yaml in the run's folder"),
    "samples": (lambda c: (c / "eval" / "samples.jsonl").unlink(), "There is no eval/samples.jsonl in the run's folder"),
    "data": (data_gone, "The held-out data is no longer at"),
    "validation": (no_validation, "The log holds no validation of questions; give data.val"),
    "steps": (no_steps, "The log holds no training steps."),
}  # fmt: skip


@pytest.mark.parametrize("part", MISSING)
def test_what_is_missing_is_said_and_the_rest_is_shown(part, copy, page):
    take_away, sentence = MISSING[part]
    take_away(copy)
    poorer = Page(write_report(copy).read_text("utf-8"))
    assert sentence in poorer.text and sentence not in page.text
    assert [name for name in poorer.sections if name] == [name for name in page.sections if name]
    assert bool(poorer.all("img")) == (part not in ("eval", "samples", "data"))
    assert ("loss of stage 2" in poorer.source) == (part not in ("log", "steps"))


def test_only_what_is_there_is_called_missing(finished, copy):
    """A run without a config, whose evaluation asked nothing about pictures."""
    (copy / "config.yaml").unlink()
    evaluate(finished / "run" / "model", ["retrieval"], finished / "scenes" / "test", copy / "eval")
    said = Page(write_report(copy).read_text("utf-8")).sections["What it sees"]
    assert "No pictures were asked about in the evaluation" in said and "config.yaml" not in said


def test_a_log_that_a_kill_cut_and_numbers_that_are_none(copy, page):
    steps = [{"stage": 1, "step": 4, "loss": "nan", "grad_norm": "inf", "seconds": 9.0}]
    text = "".join(json.dumps(step) + "\n" for step in steps) + '{"stage": 1, "step": 5, "loss": NaN}\n'
    with open(copy / "log.jsonl", "ab") as file:
        file.write(text.encode() + '{"event": "skipped_sample", "key": "ü'.encode()[:-1])
    damaged = Page(write_report(copy).read_text("utf-8"))
    charts = re.findall(r"<svg.*?</svg>", damaged.source)
    assert len(charts) == 4 and not any("nan" in chart or "inf" in chart for chart in charts)
    assert "5 steps in 9 s" in damaged.text


def test_gates_that_are_no_numbers_are_left_out(copy):
    results = json.loads((copy / "eval" / "results.json").read_text("utf-8"))
    for gates, said in (
        ({"0": ["nan", 0.5], "1": [0.5, 0.25]}, "layer 1, attention: 0.500"),
        ({"0": ["nan", "inf"]}, "Neither the results nor the log hold gates that are numbers."),
    ):
        (copy / "eval" / "results.json").write_text(json.dumps(results | {"gates": gates}))
        shown = Page(write_report(copy).read_text("utf-8")).sections["How far the picture is let in"]
        assert said in shown and "layer 0" not in shown


def test_data_that_was_damaged_since_is_said(copy, finished, tmp_path):
    data = shutil.copytree(finished / "scenes" / "test", tmp_path / "test")
    (tar,) = data.glob("*.tar")
    results = json.loads((copy / "eval" / "results.json").read_text("utf-8"))
    results["data"] = {"main": str(data)}
    (copy / "eval" / "results.json").write_text(json.dumps(results))
    entry = Shards.open(data).entries[0]
    ((_, offset, size),) = [part for part in entry.parts if part[0] == "png"]
    content = bytearray(tar.read_bytes())
    content[offset : offset + size] = bytes(size)
    tar.write_bytes(content)
    damaged = Page(write_report(copy).read_text("utf-8"))
    assert "The held-out data has changed, so no pictures can be shown:" in damaged.text
    assert f"{tar.name}: sha256" in damaged.text and not damaged.all("img")


HOSTILE = '<script>alert("x")</script> & \'"><img src=http://example.org/x onerror=alert(1)>'


def test_nothing_from_the_data_becomes_markup(finished, copy, tmp_path):
    picture = Shards.open(finished / "scenes" / "test")[0].images[0]
    with ShardWriter(tmp_path / "hostile") as writer:
        for number in range(2):
            asked = [{"question": HOSTILE, "answer": HOSTILE, "type": HOSTILE}]
            fields = {"caption": HOSTILE, "qa": asked, "label": HOSTILE}
            writer.write(f'{number}"><script>', {"png": picture, "json": json.dumps(fields).encode()})
    tasks = ["vqa", "caption", "classification"]
    evaluate(finished / "run" / "model", tasks, tmp_path / "hostile", copy / "eval")
    with open(copy / "log.jsonl", "a", encoding="utf-8") as file:
        shares = {HOSTILE: 0.5}
        event = {"event": "validation", "stage": 1, "step": 3, "seconds": 1, "loss": 1.0, "accuracy": shares}
        file.write(json.dumps(event) + "\n" + json.dumps({"event": "started", "command": HOSTILE}) + "\n")
    with open(copy / "config.yaml", "a", encoding="utf-8") as file:
        file.write(f"# {HOSTILE}\n")
    hostile = Page(write_report(copy).read_text("utf-8"))
    assert hostile.text.count(HOSTILE) >= 8 and HOSTILE in hostile.sections["At its best and at its worst"]
    test_it_loads_nothing_and_runs_nothing(hostile)
    shown = 2 + 2 * len(tasks)
    assert len(hostile.all("img")) == shown


# Folders that hold no run


@pytest.mark.parametrize("kind", ["none", "file", "empty", "model", "data", "eval"])
def test_a_folder_of_another_kind_is_refused_in_one_line(kind, finished, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    places = {"model": finished / "run" / "model", "data": finished / "scenes", "eval": finished / "run" / "eval"}
    folder = places.get(kind, tmp_path / kind)
    with pytest.raises(UsageError) as refusal:
        write_report(folder)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)
    assert str(refusal.value).endswith("; give the `out` of a training run")
    assert (folder / "report.html").exists() == (kind == "eval")  # its own, which `vlm eval` wrote
    assert (kind == "eval") == ("an evaluation, and `vlm eval` wrote report.html into it" in str(refusal.value))


@pytest.mark.parametrize("words", ["{", "[]", "null", '"x"', "[" * 100_000])
def test_results_that_say_nothing_are_refused(words, copy):
    with atomic_write(copy / "eval" / "results.json", "w") as file:
        file.write(words)
    with pytest.raises(UsageError, match="results.json: not a JSON object; run `vlm eval` again"):
        write_report(copy)


def test_the_command_prints_where_it_is(copy, capsys):
    assert cli(["report", str(copy)]) == 0 and capsys.readouterr().out == f"{copy}/report.html\n"
    assert cli(["report", str(copy / "none")]) == 2 and capsys.readouterr().err.count("\n") == 1
