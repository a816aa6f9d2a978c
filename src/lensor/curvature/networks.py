"""Cached networks for layers, one per specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lensor import ops
from lensor.cache import Cache
from lensor.network import AnyNetwork, Network
from lensor.spec import ConvSpec

_networks = Cache(maxsize=4096)


def network(op: Callable[..., AnyNetwork], spec: ConvSpec, *arguments: Any, **named: Any) -> AnyNetwork:
    """The cached result of `op(spec, *arguments, **named)`."""
    key = (op, spec, arguments, tuple(sorted(named.items())))
    return _networks.get_or_make(key, lambda: op(spec, *arguments, **named))


def example_roots(spec: ConvSpec) -> Network:
    """The gradients of every example for several vectors at the output: X, S -> `v n` and the weight's indices."""
    return ops.conv_weight_vjp_per_example(spec).rename_operands(V="S").batch("v", ["S"])
