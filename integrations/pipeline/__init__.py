"""A transformers model in stages on several processes, with `torch.distributed.pipelining`, and the plan for more."""

from .balance import balance
from .cost import Cost, Costs, measure_costs
from .pipeline import Pipeline
from .simulator import Link, Simulation, simulate
from .watch import StageError

__all__ = ["Cost", "Costs", "Link", "Pipeline", "Simulation", "StageError", "balance", "measure_costs", "simulate"]
