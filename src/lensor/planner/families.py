"""Families: the candidates of a network for all sizes of its open indices, such as the batch size.

An index is open if the network does not determine its size. The candidates are lowered once for each range of sizes,
from a power of two to the next; their steps are then resized for each size in the range. The estimates are computed for
the ends of the range and interpolated between them, so that the plan for a size does not depend on the sizes planned
before.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Protocol, TypeAlias

from lensor.cache import Cache
from lensor.kernels import Backend
from lensor.lowering import (
    BY_NAME,
    Parts,
    Slices,
    all_divided,
    divided,
    divisions,
    first_parts,
    joined,
    lower,
    parted,
    parts_at,
    summed_by_all,
    whole,
)
from lensor.network import AnyNetwork, Delta, Group, Operand, Pattern, Scale, indices_of
from lensor.plan import Plan
from lensor.plan.resizable import Resizable, monomial, resizable, value_of
from lensor.planner.cost import estimate
from lensor.planner.profile import Machine
from lensor.simplification.engine import simplify_untraced

_LEAST = 4
"""Networks with an open index that is shorter than this are lowered for their sizes."""

_MOST_OPEN = 2
"""Networks with more open indices than this are lowered for their sizes."""

_TRIES = 4
"""A candidate is lowered for at most this many marks; by chance, a length of a slice or a pad may contain a mark."""

_HOPEFUL = 2.0
"""A candidate is divided into parts if its estimate is at most this many times the least."""

_CACHES = 3.0
"""Parts are as slow as the whole if they are larger than this many caches."""

_SCALED = re.compile(r"(?:(-?\d+(?:/\d+)?) )?(.+?)(?: \+ |$)")
"""The scale, if it is not 1, and the rest of each term in the text of a network."""

Sizes: TypeAlias = Mapping[str, int]


class Member(Protocol):
    """One candidate for all sizes of the open indices."""

    @property
    def form(self) -> Resizable | None:
        """The plan in a form in which the open indices can take any size; None if its steps do not allow that."""
        ...

    def at(self, sizes: Sizes, /) -> Plan:
        """The plan for these sizes."""
        ...

    def estimate(self, sizes: Sizes, target: Target, /) -> float:
        """The estimated time for these sizes in seconds."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """What plans are chosen for: a backend, the operands' dtype and device, and a profile for estimates."""

    backend: Backend | None
    kind: tuple[Any, ...]
    profile: Machine

    @property
    def itemsize(self) -> int:
        """Bytes per entry."""
        return 8 if self.backend is None else self.backend.itemsize(self.kind)

    def estimate(self, plan: Plan, parts: int = 1) -> float:
        """The estimated time in seconds of a plan, or of a plan of several parts like it."""
        dtype = "float32" if self.backend is None else self.backend.dtype(self.kind)
        return estimate(plan, self.profile, self.itemsize, dtype, parts)

    def candidates(self, net: AnyNetwork) -> list[Plan]:
        """The candidates for a network with known sizes."""
        plans = self.whole(net)
        return plans + all_divided(net, self.divisions(net, plans))

    def whole(self, net: AnyNetwork, simplified: AnyNetwork | None = None) -> list[Plan]:
        """The candidates that do not divide an index into parts; `simplified` is the simplified network, if known."""
        backend = self.backend
        fused = backend is not None and backend.fuses(self.kind)
        plans = whole(
            net, simplified, fused=fused, convolved=backend is None or backend.convolves_as_it_multiplies(self.kind)
        )
        return [plan for plan in plans if self.backend is None or self.backend.can_run(plan.steps, self.kind)]

    def divisions(self, net: AnyNetwork, plans: Sequence[Plan]) -> list[str]:
        """The strategies of the candidates that divide an index into parts, for speed.

        In half precision, adding the parts loses accuracy. Slow candidates are not divided.
        """
        most = _CACHES * self.profile.cache_bytes / self.itemsize
        found = divisions(net, plans, most) if self.itemsize >= 4 else []
        if not found:
            return []
        seconds = {plan.strategy: self.estimate(plan) for plan in plans}
        return [name for name in found if seconds[name] <= _HOPEFUL * min(seconds.values())]


@dataclass(frozen=True, slots=True)
class Family:
    """The candidates of a network for a range of sizes of each open index.

    Args:
        lower_ends: the smallest size in the range of each open index, a power of two.
        members: the candidates.
        steps: the total number of steps of the candidates.
        corners: the estimates of all candidates at combinations of the ends of the ranges, as far as they were needed.
    """

    lower_ends: Sizes
    members: tuple[Member, ...]
    steps: int = 0
    corners: dict[tuple[int, ...], list[float]] = field(default_factory=dict)

    def estimates(self, sizes: Sizes, target: Target) -> list[float]:
        """The estimate of each candidate, interpolated between the ends of the range of each open index."""
        total = [0.0] * len(self.members)
        for weight, corner in self._weights(sizes):
            key = tuple(corner.values())
            if key not in self.corners:
                self.corners[key] = [member.estimate(corner, target) for member in self.members]
            total = [sum_ + weight * seconds for sum_, seconds in zip(total, self.corners[key], strict=True)]
        return total

    def _weights(self, sizes: Sizes) -> Iterator[tuple[float, Sizes]]:
        """The ends of the ranges between which the sizes lie, with the weights of a linear interpolation."""
        ends = []
        for index, low in self.lower_ends.items():
            share = sizes[index] / low - 1
            ends.append(((1 - share, low), (share, 2 * low)))
        for corner in itertools.product(*ends):
            weight = math.prod(part for part, _ in corner)
            if weight:
                yield weight, dict(zip(self.lower_ends, (size for _, size in corner), strict=True))


def family_of(net: AnyNetwork, sizes: Sizes, target: Target) -> Family | None:
    """The family for these sizes of the open indices of a network; None if the network is lowered for its sizes."""
    if not sizes or min(sizes.values()) < _LEAST or net.selections:
        return None
    ends = tuple((index, 1 << (size.bit_length() - 1)) for index, size in sizes.items())
    return _families.get_or_make((net.exact, ends, target), lambda: _Found(_family(net, dict(ends), target))).family


@dataclass(frozen=True, slots=True)
class _Found:
    """An entry of the cache; None is a result, too."""

    family: Family | None


def _weigh(entry: tuple[Hashable, _Found]) -> int:
    """About the number of bytes that a family keeps alive, which is faster than to count them."""
    family = entry[1].family
    if family is None:
        return 8_000
    in_parts = any(isinstance(member, _InParts) for member in family.members)  # the best one keeps a plan
    return 10_000 + 2_000 * len(family.members) + 700 * family.steps + 60_000 * in_parts


_families = Cache(maxsize=256, weigh=_weigh)


def _family(net: AnyNetwork, ends: Sizes, target: Target) -> Family | None:
    equal = equal_sizes(net)
    if equal is None or len(set(equal.values())) > _MOST_OPEN:
        return None
    opened = _Open(net, equal)
    lower_ends = {index: ends[index] for index in dict.fromkeys(equal.values())}
    marks, *others = itertools.islice(_marks(net, lower_ends), _TRIES)
    marked = opened.bind(marks)
    simplified = simplify_untraced(marked)
    if not _has_known_scales(net, simplified, opened, marks):
        return None
    plans = target.whole(marked, simplified)
    whole = {plan.strategy: _whole(opened, plan, marks, others) for plan in plans}
    most = {index: parts_at(2 * low - 1) for index, low in lower_ends.items()}
    parts = _Parts(opened, marked, most)
    divided = [_InParts(whole[strategy], parts, strategy) for strategy in target.divisions(marked, plans)]
    return Family(lower_ends, (*whole.values(), *divided), sum(len(plan.steps) for plan in plans))


@dataclass(frozen=True, slots=True)
class _Open:
    """A network with open indices, and for each of them the index that stands for all of the same size."""

    net: AnyNetwork
    equal: Mapping[str, str]

    def bind(self, sizes: Sizes) -> AnyNetwork:
        return self.net.bind({index: sizes[first] for index, first in self.equal.items()})

    def lowered(self, sizes: Sizes, strategy: str) -> Plan:
        return lower(simplify_untraced(self.bind(sizes)), BY_NAME[strategy])


def _has_known_scales(net: AnyNetwork, marked: AnyNetwork, opened: _Open, marks: Sizes) -> bool:
    """Whether the scales of the simplified network contain the open sizes as the marks in them say.

    They may not: X/n + X is simplified to 8/7 X for the mark 7, and a pattern may have a multiple of 7 entries. The
    scales of the network simplified with open indices are exact.
    """
    primes = [*marks.values()]
    scales = [term.scale.factor for term in marked.terms]
    if len(net.terms) == 1 and all(monomial(scale, primes) is scale for scale in scales):
        return True
    exact = [term.scale for term in simplify_untraced(net).terms]
    sizes = {index: marks[first] for index, first in opened.equal.items()}
    return len(exact) == len(scales) and all(
        monomial(one.factor, primes) is one.factor and one.bind(sizes) == Scale(scale)
        for one, scale in zip(exact, scales, strict=True)
    )


def equal_sizes(net: AnyNetwork) -> dict[str, str] | None:
    """For each open index, the first open index that has the same size in every case.

    Two open indices have the same size if they occur in one delta, in the same leg of an operand, or in the same leg of
    the output of two terms. The result is None if a size follows from anything else.
    """
    equal = {index: index for index, size in net.sizes.items() if size is None}
    legs: dict[object, Group] = {}
    for term in net.terms:
        if any(size is None and index not in equal for index, size in term.dimensions):
            return None  # another term has the size
        groups: list[tuple[object, Group]] = [((None, at), leg) for at, leg in enumerate(term.output)]
        for node in term.nodes:
            match node:
                case Operand(name, own):
                    groups += [((name, at), leg) for at, leg in enumerate(own)]
                case Delta(indices):
                    groups += [(node, (index,)) for index in indices]
                case Pattern() if any(index in equal for index in indices_of(node)):
                    return None
        for place, leg in groups:
            pair = [[index for index in one if index in equal] for one in (legs.setdefault(place, leg), leg)]
            rests = [math.prod(net.sizes[i] or 1 for i in one) for one in (legs[place], leg)]
            if legs[place] == leg:
                continue
            if [len(one) for one in pair] not in ([0, 0], [1, 1]) or rests[0] != rests[1]:
                return None
            if pair[0]:
                first, second = (equal[one[0]] for one in pair)
                equal = {index: first if other == second else other for index, other in equal.items()}
    return equal


@dataclass(frozen=True, slots=True)
class _Whole:
    """The candidate of a strategy; `at` returns its plan, by resizing `form` unless it is None."""

    at: Callable[[Sizes], Plan]
    form: Resizable | None

    def estimate(self, sizes: Sizes, target: Target) -> float:
        return target.estimate(self.at(sizes))


def _whole(opened: _Open, plan: Plan, marks: Sizes, others: Iterable[Sizes]) -> _Whole:
    """The candidate of a strategy, given its plan for the marks; it is lowered for other marks if necessary."""
    form = resizable(plan, marks)
    for marks in others:
        if form is not None:
            break
        form = resizable(opened.lowered(marks, plan.strategy), marks)
    if form is None:
        return _Whole(lambda sizes: opened.lowered(sizes, plan.strategy), None)
    texts = _SCALED.findall(form.plan.subscripts)
    primes = [*form.marks.values()]
    factors = [monomial(Fraction(scale or 1), primes) for scale, _ in texts]
    if all(isinstance(factor, Fraction) for factor in factors):
        return _Whole(form.at, form)

    def at(sizes: Sizes) -> Plan:
        known = [sizes[index] for index in form.marks]
        found = [(value_of(factor, known), text) for factor, (_, text) in zip(factors, texts, strict=True)]
        subscripts = " + ".join(text if factor == 1 else f"{factor} {text}" for factor, text in found)
        return replace(form.at(sizes), subscripts=subscripts)

    return _Whole(at, form)


class _Parts:
    """The division of a network into parts for any sizes of the open indices, which several candidates share."""

    def __init__(self, opened: _Open, marked: AnyNetwork, most: Sizes) -> None:
        self.opened, self.most = opened, most
        self._sizes, self._summed = marked.sizes, summed_by_all(marked)
        self._last: tuple[Sizes, Parts] | None = None

    def at(self, sizes: Sizes) -> Parts:
        last = self._last
        if last is None or last[0] != sizes:
            last = self._last = dict(sizes), parted(self.opened.bind(sizes))
        return last[1]

    def open_index(self, sizes: Sizes) -> str | None:
        """The open index that stands for the divided one; None if this is not open, or if others have its size."""
        equal = self.opened.equal
        known = {index: sizes[equal[index]] if index in equal else self._sizes[index] or 0 for index in self._summed}
        first = equal.get(min(known, key=lambda index: (-known[index], index)))
        return None if first is None or [*equal.values()].count(first) > 1 else first


@dataclass(slots=True)
class _InParts:
    """The candidate of a strategy in parts of an index. The number of its steps depends on the size of the index."""

    whole: _Whole
    parts: _Parts
    strategy: str
    last: tuple[Sizes, Plan, Slices] | None = None
    """Sizes, their plan with parts of size 1, whose first parts are the plan for a shorter index, and its slices."""

    @property
    def form(self) -> None:
        return None

    def at(self, sizes: Sizes) -> Plan:
        first, form = self.parts.open_index(sizes), self.whole.form
        if first is None or form is None:
            return divided(self.parts.at(sizes), self.strategy)
        size = sizes[first]
        if form.has_factors or parts_at(size) < size:
            return self._joined(sizes, first, form)[0]
        last = self.last
        is_known = last is not None and {**last[0], first: size} == sizes
        if last is None or not is_known or last[0][first] < size:
            longest = {**sizes, first: max(size, self.parts.most[first])} if is_known else sizes
            plan, slices = self._joined(longest, first, form)
            if slices is None:
                return plan
            last = self.last = longest, plan, slices
        _, plan, slices = last
        return first_parts(plan, size, slices) or self._joined(sizes, first, form)[0]

    def _joined(self, sizes: Sizes, first: str, form: Resizable) -> tuple[Plan, Slices | None]:
        """The plan, whose parts have the steps of the whole, if they can be computed from slices of the operands."""
        parts = self.parts.at(sizes)
        if parts.slices is None:
            return divided(parts, self.strategy), None
        lengths = {length for _, length in parts.bounds}
        plans = {length: form.at({**sizes, first: length}, sizes) for length in lengths}
        return joined(parts, plans), parts.slices

    def estimate(self, sizes: Sizes, target: Target) -> float:
        """The estimate for parts that have the steps of the whole, so that they need not be lowered."""
        first = self.parts.open_index(sizes)
        if first is None:
            return target.estimate(self.at(sizes))
        count = parts_at(sizes[first])
        return target.estimate(self.whole.at({**sizes, first: sizes[first] // count}), count)


def _marks(net: AnyNetwork, lower_ends: Sizes) -> Iterator[Sizes]:
    """Marks for the open indices: primes near the middle of their ranges that divide no number known by now."""
    numbers = {size for size in net.sizes.values() if size}
    for term in net.terms:
        numbers |= {term.scale.factor.numerator, term.scale.factor.denominator}
        for node in term.nodes:
            if isinstance(node, Pattern):
                numbers |= {node.pattern.input_size + sum(node.pattern.padding), 2 * node.pattern.kernel_size - 1}
    found = {index: _primes(low * 1.4, numbers) for index, low in lower_ends.items()}
    taken: set[int] = set()
    while True:
        marks = {}
        for index, primes in found.items():
            marks[index] = next(prime for prime in primes if prime not in taken)
            taken.add(marks[index])
        yield marks


def _primes(least: float, numbers: Iterable[int]) -> Iterator[int]:
    """The primes from `least` on, in order, that divide none of the numbers."""
    for value in itertools.count(math.ceil(least)):
        if all(value % factor for factor in range(2, math.isqrt(value) + 1)) and all(one % value for one in numbers):
            yield value
