"""The memory of a causal language model at work, in a process of its own: peak_memory.py FOLDER WORK BATCH

FOLDER holds a config; WORK is `training`, two steps of AdamW with so many texts of 16 tokens under bf16 autocast, or
`generating`, 24 tokens for one text. Prints how many bytes the peak of the resident memory lies above what the process
had before there was a model. Weights are random: they take as much memory.
"""

import sys
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def work(model: PreTrainedModel, kind: str, batch_size: int) -> None:
    if kind == "generating":
        ids = torch.ones(1, 8, dtype=torch.int64)
        model.eval().generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=24, max_new_tokens=24)
        return
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.ones(batch_size, 16, dtype=torch.int64)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    folder, kind, batch_size = sys.argv[1:]
    small = AutoConfig.from_pretrained(folder, vocab_size=64, num_hidden_layers=1)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(small, name, 0)
    work(AutoModelForCausalLM.from_config(small), kind, 1)  # what torch allocates once, for any model
    before = psutil.Process().memory_info().rss
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making it, which held tied weights twice
    work(model, kind, int(batch_size))
    # not getrusage, whose peak may be that of the process that started this one
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(1024 * int(peak.split()[1]) - before)


if __name__ == "__main__":
    main()
