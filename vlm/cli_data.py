"""The `vlm data` commands: arguments into one call of a program of `data_tools`.

Knows the commands' options. Knows nothing of how anything is done; every program is imported when it is called.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm.errors import RunError, UsageError

QUIET: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}
data = typer.Typer(help="Make, convert, clean and inspect shards.", no_args_is_help=True, **QUIET)

IN = typer.Argument(metavar="IN", help="folder of shards with index.json; a path or an address")
OUT = typer.Argument(metavar="OUT", help="folder of shards to make; a path or an address, s3://…")
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
    out: Annotated[str, OUT],
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


@data.command("text")
def data_text(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE... OUT", help="text files and .jsonl of {text: …}, then a new folder")
    ],
    tokenizer: Annotated[str, typer.Option(help="whose tokens count: Hugging Face id, path, or a model's folder")],
    length: Annotated[
        int, typer.Option(help="most tokens of a block; training adds one, so max_tokens ≥ length + 1")
    ] = 512,
    overlap: Annotated[int, typer.Option(help="tokens shared with the block before")] = 64,
    engine: EngineName = "local",
    processes: Processes = None,
) -> None:
    """Cut texts into overlapping blocks of tokens, from which they can be put together again byte for byte.

    Example: vlm data text corpus.txt more.jsonl shards/text --tokenizer HuggingFaceTB/SmolLM2-360M
    """
    *sources, out = files
    if not sources:
        raise UsageError(f"no text is given with {out}; write vlm data text FILE… OUT --tokenizer T")
    from vlm.data_tools.engines import make_engine
    from vlm.data_tools.text import Cutting, chunk

    counts = chunk(sources, out, Cutting(tokenizer, length, overlap), make_engine(engine, processes))
    print(f"{out}: {counts['blocks']} blocks, {counts['documents']} documents, {counts['tokens']} tokens")


@data.command("clean")
def data_clean(
    source: Annotated[str | None, IN] = None,
    out: Annotated[str | None, OUT] = None,
    rules: Annotated[Path | None, typer.Option(help="YAML of rules; default: those that --print-rules shows")] = None,
    set: Annotated[list[str] | None, typer.Option(help="a rule in its place, e.g. captions.min_words=3")] = None,
    print_rules: Annotated[bool, typer.Option("--print-rules", help="print every rule and stop")] = False,
    scratch: Annotated[
        Path | None, typer.Option(help="folder to work in, seen by every worker; default: in OUT")
    ] = None,
    engine: EngineName = "local",
    processes: Processes = None,
) -> None:
    """Leave out what is broken, useless, private or there twice. OUT/dropped keeps it with the reason.

    Example: vlm data clean shards/raw shards/clean --rules rules.yaml --set duplicates.by=image
    """
    from vlm.data_tools.clean_rules import load_rules
    from vlm.settings import annotated_yaml

    settings = load_rules(rules, set)
    if print_rules:
        print(annotated_yaml(settings), end="")
        return
    if source is None or out is None:
        raise UsageError("IN and OUT are missing; write vlm data clean IN OUT")
    from vlm.data_tools.clean import clean
    from vlm.data_tools.engines import make_engine

    summary = clean(source, out, settings, scratch=scratch, engine=make_engine(engine, processes))
    for reason, count in sorted(summary.reasons.items(), key=lambda item: -item[1]):
        print(f"{count:>9} {reason}")
    dropped = sum(summary.reasons.values())
    print(f"{out}: {summary.kept} samples kept, {dropped} dropped (see {out}/report.html)")


@data.command("augment")
def data_augment(
    source: Annotated[str, IN],
    out: Annotated[str, OUT],
    by: Annotated[str, typer.Option("--with", help="synonyms or back-translation")],
    seed: Annotated[int, typer.Option(help="other seeds give other words")] = 0,
    share: Annotated[float, typer.Option(help="synonyms: most of a text's words that are replaced")] = 0.3,
    copies: Annotated[int, typer.Option(help="synonyms: versions of a sample")] = 1,
    wordnet: Annotated[bool | None, typer.Option(help="synonyms: WordNet too; default: if it is installed")] = None,
    there: Annotated[str | None, typer.Option(help="back-translation: model into another language")] = None,
    back: Annotated[str | None, typer.Option(help="back-translation: model back from it")] = None,
    there_prefix: Annotated[str, typer.Option(help="what that model wants before a text, e.g. '>>deu<< '")] = "",
    back_prefix: Annotated[str, typer.Option(help="the same for the way back")] = "",
    temperature: Annotated[float, typer.Option(help="back-translation: 0 takes the best of four beams")] = 0.0,
    engine: EngineName = "local",
    processes: Processes = None,
) -> None:
    """Add every sample once more in other words. Colours, numbers, places and answers never change.

    Example: vlm data augment shards/clean shards/more --with synonyms
    """
    from vlm.data_tools.augment import Rewording, Synonyms, augment
    from vlm.data_tools.engines import make_engine

    rewording: Rewording
    if by == "synonyms":
        from vlm.data_tools.synonyms import wordnet_is_installed

        rewording = Synonyms(seed, share, copies, wordnet_is_installed() if wordnet is None else wordnet)
    elif by == "back-translation":
        from vlm.data_tools.back_translation import BackTranslation

        if there is None or back is None:
            raise UsageError("back-translation needs two models; give --there MODEL --back MODEL")
        rewording = BackTranslation(there, back, there_prefix, back_prefix, seed, temperature)
    else:
        raise UsageError(f"--with {by} is not known; use synonyms or back-translation")
    counts = augment(source, out, rewording, make_engine(engine, processes))
    print(f"{out}: {counts['originals']} samples and {counts['augmented']} in other words")


@data.command("inspect")
def data_inspect(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="folder with index.json, a .tar, or {000..012}.tar")],
    tokenizer: Annotated[
        str | None, typer.Option(help="count tokens too: Hugging Face id, path, or a model's folder")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every number to this file")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with plots and pictures to this file")] = None,
    processes: Processes = None,
) -> None:
    """Count and check what is in shards; exit code 1 on a fault.

    Example: vlm data inspect runs/scenes/train --html scenes.html
    """
    import rich

    from vlm.data_tools.engines import LocalEngine
    from vlm.data_tools.inspect import inspect
    from vlm.data_tools.inspect_page import write_page
    from vlm.files import atomic_write

    report = inspect(shards, tokenizer, LocalEngine(processes).map)
    rich.print(report)
    if json_file is not None:
        with atomic_write(json_file, "w") as file:
            json.dump(report.as_dict(), file, indent=1)
    if html is not None:
        print(write_page(report, html))
    if report.faults:
        count = f"{report.fault_count} faults, the first" if report.fault_count > 1 else "1 fault"
        raise RunError(f"{shards}: {count}: {report.faults[0]}")
