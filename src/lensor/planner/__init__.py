"""The planner, which estimates or measures candidate plans, stores measured times, and chooses the best plan."""

from lensor.planner.calibration import calibrate, machine, profile_of
from lensor.planner.choice import choose, choose_resizable, measure
from lensor.planner.cost import estimate
from lensor.planner.profile import Machine, Speed, Speeds, processor
from lensor.planner.settings import Settings, current, planning, preferring, untimed

__all__ = [
    "Machine",
    "Settings",
    "Speed",
    "Speeds",
    "calibrate",
    "choose",
    "choose_resizable",
    "current",
    "estimate",
    "machine",
    "measure",
    "planning",
    "preferring",
    "processor",
    "profile_of",
    "untimed",
]
