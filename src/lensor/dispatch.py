"""From a function call to a plan: build the network once for given shapes and options, and cache the prepared call.

While a framework captures a graph, a call becomes a constant in the graph, or, if its sizes are symbolic, a function
that works for all sizes.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from lensor import evaluate, kernels, planner, runtime
from lensor.cache import Cache
from lensor.network import AnyNetwork
from lensor.plan import Plan
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


_calls = Cache(maxsize=4096)


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
                return kernels.for_all_sizes(self.name)(*self.padded(arrays), *options)
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
                return kernels.for_all_sizes(self.name)(*self.padded(arrays), *options)
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
        key = self.key(arrays, options, lambda array: (shape_of(array), array.dtype, _device(array)))
        call = _calls.get(key)
        if call is None:
            call = self.prepare(arrays, options)
            if not kernels.backend_of(arrays[0]).is_traced(arrays[0]):
                _calls.put(key, call)  # tracing does not measure plans, so a later call may find a better one
        return call

    def captured(self, arrays: tuple[Array, ...], options: tuple) -> Array:
        """Run the call as part of a graph that a framework captures, with shapes and plan as constants."""
        kinds = tuple((shape_of(array), array.dtype, _device(array)) for array in arrays)
        return getattr(_captured_calls, _captured_call(self.name, kinds, options)).run(arrays)

    def prepare(self, arrays: tuple[Array, ...], options: tuple) -> _Call:
        """Check the arguments, build their network and plan it."""
        options = tuple(map(_frozen, options))
        named = dict(zip(self.arguments, arrays, strict=False))
        is_complex = check_arrays(named, self.real)
        shapes = [shape_of(array) for array in arrays]
        missing = [None] * (len(self.arguments) - len(arrays))
        request = self.build(*shapes, *missing, *options)
        adapt = tuple(
            _adapter(found, shape, is_complex and name in request.conjugate)
            for found, (name, shape) in zip(shapes, request.shapes.items(), strict=True)
        )
        plan = evaluate.compile(request.network, request.shapes, like=arrays[0])
        return _Call(
            _in_order(plan, tuple(request.shapes), arrays[0], request.spec),
            adapt if any(adapt) else None,
            request.unbatched,
        )


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


@kernels.constant_in_graphs
def _captured_call(operation: str, kinds: tuple, options: tuple) -> str:
    """Return the name of a call in `_captured_calls`, using constants only."""
    settings = planner.untimed(planner.current())
    key = (operation, kinds, repr(options), settings)
    name = _captured_names.get(key)
    if name is None:
        arrays = tuple(kernels.load("torch").placeholder(*kind) for kind in kinds)
        with planner.planning(effort=settings.effort):
            call = _operations[operation].prepare(arrays, options)
        name = f"call_{next(_captured_numbers)}"  # each thread gets a different number
        setattr(_captured_calls, name, call)
        _captured_names.put(key, name)
    return name


@kernels.constant_in_graphs
def _is_limited() -> bool:
    """Whether a memory limit is set; checking it requires a plan, and thus known sizes."""
    return planner.current().max_bytes is not None


def _in_order(plan: Plan, names: tuple[str, ...], like: Array, spec: ConvSpec | None) -> Callable[..., Array]:
    """The plan as a function that takes arrays in the order of `names` and does not check them."""
    backend = kernels.backend_of(like)
    ready = runtime.runnable(plan, backend)
    call = ready.unchecked if spec is None else backend.formatted(ready, spec)
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
    if conjugate:
        return lambda array: array.conj().reshape(wanted)
    return None if found == wanted else lambda array: array.reshape(wanted)


def shape_of(array: Array) -> Shape:
    """The shape of an array as a tuple of plain ints."""
    return tuple(operator.index(size) for size in array.shape)


def _device(array: Array) -> Any:
    return getattr(array, "device", None)


_parts = operator.attrgetter("shape", "dtype", "device")


def _frozen(option: Any) -> Any:
    """Convert lists to tuples, so that the option can be part of a cache key."""
    if isinstance(option, Sequence) and not isinstance(option, str):
        return tuple(_frozen(part) for part in option)
    return option


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
        if _device(array) != _device(first[1]):
            raise ValueError(
                f"{first[0]} is on device {_device(first[1])} and {name} on device {_device(array)}, expected the same"
            )
    return names[first[0]].startswith(("complex", "clongdouble"))
