"""The JAX backend: values, transforms, dtypes and graphs, against NumPy and against JAX's own operators."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lensor
import lensor.functional as F
from lensor.kernels import load
from lensor.kernels.jax import BACKEND as JAX
from lensor.lowering import STRATEGIES, lower
from lensor.plan import Plan
from lensor.plan import steps as s
from lensor.runtime import Runnable, run
from tests.support.cases import BUILDERS, SPECS, assert_close, bound, operands_of, tensors
from tests.support.oracles import OPERATIONS, make_case
from tests.support.strategies import calls

SPEC = lensor.ConvSpec(4, 6, (7, 6), (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
OPTIONS = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}
SHAPES = {"X": (2, 4, 7, 6), "W": (6, 2, 3, 2), "V": (2, 6, 4, 4)}


def normal(*shape: int, seed: int = 0, dtype: str = "float64") -> Any:
    rng = np.random.default_rng(seed)
    real = rng.standard_normal(shape)
    return jnp.asarray(real + 1j * rng.standard_normal(shape) if "complex" in dtype else real, dtype)


X, W, V = (normal(*shape, seed=seed) for seed, shape in enumerate(SHAPES.values()))


def conv(x: Any, w: Any) -> Any:
    return F.conv(x, w, **OPTIONS)


def own(x: Any, w: Any) -> Any:
    """The same convolution by JAX."""
    options = {"rhs_dilation": (1, 2), "feature_group_count": 2}
    return jax.lax.conv_general_dilated(x, w, (2, 1), [(1, 1), (0, 0)], **options)


def curved(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arrays: jnp.sin(function(*arrays)).sum()


# --------------------------------------------------------------------------------------------------------------- values
@settings(max_examples=30)
@given(st.data())
def test_three_backends_are_equal(data: st.DataObject) -> None:
    """Any operation with any hyper-parameters, with a plan that each backend chooses and with any strategy."""
    op = data.draw(st.sampled_from(sorted(OPERATIONS)))
    case = make_case(op, **data.draw(calls(op)))
    network = getattr(lensor.ops, case.op)(lensor.ConvSpec(**case.spec), **case.options)
    expected = network(**case.operands, **case.sizes)
    arrays = {name: jnp.asarray(array) for name, array in case.operands.items()}
    for found in (network(**arrays, **case.sizes), network(**tensors(case.operands), **case.sizes)):
        assert found.dtype == (jnp.float64 if isinstance(found, jax.Array) else torch.float64)
        assert_close(found, expected, 1e-12)
    shapes = {name: array.shape for name, array in arrays.items()}
    strategy = data.draw(st.sampled_from(STRATEGIES))
    plan = lower(lensor.evaluate.bind_shapes(network.bind(case.sizes), shapes).simplify(), strategy)
    assert_close(run(plan, arrays), expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", BUILDERS)
def test_every_strategy_on_every_operation(op: str, spec: str) -> None:
    net = bound(BUILDERS[op](SPECS[spec])).simplify()
    operands = operands_of(net)
    arrays = {name: jnp.asarray(array) for name, array in operands.items()}
    expected = net(**operands)
    for strategy in STRATEGIES:
        assert_close(run(lower(net, strategy), arrays), expected, 1e-12)


def test_pattern_products_by_definition() -> None:
    from lensor.lowering import FUSED

    net = bound(lensor.ops.ggn_diagonal(SPEC)).simplify()
    operands = operands_of(net)
    plan = lower(net, FUSED[1])
    assert any(isinstance(step, s.PatternProduct) for step in plan.steps)
    assert_close(run(plan, {name: jnp.asarray(x) for name, x in operands.items()}), net(**operands), 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64", "complex128"])
def test_dtypes(dtype: str) -> None:
    x, w = (normal(*SHAPES[name], seed=seed, dtype=dtype) for seed, name in enumerate("XW"))
    tolerance = {"bfloat16": 3e-2, "float16": 3e-3, "complex128": 1e-12}.get(dtype, 1e-5)
    found = conv(x, w)
    assert found.dtype == dtype
    wide = np.complex128 if "complex" in dtype else np.float64
    expected = F.conv(np.asarray(x, wide), np.asarray(w, wide), **OPTIONS)
    assert_close(np.asarray(found, wide), expected, tolerance)
    if "complex" not in dtype:
        factor = F.kfac_input_factor(x, (3, 2), padding=1)
        assert factor.dtype == dtype
        expected = F.kfac_input_factor(np.asarray(x, wide), (3, 2), padding=1)
        assert_close(np.asarray(factor, wide), expected, tolerance)


def test_large_values_in_half_precision_do_not_overflow() -> None:
    x = jnp.full((4, 8, 16, 16), 20.0, jnp.float16)
    found = F.kfac_input_factor(x, (3, 3), approx="expand")
    assert jnp.isinf(found).all()  # 400 · 14² is more than float16 can represent
    assert (F.kfac_input_factor(x, (3, 3), approx="reduce") == 400).all()  # squares of sums over positions overflow


def test_einsum_networks_and_plans_take_arrays_of_jax() -> None:
    pattern = lensor.IndexPattern(7, 3, stride=2, padding=1)
    found = lensor.einsum("n c i j, i o k -> n c o k j", X, pattern)
    assert isinstance(found, jax.Array)
    assert_close(found, lensor.einsum("n c i j, i o k -> n c o k j", np.asarray(X), pattern))
    net = lensor.ops.conv(SPEC)
    plan = net.plan(X=X, W=W)
    assert_close(plan(X=X, W=W), own(X, W), 1e-12)
    assert_close(jax.jit(lambda x, w: plan(X=x, W=w))(X, W), own(X, W), 1e-12)
    assert_close(jax.jit(lambda x, w: net(X=x, W=w))(X, W), own(X, W), 1e-12)


def test_positions_of_sampled_networks_are_traced() -> None:
    net = lensor.ops.conv_weight_vjp(SPEC).sample("i1", 0.5, stored=["X"])
    (name,) = net.selections
    rows = jnp.array([1, 4, 5])
    arrays = {"X": X[:, :, rows], "V": V}
    expected = net(**{key: np.asarray(x) for key, x in arrays.items()}, **{name: np.asarray(rows)})
    found = jax.jit(lambda x, v, at: net(**{"X": x, "V": v, name: at}))(arrays["X"], V, rows)
    assert_close(found, expected, 1e-12)
    each = jax.vmap(lambda at: net(**{"X": arrays["X"], "V": V, name: at}))(jnp.stack([rows, rows]))
    assert_close(each[1], expected, 1e-12)
    for wrong in ([1, 4, 7], [1, 4, -2]):  # traced positions cannot be checked
        assert jnp.isnan(jax.jit(lambda at: net(**{"X": arrays["X"], "V": V, name: at}))(jnp.array(wrong))).all()
    unsigned = jnp.array([0, 4, 5], jnp.uint32)
    below = jax.jit(lambda at: net(**{"X": arrays["X"], "V": V, name: at - jnp.uint32(1)}))(unsigned)
    assert jnp.isnan(below).all()
    with pytest.raises(ValueError, match="positions 1 to 7, expected 0 to 6"):
        net(**arrays, **{name: jnp.array([1, 4, 7])})


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int64"])
def test_narrow_positions_do_not_overflow(dtype: str) -> None:
    net = lensor.ops.conv_weight_vjp(lensor.ConvSpec(1, 1, (397,), (4,), stride=(3,))).sample("o1", 0.05)
    (name,) = net.selections
    x, v, at = normal(1, 1, 397), normal(1, 1, 132, seed=1), [3, 60, 70, 100, 120, 126, 127]
    expected = net(X=np.asarray(x), V=np.asarray(v), **{name: np.array(at)})
    assert_close(net(X=x, V=v, **{name: jnp.array(at, dtype)}), expected, 1e-12)
    assert_close(net(X=np.asarray(x), V=np.asarray(v), **{name: np.array(at, dtype)}), expected, 1e-12)


def test_convolutions_that_stop_the_compiler_are_rewritten() -> None:
    """XLA ends the process while it compiles the transposed convolution with these sizes."""
    x, w, v = normal(2, 3, 3, 4), normal(3, 3, 2, 3), normal(2, 3, 3, 2)
    found = F.conv_input_vjp(x.shape, w, v, padding=(2, 1), dilation=(4, 2))
    assert_close(found, F.conv_input_vjp(x.shape, *map(np.asarray, (w, v)), padding=(2, 1), dilation=(4, 2)), 1e-12)


def test_long_sums_in_bfloat16() -> None:
    assert float(F.fold(jnp.ones((1, 300, 301), jnp.bfloat16), (600,), (300,)).max()) == 300.0


# ----------------------------------------------------------------------------------------------------------- transforms
def test_long_sums_over_equal_positions_in_bfloat16() -> None:
    x, w = jnp.ones((1, 1, 4), jnp.bfloat16), jnp.ones((1, 1, 1), jnp.bfloat16)
    total = jax.grad(lambda x: F.conv(x, w, padding=300, padding_mode="replicate").astype("float32").sum())(x)
    assert_close(total.astype("float32"), np.array([[[301, 1, 1, 301]]]), 1e-2)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("way", [lambda f: f, jax.jit])
def test_results_have_no_weak_type(way: Callable[..., Any], padding: int) -> None:
    x, w = jnp.broadcast_to(jnp.asarray(2.0), (1, 2, 5)), jnp.broadcast_to(jnp.asarray(0.1), (2, 2, 3))
    assert x.weak_type
    found = way(lambda x, w: F.conv(x, w, padding=padding))(x, w)
    assert (found + jnp.ones((), jnp.bfloat16)).dtype == x.dtype


@pytest.mark.parametrize("rows", [511, 512, 1025, 1536])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_gram_matrices_in_blocks(rows: int, dtype: str) -> None:
    X = normal(2, rows, 3, dtype=dtype)
    found = lensor.einsum("g i k, g j k -> g i j", X, X)
    assert_close(np.asarray(found), np.einsum("gik,gjk->gij", X, X), 1e-12)
    assert (found == found.swapaxes(1, 2)).all()


@settings(max_examples=25)
@given(st.data())
def test_transposes_and_products_with_axes_of_size_one(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=6))
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    x = normal(*shape)
    transpose = JAX.steps[s.Transpose](s.Transpose((0,), order))
    assert (np.asarray(transpose(x)) == np.asarray(x).transpose(order)).all()
    a, b = normal(*shape[:-2], 3, 4), normal(*shape[:-2], 4, 2)
    product = JAX.steps[s.MatMul](s.MatMul((0, 1)))
    assert_close(np.asarray(product(a, b)), np.asarray(a) @ np.asarray(b), 1e-12)


def test_jit() -> None:
    assert_close(jax.jit(conv)(X, W), F.conv(np.asarray(X), np.asarray(W), **OPTIONS), 1e-12)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (2, 1)])
def test_vmap(axes: tuple[int | None, int | None]) -> None:
    arrays = [x if axis is None else jnp.stack([x, 2 * x, x - 1], axis) for x, axis in zip((X, W), axes, strict=True)]
    found = jax.vmap(conv, axes)(*arrays)
    for place in range(3):
        one = [x if axis is None else jnp.take(x, place, axis) for x, axis in zip(arrays, axes, strict=True)]
        assert_close(found[place], F.conv(*map(np.asarray, one), **OPTIONS), 1e-12)


def test_vmap_of_vmap_and_of_derivatives() -> None:
    stacked, weights = jnp.stack([X, X + 1]), jnp.stack([W, 2 * W, W - 1])
    found = jax.vmap(lambda x: jax.vmap(lambda w: conv(x, w))(weights))(stacked)
    for i, j in itertools.product(range(2), range(3)):
        assert_close(found[i, j], own(stacked[i], weights[j]), 1e-12)
    per_example = jax.vmap(jax.grad(curved(lambda w, x: conv(x[None], w))), (None, 0))(W, X)
    expected = jax.vmap(jax.grad(curved(lambda w, x: own(x[None], w))), (None, 0))(W, X)
    assert_close(per_example, expected, 1e-12)


@pytest.mark.parametrize("operand", ["X", "W"])
@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_jacobians(mode: Callable[..., Any], operand: str) -> None:
    net = lensor.ops.conv(SPEC)
    arrays = {"X": X, "W": W}
    found = mode(lambda x: conv(**({"x": X, "w": W} | {operand.lower(): x})))(arrays.pop(operand))
    assert_close(found, net.jacobian(operand)(**{name: np.asarray(x) for name, x in arrays.items()}, n=2), 1e-12)


def test_grad_and_jvp() -> None:
    gradients = jax.grad(lambda x, w: (conv(x, w) * V).sum(), (0, 1))(X, W)
    x, w, v = map(np.asarray, (X, W, V))
    assert_close(gradients[0], F.conv_input_vjp(X.shape, w, v, **OPTIONS), 1e-12)
    assert_close(gradients[1], F.conv_weight_vjp(x, (6, 2, 3, 2), v, **OPTIONS), 1e-12)
    _, tangent = jax.jvp(conv, (X, W), (2 * X, W + 1))
    assert_close(tangent, F.conv(2 * x, w, **OPTIONS) + F.conv(x, w + 1, **OPTIONS), 1e-12)


@pytest.mark.parametrize(
    "higher",
    [
        jax.hessian,
        pytest.param(lambda f: jax.jacrev(jax.jacrev(f)), marks=pytest.mark.slow),
        pytest.param(lambda f: jax.jacrev(jax.jacfwd(f)), marks=pytest.mark.slow),
    ],
    ids=["forward over reverse", "reverse over reverse", "reverse over forward"],
)
def test_second_derivatives(higher: Callable[..., Any]) -> None:
    x = X[:1, :, :4, :3]

    def of_input(f: Callable[..., Any]) -> Callable[[Any], Any]:
        return lambda x: curved(f)(x, W)

    def of_weight(f: Callable[..., Any]) -> Callable[[Any], Any]:
        return lambda w: curved(f)(x, w)

    for made, array in ((of_input, x), (of_weight, W)):
        assert_close(higher(made(conv))(array), jax.hessian(made(own))(array), 1e-12)


@pytest.mark.slow
def test_third_derivatives_of_a_network_with_an_operand_twice() -> None:
    x = normal(1, 2, 4, 3)

    def factor(x: Any) -> Any:
        return jnp.sin(F.kfac_input_factor(x, (3, 2), padding=1)).sum()

    def unfolded(x: Any) -> Any:
        padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        rows = [padded[:, :, i : i + 4, j : j + 4] for i in range(3) for j in range(2)]
        patches = jnp.stack(rows, 2).reshape(1, 12, -1)
        return jnp.sin(jnp.einsum("ndo, neo -> de", patches, patches)).sum()

    direction = normal(1, 2, 4, 3, seed=1)

    def third(f: Callable[[Any], Any]) -> Any:
        return jax.grad(lambda x: jax.jvp(jax.grad(f), (x,), (direction,))[1].sum())(x)

    assert_close(third(factor), third(unfolded), 1e-11)


def test_complex_derivatives_follow_jax() -> None:
    x, w = (normal(*SHAPES[name], seed=seed, dtype="complex128") for seed, name in enumerate("XW"))

    def squares(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arrays: jnp.abs(f(*arrays) ** 2).sum()

    found, expected = (jax.grad(squares(f), (0, 1))(x, w) for f in (conv, own))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-12)


def test_checkpoint_and_linear_transpose() -> None:
    found = jax.grad(jax.checkpoint(curved(conv)))(X, W)
    assert_close(found, jax.grad(curved(own))(X, W), 1e-12)
    (moved,) = jax.linear_transpose(lambda x: conv(x, W), X)(V)
    assert_close(moved, F.conv_input_vjp(X.shape, np.asarray(W), np.asarray(V), **OPTIONS), 1e-12)
    with pytest.raises(NotImplementedError, match="not linear in the operands"):
        jax.linear_transpose(lambda x: F.kfac_input_factor(x, (3, 2)), X)(jnp.zeros((1, 24, 24)))


def test_scans_and_branches() -> None:
    def body(x: Any, w: Any) -> tuple[Any, Any]:
        y = F.conv(x, w, padding=1)
        return y, y.sum()

    weights = normal(3, 4, 4, 3, 3, seed=2)
    found = jax.grad(lambda ws: jax.lax.scan(body, X, ws)[1].sum())(weights)

    def unrolled(ws: Any) -> Any:
        x, total = X, 0.0
        for w in ws:
            x = jax.lax.conv_general_dilated(x, w, (1, 1), [(1, 1), (1, 1)])
            total = total + x.sum()
        return total

    assert_close(found, jax.grad(unrolled)(weights), 1e-11)
    chosen = jax.lax.cond(jnp.array(True), lambda: conv(X, W), lambda: 0 * conv(X, W))
    assert_close(chosen, own(X, W), 1e-12)


SHARDED = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
from tests.kernels.test_jax import check_sharding
check_sharding()
"""


def check_sharding() -> None:
    """Sharded operands, `shard_map`, and their gradients, on two devices."""
    assert len(jax.devices()) == 2
    mesh = Mesh(np.array(jax.devices()), ("d",))
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("d")))
    w = jax.device_put(W, NamedSharding(mesh, PartitionSpec()))
    for call in (conv, jax.jit(conv)):
        assert call(x, w).sharding.is_equivalent_to(x.sharding, 4)
        assert_close(call(x, w), own(X, W), 1e-12)
    factor = F.kfac_input_factor(x, (3, 2), padding=1)
    assert_close(factor, F.kfac_input_factor(np.asarray(X), (3, 2), padding=1), 1e-12)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(PartitionSpec("d"), PartitionSpec()), out_specs=PartitionSpec())
    def total(x: Any, w: Any) -> Any:
        return jax.lax.psum(curved(conv)(x, w), "d")

    assert_close(total(X, W), curved(own)(X, W), 1e-12)
    for found, expected in zip(jax.grad(total, (0, 1))(X, W), jax.grad(curved(own), (0, 1))(X, W), strict=True):
        assert_close(found, expected, 1e-12)
    tangent = jax.jvp(total, (X, W), (X, W))[1]
    assert_close(tangent, jax.jvp(curved(own), (X, W), (X, W))[1], 1e-12)


@pytest.mark.slow
def test_sharded_operands_and_shard_map() -> None:
    subprocess.run([sys.executable, "-c", SHARDED], check=True, timeout=300)


# --------------------------------------------------------------------------------------------------------------- graphs
def primitives(jaxpr: Any) -> set[str]:
    """The names of the primitives of a jaxpr and of those inside it."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found |= primitives(inner)
    return found


@pytest.mark.parametrize("op", ["conv", "kfac_input_factor", "ggn_diagonal"])
def test_graphs_contain_no_callbacks_and_are_traced_once(op: str) -> None:
    net = bound(BUILDERS[op](SPEC))
    arrays = {name: jnp.asarray(x) for name, x in operands_of(net).items()}
    traced = []

    @jax.jit
    def call(**arrays: Any) -> Any:
        traced.append(1)
        return net(**arrays)

    for _ in range(3):
        call(**arrays)
    assert len(traced) == 1
    text = call.lower(**arrays).as_text()
    assert "callback" not in text
    ready = Runnable(net.plan(**arrays), load("jax"))
    steps = primitives(jax.make_jaxpr(lambda *xs: ready.unrecorded(*xs))(*arrays.values()).jaxpr)
    assert steps
    assert not any("callback" in name for name in steps)


def test_eager_calls_compile_once() -> None:
    conv(X, W)
    with jax.log_compiles(True), pytest.MonkeyPatch.context() as patch:
        import logging

        seen: list[str] = []
        handler = logging.Handler()
        patch.setattr(handler, "emit", lambda record: seen.append(record.getMessage()))
        logger = logging.getLogger("jax")
        logger.addHandler(handler)
        try:
            conv(X, W)
        finally:
            logger.removeHandler(handler)
    assert not seen


def test_importing_lensor_imports_no_jax() -> None:
    code = "import sys, lensor, lensor.functional; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


# --------------------------------------------------------------------------------------------------------------- errors
def test_errors_say_what_was_found_and_expected() -> None:
    with pytest.raises(TypeError, match="operands are arrays of jax and numpy, expected one framework"):
        F.conv(X, np.asarray(W))
    with pytest.raises(TypeError, match="int32"):
        F.conv(jnp.zeros((1, 1, 4), jnp.int32), jnp.zeros((1, 1, 2), jnp.int32))
    with pytest.raises(TypeError, match=r"float64.*float32"):
        F.conv(X, W.astype(jnp.float32))
    with pytest.raises(TypeError, match="float8"):
        F.conv(X.astype(jnp.float8_e4m3fn), W.astype(jnp.float8_e4m3fn))
    with pytest.raises(ValueError, match="shape"):
        jax.jit(conv)(X[:, :3], W)
    (batch,) = jax.export.symbolic_shape("b")
    with pytest.raises(TypeError, match="expected numbers as sizes"):
        jax.export.export(jax.jit(conv))(jax.ShapeDtypeStruct((batch, 4, 7, 6), X.dtype), W)


def test_plans_describe_jax() -> None:
    plan = lensor.ops.conv(SPEC).plan(X=X, W=W, effort="measure")
    assert isinstance(plan, Plan)
    assert_close(plan(X=X, W=W), own(X, W), 1e-12)
    assert "jax" in load("jax").describe(load("jax").kind(X))
