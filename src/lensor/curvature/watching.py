"""Watches the calls of a model's layer functions in one thread, without changing the model."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore[reportMissingImports]
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lensor.curvature.flow import Flow
from lensor.curvature.layers import Layer
from lensor.curvature.tracing import untraced
from lensor.curvature.writes import address, results_of, written
from lensor.nn.calls import LayerCall, layer_call


class Targets:
    """The parameters of some layers, looked up by identity.

    Args:
        layers: the layers. A parameter that several layers share is one target, named after the first of these layers.
        parameters: the parameters of these layers and of other modules, in the order of the results, if any function
            may use them.
        read: returns the parameter of a module that its calls use, by the parameter's name in the module.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        parameters: Mapping[str, Tensor] | None = None,
        read: Callable[[nn.Module, str], Any] = getattr,
    ) -> None:
        self.layers, self.complete = list(layers), parameters is not None
        self.weights: dict[int, tuple[str, Layer]] = {}
        self.biases: dict[int, str] = {}
        self.parameters: dict[str, Tensor] = {}
        self.owners: dict[str, Layer] = {}
        self.names: dict[int, str] = {}
        for layer in layers:
            weight, bias = read(layer.module, "weight"), read(layer.module, "bias")
            if id(weight) not in self.weights:
                self.weights[id(weight)] = layer.weight, layer
                self._add(layer.weight, weight, layer)
            if layer.bias is not None and id(bias) not in self.biases:
                self.biases[id(bias)] = layer.bias
                self._add(layer.bias, bias, layer)
        if parameters is not None:
            self.parameters = dict(parameters)
            self.names = {id(parameter): name for name, parameter in parameters.items()}

    def _add(self, name: str, parameter: Any, layer: Layer) -> None:
        self.parameters[name], self.owners[name], self.names[id(parameter)] = parameter, layer, name

    def is_layer(self, call: LayerCall) -> bool:
        """Whether a call is a layer's: with its weight, and without a bias that was computed from parameters.

        The bias may be a parameter that is not watched, but not one of another module that is.
        """
        if id(call.weight) not in self.weights:
            return False
        if not self.complete or call.bias is None or id(call.bias) in self.biases or not call.bias.requires_grad:
            return True
        return call.bias.is_leaf and id(call.bias) not in self.names


class Watch(TorchFunctionMode):
    """Sees every call of a torch function in the current thread while it is active.

    It intercepts the function of a layer where the layer calls that function, so hooks on modules run before or after
    the interception, in any order. It does not see calls in other threads.

    Args:
        targets: the parameters; calls of layers go to `on_layer`, and other functions to `on_function`.
        flow: the dependences of tensors, if these are needed.
    """

    def __init__(self, targets: Targets, flow: Flow | None = None) -> None:
        super().__init__()
        self.targets, self.flow, self._depth = targets, flow, 0

    def __enter__(self) -> Self:
        self._depth = depth()
        return super().__enter__()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Sequence[Any] = (), named: Any = None
    ) -> Any:
        """Handle one call."""
        named = named or {}
        if depth() > self._depth:  # Lensor itself runs the model inside the watched run
            return function(*arguments, **named)
        result = self._result(function, arguments, named)
        if self.flow is not None:
            self.flow.mark(tree_leaves((tuple(arguments), named)), results_of(function, arguments, named, result))
        return result

    def _result(self, function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        call = layer_call(function, arguments, named)
        if call is not None and self.targets.is_layer(call):
            name = self.targets.weights[id(call.weight)][1].name
            require_unmapped(call.input, f"layer {name!r}")

            def run() -> Tensor:
                try:
                    return self.call(function, arguments, named)
                except (RuntimeError, ValueError, TypeError) as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    raise ValueError(f"layer {name!r} cannot be computed: {error}") from error

            return self.on_layer(call, run)
        return self.on_function(function, arguments, named)

    def call(self, function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        """Call a function and return its result."""
        return function(*arguments, **named)

    def on_layer(self, call: LayerCall, run: Callable[[], Tensor]) -> Tensor:
        """Handle a call with one of the weights; the return value replaces the result of the call."""
        raise NotImplementedError

    def on_function(self, function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        """Handle any other call; the return value replaces its result."""
        result = self.call(function, arguments, named)
        names = self.targets.names
        for value in (*arguments, *named.values()):
            for one in value if isinstance(value, (tuple, list)) else (value,):
                name = names.get(id(one))
                if name is not None and is_use(function, one, result):
                    self.on_other(name, getattr(function, "__name__", str(function)))
        return result

    def on_other(self, name: str, function: str) -> None:
        """Handle another function's use of a parameter."""


def require_unmapped(value: Any, what: str) -> None:
    """Raise ValueError for a tensor inside of a transform of torch.func; `what` names the function that takes it."""
    if isinstance(value, Tensor) and is_functorch_wrapped_tensor(value):
        raise ValueError(
            f"{what} runs inside of a transform of torch.func (vmap, grad), where its input does not contain all"
            " examples: leave it out with layers="
        )


_WITHOUT_VALUES = {
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.rand_like,
    torch.randn_like,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_empty,
    Tensor.detach,
    torch.detach,
    vars(torch._C.TensorBase)["data"].__get__,
    vars(torch._C.TensorBase)["grad"].__get__,
}
"""Functions whose result is independent of their argument's values, or detached from it."""


def is_use(function: Callable[..., Any], parameter: Tensor, result: Any) -> bool:
    """Whether a function computed a tensor from the values of a parameter."""
    if function in _WITHOUT_VALUES:
        return False
    results = result if isinstance(result, (tuple, list)) else (result,)
    return any(
        isinstance(one, Tensor) and one is not parameter and (one.is_floating_point() or one.is_complex())
        for one in results
    )


# ------------------------------------------------------------------------------------------------ restoring the model
_thread = threading.local()


@contextmanager
def aside() -> Iterator[None]:
    """Mark runs of a model in this thread as Lensor's own, so that optimizers ignore them."""
    _thread.depth = depth() + 1
    try:
        yield
    finally:
        _thread.depth -= 1


def depth() -> int:
    """The number of `aside` blocks that the current thread is in."""
    return getattr(_thread, "depth", 0)


_DATA = vars(torch._C.TensorBase)["data"]


class _Kept:
    """Saved contents of a model's parameters, buffers and attribute tensors, from before functions wrote into them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._owners: dict[int, Tensor] | None = None
        self._storages: dict[int, tuple[Tensor, Any]] = {}
        self._data: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, tensor: Any, data: bool) -> None:
        """Save the contents of a tensor of the model or, with `data`, the memory to which the tensor refers."""
        if not isinstance(tensor, Tensor):
            return
        if self._owners is None:
            self._owners = {}
            for one in _tensors_of(self.model):
                place = address(one)
                if place:
                    self._owners.setdefault(place, one)
        place = address(tensor)
        if data and any(tensor is one for one in self._owners.values()):
            self._data.setdefault(id(tensor), (tensor, tensor.detach()))
        elif place in self._owners and place not in self._storages:
            with torch.no_grad(), untraced():
                self._storages[place] = (self._owners[place].detach(), tensor.untyped_storage().clone())

    def put_back(self) -> None:
        """Restore everything that was saved."""
        for tensor, data in self._data.values():
            tensor.data = data
        for owner, storage in self._storages.values():
            owner.untyped_storage().copy_(storage)


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for name, value in vars(module).items():
            if not name.startswith("_"):
                yield from (one for one in tree_leaves(value) if isinstance(one, Tensor))


class Preserving(TorchFunctionMode):
    """Saves the contents of a model's tensors for `undisturbed` before functions write into them."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Sequence[Any] = (), named: Any = None
    ) -> Any:
        """Handle one call."""
        named = named or {}
        kept: list[_Kept] = getattr(_thread, "kept", [])
        if kept:
            data = getattr(function, "__self__", None) is _DATA
            for tensor in written(function, arguments, named):
                kept[-1].keep(tensor, data)
        return function(*arguments, **named)


def preserve(tensors: Iterable[Tensor]) -> None:
    """Save the contents of a model's tensors for `undisturbed`, before a graph writes into them."""
    for tensor in tensors:
        _thread.kept[-1].keep(tensor, data=False)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model within `Preserving`, then restore its parameters, buffers and attribute tensors.

    Unchanged tensors are not written, because a graph may need them. The buffers of models in training mode are
    compared with copies, because normalisation layers update their statistics without calling torch functions or
    changing version counters.
    """
    training = any(module.training for module in model.modules())
    before = {name: buffer.detach().clone() for name, buffer in (model.named_buffers() if training else ())}
    stack = _thread.__dict__.setdefault("kept", [])
    stack.append(_Kept(model))
    try:
        yield
    finally:
        stack.pop().put_back()
        buffers = dict(model.named_buffers())
        with torch.no_grad():
            for name, value in before.items():
                if name in buffers and not torch.equal(buffers[name], value):
                    buffers[name].copy_(value)


@contextmanager
def forgotten(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the attributes of modules after a trial run, including the contents of lists and dictionaries."""
    restore = _attributes(modules)
    try:
        yield
    finally:
        restore()


def _attributes(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Save the attributes of modules; the result restores them."""
    known = [(module, dict(vars(module)), _copies(module)) for module in modules]

    def restore() -> None:
        for module, before, copies in known:
            now = vars(module)
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update({name: value for name, value in before.items() if now.get(name) is not value})
            for held, copied in copies:
                if isinstance(held, list):
                    if len(held) != len(copied) or any(a is not b for a, b in zip(held, copied, strict=True)):
                        held[:] = copied
                elif held.keys() != copied.keys() or any(held[key] is not copied[key] for key in copied):
                    held.clear()
                    held.update(copied)

    return restore


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Run a model in the `with` block without effects on its tensors and attributes and on random generators.

    The effects of functions of torch on tensors are undone within `Preserving`; see `undisturbed`.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(undisturbed(model))
        stack.enter_context(forgotten(list(model.modules())))
        # Weights cached by autocast would connect the graphs of two passes.
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        yield


class RandomState:
    """The state of the random generators that a model may use.

    Args:
        model: the model; the generators of GPUs are included if it has parameters on one.
    """

    def __init__(self, model: nn.Module) -> None:
        cuda = torch.cuda.is_available() and any(one.is_cuda for one in model.parameters())
        self._cuda = torch.cuda.get_rng_state_all() if cuda else []
        self._states = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def restore(self) -> None:
        """Set the generators to this state."""
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        torch.set_rng_state(self._states[0])
        random.setstate(self._states[1])
        np.random.set_state(self._states[2])


class Rewind:
    """The state of a model and of the random generators before the first pass within `undisturbed`.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._restore = _attributes(list(model.modules()))
        training = any(module.training for module in model.modules())
        self._buffers = [(one, one.detach().clone()) for one in (model.buffers() if training else ())]
        self._random = RandomState(model)

    def restore(self) -> None:
        """Undo what the passes since then have changed."""
        _thread.kept[-1].put_back()
        self._restore()
        with torch.no_grad():
            for one, value in self._buffers:
                one.copy_(value)
        self._random.restore()


def _copies(module: nn.Module) -> list[tuple[Any, Any]]:
    """The attributes that are lists or dictionaries, with copies, including torch's dictionary of buffers."""
    return [(value, value.copy()) for value in vars(module).values() if type(value) in (list, dict)]


def widened(x: Tensor) -> Tensor:
    """The tensor; in single precision, if it is in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def uncast(like: Tensor) -> AbstractContextManager[Any]:
    """Turn off `torch.autocast` for Lensor's own computations."""
    kind = like.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


# ------------------------------------------------------------------------------------------------------ compiled models
_stance_lock = threading.Lock()
_stance: Any = None
_inside = 0
"""Number of threads inside `eagerly`; the first one sets the compiler's stance, the last one restores it."""


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled models, and compiled parts of models, uncompiled.

    The setting belongs to torch and applies to all threads: meanwhile, compiled models in other threads also run
    uncompiled, with the same results.
    """
    global _stance, _inside
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _stance_lock:
        if not _inside:
            _stance = torch.compiler.set_stance("force_eager")
        _inside += 1
    try:
        yield
    finally:
        with _stance_lock:
            _inside -= 1
            if not _inside:
                _stance.__exit__(None, None, None)
                _stance = None
