"""A smaller model of the same kind, cut out of a larger one: fewer layers, narrower heads (LightChatGLM)."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PretrainedConfig, PreTrainedModel

from ..sparse.quantizer import widths_in
from .anatomy import Anatomy, find_anatomy
from .checks import check_dense
from .measuring import measure
from .plain import KEYS
from .rotary import frequency_choices, rotary_of
from .selection import CHANNELS, LAYERS, ChannelSelection, Kept, choose_layers
from .slicing import cut

NARROWED = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "glm", "glm4", "gpt2", "gpt_neox"),
    *("bert", "roberta", "xlm-roberta", "camembert"),
)
"""Only what is tested: others may scale, norm or share their channels in ways that tensors do not show."""
EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
OF_LAYERS = ("layer_types", "no_rope_layers")
"""Entries of configs that are lists with one entry for each layer."""
KINDS = ("attention_layers", "global_attn_every_n_layers")
"""Entries that say otherwise which layer is of which kind."""


def compress(
    model: PreTrainedModel,
    *,
    num_layers: int | None = None,
    head_dim: int | None = None,
    width_ratio: float | None = None,
    layers: str | Sequence[int] = "even",
    channels: str = "importance",
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Make a smaller model of the same class, that starts with weights of the model given: the mixed compression of
    LightChatGLM (Peng and Zhong, 2024).

    Depth: a part of the layers stays. Width: the number N of heads stays, while each shrinks from d to d' channels,
    and with it the hidden size H to H d'/d and that of the feed-forward blocks. The channels of the residual stream
    that stay are the same everywhere; each attention and each feed-forward block has its own. Channels that rotary
    positions turn stay in pairs, at frequencies that a config can say: every m-th from one on, by the best of them.

    What comes out is an ordinary model that plain transformers opens, to be trained on, such as against the model
    given (`DistillationConfig`). Without training it computes what the model does with the other channels zero:
    exactly with RMSNorm, as in Llama and GLM; LayerNorm subtracts the mean of the channels, which without some of them
    is another.

    Args:
        model (`PreTrainedModel`):
            A model with one stack of layers. Its width can shrink if it is one of Llama, Mistral, Qwen 2 and 3,
            SmolLM3, Granite, GLM, GPT-2, GPT-NeoX, BERT and RoBERTa. It stays as it is.
        num_layers (`int`, *optional*):
            How many layers stay; by default all, or as many as `layers` names.
        head_dim (`int`, *optional*):
            d', the channels of each head, at most d; even with rotary positions. H d'/d must be whole.
        width_ratio (`float`, *optional*):
            d'/d instead, in (0, 1]. It is rounded to the nearest d' that is possible.
        layers (`str` or `Sequence[int]`):
            Which layers stay: `"even"`, evenly spaced, the first and last among them; `"first"`; `"last"`;
            `"importance"`, those that turn their input most (ShortGPT, arXiv 2403.03853); `"random"`; or their
            numbers.
        channels (`str`):
            `"importance"`: those of which the following layers take most, by the squares of weights and of values on
            calibration data. Or `"random"`.
        calibration (iterable, *optional*):
            Batches for both kinds of importance: mappings, passed as keyword arguments, or the model's input itself.
            By default random tokens, which say less.
        seed (`int`):
            Of what is chosen at random.

    Returns:
        A model of the same class, dtype and device, with tensors of its own that train. `config.compression` says
        what of the larger model it has: `"layers"`, and if it is narrower `"channels"` of the residual stream, and the
        `"hidden_size"` that they are of. Of a model that was compressed before this is about the first one.

    Raises:
        TypeError: if it is no model of transformers, of a kind that is not known, or its weights are quantized or
            distributed.
        ValueError: if a size is impossible, an adapter is not merged yet, weights are stored sparse, layers differ in
            width after a shrink, or there is no calibration batch.
    """
    check_dense(model, "compress")
    if any(widths_in(model.config)):
        raise ValueError(
            f"The layers of this {type(model).__name__} differ in width, since shrink has made it smaller: compress "
            "first, and prune and shrink what comes out."
        )
    anatomy = find_anatomy(model)
    count = model.config.num_hidden_layers
    if not isinstance(layers, str):
        layers = [operator.index(layer) for layer in layers]
    num_layers = _check_depth(layers, num_layers, count)
    if channels not in CHANNELS:
        raise ValueError(f"channels={channels!r}: expected one of {', '.join(map(repr, CHANNELS))}.")
    head_dim = _check_width(model, anatomy, head_dim, width_ratio)
    generator = torch.Generator().manual_seed(seed)
    by_importance = (layers == "importance" and num_layers < count) or (channels == "importance" and head_dim)
    measured = measure(model, model.get_submodule(anatomy.layers), calibration) if by_importance else None
    changes = measured.changes if measured else None
    kept = Kept(choose_layers(layers, count, num_layers, changes, generator), None, {}, {})
    config = copy.deepcopy(model.config)
    _set_depth(config, kept.layers, count)
    if head_dim:
        source = measured if channels == "importance" else None
        selection = ChannelSelection(model, anatomy, source, kept.layers, generator)
        kept = _narrow(model, anatomy, config, selection, kept, head_dim)
    config.compression = _origin(model.config, kept)
    return _build(model, anatomy, config, kept)


def _origin(config: PretrainedConfig, kept: Kept) -> dict[str, Any]:
    """What of the first model is kept, if the one of this config was compressed before."""
    origin = dict(getattr(config, "compression", {}))
    before = origin.get("layers")
    origin["layers"] = [before[layer] for layer in kept.layers] if before else kept.layers
    if kept.hidden is not None:
        before = origin.get("channels")
        channels = kept.hidden.tolist()
        origin["channels"] = [before[channel] for channel in channels] if before else channels
        origin.setdefault("hidden_size", config.hidden_size)
    return origin


def _check_depth(layers: str | list[int], num_layers: int | None, count: int) -> int:
    if isinstance(layers, str):
        if layers not in LAYERS:
            raise ValueError(
                f"layers={layers!r}: expected one of {', '.join(map(repr, LAYERS))}, or the numbers of the layers "
                "that stay."
            )
        num_layers = count if num_layers is None else num_layers
    else:
        if not layers or len(set(layers)) < len(layers) or not all(0 <= layer < count for layer in layers):
            raise ValueError(f"layers={layers}: expected different numbers from 0 to {count - 1}.")
        if num_layers not in (None, len(layers)):
            raise ValueError(f"num_layers={num_layers}, but layers names {len(layers)}: leave out num_layers.")
        num_layers = len(layers)
    if not 1 <= num_layers <= count:
        raise ValueError(f"num_layers={num_layers}: expected 1 to {count}, which the model has.")
    return num_layers


def _check_width(
    model: PreTrainedModel, anatomy: Anatomy, head_dim: int | None, width_ratio: float | None
) -> int | None:
    """The channels of each head of the smaller model, None if the widths stay."""
    if head_dim is None and width_ratio is None:
        return None
    if head_dim is not None and width_ratio is not None:
        raise ValueError(f"head_dim={head_dim} and width_ratio={width_ratio} say the same: leave out one of them.")
    if model.config.model_type not in NARROWED:
        raise TypeError(
            f"compress cannot narrow a model of the type {model.config.model_type!r}: expected one of "
            f"{', '.join(NARROWED)}. Its depth can be compressed alone: leave out head_dim and width_ratio."
        )
    anatomy.check(model)
    size = next(iter(anatomy.attentions.values())).head_dim
    hidden, rotary = model.config.hidden_size, rotary_of(model)
    turned = 0 if rotary is None else 2 * len(rotary.inv_freq)  # of them an even number must stay
    possible = [d for d in range(1, size + 1) if hidden * d % size == 0 and turned * d % (2 * size) == 0]
    if width_ratio is not None:
        if not 0 < width_ratio <= 1:
            raise ValueError(f"width_ratio={width_ratio}: expected more than 0 and at most 1.")
        head_dim = min(possible, key=lambda d: abs(d - width_ratio * size))
    if head_dim not in possible:
        raise ValueError(
            f"head_dim={head_dim}: the model has {size}, and of fewer, the hidden size and pairs that rotary "
            f"positions turn stay whole with {', '.join(map(str, possible))}."
        )
    return None if head_dim == size else head_dim


def _set_depth(config: PretrainedConfig, layers: Sequence[int], count: int) -> None:
    kinds = next((key for key in KINDS if hasattr(config, key) and not getattr(config, "layer_types", None)), None)
    if kinds and len(layers) < count:
        raise TypeError(
            f"compress cannot leave out layers of a model of the type {config.model_type!r}: of which kind each is "
            f"follows from its place ({kinds} in its config), and those that stay would change theirs."
        )
    config.num_hidden_layers = len(layers)
    for key in OF_LAYERS:
        entries = getattr(config, key, None)
        if entries and len(entries) == count:
            setattr(config, key, [entries[layer] for layer in layers])


def _narrow(
    model: PreTrainedModel,
    anatomy: Anatomy,
    config: PretrainedConfig,
    selection: ChannelSelection,
    kept: Kept,
    head_dim: int,
) -> Kept:
    """Choose the channels that stay, and set their numbers in the config."""
    attention, feed_forward = (next(iter(found.values())) for found in (anatomy.attentions, anatomy.neurons))
    size, units, old = attention.head_dim, feed_forward.units, model.config
    hidden, neurons = old.hidden_size * head_dim // size, max(1, round(units * head_dim / size))
    config.hidden_size = hidden
    if hasattr(config, "head_dim") and not isinstance(getattr(type(config), "head_dim", None), property):
        config.head_dim = head_dim
    for key in KEYS["neuron"]:
        if getattr(config, key, None) == units:
            setattr(config, key, neurons)
    for key in EPS:
        if hasattr(config, key):
            setattr(config, key, getattr(config, key) * old.hidden_size / hidden)
    rotary = rotary_of(model)
    choices = [] if rotary is None else frequency_choices(rotary, old, config)
    frequencies = 0 if rotary is None else len(rotary.inv_freq)
    heads, best = selection.heads(head_dim, frequencies, [choice.kept for choice in choices])
    if choices:
        choices[best].set_in(config)
    return kept._replace(
        hidden=selection.hidden(old.hidden_size, hidden), heads=heads, neurons=selection.neurons(neurons)
    )


def _build(model: PreTrainedModel, anatomy: Anatomy, config: PretrainedConfig, kept: Kept) -> PreTrainedModel:
    with init_empty_weights():
        smaller = type(model)(config)
    tensors = cut(model, anatomy, smaller, find_anatomy(smaller), kept)
    name = model.config.name_or_path
    built = type(model).from_pretrained(
        None, config=config, state_dict=tensors, dtype=model.dtype, attn_implementation=config._attn_implementation
    )
    built.config.name_or_path = name
    if model.can_generate():
        built.generation_config = copy.deepcopy(model.generation_config)
    return built.to(model.device).train(model.training)
