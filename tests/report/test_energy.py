import pytest
from transformers import AutoTokenizer

from peft_pst import report
from peft_pst.report import energy


def test_energy(bert, local_hub):
    pytest.importorskip("codecarbon", reason="energy needs codecarbon")
    tokenizer = AutoTokenizer.from_pretrained(local_hub / "google-bert" / "bert-base-uncased")
    found = report(bert(), texts=["word1 word2"] * 64, tokenizer=tokenizer, country="NOR").energy
    assert found.texts == 64 and found.country == "Norway"
    assert 0 < found.watt_hours < 1 and 0 < found.grams_of_co2 < found.watt_hours
    assert "g CO2 (Norway)" in found.table()


def test_without_codecarbon(bert, monkeypatch):
    monkeypatch.setattr(energy.importlib.util, "find_spec", lambda name: None)
    assert energy.measured(bert(), None, ["word1"], "NOR") is None
