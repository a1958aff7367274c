"""Export to ONNX. What is exported is opened again in another process, which knows nothing of peft_pst."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_pst import PSTConfig, SparseLinear, cli, open_model, save_pretrained

onnx = pytest.importorskip("onnx", reason="exports need the extra peft-pst[onnx]")
pytest.importorskip("onnxruntime", reason="exports need the extra peft-pst[onnx]")

from onnx import numpy_helper  # noqa: E402

from peft_pst.integrations.onnx import export, graph, verification  # noqa: E402

WITH_OPTIMUM = transformers.__version__.startswith("4.")
needs_optimum = pytest.mark.skipif(not WITH_OPTIMUM, reason="there is no optimum-onnx for transformers 5")
pytestmark = pytest.mark.filterwarnings("ignore:The model's sparse weights stay compressed")

REGISTRATION = Path(__file__).parents[2] / "integrations" / "optimum_cli" / "register_peft_pst.py"
PROMPT = [[5, 17, 60, 33, 8, 21, 40], [9, 3, 77, 12, 50, 6, 31]]
STEPS = 8

OPENED_BY_OPTIMUM = """
import json, sys, torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSeq2SeqLM, ORTModelForSequenceClassification
prompt, steps = torch.tensor(json.loads(sys.argv[1])), int(sys.argv[2])
found = {}
for kind, folder in json.loads(sys.argv[3]).items():
    if kind == "bert":
        model = ORTModelForSequenceClassification.from_pretrained(folder)
        found[kind] = model(input_ids=prompt, attention_mask=torch.ones_like(prompt)).logits.tolist()
    else:
        model = (ORTModelForSeq2SeqLM if kind == "t5" else ORTModelForCausalLM).from_pretrained(folder)
        assert model.use_cache
        found[kind] = model.generate(prompt, do_sample=False, max_new_tokens=steps, min_new_tokens=steps).tolist()
assert "peft_pst" not in sys.modules
print(json.dumps(found))
"""

OPENED_BY_ONNX_RUNTIME = """
import json, sys
import numpy as np, onnxruntime
prompt, steps = np.array(json.loads(sys.argv[1])), int(sys.argv[2])
found = {}
for kind, folder in json.loads(sys.argv[3]).items():
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
    names = [entry.name for entry in session.get_inputs()]
    def logits(ids):
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        inputs["position_ids"] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        return session.run(["logits"], {name: inputs[name] for name in names})[0]
    if kind == "bert":
        found[kind] = logits(prompt).tolist()
    else:
        ids = prompt
        for _ in range(steps):
            ids = np.concatenate([ids, logits(ids)[:, -1:].argmax(-1)], axis=1)
        found[kind] = ids.tolist()
print(json.dumps(found))
"""


def make(kind, size=256):
    """A small model with random weights; at size 256 its embeddings and nodes are a small part of it."""
    torch.manual_seed(0)
    tokens = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1}
    sizes = {"hidden_size": size, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 4 * size}
    if kind == "bert":
        config = transformers.BertConfig(**sizes, num_labels=3, max_position_embeddings=64, **tokens)
        return transformers.BertForSequenceClassification(config).eval()
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=size, n_layer=2, n_head=4, n_positions=64, **tokens)
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64, **tokens)
        ).eval()
    sizes = {"d_model": size, "d_kv": size // 4, "d_ff": 4 * size, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, vocab_size=99, decoder_start_token_id=0, tie_word_embeddings=False)
    return transformers.T5ForConditionalGeneration(config).eval()


def prune(model, sparsity=0.9):
    """Zero the smallest weights of each linear layer."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            weight = module.weight.data
            smallest = weight.abs().flatten().argsort()[: int(sparsity * weight.numel())]
            weight.view(-1)[smallest] = 0
    return model


def zeros_in(file):
    """Zeros in a graph's weights, as the onnx package reads it."""
    stored = onnx.load(file).graph
    kept = (numpy_helper.to_array(tensor) for tensor in stored.initializer if len(tensor.dims) == 2)
    dense = sum(int((array == 0).sum()) for array in kept if array.dtype == "float32")
    sparse = stored.sparse_initializer
    return dense + sum(t.dims[0] * t.dims[1] - t.values.dims[0] for t in sparse)


def in_another_process(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_what_is_exported_runs_elsewhere(tmp_path, capsys):
    kinds = ["bert", "gpt2", "llama", "t5"] if WITH_OPTIMUM else ["bert", "llama"]
    expected, folders, prompt = {}, {}, torch.tensor(PROMPT)
    for kind in kinds:
        model = prune(make(kind))
        zeros = sum(int((weight == 0).sum()) for weight in model.parameters() if weight.dim() == 2)
        made = export(model, tmp_path / kind)
        assert made.difference <= 1e-4 and made.missing == []
        assert sum(before for before, _ in made.zeros.values()) == zeros == sum(n for _, n in made.zeros.values())
        assert all(now <= 0.25 * dense for dense, now in made.sizes.values())
        assert sorted(made.sizes) == sorted(file.name for file in (tmp_path / kind).glob("*.onnx*"))
        printed = capsys.readouterr().out
        assert f"{made.difference:.1e}" in printed and f"{zeros:,}" in printed
        folders[kind] = str(tmp_path / kind)
        with torch.no_grad():
            if kind == "bert":
                expected[kind] = model(prompt).logits
                assert zeros_in(tmp_path / "bert" / "model.onnx") == zeros
            else:
                expected[kind] = model.generate(
                    prompt, do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS
                ).tolist()
                assert len({token for row in expected[kind] for token in row[-STEPS:]}) > 3
    code = OPENED_BY_OPTIMUM if WITH_OPTIMUM else OPENED_BY_ONNX_RUNTIME
    found = json.loads(in_another_process(code, json.dumps(PROMPT), str(STEPS), json.dumps(folders)).splitlines()[-1])
    torch.testing.assert_close(torch.tensor(found.pop("bert")), expected.pop("bert"), atol=1e-4, rtol=0)
    assert found == expected

    export(make("bert"), tmp_path / "dense")
    dense, small = (tmp_path / name / "model.onnx" for name in ("dense", "bert"))
    assert small.stat().st_size <= 0.25 * dense.stat().st_size


def test_a_sparse_model_and_its_folder(tmp_path):
    save_pretrained(prune(make("bert", 32)).bfloat16(), tmp_path / "small")
    model = open_model(tmp_path / "small")
    made = export(model, tmp_path / "onnx")
    assert any(isinstance(module, SparseLinear) for module in model.modules()) and torch.is_grad_enabled()
    assert model.dtype == torch.bfloat16 and model.config.quantization_config is not None
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["BertForSequenceClassification"]
    again = export(tmp_path / "small", tmp_path / "again")
    assert again.zeros == made.zeros and len(made.zeros) >= 14
    files = [tmp_path / name / "model.onnx" for name in ("onnx", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture
def adapter(local_hub):
    """The folder of a 90 % sparse adapter on a base model that has a tokenizer."""
    base = local_hub / "google-bert" / "bert-base-uncased"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, ignore_mismatched_sizes=True
    )
    config = PSTConfig(task_type="SEQ_CLS", initial_sparsity=0.9)
    get_peft_model(model, config).save_pretrained(local_hub / "adapter")
    return local_hub / "adapter"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; its exit status and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["peft-pst", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "1000")
        with pytest.raises(SystemExit) as exit:
            cli.main()
        printed = capsys.readouterr()
        return exit.value.code or 0, printed.out, printed.err

    return run


def test_the_command_exports_an_adapter_with_its_tokenizer(adapter, run, tmp_path):
    code, printed, _ = run("export", adapter, tmp_path / "onnx", "--quantize", "int8")
    assert code == 0 and "largest difference to PyTorch" in printed and "| int8" in printed
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "onnx")
    assert len(tokenizer) == 92
    if WITH_OPTIMUM:
        from optimum.onnxruntime import ORTModelForSequenceClassification

        model = ORTModelForSequenceClassification.from_pretrained(tmp_path / "onnx")
        classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
        assert classify("word1 word2")[0]["label"] in model.config.label2id and model.config.num_labels == 3


def test_int8_keeps_the_zeros_and_stays_near(tmp_path):
    made = export(prune(make("t5" if WITH_OPTIMUM else "bert", 64)), tmp_path / "int8", quantize="int8")
    assert 1e-4 < made.difference < 0.1 * made.scale
    assert all(before == after for before, after in made.zeros.values()) and made.missing == []
    assert all(now < 0.5 * dense for dense, now in made.sizes.values())
    file = sorted((tmp_path / "int8").glob("*.onnx"))[0]
    assert any(tensor.values.data_type == onnx.TensorProto.INT8 for tensor in onnx.load(file).graph.sparse_initializer)


def test_large_tensors_go_into_a_second_file(tmp_path, monkeypatch):
    inside = export(prune(make("bert", 64)), tmp_path / "inside")
    size = inside.sizes["model.onnx"][1]
    monkeypatch.setattr(graph, "ONE_FILE", 0)
    beside = export(prune(make("bert", 64)), tmp_path / "beside")
    assert (tmp_path / "beside" / "model.onnx").stat().st_size < 0.4 * size
    assert (tmp_path / "beside" / "model.onnx_data").stat().st_size > 0.6 * size
    assert sorted(beside.sizes) == ["model.onnx"] and beside.sizes["model.onnx"][1] >= size
    assert beside.zeros == inside.zeros and beside.difference == inside.difference


def test_shrunk(tmp_path):
    model = make("bert", 64)
    for layer, dead in zip(model.bert.encoder.layer, (200, 208), strict=True):
        layer.intermediate.dense.weight.data[:dead] = 0
        layer.intermediate.dense.bias.data[:dead] = 0
        layer.output.dense.weight.data[:, :dead] = 0
    made = export(model, tmp_path / "onnx", shrink=True)
    shapes = {tuple(tensor.dims) for tensor in onnx.load(tmp_path / "onnx" / "model.onnx").graph.initializer}
    assert {(64, 56), (64, 48)} <= shapes and (64, 256) not in shapes and made.difference <= 1e-4
    assert "quantization_config" not in json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == 256


@needs_optimum
def test_optimum_cli_opens_a_sparse_folder(tmp_path):
    """As installed: its namespace gets our file. Without, it exports random weights."""
    model = prune(make("bert", 64))
    save_pretrained(model, tmp_path / "small")
    namespace = tmp_path / "site" / "optimum" / "commands" / "register"
    namespace.mkdir(parents=True)
    shutil.copy(REGISTRATION, namespace)
    arguments = ["--model", tmp_path / "small", "--task", "text-classification", tmp_path / "onnx"]
    code = "from optimum.commands.optimum_cli import main; main()"
    in_another_process(code, "export", "onnx", *map(str, arguments), PYTHONPATH=str(tmp_path / "site"))
    stored = graph.weights(tmp_path / "onnx" / "model.onnx")
    assert any((array == model.bert.encoder.layer[1].output.dense.weight.T.numpy(force=True)).all()
               for array in stored.values() if array.shape == (256, 64))  # fmt: skip


class TestErrors:
    def test_an_adapter_that_is_not_merged(self, tmp_path, bert):
        model = get_peft_model(bert(), PSTConfig(task_type="SEQ_CLS"))
        with pytest.raises(ValueError, match=r"not merged: call merged = model.merge_and_unload"):
            export(model, tmp_path / "onnx")
        with pytest.raises(ValueError, match="not merged"):
            export(model.base_model.model, tmp_path / "onnx")

    def test_no_model(self, tmp_path):
        with pytest.raises(TypeError, match="got a Linear: expected a model of transformers"):
            export(nn.Linear(2, 2), tmp_path / "onnx")

    def test_no_tokens(self, tmp_path):
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32))
        with pytest.raises(ValueError, match="reads 'pixel_values': expected a model that reads tokens"):
            export(model, tmp_path / "onnx")

    @pytest.mark.parametrize("package", ["onnxruntime", "optimum.exporters.onnx" if WITH_OPTIMUM else "onnxscript"])
    def test_a_missing_package(self, tmp_path, bert, monkeypatch, package):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=r"pip install 'peft-pst\[onnx\]'"):
            export(bert(), tmp_path / "onnx")
        assert not (tmp_path / "onnx").exists()

    def test_an_unknown_task(self, tmp_path, bert):
        with pytest.raises(ValueError, match="task='fill-mask' is not what .* expected 'text-classification'"):
            export(bert(), tmp_path / "onnx", "fill-mask")
        supported = (
            "'text-generation-with-past' or 'text-generation'" if WITH_OPTIMUM else "expected 'text-generation'"
        )
        with pytest.raises(ValueError, match=supported):
            export(make("llama", 32), tmp_path / "onnx", "text2text-generation")

    def test_an_unknown_quantization(self, tmp_path, bert):
        with pytest.raises(ValueError, match="quantize='int4' is unknown: expected 'int8' or None"):
            export(bert(), tmp_path / "onnx", quantize="int4")

    @pytest.mark.skipif(WITH_OPTIMUM, reason="optimum exports them")
    def test_an_encoder_decoder_with_transformers_5(self, tmp_path):
        with pytest.raises(ValueError, match=r"an encoder-decoder, cannot be exported: optimum does it"):
            export(make("t5", 32), tmp_path / "onnx")

    @needs_optimum
    def test_an_architecture_that_the_exporter_does_not_know(self, tmp_path):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
        model = transformers.NystromformerForMaskedLM(transformers.NystromformerConfig(**sizes, vocab_size=99))
        model.config.model_type = "new"
        with pytest.raises(ValueError, match=r"optimum cannot export a NystromformerForMaskedLM \(new\)"):
            export(model, tmp_path / "onnx")

    def test_an_output_too_far_from_pytorch(self, tmp_path, bert):
        with pytest.raises(ValueError, match="more than the tolerance of 0.0e\\+00. Nothing was written"):
            export(bert(), tmp_path / "onnx", tolerance=0.0)
        assert list(tmp_path.iterdir()) == []

    def test_a_lost_zero(self, tmp_path, bert, monkeypatch):
        def lose(folder):
            stored = onnx.load(folder / "model.onnx")
            for tensor in stored.graph.initializer:
                array = numpy_helper.to_array(tensor).copy()
                array[array == 0] = 1e-9
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            onnx.save(stored, folder / "model.onnx")

        monkeypatch.setattr(graph, "make_sparse", lose)
        with pytest.raises(ValueError, match="zeros, of which only 0 are zeros in model.onnx"):
            export(prune(bert()).eval(), tmp_path / "onnx")
        assert list(tmp_path.iterdir()) == []

    def test_an_output_folder_that_exists(self, tmp_path, run):
        (tmp_path / "adapter").mkdir()
        (tmp_path / "onnx").mkdir()
        (tmp_path / "onnx" / "notes.txt").write_text("mine")
        code, printed, error = run("export", tmp_path / "adapter", tmp_path / "onnx")
        assert (code, printed) == (1, "")
        assert (
            error
            == f"Error: There is something at '{tmp_path / 'onnx'}' already: delete it, or choose another folder.\n"
        )
        assert [file.name for file in (tmp_path / "onnx").iterdir()] == ["notes.txt"]

    def test_a_full_disk(self, tmp_path):
        """Simulated by a limit on the size of a file."""
        make("bert", 64).save_pretrained(tmp_path / "model")
        code = """
import resource, sys
from peft_pst import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    cli.main()
except SystemExit as exit:
    assert exit.code == 1
"""
        done = subprocess.run(
            [sys.executable, "-c", code, "export", tmp_path / "model", tmp_path / "out" / "onnx"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and done.stdout == ""
        lines = [line for line in done.stderr.splitlines() if "Warning" not in line]
        assert "[Errno 27] File too large" in lines[-1] and lines[-1].startswith("Error: ")
        assert list((tmp_path / "out").iterdir()) == []


class Exported:
    """What is called like an exported model, and computes what it is given."""

    input_names = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, compute):
        self.compute = compute

    def __call__(self, **batch):
        return self.compute(batch)


def test_what_is_no_number_is_not_near():
    model = make("bert", 64).eval()
    found = verification.difference(model, Exported(lambda batch: model(**batch)))
    assert found.largest == 0.0 < found.scale
    verification.check(found, 1e-4)
    for wrong in (math.nan, math.inf):
        found = verification.difference(model, Exported(lambda batch, x=wrong: {"logits": model(**batch).logits + x}))
        with pytest.raises(ValueError, match="away from PyTorch's"):
            verification.check(found, 1e-4)
    with pytest.raises(ValueError, match="none of the outputs"):
        verification.difference(model, Exported(lambda batch: {"scores": model(**batch).logits}))
