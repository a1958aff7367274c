"""A training step of one linear layer: PST beside full fine-tuning and LoRA."""

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from timing import device, medians, peak_bytes
from torch import Tensor, nn

from peft_pst import PSTConfig, SparsityScheduler, format_table

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
TOKENS = 4096
SPARSITY = 0.9
STEPS = 10
"""That follow each other while they are timed: as in a deep model, the host enqueues them ahead of the device."""


class Layer(nn.Module):
    """One linear layer, so that PEFT finds it by its name."""

    def __init__(self, out: int, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def full(out: int, size: int) -> nn.Module:
    return Layer(out, size)


def lora(out: int, size: int) -> nn.Module:
    return get_peft_model(Layer(out, size), LoraConfig(target_modules=["linear"]))


def pst(out: int, size: int) -> nn.Module:
    config = PSTConfig(target_modules=["linear"], sparsity=SPARSITY, initial_sparsity=SPARSITY, norms=False)
    return get_peft_model(Layer(out, size), config)


TRAININGS = {"PST": pst, "full fine-tuning": full, "LoRA r=8": lora}


def make_step(make: Callable[[int, int], nn.Module], shape: tuple[int, int], tokens: int) -> Callable[[], None]:
    """Forward, backward, into the input too as in the middle of a model, and AdamW, under bf16 autocast. The frozen
    weight is in bf16; what trains is in fp32, except the whole weight."""
    out, size = shape
    model = make(out, size).to(device())
    for parameter in model.parameters():
        if parameter.shape == (out, size):
            parameter.data = parameter.data.bfloat16()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    scheduler = SparsityScheduler(model, 10**6) if make is pst else None
    x = torch.randn(tokens, size, device=device(), dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, out, device=device(), dtype=torch.bfloat16)

    def step() -> None:
        with torch.autocast(device().type, dtype=torch.bfloat16):
            y = model(x)
        y.backward(dy)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None
        if scheduler is not None:
            scheduler.step()

    return step


def copies_to_the_host(step: Callable[[], None]) -> list[str]:
    """What a profile of three steps has of copies to the host and of waiting for them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            step()
    names = {event.key for event in profile.key_averages()}
    return sorted(name for name in names if "DtoH" in name or name in ("aten::item", "aten::_local_scalar_dense"))


def waits(step: Callable[[], None]) -> list[str]:
    """What torch says of the first operation of a step for which the host waits, if there is one."""
    if not torch.cuda.is_available():
        return []
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return [str(error).splitlines()[0]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return []


def many(step: Callable[[], None]) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(STEPS):
            step()

    return steps


def report(shapes: tuple[tuple[int, int], ...] = SHAPES, tokens: int = TOKENS, rounds: int = 20) -> str:
    """The table of all shapes."""
    rows, copies = [], set()
    for shape in shapes:
        peaks = {}
        for name, make in TRAININGS.items():
            step = make_step(make, shape, tokens)
            step()  # the optimizer makes its states
            peaks[name] = peak_bytes(step)
            if make is pst:
                copies.update(copies_to_the_host(step) + waits(step))
            del step
        ways = {name: many(make_step(make, shape, tokens)) for name, make in TRAININGS.items()}
        times = {name: taken / STEPS for name, taken in medians(ways, rounds).items()}
        for name in TRAININGS:
            ratios = (f"{times[name] / times[other]:.2f}" for other in ("full fine-tuning", "LoRA r=8"))
            memory = f"{peaks[name] / 2**20:,.0f} MiB"
            to_lora = f"{peaks[name] / peaks['LoRA r=8']:.2f}" if peaks["LoRA r=8"] else ""
            rows.append(("{}x{}".format(*shape), name, f"{times[name]:,.0f} µs", *ratios, memory, to_lora))
    columns = ("layer", "training", "step", "to full", "to LoRA", "peak memory", "to LoRA")
    said = f"Copies to the host in a profile of PST's steps, and waiting: {', '.join(sorted(copies)) or 'none'}."
    return f"{tokens:,} tokens, {SPARSITY:.0%} sparse.\n\n{format_table(columns, rows)}\n\n{said}"
