"""Positions of a batch's examples in tensors: the axis and the order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Key = tuple[str, int]
"""A call: the weight's name, and the number of previous calls with this weight."""


Given = int | str | Mapping[str, int | str] | None
"""The batch_axis that a user specifies: an axis, "outer" or "inner", for all layers or by layer name."""


@dataclass(frozen=True)
class BatchAxis:
    """The axis of a tensor that holds the examples, and their order along it.

    Args:
        axis: the axis.
        rows: number of rows along the axis per example.
        order: whether the examples are the "outer" or the "inner" index of the shared axis, if `rows` is not 1; None if
            unknown.
        independent: whether an example's rows stayed the same when the other examples changed; None if the rows of
            different examples are too similar to distinguish.
    """

    axis: int
    rows: int = 1
    order: Literal["outer", "inner"] | None = "outer"
    independent: bool | None = True

    def first(self, x: Tensor, batch: int) -> Tensor:
        """A view with the examples as the first axis, followed by an axis of rows if there are several per example."""
        if self.rows == 1:
            return x.movedim(self.axis, 0)
        if self.order == "inner":
            return x.unflatten(self.axis, (self.rows, batch)).movedim((self.axis + 1, self.axis), (0, 1))
        return x.unflatten(self.axis, (batch, self.rows)).movedim((self.axis, self.axis + 1), (0, 1))


@dataclass(frozen=True)
class FunctionAxes:
    """The position of the examples in the arguments and results of a function; None for values without examples.

    Args:
        name: the name of the function.
        arguments: the positions in the leaves of the arguments.
        results: the positions in the results.
        is_mixing: whether a result without an axis of examples depends on them.
    """

    name: str
    arguments: Mapping[int, BatchAxis]
    results: tuple[BatchAxis | None, ...]
    is_mixing: bool = False


@dataclass(frozen=True)
class BatchAxes:
    """The batch axis of every layer's input and of the outputs; None for tensors without examples.

    Args:
        calls: the number of axes and the position of the examples, by call. None for a single example or an empty
            batch, where the axis is obvious.
        outputs: the position of the examples in each output tensor.
        functions: the positions for the functions that take parameters, in their order, if these were requested.
    """

    calls: Mapping[Key, tuple[int, BatchAxis | None]] | None
    outputs: tuple[BatchAxis | None, ...] | None
    functions: tuple[FunctionAxes, ...] | None = None


def only_axis(shape: Sequence[int], batch: int) -> BatchAxis:
    """The position of the examples in a batch with at most one example."""
    return BatchAxis(0, shape[0]) if batch else BatchAxis(list(shape).index(0) if 0 in shape else 0)


class NoBatchAxisError(ValueError):
    """The model cannot run with a different number of examples."""


def given_axis(given: Given, name: str, shape: Sequence[int], batch: int) -> BatchAxis | None:
    """The position that the user specified for the examples in a layer's input; None if the layer has none.

    Raises:
        ValueError: if the position does not fit the shape.
    """
    found = given.get(name) if isinstance(given, Mapping) else given
    if found is None:
        return None
    order: Literal["outer", "inner"] = "inner" if found == "inner" else "outer"
    axis = 0 if isinstance(found, str) else found
    if isinstance(found, bool) or (isinstance(found, str) and found not in ("outer", "inner")):
        raise ValueError(f"batch_axis of {name!r} is {found!r}, expected an axis, 'outer' or 'inner'")
    if not -len(shape) <= axis < len(shape) or not batch or shape[axis] % batch:
        raise ValueError(
            f"batch_axis of {name!r} is {axis}, expected an axis whose size is a multiple of the number of examples,"
            f" {batch}: the layer's input has shape {tuple(shape)}"
        )
    axis %= len(shape)
    return BatchAxis(axis, shape[axis] // batch, order)
