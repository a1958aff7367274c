import pytest
import torch
from peft import get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_pst import PSTConfig
from peft_pst.integrations.pipeline import cost
from peft_pst.integrations.pipeline.cost import Cost, Costs, measure_costs
from peft_pst.integrations.pipeline.stages import Stage, layer_ranges

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
CAUSAL = {**SIZES, "num_key_value_heads": 2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=4)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "classifier": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "glm": lambda: GlmForCausalLM(GlmConfig(**CAUSAL, head_dim=8, pad_token_id=0)),
    # its layers' first products are frozen and do not keep what they get
    "ffn": lambda: get_peft_model(
        MODELS["classifier"](), PSTConfig(task_type="SEQ_CLS", target_modules=["intermediate.dense"])
    ),
    "pst": lambda: get_peft_model(MODELS["llama"](), PSTConfig(task_type="CAUSAL_LM")),
}


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    ids = torch.randint(1, 99, (2, 16))
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0  # so that layers share a mask
    labels = ids[:, 0] % 2 if name in ("classifier", "ffn") else ids.clone()
    return model, {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Storages:
    """Counts distinct storages that autograd keeps, those of some tensors left out."""

    def __init__(self, without):
        self.without = {tensor.untyped_storage().data_ptr() for tensor in without}
        self.found = {}

    def keep(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.without:
            self.found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def watch(self):
        return saved_tensors_hooks(self.keep, lambda tensor: tensor)

    @property
    def nbytes(self):
        return sum(self.found.values())


@pytest.mark.parametrize("name", MODELS)
def test_what_the_parts_keep_is_what_the_model_keeps(name):
    model, batch = make(name)
    costs = measure_costs(model, batch, repeats=1)
    storages = Storages([*model.parameters(), *model.buffers()])
    with storages.watch():
        output = model(**batch, output_hidden_states=True)
    for hidden in output.hidden_states[1:-1]:  # a stage keeps what it received, whether an operator needs it or not
        storages.keep(hidden)
    assert costs.whole.kept == storages.nbytes
    assert costs.hidden == output.hidden_states[0].nbytes == 2 * 16 * 32 * 4
    stages = costs.of_stages([1, 2])
    assert sum(stage.kept for stage in stages) == costs.whole.kept + costs.shared


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "pst"])
def test_what_a_stage_keeps_is_what_the_pipelines_stage_keeps(name):
    model, batch = make(name)
    split = [1, 2]
    stages = measure_costs(model, batch, repeats=1).of_stages(split)
    received = torch.zeros(())
    for index, layers in enumerate(layer_ranges(split, 3)):
        stage = Stage(model, index, layers)
        stage.shares = iter([1.0])
        storages = Storages([*model.parameters(), *model.buffers()])
        received = received.detach().requires_grad_(index > 0)
        with storages.watch():
            received = stage(received, **batch)
        # a stage makes masks and rotary embeddings itself, and the last one weights its loss
        assert stages[index].kept == pytest.approx(storages.nbytes, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_weights_gradients_and_moments_are_those_of_training(name):
    model, batch = make(name)
    costs = measure_costs(model, batch, repeats=1)
    tied = (
        {id(p): p for p in model.parameters() if p is model.get_output_embeddings().weight} if name == "tied" else {}
    )
    tied |= {
        id(p): p for p in model.parameters() if name in ("gpt2", "bert") and p is model.get_input_embeddings().weight
    }
    twice = sum(parameter.nbytes for parameter in tied.values())  # each end of the pipeline has its own
    assert costs.whole.weights == twice + sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model(**batch).loss.backward()
    optimizer.step()
    trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    moments = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    assert costs.whole.gradients == twice + trainable
    assert costs.whole.optimizer_states == 2 * twice + moments


class Tick(torch.autograd.Function):
    """Passes a tensor on and lets a clock go on, in forward and in backward."""

    clock = 0

    @staticmethod
    def forward(ctx, x, forward, backward):
        Tick.clock += forward
        ctx.backward = backward
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        Tick.clock += ctx.backward
        return gradient, None, None


def tick_in(module, forward, backward):
    module.register_forward_hook(lambda module, args, output: Tick.apply(output, forward, backward))


@pytest.mark.parametrize("frozen", [False, True])
def test_each_part_gets_its_own_time(monkeypatch, frozen):
    model, batch = make("llama")
    monkeypatch.setattr(cost, "_now", lambda device: float(Tick.clock))
    tick_in(model.model.embed_tokens, 1, 10)
    for i, layer in enumerate(model.model.layers):
        tick_in(layer.self_attn.o_proj, i + 2, 10 * (i + 2))
        tick_in(layer.mlp, 100, 1000)
    tick_in(model.model.norm, 5, 50)
    tick_in(model.lm_head, 6, 60)
    if frozen:  # the backward pass ends before the embeddings
        model.model.embed_tokens.requires_grad_(False)
    costs = measure_costs(model, batch, repeats=3)
    assert [costs.before.forward, costs.before.backward] == [1, 0 if frozen else 10]
    assert [layer.forward for layer in costs.layers] == [102, 103, 104]
    assert [layer.backward for layer in costs.layers] == [1020, 1030, 1040]
    assert [costs.after.forward, costs.after.backward] == [11, 110]


def test_gradients_and_random_numbers_stay_as_they_were():
    model, batch = make("gpt2")  # has dropout
    model(**batch).loss.backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    measure_costs(model, batch, repeats=1)
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, before[name])


def test_stages_add_up():
    layers = tuple(Cost(i, 10 * i, 1, 1, 2, 100) for i in range(1, 5))
    costs = Costs(Cost(7, 70, kept=5), layers, Cost(9, 90, kept=6), hidden=8, shared=3)
    first, second = costs.of_stages([3, 1])
    assert first == Cost(13, 130, 3, 3, 6, 308)
    assert second == Cost(13, 130, 1, 1, 2, 109)
    assert first.seconds == 143
    assert costs.whole == Cost(26, 260, 4, 4, 8, 414)
    for split in ([4, 0], [2, 1], []):
        with pytest.raises(ValueError, match="4 layers in all"):
            costs.of_stages(split)


def test_what_cannot_be_measured_says_so():
    model, batch = make("llama")
    with pytest.raises(ValueError, match="repeats=0"):
        measure_costs(model, batch, repeats=0)
    with pytest.raises(ValueError, match="gave no loss"):
        measure_costs(model, {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match="No parameter"):
        measure_costs(model.requires_grad_(False), batch)
    with pytest.raises(ValueError, match="cannot be cut"):
        measure_costs(T5ForConditionalGeneration(T5Config(d_model=16, num_layers=1, vocab_size=9)), batch)
