import pytest
import torch

from peft_pst import gemm


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [None, 7])
def test_linear_is_the_product(monkeypatch, onednn, dtype, transposed, bias):
    monkeypatch.setattr(gemm, "prefers_onednn", lambda: onednn and torch.backends.mkldnn.is_available())
    x, weight = torch.randn(5, 11, dtype=dtype), torch.randn(7, 11, dtype=dtype)
    bias = bias and torch.randn(bias, dtype=dtype)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    if transposed:
        x, weight = x.T.contiguous().T, weight.T.contiguous().T
    y = gemm.linear(x, weight, bias)
    assert y.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
