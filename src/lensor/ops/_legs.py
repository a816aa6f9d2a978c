"""The indices of the operands of convolutions and transposed convolutions.

A transposed convolution is the input VJP of a convolution and uses the index names of this convolution: its input has
the indices (g c_out) o, and its output has the indices (g c_in) i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lensor.errors import require_type
from lensor.network import Group, Network, Node, Pattern
from lensor.spec import ConvSpec


@dataclass(frozen=True, slots=True)
class Legs:
    """Names of the channel and spatial indices of an operation's input and output."""

    spec: ConvSpec

    def __post_init__(self) -> None:
        require_type(self.spec, "spec", ConvSpec)

    @property
    def dims(self) -> range:
        """The spatial dimensions, numbered from 1."""
        return range(1, self.spec.ndim + 1)

    @property
    def channels(self) -> tuple[str, str]:
        """(channel index of the input, channel index of the output) within a group."""
        return ("c_out", "c_in") if self.spec.transposed else ("c_in", "c_out")

    @property
    def positions(self) -> tuple[list[str], list[str]]:
        """(spatial indices of the input, spatial indices of the output)."""
        inputs, outputs = [f"i{d}" for d in self.dims], [f"o{d}" for d in self.dims]
        return (outputs, inputs) if self.spec.transposed else (inputs, outputs)

    @property
    def kernel(self) -> list[str]:
        """Kernel indices."""
        return [f"k{d}" for d in self.dims]

    @property
    def input(self) -> tuple[Group, ...]:
        """Legs of X."""
        return (("n",), ("g", self.channels[0]), *single(self.positions[0]))

    @property
    def output(self) -> tuple[Group, ...]:
        """Legs of Y."""
        return (("n",), ("g", self.channels[1]), *single(self.positions[1]))

    @property
    def weight(self) -> tuple[Group, ...]:
        """Legs of W in torch's layout."""
        return (("g", "c_out"), ("c_in",), *single(self.kernel))

    @property
    def patterns(self) -> list[Node]:
        """One index pattern per spatial dimension."""
        return [
            Pattern(pattern, ((f"i{d}",), (f"o{d}",), (f"k{d}",)))
            for d, pattern in zip(self.dims, self.spec.patterns, strict=True)
        ]

    @property
    def sizes(self) -> dict[str, int | None]:
        """The sizes of all indices; the size of the batch index n is not yet known."""
        spec = self.spec
        sizes: dict[str, int | None] = {"n": None, "g": spec.groups}
        sizes[self.channels[0]] = spec.in_channels // spec.groups
        sizes[self.channels[1]] = spec.out_channels // spec.groups
        for d, pattern in zip(self.dims, spec.patterns, strict=True):
            sizes[f"i{d}"], sizes[f"o{d}"] = pattern.input_size, pattern.output_size
            sizes[f"k{d}"] = pattern.kernel_size
        return sizes

    def network(self, nodes: Sequence[Node], output: Sequence[Group]) -> Network:
        """Create a network with these indices."""
        return Network.make(nodes, output, self.sizes)


def single(indices: Sequence[str]) -> list[Group]:
    """One leg per index."""
    return [(index,) for index in indices]
