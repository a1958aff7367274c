"""What a teacher says a student should be: the losses of distillation, and the projection of hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(teacher / T) || softmax(student / T)), the mean over rows; 0 if there are none.

    Args:
        student: logits [rows, classes]; so is `teacher`.

    Raises:
        ValueError: if the two have different shapes.
    """
    _check_predictions(student, teacher)
    student, teacher = ((logits.float() / temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * _mean(F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1))


def bernoulli_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(sigmoid(teacher / T) || sigmoid(student / T)), the mean over rows and labels.

    Args:
        student: logits [rows, labels]; so is `teacher`.

    Raises:
        ValueError: if the two have different shapes.
    """
    _check_predictions(student, teacher)
    # a sigmoid is a softmax beside a logit of 0
    pairs = (torch.stack([logits, torch.zeros_like(logits)], -1).flatten(0, 1) for logits in (student, teacher))
    return kl_divergence(*pairs, temperature)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """(student - teacher)², the mean over rows and values.

    Args:
        student: predicted values [rows, values]; so is `teacher`.

    Raises:
        ValueError: if the two have different shapes.
    """
    _check_predictions(student, teacher)
    return _mean((student.float() - teacher.float()).square())


def _check_predictions(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's logits have the shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: "
            "expected a teacher with the same vocabulary or classes."
        )


def _mean(values: Tensor) -> Tensor:
    """0 if there are none: a batch of a step may have no label."""
    return values.sum() / max(values.numel(), 1)


def last_hidden_state_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1/2 · sum over channels of (student - teacher)², the mean over tokens  (LightChatGLM); 0 if none counts.

    Args:
        student: [..., channels]; so is `teacher`: of a wider one `select_channels` gives those that count.
        mask: bool [...], which tokens count; None for all.

    Raises:
        ValueError: if the two have different shapes.
    """
    student, teacher = _kept(student, teacher, mask)
    return 0.5 * _mean((student - teacher).square().sum(-1))


def square_head(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """mean((s - t)²) / mean(t²) of each layer's hidden states, the mean over layers  (SquareHead, arXiv 2310.06927);
    0 if no token counts.

    Args:
        student: of each layer [..., channels]; so is `teacher`.
        mask: bool [...], which tokens count; None for all.

    Raises:
        ValueError: if the two have different numbers of layers, or shapes.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"The student has {len(student)} hidden states, the teacher {len(teacher)}: expected a teacher of as many "
            "layers."
        )
    losses = []
    for own, expected in zip(student, teacher, strict=True):
        own, expected = _kept(own, expected, mask)
        losses.append(_mean((own - expected).square()) / _mean(expected.square()).clamp_min(1e-12))
    return torch.stack(losses).mean()


def _kept(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ValueError(
            f"A hidden state of the student has the shape {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}: expected a teacher of the same width."
        )
    student, teacher = student.float(), teacher.float()
    return (student, teacher) if mask is None else (student[mask], teacher[mask])


def select_channels(teacher: Tensor, width: int, channels: Sequence[int] | None) -> Tensor:
    """The teacher's state at the channels that a narrower student kept; itself if that is as wide.

    Args:
        teacher: [..., channels].
        width: that of the student.
        channels: which of the teacher's it kept, ascending; None if that is not known.

    Raises:
        ValueError: if it is not known.
    """
    if teacher.shape[-1] == width:
        return teacher
    if channels is None:
        raise ValueError(
            f"The hidden states of the student have {width} channels, the teacher's {teacher.shape[-1]}, and the "
            "student's config does not say which of these it kept: expected a model that peft_pst.compress made of "
            "this teacher, or a teacher of the same width; or use DistillationConfig(projection=True)."
        )
    return teacher[..., torch.as_tensor(channels, device=teacher.device)]


def make_projection(student_width: int, teacher_width: int, channels: Sequence[int] | None) -> nn.Linear:
    """A linear layer, fp32 and without bias, from the channels of the student to those of the teacher. It starts as
    the identity on those that the student kept, and with 0 for the others.

    Args:
        channels: which of the teacher's a narrower student kept. None if that is not known: it starts at random then,
            always the same.
    """
    projection = nn.utils.skip_init(nn.Linear, student_width, teacher_width, bias=False, dtype=torch.float32)
    if student_width == teacher_width:
        channels = range(student_width)
    with torch.no_grad():
        if channels is None:
            start = torch.randn(teacher_width, student_width, generator=torch.Generator().manual_seed(0))
            projection.weight.copy_(start / student_width**0.5)
        else:
            projection.weight.zero_()
            projection.weight[list(channels), range(student_width)] = 1
    return projection
