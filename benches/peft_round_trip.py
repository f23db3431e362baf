#!/usr/bin/env python3
"""Train with us, go on with PEFT, import, go on with us: what differs at each hand-over.

    python benches/peft_round_trip.py MODEL_DIR [--text FILE] [--steps 3] [--split 3..26] [...]

Everything in float32, without dropout, with all samples in every step, so that both sides take the
same steps. The real binary and the real PEFT take turns:

1. `offshoot train` begins an adapter; `offshoot export` writes it; PEFT loads it.
2. PEFT goes on for as many steps and saves; `offshoot import` and `offshoot train --resume latest` go
   on for as many steps; PEFT loads the result, and goes on itself from the same place.

At each hand-over the same adapter is in both: logits by `offshoot verify` (through bottom, a server's
trunk and top) against PEFT's, and the loss by `offshoot eval` uncut, through the split and merged
(`offshoot merge`), against PEFT's. Prints a table; exit status 1 if something differs by more than
1e-4. `--record DIR` keeps what the test `peft_round_trip` needs (tests/fixtures/round_trip was made
with the model tests/fixtures/tiny_text and --split 1..3). Needs torch, transformers, peft.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from whole_job import ROOT, Process, wait_ready

BOUND = 1e-4
LEARNING_RATE = 3e-3
MAX_GRAD_NORM = 1.0
TEXTS = [
    "Many offshoots grow from one trunk, and each offshoot has its own leaves.",
    "The gardener waters the trunk in the morning.",
    "How do I reset my password? Open the settings and follow the steps.",
    "A tree is a tall plant with a trunk, branches and leaves, and 12 birds in it.",
]


def arguments():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("model", help="a Hugging Face directory with a tokenizer")
    a.add_argument("--offshoot", default=str(ROOT / "target/release/offshoot"))
    a.add_argument("--text", help="a text file; its first paragraphs are the samples")
    a.add_argument("--samples", type=int, default=4)
    a.add_argument("--max-seq-length", type=int, default=64)
    a.add_argument("--split", default="1..3", help="the server's layers")
    a.add_argument("--steps", type=int, default=3, help="of each of the three legs")
    a.add_argument("--rank", type=int, default=4)
    a.add_argument("--alpha", type=float, default=6)
    a.add_argument("--targets", default="q_proj,v_proj,down_proj")
    a.add_argument("--record", help="folder for what the test needs")
    return a.parse_args()


class Ours:
    """The binary, and a server of it."""

    def __init__(self, args, scratch):
        self.args, self.scratch, self.texts = args, scratch, scratch / "texts.txt"
        self.s1, self.s2 = args.split.split("..")
        cores = os.sched_getaffinity(0)
        self.server = Process(
            [args.offshoot, "serve", "--model-name", args.model, f"--split-point-1={self.s1}",
             f"--split-point-2={self.s2}", "--host=127.0.0.1", "--port=0"],
            cores, {}, scratch)
        self.address = f"127.0.0.1:{wait_ready(self.server)}"

    def run(self, *command):
        done = subprocess.run([self.args.offshoot, *map(str, command)], text=True, cwd=self.scratch,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode in (0, 1), f"{command}:\n{done.stdout}"
        return done.stdout

    def train(self, run, steps, *more):
        """Losses of the steps."""
        out = self.run(
            "train", "--model-name", self.args.model, "--server", self.address,
            "--train-file", self.texts, "--output-dir", run, "--max-steps", steps,
            "--max-seq-length", self.args.max_seq_length, "--batch-size", self.args.samples,
            "--learning-rate", LEARNING_RATE, "--lr-scheduler", "constant", "--warmup-steps", 0,
            "--max-grad-norm", MAX_GRAD_NORM, "--lora-dropout", 0, "--wire-dtype", "f32",
            "--no-cache", "--no-tensorboard", *more)
        metrics = self.scratch / run / "metrics.jsonl"
        assert metrics.exists(), out
        events = [json.loads(line) for line in metrics.read_text().splitlines()]
        losses = [e["loss"] for e in events if e.get("event", "step") == "step" and "loss" in e]
        assert len(losses) == steps, f"{losses}\n{out}"
        return losses

    def logits_error(self, adapter, theirs, ids):
        """Largest relative error of our logits of an adapter against PEFT's."""
        case, reference = self.scratch / "case.json", self.scratch / "reference.safetensors"
        case.write_text(json.dumps({"input_ids": ids}))
        save_file({f"logits.{i}": y.contiguous() for i, y in enumerate(theirs)}, reference)
        out = self.run("verify", "--model", self.args.model, "--adapter", adapter, "--case", case,
                       "--reference", reference, "--server", self.address)
        errors = re.findall(r"^logits\.\d+\s+\S+\s+(\S+)", out, re.M)
        assert len(errors) == len(ids), out
        return max(map(float, errors))

    def losses(self, adapter, name):
        """Uncut, through the split, merged."""
        merged = f"merged-{name}"
        self.run("merge", "--model-name", self.args.model, "--adapter", adapter,
                 "--output-dir", merged, "--max-shard-size", "200MB")
        data = ["--eval-file", self.texts, "--max-seq-length", self.args.max_seq_length,
                "--no-cache", "--json"]
        base = ["eval", "--model-name", self.args.model, "--adapter", adapter, "--no-base", *data]
        runs = {"uncut": base, "split": [*base, "--server", self.address],
                "merged": ["eval", "--model-name", merged, *data]}
        found = {}
        for way, command in runs.items():
            out = json.loads(self.run(*command).splitlines()[-1])
            found[way] = out["base" if way == "merged" else "adapter"]["loss"]
        return found, self.scratch / merged


class Theirs:
    """Transformers and PEFT on the same samples."""

    def __init__(self, args, texts):
        self.args = args
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.ids = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]
        assert all(len(ids) <= args.max_seq_length for ids in self.ids), "a sample is too long"

    def load(self, adapter):
        """A warning of PEFT's would be an adapter that is not quite its own."""
        base = AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        of_peft = [str(w.message) for w in caught if "gradient_checkpointing" not in str(w.message)]
        assert not of_peft, of_peft
        config = model.peft_config["default"]
        assert (config.r, config.lora_alpha) == (self.args.rank, self.args.alpha), config
        return model

    def logits(self, model):
        with torch.no_grad():
            return [model.eval()(torch.tensor([ids]), use_cache=False).logits[0]
                    for ids in self.ids]

    def loss(self, model):
        pairs = [(model(torch.tensor([ids]), use_cache=False).logits[0], ids) for ids in self.ids]
        total = sum(F.cross_entropy(y[:-1], torch.tensor(ids[1:]), reduction="sum")
                    for y, ids in pairs)
        return total / sum(len(ids) - 1 for ids in self.ids)

    def train(self, model):
        """As `offshoot train` is asked to above; dropout is 0. Losses of the steps."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
        losses = []
        for _ in range(self.args.steps):
            loss = self.loss(model.train())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses


class Table:
    def __init__(self):
        self.failed = False

    def row(self, what, difference):
        mark = "" if difference < BOUND else "  FAILS"
        self.failed |= difference >= BOUND
        print(f"{what:64} {difference:.1e}{mark}", flush=True)

    def hand_over(self, name, adapter, ours, theirs, model):
        logits = theirs.logits(model)
        self.row(f"{name}: logits, ours (split) against PEFT's, relative",
                 ours.logits_error(adapter, logits, theirs.ids))
        with torch.no_grad():
            loss = theirs.loss(model.eval()).item()
        found, merged = ours.losses(adapter, name)
        for way, value in found.items():
            self.row(f"{name}: loss, ours ({way}) against PEFT's {loss:.6f}", abs(value - loss))
        again = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        norm = sum((a - b).norm() / b.norm() for a, b in zip(theirs.logits(again), logits))
        self.row(f"{name}: logits, our merged model in Transformers, relative",
                 norm.item() / len(logits))
        return logits


def main():
    args = arguments()
    args.model = str(pathlib.Path(args.model).resolve())
    texts = TEXTS
    if args.text:
        paragraphs = re.split(r"\n\s*\n", pathlib.Path(args.text).read_text())
        texts = [" ".join(p.split())[:150] for p in paragraphs if p.strip()]
    texts = texts[:args.samples]
    args.samples = len(texts)
    table = Table()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        (scratch / "texts.txt").write_text("\n\n".join(texts) + "\n")
        theirs, ours = Theirs(args, texts), Ours(args, scratch)
        try:
            lora = ["--lora-rank", args.rank, "--lora-alpha", args.alpha,
                    "--target-modules", args.targets]
            tensors = {}
            begun = ours.train("run-1", args.steps, *lora)
            ours.run("export", "run-1", "--output", "ours", "--base-model", args.model)
            model = theirs.load(scratch / "ours")
            first = table.hand_over("ours, in PEFT", scratch / "ours", ours, theirs, model)

            middle = theirs.train(model)
            model.save_pretrained(scratch / "peft")
            second = table.hand_over("PEFT's, imported", scratch / "peft", ours, theirs, model)

            ours.run("import", "peft", "--model-name", args.model, "--output-dir", "run-2",
                     "--server", ours.address)
            ended = ours.train("run-2", args.steps, "--resume", "latest")
            ours.run("export", "run-2", "--output", "end", "--base-model", args.model)
            result = theirs.load(scratch / "end")
            table.hand_over("ours again, in PEFT", scratch / "end", ours, theirs, result)

            expected = theirs.train(theirs_again := theirs.load(scratch / "peft"))
            for step, (a, b) in enumerate(zip(ended, expected), 1):
                table.row(f"third leg, step {step}: loss {a:.6f}, ours against PEFT's", abs(a - b))
            third = theirs.logits(theirs_again)
            far = max(((a - b).norm() / b.norm()).item()
                      for a, b in zip(theirs.logits(result), third))
            table.row("third leg: logits after it, ours against PEFT's, relative", far)
            print("losses:", ", ".join(f"{x:.4f}" for x in [*begun, *middle, *ended]))
            if args.record:
                for name, logits in (("ours", first), ("peft", second), ("end", third)):
                    tensors |= {f"{name}.{i}": y.contiguous() for i, y in enumerate(logits)}
                tensors["middle_losses"] = torch.tensor(middle)
                tensors["end_losses"] = torch.tensor(expected)
                record(pathlib.Path(args.record), scratch, args, theirs, tensors)
        finally:
            ours.server.stop()
    sys.exit(1 if table.failed else 0)


def record(folder, scratch, args, theirs, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "reference.safetensors")
    shutil.copy(scratch / "texts.txt", folder)
    case = dict(input_ids=theirs.ids, steps=args.steps, learning_rate=LEARNING_RATE,
                max_grad_norm=MAX_GRAD_NORM, r=args.rank, lora_alpha=args.alpha,
                target_modules=args.targets.split(","), max_seq_length=args.max_seq_length)
    (folder / "case.json").write_text(json.dumps(case) + "\n")
    for name in ("ours", "peft"):
        (folder / name).mkdir(exist_ok=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(scratch / name / file, folder / name)
        # No path of the machine that made it.
        config = json.loads((folder / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "tests/fixtures/" + pathlib.Path(args.model).name
        if config["target_modules"] is not None:
            config["target_modules"] = sorted(config["target_modules"])
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / name / "adapter_config.json").write_text(text)


if __name__ == "__main__":
    main()
