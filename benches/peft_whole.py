#!/usr/bin/env python3
"""Transformers + PEFT train the whole, uncut model in one process: what Offshoot is measured by.

    python peft_whole.py convert GGUF_FILE FOLDER       once: a GGUF file to a Hugging Face folder
    python peft_whole.py train --model FOLDER --text FILE [--dtype f32|bf16] [...]

`train` prints one JSON line. It does what a training script of a PEFT user does: LoRA on all linear
layers of the blocks, AdamW, clipping at 1.0, real text in samples that fill --seq tokens, a new
batch each step. With bf16 the base is bf16 and the adapters stay float32 under autocast.
Made for torch 2.11.0, transformers 5.23.0, peft 0.21.2, gguf 0.19.0.
"""

import argparse
import contextlib
import json
import os
import pathlib
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def memory(field):
    """A field of this process's status in bytes (Linux)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def convert(args):
    folder, file = os.path.split(args.gguf)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(args.folder)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # What was read counts as quantized, and Transformers does not save that: a plain one does.
    config = AutoConfig.for_model(**{
        k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(args.folder)


def batches(args):
    """All samples have exactly `seq` tokens: no side may gain by short ones."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = pathlib.Path(args.text).read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    size = args.batch * args.seq
    needed = size * (args.warm + args.steps)
    assert len(ids) >= needed, f"{args.text} has {len(ids)} tokens, {needed} are needed"
    for start in range(0, needed, size):
        yield torch.tensor(ids[start:start + size]).view(args.batch, args.seq)


def train(args):
    from peft import LoraConfig, get_peft_model
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(
        args.model, attn_implementation="sdpa", dtype=dtype)
    if model.config.model_type == "gpt2":
        targets = ["c_attn", "c_proj", "c_fc"]
    else:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(
        task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0,
        target_modules=targets)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.01)
    bf16 = args.dtype == "bf16"

    losses, seconds, ends = [], [], []
    for i, ids in enumerate(batches(args)):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        ends.append(time.monotonic())
        if i >= args.warm:
            seconds.append(time.perf_counter() - start)
    print(json.dumps(dict(
        side="peft", dtype=args.dtype, batch=args.batch, seq=args.seq, rank=args.rank,
        threads=args.threads, step_seconds=[round(s, 4) for s in seconds],
        step_ends=[round(s, 4) for s in ends],
        losses=[round(x, 4) for x in losses],
        memory=dict(peft=dict(resident=memory("VmRSS"), peak=memory("VmHWM"))))))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser("convert")
    c.add_argument("gguf")
    c.add_argument("folder")
    t = commands.add_parser("train")
    t.add_argument("--model", required=True)
    t.add_argument("--text", required=True)
    t.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    t.add_argument("--batch", type=int, default=4)
    t.add_argument("--seq", type=int, default=128)
    t.add_argument("--rank", type=int, default=8)
    t.add_argument("--learning-rate", type=float, default=1e-4)
    t.add_argument("--warm", type=int, default=2)
    t.add_argument("--steps", type=int, default=10)
    t.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    {"convert": convert, "train": train}[args.command](args)


if __name__ == "__main__":
    main()
