import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from peft_pst import densify

SCRIPT = Path(__file__).with_name("train_in_processes.py")
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LIVE = '{"sparsity": 0.8, "norms": true}'
KEPT = '{"sparsity": 0.8, "budget": "global", "mask_interval": 3}'
AST = json.dumps(
    {
        "importance": "magnitude",
        "update": "full",
        "pattern": "2:4",
        "schedule": "constant",
        "mask_interval": 5,
        "straight_through": True,
        "masked_decay": 0.01,
        "boost": 16,
    }
)
WANDA = '{"sparsity": 0.8, "importance": "wanda"}'
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed, which is in .venv-transformers5"
)


def train(folder, kind, config, processes, *options):
    """Train in so many processes."""
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(folder / "base")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    shared |= {"OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
    runs = []
    for rank in range(processes):
        environment = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        with (folder / f"log-{rank}").open("w") as log:
            taught = ["--distill"] if config == KEPT else []
            command = [sys.executable, SCRIPT, folder, kind, config, *taught, *options]
            runs.append(subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log))
    codes = [run.wait(timeout=300) for run in runs]
    assert codes == [0] * processes, "\n\n".join((folder / f"log-{i}").read_text()[-3000:] for i in range(processes))
    return folder


def check_equal(folder, expected, processes):
    """Equal masks in all processes at every step, and in the end equal adapters, outputs and merged models."""
    masks = torch.load(expected / "masks-0.pt")
    for rank in range(processes):
        found = torch.load(folder / f"masks-{rank}.pt")
        assert found and found == masks[-len(found) :]
    for name in ("trained", "logits"):
        states = [load_file(where / f"{name}.safetensors") for where in (folder, expected)]
        assert states[0].keys() == states[1].keys()
        for key, tensor in states[1].items():
            torch.testing.assert_close(states[0][key], tensor, rtol=0, atol=1e-5)
    for name in sorted({"auto", "dense"} & {path.name for path in expected.iterdir()}):
        models = [densify(BertForSequenceClassification.from_pretrained(where / name)) for where in (folder, expected)]
        states = [model.state_dict() for model in models]
        for key, tensor in states[1].items():
            torch.testing.assert_close(states[0][key], tensor, rtol=0, atol=1e-5)
            assert torch.equal(states[0][key] == 0, tensor == 0)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A training in one process, by its config."""
    folders = {}

    def get(config):
        if config not in folders:
            folders[config] = train(tmp_path_factory.mktemp("one"), "ddp", config, 1)
        return folders[config]

    return get


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("ddp", LIVE),
        ("fsdp2", LIVE),
        ("fsdp2", KEPT),
        ("fsdp2", WANDA),
        ("ddp", AST),
        ("fsdp2", AST),
        pytest.param("zero2", LIVE, marks=needs_deepspeed),
        pytest.param("zero3", LIVE, marks=needs_deepspeed),
        pytest.param("zero3", KEPT, marks=needs_deepspeed),
    ],
    ids={LIVE: "live", KEPT: "kept", WANDA: "wanda", AST: "ast"}.get,
)
def test_two_processes_train_what_one_does(tmp_path, one_process, kind, config):
    folder = train(tmp_path / "two", kind, config, 2)
    expected = one_process(config)
    assert len(torch.load(expected / "masks-0.pt")) == 20
    check_equal(folder, expected, 2)
    if (kind, config) in (("ddp", LIVE), ("fsdp2", KEPT)):
        for name in ("auto", "dense", "checkpoint-20"):
            shutil.rmtree(folder / name)
        train(folder, kind, config, 3, "--resume")
        assert len(torch.load(folder / "masks-2.pt")) == 10
        check_equal(folder, expected, 3)
