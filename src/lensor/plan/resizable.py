"""Plans for other sizes of some indices: the same steps with new sizes, without lowering the network again.

A plan is lowered for sizes that are prime numbers, the *marks*, which divide no other size of the network. A size in a
step is then divisible by a mark if and only if it contains the marked index. This is verified: the steps are resized
for other sizes, their shapes are computed again, and no step may use a setting, such as a start or a length, on an axis
whose size changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeAlias

from lensor.plan.plan import Plan

_FAR = 10_007
"""A resized plan is verified for sizes that exceed the marks by about this number."""


@dataclass(frozen=True, slots=True)
class _Monomial:
    """A number times powers of the marked sizes, each given by its place among the marks."""

    factor: int | Fraction
    powers: tuple[tuple[int, int], ...]

    def at(self, sizes: Sequence[int]) -> int | Fraction:
        value = self.factor
        for place, power in self.powers:
            value *= sizes[place] ** power if power > 0 else Fraction(1, sizes[place] ** -power)
        return value


_Number: TypeAlias = "int | Fraction | _Monomial"
_Setting: TypeAlias = "_Number | tuple[_Number, ...]"


@dataclass(frozen=True, slots=True)
class Resizable:
    """A plan whose marked indices can take other sizes.

    Args:
        plan: the plan for the marks.
        marks: the marked indices and the primes that are their sizes in `plan`.
        settings: for each step, the settings that depend on the marks.
        shapes: the shape of each step.
    """

    plan: Plan
    marks: Mapping[str, int]
    settings: tuple[tuple[tuple[str, _Setting], ...], ...]
    shapes: tuple[_Setting, ...]

    def at(self, sizes: Mapping[str, int]) -> Plan:
        """The plan for these sizes of the marked indices."""
        known = [sizes[index] for index in self.marks]
        steps = tuple(
            replace(step, **{name: value_of(value, known) for name, value in settings}) if settings else step
            for step, settings in zip(self.plan.steps, self.settings, strict=True)
        )
        return replace(self.plan, steps=steps, shapes=tuple(value_of(shape, known) for shape in self.shapes))


def resizable(plan: Plan, marks: Mapping[str, int]) -> Resizable | None:
    """Return a plan in a form in which the marked indices can take other sizes; None if its steps do not allow that.

    Args:
        plan: a plan for sizes that are equal to the marks.
        marks: a prime for each marked index, at least 5; no other size or number of the network is divisible by it.
    """
    primes = list(marks.values())
    settings = []
    for step in plan.steps:
        found = [(name, monomial(getattr(step, name), primes)) for name in step.resized]
        settings.append(tuple((name, value) for name, value in found if _varies(value)))
    shapes = tuple(monomial(shape, primes) for shape in plan.shapes)
    form = Resizable(plan, marks, tuple(settings), shapes)
    probe = {index: prime + _FAR + 2 * at for at, (index, prime) in enumerate(marks.items())}
    return form if _is_consistent(plan, form.at(probe)) else None


def _is_consistent(plan: Plan, other: Plan) -> bool:
    """Whether a plan and the same plan for other sizes have steps that fit their shapes.

    Then the plan is right for all sizes if it is right for the marks: its steps treat the marked indices as names, and
    two sums of products that agree for all arrays with at least as many positions as there are factors are the same.
    """
    for step, before, after in zip(other.steps, plan.shapes, other.shapes, strict=True):
        taken = [other.shapes[at] for at in step.takes]
        if step.shape(taken) != after or not step.fits(taken, after):
            return False
        for was, now in ((before, after), *((plan.shapes[at], other.shapes[at]) for at in step.takes)):
            if any(was[axis] != now[axis] for axis in step.fixed(len(now)) if axis < len(now)):
                return False
    return True


def monomial(value: Any, primes: Sequence[int]) -> Any:
    """Write a number, or each number of a tuple, as a number times powers of the primes if these divide it."""
    if isinstance(value, tuple):
        return tuple(monomial(one, primes) for one in value)
    powers = []
    for place, prime in enumerate(primes) if value else ():
        power = 0
        while value.numerator % prime == 0:
            value, power = value // prime if isinstance(value, int) else value / prime, power + 1
        while value.denominator % prime == 0:
            value, power = value * prime, power - 1
        if power:
            powers.append((place, power))
    return _Monomial(value, tuple(powers)) if powers else value


def _varies(value: _Setting) -> bool:
    return any(map(_varies, value)) if isinstance(value, tuple) else isinstance(value, _Monomial)


def value_of(value: Any, sizes: Sequence[int]) -> Any:
    """The value of a number, or of each number of a tuple, that `monomial` returned, for other sizes."""
    if isinstance(value, tuple):
        return tuple(value_of(one, sizes) for one in value)
    return value.at(sizes) if isinstance(value, _Monomial) else value
