"""The networks of a convolution's input factors, as the demo displays them."""

from __future__ import annotations

from typing import Any

import lensor
from lensor.choices import Approx
from lensor.inspect.layers import Layer
from lensor.network import Operand, Pattern


def network(layer: Layer, approx: Approx) -> Any:
    """The network of the input factor, before simplification."""
    return lensor.ops.kfac_input_factor(layer.spec, approx)


def short_form(net: lensor.Network) -> str:
    """The first copy of X, followed by one letter for each pattern attached to it: Π, or S for a crop (slice, pad).

    Example:
        >>> import lensor
        >>> from examples.demo.layers import short_form
        >>> short_form(lensor.ops.kfac_input_factor(lensor.ConvSpec(4, 8, (9,), 3)))
        'X[n (g c_in) i1] Π'
    """
    operand = next(node for node in net.nodes if isinstance(node, Operand))
    reached = {index for leg in operand.legs for index in leg}
    letters = []
    for node in net.nodes:
        if isinstance(node, Pattern) and reached.intersection(node.legs[0]):
            letters.append("S" if node.pattern.is_crop else "Π")
    legs = " ".join(f"({' '.join(leg)})" if len(leg) > 1 else (leg or ("1",))[0] for leg in operand.legs)
    return " ".join([f"X[{legs}]", *letters])
