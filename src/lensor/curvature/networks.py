"""Cached networks for layers, one per specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lensor import evaluate, ops
from lensor.cache import Cache
from lensor.kernels import backend_of
from lensor.kernels.torch.tensors import is_plain
from lensor.network import AnyNetwork, Network
from lensor.planner import current
from lensor.runtime import runnable
from lensor.spec import ConvSpec

_networks = Cache(maxsize=4096)
_ready = Cache(maxsize=1024, weigh=lambda entry: 20_000)
"""Plans with their functions, which the caches of plans count, too."""


def network(op: Callable[..., AnyNetwork], spec: ConvSpec, *arguments: Any, **named: Any) -> AnyNetwork:
    """The cached result of `op(spec, *arguments, **named)`."""
    key = (op, spec, arguments, tuple(sorted(named.items())))
    return _networks.get_or_make(key, lambda: op(spec, *arguments, **named))


def of_one(op: Callable[..., AnyNetwork], spec: ConvSpec, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """The value of `op(spec, *arguments, **named)`, a network of one operand, which is not checked.

    The plan is found by the operand's shape and dtype, which takes less time than a call of the network.
    """
    if type(x) is not Tensor or not is_plain(x) or torch.compiler.is_compiling():
        net = network(op, spec, *arguments, **named)
        return net(**{net.operand_names[0]: x})
    backend = backend_of(x)
    key = op, spec, arguments, tuple(sorted(named.items())), x.shape, backend.kind(x), current()

    def make() -> Any:
        net = network(op, spec, *arguments, **named)
        (name,) = net.operand_names
        return runnable(evaluate.compile(net, {name: x.shape}, like=x), backend)

    return _ready.get_or_make(key, make).unchecked(x)


def example_roots(spec: ConvSpec) -> Network:
    """The gradients of every example for several vectors at the output: X, S -> `v n` and the weight's indices."""
    return ops.conv_weight_vjp_per_example(spec).rename_operands(V="S").batch("v", ["S"])
