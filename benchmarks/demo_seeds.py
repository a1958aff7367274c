"""The demo over several seeds: mean and spread of the accuracy, dense and sparse. What has run is not run again.

.venv-transformers5/bin/python benchmarks/demo_seeds.py
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from peft_pst import format_table

SCRIPT = Path(__file__).parents[1] / "examples" / "text_classification.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("outputs/seeds"))
    args, others = parser.parse_known_args()  # the others are the example's
    accuracy = {"dense": [], "pst": []}
    for seed in tqdm(args.seeds, desc="seeds"):
        folder = args.output / str(seed)
        if not (folder / "results.json").exists():
            command = [sys.executable, SCRIPT, "--seed", str(seed), "--output", folder, *others]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        results = json.loads((folder / "results.json").read_text())
        for name, values in accuracy.items():
            values.append(100 * results[name]["accuracy"])
    rows = [
        (
            name,
            f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}",
            ", ".join(f"{v:.2f}" for v in values),
        )
        for name, values in accuracy.items()
    ]
    print(format_table(("training", "accuracy (%), mean ± standard deviation", f"seeds {args.seeds}"), rows))


if __name__ == "__main__":
    main()
