"""The strategies: each is a list of stages, and a way to contract the tensors and patterns that remain.

To add a strategy, write a stage in a new file and add a line here. Use `Strategy.applies` to avoid unnecessary
lowering.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from lensor.lowering.contraction import Contraction
from lensor.lowering.convolutions import convolve, convolve_forward
from lensor.lowering.crops import read_crops, read_crops_late
from lensor.lowering.products import added_up, broadcast
from lensor.lowering.sampled import place_chosen, read_chosen
from lensor.lowering.state import State
from lensor.lowering.toeplitz import defer_toeplitz
from lensor.lowering.windows import overlap_add, read_windows, split_modes, without_table
from lensor.network import AnyNetwork, Operand, Pattern
from lensor.simplification.lags import has_lags, has_several_lags, lags, lags_of_last
from lensor.simplification.recompose import compose, share, undo

Stage: TypeAlias = Callable[[State], None]


def _always(net: AnyNetwork) -> bool:
    return True


def _has_patterns(net: AnyNetwork) -> bool:
    return any(isinstance(node, Pattern) for term in net.terms for node in term.nodes)


def _has_selections(net: AnyNetwork) -> bool:
    return bool(net.selections)


def _has_copies(net: AnyNetwork) -> bool:
    """Whether an operand or a pattern occurs twice in one term."""
    for term in net.terms:
        operands = Counter(node.name for node in term.nodes if isinstance(node, Operand))
        patterns = Counter(node.pattern for node in term.nodes if isinstance(node, Pattern))
        if any(count > 1 for count in (*operands.values(), *patterns.values())):
            return True
    return False


def _has_parts(net: AnyNetwork) -> bool:
    """Whether the network may have equal halves, or crops that are better applied at the end."""
    return _has_patterns(net) or _has_copies(net)


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to lower a network.

    Args:
        name: name of the strategy in plans.
        stages: functions applied to each term, in order, before the remaining tensors and patterns are contracted.
        contraction: how the remaining tensors and patterns are contracted.
        prepare: functions that rewrite the whole simplified network, in order, before the stages run.
        applies: whether the strategy may yield a better plan for the simplified network than the strategies before it.
    """

    name: str
    stages: tuple[Stage, ...]
    contraction: Contraction = field(default_factory=Contraction)
    prepare: tuple[Callable[[AnyNetwork], AnyNetwork], ...] = ()
    applies: Callable[[AnyNetwork], bool] = _always


def dense(name: str, path: str = "auto") -> Strategy:
    """A strategy that materializes patterns and contracts pairwise along a path from `find_path`."""
    return Strategy(name, (read_chosen, read_crops), Contraction(path=path), (compose,), _has_patterns)


_VIEWS = Contraction(meetings=(overlap_add, without_table))
_BATCHED = Contraction(meetings=(overlap_add, without_table), products=(broadcast, added_up))
_HALVES = Contraction(meetings=(overlap_add, without_table), halves=True)
_START = (read_chosen, split_modes)
_CONVOLVE = (*_START, read_crops, convolve, read_windows)
_LAGS = (*_START, read_crops, convolve, defer_toeplitz, read_windows)
_LATE = (*_START, read_crops_late, read_windows)

STRATEGIES = (
    Strategy("windows", (*_START, read_crops, read_windows), _VIEWS),
    Strategy("windows, batched", (*_START, read_crops, read_windows), _BATCHED),
    dense("dense"),
    Strategy("convolution", _CONVOLVE, _VIEWS, applies=_has_patterns),
    Strategy(
        "convolution, swapped",
        (*_START, read_crops, convolve_forward, read_windows),
        _VIEWS,
        applies=_has_patterns,
    ),
    Strategy("convolution, composed", (*_START, convolve, *_CONVOLVE[2:]), _VIEWS, (compose,), _has_patterns),
    Strategy("convolution, undone", _CONVOLVE, _VIEWS, (undo,)),
    Strategy("lags", _LAGS, _VIEWS, (lags,), has_lags),
    Strategy("lags, one axis", _LAGS, _VIEWS, (lags_of_last,), has_several_lags),
    Strategy("halves", _LATE, _HALVES, (share,), _has_parts),
    Strategy("halves, composed", _LATE, _HALVES, (compose, share), _has_parts),
    Strategy("placed, convolution", (place_chosen, *_CONVOLVE[1:]), _VIEWS, applies=_has_selections),
    Strategy("placed, windows", (place_chosen, split_modes, read_crops, read_windows), _VIEWS, applies=_has_selections),
)
"""All strategies; a network is lowered with each strategy that applies to it."""

BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}
