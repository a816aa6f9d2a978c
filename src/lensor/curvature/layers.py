"""Selects the layers of a model for which curvature is computed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

_Conv = nn.modules.conv._ConvNd
_TRANSFORMERS = "transformers.pytorch_utils"
"""The module in which transformers defines `Conv1D`."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution, transposed convolution or linear layer of a model, or a `Conv1D` of transformers.

    Args:
        name: the path of the module, "" for the model itself.
        module: the module.
        weight: the parameter name of the weight.
        bias: the parameter name of the bias, or None.
    """

    name: str
    module: nn.Module
    weight: str
    bias: str | None

    @property
    def is_linear(self) -> bool:
        """Whether this is a linear layer, whose positions are the axes between batch and features."""
        return isinstance(self.module, nn.Linear) or _is_conv1d(self.module)

    @property
    def groups(self) -> int:
        """Number of channel groups."""
        return getattr(self.module, "groups", 1)

    @cached_property
    def weight_shape(self) -> tuple[int, ...]:
        """The weight's shape in torch's layout."""
        return tuple(self.module.weight.shape)  # pyright: ignore[reportArgumentType]

    @property
    def is_transposed(self) -> bool:
        """Whether the weight has the input channels first."""
        return bool(getattr(self.module, "transposed", False)) or _is_conv1d(self.module)

    @property
    def output_channels(self) -> int:
        """Number of output channels, over all groups."""
        return self.weight_shape[1] * self.groups if self.is_transposed else self.weight_shape[0]

    def __str__(self) -> str:
        return repr(self.name) if self.name else "(the model)"


def require_module(model: Any) -> None:
    """Raise TypeError unless the model is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has type {type(model).__name__}, expected torch.nn.Module")


def layers_of(
    model: nn.Module,
    layers: Iterable[str] | None = None,
    strict: bool = False,
    *,
    shared: bool = False,
    trainable: bool = False,
    among: Collection[str] | None = None,
) -> list[Layer]:
    """The layers of a model for which curvature is computed, in the order of `model.named_modules()`.

    Args:
        model: the model.
        layers: names of modules; all supported layers unless given.
        strict: whether parametrised layers of unsupported kinds raise an error instead of a warning.
        shared: whether layers may share a parameter.
        trainable: whether the result must contain exactly the model's parameters that require a gradient, unless
            `layers` is given.
        among: names of parameters; unsupported layers without any of them are not reported.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: for an unknown name, for tied weights unless `shared`, for a model without layers, for complex
            parameters, or, if `strict` or `trainable`, for parametrised layers of unsupported kinds.
    """
    require_module(model)
    found = list(_plain_layers(model))
    plain = {layer.name for layer in found}
    unknown: list[str] = []
    for name, module in model.named_modules():
        own = [p for one, p in module.named_parameters(name, recurse=False) if among is None or one in among]
        if own and name not in plain and (not trainable or any(p.requires_grad for p in own)):
            unknown.append(f"{name or '(the model)'} ({type(module).__name__})")
    if layers is not None:
        wanted = [layers] if isinstance(layers, str) else list(layers)
        if not wanted:
            raise ValueError("layers is empty, expected at least one name")
        known = {layer.name: layer for layer in found}
        missing = [name for name in wanted if name not in known]
        if missing and known:
            raise ValueError(f"layers has {_listed(missing)}, expected names from {_listed(known)}")
        found = [layer for layer in found if layer.name in wanted]
    elif unknown:
        message = f"curvature is not supported for the parameters of {', '.join(unknown)}"
        if trainable:
            raise ValueError(f"{message}, expected a model with supported layers only: choose among them with layers=")
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=outer_level())
    if not found:
        raise ValueError("the model has no convolution, transposed convolution or linear layer, expected at least one")
    _require_usable(found)
    if not shared:
        _refuse_tied(model, found)
    return found


def all_parameters(
    model: nn.Module, layers: Iterable[str] | None = None, frozen: bool = True
) -> tuple[list[Layer], dict[str, nn.Parameter]]:
    """The layers of a model, and the parameters of these layers and of other modules, in the order of the model.

    Parameters of other modules are left out if they do not require a gradient. A parameter with several names has the
    first one.

    Args:
        model: the model.
        layers: names of modules with parameters; all of them unless given.
        frozen: whether to include the frozen parameters of layers, although `layers` is not given.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: for an unknown name, for a model without parameters that require gradients, for lazy layers or
            complex parameters.
    """
    require_module(model)
    owners = {name: module for name, module in model.named_modules() if any(True for _ in module.parameters(False))}
    wanted = list(owners)
    if layers is not None:
        wanted = [layers] if isinstance(layers, str) else list(layers)
        if not wanted:
            raise ValueError("layers is empty, expected at least one name")
        missing = [name for name in wanted if name not in owners]
        if missing and owners:
            raise ValueError(f"layers has {_listed(missing)}, expected names from {_listed(owners)}")
    names = {id(parameter): name for name, parameter in reversed(list(model.named_parameters(remove_duplicate=False)))}
    found = [
        replace(
            layer,
            weight=names[id(layer.module.weight)],
            bias=None if layer.bias is None else names[id(layer.module.bias)],
        )
        for layer in _plain_layers(model)
        if layer.name in wanted
    ]
    if not frozen and layers is None:
        found = [
            replace(layer, bias=layer.bias if layer.bias is not None and layer.module.bias.requires_grad else None)
            for layer in found
            if any(parameter.requires_grad for parameter in layer.module.parameters(recurse=False))
        ]
    plain = {id(layer.module.weight) for layer in found}
    plain |= {id(layer.module.bias) for layer in found if layer.bias is not None}
    asked = {id(parameter) for name in wanted for parameter in owners[name].parameters(recurse=False)}
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in asked and (parameter.requires_grad or id(parameter) in plain)
    }
    if not parameters:
        raise ValueError(
            "the model has no layer and no parameter that requires a gradient, expected at least one: to use frozen"
            " layers, name them with layers="
        )
    _require_usable(found)
    for name, parameter in parameters.items():
        _require_real(name.rpartition(".")[0], [parameter])
    return found, parameters


def refuse_mixing(model: nn.Module) -> None:
    """Raise for layers that normalise with batch statistics, because these layers mix the examples."""
    mixing = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    ]
    if mixing:
        raise ValueError(
            f"examples are mixed by the statistics of {', '.join(mixing)}: call model.eval() first, or, without running"
            " statistics, use group normalisation; kfac also accepts others='skip'"
        )


def _plain_layers(model: nn.Module) -> Iterator[Layer]:
    """The convolutions, transposed convolutions and linear layers of a model, in the order of its modules."""
    # Attention uses the parameters of its last linear layer without calling that layer.
    inside = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        if _is_layer(module) and _is_plain(module) and id(module) not in inside:
            if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse=False)):
                raise ValueError(f"layer {name!r} is lazy, expected an initialised layer: call the model first")
            prefix = f"{name}." if name else ""
            yield Layer(name, module, f"{prefix}weight", f"{prefix}bias" if module.bias is not None else None)


def _require_usable(found: Iterable[Layer]) -> None:
    """Raise ValueError for layers with complex parameters, or with parameters made under torch.inference_mode."""
    for layer in found:
        _require_real(layer.name, layer.module.parameters(recurse=False))


def _require_real(name: str, parameters: Iterable[Any]) -> None:
    for parameter in parameters:
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"layer {name!r} is lazy, expected an initialised layer: call the model first")
        if parameter.is_complex():
            raise ValueError(f"layer {name!r} has complex parameters, expected real ones: leave it out with layers=")
        if parameter.is_inference():
            raise ValueError(
                f"layer {name!r} has parameters made under torch.inference_mode, expected ordinary ones: make the"
                " model outside of it, or replace the parameters by clones"
            )


def require_known_layers(names: Iterable[str], model: nn.Module) -> None:
    """Raise ValueError if `batch_axis` contains a name that is not a convolution or linear layer of the model."""
    known = [name for name, module in model.named_modules() if _is_layer(module)]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"batch_axis has {_listed(unknown)}, expected names from {_listed(known)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def outer_level() -> int:
    """The stack level of the first caller outside Lensor, for warnings."""
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("lensor.", "contextlib")):
        frame, level = frame.f_back, level + 1
    return level


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (_Conv, nn.Linear)) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the linear layer of transformers' GPT-2, whose weight has the layout [inputs, outputs]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == _TRANSFORMERS


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer computes the same function as torch's layer, with parameters as its weight and bias.

    This excludes subclasses with a different forward pass (standardised weights, different padding) and parametrised
    layers, which are different functions of their parameters.
    """
    own = {key for key, _ in module.named_parameters(recurse=False)}
    if "weight" not in own or not own <= {"weight", "bias"} or (module.bias is not None) != ("bias" in own):
        return False
    for method in ("forward", "_conv_forward"):
        maker = next((one.__module__ for one in type(module).__mro__ if method in vars(one)), "torch.nn.")
        if _is_changed(module, method) or not maker.startswith(("torch.nn.", "lensor.", _TRANSFORMERS)):
            return False
    return True


def _is_changed(module: nn.Module, method: str) -> bool:
    """Whether an object overrides a method of its class; Lensor's own replacement of `forward` does not count."""
    own = vars(module).get(method)
    if own is None or getattr(own, "watches", False):
        return False
    return getattr(own, "__func__", None) is not getattr(type(module), method)


def _refuse_tied(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Raise if a parameter has two names: two layers would share a block that neither layer's factors describe."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for layer in layers:
        for name in (layer.weight, layer.bias):
            if name is not None and len(names[id(parameters[name])]) > 1:
                raise ValueError(f"{' and '.join(names[id(parameters[name])])} are tied, expected separate parameters")
