"""Finds the convolutions of any torch model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lensor.inspect.errors import CommandError, in_one_line
from lensor.inspect.layers import Layer
from lensor.spec import ConvSpec

_Conv = torch.nn.modules.conv._ConvNd


_ORDER = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_ORDER_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
FUNCTIONS = {f"conv{dims}d": _ORDER for dims in (1, 2, 3)} | {
    f"conv_transpose{dims}d": _ORDER_TRANSPOSED for dims in (1, 2, 3)
}
"""torch's convolution functions, and the order of their arguments."""


def record(model: torch.nn.Module, name: str, *inputs: torch.Tensor) -> list[tuple[Layer, torch.Tensor]]:
    """The distinct convolutions of a model in the order in which they run, each with its first input.

    This finds convolutions and transposed convolutions of any number of dimensions, both as modules and as calls of
    torch's functions; a convolution that runs twice counts twice. On the meta device this takes almost no memory or
    time.

    Example:
        >>> import torch
        >>> from lensor.inspect.extract import record
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 1), torch.nn.Conv2d(8, 8, 1))
        >>> for layer, _ in record(model, "net", torch.zeros(1, 3, 9, 9)):
        ...     print(layer.name, layer.count, layer.label)
        0 1 net 3→8 3×3 @9²
        1 2 net 8→8 1×1 @7²
    """
    calls = _Calls(name)

    def recorder(path: str) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
            calls.module = path
            if not module.transposed:  # the call that follows determines the output_padding from output_size
                x = arguments[0] if arguments else named["input"]
                calls.add(ConvSpec.from_module(module, input_size=tuple(x.shape[-len(module.kernel_size) :])), path, x)
                calls.inside = True

        return hook

    def leave(*_: Any) -> None:
        calls.module, calls.inside = None, False

    convolutions = [(path, module) for path, module in model.named_modules() if isinstance(module, _Conv)]
    hooks = [module.register_forward_pre_hook(recorder(path), with_kwargs=True) for path, module in convolutions]
    hooks += [module.register_forward_hook(leave) for _, module in convolutions]
    try:
        with torch.no_grad(), calls:
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return list(calls.found.values())


class _Calls(TorchFunctionMode):
    """The convolutions found so far; also records function calls outside torch's modules."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model, self.inside = model, False
        self.module: str | None = None
        self.found: dict[ConvSpec, tuple[Layer, torch.Tensor]] = {}

    def add(self, spec: ConvSpec, path: str, x: torch.Tensor) -> None:
        known = self.found.get(spec)
        if known is None:
            self.found[spec] = Layer(self.model, path, spec, 1), x.detach().contiguous().clone()
        else:
            self.found[spec] = replace(known[0], count=known[0].count + 1), known[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        result = func(*args, **(kwargs or {}))
        if name in FUNCTIONS and not self.inside:
            given = {**dict(zip(FUNCTIONS[name], args, strict=False)), **(kwargs or {})}
            x, weight = given["input"], given["weight"]
            path = f"torch.{name}" if self.module is None else self.module
            self.add(spec_of(x.shape, weight.shape, given, name.startswith("conv_transpose")), path, x)
        return result


def spec_of(x: Sequence[int], weight: Sequence[int], given: Mapping[str, Any], transposed: bool) -> ConvSpec:
    """The convolution of a call, from the shapes of input and weight and the other arguments under torch's names."""
    dims, groups = len(weight) - 2, given.get("groups", 1)
    hyper = {key: _each(given[key], dims) for key in ("stride", "padding", "dilation") if given.get(key) is not None}
    more = {"transposed": True, "output_padding": _each(given.get("output_padding", 0), dims)} if transposed else {}
    return ConvSpec(
        weight[0] if transposed else weight[1] * groups,
        weight[1] * groups if transposed else weight[0],
        tuple(x[-dims:]),
        tuple(weight[2:]),
        **hyper,
        groups=groups,
        bias=given.get("bias") is not None,
        **more,
    )


def _each(value: int | str | Sequence[int], dims: int) -> str | tuple[int, ...]:
    """One value of a hyper-parameter per dimension; a list with one number applies to all dimensions."""
    if isinstance(value, (str, int)):
        return value if isinstance(value, str) else (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)


def convolutions(factory: Callable[[], torch.nn.Module], name: str, *input_shapes: Sequence[int]) -> list[Layer]:
    """The distinct convolutions of the model that `factory` creates, in evaluation mode, for inputs of these shapes.

    The model is created and run on the meta device, or on the CPU if that fails. Inputs are zeros with the dtype of the
    parameters, or with an integer dtype if the model does not accept these.

    Args:
        factory: function that creates the model.
        name: name of the model.
        input_shapes: shape of one example for each argument of the model, without a batch axis.

    Example:
        >>> import torch
        >>> from lensor.inspect.extract import convolutions
        >>> convolutions(lambda: torch.nn.Conv1d(1, 2, 3), "net", (1, 9))
        [Layer(model='net', name='', spec=ConvSpec(1, 2, (9,), 3, bias=True), count=1)]

    Raises:
        CommandError: if the model cannot be created or run; the message states the reason in one line.
    """
    failed: BaseException | None = None
    made = False
    for device, integers in (("meta", False), ("cpu", False), ("cpu", True)):
        made = False
        try:
            with torch.device(device):
                model = factory()
            made = True
            if not isinstance(model, torch.nn.Module):
                raise CommandError(f"{name} made an object of type {type(model).__name__}, expected a torch.nn.Module")
            if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
                raise CommandError(f"{name} contains TorchScript, expected a model without it: pass the model itself")
            floating = (one.dtype for one in model.parameters() if one.is_floating_point() or one.is_complex())
            dtype = torch.int64 if integers else next(floating, torch.float32)
            inputs = [torch.zeros((1, *shape), device=device, dtype=dtype) for shape in input_shapes]
            return [layer for layer, _ in record(model.eval(), name, *inputs)]
        except CommandError:
            raise
        except (Exception, SystemExit) as error:
            failed = failed if integers else error
    if not made:
        raise CommandError(f"the factory {name} failed: {in_one_line(failed)}") from failed
    shapes = " and ".join(str(tuple(shape)) for shape in input_shapes)
    given = "an input of shape" if len(input_shapes) == 1 else "inputs of shapes"
    raise CommandError(f"{name} cannot run on {given} {shapes}: {in_one_line(failed)}") from failed


def import_factory(path: str) -> Callable[..., Any]:
    """The model factory at an import path `pkg.mod:name`; a module object there is wrapped in a function.

    The current folder is searched as well.

    Example:
        >>> from lensor.inspect.extract import import_factory
        >>> import_factory("lensor_bench.nets:all_cnn_c").__name__
        'all_cnn_c'

    Raises:
        CommandError: if the path cannot be imported, or the object cannot be called.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise CommandError(f"{path!r} is not an import path, expected pkg.mod:factory")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        factory: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise CommandError(f"cannot import {module_name}: {in_one_line(error)}") from error
    for part in name.split("."):
        if not hasattr(factory, part):
            raise CommandError(f"{module_name} has no {name}, expected a function or class that makes a model")
        factory = getattr(factory, part)
    if isinstance(factory, torch.nn.Module):
        return lambda: factory
    if not callable(factory):
        raise CommandError(f"{path} has type {type(factory).__name__}, expected a function or class that makes a model")
    return factory
