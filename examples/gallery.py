"""The gallery: the paper's figures and every operation, drawn from actual networks by one command.

Every entry contains code, which this module evaluates; subscripts and flops are computed from the resulting network.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lensor
from lensor.draw import Drawing, draw
from lensor.errors import NetworkError
from lensor.network import AnyNetwork

SETUP = "spec = lensor.ConvSpec(4, 6, input_size=(9, 9), kernel_size=3, padding=1, groups=2)"
"""The convolution of all entries whose code does not define a different one."""

SIZES = {"n": 2, "v": 3, "m": 2, "w": 3}
"""Sizes for indices that a spec does not determine, used to compute flops."""


@dataclass(frozen=True)
class Entry:
    """A diagram.

    Args:
        name: name of its file.
        title: its title.
        code: code that evaluates to the network, or to a pair (before, after).
        shade: code that evaluates to a network to shade.
        cut: operands to cut out.
    """

    name: str
    title: str
    code: str
    shade: str | None = None
    cut: tuple[str, ...] = ()

    @property
    def call(self) -> str:
        """The code of the diagram."""
        options = f", shade=[{self.shade}]" * (self.shade is not None) + f", cut={list(self.cut)}" * bool(self.cut)
        return f"lensor.draw({self.code}{options})"


_PLAIN = "lensor.ConvSpec(4, 6, (9, 9), 3)"
_UNFOLDED = "lensor.ops.unfold(spec)"
_ONE = "lensor.ConvSpec(4, 6, (9,), 3)"

FIGURES = (
    Entry(
        "figure-1",
        "Figure 1: the KFC factor of an input, two unfolded inputs",
        f'lensor.ops.kfac_input_factor({_PLAIN}, approx="expand")',
        f"lensor.ops.unfold({_PLAIN})",
    ),
    Entry("figure-2", "Figure 2: a convolution in two dimensions with groups", "lensor.ops.conv(spec)"),
    Entry("figure-3a", "Figure 3: the weight Jacobian: the kernel is cut out", "lensor.ops.conv(spec)", cut=("W",)),
    Entry("figure-3b", "Figure 3: the weight Jacobian as a network", 'lensor.ops.conv(spec).jacobian("W")'),
    Entry("figure-4a", "Figure 4a: the weight VJP", 'lensor.ops.conv(spec).vjp("W")'),
    Entry("figure-4b", "Figure 4b: the input VJP, a transposed convolution", 'lensor.ops.conv(spec).vjp("X")'),
    Entry("figure-5a", "Figure 5a: KFAC-expand", 'lensor.ops.kfac_input_factor(spec, approx="expand")', _UNFOLDED),
    Entry("figure-5b", "Figure 5b: KFAC-reduce", 'lensor.ops.kfac_input_factor(spec, approx="reduce")', _UNFOLDED),
    Entry(
        "figure-6a",
        "Figure 6: a dense convolution becomes a reshape",
        "(net := lensor.ops.conv(lensor.ConvSpec(4, 6, (9,), 3, stride=3)), net.simplify())",
    ),
    Entry(
        "figure-6b",
        "Figure 6: a down-sampling convolution becomes a slice",
        "(net := lensor.ops.conv(lensor.ConvSpec(4, 6, (9,), 1, stride=2)), net.simplify())",
    ),
    Entry(
        "figure-6c",
        "Figure 6: KFAC-reduce needs no patches",
        f'(net := lensor.ops.kfac_input_factor({_ONE}, approx="reduce"), net.simplify())',
    ),
)
"""The paper's figures."""

_OPTIONS = {
    "kfac_input_factor": ', approx="expand"',
    "kfac_output_factor": ', approx="expand"',
    "ggn_mini_blocks": ', block="filter"',
}

OPERATIONS = tuple(
    Entry(
        name.replace("_", "-"),
        name,
        f"lensor.ops.{name}(spec{_OPTIONS.get(name, '')})",
        _UNFOLDED if name.startswith("kfac_input") else None,
    )
    for name in lensor.ops.__all__
)
"""Every operation."""

OTHERS = (
    Entry("cp-kernel", "A kernel in CP form", 'lensor.ops.conv(spec1).substitute("W", cp).simplify()'),
    Entry(
        "sampled",
        "A weight gradient from sampled positions",
        'lensor.ops.conv_weight_vjp(spec1).sample("i1", 0.25, stored=["X"])',
    ),
)
"""Other features of networks."""


def entries() -> tuple[Entry, ...]:
    """All entries."""
    return (*FIGURES, *OPERATIONS, *OTHERS)


def made(entry: Entry) -> tuple[AnyNetwork, ...]:
    """Evaluate the code of an entry and return its networks."""
    found = _evaluated(entry.code)
    return found if isinstance(found, tuple) else (found,)


def drawn(entry: Entry) -> Drawing:
    """Draw an entry."""
    nets = made(entry)
    shade = [] if entry.shade is None else [_evaluated(entry.shade)]
    return draw(nets[0] if len(nets) == 1 else nets, shade=shade, cut=entry.cut)


def _evaluated(code: str) -> Any:
    space = {
        "lensor": lensor,
        "spec": lensor.ConvSpec(4, 6, (9, 9), 3, padding=1, groups=2),
        "spec1": lensor.ConvSpec(4, 6, (9,), 3),
        "cp": lensor.contraction("o r, i r, k r -> o i k", "A", "B", "C", o=6, i=4, k=3, r=2),
    }
    return eval(code, space)


def flops(net: AnyNetwork) -> int | None:
    """The flops of the plan for two examples and three columns; None if a size is unknown."""
    sizes = {index: SIZES.get(index.rstrip("_"), 2) for index, size in net.sizes.items() if size is None}
    try:
        bound = net.bind(sizes)
        shapes = {
            name: tuple(math.prod(bound.sizes[index] or 1 for index in leg) for leg in _axes(bound, name))
            for name in bound.operand_names
        }
        return bound.plan(**shapes).flops
    except (NetworkError, ValueError):
        return None


def _axes(net: AnyNetwork, name: str) -> tuple[tuple[str, ...], ...]:
    legs = net.operand_legs[name]
    return legs[1:] if name in net.selections else legs


def write(folder: Path) -> Iterator[Path]:
    """Write every diagram as SVG to a folder, and write `gallery.md`, which shows all diagrams, next to the folder.

    Raises:
        OSError: if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = [
        "# Gallery",
        "",
        "Made by `python -m examples.gallery` from the objects themselves. Rounded boxes are tensors, hexagons are"
        " index patterns, dots are deltas or indices of more than two nodes, and black triangles are output legs that"
        " group indices. An arrow leads from a network to its simplified form. Shaded areas are unfolded inputs, and"
        " dashed parts are cut out. Flops are those of the plan for 2 examples and 3 columns. The diagrams show one"
        " convolution:",
        "",
        f"    {SETUP}",
    ]
    for heading, part in (("The paper's figures", FIGURES), ("Operations", OPERATIONS), ("More", OTHERS)):
        text += ["", f"## {heading}"]
        for entry in part:
            nets = made(entry)
            drawing = drawn(entry)
            yield drawing.save(folder / f"{entry.name}.svg")
            text += ["", f"### {entry.title}", "", f"![{entry.title}]({folder.name}/{entry.name}.svg)", ""]
            text += [f"    {entry.call}", ""]
            for net in nets:
                count = flops(net)
                cost = "" if count is None else f" ({count:,} flops)"
                text += [f"`{net.subscripts}`{cost}", ""]
            if count := drawing.crossings:
                text += [f"{count} crossing{'s' if count > 1 else ''}: the graph is not planar.", ""]
    page = folder.with_name("gallery.md")
    page.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    yield page


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the gallery to the folder that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.gallery",
        description="Draw the paper's figures and every operation, and write gallery.md, which shows them.",
    )
    parser.add_argument("folder", type=Path, help="folder for the diagrams; gallery.md is written next to it")
    for path in write(parser.parse_args(arguments).folder):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
