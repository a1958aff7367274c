import json

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from peft_pst import PSTConfig, report, save_pretrained
from peft_pst.sparse.storage import encode


def test_a_layer(bert):
    model = bert()
    linear = model.bert.encoder.layer[0].output.dense  # [32, 48]
    with torch.no_grad():
        linear.weight[:4], linear.weight[:, 40:] = 0, 0
        linear.weight[10, 10] = 0
    found = report(model)
    layer = next(layer for layer in found.layers if layer.name.endswith("0.output.dense"))
    nonzeros = 28 * 40 - 1
    assert layer.shape == (32, 48) and layer.dead_rows == 4 and layer.dead_columns == 8
    assert layer.cost.nonzeros == nonzeros and layer.cost.sparsity == 1 - nonzeros / (32 * 48)
    assert (layer.cost.dense_flops, layer.cost.flops) == (2 * 32 * 48, 2 * nonzeros)
    assert layer.formats["bitmask"] == 32 * 48 // 8 + 4 * nonzeros == layer.cost.bytes
    assert layer.formats["tiles"] == 6 + 5 * nonzeros and layer.formats["2:4"] is None
    assert layer.formats["dense"] == layer.cost.dense_bytes == 4 * 32 * 48
    assert layer.formats["int8"] == sum(p.nbytes for p in encode(linear.weight, "int8")[1].values())


@pytest.mark.filterwarnings("ignore:The model's sparse weights stay compressed")
@pytest.mark.parametrize("values", ["exact", "bf16", "int8"])
def test_what_a_checkpoint_takes(bert, tmp_path, values):
    merged = get_peft_model(bert(hidden_size=256), PSTConfig(initial_sparsity=0.9)).merge_and_unload()
    save_pretrained(merged, tmp_path, values=values)
    found = report(type(merged).from_pretrained(tmp_path)).model.bytes
    assert found == pytest.approx((tmp_path / "model.safetensors").stat().st_size, rel=0.02)


def test_the_whole_model_is_all_its_parameters(bert):
    model = get_peft_model(bert(), PSTConfig(initial_sparsity=0.9))
    before, merged = report(model), model.merge_and_unload()
    found = report(merged)
    assert len(before.layers) == 12 and len(found.layers) == 14  # the pooler and the head are linear too
    for all_of in (before.model, found.model):
        assert all_of.parameters == sum(p.numel() for p in merged.parameters())
        assert all_of.nonzeros == sum(int(torch.count_nonzero(p)) for p in merged.parameters())
    assert before.total.parameters == 2 * (4 * 32 * 32 + 2 * 32 * 48)
    assert before.total.nonzeros == sum(layer.cost.nonzeros for layer in before.layers)
    assert [layer.formats for layer in before.layers] == [layer.formats for layer in found.layers[:12]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_those_of_the_file(dtype, bert, tmp_path):
    merged = get_peft_model(bert(), PSTConfig(initial_sparsity=0.9)).merge_and_unload()
    merged = merged.to(dtype).float()  # values that fit into fewer bytes take fewer
    save_pretrained(merged, tmp_path)
    file = (tmp_path / "model.safetensors").read_bytes()
    tensors = len(file) - 8 - int.from_bytes(file[:8], "little")
    assert report(merged).model.bytes == tensors
    opened = type(merged).from_pretrained(tmp_path)
    assert report(opened) == report(merged)


def test_tied_weights_count_once_and_conv1d_is_turned():
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[:, :5] = 0  # [in, out]: five outputs
    found = report(model)
    assert found.model.parameters == sum(p.numel() for p in model.parameters())
    layer = next(layer for layer in found.layers if layer.name.endswith("c_fc"))
    assert layer.shape == (64, 16) and (layer.dead_rows, layer.dead_columns) == (5, 0)


def test_table_and_json(bert):
    found = report(get_peft_model(bert(), PSTConfig(initial_sparsity=0.9)))
    lines = found.table().splitlines()
    assert len(lines) == 2 + 12 + 2 and "89.94%" in lines[2] and lines[-1].startswith("| whole model")
    again = json.loads(json.dumps(found.to_dict()))
    assert again["layers"][3]["cost"]["nonzeros"] == found.layers[3].cost.nonzeros
    assert again["model"]["bytes"] == found.model.bytes and again["fidelity"] is None


def test_with_data(bert, local_hub):
    tokenizer = AutoTokenizer.from_pretrained(local_hub / "google-bert" / "bert-base-uncased")
    texts = ["word1 word2 word3", "word60 word61"]
    model = bert().eval()
    found = report(model, texts=texts, labels=[0, 1], tokenizer=tokenizer, dense=bert(1))
    with torch.no_grad():
        classes = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    assert found.fidelity.predictions == 2
    assert found.robustness.clean == ((classes[0] == 0) + (classes[1] == 1)) / 2
    assert "agreement with the dense model" in found.table() and "with dropped words" in found.table()
    assert json.loads(json.dumps(found.to_dict()))["fidelity"]["kl"] == found.fidelity.kl


def test_a_broken_weight_has_no_size_as_int8(bert):
    model = bert()
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("nan")
    assert report(model).layers[-1].formats["int8"] is None and "classifier" in report(model).table()


def test_what_does_not_fit_together(bert):
    with pytest.raises(ValueError, match="Embedding has no linear layer"):
        report(torch.nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="texts is empty"):
        report(bert(), texts=[], tokenizer=object())
    with pytest.raises(ValueError, match=r"labels and dense need texts=\[...\] and tokenizer=... too"):
        report(bert(), labels=[1])
    with pytest.raises(ValueError, match="There are 1 labels, but 2 texts: expected one for each"):
        report(bert(), texts=["a", "b"], labels=[1], tokenizer=object())
