"""From a function call to a plan: build the network once for given shapes and options, and cache the prepared call.

While a framework captures a graph, a call becomes a constant in the graph. If sizes are symbolic, the graph contains
the steps of a plan for all sizes, or, if there is no such plan, a composition of the framework's operators.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from lensor import evaluate, kernels, planner, runtime
from lensor.cache import Cache, frozen
from lensor.kernels.marks import constant_in_graphs
from lensor.network import AnyNetwork
from lensor.spec import ConvSpec

Array: TypeAlias = Any

Shape: TypeAlias = tuple[int, ...]


class Request(NamedTuple):
    """The network that a call evaluates, built from its shapes and hyper-parameters."""

    network: AnyNetwork
    shapes: Mapping[str, Shape]  # shapes of the network's operands, in the order of the call's arrays
    unbatched: bool = False  # whether to drop the result's batch axis
    conjugate: tuple[str, ...] = ()  # operands to conjugate, for a derivative
    spec: ConvSpec | None = None  # given if the result takes the memory format of the framework's convolution


class _Kind(NamedTuple):
    """What a graph determines about an array; symbolic sizes are None."""

    shape: tuple[int | None, ...]
    dtype: Any
    device: Any


class _Call(NamedTuple):
    """A prepared request that is ready to run."""

    run_plan: Callable[..., Array]  # takes the arrays in the caller's order
    adapt: tuple[Callable[[Array], Array] | None, ...] | None
    unbatched: bool

    def run(self, arrays: Sequence[Array]) -> Array:
        """Compute the result for arrays in the order of the call."""
        if self.adapt is not None:
            arrays = [array if f is None else f(array) for f, array in zip(self.adapt, arrays, strict=True)]
        result = self.run_plan(*arrays)
        return result[0] if self.unbatched else result


class _CallForAllSizes(NamedTuple):
    """A prepared request whose plan takes some sizes from the arrays."""

    call: _Call
    equal: tuple[tuple[tuple[int, int], ...], ...]  # axes of equal size, each given by the array's place and the axis
    is_transformable: bool

    def fits(self, arrays: Sequence[Array], options: Sequence[Any]) -> bool:
        """Whether sizes are equal where they must be, and the plan can be transformed if the arrays are."""
        symbolic = kernels.symbolic()
        if not self.is_transformable and symbolic.is_transformed(arrays):
            return False
        for (first, axis), *others in self.equal:
            size = arrays[first].shape[axis]
            found = [arrays[place].shape[other] for place, other in others] + symbolic.symbolic_sizes(options)
            if any(other != size for other in found):
                return False
        return True


_calls = Cache(maxsize=4096)

_TYPICAL = 32
"""A plan for all sizes is chosen for this one, whatever sizes the graph was captured with."""


class Operation:
    """The recipe for a public function: `build` creates a request from the arrays' shapes and the other arguments."""

    def __init__(self, arguments: Sequence[str], build: Callable[..., Request], real: bool) -> None:
        self.arguments = arguments
        self.build = build
        self.name = build.__name__
        self.real = real  # whether the operation is defined for real numbers only

    def __call__(self, arrays: tuple[Array, ...], *options: Any) -> Array:
        """Compute the result for arrays in the order of the arguments."""
        if kernels.is_capturing():
            if kernels.is_symbolic(arrays, options) and not _is_limited():
                return self.captured_for_all_sizes(arrays, options)
            return self.captured(arrays, options)
        try:
            call = _calls.peek(self.key(arrays, options, _parts))
        except (AttributeError, TypeError, RuntimeError):  # the arrays are not plain arrays, or their sizes are traced
            call = None
        if call is None:
            if (override := kernels.override_of(*arrays)) is not None:
                return override(operation, (self.name, arrays, *options))
            kernels.backend_of(*arrays)  # raises unless all are arrays of one framework
            if kernels.is_symbolic(arrays, options):
                check_arrays(dict(zip(self.arguments, arrays, strict=False)), self.real)
                return self.composed(arrays, options)
            call = self.remembered(arrays, options)
        return call.run(arrays)

    def padded(self, arrays: tuple[Array, ...]) -> tuple[Array | None, ...]:
        """The arrays, with None for optional arrays that the call omits."""
        return arrays + (None,) * (len(self.arguments) - len(arrays))

    def key(self, arrays: Sequence[Array], options: tuple, parts: Callable[[Array], tuple]) -> tuple:
        """The cache key of a call; it contains the options as text, since 1, 1.0 and True compare equal."""
        settings = planner.current()
        key = (self, repr(options), settings)
        for array in arrays:
            key += (type(array), parts(array), getattr(array, "layout", None))
        return key

    def remembered(self, arrays: tuple[Array, ...], options: tuple) -> _Call:
        """The cached call for these arrays and options, prepared if it is new."""
        try:
            key = self.key(arrays, options, lambda array: (shape_of(array), array.dtype, _device(array)))
        except TypeError:
            shapes = [tuple(array.shape) for array in arrays]
            message = f"operands have the shapes {shapes}, expected numbers as sizes: plans are for known sizes"
            raise TypeError(message) from None
        call = _calls.get(key)
        if call is None:
            call = self.prepare(arrays, options)
            if not kernels.backend_of(arrays[0]).is_traced(arrays[0]):
                _calls.put(key, call)  # tracing does not measure plans, so a later call may find a better one
        return call

    def captured_for_all_sizes(self, arrays: tuple[Array, ...], options: tuple) -> Array:
        """Run the call as part of a graph with symbolic sizes: by a plan for all sizes if there is one."""
        symbolic = kernels.symbolic()
        if self.name in symbolic.LAYERS:
            return self.composed(arrays, options)
        self.check(arrays)
        kinds = tuple([(symbolic.known_sizes(array.shape), array.dtype, array.device) for array in arrays])
        name = _captured_call_for_all_sizes(self.name, kinds, symbolic.known_sizes(options))
        if name:
            found = getattr(_captured_calls, name)
            if found.fits(arrays, options):
                return found.call.run(arrays)
        return self.composed(arrays, options)  # raises an error if the arrays do not fit

    def composed(self, arrays: tuple[Array, ...], options: tuple) -> Array:
        """Run the call as a composition of the framework's operators, for all sizes."""
        return kernels.symbolic().OPERATIONS[self.name](*self.padded(arrays), *options)

    def captured(self, arrays: tuple[Array, ...], options: tuple) -> Array:
        """Run the call as part of a graph that a framework captures, with shapes and plan as constants."""
        kinds = tuple((shape_of(array), array.dtype, _device(array)) for array in arrays)
        return getattr(_captured_calls, _captured_call(self.name, kinds, options)).run(arrays)

    def prepare(self, arrays: tuple[Array, ...], options: tuple) -> _Call:
        """Check the arguments, build their network and plan it."""
        is_complex = self.check(arrays)
        shapes = [shape_of(array) for array in arrays]
        request = self.request(shapes, options)
        plan = evaluate.compile(request.network, request.shapes, like=arrays[0])
        return _call(runtime.runnable(plan, kernels.backend_of(arrays[0])), request, shapes, is_complex)

    def prepare_for_all_sizes(self, kinds: Sequence[_Kind], options: tuple) -> _CallForAllSizes | None:
        """Plan the call for all values of the sizes that are None in its shapes and options.

        The result is None if there is no such plan, for example because the network depends on one of these sizes, or
        if the arguments do not fit.
        """
        backend, shapes = kernels.load("torch"), [kind.shape for kind in kinds]
        try:
            is_complex = self.check(kinds)
            request, other = (
                self.request(_with_sizes(shapes, size), _with_sizes(options, size)) for size in (_TYPICAL, _TYPICAL + 1)
            )
        except (TypeError, ValueError):
            return None
        if request.network.exact != other.network.exact:
            return None
        form = evaluate.compile_for_all_sizes(request.network, request.shapes, other.shapes, backend, kinds[0])
        axes = form and form.axes()
        if not form or not axes:
            return None
        ready = runtime.Runnable(form.plan, backend, form=form)
        places = [list(request.shapes).index(name) for name in ready.names]
        equal = tuple([tuple([(places[at], axis) for at, axis in one]) for one in axes])
        unknown = {
            (place, axis) for place, shape in enumerate(shapes) for axis, size in enumerate(shape) if size is None
        }
        if unknown != {one for each in equal for one in each} or (len(equal) > 1 and _has_unknown(options)):
            return None
        wanted = {name: _inferred(shape, other.shapes[name]) for name, shape in request.shapes.items()}
        call = _call(ready, request._replace(shapes=wanted), _with_sizes(shapes, -1), is_complex)
        return _CallForAllSizes(call, equal, kernels.symbolic().is_transformable(form.plan.steps))

    def check(self, arrays: Sequence[Array]) -> bool:
        """Raise TypeError or ValueError unless the arrays are compatible; return whether they are complex."""
        return check_arrays(dict(zip(self.arguments, arrays, strict=False)), self.real)

    def request(self, shapes: Sequence[Shape], options: tuple) -> Request:
        """The request for arrays of these shapes."""
        return self.build(*self.padded(tuple(shapes)), *map(frozen, options))


_operations: dict[str, Operation] = {}


def operation(name: str, arrays: tuple[Array, ...], *options: Any) -> Array:
    """Run the operation with this name; torch.fx graphs call this function."""
    return _operations[name](tuple(arrays), *options)


class _CapturedCalls:
    """The calls in captured graphs, stored as attributes so that a framework finds new calls while it traces."""


_captured_calls = _CapturedCalls()
"""A graph stores only the name of a call, so each call is kept here until the process ends."""

_captured_names = Cache(maxsize=4096)

_captured_numbers = itertools.count()


@constant_in_graphs
def _captured_call(operation: str, kinds: tuple, options: tuple) -> str:
    """Return the name of a call in `_captured_calls`, using constants only."""
    settings = planner.untimed(planner.current())

    def prepare() -> _Call:
        arrays = tuple(kernels.load("torch").placeholder(*kind) for kind in kinds)
        with planner.planning(effort=settings.effort):
            return _operations[operation].prepare(arrays, options)

    return _captured_name((operation, kinds, repr(options), settings), prepare)


@constant_in_graphs
def _captured_call_for_all_sizes(operation: str, kinds: tuple, options: tuple) -> str:
    """Return the name of a call in `_captured_calls` for all values of sizes that are None; "" if there is no plan."""
    known = [_Kind(*kind) for kind in kinds]
    return _captured_name(
        (operation, kinds, repr(options)), lambda: _operations[operation].prepare_for_all_sizes(known, options)
    )


def _captured_name(key: tuple, prepare: Callable[[], _Call | _CallForAllSizes | None]) -> str:
    """The name of the call with this key, which is prepared if it is new; "" if it cannot be prepared."""
    name = _captured_names.get(key)
    if name is None:
        call = prepare()
        name = "" if call is None else f"call_{next(_captured_numbers)}"  # each thread gets a different number
        if call is not None:
            setattr(_captured_calls, name, call)
        _captured_names.put(key, name)
    return name


@constant_in_graphs
def _is_limited() -> bool:
    """Whether a memory limit is set; checking it requires a plan, and thus known sizes."""
    return planner.current().max_bytes is not None


def _call(ready: runtime.Runnable, request: Request, shapes: Sequence[Shape], is_complex: bool) -> _Call:
    """The call that runs a plan for a request on arrays of these shapes."""
    adapt = tuple(
        _adapter(found, wanted, is_complex and name in request.conjugate)
        for found, (name, wanted) in zip(shapes, request.shapes.items(), strict=True)
    )
    run_plan = _in_order(ready, tuple(request.shapes), request.spec)
    return _Call(run_plan, adapt if any(adapt) else None, request.unbatched)


def _in_order(ready: runtime.Runnable, names: tuple[str, ...], spec: ConvSpec | None) -> Callable[..., Array]:
    """A plan as a function that takes arrays in the order of `names` and does not check them."""
    call = ready.unchecked if spec is None else ready.backend.formatted(ready, spec)
    if ready.names == list(names):
        return call
    places = [names.index(name) for name in ready.names]
    return lambda *arrays: call(*(arrays[place] for place in places))


def recipe(*arguments: str, real: bool = False) -> Callable[[Callable[..., Request]], Operation]:
    """A decorator that makes an operation of a function from shapes (named by `arguments`) and options to a request."""

    def register(build: Callable[..., Request]) -> Operation:
        operation = _operations[build.__name__] = Operation(arguments, build, real)
        return operation

    return register


def _adapter(found: Shape, wanted: Shape, conjugate: bool) -> Callable[[Array], Array] | None:
    if found == wanted:
        return (lambda array: array.conj()) if conjugate else None
    return lambda array: (array.conj() if conjugate else array).reshape(wanted)


def shape_of(array: Array) -> Shape:
    """The shape of an array as a tuple of plain ints."""
    return tuple(operator.index(size) for size in array.shape)


def _with_sizes(options: Any, size: int) -> Any:
    """Replace None in a shape, or in nested options, by a size."""
    if isinstance(options, (tuple, list)):
        return tuple([_with_sizes(option, size) for option in options])
    return size if options is None else options


def _has_unknown(options: Any) -> bool:
    return any(map(_has_unknown, options)) if isinstance(options, tuple) else options is None


def _inferred(shape: Shape, other: Shape) -> Shape:
    """A shape for `reshape`, with −1 for the size that differs between two shapes."""
    return tuple([size if size == another else -1 for size, another in zip(shape, other, strict=True)])


def _device(array: Array) -> Any:
    return getattr(array, "device", None)


_parts = operator.attrgetter("shape", "dtype", "device")


def _dtype_name(array: Array) -> str:
    return getattr(array.dtype, "name", None) or str(array.dtype).rpartition(".")[2]


def check_arrays(arrays: Mapping[str, Array], real: bool) -> bool:
    """Raise TypeError or ValueError unless the arrays are compatible; return whether they are complex."""
    (first, *others), names = arrays.items(), {name: _dtype_name(array) for name, array in arrays.items()}
    for name, dtype in names.items():
        if not dtype.startswith(("float", "bfloat", "longdouble", "complex", "clongdouble")):
            raise TypeError(f"{name} has dtype {dtype}, expected a floating-point dtype")
        if dtype.startswith(("float8", "float4")):
            raise TypeError(
                f"{name} has dtype {dtype}, expected a dtype of at least 16 bits: this one is only for storage"
            )
        if real and dtype.startswith(("complex", "clongdouble")):
            raise TypeError(f"{name} has complex dtype {dtype}, expected a real dtype: curvature is not defined for it")
    for name, array in others:
        if array.dtype != first[1].dtype:
            raise TypeError(
                f"{first[0]} has dtype {names[first[0]]} and {name} has dtype {names[name]}, expected one dtype"
            )
        devices = kernels.device_of(first[1]), kernels.device_of(array)
        if devices[0] != devices[1]:
            raise ValueError(
                f"{first[0]} is on device {devices[0]} and {name} on device {devices[1]}, expected the same"
            )
    return names[first[0]].startswith(("complex", "clongdouble"))
