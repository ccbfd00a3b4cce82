"""The `vlm` command: turns arguments into one call of a program or a model, and errors into one line.

Knows the commands of the public surface. Knows nothing of how anything is done; every program is imported when it is
called, so that a command loads no more than it needs.
"""

from __future__ import annotations

import errno
import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm.cli_ask import ModelPath, asking
from vlm.cli_bench import bench
from vlm.cli_data import QUIET, data
from vlm.errors import RunError, UsageError

app = typer.Typer(help="Train vision-language models, ask them, and score them.", no_args_is_help=True, **QUIET)
score = typer.Typer(help="The official numbers for a file of predictions.", no_args_is_help=True, **QUIET)
app.add_typer(asking)
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")
app.add_typer(score, name="score")


# Training


@app.command("train")
def train_model(
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="a recipe, or the name of a packaged one")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings in its place")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="one process on each of so many GPUs; default: all")] = None,
    processes: Annotated[int | None, typer.Option(help="so many processes, on CPUs")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint in OUT")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="print every setting and stop")] = False,
) -> None:
    """Train a model by a recipe; OUT/model is what it leaves.

    Example: vlm train configs/scratch.yaml data.train=SHARDS data.val=SHARDS out=runs/mine stages.0.steps=100
    """
    from vlm.settings import annotated_yaml
    from vlm.train.config import load_config

    settings = load_config(config, overrides)
    if print_config:
        print(annotated_yaml(settings), end="")
        return
    from vlm.train.launch import launch, process_count

    count = process_count(gpus, processes)
    if count > 1:
        launch(config, overrides or [], count, resume)
        return
    from vlm.train.loop import train

    train(settings, resume=resume)


# Evaluation


SHOWN_FOUND = 5  # of a contaminated set
EVAL_TASKS = """on shards: vqa caption retrieval classification perplexity; as downloaded: vqav2 vqav2-testdev okvqa textvqa
vizwiz gqa pope mme nlvr nlvr2 scienceqa mmbench mmbench-circular mmstar seed ai2d chartqa docvqa coco-captions coco-karpathy
flickr30k-captions nocaps coco-retrieval flickr30k-retrieval imagenet cifar10 cifar100 folder wikitext2 wikitext103 text"""


@app.command("eval")
def eval_model(
    model: ModelPath,
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help=EVAL_TASKS)],
    data: Annotated[
        str | None, typer.Option(help="shards, a folder of splits with test in it, or a benchmark's own folder")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for results.json, samples.jsonl and report.html")] = None,
    limit: Annotated[int | None, typer.Option(help="only the first so many samples")] = None,
    batch: Annotated[int, typer.Option(help="samples at once")] = 64,
    blind: Annotated[bool, typer.Option(help="score it again with blank pictures")] = True,
    shuffled: Annotated[bool, typer.Option(help="score it again with other samples' pictures")] = True,
    choice: Annotated[str | None, typer.Option(help="how options are chosen: generate, letters or texts")] = None,
    prompt: Annotated[str | None, typer.Option(help='in place of the benchmark\'s own, as "{question}"')] = None,
    shots: Annotated[int, typer.Option(help="so many examples before each question")] = 0,
    shots_by: Annotated[str, typer.Option(help="random, or similar: nearest by picture")] = "random",
    shots_from: Annotated[Path | None, typer.Option(help="their folder; default: the training split in --data")] = None,
    seed: Annotated[int, typer.Option(help="of the random choice of examples")] = 0,
    processes: Annotated[int, typer.Option(help="so many processes, each with its share")] = 1,
) -> None:
    """Score a model on tasks, and see how much it really looks. With --out, a run that was killed goes on where it stopped.

    Example: vlm eval runs/demo/model vqa caption retrieval --data runs/scenes/test --out runs/demo/eval

    vlm eval compare A B sets two evaluations' folders side by side: scores, intervals, and whether they differ.
    vlm eval contamination SHARDS TASK... --data DIR tells which samples of the tasks are in the training shards.
    """
    if model == "compare":
        _compare(tasks, out)
        return
    if data is None:
        raise UsageError("Missing option '--data'; see vlm eval --help")
    if model == "contamination":
        _contamination(tasks, data, out)
        return
    from vlm.eval.run import Shots, evaluate, summary

    results = evaluate(
        model,
        tasks,
        data,
        out=out,
        batch=batch,
        limit=limit,
        blind=blind,
        shuffled=shuffled,
        choice=choice,
        prompt=prompt,
        shots=Shots(shots, shots_by, shots_from, seed),
        processes=processes,
    )
    print(summary(results))


def _compare(folders: list[str], out: Path | None) -> None:
    if len(folders) != 2:
        raise UsageError(f"{len(folders)} folders to compare; write vlm eval compare A B")
    from vlm.eval.compare import compare, summary
    from vlm.files import atomic_write

    found = compare(Path(folders[0]), Path(folders[1]))
    if out is not None:
        with atomic_write(out, "w") as file:
            json.dump(found, file, indent=2)
    print(summary(found))


def _contamination(arguments: list[str], data: str, out: Path | None) -> None:
    train, *tasks = arguments
    from vlm.data_tools.contamination import HeldOut, contamination
    from vlm.eval.plan import Plan
    from vlm.files import atomic_write

    told = {}
    for name, samples in ((name, list(held)) for name, held in Plan(tuple(tasks), Path(data)).held_out()):
        found = contamination(train, (HeldOut(*sample) for sample in samples))
        told[name] = {"n": len(samples), "found": [asdict(one) for one in found]}
        shown = ", ".join(f"{one.key} (like {one.like})" for one in found[:SHOWN_FOUND])
        print(f"{name}: {len(found)} of {len(samples)} samples are in the training data{': ' if found else ''}{shown}")
    if out is not None:
        with atomic_write(out, "w") as file:
            json.dump(told, file, indent=1)


@score.command("vqa")
def score_vqa_file(
    results: Annotated[Path, typer.Argument(metavar="RESULTS.json", help='[{"question_id": …, "answer": …}]')],
    questions: Annotated[Path, typer.Option(help="the official questions file")],
    annotations: Annotated[Path, typer.Option(help="the official annotations file")],
    out: Annotated[Path | None, typer.Option(help="write the numbers to this file too")] = None,
    mode: Annotated[
        str, typer.Option(help="official, or lmms: answers always normalised, as in lmms-eval")
    ] = "official",
) -> None:
    """VQA accuracy as the official script computes it.

    Example: vlm score vqa results.json --questions questions.json --annotations annotations.json
    """
    from vlm.eval.score import score_vqa

    print(json.dumps(score_vqa(results, questions=questions, annotations=annotations, out=out, mode=mode), indent=2))


@score.command("caption")
def score_caption_file(
    results: Annotated[Path, typer.Argument(metavar="RESULTS.json", help='[{"image_id": …, "caption": …}]')],
    annotations: Annotated[Path, typer.Option(help="COCO captions file")],
    out: Annotated[Path | None, typer.Option(help="write the numbers to this file too")] = None,
    java: Annotated[list[str] | None, typer.Option(help="METEOR or SPICE too, by pycocoevalcap and Java")] = None,
) -> None:
    """Bleu, ROUGE-L and CIDEr as the COCO caption evaluation computes them.

    Example: vlm score caption results.json --annotations captions.json
    """
    from vlm.eval.score import score_caption

    print(json.dumps(score_caption(results, annotations=annotations, out=out, java=java or ()), indent=2))


@app.command("report")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a training run, evaluated")],
    out: Annotated[Path | None, typer.Option(help="HTML file; default: RUN/report.html")] = None,
) -> None:
    """Write a run's report: curves, scores, pictures with answers; one file without network.

    Example: vlm report runs/demo
    """
    from vlm.eval.report import write_report

    print(write_report(run, out or run / "report.html"))


@app.command("quantize")
def quantize_model(
    model: ModelPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder for the quantized model")],
    scheme: Annotated[str, typer.Option(help="int8 (fast) or int4 (small)")],
    vision: Annotated[bool, typer.Option("--vision", help="the vision tower too")] = False,
    data: Annotated[Path | None, typer.Option(help="shards that quality is measured on, before and after")] = None,
    vqa_tolerance: Annotated[float, typer.Option(help="points of VQA accuracy that may be lost")] = 0.5,
    caption_tolerance: Annotated[float, typer.Option(help="per cent of CIDEr that may be lost")] = 1.0,
    limit: Annotated[int | None, typer.Option(help="only the first so many samples")] = None,
    batch: Annotated[int, typer.Option(help="samples at once")] = 64,
    report: Annotated[Path | None, typer.Option("--out", help="write the numbers to this JSON file too")] = None,
) -> None:
    """Store a model in int8 or int4, and hold it to what it could before: beyond the tolerance, exit 1 and no model.

    Example: vlm quantize runs/demo/model runs/demo/int8 --scheme int8 --data runs/scenes/test
    """
    import rich

    from vlm.eval.quantize import Tolerance, quantize
    from vlm.quantization import table

    tolerance = Tolerance(vqa_tolerance, caption_tolerance)
    done = quantize(model, out, scheme, vision, data, tolerance, batch, limit, report)
    rich.print(table(done.entries))
    for line in done.lines():
        print(line)


# The entry


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 a failed run, 2 bad usage, 130 interrupted."""
    gc.freeze()  # what is imported stays; to look through it once more at the end would take a second
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; an error becomes one line on standard error."""
    try:
        return app(arguments, prog_name="vlm", standalone_mode=False) or 0
    except UsageError as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except OSError as error:
        if error.errno == errno.EPIPE:
            return 1
        return _fail(_disk_trouble(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except Exception as error:
        # Typer's own complaints about arguments; where their classes live depends on typer's version.
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            return 2
        return _fail(_bad_usage(error), 2)


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _disk_trouble(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{place}no space left on the disk; free some and run it again"
    return f"{place}{error.strerror or error}"


def _bad_usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "vlm"
    return f"{error.format_message().rstrip('.')}; see {command} --help"


if __name__ == "__main__":
    main()
