import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from peft_pst import PSTConfig, save_pretrained
from peft_pst.sparse.verify import verify


@pytest.fixture
def folder(bert, tmp_path):
    merged = get_peft_model(bert(), PSTConfig(initial_sparsity=0.9)).merge_and_unload()
    for format in ("auto", "dense"):
        save_pretrained(merged, tmp_path / format, format, max_shard_size=40_000)
    return tmp_path / "auto"


def problems(found):
    return {name: what for name, what in found.items() if what}


def change(folder, key, change):
    file = next(file for file in folder.glob("*.safetensors") if key in load_file(file))
    tensors = load_file(file)
    change(tensors, key)
    save_file(tensors, file, metadata={"format": "pt"})


def flip(tensors, key):
    flat = tensors[key].view(torch.uint8).flatten()
    flat[flat.numel() // 2] ^= 1


def test_a_whole_one(folder):
    found = verify(folder)
    assert not problems(found) and found == verify(folder, folder.parent / "dense")
    assert len(found) == len(
        json.loads((folder.parent / "dense" / "model.safetensors.index.json").read_text())["weight_map"]
    )


@pytest.mark.parametrize("part", ["values", "indices"])
def test_a_damaged_part(folder, part):
    change(folder, f"bert.encoder.layer.0.output.dense.weight_{part}", flip)
    wrong = problems(verify(folder))
    assert list(wrong) == ["bert.encoder.layer.0.output.dense.weight"]
    assert f"weight_{part} is wrong" in wrong["bert.encoder.layer.0.output.dense.weight"][0]


def test_a_damaged_tensor_that_is_stored_as_it_is(folder):
    change(folder, "bert.embeddings.word_embeddings.weight", flip)
    assert list(problems(verify(folder))) == ["bert.embeddings.word_embeddings.weight"]


def test_a_missing_tensor(folder):
    for key in ("classifier.bias", "bert.encoder.layer.1.output.dense.weight_values"):
        change(folder, key, lambda tensors, key: tensors.pop(key))
    assert problems(verify(folder)) == {
        "classifier.bias": ["missing"],
        "bert.encoder.layer.1.output.dense.weight": ["values is missing"],
    }


def test_a_file_that_was_cut_short(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{file.name}' cannot be read, so it was cut short or damaged"):
        verify(folder)


def test_a_name_that_was_damaged(folder):
    key = "bert.embeddings.LayerNorm.bias"
    change(folder, key, lambda tensors, key: tensors.update({key[:-1] + "t": tensors.pop(key)}))
    assert problems(verify(folder))[key] == ["missing"]


def test_against_another(folder):
    dense = folder.parent / "dense"
    change(dense, "bert.encoder.layer.0.output.dense.weight", flip)
    change(dense, "bert.pooler.dense.bias", lambda tensors, key: tensors.update(extra=tensors[key].clone()))
    change(dense, "classifier.bias", lambda tensors, key: tensors.pop(key))
    assert problems(verify(folder, dense)) == {
        "bert.encoder.layer.0.output.dense.weight": [f"not the same as in {dense}"],
        "extra": [f"only in {dense}"],
        "classifier.bias": [f"not in {dense}"],
    }


def test_what_is_no_sparse_checkpoint(folder):
    with pytest.raises(ValueError, match=r"holds no sparse checkpoint: write one with peft_pst.save_pretrained\(\)"):
        verify(folder.parent / "dense")


def test_without_checksums(folder):
    """transformers saves what was opened in the same format, but knows nothing of them."""
    theirs = folder.parent / "theirs"
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(theirs)
    with pytest.raises(ValueError, match="holds no checksums, as transformers' own"):
        verify(theirs)
    assert not problems(verify(theirs, folder))
    key = "bert.encoder.layer.0.output.dense.weight"
    change(theirs, f"{key}_values", flip)
    assert problems(verify(theirs, folder)) == {key: [f"not the same as in {folder}"]}
