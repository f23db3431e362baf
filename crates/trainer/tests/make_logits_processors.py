#!/usr/bin/env python3
"""Records what Transformers' logits processors make of scores: logits_processors.json beside this
file.

    python make_logits_processors.py            write the file
    python make_logits_processors.py --check    recompute and compare, write nothing

Made with: torch 2.11.0, transformers 5.23.0. Seed: SEED below. CPU only, one thread.

Each case has `logits` [V], `ids` (the text so far), the settings, and `scores`: [position, score] of
every token that is still possible. The processors run in the order in which `generate` runs them
with do_sample: repetition penalty, minimal length, temperature, top-k, top-p. `argmax` is what
`generate` takes without do_sample: only the first two processors run then.
"""

import argparse
import json
import os
import pathlib

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import (LogitsProcessorList, MinNewTokensLengthLogitsProcessor,
                          RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper,
                          TopKLogitsWarper, TopPLogitsWarper)

SEED = 407
VERSIONS = {torch: "2.11.0", transformers: "5.23.0"}
FILE = pathlib.Path(__file__).with_name("logits_processors.json")
EOS = [2, 7]

# Absent: the processor is not there.
SETTINGS = [
    dict(),
    dict(temperature=0.7),
    dict(temperature=1.9),
    dict(top_k=5),
    dict(top_k=1000),
    dict(top_p=0.5),
    dict(top_p=0.95),
    dict(top_p=1e-6),
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=0.8),
    dict(min_new_tokens=4),
    dict(temperature=0.8, top_k=50, top_p=0.95, repetition_penalty=1.2),
    dict(temperature=0.6, top_k=7, top_p=0.8, repetition_penalty=2.0, min_new_tokens=4),
    dict(temperature=1.5, top_k=40, top_p=0.9, min_new_tokens=3),
]
PROMPT_LENGTH = 6
N_NEW = 3


def processors(settings, sampling):
    found = LogitsProcessorList()
    if "repetition_penalty" in settings:
        found.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    if "min_new_tokens" in settings:
        found.append(MinNewTokensLengthLogitsProcessor(
            PROMPT_LENGTH, settings["min_new_tokens"], EOS, device="cpu"))
    if sampling and "temperature" in settings:
        found.append(TemperatureLogitsWarper(settings["temperature"]))
    if sampling and "top_k" in settings:
        found.append(TopKLogitsWarper(settings["top_k"]))
    if sampling and "top_p" in settings:
        found.append(TopPLogitsWarper(settings["top_p"]))
    return found


def cases():
    generator = torch.Generator().manual_seed(SEED)
    for i, settings in enumerate(SETTINGS):
        n = [64, 31][i % 2]
        logits = 1.5 * torch.randn(n, generator=generator)
        if settings.keys() == {"top_k"}:
            # Equal scores: those at the border stay together, so that more than k stay.
            logits = (2 * logits).round() / 2
        ids = torch.randint(0, n, (PROMPT_LENGTH + N_NEW,), generator=generator)
        scores = processors(settings, True)(ids[None], logits[None].clone())[0]
        greedy = processors(settings, False)(ids[None], logits[None].clone())[0]
        kept = [[k, scores[k].item()] for k in range(n) if scores[k].isfinite()]
        yield dict(settings=settings, ids=ids.tolist(), logits=logits.tolist(), scores=kept,
                   argmax=greedy.argmax().item())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    for module, version in VERSIONS.items():
        found = module.__version__.split("+")[0]
        assert found == version, f"{module.__name__} {version} is needed, this is {found}"
    torch.set_num_threads(1)
    made = dict(prompt_length=PROMPT_LENGTH, eos=EOS, cases=list(cases()))
    for case in made["cases"]:
        print(case["settings"], len(case["scores"]), "of", len(case["logits"]), "stay")
    if args.check:
        assert made == json.loads(FILE.read_text()), f"{FILE} differs"
    else:
        FILE.write_text(json.dumps(made) + "\n")
    print("ok")


if __name__ == "__main__":
    main()
