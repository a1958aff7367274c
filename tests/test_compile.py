"""torch.compile through a whole schedule: how often it compiles, and whether it trains as without it."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from peft_pst import PSTConfig, SparsityScheduler, calibrate
from peft_pst.integrations import PSTCallback
from peft_pst.layer import PSTLayer

STEPS = 12


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    """An attention-like pair and a feed-forward pair, so that coupled patterns find their units."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, hidden_states):
        return hidden_states + self.down_proj(torch.tanh(self.up_proj(hidden_states)))


def make(**choices):
    torch.manual_seed(0)
    targets = {"target_modules": ["up_proj", "down_proj"], "init_weights": False}
    model = get_peft_model(nn.Sequential(Block(), Block()), PSTConfig(**{**targets, **choices}))
    if model.active_peft_config.importance == "wanda":
        calibrate(model, [{"input": torch.randn(4, 16)}])
    return model.train()


def losses(model, run, steps=STEPS, batches=None, context=nullcontext):
    """Those of a training along the model's schedule; another count of pruned entries in each step but the first."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scheduler = SparsityScheduler(model, steps)
    taken, counts = [], []
    for step in range(steps):
        x = torch.randn(*(batches or [(3, 5)])[step % len(batches or [1])], 16)
        counts.append(sum(layer.num_pruned for layer in scheduler.layers))
        with context():
            loss = (run(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        taken.append(loss.item())
    assert len(set(counts)) > 1
    return torch.tensor(taken), len(set(counts))


SCHEDULE = {"schedule": "cubic", "warmup_ratio": 0.0, "cooldown_ratio": 0.0}
CASES = {
    **{importance: {"importance": importance} for importance in ("magnitude", "movement", "l0", "wanda")},
    "soft_movement": {"importance": "soft_movement", "budget": "global"},
    **{f"update={update}": {"update": update} for update in ("low_rank", "full", "none")},
    "l0, full": {"importance": "l0", "update": "full"},
    "wanda, none": {"importance": "wanda", "update": "none", "bias": "pst_only"},
    **{pattern: {"pattern": pattern} for pattern in ("2:4", "block:8x1", "block:4x4", "row", "column", "neuron")},
    "global": {"budget": "global"},
    "global, row": {"budget": "global", "pattern": "row"},
    "mask_interval=3": {"mask_interval": 3},
    "numbers": {"beta": 0.5, "alpha1": 2.0, "alpha2": 0.3, "r": 3, "mask_r": 2},
    "bias=all": {"bias": "all"},
}


@pytest.mark.parametrize("choices", CASES.values(), ids=CASES)
def test_a_whole_schedule_compiles_once_and_trains_as_without_a_compiler(choices):
    model = make(**SCHEDULE, **choices)
    expected, counts = losses(model, model)
    assert counts >= (4 if "mask_interval" in choices else 6)
    model, counter = make(**SCHEDULE, **choices), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(losses(model, compiled)[0], expected, rtol=0, atol=0)
    assert counter.frame_count == 1


class Checkpointed(nn.Module):
    """Keeps only a block's input, and runs the block again in backward."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


@pytest.mark.parametrize("importance", ["pst", "l0"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_under_gradient_checkpointing_what_is_recomputed_is_what_was_computed(importance, backend):
    """The gates of l0 are random: in backward they have to be those of forward."""
    model = make(**SCHEDULE, importance=importance)
    expected, _ = losses(model, model)
    model, counter = make(**SCHEDULE, importance=importance), CompileCounterWithBackend(backend)
    for i, block in enumerate(model.base_model.model):
        model.base_model.model[i] = Checkpointed(block)
    with torch._inductor.config.patch(fallback_random=True):  # the random numbers that a step without a compiler draws
        taken, _ = losses(model, torch.compile(model, backend=counter, fullgraph=True))
    torch.testing.assert_close(taken, expected, rtol=0, atol=1e-4)
    assert counter.frame_count == 1


def test_under_autocast():
    context = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    model = make(**SCHEDULE)
    expected, _ = losses(model, model, context=context)
    model, counter = make(**SCHEDULE), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(losses(model, compiled, context=context)[0], expected, rtol=0, atol=1e-4)
    assert counter.frame_count == 1


def test_batches_of_many_shapes_compile_one_graph_more():
    batches = [(3, 5), (2, 7), (4, 4), (5, 9), (6, 3)]
    model = make(**SCHEDULE)
    expected, _ = losses(model, model, batches=batches)
    model, counter = make(**SCHEDULE), CompileCounterWithBackend("aot_eager")
    taken, _ = losses(model, torch.compile(model, backend=counter, fullgraph=True), batches=batches)
    torch.testing.assert_close(taken, expected, rtol=0, atol=1e-4)
    assert counter.frame_count == 2


def test_models_of_other_numbers_do_not_take_each_others_graphs():
    for choices in ({"beta": 0.5}, {"beta": 2.0}, {"alpha1": 3.0}, {"pattern": "2:4"}, {"budget": "global"}):
        model = make(**SCHEDULE, **choices)
        expected, _ = losses(model, model, steps=4)
        model = make(**SCHEDULE, **choices)
        taken, _ = losses(model, torch.compile(model, backend="aot_eager", fullgraph=True), steps=4)
        assert torch.equal(taken, expected)


@pytest.mark.parametrize("choices", [{}, {"importance": "l0"}, {"mask_interval": 2}], ids=str)
def test_evaluation_between_the_steps(choices):
    """In evaluation a layer keeps its weight between the calls, which a graph cannot; so its graph breaks, but what is
    compiled in the first two rounds serves the others, with the outputs of a model without a compiler."""

    def train_and_evaluate(model, run):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        scheduler, outputs, counts = SparsityScheduler(model, STEPS), [], []
        torch.manual_seed(1)
        x = torch.randn(3, 5, 16)
        for _ in range(STEPS):
            run(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            model.eval()
            with torch.no_grad():
                outputs += [run(x), run(x)]
            model.train()
            counts.append(counter.frame_count)
        return torch.stack(outputs), counts

    counter = CompileCounterWithBackend("aot_eager")
    expected, _ = train_and_evaluate(*[make(**SCHEDULE, **choices)] * 2)
    model = make(**SCHEDULE, **choices)
    outputs, counts = train_and_evaluate(model, torch.compile(model, backend=counter))
    assert torch.equal(outputs, expected)
    assert counts[2:] == [counts[1]] * (STEPS - 2) and counts[1] <= 12


def test_no_more_is_kept_for_backward_than_without_a_compiler():
    """A compiler that saw W' in forward and in backward would keep it instead of computing it again."""
    model = get_peft_model(nn.Sequential(nn.Linear(128, 96)), PSTConfig(target_modules=["0"])).train()
    model.base_model.set_sparsity(0.5)
    parameters = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    x = torch.randn(4, 128)
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            run(x)
        new = {t.data_ptr(): t for t in kept if t.data_ptr() not in parameters}.values()
        assert sorted((t.dtype, t.numel()) for t in new if t.numel() > x.numel()) == [(torch.uint8, 96 * 128 // 8)]


def test_a_base_model_that_does_not_fit_is_named_when_the_step_is_compiled():
    model = make()
    for layer in model.modules():
        if isinstance(layer, PSTLayer):
            layer.get_base_layer().weight.data.mul_(2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match="trained on another base model"):
        compiled(torch.randn(3, 16))


def test_the_base_weight_and_its_bias_may_train_too():
    for choices in ({}, {"update": "full"}, {"update": "none"}):
        taken = []
        for compiles in (False, True):
            model = make(**SCHEDULE, **choices).requires_grad_()
            run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
            taken.append(losses(model, run, steps=4)[0])
        assert torch.equal(*taken)


def test_conv1d_stores_its_weight_the_other_way():
    grads = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(Conv1D(24, 16)), PSTConfig(target_modules=["0"], init_weights=False))
        model.base_model.set_sparsity(0.7)
        run = torch.compile(model.train(), backend="aot_eager", fullgraph=True) if compiles else model.train()
        torch.manual_seed(1)
        run(torch.randn(2, 5, 16)).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_bert_by_inductor(bert, tokens):
    """The whole model is one graph; transformers sets `problem_type` in the first step, which would recompile."""
    taken = []
    counter = CompileCounterWithBackend("inductor")
    for compiles in (False, True):
        model = get_peft_model(
            bert(num_hidden_layers=1, problem_type="single_label_classification", hidden_dropout_prob=0.0,
                 attention_probs_dropout_prob=0.0),
            PSTConfig(**SCHEDULE, init_weights=False),
        ).train()  # fmt: skip
        run = torch.compile(model, backend=counter, fullgraph=True) if compiles else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        scheduler = SparsityScheduler(model, STEPS)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.tensor([0, 1])}
        for _ in range(STEPS):
            loss = run(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            taken.append(loss.item())
    torch.testing.assert_close(taken[STEPS:], taken[:STEPS], rtol=0, atol=1e-3)
    assert counter.frame_count == 1


def test_the_trainer_compiles_evaluates_and_saves(bert, tmp_path):
    """With `torch_compile=True`: the losses, the evaluations between the steps and the adapter are those without."""
    dataset = [{"input_ids": torch.arange(i, i + 7) % 99, "labels": i % 2} for i in range(16)]
    logs, adapters = [], []
    for compiles in (False, True):
        torch._dynamo.utils.counters.clear()
        model = get_peft_model(bert(num_hidden_layers=1), PSTConfig(**SCHEDULE, task_type="SEQ_CLS"))
        arguments = TrainingArguments(
            str(tmp_path), max_steps=STEPS, logging_steps=1, eval_strategy="steps", eval_steps=4, save_strategy="no",
            per_device_train_batch_size=4, learning_rate=1e-4, report_to="none", disable_tqdm=True, use_cpu=True,
            torch_compile=compiles, torch_compile_backend="aot_eager" if compiles else None,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset, callbacks=[PSTCallback()])
        trainer.train()
        logs.append([log[key] for log in trainer.state.log_history for key in ("loss", "eval_loss") if key in log])
        trainer.save_model(tmp_path / f"compiled={compiles}")
        adapters.append(load_file(tmp_path / f"compiled={compiles}" / "adapter_model.safetensors"))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert len(logs[0]) == STEPS + 3
    torch.testing.assert_close(logs[1], logs[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(adapters[1], adapters[0], rtol=0, atol=1e-4)
    assert 0 < graphs <= 20  # one for the steps, the others for evaluation, whatever the number of steps
