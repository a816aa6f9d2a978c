"""The convolutions of a model, and CSV tables that list them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from lensor.inspect.errors import CommandError
from lensor.inspect.text import printable, write_rows
from lensor.pattern import as_padding_mode
from lensor.spec import ConvSpec


@dataclass(frozen=True)
class Layer:
    """A convolution of a model, with its hyper-parameters and input size.

    Args:
        model: name of the model.
        name: path of the first module with this convolution.
        spec: hyper-parameters, input size and bias. Convolutions with the same specification count as one.
        count: number of times that the model runs the convolution for one input.
    """

    model: str
    name: str
    spec: ConvSpec
    count: int

    def __post_init__(self) -> None:
        for name in ("model", "name"):  # a user's names may contain anything
            object.__setattr__(self, name, printable(getattr(self, name)))

    @property
    def label(self) -> str:
        """The model and the convolution in a few characters, as in `resnet18 64→128 3×3 s2 @32²`."""
        return f"{self.model} {label(self.spec)}"

    @property
    def kind(self) -> str:
        """The kind of the convolution, including whether it is depthwise."""
        return f"{self.spec.kind}, depthwise" if is_depthwise(self.spec) else self.spec.kind


def name_of(layer: Layer) -> tuple[str, str]:
    """The name of the module, and a short text for the convolution.

    Example:
        >>> import lensor
        >>> from lensor.inspect.layers import Layer, name_of
        >>> name_of(Layer("net", "", lensor.ConvSpec(4, 8, (9,), 3, transposed=True), 1))
        ('(the model)', '4→8 3 @9 transposed')
    """
    return layer.name or "(the model)", label(layer.spec) + (" transposed" if layer.spec.transposed else "")


def is_depthwise(spec: ConvSpec) -> bool:
    """Whether the convolution has one input channel per group."""
    return spec.groups == spec.in_channels > 1


def label(spec: ConvSpec) -> str:
    """A short text for a convolution.

    Example:
        >>> import lensor
        >>> from lensor.inspect.layers import label
        >>> label(lensor.ConvSpec(64, 128, (32, 32), 3, stride=2, padding=1))
        '64→128 3×3 s2 @32²'
    """
    grouped = f"/{spec.groups}" if spec.groups > 1 else ""
    parts = [f"{spec.in_channels}→{spec.out_channels}{grouped}", "×".join(map(str, spec.kernel_size))]
    if set(spec.stride) != {1}:
        parts.append("s" + "×".join(map(str, dict.fromkeys(spec.stride))))
    if set(spec.dilation) != {1}:
        parts.append("d" + "×".join(map(str, dict.fromkeys(spec.dilation))))
    sizes = spec.input_size
    square = len(set(sizes)) == 1 and len(sizes) == 2
    if spec.padding_mode != "zeros":
        parts.append(spec.padding_mode)
    return " ".join([*parts, f"@{sizes[0]}²" if square else "@" + "×".join(map(str, sizes))])


def without_bias(spec: ConvSpec) -> ConvSpec:
    """The same convolution without a bias.

    Example:
        >>> import lensor
        >>> from lensor.inspect.layers import without_bias
        >>> without_bias(lensor.ConvSpec(1, 2, 9, 3, bias=True))
        ConvSpec(1, 2, (9,), 3)
    """
    return ConvSpec(
        spec.in_channels,
        spec.out_channels,
        spec.input_size,
        spec.kernel_size,
        spec.stride,
        spec.padding,
        spec.dilation,
        spec.groups,
        spec.padding_mode,
        False,
        spec.transposed,
        spec.output_padding,
    )


def census(layers: Iterable[Layer]) -> dict[str, tuple[int, int]]:
    """The total number of convolutions, and the number of distinct ones, for each kind that occurs.

    Example:
        >>> import lensor
        >>> from lensor.inspect.layers import Layer, census
        >>> spec = lensor.ConvSpec(4, 8, (9, 9), 3)
        >>> census([Layer("net", "conv1", spec, 2), Layer("net", "conv2", lensor.ConvSpec(4, 8, (7, 7), 3), 1)])
        {'general': (3, 2)}
    """
    total: Counter[str] = Counter()
    unique: Counter[str] = Counter()
    for layer in layers:
        total[layer.spec.kind] += layer.count
        unique[layer.spec.kind] += 1
    return {kind: (total[kind], unique[kind]) for kind in KINDS if unique[kind]}


KINDS = ("general", "mixed-dense", "dense", "down-sampling")


# ---------------------------------------------------------------------------------------------------------------- CSV
SPEC_COLUMNS = (
    *("kind", "in_channels", "out_channels", "input_size", "output_size", "kernel_size", "stride", "padding"),
    *("dilation", "groups", "bias", "padding_mode", "transposed", "output_padding"),
)
"""The columns that describe a specification."""

COLUMNS = ("net", "input_shape", "name", "count", *SPEC_COLUMNS)
"""The columns of a table of convolutions."""


def format_sizes(sizes: Sequence[int | Sequence[int]]) -> str:
    """Format sizes as text: `3x224x224`, and uneven padding as `0+1x0+1`.

    Example:
        >>> from lensor.inspect.layers import format_sizes, parse_sizes
        >>> format_sizes((3, 224, 224)), format_sizes(((1, 1), (0, 2)))
        ('3x224x224', '1x0+2')
        >>> parse_sizes("3x224x224")
        (3, 224, 224)
    """
    sides = [(size, size) if isinstance(size, int) else (size[0], size[1]) for size in sizes]
    return "x".join(str(left) if left == right else f"{left}+{right}" for left, right in sides)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Parse sizes that are separated by `x`, `×` or `,`.

    Raises:
        CommandError: for anything else.
    """
    parts = re.split("[x×]" if "," not in text else ",", text.strip())
    if not all(part.strip().isdecimal() for part in parts):
        raise CommandError(f"{text!r} is not a shape, expected sizes such as 3x224x224")
    return tuple(map(int, parts))


def _parse_padding(text: str) -> tuple[tuple[int, int], ...]:
    if not re.fullmatch(r"-?\d+(\+-?\d+)?(x-?\d+(\+-?\d+)?)*", text, re.ASCII):
        raise ValueError(f"padding is {text!r}, expected numbers such as 1x0+2")
    sides = [part.split("+") for part in text.split("x")]
    return tuple((int(pair[0]), int(pair[-1])) for pair in sides)


def integer(row: Mapping[str, str], name: str) -> int:
    """Parse the integer in a column of a row.

    Raises:
        ValueError: for anything else; the message names the column.
    """
    try:
        return int(row[name])
    except ValueError:
        raise ValueError(f"{name} is {row[name]!r}, expected an integer") from None


def spec_record(spec: ConvSpec) -> dict[str, object]:
    """A specification as columns of a table."""
    return {
        "kind": spec.kind,
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "input_size": format_sizes(spec.input_size),
        "output_size": format_sizes(spec.output_size),
        "kernel_size": format_sizes(spec.kernel_size),
        "stride": format_sizes(spec.stride),
        "padding": format_sizes(spec.padding),
        "dilation": format_sizes(spec.dilation),
        "groups": spec.groups,
        "bias": int(spec.bias),
        "padding_mode": spec.padding_mode,
        "transposed": int(spec.transposed),
        "output_padding": format_sizes(spec.output_padding),
    }


def spec_of(row: dict[str, str]) -> ConvSpec:
    """Parse the specification in a row of a table.

    Raises:
        KeyError, ValueError: for missing or invalid columns.
    """
    spec = ConvSpec(
        integer(row, "in_channels"),
        integer(row, "out_channels"),
        parse_sizes(row["input_size"]),
        parse_sizes(row["kernel_size"]),
        parse_sizes(row["stride"]),
        _parse_padding(row["padding"]),
        parse_sizes(row["dilation"]),
        integer(row, "groups"),
        as_padding_mode(row["padding_mode"]),
        row["bias"] == "1",
        row["transposed"] == "1",
        parse_sizes(row["output_padding"]),
    )
    for name, found in (("kind", spec.kind), ("output_size", format_sizes(spec.output_size))):
        if row[name] != found:
            raise ValueError(f"{name} is {row[name]}, but the other columns imply {found}")
    return spec


def write_layers(file: IO[str], layers: Iterable[Layer], input_shape: str) -> None:
    """Write convolutions as rows of CSV, without a header."""
    write_rows(
        file,
        ((layer.model, input_shape, layer.name, layer.count, *spec_record(layer.spec).values()) for layer in layers),
    )
