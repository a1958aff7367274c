import gc

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_pst import PSTConfig, SparsityScheduler
from peft_pst import decay as decay_module
from peft_pst.decay import decay_at

STEPS = 12


def model(**choices):
    torch.manual_seed(0)
    config = PSTConfig.ast(target_modules=["0"], boost=None, mask_interval=3, **{"masked_decay": 0.02, **choices})
    return get_peft_model(nn.Sequential(nn.Linear(16, 8)), config).double()


def masks(net):
    layer = net.base_model.model[0]
    weight = (layer.base_layer.weight + layer.pst_D["default"]).detach()
    return weight, layer.pruned_part("default") == 0


def plain_two_of_four(weight):
    order = weight.abs().view(-1, 4).argsort(dim=1, stable=True)
    return torch.ones(weight.numel() // 4, 4, dtype=torch.bool).scatter_(1, order[:, :2], False).view_as(weight)


def test_lambda_grows_and_stays():
    config = PSTConfig.ast(masked_decay=0.2)
    assert [decay_at(config, step, 40) for step in (0, 1, 5, 10, 39)] == pytest.approx([0, 0.02, 0.1, 0.2, 0.2])
    config = PSTConfig.ast(masked_decay=0.2, masked_decay_warmup_ratio=0.0)
    assert decay_at(config, 0, 40) == 0.2


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, betas=(0.8, 0.9)),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    ],
    ids=["AdamW", "AMSGrad", "SGD"],
)
def test_a_training_is_that_of_the_formula(make):
    """W + D trains, in float64, against the formula written out around an optimizer that knows of no hook."""
    net = model()
    layer = net.base_model.model[0]
    W, bias = layer.base_layer.weight.detach().clone(), layer.base_layer.bias.detach()
    mine = make([layer.pst_D["default"]])
    scheduler = SparsityScheduler(net, STEPS, optimizer=mine)
    D = torch.zeros_like(W, requires_grad=True)
    plain = make([D])
    mask = plain_two_of_four(W)
    for step in range(STEPS):
        x, target = torch.randn(4, 16, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
        (net(x) - target).square().mean().backward()
        mine.step()
        mine.zero_grad()
        scheduler.step()

        weight = W + D
        y = x @ (mask * weight.detach() + D - D.detach()).T + bias
        (y - target).square().mean().backward()
        plain.step()
        plain.zero_grad()
        group, state = plain.param_groups[0], plain.state[D]
        rate = group["lr"] * 0.02 * min(1.0, step / (0.25 * STEPS))
        if "exp_avg_sq" in state:
            v = state.get("max_exp_avg_sq", state["exp_avg_sq"]) / (1 - group["betas"][1] ** (step + 1))
            rate = rate / (v.sqrt() + 1e-8)
        with torch.no_grad():
            D -= torch.as_tensor(rate, dtype=torch.float64).clamp(max=1) * ~mask * (W + D)
        if (step + 1) % 3 == 0:
            mask = plain_two_of_four((W + D).detach())
        torch.testing.assert_close(layer.pst_D["default"], D, rtol=1e-11, atol=1e-13)
    assert torch.equal(masks(net)[1], mask) and not torch.equal(mask, plain_two_of_four(W))


@pytest.mark.filterwarnings("ignore:OptimState")  # torchao's, of a cache
def test_a_second_moment_in_eight_bits():
    """torchao's step is taken by an optimizer that knows of no hook, the decay by the formula."""
    optim = pytest.importorskip("torchao.optim")
    torch.manual_seed(0)
    config = PSTConfig.ast(target_modules=["0"], boost=None, masked_decay=0.02, masked_decay_warmup_ratio=0.0)
    net = get_peft_model(nn.Sequential(nn.Linear(256, 64)), config)
    layer = net.base_model.model[0]
    W, D = layer.base_layer.weight.detach(), layer.pst_D["default"]
    plain = torch.zeros_like(D, requires_grad=True)
    mine, other = (optim.AdamW8bit([p], lr=0.01, weight_decay=0.1) for p in (D, plain))
    scheduler = SparsityScheduler(net, STEPS, optimizer=mine)
    D.grad = plain.grad = torch.randn_like(D)
    mine.step()
    other.step()
    v = other.state[plain]["exp_avg_sq"].dequantize() / (1 - 0.999)
    rate = (0.01 * 0.02 / (v.sqrt() + 1e-8)).clamp(max=1)
    expected = plain.detach() - rate * ~plain_two_of_four(W) * (W + plain.detach())
    torch.testing.assert_close(D.detach(), expected)
    assert not torch.equal(D, plain) and scheduler.last_step == 0


def test_it_shrinks_what_is_masked_and_nothing_else():
    net = model(masked_decay=0.5, masked_decay_warmup_ratio=0.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = SparsityScheduler(net, STEPS, optimizer=optimizer)
    weight, kept = masks(net)
    (0 * net(torch.randn(4, 16, dtype=torch.float64)).sum()).backward()
    optimizer.step()
    after, _ = masks(net)
    assert torch.equal(after[kept], weight[kept])
    torch.testing.assert_close(after[~kept], 0.95 * weight[~kept])
    assert scheduler.last_step == 0


def test_it_never_goes_past_zero():
    net = model(masked_decay=1e9, masked_decay_warmup_ratio=0.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    scheduler = SparsityScheduler(net, STEPS, optimizer=optimizer)
    net(torch.randn(4, 16, dtype=torch.float64)).sum().backward()
    before, kept = masks(net)
    optimizer.step()
    assert (masks(net)[0][~kept].abs() <= 1e-9).all() and before[~kept].all() and scheduler


def test_it_does_not_enter_the_first_moment():
    moments = []
    for decay in (0.0, 0.5):
        net = model(masked_decay=decay, masked_decay_warmup_ratio=0.0)
        optimizer = torch.optim.Adam([net.base_model.model[0].pst_D["default"]], lr=1e-3)
        scheduler = SparsityScheduler(net, STEPS, optimizer=optimizer)
        torch.manual_seed(1)
        net(torch.randn(4, 16, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        moments.append(next(iter(optimizer.state.values()))["exp_avg"])
        scheduler.step()
    assert torch.equal(*moments)


def test_one_scheduler_at_a_time():
    """A second training with the same optimizer decays once a step, and none does when its scheduler is gone."""

    def shrinks(net, optimizer):
        before, kept = masks(net)
        (0 * net(torch.randn(4, 16, dtype=torch.float64)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return float((masks(net)[0][~kept] / before[~kept]).mean())

    net = model(masked_decay=0.5, masked_decay_warmup_ratio=0.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    first = SparsityScheduler(net, STEPS, optimizer=optimizer)
    second = SparsityScheduler(net, STEPS, optimizer=optimizer)
    assert shrinks(net, optimizer) == pytest.approx(0.95) and first
    del first, second
    gc.collect()
    assert shrinks(net, optimizer) == 1


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)],
    ids=["SGD", "fused AdamW"],
)
def test_a_step_that_a_scaler_skips_decays_nothing(make):
    net = model(masked_decay=0.5, masked_decay_warmup_ratio=0.0)
    optimizer, scaler = make([net.base_model.model[0].pst_D["default"]]), torch.amp.GradScaler("cpu")
    scheduler = SparsityScheduler(net, STEPS, optimizer=optimizer)
    before = masks(net)[0]
    scaler.scale(net(torch.randn(4, 16, dtype=torch.float64)).sum() * torch.inf).backward()
    scaler.step(optimizer)
    assert torch.equal(masks(net)[0], before) and scheduler


def test_an_optimizer_without_a_second_moment_is_a_warning():
    net = model(masked_decay_warmup_ratio=0.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = SparsityScheduler(net, STEPS, optimizer=optimizer)
    net(torch.randn(4, 16, dtype=torch.float64)).sum().backward()
    decay_module._warn_of_another_optimizer.cache_clear()
    with pytest.warns(UserWarning, match="take torch.optim.AdamW, raise masked_decay"):
        optimizer.step()
    assert scheduler


def test_what_it_needs():
    net = model()
    with pytest.raises(ValueError, match=r"give it too, as in SparsityScheduler\(model, total_steps, optimizer=opt"):
        SparsityScheduler(net, STEPS)
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="DeepSpeed's ZeRO has copies of its own"):
        SparsityScheduler(net, STEPS, optimizer=optimizer)
    with pytest.raises(ValueError, match="changes single entries of the weight, which update='low_rank' does not"):
        PSTConfig(masked_decay=0.1)
    with pytest.raises(ValueError, match="measured against the gradients of pruned entries.*straight_through=True"):
        PSTConfig(masked_decay=0.1, update="full")
    with pytest.raises(ValueError, match="masked_decay=-0.1 would let masked weights grow"):
        PSTConfig.ast(masked_decay=-0.1)
    with pytest.raises(ValueError, match="straight_through=True has no effect on update='none'"):
        PSTConfig(straight_through=True, update="none")
