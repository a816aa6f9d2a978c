"""Whether functions draw random numbers."""

from __future__ import annotations

import sys
from typing import Any

import torch


def random_draws() -> Any:
    """A value that changes when torch draws random numbers: the states of its generators.

    While a graph is traced, nothing is drawn, and the value is the number of functions in the graph that will draw.
    """
    tracing = sys.modules.get("torch.fx.experimental.proxy_tensor")  # only imported for graphs
    mode = None if tracing is None else tracing.get_proxy_mode()
    if mode is not None:
        tag = torch.Tag.nondeterministic_seeded
        return sum(tag in getattr(node.target, "tags", ()) for node in mode.tracer.graph.nodes)
    states = [torch.get_rng_state().numpy().tobytes()]
    if torch.cuda.is_initialized():
        states += [one.get_state().numpy().tobytes() for one in torch.cuda.default_generators]
    return states
