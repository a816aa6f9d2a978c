"""Layers of `flax.nnx` that are computed by Lensor."""

from __future__ import annotations

from typing import Any

from flax import nnx

from lensor.integrations import jax as lensor_jax


class Conv(nnx.Conv):
    """`flax.nnx.Conv` computed by Lensor, for any number of dimensions, with the same arguments.

    Use it for derivatives planned by Lensor, and for factors by `lensor.integrations.jax.kfac`. Calls raise ValueError
    for an `input_dilation`, `precision` or `preferred_element_type` other than the default.

    Args:
        arguments: the arguments of `flax.nnx.Conv`.
        options: its keyword arguments, except `conv_general_dilated`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from lensor.integrations.flax import Conv
        >>> layer = Conv(3, 8, (3, 3), padding="VALID", rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 8, 8, 3))).shape
        (2, 6, 6, 8)
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, conv_general_dilated=lensor_jax.conv_general_dilated, **options)


class Linear(nnx.Linear):
    """`flax.nnx.Linear`, with factors by `lensor.integrations.jax.kfac`; the arguments are the same.

    Args:
        arguments: the arguments of `flax.nnx.Linear`.
        options: its keyword arguments, except `dot_general`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from lensor.integrations.flax import Linear
        >>> Linear(3, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 3))).shape
        (2, 4)
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, dot_general=lensor_jax.dot_general, **options)
