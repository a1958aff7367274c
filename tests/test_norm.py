import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_pst import PSTConfig, SparsityScheduler, create_pst_optimizer
from peft_pst.norm import Norm, find_norms

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
IN_A_BLOCK = ("attention.output.LayerNorm", "output.LayerNorm")


def changes(model):
    return {name: p for name, p in model.named_parameters() if "pst_norm_" in name}


def changed(model, std=0.3):
    """The model with changes of its norms, which start at 0."""
    for parameter in changes(model).values():
        nn.init.normal_(parameter, std=std)
    return model


def test_the_norms_of_the_blocks_that_are_pruned_change(bert):
    model = get_peft_model(bert(), PSTConfig())
    names = {f"base_model.model.bert.encoder.layer.{i}.{norm}" for i in (0, 1) for norm in IN_A_BLOCK}
    expected = {f"{name}.pst_norm_{of}.default" for name in names for of in ("weight", "bias")}
    assert changes(model).keys() == expected
    assert all(parameter.requires_grad and not parameter.any() for parameter in changes(model).values())
    assert not any("Norm" in name for name in model.base_model.targeted_module_names)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "pst_" not in name)
    assert not changes(get_peft_model(bert(), PSTConfig(norms=False)))


def test_blocks_that_are_left_out_keep_their_norms(bert):
    config = PSTConfig(target_modules=["query"], layers_to_transform=[1])
    assert all("layer.1." in name for name in changes(get_peft_model(bert(), config)))


def test_norms_of_other_architectures_are_found():
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )
    own = {f"encoder.block.0.layer.{i}.layer_norm" for i in (0, 1)}
    own |= {f"decoder.block.0.layer.{i}.layer_norm" for i in (0, 1, 2)}
    targets = [f"{part}.block.0.layer.0.SelfAttention.q" for part in ("encoder", "decoder")]
    assert set(find_norms(t5, targets)) == own
    llama = LlamaForCausalLM(LlamaConfig(**SMALL))
    of_llama = {f"model.layers.1.{name}_layernorm" for name in ("input", "post_attention")}
    assert set(find_norms(llama, ["model.layers.1.mlp.up_proj"])) == of_llama


@pytest.mark.parametrize("make", [LlamaForCausalLM, GemmaForCausalLM])
def test_the_output_is_that_of_a_model_with_other_scales(make, tokens):
    sizes = {**SMALL, "head_dim": 8, "num_key_value_heads": 4}
    base = make(LlamaConfig(**sizes) if make is LlamaForCausalLM else GemmaConfig(**sizes)).double().eval()
    model = changed(get_peft_model(copy.deepcopy(base), PSTConfig()))
    for name, parameter in changes(model).items():
        of = name.removeprefix("base_model.model.").replace(".pst_norm_weight.default", ".weight")
        base.get_parameter(of).data += parameter.data.double()
    torch.testing.assert_close(model.eval()(tokens).logits, base(tokens).logits, rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_the_layers_own_parameters(bert, tokens):
    model = get_peft_model(bert(), PSTConfig()).train(False)
    model(tokens, labels=torch.tensor([0, 1])).loss.backward()
    plain = bert().eval()
    plain(tokens, labels=torch.tensor([0, 1])).loss.backward()
    for name, parameter in changes(model).items():
        of = name.removeprefix("base_model.model.").replace(".pst_norm_", ".").removesuffix(".default")
        torch.testing.assert_close(parameter.grad, plain.get_parameter(of).grad, rtol=1e-4, atol=1e-7)


def test_an_adapter_is_saved_with_its_norms(bert, tokens, tmp_path):
    model = changed(get_peft_model(bert(), PSTConfig())).eval()
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(bert(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(again(tokens).logits, expected)
        assert not any(parameter.requires_grad for parameter in changes(again).values())
    trainable = PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True)
    assert all(parameter.requires_grad for parameter in changes(trainable).values())


def test_a_teacher_without_the_adapter_has_its_own_norms(bert, tokens):
    base = bert().eval()
    model = changed(get_peft_model(copy.deepcopy(base), PSTConfig())).eval()
    assert not torch.equal(model(tokens).logits, base(tokens).logits)
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, base(tokens).logits)


def test_merging_gives_a_plain_model_and_unmerging_the_old_one(bert, tokens):
    base = bert().eval()
    model = changed(get_peft_model(copy.deepcopy(base), PSTConfig())).eval()
    expected = model(tokens).logits
    model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(model(tokens).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, base(tokens).logits)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=0, atol=1e-6)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert not any(isinstance(module, Norm) for module in merged.modules())


def test_a_safe_merge_refuses_a_broken_norm(bert):
    model = get_peft_model(bert(), PSTConfig())
    next(iter(changes(model).values())).data[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected .* default seems to be broken"):
        model.merge_and_unload(safe_merge=True)


def test_adapters_have_norms_of_their_own(bert, tokens):
    base = bert().eval()
    model = changed(get_peft_model(copy.deepcopy(base), PSTConfig())).eval()
    expected = model(tokens).logits
    model.add_adapter("other", PSTConfig())
    model.add_adapter("none", PSTConfig(norms=False))
    assert not any(p.requires_grad for name, p in changes(model).items() if name.endswith(".other"))
    for name in ("other", "none"):
        model.set_adapter(name)
        assert {n.rpartition(".")[2] for n, p in changes(model).items() if p.requires_grad} == {name} - {"none"}
        torch.testing.assert_close(model(tokens).logits, base(tokens).logits, rtol=0, atol=1e-6)
    model.set_adapter("default")
    assert torch.equal(model(tokens).logits, expected)
    model.delete_adapter("other")
    assert not any(name.endswith(".other") for name in changes(model))


def test_small_steps_count_under_a_bf16_model(bert, tokens):
    model = get_peft_model(bert().bfloat16(), PSTConfig(sparsity=0.5))
    assert {parameter.dtype for parameter in changes(model).values()} == {torch.float32}
    optimizer, scheduler = create_pst_optimizer(model, head_lr=1e-4), SparsityScheduler(model, total_steps=3)
    for _ in range(3):  # steps of 1e-4 beside a scale of 1, which bf16 rounds away
        model(tokens, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    for parameter in changes(model).values():
        assert 1e-4 < parameter.abs().max() < 4e-4


def test_a_compiled_step_has_no_break_and_the_same_gradients(bert, tokens):
    model = changed(get_peft_model(bert(), PSTConfig(initial_sparsity=0.5))).eval()
    labels, gradients = torch.tensor([0, 1]), []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        forward(input_ids=tokens, labels=labels).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in changes(model).values()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
