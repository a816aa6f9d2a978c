"""Execution of plans: each plan becomes one straight-line function that calls a backend function for each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from lensor.kernels import Backend, backend_of, load
from lensor.network import AnyNetwork, Operand
from lensor.plan import Plan
from lensor.plan import steps as s
from lensor.plan.constants import constants
from lensor.plan.memory import last_uses
from lensor.plan.resizable import Monomial, Resizable, value_of


def run(plan: Plan, operands: Mapping[str, Any]) -> Any:
    """Run a plan on arrays from one framework."""
    return runnable(plan, backend_of(*operands.values()))(operands)


def runnable(plan: Plan, backend: Backend) -> Runnable:
    """Return the runnable form of a plan for a backend, created once."""
    found = plan.compiled.get(backend.name)
    if found is None:
        found = plan.compiled[backend.name] = Runnable(plan, backend)
    return found


class Runnable:
    """A plan compiled to the functions of one backend.

    A call with a mapping first checks names, shapes, dtypes and devices. `unchecked` takes the arrays in the order of
    the plan's operands and does not check them. `unrecorded` runs only the plan's steps; if a framework records
    derivatives, `unchecked` makes it record the network's derivatives instead of the derivatives of the steps.

    Results are row-major arrays that share no memory with other arrays. With `channels_last`, results and derivatives
    with spatial positions use torch's memory format of that name. With `form`, the form of the plan in which some
    indices can take other sizes, `unchecked` takes their sizes from the arrays.
    """

    def __init__(
        self, plan: Plan, backend: Backend, in_channels_last: bool = False, form: Resizable | None = None
    ) -> None:
        self.plan, self.backend, self.in_channels_last = plan, backend, in_channels_last
        self.inputs = [step for step in plan.steps if isinstance(step, s.Input)]
        self.names = [step.operand for step in self.inputs]
        run = _widened(plan, backend, _compiled(plan, backend, in_channels_last, form))
        self.unrecorded = self.unchecked = run if form is not None else backend.as_operator(self, run)
        if plan.deriver is not None and self.names:
            self.unchecked = backend.differentiable(self)
        self._derivatives: dict[tuple, Callable[..., Any]] = {}

    @cached_property
    def needs(self) -> tuple[tuple[int, ...], ...]:
        """For each operand, the places of the operands that are needed for the derivative with respect to it."""
        return _needs(self.plan.network, self.names)

    @cached_property
    def channels_last(self) -> Runnable:
        """The same plan, with results in torch's channels_last memory format."""
        return self if self.in_channels_last else Runnable(self.plan, self.backend, in_channels_last=True)

    def __call__(self, operands: Mapping[str, Any]) -> Any:
        """Check the operands and run the plan."""
        if len(operands) != len(self.names) or any(name not in operands for name in self.names):
            require_operands(self.names, operands)
        arrays = [operands[name] for name in self.names]
        names, values = [], []
        for step, array in zip(self.inputs, arrays, strict=True):
            if tuple(array.shape) != step.size:
                raise ValueError(f"operand {step.operand!r} has shape {tuple(array.shape)}, expected {step.size}")
            if isinstance(step, s.Positions):
                self.backend.check_positions(array, step.operand, step.below)
            else:
                names.append(step.operand)
                values.append(array)
        self.backend.check(values, names)
        if values and not self.backend.can_run(self.plan.steps, self.backend.kind(values[0])):
            raise TypeError(
                f"operands have dtype {values[0].dtype}, in which {self.backend.name} cannot run this plan: pass"
                " arrays of this dtype, not shapes, to net.plan"
            )
        return self.unchecked(*arrays)

    def derivative(self, kind: str, place: int, arrays: Sequence[Any], direction: Any) -> Any:
        """Evaluate the network's VJP or JVP with respect to the operand at `place`; it is planned on the first call.

        Args:
            kind: "vjp" or "jvp".
            place: position of the operand in `arrays`.
            arrays: the operands, in order; None for operands that the derivative does not need.
            direction: the cotangent or the tangent.
        """
        assert self.plan.deriver is not None
        key = (kind, place, self.backend.kind(direction), self.backend.is_traced(direction))
        found = self._derivatives.get(key)
        if found is None:
            found = self.plan.deriver(
                self.plan, self.backend, kind, self.names[place], direction, in_channels_last=self.in_channels_last
            )
            self._derivatives[key] = found
        if kind == "vjp" and self.backend.is_complex(direction):
            arrays = [
                array if array is None or isinstance(step, s.Positions) else self.backend.conj(array)
                for step, array in zip(self.inputs, arrays, strict=True)
            ]
        return found(arrays, direction)

    def batched(self, places: Sequence[int], arrays: Sequence[Any]) -> Any:
        """Evaluate the network for each position of a first axis that the operands at `places` have in addition.

        The network with this index is planned on the first call with an axis of this size.
        """
        assert self.plan.deriver is not None
        like = arrays[places[0]]
        key = ("batch", tuple(places), like.shape[0], self.backend.kind(like), self.backend.is_traced(like))
        found = self._derivatives.get(key)
        if found is None:
            names = tuple([self.names[place] for place in places])
            found = self._derivatives[key] = self.plan.deriver(self.plan, self.backend, "batch", names, like)
        return found(arrays, None)


def _needs(net: AnyNetwork | None, names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """For each operand, the places of the operands that are needed for the derivative with respect to it."""
    found: list[set[str]] = [set() for _ in names]
    for term in net.terms if net is not None else ():
        held = [node.name for node in term.nodes if isinstance(node, Operand)]
        for place, name in enumerate(names):
            if name in held:
                others = list(held)
                others.remove(name)
                found[place].update(others)
    return tuple(tuple(at for at, name in enumerate(names) if name in needed) for needed in found)


def one_sum(plan: Plan) -> s.Step | None:
    """The only computing step of a plan, if frameworks accumulate it precisely enough to run in half precision.

    The result is None for other plans, since intermediate results, between steps or before scaling, may overflow
    even if the final result does not. A product plus an operand (a bias) counts as one step.
    """
    computed = [step for step in plan.steps if step.computes]
    if len(computed) == 2 and computed[0].is_product and isinstance(computed[1], s.Add):
        computed.pop()
    if len(computed) == 1 and computed[0].accumulates:
        return computed[0]
    if len(computed) != 1 or computed[0].adds_in_several or getattr(computed[0], "factor", 1) != 1:
        return None
    return computed[0]


def bytes_needed(plan: Plan, itemsize: int) -> int:
    """The bytes that a plan needs in addition to operands and patterns, for operands with `itemsize` bytes per entry.

    Half-precision plans with several steps run in single precision, which requires copies of the operands.
    """
    if itemsize != 2 or one_sum(plan) is not None or _only_moves(plan):
        return plan.peak_size * itemsize
    copies = sum(math.prod(step.size) for step in plan.steps if type(step) is s.Input)
    return 4 * (plan.peak_size + copies) + 2 * math.prod(plan.shape)


def _widened(plan: Plan, backend: Backend, run: Callable[..., Any]) -> Callable[..., Any]:
    """The plan's function; it widens half-precision operands, since sums in half precision may overflow."""
    return run if _only_moves(plan) else backend.widened(run, one_sum(plan))


def _only_moves(plan: Plan) -> bool:
    return not any(step.computes for step in plan.steps)


def _compiled(
    plan: Plan, backend: Backend, in_channels_last: bool = False, form: Resizable | None = None
) -> Callable[..., Any]:
    """Compile a plan to one function with one line per step; the function deletes values after their last use.

    Steps without operands (patterns, ones) use the dtype and device of the first operand.
    """
    steps = plan.steps
    names = [f"v{place}" for place, step in enumerate(steps) if isinstance(step, s.Input)]
    values = [f"v{place}" for place, step in enumerate(steps) if type(step) is s.Input]
    space: dict[str, Any] = {"default": backend.default_reference}
    for name in ("copy", "owned", "settled"):
        function = getattr(backend, name)
        space[name] = partial(function, channels_last=True) if in_channels_last else function
    lines = [f"def call({', '.join(names)}):"]
    if not values:
        lines.append("    like = default()")
    like = values[0] if values else "like"
    if any(not step.takes and not isinstance(step, s.Input) for step in steps) and values:
        lines.append(f"    like = {values[0]}")
        like = "like"
    resized: dict[int, _Resized] = {}
    if form is not None:
        axes = form.axes()
        assert axes is not None
        lines.append(f"    sizes = ({''.join(f'{names[at]}.shape[{axis}], ' for (at, axis), *_ in axes)})")
        resized = {
            place: _Resized(kind, given, backend.steps[kind])
            for place, kind, given in form.steps
            if kind is not s.Input
        }
    last = last_uses(steps, plan.result)
    kept = [place for place, step in enumerate(steps) if isinstance(step, s.Input)]  # held by the caller
    folded, skipped = plan.constants if form is None else constants(steps, plan.shapes, plan.result, resized)
    for place, step in enumerate(steps):
        if isinstance(step, s.Input) or place in skipped:
            continue
        if place in folded:
            space[f"f{place}"] = backend.constant(folded[place], partial(_fold, folded[place]))
            lines.append(f"    v{place} = f{place}({like})")
            continue
        space[f"f{place}"] = resized.get(place) or backend.steps[type(step)](step)
        arguments = ", ".join(f"v{at}" for at in step.takes) or like
        arguments = f"sizes, {arguments}" if place in resized else arguments
        lines.append(f"    v{place} = f{place}({arguments})")
        dead = [f"v{at}" for at, until in enumerate(last) if until == place and at not in (place, *kept, *skipped)]
        if dead:
            lines.append(f"    del {', '.join(dead)}")
    lines.append(f"    return {_returned(plan)}")
    exec(compile("\n".join(lines), f"<{plan.name} plan>", "exec"), space)
    return space["call"]


def _fold(key: tuple[Any, ...], dtype: Any) -> Any:
    """The value of a step, given with those of its operands, by the steps of NumPy."""
    step, *operands = key
    numpy = load("numpy")
    arrays = [_fold(one, dtype) for one in operands]
    return numpy.steps[type(step)](step)(*(arrays or [numpy.default_reference().astype(dtype)]))


class _Resized:
    """The function of a step whose sizes are known only when it runs."""

    def __init__(self, kind: type[s.Step], arguments: Sequence[Any], function_of: Callable[[Any], Any]) -> None:
        # Symbolic sizes cannot be part of a Fraction.
        self.arguments = tuple(
            [replace(one, factor=float(one.factor)) if _is_factor(one) else one for one in arguments]
        )
        self.kind, self.function_of = kind, function_of

    def __call__(self, sizes: Sequence[Any], *arrays: Any) -> Any:
        step = self.kind(*[value_of(argument, sizes) for argument in self.arguments])
        return self.function_of(step)(*arrays)


def _is_factor(argument: Any) -> bool:
    return isinstance(argument, Monomial) and argument.is_factor


def _returned(plan: Plan) -> str:
    """The expression that a compiled plan returns: the result, copied if it may share memory with another array."""
    result = f"v{plan.result}"
    values, place = plan.layouts, plan.result
    while True:
        step = plan.steps[place]
        if not step.is_view:
            return f"settled({result})"
        if not step.takes or step.overlaps:
            break  # an operand or constant, or a view with overlapping or read-only entries
        if values[place].copied:
            # The value is a copy if the operands are in row-major order; otherwise it may be a view of them.
            operands = [f"v{at}" for at, step in enumerate(plan.steps) if isinstance(step, s.Input)]
            return f"owned({', '.join([result, *operands])})"
        place = step.takes[0]
    return f"copy({result})"


def require_operands(expected: Sequence[str], found: Mapping[str, Any]) -> None:
    """Raise TypeError unless exactly the expected operands were given."""
    for name in expected:
        if name not in found:
            raise TypeError(f"operand {name!r} is missing, expected all of {list(expected)}: found {sorted(found)}")
    for name in found:
        if name not in expected:
            raise TypeError(f"operand {name!r} is unknown, expected one of {list(expected)}")
