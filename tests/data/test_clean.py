"""`vlm data clean`: every sample ends in one of two places, with its reason; the same bytes whoever does it, and killed."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlm
from vlm.data_tools.clean import clean, cleaned_parts
from vlm.data_tools.clean_rules import load_rules
from vlm.data_tools.engines import LocalEngine
from vlm.data_tools.inspect import inspect
from vlm.errors import UsageError
from vlm.saving import save
from vlm.shards import Shards, ShardWriter


def encoded(seed: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A picture of a few large spots, other ones for each seed."""
    spots = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(spots).resize(size, Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def blank() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(file, "PNG")
    return file.getvalue()


def pair(seed: int, caption: str) -> dict[str, bytes]:
    return {"png": encoded(seed), "json": json.dumps({"caption": caption, "licence": "CC0"}).encode()}


def shards(folder: Path, samples: Mapping[str, Mapping[str, bytes]], per_shard: int = 4) -> Path:
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for key, parts in samples.items():
            writer.write(key, parts)
    return folder


def rules(**given: Any) -> Any:
    return load_rules(None, [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in given.items()])


MESSY = {
    "good": pair(1, "a dog runs over the wet grass"),
    "twice": pair(1, "a dog runs over the wet grass"),
    "same-picture": pair(1, "the harbour of a small town at night"),
    "same-words": pair(2, "a dog runs over the wet grass"),
    "mojibake": pair(3, "a cafÃ© on the corner of the street"),
    "mail": pair(4, "ask for prints at jane@example.org today"),
    "shop": pair(5, "buy now with free shipping, 50% off"),
    "short": pair(6, "dog"),
    "blank": {**pair(7, "a white cat in the snow"), "png": blank()},
    "small": {**pair(8, "a very small picture"), "png": encoded(8, (16, 16))},
    "damaged": {**pair(9, "a picture that was cut"), "png": encoded(9)[:200]},
    "no-sample": {"png": encoded(10), "json": b"{"},
    "text": {"json": json.dumps({"text": "The sun rose over the hills. It was a cold morning."}).encode()},
}
REASONS = {
    "twice": "duplicate",
    "shop": "advertising",
    "short": "too short",
    "blank": "blank image",
    "small": "small image",
    "damaged": "unreadable image",
    "no-sample": "not a sample",
}


@pytest.fixture(scope="module")
def messy(tmp_path_factory) -> Path:
    return shards(tmp_path_factory.mktemp("messy") / "in", MESSY)


def reasons(out: Path) -> dict[str, str]:
    """Key -> reason of what was dropped."""
    dropped = Shards.open(out / "dropped")
    return {entry.key: json.loads(entry.read()["json"])["dropped"] for entry in dropped.entries}


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the reports, which name the command and the machine."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("report")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_every_sample_ends_in_one_of_two_places_with_its_reason(messy: Path, tmp_path: Path) -> None:
    summary = clean(messy, tmp_path / "out", rules(), engine=LocalEngine(1))
    kept = Shards.open(tmp_path / "out").keys
    assert kept == [key for key in MESSY if key not in REASONS]
    assert reasons(tmp_path / "out") == REASONS
    assert summary.kept == len(kept) and sum(summary.reasons.values()) == len(REASONS)
    assert {example.key for example in summary.examples} == set(REASONS)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kept"] == len(kept) and "advertising" in (tmp_path / "out" / "report.html").read_text()
    assert inspect(tmp_path / "out").faults == []


def test_what_stays_is_mended_and_otherwise_untouched(messy: Path, tmp_path: Path) -> None:
    clean(messy, tmp_path / "out", rules())
    kept = {entry.key: entry.read() for entry in Shards.open(tmp_path / "out").entries}
    assert json.loads(kept["mojibake"]["json"])["caption"] == "a café on the corner of the street"
    assert json.loads(kept["mail"]["json"])["caption"] == "ask for prints at [email] today"
    untouched = set(kept) - {"mojibake", "mail"}
    assert all(kept[key] == MESSY[key] for key in untouched)
    assert kept["mail"]["png"] == MESSY["mail"]["png"] and json.loads(kept["mail"]["json"])["licence"] == "CC0"


def test_what_is_dropped_keeps_its_bytes_and_names_what_it_is_like(messy: Path, tmp_path: Path) -> None:
    clean(messy, tmp_path / "out", rules())
    dropped = {entry.key: entry.read() for entry in Shards.open(tmp_path / "out" / "dropped").entries}
    assert all(dropped[key]["png"] == MESSY[key]["png"] for key in dropped)
    assert json.loads(dropped["twice"]["json"])["like"] == "good"
    assert json.loads(dropped["shop"]["json"])["caption"] == "buy now with free shipping, 50% off"
    assert dropped["no-sample"]["unreadable"] == b"{"


def test_a_caption_may_lie_beside_the_json(tmp_path: Path) -> None:
    questions = json.dumps({"question": "what is it?", "answer": "a cafe"}).encode()
    told = {"png": encoded(1), "txt": "a cafÃ© on the corner".encode()}
    source = shards(tmp_path / "in", {"mended": told, "empty": {"png": encoded(2), "txt": b" ", "json": questions}})
    clean(source, tmp_path / "out", rules())
    kept = {entry.key: entry.read() for entry in Shards.open(tmp_path / "out").entries}
    assert kept["mended"]["txt"].decode() == "a café on the corner"
    assert kept["empty"] == {"png": encoded(2), "txt": b" ", "json": questions}


def test_a_null_caption_hides_none_beside_the_json(tmp_path: Path) -> None:
    told = {"mended": "ask for prints at jane@example.org today", "short": "dog", "good": "a white cat in the snow"}
    json_part = b'{ "caption": null, "id": 1 }'
    samples = {
        key: {"png": encoded(number), "txt": text.encode(), "json": json_part}
        for number, (key, text) in enumerate(told.items())
    }
    clean(shards(tmp_path / "in", samples), tmp_path / "out", rules())
    kept = {entry.key: entry.read() for entry in Shards.open(tmp_path / "out").entries}
    assert reasons(tmp_path / "out") == {"short": "too short"}
    assert kept["mended"] == samples["mended"] | {"txt": b"ask for prints at [email] today"}
    assert kept["good"] == samples["good"]


@pytest.mark.parametrize(
    ("by", "out"),
    [("pair", {"twice"}), ("image", {"twice", "same-picture"}), ("text", {"twice", "same-words"}), ("none", set())],
)
def test_what_makes_a_duplicate_is_a_rule(by: str, out: set[str], messy: Path, tmp_path: Path) -> None:
    clean(messy, tmp_path / "out", rules(duplicates__by=by))
    assert {key for key, reason in reasons(tmp_path / "out").items() if reason == "duplicate"} == out


def test_a_dropped_sample_stands_for_no_other(tmp_path: Path) -> None:
    """Of two alike, the first is no use by another rule: the second stays."""
    first = {"png": encoded(1), "json": json.dumps({"caption": "a dog in the park", "text": "buy now"}).encode()}
    source = shards(tmp_path / "in", {"a": first, "b": pair(1, "a dog in the park")})
    clean(source, tmp_path / "out", rules(captions__min_words=3))
    assert Shards.open(tmp_path / "out").keys == ["b"]


def test_cleaning_twice_drops_nothing_more(messy: Path, tmp_path: Path) -> None:
    clean(messy, tmp_path / "once", rules())
    summary = clean(tmp_path / "once", tmp_path / "twice", rules())
    assert summary.reasons == {} and summary.kept == len(Shards.open(tmp_path / "once"))
    assert [entry.read() for entry in Shards.open(tmp_path / "once").entries] == [
        entry.read() for entry in Shards.open(tmp_path / "twice").entries
    ]


def test_what_is_close_to_an_evaluation_set_goes(messy: Path, tmp_path: Path) -> None:
    """The same picture under other words; the same plain text; but not the same words of another picture."""
    sunrise = {"json": MESSY["text"]["json"]}
    held_out = {"eval-1": pair(3, "what is this place"), "eval-2": sunrise, "eval-3": pair(99, "a dog runs over grass")}
    test_set = shards(tmp_path / "test", held_out)
    clean(messy, tmp_path / "out", rules(contamination=[str(test_set)]))
    found = {key: reason for key, reason in reasons(tmp_path / "out").items() if key not in REASONS}
    assert found == {"mojibake": "in an evaluation set", "text": "in an evaluation set"}
    told = {entry.key: json.loads(entry.read()["json"]) for entry in Shards.open(tmp_path / "out" / "dropped").entries}
    assert told["mojibake"]["like"] == "eval-1" and told["text"]["like"] == "eval-2"


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_model, make_processor) -> str:
    folder = tmp_path_factory.mktemp("base") / "model"
    save(make_model(), make_processor(), folder)
    return str(folder)


def test_the_pairs_that_agree_least_go(model: str, tmp_path: Path) -> None:
    """As scored through the public API, a pair at a time."""
    samples = {f"{number:02d}": pair(number, f"caption number {number} of a few") for number in range(40)}
    source = shards(tmp_path / "in", samples, per_shard=16)
    clean(source, tmp_path / "out", rules(agreement__model=model, agreement__drop_lowest=0.25, duplicates__by="none"))
    loaded = vlm.load(model, device="cpu")
    cosines = {
        key: float(loaded.embed_image([parts["png"]])[0] @ loaded.embed_text([json.loads(parts["json"])["caption"]])[0])
        for key, parts in samples.items()
    }
    lowest = sorted(cosines, key=cosines.__getitem__)[:10]
    dropped = {entry.key: json.loads(entry.read()["json"]) for entry in Shards.open(tmp_path / "out/dropped").entries}
    assert set(dropped) == set(lowest)
    assert all(abs(float(told["agreement"]) - cosines[key]) < 1e-3 for key, told in dropped.items())
    limit = (cosines[lowest[4]] + cosines[lowest[5]]) / 2
    clean(source, tmp_path / "five", rules(agreement__model=model, agreement__threshold=limit, duplicates__by="none"))
    assert set(reasons(tmp_path / "five")) == set(lowest[:5])


def test_a_text_too_long_for_the_model_is_judged_by_its_beginning(model: str, tmp_path: Path) -> None:
    """What differs behind the last token that the model takes changes nothing; what differs before it does."""
    long = " ".join(["what is this?"] * vlm.load(model, device="cpu").model.max_tokens)
    asked = {"one": f"{long} red", "two": f"{long} blue", "other": f"blue {long}", "short": "what is this?"}
    samples = {
        key: {"png": encoded(1), "json": json.dumps({"question": text, "answer": "dog"}).encode()}
        for key, text in asked.items()
    }
    source = shards(tmp_path / "in", samples)
    clean(source, tmp_path / "out", rules(agreement__model=model, agreement__threshold=1.0, duplicates__by="none"))
    told = {entry.key: json.loads(entry.read()["json"]) for entry in Shards.open(tmp_path / "out/dropped").entries}
    scores = {key: fields["agreement"] for key, fields in told.items()}
    assert set(scores) == set(asked)
    assert scores["one"] == scores["two"] and scores["other"] != scores["one"] != scores["short"]


# Who does it, and when


def test_the_bytes_do_not_depend_on_the_processes(messy: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        clean(messy, tmp_path / str(processes), rules(), engine=LocalEngine(processes))
    assert files(tmp_path / "1") == files(tmp_path / "2")


def killed(after: int, *arguments: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> bool:
    """Whether cleaning was killed at the start of the call of that number of `cleaned_parts`, or ended before it."""
    calls: list[int] = []

    def dies(parts: Any, given: Any) -> Any:
        calls.append(1)
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return cleaned_parts(parts, given)

    with monkeypatch.context() as patch:
        patch.setattr("vlm.data_tools.clean.cleaned_parts", dies)
        options |= {"engine": LocalEngine(1)}
        child = multiprocessing.get_context("fork").Process(target=clean, args=arguments, kwargs=options)
        child.start()
        child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


@pytest.mark.parametrize("after", [3, 9, 15, 20, 24])
def test_killed_and_started_again_it_ends_the_same(after: int, messy: Path, tmp_path: Path, monkeypatch) -> None:
    clean(messy, tmp_path / "straight", rules(), engine=LocalEngine(1))
    arguments = (messy, tmp_path / "out", rules())
    died = killed(after, *arguments, monkeypatch=monkeypatch)
    assert died == (not (tmp_path / "out").exists())
    if died:
        clean(*arguments, engine=LocalEngine(1))
    assert files(tmp_path / "out") == files(tmp_path / "straight")


WRITING = len(MESSY) + 3  # a call of `cleaned_parts` when all is judged


def test_a_folder_to_work_in_is_left_as_it_was(messy: Path, tmp_path: Path, monkeypatch) -> None:
    """What others keep there stays, and after a kill, and only then, what the next run goes on with."""
    work = tmp_path / "work"
    (work / "judged").mkdir(parents=True)
    (work / "judged" / "mine").touch()
    clean(messy, tmp_path / "straight", rules(), scratch=work, engine=LocalEngine(1))
    assert files(work) == {"judged/mine": b""} and len(list(work.iterdir())) == 1
    assert killed(WRITING, messy, tmp_path / "out", rules(), scratch=work, monkeypatch=monkeypatch)
    assert len(list(work.iterdir())) == 2
    monkeypatch.setattr("vlm.data_tools.clean.judge", None)  # all was judged
    clean(messy, tmp_path / "out", rules(), scratch=work, engine=LocalEngine(1))
    assert files(work) == {"judged/mine": b""} and len(list(work.iterdir())) == 1
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_a_refused_run_leaves_nothing_in_the_folder_to_work_in(messy: Path, tmp_path: Path, monkeypatch) -> None:
    def refuses(*_: Any) -> None:
        raise UsageError("no")

    monkeypatch.setattr("vlm.data_tools.clean.judge", refuses)
    with pytest.raises(UsageError, match="^no$"):
        clean(messy, tmp_path / "out", rules(), scratch=tmp_path / "work", engine=LocalEngine(1))
    assert list((tmp_path / "work").iterdir()) == []


def test_a_folder_to_work_in_that_is_lost_is_filled_anew(messy: Path, tmp_path: Path, monkeypatch) -> None:
    clean(messy, tmp_path / "straight", rules(), engine=LocalEngine(1))
    options = {"scratch": tmp_path / "work"}
    assert killed(WRITING, messy, tmp_path / "out", rules(), **options, monkeypatch=monkeypatch)
    shutil.rmtree(tmp_path / "work")
    clean(messy, tmp_path / "out", rules(), **options, engine=LocalEngine(1))
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_other_rules_after_a_kill_leave_nothing_of_it_either(messy: Path, tmp_path: Path, monkeypatch) -> None:
    by_image = rules(duplicates__by="image")
    clean(messy, tmp_path / "straight", by_image, engine=LocalEngine(1))
    options = {"scratch": tmp_path / "work"}
    assert killed(WRITING, messy, tmp_path / "out", rules(), **options, monkeypatch=monkeypatch)
    clean(messy, tmp_path / "out", by_image, **options, engine=LocalEngine(1))
    assert list((tmp_path / "work").iterdir()) == []
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_runs_may_share_a_folder_to_work_in(messy: Path, tmp_path: Path, monkeypatch) -> None:
    """One that was killed does not go on with what another has left there since."""
    other = shards(tmp_path / "other", dict(reversed(MESSY.items())))
    clean(messy, tmp_path / "straight", rules(), engine=LocalEngine(1))
    options = {"scratch": tmp_path / "work", "monkeypatch": monkeypatch}
    assert killed(WRITING, messy, tmp_path / "out", rules(), **options)
    assert killed(WRITING, other, tmp_path / "out-of-other", rules(), **options)
    clean(messy, tmp_path / "out", rules(), scratch=tmp_path / "work", engine=LocalEngine(1))
    assert files(tmp_path / "out") == files(tmp_path / "straight")


# What is refused


def test_a_flipped_byte_is_refused(messy: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for path in messy.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    data = bytearray((source / "00001.tar").read_bytes())
    data[700] ^= 1
    (source / "00001.tar").write_bytes(data)
    with pytest.raises(UsageError, match="00001.tar: sha256 .* bytes have changed"):
        clean(source, tmp_path / "out", rules())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_address_needs_a_place_to_work_in(messy: Path) -> None:
    with pytest.raises(UsageError, match="memory://out: an address is no place to work in; give --scratch"):
        clean(messy, "memory://out", rules())


def test_what_it_can_not_start_from_is_named(messy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: no such shard"):
        clean(tmp_path / "nowhere", tmp_path / "out", rules())
    with pytest.raises(UsageError, match="nowhere: no such shard"):
        clean(messy, tmp_path / "out", rules(contamination=[str(tmp_path / "nowhere")]))
    clean(messy, tmp_path / "out", rules())
    with pytest.raises(UsageError, match="out: already there"):
        clean(messy, tmp_path / "out", rules())
