"""Products whose factors are read through index patterns by one kernel, so that patches are never stored."""

from __future__ import annotations

from collections.abc import Sequence

from lensor.lowering.reads import Reads, reads_of
from lensor.lowering.state import State, Tensor
from lensor.plan import steps as s


def pattern_product(
    state: State, a: Tensor, b: Tensor, batch: Sequence[str], contracted: Sequence[str]
) -> Tensor | None:
    """Multiply two tensors by a `PatternProduct`; None if one of them is a table, which a matrix product reads."""
    program = state.program
    shared = {*batch, *contracted}
    rows = [index for index in a.indices if index not in shared]
    columns = [index for index in b.indices if index not in shared]
    every = [*batch, *rows, *columns, *contracted]
    number = {index: at for at, index in enumerate(every)}
    left, right = (reads_of(program, one.value, [number[index] for index in one.indices]) for one in (a, b))
    if not (_is_read(left) or _is_read(right)) and (_is_table(state, left) or _is_table(state, right)):
        return None
    kept = [*batch, *rows, *columns]
    later = [index for index in kept if index not in state.open]
    order = [*later, *sorted((index for index in kept if index in state.open), key=state.open.index)]

    def numbers(group: Sequence[str]) -> tuple[int, ...]:
        return tuple([number[index] for index in group])

    groups = (numbers(batch), numbers(rows), numbers(columns))
    values = (left.value, right.value)
    step = s.PatternProduct(values, state.shape(every), *groups, numbers(order), left.axes, right.axes)
    return Tensor(program.add(step), tuple(order))


def _is_read(reads: Reads) -> bool:
    return not all(axis.is_plain for axis in reads.axes)


def _is_table(state: State, reads: Reads) -> bool:
    return isinstance(state.program.steps[reads.value], (s.Constant, s.Fill, s.Identity))
