#!/usr/bin/env python3
"""Makes gguf_tokenizer.json: a cut of a GGUF file's tokenizer, and strings with their token ids.

    python make_gguf_tokenizer.py SmolLM2-135M-Instruct.Q4_1.gguf            write the file
    python make_gguf_tokenizer.py SmolLM2-135M-Instruct.Q4_1.gguf --whole F  the whole vocabulary to F

The vocabulary of 49152 tokens is cut to its first N_TOKENS with the merges that make them (ids do
not change), so that the fixture stays small. The reference is what Transformers makes of the file,
with one correction: Transformers drops the rule that the file names (tokenizer.ggml.pre = smollm:
every digit alone, then GPT-2's words) and keeps GPT-2's words only. The two differ where several
blanks stand before a digit ("a  5") and on some signs such as superscripts. The model was trained
with the named rule, and llama.cpp follows it; so do we. The script checks that strings without
digits do not differ.

Made with: Python 3.11, transformers 5.23.0, tokenizers 0.23.3, gguf 0.19.0.
"""

import argparse
import json
import pathlib

import gguf
import tokenizers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

HERE = pathlib.Path(__file__).resolve().parent
N_TOKENS = 2000
STRINGS = [
    "", " ", "The capital of France is Paris.", "don't  stop, we'll see it's fine",
    "  leading and trailing  ", "tabs\tand\nlines\n\n\nand more \n x", "1234567890 in 2024, 3.14159",
    "x1y22z333", "a 5", "a  5", "   1", "price:  12\n\n 7 items", "def f(x):\n    return x ** 2\n",
    "naïve café, Zürich, Σωκράτης, Москва", "漢字かな交じり文", "🌳🍃 trees 👩‍🌾", "٣٤ ²³ ½",
    "<|im_start|>user\nHi<|im_end|>\n", "a<|im_end|>b<|endoftext|>", "<repo_name>x<file_sep>y",
    "HELLO World CamelCase snake_case kebab-case", "\u00a0nbsp\u2003em\u200bzero", "e\u0301 e\u0301",
    "'S 'T 'RE I'M YOU'LL", "\r\nwindows\r\n", "...!!!???", "http://example.com/a?b=c&d=%20",
]


def field(reader, key):
    value = reader.fields.get(key)
    return None if value is None else value.contents()


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("gguf", type=pathlib.Path)
    args.add_argument("--whole", type=pathlib.Path)
    args = args.parse_args()

    reader = gguf.GGUFReader(args.gguf)
    get = lambda name: field(reader, "tokenizer.ggml." + name)
    assert (get("model"), get("pre")) == ("gpt2", "smollm"), "written for SmolLM2"
    tokens, types, merges = get("tokens"), get("token_type"), get("merges")
    if not args.whole:
        tokens, types = tokens[:N_TOKENS], types[:N_TOKENS]
        known = set(tokens)
        merges = [m for m in merges if m.replace(" ", "") in known]

    theirs = AutoTokenizer.from_pretrained(args.gguf.parent, gguf_file=args.gguf.name).backend_tokenizer
    state = json.loads(theirs.to_str())
    state["model"]["vocab"] = {t: i for i, t in enumerate(tokens)}
    state["model"]["merges"] = [m.split(" ") for m in merges]
    reference = tokenizers.Tokenizer.from_str(json.dumps(state))
    corrected = tokenizers.Tokenizer.from_str(json.dumps(state))
    corrected.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])

    cases = []
    for text in STRINGS:
        ids = corrected.encode(text).ids
        if reference.encode(text).ids != ids:
            print(f"differs from Transformers: {text!r}")
            assert any(c.isnumeric() for c in text), text
        cases.append(dict(text=text, ids=ids, decoded=corrected.decode(ids)))
    fixture = dict(
        model=get("model"), pre=get("pre"), tokens=tokens, token_types=[int(t) for t in types],
        merges=merges, bos_token_id=int(get("bos_token_id")), eos_token_id=int(get("eos_token_id")),
        add_bos_token=bool(get("add_bos_token")), chat_template=field(reader, "tokenizer.chat_template"),
        cases=cases)
    out = args.whole or HERE / "gguf_tokenizer.json"
    out.write_text(json.dumps(fixture, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{len(tokens)} tokens, {len(merges)} merges, {len(cases)} strings, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
