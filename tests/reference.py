"""PST as the paper writes it, with everything left to autograd: the truth that the tests compare with."""

import torch
import torch.nn.functional as F

FACTORS = ("pst_U", "pst_V", "pst_A", "pst_B", "pst_R", "pst_C")


def plain_importance(weight, U, V, A, B, R, C, beta=1.0, alpha1=1.0, alpha2=1.0):
    updated = weight + beta * (U @ V)
    return updated, updated.abs() + alpha1 * (A @ B) + alpha2 * (R[:, None] + C[None, :])


def plain_mask(importance, num_pruned):
    """The first `num_pruned` entries of a stable sort are pruned: ties go in row-major order."""
    mask = torch.ones(importance.numel(), dtype=importance.dtype)
    mask[torch.argsort(importance.detach().flatten(), stable=True)[:num_pruned]] = 0
    return mask.view_as(importance)


def plain_pst(x, bias, num_pruned, weight, *factors_and_scales):
    updated, importance = plain_importance(weight, *factors_and_scales)
    straight_through = plain_mask(importance, num_pruned) + (importance - importance.detach())
    return F.linear(x, straight_through * updated, bias)


def random_factors(n, k, r=3, mask_r=2, dtype=torch.float64, integers=False):
    """U, V, A, B, R, C; as small integers the arithmetic is exact, and importances tie."""
    shapes = ((n, r), (r, k), (n, mask_r), (mask_r, k), (n,), (k,))
    if integers:
        return [torch.randint(-1, 2, shape).to(dtype) for shape in shapes]
    scales = (1, 0.1, 1, 0.1, 0.1, 0.1)
    return [scale * torch.randn(shape, dtype=dtype) for shape, scale in zip(shapes, scales, strict=True)]


def slow_units(pattern, importance):
    """The units of a weight as the pattern's definition reads, in order, in plain Python: what a unit costs, and the
    entries that it loses."""
    n, k = importance.shape
    values = importance.tolist()
    units = []
    if ":" in pattern and not pattern.startswith("block"):
        kept, size = map(int, pattern.split(":"))
        for i in range(n):
            for start in range(0, k, size):
                group = sorted((values[i][j], j) for j in range(start, start + size))[: size - kept]
                units.append((sum(value for value, _ in group), [(i, j) for _, j in group]))
        return units
    rows, columns = {"unstructured": (1, 1), "row": (1, k), "column": (n, 1)}.get(pattern) or map(
        int, pattern.removeprefix("block:").split("x")
    )
    for i in range(0, n, rows):
        for j in range(0, k, columns):
            entries = [(a, b) for a in range(i, i + rows) for b in range(j, j + columns)]
            units.append((sum(values[a][b] for a, b in entries), entries))
    return units


def plain_step(importance, update, num_pruned, x, bias, weight, arguments, seed=None, straight_through=False):
    """One masked linear layer by the formulas of each method, everything else left to autograd."""
    weight, score = plain_weight_and_score(importance, update, weight, arguments)
    mask = plain_mask(score, num_pruned)
    if importance == "l0":
        gate = plain_hard_concrete(score, seed)
        gates = mask * gate.detach() + (gate - gate.detach())
    else:
        gates = mask + (score - score.detach())
    if straight_through:  # the rest of the weight learns too, and adds nothing
        hidden = (1 - mask) * (gate if importance == "l0" else 1.0)
        weight = gates * weight + hidden.detach() * (weight - weight.detach())
        return F.linear(x, weight, bias)
    return F.linear(x, gates * weight, bias)


def plain_weight_and_score(importance, update, weight, arguments):
    """W' and S from the arguments of the update, then those of the importance; for wanda the norms of the inputs."""
    arguments = list(arguments)
    if update == "low_rank":
        weight = weight + arguments.pop(0) @ arguments.pop(0)
    if update == "full":
        weight = weight + arguments.pop(0)
    score = {
        "pst": lambda A, B, R, C: weight.abs() + A @ B + R[:, None] + C[None],
        "magnitude": lambda: weight.abs().detach(),
        "movement": lambda S: S,
        "soft_movement": lambda S: S,
        "l0": lambda log_alpha: log_alpha,
        "wanda": lambda norm: (weight.abs() * norm).detach(),
    }[importance](*arguments)
    return weight, score


def plain_hard_concrete(log_alpha, seed=None):
    """Louizos et al., equations 10 to 12, and 13 without a seed."""
    if seed is None:
        s = torch.sigmoid(log_alpha)
    else:
        u = torch.rand(log_alpha.shape, generator=torch.Generator().manual_seed(seed), dtype=log_alpha.dtype)
        s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha) / (2 / 3))
    return torch.clamp(s * 1.2 - 0.1, 0, 1)


def sparse_tensor(shape, sparsity, dtype=torch.float32):
    tensor = torch.randn(shape) if dtype.is_floating_point else torch.randint(-127, 128, shape)
    return tensor.to(dtype).masked_fill(torch.rand(shape) < sparsity, 0)


def random_two_of_four(shape, dtype=torch.float32):
    tensor = torch.randn(shape)
    keep = torch.rand(shape).view(-1, 4).argsort(1).argsort(1) < 2
    return tensor.masked_fill(~keep.view(shape), 0).to(dtype)


def same_bits(a, b):
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
