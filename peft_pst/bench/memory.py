"""What a model takes in memory, in a process of its own: python -m peft_pst.bench.memory FOLDER --shape 1x128

Prints, as JSON, how many bytes more are resident after a forward than before the model was opened: with what the
forward made, and what the runtime needs beyond torch and transformers. A dense file is mapped into memory: what the
forward did not read, such as some rows of an embedding, does not count, while a sparse checkpoint is read whole, since
its checksums are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, BertConfig, BertModel

from .timing import random_tokens
from .variants import Variant, class_of

SMALL = {"vocab_size": 100, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", required=True, help="sequences x tokens of the forward")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--sparse", action="store_true", help="with sparse kernels")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():  # what torch and transformers allocate once, for any model
        BertModel(BertConfig(num_hidden_layers=1, **SMALL))(**random_tokens(SMALL["vocab_size"], 1, 32))
    class_of(args.folder)  # imports its code
    vocab_size = AutoConfig.from_pretrained(args.folder).vocab_size
    inputs = random_tokens(vocab_size, *map(int, args.shape.split("x")))
    process = psutil.Process()
    before = process.memory_info().rss
    model = Variant("", args.folder, args.sparse).open()
    with torch.inference_mode():
        model(**inputs)
    print(json.dumps({"resident_bytes": process.memory_info().rss - before}))


if __name__ == "__main__":
    main()
