"""Lowering of simplified networks to plans: each strategy is a list of stages that modify a shared state."""

from lensor.lowering.alternatives import candidates, compare_paths, divided, divisions, whole
from lensor.lowering.assemble import lower, lower_in_parts
from lensor.lowering.slicing import axis_of, parts_of, sliceable
from lensor.lowering.strategies import BY_NAME, STRATEGIES, Strategy

__all__ = [
    "BY_NAME",
    "STRATEGIES",
    "Strategy",
    "axis_of",
    "candidates",
    "compare_paths",
    "divided",
    "divisions",
    "lower",
    "lower_in_parts",
    "parts_of",
    "sliceable",
    "whole",
]
