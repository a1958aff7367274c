import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_pst import PSTConfig, format_table, plot_sparsity, tensor_sparsity


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


def test_table():
    table = format_table(("a", "long header"), [("x", 1), ("yy", 22)])
    assert table.splitlines() == [
        "| a  | long header |",
        "|----|-------------|",
        "| x  | 1           |",
        "| yy | 22          |",
    ]


def test_figure(tmp_path, bert):
    pytest.importorskip("matplotlib", reason="the figure needs the extra peft-pst[plot]")
    model = get_peft_model(bert(), PSTConfig(initial_sparsity=0.5))
    path = tmp_path / "new" / "sparsity.png"
    axes = plot_sparsity(tensor_sparsity(model), path).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [50] * 12
    assert path.read_bytes().startswith(b"\x89PNG") and [p.name for p in path.parent.iterdir()] == ["sparsity.png"]
