"""Watching a model run: the calls of its layers' functions, in one thread, without touching the model."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore[reportMissingImports]
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lensor.curvature.layers import Layer
from lensor.nn.calls import LayerCall, layer_call


class Targets:
    """The parameters of some layers, by identity.

    Args:
        layers: the layers; those that share a parameter are one target, with the first one's name for it.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)
        self.weights: dict[int, tuple[str, Layer]] = {}
        self.biases: dict[int, str] = {}
        self.parameters: dict[str, Tensor] = {}
        self.owners: dict[str, Layer] = {}
        self.names: dict[int, str] = {}
        for layer in layers:
            weight, bias = layer.module.weight, layer.module.bias
            if id(weight) not in self.weights:
                self.weights[id(weight)] = layer.weight, layer
                self._add(layer.weight, weight, layer)
            if layer.bias is not None and id(bias) not in self.biases:
                self.biases[id(bias)] = layer.bias
                self._add(layer.bias, bias, layer)

    def _add(self, name: str, parameter: Any, layer: Layer) -> None:
        self.parameters[name], self.owners[name], self.names[id(parameter)] = parameter, layer, name


class Watch(TorchFunctionMode):
    """Sees every call of a torch function in the current thread while it is active.

    The functions of layers are met where the layer calls them, so that hooks on modules, in any order, are outside.
    What runs in other threads is not seen.

    Args:
        targets: whose calls are passed to `on_layer`, and whose other uses to `on_other`.
    """

    def __init__(self, targets: Targets) -> None:
        super().__init__()
        self.targets, self._depth = targets, 0

    def __enter__(self) -> Self:
        self._depth = depth()
        return super().__enter__()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Sequence[Any] = (), named: Any = None
    ) -> Any:
        """One call."""
        named = named or {}
        if depth() > self._depth:  # Lensor's own runs of the model inside of the one that is watched
            return function(*arguments, **named)
        call = layer_call(function, arguments, named)
        if call is not None and id(call.weight) in self.targets.weights:
            name = self.targets.weights[id(call.weight)][1].name
            if is_functorch_wrapped_tensor(call.input):
                raise ValueError(
                    f"layer {name!r} runs inside of a transform of torch.func (vmap, grad), where inputs are not those"
                    " of all examples: leave it out with layers="
                )

            def run() -> Tensor:
                try:
                    return self.call(function, arguments, named)
                except (RuntimeError, ValueError, TypeError) as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    raise ValueError(f"layer {name!r} cannot be computed: {error}") from error

            return self.on_layer(call, run)
        result = self.call(function, arguments, named)
        names = self.targets.names
        for value in (*arguments, *named.values()):
            for one in value if isinstance(value, (tuple, list)) else (value,):
                name = names.get(id(one))
                if name is not None and _is_use(function, one, result):
                    self.on_other(name, getattr(function, "__name__", str(function)))
        return result

    def call(self, function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        """The result of a function."""
        return function(*arguments, **named)

    def on_layer(self, call: LayerCall, run: Callable[[], Tensor]) -> Tensor:
        """A call with one of the weights; returns what takes its place."""
        raise NotImplementedError

    def on_other(self, name: str, function: str) -> None:
        """A parameter is an argument of another function."""


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
"""Functions whose result does not depend on the values of their argument, or is detached from it."""


def _is_use(function: Callable[..., Any], parameter: Tensor, result: Any) -> bool:
    """Whether a function has made something of the values of a parameter."""
    if function in _WITHOUT_VALUES:
        return False
    results = result if isinstance(result, (tuple, list)) else (result,)
    return any(
        isinstance(one, Tensor) and one is not parameter and (one.is_floating_point() or one.is_complex())
        for one in results
    )


# ------------------------------------------------------------------------------------------------- the model as it was
_thread = threading.local()


@contextmanager
def aside() -> Iterator[None]:
    """Runs of a model in this thread are Lensor's own: optimizers collect nothing of them."""
    _thread.depth = depth() + 1
    try:
        yield
    finally:
        _thread.depth -= 1


def depth() -> int:
    """How many times the current thread is inside `aside`."""
    return getattr(_thread, "depth", 0)


_WRITES = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_WRITES |= {"__setitem__", "__set__", "__ilshift__", "__irshift__"}


def written(function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> list[Any]:
    """What a torch function writes into: its `out`, or the first argument of those that work in place."""
    name = getattr(function, "__name__", "")
    if named.get("out") is not None:
        found = named["out"]
    elif arguments and (name in _WRITES or (name[-1:] == "_" and name[-2:] != "__")):
        found = arguments[0]
    else:
        return []
    return list(found) if isinstance(found, (tuple, list)) else [found]


_DATA = vars(torch._C.TensorBase)["data"]


class _Kept:
    """What the tensors of a model held before functions wrote into them: parameters, buffers and attributes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._owners: dict[int, Tensor] | None = None
        self._storages: dict[int, tuple[Tensor, Any]] = {}
        self._data: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, tensor: Any, data: bool) -> None:
        """Keep what a tensor holds, if it is one of the model's; with `data` also the memory that it refers to."""
        if not isinstance(tensor, Tensor):
            return
        if self._owners is None:
            self._owners = {}
            for one in _tensors_of(self.model):
                place = _address(one)
                if place:
                    self._owners.setdefault(place, one)
        place = _address(tensor)
        if data and any(tensor is one for one in self._owners.values()):
            self._data.setdefault(id(tensor), (tensor, tensor.detach()))
        elif place in self._owners and place not in self._storages:
            with torch.no_grad():
                self._storages[place] = (self._owners[place].detach(), tensor.untyped_storage().clone())

    def put_back(self) -> None:
        """Undo what was written."""
        for tensor, data in self._data.values():
            tensor.data = data
        for owner, storage in self._storages.values():
            owner.untyped_storage().copy_(storage)


def _address(tensor: Tensor) -> int:
    """Where a tensor's memory is; 0 for tensors without any."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for name, value in vars(module).items():
            if not name.startswith("_"):
                yield from (one for one in tree_leaves(value) if isinstance(one, Tensor))


class Preserving(TorchFunctionMode):
    """Keeps what a model's tensors held, for `undisturbed`, before functions write into them."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Sequence[Any] = (), named: Any = None
    ) -> Any:
        """One call."""
        named = named or {}
        kept: list[_Kept] = getattr(_thread, "kept", [])
        if kept:
            data = getattr(function, "__self__", None) is _DATA
            for tensor in written(function, arguments, named):
                kept[-1].keep(tensor, data)
        return function(*arguments, **named)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model, within `Preserving`, and leave its parameters, buffers and tensors among attributes as they were.

    What did not change is not written: a graph may need it. Buffers of models in training mode are compared, for
    normalisation writes its statistics past torch's functions and count of versions.
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
    """Take back what a trial run writes into the attributes of modules, and into lists and dictionaries there."""
    known = [(module, dict(vars(module)), _copies(module)) for module in modules]
    try:
        yield
    finally:
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


def _copies(module: nn.Module) -> list[tuple[Any, Any]]:
    """Lists and dictionaries among the attributes, with copies; buffers, which torch keeps in a dictionary, as well."""
    return [(value, value.copy()) for value in vars(module).values() if type(value) in (list, dict)]


def uncast(like: Tensor) -> AbstractContextManager[Any]:
    """Own computations are not cast by `torch.autocast`."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


# ------------------------------------------------------------------------------------------------------ compiled models
_stance_lock = threading.Lock()
_stance: Any = None
_inside = 0
"""How many threads are inside `eagerly`; the first one sets the compiler's stance, the last one sets it back."""


@contextmanager
def eagerly() -> Iterator[None]:
    """Let compiled models and compiled parts of models run as they were written.

    The setting is torch's own and is valid for all threads: compiled models that others run meanwhile are not compiled
    either, and give the same numbers.
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
