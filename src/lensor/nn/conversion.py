"""Converts the convolutions of a torch model to Lensor."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lensor.nn import layers

Model = TypeVar("Model", bound=torch.nn.Module)

_LENSOR: dict[type, type] = {
    torch.nn.Conv1d: layers.Conv1d,
    torch.nn.Conv2d: layers.Conv2d,
    torch.nn.Conv3d: layers.Conv3d,
    torch.nn.ConvTranspose1d: layers.ConvTranspose1d,
    torch.nn.ConvTranspose2d: layers.ConvTranspose2d,
    torch.nn.ConvTranspose3d: layers.ConvTranspose3d,
}
_MIXINS = (layers.Convolution, layers.TransposedConvolution)


def convert(model: Model, inplace: bool = False) -> Model:
    """Make Lensor compute every convolution and transposed convolution of a torch model.

    A converted module becomes an instance of a Lensor subclass of its class. Everything else stays the same:
    parameters, state_dict, hooks, mode, device, dtype and parametrizations. A module used in several places remains one
    module. Subclasses that override the computation stay unchanged, and a warning names them.

    Example:
        >>> import torch, lensor.nn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU())
        >>> lensor.nn.convert(model)[0].__class__
        <class 'lensor.nn.layers.Conv2d'>

    Args:
        model: any torch module, including a convolution.
        inplace: whether to change `model` itself instead of a copy.

    Returns:
        The copy, or `model` itself.

    Raises:
        TypeError: if `model` is not a torch module.
        ValueError: if a lazy convolution has not received an input yet, or if the model cannot be copied.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model has type {type(model).__name__}, expected torch.nn.Module")
    for name, module in _convolutions(model):
        if isinstance(module, LazyModuleMixin):
            raise ValueError(
                f"{name} is a lazy {type(module).__name__}, expected an initialised module: run the model once on an"
                " input before you convert it"
            )
    if not inplace:
        model = copied(model)
    for name, module in _convolutions(model):
        new = _converted_class(type_before_parametrizations(module))
        if new is None:
            warnings.warn(
                f"{name} is not converted: {type(module).__name__} has its own computation",
                stacklevel=2,
            )
        elif is_parametrized(module):
            module.__class__ = with_base(type(module), new)
        else:
            module.__class__ = new
    return model


def _convolutions(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The torch convolutions of a model, each once, with their names for messages."""
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and not isinstance(module, _MIXINS):
            yield repr(name) if name else "the model", module


def copied(model: Model) -> Model:
    """A deep copy; ValueError if a tensor results from a computation that the copy cannot repeat."""
    memo: dict[int, Any] = {}
    again: list[tuple[str, str, Callable[[torch.nn.Module], torch.Tensor]]] = []
    for name, module in model.named_modules():
        computed = dict(_computed(module))
        for attribute, value in vars(module).items():
            if not isinstance(value, torch.Tensor) or value.is_leaf:
                continue
            if attribute not in computed:
                raise ValueError(
                    f"{attribute!r} of {repr(name) if name else 'the model'} is the result of a computation, expected a"
                    " parameter or buffer: torch cannot copy it, so use inplace=True"
                )
            memo[id(value)] = value.detach().clone()
            again.append((name, attribute, computed[attribute]))
    made = copy.deepcopy(model, memo)
    for name, attribute, compute in again:
        module = made.get_submodule(name)
        with torch.enable_grad():
            setattr(module, attribute, compute(module))
    return made


def _computed(module: torch.nn.Module) -> Iterator[tuple[str, Callable[[torch.nn.Module], torch.Tensor]]]:
    """The tensors that torch's hooks compute from a module's parameters before each call, with their functions."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield hook.name, hook.compute_weight
        elif isinstance(hook, SpectralNorm):
            yield hook.name, functools.partial(hook.compute_weight, do_power_iteration=False)
        elif isinstance(hook, BasePruningMethod):
            yield hook._tensor_name, hook.apply_mask


@functools.lru_cache(maxsize=256)
def _converted_class(cls: type) -> type | None:
    """Lensor's subclass of a convolution class; None if the class overrides the computation."""
    if cls in _LENSOR:
        return _LENSOR[cls]
    base = next((base for base in _LENSOR if issubclass(cls, base)), None)
    methods = ("forward", "_conv_forward", "_output_padding", "__call__")
    if base is None or any(getattr(cls, name, None) is not getattr(base, name, None) for name in methods):
        return None
    mixin = next(mixin for mixin in _MIXINS if issubclass(_LENSOR[base], mixin))
    members = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_made_from": cls}
    return type(f"Lensor{cls.__name__}", (_Rebuilt, mixin, cls), members)


class _Rebuilt:
    """Pickles and copies an instance of a class that `_converted_class` created, through its original class."""

    _made_from: type

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return (_new, (self._made_from,), *super().__reduce_ex__(max(protocol, 2))[2:])


def _new(cls: type) -> Any:
    converted: Any = _converted_class(cls)
    return converted.__new__(converted)


def with_base(parametrized: type, base: type) -> type:
    """Rebuild the class that torch's parametrizations created for a module, with a different base.

    This returns a new class instead of changing the bases, because torch lets copies of a module share the class.
    """
    members = {name: value for name, value in vars(parametrized).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), members)
