import os

# before torch is there: threads that spin while they wait would take the cores from the other workers' tests
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def environment():
    """TrainingArguments write their choices, such as a precision or a compiler, where other processes read them."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


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


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A tokenizer whose tokens are the 256 bytes and an end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture
def local_hub(tmp_path, bert):
    """A folder in which `google-bert/bert-base-uncased` and `fancyzhx/ag_news` are tiny folders of these names."""
    import random

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"word{i}" for i in range(90)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *words])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = tmp_path / "google-bert" / "bert-base-uncased"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(model)
    bert().save_pretrained(model)

    rng = random.Random(0)
    data = tmp_path / "fancyzhx" / "ag_news"
    data.mkdir(parents=True)
    for split, size in (("train", 64), ("test", 32)):
        rows = [(label, " ".join(rng.choices(words[45 * label :][:45], k=8))) for label in (0, 1) for _ in range(size)]
        (data / f"{split}.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for label, text in rows))
    return tmp_path
