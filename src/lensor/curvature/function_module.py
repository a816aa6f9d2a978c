"""Modules of functions of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten


class FunctionModule(nn.Module):
    """A module that calls a function of parameters and inputs, as used with `torch.func`.

    Use it to pass such a function to `lensor.curvature`. Every function of torch that takes the parameters is covered:
    per-example gradients, their norms, `clipped_gradients`, `jacobians`, `empirical_ntk`, `ggn_diagonal` and
    `hessian_diagonal` are complete. Kronecker factors belong to layers that are modules, such as `torch.nn.Linear`, so
    `kfac` and `ekfac` find no such layers in this module, and compute diagonals or dense blocks.

    Args:
        function: a function of (parameters, *inputs).
        parameters: tensors in a mapping, or in nested containers. The tensors of floating point dtypes are parameters
            that share memory with the given ones, other tensors are buffers, and other values are passed as they are.
            The names of parameters are the keys; those of nested containers are joined by dots.

    Example:
        >>> import torch
        >>> from lensor.curvature import FunctionModule, per_example_gradients
        >>> def function(parameters, x):
        ...     return torch.nn.functional.linear(x, parameters["w"], parameters["b"]).tanh()
        >>> model = FunctionModule(function, {"w": torch.randn(2, 3), "b": torch.zeros(2)})
        >>> found = per_example_gradients(model, torch.nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 2)))
        >>> {name: tuple(gradient.shape) for name, gradient in found.items()}
        {'w': (4, 2, 3), 'b': (4, 2)}

    Raises:
        TypeError: if the function is not callable.
        ValueError: if there is no tensor, or if two tensors have names that exclude each other.
    """

    def __init__(self, function: Callable[..., Any], parameters: Any) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(
                f"function has type {type(function).__name__}, expected a function of (parameters, *inputs)"
            )
        self.function = function
        leaves, self._tree = tree_flatten_with_path(parameters)
        self._leaves: list[Any] = [None if isinstance(leaf, Tensor) else leaf for _, leaf in leaves]
        self._places: dict[int, tuple[nn.Module, str]] = {}
        for at, (path, leaf) in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self._places[at] = self._add(".".join(_key(one) for one in path), leaf)
        if not self._places:
            raise ValueError("parameters contain no tensor, expected at least one")

    def _add(self, name: str, tensor: Tensor) -> tuple[nn.Module, str]:
        """Register a tensor under a name with dots; return the module that owns it, and its name there."""
        *path, last = name.split(".")
        owner: nn.Module = self
        for one in path:
            if one in owner._parameters or one in owner._buffers:
                raise ValueError(f"parameters has {name!r} and a tensor {one!r} of which it is a part, expected one")
            if one not in owner._modules:
                owner._modules[one] = nn.Module()
            owner = owner._modules[one]  # pyright: ignore[reportAssignmentType]
        if not last or any(last in names for names in (owner._parameters, owner._buffers, owner._modules)):
            raise ValueError(f"parameters has the name {name!r} twice, as a part or empty, expected different names")
        # Not by register_parameter, which refuses the names of a module's attributes, such as "type".
        if isinstance(tensor, nn.Parameter):
            owner._parameters[last] = tensor
        elif tensor.is_floating_point() or tensor.is_complex():
            owner._parameters[last] = nn.Parameter(tensor.detach())
        else:
            owner._buffers[last] = tensor
        return owner, last

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Call the function with the parameters.

        Args:
            inputs: positional arguments after the parameters.
            named: named arguments.
        """
        leaves = list(self._leaves)
        for at, (owner, name) in self._places.items():
            leaves[at] = owner._parameters[name] if name in owner._parameters else owner._buffers[name]
        return self.function(tree_unflatten(leaves, self._tree), *inputs, **named)


def _key(entry: Any) -> str:
    """The name of one entry of a path in nested containers."""
    return str(next(getattr(entry, name) for name in ("key", "idx", "name") if hasattr(entry, name)))
