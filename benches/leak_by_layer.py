#!/usr/bin/env python3
"""How many input tokens can be read from hidden states, by the layer at which they leave the client.

    python benches/leak_by_layer.py [--model .demo/smollm2-hf] [--out benches/runs/DATE-leak]

Two readers that whoever holds the public model can build in minutes, on text that they never saw:

- nearest: the token whose embedding is nearest by cosine to the hidden state as it is.
- linear: one ridge regression from hidden states to embeddings, fitted on other text (here the King
  James Bible), then the nearest embedding. Tried on questions and answers of another source.

And at the other end: how many labels can be read from the gradient if the trunk ends at the last layer,
so that the server knows the final hidden states and can try every label with the public head.

Published attacks are stronger: see docs/privacy.md. Needs torch and transformers, `cargo xtask fetch`,
and a Hugging Face copy of the model.
"""

import argparse
import datetime
import json
import pathlib

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent


def arguments():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--model", default=str(ROOT / ".demo/smollm2-hf"))
    a.add_argument("--layers", default="0,1,2,4,8,12,16,20,24,28")
    a.add_argument("--fit-tokens", type=int, default=20000)
    a.add_argument("--test-tokens", type=int, default=4000)
    a.add_argument("--threads", type=int, default=1)
    a.add_argument("--out", help="default: benches/runs/DATE-leak")
    return a.parse_args()


def hidden_states(model, ids, layers):
    """For each layer the hidden states that enter it, [N, H]."""
    found = {layer: [] for layer in layers}
    with torch.no_grad():
        for start in range(0, len(ids), 256):
            piece = ids[start:start + 256]
            states = model(piece[None], output_hidden_states=True).hidden_states
            for layer in layers:
                # The first position holds an outlier in all its rows and is left out.
                found[layer].append(states[layer][0, 1:])
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def without_first(ids):
    return torch.cat([ids[start + 1:start + 256] for start in range(0, len(ids), 256)])


def share_right(vectors, embeddings, ids):
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    right = 0
    for start in range(0, len(vectors), 512):
        scores = torch.nn.functional.normalize(vectors[start:start + 512], dim=1) @ unit.T
        right += (scores.argmax(1) == ids[start:start + 512]).sum().item()
    return right / len(ids)


def ridge(x, y):
    """Least squares with a small penalty, on centred values."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = (x - x_mean).double(), (y - y_mean).double()
    gram = x.T @ x
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, x.T @ y).float()
    return lambda v: (v - x_mean) @ weight + y_mean


def labels_read(model, ids, n_tokens=256):
    """Share of labels that the gradient by the last layer's output names."""
    norm, head = model.model.norm, model.lm_head.weight.detach()
    ids = ids[:n_tokens]
    # In Transformers the last hidden states come after the norm: caught before it instead.
    caught = []
    hook = norm.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0][0].detach()))
    with torch.no_grad():
        model(ids[None])
    hook.remove()
    x, labels = caught[0][1:-1], ids[2:]
    right = 0
    for row, label in zip(x, labels):
        row = row.clone().requires_grad_()
        logits = norm(row) @ head.T
        seen, = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, label), row)
        # The server: what the gradient would be for each label, by the norm's Jacobian [H, H].
        jacobian = torch.autograd.functional.jacobian(norm, row.detach())
        p = (norm(row.detach()) @ head.T).softmax(-1)
        candidates = ((p @ head)[None] - head) @ jacobian  # [V, H]
        right += int((candidates - seen).norm(dim=1).argmin() == label)
    return right / len(labels)


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    layers = [int(layer) for layer in args.layers.split(",")]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    embeddings = model.get_input_embeddings().weight.detach()

    def tokens(text, n):
        return torch.tensor(tokenizer(text)["input_ids"][:n])

    fit_ids = tokens((ROOT / ".demo/scribe.txt").read_text(), args.fit_tokens)
    lines = (ROOT / ".demo/support.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    test_ids = tokens("\n".join(p["prompt"] + "\n" + p["completion"] for p in pairs), args.test_tokens)
    fit, test = (hidden_states(model, ids, layers) for ids in (fit_ids, test_ids))
    fit_ids, test_ids = without_first(fit_ids), without_first(test_ids)

    rows = []
    for layer in layers:
        nearest = share_right(test[layer], embeddings, test_ids)
        read = ridge(fit[layer], embeddings[fit_ids])
        linear = share_right(read(test[layer]), embeddings, test_ids)
        rows.append((layer, nearest, linear))
        print(f"layer {layer:2}: nearest {nearest:6.1%}  linear {linear:6.1%}", flush=True)

    labels = labels_read(model, test_ids)
    print(f"labels from the gradient by the last layer's output: {labels:.1%}")

    date = datetime.date.today().isoformat()
    out = pathlib.Path(args.out or ROOT / f"benches/runs/{date}-leak")
    out.mkdir(parents=True, exist_ok=True)
    table = "\n".join(f"| {layer} | {nearest:.1%} | {linear:.1%} |" for layer, nearest, linear in rows)
    n_layers = model.config.num_hidden_layers
    (out / "result.md").write_text(
        f"""# Input tokens read from hidden states, by split point, {date}

`python benches/leak_by_layer.py`: SmolLM2-135M-Instruct ({n_layers} layers), float32. {len(test_ids)} tokens of
questions and answers; the linear reader was fitted on {len(fit_ids)} tokens of the King James Bible.
Share of tokens that are named exactly.

| first split point | nearest embedding | linear reader |
|---|---|---|
{table}

Labels read from the gradient if the trunk ends at layer {n_layers}: {labels:.1%} (254 positions).
""")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
