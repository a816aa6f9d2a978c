"""The planner: candidates are estimated for the machine, or measured and remembered, and the best is chosen."""

from lensor.planner.choose import choose, measure
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
