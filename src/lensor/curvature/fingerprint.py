"""Fingerprints of models, losses and data: what a graph that was traced with them depends on."""

from __future__ import annotations

import functools
import itertools
import sys
import types
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MOST = 200_000
"""The largest number of values in a fingerprint."""

_LIBRARIES = {"torch", "transformers", "timm", "torchvision", "numpy", "lensor", *sys.stdlib_module_names}
"""Packages whose functions do not depend on global variables that users change."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.Size)

_COMMON = (bool, int, str, type(None))


class Fingerprint:
    """A key that changes if objects change on which a traced graph depends.

    It contains the values of numbers, texts and containers, the attributes of objects (of modules with everything in
    them: hooks, mode, options), the code of functions with the values that they captured and the global variables that
    they name, and the kinds of tensors. Of parameters and other tensors in objects it contains the identity, but not
    the values, which a graph reads when it runs. It does not see attributes of classes, and variables of other modules.

    Args:
        fixed: objects whose tensors are identified: models, losses.
        given: objects whose tensors may be replaced by others of the same kind: inputs, targets.

    Raises:
        TypeError: if the objects refer to too many others.
    """

    def __init__(self, fixed: Sequence[Any], given: Sequence[Any] = ()) -> None:
        self._parts: list[Hashable] = []
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []
        self.held: list[Any] = []
        """Objects that are identified by their address, and must be kept as long as the key."""
        for one in fixed:
            self._add(one, True)
        for one in given:
            self._add(one, False)
        self.key: tuple[Hashable, ...] = tuple(self._parts)
        self._alive.clear()

    def _identify(self, value: Any) -> None:
        self.held.append(value)
        self._parts.append(id(value))

    def _add(self, value: Any, fixed: bool) -> None:
        if len(self._parts) > _MOST:
            raise TypeError(f"the model or the loss refers to more than {_MOST:,} values, expected fewer for a graph")
        kind = type(value)
        self._parts.append(kind)
        if kind in _PLAIN:
            self._parts.append(repr(value) if kind in (float, complex) else value)
        elif isinstance(value, Tensor):
            self._add_tensor(value, fixed)
        elif id(value) in self._seen:
            self._parts.append(("again", self._seen[id(value)]))
        else:
            self._seen[id(value)] = len(self._seen)
            self._alive.append(value)  # an address is free again as soon as a temporary object is deleted
            self._add_object(value, fixed)

    def _add_tensor(self, value: Tensor, fixed: bool) -> None:
        if fixed:
            self._identify(value)
        is_strided = value.layout is torch.strided
        strides = value.stride() if is_strided else None
        self._parts += [tuple(value.shape), strides, value.dtype, value.device, value.layout, value.requires_grad]
        hooks = value._backward_hooks
        if hooks and fixed:
            self._add_all(hooks.values(), fixed)

    def _add_all(self, values: Any, fixed: bool) -> None:
        values = list(values)
        self._parts.append(len(values))
        for one in values:
            self._add(one, fixed)

    def _add_attributes(self, attributes: Mapping[str, Any], fixed: bool) -> None:
        for name, value in attributes.items():
            kind = type(value)
            if kind in _COMMON:
                self._parts += (name, kind, value)
            elif kind not in (dict, OrderedDict) or value or name[:1] != "_":  # most hooks of modules are empty
                self._parts.append(name)
                self._add(value, fixed)
        self._parts.append(len(attributes))

    def _add_object(self, value: Any, fixed: bool) -> None:
        if isinstance(value, Mapping):
            self._add_all(itertools.chain.from_iterable(value.items()), fixed)
        elif isinstance(value, (list, tuple, Set)):
            self._add_all(value, fixed)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.MethodType):
            self._add_all([value.__func__, value.__self__], fixed)
        elif isinstance(value, functools.partial):
            self._add_all([value.func, value.args, value.keywords], fixed)
        elif isinstance(value, np.ndarray):
            self._add_all([value.shape, value.dtype.str, value.tobytes()], fixed)
        elif isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)) or not _attributes(value):
            self._identify(value)
        elif isinstance(value, nn.Module):
            self._add(type(value).forward, True)
            self._add_attributes(vars(value), fixed)
        else:
            self._add_attributes(_attributes(value), fixed)

    def _add_function(self, value: types.FunctionType) -> None:
        self._identify(value.__code__)
        self._add_all([value.__defaults__, value.__kwdefaults__], True)
        self._add_all(map(_content, value.__closure__ or ()), True)
        if _package(value.__module__) in _LIBRARIES:
            return
        space = value.__globals__
        for name in sorted(_names(value.__code__)):
            one = space.get(name)
            if not isinstance(one, types.ModuleType) and _package(type(one).__module__) not in _LIBRARIES - {
                "builtins"
            }:
                self._parts.append(name)
                self._add(one, True)


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _names(code: types.CodeType) -> set[str]:
    """The names of global variables and attributes in a function and in the functions inside of it."""
    inside = (_names(one) for one in code.co_consts if isinstance(one, types.CodeType))
    return set(code.co_names).union(*inside)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return None


def _attributes(value: Any) -> dict[str, Any]:
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name) and name not in ("__dict__", "__weakref__"):
                found[name] = getattr(value, name)
    return found
