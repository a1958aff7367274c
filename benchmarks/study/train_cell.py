"""Train one cell in a process of its own, and print what came of it as the last line: JSON.

    python benchmarks/study/train_cell.py --data-dir DATA --work FOLDER --model FOLDER CELL

CELL is JSON of a cell's fields with its method's `choices` and its task's `settings`; `run.py` starts this.
"""

import argparse
import json
import platform
import resource
from importlib.metadata import version
from pathlib import Path
from typing import Any

import classification
import generation
import methods
import torch

TASKS = {**classification.TASKS, "e2e": generation.e2e}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for what a training writes")
    parser.add_argument("--teacher", type=Path, help="folder of the tuned teacher")
    parser.add_argument("--model", type=Path, help="folder to save the trained model to")
    parser.add_argument("cell", type=json.loads)
    args = parser.parse_args()
    cell = args.cell
    settings = dict(cell["settings"])
    training = {name: settings.pop(name) for name in ("epochs", "batch_size")}
    task = TASKS[cell["task"]](args.data_dir, **settings)
    before = peak_memory()
    model, took = methods.train(
        task, cell["choices"], training, cell["sparsity"], cell["lr"], cell["seed"], args.work, args.teacher
    )
    took["peak_memory"] = peak_memory() - (0 if torch.cuda.is_available() else before)
    if args.model is not None:
        part = args.model.with_name(f"{args.model.name}.part")
        model.save_pretrained(part)
        part.rename(args.model)
    found = {split: task.measure(model, split) for split in ("validation", "test")}
    print("\n" + json.dumps({**cell, **found, **took, **environment()}, ensure_ascii=False))


def peak_memory() -> int:
    """In bytes, of the device's memory on a GPU, and of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def environment() -> dict[str, Any]:
    """The machine and the versions."""
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"{processor()}, {torch.get_num_threads()} threads"
    return {"device": device, "versions": {name: version(name) for name in ("torch", "transformers", "peft")}}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
