"""What the leak meter's readers find in the tiny models of tests/fixtures, computed with Transformers
and autograd: `python crates/trainer/tests/make_leak.py` writes leak.json beside it.

Made with torch 2.11, transformers 5.23, numpy seed 3.
"""

import json
import pathlib

import numpy as np
import torch
from transformers import AutoModelForCausalLM

HERE = pathlib.Path(__file__).resolve().parent
FIXTURES = HERE.parent.parent.parent / "tests/fixtures"
FAMILIES = ["gpt2", "llama", "qwen2", "qwen3", "gemma"]
POINTS = [0, 1, 3]
N_TEST, N_FIT, LENGTH = 12, 40, 24


def parts(model):
    """Layers, final norm and table of learned positions, if there is one."""
    inner = getattr(model, "transformer", None)
    if inner is not None:
        return inner.h, inner.ln_f, inner.wpe.weight.detach()
    return model.model.layers, model.model.norm, None


def inputs_of_layers(model, ids):
    """The hidden states [1, T, H] that enter each layer, and those that enter the final norm."""
    layers, norm, _ = parts(model)
    seen = []
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in [*layers, norm]]
    model(torch.tensor(ids)[None])
    for hook in hooks:
        hook.remove()
    return seen


def top(scores):
    return scores.topk(min(10, scores.shape[1]), dim=1).indices


def nearest(rows, table):
    unit = torch.nn.functional.normalize
    return top(unit(rows, dim=1) @ unit(table, dim=1).T)


def ridge(x, y):
    x_mean, y_mean = x.mean(0), y.mean(0)
    a, b = (x - x_mean).double(), (y - y_mean).double()
    gram = a.T @ a
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, a.T @ b).float()
    return lambda v: (v - x_mean) @ weight + y_mean


def right(guesses, ids):
    ids = torch.tensor(ids)[:, None]
    return [int((guesses[:, :1] == ids).any(1).sum()), int((guesses == ids).any(1).sum())]


def tokens(model, case):
    with torch.no_grad():
        # What a token is before the first layer, alone at position 0.
        table = torch.cat([inputs_of_layers(model, [v])[0][0] for v in range(model.config.vocab_size)])
        _, _, positions = parts(model)
        moved = 0 if positions is None else positions[1:LENGTH] - positions[:1]
        rows = {}
        for name in ["test", "fit"]:
            states = [inputs_of_layers(model, ids) for ids in case[name]]
            rows[name] = {p: torch.cat([s[p][0, 1:] - moved for s in states]) for p in POINTS}
    ids = {name: [i for sample in case[name] for i in sample[1:]] for name in rows}
    found = {}
    for point in POINTS:
        x, fit = rows["test"][point], rows["fit"][point]
        read = ridge(fit, table[ids["fit"]])
        found[point] = {
            "nearest": right(nearest(x, table), ids["test"]),
            "centred": right(nearest(x - x.mean(0), table - table.mean(0)), ids["test"]),
            "linear": right(nearest(read(x), table), ids["test"]),
        }
    return found


def labels(model, case, point):
    """From the gradient by what enters layer `point`, or by what enters the norm."""
    _, norm, _ = parts(model)
    head = model.lm_head.weight.detach()
    guesses, expected = [], []
    for ids in case["test"]:
        states = inputs_of_layers(model, ids)
        logits = (norm(states[-1]) @ head.T)[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")
        came, = torch.autograd.grad(loss, states[point])
        for t in range(len(ids) - 1):
            x = states[-1][0, t].detach()
            jacobian = torch.autograd.functional.jacobian(norm, x)
            p = (norm(x) @ head.T).softmax(-1).detach()
            would = ((p @ head)[None] - head) @ jacobian  # [V, H]
            guesses.append(nearest(came[0, t][None], would))
            expected.append(ids[t + 1])
    return right(torch.cat(guesses), expected)


def main():
    rng = np.random.default_rng(3)
    result = {}
    for family in FAMILIES:
        model = AutoModelForCausalLM.from_pretrained(FIXTURES / family, dtype=torch.float32).eval()
        vocabulary = model.config.vocab_size
        # Some tokens are much more frequent than others.
        weights = 1.0 / np.arange(1, vocabulary + 1)
        draw = lambda n: rng.choice(vocabulary, (n, LENGTH), p=weights / weights.sum()).tolist()
        case = {"test": draw(N_TEST), "fit": draw(N_FIT)}
        n_layers = model.config.num_hidden_layers
        case["tokens"] = tokens(model, case)
        case["labels"] = {point: labels(model, case, point) for point in [n_layers - 1, n_layers]}
        print(family, case["tokens"], case["labels"])
        result[family] = case
    (HERE / "leak.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
