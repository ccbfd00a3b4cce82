"""A running server: uvicorn in a thread, with a tiny model behind it, and clients that ask it over a real socket."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import torch
from bombs import bombs
from PIL import Image

import vlm
from vlm.saving import save
from vlm.serve.app import Service
from vlm.serve.limits import Limits
from vlm.serve.server import Server, bind

MODEL = "tiny"


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error; only if it has OpenAI's form."""
        assert self.headers["content-type"] == "application/json", self.body
        assert set(self.json) == {"error"} and set(self.json["error"]) == {"message", "type", "param", "code"}
        assert isinstance(self.json["error"]["message"], str) and self.json["error"]["message"]
        return self.json["error"]


class Running:
    """A server under way, and how it is asked."""

    def __init__(self, service: Service, server: Server, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self.service, self.server, self.port, self.loop = service, server, port, loop
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)

    def send(self, path: str, body: bytes | None = None, method: str = "", **headers: str) -> Answer:
        """One request, as it stands."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            sent = {
                "content-type": "application/json",
                **{name.replace("_", "-"): text for name, text in headers.items()},
            }
            connection.request(method or ("GET" if body is None else "POST"), path, body, sent)
            response = connection.getresponse()
            return Answer(
                response.status, {name.lower(): text for name, text in response.getheaders()}, response.read()
            )
        finally:
            connection.close()

    def post(self, path: str, content: Any) -> Answer:
        """One request in JSON."""
        return self.send(path, json.dumps(content).encode())

    def chat(self, content: Any, **more: Any) -> Answer:
        """One turn of a user."""
        told = {"messages": [{"role": "user", "content": content}], "max_tokens": 2, "temperature": 0, **more}
        return self.post("/v1/chat/completions", told)

    def metric(self, name: str, **labels: str) -> float:
        """The number that /metrics tells, 0 where it tells none."""
        shown = name + ("{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else "")
        lines = self.send("/metrics").body.decode().splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(shown + " ")), 0.0)

    def healthy(self) -> None:
        """Fails unless the server is as it was: nothing is left in it, and it answers."""
        assert self.send("/health").json == {"status": "ok"}
        assert self.chat("Still there?").status == 200
        assert not self.service.worker._places
        assert self.metric("vlm_replies_running") == self.metric("vlm_replies_waiting") == 0


@contextmanager
def running(
    model: vlm.VLM, *, api_key: str | None = None, length: int | None = None, **limits: Any
) -> Iterator[Running]:
    """A server for the time of a block."""
    service = Service(model, MODEL, Limits(**limits), length=length)
    server, listening, begun = Server(service, api_key), bind("127.0.0.1", 0), threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def live() -> None:
        loops.append(asyncio.get_running_loop())
        serving = asyncio.ensure_future(server._serve([listening]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        begun.set()
        await serving

    thread = threading.Thread(target=asyncio.run, args=(live(),), name="server")
    thread.start()
    try:
        assert begun.wait(30) and server.started
        yield Running(service, server, listening.getsockname()[1], loops[0])
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def model(make_model, make_processor) -> vlm.VLM:
    """A tiny model with open gates, whose likeliest tokens are printable."""
    tiny, processor = make_model(gate_init=1.0), make_processor()
    printable = [id_ for token, id_ in processor.tokenizer.get_vocab().items() if len(token) == 1 and token.isascii()]
    weight = tiny.language_model.get_output_embeddings().weight
    others = [id_ for id_ in range(len(weight)) if id_ not in printable]
    with torch.no_grad():
        weight[others] = 0.0
    return vlm.VLM(tiny, processor)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, model) -> str:
    """The tiny model, saved."""
    place = tmp_path_factory.mktemp("served") / "model"
    save(model.model, model.processor, place)
    return str(place)


@pytest.fixture(scope="session")
def serving(model):
    """`running`, with the tiny model."""

    def start(**options: Any):
        return running(options.pop("model", model), **options)

    return start


@pytest.fixture(scope="module")
def server(serving) -> Iterator[Running]:
    """A server with small limits."""
    with serving(rows=4, queue=16, body_bytes=2_000_000, images=3, pixels=100_000, choices=3, inputs=20) as started:
        yield started


def url_of(picture: Image.Image | bytes, kind: str = "PNG") -> str:
    """A picture, or an encoded one, as a data URL."""
    if isinstance(picture, Image.Image):
        file = io.BytesIO()
        picture.save(file, kind)
        picture = file.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(picture).decode()}"


@pytest.fixture(scope="session")
def image_part():
    """A picture as a part of a message."""

    def part(picture: Image.Image | bytes | str, kind: str = "PNG") -> dict[str, Any]:
        url = picture if isinstance(picture, str) else url_of(picture, kind)
        return {"type": "image_url", "image_url": {"url": url}}

    return part


@pytest.fixture
def unharmed(server, caplog) -> Iterator[None]:
    """Whatever a test did to the server, it is healthy afterwards, and no failure was logged."""
    yield
    server.healthy()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


@pytest.fixture(scope="module")
def made_bombs(tmp_path_factory) -> dict[str, bytes]:
    """Made once, and before memory is measured."""
    return bombs()
