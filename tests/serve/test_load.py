"""More than the server can do at once, clients that go away, engines that fail, and the end: what each is told."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from waiting import eventually

PATH = "/v1/chat/completions"
SECRET = "what a client sent"


class Held:
    """An engine that stands still between two steps until it is let go; remembers how many rows were in use, and its steps."""

    def __init__(self, running: Any) -> None:
        engine = running.service.worker._engine
        self.go, self.most, self.steps, step = threading.Event(), 0, 0, engine.step

        def held() -> Any:
            self.go.wait(30)
            self.steps += 1
            changed = step()
            self.most = max(self.most, engine.running)
            return changed

        engine.step = held


def body(tokens: int = 4, **more: Any) -> bytes:
    told = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": tokens, "temperature": 0, **more}
    return json.dumps(told).encode()


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Begins it; the result is waited for when it is called."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()

    def result() -> Any:
        thread.join(30)
        return results[0]

    return result


def hung_up(running: Any, **more: Any) -> http.client.HTTPConnection:
    """A request that is sent, and its connection, to be closed."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    connection.request("POST", PATH, body(200, **more), {"content-type": "application/json"})
    return connection


def test_the_batch_follows_the_load(serving):
    with serving(rows=3, queue=20) as running:
        held = Held(running)
        answers = [in_thread(lambda: running.send(PATH, body())) for _ in range(8)]
        eventually(lambda: len(running.service.worker._places) == 8)
        held.go.set()
        assert {answer().status for answer in answers} == {200}
        assert held.most == 3
        running.healthy()


def test_a_full_queue_says_when_to_come_again(serving):
    with serving(rows=1, queue=2) as running:
        held = Held(running)
        answers = [in_thread(lambda: running.send(PATH, body())) for _ in range(3)]
        eventually(lambda: len(running.service.worker._places) == 3)
        refused = running.send(PATH, body())
        assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.error["code"] == "queue_full" and refused.error["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            running.client.embeddings.create(model="tiny", input="Hi")
        assert running.send("/health").status == 200
        eventually(lambda: running.metric("vlm_replies_waiting") == 2 or not held.go.wait(0))
        held.go.set()
        assert {answer().status for answer in answers} == {200}
        running.healthy()


def test_replies_of_one_request_count_each(serving):
    with serving(rows=1, queue=2, choices=8) as running:
        assert running.send(PATH, body(n=3)).status == 200
        refused = running.send(PATH, body(n=4))
        assert refused.status == 400 and "3" in refused.error["message"]
        running.healthy()


def test_a_deadline_bounds_waiting(serving):
    with serving(rows=1, queue=4, wait=0.3) as running:
        held = Held(running)
        first = in_thread(lambda: running.send(PATH, body(200)))
        eventually(lambda: running.service.worker._active)
        late = [in_thread(lambda more=more: running.send(PATH, body(**more))) for more in ({}, {"stream": True})]
        eventually(lambda: len(running.service.worker._waiting) == 2)
        time.sleep(0.35)
        held.go.set()
        for answer in late:
            assert answer().status == 503 and int(answer().headers["retry-after"]) >= 1
            assert answer().error["code"] == "queue_timeout" and "0.3" in answer().error["message"]
        assert first().status == 200  # what runs is not cut short
        running.healthy()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_row(serving, stream):
    with serving(rows=1, queue=4) as running:
        held = Held(running)
        gone = hung_up(running, stream=stream)
        eventually(lambda: running.service.worker._active)
        waiting = hung_up(running, stream=stream)
        eventually(lambda: len(running.service.worker._waiting) == 1)
        waiting.close()
        eventually(lambda: not running.service.worker._waiting)
        gone.close()
        eventually(lambda: not running.service.worker._places)
        held.go.set()
        assert running.send(PATH, body()).status == 200
        eventually(lambda: running.metric("vlm_requests_total", route=PATH, status="499") == 2)
        assert running.metric("vlm_tokens_total", kind="new") < 20
        assert held.steps < 20  # of 200 that the one who went had asked for
        running.healthy()


def test_a_client_may_go_in_the_middle_of_a_stream(serving):
    with serving(rows=1, queue=4) as running:
        stream = running.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], stream=True, max_tokens=200
        )
        next(iter(stream))
        stream.close()
        eventually(lambda: not running.service.worker._places)
        running.healthy()


def test_the_end_answers_what_was_asked_and_refuses_what_is_new(serving):
    with serving(rows=1, queue=4) as running:
        held = Held(running)
        answers = [
            in_thread(lambda: running.send(PATH, body())),
            in_thread(lambda: running.send(PATH, body(stream=True))),
        ]
        eventually(lambda: len(running.service.worker._places) == 2)
        asyncio.run_coroutine_threadsafe(running.server.end(), running.loop)
        eventually(lambda: running.service.worker.draining)
        refused = running.send(PATH, body())
        assert refused.status == 503 and refused.error["code"] == "shutting_down"
        assert running.send("/health").status == 503
        held.go.set()
        assert [answer().status for answer in answers] == [200, 200]
        assert answers[1]().body.endswith(b"data: [DONE]\n\n")
        eventually(lambda: not running.service.worker._thread.is_alive())


def test_a_dead_engine_is_told_of(serving, caplog):
    with serving(rows=1, queue=4) as running:
        held, engine = Held(running), running.service.worker._engine
        stream = in_thread(lambda: running.send(PATH, body(50, stream=True)))
        eventually(lambda: running.service.worker._active)
        waiting = in_thread(lambda: running.send(PATH, body()))
        eventually(lambda: len(running.service.worker._waiting) == 1)

        def fail() -> None:
            raise RuntimeError("no more")

        engine.step = fail
        held.go.set()
        assert b'"code": "engine_dead"' in stream().body and b"[DONE]" not in stream().body
        assert waiting().status == 500 and waiting().error["code"] == "engine_dead"
        health = running.send("/health")
        assert health.status == 503 and health.json == {"status": "dead"}
        assert running.send(PATH, body()).status == 500
        with pytest.raises(openai.InternalServerError):
            running.client.embeddings.create(model="tiny", input="Hi")
        assert "no more" in caplog.text
        assert not running.service.worker._places


def test_a_fault_of_ours_is_an_error_and_no_end(serving, monkeypatch, caplog):
    with serving() as running:

        def fail(*arguments: Any) -> None:
            raise ValueError(SECRET)

        monkeypatch.setattr(running.service._prompts, "chat", fail)
        monkeypatch.setattr(running.service._embedder, "embed_text", fail)
        for answer in (running.send(PATH, body()), running.post("/v1/embeddings", {"input": "Hi"})):
            assert answer.status == 500 and answer.error["type"] == "server_error"
            assert SECRET not in answer.error["message"]
        assert "ValueError" in caplog.text and SECRET not in caplog.text
        monkeypatch.undo()
        running.healthy()


def test_nothing_is_left_of_many_requests(serving):
    with serving(rows=2, queue=8) as running:
        for number in range(150):
            more = {"stream": number % 2 == 0, "n": 1 + number % 3}
            assert running.send(PATH, body(2, **more)).status == 200
            if number == 20:
                bytes_before = running.metric("vlm_cache_bytes")
        assert running.metric("vlm_cache_bytes") == bytes_before
        worker = running.service.worker
        eventually(lambda: not (worker._places or worker._waiting or worker._closed or worker._active or worker._told))
        running.healthy()
