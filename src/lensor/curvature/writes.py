"""Which tensors a torch function writes into."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

_WRITES = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_WRITES |= {"__setitem__", "__set__", "__ilshift__", "__irshift__"}


def written(function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> list[Any]:
    """The tensors that a torch function writes into: its `out`, or the first argument of an in-place function."""
    name = getattr(function, "__name__", "")
    if named.get("out") is not None:
        found = named["out"]
    elif arguments and (name in _WRITES or (name[-1:] == "_" and name[-2:] != "__")):
        found = arguments[0]
    elif _is_in_place(function, arguments, named):
        found = arguments[0] if arguments else named.get("input")
    else:
        return []
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _is_in_place(function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> bool:
    """Whether a function such as `torch.nn.functional.relu` has the argument `inplace=True`."""
    if "inplace" in named:
        return bool(named["inplace"])
    place = _place_of_inplace(function)
    return place is not None and len(arguments) > place and bool(arguments[place])


@functools.lru_cache(maxsize=1024)
def _place_of_inplace(function: Callable[..., Any]) -> int | None:
    """The position of the argument `inplace`, or None if there is none."""
    if not isinstance(function, types.FunctionType):
        return None
    try:
        names = list(inspect.signature(function).parameters)
    except ValueError:  # a wrapper of a built-in function
        return None
    return names.index("inplace") if "inplace" in names else None


def results_of(
    function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any], result: Any
) -> list[Tensor]:
    """The tensors that a function returned, and those that it wrote into.

    If it wrote into a view, the tensor behind the view has the new value, and the graph leads to the view through it.
    """
    into = [one for one in written(function, arguments, named) if isinstance(one, Tensor)]
    found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and all(leaf is not one for one in into)]
    for one in into:
        behind = one._base if one._is_view() and one._base is not None else one
        if all(behind is not other for other in found):
            found.append(behind)
    return found


def address(tensor: Tensor) -> int:
    """The address of a tensor's memory; 0 for tensors without memory."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0
