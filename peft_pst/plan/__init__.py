"""plan: parameters, memory and files of a training, from the config of a model alone."""

from .planning import Memory, Plan, Training, plan, plan_rows

__all__ = ["Memory", "Plan", "Training", "plan", "plan_rows"]
