"""What is saved, shrunk or exported: an ordinary model of transformers, its adapter merged."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .sharded import is_sharded


def check_merged(model: nn.Module, verb: str) -> None:
    """Refuse what is no such model; `verb` is what is done with one, such as "save".

    Raises:
        TypeError: if it is no model of transformers, or its weights are quantized, or sharded, but for a save.
        ValueError: if an adapter is not merged yet, or the model is not all in memory.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"The model has an adapter that is not merged: call merged = model.merge_and_unload() and {verb} what it "
            "returns. An adapter alone is saved by model.save_pretrained()."
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{verb} got a {type(model).__name__}: expected a model of transformers.")
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        weight = module.weight.data
        if is_sharded(module.weight):
            if verb != "save":
                raise TypeError(
                    f"The weight of {name!r} is spread over processes, but {verb} takes a whole model: save it with "
                    "peft_pst.save_pretrained(model, folder) in all of them, which gathers it, and open the folder in "
                    "one process."
                )
        elif type(weight) is not Tensor or not weight.is_floating_point():
            raise TypeError(
                f"The weight of {name!r} is a {type(weight).__name__} of {weight.dtype}: expected a plain tensor of "
                "floating-point numbers. Open the model without quantization before."
            )
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError(
            "Some tensors of the model are not in memory, but offloaded: open it without device_map, or with one that "
            "offloads nothing, before."
        )
