"""Natural-gradient steps in JAX: a small CNN on the digits of scikit-learn, with Kronecker factors by Lensor.

    python -m examples.natural_gradient_jax [--library equinox] [--steps 40]

Each step draws a batch, computes the gradient and the factors A and B of each weight, and moves the weight by
(B + √δ)⁻¹ G (A + √δ)⁻¹. Biases move along their gradients. Gradient descent with the same batches is shown beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

from lensor.integrations.jax import Factors, kfac


class Model(NamedTuple):
    """A model: its function for one example, its parameters, and how weights are laid out.

    Args:
        apply: `apply(params, x)` computes the logits of one image [8, 8].
        params: the parameters.
        to_matrix: maps a weight to [c_out, d] with the order of axes of its factors.
    """

    apply: Callable[[Any, Any], Any]
    params: Any
    to_matrix: Callable[[Any], Any]


def equinox_model(seed: int = 0) -> Model:
    """The CNN with layers for Equinox: kernels are [c_out, c_in, k1, k2]."""
    import equinox as eqx

    from lensor.integrations.equinox import Conv, Linear

    keys = jax.random.split(jax.random.key(seed), 3)
    layers = [
        Conv(2, 1, 8, 3, stride=2, padding=1, key=keys[0]),
        Conv(2, 8, 16, 3, stride=2, padding=1, key=keys[1]),
        Linear(64, 10, key=keys[2]),
    ]
    params, static = eqx.partition(layers, eqx.is_array)

    def apply(params: Any, x: Any) -> Any:
        first, second, last = eqx.combine(params, static)
        return last(jnp.tanh(second(jnp.tanh(first(x[None])))).reshape(-1))

    return Model(apply, params, lambda weight: weight.reshape(len(weight), -1))


def flax_model(seed: int = 0) -> Model:
    """The CNN with layers for flax: kernels are [k1, k2, c_in, c_out]."""
    from flax import nnx

    from lensor.integrations.flax import Conv, Linear

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = Conv(1, 8, (3, 3), strides=2, padding=1, rngs=rngs)
            self.second = Conv(8, 16, (3, 3), strides=2, padding=1, rngs=rngs)
            self.last = Linear(64, 10, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.last(jnp.tanh(self.second(jnp.tanh(self.first(x[..., None])))).reshape(-1))

    definition, params = nnx.split(Net(nnx.Rngs(seed)))

    def to_matrix(weight: Any) -> Any:
        return jnp.moveaxis(weight, (-1, -2), (0, 1)).reshape(weight.shape[-1], -1)

    return Model(lambda params, x: nnx.merge(definition, params)(x), params, to_matrix)


def mean_loss(model: Model, params: Any, images: Any, labels: Any) -> Any:
    """The mean cross entropy."""
    logits = jax.vmap(model.apply, (None, 0))(params, images)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def preconditioned(model: Model, gradient: Any, factors: dict[str, Factors], damping: float) -> Any:
    """The gradient of each weight times the inverses of its damped factors; the other gradients are unchanged."""

    def one(path: Any, leaf: Any) -> Any:
        found = factors.get(jax.tree_util.keystr(path))
        if found is None:
            return leaf
        matrix, undo = jax.vjp(model.to_matrix, leaf)  # its transpose maps a matrix back to the weight's layout
        a, b = found.A[0], found.B[0]
        share = damping**0.5
        solved = jnp.linalg.solve(b + share * jnp.eye(len(b), dtype=b.dtype), matrix)
        solved = jnp.linalg.solve(a + share * jnp.eye(len(a), dtype=a.dtype), solved.T).T
        return undo(solved)[0]

    return jax.tree_util.tree_map_with_path(one, gradient)


def train(
    model: Model, steps: int, natural: bool, rate: float, damping: float = 1e-2, batch: int = 128, seed: int = 0
) -> list[float]:
    """Train, and return the loss of all training data after each step."""
    digits: Any = load_digits()
    dtype = jax.tree.leaves(model.params)[0].dtype
    images, labels = jnp.asarray(digits.images / 16.0, dtype), jnp.asarray(digits.target)

    @jax.jit
    def step(params: Any, images: Any, labels: Any) -> Any:
        gradient = jax.grad(lambda params: mean_loss(model, params, images, labels))(params)
        if natural:
            gradient = preconditioned(model, gradient, kfac(model.apply, params, (images, labels)), damping)
        return jax.tree.map(lambda old, change: old - rate * change, params, gradient)

    evaluate = jax.jit(lambda params: mean_loss(model, params, images, labels))
    params, losses = model.params, []
    for key in jax.random.split(jax.random.key(seed), steps):
        chosen = jax.random.choice(key, len(labels), (batch,), replace=False)
        params = step(params, images[chosen], labels[chosen])
        losses.append(float(evaluate(params)))
    return losses


MODELS = {"equinox": equinox_model, "flax": flax_model}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m examples.natural_gradient_jax", description=__doc__)
    parser.add_argument("--library", choices=tuple(MODELS), default="equinox", help="default: equinox")
    parser.add_argument("--steps", type=int, default=40, help="default: 40")
    options = parser.parse_args(arguments)
    model = MODELS[options.library]()
    print(f"{ravel_pytree(model.params)[0].size:,} parameters, layers for {options.library}")
    plain, natural = (train(model, options.steps, *one) for one in ((False, 0.3), (True, 0.3)))
    print("step  gradient descent  natural gradient")
    for at in range(0, options.steps, max(options.steps // 8, 1)):
        print(f"{at + 1:4}  {plain[at]:16.4f}  {natural[at]:16.4f}")
    print(f"{options.steps:4}  {plain[-1]:16.4f}  {natural[-1]:16.4f}")


if __name__ == "__main__":
    main()
