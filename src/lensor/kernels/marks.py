"""Marks on functions for compilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let compilers call a function of constants while they capture a graph, and treat its result as a constant.

    This is equivalent to `torch.compiler.assume_constant_result`, but does not import torch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
