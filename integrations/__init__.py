"""Where the ecosystem is met. Nothing in `peft_pst` imports from here."""

from .trainer import PSTCallback

__all__ = ["PSTCallback"]
