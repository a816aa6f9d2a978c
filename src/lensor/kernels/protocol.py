"""The interface of backends: checks of arrays, and a function for each kind of step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from lensor.plan.steps import Step
from lensor.spec import ConvSpec

if TYPE_CHECKING:
    import numpy as np


class Backend(Protocol):
    """An array framework that runs the steps of plans."""

    name: str
    steps: Mapping[type[Step], Callable[[Any], Callable[..., Any]]]
    """For each kind of step, a function that maps a step to the function that runs it. For `Constant`, `Fill` and
    `Identity` steps, the latter takes a reference array, which determines dtype and device."""

    def kind(self, array: Any) -> tuple:
        """The properties besides shapes on which plans depend: framework, dtype and device."""
        ...

    def device(self, kind: Sequence[Any]) -> tuple[str, str, int]:
        """The type of a device ("cpu", ...), its name ("NumPy" or "JAX" if these run on a CPU), and a CPU's threads."""
        ...

    def dtype(self, kind: Sequence[Any]) -> str:
        """The name of the dtype."""
        ...

    def example(self, shape: Sequence[int], dtype: str, device: str) -> Any:
        """An array of ones."""
        ...

    def describe(self, kind: Sequence[Any]) -> str:
        """A description of what times depend on besides the processor: framework, dtype, device and threads."""
        ...

    def check(self, arrays: Sequence[Any], names: Sequence[str]) -> None:
        """Check that all arrays have the same floating-point or complex dtype and the same device.

        Raises:
            TypeError: if a dtype is an integer dtype, or if the dtypes differ.
            ValueError: if the devices differ.
        """
        ...

    def check_positions(self, array: Any, name: str, below: int) -> None:
        """Check a vector of positions; its values are checked only if they are known.

        Raises:
            TypeError: if its dtype is not an integer dtype that the framework accepts for indexing.
            ValueError: if an entry is negative, or is not less than `below`.
        """
        ...

    def constant(self, key: Any, make: Callable[[np.dtype], np.ndarray]) -> Callable[[Any], Any]:
        """A function of a reference array, for an array that does not depend on the operands of a plan.

        Args:
            key: the key of the array in caches.
            make: computes the array in a dtype.
        """
        ...

    def default_reference(self) -> Any:
        """The reference array for a network without operands, in double precision."""
        ...

    def is_complex(self, array: Any) -> bool:
        """Whether the array is complex."""
        ...

    def conj(self, array: Any) -> Any:
        """The complex conjugate."""
        ...

    def copy(self, array: Any, *, channels_last: bool = False) -> Any:
        """Copy an array into row-major order, or into torch's channels_last memory format."""
        ...

    def owned(self, array: Any, *others: Any, channels_last: bool = False) -> Any:
        """The array in this memory order, copied if it shares memory with one of the others."""
        ...

    def settled(self, array: Any, *, channels_last: bool = False) -> Any:
        """A writable array in this memory order that shares no memory with other arrays, copied only if necessary."""
        ...

    def formatted(self, ready: Any, spec: ConvSpec) -> Callable[..., Any]:
        """The function of a plan, with results in the memory format that the framework's convolution would use.

        Args:
            ready: the plan with the backend's functions, a `lensor.runtime.Runnable`.
            spec: the convolution that the plan computes or differentiates.
        """
        ...

    def widened(self, run: Callable[..., Any], one_sum: Step | None) -> Callable[..., Any]:
        """Wrap a function so that it computes in float32 for float16 operands and returns float16.

        Args:
            run: the function.
            one_sum: the only computing step of the plan, for which the framework may itself accumulate in float32, or
                None.
        """
        ...

    def as_operator(self, ready: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        """The function of a plan's steps; in a graph that the framework traces for `lensor`, it is one operator.

        Args:
            ready: the plan with the backend's functions, a `lensor.runtime.Runnable`.
            run: the function.
        """
        ...

    def differentiable(self, ready: Any) -> Callable[..., Any]:
        """The function of a plan, with derivatives if the framework records them.

        Args:
            ready: the plan with the backend's functions, a `lensor.runtime.Runnable`: `unrecorded` runs its steps,
                `derivative` computes a VJP or JVP of its network, `needs` lists the operands for each of them, and
                `batched` maps it over a first axis of some operands.
        """
        ...

    def can_run(self, steps: Sequence[Step], kind: Sequence[Any]) -> bool:
        """Whether the framework supports all the steps for this dtype."""
        ...

    def fuses(self, kind: Sequence[Any]) -> bool:
        """Whether one kernel reads the factors of a `PatternProduct` through patterns, without storing patches."""
        ...

    def convolves_as_it_multiplies(self, kind: Sequence[Any]) -> bool:
        """Whether convolutions are at least as precise as products, so that plans may replace products by them."""
        ...

    def itemsize(self, kind: Sequence[Any]) -> int:
        """Bytes per entry."""
        ...

    def spread(self, count: int, below: int, kind: Sequence[Any]) -> Any:
        """`count` evenly spaced positions from 0 to `below` − 1, for timing."""
        ...

    def random(self, shape: Sequence[int], kind: Sequence[Any]) -> Any:
        """An array with random entries, for timing."""
        ...

    def placeholder(self, shape: Sequence[int], dtype: Any, device: Any) -> Any:
        """An array with this shape, dtype and device that does not allocate memory for its entries."""
        ...

    def timed(self, call: Callable[[], Any], kind: Sequence[Any]) -> float:
        """The seconds that a call takes until the device has finished; on a GPU, measured by events."""
        ...

    def tuning(self, kind: Sequence[Any]) -> AbstractContextManager[None]:
        """A context in which kernels with settings for a device time them once and keep the fastest."""
        ...

    def is_traced(self, array: Any) -> bool:
        """Whether the array is unsuitable for timing because it is traced, compiled or batched, or has no data."""
        ...
