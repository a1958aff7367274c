import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_pst import PSTConfig, SparsityScheduler
from peft_pst.schedule import sparsity_at


def model(**kwargs):
    return get_peft_model(nn.Sequential(nn.Linear(10, 10)), PSTConfig(target_modules=["0"], **kwargs))


@pytest.mark.parametrize(("schedule", "left"), [("cubic", lambda p: (1 - p) ** 3), ("linear", lambda p: 1 - p)])
def test_the_curve(schedule, left):
    config = PSTConfig(initial_sparsity=0.2, sparsity=0.8, schedule=schedule, warmup_ratio=0.1, cooldown_ratio=0.3)
    curve = [sparsity_at(config, step, 100) for step in range(101)]
    assert curve[:11] == [0.2] * 11 and curve[70:] == [0.8] * 31
    for step in range(11, 70):
        assert curve[step] == pytest.approx(0.8 - 0.6 * left((step - 10) / 60))
    assert curve == sorted(curve)


def test_constant_is_at_the_final_sparsity_from_the_first_step():
    config = PSTConfig(schedule="constant", initial_sparsity=0.1)
    assert [sparsity_at(config, step, 10) for step in (0, 1, 9, 10)] == [0.9] * 4


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 100, 12345])
@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 0), (0.1, 0.3), (0.5, 0.5), (0, 1), (1, 0), (0.3, 0.7)])
def test_every_training_ends_at_exactly_the_final_sparsity(total, warmup, cooldown):
    config = PSTConfig(warmup_ratio=warmup, cooldown_ratio=cooldown)
    curve = [sparsity_at(config, step, total) for step in range(total + 1)]
    assert curve[-1] == 0.9 and curve == sorted(curve)


def test_a_loop_of_ones_own():
    net = model(sparsity=0.9, warmup_ratio=0.2, cooldown_ratio=0.2)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    scheduler = SparsityScheduler(net, total_steps=10)
    seen = []
    for _ in range(10):
        net(torch.randn(4, 10)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        seen.append(round(100 * net.base_model.get_sparsity()))
    assert seen[1] == 0 and seen[-3:] == [90, 90, 90] and seen == sorted(seen) and len(set(seen)) == 7
    merged = net.merge_and_unload()
    assert (merged[0].weight == 0).sum() == 90


def test_a_scheduler_goes_on_from_its_state():
    net = model()
    first = SparsityScheduler(net, total_steps=10)
    for _ in range(5):
        first.step()
    state, sparsity = first.state_dict(), net.base_model.get_sparsity()
    second = SparsityScheduler(net, total_steps=10)
    assert net.base_model.get_sparsity() == 0
    second.load_state_dict(state)
    assert net.base_model.get_sparsity() == second.get_sparsity() == sparsity
    first.step(), second.step()
    assert net.base_model.get_sparsity() == first.get_sparsity()


def test_each_layer_follows_its_own_adapter():
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    net = get_peft_model(net, PSTConfig(target_modules=["0"], sparsity=0.5))
    net.add_adapter("other", PSTConfig(target_modules=["1"], sparsity=0.8))
    net.base_model.set_adapter(["default", "other"])
    scheduler = SparsityScheduler(net, total_steps=4)
    for _ in range(4):
        scheduler.step()
    assert [layer.num_pruned for layer in scheduler.layers] == [50, 80]


def test_what_it_needs():
    with pytest.raises(ValueError, match="Linear has no layer with an active PST adapter: call get_peft_model"):
        SparsityScheduler(nn.Linear(2, 2), 10)
    with pytest.raises(ValueError, match="total_steps=0: expected the number of optimizer steps"):
        SparsityScheduler(model(), 0)
