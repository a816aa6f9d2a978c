"""All plans that are worth a comparison, and what other contraction paths would cost."""

from __future__ import annotations

import math

from lensor.lowering.assemble import lower, lower_in_parts
from lensor.lowering.slicing import summed_by_all
from lensor.lowering.state import largest_table
from lensor.lowering.strategies import BY_NAME, STRATEGIES, dense
from lensor.network import AnyNetwork
from lensor.plan import Plan
from lensor.plan import steps as s
from lensor.plan.paths import PATHS, PathCost, PathCosts, feynman, has_best_path

_PARTS_OF_SQUARES = 32
"""A sum of squares is worked through in no more parts than this."""


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
        if not strategy.applies(simplified):
            continue
        plan = lower(simplified, strategy)
        if fits(plan):
            plans.setdefault(plan.steps, plan)
        else:
            larger.append(plan)
    if not plans:  # there is no way around a table: the smallest
        plan = min(larger, key=lambda plan: max(tables(plan)))
        plans[plan.steps] = plan
    for plan in list(plans.values()):
        # What is squared and summed need never be there as a whole: a part of an index at a time stays in fast memory.
        squares = in_parts and any(isinstance(step, s.SumSquares) for step in plan.steps)
        index = summed_by_all(net) if squares else None
        if index is not None:
            parts = min(net.sizes[index] or 0, _PARTS_OF_SQUARES)
            sliced = lower_in_parts(net, BY_NAME[plan.strategy], index, parts)
            plans.setdefault(sliced.steps, sliced)
    return list(plans.values())


def tables(plan: Plan) -> list[int]:
    """The sizes of the arrays that are made of patterns."""
    return [
        math.prod(shape) for step, shape in zip(plan.steps, plan.shapes, strict=True) if isinstance(step, s.Constant)
    ]


def fits(plan: Plan) -> bool:
    """Whether no pattern is made into an array of more entries than operands and result have."""
    sizes = [math.prod(step.size) for step in plan.steps if isinstance(step, s.Input)]
    return max(tables(plan), default=0) <= largest_table([*sizes, math.prod(plan.shape)])


def compare_paths(plan: Plan) -> PathCosts:
    """What the network of a plan costs along several paths, with patterns as arrays, and by the plan itself.

    The best path is left out where it would take long to find.
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
