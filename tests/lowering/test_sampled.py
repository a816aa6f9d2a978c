"""Sampled networks: every index of every operation, every candidate plan, against the dense network in NumPy."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lensor
from lensor.errors import NetworkError, SubscriptsError
from lensor.evaluate import bind_shapes
from lensor.lowering import candidates
from lensor.runtime import run
from tests.support.dense import evaluate_dense
from tests.support.oracles import OPERATIONS, make_case
from tests.support.strategies import calls


def assert_close(found: Any, expected: np.ndarray) -> None:
    """Equal up to rounding."""
    np.testing.assert_allclose(
        np.asarray(found), expected, rtol=1e-9, atol=1e-9 * max(1.0, np.abs(expected).max(initial=0))
    )


@st.composite
def sampled(draw: st.DrawFn, op: str) -> tuple[Any, dict[str, np.ndarray]]:
    """A network of an operation with one to three indices sampled, and its operands."""
    call = draw(calls(op))
    case = make_case(op, **call)
    spec = lensor.ConvSpec(**call["spec"])
    net = getattr(lensor.ops, op)(spec, **call["options"])
    operands = dict(case.operands)
    net = bind_shapes(
        net.bind(case.sizes) if case.sizes else net, {name: array.shape for name, array in operands.items()}
    )
    if isinstance(net, lensor.Sum):
        net = net.terms[0]
        operands = {name: array for name, array in operands.items() if name in net.operand_names}
    known = [index for index in sorted(net.sizes) if all(index != held for held, _ in net.scale.powers)]
    for index in draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True)):
        size = net.sizes[index]
        positions = np.array(sorted(draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size))), np.int64)
        weights = f"{index}_weights" if draw(st.booleans()) else None
        keep = None if weights else draw(st.sampled_from((None, 0.25, Fraction(1, 3))))
        net = net.sample(index, keep, weights=weights)
        operands[f"{index}_positions"] = positions
        if weights:
            operands[weights] = draw(st.sampled_from((1.0, 2.5))) * np.ones(len(positions))
    return net, operands


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_candidate_of_a_sampled_network_is_its_dense_value(op: str) -> None:
    @settings(max_examples=30)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        net, operands = data.draw(sampled(op))
        expected = evaluate_dense(net, operands)
        bound = bind_shapes(net, {name: array.shape for name, array in operands.items()})
        assert_close(evaluate_dense(net.simplify(), operands), expected)
        tensors = {name: torch.from_numpy(array) for name, array in operands.items()}
        for plan in candidates(bound):
            assert_close(run(plan, operands), expected)
            assert_close(run(plan, tensors), expected)

    check()


def _masked(array: np.ndarray, axes: dict[int, np.ndarray]) -> np.ndarray:
    """The array with zeros where one of the axes is at a position that is not listed."""
    for axis, positions in axes.items():
        mask = np.zeros(array.shape[axis])
        mask[positions] = 1
        array = array * mask.reshape([-1 if at == axis else 1 for at in range(array.ndim)])
    return array


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize(
    "hyper", [{"padding": 1}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}, {"groups": 2}]
)
def test_a_stored_part_gives_the_gradient_of_the_masked_input(hyper: dict[str, int], mode: str) -> None:
    spec = lensor.ConvSpec(4, 6, (9, 8), 3, padding_mode=mode, **hyper)
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((3, 4, 9, 8)), rng.standard_normal((3, 6, *spec.output_size))
    rows, columns = np.array([0, 2, 5, 8]), np.array([1, 4, 7])
    net = lensor.ops.conv_weight_vjp(spec)
    expected = 8 * evaluate_dense(net, {"X": _masked(x, {2: rows, 3: columns}), "V": v})
    net = net.sample("i1", 0.25, stored=["X"]).sample("i2", 0.5, stored=["X"])
    operands = {"X": x[:, :, rows][:, :, :, columns], "V": v, "i1_positions": rows, "i2_positions": columns}
    assert_close(net(**operands), expected)
    for plan in candidates(bind_shapes(net, {name: array.shape for name, array in operands.items()})):
        assert_close(run(plan, operands), expected)


@pytest.mark.parametrize("index", ["o1", "o2", "c_out", "n"])
def test_an_output_index_gives_the_scaled_part(index: str) -> None:
    spec = lensor.ConvSpec(2, 3, (7, 6), 3, padding=1)
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((4, 2, 7, 6)), rng.standard_normal((3, 2, 3, 3))
    net, whole = lensor.ops.conv(spec), evaluate_dense(lensor.ops.conv(spec), {"X": x, "W": w})
    axis = {"n": 0, "c_out": 1, "o1": 2, "o2": 3}[index]
    positions = np.array([2, 0])
    found = net.sample(index, 0.5, positions="S").bind({f"{index}_full": whole.shape[axis]})(X=x, W=w, S=positions)
    assert_close(found, 2 * whole.take(positions, axis))


def test_scattered_into_zeros_the_expectation_is_the_whole() -> None:
    net = lensor.contraction("o i, i -> o", "A", "x").bind(o=5)
    a, x = np.arange(10.0).reshape(5, 2), np.array([1.0, -2.0])
    total = np.zeros(5)
    for kept in range(2**5):
        positions = np.array([at for at in range(5) if kept >> at & 1], np.int64)
        probability = 0.3 ** len(positions) * 0.7 ** (5 - len(positions))
        if len(positions):
            total[positions] += probability * net.sample("o", 0.3, positions="S")(A=a, x=x, S=positions)
    np.testing.assert_allclose(total, a @ x, rtol=1e-12)


def test_text_and_subscripts_of_a_selection_read_back() -> None:
    net = lensor.ops.conv_weight_vjp(lensor.ConvSpec(2, 3, (5,), 3)).sample("i1", 0.5, stored=["X"])
    assert "select i1_positions[i1_full i1]" in str(net)
    assert lensor.parse(repr(net).removeprefix("parse('").removesuffix("')")) == net
    assert net.operands[-1] == "select i1_positions"
    small = lensor.parse("X[n i] select S[i j] -> n j")
    assert lensor.contraction(small.subscripts, *small.operands) == small
    assert small != lensor.parse("X[n i] S[i j] -> n j")
    with pytest.raises(SubscriptsError, match="1 legs, expected 2"):
        lensor.parse("X[n i] select S[i] -> n")


def test_a_selection_is_an_operand_to_transforms() -> None:
    net = lensor.parse("X[n i] select S[i j] -> n j").bind(n=2, i=3, j=2)
    x, s = np.arange(6.0).reshape(2, 3), np.array([2, 0])
    assert_close(net.rename_operands(S="T")(X=x, T=s), x[:, s])
    assert_close(net.vjp("X")(V=np.ones((2, 2)), S=s), np.array([[1.0, 0, 1], [1, 0, 1]]))
    one_hot = lensor.contraction("a b -> a b", "H").bind(a=3, b=2)
    assert_close(net.substitute("S", one_hot)(X=x, H=np.eye(3)[:, s]), x[:, s])
    for call in (net.vjp, net.jvp, net.jacobian):
        with pytest.raises(NetworkError, match="positions have no derivative"):
            call("S")
    with pytest.raises(NetworkError, match="one vector of positions"):
        net.batch("v", ["S"])
    with pytest.raises(NetworkError, match="an array in one place and a selection in another"):
        lensor.parse("S[i] select S[i j] -> j")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: net.sample("q", 0.5), "index 'q' is unknown"),
        (lambda net: net.sample("i1", 0), "keep is 0, expected a number with 0 < keep <= 1"),
        (lambda net: net.sample("i1", 1.5), "keep is 1.5"),
        (lambda net: net.sample("i1", float("nan")), "keep is nan"),
        (lambda net: net.sample("i1", float("inf")), "keep is inf"),
        (lambda net: net.sample("i1", "abc"), "keep is 'abc'"),
        (lambda net: net.sample("i1", True), "keep is True"),
        (lambda net: net.sample("i1", 0.5, positions="X"), "'X' exists already"),
        (lambda net: net.sample("i1", 0.5, weights="V"), "'V' exists already"),
        (lambda net: net.sample("i1", 0.5, stored=["V"]), "does not have index 'i1'"),
    ],
)
def test_bad_samples_are_refused(call: Any, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        call(lensor.ops.conv_weight_vjp(lensor.ConvSpec(1, 1, (5,), 3)))


def test_bad_positions_are_refused() -> None:
    net = lensor.parse("X[n i] select S[i j] -> n j")
    x = np.ones((2, 3))
    for positions, error, message in (
        (np.array([0, 3]), ValueError, "positions 0 to 3, expected 0 to 2"),
        (np.array([-1]), ValueError, "positions -1 to -1"),
        (np.array([0.0]), TypeError, "expected positions of an integer dtype"),
        (np.array([[0]]), ValueError, "axes"),
    ):
        with pytest.raises(error, match=message):
            net(X=x, S=positions)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        net(X=torch.ones(2, 3), S=torch.tensor([0], dtype=torch.int32))
    with pytest.raises(ValueError, match="positions 0 to 5"):
        net(X=torch.ones(2, 3), S=torch.tensor([0, 5]))


def test_plans_do_not_depend_on_positions() -> None:
    net = lensor.ops.conv_weight_vjp(lensor.ConvSpec(2, 3, (9,), 3, padding=1)).sample("i1", 0.5, stored=["X"])
    rng = np.random.default_rng(0)
    shapes = {"X": (2, 2, 4), "V": (2, 3, 9), "i1_positions": (4,)}
    plan = net.plan(**shapes)
    for positions in (np.array([0, 1, 2, 3]), np.array([8, 2, 2, 5])):
        operands = {"X": rng.standard_normal((2, 2, 4)), "V": rng.standard_normal((2, 3, 9)), "i1_positions": positions}
        assert_close(plan(**operands), evaluate_dense(net, operands))
    measured = net.plan(X=torch.ones(2, 2, 4), V=torch.ones(2, 3, 9), i1_positions=torch.arange(4), effort="measure")
    assert all(candidate.measured is not None for candidate in measured.candidates[:1])


def test_derivatives_of_sampled_networks_are_autograds() -> None:
    net = lensor.ops.conv_weight_vjp(lensor.ConvSpec(2, 3, (6, 5), 3, padding=1))
    net = net.sample("i1", 0.5, stored=["X"]).sample("i2", weights="p", stored=["X"])
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    rows, columns = torch.tensor([1, 4, 5]), torch.tensor([0, 3])
    x, v, p = normal(2, 2, 3, 2), normal(2, 3, 6, 5), normal(2)

    def call(x: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return net(X=x, V=v, i1_positions=rows, i2_positions=columns, p=p)

    assert torch.autograd.gradcheck(call, (x, v, p))
    assert torch.autograd.gradgradcheck(call, (x, v, p))
