"""Where the examples of a batch are in tensors: which axis, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Key = tuple[str, int]
"""A call: the weight's name, and how many calls with this weight came before."""


Given = int | str | Mapping[str, int | str] | None
"""What a user says of the examples' axis: an axis, "outer" or "inner", for all layers or by the layers' names."""


@dataclass(frozen=True)
class BatchAxis:
    """Where the examples lie.

    Args:
        axis: the axis.
        rows: how many rows along it belong to each example.
        order: whether the examples are the "outer" or the "inner" of the two that share the axis, if `rows` is not 1;
            None if that is not known.
        independent: whether an example's rows were the same among other examples; None if rows of different examples
            are too close to tell.
    """

    axis: int
    rows: int = 1
    order: Literal["outer", "inner"] | None = "outer"
    independent: bool | None = True

    def first(self, x: Tensor, batch: int) -> Tensor:
        """A tensor with the examples as first axis, and their rows as second one unless it is one each; a view."""
        if self.rows == 1:
            return x.movedim(self.axis, 0)
        if self.order == "inner":
            return x.unflatten(self.axis, (self.rows, batch)).movedim((self.axis + 1, self.axis), (0, 1))
        return x.unflatten(self.axis, (batch, self.rows)).movedim((self.axis, self.axis + 1), (0, 1))


@dataclass(frozen=True)
class Layout:
    """Where the examples lie in every layer's inputs, and in the model's outputs; None where they do not occur.

    Args:
        calls: by call: the input's number of axes, and where the examples lie. None for a single example or an empty
            batch: all rows belong to it.
        outputs: for every tensor of the outputs.
    """

    calls: Mapping[Key, tuple[int, BatchAxis | None]] | None
    outputs: tuple[BatchAxis | None, ...] | None


def only_axis(shape: Sequence[int], batch: int) -> BatchAxis:
    """Where the examples lie if there is only one, or none."""
    return BatchAxis(0, shape[0]) if batch else BatchAxis(list(shape).index(0) if 0 in shape else 0)


class NoLayoutError(ValueError):
    """The model could not be run with another number of examples."""


def given_axis(given: Given, name: str, shape: Sequence[int], batch: int) -> BatchAxis | None:
    """Where a user says that the examples of a layer's input lie; None if nothing is said of this layer.

    Raises:
        ValueError: if it does not fit the shape.
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
            f"batch_axis says that axis {axis} of the input of layer {name!r} has {batch} examples, found shape"
            f" {tuple(shape)}"
        )
    axis %= len(shape)
    return BatchAxis(axis, shape[axis] // batch, order)
