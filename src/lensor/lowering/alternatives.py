"""Candidate plans, and the costs of alternative contraction paths."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lensor.lowering.assemble import lower, lower_in_parts
from lensor.lowering.slicing import Parts, summed_by_all
from lensor.lowering.strategies import BY_NAME, FUSED, STRATEGIES, Strategy, dense
from lensor.network import AnyNetwork, to_text
from lensor.plan import Plan
from lensor.plan import steps as s
from lensor.plan.constants import largest_table
from lensor.plan.paths import PATHS, PathCost, PathCosts, feynman, has_best_path
from lensor.simplification.engine import simplify_untraced

_PARTS_OF_SQUARES = 32
"""Maximum number of parts into which a sum of squares is divided."""


def candidates(net: AnyNetwork, in_parts: bool = True, fused: bool = False) -> list[Plan]:
    """List the distinct candidate plans for a network with known sizes.

    Args:
        net: the network.
        in_parts: whether to include plans that divide an index into parts for speed; in half precision, adding the
            parts loses accuracy.
        fused: whether to include plans with kernels for products of arrays read through patterns.
    """
    plans = whole(net, fused=fused)
    found = all_divided(net, divisions(net, plans)) if in_parts else []
    return plans + [plan for plan in found if _is_new(plan, plans)]


def whole(
    net: AnyNetwork, simplified: AnyNetwork | None = None, *, fused: bool = False, convolved: bool = True
) -> list[Plan]:
    """The distinct candidates that do not divide an index into parts.

    Args:
        net: the network.
        simplified: `net` simplified, if known.
        fused: whether to include the strategies that need kernels for products of arrays read through patterns.
        convolved: whether to include the strategies that compute other products by convolutions.
    """
    simplified = simplify_untraced(net) if simplified is None else simplified
    text = to_text(simplified)
    plans: list[Plan] = []
    larger: list[Plan] = []
    lowered: dict[str, Plan] = {}
    done: list[tuple[AnyNetwork, Strategy]] = []
    known: dict[tuple, AnyNetwork] = {}
    for strategy in (*STRATEGIES, *FUSED) if fused else STRATEGIES:
        if (strategy.is_convolved and not convolved) or not strategy.applies(simplified):
            continue
        if strategy.varies is not None:
            other, may_differ = strategy.varies
            if other in lowered and not may_differ(lowered[other]):
                continue
        prepared = strategy.prepared(simplified, known)
        way = (strategy.stages, strategy.contraction)
        if any((one.stages, one.contraction) == way and other.exact == prepared.exact for other, one in done):
            continue  # an earlier strategy lowers the same network in the same way
        done.append((prepared, strategy))
        plan = lowered[strategy.name] = lower(simplified, strategy, prepared, text)
        if not fits(plan):
            larger.append(plan)
        elif _is_new(plan, plans):
            plans.append(plan)
    # If every plan needs a table that is too large, take the plan with the smallest.
    return plans or [min(larger, key=lambda plan: max(tables(plan)))]


def _is_new(plan: Plan, plans: Sequence[Plan]) -> bool:
    """Whether no plan of the list has the same steps."""
    return all(plan.steps != one.steps for one in plans)


def divisions(net: AnyNetwork, plans: Iterable[Plan], most: float = math.inf) -> list[str]:
    """The strategies that may be faster if an index is divided into parts.

    An array that is computed, squared and summed can be computed in parts that fit into fast memory, that is, with at
    most `most` entries each.
    """
    squares = {plan.strategy: size for plan in plans if (size := _squared(plan))}
    indices = summed_by_all(net) if squares else []
    if not indices:
        return []
    return [name for name, size in squares.items() if size <= most * parts_at(net.sizes[indices[0]] or 0)]


def parts_at(size: int) -> int:
    """The number of parts of an index with this size."""
    return min(size, _PARTS_OF_SQUARES)


def _squared(plan: Plan) -> int:
    """Number of entries of the largest array that a plan computes and whose squares it then sums; 0 if none."""
    found = [step.takes[0] for step in plan.steps if isinstance(step, s.SumSquares)]
    return max((math.prod(plan.shapes[place]) for place in found if _is_computed(plan, place)), default=0)


def _is_computed(plan: Plan, place: int) -> bool:
    step = plan.steps[place]
    return step.computes or any(_is_computed(plan, at) for at in step.takes)


def parted(net: AnyNetwork) -> Parts:
    """The parts in which a network is computed by the strategies that `divisions` lists, if it lists any."""
    index = summed_by_all(net)[0]
    return Parts(net, index, parts_at(net.sizes[index] or 0))


def divided(parts: Parts, strategy: str) -> Plan:
    """The plan of a strategy for a network in parts."""
    return lower_in_parts(parts.net, BY_NAME[strategy], parts.index, parts.count, parts)


def all_divided(net: AnyNetwork, strategies: Sequence[str]) -> list[Plan]:
    """The plans of several strategies, as listed by `divisions`, for a network in parts, which they share."""
    if not strategies:
        return []
    parts = parted(net)
    return [divided(parts, name) for name in strategies]


def tables(plan: Plan) -> list[int]:
    """The numbers of entries of the materialized patterns."""
    return [
        math.prod(shape) for step, shape in zip(plan.steps, plan.shapes, strict=True) if isinstance(step, s.Constant)
    ]


def fits(plan: Plan) -> bool:
    """Whether each materialized pattern is within the size limit given by the operands and the result."""
    sizes = [math.prod(step.size) for step in plan.steps if isinstance(step, s.Input)]
    return max(tables(plan), default=0) <= largest_table([*sizes, math.prod(plan.shape)])


def compare_paths(plan: Plan) -> PathCosts:
    """The costs of a plan's network for several contraction paths with materialized patterns, and of the plan itself.

    The optimal path is omitted if finding it would take too long.
    """
    assert plan.network is not None
    simplified = plan.network.simplify()
    rows = [feynman(simplified)]
    for path in PATHS:
        if path == "optimal" and not has_best_path(simplified):
            continue
        found = lower(simplified, dense(path, path))
        rows.append(PathCost(path, found.flops, found.peak_size))
    return PathCosts((*rows, PathCost("planner", plan.flops, plan.peak_size)))
