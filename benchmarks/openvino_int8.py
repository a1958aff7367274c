"""The demo's model in OpenVINO (run `make demo` before): the accuracy that int8 costs, the time that its zeros save.

    python benchmarks/openvino_int8.py

The first texts of the data calibrate the int8 models, and all are measured on the others. In the table of times all
models take turns, a call each. Zeros save time only on a processor with AMX: the last line says on how many layers
OpenVINO's sparse kernels ran, and how many have the layout for them.
"""

import argparse
import csv
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import peft_pst
from peft_pst import format_table
from peft_pst.bench.timing import random_tokens, seconds, threads_of_torch
from peft_pst.integrations.openvino import export_openvino, has_amx, open_openvino

SHAPES = ((1, 16), (1, 128), (8, 128))
BATCH = 32


@torch.inference_mode()
def predicted(model: Callable[..., object], tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """The class of each text."""
    found = []
    for start in tqdm(range(0, len(texts), BATCH), desc="predicting"):
        batch = tokenizer(texts[start : start + BATCH], truncation=True, padding=True, return_tensors="pt")
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        found.append(getattr(logits, "logits", logits).argmax(-1))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparse", type=Path, default=Path("outputs/demo/small"), help="the folder of a sparse model")
    parser.add_argument("--dense", type=Path, default=Path("outputs/demo/dense"), help="of a dense one like it")
    parser.add_argument("--data", type=Path, default=Path("outputs/demo/test.csv"), help="columns `text`, `label`")
    parser.add_argument("--calibration", type=int, default=100, help="texts that calibrate")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text that are read")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*run.* dense in OpenVINO")  # the table says it

    with open(args.data, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    texts, labels = [row["text"] for row in rows], torch.tensor([int(row["label"]) for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(args.sparse)
    tokenizer.model_max_length = args.max_length
    first, others, labels = texts[: args.calibration], texts[args.calibration :], labels[args.calibration :]

    models, accuracies = {}, []
    with tempfile.TemporaryDirectory() as work, threads_of_torch(args.threads):
        for kind, folder in (("dense", args.dense), ("sparse", args.sparse)):
            torch_model = peft_pst.densify(peft_pst.open_model(folder))
            expected = predicted(torch_model, tokenizer, others)
            ways = {"torch fp32": expected}
            for name, calibration in (("OpenVINO fp32", None), ("OpenVINO int8", first)):
                exported = f"{work}/{kind} {name}"
                export_openvino(folder, exported, texts=calibration, tokenizer=tokenizer)
                models[kind, name] = open_openvino(exported, threads=args.threads)
                ways[name] = predicted(models[kind, name], tokenizer, others)
            for name, found in ways.items():
                right, same = (found == labels).double().mean(), (found == expected).double().mean()
                accuracies.append((f"{kind}, {name}", f"{right:.2%}", f"{same:.2%}"))
        models["sparse", "OpenVINO int8, sparse_rate=1"] = open_openvino(exported, sparse_rate=1, threads=args.threads)
        models["sparse", "peft_pst.accelerate_sparse"] = peft_pst.accelerate_sparse(peft_pst.open_model(args.sparse))
        vocab_size = torch_model.config.vocab_size
        progress = tqdm(desc="timing", total=len(SHAPES) * len(models) * (args.repeats + 1))
        medians = {}
        for shape in SHAPES:
            taken = seconds(models, random_tokens(vocab_size, *shape), args.repeats, progress)
            medians[shape] = {name: 1e3 * statistics.median(times) for name, times in taken.items()}
        progress.close()

    print(f"\n{format_table((f'{len(others)} texts', 'accuracy', 'same as torch'), accuracies)}\n")
    dense = "dense", "OpenVINO int8"
    rows = [
        (", ".join(name), *(f"{medians[shape][name]:.2f}" for shape in SHAPES),
         *(f"{medians[shape][dense] / medians[shape][name]:.2f}x" for shape in SHAPES))
        for name in models
    ]  # fmt: skip
    sizes = [f"{sequences}x{tokens}" for sequences, tokens in SHAPES]
    print(format_table(("ms", *sizes, *(f"{size}, to dense int8" for size in sizes)), rows))
    layers = models["sparse", "OpenVINO int8"].layers
    print(
        f"\nOf {len(layers)} layers {sum(layer.is_sparse for layer in layers)} ran on sparse kernels and "
        f"{sum(not layer.obstacle for layer in layers)} have the layout for them. This processor has "
        f"{'' if has_amx() else 'no '}AMX. {args.threads} threads."
    )


if __name__ == "__main__":
    main()
