"""Layers for flax and Equinox, and Kronecker factors of models in JAX, against the libraries and against torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from examples.natural_gradient_jax import MODELS, train
from lensor import curvature
from lensor.integrations import equinox as layers
from lensor.integrations import flax as flax_layers
from lensor.integrations.jax import conv_general_dilated, dot_general, kfac
from tests.support.cases import assert_close

RNG = np.random.default_rng(0)
INPUTS, LABELS = RNG.standard_normal((7, 2, 8, 8)), RNG.integers(0, 5, 7)
KEYS = jax.random.split(jax.random.key(0), 3)


class Net(eqx.Module):
    first: layers.Conv
    second: layers.Conv
    last: layers.Linear

    def __init__(self) -> None:
        self.first = layers.Conv(2, 2, 4, 3, stride=2, padding=1, key=KEYS[0])
        self.second = layers.Conv(2, 4, 6, (3, 2), groups=2, key=KEYS[1])
        self.last = layers.Linear(36, 5, key=KEYS[2])

    def __call__(self, x: Any) -> Any:
        return self.last(jnp.tanh(self.second(jnp.tanh(self.first(x)))).reshape(-1))


PARAMS, STATIC = eqx.partition(Net(), eqx.is_array)


def apply(params: Any, x: Any) -> Any:
    return eqx.combine(params, STATIC)(x)


def same_in_torch() -> torch.nn.Sequential:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, 2, 1),
        torch.nn.Tanh(),
        torch.nn.Conv2d(4, 6, (3, 2), groups=2),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(36, 5),
    ).double()
    for at, layer in zip((0, 2, 5), (PARAMS.first, PARAMS.second, PARAMS.last), strict=True):
        part: Any = model[at]
        with torch.no_grad():
            part.weight.copy_(torch.tensor(np.asarray(layer.weight)))
            part.bias.copy_(torch.tensor(np.asarray(layer.bias)).flatten())
    return model


# --------------------------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": 2, "padding": ((1, 0), (2, 1)), "dilation": (1, 2), "groups": 2},
        {"kernel_size": 4, "padding": "SAME", "stride": 2},
        {"kernel_size": 4, "padding": "SAME_LOWER", "use_bias": False},
        {"kernel_size": 3, "padding": 1, "padding_mode": "REFLECT"},
        {"kernel_size": 3, "padding": 2, "padding_mode": "CIRCULAR"},
    ],
)
def test_convolutions_of_equinox(options: dict[str, Any]) -> None:
    key, x = jax.random.key(1), jnp.asarray(RNG.standard_normal((3, 4, 8, 7)))
    own, ours = eqx.nn.Conv(2, 4, 6, key=key, **options), layers.Conv(2, 4, 6, key=key, **options)
    assert_close(jax.vmap(ours)(x), jax.vmap(own)(x), 1e-12)

    def loss(layer: Any) -> Any:
        return jnp.sin(jax.vmap(layer)(x)).sum()

    for one, other in zip(*(jax.tree.leaves(eqx.filter_grad(loss)(layer)) for layer in (ours, own)), strict=True):
        assert_close(one, other, 1e-12)
    with pytest.raises(ValueError, match="map the layer over examples"):
        ours(x)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (3, 3)},
        {"kernel_size": (3, 2), "strides": 2, "padding": ((1, 0), (2, 1)), "kernel_dilation": (1, 2)},
        {"kernel_size": (4, 4), "feature_group_count": 2, "padding": "VALID", "use_bias": False},
        {"kernel_size": (3, 3), "padding": "CIRCULAR"},
        {"kernel_size": (3, 3), "mask": np.tri(3)[:, :, None, None] * np.ones((3, 3, 4, 6))},
    ],
)
@pytest.mark.parametrize(
    "shape", [(3, 8, 7, 4), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((8, 7, 4), (2, 3, 8, 7, 4)))]
)
def test_convolutions_of_flax(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    own, ours = (
        cls(4, 6, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options) for cls in (nnx.Conv, flax_layers.Conv)
    )
    x = jnp.asarray(RNG.standard_normal(shape))
    assert_close(ours(x), own(x), 1e-12)
    gradients = [nnx.grad(lambda layer: jnp.sin(layer(x)).sum())(layer) for layer in (ours, own)]
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert_close(one, other, 1e-12)


def test_linear_layers_take_one_example() -> None:
    with pytest.raises(ValueError, match=r"has shape \(2, 3\), expected \(6,\)"):
        layers.Linear(6, 3, key=KEYS[0])(jnp.ones((2, 3)))


def test_arguments_that_are_not_supported() -> None:
    x, w = jnp.ones((1, 2, 8)), jnp.ones((4, 2, 3))
    wrong: dict[str, Any] = {
        "lhs_dilation": (2,),
        "batch_group_count": 2,
        "precision": jax.lax.Precision.HIGHEST,
        "preferred_element_type": jnp.float32,
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name} is .*expected"):
            conv_general_dilated(x, w, (1,), "VALID", **{name: value})
    with pytest.raises(ValueError, match="padding"):
        conv_general_dilated(x, w, (1,), "FOO")


# -------------------------------------------------------------------------------------------------------------- factors
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_factors_are_those_of_torch(approx: Any, fisher: Any) -> None:
    data = jnp.asarray(INPUTS), jnp.asarray(LABELS)
    found = jax.jit(lambda params: kfac(apply, params, data, approx=approx, fisher=fisher))(PARAMS)
    assert set(found) == {".first.weight", ".second.weight", ".last.weight"}
    expected = curvature.kfac(
        same_in_torch(),
        torch.nn.CrossEntropyLoss(),
        (torch.tensor(INPUTS), torch.tensor(LABELS)),
        approx=approx,
        fisher=fisher,
    )
    for ours, name in (("first", "0"), ("second", "2"), ("last", "5")):
        assert_close(found[f".{ours}.weight"].A, expected[f"{name}.weight"].A.numpy(), 1e-12)
        assert_close(found[f".{ours}.weight"].B, expected[f"{name}.weight"].B.numpy(), 1e-12)


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_factors_of_the_squared_error(fisher: Any) -> None:
    targets = RNG.standard_normal((7, 5))
    found = kfac(apply, PARAMS, (jnp.asarray(INPUTS), jnp.asarray(targets)), loss="mse", fisher=fisher)
    data = torch.tensor(INPUTS), torch.tensor(targets)
    expected = curvature.kfac(same_in_torch(), torch.nn.MSELoss(), data, fisher=fisher)
    for factors, name in zip(found.values(), ("0.weight", "2.weight", "5.weight"), strict=True):
        assert_close(factors.B, expected[name].B.numpy(), 1e-12)


@pytest.mark.parametrize("loss", ["cross_entropy", pytest.param("mse", marks=pytest.mark.slow)])
def test_sampled_factors_are_unbiased(loss: str) -> None:
    targets = jnp.asarray(LABELS) if loss == "cross_entropy" else jnp.asarray(RNG.standard_normal((7, 5)))
    data = jnp.asarray(INPUTS), targets
    exact = kfac(apply, PARAMS, data, loss=loss)
    often = [jnp.concatenate([part] * 10) for part in data]  # each copy of an example is sampled for itself
    sampled = kfac(apply, PARAMS, often, loss=loss, fisher="mc", key=jax.random.key(0), mc_samples=100)
    for name, factors in exact.items():
        assert float(jnp.abs(sampled[name].B - factors.B).max()) < 0.1 * float(jnp.abs(factors.B).max())


def test_models_of_flax_have_the_factors_of_equinox() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            options: dict[str, Any] = {"rngs": rngs, "param_dtype": jnp.float64}
            self.first = flax_layers.Conv(2, 4, (3, 3), strides=2, padding=1, **options)
            self.last = flax_layers.Linear(64, 5, **options)

        def __call__(self, x: Any) -> Any:
            hidden = jnp.tanh(self.first(x))
            return self.last(jnp.moveaxis(hidden, -1, -3).reshape(-1))

    definition, params = nnx.split(Model(nnx.Rngs(0)))
    x, y = jnp.asarray(INPUTS), jnp.asarray(LABELS)
    found = kfac(lambda params, x: nnx.merge(definition, params)(x), params, (jnp.moveaxis(x, 1, -1), y))
    merged = nnx.merge(definition, params)
    first, last = layers.Conv(2, 2, 4, 3, stride=2, padding=1, key=KEYS[0]), layers.Linear(64, 5, key=KEYS[1])
    other = [
        eqx.tree_at(
            lambda layer: (layer.weight, layer.bias),
            first,
            (merged.first.kernel[...].transpose(3, 2, 0, 1), merged.first.bias[...][:, None, None]),
        ),
        eqx.tree_at(lambda layer: (layer.weight, layer.bias), last, (merged.last.kernel[...].T, merged.last.bias[...])),
    ]
    arrays, static = eqx.partition(other, eqx.is_array)

    def same(params: Any, x: Any) -> Any:
        one, two = eqx.combine(params, static)
        return two(jnp.tanh(one(x)).reshape(-1))

    for one, two in zip(found.values(), kfac(same, arrays, (x, y)).values(), strict=True):
        assert_close(one.A, two.A, 1e-12)
        assert_close(one.B, two.B, 1e-12)


def test_parts_that_were_traced_before_are_seen_or_refused() -> None:
    """A function under `jax.jit` or `jax.checkpoint` does not run again if JAX knows its jaxpr."""
    data = jnp.asarray(INPUTS), jnp.asarray(LABELS)
    expected = kfac(apply, PARAMS, data)
    whole, block = jax.jit(apply), jax.jit(lambda layer, x: jnp.tanh(layer(x)))

    def in_blocks(params: Any, x: Any) -> Any:
        net = eqx.combine(params, STATIC)
        return net.last(block(net.second, block(net.first, x)).reshape(-1))

    whole(PARAMS, data[0][0])
    for model in (whole, whole, in_blocks, in_blocks):
        found = kfac(model, PARAMS, data)
        assert set(found) == set(expected)
        for name, factors in found.items():
            assert_close(factors.A, expected[name].A, 1e-12)
            assert_close(factors.B, expected[name].B, 1e-12)
    stored = jax.checkpoint(apply)
    stored(PARAMS, data[0][0])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"jax\.checkpoint|inside a transform|not a leaf"):
            kfac(stored, PARAMS, data)


def test_models_without_factors_are_refused() -> None:
    data = jnp.asarray(INPUTS), jnp.asarray(LABELS)
    with pytest.raises(ValueError, match="is not a leaf of params"):
        kfac(lambda params, x: apply(jax.tree.map(lambda leaf: 2 * leaf, params), x), PARAMS, data)
    with pytest.raises(ValueError, match="inside a transform such as vmap or scan"):
        kfac(lambda params, x: jax.vmap(eqx.combine(params, STATIC))(x[None])[0], PARAMS, data)
    with pytest.raises(ValueError, match=r"runs 2 times, expected once"):
        kfac(lambda params, x: apply(params, x) + apply(params, -x), PARAMS, data)
    with pytest.raises(ValueError, match="expected a vector"):
        kfac(lambda params, x: apply(params, x).sum(), PARAMS, data)
    with pytest.raises(ValueError, match="targets have shape"):
        kfac(apply, PARAMS, (data[0], data[1][:3]))
    with pytest.raises(TypeError, match="random key"):
        kfac(apply, PARAMS, data, fisher="mc")
    with pytest.raises(ValueError, match="mc_samples is 0"):
        kfac(apply, PARAMS, data, fisher="mc", key=KEYS[0], mc_samples=0)
    with pytest.raises(ValueError, match="positive number of examples"):
        kfac(apply, PARAMS, (data[0][:0], data[1][:0]))
    with pytest.raises(TypeError, match="targets have dtype float64, expected integers"):
        kfac(apply, PARAMS, (data[0], data[1].astype(float)))
    with pytest.raises(ValueError, match="expected 0 to 4"):
        kfac(apply, PARAMS, (data[0], data[1] + 3))
    both, first = dict.fromkeys("ab", PARAMS.first.weight), (data[0], data[1] % 4)
    with pytest.raises(ValueError, match="are the same array"):
        kfac(lambda params, x: conv_general_dilated(x[None], params["a"], (1, 1), "SAME").mean((0, 2, 3)), both, first)
    with pytest.raises(ValueError, match="calls 0 layers of Lensor"):
        kfac(lambda params, x: x.mean((1, 2)) * params, jnp.ones(2), (data[0], data[1] % 2))
    with pytest.raises(ValueError, match="fisher"):
        kfac(apply, PARAMS, data, fisher="exact")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- example
@pytest.mark.slow
@pytest.mark.parametrize("library", MODELS)
def test_natural_gradients_learn_the_digits_in_fewer_steps(library: str) -> None:
    model = MODELS[library]()
    plain, natural = (train(model, 8, *one) for one in ((False, 0.3), (True, 0.3)))
    assert natural[-1] < 0.5 * plain[-1]


def product(x: Any, w: Any) -> Any:
    return dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def test_weights_that_are_used_elsewhere_are_refused() -> None:
    x, y, w = (
        jnp.asarray(RNG.standard_normal((4, 3))),
        jnp.array([0, 1, 2, 0]),
        jnp.asarray(RNG.standard_normal((3, 3))),
    )
    penalty = jax.jit(lambda w: (w * w).sum())
    for model in (
        lambda w, x: product(jnp.tanh(x @ w), w),
        lambda w, x: product(x, w) + penalty(w),
        lambda w, x: product(x, w) + w[0],
    ):
        with pytest.raises(ValueError, match=r"the weight  is read [23] times"):
            kfac(model, w, (x, y))
    assert set(kfac(jax.jit(lambda w, x: product(x, w)), w, (x, y))) == {""}


def test_factors_can_be_differentiated() -> None:
    x, y = jnp.asarray(RNG.standard_normal((4, 3))), jnp.array([0, 1, 1, 0])
    w = jnp.asarray(RNG.standard_normal((3, 1, 2)))

    def size(w: Any) -> Any:
        found = kfac(lambda w, x: conv_general_dilated(x[None, None], w, (1,), "VALID").mean((0, 2)), w, (x, y % 3))
        return (found[""].B ** 2).sum()

    assert_close(jax.grad(size)(w), jax.grad(jax.jit(size))(w), 1e-12)


def test_classes_out_of_range_under_jit_give_nan() -> None:
    x, y, w = (
        jnp.asarray(RNG.standard_normal((4, 3))),
        jnp.array([0, 1, 2, 0]),
        jnp.asarray(RNG.standard_normal((3, 3))),
    )
    for fisher in ("empirical", "type-2"):
        factors = jax.jit(lambda t, how=fisher: kfac(lambda w, x: product(x, w), w, (x, t), fisher=how))
        assert jnp.isnan(factors(y - 1)[""].B).all()
        assert_close(factors(y)[""].B, kfac(lambda w, x: product(x, w), w, (x, y), fisher=fisher)[""].B, 1e-12)


def test_arguments_of_kfac_are_checked() -> None:
    x, y, w = jnp.ones((4, 3)), jnp.array([0, 1, 2, 0]), jnp.ones((3, 3))
    with pytest.raises(TypeError, match=r"the leaf \['f'\] of params has type function, expected arrays"):
        kfac(lambda p, x: product(x, p["w"]), {"w": w, "f": test_linear_layers_take_one_example}, (x, y))
    with pytest.raises(TypeError, match="expected a pair"):
        kfac(lambda w, x: product(x, w), w, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mc_samples is 2\.5"):
        kfac(lambda w, x: product(x, w), w, (x, y), fisher="mc", key=KEYS[0], mc_samples=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a pair for each dimension"):
        conv_general_dilated(jnp.ones((1, 1, 4)), jnp.ones((1, 1, 2)), (1,), [1])  # type: ignore[list-item]


SHARDED = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from lensor.integrations.jax import dot_general, kfac
jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
x, y, w = rng.standard_normal((4, 3)), np.array([0, 1, 2, 0]), rng.standard_normal((3, 3))
model = lambda w, x: dot_general(x, w, (((0,), (0,)), ((), ())))
mesh = Mesh(np.array(jax.devices()), ("d",))
for loss, targets in (("cross_entropy", y), ("mse", rng.standard_normal((4, 3)))):
    for fisher in ("type-2", "empirical"):
        factors = lambda w, x, y: kfac(model, w, (x, y), loss=loss, fisher=fisher)
        mean = lambda *a: jax.tree.map(lambda one: jax.lax.pmean(one, "d"), factors(*a))
        sharded = jax.shard_map(mean, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P())
        for one, two in zip(jax.jit(sharded)(w, x, targets)[""], factors(w, x, targets)[""]):
            np.testing.assert_allclose(one, two, rtol=1e-12)
"""


def test_factors_in_shard_map() -> None:
    subprocess.run([sys.executable, "-c", SHARDED], check=True, timeout=300)
