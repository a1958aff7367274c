"""`plan` beside real models: their parameters, their files, and the memory that their training takes."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    ViTConfig,
)

import peft_pst
from peft_pst import PSTConfig
from peft_pst.model import default_target_modules
from peft_pst.plan import plan, plan_rows

BERT = BertConfig(
    hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, vocab_size=500, num_labels=3
)
LLAMA = LlamaConfig(
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=256,
    vocab_size=500,
)
TIED = LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})
GPT2 = GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=500)
SMALL = {"bert": BERT, "llama": LLAMA, "gpt2": GPT2}

# large enough that the memory of the training stands out
LARGE = {
    "bert": BertConfig(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048, vocab_size=10000
    ),
    "llama": LlamaConfig(
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1024,
        vocab_size=8000,
    ),
}
TRAININGS = ("PST", "LoRA r=8", "full fine-tuning")
BATCH = {"batch_size": 8, "tokens": 64}


def task_of(config):
    return "SEQ_CLS" if isinstance(config, BertConfig) else "CAUSAL_LM"


def base_model(config):
    auto = AutoModelForSequenceClassification if isinstance(config, BertConfig) else AutoModelForCausalLM
    return auto.from_config(config)


def real_model(config, training, pst_config=None):
    model, task = base_model(config), task_of(config)
    if training == "PST":
        return get_peft_model(model, pst_config or PSTConfig(task_type=task))
    if training == "LoRA r=8":
        return get_peft_model(model, LoraConfig(r=8, task_type=task, target_modules=default_target_modules(model)))
    return model


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def train(model, config, steps):
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    for _ in range(steps):
        ids = torch.randint(100, tuple(BATCH.values()))
        mask = torch.ones_like(ids)
        mask[0, 9:] = 0
        labels = torch.zeros(len(ids), dtype=torch.int64) if task_of(config) == "SEQ_CLS" else ids
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def by_name(planned):
    return {training.name: training for training in planned.trainings}


@pytest.mark.parametrize("name", SMALL)
def test_parameters_weights_and_states_are_those_of_the_real_model(name):
    config = SMALL[name]
    planned = by_name(plan(config, batch_size=1, tokens=4))
    assert tuple(planned) == TRAININGS
    for training in TRAININGS:
        model = real_model(config, training)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert planned[training].trainable == sum(p.numel() for p in trainable)
        assert planned[training].parameters == sum(p.numel() for p in model.parameters())
        if training != "full fine-tuning":
            assert model.get_nb_trainable_parameters() == (planned[training].trainable, planned[training].parameters)
        # a buffer may be a view of a smaller one
        weights = nbytes(model.parameters()) + sum(
            {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in model.buffers()}.values()
        )
        assert planned[training].memory.weights == pytest.approx(weights, rel=1e-3)
        states = train(model, config, steps=1).state.values()
        assert planned[training].memory.optimizer_states == nbytes(t for state in states for t in state.values())


def test_gradients_of_all_weights_live_when_the_optimizer_runs():
    for config in (LLAMA, MixtralConfig(**LLAMA.to_dict(), num_local_experts=4)):
        full = by_name(plan(config, batch_size=1, tokens=4))["full fine-tuning"]
        assert full.memory.gradients == 4 * full.trainable == full.memory.optimizer_states / 2 - 2 * n_tensors(config)


def n_tensors(config):
    return len(list(base_model(config).parameters()))  # a step count of 4 bytes each


def test_predicted_peak_is_that_of_a_real_training():
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    environment = {**os.environ, **malloc, "PYTHONPATH": str(Path(peft_pst.__file__).parents[1])}
    output = subprocess.run([sys.executable, __file__], env=environment, stdout=subprocess.PIPE, check=True).stdout
    measured = json.loads(output.splitlines()[-1])
    for name, config in LARGE.items():
        for training in plan(config, device="cpu", **BATCH).trainings:
            assert training.memory.total == pytest.approx(measured[name][training.name], rel=0.1), (name, training)


def measure(config, training):
    """Peak memory of three steps in bytes, as benchmarks/plan.py measures it."""
    model = real_model(config, training)
    own = nbytes((*model.parameters(), *model.buffers()))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    train(model, config, steps=3)
    return own + resident("VmHWM") - before


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.parametrize(
    "config, choices",
    [
        (BERT, {"sparsity": 0.5}),
        (BERT, {"sparsity": 0.9}),
        (TIED, {"sparsity": 0.95}),
        (LLAMA, {"pattern": "2:4"}),
        (LLAMA, {"pattern": "row"}),
        (LLAMA, {"pattern": "head"}),
        (GPT2, {"sparsity": 0.95}),
        (GPT2, {"pattern": "row"}),
    ],
)
def test_files_have_the_predicted_size(config, choices, tmp_path):
    pst_config = PSTConfig(task_type=task_of(config), **choices)
    planned = plan(config, pst_config, batch_size=1, tokens=4)
    assert planned.sparsity == pst_config.sparsity
    model = real_model(config, "PST", PSTConfig(task_type=task_of(config), **choices))
    model.save_pretrained(tmp_path / "adapter")
    model.base_model.set_sparsity(pst_config.sparsity)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "dense")
    peft_pst.save_pretrained(merged, tmp_path / "sparse")
    peft_pst.save_pretrained(merged, tmp_path / "bf16", values="bf16")
    for predicted, folder in (
        (by_name(planned)["PST"].adapter_bytes, "adapter"),
        (planned.dense_bytes, "dense"),
        (planned.sparse_bytes, "sparse"),
        (planned.sparse_bf16_bytes, "bf16"),
    ):
        saved = sum(file.stat().st_size for file in (tmp_path / folder).glob("*.safetensors"))
        assert predicted == pytest.approx(saved, rel=0.02), folder


def test_lora_adapter_has_the_predicted_size(tmp_path):
    real_model(BERT, "LoRA r=8").save_pretrained(tmp_path)
    saved = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert by_name(plan(BERT, batch_size=1, tokens=4))["LoRA r=8"].adapter_bytes == pytest.approx(saved, rel=0.02)


def test_a_model_of_any_size_takes_no_memory():
    # two of the 126 blocks of a model of 405 billion parameters
    wide = LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=2,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    before = resident("VmRSS")
    planned = plan(wide, batch_size=1, tokens=4096, dtype="bfloat16", devices=8, sharding="fsdp")
    assert resident("VmRSS") - before < 3e8
    assert planned.dense_bytes > 2e10
    assert all(training.memory.total > 1e10 for training in planned.trainings)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_devices_share_what_the_sharding_says(device):
    def full(**choices):
        return by_name(plan(LLAMA, batch_size=1, tokens=4, device=device, **choices))["full fine-tuning"].memory

    one = full()
    assert one == full(sharding="fsdp")  # a single device has nobody to share with
    assert full(devices=4).gradients == 2 * one.gradients
    for sharding, sharded in (("zero-1", 1), ("zero-2", 2), ("zero-3", 3), ("fsdp", 3)):
        memory = full(devices=4, sharding=sharding)
        assert memory.optimizer_states == pytest.approx(one.optimizer_states / 4, abs=2)
        if sharded == 1:
            assert memory.gradients == one.gradients
        if sharded == 2:
            assert memory.gradients < one.gradients / 3
        gathered = nbytes(gathered_parameters()) if sharded == 3 else 0
        weights = one.weights / 4 if sharded == 3 else one.weights
        assert memory.weights == pytest.approx(weights + gathered, abs=2)
        assert memory.total == sum(getattr(memory, name) for name in vars(memory) if name != "total")


def gathered_parameters():
    model = base_model(LLAMA)
    return [p for name, p in model.named_parameters() if ".layers.1." not in name]


def test_choices_change_what_they_should():
    def pst(**choices):
        return by_name(plan(BERT, **{**BATCH, **choices}))["PST"].memory

    assert pst(gradient_checkpointing=True).activations < pst().activations / 2
    # every factor stays in float32
    assert pst(dtype="bfloat16").weights < pst().weights
    # dropout in the attention of a CPU keeps matrices of scores, tokens by tokens
    assert pst(device="cuda", tokens=512).activations < pst(device="cpu", tokens=512).activations / 3


@pytest.mark.parametrize(
    "choices",
    [
        {"pattern": "neuron", "budget": "global"},
        {"budget": "global"},
        {"importance": "movement", "update": "full"},
        {"importance": "l0", "penalty": 1.0},
        {"pattern": "2:4", "mask_interval": 10},
    ],
    ids=str,
)
def test_every_method_can_be_planned(choices):
    training = plan(LLAMA, PSTConfig(**choices), batch_size=1, tokens=8).trainings[0]
    assert training.trainable == real_model(LLAMA, "PST", PSTConfig(**choices)).get_nb_trainable_parameters()[0]


def test_a_budget_for_the_whole_model_compares_all_entries_at_once():
    def total(**choices):
        return plan(LLAMA, PSTConfig(**choices), batch_size=1, tokens=4, device="cpu").trainings[0].memory.total

    targets = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    assert total(budget="global") > total(mask_interval=10) + 8 * targets


def test_a_plan_is_json_and_a_table():
    planned = plan(BERT, batch_size=1, tokens=4)
    assert json.loads(json.dumps(planned.to_dict()))["trainings"][0]["memory"]["total"] > 0
    header, rows = plan_rows(planned)
    assert header[1:] == list(TRAININGS)
    assert ["parameters trained", *(f"{t.trainable:,}" for t in planned.trainings)] in rows
    assert all(len(row) == len(header) for row in rows)


def test_the_task_is_that_of_adapter_architecture_or_kind_of_model():
    assert plan(BERT, batch_size=1, tokens=4).model == "BertForSequenceClassification"
    assert plan(LLAMA, batch_size=1, tokens=4).model == "LlamaForCausalLM"
    named = LlamaConfig(**{**LLAMA.to_dict(), "architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0})
    assert plan(named, batch_size=1, tokens=4).model == "LlamaForSequenceClassification"
    assert plan(BERT, PSTConfig(task_type="TOKEN_CLS"), batch_size=1, tokens=4).model == "BertForTokenClassification"


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"sharding": "zero-4"}, ValueError, r"sharding='zero-4'.*zero-3"),
        ({"dtype": "int8"}, ValueError, r"dtype='int8'.*bfloat16"),
        ({"device": "tpu"}, ValueError, r"device='tpu'.*cuda"),
        ({"devices": 0}, ValueError, r"devices=0.*at least 1"),
        ({"batch_size": 0}, ValueError, r"batch_size=0.*at least 1"),
        ({"tokens": 2.5}, ValueError, r"tokens=2.5.*an int"),
        ({"config": ViTConfig()}, ValueError, "ViTConfig has no model"),
        ({"config": "bert"}, TypeError, "got a str"),
        ({"pst_config": PSTConfig(task_type="FEATURE_EXTRACTION")}, ValueError, "no model for .*FEATURE_EXTRACTION"),
        (
            {"config": LLAMA, "pst_config": PSTConfig(importance="wanda", update="none", norms=False)},
            ValueError,
            "trains nothing",
        ),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, error, message):
    with pytest.raises(error, match=message):
        plan(**{"config": BERT, **arguments})


if __name__ == "__main__":
    train(real_model(BERT, "PST"), BERT, steps=2)
    train(real_model(LLAMA, "PST"), LLAMA, steps=2)
    results = {name: {t: measure(config, t) for t in TRAININGS} for name, config in LARGE.items()}
    print(json.dumps(results))
