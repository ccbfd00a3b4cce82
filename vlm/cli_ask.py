"""The commands that load a model and ask it, at once or as a server or a page. Know their options; nothing of what answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm.cli_data import QUIET
from vlm.errors import UsageError

asking = typer.Typer(**QUIET)

ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="a model folder (OUT/model) or a hub id")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX")]
MaxNewTokens = Annotated[int, typer.Option(help="longest reply in tokens")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples")]
TopK = Annotated[int | None, typer.Option(help="sample among the k likeliest tokens")]
TopP = Annotated[float | None, typer.Option(help="sample among the likeliest tokens that hold p of the probability")]
Beams = Annotated[int, typer.Option(help="beam search with this many beams")]
Seed = Annotated[int | None, typer.Option(help="makes sampling repeatable")]


# Talking to a model


@asking.command("caption")
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


@asking.command("ask")
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
    if os.path.isfile(question):  # of a Path, a long name is an error (Python 3.11)
        raise UsageError(
            f"{question} is a file and stands where the question belongs; write vlm ask MODEL IMAGE… QUESTION"
        )
    import vlm

    options = _decoding(max_new_tokens, temperature, top_k, top_p, num_beams, seed)
    print(vlm.load(model, device=device).answer(images, question, **options))


@asking.command("explain")
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


@asking.command("complete")
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


@asking.command("fill")
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


@asking.command("serve")
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
    length: Annotated[
        int | None, typer.Option(help="tokens of prompt and reply; default: all the model takes", min=2)
    ] = None,
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
    # Read by oneDNN at its first product: it makes a kernel for every length that comes, and the 1 024 that it would keep
    # let a server grow for ten thousand requests.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if replicas > 1:
        serve_replicas(replicas, settings, host, port, api_key)
    else:
        serve(settings.service(), host, port, api_key)


@asking.command("demo")
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
