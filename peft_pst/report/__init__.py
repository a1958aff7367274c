"""What a model's sparsity is, what it costs, and what it does: as tables, as JSON, as figures."""

from .behaviour import Fidelity, Robustness, fidelity, robustness
from .energy import Energy, measured
from .figures import plot_depth, plot_flips, plot_masks, plot_scores, plot_sparsity
from .report import Cost, LayerReport, Report, report
from .sparsity import TensorSparsity, layer_type, tensor_sparsity
from .tables import format_table

__all__ = [
    "Cost",
    "Energy",
    "Fidelity",
    "LayerReport",
    "Report",
    "Robustness",
    "TensorSparsity",
    "fidelity",
    "format_table",
    "layer_type",
    "measured",
    "plot_depth",
    "plot_flips",
    "plot_masks",
    "plot_scores",
    "plot_sparsity",
    "report",
    "robustness",
    "tensor_sparsity",
]
