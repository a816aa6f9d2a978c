"""Gradients and gradient norms of single examples for Opacus, computed by Lensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

import lensor.nn as layers
from lensor import ops
from lensor.curvature.batch import squared_norms
from lensor.curvature.capture import computing
from lensor.curvature.data import over_positions
from lensor.curvature.networks import network
from lensor.curvature.streaming import preferred
from lensor.curvature.watching import widened
from lensor.nn.calls import LayerCall
from lensor.nn.layers import output_padding_of
from lensor.spec import ConvSpec

try:
    from opacus.grad_sample import grad_sample_module as _hooks  # type: ignore[import-not-found]
    from opacus.grad_sample import grad_sample_module_fast_gradient_clipping as _ghost  # type: ignore[import-not-found]
except ImportError as error:
    raise ImportError(f"lensor.integrations.opacus requires Opacus 1.6 (pip install opacus): {error}") from error

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    layers.Conv1d,
    layers.Conv2d,
    layers.Conv3d,
    layers.ConvNd,
    layers.ConvTranspose1d,
    layers.ConvTranspose2d,
    layers.ConvTranspose3d,
    layers.ConvTransposeNd,
)
"""The layers for which `register` replaces Opacus' functions. Opacus looks up the exact type of a layer."""


def grad_samples(layer: Any, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """The gradients of every example for one call of a convolution: a grad sampler of Opacus.

    Use `register`, unless you register functions for classes of layers that you have derived yourself.

    Args:
        layer: a convolution or transposed convolution with any hyper-parameters.
        activations: its input [batch, c_in, *input_size], in a list.
        backprops: the gradients at its output, [batch, c_out, *output_size].

    Returns:
        A mapping from the trainable parameters to [batch, *parameter_shape], in the dtype of the parameter.

    Example:
        >>> import torch
        >>> from lensor.integrations.opacus import grad_samples
        >>> layer, x = torch.nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), torch.randn(4, 2, 8)
        >>> {tuple(found.shape) for found in grad_samples(layer, [x], torch.randn(4, 3, 8)).values()} == {
        ...     (4, 3, 2, 3), (4, 3)}
        True

    Raises:
        TypeError: for complex numbers.
        ValueError: for an input or gradients without an axis for the examples, or with different numbers of examples.
    """
    found = {}
    with computing(backprops):
        spec, x, v = _operands(layer, activations, backprops)
        if layer.weight.requires_grad:
            weight = (
                network(ops.conv_weight_vjp_per_example, spec)(X=x, V=v)
                if len(x)
                else x.new_zeros((0, *layer.weight.shape))
            )
            found[layer.weight] = weight.reshape(len(x), *layer.weight.shape).to(layer.weight.dtype)
        if layer.bias is not None and layer.bias.requires_grad:
            found[layer.bias] = over_positions(v).to(layer.bias.dtype)
    return found


def norm_samples(layer: Any, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """The norms of every example's gradients for one call of a convolution: a norm sampler of Opacus.

    The planner chooses for each layer whether the gradients are formed, or only products between positions (the choice
    of Bu et al., 2022).

    Args:
        layer: as for `grad_samples`, and so are the other arguments.
        activations: the input, in a list.
        backprops: the gradients at the output.

    Returns:
        A mapping from the trainable parameters to [batch].

    Example:
        >>> import torch
        >>> from lensor.integrations.opacus import norm_samples
        >>> layer, x = torch.nn.ConvTranspose2d(2, 3, 3, stride=2, bias=False), torch.randn(4, 2, 5, 5)
        >>> norm_samples(layer, [x], torch.randn(4, 3, 11, 11))[layer.weight].shape
        torch.Size([4])

    Raises:
        TypeError: as for `grad_samples`.
        ValueError: as for `grad_samples`.

    Equation:
        ‖g_n‖² = Σ_θ g_nθ², with g_nθ = `n (g c_in) i, i o k, n (g c_out) o -> n θ`, θ = `(g c_out) c_in k`.
    """
    found = {}
    with computing(backprops):
        spec, x, v = _operands(layer, activations, backprops)
        if layer.weight.requires_grad:
            with preferred(x, v):
                squares = network(squared_norms, spec)(X=x, V=v) if len(x) else x.new_zeros(0)
            found[layer.weight] = squares.clamp_min(0).sqrt()
        if layer.bias is not None and layer.bias.requires_grad:
            found[layer.bias] = over_positions(v).norm(dim=1)
    return found


def _operands(layer: Any, activations: Sequence[Tensor], v: Tensor) -> tuple[ConvSpec, Tensor, Tensor]:
    """The convolution for one example, its input and the gradients at its output, in the same dtype."""
    x, ndim = activations[0], len(layer.kernel_size) + 2
    name = type(layer).__name__
    if x.ndim != ndim or v.ndim != ndim or len(x) != len(v):
        raise ValueError(
            f"the input of {name} has shape {tuple(x.shape)} and its gradients {tuple(v.shape)}, expected {ndim} axes,"
            " of which the first is that of the examples, with the same number of examples"
        )
    if x.is_complex() or v.is_complex() or layer.weight.is_complex():
        raise TypeError(f"{name} computes with {layer.weight.dtype}, expected real numbers")
    kind = "conv_transpose" if layer.transposed else "conv"
    extra = output_padding_of(layer, x, v.shape[2:]) if layer.transposed else layer.output_padding
    # Pairs in `padding` are hyper-parameters of Lensor's own layers.
    call = LayerCall(
        kind,
        x,
        layer.weight,
        layer.bias,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.padding_mode,
        extra,
    )
    x, v = widened(x), widened(v)
    dtype = torch.promote_types(x.dtype, v.dtype)
    return call.spec(tuple(x.shape[2:])), x.to(dtype), v.to(dtype)


class Registration:
    """The functions that one call of `register` has replaced. As a context manager, it restores them at the end.

    Args:
        tables: the tables of Opacus, each with the new function.
    """

    def __init__(self, tables: Sequence[tuple[dict[type[nn.Module], Any], Callable[..., Any]]]) -> None:
        # New objects, so that the functions of two registrations can be told apart.
        own = [(table, partial(function)) for table, function in tables]
        self._replaced = [(table, layer, function, table.get(layer)) for table, function in own for layer in LAYERS]
        for table, layer, function, _ in self._replaced:
            table[layer] = function
        _active.append(self)

    def remove(self) -> None:
        """Restore the functions that were replaced, except where they have been replaced again since."""
        if self not in _active:
            return
        _active.remove(self)
        for table, layer, function, before in self._replaced:
            if table.get(layer) is not function:
                for later in _active:
                    later._forget(table, layer, function, before)
            elif before is None:
                del table[layer]
            else:
                table[layer] = before

    def _forget(self, table: dict[type[nn.Module], Any], layer: type[nn.Module], function: Any, before: Any) -> None:
        """Replace a function of a registration that was removed by the one that it had replaced."""
        self._replaced = [
            (*one[:3], before) if one[0] is table and one[1] is layer and one[3] is function else one
            for one in self._replaced
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


_active: list[Registration] = []
"""The registrations that were not removed."""


def register(*, norms: bool = True) -> Registration:
    """Let Opacus compute the gradients of single examples, and their norms, for convolutions by Lensor.

    It applies to all models of the process that use `grad_sample_mode="hooks"` or `"ghost"`: one- to three-dimensional
    convolutions and transposed convolutions of torch, and Lensor's own layers, with all hyper-parameters. Opacus itself
    ignores the padding mode, forms the gradients of convolutions before it computes their norms, and uses
    `torch.func.vmap` for transposed convolutions. Call it before you wrap the model, and remove it after training.

    Use `lensor.curvature.clipped_gradients` instead if you do not need the accounting of Opacus.

    Args:
        norms: whether norms are registered for `"ghost"`. Opacus raises an error for tied weights of layers with such a
            function; without one, it forms the gradients, by `grad_samples`.

    Returns:
        A `Registration`: call `remove()`, or use it in a `with` statement, to restore Opacus' own functions.

    Example:
        >>> import torch
        >>> from opacus import GradSampleModule
        >>> from lensor.integrations import opacus as lensor_opacus
        >>> layer = torch.nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")
        >>> with lensor_opacus.register():
        ...     model = GradSampleModule(layer)
        ...     model(torch.randn(4, 2, 6, 6)).square().mean().backward()
        >>> layer.weight.grad_sample.shape
        torch.Size([4, 3, 2, 3, 3])
    """
    hooks, ghost = _hooks.GradSampleHooks, _ghost.GradSampleHooksFastGradientClipping
    samplers = {id(one): one for one in (hooks.GRAD_SAMPLERS, ghost.GRAD_SAMPLERS)}  # one table in Opacus 1.6
    tables: list[tuple[dict[type[nn.Module], Any], Callable[..., Any]]] = [
        (table, grad_samples) for table in samplers.values()
    ]
    if norms:
        tables.append((ghost.NORM_SAMPLERS, norm_samples))
    return Registration(tables)
