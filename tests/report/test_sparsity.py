import torch
from peft import get_peft_model
from torch import nn

from peft_pst import PSTConfig, save_pretrained, tensor_sparsity
from peft_pst.report import layer_type


def test_counts_what_is_pruned_merged_or_not(bert):
    model = get_peft_model(bert(), PSTConfig(initial_sparsity=0.5))
    rows = tensor_sparsity(model)
    assert len(rows) == 12 and {row.sparsity for row in rows} == {0.5}
    names = model.base_model.targeted_module_names
    model.merge_adapter()
    assert tensor_sparsity(model) == rows
    merged = model.merge_and_unload()
    assert [row._replace(name="") for row in tensor_sparsity(merged, names)] == [r._replace(name="") for r in rows]


def test_an_ordinary_model_is_counted_by_its_zeros():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[0].zero_()
    assert [(row.name, row.numel, row.zeros) for row in tensor_sparsity(model)] == [("0", 12, 4), ("2", 6, 0)]


def test_a_disabled_adapter_prunes_nothing(bert):
    model = get_peft_model(bert(), PSTConfig(initial_sparsity=0.5))
    with model.disable_adapter():
        assert {row.sparsity for row in tensor_sparsity(model)} == {0}


def test_one_that_was_opened_sparse(bert, tmp_path):
    merged = get_peft_model(bert(), PSTConfig(initial_sparsity=0.5)).merge_and_unload()
    save_pretrained(merged, tmp_path)
    opened = type(merged).from_pretrained(tmp_path)
    assert tensor_sparsity(opened) == tensor_sparsity(merged)


def test_layer_types():
    assert layer_type("bert.encoder.layer.11.attention.self.query") == "attention.self.query"
    assert layer_type("base_model.model.model.layers.0.mlp.experts.3.up_proj") == "up_proj"
    assert layer_type("bert.pooler.dense") == "bert.pooler.dense"
