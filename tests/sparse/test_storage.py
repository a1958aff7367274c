import json

import pytest
import torch
from reference import same_bits, sparse_tensor

from peft_pst.sparse.storage import Description, decode, encode


def size(parts):
    return sum(part.numel() * part.element_size() for part in parts.values())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(16, 24), (7,), (), (3, 4, 5), (0, 3)])
def test_exact_values_come_back_bit_for_bit(dtype, shape):
    tensor = sparse_tensor(shape, 0.7, torch.float32).to(dtype)
    description, parts = encode(tensor)
    again = decode(Description(*json.loads(json.dumps(description))), parts)
    assert again.shape == tensor.shape and same_bits(again.to(dtype), tensor) and again.dtype == dtype


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_values_are_stored_in_the_smallest_dtype_that_holds_them(stored):
    tensor = sparse_tensor((64, 64), 0.9).to(stored).float()
    description, parts = encode(tensor)
    assert parts["values"].dtype == stored and description.dtype == "float32"
    assert same_bits(decode(description, parts), tensor)
    tensor[0, 0] = 1 + 2**-20  # now one value needs them all
    description, parts = encode(tensor)
    assert parts["values"].dtype == torch.float32 and same_bits(decode(description, parts), tensor)


def test_what_only_looks_equal_is_not_narrowed():
    tensor = torch.zeros(64, 64)
    tensor[0, 0], tensor[1, 1] = -0.0, float("nan")
    assert same_bits(decode(*encode(tensor)), tensor)


@pytest.mark.parametrize(("values", "error"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_rounded_values_are_those_of_the_cast(values, error):
    tensor = sparse_tensor((32, 64), 0.9)
    description, parts = encode(tensor, values)
    again = decode(description, parts)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again, tensor, rtol=error, atol=1e-7)
    assert size(parts) < size(encode(tensor)[1])


@pytest.mark.parametrize("shape", [(32, 64), (32, 3, 8), (64,), ()])
def test_int8_rounds_by_row(shape):
    tensor = sparse_tensor(shape, 0.8) * torch.logspace(-3, 3, shape[0] if shape else 1).view(
        -1, *[1] * (len(shape) - 1)
    )
    tensor = tensor.reshape(shape)
    description, parts = encode(tensor, "int8")
    again = decode(description, parts)
    rows = tensor.reshape(shape[0] if len(shape) > 1 else 1, -1)
    step = rows.abs().amax(1, keepdim=True) / 127
    assert ((again.reshape(rows.shape) - rows).abs() <= step / 2 + 1e-12).all()
    assert parts["values"].dtype == torch.int8 and (again[tensor == 0] == 0).all()
    if len(shape) == 2:
        assert size(parts) < 0.5 * size(encode(tensor)[1])


def test_integers_are_never_rounded():
    tensor = torch.tensor([1, 0, 0, 70000])
    for values in ("bf16", "fp16", "int8"):
        assert torch.equal(decode(*encode(tensor, values)), tensor)


def test_what_would_be_lost_is_an_error():
    tensor = torch.tensor([[1.0, 1e6]])
    with pytest.raises(ValueError, match="values='fp16' turns 1 values into infinities, the largest of them 1e\\+06"):
        encode(tensor, "fp16")
    with pytest.raises(ValueError, match="values='int8' cannot hold NaN or infinity"):
        encode(torch.tensor([[1.0, float("nan")]]), "int8")
    with pytest.raises(ValueError, match="values='int4' is unknown: expected one of"):
        encode(tensor, "int4")
