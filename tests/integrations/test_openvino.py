import csv
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_pst import PSTConfig, SparseLinear, accelerate_sparse, open_model, save_pretrained
from peft_pst.integrations.openvino import export_openvino, has_amx, open_openvino, runtime

sys.modules.setdefault("openvino_telemetry", None)  # as the integration does, since the tests import OpenVINO too

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="needs peft-pst[openvino]"),
    pytest.mark.filterwarnings("ignore:.*dense in OpenVINO", "ignore:The model's sparse weights stay compressed"),
]

WORDS = [f"word{i}" for i in range(97)]
SIZES = {"vocab_size": 99, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
PRUNED = 12  # layers


def bert(model_class=BertForSequenceClassification, **kwargs):
    torch.manual_seed(0)
    config = BertConfig(**SIZES, num_attention_heads=4, initializer_range=0.1, **{"num_labels": 3, **kwargs})
    return model_class(config).eval()


def pruned(model):
    """90 % of the weights in the encoder are zero."""
    for name, module in model.named_modules():
        if ".layer." in name and isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            weight.view(-1)[torch.randperm(weight.numel())[: int(0.9 * weight.numel())]] = 0
    return model


def some_texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(4, 30))) for _ in range(count)]


def some_tokens(sequences=64, tokens=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 99, (sequences, tokens), generator=generator)
    lengths = torch.randint(4, tokens + 1, (sequences, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths).long()}


@torch.inference_mode()
def logits(model, inputs):
    return model(**inputs).logits


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A folder with `sparse`, a sparse checkpoint with a tokenizer, and its exports `fp32` and `int8`."""
    root = tmp_path_factory.mktemp("openvino")
    save_pretrained(pruned(bert()), root / "sparse", tokenizer=tokenizer)
    export_openvino(root / "sparse", root / "fp32")
    export_openvino(root / "sparse", root / "int8", texts=some_texts(16))
    return root


@pytest.fixture(scope="module")
def model():
    return pruned(bert())


def test_fp32_is_the_model(folders, model):
    compiled = open_openvino(folders / "fp32", threads=1)
    for sequences, tokens in ((1, 1), (3, 40)):
        inputs = some_tokens(sequences, max(tokens, 4))
        torch.testing.assert_close(compiled(**inputs), logits(model, inputs), atol=1e-4, rtol=0)


def test_int8_is_close(folders, model):
    inputs = some_tokens()
    found, expected = open_openvino(folders / "int8")(**inputs), logits(model, inputs)
    assert (found.argmax(-1) == expected.argmax(-1)).double().mean() > 0.9
    assert len(expected.argmax(-1).unique()) > 1
    error = (found - expected).abs().max() / expected.abs().max()
    assert 1e-4 < error < 0.2
    assert (folders / "int8" / "openvino_model.bin").stat().st_size < 0.3 * (
        folders / "fp32" / "openvino_model.bin"
    ).stat().st_size


def test_a_call_takes_arrays_and_keeps_earlier_results(folders):
    compiled, inputs = open_openvino(folders / "fp32"), some_tokens(2)
    first = compiled(**inputs)
    kept = first.clone()
    other = compiled(**{name: 1 - tensor % 2 for name, tensor in inputs.items()})
    assert torch.equal(first, kept) and not torch.equal(first, other)
    arrays = {name: tensor.numpy().astype("int32") for name, tensor in inputs.items()}
    assert torch.equal(compiled(**arrays), first)


def test_zeros_stay_zeros(folders, model):
    import openvino

    weights = {}
    for node in openvino.Core().read_model(folders / "int8" / "openvino_model.xml").get_ordered_ops():
        if node.get_type_name() == "MatMul" and ".layer." in node.get_friendly_name():
            constant = node.input_value(1).get_node()
            while constant.get_type_name() != "Constant":
                constant = constant.input_value(0).get_node()
            weights[node.get_friendly_name().split("/")[0].removeprefix("__module.model.")] = constant.data
    assert len(weights) == PRUNED
    for name, found in weights.items():
        zero = model.get_submodule(name).weight.detach().numpy() == 0
        assert found.dtype == np.int8 and found.shape == zero.shape
        assert not found[zero].any()
        assert (found[~zero] == 0).mean() < 0.1  # what is small is rounded to zero


def test_the_exported_layout_is_that_of_the_sparse_kernels(folders, model):
    found = open_openvino(folders / "int8", sparse_rate=0.8)
    layers = {layer.name: layer for layer in found.layers}
    assert len(layers) == PRUNED + 2
    for name, layer in layers.items():
        if ".layer." in name:
            assert layer.shape == tuple(model.get_submodule(name).weight.shape)
            assert layer.sparsity >= 0.899 and layer.obstacle == ""
            assert "i8" in layer.kernel.lower() and "undef" not in layer.kernel
    assert "80%" in layers["bert.pooler.dense"].obstacle
    assert "64" in layers["classifier"].obstacle
    assert found.table().count("\n") == PRUNED + 3


@pytest.mark.skipif(not has_amx(), reason="the sparse kernels need AMX, which this processor does not have")
def test_the_sparse_kernels_run(folders, recwarn):
    layers = open_openvino(folders / "int8", sparse_rate=0.8).layers
    assert sum(layer.kernel.lower() == "brgemm_avx512_amx_sparse_i8" for layer in layers) == PRUNED
    assert not [warning for warning in recwarn if "OpenVINO" in str(warning.message)]
    dense = open_openvino(folders / "int8", sparse_rate=1).layers
    assert not any(layer.is_sparse for layer in dense)


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        ({}, ""),
        ({"transpose": False}, "stored [in, out]"),
        ({"dtype": np.float32}, "f32, not int8"),
        ({"out": 96}, "divisible by 64"),
        ({"size": 32}, "divisible by 64"),
        ({"zeros": 0.5}, "fewer than 80%"),
        ({"quantized_input": False}, "its input is"),
        ({"stacked": True}, "3 dimensions"),
    ],
)
def test_what_keeps_a_layer_from_the_sparse_kernels(tmp_path, change, obstacle):
    folder = tmp_path / "one"
    save_one_layer(folder, **change)
    (layer,) = open_openvino(folder, sparse_rate=0.8).layers
    assert obstacle in layer.obstacle and bool(obstacle) == bool(layer.obstacle)


def test_a_weight_that_openvino_crashes_at_runs_dense(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(runtime, "has_amx", lambda: True)
    folder, ids = tmp_path / "one", {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}
    save_one_layer(folder, out=64, size=64)
    found = open_openvino(folder, sparse_rate=0.8)
    (message,) = [str(warning.message) for warning in recwarn if "OpenVINO" in str(warning.message)]
    assert "crash at 64x64" in message and "sparse_rate=1" in message
    assert not found.layers[0].is_sparse and found(**ids).shape == (1, 2, 64)
    recwarn.clear()
    open_openvino(folder, sparse_rate=1)
    open_openvino(folder, sparse_rate=0.95)
    assert not [warning for warning in recwarn if "crash" in str(warning.message)]


def save_one_layer(folder, out=128, size=64, zeros=0.9, dtype=np.int8, transpose=True, quantized_input=True,
                   stacked=False):  # fmt: skip
    """A model of an embedding and one linear layer, made by hand."""
    import openvino as ov
    from openvino import opset13 as ops

    rng = np.random.default_rng(0)
    ids, mask = (ops.parameter([-1, -1], np.int64, name=name) for name in ("input_ids", "attention_mask"))
    for parameter in (ids, mask):
        parameter.output(0).set_names({parameter.get_friendly_name()})
    x = ops.gather(rng.normal(size=(10, size)).astype(np.float32), ids, np.int64(0))
    if quantized_input:
        x = ops.fake_quantize(x, *(np.float32(bound) for bound in (-3, 3, -3, 3)), 256)
    weight = rng.integers(1, 127, (out, size)) * (rng.random((out, size)) > zeros)
    weight = (weight if transpose else weight.T).astype(dtype)
    weight = ops.constant(weight[None] if stacked else weight)
    if dtype is np.int8:
        weight = ops.multiply(ops.convert(weight, "f32"), np.float32(0.01))
    product = ops.matmul(x, weight, False, transpose)
    ov.save_model(ov.Model([product], [ids, mask]), folder / "openvino_model.xml", compress_to_fp16=False)


def test_a_warning_says_why_layers_are_dense(folders, monkeypatch, recwarn):
    def warned(folder, **kwargs):
        recwarn.clear()
        open_openvino(folder, **kwargs)
        return [str(warning.message) for warning in recwarn if "OpenVINO" in str(warning.message)]

    # with AMX all of them are sparse
    for amx, reason in () if has_amx() else ((False, "no AMX"), (True, "another kernel")):
        monkeypatch.setattr(runtime, "has_amx", lambda amx=amx: amx)
        (message,) = warned(folders / "int8")
        assert f"{PRUNED} of {PRUNED} layers" in message and f"{reason} ({PRUNED})" in message
        assert "sparse_rate=1" in message
    (message,) = warned(folders / "fp32")
    assert f"f32, not int8 ({PRUNED})" in message and "export with texts" in message
    (message,) = warned(folders / "int8", sparse_rate=0.95)
    assert "no weight has 95% zeros" in message and "sparse_rate" in message
    assert warned(folders / "int8", sparse_rate=1) == []


def test_models_in_memory_and_adapters(tmp_path, tokenizer):
    inputs = some_tokens(4)
    adapted = get_peft_model(bert(), PSTConfig(task_type="SEQ_CLS", initial_sparsity=0.9))
    bert().save_pretrained(tmp_path / "base")
    adapted.base_model.model.name_or_path = adapted.peft_config["default"].base_model_name_or_path = str(
        tmp_path / "base"
    )
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="not merged: call merged"):
        export_openvino(adapted, tmp_path / "unmerged")
    export_openvino(tmp_path / "adapter", tmp_path / "from adapter")

    merged = adapted.merge_and_unload()
    expected = logits(merged, inputs)
    torch.testing.assert_close(open_openvino(tmp_path / "from adapter")(**inputs), expected, atol=1e-4, rtol=0)
    save_pretrained(merged, tmp_path / "sparse")
    sparse = accelerate_sparse(open_model(tmp_path / "sparse"))
    export_openvino(sparse, tmp_path / "from memory", tokenizer=tokenizer)
    assert any(isinstance(module, SparseLinear) for module in sparse.modules())
    torch.testing.assert_close(open_openvino(tmp_path / "from memory")(**inputs), expected, atol=1e-4, rtol=0)

    half = merged.bfloat16()
    export_openvino(half, tmp_path / "from bf16")
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(
        open_openvino(tmp_path / "from bf16")(**inputs), logits(half.float(), inputs), atol=1e-4, rtol=0
    )


def test_causal_language_models(tmp_path):
    config = OPTConfig(vocab_size=99, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
                       word_embed_proj_dim=64)  # fmt: skip
    inputs = some_tokens(3)
    opt = OPTForCausalLM(config).eval()
    export_openvino(opt, tmp_path / "opt")
    torch.testing.assert_close(open_openvino(tmp_path / "opt")(**inputs), logits(opt, inputs), atol=1e-4, rtol=0)

    llama = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4)).eval()
    if transformers.__version__ < "5":
        with pytest.raises(ValueError, match="cannot convert LlamaForCausalLM .* transformers 5"):
            export_openvino(llama, tmp_path / "llama")
        return
    export_openvino(llama, tmp_path / "llama")
    torch.testing.assert_close(open_openvino(tmp_path / "llama")(**inputs), logits(llama, inputs), atol=1e-4, rtol=0)


SERVE = """
import csv, sys
from pathlib import Path
import peft_pst, peft_pst.integrations.openvino as integration
assert not {"openvino", "nncf"} & set(sys.modules)
from transformers import AutoTokenizer
rows = list(csv.DictReader(open(sys.argv[3])))
model = integration.open_openvino(sys.argv[1], threads=1)
assert "nncf" not in sys.modules
batch = AutoTokenizer.from_pretrained(sys.argv[1])([row["text"] for row in rows], padding=True, return_tensors="pt")
for row in model(batch["input_ids"], batch["attention_mask"]).tolist():
    print("logits", *row)
integration.export_openvino(sys.argv[2], Path(sys.argv[3]).with_name("again"), texts=[rows[0]["text"]])
"""


def test_another_process_opens_it_and_no_telemetry_is_sent(folders, tokenizer, tmp_path):
    texts = some_texts(8, seed=2)
    with open(tmp_path / "texts.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    home = tmp_path / "home"
    home.mkdir()
    arguments = [folders / "int8", folders / "sparse", tmp_path / "texts.csv"]
    environment = {**os.environ, "HOME": str(home)}
    environment.pop("CI", None)  # with it OpenVINO sends nothing anyway
    result = subprocess.run(
        [sys.executable, "-c", SERVE, *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    printed = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("logits")]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    here = open_openvino(folders / "int8", threads=1)(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(torch.tensor([[float(v) for v in row] for row in printed]), here)
    assert "Statistics" not in result.stdout and "nncf" not in result.stderr
    assert not (home / "intel").exists()  # where the telemetry keeps its client's number


def test_a_trace_that_is_wrong_is_not_exported(tmp_path):
    class Branching(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask):
            output = super().forward(input_ids, attention_mask)
            if input_ids.shape[1] > 8:
                output.logits = -output.logits
            return output

    with pytest.raises(ValueError, match="Branching as OpenVINO has converted it is off"):
        export_openvino(bert(Branching), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_what_cannot_be_exported(folders, tmp_path, tokenizer):
    output = tmp_path / "exported"
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=64, d_ff=64, num_layers=1, num_heads=4))
    for model, kwargs, error, message in (
        (t5, {}, ValueError, "T5ForConditionalGeneration is not exported"),
        (bert(BertForQuestionAnswering, num_labels=2), {}, ValueError, "neither logits nor"),
        (torch.nn.Linear(64, 64), {}, TypeError, "got a Linear"),
        (tmp_path / "nowhere", {}, ValueError, "holds neither config.json"),
        (bert(), {"texts": some_texts(2)}, ValueError, "no tokenizer"),
        (bert(), {"texts": [], "tokenizer": tokenizer}, ValueError, r"texts=\[\]"),
        (bert(), {"texts": "word1 word2", "tokenizer": tokenizer}, ValueError, "expected a list"),
        (bert(), {"texts": ["word1", ""], "tokenizer": tokenizer}, ValueError, "no token of the text ''"),
    ):
        with pytest.raises(error, match=message):
            export_openvino(model, output, **kwargs)
        assert not output.exists()
    output.mkdir()
    (output / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="not an empty folder"):
        export_openvino(bert(), output)
    assert [entry.name for entry in output.iterdir()] == ["mine.txt"]


def test_a_save_that_fails_leaves_nothing(tmp_path):
    class Full:
        def save_pretrained(self, folder):
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        export_openvino(bert(), tmp_path / "exported", tokenizer=Full())
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_opened(folders, tmp_path):
    with pytest.raises(ValueError, match=r"holds no openvino_model\.xml"):
        open_openvino(tmp_path)
    with pytest.raises(ValueError, match="sparse_rate=80"):
        open_openvino(folders / "int8", sparse_rate=80)
    with pytest.raises(ValueError, match="threads=0"):
        open_openvino(folders / "int8", threads=0)


@pytest.mark.parametrize("missing", ["openvino", "nncf"])
def test_a_missing_package_is_named(missing, folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing} is not installed: pip install 'peft-pst\[openvino\]'"):
        export_openvino(folders / "sparse", tmp_path / "exported", texts=some_texts(2))
