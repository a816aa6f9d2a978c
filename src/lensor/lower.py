"""From a simplified network to a plan: selections become slices and pads, the rest pairwise contractions.

`STRATEGIES` lists the ways: patches as strided views, patterns materialized, the framework's convolutions, lags. All
leave the order of the remaining contractions to opt_einsum.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from lensor import steps as s
from lensor.network import AnyNetwork, Delta, Group, Network, Ones, Operand, Pattern, Select, indices_of
from lensor.notation import to_text
from lensor.orders import ORDERS, Order, Orders, feynman, find_order, has_best_order
from lensor.passes.composition import compose, share, undo
from lensor.pattern import IndexPattern
from lensor.plan import Plan, Program

_ONE = Fraction(1)

_MOST_DIMENSIONS = 3
"""Frameworks have convolutions of this many dimensions at most."""

_ROW = 16
"""Rows of this many entries are read at chosen positions as a whole."""

_SMALL_TABLE = 1 << 16
"""A pattern, or its sum over some legs, may be an array of this many entries however small the operands are."""

_MOST_OFFSETS = 512
"""Kernels of more positions have no products by lags: each pair of positions is a call."""

_LARGEST_HALVES = 24
"""Two equal halves are looked for among at most this many tensors and patterns."""

_MOST_PAIRS = 2_000
"""Two equal halves are looked for by trying at most this many pairs of items."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to lower a network.

    Args:
        name: what plans call it.
        windows: read patches as strided views and add overlapping patches up; else materialize patterns.
        convolutions: contract pairs of tensors through patterns by the framework's convolution.
        swapped: as forward convolutions with kernel and output swapped where a weight gradient would do.
        lags: products of patches by lags.
        halves: contract two copies of one thing alike and take sub-tensors that only one of them has at the end, so
            that one computation serves both.
        batched: an index between which and the others a product's axes stand stays a batch axis, so that nothing is
            copied to merge the two; if it is summed, the products are added up.
        composed: with patterns put together again that simplification took apart, before selections are read.
        undone: with patterns even where the network could do without them.
        placed: put what was selected at run time back into its positions, zeros elsewhere, instead of reading at those
            positions; only where there are selections.
        order: where the order of the contractions comes from, as `find_order` takes it.
    """

    name: str
    windows: bool = True
    convolutions: bool = False
    swapped: bool = False
    lags: bool = False
    batched: bool = False
    halves: bool = False
    composed: bool = False
    undone: bool = False
    placed: bool = False
    order: str = "auto"


STRATEGIES = (
    Strategy("windows"),
    Strategy("windows, batched", batched=True),
    Strategy("dense", windows=False, composed=True),
    Strategy("convolution", convolutions=True),
    Strategy("convolution, swapped", convolutions=True, swapped=True),
    Strategy("convolution, composed", convolutions=True, composed=True),
    Strategy("convolution, undone", convolutions=True, undone=True),
    Strategy("lags", lags=True),
    Strategy("halves", halves=True),
    Strategy("halves, composed", halves=True, composed=True),
    Strategy("placed, convolution", placed=True, convolutions=True),
    Strategy("placed, windows", placed=True),
)
"""The candidates that are lowered for every network."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A value of the program with the index of each of its axes."""

    value: int
    indices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Late:
    """A selection that is carried out after all contractions: from one group of the result to another."""

    pattern: IndexPattern
    before: Group
    after: Group
    reads: bool
    """Whether it reads positions of the result, or else puts the result into positions."""


@dataclass(frozen=True, slots=True)
class _ConvolutionLegs:
    """One spatial dimension of a convolution step."""

    first: Group
    second: Group
    out: Group
    stride: int
    padding: int
    dilation: int
    result: int
    shift: tuple[int, int] | None
    """Start and length to which the first tensor is padded or cropped before."""
    crop: tuple[int, int] | None
    """Start and length to which the result is padded or cropped after."""


class _Lowering:
    """Lowers one term into a program, all but a factor `later` of its scale."""

    def __init__(self, program: Program, term: Network, strategy: Strategy, later: Fraction = _ONE) -> None:
        self.program, self.term, self.strategy = program, term, strategy
        self.factor = term.scale.factor / later
        self.sizes: dict[str, int] = {index: size or 0 for index, size in term.sizes.items()}
        self.tensors: list[_Tensor] = []
        self.patterns: list[Pattern] = []
        self.selections: list[tuple[int, Group, Group]] = []
        self.late: list[_Late] = []
        self.expanded: list[str] = []
        self.open: list[str] = list(term.output_indices)
        arrays = {node.name: node.legs for node in term.nodes if isinstance(node, Operand)}
        every = [*arrays.values(), term.output]
        self.limit = _largest_table(math.prod(self.shape(index for leg in legs for index in leg)) for legs in every)

    # ------------------------------------------------------------------ small tools
    def shape(self, indices: Iterable[str]) -> tuple[int, ...]:
        return tuple(self.sizes[index] for index in indices)

    def merged(self, tensor: _Tensor, group: Group) -> tuple[int, int, tuple[str, ...]]:
        """The tensor with the axes of a group side by side as one axis: (value, that axis, the other indices)."""
        rest = [index for index in tensor.indices if index not in group]
        at = sum(index not in group for index in tensor.indices[: tensor.indices.index(group[0])])
        order = [*rest[:at], *group, *rest[at:]]
        value = self.program.transpose(tensor.value, [tensor.indices.index(index) for index in order])
        flat = (*self.shape(rest[:at]), math.prod(self.shape(group)), *self.shape(rest[at:]))
        return self.program.reshape(value, flat), at, tuple(rest)

    def ungrouped(self, value: int, before: Sequence[str], group: Group, behind: Sequence[str]) -> _Tensor:
        indices = (*before, *group, *behind)
        return _Tensor(self.program.reshape(value, self.shape(indices)), indices)

    @staticmethod
    def reads_nothing(pattern: IndexPattern) -> bool:
        """Whether the range of positions that a pattern reads in lies outside of its input."""
        length = (pattern.output_size - 1) * pattern.stride + pattern.dilation * (pattern.kernel_size - 1) + 1
        return -pattern.padding[0] >= pattern.input_size or length <= pattern.padding[0]

    def shifted(self, value: int, axis: int, start: int, length: int) -> int:
        """Positions start to start + length − 1 of an axis, zeros where it has none."""
        size = self.program.shapes[value][axis]
        low, high = max(start, 0), min(start + length, size)
        if (low, high) != (0, size):
            value = self.program.along(s.Slice((value,), axis, low, 1, high - low))
        if (low - start, start + length - high) != (0, 0):
            value = self.program.along(s.Pad((value,), axis, low - start, start + length - high))
        return value

    def used_elsewhere(self, group: Group, node: Pattern) -> bool:
        """Whether an index of the group stands in the output or in anything but this pattern."""
        if any(index in self.open for index in group):
            return True
        if any(set(group) & set(tensor.indices) for tensor in self.tensors):
            return True
        return any(other is not node and set(group) & set(indices_of(other)) for other in self.patterns)

    def is_large(self, node: Pattern, loose: Iterable[int]) -> bool:
        """Whether a pattern summed over the legs `loose` would be an array larger than the operands and the result."""
        sizes = (node.pattern.input_size, node.pattern.output_size, node.pattern.kernel_size)
        return math.prod(size for leg, size in enumerate(sizes) if leg not in loose) > self.limit

    # ------------------------------------------------------------------ the stages
    def run(self) -> int:
        held = {index for node in self.term.nodes if not isinstance(node, Ones) for index in indices_of(node)}
        for node in self.term.nodes:
            if not (isinstance(node, Ones) and node.index in held):
                self.take(node)
                held |= {node.index} if isinstance(node, Ones) else set()
        if self.factor == 0:
            return self.zeros()
        self.apply_chosen()
        if self.strategy.windows:
            self.split_modes()
        if self.strategy.convolutions and self.strategy.composed:
            self.apply_convolutions()
        self.apply_selections()
        if self.strategy.lags:
            self.apply_patch_grams()
        if self.strategy.convolutions:
            self.apply_convolutions()
        if self.strategy.windows:
            self.apply_windows()
        result = self.contract()
        for late in reversed(self.late):
            result = self.select_late(result, late) if late.reads else self.scatter(result, late)
        return self.finish(result)

    def zeros(self) -> int:
        """Zeros that still hang together with every operand, so that frameworks find zero derivatives."""
        self.factor = _ONE
        waiting, self.selections = self.selections, []
        for selection in waiting:
            self.place(*selection)
        value = self.program.add(s.Fill((), (), Fraction(0)))
        for tensor in self.tensors:
            nothing = tensor.value
            if tensor.indices:
                nothing = self.program.along(s.Slice((nothing,), 0, 0, 1, 0))
                nothing = self.program.add(s.SumAxes((nothing,), tuple(range(len(tensor.indices)))))
            value = self.program.add(s.Multiply((value, nothing)))
        self.expanded = list(self.term.output_indices)
        return self.finish(_Tensor(value, ()))

    def take(self, node: Operand | Pattern | Delta | Ones) -> None:
        match node:
            case Select(name, (i, j)):
                count, below = math.prod(self.shape(j)), math.prod(self.shape(i))
                self.selections.append((self.program.add(s.Positions((), name, (count,), below)), i, j))
            case Operand(name, legs):
                shape = tuple(math.prod(self.shape(leg)) for leg in legs)
                value = self.program.add(s.Input((), name, shape))
                indices = [index for leg in legs for index in leg]
                self.tensors.append(self.without_repeats(self.program.reshape(value, self.shape(indices)), indices))
            case Pattern():
                self.patterns.append(node)
            case Delta(indices):
                for other in indices[1:]:
                    value = self.program.add(s.Identity((), self.sizes[other]))
                    self.tensors.append(_Tensor(value, (indices[0], other)))
            case Ones(index):
                if index in self.open:
                    self.expanded.append(index)
                else:
                    self.tensors.append(_Tensor(self.program.add(s.Fill((), self.shape([index]), _ONE)), (index,)))

    def without_repeats(self, value: int, indices: list[str]) -> _Tensor:
        while len(set(indices)) < len(indices):
            index = next(index for index in indices if indices.count(index) > 1)
            first = indices.index(index)
            second = indices.index(index, first + 1)
            value = self.program.add(s.Diagonal((value,), first, second))
            indices = [i for at, i in enumerate(indices) if at not in (first, second)] + [index]
        return _Tensor(value, tuple(indices))

    def split_modes(self) -> None:
        """Where a pattern that pads by values from inside would be too large an array: the padding, read first."""
        for node in list(self.patterns):
            (i, o, k), (padding, inner) = node.legs, node.pattern.split_padding()
            loose = [at for at, leg in enumerate(node.legs) if not self.used_elsewhere(leg, node)]
            if padding is None or node.pattern.is_selection or not i or not self.is_large(node, loose):
                continue
            unit = f"{i[0]} with padding {len(self.sizes)}"  # no identifier, so no index has this name
            self.sizes[unit] = inner.input_size
            parts = [Pattern(padding.normalize(), (i, (unit,), ())), Pattern(inner.normalize(), ((unit,), o, k))]
            at = next(at for at, other in enumerate(self.patterns) if other is node)
            self.patterns[at : at + 1] = parts

    # ------------------------------------------------------------------ selections given at run time
    def apply_chosen(self) -> None:
        """Read at the chosen positions whatever stands at all of them, or put what was chosen back into its place."""
        reads: list[tuple[Pattern, int, int, int, Group]] = []
        waiting, self.selections = self.selections, []
        while waiting:
            value, i, j = waiting.pop(0)
            others = [leg for _, one, two in waiting for leg in (one, two)]
            if i and not set(i) & set(self.open) and not self.is_held(i, others):
                # Every chosen position is one of all of them: Σ_i [i = p_j] = 1.
                for index in j:
                    if not self.is_held((index,), others):
                        self.take(Ones(index))
                continue
            found = None if self.strategy.placed else self.readings(i, j, others, reads)
            if found is None:
                self.place(value, i, j)
                continue
            for tensor in [tensor for tensor in self.tensors if i and set(i) <= set(tensor.indices)]:
                merged, axis, rest = self.merged(tensor, i)
                new = self.ungrouped(self.program.add(s.Pick((merged, value), axis)), rest[:axis], j, rest[axis:])
                self.tensors[self.tensors.index(tensor)] = self.without_repeats(new.value, list(new.indices))
            for node, target in found:
                reads.append((node, target, node.legs.index(i), value, j))
                self.patterns.remove(node)
        for at, tensor in enumerate(self.tensors):
            mine = [read for read in reads if set(read[0].legs[read[1]]) & set(tensor.indices)]
            if mine:
                self.tensors[at] = self.read_chosen(tensor, mine)

    def is_held(self, group: Group, others: Sequence[Group]) -> bool:
        """Whether an index of a group stands in a tensor, a pattern, or among other legs."""
        nodes = [*(tensor.indices for tensor in self.tensors), *map(indices_of, self.patterns)]
        return any(set(group) & set(held) for held in (*nodes, *others))

    def readings(
        self, i: Group, j: Group, others: Sequence[Group], reads: Sequence[tuple[Pattern, int, int, int, Group]]
    ) -> list[tuple[Pattern, int]] | None:
        """(pattern, the leg to read) for all patterns that hold the positions; None if these cannot be read at."""
        inner = set(i)
        taken = inner.union(*others)
        holders = [tensor for tensor in self.tensors if inner & set(tensor.indices)]
        held = [node for node in self.patterns if inner & set(indices_of(node))]
        if not i or inner & set(self.open) or any(not inner <= set(tensor.indices) for tensor in holders):
            return None
        if any(inner & set(leg) for leg in others) or not (holders or held):
            return None
        found = []
        for node in held:
            flat = list(indices_of(node))
            target = None
            if node.legs.count(i) == 1 and len(set(flat)) == len(flat) and not set(flat) & set(j):
                target = self.target(node, node.legs.index(i), {*j, *taken}, [read[0] for read in reads])
            if target is None:
                return None
            found.append((node, target))
        return found

    def target(self, node: Pattern, chosen: int, taken: set[str], gone: Sequence[Pattern]) -> int | None:
        """The leg of a pattern that can be read from tensors alone once another leg's positions are chosen."""
        for target in (1,) if chosen == 0 else (0,) if chosen == 1 else (0, 1):
            if target == 1 and node.pattern.padding_mode != "zeros":
                continue  # a position may be read by several outputs then
            leg = set(node.legs[target])
            rest = {index for place, other in enumerate(node.legs) if place not in (target, chosen) for index in other}
            nodes = [other for other in (*self.patterns, *gone) if other is not node]
            holders = [tensor for tensor in self.tensors if leg & set(tensor.indices)]
            if not leg or leg & {*self.open, *taken} or any(leg & set(indices_of(other)) for other in nodes):
                continue
            if holders and all(leg <= set(one.indices) and not {*taken, *rest} & set(one.indices) for one in holders):
                return target
        return None

    def read_chosen(self, tensor: _Tensor, reads: Sequence[tuple[Pattern, int, int, int, Group]]) -> _Tensor:
        """A tensor read through patterns at chosen positions of another leg of each.

        The innermost of its other axes stays behind what is read if it is long enough: whole rows are read then, not
        single entries. Chosen positions stand before those of kernels where a product over them follows at once, and
        behind them, one row after the other, where another pattern reads the rows first.
        """
        reads = sorted(reads, key=lambda read: tensor.indices.index(read[0].legs[read[1]][0]))
        targets = [node.legs[target] for node, target, *_ in reads]
        rest = [index for index in tensor.indices if not any(index in leg for leg in targets)]
        row = [index for index in rest[-1:] if self.shape([index])[0] >= _ROW]
        rest = rest[: len(rest) - len(row)]
        order = [*rest, *(index for leg in targets for index in leg), *row]
        sizes = (*self.shape(rest), *(math.prod(self.shape(leg)) for leg in targets), *self.shape(row))
        merged = self.matrix(tensor, order, sizes)
        chosen_first = bool(row) and not any(row[0] in indices_of(other) for other in self.patterns)
        axes, firsts, seconds = [], [], []
        for at, (node, target, chosen, _, j) in enumerate(reads, start=1):
            free = 3 - target - chosen
            axes.append(s.Through(node.pattern, target, free, chosen, at))
            firsts += node.legs[free]
            seconds += j
        takes = (merged, *(value for *_, value, _ in reads))
        value = self.program.add(s.Read(takes, tuple(axes), len(rest), chosen_first))
        found = [*rest, *(seconds + firsts if chosen_first else firsts + seconds), *row]
        return self.without_repeats(self.program.reshape(value, self.shape(found)), found)

    def place(self, value: int, i: Group, j: Group) -> None:
        """What was selected put back into zeros if it is one tensor, else the selection as a matrix."""
        size = math.prod(self.shape(i))
        holders = [tensor for tensor in self.tensors if set(j) & set(tensor.indices)]
        inside = {index for node in self.patterns for index in indices_of(node)}.union(self.open)
        waiting = {index for _, one, two in self.selections for index in (*one, *two)}
        fits = len(holders) == 1 and set(j) <= set(holders[0].indices) and not set(j) & (inside | waiting)
        if i and j and fits and not set(i) & set(holders[0].indices):
            merged, axis, rest = self.merged(holders[0], j)
            put = self.program.add(s.Put((merged, value), axis, size))
            self.tensors[self.tensors.index(holders[0])] = self.ungrouped(put, rest[:axis], i, rest[axis:])
            return
        picked = self.program.add(s.Pick((self.program.add(s.Identity((), size)), value), 1))
        self.tensors.append(self.without_repeats(self.program.reshape(picked, self.shape([*i, *j])), [*i, *j]))

    def apply_selections(self) -> None:
        progress = True
        while progress:
            progress = False
            for node in sorted(self.patterns, key=self.selection_order):
                if not node.pattern.is_selection or node.legs[2]:
                    continue
                if (self.strategy.halves and self.read_late(node)) or self.gather(node) or self.put_off(node):
                    self.patterns.remove(node)
                    progress = True

    def selection_order(self, node: Pattern) -> tuple[bool, int]:
        """Selections of one position first, then by axis, so that copies of an operand are read in the same order."""
        i, o, _ = node.legs
        places = [tensor.indices.index(index) for tensor in self.tensors for index in i if index in tensor.indices]
        return bool(o), min(places, default=0)

    def carriers(self, node: Pattern, repeats: bool = False) -> list[_Tensor] | None:
        """The tensors that hold the input leg of a pattern if it can be read from them alone.

        With `repeats` they may hold the other legs, too.
        """
        i, o, k = node.legs
        legs = (*i, *o, *k)
        if not i or len(set(legs)) < len(legs) or any(index in self.open for index in i):
            return None
        if any(other is not node and set(i) & set(indices_of(other)) for other in self.patterns):
            return None
        holders = [tensor for tensor in self.tensors if set(i) & set(tensor.indices)]
        fits = all(
            set(i) <= set(tensor.indices) and (repeats or not {*o, *k} & set(tensor.indices)) for tensor in holders
        )
        return holders if holders and fits else None

    def gather(self, node: Pattern) -> bool:
        """Read a selection from the tensors that hold its input leg: Σ_i f(i) g(i) [i = r(o)] = f(r(o)) g(r(o))."""
        pattern, (i, o, _) = node.pattern, node.legs
        holders = self.carriers(node, repeats=True)
        if holders is None or pattern.is_zero:
            return False
        for tensor in holders:
            value, axis, rest = self.merged(tensor, i)
            value = self.read(value, axis, pattern)
            new = self.ungrouped(value, rest[:axis], o, rest[axis:])
            self.tensors[self.tensors.index(tensor)] = self.without_repeats(new.value, list(new.indices))
        return True

    def read(self, value: int, axis: int, pattern: IndexPattern) -> int:
        if pattern.padding_mode != "zeros":
            return self.program.along(s.Gather((value,), axis, pattern))
        low, count = pattern.span()
        start = low * pattern.stride - pattern.padding[0]
        if (start, pattern.stride, count) != (0, 1, pattern.input_size):
            value = self.program.along(s.Slice((value,), axis, start, pattern.stride, count))
        right = pattern.output_size - low - count
        return self.program.along(s.Pad((value,), axis, low, right)) if low or right else value

    def put_off(self, node: Pattern) -> bool:
        """Put a selection into the output off until everything is contracted."""
        pattern, (i, o, _) = node.pattern, node.legs
        if pattern.is_zero or not i or len({*i, *o}) < len((*i, *o)):
            return False
        others = [other for other in self.patterns if other is not node]
        inside = any(set(i) & set(tensor.indices) for tensor in self.tensors)
        inside = inside or any(set(i) & set(indices_of(other)) for other in others)
        if inside or not set(i) <= set(self.open) or set(o) & set(self.open) or set(i) & set(o):
            return False
        held = any(set(o) & set(tensor.indices) for tensor in self.tensors)
        if o and not held and not any(set(o) & set(indices_of(other)) for other in others):
            return False
        for index in o:
            held = any(index in tensor.indices for tensor in self.tensors)
            if not held and not any(index in indices_of(other) for other in others):
                value = self.program.add(s.Fill((), self.shape([index]), _ONE))
                self.tensors.append(_Tensor(value, (index,)))
        at = self.open.index(i[0])
        rest = [index for index in self.open if index not in i]
        at -= sum(index in i for index in self.open[:at])
        self.open = [*rest[:at], *o, *rest[at:]]
        self.late.append(_Late(pattern, o, i, reads=False))
        return True

    def read_late(self, node: Pattern) -> bool:
        """Put a sub-tensor of the result off, so that two copies of one part stay one."""
        pattern, (i, o, _) = node.pattern, node.legs
        others = [other for other in self.patterns if other is not node]
        if not i or len({*i, *o}) < len((*i, *o)) or pattern.is_zero or set(i) & set(self.open):
            return False
        if not self.is_one_sided(node):
            return False
        if not set(o) <= set(self.open) or any(set(o) & set(tensor.indices) for tensor in self.tensors):
            return False
        if any(set(o) & set(indices_of(other)) for other in others):
            return False
        held = {index for tensor in self.tensors for index in tensor.indices}
        if not set(i) <= held.union(*(indices_of(other) for other in others)):
            return False
        at = self.open.index(o[0]) if o else len(self.open)
        rest = [index for index in self.open if index not in o]
        at -= sum(index in o for index in self.open[:at])
        self.open = [*rest[:at], *i, *rest[at:]]
        self.late.append(_Late(pattern, i, o, reads=True))
        return True

    def is_one_sided(self, selection: Pattern) -> bool:
        """Whether a selection reads from one copy of a tensor or pattern, and there is another copy."""
        read = set(selection.legs[0])
        tensors: dict[bool, set[int]] = {True: set(), False: set()}
        patterns: dict[bool, set[IndexPattern]] = {True: set(), False: set()}
        for tensor in self.tensors:
            tensors[bool(read & set(tensor.indices))].add(tensor.value)
        for node in self.patterns:
            if node is not selection:
                patterns[bool(read & set(indices_of(node)))].add(node.pattern)
        return bool(tensors[True] & tensors[False] or patterns[True] & patterns[False])

    def select_late(self, tensor: _Tensor, late: _Late) -> _Tensor:
        value, axis, rest = self.merged(tensor, late.before)
        value = self.read(value, axis, late.pattern)
        return self.ungrouped(value, rest[:axis], late.after, rest[axis:])

    def scatter(self, tensor: _Tensor, scatter: _Late) -> _Tensor:
        pattern = scatter.pattern
        if scatter.before:
            value, axis, rest = self.merged(tensor, scatter.before)
        else:  # one number into one position
            value, axis, rest = tensor.value, len(tensor.indices), tensor.indices
            value = self.program.reshape(value, (*self.shape(rest), 1))
        if pattern.padding_mode != "zeros":
            value = self.program.add(s.ScatterAdd((value,), axis, pattern))
            return self.ungrouped(value, rest[:axis], scatter.after, rest[axis:])
        low, count = pattern.span()
        if count != pattern.output_size:
            value = self.program.along(s.Slice((value,), axis, low, 1, count))
        if pattern.stride > 1 and count > 1:
            value = self.program.add(s.Stuff((value,), axis, pattern.stride))
        left = low * pattern.stride - pattern.padding[0]
        right = pattern.input_size - left - self.program.shapes[value][axis]
        if left or right:
            value = self.program.along(s.Pad((value,), axis, left, right))
        return self.ungrouped(value, rest[:axis], scatter.after, rest[axis:])

    def apply_windows(self) -> None:
        """Read patches as strided views wherever a pattern's input leg is summed and its other legs are used."""
        for node in list(self.patterns):
            pattern, (i, o, k) = node.pattern, node.legs
            holders = self.carriers(node)
            if holders is None or pattern.padding_mode != "zeros" or not o or not k:
                continue
            if not self.used_elsewhere(o, node) or not self.used_elsewhere(k, node):
                continue
            if self.reads_nothing(pattern):
                continue
            for tensor in holders:
                value, axis, rest = self.merged(tensor, i)
                indices = (*rest[:axis], *o, *rest[axis:], *k)
                value = self.program.reshape(self.window(value, axis, pattern), self.shape(indices))
                self.tensors[self.tensors.index(tensor)] = _Tensor(value, indices)
            self.patterns.remove(node)

    # ------------------------------------------------------------------ products of patches
    def apply_patch_grams(self) -> None:
        """Contract two copies of one tensor whose patterns share their positions, without forming patches."""
        for at, one in enumerate(self.tensors):
            for two in self.tensors[at + 1 :]:
                if one.value == two.value and self.patch_gram(one, two):
                    return self.apply_patch_grams()
        return None

    def patch_gram(self, one: _Tensor, two: _Tensor) -> bool:
        pairs = []
        for node in self.patterns:
            (i, o, k), pattern = node.legs, node.pattern
            twin = next((t for t in self.patterns if t is not node and t.legs[1] == o and t.pattern == pattern), None)
            if twin is None or not set(i) <= set(one.indices) or not i or not k or not o:
                continue
            copy = tuple(two.indices[one.indices.index(index)] for index in i)
            if (
                pattern.kernel_size > _MOST_OFFSETS
                or twin.legs[0] != copy
                or pattern.stride != 1
                or pattern.padding_mode != "zeros"
                or copy == i
            ):
                continue
            legs = (*i, *o, *k, *copy, *twin.legs[2])
            own = [node, twin]
            inner = {*i, *o, *copy}
            others = [t for t in self.tensors if t is not one and t is not two]
            elsewhere = any(inner & set(tensor.indices) for tensor in others) or any(
                inner & set(indices_of(other)) for other in self.patterns if other not in own
            )
            apart = len(set(legs)) == len(legs) and not {*k, *twin.legs[2]} & {*one.indices, *two.indices}
            if apart and not elsewhere and not inner & set(self.open):
                pairs.append((node, twin))
        if not pairs:
            return False
        taken = [node for pair in pairs for node in pair]
        flat = [index for node, twin in pairs for leg in (*node.legs, twin.legs[0], twin.legs[2]) for index in leg]
        if len(set(flat)) < len(flat):
            return False
        spatial = [index for node, _ in pairs for index in node.legs[0]]
        patterns = [node for node in self.patterns if all(node is not other for other in taken)]
        tensors = [tensor for tensor in self.tensors if tensor is not one and tensor is not two]
        needed = set(self.open).union(*(t.indices for t in tensors), *(indices_of(node) for node in patterns))
        shared = [i for i, j in zip(one.indices, two.indices, strict=True) if i == j]
        group = [index for index in shared if index in needed]
        inner = [index for index in shared if index not in needed]
        rest = [(i, j) for i, j in zip(one.indices, two.indices, strict=True) if i != j and i not in spatial]
        first, second = [i for i, _ in rest], [j for _, j in rest]
        if not {*first, *second} <= needed or set(first) & set(second):
            return False
        sizes = [math.prod(self.shape(indices)) for indices in (inner, group, first)]
        sizes += [math.prod(self.shape(node.legs[0])) for node, _ in pairs]
        value = self.matrix(one, [*inner, *group, *first, *spatial], tuple(sizes))
        value = self.program.add(s.PatchGram((value,), tuple(node.pattern for node, _ in pairs)))
        kernels = [[index for pair in pairs for index in pair[side].legs[2]] for side in (0, 1)]
        indices = (*group, *first, *kernels[0], *second, *kernels[1])
        self.tensors = [*tensors, _Tensor(self.program.reshape(value, self.shape(indices)), indices)]
        self.patterns = patterns
        return True

    # ------------------------------------------------------------------ convolutions
    def apply_convolutions(self) -> None:
        """Contract pairs of tensors that patterns tie together by the framework's convolution."""
        progress = True
        while progress:
            progress = False
            for node in self.patterns:
                match = self.tied(node)
                if match is not None and self.convolve(*match):
                    progress = True
                    break

    def tied(self, node: Pattern) -> tuple[_Tensor, _Tensor, list[tuple[Pattern, int, int]]] | None:
        """The two tensors that a pattern ties, and all patterns that tie the same two in the same way.

        Each pattern comes with the numbers of its legs (0: i, 1: o, 2: k) on the first and on the second tensor.
        """
        found = self.ends(node)
        if found is None:
            return None
        (one, leg_one), (two, leg_two) = found
        same = []
        for other in self.patterns:
            ends = self.ends(other)
            if ends is not None and [end[0] for end in ends] == [one, two]:
                same.append((other, ends[0][1], ends[1][1]))
        flat = [index for other, *_ in same for leg in other.legs for index in leg]
        if len(set(flat)) < len(flat):
            return None
        third = {3 - leg_one - leg_two}
        if (
            any(3 - first - second not in third for _, first, second in same if 0 in third)
            or len(same) > _MOST_DIMENSIONS
        ):
            return None
        return one, two, same

    def ends(self, node: Pattern) -> list[tuple[_Tensor, int]] | None:
        """The tensors on the two summed legs of a pattern, the one with the input leg (else position leg) first."""
        legs = node.legs
        flat = [index for leg in legs for index in leg]
        if node.pattern.padding_mode != "zeros" or not all(legs) or len(set(flat)) < len(flat):
            return None
        ends = []
        for number, leg in enumerate(legs):
            holders = [tensor for tensor in self.tensors if set(leg) & set(tensor.indices)]
            others = any(other is not node and set(leg) & set(indices_of(other)) for other in self.patterns)
            summed = not others and not set(leg) & set(self.open)
            if summed and len(holders) == 1 and set(leg) <= set(holders[0].indices):
                ends.append((holders[0], number))
        if len(ends) != 2 or ends[0][0] is ends[1][0]:
            return None
        free = legs[3 - ends[0][1] - ends[1][1]]
        if any(set(free) & set(end[0].indices) for end in ends):
            return None
        return ends

    def convolve(self, one: _Tensor, two: _Tensor, ties: list[tuple[Pattern, int, int]]) -> bool:
        """Contract two tensors through patterns in one step; `one` holds the input legs, or else the positions."""
        spatial = {index for node, *_ in ties for leg in node.legs for index in leg}
        rest = [tensor for tensor in self.tensors if tensor is not one and tensor is not two]
        patterns = [node for node in self.patterns if all(node is not other for other, *_ in ties)]
        needed = set(self.open).union(*(tensor.indices for tensor in rest), *(indices_of(node) for node in patterns))
        one, two = (
            self.summed(one, needed | set(two.indices) | spatial),
            self.summed(two, needed | set(one.indices) | spatial),
        )
        shared = [index for index in one.indices if index in two.indices]
        group = [index for index in shared if index in needed]
        inner = [index for index in shared if index not in needed]
        free_one = [index for index in one.indices if index not in shared and index not in spatial]
        free_two = [index for index in two.indices if index not in shared and index not in spatial]
        adjoint = ties[0][1] == 1  # the output is on the input's side
        gradient = ties[0][2] == 1 and not adjoint and not self.strategy.swapped
        legs = [leg for tie in ties if (leg := self.convolution_legs(*tie, adjoint, gradient)) is not None]
        if len(legs) < len(ties):
            return False
        room = _MOST_DIMENSIONS - len(legs)
        whole = self.whole_axes(one, spatial, inner if gradient else free_one, room)
        if whole:
            # A kernel of size 1 along the axes beside: moving them into the batch would cost copies.
            legs += [self.whole_leg(index, gradient) for index in whole]
            legs.sort(key=lambda leg: one.indices.index(leg.first[0]))
            inner, free_one = ([index for index in group_ if index not in whole] for group_ in (inner, free_one))
        g, c, f1, f2 = (math.prod(self.shape(indices)) for indices in (group, inner, free_one, free_two))
        if 0 in (g, c, f1, f2):
            return False  # frameworks differ in what they take for empty arrays
        first_legs = [index for leg in legs for index in leg.first]
        second_legs = [index for leg in legs for index in leg.second]
        sizes_one = [math.prod(self.shape(leg.first)) for leg in legs]
        sizes_two = [math.prod(self.shape(leg.second)) for leg in legs]
        if gradient:
            left = self.matrix(one, [*inner, *group, *free_one, *first_legs], (c, g * f1, *sizes_one))
            right = self.matrix(two, [*inner, *group, *free_two, *second_legs], (c, g * f2, *sizes_two))
            shape, indices = (g * f2, f1), [*group, *free_two, *free_one]
        else:
            left = self.matrix(one, [*free_one, *group, *inner, *first_legs], (f1, g * c, *sizes_one))
            order = [*group, *inner, *free_two] if adjoint else [*group, *free_two, *inner]
            right = self.matrix(
                two, [*order, *second_legs], (g * (c if adjoint else f2), f2 if adjoint else c, *sizes_two)
            )
            shape, indices = (f1, g * f2), [*free_one, *group, *free_two]
        padding = []
        for axis, leg in enumerate(legs, start=2):
            if leg.shift is not None:
                left = self.shifted(left, axis, *leg.shift)
            padding.append(leg.padding)
        kind = "weight_grad" if gradient else "input_grad" if adjoint else "forward"
        step = s.Convolution(
            (left, right),
            kind,
            tuple(leg.stride for leg in legs),
            tuple(padding),
            tuple(leg.dilation for leg in legs),
            g,
            (*shape, *(leg.result for leg in legs)),
        )
        value = self.program.add(step)
        for axis, leg in enumerate(legs, start=2):
            if leg.crop is not None:
                value = self.shifted(value, axis, *leg.crop)
        indices += [index for leg in legs for index in leg.out]
        self.tensors = [*rest, _Tensor(self.program.reshape(value, self.shape(indices)), tuple(indices))]
        self.patterns = patterns
        return True

    def whole_axes(self, tensor: _Tensor, spatial: set[str], pool: list[str], room: int) -> list[str]:
        """Indices of the pool among the last axes of a tensor, beside its spatial ones; none if there is no room."""
        tail = list(itertools.takewhile(lambda index: index in spatial or index in pool, reversed(tensor.indices)))
        found = [index for index in tail if index in pool]
        return found if len(found) <= room and len(found) < len(pool) else []

    def whole_leg(self, index: str, gradient: bool) -> _ConvolutionLegs:
        size = self.sizes[index]
        if gradient:
            return _ConvolutionLegs((index,), (index,), (), 1, 0, 1, 1, None, None)
        return _ConvolutionLegs((index,), (), (index,), 1, 0, 1, size, None, None)

    def convolution_legs(
        self, node: Pattern, leg_one: int, leg_two: int, adjoint: bool, gradient: bool
    ) -> _ConvolutionLegs | None:
        pattern = node.pattern
        first, second, out = node.legs[leg_one], node.legs[leg_two], node.legs[3 - leg_one - leg_two]
        if (leg_one == 1) != adjoint:
            return None
        if not adjoint and (leg_two == 1) != gradient:
            pattern = pattern.swap()  # the tensor with the positions is the kernel
        size, kernel, positions = pattern.input_size, pattern.kernel_size, pattern.output_size
        stride, dilation, left = pattern.stride, pattern.dilation, pattern.padding[0]
        length = (positions - 1) * stride + dilation * (kernel - 1) + 1
        if -left >= size or length - left <= 0:
            return None
        if adjoint:
            extra = size - (length - 2 * left)
            if left >= 0 and 0 <= extra < max(stride, dilation):
                return _ConvolutionLegs(first, second, out, stride, left, dilation, size, None, None)
            return _ConvolutionLegs(first, second, out, stride, 0, dilation, length, None, (left, size))
        result = kernel if gradient else positions
        if left >= 0 and 1 + (size + 2 * left - dilation * (kernel - 1) - 1) // stride == positions:
            return _ConvolutionLegs(first, second, out, stride, left, dilation, result, None, None)
        return _ConvolutionLegs(first, second, out, stride, 0, dilation, result, (-left, length), None)

    # ------------------------------------------------------------------ contractions
    def contract(self) -> _Tensor:
        items: list[_Tensor | Pattern] = [*self.tensors, *self.patterns]
        wanted = [index for index in self.open if index not in self.expanded]
        if not items:
            factor, self.factor = self.factor, _ONE
            return _Tensor(self.program.add(s.Fill((), (), factor)), ())
        halves = self.two_halves(items, wanted) if self.strategy.halves else None
        if halves is None:
            last = self.joined(items, self.path(items, set(wanted)), set(wanted))
        else:
            one, two = halves
            needed = [set(wanted).union(*map(self.kept_indices, half)) for half in (two, one)]
            path = self.path(one, needed[0])
            last = self.pair(self.joined(one, path, needed[0]), self.joined(two, path, needed[1]), set(wanted))
        order = [last.indices.index(index) for index in wanted]
        return _Tensor(self.program.transpose(last.value, order), tuple(wanted))

    def joined(self, items: list[_Tensor | Pattern], path: list[tuple[int, ...]], wanted: set[str]) -> _Tensor:
        """The items contracted in the order of a path; indices in `wanted` are kept."""
        for pair in path:
            taken = [items[at] for at in pair]
            items = [item for at, item in enumerate(items) if at not in pair]
            needed = wanted.union(*(self.kept_indices(item) for item in items))
            merged = taken[0]
            for step, item in enumerate(taken[1:], start=2):
                later = needed.union(*(self.kept_indices(other) for other in taken[step:]))
                merged = self.pair(merged, item, later)
            items.append(merged)
        return self.summed(self.as_tensor(items[0]), wanted)

    def two_halves(
        self, items: list[_Tensor | Pattern], wanted: Sequence[str]
    ) -> tuple[list[_Tensor | Pattern], list[_Tensor | Pattern]] | None:
        """The items in two lists that are alike up to names of indices, or None."""

        def what(item: _Tensor | Pattern) -> tuple[object, list[int]]:
            # Tensors by their value, patterns by their parameters, both by how indices are grouped.
            if isinstance(item, Pattern):
                return item.pattern, [len(leg) for leg in item.legs]
            return item.value, [len(item.indices)]

        def flat(item: _Tensor | Pattern) -> list[str]:
            return list(item.indices) if isinstance(item, _Tensor) else [i for leg in item.legs for i in leg]

        def extended(there: dict[str, str], one: _Tensor | Pattern, two: _Tensor | Pattern) -> dict[str, str] | None:
            """The bijection from the names of the first half to those of the second with two more items."""
            there = dict(there)
            for a, b in zip(flat(one), flat(two), strict=True):
                if there.setdefault(a, b) != b or (a in wanted) != (b in wanted):
                    return None
            back = {b: a for a, b in there.items()}
            mixed = any(a != b and (a in back or b in there) for a, b in there.items())
            return None if len(back) < len(there) or mixed else there

        def search(left: list[_Tensor | Pattern], there: dict[str, str]) -> list[tuple] | None:
            if not left:
                return []
            first, rest = left[0], left[1:]
            for at, other in enumerate(rest):
                if what(first) != what(other):
                    continue
                for pair in ((first, other), (other, first)):
                    if next(tries, None) is None:
                        return None
                    more = extended(there, *pair)
                    found = None if more is None else search([*rest[:at], *rest[at + 1 :]], more)
                    if found is not None:
                        return [pair, *found]
            return None

        tries = iter(range(_MOST_PAIRS))
        pairs = search(items, {}) if len(items) % 2 == 0 and len(items) <= _LARGEST_HALVES else None
        return None if pairs is None else ([one for one, _ in pairs], [two for _, two in pairs])

    def path(self, items: list[_Tensor | Pattern], wanted: set[str]) -> list[tuple[int, ...]]:
        held = [frozenset(self.kept_indices(item)) for item in items]
        inputs = []
        for at, item in enumerate(items):
            used = wanted.union(*held[:at], *held[at + 1 :])
            loose = [item.legs[leg] for leg in self.loose_legs(item, used)] if isinstance(item, Pattern) else []
            inputs.append(held[at].difference(*loose))
        sizes = {index: max(size, 1) for index, size in self.sizes.items()}
        return find_order(inputs, frozenset(wanted), sizes, self.strategy.order)

    def kept_indices(self, item: _Tensor | Pattern) -> tuple[str, ...]:
        if isinstance(item, _Tensor):
            return item.indices
        return tuple(dict.fromkeys(index for leg in item.legs for index in leg))

    def as_tensor(self, item: _Tensor | Pattern, loose: Sequence[int] = ()) -> _Tensor:
        """A pattern materialized, summed over the legs `loose`."""
        if isinstance(item, _Tensor):
            return item
        value = self.program.add(s.Constant((), item.pattern, tuple(loose)))
        indices = [index for leg, group in enumerate(item.legs) if leg not in loose for index in group]
        return self.without_repeats(self.program.reshape(value, self.shape(indices)), indices)

    def pair(self, one: _Tensor | Pattern, two: _Tensor | Pattern, needed: set[str]) -> _Tensor:
        """Contract two items; indices in `needed` are kept."""
        for tensor, pattern in ((one, two), (two, one)):
            if self.strategy.windows and isinstance(tensor, _Tensor) and isinstance(pattern, Pattern):
                added = self.overlap_add(tensor, pattern, needed) or self.without_table(tensor, pattern, needed)
                if added is not None:
                    return added
        a = self.materialized_for(one, two, needed)
        b = self.materialized_for(two, one, needed)
        a = self.summed(a, needed.union(b.indices))
        b = self.summed(b, needed.union(a.indices))
        return self.multiply(a, b, needed)

    def materialized_for(self, item: _Tensor | Pattern, other: _Tensor | Pattern, needed: set[str]) -> _Tensor:
        if isinstance(item, _Tensor):
            return item
        used = needed.union(self.kept_indices(other))
        return self.as_tensor(item, self.loose_legs(item, used))

    def loose_legs(self, node: Pattern, used: set[str]) -> tuple[int, ...]:
        """The legs of a pattern that nothing else holds: the pattern is summed over them when it is made."""
        repeated = len(self.kept_indices(node)) < sum(len(leg) for leg in node.legs)
        loose = tuple(leg for leg, group in enumerate(node.legs) if group and not used & set(group))
        return () if repeated or len(loose) == 3 else loose

    def without_table(self, tensor: _Tensor, node: Pattern, needed: set[str]) -> _Tensor | None:
        """The product with a pattern that would be too large an array, by views and copies; None if there is no way."""
        pattern, (i, o, k) = node.pattern, node.legs
        flat, held = (*i, *o, *k), set(tensor.indices)
        if not i or len(set(flat)) < len(flat) or pattern.is_zero:
            return None
        if not self.is_large(node, self.loose_legs(node, needed | held)):
            return None
        if set(i) <= held and not set(i) & needed:
            value, axis, rest = self.merged(tensor, i)
            if pattern.is_selection and not k:
                value, indices = self.read(value, axis, pattern), [*rest[:axis], *o, *rest[axis:]]
            elif pattern.padding_mode == "zeros":
                value, indices = self.window(value, axis, pattern), [*rest[:axis], *o, *rest[axis:], *k]
            else:
                return None
            value = self.program.reshape(value, self.shape(indices))
            return self.summed(self.without_repeats(value, indices), needed)
        if set(i) & held:
            return None
        if pattern.is_selection and not k and o and set(o) <= held and not set(o) & needed:
            return self.summed(self.scatter(tensor, _Late(pattern, o, i, reads=False)), needed)
        for one, two, turned in ((o, k, pattern), (k, o, pattern.swap())):
            whole = one and two and set(two) <= held and not set(two) & needed and not set(one) & held
            if whole and turned.padding_mode == "zeros":
                return self.summed(self.shifted_rows(tensor, turned, (i, one, two)), needed)
        return None

    def window(self, value: int, axis: int, pattern: IndexPattern) -> int:
        """The patches along an axis as a view; kernel positions last."""
        length = (pattern.output_size - 1) * pattern.stride + pattern.dilation * (pattern.kernel_size - 1) + 1
        value = self.shifted(value, axis, -pattern.padding[0], length)
        step = s.Window((value,), axis, pattern.output_size, pattern.kernel_size, pattern.stride, pattern.dilation)
        return self.program.add(step)

    def shifted_rows(self, tensor: _Tensor, pattern: IndexPattern, legs: tuple[Group, Group, Group]) -> _Tensor:
        """Σ_k Π[i,o,k] z[k]: z in zeros once for each o, a stride further on from row to row.

        Rows that are a stride longer than they should be, one after another, are cut into rows of the right length.
        """
        (i, o, k), stride, rows = legs, pattern.stride, pattern.output_size
        span = pattern.dilation * (pattern.kernel_size - 1) + 1
        length = (rows - 1) * stride + span
        front = [index for index in tensor.indices if index not in k]
        value = self.matrix(tensor, [*front, *k], (*self.shape(front), pattern.kernel_size))
        axis, shape = len(front), self.shape(front)
        if pattern.dilation > 1:
            value = self.program.add(s.Stuff((value,), axis, pattern.dilation))
        value = self.program.along(s.Pad((value,), axis, 0, length + stride - span))
        value = self.program.reshape(value, (*shape, 1, length + stride))
        value = self.program.add(s.Expand((value,), (*shape, rows, length + stride)))
        value = self.program.reshape(value, (*shape, rows * (length + stride)))
        value = self.program.along(s.Slice((value,), axis, 0, 1, rows * length))
        value = self.program.reshape(value, (*shape, rows, length))
        value = self.shifted(value, axis + 1, pattern.padding[0], pattern.input_size)
        return self.ungrouped(value, front, (*o, *i), ())

    def overlap_add(self, tensor: _Tensor, node: Pattern, needed: set[str]) -> _Tensor | None:
        """Σ_{o,k} Π[i,o,k] z[o,k] by adding shifted slices."""
        pattern, (i, o, k) = node.pattern, node.legs
        summed = set(o) | set(k)
        if pattern.padding_mode != "zeros" or not o or not k or summed & needed or set(i) & set(tensor.indices):
            return None
        if len({*i, *o, *k}) < len((*i, *o, *k)) or self.reads_nothing(pattern):
            return None
        missing = [leg for leg in (o, k) if not set(leg) & set(tensor.indices)]
        large = self.is_large(node, self.loose_legs(node, needed.union(tensor.indices)))
        if len(missing) == 1 and i and large:
            # Σ_k Π[i,o,k] is too large an array: as many equal patches instead, which take no memory.
            indices = (*tensor.indices, *missing[0])
            value = self.program.reshape(tensor.value, (*self.shape(tensor.indices), *[1] * len(missing[0])))
            tensor = _Tensor(self.program.add(s.Expand((value,), self.shape(indices))), indices)
            if pattern.output_size < pattern.kernel_size:
                pattern, o, k = pattern.swap(), k, o
        if not summed <= set(tensor.indices):
            return None
        low, size = -pattern.padding[0], pattern.input_size
        length = (pattern.output_size - 1) * pattern.stride + pattern.dilation * (pattern.kernel_size - 1) + 1
        kernel_last = [*(index for index in tensor.indices if index not in k), *k]
        value = self.program.transpose(tensor.value, [tensor.indices.index(index) for index in kernel_last])
        front = kernel_last[: len(kernel_last) - len(k)]
        value = self.program.reshape(value, (*self.shape(front), pattern.kernel_size))
        unit = "the kernel"  # no identifier, so no index has this name
        self.sizes[unit] = pattern.kernel_size
        value, axis, rest = self.merged(_Tensor(value, (*front, unit)), o)
        value = self.program.add(s.OverlapAdd((value,), axis, length, pattern.stride, pattern.dilation))
        value = self.shifted(value, axis, -low, size)
        rest = rest[:-1]
        return self.summed(self.ungrouped(value, rest[:axis], i, rest[axis:]), needed | set(i))

    def summed(self, tensor: _Tensor, needed: set[str]) -> _Tensor:
        axes = tuple(axis for axis, index in enumerate(tensor.indices) if index not in needed)
        if not axes:
            return tensor
        value = self.program.add(s.SumAxes((tensor.value,), axes))
        return _Tensor(value, tuple(index for index in tensor.indices if index in needed))

    def multiply(self, a: _Tensor, b: _Tensor, needed: set[str]) -> _Tensor:
        shared = [index for index in a.indices if index in b.indices]
        batch = [index for index in shared if index in needed]
        contracted = [index for index in shared if index not in needed]
        free_a = [index for index in a.indices if index not in shared]
        free_b = [index for index in b.indices if index not in shared]
        indices = (*batch, *free_a, *free_b)
        if a == b and contracted:
            axes = tuple(a.indices.index(index) for index in contracted)
            kept = tuple(index for index in a.indices if index not in contracted)
            return _Tensor(self.program.add(s.SumSquares((a.value,), axes)), kept)
        if not contracted:
            free_a, free_b = (self.as_wanted(tensor, batch, []) for tensor in (a, b))
            indices = (*batch, *free_a, *free_b)
            left = self.matrix(a, [*batch, *free_a], (*self.shape(batch), *self.shape(free_a), *[1] * len(free_b)))
            right = self.matrix(b, [*batch, *free_b], (*self.shape(batch), *[1] * len(free_a), *self.shape(free_b)))
            return _Tensor(self.program.add(s.Multiply((left, right))), indices)
        if self.strategy.batched:
            found = self.broadcast(a, b, batch, contracted) or self.broadcast(b, a, batch, contracted)
            found = found or self.added_up(a, b, batch, contracted)
            if found is not None:
                return found
        return self.product(a, b, batch, contracted)

    def product(self, a: _Tensor, b: _Tensor, batch: list[str], contracted: list[str]) -> _Tensor:
        """Two tensors as matrices [batch, free, contracted], multiplied."""
        free_a, free_b = (self.as_wanted(tensor, batch, contracted) for tensor in (a, b))
        if self.is_result(batch, free_b, free_a) and not self.is_result(batch, free_a, free_b):
            a, b, free_a, free_b = b, a, free_b, free_a
        indices = (*batch, *free_a, *free_b)
        left = self.operand(a, batch, free_a, contracted)
        right = self.operand(b, batch, free_b, contracted)
        if left == right and free_a:
            value = self.program.add(s.Gram((left,)))
            return _Tensor(self.program.reshape(value, self.shape(indices)), indices)
        axes = len(self.program.shapes[right])
        right = self.program.transpose(right, [*range(axes - 2), axes - 1, axes - 2])
        value = self.program.add(s.MatMul((left, right)))
        return _Tensor(self.program.reshape(value, self.shape(indices)), indices)

    def is_result(self, *groups: list[str]) -> bool:
        """Whether the indices are those of the result in its order, as far as memory shows it."""
        found, wanted = (
            [index for index in order if self.sizes[index] != 1 and index not in self.expanded]
            for order in (itertools.chain(*groups), self.open)
        )
        return found == wanted

    def as_wanted(self, tensor: _Tensor, batch: list[str], contracted: list[str]) -> list[str]:
        """The free indices of a factor, in the order of the result if the product is larger than the factor."""
        free = [index for index in tensor.indices if index not in batch and index not in contracted]
        larger = math.prod(self.shape(free)) >= math.prod(self.shape(contracted))
        return sorted(free, key=self.open.index) if larger and set(free) <= set(self.open) else free

    def broadcast(self, big: _Tensor, small: _Tensor, batch: list[str], contracted: list[str]) -> _Tensor | None:
        """Free indices on both sides of the contracted ones: those in front become batch axes of both factors."""
        places = sorted(big.indices.index(index) for index in contracted)
        low, high = places[0], places[-1] + 1
        front, inner, behind = big.indices[:low], big.indices[low:high], big.indices[high:]
        if len(inner) > len(contracted) or not behind or not set(batch) < set(front):
            return None
        blocks = [(held, list(group)) for held, group in itertools.groupby(front, lambda index: index in batch)]
        free = [index for index in small.indices if index not in batch and index not in contracted]
        indices = (*front, *free, *behind)
        last = set(indices) == set(self.open) and list(indices) != sorted(indices, key=self.open.index)
        if last and math.prod(self.shape(indices)) > math.prod(self.shape(big.indices)):
            return None  # to put the result in order would cost more than the copy that is saved
        own = [index for index in front if index in batch]
        axes = tuple(math.prod(self.shape(group)) if held else 1 for held, group in blocks)
        ends = [math.prod(self.shape(group)) for group in (free, inner, behind)]
        left = self.matrix(small, [*own, *free, *inner], (*axes, ends[0], ends[1]))
        axes = tuple(math.prod(self.shape(group)) for _, group in blocks)
        right = self.matrix(big, list(big.indices), (*axes, ends[1], ends[2]))
        value = self.program.add(s.MatMul((left, right)))
        return _Tensor(self.program.reshape(value, self.shape(indices)), indices)

    def added_up(self, a: _Tensor, b: _Tensor, batch: list[str], contracted: list[str]) -> _Tensor | None:
        """Contracted indices on both sides of the free ones: a product for each position of those in front, added."""
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a.indices, b.indices, strict=False))
        front = [index for index, _ in pairs]
        inner = [index for index in contracted if index not in front]
        added = [index for index in front if index not in batch]
        if not inner or not added or not set(batch) <= set(front):
            return None
        between = any(tensor.indices[len(front)] not in inner for tensor in (a, b))
        return self.summed(self.product(a, b, front, inner), {*a.indices, *b.indices} - {*added}) if between else None

    def matrix(self, tensor: _Tensor, order: list[str], shape: tuple[int, ...]) -> int:
        value = self.program.transpose(tensor.value, [tensor.indices.index(index) for index in order])
        return self.program.reshape(value, shape)

    def operand(self, tensor: _Tensor, batch: list[str], free: list[str], contracted: list[str]) -> int:
        """The tensor as [batch, free, contracted]; where its axes stand the other way round, as a transposed view.

        Both factors of a product are brought into this one form, so that the two copies in a Gram matrix share it.
        """
        sizes = [math.prod(self.shape(group)) for group in (batch, free, contracted)]
        front = [sizes[0]] if batch else []
        if list(tensor.indices) == [*batch, *contracted, *free] and contracted and free:
            value = self.matrix(tensor, [*batch, *contracted, *free], (*front, sizes[2], sizes[1]))
            axes = len(front) + 2
            return self.program.transpose(value, [*range(axes - 2), axes - 1, axes - 2])
        return self.matrix(tensor, [*batch, *free, *contracted], (*front, sizes[1], sizes[2]))

    # ------------------------------------------------------------------ the end
    def finish(self, tensor: _Tensor) -> int:
        value = tensor.value
        order = [index for index in self.term.output_indices if index in tensor.indices]
        value = self.program.transpose(value, [tensor.indices.index(index) for index in order])
        if self.factor != 1:
            value = self.program.scaled(value, self.factor)
        if self.expanded:
            every = self.term.output_indices
            value = self.program.reshape(value, tuple(1 if i in self.expanded else self.sizes[i] for i in every))
            value = self.program.add(s.Expand((value,), self.shape(every)))
        return self.program.reshape(value, tuple(math.prod(self.shape(leg)) for leg in self.term.output))


def candidates(net: AnyNetwork, in_parts: bool = True) -> list[Plan]:
    """All candidate plans of a network whose sizes are known, without those that came out alike.

    Args:
        net: the network.
        in_parts: also plans that work through an index part by part, though memory does not ask for it; in half
            precision every part that is added costs digits.
    """
    simplified = net.simplify()
    plans: dict[tuple[s.Step, ...], Plan] = {}
    larger: list[Plan] = []
    for strategy in STRATEGIES:
        if strategy.placed and not net.selections:
            continue
        plan = lower(simplified, strategy)
        if _fits(plan):
            plans.setdefault(plan.steps, plan)
        else:
            larger.append(plan)
    if not plans:  # there is no way around a table: the smallest
        plan = min(larger, key=lambda plan: max(_tables(plan)))
        plans[plan.steps] = plan
    for plan in list(plans.values()):
        # What is squared and summed need never be there as a whole: a part of an index at a time stays in fast memory.
        strategy = next(strategy for strategy in STRATEGIES if strategy.name == plan.name)
        index = _summed_by_all(net) if in_parts and any(isinstance(step, s.SumSquares) for step in plan.steps) else None
        if index is not None:
            sliced = lower_sliced(net, strategy, index, min(net.sizes[index] or 0, _PARTS_OF_SQUARES))
            plans.setdefault(sliced.steps, sliced)
    return list(plans.values())


def _largest_table(sizes: Iterable[int]) -> int:
    """How many entries an array made of a pattern may have beside operands and a result of these sizes."""
    return max(_SMALL_TABLE, sum(sizes))


def _tables(plan: Plan) -> list[int]:
    """The sizes of the arrays that are made of patterns."""
    return [
        math.prod(shape) for step, shape in zip(plan.steps, plan.shapes, strict=True) if isinstance(step, s.Constant)
    ]


def _fits(plan: Plan) -> bool:
    """Whether no pattern is made into an array of more entries than operands and result have."""
    sizes = [math.prod(step.size) for step in plan.steps if isinstance(step, s.Input)]
    return max(_tables(plan), default=0) <= _largest_table([*sizes, math.prod(plan.shape)])


_PARTS_OF_SQUARES = 32
"""A sum of squares is worked through in no more parts than this."""


def _summed_by_all(net: AnyNetwork) -> str | None:
    """A summed index that every operand has, the largest of them."""
    held = [set(indices_of(node)) for term in net.terms for node in term.nodes if isinstance(node, Operand)]
    found = [index for index in sliceable(net) if index not in net.output_indices and all(index in one for one in held)]
    return found[0] if found else None


def compare_orders(plan: Plan) -> Orders:
    """What the network of a plan costs in several orders, with patterns materialized, and by the plan itself.

    The best order is left out where it would take long to find.
    """
    assert plan.network is not None
    simplified = plan.network.simplify()
    rows = [feynman(simplified)]
    for order in ORDERS:
        if order == "optimal" and not has_best_order(simplified):
            continue
        found = lower(simplified, Strategy(order, windows=False, composed=True, order=order))
        rows.append(Order(order, found.flops, found.peak_size))
    return Orders((*rows, Order("planner", plan.flops, plan.peak_size)))


def lower(net: AnyNetwork, strategy: Strategy) -> Plan:
    """The plan of a network by one strategy."""
    program = Program()
    return _pruned(to_text(net), program, _lower_terms(program, net, strategy), strategy.name)


def _lower_terms(program: Program, net: AnyNetwork, strategy: Strategy) -> int:
    if strategy.composed:
        net = compose(net)
    if strategy.undone:
        net = undo(net)
    if strategy.halves:
        net = share(net)
    # A factor that several terms have multiplies their sum.
    factors = Counter(term.scale.factor for term in net.terms)
    common, count = factors.most_common(1)[0]
    later = common if common and count > 1 else _ONE
    value = _added(program, [_Lowering(program, term, strategy, later).run() for term in net.terms])
    return value if later == 1 else program.scaled(value, later)


def _added(program: Program, values: Sequence[int]) -> int:
    result = values[0]
    for value in values[1:]:
        result = program.add(s.Add((result, value)))
    return result


def parts_of(net: AnyNetwork, index: str, count: int) -> list[AnyNetwork]:
    """Networks over about equal parts of an index, `count` of them or as many as it has positions.

    Their values, added up if the index is summed, else put side by side along `axis_of`, are the network's.
    """
    size = net.sizes[index] or 0
    count = min(count, size)
    bounds = [size * at // count for at in range(count + 1)]
    return [net.narrow(index, low, high - low) for low, high in itertools.pairwise(bounds)]


def axis_of(net: AnyNetwork, index: str) -> int | None:
    """The axis of the result that an index leads; None if it is summed."""
    if index not in net.output_indices:
        return None
    return next(axis for axis, leg in enumerate(net.output) if leg[:1] == (index,))


def lower_sliced(net: AnyNetwork, strategy: Strategy, index: str, parts: int) -> Plan:
    """The plan that works through an index part by part, so that less is alive at once.

    Parts of a summed index are added up, parts of an output index put side by side (it must lead its leg).
    """
    program = Program()
    axis = axis_of(net, index)
    values = []
    for piece in parts_of(net, index, parts):
        values.append(_lower_terms(program, piece.simplify(), strategy))
        if axis is None and len(values) > 1:
            values = [_added(program, values)]
    if len(values) > 1:
        assert axis is not None
        values = [program.add(s.Concat(tuple(values), axis))]
    return _pruned(to_text(net), program, values[0], f"{strategy.name}, {index} in {parts} parts")


def sliceable(net: AnyNetwork) -> list[str]:
    """Indices that can be worked through part by part, the largest first."""
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


def _pruned(text: str, program: Program, result: int, name: str) -> Plan:
    """A plan of the steps that the result needs, and of all positions, which are checked even where nothing is read."""
    needed = set()
    todo = [result, *(place for place, step in enumerate(program.steps) if isinstance(step, s.Positions))]
    while todo:
        place = todo.pop()
        if place not in needed:
            needed.add(place)
            todo += program.steps[place].takes
    kept = sorted(needed)
    new = {place: at for at, place in enumerate(kept)}
    steps = [_moved(program.steps[place], new) for place in kept]
    shapes = tuple(program.shapes[place] for place in kept)
    for at, step in enumerate(steps):
        if isinstance(step, (s.Multiple, s.Add)) and _is_owned(steps, step.takes[0], at, new[result]):
            steps[at] = replace(step, owned=True)
    return Plan(text, tuple(steps), shapes, new[result], name)


def _is_owned(steps: Sequence[s.Step], value: int, user: int, result: int) -> bool:
    """Whether a value was computed for one user alone: no operand or pattern, and only this user sees it."""
    while True:
        users = [at for at, step in enumerate(steps) if value in step.takes]
        if users != [user] or value == result:
            return False
        step = steps[value]
        if not step.is_view:
            return not isinstance(step, s.Fill)
        if not step.takes or isinstance(step, (s.Expand, s.Window, s.Diagonal)):
            return False
        user, value = value, step.takes[0]


def _moved(step: s.Step, new: dict[int, int]) -> s.Step:
    return replace(step, takes=tuple(new[at] for at in step.takes))
