"""Writes schedules.json: learning rates by step as Transformers' schedules give them.

    python crates/trainer/tests/make_schedules.py

The rate at index k is the one that step k, counted from 0, is taken with.
"""

import json
import math
from pathlib import Path

import torch
import transformers
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)


def rates(make, base, n_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    schedule = make(optimizer)
    values = []
    for _ in range(n_steps + 1):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def run(scheduler, base, n_warmup, n_steps, lowest=0.0):
    def make(optimizer):
        if scheduler == "constant":
            return get_constant_schedule_with_warmup(optimizer, n_warmup)
        if scheduler == "linear":
            return get_linear_schedule_with_warmup(optimizer, n_warmup, n_steps)
        if lowest > 0:
            return get_cosine_with_min_lr_schedule_with_warmup(
                optimizer, n_warmup, n_steps, min_lr=lowest
            )
        return get_cosine_schedule_with_warmup(optimizer, n_warmup, n_steps)

    return {
        "scheduler": scheduler,
        "base": base,
        "lowest": lowest,
        "n_warmup": n_warmup,
        "n_steps": n_steps,
        "rates": rates(make, base, n_steps),
    }


# The ratio as Trainer turns it into steps.
warmup_of_ratio = math.ceil(0.06 * 50)
runs = [
    run("constant", 1e-4, 0, 12),
    run("constant", 3e-4, 5, 20),
    run("linear", 1e-4, 0, 12),
    run("linear", 2e-4, 7, 40),
    run("cosine", 1e-4, 0, 12),
    run("cosine", 2e-4, warmup_of_ratio, 50),
    run("cosine", 2e-4, 4, 44, lowest=2e-5),
]
versions = {"torch": torch.__version__, "transformers": transformers.__version__}
path = Path(__file__).with_name("schedules.json")
path.write_text(json.dumps({"versions": versions, "runs": runs}, indent=1) + "\n")
