import torch
from reference import plain_importance, random_factors

from peft_pst.importance import effective_weight, pst_importance, pst_importance_grads


def test_importance_and_its_gradients_are_the_formula():
    weight = torch.randn(7, 11, dtype=torch.float64)
    factors = [factor.requires_grad_() for factor in random_factors(7, 11)]
    updated, importance = plain_importance(weight, *factors, 0.7, 1.3, 0.4)
    U, V, A, B, R, C = (factor.detach() for factor in factors)
    torch.testing.assert_close(effective_weight(weight, U, V, 0.7), updated.detach(), rtol=1e-13, atol=1e-13)
    mine = pst_importance(updated.detach(), A, B, R, C, 1.3, 0.4)
    torch.testing.assert_close(mine, importance.detach(), rtol=1e-13, atol=1e-13)

    grad = torch.randn_like(importance)
    expected = torch.autograd.grad(importance, factors[2:], grad)
    for mine, plain in zip(pst_importance_grads(grad, A, B, 1.3, 0.4), expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)


def test_the_weight_is_computed_in_the_dtype_of_the_factors():
    U, V, *_ = random_factors(4, 6, dtype=torch.float32)
    assert effective_weight(torch.randn(4, 6, dtype=torch.bfloat16), U, V, 1.0).dtype == torch.float32
