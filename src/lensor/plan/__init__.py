"""Plans: sequences of steps, the memory layout of their values, and contraction paths."""

from lensor.plan.plan import Candidate, Considered, Plan
from lensor.plan.program import Program

__all__ = ["Candidate", "Considered", "Plan", "Program"]
