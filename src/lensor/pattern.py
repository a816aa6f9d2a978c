"""The index pattern: which input position each (output position, kernel position) pair of a convolution reads.

Notation: Π(I,K,S,P,D)[i,o,k] = [i = k·D + o·S − P], with input size I, output size O, kernel size K, stride S, left
padding P and dilation D. At a position outside [0, I), the pattern reads zero (`padding_mode="zeros"`) or the value
that the padding mode defines.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from lensor.affine import Line, Piece, Reading, Reads, Steps, Table, affine, after, progressions, steps_of
from lensor.cache import Cache
from lensor.choices import PaddingMode, words
from lensor.errors import require_type

PADDING_MODES = words(PaddingMode)

_kept_reads = Cache(maxsize=256, max_bytes=1 << 24)
_fitted = Cache(maxsize=4096)


def as_integer(value: Any, name: str) -> int:
    """Convert an integer to an int; for any other value, including bools, raise a TypeError that names the argument."""
    if type(value) is int:
        return value
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, expected an integer")


def as_positive(value: Any, name: str) -> int:
    """Convert `value` to an int and check that it is at least 1."""
    number = as_integer(value, name)
    if number < 1:
        raise ValueError(f"{name} is {number}, expected a positive integer")
    return number


def as_padding_mode(value: Any) -> PaddingMode:
    """Return `value`; raise ValueError unless it is a padding mode of torch."""
    if value not in PADDING_MODES:
        expected = ", ".join(map(repr, PADDING_MODES))
        raise ValueError(f"padding_mode is {value!r}, expected one of {expected}")
    return value


def _as_legs(value: Any) -> tuple[int, ...]:
    """Convert a sequence of different legs of a pattern to a sorted tuple."""
    require_type(value, "legs", Sequence)
    legs = tuple(sorted(as_integer(leg, "a leg") for leg in value))
    if not {*legs} <= {0, 1, 2} or len({*legs}) < len(legs):
        raise ValueError(f"legs is {value!r}, expected different legs out of 0 (i), 1 (o) and 2 (k)")
    return legs


@dataclass(frozen=True, slots=True, init=False, repr=False)
class IndexPattern:
    """The index pattern of one spatial dimension: Π[i,o,k] = 1 iff output o reads input i through kernel position k.

    Args:
        input_size: number of input positions I.
        kernel_size: number of kernel positions K.
        stride: step S between output positions.
        padding: padding on both sides, or a (left, right) pair; negative padding crops.
        dilation: step D between kernel positions.
        padding_mode: `"zeros"`, `"circular"`, `"reflect"` or `"replicate"`, as in torch.
        output_size: number of output positions O; None for 1 + ⌊(I + P_left + P_right − D(K−1) − 1)/S⌋. With an
            explicit O, reads outside the padded input give zero (zeros mode only).

    Example:
        >>> import lensor
        >>> pi = lensor.IndexPattern(5, 3, stride=2, padding=1)
        >>> pi.output_size, pi.kind, pi.nnz
        (3, 'general', 7)
        >>> pi.reads()
        array([[-1,  0,  1],
               [ 1,  2,  3],
               [ 3,  4, -1]])
        >>> pi.materialize().shape  # [input_size, output_size, kernel_size]
        (5, 3, 3)

    Raises:
        TypeError: for a size that is not an integer.
        ValueError: for a size that is not positive, a kernel larger than the padded input, reflect padding that is not
            smaller than the input, circular padding larger than the input, circular padding that crops one side and
            wraps the other (torch would wrap the cropped input), or, in modes other than zeros, an output size for
            which the pattern would read outside the padded input.
    """

    input_size: int
    kernel_size: int
    stride: int
    padding: tuple[int, int]
    dilation: int
    padding_mode: PaddingMode
    output_size: int

    def __init__(
        self,
        input_size: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | Sequence[int] = 0,
        dilation: int = 1,
        padding_mode: PaddingMode = "zeros",
        output_size: int | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "input_size", as_positive(input_size, "input_size"))
        put(self, "kernel_size", as_positive(kernel_size, "kernel_size"))
        put(self, "stride", as_positive(stride, "stride"))
        put(self, "padding", _as_sides(padding))
        put(self, "dilation", as_positive(dilation, "dilation"))
        put(self, "padding_mode", as_padding_mode(padding_mode))
        if output_size is None:
            put(self, "output_size", self._fitting_output_size())
        else:
            put(self, "output_size", as_positive(output_size, "output_size"))
        if self.padding_mode != "zeros":
            self._check_mode()

    def _fitting_output_size(self) -> int:
        """O = 1 + ⌊(I + P_left + P_right − D(K−1) − 1)/S⌋; raise ValueError if the kernel is too large."""
        padded, span = self.input_size + sum(self.padding), self.dilation * (self.kernel_size - 1) + 1
        if span > padded:
            raise ValueError(
                f"kernel_size={self.kernel_size} with dilation={self.dilation} spans {span} positions, expected at most"
                f" {padded}, the size of the padded input (input_size={self.input_size}, padding={self.padding})"
            )
        return 1 + (padded - span) // self.stride

    def _check_mode(self) -> None:
        (left, right), size, mode = self.padding, self.input_size, self.padding_mode
        if mode == "reflect" and max(left, right) >= size:
            raise ValueError(f"reflect padding is {self.padding}, expected less than input_size={size}")
        if mode == "circular" and max(left, right) > size:
            raise ValueError(f"circular padding is {self.padding}, expected at most input_size={size}")
        if mode == "circular" and min(left, right) < 0 < max(left, right):
            raise ValueError(
                f"circular padding is {self.padding}, which crops one side and wraps the other, expected both sides"
                " >= 0 or both <= 0"
            )
        if self._needed_right > right:
            raise ValueError(
                f"output_size={self.output_size} reads {self._needed_right - right} positions outside the padded input,"
                f" which padding_mode={mode!r} does not define, expected at most {max(0, self._fitting())} for"
                f" input_size={size}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding},"
                f" dilation={self.dilation}"
            )

    def _fitting(self) -> int:
        room = self.input_size + sum(self.padding) - self.dilation * (self.kernel_size - 1) - 1
        return 1 + room // self.stride

    # ------------------------------------------------------------------------------------------------- properties
    @property
    def _needed_right(self) -> int:
        """The right padding needed for the last read: (O−1)S + D(K−1) + 1 − I − P_left."""
        reach = (self.output_size - 1) * self.stride + self.dilation * (self.kernel_size - 1)
        return reach + 1 - self.input_size - self.padding[0]

    @property
    def _is_inside(self) -> bool:
        """Whether every (o, k) reads a position in [0, I), so v[o,k] ≡ 1 even in zeros mode."""
        return self.padding[0] <= 0 and self._needed_right <= 0

    @property
    def _determines_steps(self) -> bool:
        """Whether the reads around the first one inside the input determine stride and dilation; False if unclear.

        They do if its output position and its kernel position, unless there is only one, have another read.
        """
        if self.padding_mode != "zeros":
            return False
        left, stride, room = self.padding[0], self.stride, self.input_size
        at = max(0, -(-left // stride))  # the first output position whose first kernel position reads no left padding
        read = at * stride - left
        beside = self.kernel_size == 1 or read + self.dilation < room
        below = self.output_size == 1 or (at + 1 < self.output_size and read + stride < room)
        return at < self.output_size and read < room and beside and below

    @property
    def nnz(self) -> int:
        """Number of ones, Σ Π[i,o,k].

        Example:
            >>> import lensor
            >>> pi = lensor.IndexPattern(5, 3, stride=2, padding=1)
            >>> pi.nnz, int(pi.materialize().sum())
            (7, 7)
        """
        shorter = self if self.kernel_size <= self.output_size else self.swap()
        return int(shorter.counts().sum())

    @property
    def kind(self) -> str:
        """`"dense"` (K=S, P=0, D=1, I=O·S), `"down-sampling"` (S>K, P=0, D=1) or `"general"`; a label only.

        Example:
            >>> import lensor
            >>> tuple(lensor.IndexPattern(6, size, stride=2).kind for size in (2, 1, 3))
            ('dense', 'down-sampling', 'general')
        """
        if self.padding != (0, 0) or self.dilation != 1:
            return "general"
        if self.kernel_size == self.stride and self.output_size * self.stride == self.input_size:
            return "dense"
        return "down-sampling" if self.stride > self.kernel_size and self._is_inside else "general"

    @property
    def is_crop(self) -> bool:
        """Whether K=1: the pattern Π[i,o] = [i = o·S − P] only slices, pads, crops or spreads an axis."""
        return self.kernel_size == 1

    @property
    def is_selection(self) -> bool:
        """Deprecated: use `is_crop`.

        Example:
            >>> import lensor
            >>> lensor.IndexPattern(6, 1).is_crop  # instead of is_selection
            True
        """
        warnings.warn("IndexPattern.is_selection is deprecated: use is_crop", DeprecationWarning, stacklevel=2)
        return self.is_crop

    @property
    def is_identity(self) -> bool:
        """Whether Π[i,o,0] = δ[i,o]."""
        if self.kernel_size != 1 or self.output_size != self.input_size:
            return False
        if self.padding_mode == "zeros":
            return self.padding[0] == 0 and (self.stride == 1 or self.input_size == 1)
        return progressions(self.line()) == [(0, int(self.input_size > 1), self.input_size)]

    @property
    def reads_everywhere(self) -> bool:
        """Whether every (o, k) reads an input position: v[o,k] = Σ_i Π ≡ 1.

        Example:
            >>> import lensor
            >>> lensor.IndexPattern(6, 3).reads_everywhere, lensor.IndexPattern(6, 3, padding=1).reads_everywhere
            (True, False)
        """
        return self.padding_mode != "zeros" or self._is_inside

    @property
    def is_zero(self) -> bool:
        """Whether the pattern reads nothing: Π = 0.

        Example:
            >>> import lensor
            >>> lensor.IndexPattern(4, 1, padding=(3, 0), output_size=3).is_zero
            True
        """
        if self.padding_mode != "zeros":
            return False
        first = -self.padding[0]
        last = first + (self.output_size - 1) * self.stride + (self.kernel_size - 1) * self.dilation
        if first >= self.input_size or last < 0:
            return True
        if first >= 0 or last < self.input_size:
            return False
        return self.nnz == 0

    # ----------------------------------------------------------------------------------------------------- arrays
    def reads(self) -> np.ndarray:
        """The input position that each (o, k) reads, −1 for zero; a read-only int64 array [output_size, kernel_size].

        The position is k·D + o·S − P, mapped into the input by the padding mode.

        Example:
            >>> import lensor
            >>> lensor.IndexPattern(4, 3, padding=1).reads()
            array([[-1,  0,  1],
                   [ 0,  1,  2],
                   [ 1,  2,  3],
                   [ 2,  3, -1]])
            >>> lensor.IndexPattern(4, 3, padding=1, padding_mode="circular").reads()
            array([[3, 0, 1],
                   [0, 1, 2],
                   [1, 2, 3],
                   [2, 3, 0]])
        """
        return _kept_reads.get_or_make(self, self._make_reads)

    def _make_reads(self) -> np.ndarray:
        reads = self.reading().table()
        reads.flags.writeable = False
        return reads

    def reading(self) -> Reading:
        """A compact form of `reads`: k·D + o·S − P, followed by a piecewise linear map for the padding mode.

        Example:
            >>> import lensor
            >>> lensor.IndexPattern(4, 3, padding=1, padding_mode="replicate").reading().outer
            (Piece(start=-1, stop=0, slope=0, offset=0), Piece(start=0, stop=4, slope=1, offset=0), \
Piece(start=4, stop=5, slope=0, offset=3))
        """
        size, low = self.input_size, -self.padding[0]
        stop = low + (self.output_size - 1) * self.stride + (self.kernel_size - 1) * self.dilation + 1
        found: Sequence[Piece]
        if self.padding_mode == "zeros":
            found = affine(size, 1)
        elif self.padding_mode == "circular":
            periods = range(low // size, (stop - 1) // size + 1)
            found = [Piece(at * size, (at + 1) * size, 1, -at * size) for at in periods]
        elif self.padding_mode == "replicate":
            found = [Piece(low, 0, 0, 0), Piece(0, size, 1, 0), Piece(size, stop, 0, size - 1)]
        else:  # reflect at the first and the last position, at most once
            found = [Piece(low, 0, -1, 0), Piece(0, size, 1, 0), Piece(size, stop, -1, 2 * (size - 1))]
        cut = (Piece(max(piece.start, low), min(piece.stop, stop), *piece[2:]) for piece in found)
        outer = tuple(piece for piece in cut if piece.start < piece.stop)
        shape = (self.output_size, self.kernel_size)
        return Reading(affine(shape[0], self.stride), affine(shape[1], self.dilation, low), outer, shape)

    def line(self) -> Line:
        """The input position that each output position of a crop (K = 1) reads, as a piecewise linear map.

        Example:
            >>> import lensor
            >>> lensor.IndexPattern(4, 1, padding=(0, 2), padding_mode="reflect").line()
            (Piece(start=0, stop=4, slope=1, offset=0), Piece(start=4, stop=6, slope=-1, offset=6))

        Raises:
            ValueError: if the kernel size is not 1.
        """
        if self.kernel_size != 1:
            raise ValueError(f"kernel_size is {self.kernel_size}, expected 1 (one read per output position)")
        outer = self.reading().outer
        return after(outer, affine(self.output_size, self.stride, -self.padding[0]))

    def span(self) -> tuple[int, int]:
        """The start and length of the range of output positions at which a crop (K = 1) reads the input.

        Example:
            >>> import lensor
            >>> lensor.IndexPattern(4, 1, padding=(1, 2)).span()
            (1, 4)

        Raises:
            ValueError: if the kernel size is not 1.
        """
        if self.kernel_size == 1 and self.padding_mode == "zeros":
            left, stride = self.padding[0], self.stride
            low, high = max(0, -(-left // stride)), min(self.output_size - 1, (self.input_size - 1 + left) // stride)
            return (low, high - low + 1) if low <= high else (0, 0)
        line = self.line()
        return (line[0].start, line[-1].stop - line[0].start) if line else (0, 0)

    def columns(self) -> list[tuple[int, ...]]:
        """A key for each kernel position; equal iff two kernel positions read the same inputs at all outputs.

        Example:
            >>> import lensor
            >>> one, two = lensor.IndexPattern(6, 3), lensor.IndexPattern(6, 2, output_size=4)
            >>> [one.columns().index(key) for key in two.columns()]
            [0, 1]

        Raises:
            ValueError: if the pattern reads padding in a mode other than zeros.
        """
        if self.padding_mode != "zeros" and not self._is_inside:
            raise ValueError(f"padding_mode is {self.padding_mode!r}, expected 'zeros': call split_padding() first")
        found = []
        for k, (low, high) in enumerate(zip(*(limit.tolist() for limit in self._limits()), strict=True)):
            start = low * self.stride + k * self.dilation - self.padding[0]
            found.append(() if high < low else (low, high, start, self.stride * (high > low)))
        return found

    def materialize(self) -> np.ndarray:
        """Π as a new bool array [input_size, output_size, kernel_size].

        Example:
            >>> import lensor
            >>> lensor.IndexPattern(3, 2).materialize()[:, :, 1].astype(int)  # what kernel position 1 reads
            array([[0, 0],
                   [1, 0],
                   [0, 1]])
        """
        return self.summed((), np.dtype(bool))

    def summed(self, legs: Sequence[int], dtype: np.dtype | type = np.int64) -> np.ndarray:
        """Sum Π over some of its legs (0: i, 1: o, 2: k); the remaining legs stay in this order.

        This needs memory only for the result and a few vectors of reads, since Π is not materialized.

        Example:
            >>> import lensor
            >>> lensor.IndexPattern(3, 2).summed((1, 2))
            array([1, 2, 1])

        Raises:
            TypeError: if `legs` is not a sequence of integers.
            ValueError: if a leg is not 0, 1 or 2, or is repeated.
        """
        found: Any
        match _as_legs(legs):
            case (0, 1):
                found = self.counts()
            case (0, 2):
                found = self.swap().counts()
            case (1, 2):
                found = self._times_read()
            case (0, 1, 2):
                found = np.array(self.nnz)
            case (2,):
                return self.swap().summed((1,), dtype)
            case () if self.kernel_size > self.output_size:
                return self.swap().summed((), dtype).swapaxes(1, 2)
            case (0,) if self.kernel_size > self.output_size:
                return self.swap().summed((0,), dtype).T
            case kept:
                return self._by_kernel_position(kept, dtype)
        return found.astype(dtype)

    def _by_kernel_position(self, summed: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        """Compute Π, or its sum over i or o, one kernel position at a time."""
        sizes = [self.input_size, self.output_size, self.kernel_size]
        array = np.zeros([size for leg, size in enumerate(sizes) if leg not in summed], dtype)
        reading, outputs = self.reading(), np.arange(self.output_size)
        for k in range(self.kernel_size):
            reads = reading.at(outputs, np.array(k))
            valid = np.flatnonzero(reads >= 0)
            if summed == (0,):
                array[valid, k] = 1
            elif summed == (1,):
                array[:, k] = np.bincount(reads[valid], minlength=self.input_size)
            else:
                array[reads[valid], valid, k] = 1
        return array

    def _times_read(self) -> np.ndarray:
        """Σ_{o,k} Π, int64 [input_size]: the number of k ≡ (i+P)/g·(D/g)⁻¹ mod S/g with 0 ≤ i+P−kD ≤ (O−1)S."""
        padding, inner = self.split_padding()
        if padding is not None:
            found = np.zeros(self.input_size, np.int64)
            np.add.at(found, padding.reads()[:, 0], inner._times_read())
            return found
        g = gcd(self.stride, self.dilation)
        stride, dilation = self.stride // g, self.dilation // g
        places = np.arange(self.input_size, dtype=np.int64) + self.padding[0]
        low = np.maximum(0, -(((self.output_size - 1) * self.stride - places) // self.dilation))
        high = np.minimum(self.kernel_size - 1, places // self.dilation)
        residue = places // g % stride * pow(dilation, -1, stride) % stride
        first = low + (residue - low) % stride
        return np.where(places % g == 0, np.maximum(0, (high - first) // stride + 1), 0)

    def constant_sum(self, legs: Sequence[int]) -> int | None:
        """The value of the sum of Π over some of its legs (0: i, 1: o, 2: k) if the sum is constant, else None.

        The check uses vectors along the legs and does not compute the whole sum.

        Example:
            >>> import lensor
            >>> lensor.IndexPattern(6, 3).constant_sum((0,)), lensor.IndexPattern(6, 3).constant_sum((1,))
            (1, None)
            >>> lensor.IndexPattern(6, 3, padding=1, padding_mode="circular").constant_sum((1,))
            1

        Raises:
            TypeError: if `legs` is not a sequence of integers.
            ValueError: if a leg is not 0, 1 or 2, or is repeated.
        """
        match _as_legs(legs):
            case (0,):
                return 1 if self.reads_everywhere else None
            case (1,):
                return self._constant_over_outputs()
            case (2,):
                if self.padding_mode == "zeros" and self.kernel_size < self.input_size:
                    return None  # an output position does not read every input
                return self.swap()._constant_over_outputs()
            case ():
                return None
            case several:
                return _the_one(self.summed(several).reshape(-1))

    def _constant_over_outputs(self) -> int | None:
        """The value of m[i,k] = Σ_o Π if it is constant, else None."""
        if self.padding_mode == "zeros":  # m is 0 or 1
            if self.output_size < self.input_size:
                return None  # a kernel position does not read every input
            return 1 if (self.counts() == self.input_size).all() else None
        times, rest = divmod(self.output_size, self.input_size)
        if rest or not times:
            return None
        # In circular mode, the reads of all kernel positions are rotations of each other.
        for k in range(1 if self.padding_mode == "circular" else self.kernel_size):
            reads = self.reading().at(np.arange(self.output_size), np.array(k))
            if _the_one(np.bincount(reads, minlength=self.input_size)) is None:
                return None
        return times

    def counts(self) -> np.ndarray:
        """n[k] = Σ_{i,o} Π, int64 [kernel_size] (rule 17).

        In zeros mode, n[k] = max(0, min(O−1, ⌊(I−1+P−kD)/S⌋) − max(0, ⌈(P−kD)/S⌉) + 1); else n[k] = O.

        Example:
            >>> import lensor
            >>> pi = lensor.IndexPattern(5, 3, stride=2, padding=1)
            >>> pi.counts()
            array([2, 3, 2])
        """
        if self.padding_mode != "zeros":
            return np.full(self.kernel_size, self.output_size, np.int64)
        low, high = self._limits()
        return np.maximum(0, high - low + 1)

    def _limits(self) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last o that read inside the input, for each k; high < low if there is none (zeros mode)."""
        shift = self.padding[0] - np.arange(self.kernel_size, dtype=np.int64) * self.dilation
        low = np.maximum(0, -(-shift // self.stride))
        high = np.minimum(self.output_size - 1, (self.input_size - 1 + shift) // self.stride)
        return low, high

    # --------------------------------------------------------------------------------------------------- algebra
    def swap(self) -> IndexPattern:
        """Swap the kernel and output legs: Π(I,K,S,P,D)[i,o,k] = Π(I,O,D,P,S)[i,k,o], with O set to K (rule 4).

        Example:
            >>> import lensor
            >>> pi = lensor.IndexPattern(5, 3, stride=2, padding=1)
            >>> pi.swap()
            IndexPattern(5, 3, padding=1, dilation=2)
        """
        return self._replace(
            kernel_size=self.output_size,
            stride=self.dilation,
            dilation=self.stride,
            output_size=self.kernel_size,
        )

    def normalize(self) -> IndexPattern:
        """The same pattern in normal form: hyper-parameters without effect take fixed values (rules 7, 8).

        The right padding is (O−1)S + D(K−1) + 1 − I − P_left; D=1 if K=1; S=1 if O=1; the mode is zeros if all reads
        are inside the input; a pattern that reads nothing has S = D = 1 and P_left = −I.

        Example:
            >>> import lensor
            >>> lensor.IndexPattern(6, 1, stride=2, dilation=3).normalize()
            IndexPattern(6, 1, stride=2, padding=(0, -1))
        """
        mode = "zeros" if self._is_inside else self.padding_mode
        stride = 1 if self.output_size == 1 else self.stride
        dilation = 1 if self.kernel_size == 1 else self.dilation
        left = self.padding[0]
        if mode == "zeros" and self.is_zero:
            stride, dilation, left = 1, 1, -self.input_size
        right = (self.output_size - 1) * stride + dilation * (self.kernel_size - 1) + 1 - self.input_size - left
        if mode != "zeros":
            right = max(0, right)
        if (stride, left, right, dilation, mode) == (self.stride, *self.padding, self.dilation, self.padding_mode):
            return self
        return self._replace(stride=stride, padding=(left, right), dilation=dilation, padding_mode=mode)

    def compose(self, inner: IndexPattern) -> tuple[IndexPattern, IndexPattern] | None:
        """Merge two convolutions: Σ_j Π1[i,j,k]·Π2[j,o,l] = Σ_m Π12[i,o,m]·ΠK[m,l,k], or None (rule 23).

        Here Π1 is this pattern, Π2 is `inner`, Π12 = Π(I, D1(K1−1)+D2·S1(K2−1)+1, S1·S2, P1+S1·P2, 1) and
        ΠK[m,l,k] = [m = k·D1 + l·D2·S1]. The result is None unless Π2 reads only inside its input (v2 ≡ 1) and Π1 reads
        no padding in a mode other than zeros.

        Example:
            >>> import lensor
            >>> lensor.IndexPattern(9, 3).compose(lensor.IndexPattern(7, 3))
            (IndexPattern(9, 5), IndexPattern(5, 3))
            >>> lensor.IndexPattern(9, 3).compose(lensor.IndexPattern(7, 3, padding=1)) is None
            True

        Raises:
            TypeError: if `inner` is not an IndexPattern.
            ValueError: if the input size of `inner` differs from this pattern's output size.
        """
        require_type(inner, "inner", IndexPattern)
        if inner.input_size != self.output_size:
            raise ValueError(
                f"inner.input_size is {inner.input_size}, expected this pattern's output_size={self.output_size}"
            )
        if not inner._is_inside or not (self.padding_mode == "zeros" or self._is_inside):
            return None
        step = inner.dilation * self.stride
        kernel = self.dilation * (self.kernel_size - 1) + step * (inner.kernel_size - 1) + 1
        joint = IndexPattern(
            self.input_size,
            kernel,
            stride=self.stride * inner.stride,
            padding=(self.padding[0] + self.stride * inner.padding[0], self.padding[1]),
            output_size=inner.output_size,
        )
        kernels = IndexPattern(
            kernel, self.kernel_size, stride=step, dilation=self.dilation, output_size=inner.kernel_size
        )
        return joint.normalize(), kernels

    @classmethod
    def from_reads(cls, reads: np.ndarray | Reading, input_size: int) -> IndexPattern | None:
        """Find the zeros-mode pattern with exactly these reads; None if there is none.

        If the reads do not determine a step (no line contains two reads), a small step that fits is chosen.

        Args:
            reads: the input position that each (output position, kernel position) reads, −1 for none: an array, or a
                `Reading`, for which time and memory grow only with the longer leg.
            input_size: number of input positions.

        Example:
            >>> import lensor, numpy as np
            >>> lensor.IndexPattern.from_reads(np.array([[-1, 0], [1, 2], [3, 4]]), input_size=6)
            IndexPattern(6, 2, stride=2, padding=(1, -1))
        """
        table: Reads = Table(reads) if isinstance(reads, np.ndarray) else reads
        outputs, kernels = table.shape
        if not (runs := table.runs()) and runs is not None:
            return cls(input_size, kernels, padding=(outputs + kernels, 0), output_size=outputs)

        def pattern(steps: Steps) -> IndexPattern:
            return cls(input_size, kernels, steps.stride, (steps.left, 0), steps.dilation, output_size=outputs)

        steps = steps_of(table, input_size, lambda steps: pattern(steps).reading())
        return None if steps is None else pattern(steps).normalize()

    def fitted(self) -> IndexPattern | None:
        """The zeros-mode pattern with the same reads, or None; equal reads give the same pattern.

        Example:
            >>> import lensor
            >>> lensor.IndexPattern(6, 1, padding=(6, 0), padding_mode="circular", output_size=6).fitted()
            IndexPattern(6, 1)
        """
        if self._determines_steps:
            return self.normalize()
        found = _fitted.get_or_make(self, lambda: (IndexPattern.from_reads(self.reading(), self.input_size),))
        return found[0]

    def split_padding(self) -> tuple[IndexPattern | None, IndexPattern]:
        """Split off the padding: Π_mode[i,o,k] = Σ_j R[i,j]·Π(L,K,S,0,D)[j,o,k].

        R = Π_mode(I,1,1,(P_left,P_right),1) and L = I+P_left+P_right. In zeros mode, return (None, self).

        Example:
            >>> import lensor
            >>> padding, rest = lensor.IndexPattern(5, 3, padding=1, padding_mode="reflect").split_padding()
            >>> padding, rest
            (IndexPattern(5, 1, padding=1, padding_mode='reflect'), IndexPattern(7, 3))
        """
        if self.padding_mode == "zeros":
            return None, self
        padding = IndexPattern(self.input_size, 1, padding=self.padding, padding_mode=self.padding_mode)
        return padding, self._replace(input_size=padding.output_size, padding=(0, 0), padding_mode="zeros")

    def gcd_split(self) -> tuple[IndexPattern, IndexPattern] | None:
        """Factor out g = gcd(stride, dilation): Π[i,o,k] = Σ_j [i=a+gj]·Π'[j,o,k], or None (rule 11).

        Here a = (−P) mod g and Π' = Π(·, K, S/g, (P+a)/g, D/g), with the same O. The result is None if g=1, K=1 or O=1,
        if the pattern reads nothing, or if it reads padding in a mode other than zeros.

        Example:
            >>> import lensor
            >>> lensor.IndexPattern(9, 3, stride=2, dilation=2).gcd_split()
            (IndexPattern(9, 1, stride=2), IndexPattern(5, 3))
            >>> lensor.IndexPattern(9, 3, stride=2).gcd_split() is None
            True
        """
        g = gcd(self.stride, self.dilation)
        if g == 1 or self.kernel_size == 1 or self.output_size == 1 or self.is_zero:
            return None
        if self.padding_mode != "zeros" and not self._is_inside:
            return None
        left = self.padding[0]
        a = -left % g
        length = -(-(self.input_size - a) // g)
        every = IndexPattern(self.input_size, 1, stride=g, padding=(-a, 0), output_size=length)
        smaller = IndexPattern(
            length,
            self.kernel_size,
            stride=self.stride // g,
            padding=((left + a) // g, 0),
            dilation=self.dilation // g,
            output_size=self.output_size,
        )
        return every.normalize(), smaller.normalize()

    def _replace(self, **changes: Any) -> IndexPattern:
        fields = {name: getattr(self, name) for name in _FIELDS}
        return IndexPattern(**{**fields, **changes})

    # ------------------------------------------------------------------------------------------------------- text
    def __repr__(self) -> str:
        left, right = self.padding
        parts = [f"{self.input_size}", f"{self.kernel_size}"]
        if self.stride != 1:
            parts.append(f"stride={self.stride}")
        if self.padding != (0, 0):
            parts.append(f"padding={left if left == right else self.padding}")
        if self.dilation != 1:
            parts.append(f"dilation={self.dilation}")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode!r}")
        if self.dilation * (self.kernel_size - 1) + 1 > self.input_size + left + right or (
            self.output_size != self._fitting()
        ):
            parts.append(f"output_size={self.output_size}")
        return f"IndexPattern({', '.join(parts)})"

    def __str__(self) -> str:
        left, right = self.padding
        parts = [f"{self.input_size}→{self.output_size}", f"K{self.kernel_size}"]
        if self.stride != 1:
            parts.append(f"S{self.stride}")
        if self.padding != (0, 0):
            parts.append(f"P{left}" if left == right else f"P({left},{right})")
        if self.dilation != 1:
            parts.append(f"D{self.dilation}")
        if self.padding_mode != "zeros":
            parts.append(self.padding_mode)
        return f"Π({' '.join(parts)})"


_FIELDS = ("input_size", "kernel_size", "stride", "padding", "dilation", "padding_mode", "output_size")


def _the_one(vector: np.ndarray) -> int | None:
    """The value of all entries if they are equal and positive, else None."""
    value = int(vector[0])
    return value if value > 0 and bool((vector == value).all()) else None


def _as_sides(padding: Any) -> tuple[int, int]:
    """Convert the padding to a (left, right) pair."""
    if isinstance(padding, Sequence) and not isinstance(padding, str):
        if len(padding) != 2:
            raise ValueError(
                f"padding is {padding!r} with {len(padding)} entries, expected an integer or (left, right)"
            )
        return as_integer(padding[0], "padding[0]"), as_integer(padding[1], "padding[1]")
    side = as_integer(padding, "padding")
    return side, side
