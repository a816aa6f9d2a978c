"""The distinct convolutions of a model, each with the input it was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import lensor
from lensor.network import Operand, Pattern


@dataclass(frozen=True)
class Layer:
    """A convolution of a model: `modules` of them have these hyper-parameters and this input size."""

    model: str
    name: str
    spec: lensor.ConvSpec
    modules: int

    @property
    def label(self) -> str:
        """The model and the convolution in a few characters, as in `resnet18 64→128 3×3 s2 @32²`."""
        spec = self.spec
        grouped = f"/{spec.groups}" if spec.groups > 1 else ""
        parts = [f"{spec.in_channels}→{spec.out_channels}{grouped}", "×".join(map(str, spec.kernel_size))]
        if set(spec.stride) != {1}:
            parts.append("s" + "×".join(map(str, dict.fromkeys(spec.stride))))
        sizes = spec.input_size
        parts.append(f"@{sizes[0]}²" if len(set(sizes)) == 1 and len(sizes) == 2 else "@" + "×".join(map(str, sizes)))
        return f"{self.model} {' '.join(parts)}"

    @property
    def kind(self) -> str:
        """The spec's kind, and whether each channel is a group of its own."""
        depthwise = self.spec.groups == self.spec.in_channels > 1
        return f"{self.spec.kind}, depthwise" if depthwise else self.spec.kind

    def network(self, approx: str) -> Any:
        """The network of the input factor, before simplification."""
        return lensor.ops.kfac_input_factor(self.spec, approx)


def short_form(net: lensor.Network) -> str:
    """The first copy of X, then one letter for each pattern on it: Π, or S for a selection (slice, pad).

    Example:
        >>> import lensor
        >>> from lensor.demo.layers import short_form
        >>> short_form(lensor.ops.kfac_input_factor(lensor.ConvSpec(4, 8, (9,), 3)))
        'X[n (g c_in) i1] Π'
    """
    operand = next(node for node in net.nodes if isinstance(node, Operand))
    reached = {index for leg in operand.legs for index in leg}
    letters = []
    for node in net.nodes:
        if isinstance(node, Pattern) and reached.intersection(node.legs[0]):
            letters.append("S" if node.pattern.is_selection else "Π")
    legs = " ".join(f"({' '.join(leg)})" if len(leg) > 1 else (leg or ("1",))[0] for leg in operand.legs)
    return " ".join([f"X[{legs}]", *letters])


def record(model: torch.nn.Module, name: str, batch: torch.Tensor) -> list[tuple[Layer, torch.Tensor]]:
    """The distinct convolutions of a model in the order in which they run, each with the first input it saw."""
    found: dict[lensor.ConvSpec, tuple[Layer, torch.Tensor]] = {}

    def recorder(path: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
            (x,) = inputs
            spec = lensor.ConvSpec.from_module(module, input_size=tuple(x.shape[2:]))
            known = found.get(spec)
            if known is None:
                found[spec] = Layer(name, path, spec, 1), x.detach().contiguous().clone()
            else:
                found[spec] = replace(known[0], modules=known[0].modules + 1), known[1]

        return hook

    convolutions = [(path, module) for path, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    hooks = [module.register_forward_hook(recorder(path)) for path, module in convolutions]
    try:
        with torch.no_grad():
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())
