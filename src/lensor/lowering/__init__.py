"""Lowering of simplified networks to plans: each strategy is a list of stages that modify a shared state."""

from lensor.lowering.alternatives import all_divided, candidates, compare_paths, divided, divisions, parted, whole
from lensor.lowering.assemble import lower, lower_in_parts
from lensor.lowering.slicing import Parts, axis_of, parts_of, sliceable
from lensor.lowering.strategies import BY_NAME, STRATEGIES, Strategy

__all__ = [
    "BY_NAME",
    "STRATEGIES",
    "Parts",
    "Strategy",
    "all_divided",
    "axis_of",
    "candidates",
    "compare_paths",
    "divided",
    "divisions",
    "lower",
    "lower_in_parts",
    "parted",
    "parts_of",
    "sliceable",
    "whole",
]
