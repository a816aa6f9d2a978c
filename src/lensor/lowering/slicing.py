"""Division of an index of a network into parts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lensor.network import AnyNetwork, Delta, Operand, Pattern, indices_of
from lensor.plan import Program
from lensor.plan import steps as s
from lensor.simplification.engine import simplify_untraced


def sliceable(net: AnyNetwork) -> list[str]:
    """The indices that can be divided into parts, largest first."""
    leading = {leg[0] for leg in net.output if leg}
    known = net.sizes
    fits = [
        index
        for index in known
        if (known[index] or 0) > 1
        and all(term.sizes.get(index) == known[index] for term in net.terms)
        and (index in leading or index not in net.output_indices)
    ]
    return sorted(fits, key=lambda index: (-(known[index] or 0), index))


def summed_by_all(net: AnyNetwork) -> str | None:
    """The largest summed index that appears on every operand, or None."""
    held = [set(indices_of(node)) for term in net.terms for node in term.nodes if isinstance(node, Operand)]
    found = [index for index in sliceable(net) if index not in net.output_indices and all(index in one for one in held)]
    return found[0] if found else None


def parts_of(net: AnyNetwork, index: str, count: int) -> list[AnyNetwork]:
    """Split an index into `count` parts of about equal size, or into its positions: one network per part.

    If the index is summed, the value of the network is the sum of the values of all parts; otherwise it is their
    concatenation along `axis_of(net, index)`.
    """
    return [net.narrow(index, start, length) for start, length in bounds_of(net, index, count)]


def bounds_of(net: AnyNetwork, index: str, count: int) -> list[tuple[int, int]]:
    """The (start, length) of each part of `parts_of`."""
    size = net.sizes[index] or 0
    count = min(count, size)
    return [(low, high - low) for low, high in itertools.pairwise(size * at // count for at in range(count + 1))]


class Parts:
    """An index of a network divided into parts as by `parts_of`, each of which is simplified when it is needed.

    Args:
        net: the network.
        index: the index to divide.
        count: the number of parts.
    """

    def __init__(self, net: AnyNetwork, index: str, count: int) -> None:
        self.net, self.index, self.count = net, index, count
        self.bounds = bounds_of(net, index, count)
        self.on_operands = not any(
            isinstance(node, (Pattern, Delta)) and index in indices_of(node)
            for term in net.terms
            for node in term.nodes
        )
        """Whether the index is only on operands, so that parts of equal size differ only in where they start.

        A delta may equate the index to one of a pattern.
        """
        self._simplified: dict[int, tuple[AnyNetwork, dict[tuple, AnyNetwork]]] = {}

    def simplified(self, at: int) -> tuple[AnyNetwork, dict[tuple, AnyNetwork]]:
        """The network of one part, simplified, and a dictionary for what `Strategy.prepared` makes of it."""
        if at not in self._simplified:
            start, length = self.bounds[at]
            self._simplified[at] = simplify_untraced(self.net.narrow(self.index, start, length)), {}
        return self._simplified[at]


@dataclass(frozen=True, slots=True)
class Repetition:
    """The steps of one part, which parts of equal size repeat with slices that start elsewhere.

    Args:
        steps: the steps that the part's value needs, by place, in order.
        slices: the slices among them, by place.
        moved: the places of the slices that start elsewhere in other parts.
        start: where the part starts.
        value: the place of the part's value.
    """

    steps: Mapping[int, s.Step]
    slices: Mapping[int, s.Slice]
    moved: frozenset[int]
    start: int
    value: int

    @staticmethod
    def of(program: Program, one: tuple[int, int], two: tuple[int, int]) -> Repetition | None:
        """The steps of two parts, given as (start, value) pairs; None if they differ in more than starts of slices."""
        (before, first), (start, second) = one, two
        pairs: dict[int, int] = {}
        moved: set[int] = set()
        todo = [(second, first)]
        while todo:
            place, other = todo.pop()
            if place in pairs:
                if pairs[place] != other:
                    return None
                continue
            pairs[place] = other
            step, twin = program.steps[place], program.steps[other]
            if len(step.takes) != len(twin.takes):
                return None
            todo += zip(step.takes, twin.takes, strict=True)
            expected = replace(twin, takes=step.takes)
            if isinstance(expected, s.Slice) and expected != step:
                expected = replace(expected, start=expected.start + start - before)
                moved.add(place)
            if expected != step:
                return None
        if len(set(pairs.values())) < len(pairs):
            return None
        steps = {place: program.steps[place] for place in sorted(pairs)}
        slices = {place: step for place, step in steps.items() if isinstance(step, s.Slice)}
        return Repetition(steps, slices, frozenset(moved), start, second)

    def at(self, program: Program, start: int) -> int | None:
        """Add the steps for a part that starts elsewhere.

        The result is None if two different steps would become equal, or if a slice would leave its axis.
        """
        slices = {
            place: replace(step, start=step.start + start - self.start) if place in self.moved else step
            for place, step in self.slices.items()
        }
        if len(set(slices.values())) < len(slices):
            return None  # lowering would then compute their value once
        for place in self.moved:
            step = slices[place]
            size = program.shapes[self.steps[place].takes[0]][step.axis]
            if not 0 <= step.start <= step.start + (step.count - 1) * step.step < size:
                return None
        new: dict[int, int] = {}
        for place, step in self.steps.items():
            new[place] = program.add(slices.get(place, step).taking(tuple([new[at] for at in step.takes])))
        return new[self.value]


def axis_of(net: AnyNetwork, index: str) -> int | None:
    """The axis of the result that starts with this index; None if the index is summed."""
    if index not in net.output_indices:
        return None
    return next(axis for axis, leg in enumerate(net.output) if leg[:1] == (index,))
