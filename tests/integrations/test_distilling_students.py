"""Students without an adapter, such as compressed models, and projections of their hidden states."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)

from peft_pst import Distillation, DistillationConfig, PSTConfig, compress
from peft_pst.integrations import PSTTrainer
from peft_pst.integrations.distilling import PROJECTION, DistillingTrainer

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SCRIPT = Path(__file__).with_name("train_students_in_processes.py")


def teacher():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=99, initializer_range=0.2, **SIZES))


def student():
    return compress(teacher(), num_layers=2, head_dim=6)


def rows():
    """Whose tokens are all labels but the first, so that accumulated batches weigh alike in every loss."""
    for i in range(8):
        ids = [(7 * j + 11 * i) % 99 for j in range(6)]
        yield {"input_ids": ids, "labels": [-100, *ids[1:]]}


class Recorder(TrainerCallback):
    """Notes the gradients of the first step, and may die after one."""

    def __init__(self, dies_after=None):
        self.found, self.dies_after = None, dies_after

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.found is None:
            self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.dies_after:
            raise KeyboardInterrupt


def make(
    folder,
    model,
    recorder=None,
    trainer_class=DistillingTrainer,
    projection=True,
    optimizers=None,
    init=None,
    **kwargs,
):
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 0,
        "learning_rate": 1e-2,
        **kwargs,
    }
    config = DistillationConfig(teacher(), task=0.5, logits=2.0, last_hidden_state=0.1, projection=projection)
    return trainer_class(
        model,
        TrainingArguments(str(folder), **settings),
        train_dataset=list(rows()),
        distillation=config,
        callbacks=[recorder or Recorder()],
        model_init=init,
        **({"optimizers": optimizers} if optimizers else {}),
    )


def distance(found, expected):
    assert found.keys() == expected.keys()
    difference = sum(((found[name] - expected[name]).double() ** 2).sum() for name in expected)
    return float((difference / sum((grad.double() ** 2).sum() for grad in expected.values())).sqrt())


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("projection", [False, True])
def test_gradients_are_those_of_the_plain_step(tmp_path, projection, accumulation):
    model = student().train()
    config = DistillationConfig(teacher(), task=0.5, logits=2.0, last_hidden_state=0.1, projection=projection)
    distillation = Distillation(model, config)
    inputs = {name: torch.tensor([row[name] for row in rows()]) for name in ("input_ids", "labels")}
    output = model(**distillation.request(inputs))
    distillation.total(output.loss, distillation.losses(inputs, output, distillation.teach(inputs))).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    recorder, before = Recorder(), student().state_dict()
    batches = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = make(tmp_path, student(), recorder, projection=projection, optim="sgd", weight_decay=1.0, **batches)
    trainer.train()
    assert distance(recorder.found, expected) < 1e-5
    trained = trainer.model.state_dict()
    assert trained.keys() == before.keys() and any(not torch.equal(trained[name], before[name]) for name in trained)
    assert "sparsity" not in trainer.state.log_history[0] and "last_hidden_state_loss" in trainer.state.log_history[0]
    if projection:
        # one step of SGD without decay
        start = Distillation(student(), config).projection.weight
        moved = trainer._projection.weight.detach()
        torch.testing.assert_close(moved, start - 1e-2 * distillation.projection.weight.grad, rtol=1e-4, atol=1e-7)
        assert trainer._projection.weight.grad is None


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_projection_is_clipped_with_the_model(tmp_path, accumulation):
    norms = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            of_model = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            norms.append(torch.stack([*of_model, made._projection.weight.grad.norm()]).norm())

    batches = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    made = make(tmp_path, student(), Norms(), max_grad_norm=0.1, max_steps=2, **batches)
    made.train()
    assert [float(norm) for norm in norms] == pytest.approx([0.1, 0.1], rel=1e-4)
    assert made.state.log_history[0]["grad_norm"] > 0.1


def classifier():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=99, num_labels=3, pad_token_id=0, **SIZES))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_classifier_and_its_teacher_weigh_alike_under_accumulation(tmp_path, accumulation):
    """transformers' loss of a classifier is a mean over the batch, which does not know of the other batches."""
    settings = {"max_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_grad_norm": 0}
    settings |= {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    data = [{"input_ids": [(7 * j + 11 * i) % 98 + 1 for j in range(6)], "labels": i % 3} for i in range(8)]
    teacher, expected, recorder = classifier(), classifier(), Recorder()
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    distillation = DistillationConfig(teacher, logits=2.0)
    reference = Distillation(expected.train(), distillation)
    inputs = {name: torch.tensor([row[name] for row in data]) for name in ("input_ids", "labels")}
    output = expected(**reference.request(inputs))
    reference.total(output.loss, reference.losses(inputs, output, reference.teach(inputs))).backward()
    arguments = TrainingArguments(str(tmp_path), save_strategy="no", logging_steps=1, **settings)
    trainer = DistillingTrainer(
        classifier(), arguments, train_dataset=data, distillation=distillation, callbacks=[recorder]
    )
    trainer.train()
    assert trainer.state.log_history[0]["task_loss"] == pytest.approx(float(output.loss.detach()), rel=1e-4)
    assert distance(recorder.found, {n: p.grad for n, p in expected.named_parameters() if p.grad is not None}) < 1e-5


def test_a_projection_learns_and_is_not_saved(tmp_path):
    trainer = make(tmp_path, student(), max_steps=20, save_strategy="steps", save_steps=20, learning_rate=3e-3)
    trainer.train()
    log = [row["last_hidden_state_loss"] for row in trainer.state.log_history if "loss" in row]
    assert log[-1] < 0.8 * log[0]
    groups = [group for group in trainer.optimizer.param_groups if trainer._projection.weight in set(group["params"])]
    assert len(groups) == 1 and groups[0]["weight_decay"] == 0
    assert torch.equal(load_file(tmp_path / "checkpoint-20" / PROJECTION)["weight"], trainer._projection.weight)
    trainer.save_model(tmp_path / "final")
    names = load_file(tmp_path / "final" / "model.safetensors").keys()
    assert not (tmp_path / "final" / PROJECTION).exists() and not any("projection" in name for name in names)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "final").config.compression["layers"] == [0, 2]


def adapted():
    torch.manual_seed(1)
    return get_peft_model(student(), PSTConfig(task_type="CAUSAL_LM", sparsity=0.8))


@pytest.mark.parametrize(("make_model", "trainer_class"), [(student, DistillingTrainer), (adapted, PSTTrainer)])
def test_a_killed_training_goes_on_exactly(tmp_path, make_model, trainer_class):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    straight = make(tmp_path / "straight", make_model(), trainer_class=trainer_class, **settings)
    straight.train()
    killed = make(tmp_path / "killed", make_model(), Recorder(dies_after=5), trainer_class, **settings)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make(tmp_path / "killed", make_model(), trainer_class=trainer_class, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert torch.equal(resumed._projection.weight, straight._projection.weight)
    expected = straight.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())


@pytest.mark.parametrize("kind", ["projection", "hybrid"])
def test_two_processes_do_what_one_does(tmp_path, kind):
    """On the same batches: the gradients of a projection are averaged, and labels of two languages weigh alike."""

    def run(processes):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "OMP_NUM_THREADS": 1}
        environments = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
        runs = [
            subprocess.Popen(
                [sys.executable, SCRIPT, str(tmp_path / str(processes)), kind],
                env={**os.environ, **{name: str(value) for name, value in environment.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for environment in environments
        ]
        outputs = [run.communicate(timeout=120) for run in runs]
        assert all(run.returncode == 0 for run in runs), outputs[0][1][-3000:]
        return [torch.tensor(json.loads(out.splitlines()[-1])) for out, _ in outputs]

    (alone,) = run(1)
    first, second = run(2)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-6)


def test_refused(tmp_path):
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match="which a scheduler that was made before does not know"):
        make(tmp_path, model, optimizers=(optimizer, scheduler))
    with pytest.raises(ValueError, match="model_init makes another model when training begins"):
        make(tmp_path, None, init=student)
    with pytest.raises(ValueError, match="has no layer with an active PST adapter"):
        make(tmp_path, student(), trainer_class=PSTTrainer).train()
    settings = {"save_strategy": "steps", "save_steps": 1}
    make(tmp_path / "without", student(), projection=False, **settings).train()
    with pytest.raises(ValueError, match=r"checkpoint-1' has no distillation_projection.safetensors: it is of a trai"):
        make(tmp_path / "without", student(), max_steps=2).train(resume_from_checkpoint=True)


def test_an_optimizer_of_ones_own(tmp_path):
    model = student()
    trainer = make(tmp_path, model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.01), None), max_steps=2)
    before = trainer._projection.weight.detach().clone()
    trainer.train()
    assert len(trainer.optimizer.param_groups) == 2 and not torch.equal(trainer._projection.weight, before)
