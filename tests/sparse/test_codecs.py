import pytest
import torch
from reference import random_two_of_four, same_bits, sparse_tensor

from peft_pst.sparse.codecs import CODECS, smallest_codec

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 0.99, 1])
@pytest.mark.parametrize("shape", [(16, 24), (7, 11), (3, 600), (1, 1), (5,), (0, 4)])
@pytest.mark.parametrize("name", CODECS)
def test_every_bit_comes_back(name, shape, sparsity, dtype):
    tensor = sparse_tensor(shape, sparsity, dtype)
    codec = CODECS[name]
    size = codec.size(tensor)
    if size is None:
        assert name in ("2:4", "tiles")
        return
    parts = codec.encode(tensor)
    assert sum(part.numel() * part.element_size() for part in parts.values()) == size
    assert same_bits(codec.decode(parts, tensor.shape), tensor)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("pruned", [0, 0.3])
def test_two_of_four(dtype, pruned):
    tensor = random_two_of_four((8, 32), dtype)
    tensor = tensor.masked_fill(torch.rand(8, 32) < pruned, 0)  # some groups have fewer than two
    codec = CODECS["2:4"]
    parts = codec.encode(tensor)
    assert same_bits(codec.decode(parts, tensor.shape), tensor)
    assert sum(part.numel() * part.element_size() for part in parts.values()) == codec.size(tensor)
    assert codec.size(tensor) == 8 * 32 // 8 + 8 * 32 // 2 * tensor.element_size()
    assert codec.size(torch.ones(8, 32)) is None and codec.size(tensor[:, :30]) is None


@pytest.mark.parametrize("name", CODECS)
def test_what_looks_like_zero_but_is_not_is_kept(name):
    tensor = torch.zeros(4, 8)
    tensor[0, 1], tensor[1, 0], tensor[2, 7] = -0.0, float("nan"), float("-inf")
    tensor[3, 3] = torch.finfo(torch.float32).smallest_normal / 4
    codec = CODECS[name]
    assert same_bits(codec.decode(codec.encode(tensor), tensor.shape), tensor)


@pytest.mark.parametrize("name", CODECS)
def test_the_layout_of_the_weight_does_not_matter(name):
    tensor = random_two_of_four((16, 16)).T.contiguous().T
    codec = CODECS[name]
    assert same_bits(codec.decode(codec.encode(tensor), tensor.shape), tensor)


def test_the_bytes_are_those_of_the_page():
    """By hand, as another language would read them."""
    tensor = torch.tensor([[0, 1.5, 0, 0, 0, 0, -2.0, 0], [3.0, 0, 0, 4.0, 0, 0, 0, 0]])
    bits = CODECS["bitmask"].encode(tensor)
    assert bits["bits"].tolist() == [0b01000010, 0b10010000] and bits["values"].tolist() == [1.5, -2, 3, 4]
    tiles = CODECS["tiles"].encode(tensor)
    assert tiles["counts"].tolist() == [4] and tiles["indices"].tolist() == [1, 6, 8, 11]
    packed = CODECS["2:4"].encode(tensor)
    # groups (0, 1), (0, 2), (0, 3), (0, 1): two bits each, the first lowest
    assert packed["positions"].tolist() == [0b1000_0100, 0b0100_1100]
    assert packed["values"].tolist() == [0, 1.5, 0, -2, 3, 4, 0, 0]


def test_the_smallest_is_chosen():
    assert smallest_codec(sparse_tensor((64, 256), 0)) == "dense"
    assert smallest_codec(sparse_tensor((64, 256), 0.8)) == "bitmask"
    assert smallest_codec(sparse_tensor((64, 256), 0.95)) == "tiles"
    assert smallest_codec(random_two_of_four((64, 256))) == "2:4"
    assert smallest_codec(torch.zeros(64, 256)) == "tiles"


@pytest.mark.parametrize(("sparsity", "share"), [(0.9, 0.082), (0.95, 0.04)])
def test_the_size_of_a_bf16_weight_beside_dense_fp32(sparsity, share):
    tensor = torch.randn(768, 768)
    threshold = tensor.abs().flatten().kthvalue(int(tensor.numel() * sparsity)).values
    tensor = tensor.masked_fill(tensor.abs() <= threshold, 0).bfloat16()
    assert CODECS[smallest_codec(tensor)].size(tensor) <= share * 4 * tensor.numel()


@pytest.mark.parametrize("name", CODECS)
def test_broken_parts_are_an_error_or_the_tensor(name):
    """Parts that are cut or changed never crash and never reach outside of the tensor."""
    tensor, codec = random_two_of_four((16, 32)), CODECS[name]
    for key, part in codec.encode(tensor).items():
        for cut in (0, 1, len(part) // 2, len(part) - 1):
            with pytest.raises(ValueError, match="A stored tensor is broken: .* save the checkpoint again"):
                codec.decode({**codec.encode(tensor), key: part[:cut]}, tensor.shape)
        if key == "values":
            continue
        for position in range(0, len(part), 7):
            changed = part.clone()
            changed[position] ^= 1 << (position % 8)
            try:
                decoded = codec.decode({**codec.encode(tensor), key: changed}, tensor.shape)
            except ValueError as error:
                assert "A stored tensor is broken" in str(error)
            else:
                assert decoded.shape == tensor.shape
