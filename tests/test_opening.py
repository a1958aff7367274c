import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, RobertaConfig, RobertaForSequenceClassification

from peft_pst import PSTConfig, save_pretrained
from peft_pst.opening import AUTO_CLASSES, open_model

TOKENS = torch.arange(2, 16).view(2, 7)
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def roberta(num_labels):
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(num_labels=num_labels, **SIZES)).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.filterwarnings("ignore:The model's sparse weights stay compressed")
@pytest.mark.parametrize("format", ["auto", "dense"])
def test_a_model(format, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=2))
    model = get_peft_model(model, PSTConfig(initial_sparsity=0.9)).merge_and_unload().to(torch.bfloat16).eval()
    save_pretrained(model, tmp_path, format)
    opened = open_model(tmp_path)
    assert type(opened) is type(model) and opened.dtype == torch.bfloat16 and not opened.training
    assert torch.equal(logits(opened), logits(model))


def test_an_adapter_with_the_head_it_was_trained_with(tmp_path):
    roberta(2).save_pretrained(tmp_path / "base")
    base = RobertaForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    )
    model = get_peft_model(base, PSTConfig(task_type="SEQ_CLS", initial_sparsity=0.5)).eval()
    model.save_pretrained(tmp_path / "adapter")
    opened = open_model(tmp_path / "adapter")
    assert isinstance(opened, PeftModel) and logits(opened).shape == (2, 5)
    assert torch.equal(logits(opened), logits(model))
    (tmp_path / "base").rename(tmp_path / "moved")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not name its base model: give it as base"):
        open_model(tmp_path / "adapter")
    assert torch.equal(logits(open_model(tmp_path / "adapter", tmp_path / "moved")), logits(model))


@pytest.mark.parametrize("model_type", ["distilbert", "deberta", "xlnet", "bert", "gpt2"])
@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
def test_an_adapter_with_a_head_of_several_layers(task_type, model_type, tmp_path):
    sizes = {"distilbert": {"dim": 32, "hidden_dim": 48}, "xlnet": {"d_model": 32, "n_head": 2, "d_inner": 48}}
    config = AutoConfig.for_model(model_type, **{**SIZES, **sizes.get(model_type, {})})
    if model_type == "xlnet":
        config.n_layer = 1
    if model_type == "distilbert":
        config.n_layers = 1
    auto_class = AUTO_CLASSES[task_type]
    auto_class.from_config(config).save_pretrained(tmp_path / "base")
    base = auto_class.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
    get_peft_model(base, PSTConfig(task_type=task_type)).save_pretrained(tmp_path / "adapter")
    assert open_model(tmp_path / "adapter").config.num_labels == 3


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(ValueError, match="holds neither config.json nor adapter_config.json: expected the folder"):
        open_model(tmp_path)
    for architectures in (["pipeline"], ["torch"], [], ["MyOwnModel"]):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": architectures}))
        with pytest.raises(ValueError, match=r"names the architecture .*, which transformers \S+ does not have"):
            open_model(tmp_path)
