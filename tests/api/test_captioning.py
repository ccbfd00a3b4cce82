"""Captions of a folder: which pictures, in which order, and that several processes say what one does."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from vlm.captioning import pictures_in
from vlm.cli import run
from vlm.errors import RunError, UsageError
from vlm.processes import Share, in_processes
from vlm.saving import save


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model, make_processor) -> str:
    """A saved tiny model."""
    place = tmp_path_factory.mktemp("run") / "model"
    save(make_model(gate_init=1.0), make_processor(), place)
    return str(place)


@pytest.fixture
def pictures(tmp_path, make_picture):
    """A folder of five pictures and a text."""
    place = tmp_path / "pictures"
    place.mkdir()
    for number, name in enumerate(("b.png", "a.JPG", "d.webp", "c.jpeg", "e.png")):
        make_picture(number).save(place / name)
    (place / "notes.txt").write_text("no picture")
    return place


def test_a_folder_means_its_pictures_by_name(pictures, tmp_path):
    names = ["a.JPG", "b.png", "c.jpeg", "d.webp", "e.png"]
    assert pictures_in([pictures / "e.png", pictures]) == [pictures / name for name in ("e.png", *names)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty: no picture is in the folder"):
        pictures_in([tmp_path / "empty"])


def test_two_processes_say_what_one_does(folder, pictures, capsys):
    """Drawn, so that who answers which picture would be seen."""
    outputs = []
    for replicas in ("1", "2"):
        options = [
            "--replicas",
            replicas,
            "--device",
            "cpu",
            "--max-new-tokens",
            "6",
            "--temperature",
            "1",
            "--seed",
            "5",
        ]
        assert run(["caption", folder, str(pictures), *options]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    lines = outputs[0].splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(place) for place in pictures_in([pictures])]
    assert len({line.partition(": ")[2] for line in lines}) > 1


def test_wrong_usage_is_told(folder, pictures, capsys):
    assert run(["caption", folder, str(pictures), "--replicas", "0"]) == 2
    assert capsys.readouterr().err == "error: replicas is 0; it must be at least 1\n"


def test_a_process_that_is_killed_is_told(tmp_path, monkeypatch):
    (tmp_path / "ends_at_once.py").write_text("import os\n\n\ndef work(share):\n    os.kill(os.getpid(), 9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunError, match="one of 1 processes was killed; buy memory"):
        in_processes(importlib.import_module("ends_at_once").work, 1, mend="buy memory")


@pytest.mark.parametrize(("cores", "processes"), [(2, 2), (8, 3), (7, 1), (64, 64)])
def test_the_cores_are_shared_out_evenly_and_to_the_last(cores, processes):
    usable = [3 * core for core in range(cores)]
    shares = [Share(number, processes).cores(usable) for number in range(processes)]
    assert sum(shares, []) == usable
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_cores_share_them():
    assert [Share(number, 5).cores([4, 6]) for number in range(5)].count([4]) in (2, 3)


def test_a_share_is_taken_once_and_kept():
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        assert Share(1, 2).take("cpu") == "cpu"
        assert os.sched_getaffinity(0) == set(Share(1, 2).cores(sorted(before)))
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)
