"""Measuring: the convolutions of known CNNs, the ways to compute what Lensor computes, and their times side by side.

`catalogue` holds every convolution of fourteen CNNs as data, `extract` finds those of any torch model, `run` measures
operations × convolutions × implementations into a results file, `report` turns that into tables and plots.
`conformance` asks libraries (`libraries`) for what `definitions` defines, under every hyper-parameter. Nothing here is
imported by the library itself; torch, rich and matplotlib are loaded when they are first needed.
"""

from lensor.inspect.errors import CommandError
from lensor.inspect.layers import Layer

__all__ = ["CommandError", "Layer"]
