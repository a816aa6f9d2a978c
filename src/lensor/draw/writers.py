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

_INK, _PAPER, _SHADE = "#1b1f24", "#ffffff", "#e4e8ee"

_LIGHT = "{--ink:#1b1f24;--paper:#ffffff;--tensor:#dbe9ff;--pattern:#ffe3b8;--selection:#e3f5d6;--shade:#e4e8ee}"
_DARK = "{--ink:#e6e8eb;--paper:#16181d;--tensor:#23395c;--pattern:#5a4215;--selection:#2c4a21;--shade:#2e333d}"

STYLE = (
    # Every element also has light colours as attributes, for programs that know no variables: these skip @supports.
    "@supports (--a:0){"
    f".lensor{_LIGHT}@media (prefers-color-scheme:dark){{.lensor{_DARK}}}"
    # On a page with its own theme switch, as in furo and Jupyter, the page's theme has priority.
    f"body[data-theme=light] .lensor,[data-jp-theme-light=true] .lensor{_LIGHT}"
    f"body[data-theme=dark] .lensor,[data-jp-theme-light=false] .lensor{_DARK}"
    ".lensor .paper,.lensor .ones,.lensor .cut{fill:var(--paper)}.lensor text,.lensor .dot{fill:var(--ink)}"
    ".lensor .line,.lensor .box{stroke:var(--ink)}.lensor .halo,.lensor .gap{stroke:var(--paper)}"
    ".lensor .halo.shaded,.lensor .gap.shaded{stroke:var(--shade)}"
    ".lensor .tensor,.lensor .step{fill:var(--tensor)}.lensor .pattern{fill:var(--pattern)}"
    ".lensor .selection{fill:var(--selection)}.lensor .shade{fill:var(--shade);stroke:var(--shade)}}"
)
"""Colours for light and dark pages, chosen by the system or by the surrounding page."""

_SERIF = "'STIX Two Text','Latin Modern Roman','Times New Roman',Times,serif"
_MONO = "ui-monospace,Menlo,Consolas,monospace"

_COLOURS = {
    TENSOR: "#dbe9ff",
    STEP: "#dbe9ff",
    PATTERN: "#ffe3b8",
    SELECTION: "#e3f5d6",
    ONES: "#ffffff",
    CUT: "#ffffff",
}
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
        f' viewBox="{left:.1f} {top:.1f} {width:.1f} {height:.1f}" text-anchor="middle" font-family="{_SERIF}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
    ]
    # An opaque background keeps the diagram readable on a light page in a dark system, and vice versa.
    area = f'x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"'
    parts.append(f'<rect class="paper" fill="{_PAPER}" {area} rx="6"/>')
    parts += [_svg_shade(shade) for shade in scene.shades]
    parts += [_svg_line(one) for one in scene.strokes]
    for one in scene.bridges:
        parts += [_svg_line(one, "gap shaded" if _on_shade(scene, one) else "gap"), _svg_line(one)]
    parts += [found for shape in scene.shapes if (found := _svg_shape(shape))]
    parts += [_svg_label(scene, label) for label in scene.labels]
    return "\n".join([*parts, "</svg>"])


def _svg_label(scene: Scene, label: Label) -> str:
    if label.large:
        return _svg_text('class="sign"', label.box, 18.0, _words(label.text, 18.0))
    shaded = is_shaded(scene, label.box)
    back = f'class="{"halo shaded" if shaded else "halo"}" stroke="{_SHADE if shaded else _PAPER}" aria-hidden="true"'
    back += ' stroke-width="2.5" stroke-linejoin="round"'
    text = _words(label.text, 12.5)
    return _svg_text(back, label.box, 12.5, text) + _svg_text('class="index"', label.box, 12.5, text)


def _svg_text(style: str, box: Box, size: float, text: str) -> str:
    """Text in the middle of a box: a third of its size is the distance from the middle of letters to their baseline."""
    place = f'x="{box.x:.1f}" y="{box.y + size / 3:.1f}"'
    return f'<text {style} fill="{_INK}" font-size="{size:g}" {place}>{text}</text>'


def _svg_shade(shade: Shade) -> str:
    pieces = ("L".join(f"{x:.1f},{y:.1f}" for x, y in piece) for piece in shade.pieces)
    path = "".join(f"M{piece}Z" for piece in pieces)
    style = f'fill="{_SHADE}" stroke="{_SHADE}" stroke-linejoin="round" stroke-width="{2 * Shade.MARGIN:.0f}"'
    return f'<path class="shade" {style} d="{path}"/>'


def _svg_line(one: Stroke, gap: str = "") -> str:
    start, *rest = (f"{x:.1f},{y:.1f}" for x, y in one.points)
    curves = "".join("C" + " ".join(rest[at : at + 3]) for at in range(0, len(rest), 3))
    if gap:
        style = f'class="{gap}" stroke="{_SHADE if gap.endswith("shaded") else _PAPER}" stroke-width="6"'
    else:
        style = f'class="line" stroke="{_INK}" stroke-width="1.2"' + ' stroke-dasharray="3 3"' * one.dashed
    return f'<path {style} fill="none" d="M{start}{curves}"/>'


def _words(text: str, size: float) -> str:
    """Names as mathematics: italic letters, subscripts and primes."""
    return " ".join(_word(word, size) for word in text.split())


def _word(word: str, size: float) -> str:
    head, below, primes = parts_of(word)
    if not word.isidentifier():
        return escape(word)
    upright = len(head) > 1 or head in _UPRIGHT
    found = escape(head) if upright else f'<tspan font-style="italic">{escape(head)}</tspan>'
    if below:
        found += f'<tspan font-size="{0.72 * size:.1f}" dy="{0.2 * size:.1f}">{escape(",".join(below))}</tspan>'
    back = f'<tspan dy="{-0.2 * size:.1f}">' if below else "<tspan>"
    return found + (f"{back}{'′' * primes}</tspan>" if primes else "")


def _svg_shape(shape: Shape) -> str:
    box, style = shape.box, f'stroke="{_INK}" stroke-width="1.2"'
    text = ""
    if shape.text:
        font = 'class="node" fill-opacity="0.55"' if shape.kind == CUT else 'class="node"'
        text = _svg_text(font, box, 16.0, _words(shape.text, 16.0))
    if shape.kind == STEP:
        text = _svg_text(f'class="node" xml:space="preserve" font-family="{_MONO}"', box, 13.0, escape(shape.text))
    circle = f'cx="{box.x:.1f}" cy="{box.y:.1f}" r="{box.width / 2:.1f}"'
    match shape.kind:
        case "end":
            return ""
        case "dot":
            return f'<circle class="dot" fill="{_INK}" {circle}/>'
        case "ones":
            return f'<circle class="box ones" fill="{_PAPER}" {style} {circle}/>{text}'
        case "pattern" | "group" | "arrow":
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners(shape))
            if shape.kind != PATTERN:
                return f'<polygon class="dot" fill="{_INK}" points="{points}"/>'
            return f'<polygon class="box pattern" fill="{_COLOURS[PATTERN]}" {style} points="{points}"/>{text}'
    style += {SELECTION: ' stroke-dasharray="4 2" rx="2"', CUT: ' stroke-dasharray="3 3" rx="8"'}.get(
        shape.kind, ' rx="8"'
    )
    area = f'x="{box.x - box.width / 2:.1f}" y="{box.y - box.height / 2:.1f}" width="{box.width:.1f}"'
    area += f' height="{box.height:.1f}"'
    return f'<rect class="box {shape.kind}" fill="{_COLOURS[shape.kind]}" {style} {area}/>{text}'


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
    ink = _INK
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
