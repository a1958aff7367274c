"""The loops that people use, each example in a process of its own, on a small model and real text."""

import importlib.util
import inspect
import json
import os
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

from peft_pst.boost import Boosted

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# runs a script, and kills it after a step, as the power would; figures need matplotlib, which may lack
RUNNER = """
import os, runpy, signal, sys
import peft_pst

at, script, *arguments = sys.argv[1:]
set_step = peft_pst.SparsityScheduler.set_step

def set_step_and_die(self, step):
    set_step(self, step)
    if step == int(at):
        os.kill(os.getpid(), signal.SIGKILL)

peft_pst.SparsityScheduler.set_step = set_step_and_die
try:
    import matplotlib
except ImportError:
    peft_pst.plot_sparsity = lambda *arguments: None
sys.argv = [script, *arguments]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""
# a process that knows plain transformers only: of each weight in the blocks of each model, the zeros and the entries
COUNT_ZEROS = """
import json, sys
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

found = []
for folder in sys.argv[1:]:
    language = "CausalLM" in open(f"{folder}/config.json").read()
    model = (AutoModelForCausalLM if language else AutoModelForSequenceClassification).from_pretrained(folder)
    weights = [p for name, p in model.named_parameters() if p.ndim == 2 and "layer" in name]
    found.append([[int((p == 0).sum()), p.numel()] for p in weights])
print(json.dumps(found))
"""


def texts() -> list[tuple[str, str]]:
    """Pieces of 20 words of a licence and of Python's manual, and which of the two."""
    manual = " ".join(inspect.getdoc(f) for f in vars(statistics).values() if inspect.isfunction(f) and f.__doc__)
    pieces = []
    for label, text in (("licence", (ROOT / "LICENSE").read_text()), ("manual", manual)):
        words = text.split()
        pieces += [(" ".join(words[i : i + 20]), label) for i in range(0, 20 * 60, 20)]
    random.Random(0).shuffle(pieces)
    return pieces


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tokenizer made from the texts, a tiny BERT (`bert`), a tiny Llama (`llama`), and the texts
    (`data`)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    folder, pieces = tmp_path_factory.mktemp("loops"), texts()
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<pad>", "<unk>", "</s>"]
    tokenizer.train_from_iterator(
        (text for text, _ in pieces), trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    # without dropout, so that batches may be cut in another way; wide, so that random features are worth something
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    bert = BertForSequenceClassification(BertConfig(**sizes, **plain, intermediate_size=64))
    llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64, eos_token_id=2, pad_token_id=0))
    for name, model in (("bert", bert), ("llama", llama)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "data").mkdir()
    for split, part in (("train", pieces[24:]), ("test", pieces[:24])):
        rows = (json.dumps({"text": text, "label": label}) for text, label in part)
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def start(world: Path, script: str, *arguments: object, die_at: int = -1, launch: tuple = (), **environment: str):
    """Start an example; `die_at` is the optimizer step after which it is killed."""
    (world / "runner.py").write_text(RUNNER)
    command = [*(launch or (sys.executable,)), "runner.py", die_at, EXAMPLES / script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(world / "cache"), **environment}
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=world,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-3000:]
    return out, err


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same(one: Path, other: Path, **tolerance: float) -> None:
    a, b = adapter(one), adapter(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance if a[name].is_floating_point() else {}), msg=name)


@pytest.fixture(scope="module")
def classified(world):
    """The folder of a classifier that the plain Trainer trained, with its output."""
    sizes = ("--epochs", 9, "--batch-size", 4, "--max-length", 48, "--sparsity", 0.6, "--head-lr", 5e-3)
    out, _ = finish(
        start(world, "text_classification.py", "--model", "bert", "--dataset", "data", *sizes, "--output", "trainer")
    )
    return world / "trainer", out


def test_the_plain_trainer(classified):
    folder, out = classified
    loss = [float(value) for value in re.findall(r"'loss': '?([\d.]+)", out)]
    dense, pst = loss[: len(loss) // 2], loss[len(loss) // 2 :]
    assert len(pst) == 4 and pst[-1] < 0.9 * pst[0] and dense[-1] < dense[0]
    results = json.loads((folder / "results.json").read_text())
    assert results["reloaded"]["accuracy"] == results["pst"]["accuracy"] > 0.5
    assert results["reloaded"]["targets"] == pytest.approx(0.6, abs=1e-3)


# TRL


SFT = ("--model", "llama", "--dataset", "data", "--max-length", 48, "--sparsity", 0.6, "--max-steps", 24)


@pytest.fixture(scope="module")
def tuned(world):
    """The folder of a language model that SFTTrainer trained, beside one that was killed and went on, and one that
    had a teacher."""
    pytest.importorskip("trl")
    sft = (*SFT, "--save-steps", 8, "--accumulation", 2, "--lr", 5e-4)
    processes = [
        start(world, "sft.py", *sft, "--output", "tuned"),
        start(world, "sft.py", *sft, "--output", "stopped", die_at=11),
    ]
    finish(processes[0])
    finish(processes[1], code=-9)
    assert not (world / "stopped" / "adapter").exists()
    processes = [
        # it would be killed again if it began anew
        start(world, "sft.py", *sft, "--output", "stopped", "--resume", die_at=5),
        start(world, "sft.py", *sft, "--output", "taught", "--distill", 20),
    ]
    for process in processes:
        finish(process)
    return world / "tuned"


def losses(folder: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in json.loads((folder / "results.json").read_text())["log"] if name in row]


def test_sft_trains_and_prunes(tuned):
    loss = losses(tuned)
    assert loss[-1] < loss[0]
    results = json.loads((tuned / "results.json").read_text())
    assert results["after"] < results["before"]
    assert (tuned / "small" / "model.safetensors").stat().st_size < (
        tuned / "merged" / "model.safetensors"
    ).stat().st_size


def test_sft_measures_the_saved_model_in_another_process(tuned):
    out, _ = finish(start(tuned.parent, "sft.py", *SFT, "--output", "tuned", "--evaluate", "tuned/small"))
    found = json.loads(out.splitlines()[-1])
    assert found["targets"] == pytest.approx(0.6, abs=1e-3)
    assert found["perplexity"] == pytest.approx(json.loads((tuned / "results.json").read_text())["after"], rel=1e-3)


def test_sft_goes_on_where_it_was_killed(tuned):
    assert_same(tuned, tuned.parent / "stopped", rtol=0, atol=0)


def test_sft_learns_from_a_teacher(tuned):
    """The dense model's predictions pull on the factors, so that its loss is lower than without it."""
    taught = tuned.parent / "taught"
    divergence = losses(taught, "logits_loss")
    assert len(divergence) > 1 and min(divergence) > 0
    assert not torch.equal(*(torch.cat([t.flatten() for n, t in adapter(f).items() if "pst_V" in n]) for f in
                             (tuned, taught)))  # fmt: skip


# AST


def test_ast_makes_a_two_of_four_model(world, monkeypatch):
    (world / "books").mkdir()
    for i, (text, _) in enumerate(texts()):
        (world / "books" / f"{i}.txt").write_text(text)
    sizes = ("--max-steps", 60, "--batch-size", 4, "--length", 16, "--lr", 1e-2)
    finish(start(world, "ast_causal_lm.py", "--model", "llama", "--texts", "books", "--output", "ast", *sizes))
    results = json.loads((world / "ast" / "results.json").read_text())
    assert results["after"] < 0.97 * results["one_shot"]  # its teacher knows nothing
    log = [row for row in results["log"] if "loss" in row]
    assert {"flip_rate", "first_flip_rate", "logits_loss", "task_loss"} <= log[-1].keys()
    assert log[-1]["first_flip_rate"] > 0 and {row["sparsity"] for row in log} == {0.5}
    assert "50.00%" in (world / "ast" / "results.md").read_text()
    assert (world / "ast" / "flips.png").exists() == (importlib.util.find_spec("matplotlib") is not None)

    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("ast_causal_lm")
    model, tokenizer = example.load_model(str(world / "ast" / "small"))
    weights = [module.linear.weight for module in model.modules() if isinstance(module, Boosted)]
    assert len(weights) == 14
    for weight in weights:
        assert ((weight != 0).view(-1, 4).sum(1) <= 2).all()
    data = example.blocks(example.load_texts(world / "books")[-60:], tokenizer, 16)
    assert example.perplexity(model, data) == pytest.approx(results["after"], rel=1e-2)


# a loop of one's own


LOOP = ("--model", "bert", "--dataset", "data", "--sparsity", 0.6, "--lr", 3e-4, "--epochs", 6, "--max-length", 48)


@pytest.fixture(scope="module")
def looped(world):
    """The folder of a classifier that was trained in batches of 8. Beside it one in twice 4, that was killed within an
    epoch, between two checkpoints, and went on; one in mixed precision; and one on two processes with 4 each."""

    def loop(output: str, batch: int, accumulation: int = 1, **kwargs):
        sizes = ("--batch-size", batch, "--accumulation", accumulation, "--save-steps", 10)
        return start(world, "accelerate_loop.py", *LOOP, *sizes, "--output", output, **kwargs)

    processes = [loop("looped", 8), loop("accumulated", 4, 2, die_at=37)]
    (world / "looped.log").write_text("".join(finish(processes[0])))
    finish(processes[1], code=-9)
    kept = [path.name for path in (world / "accumulated" / "checkpoints").glob("step_*")]
    assert kept == ["step_00000030"]
    processes = [loop("accumulated", 4, 2), loop("mixed", 8, ACCELERATE_MIXED_PRECISION="bf16")]
    (world / "accumulated.log").write_text("".join(finish(processes[0])))
    finish(processes[1])
    config = ("--config_file", EXAMPLES / "accelerate" / "ddp.yaml", "--mixed_precision", "no")
    launch = (sys.executable, Path(sys.executable).with_name("accelerate"), "launch", *config)
    launch = (*launch, "--main_process_port", 0)
    (world / "two.log").write_text("".join(finish(loop("two", 4, launch=launch, ACCELERATE_USE_CPU="true"))))
    return world / "looped"


def test_the_loop_learns(looped):
    log = looped.with_name("looped.log").read_text()
    loss = [float(value) for value in re.findall(r"loss=([\d.]+)", log)]
    assert len(loss) > 60 and sum(loss[-12:]) < 0.9 * sum(loss[:12])
    assert "60.0" in log and "accuracy on held-out texts" in log
    assert not (looped / "checkpoints").exists()


def test_the_loop_accumulates_gradients_and_goes_on_where_it_was_killed(looped):
    """Twice 4 texts a step, stopped in between, end where 8 texts a step do."""
    assert ", 30 of them done" in looped.with_name("accumulated.log").read_text()
    assert_same(looped, looped.with_name("accumulated"), rtol=0, atol=2e-5)


def test_the_loop_on_two_processes_is_that_on_one(looped):
    """Two processes with 4 texts each end where one with 8 does, and write the model once."""
    assert looped.with_name("two.log").read_text().count("accuracy on held-out texts") == 1
    assert_same(looped, looped.with_name("two"), rtol=0, atol=2e-5)


def test_the_loop_in_mixed_precision(looped):
    """The products run in bf16; the factors stay float32."""
    mixed, reference = adapter(looped.with_name("mixed")), adapter(looped)
    assert {t.dtype for t in mixed.values() if t.is_floating_point()} == {torch.float32}
    assert any(not torch.equal(mixed[name], reference[name]) for name in mixed)
    assert_same(looped, looped.with_name("mixed"), rtol=0, atol=2e-2)


def test_the_merged_models_open_in_another_process_with_the_zeros_asked_for(request, classified, looped):
    folders = [classified[0], *(looped.with_name(name) for name in ("looped", "accumulated", "mixed", "two"))]
    if importlib.util.find_spec("trl"):
        tuned = request.getfixturevalue("tuned")
        folders += [tuned, tuned.with_name("stopped"), tuned.with_name("taught")]
    command = [sys.executable, "-c", COUNT_ZEROS, *(folder / "merged" for folder in folders)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    for folder, found in zip(folders, json.loads(result.stdout.splitlines()[-1]), strict=True):
        assert len(found) >= 12 and all(zeros == int(0.6 * numel) for zeros, numel in found), folder.name


# accelerate's config files


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_knows_every_setting_of_the_config_files(name):
    config = load_config_from_file(str(EXAMPLES / "accelerate" / f"{name}.yaml"))
    known = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == known[name] and config.num_processes == 2
    settings = vars(launch_command_parser().parse_args(["script.py"]))
    assert not {*config.fsdp_config, *config.deepspeed_config} - {*settings}
    page = (EXAMPLES / "accelerate" / "README.md").read_text()
    assert f"accelerate launch --config_file examples/accelerate/{name}.yaml" in page
