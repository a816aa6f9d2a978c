"""Identity of networks: equal up to names and order, and what deciding it costs."""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lensor
from lensor import Delta, IndexPattern, Network, Ones, Operand, Pattern, Scale
from tests.support.cases import BUILDERS, SPECS, disguised, random_network

SEEDS = st.integers(0, 2**32 - 1)
X = Operand("X", (("i",), ("j",)))


# ------------------------------------------------------------------------------------------------------------ identity
@settings(max_examples=100)
@given(SEEDS)
def test_names_and_order_are_no_part_of_identity(seed: int) -> None:
    net = random_network(seed)
    other = disguised(net, seed)
    assert net == other
    assert hash(net) == hash(other)
    assert len({net, other}) == 1
    simple = net.simplify()
    assert simple == disguised(simple, seed)


@pytest.mark.parametrize("spec", ["1-d", "reflect", "transposed", "linear"])
@pytest.mark.parametrize("op", BUILDERS)
def test_operations_under_other_names(op: str, spec: str) -> None:
    net = BUILDERS[op](SPECS[spec])
    for seed in range(2):
        other = disguised(net, seed)
        assert net == other
        assert hash(net) == hash(other)


# Every index has size 3, and no leg of the pattern can stand for another.
ODD = IndexPattern(3, 3, stride=2, padding=(1, 3))


def small_network(choose: random.Random) -> Network:
    """A network of a few nodes over at most four indices of one size."""
    indices = "abcd"[: choose.randint(2, 4)]
    nodes: list[Any] = []
    for _ in range(choose.randint(1, 4)):
        match choose.choice(["A", "A", "B", "pattern", "delta", "ones"]):
            case "pattern":
                nodes.append(Pattern(ODD, tuple((choose.choice(indices),) for _ in range(3))))  # type: ignore[arg-type]
            case "delta":
                nodes.append(Delta(tuple(choose.sample(indices, 2))))
            case "ones":
                nodes.append(Ones(choose.choice(indices)))
            case name:
                nodes.append(Operand(name, tuple((choose.choice(indices),) for _ in range(2))))
    held = sorted({index for node in nodes for leg in node.legs for index in leg})
    output = choose.sample(held, choose.randint(0, min(2, len(held))))
    powers = {index: 1 for index in held if choose.random() < 0.1}
    net = Network.make(nodes, [(index,) for index in output], dict.fromkeys(held, None) | _sizes(nodes, held))
    return net.scaled(1, powers)


def _sizes(nodes: list[Any], held: list[str]) -> dict[str, int]:
    return dict.fromkeys(held, 3) if any(isinstance(node, Pattern) for node in nodes) else {}


def are_isomorphic(one: Network, two: Network) -> bool:
    """By definition: some renaming of the indices makes nodes, output, sizes and scale the same."""

    def parts(net: Network, names: dict[str, str]) -> tuple:
        def leg(group: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(names[index] for index in group)

        nodes = Counter(
            (type(node), frozenset(names[i] for i in node.indices))
            if isinstance(node, Delta)
            else (type(node), getattr(node, "name", getattr(node, "pattern", "")), tuple(map(leg, node.legs)))
            for node in net.nodes
        )
        sizes = {names[index]: size for index, size in net.sizes.items()}
        powers = Counter({names[index]: power for index, power in net.scale.powers})
        return nodes, tuple(map(leg, net.output)), sizes, net.scale.factor, powers

    if len(one.sizes) != len(two.sizes):
        return False
    wanted = parts(two, {index: index for index in two.sizes})
    return any(
        parts(one, dict(zip(one.sizes, order, strict=True))) == wanted for order in itertools.permutations(two.sizes)
    )


@settings(max_examples=400)
@given(SEEDS)
def test_equality_is_isomorphism(seed: int) -> None:
    """Against all renamings, on pairs that differ in one place or in everything."""
    choose = random.Random(seed)
    one = small_network(choose)
    if choose.random() < 0.3:
        two = small_network(choose)
    else:  # one leg moved to another index
        at = choose.randrange(len(one.nodes))
        node = one.nodes[at]
        held = sorted(one.sizes)
        if isinstance(node, Operand | Pattern):
            legs = list(node.legs)
            legs[choose.randrange(len(legs))] = (choose.choice(held),)
            node = dataclasses.replace(node, legs=tuple(legs))
        nodes = (*one.nodes[:at], node, *one.nodes[at + 1 :])
        still = {index for other in nodes for leg in other.legs for index in leg}
        if not still >= set(one.output_indices):
            return
        two = one.replace(nodes=nodes)
        if set(two.sizes) != still:  # the scale holds an index that is nowhere else now
            return
    assert (one == two) == are_isomorphic(one, two)
    if one == two:
        assert hash(one) == hash(two)


def test_everything_but_names_and_order_is_identity() -> None:
    net = lensor.contraction("n (g c) i, i o k, g c k -> n (g o)", "X", IndexPattern(8, 3), "W", g=2, c=3, n=5)
    pattern = net.nodes[1]
    assert isinstance(pattern, Pattern)

    def with_pattern(other: IndexPattern) -> Network:
        return net.replace(nodes=(net.nodes[0], Pattern(other, pattern.legs), net.nodes[2]))

    others = [
        net.scaled(2),
        net.scaled(-1),
        net.scaled(1, {"n": -1}),
        net.rename_operands(X="Y"),
        net.rename_operands(X="W", W="X"),
        net.regroup("(g o) n"),
        net.regroup("n (o g)"),
        net.regroup("n g o"),
        net.keep("c"),
        net.keep("c", 1),
        net.replace(output=(("n",),)),
        net.replace(nodes=(*net.nodes, net.nodes[0])),
        net.replace(nodes=(*net.nodes, Ones("n"))),
        with_pattern(IndexPattern(8, 3, padding=(1, -1))),
        with_pattern(IndexPattern(8, 3, dilation=2, padding=1)),
        with_pattern(IndexPattern(8, 3, padding=(2, 0), output_size=6)),
        with_pattern(IndexPattern(8, 3, stride=2, padding=(2, 3))),
        lensor.contraction("n (g c) i, i o k, g c k -> n (g o)", "X", IndexPattern(8, 3), "W", g=3, c=2, n=5),
        lensor.contraction("n (g c) i, i o k, g c k -> n (g o)", "X", IndexPattern(8, 3), "W", g=2, c=3, n=4),
        lensor.contraction("n (g c) i, i o k, g c k -> n (g o)", "X", IndexPattern(8, 3), "W", g=2, c=3),
        lensor.contraction("n (c g) i, i o k, g c k -> n (g o)", "X", IndexPattern(8, 3), "W", g=2, c=3, n=5),
        lensor.contraction("n g c i, i o k, g c k -> n (g o)", "X", IndexPattern(8, 3), "W", g=2, c=3, n=5),
    ]
    for at, other in enumerate(others):
        assert net != other, at
    assert len({net, *others}) == len(others) + 1
    assert net != "net"
    assert net != net + net
    assert with_pattern(IndexPattern(8, 3, padding=(0, 2), output_size=6)) == net, "right padding follows from O"


def test_powers_of_sizes_are_numbers_once_the_size_is_known() -> None:
    net = lensor.contraction("n i -> i", "X").scaled(1, {"n": -1})
    assert net.scale.powers == (("n", -1),)
    assert net.bind(n=4).scale == Scale(Fraction(1, 4))
    assert net.bind(n=4) == lensor.contraction("n i -> i", "X", n=4).scaled("1/4")
    assert net != lensor.contraction("n i -> i", "X").scaled(1, {"i": -1})
    assert (net.scale * Scale(Fraction(2), (("n", 1),))) == Scale(Fraction(2))


# -------------------------------------------------------------------------------------------------- many equal parts
class TooMuchWorkError(BaseException):
    """Raised inside the canonical form when it makes too many calls."""


def within_work(function: Callable[[], Any], limit: int) -> Any:
    """The function's value; fails if the module of canonical forms makes more than `limit` calls."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        if event == "call" and frame.f_globals.get("__name__") == "lensor.network.canonical":
            calls += 1
            if calls > limit:
                raise TooMuchWorkError

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        return function()
    except TooMuchWorkError:
        pytest.fail(f"more than {limit:,} calls")
    finally:
        sys.setprofile(before)


def joined(parts: list[str], output: str, *operands: str) -> Network:
    return lensor.contraction(f"{', '.join(parts)} -> {output}", *operands * (len(parts) // len(operands)))


EQUAL_PARTS: dict[str, Network] = {
    "apart": joined([f"i{j} k{j}" for j in range(30)], "", "X"),
    "vectors on one index": joined([f"n i{j}" for j in range(30)], "n", "X"),
    "chains between two indices": joined([part for j in range(30) for part in (f"n i{j}", f"i{j} m")], "n m", "X", "Y"),
    "pairs on one index": joined([part for j in range(30) for part in (f"n i{j}", f"n i{j}")], "n", "X", "Y"),
    "cycle": joined([f"i{j} i{(j + 1) % 30}" for j in range(30)], "", "X"),
    "cycle of products": joined([part for j in range(15) for part in (f"i{j} m{j}", f"i{(j + 1) % 15} m{j}")], "", "X"),
    "complete": joined([f"i{j} i{k}" for j in range(7) for k in range(7) if j != k], "", "X"),
    "cube": joined([f"i{v} i{v ^ (1 << b)}" for v in range(16) for b in range(4)], "", "X"),
    "torus": joined(
        [
            part
            for a in range(5)
            for b in range(5)
            for part in (f"i{a}x{b} i{(a + 1) % 5}x{b}", f"i{a}x{b} i{a}x{(b + 1) % 5}")
        ],
        "",
        "X",
    ),
}


@pytest.mark.parametrize("name", EQUAL_PARTS)
def test_equal_parts_cost_little(name: str) -> None:
    net = EQUAL_PARTS[name]
    other = disguised(net, 1)
    copies = [Network.make(one.nodes, one.output, one.sizes) for one in (net, other)]  # nothing kept from before
    assert within_work(lambda: copies[0] == copies[1], 2_500_000)


def test_equal_parts_that_differ_in_one() -> None:
    parts = [f"a{j} b{j}, a{j} b{j}" for j in range(10)]
    net = joined(", ".join(parts).split(", "), "", "X")
    other = joined(", ".join([*parts[:-1], "a9 b9, b9 a9"]).split(", "), "", "X")
    assert net != other.bind(dict.fromkeys(other.sizes, 2))
    assert net.bind(dict.fromkeys(net.sizes, 2)) != other.bind(dict.fromkeys(other.sizes, 2))


def test_regular_networks_that_refinement_cannot_tell_apart() -> None:
    """Two triangles and a hexagon: every index looks the same everywhere."""

    def cycles(*lengths: int) -> Network:
        parts, start = [], 0
        for length in lengths:
            parts += [f"i{start + j} i{start + (j + 1) % length}" for j in range(length)]
            start += length
        return joined(parts, "", "X")

    assert cycles(3, 3) != cycles(6)
    assert cycles(3, 3, 6) == cycles(6, 3, 3)
    # Joined to one more index each, so that both are connected.
    hub = [f"h i{j}" for j in range(6)]
    one = lensor.contraction(
        "i0 i1, i1 i2, i2 i0, i3 i4, i4 i5, i5 i3, " + ", ".join(hub) + " -> ", *["X"] * 6, *["Y"] * 6
    )
    two = lensor.contraction(
        "i0 i1, i1 i2, i2 i3, i3 i4, i4 i5, i5 i0, " + ", ".join(hub) + " -> ", *["X"] * 6, *["Y"] * 6
    )
    assert one != two
    assert one == disguised(one, 3)
