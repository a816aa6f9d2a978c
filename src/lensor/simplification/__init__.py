"""Simplification: apply rules until none applies, and record the rules that fired."""

from lensor.simplification.engine import PHASES, Rule, simplify

__all__ = ["PHASES", "Rule", "simplify"]
