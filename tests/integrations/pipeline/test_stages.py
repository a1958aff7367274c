import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from pipeline_cases import LLAMA, make_batches, make_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from peft_pst import PSTConfig
from peft_pst.integrations.pipeline import Pipeline
from peft_pst.integrations.pipeline.schedules import check_schedule
from peft_pst.integrations.pipeline.stages import ARCHITECTURES, Stage, count_labels, layer_ranges

HEADS = {"lm": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification, "mlm": AutoModelForMaskedLM}
SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}
OPTIONS = {
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "mistral": {"sliding_window": 4},
    "qwen2": SLIDING,
    "qwen3": SLIDING,
    "smollm3": SLIDING,
}


def make(kind, head):
    config = AutoConfig.for_model(kind, **{**LLAMA, "eos_token_id": 2, "bos_token_id": 1, **OPTIONS.get(kind, {})})
    try:
        return HEADS[head].from_config(config)
    except ValueError:
        return None


def batch_for(head):
    batch = make_batches("llama")[0]
    batch["attention_mask"][1] = batch["attention_mask"][1].flip(0)  # padded on the left
    batch["input_ids"] = batch["input_ids"].clamp(min=3).masked_fill(batch["attention_mask"] == 0, 0)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch | {"labels": torch.arange(8) % 2} if head == "classifier" else batch


def run(stages, batch):
    stages[-1].shares = iter([1.0])
    hidden = batch["input_ids"]
    for stage in stages:
        hidden = stage(hidden, **batch)
    return hidden


def cut(model, layers, **options):
    return [Stage(model, i, own, **options) for i, own in enumerate(layer_ranges(layers, sum(layers)))]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_stages_one_after_the_other_are_the_model(kind, head):
    model = make(kind, head)
    if model is None:
        pytest.skip(f"transformers has no {kind} with this head")
    model.eval()
    batch = batch_for(head)
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    stages = cut(model, [1, 2, 1])
    found = run(stages, batch)
    found.backward()
    assert found.item() == pytest.approx(loss.item(), abs=1e-6)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == gradients.keys()
    for name, p in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(p.grad, gradients[name], rtol=0, atol=1e-6)
    # every parameter lies on one stage, the same tensor, under the name that it has in the model
    own = {name: p for stage in stages for name, p in stage.model.named_parameters(remove_duplicate=False)}
    whole = dict(model.named_parameters(remove_duplicate=False))
    assert own.keys() == whole.keys() and all(own[name] is whole[name] for name in own)


def test_the_model_itself_stays_whole():
    model = make_model("llama")
    batch = make_batches("llama")[0]
    before, state = model(**batch).loss, list(model.state_dict())
    run(cut(model, [3, 1]), batch)
    assert torch.equal(model(**batch).loss, before) and list(model.state_dict()) == state


def test_positions_of_the_batch_reach_every_stage():
    model, batch = make_model("llama"), make_batches("llama")[0]
    plain = model(**batch).loss
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).mul(3).expand(8, -1)
    assert not torch.equal(model(**batch).loss, plain)
    assert torch.equal(run(cut(model, [2, 2]), batch), model(**batch).loss)


@pytest.mark.parametrize("config", [PSTConfig(sparsity=0.5, init_weights=False), LoraConfig(init_lora_weights=False)])
def test_adapters_keep_their_names(config):
    config.target_modules = {"q_proj", "up_proj"}
    model = get_peft_model(make_model("llama"), config)
    if config.peft_type == "PST":
        model.base_model.set_sparsity(0.5)
    batch = make_batches("llama")[0]
    stages = cut(model, [2, 2])
    assert torch.equal(run(stages, batch), model(**batch).loss)
    names = [name for stage in stages for name, p in stage.model.named_parameters() if p.requires_grad]
    assert names == [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_autocast(kind):
    model, batch = make_model(kind), make_batches(kind)[0]
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).loss
    loss = run(cut(model, [2, 2], autocast=torch.bfloat16), batch)
    assert torch.equal(loss, expected) and not torch.equal(loss, model(**batch).loss)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_dropout_runs_in_every_stage():
    model, batch = make_model("gpt2", dropout=0.5), make_batches("gpt2")[0]
    for stage in cut(model, [2, 2]):
        hidden = torch.randn(8, 9, 32) if stage.index else batch["input_ids"]
        stage.shares = iter([1.0, 1.0, 1.0])
        stage.train()
        assert not torch.equal(stage(hidden, **batch), stage(hidden, **batch))
        stage.eval()
        stage.shares = iter([1.0, 1.0])
        assert torch.equal(stage(hidden, **batch), stage(hidden, **batch))


def test_what_counts_as_a_label():
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    assert count_labels(make_model("llama"), labels) == 1  # the first token of a text has nothing before it
    assert count_labels(make_model("bert-mlm"), labels) == 3
    assert count_labels(make_model("bert"), torch.tensor([1, 0, -100])) == 2


def test_what_cannot_be_cut():
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=9, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
    )
    with pytest.raises(
        ValueError, match=r"T5ForConditionalGeneration \(model_type 't5'\).*one of llama, .*gpt2.*bert"
    ):
        Stage(t5, 0, range(1))
    with pytest.raises(ValueError, match=r"Linear.*cannot be cut"):
        Stage(torch.nn.Linear(2, 2), 0, range(1))
    with pytest.raises(ValueError, match="LlamaModel has no head and so no loss"):
        Stage(make_model("llama").model, 0, range(2))
    for layers in ([2, 3], [4, 0], []):
        with pytest.raises(ValueError, match=r"layers=.*together the 4 layers"):
            layer_ranges(layers, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 4, 2, 2), "one of 'gpipe', '1f1b', 'interleaved'"),
        (("1f1b", 1, 2, 2), "at least 2"),
        (("gpipe", 0, 2, 2), "at least 1"),
        (("1f1b", 4, 2, 4), "one for each process"),
        (("interleaved", 4, 2, 2), "such as 4"),
        (("interleaved", 4, 2, 5), "as many for all"),
        (("interleaved", 5, 2, 4), "a multiple of 2"),
    ],
)
def test_what_no_schedule_runs(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(*arguments)


def test_without_a_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        Pipeline(make_model("llama"), layers=[4])
