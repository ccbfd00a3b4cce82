"""The sections of the report: what is said and shown of each part of a run. Knows a run's record, charts and English.

Each section is a function of the record that returns HTML; what the record does not hold is said in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from vlm.charts import Bar, Line, bars, columns, duration, line_chart, percent, running_mean, smooth
from vlm.page import card, none, section, tile

from .report_run import Fields, RunRecord, number
from .tasks import TASKS, Benchmark

# (task, metric, what it is in words) of everything that is a share of 1 and says how much is seen.
SHARES = (
    ("vqa", "accuracy", "Questions answered right"),
    ("caption", "attributes", "Attributes named right in captions"),
    ("retrieval", "image_to_text_R@1", "Picture finds its caption (R@1)"),
    ("retrieval", "text_to_image_R@1", "Caption finds its picture (R@1)"),
    ("classification", "accuracy", "Pictures put under the right label"),
)
KEY = (
    '<div class="key"><span style="--mark:var(--c0)">with its own picture</span>'
    '<span style="--mark:var(--blind)">blind: an empty picture</span>'
    '<span style="--mark:var(--shuffled)">shuffled: another sample’s picture</span></div>'
)


def headline(run: RunRecord) -> str:
    """The few numbers that matter."""
    tiles = []
    for task, metric, words, metrics in _shares(run):
        tiles.append(tile(percent(metrics[metric]), words, _beside(task, metric, metrics)))
    for name, metric, metrics in _benchmarks(run):
        if not _is_share(name, metric, metrics):
            tiles.append(tile(_cell(metrics[metric]), f"{name}: {metric}", f"{metrics['n']:,} samples"))
    caption = run.tasks().get("caption", {})
    if "CIDEr" in caption and "attributes" not in caption:
        tiles.append(tile(f"{caption['CIDEr']:.2f}", "CIDEr of captions", f"of {caption['n']:,} pictures; 0 to 10"))
    for name, metrics in run.tasks().items():
        task, at, split = name.partition("@")
        if task == "vqa" and at:
            words = f"Questions answered right on {split.removeprefix('test-')} pictures"
            note = f"{metrics['n']:,} questions"
            if "compositional" in split:
                note += " about combinations of colour and shape that training never showed"
            tiles.append(tile(percent(metrics["accuracy"]), words, note))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _shares(run: RunRecord) -> Iterator[tuple[str, str, str, Fields]]:
    """(task, metric, the metric in words, all the task's metrics) of everything evaluated that is a share of 1."""
    for task, metric, words in SHARES:
        if metric in run.tasks().get(task, {}):
            yield task, metric, words, run.tasks()[task]
    for name, metric, metrics in _benchmarks(run):
        if _is_share(name, metric, metrics):
            yield name, metric, f"{name}: {metric}", metrics


def _benchmarks(run: RunRecord) -> Iterator[tuple[str, str, Fields]]:
    """(name, headline, metrics) of the official benchmarks, whose headline is a number."""
    for name, metrics in run.tasks().items():
        task = TASKS.get(name)
        if isinstance(task, Benchmark) and number(metrics.get(task.headline)) is not None:
            yield name, task.headline, metrics


def _is_share(name: str, metric: str, metrics: Fields) -> bool:
    return metric != "CIDEr" and not TASKS[name].less_is_better and 0.0 <= metrics[metric] <= 1.0


def _beside(task: str, metric: str, metrics: Fields) -> str:
    notes = []
    blind = metrics.get("blind", {}).get(metric)
    if blind is not None:
        notes.append(f"{percent(blind)} blind")
    if task == "retrieval":
        notes.append(f"among {metrics['n']:,}")
        if metrics.get("ceiling_R@1", 1.0) < 1.0:
            notes.append(f"equal captions leave at most {percent(metrics['ceiling_R@1'])}")
    else:
        many = {"vqa": "questions", "caption": "pictures", "classification": "pictures"}.get(task, "samples")
        notes.append(f"{metrics['n']:,} {many}")
    return ", ".join(notes)


def looking(run: RunRecord) -> str:
    """Scores with blind and shuffled beside them."""
    lead = (
        "A model can score well without seeing anything: some answers are simply more common than others. So every test "
        "was taken three times: with the right picture, <b>blind</b> (the picture replaced by one flat colour), and "
        "<b>shuffled</b> (with the picture of another sample). The distance between the long bar and the short ones is "
        "what the model gets from looking."
    )
    rows = [
        (words, _three_bars(metrics, lambda m, metric=metric: m[metric])) for _, metric, words, metrics in _shares(run)
    ]
    if not rows:
        found = none("No task was evaluated whose score is a share that a picture could help with.")
        return section("Is it really looking?", lead, found, _other_scores(run) if run.tasks() else "")
    return section("Is it really looking?", lead, card(KEY, bars(rows)), _looking_in_words(run), _other_scores(run))


def _three_bars(metrics: Fields, value: Any) -> list[Bar]:
    group = [Bar(value(metrics), "with its own picture")]
    group += [Bar(value(metrics[look]), look, look) for look in ("blind", "shuffled") if look in metrics]
    return group


def _looking_in_words(run: RunRecord) -> str:
    metrics = run.tasks().get("vqa", {})
    if "blind" not in metrics:
        return ""
    # A blind model may do worse than the plainest guess, and beating that says nothing.
    gain = 100 * (metrics["accuracy"] - max(metrics["blind"]["accuracy"], metrics["majority"]))
    usual = f"Always answering “{escape(str(metrics['majority_answer']))}” would score {percent(metrics['majority'])}. "
    return (
        f'<p class="quiet" style="margin-top:16px">{usual}Without a picture the model answers '
        f"{percent(metrics['blind']['accuracy'])} of the questions right; with it, {percent(metrics['accuracy'])}: "
        f"<b>{gain:+.0f} points come from looking</b>, over the better of the two.</p>"
    )


def _other_scores(run: RunRecord) -> str:
    """Everything in results.json that is a number, for those who want it."""
    rows = []
    for name, metrics in run.tasks().items():
        for metric, value in metrics.items():
            if number(value) is not None and metric != "n":
                others = "".join(
                    f'<td class="n">{_cell(metrics.get(look, {}).get(metric))}</td>' for look in ("blind", "shuffled")
                )
                label = f"<th>{escape(name)}</th><th>{escape(metric)}</th>"
                rows.append(
                    f'<tr>{label}<td class="n">{_cell(value)}</td>{others}<td class="n">{metrics["n"]:,}</td></tr>'
                )
    head = "".join(f'<th class="n">{name}</th>' for name in ("score", "blind", "shuffled", "n"))
    table = f"<table><tr><th>task</th><th>metric</th>{head}</tr>{''.join(rows)}</table>"
    return f'<details><summary>All numbers</summary><div class="card scroll" style="margin-top:10px">{table}</div></details>'


def _cell(value: Any) -> str:
    found = number(value)
    return "–" if found is None else f"{found:,.0f}" if abs(found) >= 1000 else f"{found:.4g}"


def by_type(run: RunRecord) -> str:
    """Accuracy by type of question."""
    title = "Which questions it can answer"
    lead = (
        "Held-out questions by what they ask. A yes/no question is right half the time by guessing, a colour seldom; so "
        "compare each bar with the blind one beneath it, not with its neighbours."
    )
    metrics = run.tasks().get("vqa", {})
    kinds = metrics.get("accuracy_by_type", {})
    if not kinds or set(kinds) == {"untyped"}:
        return section(title, lead, none("The evaluated questions carry no types, or none were evaluated."))
    rows = []
    for kind in sorted(kinds, key=lambda kind: -kinds[kind]):
        group = _three_bars(metrics, lambda m, kind=kind: m["accuracy_by_type"][kind])
        rows.append((f"{kind} ({metrics['n_by_type'][kind]:,})", group))
    return section(title, lead, card(KEY, bars(rows)), *_other_splits(run))


def _other_splits(run: RunRecord) -> Iterable[str]:
    for name, metrics in run.tasks().items():
        task, at, split = name.partition("@")
        if task == "vqa" and at and metrics.get("accuracy_by_type"):
            kinds = metrics["accuracy_by_type"]
            rows = [
                (
                    f"{kind} ({metrics['n_by_type'][kind]:,})",
                    _three_bars(metrics, lambda m, k=kind: m["accuracy_by_type"][k]),
                )
                for kind in sorted(kinds, key=lambda kind: -kinds[kind])
            ]
            yield (
                f'<h3 style="margin-top:26px">The same on the split “{escape(split)}”</h3><p class="quiet">Pictures made '
                f"apart from the test set; overall {percent(metrics['accuracy'])} of {metrics['n']:,}.</p>{card(bars(rows))}"
            )


def learning(run: RunRecord) -> str:
    """Accuracy by type over time."""
    title = "What is learned when"
    lead = (
        "While it trained, the model was asked held-out questions again and again. Different abilities appear at different "
        "times: one that has not left the level of guessing yet may need longer training, not another model."
    )
    kinds: dict[str, list[tuple[float, float]]] = {}
    start = 0.0
    for stage in range(len(run.stages)):
        for event in run.validations(stage):
            for kind, share in (event.get("accuracy") or {}).items():
                if number(share) is not None:
                    kinds.setdefault(kind, []).append(((start + (number(event.get("seconds")) or 0.0)) / 60, share))
        start += run.seconds(stage)
    if not kinds:
        return section(title, lead, none("The log holds no validation of questions; give data.val to see this."))
    lines = [Line(kind, points, colour, dots=True) for colour, (kind, points) in enumerate(sorted(kinds.items()))]
    note = (
        '<p class="quiet">Share of held-out answers whose every token is predicted right, given the tokens before it, by '
        "minutes of training.</p>"
    )
    chart = line_chart(lines, "minutes of training", "accuracy", (0.0, 1.0), lambda y: f"{100 * y:.0f}\u202f%")
    return section(title, lead, card(note, f'<div class="scroll">{chart}</div>'))


STAGES = {
    "contrastive": (
        "bring pictures and texts together",
        "The loss is how badly each picture is matched with its own text.",
    ),
    "joint": (
        "learn to answer and describe",
        "The loss is the surprise, in nats a token, at the true answers and captions.",
    ),
    "clm": ("learn the language", "The loss is the surprise, in nats a token, at the next word."),
    "mlm": ("learn the language", "The loss is the surprise, in nats a token, at words that were hidden."),
}


def losses(run: RunRecord) -> str:
    """The loss of every stage."""
    title = "How the training went"
    lead = (
        "The loss of each stage, which training pushes down: faint as it came step by step, bold smoothed, and dots for "
        "held-out data. A falling loss alone proves little; it falls even for a model that is shown empty pictures."
    )
    charts = [_loss(run, stage) for stage in range(len(run.stages)) if run.stages[stage]]
    if not charts:
        return section(title, lead, none("The log holds no training steps."))
    return section(title, lead, f'<div class="pair">{"".join(charts)}</div>')


def _loss(run: RunRecord, stage: int) -> str:
    points = [
        (x, y) for line in run.stages[stage] if (y := number(line.get("loss"))) is not None and (x := line["step"])
    ]
    raw = smooth(points)
    lines = [Line("", raw, stage, faint=True), Line("training", running_mean(raw), stage)]
    held = [(e["step"], y) for e in run.validations(stage) if (y := number(e.get("loss"))) is not None]
    if held:
        lines.append(Line("held out", held, stage + 2, dots=True))
    name = run.objective(stage)
    aim, about = STAGES.get(name, ("", ""))
    heading = f"Stage {stage + 1}, {escape(name)}" + (f": {aim}" if aim else "")
    count = f"{len(run.stages[stage]):,} steps in {duration(run.seconds(stage))}. "
    chart = line_chart(lines, "step", f"loss of stage {stage + 1}")
    return card(f"<h3>{heading}</h3>", f'<p class="quiet">{count}{about}</p>', f'<div class="scroll">{chart}</div>')


def gates(run: RunRecord) -> str:
    """The gates of every layer."""
    title = "How far the picture is let in"
    lead = (
        "Each adapter adds what it found in the picture to the language model’s own thoughts, through a <b>gate</b> between "
        "−1 and 1. At 0 the language model runs as if no picture were there; the further from 0, in either direction, the "
        "more the layer listens to it."
    )
    numbers = {
        key: [found for value in pair if (found := number(value)) is not None] for key, pair in run.gates().items()
    }
    rows = [(f"layer {key}", pair) for key, pair in numbers.items() if len(pair) == 2]
    if not rows:
        return section(title, lead, none("Neither the results nor the log hold gates that are numbers."))
    key = (
        '<div class="key"><span style="--mark:var(--c0)">attention to the picture</span>'
        '<span style="--mark:var(--c1)">feed-forward</span></div>'
    )
    return section(title, lead, card(key, f'<div class="scroll">{columns(rows, ("attention", "feed-forward"))}</div>'))


def effort(run: RunRecord) -> str:
    """Time, memory and the machine."""
    phases = [(f"stage {n + 1}, {run.objective(n)}", run.seconds(n)) for n in range(len(run.stages))]
    evaluated = sum(number(seconds) or 0.0 for seconds in run.environment().get("seconds", {}).values())
    phases += [("evaluation", evaluated)] if evaluated else []
    whole = sum(seconds for _, seconds in phases)
    body = []
    if whole:
        blocks = [
            f'<i class="b{n}" style="flex:{seconds / whole:.4f}" title="{escape(name)}: {duration(seconds)}">{escape(name)}</i>'
            for n, (name, seconds) in enumerate(phases)
        ]
        body.append(f'<div class="time">{"".join(blocks)}</div>')
    rows = [(name, duration(seconds)) for name, seconds in phases]
    speeds = [(n, _usual_speed(lines)) for n, lines in enumerate(run.stages)]
    rows += [(f"speed of stage {n + 1}", f"{speed:,.0f} samples a second") for n, speed in speeds if speed]
    trained = [value for one in run.told("peak_memory_gib") if (value := number(one)) is not None]
    rows += [("most memory in training", f"{max(trained):.2f} GiB")] if trained else []
    scored = number(run.environment().get("peak_memory_gib"))
    rows += [("most memory in evaluation", f"{scored:.2f} GiB")] if scored else []
    rows += [("training processes", str(run.told("processes")[-1]))] if run.told("processes") else []
    rows += _machine(run.environment() or next(iter(run.told("environment")), {}))
    table = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows)
    lead = "Where the time went, and on what. The training time is that of the steps themselves, without validation and saving."
    return section("Time, memory and machine", lead, card(*body, f"<table>{table}</table>"))


def _usual_speed(lines: Sequence[Fields]) -> float:
    speeds = sorted(speed for line in lines if (speed := number(line.get("samples_per_second"))) is not None)
    return speeds[len(speeds) // 2] if speeds else 0.0


def _machine(environment: Fields) -> list[tuple[str, str]]:
    rows = []
    if environment.get("cpu"):
        rows.append(("processor", f"{environment['cpu']}, {environment.get('cores')} cores"))
    if environment.get("memory_gib"):
        rows.append(("memory", f"{environment['memory_gib']} GiB"))
    if "gpus" in environment:
        rows.append(("accelerators", ", ".join(environment["gpus"]) or "none"))
    versions = {"python": environment.get("python"), **environment.get("versions", {})}
    if any(versions.values()):
        rows.append(("versions", ", ".join(f"{name} {found}" for name, found in versions.items() if found)))
    return rows


def commands(run: RunRecord) -> str:
    """The commands that made this, and the settings."""
    typed = [str(command) for command in run.told("command")]
    again = [] if typed or not run.config_text else [f"vlm train {run.folder / 'config.yaml'}"]
    if run.environment().get("command"):
        typed.append(str(run.environment()["command"]))
    listed = "".join(
        f"<pre><code>{escape(command)}</code></pre>" for command in [*again, *typed, f"vlm report {run.folder}"]
    )
    lead = "What was typed, in order. The settings below are complete: training with that file repeats the run."
    settings = ""
    if run.config_text:
        text = f"<pre><code>{escape(run.config_text)}</code></pre>"
        settings = f"<details><summary>config.yaml, as resolved</summary>{text}</details>"
    return section("The exact commands", lead, listed, settings)


def glossary(run: RunRecord) -> str:
    """What the numbers mean."""
    colour = run.results.get("blind_colour")
    entries = {
        "held-out": "Kept away from training. Everything scored here is held out.",
        "accuracy": "The share of questions answered right, after the official VQA normalisation (case, articles, number words).",
        "blind": "The picture is replaced by one of the same size in a single colour"
        + (f", {tuple(colour)} in red, green and blue," if colour else "")
        + " which the model’s normalisation turns into zeros.",
        "shuffled": "The picture is exchanged for another one, of another sample; left out where there is no other.",
        "attributes": "Size, colour and shape words of a caption, held against the things in the picture in the order that fits "
        "best; missing and invented things count as wrong.",
        "R@k": "Retrieval: how often the right partner is among the k nearest of all candidates. Where several pictures share "
        "one caption, no model can tell which is meant; that leaves the ceiling given with it.",
        "CIDEr": "How much a caption agrees with the reference in words that matter, as coco-caption computes it; 10 is the same.",
        "perplexity": "Among how many equally likely tokens the model would have to guess on average; 1 is certainty.",
    }
    listed = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in entries.items())
    return section("How to read these numbers", "", card(f"<dl>{listed}</dl>"))


def footer(run: RunRecord) -> str:
    """The model, the day and the version."""
    version = run.environment().get("versions", {}).get("vlm", "")
    finished = str(run.environment().get("finished", ""))[:10]
    facts = [
        f"Model: {escape(str(run.results['model']))}" if "model" in run.results else "",
        finished,
        f"vlm {version}" if version else "",
    ]
    return f"<footer>{' · '.join(fact for fact in facts if fact)}</footer>"
