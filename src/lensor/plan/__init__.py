"""Plans: steps in order, how their values lie in memory, and paths of contraction."""

from lensor.plan.plan import Candidate, Plan
from lensor.plan.program import Program

__all__ = ["Candidate", "Plan", "Program"]
