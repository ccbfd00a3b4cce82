"""`vlm serve` as a person starts it and a supervisor ends it: the address it prints, signals, exit codes, wrong usage."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import eventually

from vlm.cli import run
from vlm.generation.engine import Engine
from vlm.saving import save

VLM = str(Path(sys.executable).parent / "vlm")


@pytest.fixture(scope="module")
def two_processes(folder) -> Iterator[list[subprocess.Popen]]:
    """Two servers, started together; their rows are one, so that what is slow for one client is slow for all."""
    command = [VLM, "serve", folder, "--port", "0", "--rows", "1", "--name", "tiny"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLM_API_KEY": "secret"}
    processes = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def address(process: subprocess.Popen) -> str:
    """What it prints when it begins."""
    ready, _, _ = select.select([process.stdout], [], [], 300)
    line = process.stdout.readline() if ready else ""
    found = re.fullmatch(r"serving tiny at (http://127\.0\.0\.1:\d+)/v1\n", line)
    assert found, (line, process.poll())
    return found[1]


def ask(url: str, **more: Any) -> Any:
    """A long stream that has begun."""
    told = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200, "stream": True, **more}
    headers = {"content-type": "application/json", "authorization": "Bearer secret"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(told).encode(), headers)
    return urllib.request.urlopen(request, timeout=60)


def test_sigterm_answers_what_was_asked_and_a_second_signal_does_not_wait(two_processes):
    gentle, sudden = two_processes
    stream = ask(address(gentle))
    assert stream.readline().startswith(b"data: ")
    gentle.send_signal(signal.SIGTERM)
    rest = stream.read()
    assert b'"finish_reason": "length"' in rest or b'"finish_reason": "stop"' in rest
    assert rest.endswith(b"data: [DONE]\n\n")
    out, err = gentle.communicate(timeout=30)
    assert gentle.returncode == 0, err
    assert "Traceback" not in err

    url = address(sudden)
    # Nobody reads these: the second waits for the first, and both for a reader.
    streams = [ask(url) for _ in range(1)]
    sudden.send_signal(signal.SIGSTOP)  # so that neither signal comes before the other is on its way
    sudden.send_signal(signal.SIGTERM)
    sudden.send_signal(signal.SIGINT)
    sudden.send_signal(signal.SIGCONT)
    begun = time.monotonic()
    assert sudden.wait(30) == 128 + signal.SIGTERM or sudden.returncode == 128 + signal.SIGINT
    assert time.monotonic() - begun < 20
    for one in streams:
        one.close()


def test_wrong_usage_is_one_line(folder, capsys):
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    for arguments, told in (
        ([folder, "--port", port], f"127.0.0.1:{port}"),
        ([folder, "--host", "256.0.0.1"], "256.0.0.1"),
        ([folder, "--rows", "0"], "rows is 0; it must be at least 1"),
        ([folder, "--queue", "-1"], "queue is -1; it must be at least 0"),
        ([folder, "--wait", "0"], "wait is 0"),
        ([folder, "--max-n", "0"], "choices is 0"),
        ([folder, "--length", "100000"], "length is 100000"),
        ([folder, "--length", "0"], "--length"),
        ([folder, "--length", "-5"], "--length"),
        ([folder, "--length", "1"], "--length"),
        ([folder, "--port", "70000"], "65535"),
        (["nowhere"], "nowhere"),
    ):
        assert run(["serve", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ") and told in error, error
    taken.close()


def test_an_engine_that_fails_ends_the_server_so_that_it_is_started_again(folder, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    seen: list[int] = []

    def fail(engine: Engine) -> None:
        raise RuntimeError("no more")

    def ask_until_heard() -> None:
        def heard() -> bool:
            try:
                ask(f"http://127.0.0.1:{port}").close()
            except urllib.error.HTTPError as error:
                seen.append(error.code)
            except urllib.error.URLError:  # it has not begun to listen
                return False
            return True

        eventually(heard)
        if not ended.wait(20):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Engine, "step", fail)
    ended = threading.Event()
    asking = threading.Thread(target=ask_until_heard)
    asking.start()
    code = run(["serve", folder, "--port", str(port), "--name", "tiny"])
    ended.set()
    asking.join()
    assert (code, seen) == (1, [500])
    assert capsys.readouterr().err.endswith("error: the decoding engine has failed; start the server again\n")


def test_a_model_that_cannot_generate_is_refused(make_model, make_processor, tmp_path, capsys):
    save(make_model("bert"), make_processor(), tmp_path / "model")
    assert run(["serve", str(tmp_path / "model"), "--port", "0"]) == 2
    assert "'bert'" in capsys.readouterr().err


def test_without_its_libraries_the_command_says_what_to_install(folder, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("vlm.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(["serve", folder]) == 2
    assert "pip install 'vlm[serve]'" in capsys.readouterr().err


def test_few_kernels_are_kept_unless_the_user_says_how_many(folder, monkeypatch):
    kept = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    found = []
    monkeypatch.setattr("vlm.serve.server.serve", lambda *_: found.append(os.environ[kept]))
    monkeypatch.setenv(kept, "7")
    assert run(["serve", str(folder)]) == 0
    monkeypatch.delenv(kept)
    assert run(["serve", str(folder)]) == 0
    assert found == ["7", "64"]


def test_the_benchmark_has_a_row_for_each_promise(folder, tmp_path, capsys):
    out = tmp_path / "bench.json"
    small = ["--clients", "4", "--requests", "8", "--tokens", "4", "--rounds", "1", "--soak", "40", "--out", str(out)]
    assert run(["bench", "serve", "--model", folder, *small]) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == [
        "4 clients at once, 1 after another",
        "first token, 95th percentile",
        "memory of the caches",
        "memory of the process",
    ]
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows.values())
    assert "after 40 of them" in rows["memory of the process"]["conditions"]
