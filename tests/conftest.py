import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def bert():
    """A function that makes a tiny BERT classifier with random weights, the same for the same seed."""
    from transformers import BertConfig, BertForSequenceClassification

    def make(seed=0, **kwargs):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        return BertForSequenceClassification(BertConfig(vocab_size=99, **{**sizes, **kwargs}))

    return make


@pytest.fixture
def tokens():
    return torch.arange(2 * 7).view(2, 7) % 99
