"""The graph that is being traced, if there is one, for code that runs uncompiled and in a graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch


def _graph() -> Any:
    """The graph that is being traced by this thread; None if there is none."""
    found = sys.modules.get("torch.fx.experimental.proxy_tensor")  # only imported for graphs
    mode = None if found is None else found.get_proxy_mode()
    return None if mode is None else mode.tracer.graph


def is_traced() -> bool:
    """Whether this thread is tracing a graph, in which code cannot depend on values."""
    return _graph() is not None


def draws(function: Any, arguments: Sequence[Any], named: Mapping[str, Any]) -> bool:
    """Whether an operator draws random numbers; attention without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(function, "tags", ()):
        return False
    known = [argument.name for argument in function._schema.arguments]
    given = dict(zip(known, arguments, strict=False)) | dict(named)
    return "dropout_p" not in known or given.get("dropout_p", 0.0) != 0.0


def random_draws() -> Any:
    """A value that changes when torch draws random numbers: the states of its generators.

    While a graph is traced, it is the number of functions in the graph that draw.
    """
    graph = _graph()
    if graph is not None:
        return sum(draws(node.target, node.args, node.kwargs) for node in graph.nodes)
    states = [torch.get_rng_state().numpy().tobytes()]
    if torch.cuda.is_initialized():
        states += [one.get_state().numpy().tobytes() for one in torch.cuda.default_generators]
    return states


@contextmanager
def untraced() -> Iterator[None]:
    """Keep what the `with` block does out of the graph."""
    if _graph() is None:
        yield
        return
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


@contextmanager
def attempt() -> Iterator[None]:
    """Remove what the `with` block has added to the graph if it raises an error, after which there is another way."""
    graph = _graph()
    last = None if graph is None else next(iter(reversed(graph.nodes)), None)
    try:
        yield
    except Exception:
        if graph is not None:
            while (node := next(iter(reversed(graph.nodes)), None)) is not last:
                graph.erase_node(node)
        raise
