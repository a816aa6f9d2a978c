"""The hyper-parameters of a convolution, normalised once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from lensor.cache import Cache, frozen
from lensor.choices import PaddingMode
from lensor.pattern import IndexPattern, as_integer, as_padding_mode, as_positive

Sides = tuple[int, int]


@dataclass(frozen=True, slots=True, init=False, repr=False)
class ConvSpec:
    """The hyper-parameters of a convolution or transposed convolution in any number of spatial dimensions.

    The arguments follow torch. `input_size` determines the number of spatial dimensions: an int means one dimension,
    `()` a linear layer. Each other size is one int, or one int per dimension. All sizes are stored as tuples, the
    padding as one (left, right) pair per dimension.

    Args:
        in_channels: number of input channels, over all groups.
        out_channels: number of output channels, over all groups.
        input_size: spatial size of the input.
        kernel_size: spatial size of the kernel.
        stride: step between output positions.
        padding: an int, one int or one (left, right) pair per dimension, `"valid"` or `"same"`.
        dilation: step between kernel positions.
        groups: number of channel groups; must divide `in_channels` and `out_channels`.
        padding_mode: `"zeros"`, `"circular"`, `"reflect"` or `"replicate"`.
        bias: whether the convolution adds a bias.
        transposed: whether the convolution is transposed (zero padding only).
        output_padding: number of positions added to the output of a transposed convolution.

    Example:
        >>> import lensor
        >>> spec = lensor.ConvSpec(4, 8, (28, 28), 3, stride=2, padding=1, groups=2)
        >>> spec.output_size, spec.weight_shape, spec.kind
        ((14, 14), (8, 2, 3, 3), 'general')
        >>> spec
        ConvSpec(4, 8, (28, 28), 3, stride=2, padding=1, groups=2)

    Raises:
        TypeError: for a size that is not an integer, or a flag that is not a bool.
        ValueError: for hyper-parameters that torch also rejects: a size that is not positive, a tuple whose length
            differs from the number of spatial dimensions, groups that do not divide the channels, negative padding, a
            kernel larger than the padded input, `"same"` with a stride, reflect or circular padding that is too large,
            `output_padding` out of range, or a transposed convolution with `"same"`, `"valid"` or a padding mode.
    """

    in_channels: int
    out_channels: int
    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[Sides, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: PaddingMode
    bias: bool
    transposed: bool
    output_padding: tuple[int, ...]
    _patterns: tuple[IndexPattern, ...] = field(init=False, compare=False)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: int | Sequence[int],
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int | Sequence[int]] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
        bias: bool = False,
        transposed: bool = False,
        output_padding: int | Sequence[int] = 0,
    ) -> None:
        put = object.__setattr__
        put(self, "in_channels", as_positive(in_channels, "in_channels"))
        put(self, "out_channels", as_positive(out_channels, "out_channels"))
        put(self, "groups", as_positive(groups, "groups"))
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % self.groups:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a multiple of groups={self.groups}")
        put(self, "bias", _as_flag(bias, "bias"))
        put(self, "transposed", _as_flag(transposed, "transposed"))
        put(self, "padding_mode", as_padding_mode(padding_mode))
        if self.transposed and self.padding_mode != "zeros":
            raise ValueError(f"padding_mode is {padding_mode!r}, expected 'zeros' for a transposed convolution")
        sizes: tuple[Any, ...] = tuple(input_size) if _is_sequence(input_size) else (input_size,)
        put(self, "input_size", _each("input_size", input_size, len(sizes), as_positive))
        if not self.input_size and not _is_sequence(kernel_size):
            raise ValueError(f"kernel_size is {kernel_size!r}, expected () for input_size=(), a linear layer")
        put(self, "kernel_size", _each("kernel_size", kernel_size, self.ndim, as_positive))
        put(self, "stride", _each("stride", stride, self.ndim, as_positive))
        put(self, "dilation", _each("dilation", dilation, self.ndim, as_positive))
        put(self, "padding", self._as_padding(padding))
        put(self, "output_padding", _each("output_padding", output_padding, self.ndim, _as_natural))
        self._check_output_padding()
        make = self._transposed_pattern if self.transposed else self._pattern
        put(self, "_patterns", tuple(make(d) for d in range(self.ndim)))

    def _as_padding(self, padding: Any) -> tuple[Sides, ...]:
        """Convert the padding to one (left, right) pair per dimension."""
        if isinstance(padding, str):
            return self._named_padding(padding)
        if not _is_sequence(padding):
            return (_both(_as_natural(padding, "padding")),) * self.ndim
        if len(padding) != self.ndim:
            hint = ": write the sides of the only dimension as ((left, right),)" if self.ndim == 1 else ""
            raise ValueError(f"padding is {padding!r}, {_expected(self.ndim)}{hint}")
        sides: list[Sides] = []
        for d, entry in enumerate(padding):
            if not _is_sequence(entry):
                sides.append(_both(_as_natural(entry, f"padding[{d}]")))
            elif len(entry) == 2:
                sides.append((_as_natural(entry[0], f"padding[{d}][0]"), _as_natural(entry[1], f"padding[{d}][1]")))
            else:
                raise ValueError(f"padding[{d}] is {entry!r}, expected an integer or (left, right)")
        return tuple(sides)

    def _named_padding(self, name: str) -> tuple[Sides, ...]:
        """`"valid"` adds no padding; `"same"` adds D(K−1) in total, with the smaller half on the left."""
        if name not in ("same", "valid"):
            raise ValueError(f"padding is {name!r}, expected integers, 'same' or 'valid'")
        if self.transposed:
            raise ValueError(f"padding is {name!r}, expected ints or pairs of ints for a transposed convolution")
        if name == "valid":
            return ((0, 0),) * self.ndim
        if any(stride != 1 for stride in self.stride):
            raise ValueError(f"padding is 'same' with stride={self.stride}, expected stride 1")
        totals = [dilation * (size - 1) for dilation, size in zip(self.dilation, self.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)

    def _check_output_padding(self) -> None:
        if not self.transposed and any(self.output_padding):
            raise ValueError(f"output_padding is {self.output_padding}, expected 0 unless transposed=True")
        for extra, stride, dilation in zip(self.output_padding, self.stride, self.dilation, strict=True):
            if extra >= max(stride, dilation):
                raise ValueError(
                    f"output_padding is {self.output_padding}, expected less than stride={self.stride} or"
                    f" dilation={self.dilation} in every dimension"
                )

    def _pattern(self, d: int) -> IndexPattern:
        span = self.dilation[d] * (self.kernel_size[d] - 1) + 1
        padded = self.input_size[d] + sum(self.padding[d])
        if span > padded:
            raise ValueError(
                f"kernel_size={self.kernel_size} with dilation={self.dilation[d]} spans {span} positions in spatial"
                f" dimension {d}, expected at most {padded}, the size of the padded input"
                f" (input_size={self.input_size}, padding={self.padding[d]})"
            )
        try:
            return IndexPattern(
                self.input_size[d],
                self.kernel_size[d],
                stride=self.stride[d],
                padding=self.padding[d],
                dilation=self.dilation[d],
                padding_mode=self.padding_mode,
            )
        except ValueError as error:
            raise ValueError(f"{error} in spatial dimension {d}") from None

    def _transposed_pattern(self, d: int) -> IndexPattern:
        positions, kernel, stride, dilation = self.input_size[d], self.kernel_size[d], self.stride[d], self.dilation[d]
        size = (positions - 1) * stride - sum(self.padding[d]) + dilation * (kernel - 1) + self.output_padding[d] + 1
        if size < 1:
            raise ValueError(
                f"the output size of the transposed convolution is {size} in spatial dimension {d}, expected at least"
                f" 1: input_size={self.input_size}, kernel_size={self.kernel_size}, stride={self.stride},"
                f" padding={self.padding}, dilation={self.dilation}, output_padding={self.output_padding}"
            )
        return IndexPattern(
            size, kernel, stride=stride, padding=self.padding[d], dilation=dilation, output_size=positions
        )

    # ------------------------------------------------------------------------------------------------- properties
    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return len(self.input_size)

    @property
    def patterns(self) -> tuple[IndexPattern, ...]:
        """One index pattern per spatial dimension.

        For a transposed convolution, I is its output size, and O is set to its input size.

        Example:
            >>> import lensor
            >>> lensor.ConvSpec(1, 1, (5, 7), 3, stride=(1, 2)).patterns
            (IndexPattern(5, 3), IndexPattern(7, 3, stride=2))
        """
        return self._patterns

    @property
    def output_size(self) -> tuple[int, ...]:
        """Spatial size of the output.

        1 + ⌊(I + P_left + P_right − D(K−1) − 1)/S⌋; for a transposed convolution
        (I−1)·S − P_left − P_right + D(K−1) + output_padding + 1.

        Example:
            >>> import lensor
            >>> lensor.ConvSpec(1, 1, (5, 7), 3, stride=2).output_size
            (2, 3)
            >>> lensor.ConvSpec(1, 1, (5, 7), 3, stride=2, transposed=True).output_size
            (11, 15)
        """
        if self.transposed:
            return tuple(pattern.input_size for pattern in self._patterns)
        return tuple(pattern.output_size for pattern in self._patterns)

    @property
    def kind(self) -> str:
        """`"dense"`, `"down-sampling"`, `"mixed-dense"` or `"general"`; only a label.

        "dense" means that all patterns are dense, "down-sampling" that all are dense or down-sampling, "mixed-dense"
        that only some of them are, and "general" that none is.

        Example:
            >>> import lensor
            >>> [lensor.ConvSpec(1, 1, (6, 6), 2, stride=stride).kind for stride in (2, (2, 1), 1, 3)]
            ['dense', 'mixed-dense', 'general', 'down-sampling']
        """
        special = [pattern.kind for pattern in self._patterns if pattern.kind != "general"]
        if len(special) < self.ndim:
            return "mixed-dense" if special else "general"
        return "down-sampling" if "down-sampling" in special else "dense"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`[c_out, c_in/groups, *kernel_size]`, or `[c_in, c_out/groups, *kernel_size]` if transposed, as in torch.

        Example:
            >>> import lensor
            >>> lensor.ConvSpec(4, 8, (9, 9), 3, groups=2).weight_shape
            (8, 2, 3, 3)
            >>> lensor.ConvSpec(4, 8, (9, 9), 3, groups=2, transposed=True).weight_shape
            (4, 4, 3, 3)
        """
        first, second = self.out_channels, self.in_channels
        if self.transposed:
            first, second = second, first
        return (first, second // self.groups, *self.kernel_size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """`[c_in, *input_size]`."""
        return (self.in_channels, *self.input_size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """`[c_out, *output_size]`."""
        return (self.out_channels, *self.output_size)

    # ------------------------------------------------------------------------------------------------- from torch
    @classmethod
    def from_module(cls, module: Any, input_size: int | Sequence[int] = ()) -> ConvSpec:
        """Create the spec of a torch convolution, transposed convolution or linear layer, or of a subclass instance.

        Args:
            module: `torch.nn.Conv1d` to `Conv3d`, `ConvTranspose1d` to `ConvTranspose3d`, or `Linear`.
            input_size: spatial size of the module's input; `()` for a linear layer.

        Example:
            >>> import lensor, torch
            >>> lensor.ConvSpec.from_module(torch.nn.Conv2d(4, 8, 3, stride=2, padding="valid"), input_size=(9, 9))
            ConvSpec(4, 8, (9, 9), 3, stride=2, bias=True)
            >>> lensor.ConvSpec.from_module(torch.nn.Linear(4, 8, bias=False))
            ConvSpec(4, 8, (), ())

        Raises:
            TypeError: for any other module.
            ValueError: if `input_size` has the wrong number of dimensions, or if a lazy module has not been initialised
                yet.
        """
        # Compare class names to avoid importing torch.
        names = {base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch.nn.modules.")}
        if not names & {"_ConvNd", "Linear"}:
            raise TypeError(
                f"module has type {type(module).__module__}.{type(module).__qualname__}, expected a torch.nn.Conv1d to"
                " Conv3d, ConvTranspose1d to ConvTranspose3d or Linear"
            )
        sizes: Any = tuple(input_size) if _is_sequence(input_size) else (input_size,)
        ndim = len(module.kernel_size) if "_ConvNd" in names else 0
        if len(sizes) != ndim:
            raise ValueError(
                f"input_size is {sizes} with {len(sizes)} entries, expected {ndim}, one per spatial dimension of"
                f" {type(module).__name__}"
            )
        channels = ("in_channels", "out_channels") if "_ConvNd" in names else ("in_features", "out_features")
        if getattr(module, channels[0]) == 0 and any(
            base.__name__ == "LazyModuleMixin" for base in type(module).__mro__
        ):
            raise ValueError(
                f"module is a {type(module).__name__} whose {channels[0]} is not known yet, expected an initialised"
                " module: call it on an input first"
            )
        shape = (getattr(module, channels[0]), getattr(module, channels[1]), sizes)
        bias = module.bias is not None
        if "_ConvNd" not in names:
            return cls(*shape, (), bias=bias)
        return cls(
            *shape,
            module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            padding_mode=module.padding_mode,
            bias=bias,
            transposed=module.transposed,
            output_padding=module.output_padding,
        )

    def __repr__(self) -> str:
        parts = [f"{self.in_channels}", f"{self.out_channels}", f"{self.input_size}", f"{_short(self.kernel_size)}"]
        padding = _short(tuple(left if left == right else (left, right) for left, right in self.padding))
        short = {"stride": _short(self.stride), "padding": padding, "dilation": _short(self.dilation)}
        short |= {"groups": self.groups, "padding_mode": self.padding_mode, "bias": self.bias}
        short |= {"transposed": self.transposed, "output_padding": _short(self.output_padding)}
        defaults = {"stride": 1, "dilation": 1, "groups": 1, "padding_mode": "zeros"}
        parts += [f"{name}={value!r}" for name, value in short.items() if value not in (defaults.get(name, 0), ())]
        return f"ConvSpec({', '.join(parts)})"


def _both(side: int) -> Sides:
    return side, side


def _short(sizes: tuple) -> Any:
    """Abbreviate a tuple of equal ints to one int."""
    return sizes[0] if sizes and isinstance(sizes[0], int) and len(set(sizes)) == 1 else sizes


def _is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _as_flag(value: Any, name: str) -> bool:
    # NumPy bools are also accepted; 0 and 1 are not.
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, expected a bool")
    return bool(value)


def _as_natural(value: Any, name: str) -> int:
    number = as_integer(value, name)
    if number < 0:
        raise ValueError(f"{name} is {number}, expected an integer that is not negative")
    return number


def _each(name: str, value: Any, ndim: int, check: Callable[[Any, str], int]) -> tuple[int, ...]:
    """Check a size and return one entry per dimension."""
    if not _is_sequence(value):
        return (check(value, name),) * ndim
    if len(value) != ndim:
        raise ValueError(f"{name} is {tuple(value)}, {_expected(ndim)}")
    return tuple(check(entry, f"{name}[{d}]") for d, entry in enumerate(value))


def _expected(ndim: int) -> str:
    return f"expected an integer or {ndim} entr{'y' if ndim == 1 else 'ies'}, one per spatial dimension"


_specs = Cache(4096)


def known_spec(*arguments: Any, **options: Any) -> ConvSpec:
    """`ConvSpec` with these arguments; the one of an earlier call with equal arguments, if there was one.

    Example:
        >>> known_spec(4, 8, [28, 28], 3) is known_spec(4, 8, (28, 28), 3)
        True
    """
    key = frozen(arguments), *((name, frozen(option)) for name, option in options.items())
    return _specs.get_or_make(key, lambda: ConvSpec(*arguments, **options))
