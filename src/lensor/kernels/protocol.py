"""What a backend offers: checks of its arrays, and a function for every kind of step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lensor.plan.steps import Step
from lensor.spec import ConvSpec


class Backend(Protocol):
    """An array framework."""

    name: str
    steps: Mapping[type[Step], Callable[[Any], Callable[..., Any]]]
    """For each kind of step, what makes of a step the function that carries it out; `Input`, `Constant`, `Fill` and
    `Identity` steps make functions of a reference array, which tells dtype and device."""

    def kind(self, array: Any) -> tuple:
        """What plans depend on beside shapes: dtype and device."""
        ...

    def describe(self, kind: Sequence[Any]) -> str:
        """What times depend on beside the processor: framework, dtype, device, threads."""
        ...

    def check(self, arrays: Sequence[Any], names: Sequence[str]) -> None:
        """Check that all arrays have one floating or complex dtype and one device.

        Raises:
            TypeError: for integer dtypes, or two dtypes.
            ValueError: for two devices.
        """
        ...

    def check_positions(self, array: Any, name: str, below: int) -> None:
        """Check a vector of positions as far as its values are known.

        Raises:
            TypeError: if its dtype is no integer that the framework indexes with.
            ValueError: if an entry is negative or not below `below`.
        """
        ...

    def default_reference(self) -> Any:
        """The reference of a network without operands: double precision."""
        ...

    def is_complex(self, array: Any) -> bool:
        """Whether the array is complex."""
        ...

    def conj(self, array: Any) -> Any:
        """The complex conjugate."""
        ...

    def copy(self, array: Any, *, channels_last: bool = False) -> Any:
        """The array as one of its own, in row-major order, or in that of its kind that torch calls channels_last."""
        ...

    def owned(self, array: Any, *others: Any, channels_last: bool = False) -> Any:
        """The array in that order if it lies in no memory of the others', else a copy."""
        ...

    def settled(self, array: Any, *, channels_last: bool = False) -> Any:
        """An array that lies in memory of its own as one that may be written to and viewed, copied where needed."""
        ...

    def formatted(self, ready: Any, spec: ConvSpec) -> Callable[..., Any]:
        """A plan's function of arrays whose results have the order of axes of the framework's own convolution.

        Args:
            ready: the plan with the backend's functions, a `lensor.runtime.Runnable`.
            spec: the convolution that the plan computes, or a derivative of which.
        """
        ...

    def widened(self, run: Callable[..., Any], one_sum: Step | None) -> Callable[..., Any]:
        """A function of arrays that computes in float32 what is given in float16, and returns float16.

        Args:
            run: the function.
            one_sum: the only step that computes, which the framework may add up in float32 by itself, if it is one.
        """
        ...

    def differentiable(
        self,
        run: Callable[..., Any],
        derivative: Callable[[str, int, Sequence[Any], Any], Any],
        needs: Sequence[Sequence[int]],
    ) -> Callable[..., Any]:
        """A function of arrays whose derivatives, where the framework records any, are given.

        Args:
            run: the function.
            derivative: `derivative(kind, place, arrays, direction)`, its VJP ("vjp") or JVP ("jvp") with respect to the
                array at a place.
            needs: for each place the places of the arrays that this derivative needs; the others may be None.
        """
        ...

    def can_run(self, steps: Sequence[Step], kind: Sequence[Any]) -> bool:
        """Whether the framework has all the steps for this dtype."""
        ...

    def itemsize(self, kind: Sequence[Any]) -> int:
        """Bytes of one entry."""
        ...

    def spread(self, count: int, below: int, kind: Sequence[Any]) -> Any:
        """Positions from 0 to `below` − 1 at equal distances, for timing."""
        ...

    def random(self, shape: Sequence[int], kind: Sequence[Any]) -> Any:
        """An array of random entries, for timing."""
        ...

    def placeholder(self, shape: Sequence[int], dtype: Any, device: Any) -> Any:
        """An array that tells shape, dtype and device, and takes no memory."""
        ...

    def synchronize(self) -> None:
        """Wait until everything is computed."""
        ...

    def is_traced(self, array: Any) -> bool:
        """Whether nothing can be timed on the array: it is being traced, compiled or batched, or has no memory."""
        ...
