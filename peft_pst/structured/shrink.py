"""shrink: a model without the neurons and heads that are entirely pruned."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..patterns import COUPLED
from ..sparse.quantizer import SparseCheckpointConfig, widths_in
from .checks import check_dense
from .dead import living_units
from .plain import are_uniform, plain_changes, pruned_heads, set_in_configs
from .widths import find_structures, resize

SEQUENCES, TOKENS = 2, 8
"""The size of the input that the outcome is checked with."""


def shrink(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Remove the neurons of feed-forward blocks and the attention heads that are entirely pruned.

    Removed are the units that the patterns `"neuron"` and `"head"` prune, by whatever they were pruned: those from
    which the last layer takes nothing, and those that have no weights of their own and so are constants, which are
    added to the last layer's bias. Heads that share a key and a value go together. Each layer keeps one unit at least.

    Where the architecture's own config can say the new widths, it does, and plain transformers opens what is saved:
    the feed-forward layers of nearly all models, and the heads of Llama and its like and of T5, as long as each layer
    keeps as many (under `budget="layer"` it does; T5's blocks share a position bias, so they must keep the same heads
    too, and the pattern `"head"` sees to that). Otherwise, and always for the heads of BERT and GPT-2, whose size
    follows from their number, the widths are an entry of the `quantization_config`. Then `import peft_pst` must come
    before `from_pretrained`, which elsewhere fails at the sizes; but transformers 4, unlike 5, opens such a BERT or
    GPT-2 by the `pruned_heads` of its config.

    What comes out is run beside the model and compared. Where the outputs differ, as of an architecture whose
    positions, norms or kernels count its heads, they stay, with a warning.

    Args:
        model (`PreTrainedModel`):
            The model, after `merge_and_unload()`. It stays as it is.
        inputs (`Mapping`, *optional*):
            Keyword arguments of its forward for that comparison; by default random tokens.

    Returns:
        A model of the same class, dense; tensors that lose nothing are those of the model given, not copies.

    Raises:
        TypeError: if it is no model of transformers, or its weights are quantized or distributed.
        ValueError: if an adapter is not merged yet, the model is not all in memory, weights are stored sparse, layers
            have low-rank boosts, or the model does not run on the inputs.
    """
    check_dense(model, "shrink")
    inputs = _tokens(model) if inputs is None else inputs
    try:
        expected = _outputs(model, inputs)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on {sorted(inputs)}, but shrink compares the outputs before and "
            f"after ({error}): give it inputs, the keyword arguments of the model's forward."
        ) from error
    smaller, has_dead = _copy(model), False
    for pattern in COUPLED:
        without = _without_dead_units(smaller, pattern, inputs, expected)
        smaller, has_dead = without or smaller, has_dead or without is not None
    if not has_dead:
        warnings.warn(
            f"shrink found no neuron and no head of {type(model).__name__} to remove: prune with pattern='neuron' or "
            "pattern='head' first.",
            stacklevel=2,
        )
    return smaller


def _without_dead_units(
    model: PreTrainedModel, pattern: str, inputs: Mapping[str, Any], expected: Tensor
) -> PreTrainedModel | None:
    """The model, its dead units of one kind removed; itself if it does not do without them, None if it has none."""
    structures = find_structures(model, [pattern])
    living = {name: living_units(structure) for name, structure in structures.items()}
    keep = {name: mask for name, (mask, _) in living.items() if not mask.all()}
    if not keep:
        return None
    shifts = {structures[name].taker_name: shift for name, (_, shift) in living.items() if shift.any()}
    biases = [name for name in shifts if model.get_submodule(name).bias is None]
    widths, earlier = widths_in(model.config)
    changes = None
    if not biases and are_uniform(structures, {name: mask for name, (mask, _) in living.items()}):
        smaller = _copy(model)
        resize(smaller, keep, share_position_bias=True)
        name, mask = next(iter(keep.items()))
        changes = plain_changes(smaller, structures[name], int(mask.sum()), widths, earlier)
    if changes is not None:
        set_in_configs(smaller, changes)
    else:
        smaller = _copy(model)
        resize(smaller, keep, biases)
        widths = widths | {name: int(mask.sum()) for name, mask in keep.items()}
        smaller.config.quantization_config = SparseCheckpointConfig({}, {}, widths=widths, biases=earlier + biases)
        heads = pruned_heads(smaller)
        if heads is not None:
            smaller.config.pruned_heads = heads
    for name, shift in shifts.items():
        bias = smaller.get_submodule(name).bias
        moved = (bias.detach().double() + shift).to(bias.dtype)
        smaller.get_submodule(name).bias = nn.Parameter(moved, bias.requires_grad)
    problem = _problem(smaller, inputs, expected)
    if problem:
        warnings.warn(
            f"The {pattern}s of {type(model).__name__} that are pruned stay in it: {problem}. Its positions, norms or "
            "kernels count them in a way that shrink does not know.",
            stacklevel=3,
        )
        return model
    if changes is None:
        warnings.warn(
            f"{type(model.config).__name__} cannot say how many {pattern}s each layer of {type(model).__name__} has "
            "left, so the config gets an entry of ours: what is saved opens only after `import peft_pst`"
            + (", or in transformers 4." if heads else "."),
            stacklevel=3,
        )
    return smaller


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules anew, with the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _tokens(model: PreTrainedModel) -> dict[str, Tensor]:
    """Random tokens, the last ones of a sequence masked, for the encoder and, if there is one, the decoder."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = getattr(model.config.get_text_config(), "vocab_size", 2)
    ids = torch.randint(vocab_size, (SEQUENCES, TOKENS), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    mask[-1, TOKENS // 2 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = ids.flip(0)
    return inputs


@torch.no_grad()
def _outputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """The first output of the model in evaluation, such as logits or hidden states."""
    output = _copy(model).eval()(**inputs)
    return next(value for value in output.to_tuple() if isinstance(value, Tensor) and value.dim())


def _problem(model: PreTrainedModel, inputs: Mapping[str, Any], expected: Tensor) -> str | None:
    """What is wrong with the model's outputs."""
    try:
        found = _outputs(model, inputs)
    except Exception as error:  # a width that is counted elsewhere fails in any way
        return f"without them it does not run ({error})"
    scale = float(expected.abs().max())
    difference = float((found - expected).abs().max())
    close = difference <= torch.finfo(expected.dtype).eps ** 0.5 * scale
    return None if close else f"without them its outputs differ by {difference:.2g}, at most {scale:.2g} themselves"
