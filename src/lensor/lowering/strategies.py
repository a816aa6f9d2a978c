"""The strategies: each is a list of stages, and a way to contract the tensors and patterns that remain.

To add a strategy, write a stage in a new file and add a line here. Use `Strategy.applies` to avoid unnecessary
lowering.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

from lensor.lowering.contraction import Contraction
from lensor.lowering.convolutions import convolve, convolve_depthwise, convolve_forward
from lensor.lowering.crops import read_crops, read_crops_late
from lensor.lowering.fused import pattern_product
from lensor.lowering.products import added_up, broadcast
from lensor.lowering.sampled import place_chosen, read_chosen
from lensor.lowering.state import State
from lensor.lowering.toeplitz import defer_toeplitz
from lensor.lowering.windows import overlap_add, read_spread, read_windows, split_modes, without_table
from lensor.network import AnyNetwork, Network, Node, Operand, Pattern, indices_of
from lensor.plan import Plan
from lensor.plan import steps as s
from lensor.simplification.lags import has_lags, lags
from lensor.simplification.recompose import compose, share, undo

Stage: TypeAlias = Callable[[State], None]


def _always(net: AnyNetwork) -> bool:
    return True


def _has_patterns(net: AnyNetwork) -> bool:
    return any(isinstance(node, Pattern) for term in net.terms for node in term.nodes)


def _has_several_patterns(net: AnyNetwork) -> bool:
    return any(sum(isinstance(node, Pattern) for node in term.nodes) > 1 for term in net.terms)


def _has_sums_of_patterns(net: AnyNetwork) -> bool:
    """Whether several patterns of a term have a leg that nothing else uses, so that they are tables of two legs."""
    return any(sum(map(partial(_has_loose_leg, term), term.nodes)) > 1 for term in net.terms)


def _has_loose_leg(term: Network, node: Node) -> bool:
    if not isinstance(node, Pattern):
        return False
    used = {*term.output_indices, *(index for one in term.nodes if one is not node for index in indices_of(one))}
    return any(leg and used.isdisjoint(leg) for leg in node.legs)


def _has_selections(net: AnyNetwork) -> bool:
    return bool(net.selections)


def _has_copies(net: AnyNetwork) -> bool:
    """Whether an operand occurs twice in one term."""
    return any(
        max(Counter(node.name for node in term.nodes if isinstance(node, Operand)).values(), default=0) > 1
        for term in net.terms
    )


def _has_crops(net: AnyNetwork) -> bool:
    return any(isinstance(node, Pattern) and node.pattern.is_crop for term in net.terms for node in term.nodes)


def _has_parts(net: AnyNetwork) -> bool:
    """Whether the network may have equal halves, or crops that are better applied at the end."""
    return _has_crops(net) or _has_copies(net)


def _may_have_lags(net: AnyNetwork) -> bool:
    """Whether `lags` may rewrite the network, possibly after `share`, which makes copies equal."""
    return _has_copies(net) or has_lags(net)


def _has_weight_gradient(plan: Plan) -> bool:
    return any(isinstance(step, s.Convolution) and step.kind == "weight_grad" for step in plan.steps)


def _has_depthwise_gradient(plan: Plan) -> bool:
    return any(
        isinstance(step, s.Convolution) and step.kind == "weight_grad" and step.size[1] == 1 < step.groups
        for step in plan.steps
    )


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to lower a network.

    Args:
        name: name of the strategy in plans.
        stages: functions applied to each term, in order, before the remaining tensors and patterns are contracted.
        contraction: how the remaining tensors and patterns are contracted.
        prepare: functions that rewrite the whole simplified network, in order, before the stages run.
        applies: whether the strategy may yield a better plan for the simplified network than the strategies before it.
        is_convolved: whether the strategy computes products that are not part of a convolution by the framework's
            convolutions, which may round more.
        varies: the name of an earlier strategy, and whether this strategy may yield a different plan, given the plan of
            that strategy.
    """

    name: str
    stages: tuple[Stage, ...]
    contraction: Contraction = field(default_factory=Contraction)
    prepare: tuple[Callable[[AnyNetwork], AnyNetwork], ...] = ()
    applies: Callable[[AnyNetwork], bool] = _always
    varies: tuple[str, Callable[[Plan], bool]] | None = None
    is_convolved: bool = False

    def prepared(self, net: AnyNetwork, known: dict[tuple, AnyNetwork] | None = None) -> AnyNetwork:
        """The network after the functions in `prepare`.

        Args:
            net: the simplified network.
            known: the network after the functions with which the `prepare` of other strategies starts; updated.
        """
        known = {} if known is None else known
        for at in range(len(self.prepare)):
            first = self.prepare[: at + 1]
            if first not in known:
                known[first] = self.prepare[at](net)
            net = known[first]
        return net


def dense(name: str, path: str = "auto") -> Strategy:
    """A strategy that materializes patterns and contracts pairwise along a path from `find_path`."""
    return Strategy(name, (read_chosen, read_crops), Contraction(path=path), (compose,), _has_patterns)


_VIEWS = Contraction(meetings=(overlap_add, without_table))
_BATCHED = Contraction(meetings=(overlap_add, without_table), products=(broadcast, added_up))
_HALVES = Contraction(meetings=(overlap_add, without_table), halves=True)
_FUSED = Contraction(meetings=(overlap_add, without_table), products=(pattern_product,), halves=True)
_TABLES = replace(_FUSED, tables_first=True)
_START = (read_chosen, split_modes)
_CONVOLVE = (*_START, read_crops, convolve, read_windows)
_LAGS = (*_START, read_crops, convolve, defer_toeplitz, read_windows)
_LATE = (*_START, read_crops_late, read_windows)

STRATEGIES = (
    Strategy("windows", (*_START, read_crops, read_windows), _VIEWS),
    Strategy("windows, batched", (*_START, read_crops, read_windows), _BATCHED),
    Strategy(
        "windows, tables first",
        (*_START, read_crops, read_windows),
        replace(_VIEWS, tables_first=True),
        applies=_has_several_patterns,
    ),
    dense("dense"),
    Strategy("convolution", _CONVOLVE, _VIEWS, applies=_has_patterns),
    Strategy(
        "convolution, swapped",
        (*_START, read_crops, convolve_forward, read_windows),
        _VIEWS,
        applies=_has_patterns,
        varies=("convolution", _has_weight_gradient),
    ),
    Strategy(
        "convolution, depthwise",
        (*_START, read_crops, convolve_depthwise, read_windows),
        _VIEWS,
        applies=_has_patterns,
        varies=("convolution", _has_depthwise_gradient),
    ),
    Strategy("convolution, composed", (*_START, convolve, *_CONVOLVE[2:]), _VIEWS, (compose,), _has_crops),
    Strategy("convolution, undone", _CONVOLVE, _VIEWS, (compose, undo)),
    Strategy("lags", _LAGS, _VIEWS, (share, lags), _may_have_lags, is_convolved=True),
    Strategy(
        "lags, depthwise",
        (*_START, read_crops, convolve_depthwise, defer_toeplitz, read_windows),
        _VIEWS,
        (share, lags),
        _may_have_lags,
        ("lags", _has_depthwise_gradient),
        is_convolved=True,
    ),
    Strategy("halves", _LATE, _HALVES, (share,), _has_parts),
    Strategy("halves, composed", _LATE, _HALVES, (compose, share), _has_parts),
    Strategy("placed, convolution", (place_chosen, *_CONVOLVE[1:]), _VIEWS, applies=_has_selections),
    Strategy("placed, windows", (place_chosen, split_modes, read_crops, read_windows), _VIEWS, applies=_has_selections),
)
"""The strategies for all backends; a network is lowered with each strategy that applies to it."""

FUSED = (
    Strategy("patterns, tables first", (*_LATE, read_spread), _TABLES, (share,), _has_sums_of_patterns),
    Strategy("patterns", (*_LATE, read_spread), _FUSED, (share,)),
    Strategy(
        "patterns, lags",
        (*_START, read_crops, defer_toeplitz, read_windows),
        _FUSED,
        (share, lags),
        _may_have_lags,
    ),
)
"""The strategies for backends with kernels that read the factors of products through patterns."""

BY_NAME = {strategy.name: strategy for strategy in (*STRATEGIES, *FUSED)}
