#!/usr/bin/env python3
"""Transformers + PEFT on the uncut model with every sample padded to the limit: one JSON line.

    python benches/peft_padded.py --model FOLDER --data FILE.jsonl --template FILE [...]

`packing.py` runs it. Questions and answers go through the chat template, the assistant's words are
what is learned ({% generation %}), and `padding="max_length"` fills each sample up to --seq tokens.
Made for torch 2.11.0, transformers 5.23.0, peft 0.21.2.
"""

import argparse
import json
import os
import pathlib
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def samples(args, tokenizer):
    """Padded ids, mask and labels, each [1, seq]."""
    template = pathlib.Path(args.template).read_text()
    for line in pathlib.Path(args.data).read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        messages = [dict(role="user", content=pair["prompt"]),
                    dict(role="assistant", content=pair["completion"])]
        tokens = tokenizer.apply_chat_template(
            messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True)
        ids, said = tokens["input_ids"][:args.seq], tokens["assistant_masks"][:args.seq]
        padded = tokenizer.pad({"input_ids": [ids]}, padding="max_length", max_length=args.seq,
                               padding_side="right", return_tensors="pt")
        labels = torch.full((1, args.seq), -100)
        labels[0, :len(ids)] = torch.tensor([i if s else -100 for i, s in zip(ids, said)])
        yield padded["input_ids"], padded["attention_mask"], labels


def main():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--model", required=True)
    a.add_argument("--data", required=True)
    a.add_argument("--template", required=True)
    a.add_argument("--batch", type=int, default=4)
    a.add_argument("--seq", type=int, default=512)
    a.add_argument("--rank", type=int, default=8)
    a.add_argument("--threads", type=int, default=2)
    args = a.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    from peft import LoraConfig, get_peft_model
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = list(samples(args, tokenizer))
    model = AutoModelForCausalLM.from_pretrained(
        args.model, attn_implementation="sdpa", dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(
        task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0,
        target_modules=TARGETS)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
    steps = []
    for i in range(0, len(rows), args.batch):
        ids, mask, labels = (torch.cat(part) for part in zip(*rows[i:i + args.batch]))
        start = time.perf_counter()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        steps.append(dict(samples=len(ids), tokens=int(mask.sum()), computed=ids.numel(),
                          seconds=round(seconds, 4), loss=round(loss.item(), 4)))
    print(json.dumps(dict(steps=steps)))


if __name__ == "__main__":
    main()
