"""Fingerprints of models, losses and data: what a graph that was traced with them depends on."""

from __future__ import annotations

import dis
import functools
import itertools
import random
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MOST = 200_000
"""The largest number of entries of a fingerprint."""

_LIBRARIES = {"torch", "numpy", "lensor", *sys.stdlib_module_names}
"""Packages whose functions do not depend on variables that users change, besides the installed ones."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.Size)

_COMMON = (bool, int, str, type(None))

_CONTAINERS = (list, tuple, Set, deque)


class TooLargeError(Exception):
    """The objects refer to too many others for a fingerprint."""


class Fingerprint:
    """A key that changes if objects change on which a traced graph depends.

    It contains the values of numbers, texts and containers; the attributes of objects (of modules with everything in
    them: hooks, mode, options); the code of functions, with the values that they captured and the global variables that
    they name; classes; and the kinds of tensors. Of parameters and other tensors in objects it contains the identity,
    but not the values, which a graph reads when it runs. It does not contain the state of iterators, and variables that
    are found by name at run time or that functions of installed packages read.

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
        self._classes: set[type] = set()
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
        if isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.MethodType):
            self._add_method(value)
        elif isinstance(value, type):
            self._identify(value)
            self._add_class(value)
        elif isinstance(value, types.ModuleType):
            self._identify(value)
        elif isinstance(value, types.BuiltinFunctionType):
            self._identify(value)
            owner = value.__self__
            if owner is not None and not isinstance(owner, (types.ModuleType, type)):
                self._add(owner, fixed)
        elif isinstance(value, functools.partial):
            self._add_all([value.func, value.args, value.keywords], fixed)
        elif isinstance(value, np.ndarray):
            values = value.tolist() if value.dtype.hasobject else value.tobytes()
            self._add_all([value.shape, value.dtype.str, values], fixed)
        elif isinstance(value, tuple(_STATES)):
            self._add(next(state for kind, state in _STATES.items() if isinstance(value, kind))(value), fixed)
        else:
            self._add_class(type(value))
            if isinstance(value, Mapping):
                self._add_all(itertools.chain.from_iterable(value.items()), fixed)
            elif isinstance(value, _CONTAINERS):
                self._add_all(value, fixed)
            found = vars(value) if isinstance(value, nn.Module) else _attributes(value)
            if found:
                self._add_attributes(found, fixed)
            elif not isinstance(value, (Mapping, *_CONTAINERS)) and _is_library(type(value).__module__):
                self._identify(value)

    def _add_function(self, value: types.FunctionType) -> None:
        self._identify(value.__code__)
        self._add_all([value.__defaults__, value.__kwdefaults__, vars(value) or None], True)
        self._add_all(map(_content, value.__closure__ or ()), True)
        if _is_library(value.__module__):
            return
        space, names = value.__globals__, _names_in(value.__code__)
        for name in _globals_in(value.__code__):
            one = space.get(name)
            if isinstance(one, types.ModuleType):
                if not _is_library(one.__name__):  # its variables that the function names
                    inside = vars(one)
                    self._add_all([inside[other] for other in names if other in inside], True)
            elif name in space and not _is_of_a_library(one):
                self._parts.append(name)
                self._add(one, True)

    def _add_method(self, value: types.MethodType) -> None:
        """Add a method of an object: of other objects than modules, only the attributes that it may read."""
        owner = value.__self__
        self._add(value.__func__, True)
        if isinstance(owner, (type, nn.Module)) or not isinstance(value.__func__, types.FunctionType):
            self._add(owner, True)
            return
        self._add_class(type(owner))
        names = _reached(type(owner), value.__func__)
        self._add_attributes({name: one for name, one in _attributes(owner).items() if name in names}, True)

    def _add_class(self, kind: type) -> None:
        """Add the functions and other attributes of a class and of the classes that it extends."""
        if kind in self._classes or _is_library(kind.__module__):
            return
        self._classes.add(kind)
        for one in kind.__mro__:
            for name, value in () if _is_library(one.__module__) else vars(one).items():
                functions = list(_functions_of(one, name))
                for function in functions:
                    self._add(function, True)
                if not functions and name[:2] != "__":
                    self._parts.append(name)
                    self._add(value, True)


_STATES: dict[type, Any] = {
    np.random.Generator: lambda value: repr(value.bit_generator.state),
    np.random.RandomState: lambda value: repr(value.get_state(legacy=False)),
    random.Random: lambda value: value.getstate(),
    bytearray: bytes,
    weakref.ref: lambda value: value(),
}
"""The states of objects without attributes."""


def _functions_of(kind: type, name: str) -> Iterator[types.FunctionType]:
    """The functions with a name in a class and in the classes that it extends: methods and properties."""
    for one in kind.__mro__:
        found = vars(one).get(name)
        if isinstance(found, (staticmethod, classmethod)):
            found = found.__func__
        if isinstance(found, property):
            found = found.fget
        if isinstance(found, types.FunctionType) and not _is_library(found.__module__):
            yield found


def _reached(kind: type, start: types.FunctionType) -> set[str]:
    """The names and texts in a method, in methods that these name, and in functions that these call or wrap."""
    names: set[str] = set()
    todo, done = [start], {id(start)}
    for name in ("__getitem__", "__getattr__", "__call__", "__iter__", "__len__"):
        todo += _functions_of(kind, name)
    while todo:
        one = todo.pop()
        new = {*_names_in(one.__code__), *(text for text in one.__code__.co_consts if isinstance(text, str))}
        found = [*map(_content, one.__closure__ or ()), getattr(one, "__wrapped__", None)]
        found += [one.__globals__.get(name) for name in _globals_in(one.__code__)]
        for name in new:
            found += _functions_of(kind, name)
        names |= new
        for other in found:
            if isinstance(other, types.FunctionType) and id(other) not in done:
                done.add(id(other))
                todo += [] if _is_library(other.__module__) else [other]
    return names


def _is_of_a_library(value: Any) -> bool:
    """Whether a global variable is a module, or a function or class of a library, which users do not change."""
    if isinstance(value, (types.FunctionType, type)):
        return _is_library(value.__module__)
    return isinstance(value, types.ModuleType)


@functools.lru_cache(4096)
def _is_library(module: str | None) -> bool:
    """Whether a module belongs to an installed package, rather than to the user's own code."""
    if (module or "").partition(".")[0] in _LIBRARIES:
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return not {"site-packages", "dist-packages"}.isdisjoint(PurePath(file).parts)


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
