"""Reads data, inputs and outputs in the forms that users pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Inputs = Any
"""Inputs of a model: a tensor, a tuple of positional arguments, or a mapping of named arguments."""


class Arguments(NamedTuple):
    """Positional and named arguments, for a model that is called with both."""

    by_place: tuple[Any, ...]
    by_name: dict[str, Any]


def known_containers(inputs: Inputs) -> Inputs:
    """The inputs; mappings of any kind become dictionaries, in which torch finds tensors."""
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


def outputs_of(model: nn.Module, inputs: Inputs) -> Any:
    """The value that the model returns for its inputs."""
    if isinstance(inputs, Arguments):
        return model(*inputs.by_place, **inputs.by_name)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def one_tensor(outputs: Any) -> Tensor:
    """The outputs as one tensor: the tensor itself, the only entry of a tuple or list, or `.logits`.

    Raises:
        TypeError: if there is not exactly one output tensor.
    """
    if isinstance(outputs, Tensor):
        return outputs
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(outputs, (tuple, list)) and len(outputs) == 1 and isinstance(outputs[0], Tensor):
        return outputs[0]
    size = f" with {len(outputs)} entries" if isinstance(outputs, (tuple, list, Mapping)) else ""
    raise TypeError(
        f"the model's output has type {type(outputs).__name__}{size}, expected one tensor, or an object with logits:"
        " wrap the model in a module whose forward pass returns the output that the loss takes"
    )


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's outputs as one tensor.

    Raises:
        TypeError: if there is not exactly one output tensor.
    """
    return one_tensor(outputs_of(model, inputs))


def over_positions(v: Tensor, front: int = 2) -> Tensor:
    """Sum over the axes of the positions; the first `front` axes, the last of which holds the channels, remain."""
    return v.flatten(front).sum(front) if v.ndim > front else v


def size_of(inputs: Inputs, *, empty: bool = False) -> int:
    """The number of examples.

    Args:
        inputs: the inputs of the model.
        empty: whether the batch may be empty.

    Raises:
        ValueError: if no tensor has a batch axis, or if the batch is empty.
    """
    if isinstance(inputs, Arguments):
        values = (*inputs.by_place, *inputs.by_name.values())
    else:
        values = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else ()
    first = inputs if isinstance(inputs, Tensor) else next((v for v in values if isinstance(v, Tensor)), None)
    if first is None or first.ndim == 0:
        raise ValueError(
            f"inputs have type {type(inputs).__name__} without a tensor that has a batch axis, expected a tensor, a"
            " tuple of arguments or a mapping"
        )
    if len(first) == 1 and not isinstance(inputs, Tensor):
        sizes = [len(one) for one in tree_leaves(list(values)) if isinstance(one, Tensor) and one.ndim]
        if max(sizes) > 1:
            raise ValueError(
                f"the first axes of the inputs have sizes {sizes}, expected the batch size in the first input: size 1"
                " is ambiguous, so if all examples share a value, expand it to the batch size"
            )
    if len(first) == 0 and not empty:
        raise ValueError("the batch is empty, expected at least one example")
    return len(first)


def narrowed(inputs: Inputs, batch: int, start: int, stop: int) -> Inputs:
    """The inputs of some of the examples: views of the tensors whose first axis holds `batch` examples."""

    def one(value: Any) -> Any:
        return value[start:stop] if isinstance(value, Tensor) and value.shape[:1] == (batch,) else value

    return tree_map(one, inputs)


def batches(data: Any) -> Iterator[tuple[Inputs, Any]]:
    """Yield the (inputs, targets) pairs of a loader, or the single pair that was given; see `known_containers`.

    Raises:
        TypeError: if `data` is anything else.
        ValueError: if there is no pair.
    """
    if isinstance(data, Tensor):
        raise TypeError("data is a tensor, expected a pair (inputs, targets) or an iterable of such pairs")
    if isinstance(data, (tuple, list)) and len(data) == 2:
        if isinstance(data, tuple) and all(isinstance(one, tuple) and len(one) == 2 for one in data):
            raise ValueError(
                "data is a tuple of two pairs, which is ambiguous (two batches, or one batch of a model with two"
                " inputs), expected a list of batches, or (inputs, targets) with inputs as a mapping by argument name"
            )
        if _is_pair(*data):
            data = [data]
    empty = True
    for pair in data:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"data contains an object of type {type(pair).__name__}, expected pairs (inputs, targets)")
        empty = False
        yield known_containers(pair[0]), pair[1]
    if empty:
        raise ValueError("data is empty, expected at least one batch")


def _is_pair(inputs: Any, targets: Any) -> bool:
    """Whether two objects are the inputs and targets of one batch, rather than two (inputs, targets) pairs."""
    return isinstance(targets, Tensor) or targets is None or not isinstance(inputs, (tuple, list))
