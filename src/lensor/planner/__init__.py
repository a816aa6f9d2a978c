"""The planner, which estimates or measures candidate plans, stores measured times, and chooses the best plan."""

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
