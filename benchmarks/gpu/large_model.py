"""A Llama of 7B parameters with random weights, 90 % sparse: what it takes in memory, and how fast it decodes."""

from collections.abc import Iterator

import torch
from timing import as_graph, device, medians, peak_bytes
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from peft_pst import format_table
from peft_pst.sparse.linear import SparseLinear

SPARSITY = 0.9
LARGE = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32000,
    tie_word_embeddings=False,
)


def build(config: LlamaConfig) -> LlamaForCausalLM:
    """The model with sparse blocks, each weight drawn, pruned by magnitude and compressed before the next one."""
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model = model.requires_grad_(False).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in tqdm(names, desc="weights"):
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(name).to_empty(device=device())
        nn.init.normal_(module.weight, std=config.initializer_range)
        if name != "lm_head":
            prune(module.weight)
            module = SparseLinear.from_linear(module)
        setattr(model.get_submodule(parent), child, module)
    for module in model.modules():
        if next(module.children(), None) is None and not isinstance(module, (nn.Linear, SparseLinear)):
            fill(module, config)
    return model


def prune(weight: Tensor) -> None:
    threshold = weight.abs().flatten().float().kthvalue(int(SPARSITY * weight.numel())).values
    weight.masked_fill_(weight.abs() <= threshold, 0)


def fill(module: nn.Module, config: LlamaConfig) -> None:
    """The embedding at random, norms with ones, rotary frequencies as they are."""
    if hasattr(module, "inv_freq"):
        module.__init__(config, device=device())
        return
    module.to_empty(device=device())
    for parameter in module.parameters():
        nn.init.ones_(parameter) if parameter.ndim == 1 else nn.init.normal_(parameter, std=config.initializer_range)


def made_dense(model: LlamaForCausalLM) -> None:
    """Make the blocks of a model dense, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.to_linear())


def tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, SparseLinear) and module._tiles is not None:
            yield from module._tiles[:3]


def weight_bytes(model: nn.Module) -> int:
    """What all that a model computes with takes on the device, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(model)}.values())


class Decoding:
    """One token after another, at batch 1, under a CUDA graph: the token that comes is the one that went."""

    def __init__(self, model: LlamaForCausalLM, length: int = 128) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.token = torch.ones(1, 1, dtype=torch.long, device=device())
        self.position = torch.zeros(1, dtype=torch.long, device=device())

    @torch.no_grad()
    def __call__(self) -> Tensor:
        return self.model(
            input_ids=self.token,
            past_key_values=self.cache,
            cache_position=self.position,
            position_ids=self.position[None],
            use_cache=True,
        ).logits


@torch.no_grad()
def report(config: LlamaConfig = LARGE, rounds: int = 20) -> str:
    """The table of both models."""
    built: list[LlamaForCausalLM] = []
    peak = peak_bytes(lambda: built.append(build(config)))
    model = built.pop()
    prompt = torch.randint(0, config.vocab_size, (1, 8), device=device())
    logits = {"sparse": model(prompt).logits.float()}
    decode, took = {"sparse": as_graph(Decoding(model))}, {"sparse": weight_bytes(model)}
    times = medians(decode, rounds)
    del decode
    made_dense(model)
    logits["dense"], took["dense"] = model(prompt).logits.float(), weight_bytes(model)
    times |= medians({"dense": as_graph(Decoding(model))}, rounds)
    rows = [
        (
            name,
            f"{took[name] / 2**30:.2f} GiB",
            f"{took[name] / took['dense']:.3f}",
            f"{times[name] / 1000:.2f} ms",
            f"{1e6 / times[name]:,.1f}",
            f"{times['dense'] / times[name]:.2f}x",
        )
        for name in ("sparse", "dense")
    ]
    error = (logits["sparse"] - logits["dense"]).norm() / logits["dense"].norm()
    columns = ("model", "weights", "to dense", "a token", "tokens a second", "speed-up")
    size = sum(p.numel() for p in model.parameters())
    said = (
        f"{size / 1e9:.2f}B parameters, random, {SPARSITY:.0%} of the blocks' pruned by magnitude; batch 1, under",
        f"CUDA graphs. Building the sparse one took {peak / 2**30:.2f} GiB at its peak. The logits of a prompt differ",
        f"by {float(error):.1e} of their norm.",
    )
    return f"{' '.join(said)}\n\n{format_table(columns, rows)}"
