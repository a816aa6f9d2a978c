"""The layers of a model, what goes into them and what is propagated back to them, without touching the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from lensor.spec import ConvSpec

_Conv = nn.modules.conv._ConvNd


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution, transposed convolution or linear layer of a model.

    Args:
        name: the module's path, "" for the model itself.
        module: the module.
        weight: the weight's name among the model's parameters.
        bias: the bias's name, or None.
    """

    name: str
    module: nn.Module
    weight: str
    bias: str | None

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer; its positions are the axes between the batch and the features."""
        return isinstance(self.module, nn.Linear)

    @property
    def groups(self) -> int:
        """Groups of channels."""
        return getattr(self.module, "groups", 1)

    @cached_property
    def weight_shape(self) -> tuple[int, ...]:
        """The weight's shape in torch's layout."""
        return tuple(self.module.weight.shape)  # pyright: ignore[reportArgumentType]

    @property
    def is_transposed(self) -> bool:
        """Whether the weight has the layer's input channels first."""
        return bool(getattr(self.module, "transposed", False))

    def spec(self, x: Tensor) -> ConvSpec:
        """The convolution that the layer is, for an input in the layout of convolutions."""
        if self.is_linear:
            c_out, c_in = self.weight_shape
            kernel = () if x.ndim == 2 else 1
            return ConvSpec(c_in, c_out, tuple(x.shape[2:]), kernel, bias=self.bias is not None)
        return ConvSpec.from_module(self.module, input_size=tuple(x.shape[2:]))

    @property
    def output_channels(self) -> int:
        """Channels of the output, over all groups."""
        return self.weight_shape[1] * self.groups if self.is_transposed else self.weight_shape[0]

    def output_spec(self, gradient: Tensor) -> ConvSpec:
        """A convolution with the layer's outputs: of a kernel of size 1, for the output factor sees no kernel."""
        kernel = () if gradient.ndim == 2 else 1
        channels = self.output_channels
        return ConvSpec(channels, channels, tuple(gradient.shape[2:]), kernel, groups=self.groups)

    def as_examples(self, x: Tensor) -> Tensor:
        """A linear layer's input or output, its positions as examples: a view, for its channels are innermost."""
        return x.movedim(1, -1).flatten(0, -2) if self.is_linear and x.ndim > 2 else x

    def as_convolution(self, x: Tensor, batch: int) -> Tensor:
        """The layer's input or output with the layout [batch, channels, *positions]; a view.

        Raises:
            ValueError: if its first axis is not that of the examples.
        """
        if not self.is_linear:
            dims = len(self.module.kernel_size)  # pyright: ignore[reportArgumentType]
            if x.ndim != dims + 2 or len(x) != batch:
                raise ValueError(
                    f"layer {self.name!r} has an input or output of shape {tuple(x.shape)}, expected a batch of {batch}"
                    f" examples first, then channels and {dims} spatial axes"
                )
            return x
        if x.ndim < 2 or len(x) % batch or (x.ndim > 2 and len(x) > batch == x.shape[1]):
            raise ValueError(
                f"layer {self.name!r} has an input or output of shape {tuple(x.shape)}, expected a batch of {batch}"
                " examples first, or a multiple of it with the examples outermost"
            )
        if x.ndim == 2 and len(x) == batch:
            return x
        return x.reshape(batch, -1, x.shape[-1]).movedim(-1, 1)


def layers_of(model: nn.Module, layers: Iterable[str] | None = None, strict: bool = False) -> list[Layer]:
    """The layers of a model that curvature is computed for, in the order of `model.named_modules()`.

    Args:
        model: the model.
        layers: names of modules; all that are known unless given.
        strict: whether parametrised layers of other kinds are an error instead of a warning.

    Raises:
        TypeError: if `model` is no module.
        ValueError: for names that are not known, for tied weights, if there is no layer, or, if `strict`, for
            parametrised layers of other kinds.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    found: list[Layer] = []
    unknown: list[str] = []
    for name, module in model.named_modules():
        own = [f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)]
        if isinstance(module, (_Conv, nn.Linear)) and _is_plain(module):
            if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse=False)):
                raise ValueError(f"layer {name!r} is lazy and has seen no input yet: call the model first")
            prefix = f"{name}." if name else ""
            found.append(Layer(name, module, f"{prefix}weight", f"{prefix}bias" if module.bias is not None else None))
        elif own:
            unknown.append(f"{name or '(the model)'} ({type(module).__name__})")
    if layers is not None:
        wanted = [layers] if isinstance(layers, str) else list(layers)
        known = {layer.name: layer for layer in found}
        missing = [name for name in wanted if name not in known]
        if missing:
            raise ValueError(f"no layer named {', '.join(map(repr, missing))}, expected some of {', '.join(known)}")
        found = [layer for layer in found if layer.name in wanted]
    elif unknown:
        message = f"no curvature is computed for the parameters of {', '.join(unknown)}"
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)
    if layers is not None and not found:
        raise ValueError("layers names no layer")
    if not found:
        raise ValueError("the model has no convolution, transposed convolution or linear layer")
    _refuse_tied(model, found)
    return found


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer is computed as torch's layers are, with a weight and a bias that are its parameters.

    A subclass with a forward pass of its own (standardised weights, padding of its own) is another function of its
    parameters, and so is a layer with a parametrisation.
    """
    own = {key for key, _ in module.named_parameters(recurse=False)}
    if "weight" not in own or not own <= {"weight", "bias"} or (module.bias is not None) != ("bias" in own):
        return False
    for method in ("forward", "_conv_forward"):
        maker = next((one.__module__ for one in type(module).__mro__ if method in vars(one)), "torch.nn.")
        if method in vars(module) or not maker.startswith(("torch.nn.", "lensor.")):
            return False
    return True


def _refuse_tied(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Two names of one parameter mean two layers of one block, which no factor of either describes."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for layer in layers:
        for name in (layer.weight, layer.bias):
            if name is not None and len(names[id(parameters[name])]) > 1:
                raise ValueError(f"tied parameters are not supported: {' and '.join(names[id(parameters[name])])}")


# ------------------------------------------------------------------------------------------------------------ capturing
OnInput = Callable[[Layer, Tensor], None]


@dataclass
class Capture:
    """One forward pass: what is given to each layer is told at once, gradients at their outputs may be asked for later.

    Args:
        layers: the layers.
        on_input: is called with a layer and its input, in the layout of convolutions, when the layer runs. Half
            precision is widened to single, here and below.
        batch: the number of examples.
        on_output: is called with a layer and the gradient at its output when somebody propagates through the graph.
    """

    layers: Sequence[Layer]
    on_input: OnInput
    batch: int
    on_output: OnInput | None = None
    _edges: dict[str, GradientEdge] = field(default_factory=dict)
    _shapes: dict[str, torch.Size] = field(default_factory=dict)
    _expected: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on the layers while the block runs."""
        handles: list[RemovableHandle] = []
        for layer in self.layers:
            before, after = partial(_before, self, layer), partial(_after, self, layer)
            handles.append(layer.module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def before(self, layer: Layer, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """What a layer is about to be called with.

        Raises:
            ValueError: if it has run already, or the input is no batch.
        """
        if layer.weight in self._shapes:
            raise ValueError(f"layer {layer.name!r} runs twice on one input: its weight is shared, not supported")
        x = arguments[0] if arguments else named["input"]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x = layer.as_convolution(_widened(x.detach()), self.batch)
            if not layer.is_linear:
                self._expected[layer.weight] = layer.spec(x).output_size
            self.on_input(layer, x)

    def after(self, layer: Layer, out: Tensor) -> Tensor:
        """What a layer has returned; returns what takes its place.

        Raises:
            ValueError: if it is not of the size that the layer's hyper-parameters tell.
        """
        expected = self._expected.get(layer.weight)
        if expected is not None and tuple(out.shape[2:]) != expected:
            raise ValueError(
                f"layer {layer.name!r} returned positions {tuple(out.shape[2:])}, its hyper-parameters tell {expected}:"
                " an output_size in the call is not supported, give the layer its output_padding"
            )
        if not out.requires_grad and torch.is_grad_enabled():  # all before it is frozen
            out = out.detach().requires_grad_().clone()  # what comes next may write into it, but not into a leaf
        self._shapes[layer.weight] = out.shape
        if out.requires_grad:
            self._edges[layer.weight] = get_gradient_edge(out)
            if self.on_output is not None:
                out.register_hook(_telling(layer, self.on_output, self.batch))
        return out

    def check(self) -> None:
        """Raise for layers that did not run.

        Raises:
            ValueError: with their names.
        """
        idle = [layer.name for layer in self.layers if layer.weight not in self._shapes]
        if idle:
            raise ValueError(f"these layers did not run on the data, leave them out with layers=: {_listed(idle)}")

    def require_gradients(self, layers: Sequence[Layer]) -> None:
        """Raise for layers at whose outputs no gradient can be had.

        Raises:
            ValueError: with their names.
        """
        missing = [layer.name for layer in layers if layer.weight not in self._edges]
        if missing:
            raise ValueError(
                "these layers ran where gradients are not recorded (torch.no_grad, or a checkpoint with"
                f" use_reentrant=True), leave them out with layers=: {_listed(missing)}"
            )

    def gradients(
        self, outputs: Tensor, vector: Tensor, keep: bool, again: bool = False, only: Layer | None = None
    ) -> dict[str, Tensor]:
        """A vector at the model's outputs propagated to the output of every layer, in the layout of convolutions.

        Args:
            outputs: the model's outputs, or what was computed from them.
            vector: of their shape.
            keep: whether the graph is needed again.
            again: whether the result is to be differentiated.
            only: one layer instead of all.
        """
        layers = self.layers if only is None else [only]
        self.require_gradients(layers)
        edges = [self._edges[layer.weight] for layer in layers]
        found = torch.autograd.grad(outputs, edges, vector, retain_graph=keep, create_graph=again, allow_unused=True)
        result = {}
        for layer, gradient in zip(layers, found, strict=True):
            if gradient is None:
                gradient = vector.new_zeros(self._shapes[layer.weight])
            result[layer.weight] = layer.as_convolution(_widened(gradient), self.batch)
        return result


def _before(
    capture: Capture, layer: Layer, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> None:
    capture.before(layer, arguments, named)


def _after(capture: Capture, layer: Layer, module: nn.Module, arguments: tuple[Any, ...], out: Tensor) -> Tensor:
    return capture.after(layer, out)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name or "(the model)" for name in names)


def _telling(layer: Layer, on_output: OnInput, batch: int) -> Callable[[Tensor], None]:
    """A hook of a tensor. It must not know a Capture, which knows the graph that keeps the hook: nothing frees that."""

    def hook(gradient: Tensor) -> None:
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            on_output(layer, layer.as_convolution(_widened(gradient), batch))

    return hook


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model and leave its buffers (statistics of normalisation in training mode) as they were.

    What did not change is not written: a graph may need it. Values are compared, for normalisation writes its
    statistics past torch's count of versions.
    """
    training = any(module.training for module in model.modules())
    before = {name: buffer.detach().clone() for name, buffer in (model.named_buffers() if training else ())}
    try:
        yield
    finally:
        buffers = dict(model.named_buffers())
        with torch.no_grad():
            for name, value in before.items():
                if not torch.equal(buffers[name], value):
                    buffers[name].copy_(value)


Inputs = Any
"""What a model is called with: a tensor, a tuple of arguments, or a mapping of named ones."""


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's outputs as a tensor: itself, its `logits`, or the first of several.

    Raises:
        TypeError: if there is no tensor.
    """
    if isinstance(inputs, Mapping):
        found = model(**inputs)
    else:
        found = model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    if not isinstance(found, Tensor):
        logits = getattr(found, "logits", None)
        found = logits if logits is not None else found[0] if isinstance(found, (tuple, list)) else found
    if not isinstance(found, Tensor):
        raise TypeError(f"the model returns a {type(found).__name__}, expected a tensor, or something with logits")
    return found


def over_positions(v: Tensor, front: int = 2) -> Tensor:
    """The sum over positions: the axes behind the first `front`, which end with the channels."""
    return v.flatten(front).sum(front) if v.ndim > front else v


def size_of(inputs: Inputs) -> int:
    """The number of examples.

    Raises:
        ValueError: if there is no tensor with a batch axis, or no example.
    """
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    first = inputs if isinstance(inputs, Tensor) else next((v for v in values if isinstance(v, Tensor)), None)
    if first is None or first.ndim == 0:
        raise ValueError("the inputs hold no tensor with a batch axis")
    if len(first) == 0:
        raise ValueError("a batch holds no example")
    return len(first)


def batches(data: Any) -> Iterator[tuple[Inputs, Any]]:
    """Pairs (inputs, targets): of a loader, or the one that is given.

    Raises:
        TypeError: for anything else.
        ValueError: if there are none.
    """
    if isinstance(data, Tensor):
        raise TypeError("data is a tensor, expected a pair (inputs, targets) or an iterable of such pairs")
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor):
        data = [data]
    empty = True
    for pair in data:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"data holds a {type(pair).__name__}, expected pairs (inputs, targets)")
        empty = False
        yield pair[0], pair[1]
    if empty:
        raise ValueError("data holds no batch")
