import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
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


# mask_interval: sparsity and masks change at every k-th step, and when the sparsity becomes final.


def masks(net):
    layer = net.base_model.model[0]
    return layer.pst_mask["default"].clone(), layer.num_pruned


def train_step(net, scheduler, optimizer):
    net(torch.randn(4, 10)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()


@pytest.mark.parametrize("total", [20, 23])
def test_masks_change_only_at_the_interval_and_when_the_sparsity_is_final(total):
    net = model(mask_interval=5, warmup_ratio=0, cooldown_ratio=0.1, init_weights=False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    scheduler = SparsityScheduler(net, total_steps=total)
    final = total - round(0.1 * total)
    for step in range(1, total + 1):
        before = masks(net)
        train_step(net, scheduler, optimizer)
        after = masks(net)
        changed = not torch.equal(before[0], after[0])
        assert changed == (step % 5 == 0 or step == final), step
        if not changed:
            assert before[1] == after[1]
        else:
            assert after[1] == int(100 * sparsity_at(net.peft_config["default"], step, total))
            # the mask is that of the weight as it is now
            layer = net.base_model.model[0]
            keep = layer.importance("default").flatten().argsort()[after[1] :]
            merged = copy.deepcopy(net).merge_and_unload()[0].weight.flatten()
            assert set(keep.tolist()) == set(merged.nonzero().flatten().tolist())
    assert masks(net)[1] == 90


def test_an_interrupted_training_goes_on_with_the_mask_that_it_had(tmp_path):
    def parts(net, last_step):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
        return optimizer, SparsityScheduler(net, 20, last_step)

    torch.manual_seed(0)
    net = model(mask_interval=5, init_weights=False, warmup_ratio=0)
    optimizer, scheduler = parts(net, 0)
    for step in range(18):
        torch.manual_seed(step)
        train_step(net, scheduler, optimizer)
        if step == 6:
            net.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(10, 10)), tmp_path, is_trainable=True)
    optimizer, scheduler = parts(again, 7)
    for step in range(7, 18):
        torch.manual_seed(step)
        train_step(again, scheduler, optimizer)
    for (name, a), b in zip(net.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_loaded_state_keeps_the_loaded_mask():
    """The order of accelerate: everything is made, then the model's state is loaded, then the scheduler's."""
    net = model(mask_interval=5, init_weights=False, warmup_ratio=0)
    scheduler = SparsityScheduler(net, 20)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(7):
        train_step(net, scheduler, optimizer)
    saved, state = copy.deepcopy(net.state_dict()), scheduler.state_dict()
    again = model(mask_interval=5)
    scheduler = SparsityScheduler(again, 20)
    again.load_state_dict(saved)
    scheduler.load_state_dict(state)
    assert torch.equal(masks(again)[0], masks(net)[0]) and masks(again)[1] == masks(net)[1]


def test_what_it_needs():
    with pytest.raises(ValueError, match="Linear has no layer with an active PST adapter: call get_peft_model"):
        SparsityScheduler(nn.Linear(2, 2), 10)
    with pytest.raises(ValueError, match="total_steps=0: expected the number of optimizer steps"):
        SparsityScheduler(model(), 0)
