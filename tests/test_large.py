"""Large networks: steps are counted, not timed. Twice the size takes about twice the steps, or no more than a bound."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import lensor
from lensor import Delta, IndexPattern, Network, Ones, Operand
from lensor.draw import layers, scene
from lensor.draw.graph import graph_of
from lensor.lowering import BY_NAME, lower
from lensor.network import canonical, sum_of, to_text
from lensor.plan.paths import has_best_path


def steps(function: Callable[[], Any]) -> int:
    """How many calls of the package's functions a call makes, list and generator expressions among them."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        if event == "call" and str(frame.f_globals.get("__name__")).startswith("lensor"):
            calls += 1

    before = sys.getprofile()
    lensor.clear_caches()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


def joined(edges: Sequence[tuple[Any, Any]], delta: bool = False, named: bool = False) -> Network:
    """A node for each vertex and an index for each edge, or a delta for each edge and an index for each vertex."""
    if delta:
        names = {end: f"a{at}" for at, end in enumerate(dict.fromkeys(end for edge in edges for end in edge))}
        nodes: list[Any] = [Delta((names[one], names[other])) for one, other in edges]
        return Network.make(nodes, [], dict.fromkeys(names.values(), 2))
    held: dict[Any, list[str]] = {}
    for at, edge in enumerate(edges):
        for end in edge:
            held.setdefault(end, []).append(f"e{at}")
    nodes = [
        Operand(f"A{at}" if named else f"A{len(indices)}", tuple((index,) for index in indices))
        for at, indices in enumerate(held.values())
    ]
    return Network.make(nodes, [], {f"e{at}": 2 for at in range(len(edges))})


def chain(n: int) -> list[tuple[int, int]]:
    return [(at, at + 1) for at in range(n)]


def ring(n: int) -> list[tuple[int, int]]:
    return [(at, (at + 1) % n) for at in range(n)]


def complete(n: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(n), 2))


def hypercube(n: int) -> list[tuple[int, int]]:
    return [(v, v | 1 << bit) for v in range(2**n) for bit in range(n) if not v >> bit & 1]


def matrices(n: int) -> Network:
    text = ", ".join(f"a{at} a{at + 1}" for at in range(n))
    return lensor.contraction(
        f"{text} -> a0 a{n}", *[f"X{at}" for at in range(n)], **{f"a{at}": 2 for at in range(n + 1)}
    )


def deltas(n: int) -> Network:
    """A chain of deltas of which only the last tells a size."""
    text = ", ".join(f"a{at} a{at + 1}" for at in range(n))
    return lensor.contraction(f"{text}, a{n} -> a0", *["δ"] * n, "X", **{f"a{n}": 2})


def ones(n: int) -> Network:
    return Network.make(
        [Operand("X", (("a0",),)), *(Ones(f"a{at}") for at in range(n))], [("a0",)], {f"a{at}": 2 for at in range(n)}
    )


def terms(n: int) -> Any:
    return sum_of([lensor.contraction("i j, j k -> i k", f"A{at}", "B", j=2) for at in range(n)])


LINEAR: dict[str, tuple[Callable[[int], Any], Callable[[Any], Any]]] = {
    "canonical, deltas in a chain": (lambda n: joined(chain(n), delta=True), hash),
    "canonical, deltas in a ring": (lambda n: joined(ring(n), delta=True), hash),
    "canonical, deltas on one index": (lambda n: joined([(0, at + 1) for at in range(n)], delta=True), hash),
    "canonical, equal deltas": (lambda n: Network.make([Delta(("a", "b"))] * n, [], {"a": 2, "b": 2}), hash),
    "canonical, chain": (lambda n: joined(chain(n)), hash),
    "canonical, ring": (lambda n: joined(ring(n)), hash),
    "canonical, matrices": (matrices, hash),
    "canonical, terms": (terms, hash),
    "simplify, matrices": (matrices, lambda net: net.simplify()),
    "simplify, deltas": (deltas, lambda net: net.simplify()),
    "simplify, terms": (terms, lambda net: net.simplify()),
    "sizes over deltas": (deltas, lambda net: net.bind(a0=2)),
    "text, deltas": (deltas, lambda net: lensor.parse(to_text(net, legend=True))),
    "text, matrices": (matrices, lambda net: lensor.parse(to_text(net, legend=True))),
    "parts": (ones, lambda net: net.components()),
    "merge": (deltas, lambda net: net.merge(net)),
    "jacobian": (matrices, lambda net: net.jacobian("X1")),
    "sums": (lambda n: [matrices(3)] * n, sum_of),
}


@pytest.mark.parametrize("name", LINEAR)
def test_twice_the_size_takes_twice_the_steps(name: str) -> None:
    make, act = LINEAR[name]
    small, large = (steps(functools.partial(act, make(n))) for n in (60, 120))
    assert large <= 2.6 * small + 200, (small, large)


def test_ones_are_dropped_at_once() -> None:
    assert len(ones(50).simplify().trace) == 1
    assert ones(50).simplify() == lensor.contraction("i -> i", "X", i=2).scaled(2**49)


@pytest.mark.parametrize(
    "net",
    [
        Network.make([Delta(tuple(f"a{at}" for at in range(200)))], [], {f"a{at}": 2 for at in range(200)}),
        joined(complete(14)),
        joined(hypercube(5)),
        joined([(at, 20 + other) for at in range(12) for other in range(12)]),
        joined(
            [((a, b), (a, (b + 1) % 8)) for a in range(8) for b in range(8)]
            + [((a, b), ((a + 1) % 8, b)) for a in range(8) for b in range(8)]
        ),
    ],
    ids=["one delta", "complete", "hypercube", "bipartite", "torus"],
)
def test_canonical_forms_of_symmetric_networks(net: Network) -> None:
    names = {index: f"z{at}" for at, index in enumerate(reversed(list(net.sizes)))}
    other = net.rename(names).replace(nodes=tuple(reversed(net.rename(names).nodes)))
    assert steps(lambda: net.canonical) < 1_500_000
    assert net == other
    assert net.canonical[0] != "with names"


def test_canonical_forms_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without effort a network is equal to those with its names only, in any order of nodes."""
    monkeypatch.setattr(canonical, "EFFORT", 10)
    net = joined(ring(6))
    renamed = net.rename({index: f"z{index}" for index in net.sizes})
    backwards = Network.make(tuple(reversed(net.nodes)), net.output, net.sizes)
    assert net == backwards
    assert hash(net) == hash(backwards)
    assert net != renamed
    assert net.canonical_order.keys() == net.sizes.keys()
    assert len({net, renamed, backwards}) == 2


def test_equal_halves_are_looked_for_in_bounded_effort() -> None:
    """Eleven pairs that fit in any way, and two tensors that fit in none."""
    text = ", ".join(f"a{at} b{at}" for at in range(22))
    net = lensor.contraction(f"{text}, c, d ->", *["X"] * 22, "Y", "Z").bind(
        dict(c=2, d=2, **{f"{i}{at}": 2 for i in "ab" for at in range(22)})
    )
    halves = BY_NAME["halves"]
    assert steps(lambda: lower(net, halves)) < 300_000


def test_the_best_order_of_many_tensors_is_left_out() -> None:
    assert has_best_path(matrices(20))
    assert not has_best_path(joined(complete(12)))
    net = joined(complete(12), named=True)
    shapes: dict[str, Any] = dict.fromkeys(net.operand_names, (2,) * 11)
    orders = [row.name for row in net.plan(**shapes).compare()]
    assert orders == ["Feynman", "left to right", "greedy", "planner"]


def work_of_drawing(net: Network, monkeypatch: pytest.MonkeyPatch) -> int:
    """Pairs of places whose lines a layout compares, and of names and lines that a drawing does."""
    compared = 0
    worse, cuts = layers._Order._worse, scene.cuts

    def covered(lines: Any, boxes: Any, gap: float = 0.0) -> Any:
        nonlocal compared
        compared += len(lines) * len(boxes)
        return cuts(lines, boxes, gap)

    def counted(order: layers._Order, one: layers.Place, other: layers.Place) -> int:
        nonlocal compared
        compared += 1
        return worse(order, one, other)

    monkeypatch.setattr(layers._Order, "_worse", counted)
    monkeypatch.setattr(scene, "cuts", covered)
    laid_out = scene.laid_out

    def complete(graph: Any, part: Sequence[int]) -> Any:
        found = laid_out(graph, part)
        assert set(found.places) | {at for own in found.upright.values() for at in own} == set(part)
        return found

    monkeypatch.setattr(scene, "laid_out", complete)
    drawn = scene.scene_of(graph_of(net))
    assert all(math.isfinite(at) for shape in drawn.shapes for at in (shape.box.x, shape.box.y))
    return compared


DRAWN = {
    "complete, 12": joined(complete(12), named=True),
    "complete, 12, alike": joined(complete(12)),
    "complete, 20": joined(complete(20), named=True),
    "bipartite": joined([(at, 20 + other) for at in range(7) for other in range(7)], named=True),
    "hypercube": joined(hypercube(4)),
    "matrices": matrices(60),
    "one tensor of 60 legs": lensor.contraction(
        " ".join(f"a{i}" for i in range(60)) + " -> " + " ".join(f"a{i}" for i in range(60)), "X"
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_drawings_take_bounded_effort(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert work_of_drawing(DRAWN[name], monkeypatch) < 2 * 10**8


def test_patterns_in_a_row() -> None:
    """Many patterns, of which each is looked up with those that share its legs only."""

    def net(n: int) -> Network:
        text = ", ".join([*(f"a{at} o{at} k{at}" for at in range(n)), *(f"a{at}" for at in range(n))])
        return lensor.contraction(f"{text} -> o0", *[IndexPattern(6, 3)] * n, *[f"X{at}" for at in range(n)])

    small, large = (steps(net(n).simplify) for n in (20, 40))
    assert large <= 4.2 * small, (small, large)
