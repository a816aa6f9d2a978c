"""The convolutions of a model, and the network, simplification and plan of each: `lensor convs`, `explain` and `rules`.

`catalogue` has the convolutions of fourteen CNNs as data, `extract` and `exported` find those of your model, `explain`
and `page` show what Lensor does with them. torch, rich and jinja2 are imported when they are first needed.
"""

from lensor.inspect.errors import CommandError
from lensor.inspect.layers import Layer

__all__ = ["CommandError", "Layer"]
