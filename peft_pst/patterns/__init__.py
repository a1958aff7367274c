"""Which masks are allowed, the exact selection under a budget, and masks as bits."""

from .bits import pack_bits, unpack_bits
from .selection import keep_largest
from .shapes import COUPLED, GroupsOf, Pattern, Slices, Units, parse_pattern

__all__ = [
    "COUPLED",
    "GroupsOf",
    "Pattern",
    "Slices",
    "Units",
    "keep_largest",
    "pack_bits",
    "parse_pattern",
    "unpack_bits",
]
