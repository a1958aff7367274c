"""Parameter-efficient sparse training (PST, arXiv 2205.11005) as a PEFT method.

Importing this package registers PST with PEFT: from then on `get_peft_model`, `PeftModel.from_pretrained` and
transformers' `load_adapter` understand `PSTConfig` and the adapters that it made.
"""

from .bench import Bench, bench, plot_bench
from .calibration import calibrate
from .config import PSTConfig
from .distillation import Distillation, DistillationConfig
from .layer import PSTLayer
from .model import PSTModel
from .opening import open_model
from .optimizer import create_pst_optimizer
from .plan import plan
from .registration import register
from .report import (
    Report,
    TensorSparsity,
    format_table,
    plot_depth,
    plot_flips,
    plot_masks,
    plot_scores,
    plot_sparsity,
    report,
    tensor_sparsity,
)
from .schedule import SparsityScheduler
from .sparse.acceleration import accelerate_sparse
from .sparse.checkpoint import save_pretrained
from .sparse.linear import SparseLinear
from .sparse.quantizer import densify
from .sparse.quantizer import register as register_checkpoint
from .sparse.verify import verify
from .structured.compress import compress
from .structured.shrink import shrink

__version__ = "0.1.0"

__all__ = [
    "Bench",
    "Distillation",
    "DistillationConfig",
    "PSTConfig",
    "PSTLayer",
    "PSTModel",
    "Report",
    "SparseLinear",
    "SparsityScheduler",
    "TensorSparsity",
    "accelerate_sparse",
    "bench",
    "calibrate",
    "compress",
    "create_pst_optimizer",
    "densify",
    "format_table",
    "open_model",
    "plan",
    "plot_bench",
    "plot_depth",
    "plot_flips",
    "plot_masks",
    "plot_scores",
    "plot_sparsity",
    "report",
    "save_pretrained",
    "shrink",
    "tensor_sparsity",
    "verify",
]

register()
register_checkpoint()
