import pytest
import torch
from peft import get_peft_model
from reference import FACTORS

from peft_pst import PSTConfig, create_pst_optimizer


def test_factors_and_head_have_learning_rates_of_their_own(bert):
    model = get_peft_model(bert(), PSTConfig(task_type="SEQ_CLS", bias="pst_only"))
    optimizer = create_pst_optimizer(model, torch.optim.SGD, lr=0.25, head_lr=0.5, momentum=0.9)
    names = {id(p): name for name, p in model.named_parameters()}
    lr = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert set(lr) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, value in lr.items():
        assert value == (0.25 if name.split(".")[-2] in FACTORS else 0.5), name
    assert {0.25, 0.5} == set(lr.values()) and all(group["momentum"] == 0.9 for group in optimizer.param_groups)


@pytest.mark.parametrize(("importance", "update"), [("movement", "full"), ("l0", "low_rank"), ("magnitude", "none")])
def test_each_kind_of_parameter_has_a_learning_rate_of_its_own(bert, importance, update):
    model = get_peft_model(bert(), PSTConfig(task_type="SEQ_CLS", importance=importance, update=update))
    optimizer = create_pst_optimizer(model, lr=1.0, delta_lr=2.0, score_lr=3.0, head_lr=4.0)
    names = {id(p): name.split(".")[-2] for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"pst_U": 1.0, "pst_V": 1.0, "pst_D": 2.0, "pst_S": 3.0, "pst_log_alpha": 3.0}
    expected |= dict.fromkeys(("pst_norm_weight", "pst_norm_bias", "default", "dense"), 4.0)
    assert rates == {name: expected[name] for name in rates}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == sum(
        p.requires_grad for p in model.parameters()
    )


@pytest.mark.parametrize(("choices", "lr"), [({}, 3e-4), ({"pattern": "2:4"}, 1e-4), ({"sparsity": 0.75}, 3e-4)])
def test_factors_learn_slower_where_less_is_pruned(bert, choices, lr):
    model = get_peft_model(bert(), PSTConfig(task_type="SEQ_CLS", **choices))
    optimizer = create_pst_optimizer(model)
    assert [group["lr"] for group in optimizer.param_groups] == [lr, 1e-3]
    assert optimizer.defaults["lr"] == lr


def test_needs_a_model_that_trains_something(bert):
    with pytest.raises(ValueError, match="BertForSequenceClassification has no PST layer, or nothing in it trains"):
        create_pst_optimizer(bert())
    with pytest.raises(ValueError, match="has no PST layer, or nothing in it trains"):
        create_pst_optimizer(get_peft_model(bert(), PSTConfig()).requires_grad_(False))
