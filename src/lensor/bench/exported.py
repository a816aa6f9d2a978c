"""The convolutions of a program that `torch.export` saved."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.fx.operator_schemas import normalize_function

from lensor.bench.errors import BenchError
from lensor.bench.extract import spec_of
from lensor.bench.layers import Layer
from lensor.spec import ConvSpec

_FORWARD = {f"aten::conv{dims}d" for dims in (1, 2, 3)}
_TRANSPOSED = {f"aten::conv_transpose{dims}d" for dims in (1, 2, 3)}


def exported(path: Path) -> tuple[list[Layer], tuple[int, ...]]:
    """The distinct convolutions of an exported program, and the shape of one example of its first input.

    Sizes are those that the program was exported with. Padding by another mode than zeros is a step of its own in such
    programs; the convolution after it has none.

    Args:
        path: a file that `torch.export.save` wrote.

    Raises:
        BenchError: if there is no such file, or it holds something else, or a size of a convolution is not known.
    """
    if not path.is_file():
        raise BenchError(f"there is no file {path}")
    program = _load(path)
    found: dict[ConvSpec, Layer] = {}
    shape: tuple[int, ...] = ()
    given = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in given and not shape:
            value = node.meta.get("val")
            shape = _sizes(value.shape[1:], str(node.name)) if isinstance(value, torch.Tensor) else ()
        spec = _spec(node) if node.op == "call_function" else None
        if spec is not None:
            known = found.get(spec) or Layer(path.stem, _module(node), spec, 0)
            found[spec] = replace(known, count=known.count + 1)
    return list(found.values()), shape


def _load(path: Path) -> torch.export.ExportedProgram:
    """The program, without torch's log of what kept it from being one."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path)
    except Exception as error:  # whatever reading a foreign file raises
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BenchError(f"{path} is no exported program: {lines[0]}") from None
    finally:
        logging.disable(before)


def _spec(node: Any) -> ConvSpec | None:
    """The convolution that a node of a graph is, if it is one."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name if schema is not None else ""
    if name not in _FORWARD | _TRANSPOSED | {"aten::convolution"}:
        return None
    normalized = normalize_function(node.target, node.args, node.kwargs, normalize_to_only_use_kwargs=True)
    if normalized is None:
        raise BenchError(f"cannot read the arguments of {node.name}: {node.target}")
    given = dict(normalized.kwargs)
    x, weight = (given[key].meta["val"].shape for key in ("input", "weight"))
    transposed = name in _TRANSPOSED or bool(given.get("transposed"))
    return spec_of(_sizes(x[2 - len(weight) :], node.name), _sizes(weight, node.name), given, transposed)


def _sizes(shape: Sequence[Any], name: str) -> tuple[int, ...]:
    try:
        return tuple(size if isinstance(size, int) else int(size.node.hint) for size in shape)
    except (AttributeError, TypeError, ValueError):
        raise BenchError(f"a size of {name} is not known: export the model with fixed image sizes") from None


def _module(node: Any) -> str:
    """The path of the module that a node comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed([one[0] for one in stack.values()]), "") if stack else ""
    return path or node.name
