"""Transforms against torch.func, slices of dense results, and factorised kernels against autograd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from opt_einsum import contract
from torch.func import hessian, jacrev, jvp, vjp, vmap

import lensor
from lensor import ConvSpec, NetworkError, ops
from lensor.lowering import candidates
from tests.support.cases import BUILDERS, SPEC, SPECS, assert_close, bound, operands_of
from tests.support.dense import evaluate_dense

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
    net = ops.conv_weight_jacobian(spec).simplify()
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
    with pytest.raises(NetworkError, match=r"'n' exists already"):
        net.batch("n", ["X"])


# -------------------------------------------------------------------------------------------------------- sub-tensors
TWO_EQUAL_PARTS = {op for op in BUILDERS if op.startswith(("ggn", "kfac", "hessian_backprop"))}


PLANNED = ("1-d", "2-d", "reflect", "transposed")
"""Where sub-tensors are planned as well; elsewhere they are evaluated by definition only."""


def separate(net: Any) -> Any:
    """Every output index on a leg of its own."""
    return net.regroup(" ".join(net.output_indices))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", BUILDERS)
def test_sub_tensors_are_slices_of_the_result(op: str, spec: str) -> None:
    net = separate(bound(BUILDERS[op](SPECS[spec])))
    operands = operands_of(net)
    full = evaluate_dense(net, operands)
    most = (2 if op in TWO_EQUAL_PARTS else 1) * cost(net)
    for axis, index in enumerate(net.output_indices):
        size = net.sizes[index]
        if size < 2:
            continue
        assert_close(evaluate_dense(net.narrow(index, 1, size - 1), operands), full.take(range(1, size), axis))
        every_other = net.slice(index, 0, size, 2)
        assert_close(evaluate_dense(every_other, operands), full.take(range(0, size, 2), axis))
        selected = net.select(index, -1)
        assert_close(evaluate_dense(selected, operands), full.take(size - 1, axis))
        if spec not in PLANNED:
            continue
        if axis == full.ndim - 1:
            assert_close(every_other(**operands), full.take(range(0, size, 2), axis))
        plan = selected.plan(**operands)
        assert_close(plan(**operands), full.take(size - 1, axis))
        # One side of a product of two equal parts: what the parts share is lost, at most the one part's cost.
        assert min(candidate.flops for candidate in plan.candidates) <= most
    for first, second in equal_pairs(net):
        a, b = net.output_indices.index(first), net.output_indices.index(second)
        kept = [axis for axis in range(full.ndim) if axis != b]
        labels = list(range(full.ndim))
        labels[b] = labels[a]
        expected = np.einsum(full, labels, [labels[axis] for axis in kept])
        assert_close(evaluate_dense(net.diagonal(first, second), operands), expected)
        if spec in PLANNED and first == net.output_indices[0]:
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
        ("conv_weight_vjp", "c_in"),
        ("conv_input_vjp", "i1"),
        ("conv_weight_vjp_per_example", "n"),
    ],
)
def test_flops_fall_with_the_sub_tensor(op: str, index: str) -> None:
    net = separate(bound(BUILDERS[op](ConvSpec(16, 16, (16, 16), 3, padding=1, groups=2)), 4))
    operands = operands_of(net)
    part = net.narrow(index, 0, 1)
    assert cost(part) < 0.75 * cost(net)
    assert_close(part(**operands), net(**operands).take([0], net.output_indices.index(index)))


@pytest.mark.parametrize("op", [op for op in BUILDERS if op != "ggn_gram"])
def test_flops_fall_with_some_sub_tensor_of_every_operation_and_rise_with_none(op: str) -> None:
    net = separate(bound(BUILDERS[op](ConvSpec(8, 8, (8, 8), 3, padding=1, groups=2)), 4))
    whole = cost(net)
    parts = {index: net.narrow(index, 0, 1) for index in net.output_indices if (net.sizes[index] or 0) > 1}
    costs = {index: cost(part) for index, part in parts.items()}
    assert all(found <= 1.001 * whole for found in costs.values())  # a factor costs a few flops
    if whole:
        assert min(costs.values()) <= 0.5 * whole
    else:  # patches cost no flops, but entries
        operands = operands_of(net)
        assert all(part.plan(**operands).peak_size < net.plan(**operands).peak_size for part in parts.values())


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
C, F, K, R = 12, 14, 3, 2


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
        (lambda net: net.jacobian("Z"), r"operand 'Z' is unknown, expected one of \['X', 'W'\]"),
        (lambda net: net.vjp("Z"), r"operand 'Z' is unknown, expected one of \['X', 'W'\]"),
        (lambda net: net.narrow("z", 0, 1), r"index 'z' is unknown"),
        (
            lambda net: net.narrow("o1", 0, 99),
            r"slice of index 'o1' has start 0, stop 99 and step 1, expected 0 <= start < stop <= 3",
        ),
        (lambda net: net.slice("o1", 2, 2), r"start < stop"),
        (lambda net: net.select("o1", 3), r"position is 3, expected -3 <= position < 3 for index 'o1'"),
        (lambda net: net.narrow("n", 0, 1), r"net.bind\(n="),
        (lambda net: net.diagonal("o1", "k1"), r"output index 'k1' is unknown"),
        (lambda net: net.diagonal("o1", "o2"), r"'o1' and 'o2' of a diagonal have sizes 3 and 4"),
        (lambda net: net.keep("o1"), r"index 'o1' is an output index already, expected a summed index, one of"),
        (lambda net: net.batch("v", ["Z"]), r"operand 'Z' is unknown"),
        (lambda net: net.substitute("Z", net), r"operand 'Z' is unknown"),
        (lambda net: net.substitute("W", net), r"leg 1 of operand 'W'"),
        (lambda net: net.merge(net, share=["z"]), r"index 'z' is unknown"),
        (lambda net: net.rename(o1="o2"), r"two indices would be named 'o2'"),
        (lambda net: net.rename(z="y"), r"index 'z' is unknown"),
        (lambda net: net.rename_operands(X="W"), r"different identifiers"),
        (lambda net: net.regroup("n g c_out o1"), r"'o2' is missing"),
        (lambda net: net.split("c_out", {"a": 2, "b": 2}), r"sizes is .* product 3, the size of 'c_out'"),
        (lambda net: net.split("c_out", {"o1": 3}), r"'o1' exists already"),
        (lambda net: net.bind(o1=4), r"'o1' is 4, expected 3"),
        (lambda net: net.bind(z=4), r"index 'z' is unknown"),
    ],
)
def test_errors_name_what_was_asked_and_what_there_is(call: Any, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        call(ops.conv(SPEC))


# ------------------------------------------------------------------------------------- every operation, by definition
def dense(net: Any) -> Any:
    """A network as a torch function of its operands by definition: every pattern materialized, one einsum a term."""

    def function(**operands: Any) -> Any:
        total = 0.0
        for term in net.terms:
            arguments: list[Any] = []
            for node in term.nodes:
                indices = [index for leg in node.legs for index in leg]
                if isinstance(node, lensor.Operand):
                    array = operands[node.name]
                elif isinstance(node, lensor.Pattern):
                    array = torch.tensor(node.pattern.materialize()).double()
                elif isinstance(node, lensor.Delta):
                    array = torch.eye(term.sizes[indices[0]], dtype=torch.double)
                else:
                    array = torch.ones(term.sizes[indices[0]], dtype=torch.double)
                arguments += [array.reshape([term.sizes[index] for index in indices]), indices]
            result = contract(*arguments, list(term.output_indices))
            total = total + result.reshape(term.output_shape) * float(term.scale.factor)
        return total

    return function


@pytest.mark.parametrize("spec", ["1-d", "circular", "transposed"])
@pytest.mark.parametrize("op", BUILDERS)
def test_derivatives_of_every_operation(op: str, spec: str) -> None:
    """Jacobian, VJP, JVP and second derivatives against torch.func through the definition."""
    net = bound(BUILDERS[op](SPECS[spec]))
    operands = {name: torch.tensor(array) for name, array in operands_of(net).items()}
    function = dense(net)
    generator = torch.Generator().manual_seed(0)
    assert_close(net(**operands), function(**operands))
    for name, value in operands.items():
        rest = {key: other for key, other in operands.items() if key != name}

        def call(one: Any, name: str = name, rest: Any = rest) -> Any:
            return function(**{name: one}, **rest)

        tangent = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        expected, derivative = jvp(call, (value,), (tangent,))
        cotangent = torch.randn(expected.shape, generator=generator, dtype=value.dtype)

        def apply(derived: Any, **more: Any) -> Any:
            return derived(**{key: (operands | more)[key] for key in derived.operand_names})

        assert_close(apply(net.jvp(name, "T_"), T_=tangent), derivative)
        assert_close(apply(net.vjp(name, "U"), U=cotangent), vjp(call, value)[1](cotangent)[0])
        if expected.numel() * value.numel() < 20_000:
            assert_close(apply(net.jacobian(name)), jacrev(call)(value))
        if len(net.terms[0].nodes) > 2:  # Hessian-vector products, by a derivative of a derivative
            again = net.vjp(name, "U")
            if name in again.operand_names:
                second = jvp(lambda x: vjp(call, x)[1](cotangent)[0], (value,), (tangent,))[1]  # noqa: B023
                assert_close(apply(again.jvp(name, "T_"), U=cotangent, T_=tangent), second)


@pytest.mark.parametrize("spec", ["1-d", "dense", "transposed"])
@pytest.mark.parametrize("op", BUILDERS)
def test_blocks_on_the_diagonal_of_every_operation(op: str, spec: str) -> None:
    net = separate(bound(BUILDERS[op](SPECS[spec])))
    operands = operands_of(net)
    full = evaluate_dense(net, operands)
    found = net.output_indices
    for first, second in equal_pairs(net):
        size = net.sizes[first]
        a, b = found.index(first), found.index(second)
        for block in {1, size} | {part for part in (2, 3) if size % part == 0}:
            result = net.block_diagonal(first, second, block)
            split = np.moveaxis(full, (a, b), (0, 1)).reshape(size // block, block, size // block, block, -1)
            blocks = np.einsum("aiajr->aijr", split).reshape(-1, block, block, *np.delete(full.shape, [a, b]))
            # Axes block, within and copy stand where the two axes stood.
            order = [axis + 3 for axis in range(full.ndim - 2)]
            order.insert(min(a, b), 2 if b < a else 0)
            order.insert(max(a, b), 0 if b < a else 2)
            order.insert(order.index(0) + 1, 1)
            assert_close(evaluate_dense(result, operands), blocks.transpose(order))
        assert_close(result(**operands), blocks.transpose(order))


@pytest.mark.parametrize("spec", ["1-d"])
@pytest.mark.parametrize("op", BUILDERS)
def test_parts_of_summed_indices_add_up(op: str, spec: str) -> None:
    """A narrowed summed index: the sum over these positions only; parts that fill it add up to the whole."""
    net = bound(BUILDERS[op](SPECS[spec]))
    operands = operands_of(net)
    full = evaluate_dense(net, operands)
    for index in dict.fromkeys(index for term in net.terms for index in term.inner_indices):
        size = net.sizes[index]
        if size < 2 or any(index not in term.inner_indices for term in net.terms):
            continue
        parts = [net.narrow(index, 0, 1), net.narrow(index, 1, size - 1)]
        assert_close(sum(evaluate_dense(part, operands) for part in parts), full)
        assert_close(parts[0](**operands), evaluate_dense(parts[0], operands))
        parts = [net.slice(index, 0, size, 2), net.slice(index, 1, size, 2)]
        assert_close(sum(evaluate_dense(part, operands) for part in parts), full)
        positions = [evaluate_dense(net.select(index, at), operands) for at in range(size)]
        assert_close(sum(positions), full)
        if len(net.terms) == 1:
            assert_close(evaluate_dense(net.keep(index, 1), operands), np.stack(positions, 1))


def test_sub_tensors_of_sub_tensors() -> None:
    net = separate(bound(ops.conv(SPECS["2-d"])))
    operands = operands_of(net)
    full = evaluate_dense(net, operands)  # [n, g, c_out, o1, o2]
    part = net.slice("o1", 1, 7, 2).narrow("o1", 1, 2).select("c_out", 2).slice("n", 0, 2, 1).select("o2", 0)
    assert_close(part(**operands), full[:, :, 2, [3, 5], 0])
    one = net
    for index in net.output_indices:
        one = one.select(index, 0)
    assert one.output == ()
    assert_close(one(**operands), full[0, 0, 0, 0, 0])
    assert_close(net.narrow("o1", 0, 7)(**operands), full)


def test_sums_are_transformed_term_by_term() -> None:
    spec = ConvSpec(4, 6, (6, 5), (3, 2), stride=(2, 1), padding=(1, 0), groups=2, bias=True)
    net = ops.conv(spec)
    b = torch.randn(6, dtype=torch.float64)

    def biased(x: Any, w: Any, b: Any) -> Any:
        return conv(x, w) + b[:, None, None]

    whole = biased(X, W, b)
    assert_close(net(X=X, W=W, b=b), whole)
    assert_close(net.vjp("b")(V=V), vjp(lambda b: biased(X, W, b), b)[1](V)[0])
    assert_close(net.vjp("W")(X=X, V=V), vjp(conv, X, W)[1](V)[1])
    assert_close(net.jacobian("b")(n=2), jacrev(biased, 2)(X, W, b))
    assert_close(net.jvp("b")(T=b, n=2), b[:, None, None].expand(whole.shape))
    assert_close(net.narrow("o2", 1, 2)(X=X, W=W, b=b), whole[..., 1:3])
    assert_close(net.slice("o1", 0, 3, 2)(X=X, W=W, b=b), whole[:, :, ::2])
    assert_close(net.ungroup("g").select("c_out", 1)(X=X, W=W, b=b), whole[:, 1::3])
    assert_close(net.regroup("o1 (n o2) g c_out")(X=X, W=W, b=b).shape, (3, 8, 2, 3))
    assert_close(net.scaled("1/3")(X=X, W=W, b=b), whole / 3)
    squares = net.merge(net, share=net.output_indices, output="")
    assert len(squares.terms) == 4
    assert_close(squares(X=X, W=W, b=b), whole.square().sum())
    assert_close(squares.jacobian("b")(X=X, W=W, b=b), 2 * whole.sum((0, 2, 3)))
    with pytest.raises(NetworkError, match="net is a Sum, expected a Network"):
        net.components()


def test_merge_is_a_product_of_values() -> None:
    one = lensor.contraction("a i, i b -> a b", "X", "Y", a=2, i=3, b=4)
    two = lensor.contraction("b i, i c -> b c", "Z", "X2", b=4, i=3, c=5)
    rng = np.random.default_rng(1)
    x, y, z, u = (rng.standard_normal(shape) for shape in [(2, 3), (3, 4), (4, 3), (3, 5)])
    operands = {"X": x, "Y": y, "Z": z, "X2": u}
    assert_close(one.merge(two, share=["b"], output="a c")(**operands), x @ y @ z @ u)
    assert_close(one.merge(two, share=["b"])(**operands), np.einsum("ab,bc->abc", x @ y, z @ u))
    assert_close(one.merge(two)(**operands), np.einsum("ab,dc->abdc", x @ y, z @ u))
    assert_close(one.merge(two, output="(b_ c) (a b)")(**operands).shape, (20, 8))
    assert_close(one.merge(two, share=["b", "i"], output="a c")(**operands), np.einsum("ai,ib,bi,ic->ac", x, y, z, u))
    # Operands of one name are one array; scales multiply.
    twice = one.scaled("1/2").merge(one.scaled(3), share=["a"], output="b b_")
    assert twice.operand_names == ("X", "Y")
    assert_close(twice(X=x, Y=y), 1.5 * (x @ y).T @ (x @ y))
    with pytest.raises(NetworkError, match="shared index 'i' has sizes 3 and 2 in the two networks"):
        one.merge(lensor.contraction("i -> i", "V", i=2), share=["i"])


def test_splitting_goes_through_deltas_and_patterns() -> None:
    delta = lensor.contraction("a b, n a -> n b", "δ", "X", a=6, n=2).split("b", {"p": 2, "q": None})
    x = np.random.default_rng(2).standard_normal((2, 6))
    assert delta.output == (("n",), ("p", "q"))
    assert_close(delta(X=x), x)
    both = lensor.contraction("a b -> a b", "δ", a=6).split("a", {"p": 3, "q": 2})
    assert_close(both.ungroup("p")(), np.eye(6).reshape(3, 2, 6))
    net = bound(ops.conv(SPECS["1-d"]))
    operands = operands_of(net)
    full = net(**operands)
    assert_close(net.split("o1", {"a": 5, "b": 1}).ungroup("a")(**operands), full[..., None])
    assert_close(net.split("i1", {"a": 3, "b": None})(**operands), full)
    assert_close(net.split("k1", {"k1": 3})(**operands), full)
    assert_close(net.narrow("o1", 0, 4).split("o1", {"a": 2, "b": 2}).select("b", 1)(**operands), full[..., 1:4:2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: net.jvp("Z"), r"operand 'Z' is unknown, expected one of \['X', 'W'\]"),
        (lambda net: net.vjp("W", "X"), r"cotangent 'X' is an operand already, .*: operands are \['X', 'W'\]"),
        (lambda net: net.jvp("W", "X"), r"tangent 'X' is an operand already"),
        (lambda net: net.slice("z", 0, 1), r"index 'z' is unknown, expected one of .*'c_in'"),
        (lambda net: net.slice("o1", 0, 3, 0), r"has start 0, stop 3 and step 0, expected .* step >= 1"),
        (lambda net: net.slice("o1", -1, 3), r"0 <= start"),
        (lambda net: net.narrow("o1", 0, 0), r"start < stop"),
        (lambda net: net.select("z", 0), r"index 'z' is unknown"),
        (lambda net: net.select("o1", -4), r"position is -4, expected -3 <= position < 3"),
        (lambda net: net.select("n", 0), r"net\.bind\(n="),
        (lambda net: net.diagonal("o1", "o1"), r"are 'o1' and 'o1', expected two different ones"),
        (lambda net: net.diagonal("z", "o1"), r"output index 'z' is unknown, expected one of \['n', 'g', 'c_out', "),
        (lambda net: net.block_diagonal("z", "o1", 1), r"output index 'z' is unknown"),
        (
            lambda net: net.block_diagonal("o1", "o2", 1),
            r"block_size is 1 for indices 'o1' and 'o2' of sizes \(3, 4\), expected equal",
        ),
        (lambda net: net.block_diagonal("c_out", "o1", 0), r"block_size is 0 for .* of sizes \(3, 3\), expected"),
        (lambda net: net.block_diagonal("n", "o1", 1), r"net\.bind\(n="),
        (lambda net: net.keep("z"), r"summed index 'z' is unknown, expected one of \['c_in', 'i1', "),
        (lambda net: net.batch("v", ["X", "Z"]), r"operand 'Z' is unknown, expected one of \['X', 'W'\]"),
        (lambda net: net.merge(net, share=["n"], output="z"), r"'z'"),
        (lambda net: net.rename(o1="a b"), r"the new name of an index is 'a b', expected an identifier"),
        (lambda net: net.rename(o1="x", o2="x"), r"two indices would be named 'x'"),
        (lambda net: net.rename_operands(Z="Y"), r"operand 'Z' is unknown"),
        (lambda net: net.rename_operands(X="1"), r"would be \['1', 'W'\], expected different identifiers"),
        (lambda net: net.group("o1", "z"), r"output index 'z' is unknown"),
        (lambda net: net.group("o1", "o1"), r"'o1'"),
        (lambda net: net.ungroup("z"), r"output index 'z' is unknown"),
        (lambda net: net.ungroup("i1"), r"output index 'i1' is unknown"),
        (lambda net: net.split("z", {"a": 1}), r"index 'z' is unknown"),
        (lambda net: net.split("n", {"a": 1, "b": None}), r"net\.bind\(n="),
        (lambda net: net.split("c_out", {"a": None, "b": None}), r"with 2 entries None, expected at most one"),
        (lambda net: net.split("c_out", {"a": 2, "b": None}), r"expected sizes with the product 3"),
        (lambda net: net.bind(n=-1), r"'n' is -1, expected at least 0"),
        (lambda net: net.scaled(1, {"z": 1}), r"index 'z' is unknown"),
        (
            lambda net: net.substitute("W", lensor.contraction("a b -> a b", "A")),
            r"network has 2 output legs, expected 4 as operand 'W'",
        ),
        (
            lambda net: net.substitute("W", lensor.contraction("a b c d -> a b c d", "A", a=5, b=2, c=3, d=2)),
            r"output leg 0 of network, \('a',\), has size 5, expected 6 as leg 0 of operand 'W', \('g', 'c_out'\)",
        ),
        (lambda net: net.regroup("n (g c_out) o1 o2 z"), r"'z' is not in the operands"),
        (lambda net: net.regroup("n (g c_out) o1 o2 n"), r"'n' is repeated"),
    ],
)
def test_errors_of_transforms(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call(ops.conv(SPEC))
    assert isinstance(caught.value, lensor.LensorError)


def test_operands_of_batch_are_a_sequence() -> None:
    with pytest.raises(TypeError, match="operands is the str 'X', expected a sequence of names"):
        ops.conv(SPEC).batch("v", "X")
    with pytest.raises(TypeError):
        ops.conv(SPEC).slice("o1", 0.0, 2)


def test_substituting_among_operands_of_similar_names() -> None:
    """The new operands, and those that stay, may be called anything, the replaced one's name included."""
    gram = lensor.contraction("i j, j k, k l -> i l", "A", "A", "A_")
    both = gram.substitute("A", lensor.contraction("a r, r b -> a b", "A__", "A"))
    a, b, c = (RNG.standard_normal((3, 3)) for _ in range(3))
    assert set(both.operand_names) == {"A", "A_", "A__"}
    assert_close(both(A=a, A_=b, A__=c), c @ a @ c @ a @ b)


@pytest.mark.parametrize(
    "cut",
    [
        lambda net: net.narrow("j", 0, 2),
        lambda net: net.slice("j", 0, 5, 2),
        lambda net: net.select("j", 1),
        lambda net: net.select("j", -1),
    ],
)
def test_no_positions_of_an_index_that_has_two_sizes_in_a_sum(cut: Any) -> None:
    """Summed indices of different terms may share a name by chance: there is no one index to take positions of."""
    one = lensor.contraction("i j, j -> i", "A", "B", i=2, j=3)
    other = lensor.contraction("i j, j -> i", "C", "D", i=2, j=5)
    for total, sizes in ((one + other, [3, 5]), (other + one, [5, 3])):
        with pytest.raises(
            NetworkError, match=rf"index 'j' has sizes \{sizes} in the terms of the sum, expected one size"
        ):
            cut(total)


def test_binding_an_index_that_has_another_size_in_a_later_term() -> None:
    one = lensor.contraction("i j, j -> i", "A", "B", i=2, j=3)
    other = lensor.contraction("i j, j -> i", "C", "D", i=2, j=5)
    with pytest.raises(NetworkError, match="the size of index 'j' is 3, expected 5"):
        (one + other).bind(j=3)
    assert (one + other).bind(i=2) == one + other
