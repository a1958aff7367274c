import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_pst import tensor_sparsity

SCRIPT = Path(__file__).parents[1] / "examples" / "light_bilingual_lm.py"


@pytest.fixture
def folder(tmp_path, byte_tokenizer):
    """With a small model in `teacher`, whose tokens are bytes."""
    byte_tokenizer.save_pretrained(tmp_path / "teacher")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
    config = LlamaConfig(vocab_size=257, intermediate_size=48, head_dim=8, tie_word_embeddings=True, **sizes, **ends)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    return tmp_path


def test_the_whole_way(folder):
    command = [sys.executable, SCRIPT, "--teacher", "teacher", "--output", "out", "--steps", "4", "--batch-size", "6"]
    command += ["--num-layers", "2", "--head-dim", "6", "--sparsity", "0.7"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    out = folder / "out"
    stages = json.loads((out / "results.json").read_text())
    assert list(stages) == ["teacher, tuned", "compressed", "distilled", "with PST, 70% sparse"]
    assert all(found["languages"].keys() == {"en", "zh"} for found in stages.values())
    before, after = (stages[name]["languages"] for name in ("compressed", "distilled"))
    assert after["en"]["loss"] < before["en"]["loss"] and after["zh"]["loss"] < before["zh"]["loss"]
    assert (out / "results.md").read_text().strip() in result.stdout
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {file.name for file in (out / "small").iterdir()}
    light = AutoModelForCausalLM.from_pretrained(out / "light")
    assert (light.config.num_hidden_layers, light.config.head_dim, light.config.hidden_size) == (2, 6, 24)
    assert len(light.config.compression["channels"]) == 24
    small = AutoModelForCausalLM.from_pretrained(out / "small")
    shares = [row.zeros / row.numel for row in tensor_sparsity(small) if "proj" in row.name]
    assert len(shares) == 14 and min(shares) > 0.69


def test_data_of_ones_own(folder):
    for split in ("train", "dev", "test"):
        text = f'en\tzh\tsource\n"Open" {split}\t打开\tmodule\nfont\t字体\tmodule\n'
        (folder / f"{split}.tsv").write_text(text, encoding="utf-8")
    script = runpy.run_path(str(SCRIPT))
    pairs = script["load_pairs"](folder)
    assert pairs["dev"] == [('"Open" dev', "打开"), ("font", "字体")] and len(pairs["train"]) == 2
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "teacher")
    rows = script["mixed"](pairs["dev"], tokenizer, 16)  # of the longer pair no direction fits
    texts = {row["language"]: tokenizer.decode(row["input_ids"]) for row in rows}
    assert texts == {0: "字体\nfont<end>", 1: "font\n字体<end>"}
    said = {row["language"]: tokenizer.decode([i for i in row["labels"] if i != -100]) for row in rows}
    assert said == {0: "font<end>", 1: "字体<end>"}


def test_the_terms_beside_the_script():
    pairs = runpy.run_path(str(SCRIPT))["load_pairs"](None)
    assert {name: len(split) for name, split in pairs.items()} == {"train": 80, "dev": 10, "test": 10}
    every = [pair for split in pairs.values() for pair in split]
    assert len(set(every)) == 100 and all(en.isascii() and not zh.isascii() for en, zh in every)
