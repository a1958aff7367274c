"""What a model's predictions cost in energy and CO2, where codecarbon is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from .behaviour import logits
from .tables import format_table


@dataclasses.dataclass(frozen=True)
class Energy:
    """What reading `texts` took, by codecarbon's account of processor and memory of this machine."""

    texts: int
    watt_hours: float
    grams_of_co2: float
    country: str
    processor: str

    def table(self) -> str:
        """Its numbers."""
        header = ("texts", "Wh", f"g CO2 ({self.country})", "processor")
        row = (f"{self.texts:,}", f"{self.watt_hours:.3g}", f"{self.grams_of_co2:.3g}", self.processor)
        return format_table(header, [row])


def measured(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], country: str
) -> Energy | None:
    """The energy of one pass over texts; None where codecarbon is not installed.

    Args:
        country: where the electricity comes from, an ISO code of three letters.
    """
    if importlib.util.find_spec("codecarbon") is None:
        return None
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").setLevel(logging.ERROR)  # it speaks before it heeds log_level
    tracker = OfflineEmissionsTracker(
        country_iso_code=country, save_to_file=False, log_level="error", allow_multiple_runs=True
    )
    tracker.start()
    for _ in logits(model, tokenizer, texts, "energy"):
        pass
    tracker.stop()
    found = tracker.final_emissions_data
    return Energy(len(texts), 1e3 * found.energy_consumed, 1e3 * found.emissions, found.country_name, found.cpu_model)
