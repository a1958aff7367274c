import pytest
import torch
from peft import get_peft_model

from peft_pst import PSTConfig, create_pst_optimizer
from peft_pst.layer import FACTORS


def test_factors_and_head_have_learning_rates_of_their_own(bert):
    model = get_peft_model(bert(), PSTConfig(task_type="SEQ_CLS", bias="pst_only"))
    optimizer = create_pst_optimizer(model, torch.optim.SGD, lr=0.25, head_lr=0.5, momentum=0.9)
    names = {id(p): name for name, p in model.named_parameters()}
    lr = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert set(lr) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, value in lr.items():
        assert value == (0.25 if name.split(".")[-2] in FACTORS else 0.5), name
    assert {0.25, 0.5} == set(lr.values()) and all(group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_needs_a_model_that_trains_factors(bert):
    with pytest.raises(ValueError, match="BertForSequenceClassification has no PST factor that trains"):
        create_pst_optimizer(bert())
