"""Lowering of simplified networks to plans: each strategy is a list of stages that modify a shared state."""

from lensor.lowering.alternatives import (
    all_divided,
    candidates,
    compare_paths,
    divided,
    divisions,
    parted,
    parts_at,
    whole,
)
from lensor.lowering.assemble import first_parts, joined, lower, lower_in_parts
from lensor.lowering.slicing import Parts, Slices, axis_of, parts_of, sliceable, summed_by_all
from lensor.lowering.strategies import BY_NAME, FUSED, STRATEGIES, Strategy

__all__ = [
    "BY_NAME",
    "FUSED",
    "STRATEGIES",
    "Parts",
    "Slices",
    "Strategy",
    "all_divided",
    "axis_of",
    "candidates",
    "compare_paths",
    "divided",
    "divisions",
    "first_parts",
    "joined",
    "lower",
    "lower_in_parts",
    "parted",
    "parts_at",
    "parts_of",
    "sliceable",
    "summed_by_all",
    "whole",
]
