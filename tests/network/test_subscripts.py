"""Text and networks both ways, errors that point at the place, and einsum over arrays and patterns."""

from __future__ import annotations

import pickle
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lensor
from lensor import ConvSpec, Delta, IndexPattern, Network, NetworkError, Ones, Operand, Pattern, SubscriptsError, ops
from tests.support.cases import BUILDERS, SPECS, assert_close, bound, random_network

SEEDS = st.integers(0, 2**32 - 1)
RNG = np.random.default_rng(0)
PI = IndexPattern(5, 3)


# ---------------------------------------------------------------------------------------------------------- round trip
def assert_round_trip(net: Any) -> None:
    """`repr` needs nothing else; `str` needs the sizes and patterns. Names, order and scale are the same again."""
    again = eval(repr(net), {"parse": lensor.parse})
    assert again == net
    assert again.exact == net.exact
    assert repr(again) == repr(net)
    parsed = lensor.parse(str(net), sizes=net.sizes, patterns=net.patterns)
    assert parsed.exact == net.exact
    assert str(parsed) == str(net)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", BUILDERS)
def test_every_operation_as_text(op: str, spec: str) -> None:
    net = BUILDERS[op](SPECS[spec])
    assert_round_trip(net)
    assert_round_trip(bound(net))
    assert_round_trip(net.simplify())


def test_biased_convolutions_as_text() -> None:
    for spec in (ConvSpec(4, 6, (9, 7), 3, stride=2, groups=2, bias=True), ConvSpec(2, 3, 5, 3, bias=True)):
        net = ops.conv(spec)
        assert_round_trip(net)
        assert_round_trip(net.vjp("X"))
        assert_round_trip(net.batch("v", ["X"]))
    assert str(net) == "X[n (g c_in) i1] Π1[i1 o1 k1] W[(g c_out) c_in k1] + b[(g c_out)] 1[n] 1[o1] -> n (g c_out) o1"
    assert repr(net) == (
        "parse('X[n (g c_in) i1] Π1[i1 o1 k1] W[(g c_out) c_in k1] + b[(g c_out)] 1[n] 1[o1] -> n (g c_out) o1 "
        "where Π1=IndexPattern(5, 3), c_in=2, c_out=3, g=1, i1=5, k1=3, o1=3')"
    )


@settings(max_examples=60)
@given(SEEDS)
def test_random_operations_as_text(seed: int) -> None:
    net = random_network(seed)
    assert_round_trip(net)
    assert_round_trip(net.simplify())


def free_network(choose: random.Random) -> Network:
    """Any nodes, groups, sizes and scales, with names that look like other parts of the notation."""
    names = ["a", "b_", "i1", "i1__", "X", "W", "n", "δ", "Π1", "delta", "_", "ä"]
    indices = choose.sample(names, choose.randint(1, 6))
    sizes: dict[str, int | None] = {index: choose.choice([None, 0, 1, 2, 3, 12]) for index in indices}
    nodes: list[Any] = []

    def legs(most: int) -> tuple[tuple[str, ...], ...]:
        return tuple(
            tuple(choose.choice(indices) for _ in range(choose.choice([0, 1, 1, 1, 2, 3])))
            for _ in range(choose.randint(0, most))
        )

    for at in range(choose.randint(1, 4)):
        match choose.choice(["operand", "operand", "pattern", "delta", "ones"]):
            case "operand":
                nodes.append(Operand(choose.choice(["X", "W", "a1"]) + f"{at}", legs(4)))
            case "pattern":
                pattern = IndexPattern(
                    choose.randint(3, 9), choose.randint(1, 3), choose.randint(1, 3), choose.choice([0, 1, (2, 0)])
                )
                shape = (pattern.input_size, pattern.output_size, pattern.kernel_size)
                inside = tuple(f"p{at}{leg}" for leg in "iok")
                sizes |= dict(zip(inside, shape, strict=True))
                nodes.append(Pattern(pattern, tuple((index,) for index in inside)))  # type: ignore[arg-type]
            case "delta":
                sizes |= {f"d{at}x": 4, f"d{at}y": 4, f"d{at}z": 4}
                nodes.append(Delta(tuple(f"d{at}{leg}" for leg in "xyz"[: choose.randint(2, 3)])))
            case "ones":
                nodes.append(Ones(choose.choice(indices)))
    held = sorted({index for node in nodes for leg in node.legs for index in leg})
    open_ = choose.sample(held, choose.randint(0, len(held)))
    output = []
    while open_:
        cut = choose.randint(0, min(2, len(open_)))
        output.append(tuple(open_[:cut]))
        open_ = open_[cut:]
    net = Network.make(nodes, output, sizes)
    powers = {i: choose.choice([-2, -1, 1, 3]) for i in held if sizes[i] is None and choose.random() < 0.3}
    return net.scaled(choose.choice([1, 1, 0, -1, Fraction(2, 3), Fraction(-7, 10**12)]), powers)


@settings(max_examples=200)
@given(SEEDS)
def test_random_networks_as_text(seed: int) -> None:
    net = free_network(random.Random(seed))
    assert_round_trip(net)


@pytest.mark.parametrize(
    "name", ["in", "is", "lambda", "None", "where", "parse", "δ", "_", "x1", "ärmel", "delta", "l·l", "e\u0301"]
)
def test_any_identifier_is_an_index_name(name: str) -> None:
    net = lensor.contraction(f"n {name} k, {name} m -> n m", "X", "W", **{name: 4})
    assert_round_trip(net)
    assert net.sizes[name] == 4
    assert_round_trip(net.batch("v", ["X"]).keep(name))


def test_terms_with_a_name_of_two_sizes_as_text() -> None:
    terms = [("X[n i]", 3), ("Y[n i]", 4), ("Z[n i]", None), ("A[n i] B[i]", None), ("C[n i] D[i]", 3)]
    net = lensor.network.sum_of([lensor.parse(f"{text} -> n", {"n": 2, "i": size}) for text, size in terms])
    again = eval(repr(net), {"parse": lensor.parse})
    assert again == net
    assert [term.sizes for term in again.terms if "i" in term.sizes] == [{"n": 2, "i": 3}] * 2
    assert repr(again) == repr(net)


@pytest.mark.parametrize("name", ["", "1", "a b", "x²", "a,b", 3])
def test_index_names_are_identifiers(name: Any) -> None:
    with pytest.raises(NetworkError, match=r"the name of an index is .*, expected an identifier"):
        Network.make([Operand("X", ((name,),))], ((name,),), {name: 2})


def test_the_legend_is_told_from_an_index_named_where() -> None:
    for text in ("X[where] -> where where where=4", "X[where n] -> where where n=2", "where[where] -> where"):
        assert repr(lensor.parse(text)) == f"parse({text!r})"
    assert lensor.parse("X[n where] -> where\n  where n = 2 , where = 3 ,").sizes == {"n": 2, "where": 3}
    assert lensor.parse("X[i] -> where i=3") == lensor.contraction("i ->", "X", i=3)
    total = lensor.parse("X[where] -> where + in[i] -> i where where=3, i=3")
    assert total.operand_names == ("X", "in")
    assert_round_trip(total)


@pytest.mark.parametrize("name", ["in", "where", "x1", "parse", "Y_"])
def test_any_identifier_is_an_operand_name(name: str) -> None:
    assert_round_trip(lensor.contraction("n i, i m -> n m", name, "W", n=2))
    assert_round_trip(lensor.contraction("n i, i m -> n m", "X", "W", n=2).rename_operands(X=name))


@pytest.mark.parametrize("name", ["δ", "delta", "Π1"])
def test_names_with_a_meaning_are_no_operand_names(name: str) -> None:
    """Else the text would mean another network."""
    net = lensor.contraction("n i, i m -> n m", "X", "W", n=2)
    message = rf"is '{name}', expected an identifier other than .* deltas, and .* index patterns"
    for make in (
        lambda: net.rename_operands(X=name),
        lambda: Operand(name, (("i",),)),
        lambda: net.vjp("X", name),
        lambda: net.jvp("X", name),
        lambda: net.substitute("W", Network.make([Operand(name, (("i",), ("m",)))], [("i",), ("m",)], net.sizes)),
    ):
        with pytest.raises(NetworkError, match=message):
            make()
    if name == "Π1":  # the others are what `contraction` calls deltas
        with pytest.raises(NetworkError, match=message):
            lensor.contraction("n i -> n", name)


@pytest.mark.parametrize("name", ["Π", "Πx", "Π1_", "delta1", "δ_", "π1"])
def test_names_close_to_those_with_a_meaning_are_operand_names(name: str) -> None:
    assert_round_trip(lensor.contraction("n i, i m -> n m", name, "W", n=2))


@pytest.mark.parametrize("name", ["", "1", "a b", "X (0)", 3, None])
def test_operand_names_are_identifiers(name: Any) -> None:
    with pytest.raises(NetworkError, match="expected an identifier"):
        Operand(name, ())
    with pytest.raises(NetworkError, match="expected different identifiers"):
        lensor.contraction("n i -> n", "X").rename_operands(X=name)


def test_text_of_a_network() -> None:
    net = lensor.contraction("n (g c) i, i o k, g g_, a, () i -> n (g c o) g_ () k", "X", PI, "δ", "1", "Y", g=2, n=3)
    assert str(net) == "X[n (g c) i] Π1[i o k] δ[g g_] 1[a] Y[() i] -> n (g c o) g_ () k"
    assert net.subscripts == "n (g c) i, i o k, g g_, a, () i -> n (g c o) g_ () k"
    assert net.operands == ("X", PI, "δ", "1", "Y")
    assert net.patterns == {"Π1": PI}
    assert str(net.scaled("-2/3", {"c": -1, "a": 2})) == f"-2/3 a^2 c^-1 {net}"
    assert str(lensor.contraction("i ->", "X")) == "X[i] ->"
    assert str(lensor.contraction("->", "X")) == "X[] ->"


def test_copies_of_a_pattern_share_a_name_and_other_patterns_do_not() -> None:
    other = IndexPattern(5, 3, padding=(1, -1))
    net = lensor.contraction("i o k, i_ o_ k_, j p l, i q m -> ", PI, PI, PI, other)
    assert str(net) == "Π1[i o k] Π1[i_ o_ k_] Π2[j p l] Π3[i q m] ->"
    assert net.patterns == {"Π1": PI, "Π2": PI, "Π3": other}


def test_parsing_takes_what_people_write() -> None:
    net = lensor.parse("X[n (g c)]  W[ (g o)   c ]->n ( g o )", sizes={"g": 2})
    assert net == lensor.contraction("n (g c), (g o) c -> n (g o)", "X", "W", g=2)
    assert lensor.parse("2 3/4 X[i] 1/3 n^2 n^-1 1[n] -> i").scale == lensor.Scale(Fraction(1, 2), (("n", 1),))
    assert lensor.parse("delta[a b] -> a b").nodes == (Delta(("a", "b")),)
    assert lensor.parse("A[i 1 ()] -> i 1").nodes == (Operand("A", (("i",), (), ())),)
    assert lensor.parse("A[i o k] -> o", patterns={"A": PI}).nodes == (Pattern(PI, (("i",), ("o",), ("k",))),)
    assert lensor.parse("X[a] δ[a b] δ[b c] -> c where a=4").sizes == {"a": 4, "b": 4, "c": 4}


def test_terms_of_a_sum_with_outputs_of_their_own() -> None:
    net = lensor.parse("A[i j] -> i j + B[p q] -> q p", sizes={"i": 2, "j": 3})
    assert net.output == (("i",), ("j",))
    assert [term.output for term in net.terms] == [(("i",), ("j",))] * 2
    a, b = RNG.standard_normal((2, 3)), RNG.standard_normal((3, 2))
    assert_close(net(A=a, B=b), a + b.T)


# -------------------------------------------------------------------------------------------------------------- errors
def assert_points_at(error: SubscriptsError, text: str, caret: str) -> None:
    """The message shows the text with a caret under it where `caret` has one."""
    lines = str(error).split("\n")
    assert lines[-2:] == [f"  {text}", f"  {caret.rstrip()}"]
    assert (error.text, error.position) == (text, caret.index("^"))
    assert error.reason == "\n".join(lines[:-2])


SUBSCRIPTS_ERRORS = [
    # text, caret, what the message says
    ("n i", "   ^", "found the end, expected '->'"),
    ("n i, i o  ", "        ^", "expected '->' and the output's indices"),
    ("", "^", "expected '->'"),
    ("n (g c -> n", "       ^", r"found '->', expected an index name or '\)' inside a group"),
    ("n (g (c)) -> n", "     ^", r"found '\(', expected an index name or '\)' inside a group"),
    ("n (g", "  ^", r"this '\(' is never closed"),
    ("n g) -> n", "   ^", r"found '\)'"),
    ("n 2 -> n", "  ^", "found '2'"),
    ("n -> n -> n", "       ^", "found '->', expected an output index or the end"),
    ("n -> n, n", "      ^", "found ',', expected an output index or the end"),
    ("n i -> n k", "         ^", "output index 'k' is not in the operands"),
    ("n i -> n (i k)", "            ^", "output index 'k' is not in the operands"),
    ("n i -> n i n", "           ^", "output index 'n' is repeated in the output"),
    ("n i -> (n n)", "          ^", "output index 'n' is repeated in the output"),
    ("n i -> ...", "       ^", r"output index '\.\.\.' is not in the operands"),
    ("n $ -> n", "  ^", r"cannot read '\$'"),
    ("n i,  %i -> n", "      ^", "cannot read '%i'"),
    ("n i -> n\t#", "        \t^", "cannot read '#'"),
    ("n\ti -> n #", " \t       ^", "cannot read '#'"),
    ("n - > n", "  ^", "cannot read '-'"),
    ("n ->> n", "    ^", "cannot read '>'"),
    ("n.i -> n", " ^", r"cannot read '\.'"),
    ("n 1i -> n", "  ^", "cannot read '1i'"),
    ("n x² -> n", "  ^", "cannot read 'x²', expected an index name"),
    ("n -1 -> n", "  ^", "found '-1'"),
    ("n 1/2 -> n", "  ^", "found '1/2'"),
    ("n^2 -> n", " ^", r"found '\^'"),
    ("n i,", "    ^", "found the end"),
    ("n (... i) -> n", "   ^", r"found '\.\.\.'"),
    ("n i -> (n i", "       ^", r"this '\(' is never closed"),
    ("n i -> n) i", "        ^", r"found '\)'"),
    ("n i -> n + i", "         ^", r"found '\+'"),
    ("n i -> n 2", "         ^", "found '2'"),
    ("n_i i -> n _", "         ^", "output index 'n' is not in the operands"),
    ("... i -> ... ...", "             ^", r"'\.\.\.' is repeated in the output"),
    ("n [i] -> n", "  ^", r"found '\['"),
    ("n + i -> n", "  ^", r"found '\+'"),
    ("n ... i ... -> ...", "^", r"several '\.\.\.', expected at most one"),
    ("a, n ... ... -> ... n", "   ^", r"several '\.\.\.', expected at most one"),
    ("n ... i -> n i", "              ^", r"'\.\.\.' is missing from the output"),
    ("n ... i -> n i  ", "              ^", r"'\.\.\.' is missing from the output"),
]


@pytest.mark.parametrize(("text", "caret", "message"), SUBSCRIPTS_ERRORS, ids=[case[0] for case in SUBSCRIPTS_ERRORS])
def test_errors_point_at_the_place(text: str, caret: str, message: str) -> None:
    count = max(text.split("->")[0].count(",") + 1, 1)
    with pytest.raises(SubscriptsError, match=message) as caught:
        lensor.einsum(text, *[np.ones((2, 2))] * count)
    assert_points_at(caught.value, text, caret)
    with pytest.raises(SubscriptsError, match=message):
        lensor.contraction(text, *["X"] * count)


PARSE_ERRORS = [
    ("X[n i", "     ^", r"found the end, expected an index or '\]'"),
    ("X[n (i] -> n", "      ^", r"found '\]', expected an index name or '\)' inside a group"),
    ("X[n i] n", "        ^", r"expected '\[' or '\^'"),
    ("X n -> n", "  ^", r"found 'n', expected '\[' or '\^'"),
    ("X[n i]", "      ^", r"found the end, expected a node, '\+' or '->'"),
    ("X[n i] -> n i ]", "              ^", r"found '\]', expected an output index, '\+' or the end"),
    ("X[n i] n^1/2 -> i", "         ^", "a whole power"),
    ("X[n i] n^ -> i", "          ^", "a whole power"),
    ("X[n i] n^i -> i", "         ^", "found 'i', expected a whole power"),
    ("X[n i] n^", "         ^", "found the end, expected a whole power"),
    ("n^2^3 X[n] -> n", "   ^", r"found '\^', expected a node"),
    ("2^3 X[i] -> i", " ^", r"found '\^', expected a node"),
    ("X[i] 1/0 -> i", "     ^", "found '1/0', expected a number"),
    ("0.5 X[i] -> i", " ^", r"cannot read '\.'"),
    ("-1[i] -> i", "^", "is '-1', expected an identifier"),
    ("1[i j] -> i", "^", "ones have legs .*, expected one single index"),
    ("δ[] -> ", "^", "a delta has legs .*, expected at least two single indices"),
    ("X[...] -> ...", "  ^", r"found '\.\.\.', expected an index or '\]'"),
    ("X[i] -> ...", "        ^", r"found '\.\.\.', expected an output index"),
    ("", "^", "found the end, expected a node"),
    ("X", " ^", r"found the end, expected '\[' or '\^'"),
    ("X[i]] -> i", "    ^", r"found '\]', expected a node"),
    ("(X[i]) -> i", "^", r"found '\(', expected a node"),
    ("X[i], Y[i] -> i", "    ^", "found ',', expected a node"),
    ("X[i] -> i, j", "         ^", "found ',', expected an output index"),
    ("X[i] -> i +", "           ^", "found the end, expected a node"),
    ("X[i] -> i -> i", "          ^", "found '->', expected an output index"),
    ("X[i^2] -> i", "   ^", r"found '\^', expected an index or '\]'"),
    ("X[(i (j))] ->", "     ^", r"found '\(', expected an index name or '\)' inside a group"),
    ("X[(i", "  ^", r"this '\(' is never closed"),
    ("X[n i] Π1[i o k] -> n", "       ^", "no index pattern is given for Π1"),
    ("X[n i] δ[i] -> n", "       ^", "a delta has legs .*, expected at least two single indices"),
    ("X[n i] δ[(i j) k] -> n", "       ^", "a delta has legs .*, expected at least two single indices"),
    ("X[n i] 1[i n] -> n", "       ^", "ones have legs .*, expected one single index"),
    ("X[n i] 2[i] -> n", "       ^", "is '2', expected an identifier"),
    ("X[n, i] -> n", "   ^", r"found ',', expected an index or '\]'"),
    ("X[n i] & -> n", "       ^", r"cannot read '&', expected a node such as X\[n i\]"),
    ("X[1i] -> ", "  ^", "cannot read '1i'"),
    ("X[x²] -> ", "  ^", "cannot read 'x²'"),
    ("X[i] -> i where i=", "                  ^", "cannot read the text after 'where': .* size .* for 'i'"),
    ("X[i] -> i where 5=3", "                ^", "after 'where': expected name=size or name=IndexPattern"),
    ("X[i] -> i where i=3,, n=2", "                    ^", "expected name=size"),
    ("X[i] -> i where i=3, i=4", "                     ^", "'i' occurs twice"),
    ("X[i] -> i where i=3.5", "                  ^", "expected a size"),
    ("X[i] -> i where i=3 n=2", "                    ^", "expected ',' or the end"),
    ("X[i] -> i where Π1=IndexPattern(5)", "                   ^", "'kernel_size'"),
    ("X[i] -> i where Π1=IndexPattern(5, i)", "                   ^", "malformed"),
    ("X[i] -> i where Π1=IndexPattern(5, 9)", "                   ^", "kernel_size=9"),
    ("X[i] -> i where Π1=IndexPattern(5, 3", "                   ^", "for 'Π1'"),
    ("X[i] & -> i where i=3", "     ^", "cannot read '&'"),
    ("X[i] where i=3", "    ^", "found the end, expected a node"),
]


@pytest.mark.parametrize(("text", "caret", "message"), PARSE_ERRORS, ids=[case[0] for case in PARSE_ERRORS])
def test_errors_of_parse_point_at_the_place(text: str, caret: str, message: str) -> None:
    with pytest.raises(SubscriptsError, match=message) as caught:
        lensor.parse(text)
    assert_points_at(caught.value, text, caret)


def test_the_caret_stands_under_its_line() -> None:
    with pytest.raises(SubscriptsError) as caught:
        lensor.contraction("n i,\n  i %,\n  j -> n", "X", "Y", "Z")
    assert str(caught.value).split("\n")[1:] == ["  n i,", "    i %,", "      ^"]
    with pytest.raises(SubscriptsError) as caught:
        lensor.parse("X[n i]\n  -> n\n  where i=")
    assert str(caught.value).split("\n")[1:] == ["  X[n i]", "    -> n", "    where i=", "            ^"]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_pattern_with_two_legs_in_text() -> None:
    with pytest.raises(SubscriptsError, match=r"an index pattern has 2 legs, expected 3 \(i, o, k\)") as caught:
        lensor.parse("X[n i] Π1[i o] -> n", patterns={"Π1": PI})
    assert_points_at(caught.value, "X[n i] Π1[i o] -> n", "       ^")
    with pytest.raises(SubscriptsError, match=r"an index pattern has . legs, expected 3") as caught:
        lensor.contraction("n i, i o -> n", "X", PI)
    assert_points_at(caught.value, "n i, i o -> n", "     ^")


def test_contraction_errors() -> None:
    with pytest.raises(ValueError, match="the number of operands is 1, expected 2"):
        lensor.contraction("n i, i o -> n o", "X")
    with pytest.raises(
        SubscriptsError, match=r"subscripts of a network contain '\.\.\.', expected explicit indices"
    ) as caught:
        lensor.contraction("n ... -> n ...", "X")
    assert_points_at(caught.value, "n ... -> n ...", "  ^")
    with pytest.raises(ValueError, match="a size is given for 'z', expected an index"):
        lensor.contraction("n i -> n", "X", z=3)
    with pytest.raises(TypeError, match="an operand is of type int, expected a name or an IndexPattern"):
        lensor.contraction("n i -> n", 3)  # type: ignore[arg-type]
    with pytest.raises(SubscriptsError, match="the name of an operand is 'X Y', expected an identifier"):
        lensor.contraction("n i -> n", "X Y")
    with pytest.raises(TypeError, match="subscripts is of type int, expected a str"):
        lensor.contraction(3, "X")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'i' has size 5 in IndexPattern\(5, 3\), expected 4 as elsewhere"):
        lensor.contraction("n i, i o k -> n", "X", PI, i=4)
    with pytest.raises(NetworkError, match="operand 'X' occurs with shapes"):
        lensor.contraction("n i, i n -> n", "X", "X", n=2, i=3)
    with pytest.raises(NetworkError, match=r"a delta has indices .*, expected at least two different ones"):
        lensor.contraction("i i -> i", "δ")
    with pytest.raises(NetworkError, match="output index 'z' is not in any node"):
        lensor.parse("X[n] -> z")


# -------------------------------------------------------------------------------------------------------------- einsum
def test_einsum_of_the_readme() -> None:
    pi = IndexPattern(9, 3, stride=2, padding=1)
    x, w = RNG.standard_normal((2, 4, 9, 9)), RNG.standard_normal((6, 2, 3, 3))
    text = "n (g ci) i1 i2, i1 o1 k1, i2 o2 k2, (g co) ci k1 k2 -> n (g co) o1 o2"
    expected = torch.nn.functional.conv2d(torch.tensor(x), torch.tensor(w), None, 2, 1, 1, 2)
    assert_close(lensor.einsum(text, x, pi, pi, w, g=2), expected)
    found = lensor.einsum(text, torch.tensor(x), pi, pi, torch.tensor(w), g=2)
    assert isinstance(found, torch.Tensor)
    assert_close(found, expected)


def test_einsum_with_repeated_indices_is_a_diagonal() -> None:
    x, y = RNG.standard_normal((3, 3, 4)), RNG.standard_normal((3, 3, 3))
    assert_close(lensor.einsum("i i j -> j", x), np.einsum("iij->j", x))
    assert_close(lensor.einsum("i i j -> j i", x), np.einsum("iij->ji", x))
    assert_close(lensor.einsum("i i i -> ", y), np.einsum("iii->", y))
    assert_close(lensor.einsum("i i i -> i", y), np.einsum("iii->i", y))
    assert_close(lensor.einsum("i j i, i i k -> k j", y, x), np.einsum("iji,iik->kj", y, x))
    z = RNG.standard_normal((6, 2, 3))
    assert_close(lensor.einsum("(a b) a b -> b", z, a=2), np.einsum("abab->b", z.reshape(2, 3, 2, 3)))
    t = RNG.standard_normal(9)
    assert_close(lensor.einsum("(a a) -> a", t, a=3), t[::4])
    # A pattern's diagonal: Π[i,o,k] with two equal legs.
    pi = IndexPattern(3, 3, padding=1)
    v = RNG.standard_normal(3)
    assert_close(lensor.einsum("i i k, k -> i", pi, v), np.einsum("iik,k->i", pi.materialize().astype(float), v))
    assert_close(lensor.einsum("i o i, o -> i", pi, v), np.einsum("ioi,o->i", pi.materialize().astype(float), v))


def test_einsum_with_axes_of_length_one() -> None:
    x = RNG.standard_normal((1, 4, 1))
    assert_close(lensor.einsum("1 i () -> i", x), x[0, :, 0])
    assert_close(lensor.einsum("1 i 1 -> 1 i ()", x), x)
    assert_close(lensor.einsum("1 i 1, i -> 1", x, np.ones(4)), [x.sum()])
    with pytest.raises(ValueError, match="size 4"):
        lensor.einsum("1 1 1 ->", x)


def test_einsum_with_an_ellipsis() -> None:
    x, w = RNG.standard_normal((2, 3, 4, 5)), RNG.standard_normal((5, 6))
    assert_close(lensor.einsum("... i, i j -> ... j", x, w), x @ w)
    assert_close(lensor.einsum("... i, i j -> j ...", x, w), np.einsum("...i,ij->j...", x, w))
    assert_close(lensor.einsum("n ... -> ... n", x), np.einsum("n...->...n", x))
    assert_close(lensor.einsum("a b c d ... -> ... d c b a", x), x.transpose())
    y = RNG.standard_normal((4, 5))
    assert_close(lensor.einsum("..., ... -> ...", x, y), x * y)
    assert_close(lensor.einsum("a ..., ... -> ...", x, y), (x * y).sum(0))
    assert_close(lensor.einsum("..., ... -> ...", x, np.array(2.0)), 2 * x)
    pi = IndexPattern(5, 3)
    assert_close(
        lensor.einsum("... i, i o k -> ... o k", x, pi), np.lib.stride_tricks.sliding_window_view(x, 3, axis=-1)
    )
    with pytest.raises(SubscriptsError, match="operand 1 has 1 axes, expected at least 2") as caught:
        lensor.einsum("... i, ... i j -> ... j", x, np.ones(5))
    assert_points_at(caught.value, "... i, ... i j -> ... j", "       ^")
    with pytest.raises(ValueError, match="has size"):
        lensor.einsum("..., ... -> ...", x, np.ones((5, 4)))


def test_einsum_with_groups() -> None:
    x, w = RNG.standard_normal((6, 4)), RNG.standard_normal((2, 3))
    assert_close(lensor.einsum("(a b) i, a b -> i", x, w), np.einsum("abi,ab->i", x.reshape(2, 3, 4), w))
    assert_close(lensor.einsum("(a b) i -> b (i a)", x, b=3), x.reshape(2, 3, 4).transpose(1, 2, 0).reshape(3, 8))
    expected = x.reshape(1, 2, 3, 2, 2).transpose(4, 3, 2, 1, 0).reshape(4, 3, 2)
    assert_close(lensor.einsum("(a b c) (d e) -> (e d) c (b a)", x, a=1, b=2, d=2), expected)
    with pytest.raises(ValueError, match=r"axis \(a b\) of operand 0 has size 6, expected a multiple of 4"):
        lensor.einsum("(a b) i -> a b i", x, a=4)
    with pytest.raises(ValueError, match=r"size of index 'a' does not follow .*: give it as a keyword, a="):
        lensor.einsum("(a b) i -> a b i", x)
    with pytest.raises(ValueError, match=r"group \(a b\) has size 6 in operand 0, expected 4"):
        lensor.einsum("(a b) i -> a b i", x, a=2, b=2)


def test_einsum_with_patterns_only_or_with_no_operands() -> None:
    dense = PI.materialize().astype(float)
    found = lensor.einsum("i o k -> o k i", PI)
    assert found.dtype == np.float64
    assert_close(found, dense.transpose(1, 2, 0))
    assert_close(lensor.einsum("i o k, i o_ k_ -> k k_", PI, PI), np.einsum("iok,ipl->kl", dense, dense))
    assert_close(lensor.einsum("i o k -> ", PI), dense.sum())
    assert_close(lensor.einsum("->", np.array(3.0)), 3.0)
    with pytest.raises(ValueError, match="the number of operands is 0, expected 1"):
        lensor.einsum("i ->")


def test_einsum_sizes() -> None:
    x = RNG.standard_normal((3, 4))
    with pytest.raises(ValueError, match="index 'i' has size 4 in operand 1, expected 3 as elsewhere"):
        lensor.einsum("i j, i k -> j", x, np.ones((4, 2)))
    with pytest.raises(ValueError, match="index 'i' has size 3 in operand 0, expected 5"):
        lensor.einsum("i j -> j", x, i=5)
    with pytest.raises(ValueError, match="'i' has size"):
        lensor.einsum("j i, i o k -> j", x, PI)
    with pytest.raises(ValueError, match="a size is given for 'z', expected an index of 'i j -> j'"):
        lensor.einsum("i j -> j", x, z=2)
    with pytest.raises(
        SubscriptsError, match=r"operand 1 has 2 axes \(shape \(3, 4\)\), expected 1 as in its subscripts"
    ) as c:
        lensor.einsum("i j, i -> j", x, x)
    assert_points_at(c.value, "i j, i -> j", "     ^")
    with pytest.raises(SubscriptsError, match="operand 1 has 3 axes") as c:
        lensor.einsum("i j, i o -> j", x, PI)
    assert_points_at(c.value, "i j, i o -> j", "     ^")
    with pytest.raises(ValueError, match="the number of operands is 2, expected 1"):
        lensor.einsum("i j -> j", x, x)
    with pytest.raises(TypeError):
        lensor.einsum("i j -> j", x, i=3.0)
    assert_close(lensor.einsum("i j -> j", x, i=np.int64(3)), x.sum(0))
    assert_close(lensor.einsum("i j -> j i", np.ones((0, 3))), np.ones((3, 0)))
    assert_close(lensor.einsum("i j, i -> j", np.ones((0, 3)), np.ones(0)), np.zeros(3))


def test_einsum_operands() -> None:
    x = RNG.standard_normal((3, 4))
    with pytest.raises(TypeError, match="arrays of numpy and torch, expected one framework"):
        lensor.einsum("i j, i j -> j", x, torch.tensor(x))
    with pytest.raises(TypeError, match=r"has type builtins\.list, expected an array of NumPy, torch or JAX"):
        lensor.einsum("i -> i", [1.0, 2.0])
    with pytest.raises(TypeError, match=r"has dtype int64, expected a floating or complex dtype"):
        lensor.einsum("i -> i", np.arange(3))
    with pytest.raises(TypeError, match=r"has dtype float32, expected float64"):
        lensor.einsum("i j, i j -> j", x, x.astype(np.float32))
    z = x + 1j * x
    assert_close(lensor.einsum("i j, i j -> j", z, z), (z * z).sum(0))
    for dtype in (np.float16, np.float32, np.longdouble, np.complex64):
        assert lensor.einsum("i j -> j", x.astype(dtype)).dtype == dtype


@pytest.mark.parametrize("text", ["i j, j -> i", " i j ,j->i  ", "row col, col -> row", "ä_1 ß, ß -> ä_1"])
def test_white_space_and_names_do_not_matter(text: str) -> None:
    x, v = RNG.standard_normal((3, 4)), RNG.standard_normal(4)
    assert_close(lensor.einsum(text, x, v), x @ v)


@settings(max_examples=200)
@given(SEEDS)
def test_einsum_equals_numpy_s(seed: int) -> None:
    """Random subscripts over arrays and patterns, with repeated indices, groups, empty legs and sizes of 0 and 1."""
    choose, rng = random.Random(seed), np.random.default_rng(seed)
    letters = "abcdef"[: choose.randint(1, 6)]
    sizes = {letter: choose.choice([1, 2, 2, 3, 3, 4] + [0] * (choose.random() < 0.1)) for letter in letters}
    patterns = {"p": IndexPattern(4, 2, stride=2, padding=1), "q": IndexPattern(3, 3, padding=1)}
    sizes |= {"i": 4, "o": 3, "k": 2, "x": 3}
    parts: list[str] = []
    numpy_parts: list[str] = []
    operands: list[Any] = []
    arrays: list[np.ndarray] = []
    for _ in range(choose.randint(1, 4)):
        if choose.random() < 0.25:
            name = choose.choice("pq")
            legs = "iok" if name == "p" else choose.choice(["xxx", "oxx", "xox", "xoo"])
            parts.append(" ".join(legs))
            numpy_parts.append(legs)
            operands.append(patterns[name])
            arrays.append(patterns[name].materialize().astype(float))
            continue
        groups = [
            [choose.choice([*letters, "i", "o", "k", "x"]) for _ in range(choose.choice([0, 1, 1, 1, 2]))]
            for _ in range(choose.randint(0, 4))
        ]
        flat = [index for group in groups for index in group]
        array = rng.standard_normal([sizes[index] for index in flat])
        arrays.append(array)
        operands.append(array.reshape([int(np.prod([sizes[i] for i in group])) for group in groups]))
        numpy_parts.append("".join(flat))
        parts.append(" ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups))
    held = sorted(set("".join(numpy_parts)))
    output = choose.sample(held, choose.randint(0, len(held)))
    text = f"{', '.join(parts)} -> {' '.join(output)}"
    known = {index: size for index, size in sizes.items() if index in held}
    expected = np.einsum(f"{','.join(numpy_parts)}->{''.join(output)}", *arrays)
    assert_close(lensor.einsum(text, *operands, **known), expected)
    together = f"{', '.join(parts)} -> ({' '.join(output)})"
    assert_close(lensor.einsum(together, *operands, **known), expected.reshape(-1))
    tensors = [torch.tensor(each) if isinstance(each, np.ndarray) else each for each in operands]
    assert_close(lensor.einsum(text, *tensors, **known), expected)
