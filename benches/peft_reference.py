#!/usr/bin/env python3
"""Numbers of Transformers + PEFT for `offshoot verify --case --reference`, for any model and adapter.

    python benches/peft_reference.py MODEL_DIR ADAPTER_DIR OUT_DIR

Writes OUT_DIR/case.json (random ids, unequal lengths) and OUT_DIR/reference.safetensors (logits of
each sequence, the mean loss over all predicted tokens, every LoRA gradient), in float32, without
dropout. Needs torch, transformers, peft and safetensors.
"""

import json
import pathlib
import sys

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

model_dir, adapter_dir, out = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
out.mkdir(parents=True, exist_ok=True)
base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
model = PeftModel.from_pretrained(base, adapter_dir, is_trainable=True).eval()
generator = torch.Generator().manual_seed(7)
sequences = [
    torch.randint(0, base.config.vocab_size, (n,), generator=generator) for n in (23, 64, 2, 9)
]
tensors, total = {}, torch.zeros(())
for i, ids in enumerate(sequences):
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    tensors[f"logits.{i}"] = logits.detach().contiguous()
    total = total + torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
loss = total / sum(len(ids) - 1 for ids in sequences)
loss.backward()
tensors["loss"] = loss.detach()
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        tensors[f"grad.{name}"] = parameter.grad.contiguous()
save_file(tensors, out / "reference.safetensors")
(out / "case.json").write_text(json.dumps({"input_ids": [ids.tolist() for ids in sequences]}))
print(f"loss {loss.item():.6f}, {len(tensors)} tensors in {out}")
