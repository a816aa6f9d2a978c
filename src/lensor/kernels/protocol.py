"""The interface of backends: checks of arrays, and a function for every kind of step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lensor.plan.steps import Step
from lensor.spec import ConvSpec


class Backend(Protocol):
    """An array framework."""

    name: str
    steps: Mapping[type[Step], Callable[[Any], Callable[..., Any]]]
    """For each kind of step, a function from a step to the function that runs it. The functions of `Constant`, `Fill`
    and `Identity` steps take a reference array, which determines dtype and device."""

    def kind(self, array: Any) -> tuple:
        """Everything that plans depend on in addition to shapes: framework, dtype and device."""
        ...

    def describe(self, kind: Sequence[Any]) -> str:
        """Everything that times depend on in addition to the processor: framework, dtype, device, threads."""
        ...

    def check(self, arrays: Sequence[Any], names: Sequence[str]) -> None:
        """Check that all arrays have one floating or complex dtype and one device.

        Raises:
            TypeError: for integer dtypes, or two dtypes.
            ValueError: for two devices.
        """
        ...

    def check_positions(self, array: Any, name: str, below: int) -> None:
        """Check a vector of positions; values are checked only if they are known.

        Raises:
            TypeError: if its dtype is not an integer dtype with which the framework indexes.
            ValueError: if an entry is negative or not below `below`.
        """
        ...

    def default_reference(self) -> Any:
        """The reference array of a network without operands, in double precision."""
        ...

    def is_complex(self, array: Any) -> bool:
        """Whether the array is complex."""
        ...

    def conj(self, array: Any) -> Any:
        """The complex conjugate."""
        ...

    def copy(self, array: Any, *, channels_last: bool = False) -> Any:
        """A copy of the array in row-major order, or in torch's memory format channels_last."""
        ...

    def owned(self, array: Any, *others: Any, channels_last: bool = False) -> Any:
        """The array in this memory order; copied if it shares memory with one of the others."""
        ...

    def settled(self, array: Any, *, channels_last: bool = False) -> Any:
        """An array that shares no memory with others, in this order and writable; copied only if necessary."""
        ...

    def formatted(self, ready: Any, spec: ConvSpec) -> Callable[..., Any]:
        """The function of a plan, with results in the memory format of the framework's own convolution.

        Args:
            ready: the plan with the backend's functions, a `lensor.runtime.Runnable`.
            spec: the convolution that the plan computes or differentiates.
        """
        ...

    def widened(self, run: Callable[..., Any], one_sum: Step | None) -> Callable[..., Any]:
        """A function of arrays that computes float16 operands in float32 and returns float16.

        Args:
            run: the function.
            one_sum: the only computing step of the plan, for which the framework may accumulate in float32 itself, or
                None.
        """
        ...

    def differentiable(
        self,
        run: Callable[..., Any],
        derivative: Callable[[str, int, Sequence[Any], Any], Any],
        needs: Sequence[Sequence[int]],
    ) -> Callable[..., Any]:
        """A function of arrays with given derivatives, if the framework records derivatives.

        Args:
            run: the function.
            derivative: `derivative(kind, place, arrays, direction)`, the VJP ("vjp") or JVP ("jvp") with respect to the
                array at `place`.
            needs: for each place, the places of the arrays that this derivative needs; the others may be None.
        """
        ...

    def can_run(self, steps: Sequence[Step], kind: Sequence[Any]) -> bool:
        """Whether the framework has all the steps for this dtype."""
        ...

    def itemsize(self, kind: Sequence[Any]) -> int:
        """Bytes per entry."""
        ...

    def spread(self, count: int, below: int, kind: Sequence[Any]) -> Any:
        """`count` evenly spaced positions from 0 to `below` − 1, for timing."""
        ...

    def random(self, shape: Sequence[int], kind: Sequence[Any]) -> Any:
        """An array of random entries, for timing."""
        ...

    def placeholder(self, shape: Sequence[int], dtype: Any, device: Any) -> Any:
        """An array with this shape, dtype and device that takes no memory."""
        ...

    def synchronize(self) -> None:
        """Wait until all computations are finished."""
        ...

    def is_traced(self, array: Any) -> bool:
        """Whether the array cannot be used for timing: it is traced, compiled or batched, or has no memory."""
        ...
