"""Models with half of their neurons and heads pruned, before and after `shrink`, in torch and in ONNX Runtime.

    python benchmarks/shrink.py

Blocks of BERT-base's width with random weights, pruned to half by `pattern="neuron"` and then `"head"`, without
training. The time is that of the model without a head, from token ids (a vocabulary of 1,000) through four blocks to
hidden states; of T5, four blocks of the encoder and four of the decoder. The projection to a vocabulary would come on
top, and does not shrink. The four ways take turns, and the figures are medians; eager attention, fp32, all tokens at
once without a cache.
"""

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable

import onnxruntime
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, PreTrainedModel

from peft_pst import PSTConfig, format_table, shrink
from peft_pst.bench.benchmark import _processor
from peft_pst.bench.timing import seconds, threads_of_torch

VOCAB = 1000
BERT = {"hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 3072}
CONFIGS = {
    "bert": BERT,
    "gpt2": {"n_embd": 768, "n_layer": 4, "n_head": 12, "bos_token_id": 1, "eos_token_id": 1},
    "llama": {**BERT, "num_key_value_heads": 4},
    "t5": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "num_layers": 4},
}


class Hidden(nn.Module):
    """A model that takes and returns tensors, as the exporter wants it."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.eval()  # an export sets the mode of what is inside to that of the whole

    def forward(self, *tensors: Tensor) -> Tensor:
        inputs = dict(zip(self.names, tensors, strict=True))
        return self.model(**inputs, use_cache=False, return_dict=True).last_hidden_state


def pruned(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, pad_token_id=0, **CONFIGS[model_type])
    model = AutoModel.from_config(config, attn_implementation="eager")
    for pattern in ("neuron", "head"):
        method = PSTConfig(pattern=pattern, importance="magnitude", update="none", initial_sparsity=0.5, sparsity=0.5)
        model = get_peft_model(model, method).merge_and_unload()
    return model.eval()


def inputs_of(model: PreTrainedModel, sequences: int, tokens: int) -> dict[str, Tensor]:
    """Token ids, int64 [sequences, tokens], and of a decoder its mask of four dimensions, which the exporter needs."""
    ids = torch.randint(VOCAB, (sequences, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1).expand(sequences, 1, -1, -1)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1), "decoder_attention_mask": mask}
    return {"input_ids": ids} if model.config.model_type == "bert" else {"input_ids": ids, "attention_mask": mask}


def in_onnx(model: PreTrainedModel, inputs: dict[str, Tensor], threads: int) -> Callable[..., Tensor]:
    """The model in ONNX Runtime, called like the model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Hidden(model, list(inputs)),
            tuple(inputs.values()),
            f"{work}/model.onnx",
            input_names=list(inputs),
            output_names=["hidden"],
            dynamo=False,  # of the two exporters the one whose graph is faster here
        )
        session = onnxruntime.InferenceSession(f"{work}/model.onnx", options, providers=["CPUExecutionProvider"])

    def run(**inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])

    return run


@torch.inference_mode()
def measure(model_type: str, shape: tuple[int, int], threads: int, repeats: int, progress: tqdm) -> tuple[str, ...]:
    model = pruned(model_type)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* cannot say how many heads")
        smaller = shrink(model)
    inputs = inputs_of(model, *shape)
    ways = {"torch": Hidden(model, list(inputs)), "torch, shrunk": Hidden(smaller, list(inputs))}
    calls = {name: lambda way=way, **inputs: way(*inputs.values()) for name, way in ways.items()}
    calls |= {"ONNX": in_onnx(model, inputs, threads), "ONNX, shrunk": in_onnx(smaller, inputs, threads)}
    expected = calls["torch"](**inputs)
    errors = {name: f"{float((call(**inputs) - expected).abs().max()):.0e}" for name, call in calls.items()}
    ms = {name: 1e3 * statistics.median(taken) for name, taken in seconds(calls, inputs, repeats, progress).items()}
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, smaller)]
    row = [type(model).__name__, "{}x{}".format(*shape), "{:.1f} to {:.1f}".format(*millions)]
    for engine in ("torch", "ONNX"):
        before, after = ms[engine], ms[f"{engine}, shrunk"]
        row += [f"{before:.0f} to {after:.0f}", f"{before / after:.2f}x", errors[f"{engine}, shrunk"]]
    return tuple(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    with (
        threads_of_torch(args.threads),
        tqdm(total=4 * (args.repeats + 1) * len(args.models), desc="calls") as progress,
    ):
        shape = args.sequences, args.tokens
        rows = [measure(name, shape, args.threads, args.repeats, progress) for name in args.models]
    engines = (f"torch {torch.__version__}", f"ONNX Runtime {onnxruntime.__version__}")
    header = [cell for engine in engines for cell in (f"{engine}, ms", "faster", "difference")]
    print(f"{_processor()}, {args.threads} thread(s), transformers {transformers.__version__}\n")
    print(format_table(("model", "input", "million parameters", *header), rows))


if __name__ == "__main__":
    main()
