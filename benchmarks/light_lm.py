"""A light bilingual language model, step by step: what each part of LightChatGLM's recipe brings.

SmolLM2-135M-Instruct (its weights are 4-bit values, dequantized), tuned on English-Chinese software terms, is the
teacher. Students of one size train for the same few steps on the same data:

    .venv-transformers5/bin/python benchmarks/light_lm.py --data-dir DATA

The folder holds `train.tsv`, `dev.tsv` and `test.tsv` with the columns `en` and `zh`. Measured are the accuracy of the
next token and the perplexity of the answers, for each language, on the held-out test split and, as curves over the
steps, on a part of the dev split. Each training is written down in `--output` when it is done, and not run again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from peft_pst import DistillationConfig, compress
from peft_pst.integrations.distilling import DistillingTrainer
from peft_pst.integrations.hybrid import HybridTrainer, count_labels, evaluate_languages

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import light_bilingual_lm as example
import light_lm_report as report


class Arm(NamedTuple):
    """How a student is made and trained."""

    choice: str | None = None
    """How layers and channels are chosen, None for `--layers` and by importance."""
    hidden_states: bool = False
    hybrid: bool = False


ARMS = {
    "random pruning": Arm(choice="random"),
    "compression": Arm(),
    "compression, hidden states": Arm(hidden_states=True),
    "compression, hidden states, hybrid data": Arm(hidden_states=True, hybrid=True),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("outputs/light-lm"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=200, help="of each student")
    parser.add_argument("--num-layers", type=int, default=19, help="of a student; the teacher has 30")
    parser.add_argument("--head-dim", type=int, default=60, help="of a student; the teacher has 64")
    parser.add_argument("--layers", default="importance", help="which a student keeps: importance, even, first, last")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32, help="longer rows are left out")
    parser.add_argument("--teacher-lr", type=float, default=5e-4)
    parser.add_argument("--lr", type=float, default=1e-3, help="of each student")
    parser.add_argument("--alpha", type=float, default=0.65)
    parser.add_argument("--lambda", type=float, default=0.65, dest="lambda_")
    parser.add_argument("--hidden-weight", type=float, default=1e-3, help="of the last hidden state's loss")
    parser.add_argument("--evaluations", type=int, default=4, help="points of a curve, besides the start")
    parser.add_argument("--dev-rows", type=int, default=192)
    return parser.parse_args()


class Curve(TrainerCallback):
    """Both languages on a part of the dev split, a few times."""

    def __init__(self, data: Dataset, collator: DataCollatorForSeq2Seq, every: int) -> None:
        self.data, self.collator, self.every, self.points = data, collator, every, []

    def note(self, step: int, model: PreTrainedModel) -> None:
        self.points.append({"step": step, **evaluate(model, self.data, self.collator)})

    def on_train_begin(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        self.note(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.note(state.global_step, model)


def evaluate(model: PreTrainedModel, data: Dataset, collator: DataCollatorForSeq2Seq) -> dict[str, Any]:
    """Of each language, and the accuracy over the labels of both, under bf16 autocast."""
    with torch.autocast(model.device.type, torch.bfloat16):
        found = evaluate_languages(model, data, collator, batch_size=64)
    counts = dict(zip(found, count_labels(data, model), strict=True))
    both = sum(counts[name] * of["accuracy"] for name, of in found.items()) / sum(counts.values())
    return {**found, "both": both}


def train(
    model: PreTrainedModel,
    data: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace,
    kind: type[DistillingTrainer],
    steps: int,
    lr: float,
    **kwargs: Any,
) -> dict[str, Any]:
    """Train a model; minutes, its curve, and how it does on the test split."""
    collator = DataCollatorForSeq2Seq(tokenizer)
    curve = Curve(data["dev"], collator, max(1, steps // args.evaluations))
    arguments = TrainingArguments(
        str(args.output / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.01,
        optim="adamw_torch_fused",
        logging_steps=min(10, steps),
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        bf16=True,
        use_cpu=not torch.accelerator.is_available(),
    )
    batches = in_batches(data["train"], args)
    trainer = kind(model, arguments, train_dataset=batches, data_collator=collator, callbacks=[curve], **kwargs)
    start = time.perf_counter()
    trainer.train()
    minutes = (time.perf_counter() - start) / 60
    log = [row for row in trainer.state.log_history if "loss" in row]
    return {"minutes": minutes, "curve": curve.points, "log": log, "test": evaluate(model, data["test"], collator)}


def in_batches(data: Dataset, args: argparse.Namespace) -> Dataset:
    """The rows in an order whose batches hold rows of like lengths, each batch of another length than the last:
    transformers' own grouping goes from long to short in rounds, and the model with it."""
    generator = torch.Generator().manual_seed(args.seed)
    lengths = torch.tensor([len(ids) for ids in data["input_ids"]])
    ranked = (lengths + torch.rand(len(lengths), generator=generator)).argsort()
    batches = list(ranked[: len(ranked) // args.batch_size * args.batch_size].split(args.batch_size))
    order = torch.randperm(len(batches), generator=generator)
    return data.select(torch.cat([batches[i] for i in order]).tolist())


def tuned_teacher(args: argparse.Namespace) -> Path:
    """The folder of the teacher, which is tuned if it is not there yet."""
    folder = args.output / f"teacher-{args.teacher_steps}-steps-lr-{args.teacher_lr:g}-alpha-{args.alpha:g}"
    if not (folder / "result.json").exists():
        args.seed = 0
        set_seed(args.seed)
        model, tokenizer = example.load_model(None)
        data = load_splits(tokenizer, args)
        found = train(
            model, data, tokenizer, args, HybridTrainer, args.teacher_steps, args.teacher_lr, alpha=args.alpha
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "result.json").write_text(json.dumps({"parameters": model.num_parameters(), **found}))
    return folder


def load_splits(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> dict[str, Dataset]:
    pairs = example.load_pairs(args.data_dir)
    data = {split: example.mixed(pairs[split], tokenizer, args.max_tokens) for split in example.SPLITS}
    data["dev"] = data["dev"].select(range(min(args.dev_rows, len(data["dev"]))))
    for split in ("dev", "test"):  # a batch of one length needs no padding
        lengths = [len(ids) for ids in data[split]["input_ids"]]
        data[split] = data[split].select(sorted(range(len(lengths)), key=lengths.__getitem__))
    return data


def make_student(
    teacher: PreTrainedModel, choice: str | None, data: Dataset, seed: int, args: argparse.Namespace
) -> PreTrainedModel:
    return compress(
        teacher,
        num_layers=args.num_layers,
        head_dim=args.head_dim,
        layers=choice or args.layers,
        channels=choice or "importance",
        calibration=example.by_length(data, batches=8, rows=32),
        seed=seed,
    )


def chosen_student(teacher: Path, data: Dataset, args: argparse.Namespace) -> Path:
    """The folder of the student before its training, whose layers and channels were chosen, the same for all seeds."""
    folder = args.output / f"student-{args.layers}-{args.num_layers}-{args.head_dim}-of-{teacher.name}"
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        model, tokenizer = example.load_model(str(teacher))
        make_student(model, None, data, 0, args).save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(folder)
    return folder


def train_student(
    arm: Arm, folder: Path, student: Path, data: dict[str, Dataset], args: argparse.Namespace
) -> dict[str, Any]:
    """Train one student; `folder` is the teacher's, `student` that of the chosen one."""
    set_seed(args.seed)
    model, tokenizer = example.load_model(str(student if arm.choice is None else folder))
    if arm.choice is not None:
        model = make_student(model, arm.choice, data["train"], args.seed, args)
    size = {"parameters": model.num_parameters(), "layers": model.config.compression["layers"]}
    kind, kwargs, hidden = DistillingTrainer, {}, args.hidden_weight if arm.hidden_states else 0.0
    if arm.hidden_states or arm.hybrid:
        # it only says what it knows, for which bf16 is enough
        teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        taught = DistillationConfig(teacher, logits=0.0, last_hidden_state=hidden)
        if arm.hybrid:
            taught = DistillationConfig.hybrid(teacher, args.lambda_, last_hidden_state=hidden)
            kind, kwargs = HybridTrainer, {"alpha": args.alpha}
        kwargs["distillation"] = taught
    return {**size, **train(model, data, tokenizer, args, kind, args.steps, args.lr, **kwargs)}


def measure(work: str, folder: Path, args: argparse.Namespace) -> int:
    """Bytes, in a process of its own."""
    command = [sys.executable, Path(__file__).with_name("peak_memory.py"), str(folder), work, str(args.batch_size)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    folder = tuned_teacher(args)
    data = load_splits(AutoTokenizer.from_pretrained(folder), args)
    student = chosen_student(folder, data["train"], args)
    names = ("steps", "num_layers", "head_dim", "layers", "lr", "alpha", "lambda_", "hidden_weight", "batch_size")
    settings = {"teacher": folder.name, **{name: getattr(args, name) for name in (*names, "max_tokens")}}
    file = args.output / "results.jsonl"
    done = {(row["arm"], row["seed"]): row for row in read_lines(file) if row["settings"] == settings}
    trainings = [(seed, name) for seed in args.seeds for name in args.arms]
    for args.seed, name in tqdm(trainings, desc="trainings"):
        if (name, args.seed) not in done:
            found = {"arm": name, "seed": args.seed, "settings": settings}
            done[name, args.seed] = found | train_student(ARMS[name], folder, student, data, args)
            with file.open("a") as lines:
                lines.write(json.dumps(done[name, args.seed]) + "\n")
    memory = {work: [measure(work, of, args) for of in (folder, student)] for work in ("training", "generating")}
    teacher = json.loads((folder / "result.json").read_text())
    rows = {name: [done[name, seed] for seed in args.seeds] for name in args.arms}
    tables = [
        report.quality_table(teacher, rows),
        report.memory_table(teacher, rows, memory),
        report.curve_table(rows),
    ]
    (args.output / "results.md").write_text("\n\n".join(tables) + "\n")
    report.plot_curves(rows, teacher, args.output / "curves.png")
    print("\n" + "\n\n".join(tables))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """What is there, but for a line that a killed process has not ended, which is removed."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith("\n"):
        file.write_text("".join(lines := lines[:-1]))
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    main()
