"""The `vlm bench` commands. Know their options; nothing of what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm.cli_data import QUIET

bench = typer.Typer(help="Speeds beside those of peers, in one run, as ratios.", no_args_is_help=True, **QUIET)


@bench.command("data")
def bench_data_command(
    against: Annotated[
        str | None, typer.Option(help="copy, pil, webdataset (default: these), memory, dedup or swapped")
    ] = None,
    model: Annotated[str | None, typer.Option(help="swapped: the model that judges pairs")] = None,
    data: Annotated[str | None, typer.Option(help="swapped: shards with captions")] = None,
    samples: Annotated[int, typer.Option(help="pictures to convert")] = 5000,
    rounds: Annotated[int, typer.Option(help="how often each is measured, in turns")] = 3,
    out: Annotated[Path | None, typer.Option(help="write the rows to this JSON file too")] = None,
) -> None:
    """Converting, reading, cleaning: speed, memory and what is found.

    Example: vlm bench data --against webdataset --out bench.json
    """
    import rich

    from vlm.benchmark import table, write_rows
    from vlm.data_tools.bench import bench_data

    rows = bench_data(against, samples=samples, rounds=rounds, model=model, data=data)
    rich.print(table(rows))
    if out is not None:
        write_rows(rows, out)


@bench.command("score")
def bench_score_command(
    questions: Annotated[int, typer.Option(help="VQA questions, of ten answers each")] = 200_000,
    pictures: Annotated[int, typer.Option(help="captions, beside five references each")] = 40_000,
    out: Annotated[Path | None, typer.Option(help="write the rows to this JSON file too")] = None,
) -> None:
    """Scoring of predictions: seconds.

    Example: vlm bench score --out bench.json
    """
    import rich

    from vlm.benchmark import table, write_rows
    from vlm.eval.bench import bench_score

    rows = bench_score(questions, pictures)
    rich.print(table(rows))
    if out is not None:
        write_rows(rows, out)


@bench.command("eval")
def bench_eval_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="folder or hub id of the model that answers")],
    data: Annotated[Path, typer.Option(help="shards with questions about pictures, of one split")],
    batch: Annotated[int, typer.Option(help="questions at once")] = 32,
    limit: Annotated[int, typer.Option(help="only the first so many samples")] = 64,
    rounds: Annotated[int, typer.Option(help="how often each is measured, in turns")] = 3,
    out: Annotated[Path | None, typer.Option(help="write the rows to this JSON file too")] = None,
) -> None:
    """What an evaluation costs beside the decoding itself: questions a second.

    Example: vlm bench eval runs/demo/model --data runs/scenes/test --out bench.json
    """
    import rich

    from vlm.benchmark import table, write_rows
    from vlm.eval.bench import bench_eval

    rows = bench_eval(model, data, batch, limit, rounds)
    rich.print(table(rows))
    if out is not None:
        write_rows(rows, out)
