"""What PST and sparse weights do on a GPU, and docs/gpu.md, which this writes.

python benchmarks/gpu/run.py
python benchmarks/gpu/run.py --parts step product
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

import large_model
import product
import step
import torch

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
PARTS = {"step": step, "product": product, "large_model": large_model}
TITLES = {"step": "A training step", "product": "One product", "large_model": "A large model"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This measures a GPU, and torch finds none. TRITON_INTERPRET=1 pytest tests/gpu runs the kernels.")
    torch.manual_seed(0)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "peft", "transformers"))
    sections = [f"# On a GPU\n\n`python benchmarks/gpu/run.py` on {torch.cuda.get_device_name()}; {versions}."]
    for name in args.parts:
        sections.append(f"## {TITLES[name]}\n\n{PARTS[name].report()}")
        print(sections[-1], flush=True)
        part = args.page.with_name(f"{args.page.name}.part")
        part.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
        part.replace(args.page)


if __name__ == "__main__":
    main()
