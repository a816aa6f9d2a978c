"""Every operation is isomorphic to its contraction string in the table of operations.

The strings are the table's, with `i` for `i1 i2 …` and one pattern `i o k` for each spatial dimension.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import lensor
from lensor import ConvSpec, ops

PLAIN = {
    1: ConvSpec(6, 4, (9,), 3, stride=2, padding=1, groups=2),
    2: ConvSpec(6, 4, (9, 7), (3, 2), stride=(2, 1), padding=(1, 0), groups=2),
    3: ConvSpec(6, 4, (5, 6, 4), (3, 2, 2), stride=(2, 1, 3), groups=2),
}
TRANSPOSED = {
    1: ConvSpec(6, 4, (5,), 3, stride=2, padding=1, groups=2, transposed=True, output_padding=1),
    2: ConvSpec(6, 4, (5, 4), (3, 2), stride=(2, 1), padding=(1, 0), groups=2, transposed=True),
    3: ConvSpec(6, 4, (3, 4, 2), (3, 2, 2), stride=(2, 1, 3), groups=2, transposed=True),
}


ONE_GROUP = {
    1: ConvSpec(3, 4, (9,), 3, stride=2, padding=((0, 2),), padding_mode="circular"),
    2: ConvSpec(3, 4, (9, 7), (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 3)),
}
TRANSPOSED_ONE_GROUP = {
    1: ConvSpec(3, 4, (5,), 3, stride=3, padding=1, transposed=True, output_padding=2),
    2: ConvSpec(3, 4, (5, 4), (3, 2), stride=(2, 1), padding=((1, 0), 0), dilation=(1, 2), transposed=True),
}
"""Without groups, g is an index of size 1."""


def _expand_leg(leg: str, dims: int) -> str:
    """`i` -> `i1 i2`, inside and outside groups."""
    return re.sub(
        r"\b([iok])(_*)(?=\b|\s|\)|$)",
        lambda m: " ".join(f"{m[1]}{d}{m[2]}" for d in range(1, dims + 1)),
        leg,
    )


def expand(row: str, operands: Sequence[str], spec: ConvSpec) -> tuple[str, list[Any]]:
    """The table's shorthand as full subscripts with their operands; "Π" stands for one pattern per dimension."""
    left, right = row.split("->")
    parts: list[str] = []
    named: list[Any] = []
    for part, operand in zip((p.strip() for p in left.split(",")), operands, strict=True):
        if operand == "Π":
            i, o, k = part.split()
            for d, pattern in enumerate(spec.patterns, start=1):
                parts.append(" ".join(re.sub(r"^([iok])", rf"\g<1>{d}", index) for index in (i, o, k)))
                named.append(pattern)
        else:
            parts.append(_expand_leg(part, spec.ndim))
            named.append(operand)
    return f"{', '.join(parts)} -> {_expand_leg(right.strip(), spec.ndim)}", named


def built(row: str, operands: Sequence[str], spec: ConvSpec, **sizes: int) -> lensor.Network:
    """The network of a row."""
    text, named = expand(row, operands, spec)
    return lensor.contraction(text, *named, **sizes)


def names(spec: ConvSpec) -> dict[str, int]:
    """Sizes of the indices that no pattern tells."""
    first, second = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    ci, co = (second, first) if spec.transposed else (first, second)
    return {"g": spec.groups, "ci": ci, "co": co}


def row(
    op: Callable[[ConvSpec], Any],
    text: str,
    operands: str,
    copies: str = "",
    powers: dict[str, int] | None = None,
) -> tuple:
    return op, text, operands.split(), copies.split(), powers or {}


GGN = "n (g ci) i, i o k, v n (g co) o, n (g ci) i_, i_ o_ k, v n (g co) o_"
GGN_OPERANDS = "X Π S X Π S"
ROWS = {
    "conv": row(ops.conv, "n (g ci) i, i o k, (g co) ci k -> n (g co) o", "X Π W"),
    "fold": row(ops.fold, "n (c k) o, i o k -> n c i", "V Π", "c"),
    "unfold": row(ops.unfold, "n c i, i o k -> n (c k) o", "X Π", "c"),
    "unfolded_kernel": row(ops.unfolded_kernel, "i o k, (g co) ci k, g g_ -> (g co o) (g_ ci i)", "Π W δ", "g_:g"),
    "transpose convolution": row(ops.conv_transpose, "(g co) ci k, i o k, n (g co) o -> n (g ci) i", "W Π X"),
    "transpose-unfold": row(ops.unfold_transpose, "n co o, i o k -> n (co k) i", "X Π", "co*g"),
    "conv_weight_vjp": row(ops.conv_weight_vjp, "n (g ci) i, i o k, n (g co) o -> (g co) ci k", "X Π V"),
    "conv_weight_vjp_per_example": row(
        ops.conv_weight_vjp_per_example, "n (g ci) i, i o k, n (g co) o -> n (g co) ci k", "X Π V"
    ),
    "conv_input_vjp": row(ops.conv_input_vjp, "(g co) ci k, i o k, n (g co) o -> n (g ci) i", "W Π V"),
    "conv_weight_jvp": row(ops.conv_weight_jvp, "n (g ci) i, i o k, (g co) ci k -> n (g co) o", "X Π T"),
    "conv_input_jvp": row(ops.conv_input_jvp, "n (g ci) i, i o k, (g co) ci k -> n (g co) o", "T Π W"),
    "conv_weight_jacobian": row(
        ops.conv_weight_jacobian,
        "n (g ci) i, i o k, g g_, co co_ -> n (g co) o (g_ co_) ci k",
        "X Π δ δ",
        "g_:g co_:co",
    ),
    "conv_input_jacobian": row(
        ops.conv_input_jacobian, "(g co) ci k, i o k, g g_, n n_ -> n (g co) o n_ (g_ ci) i", "W Π δ δ", "g_:g"
    ),
    "mixed_second_derivative": row(
        ops.mixed_second_derivative,
        "i o k, n (g co) o, ci ci_, g g_ -> (g co) ci k n (g_ ci_) i",
        "Π V δ δ",
        "g_:g ci_:ci",
    ),
    "KFAC-expand": row(
        lambda s: ops.kfac_input_factor(s, "expand"),
        "n (g ci) i, i o k, n (g ci_) i_, i_ o k_ -> g (ci k) (ci_ k_)",
        "X Π X Π",
        "ci_:ci",
        {"n": -1},
    ),
    "KFAC-reduce": row(
        lambda s: ops.kfac_input_factor(s, "reduce"),
        "n (g ci) i, i o k, n (g ci_) i_, i_ o_ k_ -> g (ci k) (ci_ k_)",
        "X Π X Π",
        "ci_:ci",
        {"n": -1, "o": -2},
    ),
    "output factor, expand": row(
        lambda s: ops.kfac_output_factor(s, "expand"),
        "v n (g co) o, v n (g co_) o -> g co co_",
        "V V",
        "co_:co",
        {"o": -1},
    ),
    "output factor, reduce": row(
        lambda s: ops.kfac_output_factor(s, "reduce"), "v n (g co) o, v n (g co_) o_ -> g co co_", "V V", "co_:co"
    ),
    "ggn_diagonal": row(ops.ggn_diagonal, f"{GGN} -> (g co) ci k", GGN_OPERANDS),
    "ggn_diagonal per example": row(
        lambda s: ops.ggn_diagonal(s, per_example=True), f"{GGN} -> n (g co) ci k", GGN_OPERANDS
    ),
    "ggn_gram": row(
        ops.ggn_gram,
        "n (g ci) i, i o k, v n (g co) o, m (g ci) i_, i_ o_ k, w m (g co) o_ -> (v n) (w m)",
        GGN_OPERANDS,
    ),
    "mini-blocks by filter": row(
        lambda s: ops.ggn_mini_blocks(s, "filter"),
        "n (g ci) i, i o k, v n (g co) o, n (g ci_) i_, i_ o_ k_, v n (g co) o_ -> (g co) (ci k) (ci_ k_)",
        GGN_OPERANDS,
        "ci_:ci",
    ),
    "mini-blocks by kernel": row(
        lambda s: ops.ggn_mini_blocks(s, "kernel"),
        "n (g ci) i, i o k, v n (g co) o, n (g ci) i_, i_ o_ k_, v n (g co) o_ -> (g co) ci k k_",
        GGN_OPERANDS,
    ),
    "mini-blocks by position": row(
        lambda s: ops.ggn_mini_blocks(s, "position"),
        "n (g ci) i, i o k, v n (g co) o, n (g ci_) i_, i_ o_ k, v n (g co_) o_ -> g k (co ci) (co_ ci_)",
        GGN_OPERANDS,
        "ci_:ci co_:co",
    ),
    "hessian_backprop": row(
        ops.hessian_backprop,
        "(g co) ci k, i o k, (g co) o (g_ co_) o_, (g_ co_) ci_ k_, i_ o_ k_ -> (g ci) i (g_ ci_) i_",
        "W Π H W Π",
        "g_:g ci_:ci co_:co",
    ),
}
TRANSPOSED_ROWS = {
    "conv": row(ops.conv, "(g co) ci k, i o k, n (g co) o -> n (g ci) i", "W Π X"),
    "transpose-unfold": row(ops.unfold, "n c o, i o k -> n (c k) i", "X Π", "c"),
    "conv_weight_vjp": row(ops.conv_weight_vjp, "n (g co) o, i o k, n (g ci) i -> (g co) ci k", "X Π V"),
    "KFAC-expand": row(
        lambda s: ops.kfac_input_factor(s, "expand"),
        "n (g co) o, i o k, n (g co_) o_, i o_ k_ -> g (co k) (co_ k_)",
        "X Π X Π",
        "co_:co",
        {"n": -1},
    ),
    "KFAC-reduce": row(
        lambda s: ops.kfac_input_factor(s, "reduce"),
        "n (g co) o, i o k, n (g co_) o_, i_ o_ k_ -> g (co k) (co_ k_)",
        "X Π X Π",
        "co_:co",
        {"n": -1, "i": -2},
    ),
    "output factor, expand": row(
        lambda s: ops.kfac_output_factor(s, "expand"),
        "v n (g ci) i, v n (g ci_) i -> g ci ci_",
        "V V",
        "ci_:ci",
        {"i": -1},
    ),
    "output factor, reduce": row(
        lambda s: ops.kfac_output_factor(s, "reduce"), "v n (g ci) i, v n (g ci_) i_ -> g ci ci_", "V V", "ci_:ci"
    ),
}


def expected(entry: tuple, spec: ConvSpec) -> lensor.Network:
    """The network of a row of the table for a spec, its scale included."""
    _, text, operands, copies, powers = entry
    sizes = names(spec)
    for copy in copies:
        if ":" in copy:
            new, old = copy.split(":")
            sizes[new] = sizes[old]
        elif copy == "co*g":
            sizes["co"] *= sizes["g"]
        else:  # all channels of the input
            sizes["c"] = spec.in_channels
    used = set(re.findall(r"\w+", text))
    sizes = {index: size for index, size in sizes.items() if index in used}
    if "V" in operands and "v" in used:  # no pattern tells the positions' sizes
        for d, pattern in enumerate(spec.patterns, start=1):
            for letter, size in (("o", pattern.output_size), ("i", pattern.input_size)):
                sizes.update({f"{index[0]}{d}{index[1:]}": size for index in used if index.rstrip("_") == letter})
    net = built(text, operands, spec, **sizes)
    spread = {}
    for index, power in powers.items():
        spread.update({index: power} if index == "n" else {f"{index}{d}": power for d in range(1, spec.ndim + 1)})
    return net.scaled(1, spread)


@pytest.mark.parametrize("dims", PLAIN)
@pytest.mark.parametrize("name", ROWS)
def test_operation_is_its_row(name: str, dims: int) -> None:
    spec = PLAIN[dims]
    assert ROWS[name][0](spec) == expected(ROWS[name], spec)


@pytest.mark.parametrize("dims", TRANSPOSED)
@pytest.mark.parametrize("name", TRANSPOSED_ROWS)
def test_operation_of_a_transposed_convolution_is_its_row(name: str, dims: int) -> None:
    spec = TRANSPOSED[dims]
    assert TRANSPOSED_ROWS[name][0](spec) == expected(TRANSPOSED_ROWS[name], spec)


@pytest.mark.parametrize("dims", ONE_GROUP)
@pytest.mark.parametrize("name", ROWS)
def test_operation_without_groups_is_its_row(name: str, dims: int) -> None:
    spec = ONE_GROUP[dims]
    assert ROWS[name][0](spec) == expected(ROWS[name], spec)


@pytest.mark.parametrize("dims", TRANSPOSED_ONE_GROUP)
@pytest.mark.parametrize("name", TRANSPOSED_ROWS)
def test_operation_of_a_transposed_convolution_without_groups_is_its_row(name: str, dims: int) -> None:
    spec = TRANSPOSED_ONE_GROUP[dims]
    assert TRANSPOSED_ROWS[name][0](spec) == expected(TRANSPOSED_ROWS[name], spec)


@pytest.mark.parametrize("name", ROWS)
def test_rows_differ_from_each_other(name: str) -> None:
    """A comparison that always held would prove nothing: each row equals its operation and no other one's."""
    spec = PLAIN[2]
    row_ = expected(ROWS[name], spec)
    assert [other for other in ROWS if ROWS[other][0](spec) == row_] == [name]


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name][4]])
def test_rows_hold_with_their_scale_only(name: str) -> None:
    spec = PLAIN[2]
    op, text, operands, copies, _ = ROWS[name]
    assert op(spec) != expected((op, text, operands, copies, {}), spec)
    assert op(spec).scaled(2) != expected(ROWS[name], spec)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_factors_with_a_group_of_their_own_in_each_copy_differ(approx: str) -> None:
    """An independent copy of g, summed or not, is another network: the known mistake for G > 1."""
    spec = PLAIN[1]
    o = "o" if approx == "expand" else "o_"
    wrong = f"n (g ci) i, i o k, n (h ci_) i_, i_ {o} k_ -> g (ci k) (ci_ k_)"
    powers = {"n": -1} if approx == "expand" else {"n": -1, "o1": -2}
    net = built(wrong, ["X", "Π", "X", "Π"], spec, g=2, h=2, ci=3, ci_=3).scaled(1, powers)
    assert ops.kfac_input_factor(spec, approx) != net


def test_bias_is_a_second_term() -> None:
    spec = ConvSpec(6, 4, (9, 7), 3, groups=2, bias=True)
    main, bias = ops.conv(spec).terms
    assert main == ops.conv(ConvSpec(6, 4, (9, 7), 3, groups=2))
    sizes = {"g": 2, "co": 2, "o1": 7, "o2": 5}
    assert bias == lensor.contraction("(g co), n, o1, o2 -> n (g co) o1 o2", "b", "1", "1", "1", **sizes)


def test_unfolded_kernel_of_one_group_is_the_table_s() -> None:
    spec = ConvSpec(3, 4, (9, 7), (3, 2), stride=(2, 1))
    row_ = "i1 o1 k1, i2 o2 k2, co ci k1 k2 -> (co o1 o2) (ci i1 i2)"
    table = lensor.contraction(row_, *spec.patterns, "W", co=4, ci=3)
    assert ops.unfolded_kernel(spec).simplify() == table.simplify()


@pytest.mark.parametrize("dims", [1, 2])
def test_hessian_diagonals_are_vjps_with_squared_operands(dims: int) -> None:
    """Input VJP with W², weight VJP with X²: the operand stands twice on the same indices, the pattern once."""
    spec = PLAIN[dims]
    weight = "n (g ci) i, i o k, n (g ci) i, n (g co) o -> (g co) ci k"
    inputs = "(g co) ci k, i o k, (g co) ci k, n (g co) o -> n (g ci) i"
    found = ops.hessian_diagonal_weight(spec).simplify()
    assert found == built(weight, ["X", "Π", "X", "V"], spec, **names(spec)).simplify()
    found = ops.hessian_diagonal_input(spec).simplify()
    assert found == built(inputs, ["W", "Π", "W", "V"], spec, **names(spec)).simplify()


def test_factor_with_bias_has_the_rows_of_the_table() -> None:
    """Ω[(ci k), b] = 1/N Σ [X] and Ω[b, b] = O, and for reduce the mean patch and 1."""
    spec = PLAIN[2]
    positions = spec.output_size[0] * spec.output_size[1]
    for approx, corner, power in (("expand", positions, 0), ("reduce", 1, -1)):
        net = ops.kfac_input_factor(spec, approx, bias=True).bind(n=5)
        d = net.output_shape[1]
        assert d == 3 * 3 * 2 + 1
        size = d - 1
        column = net.narrow("d", 0, size).select("d_", size).simplify()
        patches = "n (g ci) i1 i2, i1 o1 k1, i2 o2 k2 -> g (ci k1 k2)"
        table = lensor.contraction(patches, "X", *spec.patterns, g=2, ci=3, n=5)
        wanted = table.scaled(1, {"n": -1, "o1": power, "o2": power})
        live = [term for term in column.terms if term.scale.factor]
        assert live == [wanted.simplify()]
        last = net.select("d", size).select("d_", size).simplify()
        assert [term.scale.factor for term in last.terms if term.scale.factor] == [corner]
