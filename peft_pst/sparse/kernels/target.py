"""What the processor offers: how wide its vectors are, and which instructions the kernels may count on."""

from __future__ import annotations

from numba.core.registry import cpu_target

_TRIPLE, _NAME, _FEATURES = cpu_target.target_context.codegen().magic_tuple()
FEATURES = frozenset(feature[1:] for feature in _FEATURES.split(",") if feature.startswith("+"))

LANES = 16 if "avx512f" in FEATURES else 8 if "avx2" in FEATURES else 4
"""Floats in a vector register."""
REGISTERS = 16 if LANES == 8 else 32
"""Vector registers: 32 with AVX-512 and NEON, 16 with AVX2."""
HAS_HALF = "avx512fp16" in FEATURES
"""Whether 32 products in fp16 are one instruction."""
CONVERTS_HALF = bool({"f16c", "avx512f"} & FEATURES) or _TRIPLE.startswith(("aarch64", "arm64"))
"""Whether fp16 becomes fp32 in one instruction. LLVM would call a function that is nowhere to be found."""
HAS_BITMASK = {"avx512vbmi2", "avx512bw", "avx512vnni"} <= FEATURES
"""Whether bytes are spread over the places that a bitmask names, and multiplied, in one instruction each."""
HAS_LOOKUP = {"avx512bw", "avx512vl"} <= FEATURES
"""Whether one instruction looks sixteen floats up in two registers, and one loads some bytes of a vector."""

WIDTHS = tuple(width for width in (1, 4, 8, 16, 32, 64) if width <= 4 * LANES)
"""How many tokens a panel may hold: one, part of a vector, or up to four vectors."""
WIDEST = WIDTHS[-1]
