import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_pst import Distillation, DistillationConfig, compress
from peft_pst.losses import last_hidden_state_loss, make_projection, select_channels

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TOKENS = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
"""Of two texts the tokens that are not padding."""


@pytest.fixture
def teacher():
    return LlamaForCausalLM(LlamaConfig(vocab_size=99, initializer_range=0.2, **SIZES))


@pytest.fixture
def inputs():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    ids = torch.arange(8).view(2, 4) * 11 + 3
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def states(model, inputs):
    """The last hidden states, float64."""
    kept = {name: value for name, value in inputs.items() if name != "labels"}
    return model.eval()(**kept, output_hidden_states=True).hidden_states[-1].double()


def losses(student, teacher, inputs, **choices):
    config = DistillationConfig(teacher, logits=0, last_hidden_state=1, **choices)
    distillation = Distillation(student, config)
    output = student.eval()(**distillation.request(inputs))
    return distillation, distillation.losses(inputs, output, distillation.teach(inputs))["last_hidden_state"]


def test_kept_channels_by_hand(teacher, inputs):
    """1/2 · sum of squares over the channels that the student kept, the mean over tokens."""
    student = compress(teacher, num_layers=2, head_dim=6, channels="random", seed=3)
    channels = student.config.compression["channels"]
    assert len(channels) == 24 and channels != list(range(24))
    own, expected = states(student, inputs), states(teacher, inputs)
    squares = [
        0.5 * sum((own[t][j] - expected[t][channel]) ** 2 for j, channel in enumerate(channels)) for t in TOKENS
    ]
    _, found = losses(student, teacher, inputs)
    assert float(found.detach()) == pytest.approx(float(sum(squares).detach()) / 6, rel=1e-5)
    gradient = torch.autograd.grad(found, student.model.norm.weight, retain_graph=True)[0]
    written_out = torch.autograd.grad(sum(squares) / 6, student.model.norm.weight)[0]
    torch.testing.assert_close(gradient, written_out, rtol=1e-4, atol=1e-6)


def test_fewer_layers_keep_all_channels(teacher, inputs):
    student = compress(teacher, num_layers=2)
    _, found = losses(student, teacher, inputs)
    own, expected = states(student, inputs), states(teacher, inputs)
    written_out = sum(0.5 * ((own[t] - expected[t]) ** 2).sum() for t in TOKENS) / 6
    assert float(found.detach()) == pytest.approx(float(written_out.detach()), rel=1e-5)


def test_a_projection_by_hand(teacher, inputs):
    """1/2 · ||P s - t||² over all channels of the teacher."""
    student = compress(teacher, num_layers=2, head_dim=6)
    distillation, _ = losses(student, teacher, inputs, projection=True)
    weight = distillation.projection.weight
    assert weight.shape == (32, 24) and weight.dtype == torch.float32 and distillation.projection.bias is None
    torch.nn.init.normal_(weight)
    output = student(**distillation.request(inputs))
    found = distillation.losses(inputs, output, distillation.teach(inputs))["last_hidden_state"]
    own, expected, matrix = states(student, inputs), states(teacher, inputs), weight.double()
    written_out = sum(0.5 * ((matrix @ own[t] - expected[t]) ** 2).sum() for t in TOKENS) / 6
    assert float(found.detach()) == pytest.approx(float(written_out.detach()), rel=1e-5)
    parameters = (weight, student.model.norm.weight)
    gradients = torch.autograd.grad(found, parameters), torch.autograd.grad(written_out, parameters)
    for gradient, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)
    assert weight not in set(student.parameters())


def test_a_projection_starts_as_the_identity_on_kept_channels(teacher, inputs):
    student = compress(teacher, num_layers=2, head_dim=6, channels="random", seed=1)
    channels = student.config.compression["channels"]
    others = [channel for channel in range(32) if channel not in channels]
    _, kept = losses(student, teacher, inputs)
    distillation, projected = losses(student, teacher, inputs, projection=True)
    rest = sum(0.5 * (states(teacher, inputs)[t][others] ** 2).sum() for t in TOKENS) / 6
    assert float(projected.detach()) == pytest.approx(float((kept + rest).detach()), rel=1e-5)
    assert torch.equal(distillation.projection.weight[channels], torch.eye(24))


def test_other_starts_of_a_projection():
    before = torch.get_rng_state()
    first, second = make_projection(24, 32, None), make_projection(24, 32, None)
    assert torch.equal(first.weight, second.weight) and torch.equal(torch.get_rng_state(), before)
    assert float(first.weight.detach().std()) == pytest.approx(24**-0.5, rel=0.1)
    # a student that PST prunes after compression, with its dense self as the teacher
    assert torch.equal(make_projection(24, 24, None).weight, torch.eye(24))


def test_a_compressed_teacher_of_the_same_width(teacher, inputs):
    student = compress(teacher, num_layers=2, head_dim=6)
    same = compress(teacher, num_layers=3, head_dim=6)
    _, found = losses(student, same, inputs)
    own, expected = states(student, inputs), states(same, inputs)
    written_out = sum(0.5 * ((own[t] - expected[t]) ** 2).sum() for t in TOKENS) / 6
    assert float(found.detach()) == pytest.approx(float(written_out.detach()), rel=1e-5)


def test_refused(teacher, inputs):
    stranger = LlamaForCausalLM(LlamaConfig(vocab_size=99, **{**SIZES, "hidden_size": 24}))
    with pytest.raises(ValueError, match="have 24 channels, the teacher's 32, and the student's config does not say"):
        losses(stranger, teacher, inputs)
    assert losses(stranger, teacher, inputs, projection=True)[1] > 0
    with pytest.raises(ValueError, match=r"use DistillationConfig\(projection=True\)"):
        select_channels(torch.zeros(2, 32), 3, None)
    middle = compress(teacher, head_dim=6)
    student = compress(middle, head_dim=4)
    assert losses(student, teacher, inputs)[1] > 0
    with pytest.raises(ValueError, match="have 16 channels, the teacher's 24, and the student's config does not say"):
        losses(student, middle, inputs)
    with pytest.raises(ValueError, match="expected a teacher of the same width"):
        last_hidden_state_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="projection=True is of the last hidden state: give last_hidden_state a wei"):
        DistillationConfig(teacher, projection=True)
