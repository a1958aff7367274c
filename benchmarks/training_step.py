"""The training step of PST beside the plain formula under autograd, LoRA, full fine-tuning, and other sparse methods.

One transformer encoder of BERT-base width (768, FFN 3072, 12 heads; random weights, two layers) takes whole optimizer
steps, AdamW and the schedule's step included, in each way; only the target layers train, as under LoRA. The steps are
interleaved, so that a machine that slows down slows all of them; the figures are medians of CPU time. Bytes saved for
backward are those of tensors that autograd keeps between forward and backward, without parameters and buffers.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --methods --tokens 8x128
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import peft
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BertConfig, BertModel

from peft_pst import PSTConfig, SparsityScheduler, calibrate, format_table, gemm

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
SPARSITY = 0.9


class PlainMask(torch.autograd.Function):
    """The mask of the authors' formulation: a full sort, and the gradient straight through."""

    @staticmethod
    def forward(ctx: object, importance: Tensor, sparsity: float) -> Tensor:
        pruned = importance.flatten().argsort()[: int(importance.numel() * sparsity)]
        return torch.ones_like(importance).flatten().index_fill_(0, pruned, 0).view_as(importance)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class PlainLinear(nn.Module):
    """PST as the formula reads, each intermediate left to autograd."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        n, k = base.weight.shape
        self.base = base.requires_grad_(False)
        self.U, self.V = nn.Parameter(torch.randn(n, rank)), nn.Parameter(torch.zeros(rank, k))
        self.A, self.B = nn.Parameter(torch.randn(n, rank)), nn.Parameter(torch.zeros(rank, k))
        self.R, self.C = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(k))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.U @ self.V
        importance = weight.abs() + self.A @ self.B + (self.R[:, None] + self.C[None, :])
        return F.linear(x, PlainMask.apply(importance, SPARSITY) * weight, self.base.bias)


def encoder(layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=layers, vocab_size=8)  # hidden states go in, so no real vocabulary
    model = BertModel(config, add_pooling_layer=False).encoder
    model.config = config
    return model


def plain(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PlainLinear(module))
    return model


def pst(model: nn.Module, **choices: object) -> nn.Module:
    """Sparse training at its final sparsity, 0.9 or what N:M implies, from the first step on."""
    config = PSTConfig(schedule="constant", norms=False, **{"target_modules": TARGETS, **choices})
    model = get_peft_model(model, config)
    if config.importance == "wanda":
        calibrate(model, [{"hidden_states": torch.randn(2, 16, 768)}])
    model.base_model.set_sparsity(config.sparsity)
    return model


def lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=8, target_modules=TARGETS))


LORA = "LoRA r=8"
MKL_ONLY = "PST, products by MKL"  # as the other three have them; see peft_pst/gemm.py
VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "PST": pst,
    MKL_ONLY: pst,
    "plain formula under autograd": plain,
    LORA: lora,
    "full fine-tuning": lambda model: model,
}


# one changed argument each
METHODS = {
    **{f"PST, {pattern}": {"pattern": pattern} for pattern in ("2:4", "4:8", "block:8x1", "block:32x32")},
    **{f"PST, {pattern}": {"pattern": pattern} for pattern in ("row", "column")},
    "PST, neuron (FFN only)": {"pattern": "neuron", "target_modules": TARGETS[-2:], "exclude_modules": TARGETS[3:4]},
    "PST, head (attention only)": {"pattern": "head", "target_modules": TARGETS[:4]},
    **{name: {"importance": name} for name in ("magnitude", "movement")},
    "soft_movement, global": {"importance": "soft_movement", "budget": "global"},
    **{name: {"importance": name} for name in ("l0", "wanda")},
    "PST, global": {"budget": "global"},
    "PST, mask_interval=10": {"mask_interval": 10},
    "PST, global, mask_interval=10": {"budget": "global", "mask_interval": 10},
    "PST, update=none": {"update": "none"},
    "PST, update=full": {"update": "full"},
    "magnitude, update=full": {"importance": "magnitude", "update": "full"},
    "movement, update=full": {"importance": "movement", "update": "full"},
}


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: SparsityScheduler | None, x: Tensor
) -> tuple[float, float]:
    """CPU seconds of forward and backward, and of the whole step with optimizer and schedule."""
    start = time.process_time()
    model(hidden_states=x).last_hidden_state.square().mean().backward()
    middle = time.process_time()
    optimizer.step()
    optimizer.zero_grad()
    if scheduler is not None:
        scheduler.step()
    return middle - start, time.process_time() - start


def typical(times: list[float], scheduler: SparsityScheduler | None) -> float:
    """The median time of a step, the first left out; under a mask interval the masks' share of each step added."""
    interval = 1 if scheduler is None else scheduler.layers[0].active_config.mask_interval
    if interval == 1:
        return statistics.median(times[1:])
    selecting = times[interval - 1 :: interval]
    others = [time for i, time in enumerate(times[1:], start=2) if i % interval]
    return (statistics.median(selecting) + (interval - 1) * statistics.median(others)) / interval


def bytes_saved(model: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, parameters and buffers left out."""
    parameters = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(hidden_states=x).last_hidden_state
    del output
    return sum(kept.values())


def measure(batch: int, tokens: int, layers: int, rounds: int, methods: bool) -> list[list[str]]:
    x = torch.randn(batch, tokens, 768)
    variants = {name: make for name, make in VARIANTS.items() if name != MKL_ONLY or gemm.prefers_onednn()}
    if methods:
        others = {name: partial(pst, **choices) for name, choices in METHODS.items()}
        variants = {"PST": variants["PST"], "full fine-tuning": variants["full fine-tuning"], **others}
    models = {name: make(encoder(layers)).train() for name, make in variants.items()}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        for name, model in models.items()
    }
    schedulers = {
        name: SparsityScheduler(model, 1000) if isinstance(model, PeftModel) and name != LORA else None
        for name, model in models.items()
    }
    saved = {name: bytes_saved(model, x.clone().requires_grad_()) for name, model in models.items()}
    times = {name: [] for name in models}
    for _ in tqdm(range(rounds + 1), desc=f"{batch}x{tokens} tokens"):
        for name, model in models.items():
            with patch.object(gemm, "prefers_onednn", lambda: False) if name == MKL_ONLY else nullcontext():
                times[name].append(step(model, optimizers[name], schedulers[name], x.clone().requires_grad_()))
    medians = {
        name: [typical(list(kind), schedulers[name]) for kind in zip(*taken, strict=True)]
        for name, taken in times.items()
    }
    mine = "PST"
    return [
        [
            f"{batch}x{tokens}",
            name,
            f"{1000 * medians[name][1]:.0f} ms",
            f"{medians[name][1] / medians[mine][1]:.2f}",
            f"{medians[name][0] / medians[mine][0]:.2f}",
            f"{saved[name] / 1e6:.1f} MB",
            f"{saved[name] / saved[mine]:.3f}",
        ]
        for name in models
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", default="8x128,32x128", help="batches as sequences x tokens")
    parser.add_argument("--methods", action="store_true", help="patterns, importances and updates instead of LoRA")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for shape in args.tokens.split(","):
        batch, tokens = map(int, shape.split("x"))
        rows += measure(batch, tokens, args.layers, args.rounds, args.methods)
    print(f"{cpu_name()}, {args.threads} threads, Python {platform.python_version()}, torch {torch.__version__},")
    print(f"peft {peft.__version__}, transformers {transformers.__version__}; sparsity {SPARSITY}\n")
    header = ("tokens", "training", "CPU time a step", "to PST", "forward+backward", "saved for backward", "to PST")
    print(format_table(header, rows))


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
