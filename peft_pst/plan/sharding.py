"""What each of several devices holds of a training.

With n devices, a device holds of the weights W, the gradients G and the optimizer's states S:

| sharding | weights | gradients | states |
| --- | --- | --- | --- |
| none (DDP) | W | 2 G | S |
| zero-1 | W | G | S / n |
| zero-2 | W | G / n | S / n |
| zero-3, fsdp | W / n + gathered | G / n + gathered | S / n |

and all of its own activations and temporaries, but those of the optimizer, which works on what the device holds of the
states. ZeRO's stages are those of Rajbhandari et al., arXiv 1910.02054, section 5; FSDP shards as stage 3 does
(https://docs.pytorch.org/docs/stable/fsdp.html). DDP copies the gradients into its buckets (`gradient_as_bucket_view`
is off by default); one device has no buckets. Gathered are the weights of the largest block, an entry of the model's
lists of layers, and of all that is outside of the blocks, such as embeddings; and the gradients of what trains there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

SHARDINGS = ("none", "zero-1", "zero-2", "zero-3", "fsdp")
CATEGORIES = ("weights", "gradients", "optimizer_states", "activations", "temporaries")

Shares = Mapping[str, float]
"""The share of each category that one device holds."""


def shares_of(sharding: str, devices: int) -> Shares:
    """The share of each category that one of several devices holds, without what it gathers."""
    stage = SHARDINGS.index(sharding.replace("fsdp", "zero-3"))
    return {
        "weights": 1 / devices if stage >= 3 else 1,
        "gradients": 1 / devices if stage >= 2 else 2 if stage == 0 and devices > 1 else 1,
        "optimizer_states": 1 / devices if stage >= 1 else 1,
        "activations": 1,
        "temporaries": 1,
    }


def gathered_bytes(model: nn.Module, sharding: str, devices: int) -> dict[str, int]:
    """Bytes of the weights, and of their gradients, that a device holds whole beside its shards."""
    if sharding not in ("zero-3", "fsdp") or devices == 1:
        return {}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    blocks = [block for name in outermost for block in model.get_submodule(name)]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    largest = max(blocks, key=lambda block: _bytes(block.parameters()), default=nn.Identity())
    gathered = [*outside, *largest.parameters()]
    return {"weights": _bytes(gathered), "gradients": _bytes(p for p in gathered if p.requires_grad)}


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
