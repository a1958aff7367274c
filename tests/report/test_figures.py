import pytest
import torch
from peft import get_peft_model
from reference import plain_importance
from transformers import T5Config, T5ForConditionalGeneration

from peft_pst import PSTConfig, plot_depth, plot_flips, plot_masks, plot_scores, plot_sparsity, tensor_sparsity

pytest.importorskip("matplotlib", reason="figures need the extra peft-pst[plot]")


def test_sparsity(tmp_path, bert):
    model = get_peft_model(bert(), PSTConfig(initial_sparsity=0.5))
    path = tmp_path / "new" / "sparsity.png"
    axes = plot_sparsity(tensor_sparsity(model), path).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [50] * 12
    assert path.read_bytes().startswith(b"\x89PNG") and [p.name for p in path.parent.iterdir()] == ["sparsity.png"]


def test_depth(tmp_path, bert):
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[:, :24] = 0
    axes = plot_depth(tensor_sparsity(model), tmp_path / "depth.svg").axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert len(lines) == 6 and lines["output.dense"] == [0, 50] and lines["attention.self.key"] == [0, 0]
    assert "<svg" in (tmp_path / "depth.svg").read_text()


def test_depth_is_that_of_the_blocks(tmp_path):
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, num_decoder_layers=3)
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        model.decoder.block[2].layer[1].EncDecAttention.q.weight[:16] = 0
    rows = [row for row in tensor_sparsity(model) if "decoder.block.0." not in row.name]
    lines = plot_depth(rows, tmp_path / "depth.png").axes[0].get_lines()
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}
    assert lines["encoder.block: SelfAttention.q"] == ([0, 1], [0, 0])
    assert lines["decoder.block: SelfAttention.q"] == ([1, 2], [0, 0])
    assert lines["decoder.block: EncDecAttention.q"] == ([1, 2], [0, 50])


def test_masks(tmp_path, bert):
    model = bert(intermediate_size=256)
    name = "bert.encoder.layer.1.intermediate.dense"
    with torch.no_grad():
        weight = model.get_submodule(name).weight
        weight[:64], weight[:, 3] = 0, 0
    figure = plot_masks(model, tmp_path / "masks.png", [name])
    above, _, picture, beside = figure.axes
    image = picture.get_images()[0].get_array()
    assert image.shape == (128, 32)  # two rows of the weight a point
    assert (image[:32] == 0).all() and (image[:, 3] == 0).all() and image.sum() == 96 * 31
    assert list(beside.get_lines()[0].get_xdata()) == [0] * 64 + [31 / 32] * 192
    assert above.get_lines()[0].get_ydata()[3] == 0 and above.get_lines()[0].get_ydata()[4] == 0.75
    assert len(plot_masks(model, tmp_path / "masks.png").axes) == 4 * 6


def test_scores(tmp_path, bert):
    model = get_peft_model(bert(), PSTConfig(alpha1=0.5, alpha2=2.0, init_weights=False))
    axes = plot_scores(model, tmp_path / "scores.png").axes[0]
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    U, V, A, B, R, C = (getattr(layer, f"pst_{name}")["default"] for name in "UVABRC")
    updated, _ = plain_importance(layer.base_layer.weight, U, V, A, B, R, C)
    expected = (updated.abs(), 0.5 * A @ B, 2 * (R[:, None] + C[None]))
    drawn = [line.get_ydata()[0] for line in axes.get_lines()]
    torch.testing.assert_close(torch.tensor(drawn), torch.stack([part.std() for part in expected]).double().detach())
    with pytest.raises(ValueError, match="No layer has an active adapter with importance='pst'"):
        plot_scores(model.merge_and_unload(), tmp_path / "scores.png")


def test_flips(tmp_path):
    history = [
        {"step": 10, "loss": 2.0, "sparsity": 0.5, "flip_rate": 0.0, "first_flip_rate": 0.0},
        {"step": 10, "eval_loss": 2.0},
        {"step": 20, "loss": 1.5, "sparsity": 0.5, "flip_rate": 0.125, "first_flip_rate": 0.25},
        {"step": 20, "train_runtime": 3.0},
    ]
    axes = plot_flips(history, tmp_path / "flips.png").axes[0]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert lines == {"at the last selection": ([10, 20], [0, 12.5]), "since the first mask": ([10, 20], [0, 25])}
    assert axes.get_xlabel() == "optimizer step" and "%" in axes.get_ylabel() and axes.get_legend()
    assert (tmp_path / "flips.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"no flip rates: .* as with PSTConfig.ast\(\). Train with PSTTrainer"):
        plot_flips(history[1::2], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
