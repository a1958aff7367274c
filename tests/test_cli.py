import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerState

from peft_pst import PSTConfig, cli, tensor_sparsity

pytestmark = pytest.mark.filterwarnings("ignore:The model's sparse weights stay compressed")


@pytest.fixture
def folders(local_hub):
    """A folder with `base`, which has a tokenizer, and `adapter`, 90 % sparse."""
    base = local_hub / "google-bert" / "bert-base-uncased"
    base.rename(local_hub / "base")
    model = AutoModelForSequenceClassification.from_pretrained(
        local_hub / "base", num_labels=3, ignore_mismatched_sizes=True
    )
    get_peft_model(model, PSTConfig(task_type="SEQ_CLS", initial_sparsity=0.9)).save_pretrained(local_hub / "adapter")
    return local_hub


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; its exit status and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["peft-pst", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        printed = capsys.readouterr()
        return exit.value.code or 0, printed.out + printed.err

    return run


def test_from_an_adapter_to_a_report(folders, run, tmp_path):
    small = tmp_path / "small"
    assert run("merge", folders / "adapter", small)[0] == 0
    model = AutoModelForSequenceClassification.from_pretrained(small)
    assert model.config.num_labels == 3 and len(AutoTokenizer.from_pretrained(small)) == 92
    pruned = [row for row in tensor_sparsity(model) if row.sparsity > 0.5]
    assert len(pruned) == 12

    with open(tmp_path / "data.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), ("word1 word2", "LABEL_1"), ("word60, word61", "0")])
    code, printed = run(
        "report", small, "--data", tmp_path / "data.csv", "--dense", small, "--json", tmp_path / "new" / "report.json"
    )
    assert code == 0 and "bert.encoder.layer.1.output.dense" in printed and "| whole model" in printed
    found = json.loads((tmp_path / "new" / "report.json").read_text())
    assert found["fidelity"] == {"predictions": 2, "agreement": 1.0, "kl": 0.0}
    assert set(found["robustness"]) == {"clean", "typos", "dropped_words"}
    assert sum(layer["cost"]["parameters"] - layer["cost"]["nonzeros"] for layer in found["layers"]) >= sum(
        row.zeros for row in pruned
    )


def test_an_adapter_is_reported_with_the_tokenizer_of_its_base_model(folders, run, tmp_path):
    (tmp_path / "data.csv").write_text("text,label\nword1 word2,LABEL_1\nword3,LABEL_0\n")
    code, printed = run("report", folders / "adapter", "--data", tmp_path / "data.csv")
    assert code == 0 and "accuracy" in printed
    for file in (folders / "base").glob("*token*"):
        file.unlink()
    code, printed = run("report", folders / "adapter", "--data", tmp_path / "data.csv")
    assert code == 1 and "has no tokenizer for the texts of --data" in " ".join(printed.split())


def test_labels_that_are_digits(tmp_path):
    """Of a model whose classes are called so they are names, unless one of them is none."""
    file, label2id = tmp_path / "data.csv", {"1": 0, "2": 1, "3": 2}
    for labels, expected in (("123", [0, 1, 2]), ("012", [0, 1, 2]), ("11", [0, 0]), ("00", [0, 0])):
        file.write_text("".join(["text,label\n", *(f"word,{label}\n" for label in labels)]))
        assert cli._read(file, label2id)[1] == expected
    file.write_text("text,label\nword,0\nword,3\n")
    with pytest.raises(ValueError, match=r"has the labels \['3'\], but the model knows .* by number \[0, 1, 2\]"):
        cli._read(file, {"a": 0, "b": 1, "c": 2})


def test_figures(folders, run, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need the extra peft-pst[plot]")
    code, _ = run("report", folders / "adapter", "--figures", tmp_path / "figures")
    assert code == 0
    names = sorted(file.name for file in (tmp_path / "figures").iterdir())
    assert names == ["depth.png", "masks.png", "scores.png", "sparsity.png"]


@pytest.mark.parametrize("masks", [{"sparsity": 0.9}, {"sparsity": 0.9, "flip_rate": 0.1, "first_flip_rate": 0.2}])
def test_the_figure_of_flips_of_a_checkpoint(masks, folders, run, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need the extra peft-pst[plot]")
    history = [{"step": 10, "loss": 1.0, **masks}, {"step": 10, "eval_loss": 1.0}]
    TrainerState(log_history=history).save_to_json(folders / "adapter" / "trainer_state.json")
    assert run("report", folders / "adapter", "--figures", tmp_path / "figures")[0] == 0
    assert (tmp_path / "figures" / "flips.png").is_file() == ("flip_rate" in masks)


def test_save_and_verify(folders, run, tmp_path):
    assert run("merge", folders / "adapter", tmp_path / "dense", "--format", "dense")[0] == 0
    assert run("save", tmp_path / "dense", tmp_path / "small")[0] == 0
    assert run("verify", tmp_path / "small", "--against", tmp_path / "dense") == (
        0,
        f"All 41 tensors are right, and the same as in {tmp_path / 'dense'}.\n",
    )
    assert run("save", tmp_path / "small", tmp_path / "int8", "--values", "int8")[0] == 0
    assert run("verify", tmp_path / "int8")[0] == 0
    code, printed = run("verify", tmp_path / "int8", "--against", tmp_path / "dense")
    assert code == 1 and printed.count("not the same as in") == 12
    assert run("save", tmp_path / "small", tmp_path / "again", "--format", "dense")[0] == 0
    again, dense = (AutoModelForSequenceClassification.from_pretrained(tmp_path / f) for f in ("again", "dense"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), dense.parameters(), strict=True))


def test_card(folders, run, tmp_path):
    run("merge", folders / "adapter", tmp_path / "small")
    (tmp_path / "results.json").write_text(
        json.dumps([{"task_type": "text-classification", "dataset_type": "csv", "dataset_name": "Words",
                     "metric_type": "accuracy", "metric_value": 0.875}])
    )  # fmt: skip
    code, _ = run(
        "card", tmp_path / "small", "me/words", "--base-model", "a/base", "--results", tmp_path / "results.json"
    )
    text = (tmp_path / "small" / "README.md").read_text()
    assert code == 0 and "import peft_pst" in text and "base_model: a/base" in text and "0.875" in text


def test_the_card_of_an_adapter_takes_the_place_of_the_empty_one(folders, run):
    code, printed = run("card", folders / "adapter", "me/words", "--base-model", "a/base")
    text = (folders / "adapter" / "README.md").read_text()
    assert code == 0 and 'PeftModel.from_pretrained(base, "me/words")' in text and "num_labels=3" in text
    code, printed = run("card", folders / "adapter", "me/words")
    assert code == 1 and "give base_model='owner/name'" in " ".join(printed.split())


def test_plan(folders, run, tmp_path):
    (folders / "base" / "model.safetensors").unlink()  # the config is enough
    arguments = ("--sparsity", "0.95", "--batch-size", "2", "--tokens", "16", "--device", "cpu")
    code, printed = run("plan", folders / "base", *arguments, "--json", tmp_path / "plan.json")
    assert code == 0 and "| model file, 95% sparse" in printed
    found = json.loads((tmp_path / "plan.json").read_text())
    adapter = load_file(folders / "adapter" / "adapter_model.safetensors")
    factors = sum(tensor.numel() for name, tensor in adapter.items() if tensor.is_floating_point() and "pst" in name)
    head = 2 * 32 + 2 + 32 * 32 + 32  # with the pooler
    assert found["trainings"][0]["trainable"] == factors + head
    code, printed = run("plan", folders / "base", "--batch-size", "0")
    assert code == 1 and printed.startswith("Error: batch_size=0")


def test_what_a_user_can_mend_is_one_line(folders, run, tmp_path):
    code, printed = run("save", folders / "adapter", tmp_path / "small")
    assert code == 1 and printed.startswith("Error: ") and "merge it with peft-pst merge" in " ".join(printed.split())
    code, printed = run("merge", folders / "base", tmp_path / "small")
    assert code == 1 and "holds no adapter" in printed
    code, printed = run("report", folders / "base", "--dense", folders / "base")
    assert code == 1 and "--dense needs --data too" in printed
    (tmp_path / "data.csv").write_text("sentence\nword1\n")
    code, printed = run("report", folders / "base", "--data", tmp_path / "data.csv")
    assert code == 1 and "has no column `text`" in " ".join(printed.split())
    (tmp_path / "data.csv").write_text("text,label\nword1,sport\n")
    code, printed = run("report", folders / "base", "--data", tmp_path / "data.csv")
    assert code == 1 and "['sport'], but the model knows ['LABEL_0', 'LABEL_1']" in " ".join(printed.split())


@pytest.mark.parametrize("command", ["report", "merge", "save", "verify", "push", "card", "plan", "bench"])
def test_help_shows_an_example(command, run):
    code, printed = run(command, "--help")
    assert code == 0 and f"peft-pst {command} " in printed.split("Example:")[1]


def test_the_command_is_installed():
    command = Path(sys.executable).with_name("peft-pst")
    found = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(name in found for name in ("report", "merge", "save", "verify", "push", "card", "plan", "bench"))
