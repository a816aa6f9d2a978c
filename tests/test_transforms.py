"""Transforms against torch.func, slices of dense results, and factorised kernels against autograd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import hessian, jacrev, jvp, vjp, vmap

import lensor
from lensor import ConvSpec, NetworkError, ops
from lensor.execute import evaluate_dense
from lensor.lower import candidates
from tests.cases import BUILDERS, SPECS, assert_close, bound, operands_of

SPEC = ConvSpec(4, 6, (6, 5), (3, 2), stride=(2, 1), padding=(1, 0), groups=2)
SMALL = ConvSpec(2, 4, (4, 3), (3, 2), stride=(2, 1), padding=(1, 0), groups=2)
RNG = np.random.default_rng(0)
X = torch.tensor(RNG.standard_normal((2, 4, 6, 5)))
W = torch.tensor(RNG.standard_normal((6, 2, 3, 2)))
V = torch.tensor(RNG.standard_normal((2, 6, 3, 4)))


def conv(x: Any, w: Any) -> Any:
    return torch.nn.functional.conv2d(x, w, None, (2, 1), (1, 0), 1, 2)


def patches(x: Any) -> Any:
    """[n, groups, d, positions]"""
    found = torch.nn.functional.unfold(x, (3, 2), 1, (1, 0), (2, 1))
    return found.reshape(x.shape[0], 2, -1, found.shape[-1])


def expand(x: Any) -> Any:
    return torch.einsum("ngio,ngjo->gij", patches(x), patches(x)) / x.shape[0]


def reduce(x: Any) -> Any:
    mean = patches(x).mean(-1)
    return torch.einsum("ngi,ngj->gij", mean, mean) / x.shape[0]


# -------------------------------------------------------------------------------------------------------- derivatives
def test_jacobians_equal_torch_func() -> None:
    net = ops.conv(SPEC)
    assert_close(net.jacobian("W")(X=X), jacrev(conv, 1)(X, W))
    assert_close(net.jacobian("X")(W=W, n=2), jacrev(conv, 0)(X, W))


def test_vjps_and_jvps_equal_torch_func() -> None:
    net = ops.conv(SPEC)
    _, pull = vjp(conv, X, W)
    assert_close(net.vjp("X")(W=W, V=V), pull(V)[0])
    assert_close(net.vjp("W")(X=X, V=V), pull(V)[1])
    t = torch.randn_like(W)
    assert_close(net.jvp("W")(X=X, T=t), jvp(lambda w: conv(X, w), (W,), (t,))[1])


@pytest.mark.parametrize("order", ["XW", "WX"])
def test_mixed_second_derivatives_equal_torch_func(order: str) -> None:
    first, second = order
    place = {"X": 0, "W": 1}
    x, w = torch.randn(2, 2, 4, 3, dtype=torch.float64), torch.randn(4, 1, 3, 2, dtype=torch.float64)
    expected = jacrev(jacrev(conv, place[first]), place[second])(x, w)
    assert_close(ops.conv(SMALL).jacobian(first).jacobian(second)(n=2), expected)


def test_hessian_of_a_quadratic_by_repetition() -> None:
    """Half the squared norm of the output has the Hessian JᵀJ; both operands occur twice."""
    net = ops.conv(SMALL)
    x, w = torch.randn(2, 2, 4, 3, dtype=torch.float64), torch.randn(4, 1, 3, 2, dtype=torch.float64)
    every = list(net.output_indices)
    square = net.merge(net, share=every, output="")
    expected = hessian(lambda w: conv(x, w).square().sum())(w)
    assert_close(square.jacobian("W").jacobian("W")(X=x), expected)
    expected = jacrev(jacrev(lambda x, w: conv(x, w).square().sum(), 0), 1)(x, w)
    assert_close(square.jacobian("X").jacobian("W")(X=x, W=w), expected)


@pytest.mark.parametrize(("approx", "define"), [("expand", expand), ("reduce", reduce)])
def test_derivative_of_kfac_by_the_product_rule(approx: str, define: Any) -> None:
    net = ops.kfac_input_factor(SPEC, approx)
    derivative = net.jacobian("X")
    assert len(derivative.terms) == 2
    assert_close(derivative(X=X), jacrev(define)(X))
    t = torch.randn_like(X)
    assert_close(net.jvp("X")(X=X, T=t), jvp(define, (X,), (t,))[1])
    v = torch.randn(2, 12, 12, dtype=torch.float64)
    assert_close(net.vjp("X")(X=X, V=v), vjp(define, X)[1](v)[0])


def test_weight_jacobian_falls_into_patches_and_identity() -> None:
    spec = ConvSpec(2, 3, (5, 4), 2)
    net = ops.weight_jacobian(spec).simplify()
    first, second = net.components()
    assert first == ops.unfold(spec).ungroup("c_in").regroup("n o1 o2 c_in k1 k2").simplify()
    assert second == lensor.contraction("a b -> a b", "δ", a=3, b=3)
    x = RNG.standard_normal((1, 2, 5, 4))
    columns = torch.nn.functional.unfold(torch.tensor(x), 2)[0].numpy()  # [d, positions]
    found = net(X=x).reshape(3, 12, 3, 8).transpose(1, 0, 3, 2).reshape(36, 24)
    assert_close(found, np.kron(columns.T, np.eye(3)))


def test_batch_is_vmap() -> None:
    xs = torch.randn(3, 2, 4, 6, 5, dtype=torch.float64)
    ws = torch.randn(3, 6, 2, 3, 2, dtype=torch.float64)
    net = ops.conv(SPEC)
    assert_close(net.batch("v", ["X"])(X=xs, W=W), vmap(conv, (0, None))(xs, W))
    assert_close(net.batch("v", ["W"])(X=X, W=ws), vmap(conv, (None, 0))(X, ws))
    assert_close(net.batch("v", ["X", "W"])(X=xs, W=ws), vmap(conv)(xs, ws))
    biased = ops.conv(ConvSpec(4, 6, (6, 5), (3, 2), stride=(2, 1), padding=(1, 0), groups=2, bias=True))
    b = torch.randn(6, dtype=torch.float64)
    expected = vmap(conv, (0, None))(xs, W) + b[:, None, None]
    assert_close(biased.batch("v", ["X"])(X=xs, W=W, b=b), expected)
    with pytest.raises(NetworkError, match=r"'n' is already there"):
        net.batch("n", ["X"])


# -------------------------------------------------------------------------------------------------------- sub-tensors
TWO_EQUAL_PARTS = {op for op in BUILDERS if op.startswith(("ggn", "kfac", "hessian_backprop"))}


def separate(net: Any) -> Any:
    """Every output index on a leg of its own."""
    return net.regroup(" ".join(net.output_indices))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", BUILDERS)
def test_sub_tensors_are_slices_of_the_result(op: str, spec: str) -> None:
    net = separate(bound(BUILDERS[op](SPECS[spec])))
    operands = operands_of(net)
    full = evaluate_dense(net, operands)
    for axis, index in enumerate(net.output_indices):
        size = net.sizes[index]
        if size < 2:
            continue
        assert_close(net.narrow(index, 1, size - 1)(**operands), full.take(range(1, size), axis))
        assert_close(net.slice(index, 0, size, 2)(**operands), full.take(range(0, size, 2), axis))
        selected = net.select(index, -1)
        assert_close(selected(**operands), full.take(size - 1, axis))
        # One side of a product of two equal parts: what the parts share is lost, at most the one part's cost.
        assert cost(selected) <= (2 if op in TWO_EQUAL_PARTS else 1) * cost(net)
    for first, second in equal_pairs(net):
        a, b = net.output_indices.index(first), net.output_indices.index(second)
        kept = [axis for axis in range(full.ndim) if axis != b]
        labels = list(range(full.ndim))
        labels[b] = labels[a]
        expected = np.einsum(full, labels, [labels[axis] for axis in kept])
        assert_close(net.diagonal(first, second)(**operands), expected)


def cost(net: Any) -> int:
    """Flops of the candidate with the fewest; the planner weighs bytes and calls, too."""
    return min(plan.flops for plan in candidates(net))


def equal_pairs(net: Any) -> list[tuple[str, str]]:
    found = net.output_indices
    pairs = [(a, b) for at, a in enumerate(found) for b in found[at + 1 :] if net.sizes[a] == net.sizes[b]]
    return pairs[:4]


@pytest.mark.parametrize(
    ("op", "index"),
    [
        ("conv", "o1"),
        ("conv", "c_out"),
        ("conv", "g"),
        ("weight_vjp", "c_in"),
        ("input_vjp", "i1"),
        ("per_example_weight_vjp", "n"),
    ],
)
def test_flops_fall_with_the_sub_tensor(op: str, index: str) -> None:
    net = separate(bound(BUILDERS[op](ConvSpec(16, 16, (16, 16), 3, padding=1, groups=2)), 4))
    operands = operands_of(net)
    part = net.narrow(index, 0, 1)
    assert cost(part) < 0.75 * cost(net)
    assert_close(part(**operands), net(**operands).take([0], net.output_indices.index(index)))


def test_flops_fall_with_a_block_of_a_gram_matrix() -> None:
    net = separate(bound(ops.ggn_gram(ConvSpec(16, 16, (16, 16), 3, padding=1, groups=2)), 4))
    block = net.narrow("n", 0, 1).narrow("m", 0, 1)
    assert cost(block) < 0.5 * cost(net)


def test_block_diagonal_is_blocks_of_the_matrix() -> None:
    net = lensor.contraction("n i, n j -> i j", "X", "X", i=6, j=6)
    x = RNG.standard_normal((4, 6))
    full = x.T @ x
    expected = np.stack([full[:2, :2], full[2:4, 2:4], full[4:, 4:]])
    assert_close(net.block_diagonal("i", "j", 2)(X=x), expected)
    with pytest.raises(NetworkError, match="block_size"):
        net.block_diagonal("i", "j", 4)


def test_averages_stay_over_the_full_index() -> None:
    net = ops.kfac_input_factor(ConvSpec(2, 2, (5,), 3)).bind(n=4)
    x = RNG.standard_normal((4, 2, 5))
    parts = net.narrow("n", 0, 1)(X=x) + net.narrow("n", 1, 3)(X=x)
    assert_close(parts, net(X=x))


# -------------------------------------------------------------------------------------------------- factorised kernels
C, F, K, R = 5, 7, 3, 2


def kernels() -> dict[str, tuple[lensor.Network, dict[str, tuple[int, ...]], Any]]:
    """For each factorisation: its network, the shapes of its factors, and the full kernel by torch."""
    sizes = {"o": F, "i": C, "k": K, "l": K}
    return {
        "CP": (
            lensor.contraction("o r, i r, k r, l r -> o i k l", "A", "B", "P", "Q", r=R, **sizes),
            {"A": (F, R), "B": (C, R), "P": (K, R), "Q": (K, R)},
            lambda A, B, P, Q: torch.einsum("or,ir,kr,lr->oikl", A, B, P, Q),
        ),
        "Tucker": (
            lensor.contraction("o r, i s, r s k l -> o i k l", "A", "B", "G", r=R, s=R, **sizes),
            {"A": (F, R), "B": (C, R), "G": (R, R, K, K)},
            lambda A, B, G: torch.einsum("or,is,rskl->oikl", A, B, G),
        ),
        "tensor train": (
            lensor.contraction("o r, r i s, s k t, t l -> o i k l", "A", "B", "P", "Q", r=R, s=R, t=R, **sizes),
            {"A": (F, R), "B": (R, C, R), "P": (R, K, R), "Q": (R, K)},
            lambda A, B, P, Q: torch.einsum("or,ris,skt,tl->oikl", A, B, P, Q),
        ),
        "depthwise separable": (
            lensor.contraction("o i, i k l -> o i k l", "A", "D", **sizes),
            {"A": (F, C), "D": (C, K, K)},
            lambda A, D: torch.einsum("oi,ikl->oikl", A, D),
        ),
    }


@pytest.mark.parametrize("name", kernels())
def test_factorised_kernels(name: str) -> None:
    network, shapes, full = kernels()[name]
    spec = ConvSpec(C, F, (8, 9), K, padding=1, stride=(1, 2))
    factors = {key: torch.randn(*shape, dtype=torch.float64) for key, shape in shapes.items()}
    x = torch.randn(2, C, 8, 9, dtype=torch.float64)

    def model(x: Any, *factors: Any) -> Any:
        return torch.nn.functional.conv2d(x, full(*factors), None, (1, 2), 1)

    values = tuple(factors.values())
    net = ops.conv(spec).substitute("W", network)
    y = model(x, *values)
    v = torch.randn_like(y)
    _, pull = vjp(model, x, *values)
    check_plan(net, dict(X=x, **factors), y)
    expected = dict(zip(["X", *factors], pull(v), strict=True))
    for argument, gradient in expected.items():
        operands = {key: value for key, value in dict(X=x, V=v, **factors).items() if key != argument}
        check_plan(net.vjp(argument), operands, gradient)
    roots = torch.randn(2, *y.shape, dtype=torch.float64)
    for at, factor in enumerate(factors):

        def per_example(one: Any, root: Any, at: int = at) -> Any:
            return vjp(lambda f: model(one[None], *values[:at], f, *values[at + 1 :]), values[at])[1](root[None])[0]

        squares = vmap(vmap(per_example, (0, 0)), (None, 0))(x, roots).square().sum((0, 1))
        jacobian = net.vjp(factor, "S").keep("n").batch("v", ["S"])
        legs = [index for leg in jacobian.output[2:] for index in leg]
        diagonal = jacobian.merge(jacobian, share=["v", "n", *legs], output=" ".join(legs))
        operands = {key: value for key, value in dict(X=x, S=roots, **factors).items() if key in diagonal.operand_names}
        check_plan(diagonal, operands, squares)


def check_plan(net: Any, operands: dict[str, Any], expected: Any) -> None:
    """The value is right, and nothing that is made of factors alone has the axes of the full kernel."""
    plan = net.plan(**operands)
    assert_close(plan(**operands), expected)
    from_factors: list[bool] = []
    for step, shape in zip(plan.steps, plan.shapes, strict=True):
        if step.takes:
            from_factors.append(all(from_factors[at] for at in step.takes))
        else:
            from_factors.append(getattr(step, "operand", "") not in ("X", "V", "S"))
        if from_factors[-1]:
            assert math.prod(shape) < F * C * K * K, f"{step} forms the full kernel"


# ------------------------------------------------------------------------------------------------- names and structure
def test_rename_split_group_and_regroup() -> None:
    net = ops.unfold(ConvSpec(4, 1, (6,), 3)).bind(n=2)
    operands = operands_of(net)
    full = net(**operands)  # [n, (c k), o]
    grouped = net.split("c_in", {"g": 2, "c_in": None}).ungroup("g")
    assert grouped.output_shape == (2, 2, 2, 3, 4)
    assert_close(grouped(**operands), full.reshape(2, 2, 2, 3, 4))
    assert_close(
        grouped.group("g", "o1")(**operands), full.reshape(2, 2, 6, 4).transpose(0, 1, 3, 2).reshape(2, 8, 2, 3)
    )
    assert_close(net.regroup("o1 n (c_in k1)")(**operands), full.transpose(2, 0, 1))
    assert net.rename(c_in="channel", k1="offset") == net
    assert "channel" in net.rename(c_in="channel").sizes
    assert net.rename_operands(X="Y").operand_names == ("Y",)
    assert_close(net.scaled("1/2", {"o1": -1})(**operands), full / 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: net.jacobian("Z"), r"'Z'.*'X', 'W'"),
        (lambda net: net.vjp("Z"), r"'Z'.*'X', 'W'"),
        (lambda net: net.narrow("z", 0, 1), r"unknown index 'z'"),
        (lambda net: net.narrow("o1", 0, 99), r"'o1' has positions 0 to 2"),
        (lambda net: net.slice("o1", 2, 2), r"start < stop"),
        (lambda net: net.select("o1", 3), r"'o1' has size 3"),
        (lambda net: net.narrow("n", 0, 1), r"net.bind\(n="),
        (lambda net: net.diagonal("o1", "k1"), r"unknown output index 'k1'"),
        (lambda net: net.diagonal("o1", "o2"), r"'o1' has 3, 'o2' has 4"),
        (lambda net: net.keep("o1"), r"unknown summed index 'o1'"),
        (lambda net: net.batch("v", ["Z"]), r"unknown operand 'Z'"),
        (lambda net: net.substitute("Z", net), r"unknown operand 'Z'"),
        (lambda net: net.substitute("W", net), r"leg 1 of operand 'W'"),
        (lambda net: net.merge(net, share=["z"]), r"unknown index 'z'"),
        (lambda net: net.rename(o1="o2"), r"two indices would be named 'o2'"),
        (lambda net: net.rename(z="y"), r"unknown index 'z'"),
        (lambda net: net.rename_operands(X="W"), r"different identifiers"),
        (lambda net: net.regroup("n g c_out o1"), r"'o2' is missing"),
        (lambda net: net.split("c_out", {"a": 2, "b": 2}), r"size 3"),
        (lambda net: net.split("c_out", {"o1": 3}), r"'o1' is already there"),
        (lambda net: net.bind(o1=4), r"'o1' has size 3, got 4"),
        (lambda net: net.bind(z=4), r"unknown index 'z'"),
    ],
)
def test_errors_name_what_was_asked_and_what_there_is(call: Any, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        call(ops.conv(SPEC))
