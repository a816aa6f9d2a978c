"""Kernels: the array frameworks that run the steps of plans; each is loaded on first use."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from lensor.kernels.protocol import Backend

_LOADED: dict[str, Backend] = {}


def load(name: str) -> Backend:
    """Return the backend with this name, `"numpy"`, `"torch"` or `"jax"`."""
    backend = _LOADED.get(name)
    if backend is None:
        if name not in ("numpy", "torch", "jax"):
            raise ValueError(f"backend {name!r} is unknown, expected 'numpy', 'torch' or 'jax'")
        backend = import_module(f"lensor.kernels.{name}").BACKEND
        _LOADED[name] = backend
    return backend


def name_of(array: Any) -> str:
    """Return the name of the framework to which an array belongs.

    Raises:
        TypeError: if it is not an array of NumPy, torch or JAX, or if its entries alone do not define its meaning: a
            masked array, a matrix or another subclass of NumPy arrays, or a sparse, nested, quantized or masked tensor.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        if array.layout is not torch.strided or array.is_nested or array.is_quantized or _is_masked(array):
            raise TypeError(_why_not_tensor(array))
        return "torch"
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(array, jax.Array):
        return "jax"
    numpy = sys.modules["numpy"]
    if type(array) is numpy.ndarray or isinstance(array, (numpy.generic, numpy.memmap)):
        return "numpy"
    if isinstance(array, numpy.ndarray):
        raise TypeError(_why_not_array(array))
    raise TypeError(f"an operand has type {_type_name(array)}, expected an array of NumPy, torch or JAX")


def device_of(array: Any) -> Any:
    """The device of an array; None if it has none, or for JAX, which moves arrays itself."""
    jax = sys.modules.get("jax")
    return None if jax is not None and isinstance(array, jax.Array) else getattr(array, "device", None)


def _type_name(array: Any) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"


def _is_masked(array: Any) -> bool:
    return type(array).__name__ == "MaskedTensor" and type(array).__module__.startswith("torch.masked")


def _why_not_tensor(array: Any) -> str:
    if array.is_nested:
        return "an operand is a nested tensor, expected a dense one: torch.nested.to_padded_tensor(x, 0.0) makes one"
    if array.is_quantized:
        return f"an operand is a quantized tensor of {array.dtype}, expected a floating-point one: call x.dequantize()"
    if _is_masked(array):
        return (
            "an operand is a masked tensor, expected one without a mask: x.to_tensor(0.0) replaces masked entries by 0"
        )
    return f"an operand is a tensor of layout {array.layout}, expected a dense one: call x.to_dense()"


def _why_not_array(array: Any) -> str:
    if isinstance(array, sys.modules["numpy"].ma.MaskedArray):
        return "an operand is a masked array, expected one without a mask: x.filled(0.0) replaces masked entries by 0"
    return (
        f"an operand has type {_type_name(array)}, a subclass of NumPy's arrays with another meaning (units, matrix"
        " products), expected a plain array: call numpy.asarray(x)"
    )


def backend_of(*arrays: Any) -> Backend:
    """Return the backend for all the given arrays.

    Raises:
        TypeError: if they belong to different frameworks, or to a framework that is not supported (see `name_of`).
    """
    names = dict.fromkeys(name_of(array) for array in arrays)
    if len(names) > 1:
        raise TypeError(f"operands are arrays of {' and '.join(names)}, expected one framework")
    return load(next(iter(names), "numpy"))


def override_of(*arrays: Any) -> Callable[..., Any] | None:
    """Return the `__torch_function__` override for a call if one of the arrays is a proxy, else None.

    torch.fx proxies record the function and its arguments. Call the override with the function, the tuple of its
    positional arguments, and its keyword arguments.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    for array in arrays:
        kind = type(array)
        found = getattr(kind, "__torch_function__", None)
        if found is not None and not isinstance(array, torch.Tensor):
            return lambda function, arguments, **options: found(function, (kind,), arguments, options)
    return None


def is_capturing() -> bool:
    """Whether a framework is capturing a graph (torch.compile, torch.export)."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def is_symbolic(arrays: Sequence[Any], options: Sequence[Any]) -> bool:
    """Whether a size of the arrays or in the options is symbolic, because a graph is being captured."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        sizes = itertools.chain(options, *(array.shape for array in arrays), *filter(_is_sequence, options))
        if not any(isinstance(size, torch.SymInt) for size in sizes):
            return False  # ordinary calls do not import the compiler's modules
    return symbolic().is_symbolic(arrays, options)


def _is_sequence(option: Any) -> bool:
    return isinstance(option, (tuple, list))


def symbolic() -> Any:
    """The module for symbolic sizes, `lensor.kernels.torch.symbolic`, which imports the compiler's modules."""
    from lensor.kernels.torch import symbolic

    return symbolic


__all__ = [
    "Backend",
    "backend_of",
    "device_of",
    "is_capturing",
    "is_symbolic",
    "load",
    "name_of",
    "override_of",
    "symbolic",
]
