"""Fingerprints of models, losses and data: what a graph that was traced with them depends on."""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MOST = 200_000
"""The largest number of entries of a fingerprint."""

_LIBRARIES = {"torch", "transformers", "timm", "torchvision", "numpy", "lensor", *sys.stdlib_module_names}
"""Packages whose functions do not depend on variables that users change."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.Size)

_COMMON = (bool, int, str, type(None))


class TooLargeError(Exception):
    """The objects refer to too many others for a fingerprint."""


class Fingerprint:
    """A key that changes if objects change on which a traced graph depends.

    It contains the values of numbers, texts and containers; the attributes of objects (of modules with everything in
    them: hooks, mode, options); the code of functions, with the values that they captured, the global variables that
    they name, and the methods of their class that they name; and the kinds of tensors. Of parameters and other tensors
    in objects it contains the identity, but not the values, which a graph reads when it runs. It does not contain
    attributes of classes other than methods, and variables that only functions of libraries read.

    Args:
        fixed: objects whose tensors are identified: models, losses.
        given: objects whose tensors may be replaced by others of the same kind: inputs, targets.

    Raises:
        TooLargeError: if the objects refer to too many others.
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
            raise TooLargeError
        kind = type(value)
        self._parts.append(kind)
        if kind in _PLAIN:
            self._parts.append(repr(value) if kind in (float, complex) else value)
        elif isinstance(value, np.generic):
            self._parts.append(value.tobytes())
        elif id(value) in self._seen:
            self._parts.append(("again", self._seen[id(value)]))
        else:
            self._seen[id(value)] = len(self._seen)
            self._alive.append(value)  # an address is free again as soon as a temporary object is deleted
            if isinstance(value, Tensor):
                self._add_tensor(value, fixed)
            else:
                self._add_object(value, fixed)

    def _add_tensor(self, value: Tensor, fixed: bool) -> None:
        if fixed:
            self._identify(value)
            self._add(vars(value) or None, True)
        is_strided = value.layout is torch.strided
        strides = value.stride() if is_strided else None
        self._parts += [tuple(value.shape), strides, value.dtype, value.device, value.layout, value.requires_grad]
        self._parts += [value.is_conj(), value.is_neg()]
        if fixed and value._backward_hooks:
            self._add_all(value._backward_hooks.values(), fixed)

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
            elif kind in (dict, OrderedDict) and name[:1] == "_" and "hook" in name:
                if value:  # the keys are numbers of handles
                    self._parts.append(name)
                    self._add_all(value.values(), fixed)
            elif kind not in (dict, OrderedDict) or value or name[:1] != "_":
                self._parts.append(name)
                self._add(value, fixed)
        self._parts.append(len(attributes))

    def _add_object(self, value: Any, fixed: bool) -> None:
        if isinstance(value, Mapping):
            self._add_all(itertools.chain.from_iterable(value.items()), fixed)
            self._add(getattr(value, "__dict__", None) or None, fixed)
        elif isinstance(value, (list, tuple, Set, deque)):
            self._add_all(value, fixed)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.MethodType):
            self._add_method(value)
        elif isinstance(value, functools.partial):
            self._add_all([value.func, value.args, value.keywords], fixed)
        elif isinstance(value, np.ndarray):
            self._add_all([value.shape, value.dtype.str, value.tobytes()], fixed)
        elif isinstance(value, nn.Module):
            self._add_class(type(value), ("forward",))
            self._add_attributes(vars(value), fixed)
        elif isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
            self._identify(value)
        elif found := _attributes(value):
            self._add_class(type(value), ("__call__",))
            self._add_attributes(found, fixed)
        elif "__call__" in dir(type(value)) and _package(type(value).__module__) not in _LIBRARIES:
            self._add_class(type(value), ("__call__",))
        else:
            self._identify(value)

    def _add_function(self, value: types.FunctionType) -> None:
        self._identify(value.__code__)
        self._add_all([value.__defaults__, value.__kwdefaults__, vars(value) or None], True)
        self._add_all(map(_content, value.__closure__ or ()), True)
        if _package(value.__module__) in _LIBRARIES:
            return
        for name in _globals_in(value.__code__):
            one = value.__globals__.get(name)
            if name in value.__globals__ and not _is_of_a_library(one):
                self._parts.append(name)
                self._add(one, True)

    def _add_method(self, value: types.MethodType) -> None:
        """Add a method of an object: of other objects than modules, only the attributes that it names."""
        owner = value.__self__
        self._add(value.__func__, True)
        if isinstance(owner, (type, nn.Module)) or not isinstance(value.__func__, types.FunctionType):
            self._add(owner, True)
            return
        names: set[str] = set()
        for function in self._methods(type(owner), (value.__name__,)):
            names |= set(_names_in(function.__code__))
            self._add(function, True)
        found = _attributes(owner)
        self._add_attributes({name: one for name, one in found.items() if name in names}, True)

    def _add_class(self, kind: type, names: Sequence[str]) -> None:
        """Add methods of a class, and the methods that these name."""
        if _package(kind.__module__) not in _LIBRARIES:
            for function in self._methods(kind, names):
                self._add(function, True)

    def _methods(self, kind: type, names: Sequence[str]) -> Iterator[types.FunctionType]:
        todo, done = list(names), set(names)
        while todo:
            one = getattr(kind, todo.pop(), None)
            one = one.fget if isinstance(one, property) else one
            if not isinstance(one, types.FunctionType) or _package(one.__module__) in _LIBRARIES:
                continue
            yield one
            more = set(_names_in(one.__code__)) - done
            done |= more
            todo += sorted(more)


def _is_of_a_library(value: Any) -> bool:
    """Whether a global variable is a module, a class, or a function of a library, which users do not change."""
    if isinstance(value, (types.FunctionType, type)):
        return _package(value.__module__) in _LIBRARIES or isinstance(value, type)
    return isinstance(value, (types.ModuleType, types.BuiltinFunctionType))


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


@functools.lru_cache(4096)
def _globals_in(code: types.CodeType) -> tuple[str, ...]:
    """The names of the global variables that a function and the functions inside of it read."""
    found = {one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            found.update(_globals_in(one))
    return tuple(sorted(found))


@functools.lru_cache(4096)
def _names_in(code: types.CodeType) -> tuple[str, ...]:
    """The names of attributes and global variables in a function and in the functions inside of it."""
    inside = (_names_in(one) for one in code.co_consts if isinstance(one, types.CodeType))
    return tuple(sorted(set(code.co_names).union(*inside)))


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
