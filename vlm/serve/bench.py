"""`vlm bench serve`: many clients beside one, the first token under a light load, memory over many requests.

Knows a server only by its address: it is started as a person starts it, in a process of its own, and asked over HTTP. Knows
nothing of how it answers.
"""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from vlm.benchmark import Row, interleaved
from vlm.configuration import VLMConfig
from vlm.errors import RunError
from vlm.model import VLMModel
from vlm.processing import VLMImageProcessor, VLMProcessor, complete_tokenizer
from vlm.saving import save

from . import bench_soak

PIXELS = (224, 224)  # of the pictures that are sent
PATIENCE = 600  # seconds that a reply may take
HEAD = 64  # features of an attention head
LIGHT = 0.1  # of the requests a second that many clients get answered


@dataclass(frozen=True)
class Shape:
    """A model of random weights: layers × features of its towers, features of a feed-forward layer, a side of a picture."""

    text: tuple[int, int]
    inner: int
    vision: tuple[int, int]
    pixels: int

    def __str__(self) -> str:
        layers, width = self.text
        depth, features = self.vision
        return f"random weights: Qwen3 shape {layers} × {width}, ViT {depth} × {features} of {self.pixels} pixels"


MEASURED = Shape((8, 512), 1536, (6, 384), 224)
# Small, for what a server keeps of a request does not depend on how long its model takes.
SOAKED = Shape((2, 64), 128, (2, 64), 64)


def bench_serve(
    model: str | None = None,
    *,
    clients: int = 16,
    requests: int = 64,
    tokens: int = 32,
    rounds: int = 3,
    soak: int = 10_000,
) -> list[Row]:
    """Rows of a server of `model`, a folder; None is a model of random weights. Memory is watched with a small one of these.

    clients: how many ask at once. requests: in each measurement. tokens: of each reply. soak: requests over which memory
    is watched.
    """
    with tempfile.TemporaryDirectory(prefix="vlm-bench-") as place:
        with served(model or random_model(Path(place, "model"), MEASURED), clients) as server:
            measured = Measured(server, tokens)
            measured.at_once(clients, clients)  # the first ones fill caches of every kind
            length = measured.tokens_told / clients  # a trained model may end before it has to
            conditions = f"{model or MEASURED}; a picture and a question each, replies of {length:.3g} tokens"
            rows = _throughput(measured, clients, requests, rounds, conditions)
            rows += _first_token(measured, rows[0].ours, requests, rounds, conditions)
        with served(random_model(Path(place, "small"), SOAKED), clients) as server:
            return rows + _memory(server, clients, soak, str(SOAKED))


def _throughput(measured: Measured, clients: int, requests: int, rounds: int, conditions: str) -> list[Row]:
    together, alone = interleaved(
        lambda: measured.at_once(requests, clients), lambda: measured.at_once(requests, 1), rounds
    )
    return [Row(f"{clients} clients at once, 1 after another", together, alone, "requests/s", conditions, "≥ 4 ×")]


def _first_token(measured: Measured, most: float, requests: int, rounds: int, conditions: str) -> list[Row]:
    """most: requests a second that the server can answer."""
    rate = LIGHT * most
    light, single = interleaved(
        lambda: measured.first_token(requests, rate), lambda: measured.first_token(requests, None), rounds
    )
    told = f"{conditions}; {requests} at random times, {rate:.2g} a second, {LIGHT:.0%} of what is possible; peer: one alone"
    return [Row("first token, 95th percentile", light * 1e3, single * 1e3, "ms", told, "≤ 1.2 × (≥ 0.83)", True)]


def _memory(server: Served, clients: int, soak: int, conditions: str) -> list[Row]:
    """After a tenth of the requests everything has been used once; what comes later may add nothing."""
    marks = (0, soak // 10, soak // 2, soak)
    told = []
    for before, after in itertools.pairwise(marks):
        bench_soak.send(server.port, range(before, after), clients)
        while server.metric("vlm_replies_running"):
            time.sleep(0.1)  # who hung up may still hold a row
        told.append((server.metric("vlm_cache_bytes"), server.own_bytes()))
    early, half, late = told
    shown = (
        f"{conditions}; requests of every kind and length, {clients} clients; after {marks[3]} of them, "
        f"{{:.4g}} MiB after {marks[2]}; peer: after {marks[1]}"
    )
    names = (("memory of the caches", "unchanged"), ("memory of the process", "≤ 1.02 × (≥ 0.98)"))
    return [
        Row(name, last / 2**20, first / 2**20, "MiB", shown.format(between / 2**20), target, True)
        for (name, target), first, between, last in zip(names, early, half, late, strict=True)
    ]


class Served:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def metric(self, name: str) -> float:
        """What /metrics tells under a name."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def own_bytes(self) -> float:
        """Memory that the process has written, from Linux's /proc: pages of files come and go as the system sees fit."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


@contextmanager
def served(folder: str, rows: int) -> Iterator[Served]:
    """`vlm serve` for the time of a block. Raises RunError where it does not start."""
    command = [sys.executable, "-m", "vlm.cli", "serve", folder, "--port", "0", "--rows", str(rows), "--name", "bench"]
    command += ["--wait", str(PATIENCE)]  # a machine that is busy with other things is slow, and nothing worse
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RunError(f"the server of {folder} did not start; see above")
        yield Served(process, int(line.rsplit(":", 1)[1].split("/")[0]))
    finally:
        process.terminate()
        process.wait()


class Measured:
    """Requests that a server has not seen, and how long it took for them."""

    def __init__(self, server: Served, tokens: int) -> None:
        self.server, self.tokens = server, tokens
        self._chance = random.Random(0)
        self._sent = self.tokens_told = 0

    def at_once(self, requests: int, clients: int) -> float:
        """Requests answered a second, when so many clients send so many of them together."""
        bodies = [self._body(stream=False) for _ in range(requests)]
        shares = [bodies[start::clients] for start in range(clients)]
        with ThreadPoolExecutor(clients) as pool:
            begun = time.perf_counter()
            self.tokens_told += sum(pool.map(self._client, shares))
            return requests / (time.perf_counter() - begun)

    def first_token(self, requests: int, rate: float | None) -> float:
        """The 95th percentile of seconds to the first chunk with text; None is one request after another."""
        bodies = [self._body(stream=True) for _ in range(requests)]
        if rate is None:
            return _p95([self._first(body) for body in bodies])
        with ThreadPoolExecutor(requests) as pool:
            asked = []
            for body in bodies:
                asked.append(pool.submit(self._first, body))
                time.sleep(self._chance.expovariate(rate))
            return _p95([one.result() for one in asked])

    def _client(self, bodies: Sequence[bytes]) -> int:
        connection = self._connection()
        told = 0
        for body in bodies:
            answer = json.loads(_post(connection, body).read())
            told += answer["usage"]["completion_tokens"]
        connection.close()
        return told

    def _first(self, body: bytes) -> float:
        """Until the server tells that a token is there; random bytes may be no text yet."""
        connection = self._connection()
        begun = time.perf_counter()
        response = _post(connection, body)
        response.readline()
        took = time.perf_counter() - begun
        response.read()
        connection.close()
        return took

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=PATIENCE)

    def _body(self, stream: bool) -> bytes:
        """A picture and a question that nobody has asked."""
        self._sent += 1
        file = io.BytesIO()
        pixels = np.random.default_rng(self._sent).integers(0, 256, (14, 14, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(PIXELS).save(file, "JPEG")
        url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        text = f"{self._sent}: what do you see in this picture, and where is it?"
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": text},
        ]
        told = {"messages": [{"role": "user", "content": content}], "temperature": 0, "stream": stream}
        return json.dumps({**told, "max_tokens": self.tokens}).encode()


def _post(connection: http.client.HTTPConnection, body: bytes) -> http.client.HTTPResponse:
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RunError(f"the server answered {response.status}: {response.read().decode()[:200]}")
    return response


def _p95(values: Sequence[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1]


def random_model(folder: Path, shape: Shape) -> str:
    """Save a model of random weights whose words are bytes; gives the folder."""
    layers, width = shape.text
    depth, features = shape.vision
    picture = (shape.pixels, shape.pixels)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE({token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = complete_tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    )
    processor = VLMProcessor(VLMImageProcessor(input_size=(3, *picture)), tokenizer)
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=shape.inner,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        num_key_value_heads=max(1, width // HEAD // 2),
        head_dim=HEAD,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    vision = {"patch_size": 16, "embed_dim": features, "depth": depth, "num_heads": features // HEAD}
    config = VLMConfig(
        vision={"name": "timm:vit_small_patch16_224", "image_size": picture, "kwargs": vision},
        text_config=text,
        adapter={"gate_init": 0.5},
        embedding_dim=256,
        image_token_id=processor.image_token_id,
        mask_token_id=processor.mask_token_id,
    )
    save(VLMModel(config), processor, folder)
    return str(folder)
