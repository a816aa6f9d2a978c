"""Diagrams of networks, sums, simplifications and plans, as SVG, PNG and TikZ.

In the paper's notation, tensors are rounded boxes, index patterns are hexagons, and indices are lines with their names.
Inputs are left of the patterns, kernels right of them, and each spatial dimension has a row.
An index shared by more than two nodes is a dot. An output leg is an open end, or a black triangle if it groups indices.
This package needs networkx, and matplotlib for PNG: `lensor[draw]`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensor.errors import NetworkError, require_choice
from lensor.network import AnyNetwork, Network, Pattern, Verbs
from lensor.network.text import pattern_names
from lensor.plan import Plan

if TYPE_CHECKING:
    from lensor.draw.shapes import Scene

FORMATS = (".svg", ".png", ".tex")
"""Supported file extensions of a saved drawing."""


@dataclass(frozen=True)
class Drawing:
    """A diagram; notebooks display it.

    Args:
        scene: the shapes and their positions.
        title: a description as text.

    Example:
        >>> import lensor
        >>> drawing = lensor.draw(lensor.ops.conv(lensor.ConvSpec(2, 4, (9, 9), 3)))
        >>> drawing.crossings, drawing.svg.startswith("<svg")
        (0, True)
    """

    scene: Scene
    title: str

    @property
    def svg(self) -> str:
        """An SVG document with colours for light and dark pages."""
        from lensor.draw.writers import svg

        return svg(self.scene, self.title)

    @property
    def tikz(self) -> str:
        """A TeX document that compiles on its own.

        Raises:
            ValueError: for a name with a character that TeX does not support.
        """
        from lensor.draw.writers import tikz

        return tikz(self.scene)

    @property
    def crossings(self) -> int:
        """Number of pairs of lines that cross."""
        return self.scene.crossings

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"<Drawing of {self.title}>"

    def save(self, path: str | Path) -> Path:
        """Write the drawing to a file.

        Args:
            path: the file; its extension, .svg, .png or .tex, determines the format; ~ is the home folder.

        Example:
            >>> import lensor, tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     file = lensor.draw(lensor.contraction("n i -> i", "X")).save(f"{folder}/sum.svg")
            ...     file.name
            'sum.svg'

        Raises:
            ValueError: for an unsupported extension, or, for .tex, a name with a character that TeX does not support.
            ImportError: if matplotlib is missing, for PNG.
            OSError: if the file cannot be written, or its folder does not exist.
        """
        from lensor.draw.writers import png

        file = Path(path).expanduser()
        ending = file.suffix.lower()
        require_choice("the file extension", ending, FORMATS)
        if not file.parent.is_dir():
            raise FileNotFoundError(f"the folder {file.parent} does not exist, expected one for {file.name}: create it")
        if ending == ".png":
            _require("matplotlib")
            png(self.scene, file)
        else:
            file.write_text(self.svg if ending == ".svg" else self.tikz, encoding="utf-8")
        return file


def draw(
    what: AnyNetwork | Plan | Sequence[AnyNetwork],
    path: str | Path | None = None,
    *,
    shade: Network | Sequence[Collection[int] | Network] = (),
    cut: str | Collection[str] = (),
) -> Drawing:
    """Draw a network, a sum, a plan, or several networks with arrows between them.

    Use this for figures; `print(net)` and `print(plan)` give the text form. Inputs are on the left, kernels on the
    right, and index patterns between them, with a row for each spatial dimension. Equal halves are mirrored. The layout
    is deterministic. Planar networks are drawn without crossings, other networks with few (see `Drawing.crossings`).

    Args:
        what: the network or plan; a sequence of networks gives one diagram with arrows between them: before and after.
        path: a file to write the drawing to: .svg, .png or .tex.
        shade: one or more parts to shade at every occurrence, given as networks, such as the unfolded input inside a
            factor. For a single network, you can also pass sets of node numbers.
        cut: name or names of operands to cut out: the arguments of a Jacobian. They are drawn as ghosts, and their
            dashed lines are legs of the Jacobian.

    Returns:
        The drawing, with `svg` and `tikz`; notebooks display it.

    Example:
        >>> import lensor
        >>> net = lensor.ops.kfac_input_factor(lensor.ConvSpec(2, 4, (9,), 3), approx="reduce")
        >>> lensor.draw([net, net.simplify()])  # doctest: +ELLIPSIS
        <Drawing of ... → ...>
        >>> spec = lensor.ConvSpec(2, 4, (9,), 3)
        >>> factor = lensor.draw(lensor.ops.kfac_input_factor(spec), shade=[lensor.ops.unfold(spec)])
        >>> len(factor.scene.shades)
        2
        >>> conv_weight_jacobian = lensor.draw(lensor.ops.conv(spec), cut=["W"])

    Raises:
        TypeError: if an argument has an unsupported type.
        ValueError: for an empty sequence, an unsupported file extension, or nodes, networks or operands that do not
            occur.
        FileNotFoundError: if the folder of the file does not exist.
        ImportError: if networkx is missing, or matplotlib for PNG.
    """
    _require("networkx")
    drawing = _drawing(what, shade, cut)
    if path is not None:
        drawing.save(path)
    return drawing


def _drawing(
    what: AnyNetwork | Plan | Sequence[AnyNetwork],
    shade: Network | Sequence[Collection[int] | Network],
    cut: str | Collection[str],
) -> Drawing:
    from lensor.draw.plans import scene_of_plan
    from lensor.draw.shapes import row

    shade, cut = _listed_shades(shade), _listed_names(cut)
    if isinstance(what, Plan):
        if shade or cut:
            raise ValueError("shade or cut is given for a plan, expected a network: draw the plan's network instead")
        return Drawing(scene_of_plan(what), f"the plan of {what.subscripts}")
    nets = _listed(what)
    terms = [term for net in nets for term in net.terms]
    _check_cut(terms, cut)
    shades, names = _shades(terms, shade), pattern_names(terms)
    parts: list[Scene | str] = []
    for at, net in enumerate(nets):
        parts += ["→"] * (at > 0) + _parts(net, [next(shades) for _ in net.terms], cut, names)
    return Drawing(row(parts), " → ".join(map(str, nets)))


def _listed(what: Any) -> Sequence[AnyNetwork]:
    """The networks to draw."""
    nets = [what] if isinstance(what, Verbs) else what
    if not isinstance(nets, Sequence) or isinstance(nets, str):
        raise TypeError(f"the object to draw has type {type(what).__name__}, expected a network, a plan, or a sequence")
    if not nets:
        raise ValueError("the sequence to draw is empty, expected networks")
    for place, one in enumerate(nets):
        if not isinstance(one, Verbs):
            alone = "; a plan is drawn alone" if isinstance(one, Plan) else ""
            raise TypeError(f"entry {place} of the sequence to draw is {_told(one)}, expected a network{alone}")
    return nets


def _listed_shades(shade: Any) -> Sequence[Collection[int] | Network]:
    """The shades as a sequence of networks and of sets of node numbers."""
    form = "expected networks, as in shade=[unfolded], or sets of node numbers, as in shade=[{0, 1}]"
    if isinstance(shade, Network):
        return [shade]
    if isinstance(shade, (Verbs, str)) or not isinstance(shade, Iterable):
        raise TypeError(f"shade is {_told(shade)}, {form}")
    shade = list(shade)
    for one in shade:
        numbers = isinstance(one, Collection) and all(type(node) is int for node in one)
        if not numbers and not isinstance(one, Network):
            raise TypeError(f"shade has {_told(one)}, {form}")
    return shade


def _listed_names(cut: Any) -> Collection[str]:
    """The names of operands to cut out, as a collection."""
    if isinstance(cut, str):
        return [cut]
    if not isinstance(cut, Collection) or not all(isinstance(name, str) for name in cut):
        raise TypeError(f"cut is {_told(cut)}, expected names of operands, as in cut=['W']")
    return cut


def _told(found: Any) -> str:
    """A description of an object for error messages: the object's text if that is short."""
    text = repr(found)
    kind = type(found).__name__
    return f"a {kind}" if isinstance(found, (Verbs, Plan)) or len(text) > 60 else f"{text} of type {kind}"


def _check_cut(terms: Sequence[Network], cut: Collection[str]) -> None:
    known = list(dict.fromkeys(name for term in terms for name in term.operand_names))
    for name in cut:
        if name not in known:
            raise ValueError(f"cut has {name!r}, expected operands from {', '.join(known)}")


def _shades(terms: Sequence[Network], shade: Sequence[Collection[int] | Network]) -> Iterator[list[Collection[int]]]:
    """The sets of shaded nodes of each term."""
    from lensor.draw.match import occurrences

    found: list[list[Collection[int]]] = [[] for _ in terms]
    for one in shade:
        if isinstance(one, Network):
            for term, own in zip(terms, found, strict=True):
                own += occurrences(term, one)
            if not any(occurrences(term, one) for term in terms):
                raise ValueError(f"shade has the network {one}, expected one that occurs in the drawing")
        elif len(terms) > 1 or not one or not set(one) <= set(range(len(terms[0].nodes))):
            several = f"of a single network, not {len(terms)}" if len(terms) > 1 else f"0 to {len(terms[0].nodes) - 1}"
            raise ValueError(f"shade has nodes {sorted(one)}, expected nodes {several}")
        else:
            found[0].append(one)
    return iter(found)


def _parts(
    net: AnyNetwork, shades: Sequence[list[Collection[int]]], cut: Collection[str], names: Mapping[Pattern, str]
) -> list[Scene | str]:
    """The terms of a network as scenes, with scales and signs between them."""
    from lensor.draw.graph import graph_of
    from lensor.draw.scene import scene_of
    from lensor.draw.tex import raised

    parts: list[Scene | str] = []
    for at, (term, shade) in enumerate(zip(net.terms, shades, strict=True)):
        parts += ["+"] * (at > 0)
        powers = [index + raised(power) if power != 1 else index for index, power in term.scale.powers]
        scale = " ".join([*([] if term.scale.factor == 1 else [str(term.scale.factor)]), *powers])
        parts += [f"{scale} ×"] * bool(scale)
        parts.append(scene_of(graph_of(term, cut, names), shade))
    return parts


def to_tikz(net: AnyNetwork | Plan) -> str:
    r"""The diagram of a network or plan as a TeX document that compiles on its own.

    Example:
        >>> import lensor
        >>> lensor.contraction("n i -> i", "X").to_tikz().splitlines()[1]
        '\\begin{document}'

    Raises:
        ImportError: if networkx is missing.
        ValueError: for a name with a character that TeX does not support.
    """
    return draw(net).tikz


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise ImportError(f"{package} is not installed, but drawing requires it: install lensor[draw]")


def svg_or_none(net: AnyNetwork | Plan) -> str | None:
    """The SVG that notebooks display for a network or plan; None if it cannot be drawn."""
    if find_spec("networkx") is None:
        return None
    try:
        return draw(net).svg
    except NetworkError:
        return None
