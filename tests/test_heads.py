"""The heads of classifiers: all that lies between the blocks and the logits trains, and merges."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from peft_pst import PSTConfig

HEADS = {
    "albert": {"albert.pooler", "classifier"},
    "bart": {"classification_head.dense", "classification_head.out_proj"},
    "bert": {"bert.pooler.dense", "classifier"},
    "deberta-v2": {"pooler.dense", "classifier"},
    "distilbert": {"pre_classifier", "classifier"},
    "electra": {"classifier.dense", "classifier.out_proj"},
    "gpt2": {"score"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "t5": {"classification_head.dense", "classification_head.out_proj"},
    "xlnet": {"sequence_summary.summary", "logits_proj"},
}
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "n_layer": 1,
    "n_layers": 1,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def classifier(model_type):
    defaults = AutoConfig.for_model(model_type).to_dict()
    config = AutoConfig.for_model(model_type, **{key: value for key, value in SIZES.items() if key in defaults})
    config.decoder_start_token_id = 0  # T5 needs it
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


def heads(model):
    """The modules that train in full."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "pst_" not in name]
    names = [name.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for name in names]
    return {name.rpartition(".")[0] for name in names}


@pytest.mark.parametrize("model_type", HEADS)
def test_the_whole_head_trains_and_merges(model_type, tmp_path):
    model = get_peft_model(classifier(model_type), PSTConfig(task_type="SEQ_CLS"))
    assert heads(model) == HEADS[model_type]
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            nn.init.normal_(parameter)
    tokens = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 11, 12, 2]])
    expected = model(tokens).logits
    assert not torch.allclose(expected, classifier(model_type)(tokens).logits)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier(model_type), tmp_path).eval()
    torch.testing.assert_close(again(tokens).logits, expected, rtol=0, atol=1e-4)  # BLAS rounds by where weights lie
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=0, atol=1e-4)
    assert merged.state_dict().keys() == classifier(model_type).state_dict().keys()


def test_the_whole_head_trains_where_the_targets_are_narrowed():
    model = get_peft_model(classifier("bert"), PSTConfig(task_type="SEQ_CLS", target_modules=["query"]))
    assert heads(model) == HEADS["bert"]


def test_an_adapter_saved_before_the_whole_head_trained_stays_as_it_is(tmp_path):
    get_peft_model(classifier("bert"), PSTConfig(task_type="SEQ_CLS", modules_to_save=["classifier"])).save_pretrained(
        tmp_path
    )
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "modules_to_save": ["classifier", "score"]}))
    model = PeftModel.from_pretrained(classifier("bert"), tmp_path, is_trainable=True)
    assert heads(model) == {"classifier"}


@pytest.mark.parametrize("choices", [{"modules_to_save": ["classifier"]}, {"task_type": "TOKEN_CLS"}])
def test_what_is_chosen_otherwise_is_left_to_peft(choices):
    model = get_peft_model(classifier("bert"), PSTConfig(**{"task_type": "SEQ_CLS", **choices}))
    assert heads(model) == {"classifier"}
