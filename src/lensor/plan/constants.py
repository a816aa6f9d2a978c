"""The values of a plan that are computed from patterns only."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple

from lensor.plan import steps as s

_SMALL_TABLE = 1 << 16
"""Number of entries that a materialized pattern may always have, even if the operands are smaller."""


def largest_table(sizes: Iterable[int]) -> int:
    """Maximum number of entries of a materialized pattern, for operands and a result of these sizes."""
    return max(_SMALL_TABLE, sum(sizes))


class Constants(NamedTuple):
    """The values that do not depend on the operands, which a backend computes once.

    Args:
        kept: for each value that other steps use, the step that computes it, followed by the same for its operands.
        skipped: the places of the values that only these values are computed from.
    """

    kept: dict[int, tuple[Any, ...]]
    skipped: frozenset[int]


NONE = Constants({}, frozenset())


def constants(
    steps: Sequence[s.Step], shapes: Sequence[s.Shape], result: int, varying: Container[int] = ()
) -> Constants:
    """Find the values that are computed from patterns only, and by at least one step besides them.

    They are not larger than a pattern that may be materialized. The result of the plan is not one of them,
    because it must not share memory with a later one.

    Args:
        steps: the steps of a plan.
        shapes: the shapes of their values.
        result: the place of the result.
        varying: the places of steps whose settings are known only when they run.
    """
    fixed: dict[int, tuple[Any, ...]] = {}
    for place, step in enumerate(steps):
        if isinstance(step, s.Constant):
            fixed[place] = (step,)
        elif step.takes and place not in varying and all(at in fixed for at in step.takes):
            fixed[place] = (step.taking(()), *[fixed[at] for at in step.takes])
    if all(len(key) == 1 for key in fixed.values()):
        return NONE
    users: dict[int, list[int]] = {place: [] for place in fixed}
    for place, step in enumerate(steps):
        for at in step.takes:
            if at in fixed:
                users[at].append(place)
    operands = [math.prod(step.size) for step in steps if isinstance(step, s.Input)]
    most = largest_table([*operands, math.prod(shapes[result])])
    kept = {}
    for place, key in fixed.items():
        others = [other for other in users[place] if other not in fixed]
        # a step, or a later one through a view, may write into its first operand
        first = [steps[other] for other in others if steps[other].takes[0] == place]
        is_written = any(step.in_place or step.is_view for step in first)
        if others and len(key) > 1 and place != result and not is_written and math.prod(shapes[place]) <= most:
            kept[place] = key
    skipped: set[int] = set()
    for place in sorted(fixed, reverse=True):
        is_used = any(other not in skipped and other not in kept for other in users[place])
        if place not in kept and place != result and users[place] and not is_used:
            skipped.add(place)
    return Constants(kept, frozenset(skipped))
