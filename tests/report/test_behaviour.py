import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from peft_pst.report.behaviour import fidelity, logits, misspelt, robustness, without_words

TEXTS = [" ".join(f"word{(7 * i + j) % 90}" for j in range(3 + i % 5)) for i in range(40)]


@pytest.fixture
def tokenizer(local_hub):
    return AutoTokenizer.from_pretrained(local_hub / "google-bert" / "bert-base-uncased")


def gpt2(seed):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2)).eval()


def by_formula(model, dense, tokenizer, texts):
    """Text by text, without padding, in float64."""
    found = [[], []]
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt")
        for m, own in zip((model, dense), found, strict=True):
            with torch.no_grad():
                own.append(m(**tokens).logits.double().flatten(0, -2).softmax(-1))
    ours, theirs = map(torch.cat, found)
    kl = (theirs * (theirs / ours).log()).sum(-1).mean()
    return len(ours), float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()), float(kl)


@pytest.mark.parametrize("kind", ["classifier", "language model"])
def test_fidelity(kind, bert, tokenizer):
    model, dense = (bert(0), bert(1)) if kind == "classifier" else (gpt2(0), gpt2(1))
    for m in (model.eval(), dense.eval()):
        with torch.no_grad():
            for p in m.parameters():
                p.mul_(5)  # so that they disagree
    predictions, agreement, kl = by_formula(model, dense, tokenizer, TEXTS)
    found = fidelity(model.train(), dense.train(), tokenizer, TEXTS)  # dropout plays no part
    assert found.predictions == predictions and 0 < agreement < 1
    assert found.agreement == agreement and found.kl == pytest.approx(kl, rel=1e-4)
    same = fidelity(model, model, tokenizer, TEXTS)
    assert same.agreement == 1 and same.kl == 0


def test_without_a_padding_token(tokenizer):
    model = gpt2(0)
    expected = torch.cat(list(logits(model, tokenizer, TEXTS)))
    tokenizer.pad_token = None
    torch.testing.assert_close(torch.cat(list(logits(model, tokenizer, TEXTS))), expected)


def test_another_task_is_named(bert, tokenizer):
    with pytest.raises(ValueError, match="The model predicts 2 classes, the dense one 3: give the dense model"):
        fidelity(bert(), bert(num_labels=3), tokenizer, TEXTS)


def test_robustness(bert, tokenizer):
    model, texts = bert().train(), TEXTS * 10
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    labels = torch.cat(list(logits(model, tokenizer, texts))).argmax(-1).tolist()
    found = robustness(model, tokenizer, texts, labels)
    assert found.clean == 1 and found == robustness(model, tokenizer, texts, labels)
    assert 0.8 < found.typos < 1 and 0.8 < found.dropped_words < 1
    wrong = robustness(model, tokenizer, texts, [1 - label for label in labels])
    assert wrong.clean == 0 and wrong.typos == pytest.approx(1 - found.typos)
    assert [module.training for module in model.modules()] == modes


def test_labels_need_a_classifier(tokenizer):
    with pytest.raises(ValueError, match="predictions for 40 texts: labels need a model that classifies texts"):
        robustness(gpt2(0), tokenizer, TEXTS, [0] * len(TEXTS))


def test_damage():
    text = " ".join(f"word{i}" for i in range(2000))
    words, typos = text.split(), misspelt(text, random.Random(0)).split()
    changed = [(a, b) for a, b in zip(words, typos, strict=True) if a != b]
    assert 150 < len(changed) < 250
    assert all(abs(len(a) - len(b)) <= 1 for a, b in changed)
    assert any(sorted(a) == sorted(b) for a, b in changed) and {len(b) - len(a) for a, b in changed} == {-1, 0, 1}
    left = without_words(text, random.Random(0)).split()
    assert 1750 < len(left) < 1850 and set(left) < set(words)
    assert misspelt(text, random.Random(0)) == misspelt(text, random.Random(0))
