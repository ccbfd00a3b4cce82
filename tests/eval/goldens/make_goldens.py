"""Makes vqa.json and captions.json: what the official programs say of strings made here. Run by hand, with Java ≥ 8.

    python make_goldens.py --vqa-eval DIR --pycocoevalcap DIR

DIR of the first: holds `vqaEval.py` of github.com/GT-Vision-Lab/VQA at its last commit (`print` statements made calls).
DIR of the second: the package `pycocoevalcap` 1.2 as unpacked from its wheel, for its PTB tokenizer (the Java program
of Stanford CoreNLP 3.4.1), Bleu, Rouge and Cider.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PUNCTUATION = ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]

NAMES = """
    man woman dog horse surfer giraffe train pizza t-shirt teddy-bear café building 747 o'clock St. Mr. Dr.
    Coca-Cola iPhone TV U.S. U.S.A. mid-air half-pipe black-and-white two-story 7-11 Macy's dog's dogs' women's it's
    there's isn't can't doesn't won't they're he's I'm I've you'll let's cannot gonna wanna 1950's 1950s '50s 60's
    1/2 2 10 12:30 5 p.m. a.m. $5 $1.99 50% 1st 3rd No. 1 100,000 3.5 w/ and/or black/white b&w AT&T Q&A etc. e.g.
    i.e. vs. Jr. Ave. Inc. ft. lbs. oz. 6' 5" 12x12 4WD 2-D 35mm 9/11 24/7 ol' rock'n'roll n' doin' 'em crème brûlée
    jalapeño Hawai'i O'Hare 3½ 90° don’t”
""".split()
WORDS = """
    a an the one two some many large small red blue white black sitting standing riding on in at of with next to
    near behind under is are was his her and while looking eating through street field table
""".split()
ENDINGS = [""] * 30 + [",", ".", ";", ":", "!", "?", "...", "!!", "--", " --", "'", '"', ")"]
HAND_MADE = [
    "A man's dog, isn't it? (No. 5) [sic] {x}",
    "The well-known state-of-the-art two-story house's 1/2 3 1/2 and/or $5.00 at 10:30am",
    "The U.S. is big. I live in the U.S. and J. Smith does not. Mr. & Mrs. Smith vs. Dr. No.",
    "A cat... two -- three — four – five - six",
    "The café naïve 中文 ½ ° © • £5 ¥ ¢ % & &amp; * / \\ | ~ ^ _ + = < >",
    "A :) smile and a :-( frown 👍 😀😀 gone",
    "The 'quoted' ‘single’ “double” ``old'' style",
    "An adult y'all d'être l'eau ma'am o'clock jack-o'-lantern 'tis 'twas",
    "Some a,b 1,2,3 1, 2 12,34 1.2.3 x.y, end.start .5 5. 007",
    "A call (555) 123-4567 or http://www.x.com/a?b=c, foo@bar.com @home #1 #one",
    "",
    "   ",
    "...",
]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--vqa-eval", required=True)
    arguments.add_argument("--pycocoevalcap", required=True)
    chosen = arguments.parse_args()
    sys.path[:0] = [chosen.vqa_eval, str(Path(chosen.pycocoevalcap).resolve().parent)]
    _write("vqa.json", vqa_goldens())
    _write("captions.json", caption_goldens(Path(chosen.pycocoevalcap)))


# ------------------------------------------------------------------------------------------------------------- VQA


class Asked:
    """What the official program wants of its VQA class."""

    def __init__(self, qa: dict) -> None:
        self.qa = qa

    def getQuesIds(self) -> list[int]:
        return list(self.qa)


def vqa_goldens() -> dict:
    official = importlib.import_module("vqaEval").VQAEval
    tables = official(Asked({}), Asked({}))
    rng = random.Random(0)
    words = [
        *tables.contractions,
        *tables.contractions.values(),
        *tables.manualMap,
        "a",
        "An",
        "the",
        "yes",
        "Yes",
        "red",
    ]
    words += [
        "1,000",
        "1,",
        "2.5",
        ".5",
        "3.",
        "u.s.a.",
        "...",
        "Ü",
        "İ",
        "½",
        "x\u00a0y",
        "cat's",
        "don’t",
        "*",
        "&",
        ":",
        "'",
    ]
    words += ["\n", "\t", "", "on/off", "t-shirt", "(red)", '"q"', "$5.00", "10:30", "一", "." * 40]

    def text() -> str:
        made = ""
        for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 5])):
            made += rng.choice(words) + rng.choice(
                [" ", " ", " ", "", rng.choice([*tables.punct, ".", "  ", "'", ":", "\n"])]
            )
            made = rng.choice(tables.punct) + made if rng.random() < 0.2 else made
            made = made.upper() if rng.random() < 0.1 else made
        return made

    questions, predictions = {}, {}
    for number in range(500):
        pool = [text() for _ in range(rng.choice([1, 1, 2, 3]))]
        answers = [{"answer": rng.choice(pool), "answer_id": i} for i in range(1, rng.choice([1, 3, 10, 10, 10]) + 1)]
        if rng.random() < 0.1:
            answers = [{"answer": answer["answer"]} for answer in answers]
        kind, answer_type = rng.choice(["what is", "how many", "is the"]), rng.choice(["yes/no", "number", "other"])
        questions[number] = {
            "question_id": number,
            "answers": answers,
            "question_type": kind,
            "answer_type": answer_type,
        }
        said = rng.choice(pool)
        predictions[number] = (
            said if rng.random() < 0.7 else tables.processDigitArticle(tables.processPunctuation(said))
        )
    annotations = json.loads(json.dumps(list(questions.values())))  # the official program rewrites its answers
    run = official(Asked(questions), Asked({number: {"answer": said} for number, said in predictions.items()}))
    run.evaluate()
    results = [{"question_id": number, "answer": said} for number, said in predictions.items()]
    return {
        "annotations": annotations,
        "results": results,
        "accuracy": run.accuracy,
        "per_question": list(run.evalQA.values()),
    }


# -------------------------------------------------------------------------------------------------------- captions


def caption_goldens(package: Path) -> dict:
    rng = random.Random(0)
    captions = [made_caption(rng) for _ in range(900)] + HAND_MADE
    tokens = java_tokens(package, captions)

    pictures = []
    for _ in range(80):
        base = made_caption(rng)
        references = [changed(base, rng) for _ in range(rng.randint(1, 5))]
        pictures.append(
            {
                "candidate": rng.choice([changed(base, rng), references[0], made_caption(rng), ""]),
                "references": references,
            }
        )
    everything = [caption for picture in pictures for caption in (picture["candidate"], *picture["references"])]
    tokenized = iter(java_tokens(package, everything))
    candidates, references = {}, {}
    for number, picture in enumerate(pictures):
        candidates[number] = [next(tokenized)]
        references[number] = [next(tokenized) for _ in picture["references"]]
    scorers = {
        "Bleu": importlib.import_module("pycocoevalcap.bleu.bleu").Bleu(4),
        "ROUGE_L": importlib.import_module("pycocoevalcap.rouge.rouge").Rouge(),
        "CIDEr": importlib.import_module("pycocoevalcap.cider.cider").Cider(),
    }
    metrics, each = {}, {}
    for name, scorer in scorers.items():
        score, scores = scorer.compute_score(references, candidates)
        names = [f"Bleu_{n}" for n in range(1, 5)] if name == "Bleu" else [name]
        for one, value, values in zip(
            names, score if name == "Bleu" else [score], scores if name == "Bleu" else [scores], strict=True
        ):
            metrics[one], each[one] = float(value), [float(x) for x in values]
    return {"tokens": dict(zip(captions, tokens, strict=True)), "pictures": pictures, "metrics": metrics, "each": each}


def made_caption(rng: random.Random) -> str:
    words = []
    for _ in range(rng.randint(4, 12)):
        word = rng.choice(WORDS if rng.random() < 0.72 else NAMES)
        wrapped = rng.random()
        if wrapped < 0.06:
            pair = rng.choice(['""', "''", "()", "“”"])
            word = pair[0] + word + pair[1]
        words.append(word + (rng.choice(ENDINGS) if rng.random() < 0.25 else ""))
    # How the Java program reads a single letter at the end depends on the next caption; these begin as most do.
    return (
        rng.choice(["A ", "A ", "An ", "The ", "Some "])
        + " ".join(words)
        + rng.choice([".", ".", ".", "", " .", "!", "..."])
    )


def changed(caption: str, rng: random.Random) -> str:
    words = caption.split()
    for _ in range(rng.randint(0, 4)):
        if rng.random() < 0.5 and len(words) > 2:
            words.pop(rng.randrange(1, len(words)))
        else:
            words.insert(rng.randint(1, len(words)), rng.choice(WORDS))
    return " ".join(words)


def java_tokens(package: Path, captions: list[str]) -> list[str]:
    jar = package / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
        file.write("\n".join(captions))
        file.flush()
        command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        command += ["-preserveLines", "-lowerCase", file.name]
        lines = (
            subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
            .stdout.decode()
            .split("\n")
        )
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION)
        for line in lines[: len(captions)]
    ]


def _write(name: str, content: dict) -> None:
    (HERE / name).write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", "utf-8")


if __name__ == "__main__":
    main()
