import pytest
import torch
from accelerate.state import AcceleratorState
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from peft_pst import Distillation, DistillationConfig, PSTConfig, create_pst_optimizer
from peft_pst.integrations import PSTCallback, PSTTrainer

LENGTHS = (9, 5, 7, 3, 8, 6, 4, 9)
ALL = DistillationConfig(task=0.5, logits=2.0, last_hidden_state=0.1, hidden_states=1.0)
LOGITS = DistillationConfig(task=0.5, logits=2.0)
"""Hidden states of accumulated batches weigh by their labels, which are not as many as their tokens."""


@pytest.fixture(autouse=True)
def forgets_bf16(monkeypatch):
    """Of a training in bf16 TrainingArguments leave a trace in the environment, and accelerate in its state."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)


class Tokens(torch.utils.data.Dataset):
    """Texts of several lengths, as inputs of a causal language model."""

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, i):
        ids = (torch.arange(10) * 7 + 11 * i) % 99
        mask = torch.arange(10) < LENGTHS[i]
        labels = ids.masked_fill(~mask, -100)
        labels[0] = -100  # nothing predicts it, but transformers 4.57 counts it among the labels of a step
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


class Recorder(TrainerCallback):
    def __init__(self):
        self.logged, self.gradients = [], []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logged.append(dict(logs))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def student(**kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes))
    model = get_peft_model(base, PSTConfig(sparsity=0.8, initial_sparsity=0.5, task_type="CAUSAL_LM", **kwargs))
    for name, parameter in model.named_parameters():
        if "pst_" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def train(tmp_path, distillation=ALL, model=None, **kwargs):
    model = model or student()
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 0,
        **kwargs,
    }
    recorder = Recorder()
    trainer = PSTTrainer(
        model,
        TrainingArguments(str(tmp_path), **settings),
        train_dataset=Tokens(),
        optimizers=(create_pst_optimizer(model), None),
        distillation=distillation,
        callbacks=[recorder],
    )
    trainer.train()
    return trainer, recorder


def plain_gradients(config):
    """Of the whole data in one batch, without the Trainer; and the losses."""
    model = student().train()
    data = [Tokens()[i] for i in range(len(LENGTHS))]
    inputs = {name: torch.stack([one[name] for one in data]) for name in data[0]}
    distillation = Distillation(model, config)
    output = model(**distillation.request(inputs))
    losses = distillation.losses(inputs, output, distillation.teach(inputs))
    distillation.total(output.loss, losses).backward()
    found = {name: float(loss.detach()) for name, loss in {"task": output.loss, **losses}.items()}
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, found


def distance(found, expected):
    """Of all gradients together, relative to the expected ones."""
    assert found.keys() == expected.keys()
    difference = sum(((found[name] - expected[name]).double() ** 2).sum() for name in expected)
    return float((difference / sum((grad.double() ** 2).sum() for grad in expected.values())).sqrt())


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_are_those_of_the_plain_step(tmp_path, accumulation, checkpointing, bf16):
    config = ALL if accumulation == 1 else LOGITS
    expected, _ = plain_gradients(config)
    arguments = {
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": bf16,
    }
    _, recorder = train(tmp_path, config, **arguments)
    assert distance(recorder.gradients[0], expected) <= (0.05 if bf16 else 1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_each_loss_is_logged(tmp_path, accumulation):
    """Weighted they add up to the loss; with accumulation each is that of the whole step."""
    _, expected = plain_gradients(ALL)
    arguments = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    _, recorder = train(tmp_path, **arguments)
    logged = recorder.logged[0]
    found = {name: logged[f"{name}_loss"] for name in expected}
    assert found == pytest.approx(expected, rel=1e-4 if accumulation == 1 else 0.05)
    weighted = sum(getattr(ALL, name) * logged[f"{name}_loss"] for name in expected)
    assert logged["loss"] == pytest.approx(weighted, rel=1e-3)


def test_logs_are_means_of_the_steps_since_the_last(tmp_path):
    _, each = train(tmp_path, max_steps=4, lr_scheduler_type="constant")
    _, together = train(tmp_path, max_steps=4, logging_steps=4, lr_scheduler_type="constant")
    for name in ("task_loss", "logits_loss", "hidden_states_loss", "last_hidden_state_loss"):
        mean = sum(logs[name] for logs in each.logged[:4]) / 4
        assert together.logged[0][name] == pytest.approx(mean, rel=1e-5)


def test_sparsity_reaches_reporters_that_come_first(tmp_path):
    """Those of the Trainer itself stand before any callback of a user."""
    trainer, recorder = train(tmp_path, None, max_steps=4)
    assert [type(callback) for callback in trainer.callback_handler.callbacks][-1] is PSTCallback
    assert all("sparsity" in logs for logs in recorder.logged[:4]) and "task_loss" not in recorder.logged[0]
    assert trainer.model.base_model.get_sparsity() == pytest.approx(0.8, abs=1e-3)


def test_evaluation_is_of_the_task_alone(tmp_path):
    trainer, _ = train(tmp_path)
    expected, _ = train(tmp_path, None)
    expected.model.load_state_dict(trainer.model.state_dict())
    found = trainer.evaluate(Tokens())["eval_loss"]
    assert found == pytest.approx(expected.evaluate(Tokens())["eval_loss"], rel=1e-5)


def test_a_callback_given_besides_counts_once(tmp_path):
    model = student()
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = PSTTrainer(model, arguments, train_dataset=Tokens(), callbacks=[PSTCallback()])
    assert sum(isinstance(callback, PSTCallback) for callback in trainer.callback_handler.callbacks) == 1


def test_logits_that_the_loss_is_not_made_of_teach_nothing(tmp_path):
    """As of a Trainer with a loss of its own, such as TRL's."""

    class Fused(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            outputs.logits = outputs.logits.detach()
            return (loss, outputs) if return_outputs else loss

    class Taught(PSTTrainer, Fused):
        pass

    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    trainer = Taught(student(), arguments, train_dataset=Tokens(), distillation=LOGITS)
    with pytest.raises(ValueError, match=r"\['logits'\] have no gradient: Taught does not take its loss from the log"):
        trainer.train()


def test_the_trainer_makes_the_optimizer_with_the_learning_rates_given(tmp_path):
    model = student(update="full", modules_to_save=["lm_head"])
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=2e-4, weight_decay=0.1, adam_beta1=0.8, optim="adamw_torch", use_cpu=True
    )
    trainer = PSTTrainer(model, arguments, train_dataset=Tokens(), learning_rates={"head_lr": 5e-3, "delta_lr": 3e-5})
    found = {}
    for group in trainer.create_optimizer().param_groups:
        assert (group["weight_decay"], group["betas"][0]) == (0.1, 0.8)
        found |= {id(parameter): group["lr"] for parameter in group["params"]}
    trained = {name.removesuffix(".default"): p for name, p in model.named_parameters() if p.requires_grad}
    rates = {name.rpartition(".")[2]: found[id(p)] for name, p in trained.items()}
    others = {"weight": 5e-3, "pst_norm_weight": 5e-3}
    assert rates == {"pst_D": 3e-5, "pst_A": 2e-4, "pst_B": 2e-4, "pst_R": 2e-4, "pst_C": 2e-4, **others}
    with pytest.raises(ValueError, match="leave out one of the two"):
        PSTTrainer(
            model,
            arguments,
            train_dataset=Tokens(),
            optimizers=(create_pst_optimizer(model), None),
            learning_rates={"lr": 1e-4},
        )


def test_a_penalty_counts_once_a_step(tmp_path):
    """However many batches a step has."""

    def gradient(batches):
        model = student(importance="soft_movement", budget="global", penalty=5.0, update="none")
        arguments = {"per_device_train_batch_size": 8 // batches, "gradient_accumulation_steps": batches}
        return train(tmp_path, None, model, **arguments)[1].gradients[0]

    assert distance(gradient(4), gradient(1)) <= 1e-5
