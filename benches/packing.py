#!/usr/bin/env python3
"""Real questions and answers without padding, against loaders that pad to the limit.

    python benches/packing.py [--python PYTHON_WITH_PEFT] [--samples 64] [--rounds 2] [...]

The same samples (LoRA of rank 8 on all linear layers, float32, limit 512 tokens) go once through

    packed      offshoot as it is: 4 samples a step, nothing is padded
    budget      the same with --max-tokens-per-batch 2048: as many samples a step as fit
    padded      offshoot, each sample filled up to 512 tokens that are not learned, 4 samples a step
    peft        Transformers + PEFT on the uncut model, padding="max_length", 4 samples a step

in turn on the same cores. Offshoot pads nothing by itself: a chat template that ends with 512 end
tokens stands for the loader that does. Steps of `packed` and `padded` have the same samples, and the
script checks that their losses agree: what is compared learns the same.

Writes benches/runs/DATE-packing/: result.md and raw.jsonl (one line a run). Needs a release build and
`cargo xtask fetch`, and only the standard library; PEFT's side needs a Python with torch,
transformers and peft: `.venv` is made unless --python names one.
"""

import argparse
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

from whole_job import DEMO, PINNED, ROOT, SPLIT, Process, machine, prepare, python_with_peft, wait_ready

# A question, a line break, the answer and its end: what --prompt-format plain makes of a pair.
TEMPLATE = ("{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
            "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ '\\n' }}{% endif %}"
            "{% endfor %}")
SIDES = ["packed", "budget", "padded", "peft"]


def arguments():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--python", help="has torch, transformers and peft (default: .venv)")
    a.add_argument("--offshoot", default=str(ROOT / "target/release/offshoot"))
    a.add_argument("--samples", type=int, default=64, help="evenly from the questions and answers")
    a.add_argument("--rounds", type=int, default=2)
    a.add_argument("--warm", type=int, default=1, help="steps at the beginning that do not count")
    a.add_argument("--batch", type=int, default=4)
    a.add_argument("--seq", type=int, default=512, help="limit, and what is padded to")
    a.add_argument("--threads", type=int, default=2, help="cores, and threads of each process")
    a.add_argument("--out", help="folder for the record (default: benches/runs/DATE-packing)")
    return a.parse_args()


def write_inputs(args, scratch):
    """The samples, and the template without and with padding."""
    lines = (DEMO / "support.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= args.samples, f"there are {len(lines)} questions and answers"
    chosen = [lines[i * len(lines) // args.samples] for i in range(args.samples)]
    (scratch / "samples.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    (scratch / "packed.jinja").write_text(TEMPLATE)
    padding = "{% for i in range(" + str(args.seq) + ") %}{{ eos_token }}{% endfor %}"
    (scratch / "padded.jinja").write_text(TEMPLATE + padding)


def run_peft(args, python, folder, scratch, cores):
    process = Process(
        [python, "-W", "ignore", ROOT / "benches/peft_padded.py", "--model", folder,
         "--data", scratch / "samples.jsonl", "--template", scratch / "packed.jinja",
         "--batch", args.batch, "--seq", args.seq, "--threads", args.threads],
        cores, {"OMP_NUM_THREADS": str(args.threads)}, ROOT, subprocess.PIPE)
    out, _ = process.child.communicate()
    process.check()
    return json.loads(out.strip().splitlines()[-1])["steps"]


def run_offshoot(args, side, gguf, scratch, cores):
    environment = {"OMP_NUM_THREADS": str(args.threads)}
    template = "padded.jinja" if side == "padded" else "packed.jinja"
    # A step with a budget has many samples: the same ones several times give steps to measure.
    epochs = 1 if side != "budget" else 6
    size = [f"--batch-size={args.batch}"]
    if side == "budget":
        size = [f"--max-tokens-per-batch={args.batch * args.seq}"]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        folder = pathlib.Path(folder)
        server = Process(
            [args.offshoot, "serve", "--model-name", gguf, *SPLIT, "--dtype=f32",
             "--host=127.0.0.1", "--port=0"], cores, environment, folder)
        client = None
        try:
            port = wait_ready(server)
            client = Process(
                [args.offshoot, "train", "--model-name", gguf, *SPLIT, "--server-host=127.0.0.1",
                 f"--server-port={port}", "--lora-rank=8", "--lora-alpha=16", "--lora-dropout=0",
                 *size, f"--max-seq-length={args.seq}", f"--num-epochs={epochs}",
                 "--learning-rate=1e-4", "--warmup-steps=0", "--log-interval=1",
                 "--save-interval=1000000", f"--train-file={scratch / 'samples.jsonl'}",
                 "--prompt-format=chat", f"--chat-template={scratch / template}", "--no-cache",
                 f"--output-dir={folder / 'out'}", "--dtype=f32", "--wire-dtype=f32"],
                cores, environment, folder)
            client.child.wait()
            client.check()
            events = (folder / "out/metrics.jsonl").read_text().splitlines()
        finally:
            if client:
                client.stop()
            server.stop()
    steps = [event for event in map(json.loads, events) if event["event"] == "step"]
    return [dict(samples=s["samples"], tokens=s["tokens"], computed=s["tokens"],
                 seconds=round(1 / s["steps_per_second"], 4), loss=round(s["loss"], 4))
            for s in steps]


def check(runs):
    """Padding must change no loss: the steps of `packed` and `padded` have the same samples."""
    losses = {side: [[s["loss"] for s in r["steps"]] for r in runs if r["side"] == side]
              for side in ("packed", "padded")}
    worst = max((abs(a - b) for one, two in zip(losses["packed"], losses["padded"])
                 for a, b in zip(one, two, strict=True)), default=0.0)
    assert worst < 2e-3, f"padding changed a loss by {worst}"
    # Transformers reads the GGUF file's tokenizer a little differently where blanks meet digits.
    real = {side: [sum(s["tokens"] for s in r["steps"]) for r in runs if r["side"] == side]
            for side in ("packed", "peft")}
    for ours, theirs in zip(real["packed"], real["peft"]):
        assert abs(ours - theirs) <= 0.01 * theirs, f"{ours} tokens here, {theirs} at the peer"
    return worst


def table(args, runs):
    rows = ["| side | samples a step | computed tokens a step | of them padding | steps/s | samples/s "
            "| samples/s by round |", "|---|---|---|---|---|---|---|"]
    packed = [s for r in runs if r["side"] == "packed" for s in r["steps"]]
    real_tokens = sum(s["tokens"] for s in packed) / sum(s["samples"] for s in packed)
    speed = {}
    for side in SIDES:
        mine = [r["steps"][args.warm:] for r in runs if r["side"] == side]
        total = {k: sum(s[k] for steps in mine for s in steps)
                 for k in ("samples", "computed", "seconds")}
        n = sum(map(len, mine))
        speed[side] = total["samples"] / total["seconds"]
        rounds = [sum(s["samples"] for s in steps) / sum(s["seconds"] for s in steps)
                  for steps in mine]
        whole = [s for r in runs if r["side"] == side for s in r["steps"]]
        computed = sum(s["computed"] for s in whole) / sum(s["samples"] for s in whole)
        padding = 1 - real_tokens / computed
        rows.append(f"| {side} | {total['samples'] / n:.1f} | {total['computed'] / n:.0f} | "
                    f"{padding:.0%} | {n / total['seconds']:.3f} | {speed[side]:.2f} | "
                    f"{', '.join(f'{x:.2f}' for x in rounds)} |")
    lines = ["", "| ratio of samples per second | |", "|---|---|"]
    for a in ("packed", "budget"):
        for b in ("padded", "peft"):
            lines.append(f"| {a} / {b} | {speed[a] / speed[b]:.1f} |")
    return "\n".join(rows + lines)


def main():
    args = arguments()
    # A plain kill must not leave a server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    assert args.samples // args.batch > args.warm, "no step is left to measure"
    python = python_with_peft(args)
    gguf, folder, _ = prepare(python)
    assert pathlib.Path(args.offshoot).exists(), \
        f"no {args.offshoot}: run `cargo build --release -p offshoot` first"
    cores = set(sorted(os.sched_getaffinity(0))[:args.threads])
    date = datetime.date.today().isoformat()
    out = pathlib.Path(args.out or ROOT / f"benches/runs/{date}-packing")
    out.mkdir(parents=True, exist_ok=True)

    runs = []
    with tempfile.TemporaryDirectory(dir=DEMO) as scratch, (out / "raw.jsonl").open("w") as raw:
        scratch = pathlib.Path(scratch)
        write_inputs(args, scratch)
        for round_ in range(args.rounds):
            for side in SIDES[::-1] if round_ % 2 else SIDES:
                load = os.getloadavg()[0]
                if side == "peft":
                    steps = run_peft(args, python, folder, scratch, cores)
                else:
                    steps = run_offshoot(args, side, gguf, scratch, cores)
                run = dict(round=round_, side=side, load_before=round(load, 2), steps=steps)
                runs.append(run)
                raw.write(json.dumps(run) + "\n")
                raw.flush()
                counted = steps[args.warm:]
                speed = sum(s["samples"] for s in counted) / sum(s["seconds"] for s in counted)
                print(f"round {round_} {side:7}: {speed:.2f} samples/s, {len(steps)} steps, loss "
                      f"{steps[0]['loss']} to {steps[-1]['loss']}", flush=True)
    worst = check(runs)

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE).stdout.strip()
    options = " ".join(f"--{k} {v}" for k, v in vars(args).items()
                       if k in ("samples", "rounds", "warm", "batch", "seq", "threads"))
    result = f"""# Questions and answers without padding, {date}

{table(args, runs)}

- Command: `python benches/packing.py {options}`
- Commit: {commit}
- Machine: {machine()}; all sides pinned to {args.threads} cores, {args.threads} threads a process
- Peer: {", ".join(PINNED)}
- {args.samples} samples, evenly from the questions and answers of `cargo xtask fetch`; limit
  {args.seq} tokens; LoRA of rank 8 on all linear layers, float32 everywhere; offshoot as two
  processes over loopback, layers 0 to 20 of 30 at the server.
- Speeds are over all steps of {args.rounds} rounds in turn but the first {args.warm} of each run.
  `budget` goes through the samples six times, the others once.
- Losses of `packed` and `padded`, whose steps have the same samples, differ by at most {worst:.4f}.
- raw.jsonl has every step.
"""
    (out / "result.md").write_text(result)
    print("\n" + result)


if __name__ == "__main__":
    main()
