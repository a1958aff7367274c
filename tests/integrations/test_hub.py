"""Pushes to a Hub on the loopback address, with the real client."""

import json
import math
import os
import re
import subprocess
import sys
import time
import warnings

import huggingface_hub
import pytest
import torch
from hub_server import running_hub
from huggingface_hub import EvalResult, HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from peft import LoraConfig, get_peft_model
from safetensors.torch import load
from transformers import BertConfig, BertForSequenceClassification, BertModel

from peft_pst import PSTConfig, save_pretrained, tensor_sparsity
from peft_pst.integrations import model_card, push_to_hub

BASE = "tiny/base"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
RESULTS = [
    EvalResult("text-classification", "ag_news", "AG News", "accuracy", 0.75),
    EvalResult("text-classification", "ag_news", "AG News", "latency", 12.5, metric_name="latency (ms)"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny BERT without a head."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    BertModel(BertConfig(vocab_size=99, **SIZES)).save_pretrained(folder)
    return folder


def trained(base):
    """A model of three classes with a PST adapter that changes every layer."""
    torch.manual_seed(1)
    model = BertForSequenceClassification.from_pretrained(base, num_labels=3)
    config = PSTConfig(
        task_type="SEQ_CLS", r=2, mask_r=2, init_weights=False, initial_sparsity=0.9, sparsity=0.95, pattern="row"
    )
    return get_peft_model(model, config).eval()


def merged(base):
    return trained(base).merge_and_unload()


def pushing_to(hub, patch):
    """Let the client of this process talk to the Hub."""
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    # the client asks no server: if hf_xet is there, it uploads by Xet, which is no HTTP for a small server
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setenv("HF_TOKEN", "hf_loopback")
    huggingface_hub.utils.disable_progress_bars()
    close_sessions()


def close_sessions():
    """Forget the client's connections; huggingface_hub 0.x and later name it differently."""
    utils = huggingface_hub.utils
    (utils.close_session if hasattr(utils, "close_session") else utils.reset_sessions)()


@pytest.fixture
def pauses(monkeypatch):
    """What would have been slept."""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def hub(monkeypatch, pauses):
    with running_hub() as hub, monkeypatch.context() as patch:
        pushing_to(hub, patch)
        yield hub
    close_sessions()


# runs each python block of each card as it stands
OPEN = """
import re, sys, torch
from huggingface_hub import ModelCard
tokens, logits = torch.arange(14).view(2, 7), {}
for repo in sys.argv[2:]:
    logits[repo] = []
    for code in re.findall(r"```python\\n(.*?)```", ModelCard.load(repo).text, re.DOTALL):
        names = {}
        exec(code, names)
        logits[repo].append(names["model"].eval()(tokens).logits.detach())
torch.save(logits, sys.argv[1])
"""


@pytest.fixture(scope="module")
def opened(base, tmp_path_factory):
    """The Hub after three pushes, and by repo the logits of the models that its card opens, in a new process."""
    folder = tmp_path_factory.mktemp("opened")
    with running_hub() as hub, pytest.MonkeyPatch.context() as patch:
        pushing_to(hub, patch)
        hub.add_repo(BASE, files={file.name: file.read_bytes() for file in base.iterdir()})
        push_to_hub(merged(base), "me/model")
        push_to_hub(trained(base), "me/adapter", base_model=BASE)
        push_to_hub(merged(base), "me/both", adapter=trained(base), base_model=BASE, results=RESULTS)
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
        env.pop("HF_HUB_OFFLINE")
        command = [sys.executable, "-c", OPEN, folder / "logits", "me/model", "me/adapter", "me/both"]
        result = subprocess.run(command, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        yield hub, torch.load(folder / "logits")
    close_sessions()


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def test_a_model_opens_as_its_card_says(opened, base, tokens):
    hub, by_repo = opened
    assert hub.repos["me/model"].names == ["README.md", "config.json", "model.safetensors"]
    [from_hub] = by_repo["me/model"]
    assert torch.equal(from_hub, logits(merged(base), tokens))


def test_an_adapter_opens_as_its_card_says(opened, base, tokens):
    hub, by_repo = opened
    repo = hub.repos["me/adapter"]
    assert repo.names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert json.loads(repo.head.files["adapter_config.json"])["base_model_name_or_path"] == BASE
    [from_hub] = by_repo["me/adapter"]
    assert torch.equal(from_hub, logits(trained(base), tokens))


def test_a_model_and_its_adapter_open_from_one_repo(opened, base, tokens):
    hub, by_repo = opened
    assert hub.repos["me/both"].names == [
        "README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "config.json",
        "model.safetensors",
    ]
    model, adapted = by_repo["me/both"]
    assert torch.equal(model, logits(merged(base), tokens))
    assert torch.equal(adapted, logits(trained(base), tokens))


def card_of(hub, repo_id):
    return ModelCard(hub.repos[repo_id].head.files["README.md"].decode())


def test_the_card_says_what_the_hub_reads(opened):
    hub, _ = opened
    data = card_of(hub, "me/both").data
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("transformers", BASE, "text-classification")
    assert data.tags == ["peft", "pst", "sparse"]
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("accuracy", 0.75), ("latency", 12.5)]
    assert card_of(hub, "me/adapter").data.library_name == "peft"
    data = card_of(hub, "me/model").data
    assert data.base_model is None and data.eval_results is None


@pytest.mark.parametrize(("repo_id", "count"), [("me/model", 1), ("me/adapter", 1), ("me/both", 2)])
def test_each_way_to_open_imports_us(opened, repo_id, count):
    hub, _ = opened
    blocks = re.findall(r"```python\n(.*?)```", card_of(hub, repo_id).text, re.DOTALL)
    assert len(blocks) == count
    assert all(block.startswith("import peft_pst") for block in blocks)


def test_the_base_model_is_one_on_the_hub(base, tmp_path, monkeypatch):
    model = merged(base)
    save_pretrained(model, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    for name, expected in (("google-bert/bert", "google-bert/bert"), ("mine", None), (str(base), None), ("", None)):
        model.name_or_path = name
        assert model_card(model, "mine", "me/model").data.base_model == expected


def tables(card):
    """By their first cell, the other cells of each row of each table."""
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*\|$", card.text, re.MULTILINE)
    ]
    return {cells[0]: cells[1:] for cells in rows}


def test_the_card_says_what_is_there(opened, base):
    hub, _ = opened
    model, rows = merged(base), tables(card_of(hub, "me/both"))
    queries = [row for row in tensor_sparsity(model) if row.name.endswith("attention.self.query")]
    numel, zeros = sum(row.numel for row in queries), sum(row.zeros for row in queries)
    assert len(queries) == 2 and zeros > 0.8 * numel
    assert rows["`attention.self.query`"] == [f"{numel:,}", f"{zeros:,}", f"{zeros / numel:.2%}"]
    numel = model.num_parameters()
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert rows["the whole model"] == [f"{numel:,}", f"{zeros:,}", f"{zeros / numel:.2%}"]
    files = hub.repos["me/both"].head.files
    assert rows["model"] == [f"{len(files['model.safetensors']) / 1e6:.2f}"]
    assert rows["adapter"] == [f"{len(files['adapter/adapter_model.safetensors']) / 1e6:.2f}"]
    assert rows["model, stored dense in float32"] == [f"{4 * numel / 1e6:.2f}"]
    assert (rows["pattern"], rows["sparsity"]) == (["`row`"], ["`0.95`"])
    assert ["AG News", "latency (ms)", "12.5"] in [rows["text-classification"]]
    assert "2205.11005" in card_of(hub, "me/both").text


def test_an_adapter_s_card_counts_the_same(opened):
    hub, _ = opened
    of_adapter, of_model = tables(card_of(hub, "me/adapter")), tables(card_of(hub, "me/model"))
    assert of_adapter["`attention.self.query`"] == of_model["`attention.self.query`"]
    assert of_adapter["the whole model"] == of_model["the whole model"]


def test_a_card_of_an_opened_checkpoint_counts_the_same(base, tmp_path):
    model = merged(base)
    save_pretrained(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = type(model).from_pretrained(tmp_path)
    assert tables(model_card(again, tmp_path, "me/model")) == tables(model_card(model, tmp_path, "me/model"))


def test_a_new_repo_is_private(hub, base, tmp_path):
    save_pretrained(merged(base), tmp_path)
    commit = push_to_hub(tmp_path, "me/new")
    assert hub.repos["me/new"].private
    assert commit == f"{hub.url}/me/new/commit/{hub.repos['me/new'].head.oid}"
    hub.add_repo("me/public")
    push_to_hub(tmp_path, "me/public")
    assert not hub.repos["me/public"].private
    push_to_hub(tmp_path, "me/open", private=False)
    assert not hub.repos["me/open"].private


def test_one_commit_leaves_nothing_of_the_old_version(hub, base, tmp_path):
    save_pretrained(merged(base), tmp_path / "old", max_shard_size=40_000)
    trained(base).save_pretrained(tmp_path / "adapter")
    for name in ("pytorch_model.bin", "notes.txt", "onnx/model.safetensors"):
        (tmp_path / "old" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "old" / name).write_text(name)
    push_to_hub(tmp_path / "old", "me/model", adapter=tmp_path / "adapter", base_model=BASE)
    repo = hub.repos["me/model"]
    assert {"model-00001-of-00003.safetensors", "model.safetensors.index.json", "pytorch_model.bin"} < set(repo.names)
    assert "adapter/adapter_config.json" in repo.names
    push_to_hub(merged(base), "me/model", commit_message="smaller")
    assert [commit.title for commit in repo.commits[2:]] == ["smaller"]
    assert set(repo.names) - {"adapter/README.md"} == {
        "README.md", "config.json", "model.safetensors", "notes.txt", "onnx/model.safetensors",
    }  # fmt: skip


def test_a_model_takes_the_place_of_an_adapter_at_the_root(hub, base):
    push_to_hub(trained(base), "me/model", base_model=BASE)
    push_to_hub(merged(base), "me/model")
    assert hub.repos["me/model"].names == ["README.md", "config.json", "model.safetensors"]
    push_to_hub(trained(base), "me/model", base_model=BASE)
    assert hub.repos["me/model"].names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_an_upload_that_breaks_off_is_tried_again(hub, base, pauses, caplog):
    # the client itself gives up after six
    hub.cuts, hub.cut_after = 7, 10_000
    push_to_hub(merged(base), "me/model")
    repo = hub.repos["me/model"]
    assert len(repo.commits) == 2
    assert load(repo.head.files["model.safetensors"])
    assert list(hub.uploads.values()) == [1]
    assert "The push to me/model broke off, and is tried again in 2 s: Error while uploading" in caplog.text
    assert 2 in pauses


@pytest.mark.parametrize("accident", ["cut", "answer lost", "busy", "overtaken"])
def test_a_commit_is_made_once_whatever_happens(hub, base, accident, tmp_path):
    save_pretrained(merged(base), tmp_path, max_shard_size=40_000)
    push_to_hub(tmp_path, "me/model")
    hub.accidents = [accident]
    commit = push_to_hub(merged(base), "me/model", commit_message="mine")
    repo = hub.repos["me/model"]
    assert [commit.title for commit in repo.commits].count("mine") == 1
    assert commit.oid == repo.head.oid
    assert repo.names == ["README.md", "config.json", "model.safetensors"]


def test_a_push_that_fails_changes_nothing_and_goes_on_where_it_stopped(hub, base, pauses):
    hub.add_repo("me/model", files={"model.safetensors": b"old", "README.md": b"old"})
    before = hub.repos["me/model"].head
    model, adapter = merged(base), trained(base)
    hub.cuts, hub.cut_after = math.inf, 50_000
    with pytest.raises(
        ConnectionError, match=r"me/model broke off in each of 4 attempts. The repo is unchanged.*again"
    ):
        push_to_hub(model, "me/model", adapter=adapter, base_model=BASE)
    assert pauses.count(30) == 1
    assert hub.repos["me/model"].head is before
    [small] = hub.uploads
    hub.cuts = 0
    push_to_hub(model, "me/model", adapter=adapter, base_model=BASE)
    assert sorted(hub.uploads.values()) == [1, 1]
    files = hub.repos["me/model"].head.files
    assert hub.blobs[small] == files["adapter/adapter_model.safetensors"]
    assert load(files["model.safetensors"])


def test_what_the_hub_refuses_is_not_tried_again(hub, base, pauses, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HfHubHTTPError, match="401"):
        push_to_hub(merged(base), "me/model")
    assert pauses == []
    push_to_hub(merged(base), "me/model", token="hf_given")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token=False).model_info("me/model")


def test_offline_is_said_at_once(hub, base, pauses, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_sessions()
    with pytest.raises(OfflineModeIsEnabled):
        push_to_hub(merged(base), "me/model")
    assert pauses == []


def test_a_folder_s_own_card_is_used(hub, base, tmp_path):
    save_pretrained(merged(base), tmp_path)
    push_to_hub(tmp_path, "me/model", base_model=BASE)
    made = card_of(hub, "me/model")
    assert made.data.base_model == BASE and "```python\nimport peft_pst" in made.text
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "lock").write_text("")
    push_to_hub(tmp_path, "me/model")
    assert hub.repos["me/model"].head.files["README.md"] == b"mine"
    assert ".cache/lock" not in hub.repos["me/model"].names


def test_a_dense_checkpoint_s_card_has_no_need_of_us(base, tmp_path):
    save_pretrained(merged(base), tmp_path, format="dense")
    assert "import peft_pst" not in model_card(merged(base), tmp_path, "me/model").text


def test_an_adapter_of_another_name_is_at_the_root_too(hub, base):
    model = trained(base)
    model.add_adapter("second", PSTConfig(task_type="SEQ_CLS"))
    model.set_adapter("second")
    push_to_hub(model, "me/adapter", base_model=BASE)
    assert hub.repos["me/adapter"].names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_a_tokenizer_goes_along(hub, base, local_hub):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(local_hub / "google-bert" / "bert-base-uncased")
    push_to_hub(merged(base), "me/model", tokenizer=tokenizer)
    assert {"tokenizer.json", "tokenizer_config.json"} < set(hub.repos["me/model"].names)


def test_what_cannot_be_pushed(hub, base, bert, tmp_path):
    with pytest.raises(ValueError, match="repo_id='model' has no owner: expected 'owner/name'"):
        push_to_hub(merged(base), "model")
    with pytest.raises(ValueError, match="holds neither config.json nor adapter_config.json"):
        push_to_hub(tmp_path, "me/model")
    with pytest.raises(ValueError, match="model is an adapter already"):
        push_to_hub(trained(base), "me/model", adapter=trained(base), base_model=BASE)
    with pytest.raises(ValueError, match="is of type .*LORA: expected one of type PST"):
        push_to_hub(get_peft_model(bert(), LoraConfig(target_modules=["query"])), "me/model")
    with pytest.raises(ValueError, match="no name on the Hub, .* give base_model='owner/name'"):
        push_to_hub(trained(base), "me/model")
    trained(base).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no card, .* give the PeftModel instead"):
        push_to_hub(tmp_path, "me/model")
    with pytest.raises(TypeError, match="model_card got a Linear: expected a model of transformers"):
        model_card(torch.nn.Linear(2, 2), tmp_path, "me/model")
    assert "me/model" not in hub.repos
