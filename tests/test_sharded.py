from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard

from peft_pst import Distillation, DistillationConfig, PSTConfig, save_pretrained, shrink


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(bert, **choices):
    """A sharded model with an adapter, and the same one whole."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = get_peft_model(bert(), PSTConfig(sparsity=0.8, initial_sparsity=0.8, init_weights=False, **choices))
        models.append(model.eval())
    for layer in models[0].base_model.model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(models[0])
    return [model.eval() for model in models]


@pytest.mark.parametrize("choices", [{}, {"pattern": "neuron"}], ids=str)
def test_a_sharded_weight_is_pruned_merged_and_put_back(one_process, bert, choices):
    model, whole = sharded(bert, **choices)
    name = "base_model.model.bert.encoder.layer.0.output.dense"
    ids = torch.arange(8).view(2, 4)
    with torch.no_grad():
        for sparsity in (0.8, 0.5):
            for each in (model, whole):
                each.base_model.set_sparsity(sparsity)
            assert torch.equal(model(ids)[0], whole(ids)[0])
        layer, expected = model.get_submodule(name), whole.get_submodule(name)
        assert torch.equal(layer.masked_weight("default"), expected.masked_weight("default"))
        dense = layer.base_layer.weight.full_tensor().clone()
        model.merge_adapter(safe_merge=True)
        whole.merge_adapter()
        assert torch.equal(layer.base_layer.weight.full_tensor(), expected.base_layer.weight)
        assert torch.equal(model(ids)[0], whole(ids)[0])
        model.unmerge_adapter()
        assert torch.equal(layer.base_layer.weight.full_tensor(), dense)


def test_evaluation_keeps_no_whole_weight_of_a_sharded_model(one_process, bert):
    model, whole = sharded(bert)
    for each, bytes_an_entry in ((model, 1 / 8), (whole, 4)):
        with torch.no_grad():
            each(torch.arange(8).view(2, 4))
            each(torch.arange(8).view(2, 4))
        layer = each.get_submodule("base_model.model.bert.encoder.layer.0.output.dense")
        assert layer._inference_weight.kept.nbytes == layer.shape.numel() * bytes_an_entry
        assert bool(layer._inference_weight.base) == (each is whole)


def test_what_takes_a_whole_model_refuses_a_sharded_one(one_process, bert, tmp_path):
    model, whole = sharded(bert)
    merged = model.merge_and_unload()
    with pytest.raises(TypeError, match="spread over processes, but shrink takes a whole model: save it with"):
        shrink(merged)
    save_pretrained(merged, tmp_path / "gathered")
    save_pretrained(whole.merge_and_unload(), tmp_path / "whole")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("gathered", "whole")]
    assert files[0] == files[1]


def test_a_launch_that_would_lose_the_buffers_is_refused(bert, monkeypatch):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    get_peft_model(bert(), PSTConfig())
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "True")
    with pytest.raises(ValueError, match="set fsdp_cpu_ram_efficient_loading: false"):
        get_peft_model(bert(), PSTConfig())


def test_a_teacher_on_shared_weights_does_not_go_with_sharded_ones(one_process, bert, tmp_path):
    get_peft_model(bert(), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = get_peft_model(bert(), PSTConfig(sparsity=0.8))
    distillation = Distillation(model, DistillationConfig(teacher=tmp_path))
    inputs = {"input_ids": torch.arange(8).view(2, 4)}
    distillation.teach(inputs)
    fully_shard(model)
    with pytest.raises(
        ValueError, match="but these are spread over processes: give the teacher as a model of its own"
    ):
        distillation.teach(inputs)


def test_a_penalty_whose_gradient_zero_3_would_not_give_is_refused(bert):
    model = get_peft_model(bert(), PSTConfig(importance="l0", update="full", pattern="neuron", penalty=1.0))
    assert model.base_model.penalty().requires_grad
    for name, parameter in model.named_parameters():
        if "pst_log_alpha" in name:
            parameter.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
    with pytest.raises(ValueError, match="charged for nothing: set penalty=0, or train with FSDP2 or ZeRO-2"):
        model.base_model.penalty()
