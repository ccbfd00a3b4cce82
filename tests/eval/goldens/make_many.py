"""Makes many.json.gz: what the official programs say of thousands of strings made here. Run by hand, with Java ≥ 8.

    python make_many.py --vqa-eval DIR --lmms DIR [--seed N] [--out FILE]

DIR of the first as for make_goldens.py. DIR of the second: the wheel of lmms-eval 0.7.3, unpacked. pycocoevalcap 1.2 is
installed. Another seed makes strings that the tokenizer was not written to: that is how its share was measured.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib
import importlib.util
import json
import random
import string
import sys
import types
from pathlib import Path

from make_goldens import Asked, java_tokens

HERE = Path(__file__).parent

NOUNS = """
    man woman boy girl dog cat horse surfer skateboarder giraffe zebra train bus pizza sandwich table kitchen bathroom
    street sign clock tower beach umbrella kite laptop phone bench bear sheep cow plane truck motorcycle ocean wave field
    fence tree mountain snow racket ball bat glove plate bowl cup bottle cake donut banana couch desk vase remote oven
""".split()
PLAIN = """
    red white black green old young large small little wooden striped plaid empty busy shiny grassy brightly sitting
    standing riding holding eating walking playing looking flying parked wearing on in at near under behind beside with
    to of over through against a an the his her some two and is are
""".split()
OPENINGS = ["A", "A", "A", "a", "The", "Two", "An", "Some", "There is a", "This is a", "Several", "People", "Man"]
ODD = {
    "contractions": """
        isn't aren't doesn't don't can't won't it's that's he's they're we're I'm I've you'll let's who's cannot gonna
        wanna gotta gimme lemme y'all 'tis 'twas o'clock ma'am isnt dont IT'S CAN'T shouldn't've would've man's dogs'
        kids' women's boss's Macy's isn’t it’s don’t dog’s they’re c'mon ol' rock'n'roll 'em 'cause 'til d'Azur O'Brien
        L'Oreal goin' n't 's it'd ne'er e'er 'round 'n' O'Brien-Smith wanna's cannot's
    """,
    "abbreviations": """
        U.S. U.K. U.S.A. D.C. N.Y. a.m. p.m. A.M. P.M. e.g. i.e. etc. etc vs. v. Mr. Mrs. Dr. St. Ave. Blvd. Jr. Inc.
        Co. Ltd. No. no. approx. dept. Jan. Sept. Oct. Mon. Fri. ft. in. lbs. oz. min. hr. Ph.D. M.D. B.C. J. Prof. Sgt.
        Gen. Mt. Calif. Mass. Tex. Fig. pp. p. vol. est. tel. max. Bros. Bldg. Hwy. w/o w/ b/c c/o
    """,
    "numbers": """
        1 2 10 1,000 1,000,000 2.5 .5 3/4 1/2 50% 1st 2nd 21st 747 1950's 1950s 60s '90s '80's 12:30 10:30pm 5pm 7-11
        9/11 24/7 12/25/2013 12-25-13 555-1234 (555)555-1234 800-555-1234 4x4 2x 3D 3-D 35mm 5'10" 6' 1-2 #1 No.1 A380
        F-16 X-box 4-way 5lb -5 +5 ±3 1.5m 1.2.3 007 6:15am 16:9 3,4 '95 5'10 -10am 3/4-inch 1/2-mile
    """,
    "currency": "$5 $1.99 $10,000 £20 €15 ¥500 US$5 25¢ 5¢ C$10 $5.00/lb $1million $ £ ¢",
    "hyphens": """
        t-shirt T-shirt black-and-white two-story double-decker half-eaten close-up multi-colored mid-air state-of-the-art
        jack-o-lantern jack-o'-lantern merry-go-round x-ray e-mail wi-fi U-turn A-frame U.S.-made -- --- - – — and/or
        black/white his/her man/woman/child on/off grey-ish teddy-bear's big-eared- -tailed red-- --blue 5-year-old
    """,
    "Unicode": """
        café crème brûlée jalapeño naïve résumé São München 中文 日本語 한국어 Привет Ελλάδα עברית العربية हिन्दी ½ ¼ ¾ 3½
        90° © ® ™ Nike® • … “hello” ‘hi’ «oui» ‹x› „tief“ ﬁre m³ H₂O Ω ≠ → ★ ♥ ✓ № ¿Qué? ¡Hola! ñ ø ß Ａ e\u0301tude
        soft\u00adhyphen non\u2011breaking zero\u200bwidth “‘x’” ““x””
    """,
    "emoji": "😀 😂 👍 ❤️ 🐶 👨‍👩‍👧 🇺🇸 👍🏽 :) :-) :( ;) :D :P <3 ^_^ :-/ =) XD -_- T_T",
    "quotes": """ "hello" 'hello' ``hello'' “stop” ‘stop’ 'Stop' 'L' 'A' "" '' ` ``x "x ' " '" "' """,
    "web": """
        www.google.com http://example.com https://t.co/abc?x=1 Amazon.com me@mail.com @twitter #hashtag C++ C# .NET
        Node.js &amp; &lt; &quot; AT&T R&B H&M Q&A a&b & <br> IMG_2031.jpg file.txt foo_bar a=b x+y 2+2=4 %20 ~5 ^ | / *
        ** [sic] {x} (a) 1) a) []
    """,
    "capitals": "TV NYC USA DVD iPhone McDonald's FedEx Wii BBQ PB&J D.J. B.B. King J.C. Penney T.V. R2D2 II Xbox M&M's",
}
ODD_WORDS = {kind: words.split() for kind, words in ODD.items()}
ENDINGS = ["."] * 10 + [""] * 6 + "! ? ... .. , ; : !! ?! .... -- .) .\" '. … !!!1".split() + [" .", ". ", " ,", " -"]
LOOSE = [",", ".", ";", ":", "!", "?", "'", '"', ")", "”", "’", "...", "--", "-", "/", "'s", "’s", "*", "%", "]"]


def ordinary(rng: random.Random) -> str:
    """As people caption pictures: plain words, now and then something odd."""
    words = rng.choice(OPENINGS).split()
    for _ in range(rng.randint(5, 14)):
        words.append(rng.choice(NOUNS if rng.random() < 0.4 else PLAIN))
        chance = rng.random()
        if chance < 0.01:
            words[-1] += ","
        elif chance < 0.02:
            words[-1] = rng.choice(rng.choice(list(ODD_WORDS.values())))
        elif chance < 0.025:
            words[-1] = rng.choice(['"{}"', "({})", "'{}'"]).format(words[-1])
    return " ".join([*words, rng.choice(NOUNS)]) + rng.choice([".", ".", ".", "", "", ". ", " .", "!"])


def adversarial(rng: random.Random) -> str:
    """Every other word odd, with loose punctuation, capitals and strange spaces."""
    made = ""
    for _ in range(rng.randint(1, 12)):
        odd = rng.random() < 0.5
        word = rng.choice(rng.choice(list(ODD_WORDS.values()))) if odd else rng.choice(NOUNS + PLAIN)
        word = rng.choice(['"', "(", "'", "[", "“", "‘", "``", "-", "#", "*"]) + word if rng.random() < 0.04 else word
        word += rng.choice(LOOSE) if rng.random() < 0.12 else ""
        word = rng.choice([str.upper, str.capitalize])(word) if rng.random() < 0.05 else word
        made += word + (rng.choice(["", "  ", "\t", "-", "/", "\u00a0"]) if rng.random() < 0.04 else " ")
    return made.strip() + rng.choice(ENDINGS)


def very_long(rng: random.Random) -> str:
    return " ".join(ordinary(rng) for _ in range(60))


def empty(rng: random.Random) -> str:
    return rng.choice(["", " ", "   ", ".", "...", "-", '"', "'", "?!", "\t", ", ,", "😀"])


KINDS = {ordinary: 3000, adversarial: 3000, very_long: 20, empty: 100}


def token_goldens(rng: random.Random, package: Path) -> dict:
    made = {kind.__name__: [kind(rng) for _ in range(count)] for kind, count in KINDS.items()}
    return {kind: {"captions": texts, "tokens": java_tokens(package, texts)} for kind, texts in made.items()}


def caption_goldens(rng: random.Random, pictures: int = 600) -> dict:
    """What the whole of coco-caption prints but METEOR and SPICE, and the tokens it scored."""
    references, candidates = {}, {}
    for number in range(pictures):
        kind = ordinary if rng.random() < 0.9 else adversarial
        base = kind(rng)
        references[number] = [shaken(base, rng) for _ in range(rng.randint(1, 5))]
        candidates[number] = [rng.choice([shaken(base, rng), references[number][0], kind(rng), empty(rng)])]
    tokenizer = importlib.import_module("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    as_captions = [{n: [{"caption": one} for one in each] for n, each in x.items()} for x in (references, candidates)]
    truth, said = map(tokenizer.tokenize, as_captions)
    metrics = {}
    for module, name in (("bleu", "Bleu"), ("rouge", "Rouge"), ("cider", "Cider")):
        scorer = getattr(importlib.import_module(f"pycocoevalcap.{module}.{module}"), name)()
        score = scorer.compute_score(truth, said)[0]
        named = {f"Bleu_{n}": x for n, x in enumerate(score, start=1)} if name == "Bleu" else {scorer.method(): score}
        metrics |= {"ROUGE_L" if one == "Rouge" else one: float(value) for one, value in named.items()}
    return {
        "candidates": [each[0] for each in candidates.values()],
        "references": list(references.values()),
        "candidate_tokens": [each[0] for each in said.values()],
        "reference_tokens": list(truth.values()),
        "metrics": metrics,
    }


def shaken(caption: str, rng: random.Random) -> str:
    words = caption.split()
    for _ in range(rng.randint(0, 5)):
        place = rng.randrange(len(words) + 1)
        if rng.random() < 0.5 and len(words) > 1:
            words[place : place + 1] = []
        else:
            words.insert(place, rng.choice(NOUNS + PLAIN))
    return " ".join(words)


def vqa_goldens(rng: random.Random, lmms: Path, questions: int = 4000) -> dict:
    official = importlib.import_module("vqaEval").VQAEval
    annotations, results = made_questions(rng, official(Asked({}), Asked({})), questions)
    said = {one["question_id"]: one for one in results}
    run = official(Asked({one["question_id"]: copy.deepcopy(one) for one in annotations}), Asked(said))
    run.evaluate()
    score = lmms_vqav2(lmms)
    mean = [score(copy.deepcopy(one), [said[one["question_id"]]["answer"]])["exact_match"] for one in annotations]
    return {
        "annotations": annotations,
        "results": results,
        "accuracy": run.accuracy,
        "per_question": list(run.evalQA.values()),
        "lmms_per_question": [round(100 * one, 2) for one in mean],
    }


def made_questions(rng: random.Random, tables: object, questions: int) -> tuple[list[dict], list[dict]]:
    words = [*tables.contractions, *tables.contractions.values(), *tables.manualMap, "a", "An", "THE", "yes", "Yes"]
    words += [word for group in ODD_WORDS.values() for word in group] + ["1,,2", "1,", "3.", "...", "", "\n", "İ", "."]
    marks = [*string.punctuation, *tables.punct, " ", " ", "  ", "\n", "\t", " . ", "", "", ""]

    def text() -> str:
        return "".join(rng.choice(words) + rng.choice(marks) for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 6])))

    annotations, results = [], []
    for number in range(questions):
        pool = [text() for _ in range(rng.choice([1, 1, 2, 3]))]
        pool += [tables.processDigitArticle(tables.processPunctuation(rng.choice(pool)))]
        answers = [{"answer": rng.choice(pool), "answer_id": n} for n in range(1, rng.choice([1, 3, 10, 10, 10]) + 1)]
        answers = [{"answer": one["answer"]} for one in answers] if rng.random() < 0.05 else answers
        kinds = {"question_type": rng.choice(["what", "how many"]), "answer_type": rng.choice(["number", "other"])}
        annotations.append({"question_id": number, "answers": answers, **kinds})
        results.append({"question_id": number, "answer": rng.choice(pool) + rng.choice(["", "", "", ".", " ", "?"])})
    return annotations, results


def lmms_vqav2(folder: Path) -> object:
    """lmms-eval's scoring of one VQAv2 question, without the rest of the harness and what it needs."""
    for name in ("loguru", "lmms_eval", "lmms_eval.tasks", "lmms_eval.tasks._task_utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["loguru"].logger = None
    files = types.ModuleType("lmms_eval.tasks._task_utils.file_utils")
    sys.modules["lmms_eval.tasks._task_utils"].file_utils = sys.modules[files.__name__] = files
    tasks = folder / "lmms_eval" / "tasks"
    _load("lmms_eval.tasks._task_utils.vqa_eval_metric", tasks / "_task_utils" / "vqa_eval_metric.py")
    return _load("lmms_eval.tasks.vqav2.utils", tasks / "vqav2" / "utils.py").vqav2_process_results


def _load(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--vqa-eval", required=True)
    arguments.add_argument("--lmms", required=True, type=Path)
    arguments.add_argument("--seed", default=0, type=int)
    arguments.add_argument("--out", default=HERE / "many.json.gz", type=Path)
    chosen = arguments.parse_args()
    sys.path.insert(0, chosen.vqa_eval)
    package = Path(importlib.util.find_spec("pycocoevalcap").submodule_search_locations[0])
    rng = random.Random(chosen.seed)
    made = {"tokens": token_goldens(rng, package), "captions": caption_goldens(rng)}
    made["vqa"] = vqa_goldens(rng, chosen.lmms)
    content = json.dumps(made, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    chosen.out.write_bytes(gzip.compress(content, mtime=0))


if __name__ == "__main__":
    main()
