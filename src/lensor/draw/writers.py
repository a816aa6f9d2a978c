"""Writers of a scene as SVG, TikZ and PNG."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from lensor.draw.graph import ARROW, CUT, DOT, END, GROUP, ONES, PATTERN, SELECTION, STEP, TENSOR
from lensor.draw.shapes import Box, Label, Scene, Shade, Shape, Stroke
from lensor.draw.tex import parts_of, tex

_LIGHT = "{--ink:#1b1f24;--paper:#ffffff;--tensor:#dbe9ff;--pattern:#ffe3b8;--selection:#e3f5d6;--shade:#e4e8ee}"
_DARK = "{--ink:#e6e8eb;--paper:#16181d;--tensor:#23395c;--pattern:#5a4215;--selection:#2c4a21;--shade:#2e333d}"

STYLE = (
    f".lensor{_LIGHT}@media (prefers-color-scheme:dark){{.lensor{_DARK}}}"
    # On a page with its own theme switch, as in furo and Jupyter, the page's theme has priority.
    f"body[data-theme=light] .lensor,[data-jp-theme-light=true] .lensor{_LIGHT}"
    f"body[data-theme=dark] .lensor,[data-jp-theme-light=false] .lensor{_DARK}"
    ".lensor .paper{fill:var(--paper)}"
    ".lensor text{font-family:'STIX Two Text','Latin Modern Roman','Times New Roman',Times,serif;fill:var(--ink);"
    "text-anchor:middle;dominant-baseline:central}.lensor .i{font-style:italic}.lensor .b{font-size:72%}"
    ".lensor .node{font-size:16px}.lensor .step+text{font:13px ui-monospace,Menlo,Consolas,monospace}"
    ".lensor .index{font-size:12.5px;paint-order:stroke;stroke:var(--paper);stroke-width:3;stroke-linejoin:round}"
    ".lensor .sign{font-size:18px}.lensor .line{fill:none;stroke:var(--ink);stroke-width:1.2}"
    ".lensor .dashed{stroke-dasharray:3 3}.lensor .cut{fill:var(--paper);stroke-dasharray:3 3}"
    ".lensor .cut+text{fill-opacity:.55}"
    ".lensor .gap{stroke:var(--paper);stroke-width:6}"
    ".lensor .index.shaded{stroke:var(--shade)}.lensor .gap.shaded{stroke:var(--shade)}"
    ".lensor .box{stroke:var(--ink);stroke-width:1.2}.lensor .dot{fill:var(--ink)}"
    ".lensor .tensor,.lensor .step{fill:var(--tensor)}.lensor .pattern{fill:var(--pattern)}"
    ".lensor .selection{fill:var(--selection);stroke-dasharray:4 2}.lensor .ones{fill:var(--paper)}"
    ".lensor .shade{fill:var(--shade);stroke:var(--shade);stroke-linejoin:round}"
)
"""Colours for light and dark pages, chosen by the system or by the surrounding page."""

_COLOURS = {
    TENSOR: "#dbe9ff",
    STEP: "#dbe9ff",
    PATTERN: "#ffe3b8",
    SELECTION: "#e3f5d6",
    ONES: "#ffffff",
    CUT: "#ffffff",
}
_SHADE = "#e4e8ee"
_UPRIGHT = "ΓΔΘΛΞΠΣΥΦΨΩ"
"""Letters that mathematics sets upright."""


def is_shaded(scene: Scene, box: Box) -> bool:
    """Whether the centre of a box is on a shade; the area cleared around the box then gets the shade's colour."""
    middle = Box(box.x, box.y, 1.0, 1.0)
    return any(shade.overlaps(middle) for shade in scene.shades)


def _on_shade(scene: Scene, bridge: Stroke) -> bool:
    (x1, y1), (x2, y2) = bridge.points[0], bridge.points[-1]
    return is_shaded(scene, Box((x1 + x2) / 2, (y1 + y2) / 2, 1.0, 1.0))


def corners(shape: Shape) -> list[tuple[float, float]]:
    """The corners of a hexagon (a pattern) or of a triangle (a group of output indices, an arrowhead)."""
    box = shape.box
    if shape.kind in (GROUP, ARROW):
        turns = (0.0, 2.3, -2.3)
        radius = box.width / 2
        return [
            (box.x + radius * math.cos(shape.angle + turn), box.y + radius * math.sin(shape.angle + turn))
            for turn in turns
        ]
    half, cut, high = box.width / 2, 7.0, box.height / 2
    return [
        (box.x - half, box.y),
        (box.x - half + cut, box.y - high),
        (box.x + half - cut, box.y - high),
        (box.x + half, box.y),
        (box.x + half - cut, box.y + high),
        (box.x - half + cut, box.y + high),
    ]


# ------------------------------------------------------------------------------------------------------------------ SVG
def svg(scene: Scene, title: str) -> str:
    """The scene as an SVG document with colours for light and dark pages."""
    left, top, width, height = scene.bounds()
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lensor" role="img" width="{width:.0f}" height="{height:.0f}"'
        f' viewBox="{left:.1f} {top:.1f} {width:.1f} {height:.1f}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
    ]
    # An opaque background keeps the diagram readable on a light page in a dark system, and vice versa.
    parts.append(f'<rect class="paper" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" rx="6"/>')
    parts += [_svg_shade(shade) for shade in scene.shades]
    parts += [_svg_line(one, "line") for one in scene.strokes]
    parts += [
        _svg_line(one, style)
        for one in scene.bridges
        for style in ("gap shaded" if _on_shade(scene, one) else "gap", "line")
    ]
    parts += [found for shape in scene.shapes if (found := _svg_shape(shape))]
    parts += [
        f'<text class="{_svg_label(scene, label)}" x="{label.box.x:.1f}" y="{label.box.y:.1f}">'
        f"{_svg_text(label.text)}</text>"
        for label in scene.labels
    ]
    return "\n".join([*parts, "</svg>"])


def _svg_label(scene: Scene, label: Label) -> str:
    return "sign" if label.large else "index" + " shaded" * is_shaded(scene, label.box)


def _svg_shade(shade: Shade) -> str:
    pieces = ("L".join(f"{x:.1f},{y:.1f}" for x, y in piece) for piece in shade.pieces)
    path = "".join(f"M{piece}Z" for piece in pieces)
    return f'<path class="shade" stroke-width="{2 * Shade.MARGIN:.0f}" d="{path}"/>'


def _svg_line(one: Stroke, style: str) -> str:
    style += " dashed" * (one.dashed and style == "line")
    start, *rest = (f"{x:.1f},{y:.1f}" for x, y in one.points)
    curves = "".join("C" + " ".join(rest[at : at + 3]) for at in range(0, len(rest), 3))
    return f'<path class="{style}" d="M{start}{curves}"/>'


def _svg_text(text: str) -> str:
    """Names as mathematics: italic letters, subscripts and primes."""
    return " ".join(map(_svg_word, text.split()))


def _svg_word(word: str) -> str:
    head, below, primes = parts_of(word)
    if not word.isidentifier():
        return escape(word)
    found = f'<tspan class="i">{escape(head)}</tspan>' if len(head) == 1 and head not in _UPRIGHT else escape(head)
    if below:
        found += f'<tspan class="b" dy=".28em">{escape(",".join(below))}</tspan>'
    back = '<tspan dy="-.2em">' if below else "<tspan>"  # an em of a subscript is shorter
    return found + (f"{back}{'′' * primes}</tspan>" if primes else "")


def _rectangle(box: Box) -> str:
    return (
        f'x="{box.x - box.width / 2:.1f}" y="{box.y - box.height / 2:.1f}" width="{box.width:.1f}"'
        f' height="{box.height:.1f}"'
    )


def _svg_shape(shape: Shape) -> str:
    box, name = shape.box, escape(shape.text) if shape.kind == STEP else _svg_text(shape.text)
    text = f'<text class="node" x="{box.x:.1f}" y="{box.y:.1f}">{name}</text>' if shape.text else ""
    match shape.kind:
        case "end":
            return ""
        case "dot":
            return f'<circle class="dot" cx="{box.x:.1f}" cy="{box.y:.1f}" r="{box.width / 2:.1f}"/>'
        case "ones":
            return f'<circle class="box ones" cx="{box.x:.1f}" cy="{box.y:.1f}" r="{box.width / 2:.1f}"/>{text}'
        case "pattern" | "group" | "arrow":
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners(shape))
            return f'<polygon class="{"box pattern" if shape.kind == PATTERN else "dot"}" points="{points}"/>{text}'
    return f'<rect class="box {shape.kind}" {_rectangle(box)} rx="{2 if shape.kind == SELECTION else 8}"/>{text}'


# ----------------------------------------------------------------------------------------------------------------- TikZ
def tikz(scene: Scene) -> str:
    """The scene as a TeX document that compiles on its own; copy its tikzpicture into a paper.

    Raises:
        ValueError: for a name with a character that TeX does not support.
    """
    lines = [
        r"\documentclass[tikz,border=4pt]{standalone}",
        r"\begin{document}",
        r"\begin{tikzpicture}[x=1pt,y=-1pt,font=\small,",
        r"  box/.style={draw,line width=0.5pt,inner sep=0pt},index/.style={font=\scriptsize,inner sep=1pt,fill=white}]",
        *(
            rf"\definecolor{{lensor{name}}}{{HTML}}{{{colour[1:].upper()}}}"
            for name, colour in {**_COLOURS, "shade": _SHADE}.items()
        ),
    ]
    for shade in scene.shades:
        path = " ".join(" -- ".join(f"({x:.1f},{y:.1f})" for x, y in piece) + " -- cycle" for piece in shade.pieces)
        lines.append(rf"\filldraw[lensorshade,line join=round,line width={2 * Shade.MARGIN:.1f}pt] {path};")
    lines += [rf"\draw{'[dashed]' * one.dashed} {_tikz_path(one)};" for one in scene.strokes]
    lines += [
        rf"\draw[{style}] {_tikz_path(one)};"
        for one in scene.bridges
        for style in (f"{'lensorshade' if _on_shade(scene, one) else 'white'},line width=4pt", "")
    ]
    lines += [found for shape in scene.shapes if (found := _tikz_shape(shape))]
    lines += [
        rf"\node[{_tikz_label(scene, label)}] at ({label.box.x:.1f},{label.box.y:.1f})"
        rf" {{{tex(label.text, 'rename')}}};"
        for label in scene.labels
    ]
    return "\n".join([*lines, r"\end{tikzpicture}", r"\end{document}", ""])


def _tikz_path(one: Stroke) -> str:
    start, *rest = (f"({x:.1f},{y:.1f})" for x, y in one.points)
    curves = (rest[at : at + 3] for at in range(0, len(rest), 3))
    return start + "".join(f" .. controls {a} and {b} .. {c}" for a, b, c in curves)


def _tikz_label(scene: Scene, label: Label) -> str:
    if label.large:
        return r"font=\large"
    return "index,fill=lensorshade" if is_shaded(scene, label.box) else "index"


def _tikz_shape(shape: Shape) -> str:
    box, text = shape.box, tex(shape.text, "rename_operands")
    at = f"({box.x:.1f},{box.y:.1f})"
    size = f"minimum width={box.width:.1f}pt,minimum height={box.height:.1f}pt"
    match shape.kind:
        case "end":
            return ""
        case "dot":
            return rf"\fill {at} circle ({box.width / 2:.1f}pt);"
        case "ones":
            return rf"\node[box,circle,fill=white,{size}] at {at} {{{text}}};"
        case "group" | "arrow":
            return rf"\fill {' -- '.join(f'({x:.1f},{y:.1f})' for x, y in corners(shape))} -- cycle;"
        case "pattern":
            path = " -- ".join(f"({x:.1f},{y:.1f})" for x, y in corners(shape))
            return rf"\filldraw[fill=lensorpattern] {path} -- cycle;" + "\n" + rf"\node at {at} {{{text}}};"
    style = {SELECTION: "dashed", CUT: "dashed,rounded corners=4pt,text=gray"}.get(shape.kind, "rounded corners=4pt")
    return rf"\node[box,{style},fill=lensor{shape.kind},{size}] at {at} {{{text}}};"


# ------------------------------------------------------------------------------------------------------------------ PNG
def png(scene: Scene, path: Path, dpi: int = 160) -> None:
    """Write the scene as a PNG file."""
    from matplotlib import patches, patheffects
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    left, top, width, height = scene.bounds()
    figure = Figure(figsize=(width / 72, height / 72))
    FigureCanvasAgg(figure)
    axis: Any = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(left, left + width)
    axis.set_ylim(top + height, top)
    axis.axis("off")
    ink = "#1b1f24"
    families = _families("".join(one.text for one in (*scene.shapes, *scene.labels)))
    for piece in (piece for shade in scene.shades for piece in shade.pieces):
        width = 2 * Shade.MARGIN
        axis.add_patch(patches.Polygon(piece, color=_SHADE, linewidth=width, joinstyle="round", zorder=0))
    for one in scene.strokes:
        _line(axis, one, 1, "--" if one.dashed else "-", color=ink, linewidth=1.1)
    for one in scene.bridges:
        back = _SHADE if _on_shade(scene, one) else "white"
        _line(axis, one, 1.1, "-", color=back, linewidth=5, capstyle="butt")
        _line(axis, one, 1.2, "-", color=ink, linewidth=1.1)
    for shape in scene.shapes:
        box = shape.box
        if shape.kind == END:
            continue
        if shape.kind in (DOT, ONES):
            colour = ink if shape.kind == DOT else "white"
            axis.add_patch(patches.Circle((box.x, box.y), box.width / 2, facecolor=colour, edgecolor=ink, zorder=2))
        elif shape.kind in (PATTERN, GROUP, ARROW):
            colour = _COLOURS[PATTERN] if shape.kind == PATTERN else ink
            axis.add_patch(patches.Polygon(corners(shape), facecolor=colour, edgecolor=ink, zorder=2))
        else:
            patch = _patch(patches, box, _COLOURS[shape.kind], ink, 2 if shape.kind == SELECTION else 6)
            patch.set_linestyle("--" if shape.kind in (CUT, SELECTION) else "-")
            axis.add_patch(patch)
        if shape.text:
            text = shape.text if shape.kind == STEP else _mathematics(shape.text)
            size = 10 if shape.kind == STEP else 13
            _text(axis, text, box, size, "gray" if shape.kind == CUT else ink, families)
    for label in scene.labels:
        back = _SHADE if is_shaded(scene, label.box) else "white"
        halo = [] if label.large else [patheffects.withStroke(linewidth=2.5, foreground=back)]
        size = 15 if label.large else 10
        _text(axis, _mathematics(label.text), label.box, size, ink, families, path_effects=halo)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # `_families` warns once for all glyphs
        figure.savefig(path, dpi=dpi, facecolor="white", format="png")


def _patch(patches: Any, box: Box, face: str, edge: str, radius: float) -> Any:
    return patches.FancyBboxPatch(
        (box.x - box.width / 2 + radius, box.y - box.height / 2 + radius),
        box.width - 2 * radius,
        box.height - 2 * radius,
        boxstyle=f"round,pad={radius}",
        facecolor=face,
        edgecolor=edge,
        zorder=2,
    )


def _families(text: str) -> list[str]:
    """The fonts for a text: the monospaced font and, for characters missing from it, other fonts on this machine."""
    from matplotlib import font_manager

    found, lacking = ["monospace"], set(text)
    lacking -= {*map(chr, font_manager.get_font(font_manager.findfont("monospace")).get_charmap())}
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: (font.name, font.fname)):
        if not lacking:
            break
        # A font of last resort draws a box for every letter.
        if font.style != "normal" or font.weight not in (400, "normal", "book") or "Last Resort" in font.name:
            continue
        try:
            has = lacking & {*map(chr, font_manager.get_font(font.fname).get_charmap())}
        except (OSError, RuntimeError):  # a bitmap font, or a file that was removed
            continue
        found += [font.name] * bool(has)
        lacking -= has
    if lacking:
        letters = ", ".join(map(repr, sorted(lacking)))
        warnings.warn(
            f"no font on this machine has {letters}: the PNG file shows boxes instead; save the diagram as .svg, or"
            " install a font that has them",
            stacklevel=4,  # the user's call
        )
    return found


def _line(axis: Any, one: Stroke, order: float, style: str, **options: Any) -> None:
    from matplotlib import patches
    from matplotlib.path import Path as Curve

    codes = [Curve.MOVETO] + [Curve.CURVE4] * (len(one.points) - 1)
    axis.add_patch(patches.PathPatch(Curve(one.points, codes), fill=False, linestyle=style, zorder=order, **options))


def _mathematics(text: str) -> str:
    """The text in matplotlib's mathematics, or as it is if it has other letters."""
    from matplotlib.mathtext import MathTextParser

    try:
        found = tex(text, "rename").replace("$ $", "$  $")
        MathTextParser("path").parse(found)
    except ValueError:
        return text
    return found


def _text(axis: Any, text: str, box: Box, size: float, colour: str, families: list[str], **options: Any) -> None:
    style = {"ha": "center", "va": "center", "fontsize": size, "math_fontfamily": "stix", "zorder": 4}
    axis.text(box.x, box.y, text, color=colour, family=families, **style, **options)
