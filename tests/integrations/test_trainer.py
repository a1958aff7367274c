import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_pst import PSTConfig, create_pst_optimizer
from peft_pst.integrations import PSTCallback
from peft_pst.schedule import sparsity_at

SCRIPT = Path(__file__).parent / "train_and_stop.py"


class Texts(torch.utils.data.Dataset):
    def __init__(self, size=64):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 99, (size, 7), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": int(self.ids[i].sum() % 2)}


class Recorder(TrainerCallback):
    def __init__(self):
        self.sparsity, self.logged = [], []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.sparsity.append(model.base_model.get_sparsity())

    def on_log(self, args, state, control, logs, **kwargs):
        self.logged.append(dict(logs))


def trainer(bert, tmp_path, callbacks=(), lr=1e-3, optimizer=True, **kwargs):
    model = get_peft_model(bert(), PSTConfig(task_type="SEQ_CLS"))
    settings = {
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(str(tmp_path), learning_rate=lr, **{**settings, **kwargs})
    optimizers = (create_pst_optimizer(model), None) if optimizer else (None, None)
    callbacks = [PSTCallback(), *callbacks]
    return Trainer(
        model, arguments, train_dataset=Texts(), eval_dataset=Texts(8), optimizers=optimizers, callbacks=callbacks
    )


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_sparsity_advances_once_an_optimizer_step(bert, tmp_path, accumulation):
    recorder = Recorder()
    run = trainer(bert, tmp_path, [recorder], gradient_accumulation_steps=accumulation)
    run.train()
    config = run.model.peft_config["default"]
    assert len(recorder.sparsity) == 20
    assert recorder.sparsity == pytest.approx([sparsity_at(config, step, 20) for step in range(1, 21)], abs=1e-3)
    assert recorder.sparsity[-1] == pytest.approx(0.9, abs=1e-3)


def test_the_sparsity_is_logged_beside_the_loss(bert, tmp_path):
    recorder = Recorder()
    run = trainer(bert, tmp_path, [recorder])
    run.train()
    with_loss = [logs for logs in recorder.logged if "loss" in logs]
    assert [logs["sparsity"] for logs in with_loss] == recorder.sparsity[4::5]
    assert [logs["sparsity"] for logs in run.state.log_history if "loss" in logs] == recorder.sparsity[4::5]


def test_the_progress_bar_stays_whole(bert, tmp_path, capfd):
    trainer(bert, tmp_path, disable_tqdm=False).train()
    out, err = capfd.readouterr()
    assert "20/20" in err and "'sparsity'" in out + err
    assert all(line.startswith("{") for line in out.splitlines() if line.strip())


class Metrics(TrainerCallback):
    """Makes the metric of each evaluation up: the earlier, the better, but among the last ones it is `best`."""

    def __init__(self, best):
        self.best = best

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = 0.5 if state.global_step == self.best else state.global_step


@pytest.mark.parametrize("save_strategy", ["steps", "best"])
@pytest.mark.parametrize("best", [2, 14, 16, 20])
def test_the_best_model_is_one_at_the_final_sparsity(bert, tmp_path, best, save_strategy):
    if save_strategy == "best" and transformers.__version__.startswith("4"):
        pytest.skip("the Trainer of transformers 4 never loads the best model under save_strategy='best'")
    run = trainer(
        bert,
        tmp_path,
        [Metrics(best)],
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        save_strategy=save_strategy,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
    )
    run.train()
    # the ramp ends after step 14 of 20
    expected = best if best >= 14 else 14
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{expected}")
    assert run.model.base_model.get_sparsity() == pytest.approx(0.9, abs=1e-3)
    saved = load_file(tmp_path / f"checkpoint-{expected}" / "adapter_model.safetensors")
    for name, value in run.model.state_dict().items():
        if "pst_" in name:
            assert torch.equal(value, saved[name.replace(".default", "")])


@pytest.mark.parametrize(("lr", "warns"), [(1e-3, True), (3e-4, False)])
def test_a_learning_rate_that_diverges_is_warned_of(bert, tmp_path, lr, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(bert, tmp_path, lr=lr, optimizer=False, max_steps=2).train()
    ours = [str(w.message) for w in caught if "The PST factors train with a learning rate of 0.001" in str(w.message)]
    assert bool(ours) == warns and all("create_pst_optimizer" in message for message in ours)


def test_without_an_adapter_the_callback_says_what_is_missing(bert, tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="has no layer with an active PST adapter: call get_peft_model"):
        Trainer(bert(), arguments, train_dataset=Texts(), callbacks=[PSTCallback()]).train()


def test_gradient_checkpointing_gives_the_same_gradients(bert, tokens):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = get_peft_model(base, PSTConfig(task_type="SEQ_CLS", init_weights=False, initial_sparsity=0.5)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model(input_ids=tokens, labels=torch.tensor([0, 1])).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("arguments", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_with_gradient_checkpointing_every_factor_trains(bert, tmp_path, arguments):
    """Embeddings are frozen: to reentrant checkpoints that looks as if there were nothing to train."""
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": arguments, "max_steps": 3}
    made = trainer(bert, tmp_path, **settings)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters() if "pst_" in name}
    made.train()
    after = dict(made.model.named_parameters())
    assert before and not [name for name, value in before.items() if torch.equal(after[name], value)]


def start(folder, *arguments):
    return subprocess.Popen([sys.executable, SCRIPT, folder, *arguments], stderr=subprocess.PIPE, text=True)


def finish(process):
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]


def adapter(folder):
    return load_file(Path(folder) / "final" / "adapter_model.safetensors")


# the default; masks that are kept for some steps and were not due at step 10; gates that are drawn at random
METHODS = {
    "pst": {},
    "interval": {"mask_interval": 7, "budget": "global"},
    "l0": {"importance": "l0", "update": "full", "pattern": "neuron"},
    "ast": {"ast": True, "mask_interval": 5, "masked_decay": 0.01, "masked_decay_warmup_ratio": 0.9},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_training_resumes_bit_for_bit(tmp_path, method):
    config = json.dumps(METHODS[method])
    finish(start(tmp_path / "whole", config))

    killed = start(tmp_path / "killed", config, "--slow")
    checkpoint = tmp_path / "killed" / "checkpoint-10" / "trainer_state.json"
    deadline = time.time() + 240
    while not checkpoint.exists():
        assert time.time() < deadline and killed.poll() is None, killed.stderr.read()[-3000:]
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "final").exists()
    assert 10 <= json.loads((tmp_path / "killed" / "step.json").read_text()) < 20

    before = load_file(tmp_path / "killed" / "checkpoint-10" / "adapter_model.safetensors")
    finish(start(tmp_path / "killed", config, "--resume"))
    whole, resumed = adapter(tmp_path / "whole"), adapter(tmp_path / "killed")
    assert whole.keys() == resumed.keys() and any("classifier" in name for name in whole)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    masks = [load_file(tmp_path / run / "masks.safetensors") for run in ("whole", "killed")]
    assert masks[0].keys() == masks[1].keys() and len(masks[0]) == 12
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name]), name
    # it was killed in the middle of the schedule, and went on from there
    counts = [sum(int(v) for name, v in state.items() if name.endswith("num_pruned")) for state in (before, whole)]
    if method != "ast":
        assert 0 < counts[0] < counts[1]
        return
    flips = [value for name, value in whole.items() if name.endswith("pst_flips")]
    assert len(flips) == 12 and sum(flips)[1] > 0 and 0 < counts[0] == counts[1]
    logs = [json.loads((tmp_path / run / "log.json").read_text()) for run in ("whole", "killed")]
    rates = [[row["flip_rate"], row["first_flip_rate"]] for row in logs[0] if "loss" in row]
    assert rates == [[row["flip_rate"], row["first_flip_rate"]] for row in logs[1] if "loss" in row]
    assert len(rates) == 20 and rates[0] == [0, 0] and 0 < max(rate[0] for rate in rates) < rates[-1][1]
