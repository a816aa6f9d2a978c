"""Diagrams: what is in them, that nothing overlaps, that planar networks do not cross, and the files they become."""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import networkx
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from matplotlib.path import Path as Polygon
from PIL import Image

import lensor
from examples import gallery
from lensor.draw import Drawing
from lensor.draw.graph import ARROW, CUT, DOT, END, GROUP, LOOP, PATTERN, TENSOR, Graph, graph_of
from lensor.draw.match import occurrences
from lensor.draw.scene import scene_of
from lensor.draw.shapes import Box, Label, Scene, Shape, Stroke
from lensor.draw.tex import tex
from lensor.draw.writers import png, svg, tikz
from lensor.plan import Plan, Program
from lensor.plan.steps import Input, MatMul
from tests.support.strategies import random_spec

SPECS = {
    "1-d": {"in_channels": 4, "out_channels": 6, "input_size": (9,), "kernel_size": 3, "groups": 2},
    "2-d": {"in_channels": 4, "out_channels": 6, "input_size": (9, 9), "kernel_size": 3, "padding": 1, "groups": 2},
}
OPERATIONS = sorted(lensor.ops.__all__)
CROSSINGS = {
    ("ggn_diagonal", "1-d"): 2,
    ("hessian_diagonal_input", "1-d"): 2,
    ("hessian_diagonal_weight", "1-d"): 1,
    ("ggn_diagonal", "2-d"): 4,
    ("ggn_gram", "2-d"): 2,
    ("hessian_diagonal_input", "2-d"): 4,
    ("hessian_diagonal_weight", "2-d"): 3,
    ("unfolded_kernel", "2-d"): 1,
}
"""Crossings of the operations that are not planar; most that any of their forms has."""


def network(op: str, spec: dict[str, Any]) -> Any:
    """The network of an operation with its required options."""
    options: dict[str, Any] = {}
    if op.startswith("kfac_") and "root" not in op:
        options = {"approx": "expand"}
    if op == "ggn_mini_blocks":
        options = {"block": "filter"}
    return getattr(lensor.ops, op)(lensor.ConvSpec(**spec), **options)


def points_of(line: Stroke) -> np.ndarray:
    """[points, 2]: many points of a line."""
    t = np.linspace(0.0, 1.0, 60)[:, None]
    found = []
    for at in range(0, len(line.points) - 1, 3):
        a, b, c, d = np.array(line.points[at : at + 4])
        found.append((1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * b + 3 * t**2 * (1 - t) * c + t**3 * d)
    return np.concatenate(found)


def runs_through(line: Stroke, box: Box) -> bool:
    """Whether one of many points of a line lies in a box."""
    x, y = points_of(line).T
    return bool(((np.abs(x - box.x) < box.width / 2) & (np.abs(y - box.y) < box.height / 2)).any())


def crossings_of(strokes: Sequence[Stroke]) -> int:
    """The number of times that two lines cross, from many points of each."""
    count = 0
    for one, other in itertools.combinations(strokes, 2):
        ends = [line.points[at] for line in (one, other) for at in (0, -1)]
        a, b = points_of(one), points_of(other)
        a1, a2, b1, b2 = a[:-1, None], a[1:, None], b[None, :-1], b[None, 1:]

        def side(start: np.ndarray, end: np.ndarray, point: np.ndarray) -> np.ndarray:
            along, to = end - start, point - start
            return along[..., 0] * to[..., 1] - along[..., 1] * to[..., 0]

        apart = (side(a1, a2, b1) * side(a1, a2, b2) < -1e-9) & (side(b1, b2, a1) * side(b1, b2, a2) < -1e-9)
        for i, j in zip(*np.nonzero(apart), strict=True):
            count += min(math.dist(a[i], end) for end in ends) > 4.5 or min(math.dist(b[j], end) for end in ends) > 4.5
    return count


def check_scene(graph: Graph, scene: Scene) -> None:
    """Nothing overlaps, no line runs through another's label or vertex, and crossings are counted as they are.

    Vertices, labels and lines are those that are drawn.
    """
    for line in scene.strokes:
        joined = {graph.lines[line.line].first, graph.lines[line.line].second}
        for label in scene.labels:
            assert label.line == line.line or not runs_through(line, label.box), (label.text, line)
        for at, shape in enumerate(scene.shapes):
            assert at in joined or not runs_through(line, shape.box), (shape, line)
    boxes = [shape.box for shape in scene.shapes if shape.kind != END] + [label.box for label in scene.labels]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (one, other)
    assert {one.line for one in scene.strokes} == set(range(len(graph.lines)))
    assert len({frozenset((line.first, line.second)) for line in graph.lines}) == len(graph.lines)
    for line in scene.strokes:
        ends = (graph.lines[line.line].first, graph.lines[line.line].second)
        for at in ends:
            if graph.vertices[at].shape != LOOP:  # lines reach what they join
                x, y = np.abs(points_of(line) - (scene.shapes[at].box.x, scene.shapes[at].box.y)).T
                assert ((x <= scene.shapes[at].box.width / 2) & (y <= scene.shapes[at].box.height / 2)).any()
    assert crossings_of(scene.strokes) == scene.crossings == len(scene.bridges)


def check_network(net: lensor.Network) -> Scene:
    graph = graph_of(net)
    scene = scene_of(graph)
    check_scene(graph, scene)
    whole = networkx.Graph([(line.first, line.second) for line in graph.lines])
    if networkx.check_planarity(whole)[0]:
        lines = [(line.first, line.second) for line in graph.lines]
        assert networkx.check_planarity(networkx.Graph(lines))[0]
        assert scene.crossings == 0, str(net)
    named = [index for line in graph.lines for index in line.indices]
    assert set(named) == set(net.sizes)
    assert sum(vertex.node is not None for vertex in graph.vertices) == len(net.nodes)
    return scene


@pytest.mark.parametrize("dims", SPECS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_is_drawn_without_overlaps_and_needless_crossings(op: str, dims: str) -> None:
    for net in (network(op, SPECS[dims]), network(op, SPECS[dims]).simplify()):
        for term in net.terms:
            assert check_network(term).crossings <= CROSSINGS.get((op, dims), 0)


def random_networks(seeds: range) -> None:
    for seed in seeds:
        rng = np.random.default_rng([7, seed])
        spec = random_spec(rng, 2)
        op = OPERATIONS[int(rng.integers(len(OPERATIONS)))]
        for term in network(op, spec).terms:
            check_network(term)


def test_random_networks_are_drawn_without_overlaps_and_needless_crossings() -> None:
    random_networks(range(15))


@pytest.mark.slow
def test_two_hundred_random_networks() -> None:
    random_networks(range(30, 230))


@pytest.mark.parametrize("seed", ["1", "12345"])
def test_drawings_are_the_same_in_every_process(seed: str) -> None:
    code = "import lensor; print(lensor.draw(lensor.ops.ggn_diagonal(lensor.ConvSpec(4, 6, (9,), 3))).svg)"
    environment = os.environ | {"PYTHONHASHSEED": seed}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == lensor.draw(lensor.ops.ggn_diagonal(lensor.ConvSpec(4, 6, (9,), 3))).svg + "\n"


@pytest.mark.parametrize("op", ["kfac_input_factor", "ggn_mini_blocks", "ggn_diagonal", "hessian_backprop"])
def test_equal_halves_are_mirrored(op: str) -> None:
    scene = scene_of(graph_of(network(op, SPECS["2-d"])))
    boxes = [(shape.box, shape.text) for shape in scene.shapes if shape.text]
    middle = sum(box.x for box, _ in boxes) / len(boxes)

    def points(sign: float) -> set[tuple[float, float, str]]:
        return {(round(sign * (box.x - middle), 1) + 0.0, round(box.y, 1), text) for box, text in boxes}

    assert points(1.0) == points(-1.0)


def test_boxes_are_placed_by_their_roles() -> None:
    for dims in (1, 2, 3):
        spec = lensor.ConvSpec(4, 6, (9,) * dims, 3, groups=2)
        for op, left, right in (("conv", "X", "W"), ("conv_weight_vjp", "X", "V"), ("conv_input_vjp", "V", "W")):
            scene = getattr(lensor.ops, op)(spec).draw().scene
            place = {shape.text: shape.box for shape in scene.shapes if shape.text}
            patterns = [shape.box for shape in scene.shapes if shape.kind == PATTERN]
            assert len({box.x for box in patterns}) == 1  # one column,
            assert [box.y for box in patterns] == sorted({box.y for box in patterns})  # a row for each dimension
            assert place[left].x < patterns[0].x < place[right].x
            assert patterns[0].y < place[left].y < patterns[-1].y or dims == 1
            (triangle,) = (shape.box for shape in scene.shapes if shape.kind == GROUP)
            assert triangle.x > place[right].x  # outwards
            groups = [label.box.y for label in scene.labels if label.text == "g"]
            assert max(groups) > max(box.y for box in patterns)
            legs = [label for label in scene.labels if label.text == "n"]
            assert op == "conv_weight_vjp" or legs[0].box.y < place[left].y


def test_groups_dots_and_open_ends() -> None:
    graph = graph_of(lensor.contraction("n (g c) i, n g, i -> (n c) g", "X", "Y", "Z"))
    kinds = [vertex.shape for vertex in graph.vertices]
    assert kinds.count(GROUP) == 1
    assert kinds.count(END) == 1
    assert kinds.count(DOT) == 2  # n and g are in three places
    jacobian = graph_of(network("conv_weight_jacobian", SPECS["1-d"]))
    assert sum(vertex.shape == DOT and vertex.node is not None for vertex in jacobian.vertices) == 2


def ends_of_lines(graph: Graph) -> list[tuple[str, str, str, int]]:
    """What each line joins (text or shape), the label, and how many lines are drawn."""
    kinds = [vertex.text or vertex.shape for vertex in graph.vertices]
    return sorted((*sorted((kinds[line.first], kinds[line.second])), line.label, line.times) for line in graph.lines)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("X[i i] ->", [("X", "loop", "i", 2)]),
        ("X[i i j j] ->", [("X", "loop", "i j", 2)]),
        ("X[i i] -> i", [("X", "dot", "i", 2), ("dot", "end", "i", 1)]),
        ("X[i i] Y[i] ->", [("X", "dot", "i", 2), ("Y", "dot", "i", 1)]),
        ("X[i i i] ->", [("X", "dot", "i", 3)]),
        ("δ[i j] X[i] Y[i] -> j", [("X", "dot", "i", 1), ("Y", "dot", "i", 1), ("dot", "end", "j", 1)]),
    ],
)
def test_every_leg_of_a_node_is_seen(text: str, lines: list[tuple[str, str, str, int]]) -> None:
    graph = graph_of(lensor.parse(text))
    assert ends_of_lines(graph) == lines
    scene = scene_of(graph)
    assert len(scene.labels) == len(graph.lines)
    for at, line in enumerate(graph.lines):
        first = scene.shapes[line.first].box  # loops' vertices come last
        own = [one for one in scene.strokes if one.line == at]
        ends = [Box(*one.points[end], 0.0, 0.0) for one in own for end in (0, -1)]
        assert sum(first.overlaps(end) for end in ends) == line.times
    assert all(shape.kind != LOOP for shape in scene.shapes)


def test_patterns_have_the_names_of_the_whole_text() -> None:
    one = lensor.parse("X[i] Π1[i o k] W[k] -> o where Π1=IndexPattern(9,3)")
    other = lensor.parse("Y[i] Π1[i o k] W[k] -> o where Π1=IndexPattern(13,3,dilation=3)")

    def names(drawing: Drawing) -> list[str]:
        return [shape.text for shape in drawing.scene.shapes if shape.kind == "pattern"]

    assert "Π2[" in str(one + other)
    assert names(lensor.draw(one + other)) == names(lensor.draw([one, other])) == ["Π1", "Π2"]
    assert names(lensor.draw([one, one])) == ["Π1", "Π1"]
    assert names(lensor.draw(other)) == ["Π1"]


@pytest.mark.parametrize("count", [5, 60])
def test_many_indices_are_one_line_with_a_short_label(count: int) -> None:
    names = [f"i{at}" for at in range(count)]
    net = lensor.parse(f"X[{' '.join(names)}] Y[{' '.join(names)}] ->")
    scene = check_network(net)
    assert [label.text for label in scene.labels] == [f"i0 … i{count - 1}"]
    assert f"i0 … i{count - 1}" in "".join(ElementTree.fromstring(net._repr_svg_() or "").itertext())


def test_networks_too_dense_for_their_labels_are_drawn_all_the_same() -> None:
    names = [f"a_long_name_of_an_index_{at}" for at in range(24)]
    net = lensor.parse(f"X[{' '.join(names)}] -> {' '.join(names)}")
    scene = net.draw().scene
    assert sorted(label.text for label in scene.labels) == sorted(names)


def test_the_name_of_a_leg_stands_behind_its_end() -> None:
    for text in ("X[first_index b] Y[b] Z[b second_index] -> first_index second_index", "X[a b c d e] -> a b c d e"):
        net = lensor.parse(text)
        graph = graph_of(net)
        scene = scene_of(graph)
        for label in scene.labels:
            joined = [graph.lines[label.line].first, graph.lines[label.line].second]
            for at in joined:
                if graph.vertices[at].shape == END:
                    assert math.dist((label.box.x, label.box.y), (scene.shapes[at].box.x, scene.shapes[at].box.y)) > 3
                    assert not any(runs_through(one, label.box) for one in scene.strokes if one.line == label.line)


@pytest.mark.parametrize("ends", [("", "-> a l"), (" U[l]", "-> a"), (" U[l] V[a]", "->")])
def test_chains_are_straight_and_level(ends: tuple[str, str]) -> None:
    names = "abcdefghijkl"
    chain = " ".join(f"M{at}[{one} {other}]" for at, (one, other) in enumerate(itertools.pairwise(names)))
    scene = scene_of(graph_of(lensor.parse(f"{chain}{ends[0]} {ends[1]}")))
    assert np.ptp([shape.box.y for shape in scene.shapes]) < 0.5
    assert np.ptp([shape.box.x for shape in scene.shapes]) > 11 * 40


def test_files(tmp_path: Path) -> None:
    net = network("kfac_input_factor", SPECS["2-d"])
    drawing = net.draw(tmp_path / "net.svg", shade=[{0, 1, 2}])
    root = ElementTree.fromstring((tmp_path / "net.svg").read_text(encoding="utf-8"))
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"X", "Π1", "Π2", "n", "g", "o1"} <= set(texts)
    assert len([element for element in root.iter() if element.get("class") == "shade"]) == 1
    assert "prefers-color-scheme:dark" in drawing.svg
    assert net._repr_svg_() == net.draw().svg
    drawing.save(tmp_path / "net.png")
    with Image.open(tmp_path / "net.png") as picture:
        assert min(picture.size) > 200
        assert len(picture.getcolors(1 << 20) or ()) > 3
    drawing.save(tmp_path / "net.tex")
    text = (tmp_path / "net.tex").read_text(encoding="utf-8")
    assert text == drawing.tikz
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert text.count("{") == text.count("}")


def rules(style: str) -> dict[str, dict[str, str]]:
    """The colours of each rule of a style sheet that sets them, by what it is for."""
    found = re.findall(r"((?:@media[^{]*\{)?[^{}]*\.lensor)\{(--[^}]*)\}", style)
    return {who: dict(one.split(":") for one in colours.split(";")) for who, colours in found}


def test_pictures_have_their_paper_and_follow_the_page_around() -> None:
    drawing = lensor.draw(network("conv", SPECS["2-d"]))
    root = ElementTree.fromstring(drawing.svg)
    paper = root[2]  # behind everything but the title and the style
    assert paper.get("class") == "paper"
    left, top, width, height = map(float, (root.get("viewBox") or "").split())
    assert [float(paper.get(name) or "nan") for name in ("x", "y", "width", "height")] == [left, top, width, height]
    colours = rules(root[1].text or "")
    light, dark = colours[".lensor"], colours["@media (prefers-color-scheme:dark){.lensor"]
    assert all(light[name] != dark[name] for name in light)
    told = {selector: one for who, one in colours.items() for selector in who.split(",") if "[" in selector}
    assert {selector for selector, one in told.items() if one == dark} == {
        "body[data-theme=dark] .lensor",
        "[data-jp-theme-light=false] .lensor",
    }
    assert {selector for selector, one in told.items() if one == light} == {
        "body[data-theme=light] .lensor",
        "[data-jp-theme-light=true] .lensor",
    }


def compile_tex(folder: Path) -> None:
    found = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "net.tex"], cwd=folder, capture_output=True, check=False
    )
    assert found.returncode == 0, found.stdout[-2000:]


needs_tex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX is installed")


@needs_tex
@pytest.mark.parametrize("op", OPERATIONS)
def test_tikz_compiles(op: str, tmp_path: Path) -> None:
    lensor.draw(network(op, SPECS["2-d"]), tmp_path / "net.tex")
    compile_tex(tmp_path)


GREEK = [chr(code) for code in (*range(0x386, 0x3CF), 0x3D1, 0x3D5, 0x3D6, 0x3F1, 0x3F5) if chr(code).isalpha()]


@needs_tex
def test_tikz_of_all_names_that_it_takes_compiles(tmp_path: Path) -> None:
    latin = "é naïve c_out k1 k1_ _ __x a__b x_1_ab W12 Ω̂ a·b µ ℓ 3/1024 c_out⁻¹² 4×6 → -1 100% #1 {$&} a^b ~ c\\d"
    names = [name for letter in GREEK for name in (letter, letter + "x", "i_" + letter)] + latin.split()
    labels = [Label(name, Box(0.0, 12.0 * at, 40.0, 11.0)) for at, name in enumerate(names)]
    shapes = [Shape(TENSOR, Box(80.0, 30.0 * at, 60.0, 24.0), name) for at, name in enumerate(names)]
    (tmp_path / "net.tex").write_text(tikz(Scene(tuple(shapes), labels=tuple(labels))), encoding="utf-8")
    compile_tex(tmp_path)


def test_names_and_scales_in_tex() -> None:
    words = {
        "X": "$X$",
        "weight": r"$\mathrm{weight}$",
        "c_out": r"$c_{\mathrm{out}}$",
        "k1_": "$k_{1}'$",
        "Σ α": r"$\Sigma $ $\alpha $",
        "Ώ": r"$\acute{\Omega }$",
        "Α": r"$\mathrm{A}$",
        "ï": r"$\ddot{i}$",
        "_a": r"$\mathrm{\_a}$",
        "n⁻¹²": "$n^{-12}$",
        "c_in²": r"$c_{\mathrm{in}}^{2}$",
        "-1/117649": r"$-\frac{1}{117649}$",
        "4×6×9": r"$4\times 6\times 9$",
    }
    assert {text: tex(text, "rename") for text in words} == words
    net = lensor.contraction("n i -> i", "X").scaled("1/3", {"n": -1, "i": 1})
    (scale,) = (label.text for label in net.draw().scene.labels if label.large)
    assert scale == "1/3 i n⁻¹ ×"
    assert r"{$\frac{1}{3}$ $i$ $n^{-1}$ $\times $}" in net.to_tikz()


@pytest.mark.parametrize(
    ("operand", "index", "message"),
    [
        ("漢字", "i", r"'漢' \(CJK UNIFIED IDEOGRAPH-6F22\) in '漢字'.*net.rename_operands\(漢字='x'\)"),
        ("X", "и", r"'и' \(CYRILLIC SMALL LETTER I\) in 'и'.*net.rename\(и='x'\)"),
    ],
)
def test_names_that_tex_does_not_know_are_refused(operand: str, index: str, message: str, tmp_path: Path) -> None:
    net = lensor.contraction(f"n {index} -> n", operand)
    with pytest.raises(ValueError, match=message):
        net.to_tikz()
    with pytest.raises(ValueError, match=message):
        net.draw(tmp_path / "net.tex")
    assert not (tmp_path / "net.tex").exists()
    assert operand in net.draw().svg


def test_a_network_alone_is_a_shade_and_a_name_alone_is_cut() -> None:
    spec = lensor.ConvSpec(**SPECS["1-d"])
    net = network("conv", SPECS["1-d"]).rename_operands(W="weight")
    assert lensor.draw(net, cut="weight").svg == lensor.draw(net, cut=["weight"]).svg
    factor, part = network("kfac_input_factor", SPECS["1-d"]), lensor.ops.unfold(spec)
    assert lensor.draw(factor, shade=part).svg == lensor.draw(factor, shade=[part]).svg


def test_endings_in_capitals_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    net = lensor.contraction("n i -> i", "X")
    assert net.draw().save("~/net.SVG") == tmp_path / "net.SVG"
    assert (tmp_path / "net.SVG").read_text(encoding="utf-8") == net.draw().svg
    net.draw(tmp_path / "net.PNG")
    with Image.open(tmp_path / "net.PNG") as picture:
        assert picture.format == "PNG"
    net.draw(tmp_path / "net.TEX")
    assert (tmp_path / "net.TEX").read_text(encoding="utf-8") == net.to_tikz()


@pytest.mark.parametrize("what", ["factor", "jacobian", "plan", "selection"])
def test_an_svg_has_its_colours_and_sizes_without_style_sheets(what: str) -> None:
    """Some converters ignore variables, relative sizes and baselines, and draw black shapes instead."""
    spec = lensor.ConvSpec(4, 6, (9, 9), 3, groups=2)
    factor, net = lensor.ops.kfac_input_factor(spec), lensor.ops.conv(spec)
    drawing = {
        "factor": lambda: lensor.draw(factor, shade=[lensor.ops.unfold(spec)]),
        "jacobian": lambda: lensor.draw(net, cut="W"),
        "plan": lambda: lensor.draw(net.plan(X=(2, 4, 9, 9), W=(6, 2, 3, 3))),
        "selection": lambda: lensor.draw(net.sample("i1", 0.5)),
    }[what]()
    root = ElementTree.fromstring(drawing.svg)
    (style,) = root.iter("{http://www.w3.org/2000/svg}style")
    assert style.text is not None
    assert style.text.startswith("@supports")
    root.remove(style)
    elements = [
        one for one in root.iter() if one.tag.rpartition("}")[2] in ("path", "rect", "circle", "polygon", "text")
    ]
    assert len(elements) > 5
    for one in elements:
        assert re.fullmatch("#[0-9a-f]{6}|none", one.get("fill", "")), one.attrib
        assert one.get("fill") != "none" or re.fullmatch("#[0-9a-f]{6}", one.get("stroke", "")), one.attrib
        assert float(one.get("font-size", "1")) > 0
    assert not re.search('var\\(|em"|%|baseline|paint-order', ElementTree.tostring(root, encoding="unicode"))


def test_what_is_cleared_around_a_label_has_the_colour_below(tmp_path: Path) -> None:
    def scene(label: Box, bridge: Stroke) -> Scene:
        graph = graph_of(lensor.contraction("n i, n o -> i o", "X", "Y"))
        drawn = scene_of(graph, [range(2)])
        return Scene((), (), (Label("n", label),), drawn.shades, (bridge,), 1)

    (shade,) = scene_of(graph_of(lensor.contraction("n i, n o -> i o", "X", "Y")), [range(2)]).shades
    left, top, width, height = Scene(shades=(shade,)).bounds(0.0)
    x, y = left + width / 2, top + height / 2
    near, far = (scene(Box(x, y + away, 9, 9), Stroke.straight((x, y + away), (x, y + away + 4))) for away in (0, 99))
    assert 'class="halo shaded"' in svg(near, "")
    assert 'class="gap shaded"' in svg(near, "")
    assert "index,fill=lensorshade" in tikz(near)
    assert "lensorshade,line width" in tikz(near)
    assert not re.search('class="(halo|gap) shaded"', svg(far, ""))
    assert "index,fill=lensorshade" not in tikz(far)
    png(near, tmp_path / "near.png")
    with Image.open(tmp_path / "near.png") as picture:
        image = np.asarray(picture.convert("RGB"))
    scale = image.shape[1] / near.bounds()[2]
    column = int((x - 5 - near.bounds()[0]) * scale)  # beside the label's letter, in its halo
    assert image[int((y - near.bounds()[1]) * scale), column].tolist() == [0xE4, 0xE8, 0xEE]


def test_letters_that_the_font_of_png_files_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    monospaced, other = (
        set(FT2Font(folder / f"{name}.ttf").get_charmap()) for name in ("DejaVuSansMono", "DejaVuSans")
    )
    letter = next(chr(code) for code in sorted(other - monospaced) if chr(code).isidentifier())
    own = [font for font in font_manager.fontManager.ttflist if Path(font.fname).parent == folder]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lensor.contraction("n i -> i", letter).draw(tmp_path / "net.png")
    with pytest.warns(UserWarning, match="no font on this machine has '字', '漢'") as found:
        lensor.contraction("n 漢 -> 漢", "字").draw(tmp_path / "net.png")
    assert len(found) == 1


def plan_of(net: Any) -> Any:
    """A plan with the sizes of the gallery."""
    sizes = {index: gallery.SIZES.get(index.rstrip("_"), 2) for index, size in net.sizes.items() if size is None}
    bound = net.bind(sizes)
    legs = {name: bound.operand_legs[name][name in bound.selections :] for name in bound.operand_names}
    return bound.plan(
        **{name: tuple(math.prod(bound.sizes[i] for i in leg) for leg in own) for name, own in legs.items()}
    )


def check_plan(plan: Any) -> Scene:
    """Lines run through no box or label of others, lead where values go, and their crossings are counted."""
    scene = plan.draw().scene
    steps = [shape for shape in scene.shapes if shape.kind != ARROW]
    for one, other in itertools.combinations([shape.box for shape in steps] + [label.box for label in scene.labels], 2):
        assert not one.overlaps(other)
    lines = [(complex(*one.points[0]), complex(*one.points[-1])) for one in scene.strokes]
    for one, (start, end) in zip(scene.strokes, lines, strict=True):
        assert end.real > start.real  # to the right
        for box in [shape.box for shape in steps] + [label.box for label in scene.labels]:
            assert complex(box.x, box.y) in (start, end) or not runs_through(one, box), (start, end, box)
    assert crossings_of(scene.strokes) == scene.crossings == len(scene.bridges)

    def sources(at: int) -> set[int]:
        passed = plan.steps[at].takes and plan.steps[at].is_view and at != plan.result
        return set().union(*map(sources, plan.steps[at].takes)) if passed else {at}

    drawn = [at for at in range(len(plan.steps)) if sources(at) == {at}]
    centres = {complex(shape.box.x, shape.box.y): at for at, shape in zip(drawn, steps, strict=True)}
    for centre, at in centres.items():
        todo, reached = [centre], set()
        while todo:
            here = todo.pop()
            if here in centres and here != centre:
                reached.add(centres[here])
            else:
                todo += [end for start, end in lines if start == here]
        assert reached == {user for user in drawn if at in set().union(*map(sources, plan.steps[user].takes))}
    heads = [shape for shape in scene.shapes if shape.kind == ARROW]
    assert len(heads) == sum(bool(plan.steps[at].takes) for at in drawn)
    return scene


@pytest.mark.parametrize("op", OPERATIONS)
def test_plans_are_drawn_without_lines_through_others(op: str) -> None:
    net = network(op, SPECS["2-d"])
    assert gallery.flops(net) is not None  # no size stays open
    assert check_plan(plan_of(net)).crossings == 0


def test_plans_of_random_networks_are_drawn_without_lines_through_others() -> None:
    for seed in range(6):
        rng = np.random.default_rng([8, seed])
        legs = [rng.choice(list("abcdefghij"), 3, replace=False) for _ in range(8)]
        text = ", ".join(" ".join(leg) for leg in legs)
        net = lensor.contraction(f"{text} -> {legs[0][0]}", *(f"T{at}" for at in range(8)))
        check_plan(net.plan(**{f"T{at}": (2, 2, 2) for at in range(8)}))


def test_crossings_of_plans_are_few_and_counted() -> None:
    # Products of each pair of three matrices: a circle of six values in two layers, which takes two crossings.
    program = Program()
    x, y, z = (program.add(Input((), name, (2, 2))) for name in "XYZ")
    xy, yz, zx = (program.add(MatMul(pair)) for pair in ((x, y), (y, z), (z, x)))
    result = program.add(MatMul((program.add(MatMul((xy, zx))), yz)))
    plan = Plan("", tuple(program.steps), tuple(program.shapes), result)
    assert check_plan(plan).crossings == 2


@needs_tex
def test_tikz_of_plans_compiles(tmp_path: Path) -> None:
    plan_of(network("hessian_diagonal_weight", SPECS["2-d"])).draw(tmp_path / "net.tex")
    compile_tex(tmp_path)


def test_plans_show_themselves() -> None:
    assert PLAN._repr_svg_() == PLAN.draw().svg
    assert PLAN.to_tikz() == PLAN.draw().tikz
    assert repr(PLAN) == "<Plan of X[n i] W[i o] -> n o: 3 steps, 48 flops>"


def test_sums_pairs_and_plans() -> None:
    with_bias = lensor.ops.conv(lensor.ConvSpec(2, 4, (9,), 3, bias=True))
    signs = [label.text for label in lensor.draw(with_bias).scene.labels if label.large]
    assert signs == ["+"]
    factor = network("kfac_input_factor", SPECS["1-d"])
    signs = [label.text for label in lensor.draw([factor, factor.simplify()]).scene.labels if label.large]
    assert signs == ["n⁻¹ ×", "→", "n⁻¹ ×"]
    plan = lensor.ops.conv(lensor.ConvSpec(2, 4, (9,), 3)).plan(X=(1, 2, 9), W=(4, 2, 3))
    texts = [shape.text for shape in plan.draw().scene.shapes]
    assert texts[:2] == ["X", "W"]
    assert "convolution" in texts or "matmul" in texts


def check_shades(net: lensor.Network, shade: list[Any], sets: list[frozenset[int]]) -> None:
    """Each shade lies behind all of its nodes and behind no other one."""
    scene = lensor.draw(net, shade=shade).scene
    assert len(scene.shades) == len(sets)
    for own, found in zip(sets, scene.shades, strict=True):
        pieces = [polygon(piece) for piece in found.pieces]
        for shape in scene.shapes:
            margin = -found.MARGIN if shape.node in own else found.MARGIN  # the area is drawn larger by this
            x, y = (np.linspace(-0.5, 0.5, 15) * (size + 2 * margin) for size in (shape.box.width, shape.box.height))
            points = np.stack(np.meshgrid(shape.box.x + x, shape.box.y + y), -1).reshape(-1, 2)
            inside = np.any([piece.contains_points(points, radius=-1e-9) for piece in pieces], 0)
            if shape.node in own:
                assert inside.all()
            elif shape.node is not None:
                assert not inside.any()
                assert not found.overlaps(shape.box)


def polygon(piece: Any) -> Polygon:
    return Polygon([*piece, piece[0]], closed=True)


@pytest.mark.parametrize("dims", SPECS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_a_shade_lies_behind_each_unfolded_input(op: str, dims: str) -> None:
    unfolded = lensor.ops.unfold(lensor.ConvSpec(**SPECS[dims]))
    for net in network(op, SPECS[dims]).terms:
        if halves := occurrences(net, unfolded):
            check_shades(net, [unfolded], halves)


def test_a_shade_lies_behind_nodes_that_stand_apart() -> None:
    check_shades(network("conv", SPECS["2-d"]), [[0, 3], [1, 2]], [frozenset({0, 3}), frozenset({1, 2})])
    cubic = {"in_channels": 4, "out_channels": 6, "input_size": (6, 6, 6), "kernel_size": 3, "groups": 2}
    net, unfolded = network("kfac_input_factor", cubic), lensor.ops.unfold(lensor.ConvSpec(**cubic))
    halves = occurrences(net, unfolded)
    assert len(halves) == 2
    assert frozenset.union(*halves) == set(range(len(net.nodes)))
    check_shades(net, [unfolded], halves)


def test_what_is_summed_over_outside_of_a_shade_stays_outside() -> None:
    spec = lensor.ConvSpec(2, 4, (9,), 3)
    scene = lensor.draw(lensor.ops.kfac_input_factor(spec, approx="reduce"), shade=[lensor.ops.unfold(spec)]).scene
    dots = [shape.box for shape in scene.shapes if shape.kind == DOT]
    assert (len(scene.shades), len(dots)) == (2, 3)  # o1, o1_ and g
    assert not any(shade.overlaps(dot) for shade in scene.shades for dot in dots)


def test_what_a_shade_needs() -> None:
    assert occurrences(lensor.contraction("n i, i o -> n o", "X", "W"), lensor.contraction("a b -> a b", "X")) == [{0}]
    # The part sums over b, which something else holds.
    assert occurrences(lensor.contraction("n i, i o -> n o", "X", "W"), lensor.contraction("a b -> a", "X")) == []
    # One index cannot stand for two.
    assert occurrences(lensor.contraction("n n -> n", "X"), lensor.contraction("a b -> a b", "X")) == []
    # A group for one index that is kept, none for one that is summed over.
    grouped = lensor.contraction("n (g c) -> n g c", "X")
    assert occurrences(grouped, lensor.contraction("a b -> a b", "X")) == [{0}]
    assert occurrences(lensor.contraction("n (g c) -> n", "X"), lensor.contraction("a b -> a", "X")) == []


def test_arguments_of_a_jacobian_are_cut_out(tmp_path: Path) -> None:
    net = network("conv", SPECS["2-d"])
    drawing = lensor.draw(net, cut=["W"])
    weight = next(shape for shape in drawing.scene.shapes if shape.text == "W")
    assert [shape.text for shape in drawing.scene.shapes if shape.kind == CUT] == ["W"]
    dashed = [line for line in drawing.scene.strokes if line.dashed]
    assert len(dashed) == len({index for leg in net.operand_legs["W"] for index in leg}) == 5  # g, c_out, c_in, k1, k2
    for line in dashed:
        assert any(weight.box.overlaps(Box(*line.points[end], 0.0, 0.0)) for end in (0, -1))
    lines = re.findall('<path class="line"[^>]*stroke-dasharray', drawing.svg)
    assert len(lines) == drawing.tikz.count(r"\draw[dashed]") == 5
    drawing.save(tmp_path / "cut.png")
    assert (tmp_path / "cut.png").stat().st_size > 5000


def test_the_gallery_in_the_docs_is_what_the_command_makes(tmp_path: Path) -> None:
    written = list(gallery.write(tmp_path / "gallery"))
    docs = Path(__file__).parents[2] / "docs"
    assert (tmp_path / "gallery.md").read_text(encoding="utf-8") == (docs / "gallery.md").read_text(encoding="utf-8")
    pictures = {path.name for path in written if path.suffix == ".svg"}
    assert len(pictures) == len(gallery.entries())
    assert pictures == {path.name for path in (docs / "gallery").iterdir()}

    def content(path: Path) -> list[tuple[str, str, str]]:  # places may differ in the last digit
        elements = ElementTree.parse(path).getroot().iter()
        return sorted((one.tag, one.get("class") or "", one.text or "") for one in elements)

    for name in pictures:
        assert content(tmp_path / "gallery" / name) == content(docs / "gallery" / name)


def joined(graph: networkx.Graph) -> lensor.Network:
    """A network of tensors joined as a graph is."""
    names = {frozenset(edge): f"e{at}" for at, edge in enumerate(graph.edges)}
    legs = {one: " ".join(names[frozenset((one, other))] for other in graph[one]) for one in graph}
    return lensor.parse(" ".join(f"T{one}[{own}]" for one, own in legs.items()) + " ->")


def test_graphs_that_are_not_planar_cross_little() -> None:
    five = networkx.complete_graph(5)
    assert check_network(joined(five)).crossings == 1
    assert check_network(joined(networkx.complete_bipartite_graph(3, 3))).crossings <= 2
    assert check_network(joined(networkx.petersen_graph())).crossings == 2
    two = networkx.disjoint_union(five, five)
    two.add_edge(0, 9)  # a part hangs on one vertex
    assert check_network(joined(two)).crossings == 2


def test_large_networks_stay_readable() -> None:
    chain = ", ".join(f"i{at} i{at + 1}" for at in range(40))
    net = lensor.contraction(f"{chain} -> i0 i40", *(f"A{at}" for at in range(40)))
    scene = check_network(net)
    assert len(scene.shapes) == 42


SUM = lensor.contraction("n -> ", "X").simplify() + lensor.contraction("n -> ", "Y")
PLAN = lensor.contraction("n i, i o -> n o", "X", "W").plan(X=(4, 3), W=(3, 2))
ONE = lensor.contraction("n -> ", "X")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ONE.draw(shade=SUM), TypeError, r"shade is a Sum, expected networks, as in shade=\[unfolded\]"),
        (lambda: ONE.draw(shade="X"), TypeError, r"shade is 'X' of type str, expected networks"),
        (lambda: ONE.draw(shade=0), TypeError, r"shade is 0 of type int, expected networks"),
        (lambda: ONE.draw(shade=[0, 1]), TypeError, r"shade has 0 of type int, .* as in shade=\[\{0, 1\}\]"),
        (lambda: ONE.draw(shade=[SUM]), TypeError, "shade has a Sum, expected networks"),
        (lambda: ONE.draw(shade=[PLAN]), TypeError, "shade has a Plan, expected networks"),
        (lambda: ONE.draw(shade=["X"]), TypeError, "shade has 'X' of type str, expected networks"),
        (lambda: ONE.draw(cut="weight"), ValueError, "cut has 'weight', expected operands from X"),
        (lambda: ONE.draw(cut=[3]), TypeError, r"cut is \[3\] of type list, expected names of operands, as in cut="),
        (lambda: ONE.draw(cut=None), TypeError, "cut is None of type NoneType, expected names of operands"),
        (
            lambda: lensor.draw([ONE, PLAN]),
            TypeError,
            "entry 1 of the sequence to draw is a Plan, expected a network; a plan is drawn alone",
        ),
        (lambda: lensor.draw([ONE, 3]), TypeError, "entry 1 of the sequence to draw is 3 of type int"),
        (lambda: lensor.draw([]), ValueError, "the sequence to draw is empty"),
        (
            lambda: ONE.draw("no/where/x.svg"),
            FileNotFoundError,
            "the folder no/where does not exist, expected one for x.svg",
        ),
        (
            lambda: ONE.draw("no/where/x.png"),
            FileNotFoundError,
            "the folder no/where does not exist, expected one for x.png",
        ),
        (lambda: lensor.draw(3), TypeError, "the object to draw has type int, expected a network"),
        (lambda: lensor.draw("X"), TypeError, "the object to draw has type str, expected a network"),
        (
            lambda: lensor.contraction("n -> ", "X").draw("net.bmp"),
            ValueError,
            "'.bmp', expected one of '.svg'",
        ),
        (lambda: lensor.contraction("n -> ", "X").draw(shade=[{4}]), ValueError, r"shade has nodes \[4\]"),
        (
            lambda: lensor.contraction("n -> ", "X").draw(shade=[lensor.contraction("n -> ", "Y")]),
            ValueError,
            r"shade has the network Y\[n\] ->, expected one that occurs",
        ),
        (lambda: lensor.contraction("n -> ", "X").draw(cut=["W"]), ValueError, "cut has 'W', expected operands from X"),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
