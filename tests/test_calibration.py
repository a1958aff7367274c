import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
)

from peft_pst import PSTConfig, PSTLayer, SparsityScheduler, calibrate


def wanda(bert, **kwargs):
    return get_peft_model(bert(), PSTConfig(importance="wanda", update="none", **kwargs))


def noted(model):
    layers = [m for m in model.modules() if isinstance(m, PSTLayer)]
    return [layer.pst_input_squares["default"].view(torch.float64).clone() for layer in layers]


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(99, (4, 7), generator=generator)
        mask = torch.arange(7) < torch.randint(1, 8, (4, 1), generator=generator)
        yield {"input_ids": ids, "attention_mask": mask.long()}


def test_the_norms_are_those_of_the_inputs(bert):
    model = wanda(bert)
    seen = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PSTLayer)}
    model.eval()
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0]))
    data = list(batches(3))
    calibrate(model, data)
    for name, layer in layers.items():
        inputs = [x[batch["attention_mask"].bool()] for x, batch in zip(seen[name], data, strict=True)]
        rows = torch.cat(inputs).double()
        values = layer.pst_input_squares["default"].view(torch.float64)
        torch.testing.assert_close(values[:-1], rows.square().sum(0))
        assert values[-1] == len(rows)
        weight = layer.get_base_layer().weight
        expected = weight.abs() * (rows.square().mean(0).sqrt().float())
        torch.testing.assert_close(layer.importance("default"), expected)


def test_two_halves_give_what_the_whole_gives(bert):
    whole, halves = wanda(bert), wanda(bert)
    data = list(batches(6))
    calibrate(whole, data)
    calibrate(halves, data[:3])
    calibrate(halves, data[3:])
    for a, b in zip(noted(whole), noted(halves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_nothing_is_kept_but_the_norms(bert):
    """Tensors that are alive at the n-th batch are those that were alive at the first."""
    import gc

    model, alive = wanda(bert), []

    def watched(count):
        for batch in batches(count):
            gc.collect()
            # by exact type: other tests may leave dead weak references and the fake tensors of a compiler
            found = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
            alive.append(sum(o.numel() for o in found))
            yield batch

    calibrate(model, watched(12))
    assert len(set(alive[2:])) == 1


def test_the_model_is_as_it_was(bert):
    model = wanda(bert).train()
    model.base_model.model.bert.embeddings.eval()  # as a user freezes its dropout
    modes = [module.training for module in model.modules()]
    calibrate(model, batches(1))
    layers = [m for m in model.modules() if isinstance(m, PSTLayer)]
    assert [module.training for module in model.modules()] == modes
    assert not any(layer._forward_pre_hooks for layer in layers)
    with pytest.raises((TypeError, ValueError)):
        calibrate(model, [{"no_such_argument": 1}])
    assert [module.training for module in model.modules()] == modes
    assert not any(layer._forward_pre_hooks for layer in layers)


def counted(model):
    """Of each layer of a model the tokens that it counted."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PSTLayer)}
    return {name: int(m.pst_input_squares["default"].view(torch.float64)[-1]) for name, m in layers.items()}


SIZES = {"d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 0, "vocab_size": 99}
ENCODER_DECODERS = {
    "t5": T5Config(d_ff=48, d_kv=8, num_heads=4, num_layers=2, **SIZES),
    "bart": BartConfig(
        **SIZES,
        **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 48))},
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    ),
}


@pytest.mark.parametrize("target_length", [8, 7])
@pytest.mark.parametrize("by_mask", [False, True])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_each_side_has_padding_of_its_own(name, by_mask, target_length):
    config = PSTConfig(importance="wanda", update="none", task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(AutoModelForSeq2SeqLM.from_config(ENCODER_DECODERS[name]), config)
    ids, targets = torch.arange(1, 17).view(2, 8), torch.arange(1, 2 * target_length + 1).view(2, -1)
    batch = {"input_ids": ids, "attention_mask": (torch.arange(8) < 3).expand(2, 8).long()}
    mask = (torch.arange(target_length) < 5).expand(2, -1)
    if by_mask:
        batch |= {"decoder_input_ids": targets, "decoder_attention_mask": mask.long()}
    else:
        batch["labels"] = targets.masked_fill(~mask, -100)
    calibrate(model, [batch])
    for layer, count in counted(model).items():
        of_encoder = "decoder" not in layer or layer.endswith(
            ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")
        )
        assert count == (6 if of_encoder else 10), layer


def test_tokens_of_all_rows_in_one_dimension():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 99}
    model = OPTForCausalLM(OPTConfig(word_embed_proj_dim=32, **sizes))
    model = get_peft_model(model, PSTConfig(importance="wanda", update="none"))
    calibrate(model, [next(batches(1))])
    assert set(counted(model).values()) == {int(next(batches(1))["attention_mask"].sum())}


def test_batches_may_be_tensors():
    net = get_peft_model(nn.Sequential(nn.Linear(4, 3)), PSTConfig(importance="wanda", target_modules=["0"]))
    x = torch.randn(5, 4)
    calibrate(net, torch.utils.data.DataLoader(x, batch_size=2))
    torch.testing.assert_close(noted(net)[0], torch.cat((x.double().square().sum(0), torch.tensor([5.0]))).double())


def test_pruning_waits_for_calibration(bert):
    model = wanda(bert)
    message = "importance='wanda' has seen no input of 'bert.*query' yet, .*: call peft_pst.calibrate"
    with pytest.raises(ValueError, match=message):
        model.base_model.set_sparsity(0.5)
    with pytest.raises(ValueError, match=message):
        SparsityScheduler(model, 10)  # before the first step, not when the sparsity begins to grow
    calibrate(model, batches(2))
    model.base_model.set_sparsity(0.5)
    assert model.base_model.get_sparsity() == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norms_survive_saving_and_casting(bert, tmp_path, dtype):
    model = wanda(bert)
    calibrate(model, batches(2))
    before = noted(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert(), tmp_path).to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(before, noted(again), strict=True))
    again.base_model.set_sparsity(0.5)


def test_what_it_needs(bert):
    with pytest.raises(ValueError, match="no active adapter has importance='wanda', the only one"):
        calibrate(get_peft_model(bert(), PSTConfig()), batches(1))
    model = wanda(bert)
    with pytest.raises(ValueError, match=r"calibrate\(\) got no batch: the dataloader is empty"):
        calibrate(model, [])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"The adapter is merged: call unmerge_adapter\(\) before calibrate"):
        calibrate(model, batches(1))
