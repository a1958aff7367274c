"""Where the ecosystem is met. Nothing in `peft_pst` imports from here."""

from .cards import model_card
from .distilling import DistillingTrainer
from .hub import push_to_hub
from .trainer import PSTCallback, PSTTrainer

__all__ = ["DistillingTrainer", "PSTCallback", "PSTTrainer", "model_card", "push_to_hub"]
