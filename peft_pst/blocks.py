"""Where the blocks of a model are. A block is an entry of an `nn.ModuleList`, as transformers builds its models."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def block_lists(modules: Mapping[str, nn.Module]) -> list[str]:
    """The names of the lists among the modules, each with a dot at its end."""
    return [f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList)]


def outermost(name: str, lists: list[str]) -> str | None:
    """The outermost of the lists that a module lies in; None if it lies in none."""
    return min((prefix for prefix in lists if name.startswith(prefix)), key=len, default=None)
