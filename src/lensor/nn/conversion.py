"""Make the convolutions of a torch model compute with Lensor."""

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
    """The model with every convolution and transposed convolution of torch computed by Lensor.

    A converted module is of a Lensor subclass of its own class and is the same in all else: parameters, state_dict,
    hooks, mode, device, dtype, parametrizations; a module used in several places stays one module. Subclasses that
    compute in a way of their own are left alone, with a warning that names them.

    Example:
        >>> import torch, lensor.nn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU())
        >>> lensor.nn.convert(model)[0].__class__
        <class 'lensor.nn.layers.Conv2d'>

    Args:
        model: any torch module, a convolution included.
        inplace: whether to change `model` itself instead of a copy of it.

    Returns:
        The copy, or `model` itself.

    Raises:
        TypeError: if `model` is no torch module.
        ValueError: if a lazy convolution waits for its first input, or if the model cannot be copied.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    for name, module in _convolutions(model):
        if isinstance(module, LazyModuleMixin):
            raise ValueError(
                f"{name} is a {type(module).__name__} that waits for its first input, expected an initialised model:"
                " run it once on an input before converting it"
            )
    if not inplace:
        model = copied(model)
    for name, module in _convolutions(model):
        new = _converted_class(type_before_parametrizations(module))
        if new is None:
            warnings.warn(
                f"{name} is left as it is: {type(module).__name__} computes its convolution in a way of its own",
                stacklevel=2,
            )
        elif is_parametrized(module):
            module.__class__ = with_base(type(module), new)
        else:
            module.__class__ = new
    return model


def _convolutions(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The convolutions of torch in a model, each once, with the names for messages."""
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and not isinstance(module, _MIXINS):
            yield repr(name) if name else "the model", module


def copied(model: Model) -> Model:
    """A deep copy; ValueError where a tensor is the result of a computation that the copy could not repeat."""
    memo: dict[int, Any] = {}
    again: list[tuple[str, str, Callable[[torch.nn.Module], torch.Tensor]]] = []
    for name, module in model.named_modules():
        computed = dict(_computed(module))
        for attribute, value in vars(module).items():
            if not isinstance(value, torch.Tensor) or value.is_leaf:
                continue
            if attribute not in computed:
                raise ValueError(
                    f"{attribute!r} of {repr(name) if name else 'the model'} is the result of a computation, which"
                    " torch cannot copy; expected parameters and buffers, or inplace=True"
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
    """The tensors that torch's hooks compute of a module's parameters before each call, and how."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield hook.name, hook.compute_weight
        elif isinstance(hook, SpectralNorm):
            yield hook.name, functools.partial(hook.compute_weight, do_power_iteration=False)
        elif isinstance(hook, BasePruningMethod):
            yield hook._tensor_name, hook.apply_mask


@functools.lru_cache(maxsize=256)
def _converted_class(cls: type) -> type | None:
    """Lensor's subclass of a class of convolutions, None if the class computes in a way of its own."""
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
    """Pickles and copies an object of a class that `_converted_class` made: by the class it was made from."""

    _made_from: type

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return (_new, (self._made_from,), *super().__reduce_ex__(max(protocol, 2))[2:])


def _new(cls: type) -> Any:
    converted: Any = _converted_class(cls)
    return converted.__new__(converted)


def with_base(parametrized: type, base: type) -> type:
    """The class that torch's parametrizations made for a module, on another base.

    A new class rather than new bases: torch lets copies of a module share the class.
    """
    members = {name: value for name, value in vars(parametrized).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), members)
