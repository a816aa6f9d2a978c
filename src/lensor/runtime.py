"""Running plans: the functions of a backend for the steps of a plan, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lensor import steps as s
from lensor.kernels import Backend, backend_of
from lensor.layout import last_uses
from lensor.plan import Plan


def run(plan: Plan, operands: Mapping[str, Any]) -> Any:
    """Run a plan on arrays of one framework."""
    backend = backend_of(*operands.values())
    program = plan.compiled.get(backend.name)
    if program is None:
        program = plan.compiled[backend.name] = Runnable(plan, backend)
    return program(operands)


class Runnable:
    """A plan with the functions of one backend."""

    def __init__(self, plan: Plan, backend: Backend) -> None:
        self.plan, self.backend = plan, backend
        self.inputs = [(at, step.operand, step.size) for at, step in enumerate(plan.steps) if isinstance(step, s.Input)]
        last = last_uses(plan.steps, plan.result)
        self.instructions: list[tuple[Callable[..., Any], tuple[int, ...], int, list[int]]] = []
        for place, step in enumerate(plan.steps):
            if not isinstance(step, s.Input):
                dead = [at for at, until in enumerate(last) if until == place and at != place]
                self.instructions.append((backend.steps[type(step)](step), step.takes, place, dead))
        self.shares = self._shares(plan, plan.result)

    @staticmethod
    def _shares(plan: Plan, place: int) -> bool:
        """Whether the result may be a view of an operand or of a constant, or have repeated entries."""
        step = plan.steps[place]
        while step.is_view and step.takes:
            if isinstance(step, s.Expand):
                return True
            step = plan.steps[step.takes[0]]
        return step.is_view

    def __call__(self, operands: Mapping[str, Any]) -> Any:
        names = [name for _, name, _ in self.inputs]
        if len(operands) != len(names) or any(name not in operands for name in names):
            require_operands(names, operands)
        arrays = [operands[name] for name in names]
        values: list[Any] = [None] * len(self.plan.steps)
        for (place, name, shape), array in zip(self.inputs, arrays, strict=True):
            if tuple(array.shape) != shape:
                raise ValueError(f"operand {name!r} has shape {tuple(array.shape)}, expected {shape}")
            values[place] = array
        like = self.backend.reference(arrays, names)
        for function, takes, place, dead in self.instructions:
            values[place] = function(*(values[at] for at in takes)) if takes else function(like)
            for at in dead:
                values[at] = None
        result = values[self.plan.result]
        return self.backend.copy(result) if self.shares else result


def require_operands(expected: Sequence[str], found: Mapping[str, Any]) -> None:
    """Raise TypeError unless exactly the expected operands are given."""
    for name in expected:
        if name not in found:
            raise TypeError(f"operand {name!r} is missing; expected {list(expected)}, found {sorted(found)}")
    for name in found:
        if name not in expected:
            raise TypeError(f"unknown operand {name!r}; expected {list(expected)}")
