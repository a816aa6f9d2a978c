"""What the stages of a strategy work on: the tensors and patterns of one term that are still to be contracted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction

from lensor.network import Group, Network, Operand, Pattern, indices_of
from lensor.pattern import IndexPattern
from lensor.plan import Program
from lensor.plan import steps as s

_SMALL_TABLE = 1 << 16
"""A pattern, or its sum over some legs, may be an array of this many entries however small the operands are."""


class Leg(IntEnum):
    """The legs of an index pattern, in the order of `Pattern.legs`."""

    INPUT = 0
    OUTPUT = 1
    KERNEL = 2

    @staticmethod
    def third(one: Leg, two: Leg) -> Leg:
        """The leg that is neither of two."""
        (found,) = set(Leg) - {one, two}
        return found


@dataclass(frozen=True, slots=True)
class Tensor:
    """A value of the program with the index of each of its axes."""

    value: int
    indices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """Positions that are known at run time only: [i = positions[j]].

    Args:
        positions: the value of the program that has them.
        full: the indices of all positions.
        chosen: the indices of the chosen ones.
    """

    positions: int
    full: Group
    chosen: Group


@dataclass(frozen=True, slots=True)
class Late:
    """A crop that is carried out after all contractions: from one group of the result to another.

    Args:
        pattern: what it reads.
        before: the group before it.
        after: the group after it.
        reads: whether it reads positions of the result, or else puts the result into positions.
    """

    pattern: IndexPattern
    before: Group
    after: Group
    reads: bool


class State:
    """One term between its network and its program.

    The program is everything but a factor `later` of the term's scale. `tensors` and `patterns` change through the
    methods here only, which keep the map from indices to their holders.
    """

    def __init__(self, program: Program, term: Network, later: Fraction = Fraction(1)) -> None:
        self.program, self.term = program, term
        self.factor = term.scale.factor / later
        self.sizes: dict[str, int] = {index: size or 0 for index, size in term.sizes.items()}
        self.tensors: tuple[Tensor, ...] = ()
        self.patterns: tuple[Pattern, ...] = ()
        self.selections: list[Selection] = []
        self.late: list[Late] = []
        self.expanded: list[str] = []
        self.open: list[str] = list(term.output_indices)
        arrays = {node.name: node.legs for node in term.nodes if isinstance(node, Operand)}
        every = [*arrays.values(), term.output]
        self.limit = largest_table(math.prod(self.shape(index for leg in legs for index in leg)) for legs in every)
        self._holders: dict[str, tuple[set[int], set[int]]] | None = None

    # ------------------------------------------------------------------------------------------- tensors and patterns
    def set(self, tensors: Iterable[Tensor] | None = None, patterns: Iterable[Pattern] | None = None) -> None:
        """Replace all tensors, all patterns, or both."""
        self.tensors = self.tensors if tensors is None else tuple(tensors)
        self.patterns = self.patterns if patterns is None else tuple(patterns)
        self._holders = None

    def add(self, tensor: Tensor) -> None:
        """Add a tensor."""
        self.set(tensors=(*self.tensors, tensor))

    def add_pattern(self, pattern: Pattern) -> None:
        """Add a pattern."""
        self.set(patterns=(*self.patterns, pattern))

    def replace(self, tensor: Tensor, new: Tensor) -> None:
        """Put a tensor in the place of another."""
        self.set(tensors=(new if one is tensor else one for one in self.tensors))

    def drop(self, *patterns: Pattern) -> None:
        """Remove patterns."""
        self.set(patterns=(one for one in self.patterns if all(one is not pattern for pattern in patterns)))

    def _held(self, indices: Iterable[str]) -> tuple[set[int], set[int]]:
        if self._holders is None:
            self._holders = {}
            for at, tensor in enumerate(self.tensors):
                for index in tensor.indices:
                    self._holders.setdefault(index, (set(), set()))[0].add(at)
            for at, pattern in enumerate(self.patterns):
                for index in indices_of(pattern):
                    self._holders.setdefault(index, (set(), set()))[1].add(at)
        found = [self._holders[index] for index in indices if index in self._holders]
        return set().union(*(one for one, _ in found)), set().union(*(one for _, one in found))

    def tensors_on(self, indices: Iterable[str]) -> list[Tensor]:
        """The tensors that hold one of some indices."""
        return [self.tensors[at] for at in sorted(self._held(indices)[0])]

    def patterns_on(self, indices: Iterable[str], *without: Pattern) -> list[Pattern]:
        """The patterns that hold one of some indices, without those named."""
        found = [self.patterns[at] for at in sorted(self._held(indices)[1])]
        return [one for one in found if all(one is not other for other in without)]

    def used_elsewhere(self, group: Group, node: Pattern) -> bool:
        """Whether an index of the group is in the output, or in anything but this pattern."""
        return bool(set(group) & set(self.open) or self.tensors_on(group) or self.patterns_on(group, node))

    def needed_beside(self, *taken: Tensor | Pattern) -> set[str]:
        """The indices of the output and of everything but some tensors and patterns."""
        rest = [one for one in (*self.tensors, *self.patterns) if all(one is not other for other in taken)]
        return set(self.open).union(*map(kept_indices, rest))

    # ------------------------------------------------------------------------------------------------------- patterns
    def is_large(self, node: Pattern, loose: Iterable[int]) -> bool:
        """Whether a pattern summed over the legs `loose` would be an array larger than the operands and the result."""
        sizes = (node.pattern.input_size, node.pattern.output_size, node.pattern.kernel_size)
        return math.prod(size for leg, size in enumerate(sizes) if leg not in loose) > self.limit

    # --------------------------------------------------------------------------------------------------------- tensors
    def shape(self, indices: Iterable[str]) -> tuple[int, ...]:
        """The sizes of some indices."""
        return tuple(self.sizes[index] for index in indices)

    def size(self, indices: Iterable[str]) -> int:
        """The product of their sizes."""
        return math.prod(self.shape(indices))

    def matrix(self, tensor: Tensor, order: Sequence[str], shape: tuple[int, ...]) -> int:
        """The tensor with its axes in another order, as an array of a shape."""
        value = self.program.transpose(tensor.value, [tensor.indices.index(index) for index in order])
        return self.program.reshape(value, shape)

    def merged(self, tensor: Tensor, group: Group) -> tuple[int, int, tuple[str, ...]]:
        """The tensor with the axes of a group side by side as one axis: (value, that axis, the other indices)."""
        rest = [index for index in tensor.indices if index not in group]
        at = sum(index not in group for index in tensor.indices[: tensor.indices.index(group[0])])
        flat = (*self.shape(rest[:at]), self.size(group), *self.shape(rest[at:]))
        return self.matrix(tensor, [*rest[:at], *group, *rest[at:]], flat), at, tuple(rest)

    def ungrouped(self, value: int, before: Sequence[str], group: Group, after: Sequence[str]) -> Tensor:
        """A value with one axis for a group, as a tensor with an axis for each of its indices."""
        indices = (*before, *group, *after)
        return Tensor(self.program.reshape(value, self.shape(indices)), indices)

    def shifted(self, value: int, axis: int, start: int, length: int) -> int:
        """Positions start to start + length − 1 of an axis, zeros where it has none."""
        size = self.program.shapes[value][axis]
        low, high = max(start, 0), min(start + length, size)
        if (low, high) != (0, size):
            value = self.program.along(s.Slice((value,), axis, low, 1, high - low))
        if (low - start, start + length - high) != (0, 0):
            value = self.program.along(s.Pad((value,), axis, low - start, start + length - high))
        return value

    def without_repeats(self, value: int, indices: Sequence[str]) -> Tensor:
        """A value whose axes have some indices, with the diagonal taken of axes with one index."""
        names = list(indices)
        while len(set(names)) < len(names):
            index = next(index for index in names if names.count(index) > 1)
            first = names.index(index)
            second = names.index(index, first + 1)
            value = self.program.add(s.Diagonal((value,), first, second))
            names = [i for at, i in enumerate(names) if at not in (first, second)] + [index]
        return Tensor(value, tuple(names))

    def summed(self, tensor: Tensor, needed: set[str]) -> Tensor:
        """The tensor summed over the indices that are not needed."""
        axes = tuple(axis for axis, index in enumerate(tensor.indices) if index not in needed)
        if not axes:
            return tensor
        value = self.program.add(s.SumAxes((tensor.value,), axes))
        return Tensor(value, tuple(index for index in tensor.indices if index in needed))


def kept_indices(item: Tensor | Pattern) -> tuple[str, ...]:
    """The indices of a tensor or pattern, each once."""
    return item.indices if isinstance(item, Tensor) else tuple(dict.fromkeys(indices_of(item)))


def loose_legs(node: Pattern, used: set[str]) -> tuple[int, ...]:
    """The legs of a pattern that nothing else holds: the pattern is summed over them when it is made an array."""
    repeated = len(kept_indices(node)) < sum(len(leg) for leg in node.legs)
    loose = tuple(leg for leg, group in enumerate(node.legs) if group and not used & set(group))
    return () if repeated or len(loose) == len(Leg) else loose


def has_repeats(node: Pattern) -> bool:
    """Whether an index occurs twice in the legs of a pattern."""
    return len(set(indices_of(node))) < sum(len(leg) for leg in node.legs)


def largest_table(sizes: Iterable[int]) -> int:
    """How many entries an array made of a pattern may have, for operands and a result of these sizes."""
    return max(_SMALL_TABLE, sum(sizes))
