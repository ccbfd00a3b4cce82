"""The `vlm data` commands: arguments into one call of a program of `data_tools`.

Knows the commands' options. Knows nothing of how anything is done; every program is imported when it is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlm.errors import RunError, UsageError

QUIET: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}
data = typer.Typer(help="Make, convert, clean and inspect shards.", no_args_is_help=True, **QUIET)

Source = Annotated[str, typer.Argument(metavar="IN", help="folder of shards with index.json; a path or an address")]
Out = Annotated[str, typer.Argument(metavar="OUT", help="folder of shards to make; a path or an address, s3://…")]
EngineName = Annotated[str, typer.Option(help="local: processes of this machine; ray: a Ray cluster")]
Processes = Annotated[int | None, typer.Option(help="so many processes; default: one per usable core")]


@data.command("scenes")
def data_scenes(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to make: train, val, test, test-compositional")],
    level: Annotated[str, typer.Option(help="easy (64 pixels, for CPUs) or hard (224 pixels, for GPUs)")] = "easy",
    train: Annotated[int, typer.Option(help="pictures to learn from")] = 20000,
    val: Annotated[int, typer.Option(help="pictures for validation")] = 500,
    test: Annotated[int, typer.Option(help="pictures held out, and as many with unseen pairs")] = 500,
    seed: Annotated[int, typer.Option(help="other seeds give other pictures")] = 0,
    processes: Processes = None,
) -> None:
    """Generate the built-in image–text set, as shards.

    Example: vlm data scenes runs/scenes --train 20000
    """
    from vlm.data_tools.engines import LocalEngine
    from vlm.data_tools.scenes import generate_scenes

    made = generate_scenes(out, level=level, train=train, val=val, test=test, seed=seed, engine=LocalEngine(processes))
    for split, number in made.items():
        print(f"{out / split}: {number} pictures")


@data.command("convert")
def data_convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="what to convert")],
    out: Out,
    format: Annotated[str, typer.Option(help="jsonl, csv, coco, vqa, llava, folder or img2dataset")] = "jsonl",
    images: Annotated[Path | None, typer.Option(help="folder that image paths start from; default: SRC's own")] = None,
    column: Annotated[list[str] | None, typer.Option(help="csv: FIELD=COLUMN, e.g. caption=title; repeatable")] = None,
    annotations: Annotated[Path | None, typer.Option(help="vqa: the annotations that belong to the questions")] = None,
    template: Annotated[str | None, typer.Option(help="folder: caption of a class, {} is its name")] = None,
    samples_per_shard: Annotated[int, typer.Option(help="most samples in a shard")] = 1000,
    shard_mb: Annotated[int | None, typer.Option(help="most megabytes in a shard; default: no limit")] = None,
    max_skipped: Annotated[float, typer.Option(help="stop if a larger share of samples can not be used")] = 0.1,
    engine: EngineName = "local",
    processes: Processes = None,
) -> None:
    """Convert a data set to shards. Interrupted, it goes on when called again.

    Example: vlm data convert pairs.jsonl shards/pairs --format jsonl --images pictures
    """
    from vlm.data_tools.convert import SKIPPED, convert
    from vlm.data_tools.engines import make_engine
    from vlm.storage import join

    options = {"columns": _columns(column), "annotations": annotations, "template": template}
    counts = convert(
        source,
        out,
        format=format,
        images=images,
        samples_per_shard=samples_per_shard,
        shard_bytes=None if shard_mb is None else shard_mb * 10**6,
        max_skipped=max_skipped,
        engine=make_engine(engine, processes),
        **{name: value for name, value in options.items() if value is not None},
    )
    skipped = f", {counts.skipped} skipped (see {join(out, SKIPPED)})" if counts.skipped else ""
    print(f"{out}: {counts.samples} samples{skipped}")


def _columns(given: list[str] | None) -> dict[str, str] | None:
    pairs = [one.partition("=") for one in given or []]
    for field, equals, name in pairs:
        if not (field and equals and name):
            raise UsageError(f"--column {field}{equals}{name} is no pair; write FIELD=COLUMN, e.g. caption=title")
    return {field: name for field, _, name in pairs} or None


@data.command("inspect")
def data_inspect(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="folder with index.json, a .tar, or {000..012}.tar")],
) -> None:
    """Count and check what is in shards; exit code 1 on a fault.

    Example: vlm data inspect runs/scenes/train
    """
    import rich

    from vlm.data_tools.inspect import inspect

    report = inspect(shards)
    rich.print(report)
    if report.faults:
        count = f"{len(report.faults)} faults, the first" if len(report.faults) > 1 else "1 fault"
        raise RunError(f"{shards}: {count}: {report.faults[0]}")
