#!/usr/bin/env python3
"""Transformers generates with the whole model in one process: what `offshoot generate` is measured by.

    python generate_peer.py --model FOLDER --prompts FILE [--tokens 64] [--threads 2]

FILE is a JSON list of texts. Prints one JSON line for each: greedy, float32, Transformers' own cache,
no end before --tokens. Made for torch 2.11.0, transformers 5.23.0.
"""

import argparse
import json
import os
import pathlib
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList


class Clock(StoppingCriteria):
    """Is asked after each token, and notes when."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **_):
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, attn_implementation="sdpa", dtype=torch.float32).eval()
    for prompt in json.loads(pathlib.Path(args.prompts).read_text()):
        ids = tokenizer(prompt, return_tensors="pt")
        clock, began = Clock(), time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                **ids, do_sample=False, min_new_tokens=args.tokens, max_new_tokens=args.tokens,
                pad_token_id=tokenizer.eos_token_id, stopping_criteria=StoppingCriteriaList([clock]))
        n = ids["input_ids"].shape[1]
        seconds = clock.times[-1] - clock.times[0]
        print(json.dumps(dict(
            prompt_tokens=n, ids=out[0, n:].tolist(), seconds_to_first_token=clock.times[0] - began,
            tokens_per_second=(len(clock.times) - 1) / seconds)), flush=True)


if __name__ == "__main__":
    main()
