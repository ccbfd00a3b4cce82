"""The routes of the server: what each is asked, in which order the parts are called, what it answers.

Knows FastAPI. Whatever takes time is done elsewhere: reading and preparing in a pool of threads, the model's work in the
worker's. So /health is answered whatever else goes on.
"""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response, StreamingResponse
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from vlm.api import VLM
from vlm.machine import usable_cores

from .gate import Gate
from .limits import Limits
from .metrics import CONTENT_TYPE, Metrics
from .prompts import Prompts
from .refusals import Refusal
from .replies import DONE, Form, Trimmed, Usage, embeddings, event, model_card
from .requests import Asked, ChatRequest, CompletionRequest, EmbeddingRequest, Sampling, Strict, read_request
from .worker import Job, Progress, Worker

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
BODIES: dict[str, type[Strict]] = {CHAT: ChatRequest, COMPLETIONS: CompletionRequest, EMBEDDINGS: EmbeddingRequest}
MARKS = 10_000  # commas and brackets of a body, beyond those of its texts
EMBEDDED_AT_ONCE = 8  # between two steps of the engine
Result = TypeVar("Result")


class Answering(Protocol):
    """What the routes ask. name: what clients call the model. created: since when, in seconds of Unix time."""

    name: str
    created: int
    limits: Limits
    metrics: Metrics

    async def chat(self, body: bytes) -> Response:
        """Answer /v1/chat/completions. Raises Refusal, as the next two."""

    async def complete(self, body: bytes) -> Response:
        """Answer /v1/completions."""

    async def embed(self, body: bytes) -> Response:
        """Answer /v1/embeddings."""

    def health(self) -> dict[str, Any]:
        """`{"status": "ok"}`, or another word where nothing can be asked, and what else is known."""

    async def measured(self) -> bytes:
        """All metrics in Prometheus's text format."""

    def life(self) -> AbstractAsyncContextManager[None]:
        """What goes on while it answers."""

    async def drain(self) -> None:
        """Take nothing new, and return when all that was taken is answered."""


class Service:
    """One model and everything that answers for it: `Answering`. name: what clients call the model."""

    def __init__(self, vlm: VLM, name: str, limits: Limits, *, length: int | None = None, **engine: Any) -> None:
        self.name, self.limits = name, limits
        self.created = int(time.time())
        self.metrics = Metrics()
        made = vlm.engine(limits.rows, length, **engine)
        self.worker = Worker(made, limits, self.metrics)
        self._prompts = Prompts(vlm, limits, made.most_tokens)
        # A tokenizer that pads may not be used by two threads, and the engine's thread pads what it embeds.
        self._embedder = copy.copy(vlm)
        self._embedder.processor = copy.deepcopy(vlm.processor)
        self._pool = ThreadPoolExecutor(max(2, usable_cores()), "vlm-prepare")

    @property
    def lost(self) -> str | None:
        """What became of a process that holds the model with this one and has died; None while all is well."""
        return self._embedder.lost

    async def _off_loop(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Do `work` in the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    async def chat(self, body: bytes) -> Response:
        """Answer /v1/chat/completions. Raises Refusal, as the next two."""
        asked = await self._read(body, ChatRequest)
        return await self._replies(asked, True, partial(self._prompts.chat, asked), asked.n or 1)

    async def complete(self, body: bytes) -> Response:
        """Answer /v1/completions."""
        asked = await self._read(body, CompletionRequest)
        prompts = len(asked.prompt) if isinstance(asked.prompt, list) else 1
        return await self._replies(asked, False, partial(self._prompts.completion, asked), (asked.n or 1) * prompts)

    async def _read(self, body: bytes, kind: type[Asked]) -> Asked:
        most_marks = MARKS + self._prompts.characters
        asked = await self._off_loop(read_request, body, kind, most_marks)
        if asked.model is not None and asked.model != self.name:
            raise Refusal(404, f"this server has the model {self.name!r} alone", param="model", code="model_not_found")
        return asked

    async def _replies(self, asked: Sampling, chat: bool, prepare: Callable[[], list[Job]], count: int) -> Response:
        """`count` replies to what `prepare` makes of the request, whole or as a stream."""
        if (asked.n or 1) > self.limits.choices:
            told = f"n: {asked.n} replies, the limit is {self.limits.choices}; ask for less"
            raise Refusal(400, told, param="n", code="invalid_value")
        if count > (most := self.limits.rows + self.limits.queue):
            raise Refusal(
                400, f"{count} replies in all, the limit is {most}; ask for less at once", code="invalid_value"
            )
        places = self.worker.open(count)
        streams = False
        try:
            jobs = await self._off_loop(prepare)
            places.start(jobs)
            progress, form = places.progress(), Form(self.name, chat)
            if not asked.stream:
                return await _whole(form, jobs, progress)
            # The first of it is waited for, so that a deadline or a dead engine is still told by the status.
            first = await anext(progress)
            with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
            stream = Stream(_chunks(form, jobs, _with_first(first, progress), with_usage), places.close)
            streams = True
            return stream
        finally:
            if not streams:
                places.close()

    async def embed(self, body: bytes) -> Response:
        """Answer /v1/embeddings."""
        asked = await self._read(body, EmbeddingRequest)
        places = self.worker.open(1)
        try:
            items, tokens = await self._off_loop(self._prompts.embedding, asked)
            vectors = []
            for start in range(0, len(items), EMBEDDED_AT_ONCE):
                part = items[start : start + EMBEDDED_AT_ONCE]
                vectors.append(await places.run(partial(self._embed, part)))
        finally:
            places.close()
        told = embeddings(self.name, torch.cat(vectors).numpy(), tokens, asked.encoding_format == "base64")
        return await self._off_loop(_json, told)

    def _embed(self, items: Sequence[str | bytes]) -> torch.Tensor:
        """Texts and encoded pictures -> (N, D)."""
        rows = torch.empty(len(items), self._embedder.model.config.embedding_dim)
        texts = {place: item for place, item in enumerate(items) if isinstance(item, str)}
        pictures = {place: item for place, item in enumerate(items) if isinstance(item, bytes)}
        if texts:
            rows[list(texts)] = self._embedder.embed_text(list(texts.values()))
        if pictures:
            rows[list(pictures)] = self._embedder.embed_image(list(pictures.values()))
        return rows

    def health(self) -> dict[str, Any]:
        """Whether the engine lives and takes requests."""
        dead = self.worker.dead or self.lost is not None
        return {"status": "dead" if dead else "draining" if self.worker.draining else "ok"}

    async def measured(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return self.metrics.text()

    @asynccontextmanager
    async def life(self) -> AsyncIterator[None]:
        """The engine works, and its threads are let go of at the end."""
        self.worker.start()
        yield
        self.worker.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def drain(self) -> None:
        """Take nothing new, and return when all that was taken is answered."""
        await self.worker.drain()

    def give_up(self) -> None:
        """Tell all who wait that it is dead."""
        self.worker.give_up()


def make_app(service: Answering, api_key: str | None = None) -> FastAPI:
    """The application of what answers."""
    app = FastAPI(title="vlm serve", docs_url=None, redoc_url=None, lifespan=lambda _: service.life())
    app.add_exception_handler(Refusal, _tell)
    app.add_exception_handler(HTTPException, _tell_http)

    @app.post(CHAT, openapi_extra=_body(ChatRequest))
    async def chat(request: Request) -> Response:
        return await _unless_gone(request, service.chat)

    @app.post(COMPLETIONS, openapi_extra=_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await _unless_gone(request, service.complete)

    @app.post(EMBEDDINGS, openapi_extra=_body(EmbeddingRequest))
    async def embed(request: Request) -> Response:
        return await _unless_gone(request, service.embed)

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [model_card(service.name, service.created)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != service.name:
            raise Refusal(
                404, f"this server has the model {service.name!r} alone", param="model", code="model_not_found"
            )
        return _json(model_card(service.name, service.created))

    @app.get("/health")
    async def health() -> Response:
        told = service.health()
        return _json(told, 200 if told["status"] == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await service.measured(), media_type=CONTENT_TYPE)

    routes = frozenset(route.path for route in app.routes if hasattr(route, "path"))
    app.add_middleware(
        Gate, metrics=service.metrics, body_bytes=service.limits.body_bytes, api_key=api_key, routes=routes
    )
    app.openapi = partial(_openapi, app)  # type: ignore[method-assign]
    return app


class Stream(StreamingResponse):
    """Server-sent events. `close` is called whatever becomes of the client, even before the first of them."""

    def __init__(self, chunks: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._close = close

    async def __call__(self, *arguments: Any) -> None:
        try:
            await super().__call__(*arguments)
        finally:
            self._close()


async def _whole(form: Form, jobs: Sequence[Job], progress: AsyncIterator[tuple[int, Progress]]) -> Response:
    texts, last = [""] * len(jobs), {}
    async for index, told in progress:
        texts[index] += told.text
        last[index] = told
    said = [text.strip() for text in texts] if form.chat else texts
    reasons = [last[index].finish_reason or "" for index in range(len(jobs))]
    return _json(form.whole(said, reasons, _usage(jobs, last)))


async def _chunks(
    form: Form, jobs: Sequence[Job], progress: AsyncIterator[tuple[int, Progress]], with_usage: bool
) -> AsyncIterator[bytes]:
    last: dict[int, Progress] = {}
    trimmed = [Trimmed() for _ in jobs]
    if form.chat:
        for index in range(len(jobs)):
            yield form.role(index)
    try:
        async for index, told in progress:
            last[index] = told
            if text := trimmed[index].add(told.text) if form.chat else told.text:
                yield form.piece(index, text)
            if told.finish_reason is not None:
                yield form.finish(index, told.finish_reason)
    except Refusal as refusal:
        yield event(refusal.content())
        return
    if with_usage:
        yield form.usage(_usage(jobs, last))
    yield DONE


async def _with_first(first: Result, rest: AsyncIterator[Result]) -> AsyncIterator[Result]:
    yield first
    async for one in rest:
        yield one


def _usage(jobs: Sequence[Job], last: Mapping[int, Progress]) -> Usage:
    """A prompt counts once, however many replies are made to it, and what the first of them found read."""
    prompts = {id(prompt): (len(prompt.ids), last[index].reused) for index, (prompt, _) in reversed([*enumerate(jobs)])}
    return Usage(
        prompt=sum(tokens for tokens, _ in prompts.values()),
        cached=sum(reused for _, reused in prompts.values()),
        new=sum(told.tokens for told in last.values()),
    )


async def _unless_gone(request: Request, answer: Callable[[bytes], Awaitable[Response]]) -> Response:
    """What is answered to the body; the work on it is cancelled when the client hangs up."""
    answering = asyncio.ensure_future(answer(await request.body()))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
        raise Refusal(499, "the client hung up")
    finally:
        gone.cancel()
        answering.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(content).encode("ascii"), status, media_type="application/json")


def _tell(request: Request, refusal: Any) -> Response:
    return Response(refusal.body(), refusal.status, refusal.headers())


def _tell_http(request: Request, error: Any) -> Response:
    told = {404: "there is no such route; see /openapi.json", 405: "the route has no such method; see /openapi.json"}
    return _tell(request, Refusal(error.status_code, told.get(error.status_code, str(error.detail))))


def _body(kind: type[Strict]) -> dict[str, Any]:
    """Told to the schema and not to FastAPI, which would read the body on the event loop and quote what is wrong with it."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    told = get_openapi(title=app.title, version=app.version, routes=app.routes)
    kinds = [(kind, "validation") for kind in BODIES.values()]
    _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    told.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    return told
