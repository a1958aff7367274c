"""Train a few steps at batch size 1, without a teacher, with the free one or with a copy of the base model, and print
how many bytes the peak of the resident memory lies above what the process had before there was a model."""

import sys
from pathlib import Path

import psutil
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_pst import Distillation, DistillationConfig, PSTConfig

SIZES = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "intermediate_size": 2816}


def steps(model, teacher, vocab_size, count):
    config = DistillationConfig(teacher=teacher, hidden_states=1) if teacher != "none" else None
    distillation = config and Distillation(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    inputs = {"input_ids": torch.arange(64)[None] % vocab_size, "labels": torch.arange(64)[None] % vocab_size}
    for _ in range(count):
        taught = distillation and distillation.teach(inputs)
        output = model(**(distillation.request(inputs) if distillation else inputs))
        losses = distillation.losses(inputs, output, taught) if distillation else {}
        loss = distillation.total(output.loss, losses) if distillation else output.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def student(**sizes):
    base = LlamaForCausalLM(LlamaConfig(vocab_size=100, **{**SIZES, **sizes}))
    return base, get_peft_model(base, PSTConfig(sparsity=0.9))


torch.manual_seed(0)
torch.set_num_threads(1)
small = student(hidden_size=64, num_hidden_layers=1, intermediate_size=64)[1]
steps(small, None, 100, 2)  # what torch and numba allocate once
process = psutil.Process()
before = process.memory_info().rss
base, model = student()
teacher = {"none": "none", "free": None, "copy": None}[sys.argv[1]]
if sys.argv[1] == "copy":
    teacher = LlamaForCausalLM(base.config)
    teacher.load_state_dict(
        {name.replace("base_layer.", ""): tensor for name, tensor in base.state_dict().items() if "pst_" not in name}
    )
steps(model, teacher, 100, 3)

# not getrusage, whose peak may be that of the process that started this one
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(1024 * int(peak.split()[1]) - before)
