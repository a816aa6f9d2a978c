"""Simplification: applies rules until none applies, and traces the rules that fired."""

from lensor.simplification.engine import PHASES, Rule, simplify

__all__ = ["PHASES", "Rule", "simplify"]
