"""Networks as data: their grammar, identity up to names and order, copies, and evaluation of large ones."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import lensor
from lensor import ConvSpec, Delta, IndexPattern, Network, NetworkError, Ones, Operand, Pattern, Scale, Sum, ops
from tests.support.cases import BUILDERS, SPECS, assert_close, bound, disguised, operands_of
from tests.support.dense import evaluate_dense

X = Operand("X", (("i",), ("j",)))


# ------------------------------------------------------------------------------------------------------------- grammar
@pytest.mark.parametrize(
    ("nodes", "output", "sizes", "message"),
    [
        ([X], [("i",)], {"i": 2}, r"index 'j' has no entry in sizes, expected one: it has entries for \['i'\]"),
        ([X], [("i",)], {"i": 2, "j": -1}, "index 'j' has size -1, expected at least 0"),
        ([X], [("i",), ("i",)], {"i": 2, "j": 3}, "output index 'i' occurs 2 times in the output, expected once"),
        ([X], [("i", "i")], {"i": 2, "j": 3}, "output index 'i' occurs 2 times"),
        ([X], [("k",)], {"i": 2, "j": 3, "k": 4}, r"output index 'k' is not in any node, .*\['i', 'j'\]"),
        (
            [Pattern(IndexPattern(5, 3), (("i",), ("o",), ("k",)))],
            [],
            {"i": 5, "o": 4, "k": 3},
            r"the legs .* of IndexPattern\(5, 3\) have sizes \(5, 4, 3\)",
        ),
        (
            [Pattern(IndexPattern(5, 3), (("i",), ("o",), ("k",)))],
            [],
            {"i": 5, "o": None, "k": 3},
            r"have sizes \(5, None, 3\)",
        ),
        ([Delta(("i",))], [], {"i": 2}, r"a delta has indices \('i',\), expected at least two different ones"),
        ([Delta(("i", "i"))], [], {"i": 2}, r"a delta has indices \('i', 'i'\), expected at least two different"),
        (
            [Delta(("i", "j"))],
            [],
            {"i": 2, "j": 3},
            r"the indices \('i', 'j'\) of a delta have sizes \[2, 3\], expected one size",
        ),
        ([Delta(("i", "j"))], [], {"i": 2, "j": None}, "of a delta have sizes .*, expected one size"),
        (
            [X, Operand("X", (("j",), ("i",)))],
            [],
            {"i": 2, "j": 3},
            r"operand 'X' occurs with shapes \(2, 3\) and \(3, 2\)",
        ),
        ([X, Operand("X", (("i",),))], [], {"i": 2, "j": 3}, r"operand 'X' occurs with shapes \(2, 3\) and \(2,\)"),
    ],
)
def test_grammar(nodes: Any, output: Any, sizes: Any, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        Network.make(nodes, output, sizes)


def test_grammar_of_parts_given_directly() -> None:
    with pytest.raises(
        NetworkError, match=r"index 'j' has no entry in dimensions, expected one: it has entries for \['i'\]"
    ):
        Network((X,), (("i",),), (("i", 2),))
    net = Network((X,), (("i",),), (("i", 2), ("j", None)))
    net.check()
    assert net.output_shape == (2,)


def test_grammar_of_sums() -> None:
    net = Network.make([X], [("i",)], {"i": 2, "j": 3})
    other = Network.make([X], [("j",)], {"i": 2, "j": 3})
    with pytest.raises(NetworkError, match="the number of terms of a sum is 1, expected at least 2"):
        Sum((net,))
    with pytest.raises(NetworkError, match=r"the terms of a sum have output shapes \(2,\) and \(3,\), expected one"):
        Sum((net, other))
    with pytest.raises(NetworkError, match="output shapes"):
        net + Network.make([X], [("i",), ("j",)], {"i": 2, "j": 3})
    (net + net).check()


def test_splitting_a_delta_needs_all_its_indices() -> None:
    net = Network.make([Delta(("i", "j"))], [("i",), ("j",)], {"i": 6, "j": 6})
    with pytest.raises(NetworkError, match="expected groups of equal length"):
        net.relabel({"i": ("a", "b")}, {"a": 2, "b": 3})
    both = net.relabel({"i": ("a", "b"), "j": ("c", "d")}, {"a": 2, "b": 3, "c": 2, "d": 3})
    assert both.nodes == (Delta(("a", "c")), Delta(("b", "d")))


def test_average_over_nothing_is_not_defined() -> None:
    net = lensor.contraction("n i -> i", "X").scaled(1, {"n": -1})
    with pytest.raises(
        ValueError, match="index 'n' has size 0, expected at least 1: the average over it is not defined"
    ):
        net.bind(n=0)
    assert lensor.contraction("n i -> i", "X").scaled(1, {"n": 2}).bind(n=0).scale == Scale(Fraction(0))


def test_sizes_of_a_wide_network() -> None:
    net = ops.conv(ConvSpec(4, 8, (9,), 3, groups=2))
    assert net.sizes == {"n": None, "g": 2, "c_in": 2, "c_out": 4, "i1": 9, "o1": 7, "k1": 3}
    assert net.operand_names == ("X", "W")
    assert net.operands == ("X", IndexPattern(9, 3), "W")
    assert net.output == (("n",), ("g", "c_out"), ("o1",))
    assert net.output_indices == ("n", "g", "c_out", "o1")
    assert net.output_shape == (None, 8, 7)
    assert set(net.inner_indices) == {"c_in", "i1", "k1"}
    assert net.group_size(("g", "c_in")) == 4
    assert net.group_size(()) == 1
    assert net.group_size(("n", "g")) is None
    assert net.fresh("o1") == "o1_"
    assert net.fresh("o1", ["o1_"]) == "o1__"
    assert net.fresh("x") == "x"
    assert net.terms == (net,)


# -------------------------------------------------------------------------------------------------------- immutability
@pytest.mark.parametrize(
    "thing",
    [
        X,
        Pattern(IndexPattern(5, 3), (("i",), ("o",), ("k",))),
        Delta(("i", "j")),
        Ones("i"),
        Scale(),
        ops.conv(SPECS["1-d"]),
        ops.conv(ConvSpec(2, 2, 5, 3, bias=True)),
        ops.conv(SPECS["dense"]).simplify().trace[0],
        IndexPattern(5, 3),
        SPECS["1-d"],
        ops.conv(SPECS["1-d"]).plan(X=(1, 4, 9), W=(6, 2, 3)),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_fields_cannot_be_set(thing: Any) -> None:
    for field in dataclasses.fields(thing):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field.name, None)
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(thing, field.name)


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_read_from_a_network_is_no_way_to_change_it(bias: bool) -> None:
    net = ops.conv(ConvSpec(2, 2, 5, 3, bias=bias))
    before = (dict(net.sizes), dict(net.operand_legs), net.output_shape, hash(net), str(net))
    for mapping in (net.sizes, net.operand_legs, *(term.canonical_order for term in net.terms)):
        try:
            mapping["n"] = 7  # either refused or without effect
            mapping.pop("X", None)
        except (TypeError, AttributeError):
            pass
    assert (dict(net.sizes), dict(net.operand_legs), net.output_shape, hash(net), str(net)) == before
    assert all("n" not in {**term.canonical_order} or term.canonical_order["n"] != 7 for term in net.terms)


@pytest.mark.parametrize("bias", [False, True])
def test_mappings_of_networks_and_sums_are_read_only(bias: bool) -> None:
    net = ops.conv(ConvSpec(2, 2, 5, 3, bias=bias))
    orders = [term.canonical_order for term in net.terms]
    for mapping in (net.sizes, net.operand_legs, *orders):
        name = next(iter(mapping))
        with pytest.raises(TypeError):
            mapping[name] = mapping[name]
        assert not hasattr(mapping, "pop")
        assert mapping == dict(mapping)
        assert {**mapping, "new": None}.keys() == {*mapping, "new"}
    for twin in copies(net):  # what was read before is no part of a copy
        assert (twin, hash(twin), twin.sizes, twin.operand_legs) == (net, hash(net), net.sizes, net.operand_legs)


def test_the_lists_a_network_is_made_from_can_be_changed_afterwards() -> None:
    nodes, output, sizes = [X], [("i",)], {"i": 2, "j": 3}
    net = Network.make(nodes, output, sizes)
    nodes.append(X)
    output.clear()
    sizes["i"] = 5
    assert (net.nodes, net.output, net.sizes) == ((X,), (("i",),), {"i": 2, "j": 3})


# ---------------------------------------------------------------------------------------------------------------- sums
def test_sums_are_equal_in_any_order() -> None:
    terms = ops.kfac_input_factor(ConvSpec(2, 3, 5, 3, groups=1), bias=True).terms
    assert len(terms) == 4
    whole = Sum(terms)
    for order in itertools.permutations(terms):
        assert Sum(order) == whole
        assert hash(Sum(order)) == hash(whole)
    assert disguised(whole, 5) == whole
    assert Sum(terms[:3]) != whole
    assert Sum((*terms, terms[0])) != whole
    assert Sum((*terms[:3], terms[3].scaled(2))) != whole
    assert whole != terms[0]


def test_addition_names_outputs_as_in_the_first_term() -> None:
    a = lensor.contraction("i j -> i j", "A", i=2, j=3)
    b = lensor.contraction("j i, k -> j i", "B", "C", i=3, j=2, k=4)
    both = a + b
    assert both.output == (("i",), ("j",))
    assert all(term.output == both.output for term in both.terms)
    assert (a + b) + a == a + (b + a)
    operands = operands_of(both)
    expected = operands["A"] + operands["B"] * operands["C"].sum()
    assert_close(evaluate_dense(both, operands), expected)
    assert_close(both(**operands), expected)
    assert both.operand_names == ("A", "B", "C")
    assert both.operands == (("A",), ("B", "C"))
    assert both.subscripts == "i j -> i j + i j, k -> i j"


def test_a_summed_index_that_clashes_with_the_output_is_renamed() -> None:
    a = lensor.contraction("i j -> i j", "A", i=2, j=3)
    b = lensor.contraction("p q j, i -> p q", "B", "C", p=2, q=3, j=5, i=4)
    both = a + b
    operands = operands_of(both)
    expected = operands["A"] + operands["B"].sum(2) * operands["C"].sum()
    assert_close(evaluate_dense(both, operands), expected)
    assert_close(both(**operands), expected)


# -------------------------------------------------------------------------------------------------------------- copies
def copies(thing: Any) -> list[Any]:
    return [
        copy.copy(thing),
        copy.deepcopy(thing),
        *(pickle.loads(pickle.dumps(thing, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)),
    ]


@pytest.mark.parametrize("op", BUILDERS)
def test_networks_are_copied(op: str) -> None:
    for net in (BUILDERS[op](SPECS["1-d"]), BUILDERS[op](SPECS["dense"]).simplify()):
        hash(net), net.sizes  # filled in before as well as after
        for twin in copies(net):
            assert type(twin) is type(net)
            assert twin == net
            assert hash(twin) == hash(net)
            assert (twin.exact, twin.trace, str(twin), repr(twin)) == (net.exact, net.trace, str(net), repr(net))
            twin.check()
            known = bound(twin)
            operands = operands_of(known)
            assert_close(known(**operands), bound(net)(**operands), 0)


@pytest.mark.parametrize("spec", SPECS)
def test_specs_and_patterns_are_copied(spec: str) -> None:
    for thing in (SPECS[spec], *SPECS[spec].patterns):
        for twin in copies(thing):
            assert twin == thing
            assert hash(twin) == hash(thing)
            assert repr(twin) == repr(thing)
            if isinstance(thing, IndexPattern):
                assert np.array_equal(twin.materialize(), thing.materialize())
            else:
                assert (twin.patterns, twin.output_size) == (thing.patterns, thing.output_size)


@pytest.mark.parametrize("op", BUILDERS)
def test_plans_are_copied(op: str) -> None:
    net = bound(BUILDERS[op](SPECS["1-d"]))
    operands = operands_of(net)
    plan = net.plan(**operands)
    expected = plan(**operands)
    for twin in copies(plan):
        assert (twin.steps, twin.shapes, twin.result, twin.name) == (plan.steps, plan.shapes, plan.result, plan.name)
        assert str(twin) == str(plan)
        assert_close(twin(**operands), expected, 0)
        assert_close(twin(**{name: torch.tensor(array) for name, array in operands.items()}), expected)


def test_errors_are_copied() -> None:
    for error in (NetworkError("some reason"), lensor.SubscriptsError("some reason", "a b", 2)):
        for twin in copies(error):
            assert type(twin) is type(error)
            assert str(twin) == str(error)


# ---------------------------------------------------------------------------------------------------------------- large
def test_a_chain_of_more_than_sixty_indices() -> None:
    length = 70
    rng = np.random.default_rng(0)
    sizes = [2 + at % 3 for at in range(length + 1)]
    matrices = {f"A{at}": rng.standard_normal((sizes[at], sizes[at + 1])) for at in range(length)}
    text = ", ".join(f"i{at} i{at + 1}" for at in range(length)) + f" -> i0 i{length}"
    net = lensor.contraction(text, *matrices)
    assert len(net.sizes) == length + 1
    expected = np.linalg.multi_dot(list(matrices.values()))
    assert_close(net(**matrices), expected)
    assert_close(evaluate_dense(net.bind({f"i{at}": size for at, size in enumerate(sizes)}), matrices), expected)
    assert_close(net(**{name: torch.tensor(matrix) for name, matrix in matrices.items()}), expected)
    assert_close(lensor.einsum(text, *matrices.values()), expected)
    assert net == disguised(net, 0)
    assert lensor.parse(str(net)) == net


def test_convolutions_one_after_another_with_more_than_sixty_indices() -> None:
    layers, size = 14, 40
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 2, size))
    weights = [rng.standard_normal((2, 2, 2)) for _ in range(layers)]
    parts, operands, arrays = ["n c0 i0"], ["X"], {"X": x}
    expected = torch.tensor(x)
    for at, weight in enumerate(weights):
        parts += [f"i{at} i{at + 1} k{at}", f"c{at + 1} c{at} k{at}"]
        operands += [IndexPattern(size - at, 2), f"W{at}"]
        arrays[f"W{at}"] = weight
        expected = torch.nn.functional.conv1d(expected, torch.tensor(weight))
    net = lensor.contraction(f"{', '.join(parts)} -> n c{layers} i{layers}", *operands)
    assert len(net.sizes) == 3 * layers + 3
    assert_close(net(**arrays), expected)
    jacobian = net.jacobian("W3").jacobian("W9")
    tangents = {name: array for name, array in arrays.items() if name not in ("W3", "W9")}
    found = jacobian(**tangents)
    assert_close(np.einsum("nciabkdel,abk,del->nci", found, weights[3], weights[9]), expected)


# --------------------------------------------------------------------------------------------------------------- trace
def test_a_trace_tells_each_step() -> None:
    net = ops.conv(ConvSpec(4, 6, (9, 7), (3, 2), stride=(3, 2), groups=2))
    simple = net.simplify()
    trace = simple.trace
    assert net.trace == ()
    assert trace
    assert trace[0].before == str(net)
    assert trace[-1].after == str(simple)
    for one, two in itertools.pairwise(trace):
        assert one.after == two.before
    numbers = {"structural", "modes", *map(str, range(1, 24))}
    for firing in trace:
        assert set(firing.number.split(", ")) <= numbers
        assert str(firing) == f"{firing.rule} (rule {firing.number}):\n    {firing.before}\n  → {firing.after}"


def test_a_trace_is_no_part_of_identity() -> None:
    simple = ops.conv(SPECS["dense"]).simplify()
    bare = simple.replace(trace=())
    assert simple.trace
    assert not bare.trace
    assert simple == bare
    assert hash(simple) == hash(bare)
    assert bare.simplify().trace == ()
    assert simple.simplify().trace == simple.trace


def test_a_sum_s_trace_is_that_of_its_terms() -> None:
    net = ops.conv(ConvSpec(2, 3, 9, 3, stride=3, bias=True)).simplify()
    assert isinstance(net, Sum)
    assert net.trace == tuple(firing for term in net.terms for firing in term.trace)
    twice = ops.conv(SPECS["1-d"]) + ops.conv(SPECS["1-d"])
    simple = twice.simplify()
    assert isinstance(simple, Network)
    assert simple.scale.factor == 2
    assert simple.trace[-1].rule == "like terms added"
