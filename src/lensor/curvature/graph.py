"""Queries on the graph that autograd recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lensor.curvature.tracing import attempt

Node = Any
"""A node of autograd's graph."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers, and in the attributes and slots of other objects."""
    yield from _tensors_in(value, set())


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif not isinstance(leaf, (type, torch.nn.Module, str, int, float)) and id(leaf) not in seen:
            seen.add(id(leaf))
            slots = [name for kind in type(leaf).__mro__ for name in _listed(vars(kind).get("__slots__", ()))]
            inside = {name: getattr(leaf, name) for name in slots if hasattr(leaf, name)} | getattr(
                leaf, "__dict__", {}
            )
            if inside:
                yield from _tensors_in(inside, seen)


def _listed(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def inner_nodes(output: Tensor, arguments: Iterable[Any], parameters: Iterable[Tensor]) -> set[Node]:
    """The nodes that one call added to the graph, between its output and its arguments.

    Args:
        output: the value that the call returned.
        arguments: the call's arguments.
        parameters: arguments whose own nodes (casts, which other calls may share) also count as added by the call.
    """
    own = {id(one) for one in parameters}
    outside = {one.grad_fn for one in arguments if isinstance(one, Tensor) and id(one) not in own}
    outside.discard(None)
    found: set[Node] = set()
    todo = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in found or node in outside or _leaf(node) is not None:
            continue
        found.add(node)
        todo += [following for following, _ in node.next_functions]
    return found


def leading_to(nodes: set[Node], parameters: Iterable[Tensor]) -> set[Node]:
    """The nodes of a set from which a path within the set leads to one of the parameters."""
    wanted = {id(one) for one in parameters}
    found: set[Node] = set()
    grows = True
    while grows:
        grows = False
        for node in nodes - found:
            next_nodes = [following for following, _ in node.next_functions if following is not None]
            if any(following in found or id(_leaf(following)) in wanted for following in next_nodes):
                found.add(node)
                grows = True
    return found


class Reached:
    """The part of the graph that is reachable from some tensors.

    `consumers` maps each node to the nodes that use its value; `leaves` are the leaves that require gradients.

    Args:
        roots: the tensors.
    """

    def __init__(self, roots: Iterable[Tensor]) -> None:
        self.nodes: set[Node] = set()
        self.consumers: dict[Node, list[Node]] = {}
        self.leaves: list[Tensor] = []
        self._users: dict[int, list[Node]] = {}
        todo = [root.grad_fn for root in roots]
        while todo:
            node = todo.pop()
            if node is None or node in self.nodes:
                continue
            self.nodes.add(node)
            for following, _ in node.next_functions:
                if following is None:
                    continue
                leaf = _leaf(following)
                if leaf is None:
                    self.consumers.setdefault(following, []).append(node)
                    todo.append(following)
                else:
                    if id(leaf) not in self._users:
                        self.leaves.append(leaf)
                    self._users.setdefault(id(leaf), []).append(node)

    def users(self, parameter: Tensor) -> list[Node]:
        """The nodes that take a leaf as input."""
        return self._users.get(id(parameter), [])


def _leaf(node: Node) -> Tensor | None:
    """The leaf whose gradient a node accumulates; None for other nodes."""
    return node.variable if type(node).__name__ == "AccumulateGrad" else None


def gradients_for_each(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients with respect to some tensors for each of several vectors at the outputs, [count, *shape].

    They are computed in one batched backward pass, or one after the other if a function does not support `vmap`.

    Args:
        outputs: the ends of the graph, which is kept.
        inputs: the tensors; the gradients of those that are not reached are None.
        vectors: for each output, the vectors [count, *output_shape].
    """
    try:
        with attempt():
            return list(
                torch.autograd.grad(
                    outputs, inputs, vectors, retain_graph=True, allow_unused=True, is_grads_batched=True
                )
            )
    except RuntimeError:
        single = [
            torch.autograd.grad(outputs, inputs, one, retain_graph=True, allow_unused=True)
            for one in zip(*vectors, strict=True)
        ]
        return [None if parts[0] is None else torch.stack(parts) for parts in zip(*single, strict=True)]


def innermost(roots: Iterable[Tensor], nodes: set[Node]) -> set[Node]:
    """The nodes of a set from which no other node of the set is reachable, among those reachable from the roots."""
    leads: dict[Node, bool] = {}  # whether a node of the set is reachable from a node, itself excluded
    todo = [(root.grad_fn, False) for root in roots if root.grad_fn is not None]
    while todo:
        node, is_done = todo.pop()
        following = [one for one, _ in node.next_functions if one is not None]
        if is_done:
            leads[node] = any(one in nodes or leads[one] for one in following)
        elif node not in leads:
            leads[node] = False  # a graph has no cycles
            todo.append((node, True))
            todo += [(one, False) for one in following if one not in leads]
    return {node for node, more in leads.items() if node in nodes and not more}
