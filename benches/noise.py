#!/usr/bin/env python3
"""What noise on hidden states and gradients buys, and what it costs: recovered tokens and labels
against the loss of a run that was trained with it.

    python benches/noise.py --out benches/runs/DATE-leak [--steps 40]

Each setting trains SmolLM2 on the demo's questions and answers for the same steps with the same seed,
and is measured by `offshoot leak` with the run's adapter: once by a reader who knows the other half of
the text, once by one who knows the King James Bible only. Clip norms are the median norms that
`offshoot leak` prints. The loss is that of questions and answers that were held out, as the run saw it
(with the noise), and uncut without any noise (`offshoot eval`).

With --steps 0 nothing is trained, and the base model is measured: quicker, and what an adapter would
have learned to live with is in its losses.

Losses and shares do not depend on how busy a machine is. Writes noise.json and prints a table. Needs a
release build, `cargo xtask fetch`, and only the standard library.
"""

import argparse
import json
import os
import pathlib
import subprocess
import tempfile

from whole_job import ROOT, Process, wait_ready

# Name, hidden clip (in medians), hidden noise, gradient clip (in medians), gradient noise.
SETTINGS = [
    ("as it is", None, 0, None, 0),
    ("hidden: clip", 1, 0, None, 0),
    ("hidden: clip, noise 0.25", 1, 0.25, None, 0),
    ("hidden: clip, noise 0.5", 1, 0.5, None, 0),
    ("hidden: clip, noise 1", 1, 1, None, 0),
    ("hidden: clip, noise 2", 1, 2, None, 0),
    ("gradients: clip, noise 1", None, 0, 1, 1),
    ("gradients: clip, noise 4", None, 0, 1, 4),
    ("both: clip, noise 1", 1, 1, 1, 1),
]


def arguments():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--offshoot", default=str(ROOT / "target/release/offshoot"))
    a.add_argument("--model", default=str(ROOT / ".demo/smollm2-hf"))
    a.add_argument("--split", default="2..28")
    a.add_argument("--steps", type=int, default=40)
    a.add_argument("--tokens", type=int, default=2000, help="that are measured")
    a.add_argument("--reader-tokens", type=int, default=10000)
    a.add_argument("--batch-size", type=int, default=8)
    a.add_argument("--learning-rate", default="5e-4")
    a.add_argument("--no-labels", action="store_true", help="measure hidden states only")
    a.add_argument("--only", help="settings by number, such as 0,3")
    a.add_argument("--out", required=True, help="folder for the record")
    return a.parse_args()


def leak(args, split, adapter=None, privacy=(), **more):
    """What `offshoot leak` finds; `more`: further options."""
    command = [args.offshoot, "leak", "--model-name", args.model, "--json", "--no-cache",
               "--train-file", str(ROOT / ".demo/support.jsonl"), "--split-point-1", split[0], *privacy]
    if adapter:
        command += ["--adapter", str(adapter)]
    known = {"tokens": args.tokens, "reader_tokens": args.reader_tokens}
    command += [f"--{name.replace('_', '-')}={value}" for name, value in {**known, **more}.items()]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found | {"model": recorded(args.model), "adapter": adapter and recorded(adapter)}


def recorded(path):
    """A path as it reads on any machine: from the repository's root, or its last part. A hub name is
    not changed."""
    path = pathlib.Path(path)
    if not path.is_absolute():
        return str(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def labels(args, split, adapter=None, privacy=()):
    """The other end, on less text: all layers have to be run."""
    found = leak(args, split, adapter, privacy, split_point_2=split[1], tokens=400, reader_tokens=3000)
    return found["labels"]


def options(setting, norms):
    _, hidden_clip, hidden_noise, gradient_clip, gradient_noise = setting
    words = []
    if hidden_clip:
        words += [f"--hidden-clip-norm={hidden_clip * norms['hidden']:.3g}", f"--hidden-noise={hidden_noise}"]
    if gradient_clip:
        words += [f"--gradient-clip-norm={gradient_clip * norms['gradients']:.3g}",
                  f"--gradient-noise={gradient_noise}"]
    return words


def train(args, folder, privacy):
    subprocess.run(
        [args.offshoot, "train", "--model-name", args.model, "--server", f"127.0.0.1:{args.port}",
         "--train-file", str(ROOT / ".demo/support.jsonl"), "--eval-file", str(ROOT / ".demo/support.eval.jsonl"),
         "--output-dir", str(folder), f"--max-steps={args.steps}", f"--batch-size={args.batch_size}",
         f"--learning-rate={args.learning_rate}", "--warmup-steps=5", "--max-seq-length=256",
         f"--eval-interval={args.steps}", "--wire-dtype=f32", "--no-cache", "--quiet", "--no-tensorboard",
         *privacy], check=True)
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [e["loss"] for e in events if e["event"] == "eval"], [e["loss"] for e in events if e["event"] == "step"]


def evaluate(args, *words):
    """The loss of the model, or of the adapter that `words` name."""
    command = [args.offshoot, "eval", "--model-name", args.model, "--no-cache", "--json",
               "--eval-file", str(ROOT / ".demo/support.eval.jsonl"), "--max-seq-length=256", *words]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return (found.get("adapter") or found["base"])["loss"]


def row(name, found):
    known, bible = found["known"], found["bible"]
    share = lambda leak, reader: f"{leak['split_points'][0][reader]['top_1']:.1%}"
    return (f"| {name} | {found['eval'][-1]:.3f} | {found['uncut']:.3f} "
            f"| {share(known, 'nearest')} | {share(known, 'centred')} | {share(known, 'linear')} "
            f"| {known['split_points'][0]['linear']['rare_top_1']:.1%} | {share(bible, 'linear')} "
            f"| {of_labels(found, 'direct')} | {of_labels(found, 'linear')} |")


def of_labels(found, reader):
    return f"{found['labels'][reader]['top_1']:.1%}" if found["labels"] else "-"


HEAD = """\
| what is sent | eval loss, with noise | uncut, without | nearest | centred | linear | linear, rare | linear, stranger | labels, direct | labels, linear |
|---|---|---|---|---|---|---|---|---|---|"""


def main():
    args = arguments()
    split = args.split.split("..")
    chosen = [int(n) for n in args.only.split(",")] if args.only else range(len(SETTINGS))
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    base, base_labels = leak(args, split), None if args.no_labels else labels(args, split)
    norms = {"hidden": base["split_points"][0]["norms"]["median"], "gradients": base_labels["norms"]["median"] if base_labels else None}
    print(f"median norms: {norms}", flush=True)
    record = {"split": args.split, "steps": args.steps, "batch_size": args.batch_size,
              "learning_rate": args.learning_rate, "tokens": args.tokens, "reader_tokens": args.reader_tokens, "norms": norms, "base": base, "base_labels": base_labels,
              "settings": []}
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        command = [args.offshoot, "serve", "--model-name", args.model, "--split-point-1", split[0],
                   "--split-point-2", split[1], "--host=127.0.0.1", "--port=0", "--store-dir=store"]
        server = Process(command, os.sched_getaffinity(0), {}, place)
        try:
            args.port = wait_ready(server)
            for number in chosen:
                setting = SETTINGS[number]
                privacy, folder = options(setting, norms), place / f"run-{number}"
                if args.steps == 0:
                    through = ["--server", f"127.0.0.1:{args.port}", *privacy]
                    evaluations, losses, adapter = [evaluate(args, *through)], [], None
                    uncut = evaluate(args)
                else:
                    evaluations, losses = train(args, folder, privacy)
                    adapter, uncut = folder, evaluate(args, "--adapter", str(folder), "--no-base")
                # Noise on hidden states alone changes little at the other end.
                is_other_end = not args.no_labels and (number == 0 or setting[3] is not None)
                found = {"name": setting[0], "options": privacy, "eval": evaluations, "losses": losses,
                         "uncut": uncut, "known": leak(args, split, adapter, privacy),
                         "bible": leak(args, split, adapter, privacy, reader_data=ROOT / ".demo/scribe.txt"),
                         "labels": labels(args, split, adapter, privacy) if is_other_end else None}
                record["settings"].append(found)
                print(row(setting[0], found), flush=True)
                (out / "noise.json").write_text(json.dumps(record, indent=1) + "\n")
        finally:
            server.stop()


if __name__ == "__main__":
    main()
