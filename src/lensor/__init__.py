"""Lensor: convolutions and everything derived from them as tensor networks.

Importing the package loads no array framework except NumPy. torch is loaded when you first use `lensor.nn` or another
package that requires torch, or pass a tensor.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from lensor import functional, ops, wisdom
from lensor import methods as _methods  # noqa: F401  (adds the methods of networks)
from lensor.cache import clear_caches
from lensor.draw import Drawing, draw
from lensor.errors import LensorError, NetworkError, SubscriptsError
from lensor.evaluate import einsum
from lensor.network import Delta, Network, Ones, Operand, Pattern, Scale, Select, Sum, contraction, parse
from lensor.pattern import IndexPattern
from lensor.plan import Plan
from lensor.planner import Machine, calibrate, machine, planning
from lensor.simplification import simplify
from lensor.spec import ConvSpec

try:
    __version__ = version("lensor")
except PackageNotFoundError:  # the package runs from a source tree and is not installed
    __version__ = "0+unknown"


if TYPE_CHECKING:
    from lensor import curvature, distributed, nn, optim, sampling
else:

    def __getattr__(name: str) -> Any:
        if name in ("curvature", "distributed", "nn", "optim", "sampling"):
            return import_module(f"lensor.{name}")
        raise AttributeError(f"module 'lensor' has no attribute {name!r}")


__all__ = [
    "ConvSpec",
    "Delta",
    "Drawing",
    "IndexPattern",
    "LensorError",
    "Machine",
    "Network",
    "NetworkError",
    "Ones",
    "Operand",
    "Pattern",
    "Plan",
    "Scale",
    "Select",
    "SubscriptsError",
    "Sum",
    "calibrate",
    "clear_caches",
    "contraction",
    "curvature",
    "distributed",
    "draw",
    "einsum",
    "functional",
    "machine",
    "nn",
    "ops",
    "optim",
    "parse",
    "planning",
    "sampling",
    "simplify",
    "wisdom",
]
