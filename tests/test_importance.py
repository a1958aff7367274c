import pytest
import torch
from peft import get_peft_model
from reference import plain_hard_concrete, plain_importance, plain_step, random_factors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_pst import PSTConfig
from peft_pst.functional import Kept, Live, MaskedLinear, Method
from peft_pst.importance import IMPORTANCES, L0, PST, Wanda
from peft_pst.patterns import pack_bits, parse_pattern
from peft_pst.update import UPDATES, LowRank

N, K = 12, 17


def config(importance, update="low_rank", **kwargs):
    budget = "global" if importance == "soft_movement" else "layer"
    return PSTConfig(importance=importance, update=update, r=3, mask_r=2, budget=budget, **kwargs)


def arguments_of(method):
    """Random parameters, float64 with gradients, and the buffers of wanda as the layer and as the formula has them."""
    shapes = [start.shape for part in (method.update, method.importance) for start in part.starts(N, K)]
    parameters = [(0.5 * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in shapes]
    if not isinstance(method.importance, Wanda):
        return parameters, [], []
    squares, tokens = 9 * torch.rand(K, dtype=torch.float64), 9.0
    buffer = torch.cat((squares, torch.tensor([tokens], dtype=torch.float64))).view(torch.int64)
    return parameters, [buffer], [(squares / tokens).sqrt()]


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9])
@pytest.mark.parametrize("kept", [False, True], ids=["live", "kept"])
@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("straight_through", [False, True], ids=["masked", "straight"])
def test_output_and_gradients_are_those_of_the_formula(importance, update, sparsity, kept, seed, straight_through):
    if straight_through and update == "none":
        pytest.skip("no weight trains")
    method = Method.of(config(importance, update, straight_through=straight_through))
    parameters, buffers, for_formula = arguments_of(method)
    x, bias, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, K), (N,), (N, K)))
    num_pruned = int(N * K * sparsity)
    mask = Live(parse_pattern("unstructured"), torch.tensor(num_pruned))
    if kept:
        with torch.no_grad():
            mask = Kept(pack_bits(method.weight_and_mask(mask, weight.detach(), *parameters, *buffers)[1]))
    y = MaskedLinear.apply(x, bias, mask, method, seed, weight, *parameters, *buffers)
    arguments = [*parameters, *for_formula]
    expected = plain_step(importance, update, num_pruned, x, bias, weight, arguments, seed, straight_through)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    dy, tensors = torch.randn_like(y), (x, bias, weight, *parameters)
    mine = torch.autograd.grad(y, tensors, dy)
    plain = torch.autograd.grad(expected, tensors, dy)
    for name, a, b in zip(("x", "bias", "weight", *method.names), mine, plain, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("update", UPDATES)
def test_the_merged_weight_is_that_of_the_formula(importance, update):
    net = get_peft_model(nn.Sequential(nn.Linear(K, N).double()), config(importance, update, target_modules=["0"]))
    layer = net.base_model.model[0]
    method = Method.of(layer.active_config)
    parameters, buffers, for_formula = arguments_of(method)
    with torch.no_grad():
        for mine, new in zip(layer.arguments("default"), [*parameters, *buffers], strict=True):
            mine.copy_(new)
    parameters = [p.double() for p in layer.arguments("default")[: len(parameters)]]
    net.base_model.set_sparsity(0.7)
    weight = layer.get_base_layer().weight.detach().double()
    identity = torch.eye(K, dtype=torch.float64)
    num_pruned = int(N * K * 0.7)
    expected = plain_step(importance, update, num_pruned, identity, None, weight, [*parameters, *for_formula]).T
    x = torch.randn(4, K, dtype=torch.float64)
    y = net.eval()(x)
    merged = net.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged[0].weight.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged(x), y, rtol=1e-5, atol=1e-6)
    assert (merged[0].weight == 0).sum() == num_pruned


def test_pst_and_its_gradients_are_the_formula():
    weight = torch.randn(7, 11, dtype=torch.float64)
    factors = [factor.requires_grad_() for factor in random_factors(7, 11)]
    updated, importance = plain_importance(weight, *factors, 0.7, 1.3, 0.4)
    given = PSTConfig(beta=0.7, alpha1=1.3, alpha2=0.4)
    torch.testing.assert_close(LowRank(given).weight(weight, *factors[:2]), updated, rtol=1e-13, atol=1e-13)
    mine = PST(given).score(updated, *factors[2:])
    torch.testing.assert_close(mine, importance, rtol=1e-13, atol=1e-13)


def test_the_weight_is_computed_in_the_dtype_of_the_parameters():
    U, V, *_ = random_factors(4, 6, dtype=torch.float32)
    weight = torch.randn(4, 6, dtype=torch.bfloat16)
    assert UPDATES["low_rank"](PSTConfig()).weight(weight, U, V).dtype == torch.float32
    assert UPDATES["full"](PSTConfig()).weight(weight, torch.zeros(4, 6)).dtype == torch.float32
    assert UPDATES["none"](PSTConfig()).weight(weight).dtype == torch.float32


def test_the_frozen_weight_is_never_written_to():
    for update in UPDATES:
        net = get_peft_model(nn.Sequential(nn.Linear(K, N)), config("magnitude", update, target_modules=["0"]))
        before = net.base_model.model[0].get_base_layer().weight.detach().clone()
        net.base_model.set_sparsity(0.5)
        net(torch.randn(2, K, requires_grad=True)).sum().backward()
        net.eval()(torch.randn(2, K))
        assert torch.equal(net.base_model.model[0].get_base_layer().weight, before)


# Gates.


def test_gates_are_drawn_anew_in_each_step_and_are_the_same_in_backward():
    net = get_peft_model(nn.Sequential(nn.Linear(K, N)), config("l0", target_modules=["0"]))
    x = torch.randn(3, K)
    assert all(module.training for module in net.modules())
    assert not torch.equal(net(x), net(x))
    net.eval()
    with torch.no_grad():
        assert torch.equal(net(x), net(x))


def test_under_gradient_checkpointing_the_gates_are_the_same():
    net = get_peft_model(nn.Sequential(nn.Linear(K, N)), config("l0", target_modules=["0"]))
    x = torch.randn(3, K, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False) if checkpointed else net(x)
        gradients.append(torch.autograd.grad(y.square().sum(), (x, *net.base_model.model[0].arguments("default"))))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_mean_of_many_gates_is_near_their_gate_in_evaluation():
    log_alpha = torch.linspace(-3, 5, 9).expand(20000, 9)
    gates = plain_hard_concrete(log_alpha, seed=0)
    mine = L0(PSTConfig()).gates(torch.ones_like(log_alpha), 0, log_alpha)
    torch.testing.assert_close(mine, gates, rtol=1e-4, atol=1e-5)
    open_share = (mine > 0).float().mean(0)
    penalty = L0(PSTConfig()).penalty(log_alpha[:1]).item()
    assert open_share.sum().item() == pytest.approx(penalty, abs=0.02)


# Penalties.


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
@pytest.mark.parametrize("importance", ["soft_movement", "l0"])
def test_the_penalty_is_in_the_loss_of_a_training_step(importance, task_type, bert, tokens):
    model = get_peft_model(bert(), config(importance, "full", task_type=task_type, penalty=3.0))
    labels = torch.tensor([0, 1])
    torch.manual_seed(5)
    output = model.train()(input_ids=tokens, labels=labels)
    plain = nn.functional.cross_entropy(output.logits, labels)
    layers = [m for m in model.modules() if hasattr(m, "pst_config")]
    score = "pst_S" if importance == "soft_movement" else "pst_log_alpha"
    scores = torch.cat([getattr(layer, score)["default"].flatten() for layer in layers])
    shift = 0 if importance == "soft_movement" else 2 / 3 * torch.log(torch.tensor(0.1 / 1.1))
    charge = 3.0 * torch.sigmoid(scores - shift).mean()
    torch.testing.assert_close(output.loss, plain + charge)
    torch.testing.assert_close(model.base_model.penalty(), charge)
    assert all(getattr(layer, score)["default"].grad is None for layer in layers)
    output.loss.backward()
    assert all(getattr(layer, score)["default"].grad.abs().sum() > 0 for layer in layers)
    output = model.eval()(input_ids=tokens, labels=labels)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    merged = model.merge_and_unload().train()
    assert not merged._forward_hooks


def test_a_penalty_counts_without_peft_model_too(bert, tokens):
    model = bert()
    model.add_adapter(config("l0", "full", penalty=3.0))
    output = model.train()(input_ids=tokens, labels=torch.tensor([0, 1]))
    assert output.loss > nn.functional.cross_entropy(output.logits, torch.tensor([0, 1])) + 0.5


def test_without_a_penalty_nothing_is_charged(bert):
    assert get_peft_model(bert(), config("l0")).base_model.penalty() == 0.0


def test_a_loss_from_elsewhere_would_leave_out_the_penalty():
    """TRL tells the model that its head and loss are fused elsewhere."""
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    model = get_peft_model(llama, config("l0", "full", task_type="CAUSAL_LM", penalty=3.0))
    ids = torch.arange(6).view(1, 6)
    with pytest.raises(ValueError, match="TRL's SFTTrainer takes its loss from a fused head"):
        model.train()(input_ids=ids, labels=ids, fused_lm_head=True)
