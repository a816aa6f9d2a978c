"""The planner: estimates or measures candidates for the machine, remembers the times, and chooses the best."""

from lensor.planner.choice import choose, measure
from lensor.planner.cost import estimate
from lensor.planner.profile import Machine, calibrate, machine, processor
from lensor.planner.settings import Settings, current, planning, preferring, untimed

__all__ = [
    "Machine",
    "Settings",
    "calibrate",
    "choose",
    "current",
    "estimate",
    "machine",
    "measure",
    "planning",
    "preferring",
    "processor",
    "untimed",
]
