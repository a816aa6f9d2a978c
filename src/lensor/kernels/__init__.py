"""Kernels: the array frameworks that carry out the steps of a plan, each loaded when first used."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from lensor.kernels.protocol import Backend

_LOADED: dict[str, Backend] = {}


def load(name: str) -> Backend:
    """The backend of that name, `"numpy"` or `"torch"`."""
    backend = _LOADED.get(name)
    if backend is None:
        if name not in ("numpy", "torch"):
            raise ValueError(f"unknown backend {name!r}, expected 'numpy' or 'torch'")
        backend = import_module(f"lensor.kernels.{name}").BACKEND
        _LOADED[name] = backend
    return backend


def name_of(array: Any) -> str:
    """The name of the framework an array belongs to.

    Raises:
        TypeError: if it is no array of NumPy or torch, or one that means more than its entries: a masked array, a
            matrix, or another subclass of NumPy's arrays; a sparse, nested, quantized or masked tensor.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        if array.layout is not torch.strided or array.is_nested or array.is_quantized or _is_masked(array):
            raise TypeError(_why_not_tensor(array))
        return "torch"
    numpy = sys.modules["numpy"]
    if type(array) is numpy.ndarray or isinstance(array, (numpy.generic, numpy.memmap)):
        return "numpy"
    if isinstance(array, numpy.ndarray):
        raise TypeError(_why_not_array(array))
    raise TypeError(f"expected an array of NumPy or torch, found {_type_name(array)}")


def _type_name(array: Any) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"


def _is_masked(array: Any) -> bool:
    return type(array).__name__ == "MaskedTensor" and type(array).__module__.startswith("torch.masked")


def _why_not_tensor(array: Any) -> str:
    if array.is_nested:
        return "found a nested tensor, expected a dense one: torch.nested.to_padded_tensor(x, 0.0) makes one"
    if array.is_quantized:
        return f"found a quantized tensor of {array.dtype}, expected a floating-point one: x.dequantize() makes one"
    if _is_masked(array):
        return "found a masked tensor, whose mask would be lost: x.to_tensor(0.0) replaces masked entries by 0"
    return f"found a tensor of layout {array.layout}, expected a dense one: x.to_dense() makes one"


def _why_not_array(array: Any) -> str:
    if isinstance(array, sys.modules["numpy"].ma.MaskedArray):
        return "found a masked array, whose mask would be lost: x.filled(0.0) replaces masked entries by 0"
    return (
        f"found {_type_name(array)}, a subclass of NumPy's arrays, whose meaning (units, matrix products) would be "
        "lost: numpy.asarray(x) makes a plain array"
    )


def backend_of(*arrays: Any) -> Backend:
    """The backend of all the arrays.

    Raises:
        TypeError: if they belong to two frameworks, or to none that is supported (see `name_of`).
    """
    names = dict.fromkeys(name_of(array) for array in arrays)
    if len(names) > 1:
        raise TypeError(f"operands must belong to one framework, found {' and '.join(names)}")
    return load(next(iter(names), "numpy"))


def is_capturing() -> bool:
    """Whether a framework is writing down a graph of what runs (torch.compile, torch.export)."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


__all__ = ["Backend", "backend_of", "is_capturing", "load", "name_of"]
