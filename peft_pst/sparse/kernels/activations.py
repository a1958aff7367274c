"""The activations of a feed-forward block, on vectors of fp32."""

from __future__ import annotations

import math
from collections.abc import Callable

from llvmlite import ir

from .emit import I32, fma

LOG2E = math.log2(math.e)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
"""ln 2 in two parts, the first exact in 9 bits (Cody and Waite)."""
LOWEST, HIGHEST = -87.0, 88.0
"""Between them e^x is a normal fp32 number."""
ERF_LIMIT = 3.921875
"""From here on erf(x) is 1 in fp32."""
ERF_NUMERATOR = [
    1.1283791065216064,
    0.18996334075927734,
    0.052690278738737106,
    0.0037468934897333384,
    0.0002845127892214805,
    2.054016704278183e-06,
]
ERF_DENOMINATOR = [
    1.0,
    0.5016834139823914,
    0.11392616480588913,
    0.014931370504200459,
    0.001158109400421381,
    3.8113394111860543e-05,
]


def constant(like: ir.Value, value: float) -> ir.Constant:
    """A vector with a number in every lane."""
    return ir.Constant(like.type, [value] * like.type.count)


def clamp(builder: ir.IRBuilder, x: ir.Value, low: float, high: float) -> ir.Value:
    """x between two bounds; a NaN stays one."""
    low, high = constant(x, low), constant(x, high)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    return builder.select(builder.fcmp_ordered(">", x, high), high, x)


def polynomial(builder: ir.IRBuilder, x: ir.Value, coefficients: list[float]) -> ir.Value:
    """c₀ + c₁ x + c₂ x² + … by Horner's rule."""
    total = constant(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = fma(builder, total, x, constant(x, coefficient))
    return total


def exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x = 2ⁿ e^r with |r| <= ln 2 / 2, of x between `LOWEST` and `HIGHEST`, by the Taylor polynomial of degree 7."""
    x = clamp(builder, x, LOWEST, HIGHEST)
    integers = ir.VectorType(I32, x.type.count)
    shifted = fma(builder, x, constant(x, LOG2E), constant(x, 1.5 * 2**23))  # rounds to an integer in the low bits
    n = builder.fsub(shifted, constant(x, 1.5 * 2**23))
    r = fma(builder, n, constant(x, -LN2_HIGH), x)
    r = fma(builder, n, constant(x, -LN2_LOW), r)
    power = polynomial(builder, r, [1 / math.factorial(i) for i in range(8)])
    exponent = builder.shl(builder.bitcast(shifted, integers), ir.Constant(integers, [23] * x.type.count))
    return builder.bitcast(builder.add(builder.bitcast(power, integers), exponent), x.type)


def sigmoid(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """1 / (1 + e^-x), 0 from where it is no normal number: times an infinity that is a NaN, as it is in torch."""
    one = constant(x, 1.0)
    value = builder.fdiv(one, builder.fadd(one, exp(builder, builder.fneg(x))))
    return builder.select(builder.fcmp_ordered("<", x, constant(x, -HIGHEST)), constant(x, 0.0), value)


def erf(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The error function within 4e-7: x P(x²) / Q(x²), fitted by least squares of the relative error."""
    x = clamp(builder, x, -ERF_LIMIT, ERF_LIMIT)
    square = builder.fmul(x, x)
    numerator = builder.fmul(x, polynomial(builder, square, ERF_NUMERATOR))
    value = builder.fdiv(numerator, polynomial(builder, square, ERF_DENOMINATOR))
    for limit, end in ((-ERF_LIMIT, -1.0), (ERF_LIMIT, 1.0)):
        reached = builder.fcmp_ordered("==", x, constant(x, limit))
        value = builder.select(reached, constant(x, end), value)
    return value


def relu(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """max(x, 0)."""
    zero = constant(x, 0.0)
    return builder.select(builder.fcmp_ordered("<", x, zero), zero, x)


def gelu(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x Φ(x)."""
    probability = erf(builder, builder.fmul(x, constant(x, math.sqrt(0.5))))
    half = constant(x, 0.5)
    return builder.fmul(x, fma(builder, probability, half, half))


def gelu_tanh(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))), which is x σ of twice the argument."""
    scale = 2 * math.sqrt(2 / math.pi)
    square = builder.fmul(x, x)
    argument = builder.fmul(x, fma(builder, square, constant(x, 0.044715 * scale), constant(x, scale)))
    return builder.fmul(x, sigmoid(builder, argument))


def silu(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x σ(x)."""
    return builder.fmul(x, sigmoid(builder, x))


def quick_gelu(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x σ(1.702 x)."""
    return builder.fmul(x, sigmoid(builder, builder.fmul(x, constant(x, 1.702))))


ACTIVATIONS: dict[str, Callable[[ir.IRBuilder, ir.Value], ir.Value]] = {
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "quick_gelu": quick_gelu,
}
"""A program names an activation by its place in this table."""
