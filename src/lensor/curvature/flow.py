"""Which tensors of a forward pass depend on the parameters only, and which on the examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Flow:
    """The dependences of the tensors of one forward pass.

    Args:
        parameters: the parameters.
        examples: the inputs of the model that hold examples.
    """

    def __init__(self, parameters: Iterable[Tensor], examples: Iterable[Tensor]) -> None:
        self._parameters = {id(parameter) for parameter in parameters}
        self._derived: dict[int, Tensor] = {}  # it refers to the tensors, so that their identities stay unique
        self._examples: Any = WeakIdKeyDictionary()
        for one in examples:
            self._examples[one] = True

    def comes_from_parameters(self, value: Any) -> bool:
        """Whether a value is a parameter, or was computed from parameters and not from examples."""
        return id(value) in self._parameters or id(value) in self._derived

    def comes_from_examples(self, value: Any) -> bool:
        """Whether a value is a tensor that was computed from examples."""
        return isinstance(value, Tensor) and value in self._examples

    def mark(self, leaves: Sequence[Any], results: Iterable[Tensor]) -> None:
        """Record the results of a function with some arguments."""
        if any(self.comes_from_examples(leaf) for leaf in leaves):
            for result in results:
                self._examples[result] = True
                self._derived.pop(id(result), None)
        elif any(self.comes_from_parameters(leaf) for leaf in leaves):
            for result in results:
                if result.requires_grad and id(result) not in self._parameters:
                    self._derived[id(result)] = result


def with_examples(leaves: Sequence[Any], batch: int) -> list[bool]:
    """Whether each leaf of a model's inputs is a tensor whose first axis holds `batch` examples."""
    return [isinstance(leaf, Tensor) and leaf.shape[:1] == (batch,) for leaf in leaves]
