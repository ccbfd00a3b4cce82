"""The `vlm bench` commands. Know their options; nothing of what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vlm.benchmark import Row, table, write_rows
from vlm.cli_data import QUIET

Rounds = Annotated[int, typer.Option(help="how often each is measured, in turns")]
Out = Annotated[Path | None, typer.Option(help="write the rows to this JSON file too")]

bench = typer.Typer(help="Speeds beside those of peers, in one run, as ratios.", no_args_is_help=True, **QUIET)


@bench.command("data")
def bench_data_command(
    against: Annotated[
        str | None, typer.Option(help="copy, pil, webdataset (default: these), memory, dedup or swapped")
    ] = None,
    model: Annotated[str | None, typer.Option(help="swapped: the model that judges pairs")] = None,
    data: Annotated[str | None, typer.Option(help="swapped: shards with captions")] = None,
    samples: Annotated[int, typer.Option(help="pictures to convert")] = 5000,
    rounds: Rounds = 3,
    out: Out = None,
) -> None:
    """Converting, reading, cleaning: speed, memory and what is found.

    Example: vlm bench data --against webdataset --out bench.json
    """
    from vlm.data_tools.bench import bench_data

    _tell(bench_data(against, samples=samples, rounds=rounds, model=model, data=data), out)


@bench.command("score")
def bench_score_command(
    questions: Annotated[int, typer.Option(help="VQA questions, of ten answers each")] = 200_000,
    pictures: Annotated[int, typer.Option(help="captions, beside five references each")] = 40_000,
    out: Out = None,
) -> None:
    """Scoring of predictions: seconds.

    Example: vlm bench score --out bench.json
    """
    from vlm.eval.bench import bench_score

    _tell(bench_score(questions, pictures), out)


@bench.command("decode")
def bench_decode_command(
    against: Annotated[
        str | None, typer.Option(help="hf-idefics, hf-generate, fp32, bandwidth (default: these) or llama.cpp")
    ] = None,
    rounds: Rounds = 3,
    out: Out = None,
) -> None:
    """Decoding: tokens a second.

    Example: vlm bench decode --against hf-idefics --out bench.json
    """
    from vlm.generation.bench import bench_decode

    _tell(bench_decode(against, rounds), out)


@bench.command("train")
def bench_train_command(
    against: Annotated[
        str | None, typer.Option(help="open_clip, idefics, padded (default: these); gradcache, long or zero: memory")
    ] = None,
    rounds: Rounds = 3,
    out: Out = None,
) -> None:
    """Training steps: speed beside peers, and memory.

    Example: vlm bench train --against open_clip --out bench.json
    """
    from vlm.train.bench import bench_train

    _tell(bench_train(against, rounds=rounds), out)


@bench.command("kernels")
def bench_kernels_command(
    rounds: Annotated[int, typer.Option(help="how often each is measured, in turns")] = 15,
    out: Out = None,
) -> None:
    """Every candidate for a packed or quantized linear layer on this machine, beside PyTorch's own.

    Example: vlm bench kernels --out bench.json
    """
    from vlm.quantization_bench import bench_kernels

    _tell(bench_kernels(rounds), out)


@bench.command("serve")
def bench_serve_command(
    model: Annotated[str | None, typer.Option(help="a model folder; default: one of random weights")] = None,
    clients: Annotated[int, typer.Option(help="how many ask at once", min=1)] = 16,
    requests: Annotated[int, typer.Option(help="in each measurement", min=2)] = 64,
    tokens: Annotated[int, typer.Option(help="of each reply", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="how often each is measured, in turns", min=1)] = 3,
    soak: Annotated[int, typer.Option(help="requests over which memory is watched", min=10)] = 10_000,
    out: Out = None,
) -> None:
    """Many clients beside one, the first token under a light load, memory over many requests.

    Example: vlm bench serve --model runs/demo/model --out bench.json
    """
    from vlm.serve.bench import bench_serve

    _tell(bench_serve(model, clients=clients, requests=requests, tokens=tokens, rounds=rounds, soak=soak), out)


@bench.command("eval")
def bench_eval_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="folder or hub id of the model that answers")],
    data: Annotated[Path, typer.Option(help="shards with questions about pictures, of one split")],
    batch: Annotated[int, typer.Option(help="questions at once")] = 32,
    limit: Annotated[int, typer.Option(help="only the first so many samples")] = 64,
    rounds: Rounds = 3,
    out: Out = None,
) -> None:
    """What an evaluation costs beside the decoding itself: questions a second.

    Example: vlm bench eval runs/demo/model --data runs/scenes/test --out bench.json
    """
    from vlm.eval.bench import bench_eval

    _tell(bench_eval(model, data, batch, limit, rounds), out)


def _tell(rows: Sequence[Row], out: Path | None) -> None:
    import rich

    rich.print(table(rows))
    if out is not None:
        write_rows(rows, out)
