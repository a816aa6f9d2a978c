"""The first stage, which converts the nodes of a term to tensors, patterns and selections."""

from __future__ import annotations

from fractions import Fraction

from lensor.lowering.state import Selection, State, Tensor
from lensor.network import Delta, Node, Ones, Operand, Pattern, Select, indices_of
from lensor.plan import steps as s


def take_nodes(state: State) -> None:
    """Add all nodes of the term to the state, except ones whose index also appears on another node."""
    held = {index for node in state.term.nodes if not isinstance(node, Ones) for index in indices_of(node)}
    for node in state.term.nodes:
        if not (isinstance(node, Ones) and node.index in held):
            take(state, node)
            held |= {node.index} if isinstance(node, Ones) else set()


def take(state: State, node: Node) -> None:
    """Add one node to the state."""
    program = state.program
    match node:
        case Select(name, (full, chosen)):
            positions = program.add(s.Positions((), name, (state.size(chosen),), state.size(full)))
            state.selections.append(Selection(positions, full, chosen))
        case Operand(name, legs):
            value = program.add(s.Input((), name, tuple(state.size(leg) for leg in legs)))
            indices = [index for leg in legs for index in leg]
            state.add(state.without_repeats(program.reshape(value, state.shape(indices)), indices))
        case Pattern():
            state.add_pattern(node)
        case Delta(indices):
            for other in indices[1:]:
                value = program.add(s.Identity((), state.sizes[other]))
                state.add(Tensor(value, (indices[0], other)))
        case Ones(index):
            if index in state.open:
                state.expanded.append(index)
            else:
                state.add(Tensor(program.add(s.Fill((), state.shape([index]), Fraction(1))), (index,)))
