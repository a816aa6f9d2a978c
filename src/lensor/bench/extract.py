"""The convolutions of any torch model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lensor.bench.errors import BenchError
from lensor.bench.layers import Layer
from lensor.spec import ConvSpec

_Conv = torch.nn.modules.conv._ConvNd


def record(model: torch.nn.Module, name: str, batch: torch.Tensor) -> list[tuple[Layer, torch.Tensor]]:
    """The distinct convolutions of a model in the order in which they run, each with the first input it was given.

    Convolutions and transposed convolutions of any number of dimensions are found, one that runs twice is counted
    twice. A model and a batch on the meta device cost neither memory nor time.

    Example:
        >>> import torch
        >>> from lensor.bench.extract import record
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 1), torch.nn.Conv2d(8, 8, 1))
        >>> for layer, _ in record(model, "net", torch.zeros(1, 3, 9, 9)):
        ...     print(layer.name, layer.count, layer.label)
        0 1 net 3→8 3×3 @9²
        1 2 net 8→8 1×1 @7²
    """
    found: dict[ConvSpec, tuple[Layer, torch.Tensor]] = {}

    def recorder(path: str) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
            x = arguments[0] if arguments else named["input"]
            spec = ConvSpec.from_module(module, input_size=tuple(x.shape[-len(module.kernel_size) :]))
            known = found.get(spec)
            if known is None:
                found[spec] = Layer(name, path, spec, 1), x.detach().contiguous().clone()
            else:
                found[spec] = replace(known[0], count=known[0].count + 1), known[1]

        return hook

    convolutions = [(path, module) for path, module in model.named_modules() if isinstance(module, _Conv)]
    hooks = [module.register_forward_pre_hook(recorder(path), with_kwargs=True) for path, module in convolutions]
    try:
        with torch.no_grad():
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def convolutions(factory: Callable[[], torch.nn.Module], name: str, input_shape: Sequence[int]) -> list[Layer]:
    """The distinct convolutions of the model that `factory` makes, in evaluation mode, for inputs of a shape.

    The model is made and run on the meta device; on the CPU if it cannot run there.

    Args:
        factory: makes the model.
        name: what to call it.
        input_shape: the shape of one example, without a batch axis.

    Example:
        >>> import torch
        >>> from lensor.bench.extract import convolutions
        >>> convolutions(lambda: torch.nn.Conv1d(1, 2, 3), "net", (1, 9))
        [Layer(model='net', name='', spec=ConvSpec(1, 2, (9,), 3, bias=True), count=1)]

    Raises:
        BenchError: if the model cannot be made or run; the reason in one line.
    """
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                model = factory()
            if not isinstance(model, torch.nn.Module):
                raise BenchError(f"{name} made a {type(model).__name__}, expected a torch.nn.Module")
            return [layer for layer, _ in record(model.eval(), name, torch.zeros((1, *input_shape), device=device))]
        except BenchError:
            raise
        except Exception as error:
            if device == "cpu":
                raise BenchError(
                    f"{name} cannot run on an input of shape {tuple(input_shape)}: {_line(error)}"
                ) from error
    raise AssertionError("unreachable")


def import_factory(path: str) -> Callable[..., Any]:
    """The model factory at an import path `pkg.mod:factory`; the current folder is searched too.

    Example:
        >>> from lensor.bench.extract import import_factory
        >>> import_factory("lensor.bench.nets:all_cnn_c").__name__
        'all_cnn_c'

    Raises:
        BenchError: if there is no such thing to import or to call.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise BenchError(f"{path!r} is no import path, expected pkg.mod:factory")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        factory: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises
        raise BenchError(f"cannot import {module_name}: {_line(error)}") from error
    for part in name.split("."):
        if not hasattr(factory, part):
            raise BenchError(f"{module_name} has no {name}")
        factory = getattr(factory, part)
    if not callable(factory):
        raise BenchError(f"{path} is a {type(factory).__name__}, expected a function or class that makes a model")
    return factory


def _line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
