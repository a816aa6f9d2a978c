"""Diagrams: what is in them, that nothing overlaps, that planar networks do not cross, and the files they become."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
from matplotlib.path import Path as Polygon
from PIL import Image

import lensor
from lensor.bench import gallery
from lensor.draw import Drawing
from lensor.draw.graph import CUT, DOT, END, GROUP, LOOP, Graph, graph_of
from lensor.draw.layout import is_planar, laid_out
from lensor.draw.match import occurrences
from lensor.draw.scene import Box, Scene, Segment, scene_of
from tests.strategies import random_spec

SPECS = {
    "1-d": {"in_channels": 4, "out_channels": 6, "input_size": (9,), "kernel_size": 3, "groups": 2},
    "2-d": {"in_channels": 4, "out_channels": 6, "input_size": (9, 9), "kernel_size": 3, "padding": 1, "groups": 2},
}
OPERATIONS = sorted(lensor.ops.__all__)
CROSSINGS = {
    ("ggn_diagonal", "1-d"): 2,
    ("hessian_diagonal_input", "1-d"): 1,
    ("hessian_diagonal_weight", "1-d"): 1,
    ("ggn_diagonal", "2-d"): 4,
    ("ggn_gram", "2-d"): 2,
    ("hessian_diagonal_input", "2-d"): 2,
    ("hessian_diagonal_weight", "2-d"): 2,
    ("unfolded_kernel", "2-d"): 1,
}
"""Crossings of the operations that are not planar; most that any of their forms has."""


def network(op: str, spec: dict[str, Any]) -> Any:
    """The network of an operation with its required options."""
    options: dict[str, Any] = {}
    if op.startswith("kfac_") and "root" not in op:
        options = {"approx": "expand"}
    if op == "ggn_mini_block":
        options = {"block": "filter"}
    return getattr(lensor.ops, op)(lensor.ConvSpec(**spec), **options)


def runs_through(line: Segment, box: Box) -> bool:
    """Whether one of many points of a line lies in a box."""
    x, y = np.linspace((line.x1, line.y1), (line.x2, line.y2), 400).T
    return bool(((np.abs(x - box.x) < box.width / 2) & (np.abs(y - box.y) < box.height / 2)).any())


def check_scene(graph: Graph, scene: Scene) -> None:
    """Nothing overlaps, no line runs through another's label or vertex, and crossings are counted as they are.

    Vertices, labels and lines are those that are drawn.
    """
    for line in scene.segments:
        joined = {graph.lines[line.line].first, graph.lines[line.line].second}
        for label in scene.labels:
            assert label.line == line.line or not runs_through(line, label.box), (label.text, line)
        for at, shape in enumerate(scene.shapes):
            assert at in joined or not runs_through(line, shape.box), (shape, line)
    boxes = [shape.box for shape in scene.shapes if shape.kind != END] + [label.box for label in scene.labels]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (one, other)
    assert {one.line for one in scene.segments} == set(range(len(graph.lines)))
    assert len({frozenset((line.first, line.second)) for line in graph.lines}) == len(graph.lines)
    found = 0
    for a, b in itertools.combinations(scene.segments, 2):
        if {(a.x1, a.y1), (a.x2, a.y2)} & {(b.x1, b.y1), (b.x2, b.y2)}:
            continue
        p, q = (complex(a.x1, a.y1), complex(a.x2, a.y2)), (complex(b.x1, b.y1), complex(b.x2, b.y2))
        sides = [
            ((end[1] - end[0]).conjugate() * (point - end[0])).imag
            for end, other in ((p, q), (q, p))
            for point in other
        ]
        found += sides[0] * sides[1] < 0 and sides[2] * sides[3] < 0
    assert found == scene.crossings == len(scene.bridges)


def check_network(net: lensor.Network) -> Scene:
    graph = graph_of(net)
    scene = scene_of(graph)
    check_scene(graph, scene)
    whole = networkx.Graph([(line.first, line.second) for line in graph.lines])
    if networkx.check_planarity(whole)[0]:
        assert is_planar(graph)
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


def test_drawings_are_the_same_every_time() -> None:
    net = network("ggn_diagonal", SPECS["2-d"])
    assert lensor.draw(net).svg == lensor.draw(net).svg


def test_equal_halves_are_mirrored() -> None:
    graph = graph_of(network("kfac_input_factor", SPECS["2-d"]))
    place = laid_out(graph).place
    tensors = [at for at, vertex in enumerate(graph.vertices) if vertex.text]
    middle = place[tensors, 0].mean()
    texts = {at: graph.vertices[at].text for at in tensors}

    def points(sign: float) -> set[tuple[float, float, str]]:
        return {(round(sign * (place[at, 0] - middle), 6), round(place[at, 1], 6), texts[at]) for at in tensors}

    assert points(1.0) == points(-1.0)
    assert scene_of(graph).crossings == 0


def test_groups_dots_and_open_ends() -> None:
    graph = graph_of(lensor.contraction("n (g c) i, n g, i -> (n c) g", "X", "Y", "Z"))
    kinds = [vertex.shape for vertex in graph.vertices]
    assert kinds.count(GROUP) == 1
    assert kinds.count(END) == 1
    assert kinds.count(DOT) == 2  # n and g are in three places
    jacobian = graph_of(network("weight_jacobian", SPECS["1-d"]))
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
        own = [one for one in scene.segments if one.line == at]
        points = [point for one in own for point in ((one.x1, one.y1), (one.x2, one.y2))]
        leaving = sum(math.dist(point, (first.x, first.y)) < 1e-6 for point in points)
        assert leaving == line.times
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
    assert f"i0 … i{count - 1}" in net._repr_svg_()


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
                    own = scene.segments[label.line]
                    assert not runs_through(own, label.box), text


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


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX is installed")
@pytest.mark.parametrize("op", OPERATIONS)
def test_tikz_compiles(op: str, tmp_path: Path) -> None:
    lensor.draw(network(op, SPECS["2-d"]), tmp_path / "net.tex")
    found = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "net.tex"], cwd=tmp_path, capture_output=True, check=False
    )
    assert found.returncode == 0, found.stdout[-2000:]


def test_sums_pairs_and_plans() -> None:
    with_bias = lensor.ops.conv(lensor.ConvSpec(2, 4, (9,), 3, bias=True))
    signs = [label.text for label in lensor.draw(with_bias).scene.labels if label.large]
    assert signs == ["+"]
    factor = network("kfac_input_factor", SPECS["1-d"])
    signs = [label.text for label in lensor.draw([factor, factor.simplify()]).scene.labels if label.large]
    assert signs == ["n^-1 ×", "→", "n^-1 ×"]
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
    dashed = [line for line in drawing.scene.segments if line.dashed]
    assert len(dashed) == len({index for leg in net.operand_legs["W"] for index in leg}) == 5  # g, c_out, c_in, k1, k2
    for line in dashed:
        assert (weight.box.x, weight.box.y) in ((line.x1, line.y1), (line.x2, line.y2))
    assert drawing.svg.count('class="line dashed"') == drawing.tikz.count(r"\draw[dashed]") == 5
    drawing.save(tmp_path / "cut.png")
    assert (tmp_path / "cut.png").stat().st_size > 5000


def test_the_gallery_in_the_docs_is_what_the_command_makes(tmp_path: Path) -> None:
    written = list(gallery.write(tmp_path / "gallery"))
    docs = Path(__file__).parents[1] / "docs"
    assert (tmp_path / "gallery.md").read_text(encoding="utf-8") == (docs / "gallery.md").read_text(encoding="utf-8")
    pictures = {path.name for path in written if path.suffix == ".svg"}
    assert len(pictures) == len(gallery.entries())
    assert pictures == {path.name for path in (docs / "gallery").iterdir()}

    def content(path: Path) -> list[tuple[str, str | None, str]]:  # places may differ in the last digit
        elements = ElementTree.parse(path).getroot().iter()
        return sorted((one.tag, one.get("class"), one.text or "") for one in elements)

    for name in pictures:
        assert content(tmp_path / "gallery" / name) == content(docs / "gallery" / name)


def joined(graph: networkx.Graph) -> lensor.Network:
    """A network of tensors joined as a graph is."""
    names = {frozenset(edge): f"e{at}" for at, edge in enumerate(graph.edges)}
    legs = {one: " ".join(names[frozenset((one, other))] for other in graph[one]) for one in graph}
    return lensor.parse(" ".join(f"T{one}[{own}]" for one, own in legs.items()) + " ->")


def test_graphs_that_are_not_planar_cross_as_little_as_is_known_to_be_possible() -> None:
    five = networkx.complete_graph(5)
    assert check_network(joined(five)).crossings == 1
    assert check_network(joined(networkx.complete_bipartite_graph(3, 3))).crossings == 1
    assert check_network(joined(networkx.petersen_graph())).crossings == 2
    two = networkx.disjoint_union(five, five)
    two.add_edge(0, 9)  # a part hangs on one vertex
    assert check_network(joined(two)).crossings == 2


def test_large_networks_stay_readable() -> None:
    chain = ", ".join(f"i{at} i{at + 1}" for at in range(40))
    net = lensor.contraction(f"{chain} -> i0 i40", *(f"A{at}" for at in range(40)))
    scene = check_network(net)
    assert len(scene.shapes) == 42


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lensor.draw(3), TypeError, "found int"),
        (lambda: lensor.draw("X"), TypeError, "found str"),
        (
            lambda: lensor.contraction("n -> ", "X").draw("net.bmp"),
            ValueError,
            "'.bmp', expected one of '.svg'",
        ),
        (lambda: lensor.contraction("n -> ", "X").draw(shade=[{4}]), ValueError, r"shade names nodes \[4\]"),
        (
            lambda: lensor.contraction("n -> ", "X").draw(shade=[lensor.contraction("n -> ", "Y")]),
            ValueError,
            r"the network to shade, Y\[n\] ->, occurs nowhere in what is drawn",
        ),
        (lambda: lensor.contraction("n -> ", "X").draw(cut=["W"]), ValueError, "cut names 'W', expected of X"),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_lines_are_about_as_long_as_each_other() -> None:
    graph = graph_of(network("conv", SPECS["2-d"]))
    place = laid_out(graph).place
    lengths = [math.dist(place[line.first], place[line.second]) for line in graph.lines]
    assert max(lengths) < 4 * min(lengths)
