"""The value of a network by definition: the oracle of the passes and the planner, which shares nothing with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from opt_einsum import contract

from lensor.network import AnyNetwork, Delta, Network, Ones, Operand, Pattern, Select


def evaluate_dense(net: AnyNetwork, operands: Mapping[str, Any], sizes: Mapping[str, int] | None = None) -> np.ndarray:
    """Every pattern materialized, every delta an array, one einsum for each term, in double precision."""
    arrays = {name: np.asarray(array) for name, array in operands.items()}
    known = _sizes(net, arrays, sizes or {})
    terms = [_dense_term(term, arrays, own) for term, own in zip(net.terms, known, strict=True)]
    return sum(terms[1:], terms[0])


def _sizes(net: AnyNetwork, arrays: Mapping[str, np.ndarray], given: Mapping[str, int]) -> list[dict[str, int]]:
    """The size of every index of each term: its own, one given, that of an axis or of a delta, or another term's."""
    known = [{**given, **{index: size for index, size in term.sizes.items() if size is not None}} for term in net.terms]
    before = -1
    while before != sum(map(len, known)):
        before = sum(map(len, known))
        for term, sizes in zip(net.terms, known, strict=True):
            for node in term.nodes:
                if isinstance(node, Operand):
                    legs = node.legs[1:] if isinstance(node, Select) else node.legs
                    for leg, length in zip(legs, arrays[node.name].shape, strict=True):
                        unknown = [index for index in leg if index not in sizes]
                        rest = math.prod(sizes[index] for index in leg if index in sizes)
                        if len(unknown) == 1 and rest:
                            sizes[unknown[0]] = length // rest
                elif isinstance(node, Delta):
                    found = [sizes[index] for index in node.indices if index in sizes]
                    sizes.update((index, found[0]) for index in node.indices if found)
            for other in known:
                for index in term.sizes:
                    if index not in sizes and index in other:
                        sizes[index] = other[index]
    return known


def _dense_term(term: Network, arrays: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> np.ndarray:
    number = {index: at for at, index in enumerate(term.sizes)}
    arguments: list[Any] = []
    for node in term.nodes:
        match node:
            case Select(name, (i, j)):
                below = math.prod(sizes[index] for index in i)
                array = (np.arange(below)[:, None] == arrays[name]).astype(np.float64)
                assert len(arrays[name]) == math.prod(sizes[index] for index in j)
            case Operand(name):
                array = arrays[name].astype(np.result_type(arrays[name].dtype, np.float64))
            case Pattern(pattern):
                array = pattern.materialize().astype(np.float64)
            case Delta(indices):
                places = np.arange(sizes[indices[0]])
                array = np.zeros([len(places)] * len(indices))
                array[(places,) * len(indices)] = 1.0
            case Ones(index):
                array = np.ones(sizes[index])
        indices = [index for leg in node.legs for index in leg]
        arguments += [array.reshape([sizes[index] for index in indices]), [number[i] for i in indices]]
    if not arguments:
        arguments = [np.ones(()), []]
    result = contract(*arguments, [number[index] for index in term.output_indices])
    shape = [math.prod(sizes[index] for index in leg) for leg in term.output]
    scale = float(term.scale.factor) * math.prod(float(sizes[index]) ** power for index, power in term.scale.powers)
    return np.asarray(result).reshape(shape) * scale
