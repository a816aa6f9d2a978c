"""Evaluation: planning a network for given arrays, and running the cached plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from lensor.arguments import by_name
from lensor.cache import Cache
from lensor.choices import Effort
from lensor.errors import SubscriptsError
from lensor.kernels import Backend, backend_of, load, override_of
from lensor.network import AnyNetwork, Network, Operand, Select, contraction
from lensor.network.nodes import new_name
from lensor.network.subscripts import (
    expand_ellipsis,
    format_legs,
    infer_sizes,
    parse_subscripts,
    spread_over_deltas,
    with_spaces,
)
from lensor.pattern import IndexPattern, as_integer
from lensor.plan import Plan
from lensor.plan.resizable import Resizable
from lensor.plan.steps import Input
from lensor.planner import Settings, choose, choose_resizable, current, planning, profile_of, untimed
from lensor.runtime import Runnable, require_operands, run, runnable


def _weigh_plan(entry: tuple[Any, Plan]) -> int:
    """About the number of bytes that a plan keeps alive once it has run, which is faster than to count them."""
    plan = entry[1]
    nodes = sum(len(term.nodes) for term in plan.network.terms) if plan.network is not None else 0
    return 12_000 + 600 * len(plan.steps) + 500 * nodes


_plans = Cache(maxsize=1024, weigh=_weigh_plan)
_contractions = Cache(maxsize=1024)


# ------------------------------------------------------------------------------------------------------------ planning
def compile(
    net: AnyNetwork,
    shapes: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int] | None = None,
    like: Any = None,
    settings: Settings | None = None,
    shapes_only: bool = False,
) -> Plan:
    """Simplify a network, choose a plan for operands of the given shapes, and cache it.

    Args:
        net: the network.
        shapes: the shape of every operand.
        sizes: sizes of indices that no operand determines.
        like: an array with the framework, dtype and device of the operands, for measuring candidates.
        settings: effort and memory limit; by default, those set with `lensor.planning`.
        shapes_only: whether the framework of the operands is unknown, so that estimates are those for torch on a CPU.

    Raises:
        TypeError: if an operand is missing or unknown.
        ValueError: if shapes or sizes do not match the network, or if no plan meets the memory limit.
    """
    if sizes:
        net = net.bind(sizes)
    settings = settings or current()
    backend = None if like is None else backend_of(like)
    kind = () if backend is None else backend.kind(like)
    if backend is not None and backend.is_traced(like):
        settings = untimed(settings)
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    key = (net, tuple(sorted(shapes.items())), kind, settings, shapes_only)

    def make() -> Plan:
        profile = profile_of(None) if shapes_only else profile_of(backend, kind)
        plan = choose(bind_shapes(net, shapes), settings, backend, kind, profile, net)
        return replace(plan, deriver=partial(_derived, settings=settings))

    try:
        return _plans.get_or_make(key, make)
    except TypeError:
        _refuse_symbols(shapes)
        raise


def compile_for_all_sizes(
    net: AnyNetwork,
    shapes: Mapping[str, Sequence[int]],
    others: Mapping[str, Sequence[int]],
    backend: Backend,
    like: Any,
) -> Resizable | None:
    """Choose a plan for all sizes of some indices; None if there is none.

    Args:
        net: the network.
        shapes: the shape of every operand, with typical sizes of these indices.
        others: the shapes with other sizes of these indices.
        backend: the backend.
        like: an object with the dtype and device of the operands.
    """
    bound, other = bind_shapes(net, shapes).sizes, bind_shapes(net, others).sizes
    sizes = {index: bound[index] or 0 for index, size in net.sizes.items() if size is None}
    free = {index: size for index, size in sizes.items() if other[index] != size}
    rest = {index: size for index, size in sizes.items() if index not in free}
    return choose_resizable(net.bind(rest) if rest else net, free, backend, backend.kind(like))


def _refuse_symbols(shapes: Mapping[str, Sequence[Any]]) -> None:
    """Raise TypeError if a shape contains a compiler's symbolic sizes, which cannot be part of a cache key."""
    for name, shape in shapes.items():
        if any(type(size).__name__ == "SymInt" for size in shape):
            raise TypeError(
                f"operand {name!r} has shape {tuple(shape)} with symbolic sizes, expected numbers: a network is planned"
                " for known sizes; the functions of lensor.functional accept symbolic sizes"
            ) from None


def _derived(
    plan: Plan,
    backend: Backend,
    kind: str,
    operand: Any,
    like: Any,
    *,
    settings: Settings,
    in_channels_last: bool = False,
) -> Callable[[Sequence[Any], Any], Any]:
    """Plan the VJP or JVP of a plan's network; return a function of the plan's operands and a direction.

    With kind "batch", plan the network with an index for the first axis of `like`, which the operands with the names
    `operand` have in addition; the function ignores the direction.
    """
    net = plan.network
    assert net is not None
    direction = "V"
    while direction in net.operand_names:
        direction += "_"
    shapes = {step.operand: step.size for step in plan.steps if isinstance(step, Input)}
    if kind == "batch":
        size = int(like.shape[0])
        derived = net.batch(new_name("batch", {*net.sizes}), operand, size)
        shapes.update((name, (size, *shapes[name])) for name in operand)
    else:
        derived = net.vjp(operand, direction) if kind == "vjp" else net.jvp(operand, direction)
        shapes[direction] = plan.shape if kind == "vjp" else shapes[operand]
    ready = runnable(
        compile(derived, {name: shapes[name] for name in derived.operand_names}, like=like, settings=settings), backend
    )
    if in_channels_last:
        ready = ready.channels_last
    places = [-1 if name == direction else plan.operands.index(name) for name in ready.names]
    return lambda arrays, direction: ready.unchecked(*(direction if at < 0 else arrays[at] for at in places))


def bind_shapes(net: AnyNetwork, shapes: Mapping[str, Sequence[int]]) -> AnyNetwork:
    """Bind all sizes of a network, given the shapes of its operands."""
    require_operands(net.operand_names, shapes)
    # A name means the same index in all terms of a sum, so a size unknown in one term may come from another term.
    sizes: dict[str, int | None] = dict(net.sizes)
    for term in net.terms if len(net.terms) > 1 else ():
        held = [(name, legs, shapes[name]) for name, legs in _occurrences(term)]
        sizes.update((index, size) for index, size in infer_sizes(held, term.sizes).items() if size is not None)
    terms = []
    for term in net.terms:
        held = [(name, legs, shapes[name]) for name, legs in _occurrences(term)]
        known = {index: sizes[index] if size is None else size for index, size in term.sizes.items()}
        found = spread_over_deltas(term.nodes, infer_sizes(held, known))
        if None in found.values():
            missing = sorted(index for index, size in found.items() if size is None)
            raise ValueError(
                f"the size of index {missing[0]!r} does not follow from the operands: give it as a keyword,"
                f" {missing[0]}=..., or call net.bind({missing[0]}=...)"
            )
        terms.append(term.replace(sizes=found, scale=term.scale.bind(found)))
    return terms[0] if len(terms) == 1 else type(net)(tuple(terms))  # type: ignore[call-arg]


def _occurrences(term: Network) -> list[tuple[str, tuple]]:
    """A (name, legs of the array) pair for each operand; a selection's vector has only the second leg."""
    return [
        (node.name, node.legs[1:] if isinstance(node, Select) else node.legs)
        for node in term.nodes
        if isinstance(node, Operand)
    ]


def _reference(net: AnyNetwork, arrays: Mapping[str, Any]) -> Any:
    """The first operand that is not a position vector; None if there is none."""
    chosen = net.selections
    return next((array for name, array in arrays.items() if name not in chosen and hasattr(array, "dtype")), None)


@by_name("operand_names")
def plan(net: AnyNetwork, /, *, effort: Effort | None = None, max_bytes: int | None = None, **operands: Any) -> Plan:
    """Plan the network for operands given as arrays or shapes; int keywords set index sizes.

    Use this method to inspect a plan and its costs; to evaluate the network, call it: the call also plans it.

    Args:
        net: the network.
        effort: `"estimate"` chooses the candidate with the lowest estimated cost. `"measure"` times the candidates once
            on operands with these shapes and the dtype and device of the given arrays (float32 NumPy arrays if only
            shapes are given). `"remember"` uses the times stored in `lensor.wisdom`.
        max_bytes: the maximum memory that the plan may use in addition to its operands.
        operands: an array or a shape for each operand; an int for each index whose size no operand determines.

    Example:
        >>> import lensor
        >>> plan = lensor.ops.conv(lensor.ConvSpec(2, 4, (5,), 1)).plan(X=(3, 2, 5), W=(4, 2, 1))
        >>> plan.flops, plan.shape
        (240, (3, 4, 5))

    Raises:
        TypeError: if an operand is missing or unknown.
        ValueError: if shapes do not match the network, the effort is unknown, or no plan meets the memory limit.
    """
    with planning(effort=effort, max_bytes=max_bytes):
        settings = current()
    arrays, sizes = split_sizes(net, operands)
    shapes = {name: _shape_of(name, value) for name, value in arrays.items()}
    like = _reference(net, arrays)
    shapes_only = like is None
    like = np.zeros((), np.float32) if like is None else like
    return compile(net, shapes, sizes, like, settings, shapes_only)


def _shape_of(name: str, value: Any) -> tuple[int, ...]:
    shape = getattr(value, "shape", value)
    if isinstance(shape, Sequence) and not isinstance(shape, str):
        return tuple(as_integer(size, f"a size in the shape of {name!r}") for size in shape)
    raise TypeError(f"operand {name!r} is {value!r}, expected an array or a shape, a sequence of ints")


def split_sizes(net: AnyNetwork, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Separate keywords into operands and sizes: a name that is an index but not an operand sets a size.

    Raises:
        TypeError: if an int is given for a name that is neither, or if a size is not an integer.
    """
    arrays, sizes = {}, {}
    names = net.operand_names
    for name, value in given.items():
        if name not in names and name in net.sizes:
            sizes[name] = as_integer(value, f"the size of index {name!r}")
        elif name not in names and isinstance(value, int):
            raise TypeError(
                f"operand or index {name!r} is unknown, expected one of the operands {list(names)} or the indices"
                f" {sorted(net.sizes)}"
            )
        else:
            arrays[name] = value
    return arrays, sizes


# ---------------------------------------------------------------------------------------------------------- evaluation
def evaluate(net: AnyNetwork, operands: Mapping[str, Any], sizes: Mapping[str, int] | None = None) -> Any:
    """Evaluate a network on arrays from one framework.

    Raises:
        TypeError: if operands are missing or unknown, differ in framework or dtype, or have an integer dtype.
        ValueError: if shapes or sizes do not match the network.
    """
    require_operands(net.operand_names, operands)
    backend_of(*operands.values())
    like = _reference(net, operands)
    return run(compile(net, {name: array.shape for name, array in operands.items()}, sizes, like), operands)


@by_name("operand_names")
def call(net: AnyNetwork, /, **operands: Any) -> Any:
    """Evaluate the network on arrays from one framework; int keywords set index sizes that no array determines.

    Example:
        >>> import lensor, numpy as np
        >>> net = lensor.contraction("n i, n i -> n", "X", "X")
        >>> net(X=np.array([[3.0, 4.0]]))
        array([25.])
    """
    arrays, sizes = split_sizes(net, operands)
    return evaluate(net, arrays, sizes)


# -------------------------------------------------------------------------------------------------------------- einsum
def einsum(subscripts: str, /, *operands: Any, **sizes: int) -> Any:
    """Evaluate einsum-like subscripts on arrays from one framework and index patterns.

    Spaces separate legs. `(g c)` is an axis with two indices, and `1` is an axis of length 1. An index repeated within
    one operand selects the diagonal. `...` stands for axes that operands share. Indices that are not in the output are
    summed.

    Args:
        subscripts: e.g. `"n (g ci) i, i o k, (g co) ci k -> n (g co) o"`; `->` and the output are required.
        operands: arrays and IndexPatterns, one for each part of the subscripts.
        sizes: sizes of indices that neither arrays nor patterns determine.

    Example:
        >>> import lensor, numpy as np
        >>> x, pi, w = np.arange(5.0), lensor.IndexPattern(5, 3), np.ones(3)
        >>> lensor.einsum("i, i o k, k -> o", x, pi, w)
        array([3., 6., 9.])

    Raises:
        SubscriptsError: if the subscripts do not parse; a caret marks the place.
        ValueError: if an index has conflicting sizes, or its size is unknown.
        TypeError: if an operand is neither an array nor an index pattern, or if the arrays come from different
            frameworks.
    """
    if not isinstance(subscripts, str):
        raise TypeError(f"subscripts is of type {type(subscripts).__name__}, expected a str as the first argument")
    sizes = {name: as_integer(size, f"the size of index {name!r}") for name, size in sizes.items()}
    arrays = {f"x{at}": operand for at, operand in enumerate(operands) if not isinstance(operand, IndexPattern)}
    if (override := override_of(*arrays.values())) is not None:
        return override(einsum, (subscripts, *operands), **sizes)
    backend = backend_of(*arrays.values()) if arrays else load("numpy")
    key = (
        subscripts,
        tuple(operand if isinstance(operand, IndexPattern) else tuple(operand.shape) for operand in operands),
        tuple(sorted(sizes.items())),
    )
    try:
        net = _contractions.get_or_make(key, lambda: _contraction_of(subscripts, operands, sizes))
    except TypeError:
        _refuse_symbols({name: array.shape for name, array in arrays.items()})
        raise
    if arrays:
        return evaluate(net, arrays)
    return Runnable(compile(net, {}), backend)({})


def _contraction_of(subscripts: str, operands: Sequence[Any], sizes: Mapping[str, int]) -> Network:
    parsed = parse_subscripts(subscripts)
    if len(parsed.operands) != len(operands):
        raise ValueError(
            f"the number of operands is {len(operands)}, expected {len(parsed.operands)} for {subscripts!r}"
        )
    shapes = [
        (operand.input_size, operand.output_size, operand.kernel_size)
        if isinstance(operand, IndexPattern)
        else tuple(operand.shape)
        for operand in operands
    ]
    parsed = expand_ellipsis(parsed, [len(shape) for shape in shapes])
    held = []
    for at, (legs, shape, start) in enumerate(zip(parsed.operands, shapes, parsed.starts, strict=True)):
        if len(legs) != len(shape):
            raise SubscriptsError(
                f"operand {at} has {len(shape)} axes (shape {shape}), expected {len(legs)} as in its subscripts"
                f"{with_spaces(subscripts)}",
                subscripts,
                start,
            )
        held.append((f"operand {at}", legs, shape))
    found = infer_sizes(held, sizes)
    missing = sorted(index for index, size in found.items() if size is None)
    if missing:
        raise ValueError(
            f"the size of index {missing[0]!r} does not follow from the operands: give it as a keyword,"
            f" {missing[0]}=..."
        )
    unknown = sorted(set(sizes) - {index for legs in parsed.operands for leg in legs for index in leg})
    if unknown:
        raise ValueError(f"a size is given for {unknown[0]!r}, expected an index of {subscripts!r}")
    text = f"{', '.join(format_legs(legs) for legs in parsed.operands)} -> {format_legs(parsed.output)}"
    names = [operand if isinstance(operand, IndexPattern) else f"x{at}" for at, operand in enumerate(operands)]
    known = {index: size for index, size in found.items() if size is not None}
    return contraction(text, *names, **known)
