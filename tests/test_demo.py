"""`make demo` as a newcomer types it, on a handful of pictures and for seconds: from pictures to a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from vlm.data_tools.scenes import generate_scenes

ROOT = Path(__file__).parents[1]


def test_make_demo(tmp_path):
    generate_scenes(tmp_path / "scenes", train=80, val=6, test=4)
    settings = [f"VENV={sys.prefix}", f"SCENES={tmp_path}/scenes", f"OUT={tmp_path}/demo", "MINUTES=0.02"]
    # The tests themselves may run under make, whose flags would reach this one.
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "demo", *settings]
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith(f"{tmp_path}/demo/report.html")
    results = json.loads((tmp_path / "demo" / "eval" / "results.json").read_text())
    assert {"vqa", "caption", "retrieval", "vqa@test-compositional"} <= set(results["tasks"])
    log = [json.loads(line) for line in (tmp_path / "demo" / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in log if "loss" in line} == {0, 1}, "both stages trained"
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4, "the held-out pictures are in it"
    assert "vlm train configs/demo.yaml" in page, "so is what was typed"
