"""Simplification: rules run to a fixpoint, with a trace of what fired."""

from lensor.simplification.engine import PHASES, Rule, simplify

__all__ = ["PHASES", "Rule", "simplify"]
