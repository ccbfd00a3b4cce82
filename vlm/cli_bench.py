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


@bench.command("train")
def bench_train_command(
    against: Annotated[str, typer.Option(help="long: peak memory of 16 384 tokens beside 4 096")] = "long",
    out: Annotated[Path | None, typer.Option(help="write the rows to this JSON file too")] = None,
) -> None:
    """Training: memory.

    Example: vlm bench train --against long
    """
    import rich

    from vlm.benchmark import table, write_rows
    from vlm.errors import UsageError
    from vlm.train import bench_memory

    benches = {"long": bench_memory.rows}
    if against not in benches:
        raise UsageError(f"vlm bench train knows no {against!r}; choose {', '.join(benches)}")
    rows = benches[against]()
    rich.print(table(rows))
    if out is not None:
        write_rows(rows, out)
