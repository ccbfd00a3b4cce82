"""Several engines behind one address: they answer as one does, share what is asked, and none of them is missed or left over."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from waiting import eventually

from vlm.cli import run
from vlm.errors import RunError, UsageError
from vlm.processes import Share
from vlm.serve.app import Stream
from vlm.serve.limits import Limits
from vlm.serve.refusals import Refusal
from vlm.serve.replica import Settings
from vlm.serve.replicas import Replica, Replicas

VLM = str(Path(sys.executable).parent / "vlm")
TOKENS = 12
CHATS = 'vlm_requests_total{route="/v1/chat/completions",status="200"}'


class Started:
    """`vlm serve --replicas 2` as a process, and its clients."""

    def __init__(self, process: subprocess.Popen) -> None:
        ready, _, _ = select.select([process.stdout], [], [], 300)
        line = process.stdout.readline() if ready and process.stdout else ""
        found = re.fullmatch(r"serving tiny at (http://127\.0\.0\.1:\d+)/v1\n", line)
        assert found, (line, process.poll())
        self.process, self.url = process, found[1]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0, timeout=60)

    def replicas(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return answer.read().decode()

    def health(self) -> Any:
        return json.loads(self.get("/health"))

    def metric(self, start: str) -> dict[str, float]:
        """Label sets, and what is told of each."""
        lines = self.get("/metrics").splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(start)}

    def ask(self, content: str, **more: Any) -> Any:
        told = {"model": "tiny", "max_tokens": TOKENS, "temperature": 0, **more}
        return self.client.chat.completions.create(messages=[{"role": "user", "content": content}], **told)


@pytest.fixture(scope="module")
def started(folder) -> Iterator[Started]:
    command = [VLM, "serve", folder, "--port", "0", "--name", "tiny", "--replicas", "2", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLM_API_KEY": "secret"}
    process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment)
    try:
        yield Started(process)
    finally:
        process.kill()
        process.communicate()


# The command


def test_they_answer_as_one_does_and_share_what_is_asked(started, model):
    asked = ["Hi", "What?", "A cat", "No."]
    alone = model.generate([[{"role": "user", "content": text}] for text in asked], max_new_tokens=TOKENS)
    assert [started.ask(text).choices[0].message.content for text in asked] == alone
    new = started.metric('vlm_tokens_total{kind="new"')
    assert set(new) == {f'vlm_tokens_total{{kind="new",replica="{number}"}}' for number in (0, 1)}
    assert min(new.values()) > 0
    (requests,) = started.metric(CHATS).values()
    assert requests == len(asked)
    assert [one.id for one in started.client.models.list()] == ["tiny"]
    assert started.health() == {"status": "ok", "replicas": 2, "alive": 2}


def test_each_keeps_to_its_cores(started):
    cores = sorted(os.sched_getaffinity(0))
    kept = sorted(sorted(replica.cpu_affinity()) for replica in started.replicas())
    assert kept == sorted(Share(number, 2).cores(cores) for number in (0, 1))


def test_a_stream_comes_through_whole(started):
    pieces = [chunk.choices[0].delta.content or "" for chunk in started.ask("Hi", stream=True)]
    assert len(pieces) > 2
    assert "".join(pieces) == started.ask("Hi").choices[0].message.content


def test_what_is_refused_here_and_what_there_has_one_form(started):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{started.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError, match="the model 'tiny' alone"):
        started.ask("Hi", model="other")


def test_a_hang_up_reaches_the_replica(started):
    before = sum(started.metric('vlm_tokens_total{kind="new"').values())
    answered = sum(started.metric(CHATS).values())
    stream = started.ask("Hi", stream=True, max_tokens=200, n=8)
    next(iter(stream))
    # They stand still until the front has seen it, and can not have come to the end by themselves.
    for replica in started.replicas():
        replica.suspend()
    stream.close()
    eventually(lambda: sum(started.metric(CHATS).values()) > answered)
    for replica in started.replicas():
        replica.resume()
    eventually(lambda: len(running := started.metric("vlm_replies_running")) == 2 and not any(running.values()))
    assert 0 < sum(started.metric('vlm_tokens_total{kind="new"').values()) - before < 8 * 200


def test_one_that_is_killed_is_not_missed_and_comes_back(started):
    victim, other = started.replicas()
    victim.kill()
    eventually(lambda: started.health() == {"status": "ok", "replicas": 2, "alive": 1})
    assert started.ask("Hi").choices[0].message.content
    eventually(lambda: started.health()["alive"] == 2)
    assert victim not in started.replicas() and other in started.replicas() and len(started.replicas()) == 2
    for _ in range(2):
        assert started.ask("Hi").choices[0].message.content
    assert min(started.metric('vlm_tokens_total{kind="new"').values()) > 0


def test_sigterm_answers_what_was_asked_and_leaves_no_process(started):
    """The last one of this server."""
    replicas = started.replicas()
    stream = started.ask("Hi", stream=True, max_tokens=200, n=8)
    next(iter(stream))
    started.process.send_signal(signal.SIGTERM)
    *_, last = stream
    assert last.choices[0].finish_reason in ("length", "stop")
    _, err = started.process.communicate(timeout=60)
    assert started.process.returncode == 0, err
    assert "Traceback" not in err
    assert len(replicas) == 2 and not any(replica.is_running() for replica in replicas)


# One replica


def test_a_replica_ends_when_who_started_it_has(folder):
    place = Path(tempfile.mkdtemp(prefix="vlm-"))
    process = subprocess.Popen([sys.executable, "-P", "-m", "vlm.serve.replica"], stdin=-1, stdout=-1)
    try:
        assert process.stdin and process.stdout
        process.stdin.write(Settings(folder, "tiny", Limits()).line(place / "0", Share()))
        process.stdin.flush()
        assert process.stdout.readline() == b'{"error": null}\n' and (place / "0").is_socket()
        process.stdin.close()
        assert process.wait(60) == 1 and not place.exists()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        shutil.rmtree(place, ignore_errors=True)


def test_what_hinders_a_replica_is_told(tmp_path):
    async def start() -> None:
        replica = Replica(Settings("nowhere", "tiny", Limits()), tmp_path, Share())
        try:
            await replica.start()
        finally:
            await replica.end()

    with pytest.raises(UsageError, match="nowhere"):
        asyncio.run(start())


@pytest.fixture
def dying(tmp_path, monkeypatch) -> Callable[[], Replicas]:
    """Two replicas of which each ends as soon as it begins."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return partial(Replicas, Settings("", "tiny", Limits()), tmp_path, 2)


def test_one_that_ends_before_it_can_be_asked_is_told(dying):
    async def start() -> None:
        replicas = dying()
        try:
            await replicas.start()
        finally:
            await replicas.end()

    with pytest.raises(RunError, match="replica [01] ended with 3 before it could be asked; see above"):
        asyncio.run(start())


def test_one_that_never_lives_is_given_up(dying, monkeypatch, caplog):
    monkeypatch.setattr("vlm.serve.replicas.ATTEMPTS", 2)

    async def live() -> None:
        replicas = dying()
        with suppress(RunError):
            await replicas.start()
        async with replicas.life():
            while replicas._given_up < 2:
                await asyncio.sleep(0.05)
            assert replicas.health() == {"status": "dead", "replicas": 2, "alive": 0}
            with pytest.raises(Refusal, match="no replica lives; start the server again"):
                await replicas.chat(b"{}")
        await replicas.end()

    asyncio.run(asyncio.wait_for(live(), 60))
    assert caplog.text.count("has failed 2 times and is given up") == 2


def test_wrong_usage(folder, capsys):
    assert run(["serve", folder, "--replicas", "0"]) == 2
    assert "--replicas" in capsys.readouterr().err


# Which is asked, and what is told of the rest; the replicas are what the tests say they are

HEAD = b"HTTP/1.1 %s\r\ncontent-type: %s\r\n"
JSON = HEAD % (b"200 OK", b"application/json") + b"content-length: 2\r\n\r\n{}"
FULL = HEAD % (b"429 No", b"application/json") + b"retry-after: 7\r\ncontent-length: 2\r\n\r\n[]"
CUT = HEAD % (b"200 OK", b"application/json") + b"content-length: 9\r\n\r\n{}"
NOTHING = b""
EVENTS = HEAD % (b"200 OK", b"text/event-stream") + b"transfer-encoding: chunked\r\n\r\n"
CUT_EVENTS = EVENTS + b"b\r\ndata: 1\n\nda\r\n"


def with_replies(*replies: bytes | None, busy: tuple[int, ...] = (0, 0)) -> tuple[Any, list[int]]:
    """What comes of one request where the replicas reply so, None: not at all; and which were asked. busy: in flight."""
    asked: list[int] = []

    async def answer() -> Any:
        place = Path(tempfile.mkdtemp(prefix="vlm-"))
        replicas = Replicas(Settings("", "tiny", Limits()), place, len(replies))

        def listener(number: int, reply: bytes) -> Any:
            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                asked.append(number)
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(2)
                writer.write(reply)
                await writer.drain()
                writer.close()

            return asyncio.start_unix_server(serve, place / str(number))

        try:
            for number, reply in enumerate(replies):
                replicas._all[number].alive, replicas._all[number].in_flight = True, busy[number]
                if reply is not None:
                    await listener(number, reply)
            told = await replicas.chat(b"{}")
            if isinstance(told, Stream):
                assert sum(replica.in_flight for replica in replicas._all) == sum(busy) + 1
                events = b"".join([bytes(piece) async for piece in told.body_iterator])
                told._close()
                return events
            return told
        finally:
            assert tuple(replica.in_flight for replica in replicas._all) == busy
            await replicas.end()
            shutil.rmtree(place)

    return asyncio.run(answer()), asked


def test_one_that_is_full_or_gone_is_passed_over():
    told, asked = with_replies(FULL, JSON)
    assert (told.status_code, told.body, asked) == (200, b"{}", [0, 1])
    told, asked = with_replies(None, JSON)
    assert (told.status_code, told.body, asked) == (200, b"{}", [1])


def test_when_all_are_full_the_client_is_told_when_to_come_again():
    told, asked = with_replies(FULL, FULL)
    assert (told.status_code, told.headers["retry-after"], asked) == (429, "7", [0, 1])


@pytest.mark.parametrize("reply", [NOTHING, CUT])
def test_what_kills_a_replica_is_not_given_to_the_next(reply):
    with pytest.raises(Refusal, match="has died") as told:
        with_replies(reply, JSON)
    assert told.value.status == 502 and told.value.content()["error"]["code"] == "replica_lost"


def test_without_any_the_client_is_told_so():
    with pytest.raises(Refusal, match="no replica lives; try again") as told:
        with_replies(None, None)
    assert told.value.status == 503


def test_a_stream_that_breaks_ends_in_an_error_and_in_no_half_event():
    events, asked = with_replies(CUT_EVENTS, JSON)
    first, error, rest = events.split(b"\n\n")
    assert (first, rest, asked) == (b"data: 1", b"", [0])
    assert error.startswith(b"data: ") and b'"replica_lost"' in error


def test_the_least_busy_is_asked_first():
    told, asked = with_replies(FULL, FULL, FULL, busy=(2, 0, 1))
    assert (told.status_code, asked) == (429, [1, 2, 0])
