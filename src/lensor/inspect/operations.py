"""The seven measured operations, with their networks and operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lensor import ops
from lensor.spec import ConvSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """An operation of a convolution.

    Args:
        name: name of the operation.
        operands: names of its operands, out of X, W, V (a cotangent) and S (columns of cotangents).
        network: function that returns the tensor network of the operation.
    """

    name: str
    operands: tuple[str, ...]
    network: Callable[[ConvSpec], Any]

    def shapes(self, spec: ConvSpec, batch: int, columns: int) -> dict[str, Shape]:
        """The shape of each operand.

        Example:
            >>> import lensor
            >>> from lensor.inspect.operations import OPERATIONS
            >>> OPERATIONS["ggn_diagonal"].shapes(lensor.ConvSpec(4, 8, (9,), 3), batch=2, columns=5)
            {'X': (2, 4, 9), 'S': (5, 2, 8, 7)}
        """
        every = {
            "X": (batch, *spec.input_shape),
            "W": spec.weight_shape,
            "V": (batch, *spec.output_shape),
            "S": (columns, batch, *spec.output_shape),
        }
        return {name: every[name] for name in self.operands}


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("forward", ("X", "W"), ops.conv),
        Operation("input_vjp", ("W", "V"), ops.conv_input_vjp),
        Operation("weight_vjp", ("X", "V"), ops.conv_weight_vjp),
        Operation("kfac_expand", ("X",), lambda spec: ops.kfac_input_factor(spec, "expand")),
        Operation("kfac_reduce", ("X",), lambda spec: ops.kfac_input_factor(spec, "reduce")),
        Operation("per_example_weight_vjp", ("X", "V"), ops.conv_weight_vjp_per_example),
        Operation("ggn_diagonal", ("X", "S"), ops.ggn_diagonal),
    )
}
"""The operations, by name; kfac_expand is also known as KFC."""

PAPER_OPERATIONS = ("forward", "input_vjp", "weight_vjp", "kfac_expand", "kfac_reduce")
"""The five operations that the paper measures."""

STANDARD = "standard"
"""The reference implementation for results and times."""

DEVICES = ("cpu", "cuda")
"""The devices of operands."""

DTYPES = ("float64", "float32", "float16", "bfloat16")
"""Dtypes of operands."""


@dataclass(frozen=True)
class Measuring:
    """The settings of `lensor explain` for plans and timings.

    Args:
        batch: batch size.
        columns: number of columns of the square root of the GGN.
        dtype: dtype of the operands.
        threads: number of torch threads.
        device: "cpu" or "cuda".
        repeats: maximum number of rounds.
        seconds: time budget for each implementation, spent in at least three rounds.
    """

    batch: int = 8
    columns: int = 4
    dtype: str = "float32"
    threads: int = 2
    device: str = "cpu"
    repeats: int = 20
    seconds: float = 0.1
