"""Inspection of a model's convolutions: networks, simplifications and plans (`lensor convs`, `explain`, `rules`).

`catalogue` contains the convolutions of fourteen CNNs as data, `extract` and `exported` find the convolutions of your
model, and `explain` and `page` show what Lensor computes for them. torch, rich and jinja2 are imported on first use.
"""

from lensor.inspect.errors import CommandError
from lensor.inspect.layers import Layer

__all__ = ["CommandError", "Layer"]
