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
from typing import Any

from lensor.plan.plan import Plan
from lensor.plan.steps import Input, Step

_FAR = 10_007
"""A resized plan is verified for sizes that exceed the marks by about this number."""


@dataclass(frozen=True, slots=True)
class Monomial:
    """A number times powers of the marked sizes, each given by its place among the marks."""

    factor: int | Fraction
    powers: tuple[tuple[int, int], ...]

    @property
    def is_factor(self) -> bool:
        """Whether the number is a factor, and not the size of an axis."""
        return isinstance(self.factor, Fraction)

    def at(self, sizes: Sequence[int]) -> int | Fraction:
        """The number for these sizes."""
        value: Any = self.factor
        for place, power in self.powers:
            for _ in range(power):
                value *= sizes[place]
            for _ in range(-power):
                value /= sizes[place]
        return value


@dataclass(frozen=True, slots=True)
class Resizable:
    """A plan whose marked indices can take other sizes.

    Args:
        plan: the plan for the marks.
        marks: the marked indices and the primes that are their sizes in `plan`.
        steps: the steps that depend on the marks: the place, the type, and the arguments, with monomials.
        shapes: the shapes that depend on the marks: the place, and the sizes, with monomials.
        values: the arguments and shapes with monomials, each once, by their identity.
    """

    plan: Plan
    marks: Mapping[str, int]
    steps: tuple[tuple[int, type[Step], tuple[Any, ...]], ...]
    shapes: tuple[tuple[int, tuple[int | Monomial, ...]], ...]
    values: Mapping[int, Any]

    @property
    def has_factors(self) -> bool:
        """Whether a factor depends on the marked sizes."""
        return any(isinstance(value, Monomial) and value.is_factor for value in self.values.values())

    def at(self, sizes: Mapping[str, int], scales: Mapping[str, int] | None = None) -> Plan:
        """The plan for these sizes of the marked indices; with `scales`, its factors are those for other sizes."""
        known = [sizes[index] for index in self.marks]
        whole = known if scales is None else [scales[index] for index in self.marks]
        values = {
            at: value_of(value, whole if isinstance(value, Monomial) and value.is_factor else known)
            for at, value in self.values.items()
        }
        steps, shapes = list(self.plan.steps), list(self.plan.shapes)
        for place, kind, arguments in self.steps:
            steps[place] = kind(*[values.get(id(argument), argument) for argument in arguments])
        for place, shape in self.shapes:
            shapes[place] = values[id(shape)]
        return replace(self.plan, steps=tuple(steps), shapes=tuple(shapes))

    def axes(self) -> list[list[tuple[int, int]]] | None:
        """For each mark, the axes of operands with its size: the place among the operands, and the axis.

        The result is None if a mark has no axis, or if an axis has another size that depends on the marks.
        """
        primes = list(self.marks.values())
        found: dict[int, list[tuple[int, int]]] = {prime: [] for prime in primes}
        for place, step in enumerate(step for step in self.plan.steps if isinstance(step, Input)):
            for axis, size in enumerate(step.size):
                if size in found:
                    found[size].append((place, axis))
                elif monomial(size, primes) is not size:
                    return None
        return list(found.values()) if all(found.values()) else None


def resizable(plan: Plan, marks: Mapping[str, int]) -> Resizable | None:
    """Return a plan in a form in which the marked indices can take other sizes; None if its steps do not allow that.

    Args:
        plan: a plan for sizes that are equal to the marks.
        marks: a prime for each marked index, at least 5, that divides no other size of an index.
    """
    primes = list(marks.values())
    known: dict[Any, Any] = {}  # None for values that do not depend on the marks

    def marked(value: Any) -> Any:
        key = value if isinstance(value, tuple) else (type(value), value)  # a Fraction may equal an int
        if key not in known:
            found = monomial(value, primes)
            known[key] = None if found is value else found
        return known[key]

    steps = []
    for place, step in enumerate(plan.steps):
        found = {name: new for name in step.resized if (new := marked(getattr(step, name))) is not None}
        if found:
            arguments = [found.get(name, getattr(step, name)) for name in step.__match_args__]
            steps.append((place, type(step), tuple(arguments)))
    shapes = [(place, new) for place, old in enumerate(plan.shapes) if (new := marked(old)) is not None]
    values = {id(value): value for value in known.values() if value is not None}
    form = Resizable(plan, marks, tuple(steps), tuple(shapes), values)
    probe = {index: prime + _FAR + 2 * at for at, (index, prime) in enumerate(marks.items())}
    return form if _is_consistent(plan, form.at(probe)) else None


def _is_consistent(plan: Plan, other: Plan) -> bool:
    """Whether a plan and the same plan for other sizes have steps that fit their shapes.

    Then the plan is right for all sizes if it is right for the marks: its steps treat the marked indices as names, and
    two sums of products that agree for all arrays with at least as many positions as there are factors are the same.
    """
    same = [before is after for before, after in zip(plan.shapes, other.shapes, strict=True)]
    for place, step in enumerate(other.steps):
        if step is plan.steps[place] and same[place] and all(same[at] for at in step.takes):
            continue
        taken, after = [other.shapes[at] for at in step.takes], other.shapes[place]
        if step.shape(taken) != after or not step.fits(taken, after):
            return False
        for at in (place, *step.takes):
            was, now = plan.shapes[at], other.shapes[at]
            if not same[at] and any(was[axis] != now[axis] for axis in step.fixed(len(now)) if axis < len(now)):
                return False
    return True


def monomial(value: Any, primes: Sequence[int]) -> Any:
    """Write a number, or each number of a tuple, as a number times powers of the primes that divide it.

    The value itself is returned if none of them divides it.
    """
    if isinstance(value, tuple):
        if all(one % prime for one in value for prime in primes):
            return value
        found = tuple([monomial(one, primes) for one in value])
        return found if any(isinstance(one, Monomial) for one in found) else value
    rest, powers = value, []
    for place, prime in enumerate(primes) if value else ():
        power = 0
        while rest.numerator % prime == 0:
            rest, power = rest // prime if isinstance(rest, int) else rest / prime, power + 1
        while rest.denominator % prime == 0:
            rest, power = rest * prime, power - 1
        if power:
            powers.append((place, power))
    return Monomial(rest, tuple(powers)) if powers else value


def value_of(value: Any, sizes: Sequence[int]) -> Any:
    """The value of a number, or of each number of a tuple, that `monomial` returned, for other sizes."""
    if isinstance(value, tuple):
        return tuple([one.at(sizes) if isinstance(one, Monomial) else one for one in value])
    return value.at(sizes) if isinstance(value, Monomial) else value
