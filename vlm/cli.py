"""The `vlm` command: turns arguments into one call of a program or a model, and errors into one line.

Knows the commands of the public surface. Knows nothing of how anything is done; every program is imported when it is
called, so that a command loads no more than it needs.
"""

from __future__ import annotations

import errno
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm.cli_bench import bench
from vlm.cli_data import QUIET, data
from vlm.errors import RunError, UsageError

app = typer.Typer(help="Train vision-language models, ask them, and score them.", no_args_is_help=True, **QUIET)
score = typer.Typer(help="The official numbers for a file of predictions.", no_args_is_help=True, **QUIET)
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")
app.add_typer(score, name="score")

ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="a model folder (OUT/model) or a hub id")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX")]
MaxNewTokens = Annotated[int, typer.Option(help="longest reply in tokens")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples")]
TopK = Annotated[int | None, typer.Option(help="sample among the k likeliest tokens")]
TopP = Annotated[float | None, typer.Option(help="sample among the likeliest tokens that hold p of the probability")]
Beams = Annotated[int, typer.Option(help="beam search with this many beams")]
Seed = Annotated[int | None, typer.Option(help="makes sampling repeatable")]


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


# Talking to a model


@app.command("caption")
def caption(
    model: ModelPath,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="JPEG, PNG or WEBP files, or folders of them")
    ],
    replicas: Annotated[int, typer.Option(help="so many processes, each with the model and its share")] = 1,
    device: Device = "auto",
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    num_beams: Beams = 1,
    seed: Seed = None,
) -> None:
    """Describe pictures, one line each, those of a folder by their names.

    Example: vlm caption runs/demo/model cat.jpg dog.jpg
    """
    from vlm.captioning import caption_all, pictures_in

    options = _decoding(max_new_tokens, temperature, top_k, top_p, num_beams, seed)
    pictures = pictures_in(images)
    captions = caption_all(model, pictures, device, replicas, **options)
    for picture, text in zip(pictures, captions, strict=True):
        print(f"{picture}: {text}" if len(pictures) > 1 else text)


@app.command("ask")
def ask(
    model: ModelPath,
    rest: Annotated[list[str], typer.Argument(metavar="IMAGE... QUESTION", help="pictures, then one question")],
    device: Device = "auto",
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    num_beams: Beams = 1,
    seed: Seed = None,
) -> None:
    """Ask one question about a picture, or about several together.

    Example: vlm ask runs/demo/model cat.jpg "What colour is it?"
    """
    *images, question = rest
    if not images:
        raise UsageError(f"no picture is given with {question!r}; write vlm ask MODEL IMAGE… QUESTION")
    if Path(question).is_file():
        raise UsageError(
            f"{question} is a file and stands where the question belongs; write vlm ask MODEL IMAGE… QUESTION"
        )
    import vlm

    options = _decoding(max_new_tokens, temperature, top_k, top_p, num_beams, seed)
    print(vlm.load(model, device=device).answer(images, question, **options))


@app.command("explain")
def explain(
    model: ModelPath,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="JPEG, PNG or WEBP file")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="what is asked about it")],
    out: Annotated[Path, typer.Option(help="HTML file for the explanation")],
    grid: Annotated[int, typer.Option(help="regions along each side of the picture")] = 7,
    samples: Annotated[
        int, typer.Option(help="pictures with regions left out, and as many questions with words")
    ] = 400,
    seed: Annotated[int, typer.Option(help="which regions and words those are")] = 0,
    device: Device = "auto",
    max_new_tokens: MaxNewTokens = 64,
) -> None:
    """Show what an answer hung on: regions, words, and where the model looked; one page without network.

    Example: vlm explain runs/demo/model cat.jpg "What colour is it?" --out why.html
    """
    import vlm
    from vlm.explain_page import write_explanation

    options = {"grid": grid, "samples": samples, "seed": seed, "max_new_tokens": max_new_tokens}
    told = vlm.load(model, device=device).explain(image, question, **options)
    print(told.answer)
    print(write_explanation(told, out))


@app.command("complete")
def complete(
    model: ModelPath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="text to go on from")],
    device: Device = "auto",
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    num_beams: Beams = 1,
    seed: Seed = None,
) -> None:
    """Continue a text, without pictures.

    Example: vlm complete runs/demo/model "There is a" --temperature 0.8 --seed 1
    """
    import vlm

    options = _decoding(max_new_tokens, temperature, top_k, top_p, num_beams, seed)
    print(prompt + vlm.load(model, device=device).complete(prompt, **options))


@app.command("fill")
def fill(
    model: ModelPath,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="text with one <mask>")],
    top_k: Annotated[int, typer.Option(help="how many candidates")] = 5,
    device: Device = "auto",
) -> None:
    """Rank what may stand in the place of <mask>.

    Example: vlm fill runs/text/model "The <mask> is shining."
    """
    import vlm

    for token, probability in vlm.load(model, device=device).fill_mask(text, top_k=top_k):
        print(f"{probability:.4f}  {token}")


# Serving


@app.command("serve")
def serve_model(
    model: ModelPath,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 is every one of the machine")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="what clients call the model; default: MODEL")] = None,
    device: Device = "auto",
    quantize: Annotated[str | None, typer.Option(help="int8 or int4; default: weights as saved")] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="compile decoding: slow first replies, then quicker")
    ] = False,
    int8_cache: Annotated[bool, typer.Option("--int8-cache", help="keys and values of the text in 8 bits")] = False,
    replicas: Annotated[
        int, typer.Option(help="so many engines, each on its GPU or its cores; what follows is for each", min=1)
    ] = 1,
    tensor_parallel: Annotated[
        int, typer.Option(help="so many processes hold each model together, each on its GPU or its cores", min=1)
    ] = 1,
    rows: Annotated[int, typer.Option(help="replies decoded together")] = 16,
    length: Annotated[int | None, typer.Option(help="tokens of prompt and reply; default: all the model takes")] = None,
    queue: Annotated[int, typer.Option(help="replies that may wait for a row; more get 429")] = 64,
    wait: Annotated[float, typer.Option(help="seconds that one may wait for a row; then it gets 503")] = 60.0,
    max_body: Annotated[int, typer.Option(help="bytes of a request")] = 32 * 2**20,
    max_images: Annotated[int, typer.Option(help="pictures of a request")] = 8,
    max_pixels: Annotated[int, typer.Option(help="pixels of a picture")] = 16_000_000,
    max_n: Annotated[int, typer.Option("--max-n", help="replies to one prompt")] = 8,
    api_key: Annotated[str | None, typer.Option(envvar="VLM_API_KEY", help="what clients must send")] = None,
) -> None:
    """Answer OpenAI's HTTP interface: /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models.

    Example: vlm serve runs/demo/model --port 8000

    Pictures come as data URLs; addresses are never fetched. /health and Prometheus's /metrics need no key. SIGTERM and
    Ctrl-C finish what has been asked; a second one does not.
    """
    from vlm.serve.limits import Limits

    limits = Limits(
        rows=rows, queue=queue, wait=wait, body_bytes=max_body, images=max_images, pixels=max_pixels, choices=max_n
    )
    try:
        from vlm.serve.replica import Settings
        from vlm.serve.replicas import serve_replicas
        from vlm.serve.server import serve
    except ModuleNotFoundError as error:
        raise UsageError(f"vlm serve needs {error.name}; pip install 'vlm[serve]'") from None
    settings = Settings(model, name or model, limits, length, device, quantize, compile, int8_cache, tensor_parallel)
    settings.check(replicas)
    if replicas > 1:
        serve_replicas(replicas, settings, host, port, api_key)
    else:
        serve(settings.service(), host, port, api_key)


@app.command("demo")
def demo(
    model: ModelPath,
    port: Annotated[int, typer.Option(min=1, max=65535, help="the page is at http://127.0.0.1:PORT")] = 7860,
    device: Device = "auto",
) -> None:
    """A page on this machine alone: drop pictures, ask, and see where the model looked for each word.

    Example: vlm demo runs/demo/model
    """
    import vlm
    from vlm.demo import launch

    launch(vlm.load(model, device=device), model, port)


def _decoding(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, num_beams: int, seed: int | None
) -> dict[str, Any]:
    return {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "num_beams": num_beams,
        "seed": seed,
    }


# The entry


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 a failed run, 2 bad usage, 130 interrupted."""
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
