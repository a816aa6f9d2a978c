"""Layers of Equinox that are computed by Lensor."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from lensor.integrations import jax as lensor_jax


class Conv(eqx.nn.Conv):
    """`equinox.nn.Conv` computed by Lensor, for any number of dimensions; the arguments are the same.

    Use it for derivatives planned by Lensor, and for factors by `lensor.integrations.jax.kfac`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lensor.integrations.equinox import Conv
        >>> layer = Conv(2, 3, 8, kernel_size=3, key=jax.random.key(0))
        >>> layer(jnp.ones((3, 8, 8))).shape
        (8, 6, 6)
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)

    def __call__(self, x: Any, *, key: Any = None) -> Any:
        """The output [out_channels, *output_size] for one input [in_channels, *input_size]; the key is ignored."""
        if x.ndim != self.num_spatial_dims + 1:
            raise ValueError(
                f"the input has shape {x.shape}, expected {self.num_spatial_dims + 1} axes: map the layer over examples"
                " with jax.vmap"
            )
        padding: Any = self.padding
        if self.padding_mode != "ZEROS":
            x, padding = self._nonzero_pad(x), "VALID"
        found = lensor_jax.conv_general_dilated(
            x[None], self.weight, self.stride, padding, None, self.dilation, feature_group_count=self.groups
        )[0]
        return found if self.bias is None else found + self.bias


class Linear(eqx.nn.Linear):
    """`equinox.nn.Linear`, with factors by `lensor.integrations.jax.kfac`; the arguments are the same.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lensor.integrations.equinox import Linear
        >>> Linear(3, 4, key=jax.random.key(0))(jnp.ones(3)).shape
        (4,)
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)

    def __call__(self, x: Any, *, key: Any = None) -> Any:
        """The output [out_features] for one input [in_features]; the key is ignored."""
        expected = () if self.in_features == "scalar" else (self.in_features,)
        if x.shape != expected:
            raise ValueError(f"the input has shape {x.shape}, expected {expected}: map the layer over examples")
        found = jnp.reshape(self.weight @ jnp.reshape(x, -1), -1)
        found = lensor_jax.linear(self.weight, jnp.reshape(x, -1), found)
        found = found if self.bias is None else found + self.bias
        return found.reshape(()) if self.out_features == "scalar" else found
