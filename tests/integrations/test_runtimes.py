import csv
import importlib.util
import json

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_pst import PSTConfig, cli, densify, open_model, save_pretrained
from peft_pst.bench import timing

pytestmark = pytest.mark.filterwarnings("ignore:The model's sparse weights stay compressed")

NEEDS = {"onnx": ["onnxruntime"], "openvino": ["openvino", "nncf"]}
COLUMNS = {
    "onnx": ["ONNX Runtime fp32", "ONNX Runtime int8"],
    "openvino": ["OpenVINO fp32", "OpenVINO int8", "OpenVINO sparse int8"],
}


@pytest.fixture
def folder(bert, tmp_path):
    """A sparse classifier with its tokenizer, and labelled texts, a tenth of them with the wrong label."""
    method = PSTConfig(importance="magnitude", update="none", initial_sparsity=0.9, sparsity=0.9)
    merged = get_peft_model(bert(hidden_size=64, intermediate_size=128), method).merge_and_unload().eval()
    torch.nn.init.normal_(merged.classifier.weight)  # so that the classes lie apart, also in int8
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(97))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    save_pretrained(merged, tmp_path / "small", tokenizer=tokenizer)
    model, rows = densify(open_model(tmp_path / "small")).double(), []
    for i in range(60):
        text = " ".join(f"w{(7 * i + j * j) % 97}" for j in range(3 + i % 9))
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        label = int(logits.argmax())
        rows.append((text, 1 - label if i % 10 == 0 else label))
    with open(tmp_path / "test.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return tmp_path / "small"


@pytest.mark.parametrize("runtime", NEEDS)
def test_the_command_measures_them_beside(folder, runtime, monkeypatch, capsys):
    for package in NEEDS[runtime]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    monkeypatch.setattr(timing, "PAUSE", 0)
    out = folder.with_name("bench.json")
    arguments = ["bench", folder, "--shapes", "1x8,2x16", "--repeats", "1", "--runtimes", runtime, "--json", out]
    monkeypatch.setattr("sys.argv", ["peft-pst", *map(str, arguments), "--data", str(folder.with_name("test.csv"))])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (None, 0)
    measured = {one["name"]: one for one in json.loads(out.read_text())["measured"]}
    assert list(measured)[3:] == COLUMNS[runtime]
    for name in COLUMNS[runtime]:
        assert measured[name]["accuracy"] == pytest.approx(0.9, abs=0.06 if "int8" in name else 1e-6)
        assert set(measured[name]["latency"]) == {"1x8", "2x16"}
    fp32, int8 = (measured[name]["file_bytes"] for name in COLUMNS[runtime][:2])
    assert 0 < int8 < fp32
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runtimes", "onnx,tvm"], "The runtimes 'onnx,tvm' are not all known: expected onnx, openvino"),
        (["--data", "unlabelled.csv"], "has no column `label`"),
    ],
)
def test_errors_of_the_command(folder, arguments, message, monkeypatch, capsys):
    folder.with_name("unlabelled.csv").write_text("text\nw1\n")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("sys.argv", ["peft-pst", "bench", str(folder), *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1 and message in " ".join(capsys.readouterr().err.split())
