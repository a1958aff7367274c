"""What combines with what: every combination is made, trained for two steps, merged and counted, and the page written.

python docs/combinations.py
"""

import argparse
import itertools
import os
import warnings
from pathlib import Path

import torch
from peft import get_peft_model
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

from peft_pst import PSTConfig, SparsityScheduler, calibrate, create_pst_optimizer, format_table, tensor_sparsity
from peft_pst.config import BUDGETS
from peft_pst.importance import IMPORTANCES
from peft_pst.update import UPDATES

PAGE = Path(__file__).with_suffix(".md")
PATTERNS = ("unstructured", "2:4", "block:8x1", "row", "column", "neuron", "head")
TOKENS = torch.arange(14).view(2, 7)

INTRODUCTION = """# What combines with what

Written by `python docs/combinations.py`, which makes each combination, trains it for two steps on a small BERT with
random weights, merges it, and counts the zeros.

A cell says under which `budget` a pattern and an importance combine. Where they do, they do so with every `update`
({updates}) and every `mask_interval`. `2:4` stands for all N:M, `block:8x1` for all blocks.

`straight_through` wants an `update` that trains a weight, `masked_decay` wants `full` and `straight_through`, and an
optimizer that has the weights themselves, as under DDP and FSDP2 but not under DeepSpeed's ZeRO. A `boost` goes with
every pattern but `neuron` and `head`, and its size divides the inputs of each weight.

"""


def small_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=99, **sizes))


def try_out(**choices: object) -> None:
    """Train and merge one combination.

    Raises:
        ValueError: if it is refused.
        AssertionError: if the zeros of the merged model are not those that were asked for.
    """
    config = PSTConfig(task_type="SEQ_CLS", warmup_ratio=0, cooldown_ratio=0, **choices)
    model = get_peft_model(small_model(), config)
    if config.importance == "wanda":
        calibrate(model, [{"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}])
    optimizer, scheduler = create_pst_optimizer(model), SparsityScheduler(model, total_steps=2)
    for _ in range(2):
        model(input_ids=TOKENS, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    sparsity, targets = model.base_model.get_sparsity(), model.base_model.targeted_module_names
    rows = tensor_sparsity(model.merge_and_unload(safe_merge=True), targets)
    zeros = sum(row.zeros for row in rows) / sum(row.numel for row in rows)
    assert zeros == sparsity, f"{choices}: {zeros:.4f} zeros, but the sparsity is {sparsity:.4f}"
    largest_unit = 0.25 if config.pattern == "head" else 0.07
    assert 0 <= config.sparsity - sparsity < largest_unit, f"{choices}: {sparsity:.4f} instead of {config.sparsity}"


def combines(pattern: str, importance: str, budget: str) -> str | None:
    """The error that refuses a combination, None if it works with every update and mask interval."""
    for update, mask_interval in itertools.product(UPDATES, (1, 10)):
        try:
            try_out(pattern=pattern, importance=importance, budget=budget, update=update, mask_interval=mask_interval)
        except ValueError as error:
            return str(error)
    return None


def page() -> str:
    errors, rows = {}, []
    for pattern in tqdm(PATTERNS, desc="patterns", disable=None):
        row = [f"`{pattern}`"]
        for importance in IMPORTANCES:
            refusals = {budget: combines(pattern, importance, budget) for budget in BUDGETS}
            for budget, error in refusals.items():
                if error:
                    errors.setdefault(error, f"pattern={pattern!r}, importance={importance!r}, budget={budget!r}")
            row.append(", ".join(budget for budget, error in refusals.items() if error is None) or "no")
        rows.append(row)
    text = INTRODUCTION.format(updates=", ".join(f"`{name}`" for name in UPDATES))
    text += format_table(("", *(f"`{name}`" for name in IMPORTANCES)), rows)
    text += "\n\nWhat is not there is refused when the config is made, as is what contradicts itself:\n\n"
    refused = [(arguments, error) for error, arguments in errors.items()] + contradictions()
    return text + format_table(("arguments", "error"), [(f"`{a}`", error) for a, error in refused]) + "\n"


CONTRADICTIONS = (
    "pattern='2:4', sparsity=0.9",
    "pattern='row', coupled_modules=[['fc1', 'fc2']]",
    "importance='movement', penalty=1.0",
    "importance='wanda', initial_sparsity=0.5",
    "initial_sparsity=0.95",
    "warmup_ratio=0.5, cooldown_ratio=0.6",
    "target_modules='.*query', layers_to_transform=[0]",
    "layers_pattern='layer'",
)


def contradictions() -> list[tuple[str, str]]:
    """Arguments that are refused whatever else is chosen, and the errors."""
    rows = []
    for arguments in CONTRADICTIONS:
        try:
            eval(f"PSTConfig({arguments})")
        except ValueError as error:
            rows.append((arguments, str(error)))
        else:
            raise AssertionError(f"{arguments} is not refused")
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    warnings.filterwarnings("ignore", message="importance=.* starts with the same score")
    written = PAGE.with_suffix(".tmp")
    written.write_text(page())
    os.replace(written, PAGE)


if __name__ == "__main__":
    main()
