"""The state that a strategy's stages modify: the tensors and patterns of one term that remain to be contracted."""

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
from lensor.plan.constants import largest_table


class Leg(IntEnum):
    """The legs of an index pattern, in the order of `Pattern.legs`."""

    INPUT = 0
    OUTPUT = 1
    KERNEL = 2

    @staticmethod
    def third(one: Leg, two: Leg) -> Leg:
        """The remaining leg, given the other two."""
        (found,) = set(Leg) - {one, two}
        return found


@dataclass(frozen=True, slots=True)
class Tensor:
    """A value of the program, with an index for each axis."""

    value: int
    indices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """A selection at run time, [i = positions[j]].

    Args:
        positions: the program's value for the vector of positions.
        full: the indices of the leg from which positions are chosen.
        chosen: the indices of the leg with the chosen positions.
    """

    positions: int
    full: Group
    chosen: Group


@dataclass(frozen=True, slots=True)
class Late:
    """A deferred crop, which is applied after all contractions and replaces a group of indices of the result.

    Args:
        pattern: the crop.
        before: the group that the crop replaces.
        after: the new group.
        reads: whether the crop is applied to the result; if False, its adjoint is applied.
    """

    pattern: IndexPattern
    before: Group
    after: Group
    reads: bool


class State:
    """The state of lowering one term.

    `toeplitz` lists deferred Toeplitz patterns, each with the output's order of indices before it was deferred.

    The program computes the term without the factor `later` of its scale. Change `tensors` and `patterns` only through
    the methods, which maintain the map from each index to the tensors and patterns on which it appears.
    """

    def __init__(self, program: Program, term: Network, later: Fraction = Fraction(1)) -> None:
        self.program, self.term = program, term
        self.factor = term.scale.factor if later == 1 else term.scale.factor / later
        self.sizes: dict[str, int] = {index: size or 0 for index, size in term.sizes.items()}
        self.tensors: tuple[Tensor, ...] = ()
        self.patterns: tuple[Pattern, ...] = ()
        self.selections: list[Selection] = []
        self.late: list[Late] = []
        self.toeplitz: list[tuple[Pattern, tuple[str, ...]]] = []
        self.expanded: list[str] = []
        self.open: list[str] = list(term.output_indices)
        arrays = {node.name: node.legs for node in term.nodes if isinstance(node, Operand)}
        every = [*arrays.values(), term.output]
        self.limit = largest_table(math.prod(self.shape(index for leg in legs for index in leg)) for legs in every)
        self._on_tensors: dict[str, list[int]] | None = None
        self._on_patterns: dict[str, list[int]] | None = None

    # ------------------------------------------------------------------------------------------- tensors and patterns
    def set(self, tensors: Iterable[Tensor] | None = None, patterns: Iterable[Pattern] | None = None) -> None:
        """Replace all tensors, all patterns, or both."""
        if tensors is not None:
            self.tensors, self._on_tensors = tuple(tensors), None
        if patterns is not None:
            self.patterns, self._on_patterns = tuple(patterns), None

    def add(self, tensor: Tensor) -> None:
        """Add a tensor."""
        self.set(tensors=(*self.tensors, tensor))

    def add_pattern(self, pattern: Pattern) -> None:
        """Add a pattern."""
        self.set(patterns=(*self.patterns, pattern))

    def replace(self, tensor: Tensor, new: Tensor) -> None:
        """Replace one tensor by a new one."""
        self.set(tensors=[new if one is tensor else one for one in self.tensors])

    def drop(self, *patterns: Pattern) -> None:
        """Remove patterns."""
        kept: Sequence[Pattern] = self.patterns
        for pattern in patterns:
            kept = [one for one in kept if one is not pattern]
        self.set(patterns=kept)

    def tensors_on(self, indices: Iterable[str]) -> list[Tensor]:
        """The tensors on which at least one of the indices appears."""
        if self._on_tensors is None:
            self._on_tensors = _places(tensor.indices for tensor in self.tensors)
        found = {at for index in indices if index in self._on_tensors for at in self._on_tensors[index]}
        return [self.tensors[at] for at in sorted(found)]

    def patterns_on(self, indices: Iterable[str], *without: Pattern) -> list[Pattern]:
        """The patterns on which at least one of the indices appears, except those in `without`."""
        if self._on_patterns is None:
            self._on_patterns = _places(map(indices_of, self.patterns))
        found = {at for index in indices if index in self._on_patterns for at in self._on_patterns[index]}
        kept = [self.patterns[at] for at in sorted(found)]
        for other in without:
            kept = [one for one in kept if one is not other]
        return kept

    def used_elsewhere(self, group: Group, node: Pattern) -> bool:
        """Whether an index of the group appears in the output, on a tensor, or on a pattern other than `node`."""
        return bool(set(group) & set(self.open) or self.tensors_on(group) or self.patterns_on(group, node))

    def needed_beside(self, *taken: Tensor | Pattern) -> set[str]:
        """The indices of the output and of all tensors and patterns except those in `taken`."""
        rest = [one for one in (*self.tensors, *self.patterns) if all(one is not other for other in taken)]
        return set(self.open).union(*map(kept_indices, rest))

    # ------------------------------------------------------------------------------------------------------- patterns
    def is_large(self, node: Pattern, loose: Iterable[int]) -> bool:
        """Whether a pattern, summed over the legs in `loose`, exceeds the size limit for materialized patterns."""
        sizes = (node.pattern.input_size, node.pattern.output_size, node.pattern.kernel_size)
        return math.prod(size for leg, size in enumerate(sizes) if leg not in loose) > self.limit

    # --------------------------------------------------------------------------------------------------------- tensors
    def shape(self, indices: Iterable[str]) -> tuple[int, ...]:
        """The sizes of the indices."""
        return tuple([self.sizes[index] for index in indices])

    def size(self, indices: Iterable[str]) -> int:
        """The product of the sizes of the indices."""
        return math.prod([self.sizes[index] for index in indices])

    def matrix(self, tensor: Tensor, order: Sequence[str], shape: tuple[int, ...]) -> int:
        """Transpose a tensor to the given order of indices and reshape it."""
        value = tensor.value
        if tuple(order) != tensor.indices:
            value = self.program.transpose(value, [tensor.indices.index(index) for index in order])
        return self.program.reshape(value, shape)

    def merged(self, tensor: Tensor, group: Group) -> tuple[int, int, tuple[str, ...]]:
        """Merge a tensor's axes of a group into one axis; return the value, the merged axis and the other indices."""
        rest = [index for index in tensor.indices if index not in group]
        at = len([index for index in tensor.indices[: tensor.indices.index(group[0])] if index not in group])
        flat = (*self.shape(rest[:at]), self.size(group), *self.shape(rest[at:]))
        return self.matrix(tensor, [*rest[:at], *group, *rest[at:]], flat), at, tuple(rest)

    def ungrouped(self, value: int, before: Sequence[str], group: Group, after: Sequence[str]) -> Tensor:
        """Split the axis of a group into one axis per index."""
        indices = (*before, *group, *after)
        return Tensor(self.program.reshape(value, self.shape(indices)), indices)

    def shifted(self, value: int, axis: int, start: int, length: int) -> int:
        """Take positions start to start + length − 1 of an axis, with zeros outside the axis."""
        size = self.program.shapes[value][axis]
        low, high = max(start, 0), min(start + length, size)
        if (low, high) != (0, size):
            value = self.program.along(s.Slice((value,), axis, low, 1, high - low))
        if (low - start, start + length - high) != (0, 0):
            value = self.program.along(s.Pad((value,), axis, low - start, start + length - high))
        return value

    def without_repeats(self, value: int, indices: Sequence[str]) -> Tensor:
        """Create a tensor from a value and its indices; take the diagonal of axes with the same index."""
        names = list(indices)
        while len(set(names)) < len(names):
            index = next(index for index in names if names.count(index) > 1)
            first = names.index(index)
            second = names.index(index, first + 1)
            value = self.program.add(s.Diagonal((value,), first, second))
            names = [i for at, i in enumerate(names) if at not in (first, second)] + [index]
        return Tensor(value, tuple(names))

    def summed(self, tensor: Tensor, needed: set[str]) -> Tensor:
        """Sum a tensor over the indices that are not in `needed`."""
        axes = tuple([axis for axis, index in enumerate(tensor.indices) if index not in needed])
        if not axes:
            return tensor
        value = self.program.add(s.SumAxes((tensor.value,), axes))
        return Tensor(value, tuple(index for index in tensor.indices if index in needed))


def _places(items: Iterable[Iterable[str]]) -> dict[str, list[int]]:
    """Map each index to the places of the items on which it appears."""
    places: dict[str, list[int]] = {}
    for at, indices in enumerate(items):
        for index in indices:
            if index in places:
                places[index].append(at)
            else:
                places[index] = [at]
    return places


def kept_indices(item: Tensor | Pattern) -> tuple[str, ...]:
    """The indices of a tensor or pattern, each once."""
    return item.indices if isinstance(item, Tensor) else tuple(dict.fromkeys(indices_of(item)))


def loose_legs(node: Pattern, used: set[str]) -> tuple[int, ...]:
    """The legs of a pattern without an index in `used`; a materialized pattern is summed over these legs."""
    loose = tuple([leg for leg, group in enumerate(node.legs) if group and used.isdisjoint(group)])
    return () if has_repeats(node) or len(loose) == len(node.legs) else loose


def has_repeats(node: Pattern) -> bool:
    """Whether an index occurs more than once in the legs of a pattern."""
    indices = tuple(indices_of(node))
    return len(set(indices)) < len(indices)
