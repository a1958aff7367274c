import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "text_classification.py"


def test_text_classification(local_hub):
    pytest.importorskip("matplotlib", reason="the example draws a figure, which needs peft-pst[plot]")
    command = [sys.executable, SCRIPT, "--model", "google-bert/bert-base-uncased", "--dataset", "fancyzhx/ag_news"]
    command += ["--output", "out", "--epochs", "3", "--sparsity", "0.8"]
    result = subprocess.run(command, cwd=local_hub, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    out = local_hub / "out"
    results = json.loads((out / "results.json").read_text())
    assert results["reloaded"]["targets"] == pytest.approx(0.8, abs=1e-3)
    assert 0 < results["reloaded"]["model"] < 0.8
    assert results["reloaded"]["accuracy"] == results["pst"]["accuracy"] > 0.5
    assert results["pst"]["trained"] < results["dense"]["trained"] == results["dense"]["total"]
    assert (out / "results.md").read_text().strip() in result.stdout
    assert (out / "sparsity.png").stat().st_size > 1000
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in (out / "adapter").iterdir()}
    assert "it/s]" in result.stderr or "s/it]" in result.stderr


def test_methods_side_by_side(local_hub):
    pytest.importorskip("matplotlib", reason="it imports the example, which draws a figure: peft-pst[plot]")
    command = [sys.executable, ROOT / "benchmarks" / "methods.py", "--seeds", "0", "1", "--epochs", "1"]
    command += ["--model", "google-bert/bert-base-uncased", "--dataset", "fancyzhx/ag_news"]
    result = subprocess.run(command, cwd=local_hub, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines() if "|" in line]
    assert [row[0] for row in rows[2:]] == ["magnitude", "movement", "soft movement", "L0", "PST"]
    assert all(79.9 < float(row[3]) <= 80 and " ± " in row[1] for row in rows[2:])
