"""Cached networks for layers, one per specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lensor.cache import Cache
from lensor.network import AnyNetwork
from lensor.spec import ConvSpec

_networks = Cache(maxsize=4096)


def network(op: Callable[..., AnyNetwork], spec: ConvSpec, *arguments: Any, **named: Any) -> AnyNetwork:
    """The cached result of `op(spec, *arguments, **named)`."""
    key = (op.__name__, spec, arguments, tuple(sorted(named.items())))
    return _networks.get_or_make(key, lambda: op(spec, *arguments, **named))
