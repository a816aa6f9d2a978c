"""Diagonals and mini-blocks of the generalised Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lensor import ops
from lensor.arguments import described
from lensor.choices import Fisher
from lensor.curvature.batch import Batch, add_parts, check_roots
from lensor.curvature.batch_axes import Given
from lensor.curvature.capture import Use, computing, own, running, unwrapped
from lensor.curvature.data import batches, over_positions
from lensor.curvature.described import SHARED
from lensor.curvature.layers import all_parameters, layers_of, refuse_mixing
from lensor.curvature.losses import require_counted
from lensor.curvature.networks import network
from lensor.curvature.registry import reduction_of
from lensor.curvature.watching import Targets
from lensor.errors import require_choice


@described(SHARED)
def ggn_diagonal(
    model: nn.Module,
    loss: Any,
    data: Any,
    *,
    fisher: Fisher = "type-2",
    layers: Iterable[str] | None = None,
    strict: bool = False,
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    batch_axis: Given = None,
) -> dict[str, Tensor]:
    """The diagonal of the generalised Gauss-Newton matrix of the loss over all data.

    Use this when the diagonal entries suffice; use `ggn_mini_blocks` for one block per filter, kernel or position.

    Args:
        layers: names of modules whose own parameters are wanted; all trainable parameters, and the frozen ones of
            convolutions and linear layers, unless given.
        strict: has no effect, since all parameters are supported.

    Returns:
        A mapping from the name of each parameter to a tensor of its shape.

    Example:
        >>> import torch
        >>> from lensor.curvature import ggn_diagonal
        >>> model, data = torch.nn.Linear(3, 2), (torch.ones(4, 3), torch.zeros(4, 2))
        >>> ggn_diagonal(model, torch.nn.MSELoss(reduction="sum"), data)
        {'weight': tensor([[8.0000, 8.0000, 8.0000],
                [8.0000, 8.0000, 8.0000]]), 'bias': tensor([8.0000, 8.0000])}

    Raises:
        TypeError: for a loss, model or data of an unsupported type.
        ValueError: for an unknown choice, an unknown layer, a layer that does not run, or a model that mixes examples.
    """

    def parts(batch: Batch, columns: Sequence[Mapping[Any, Any]]) -> dict[str, Tensor]:
        others = [batch.of_functions(one) for one in columns]
        found: dict[str, Tensor] = {}
        for name in batch.capture.targets.parameters:
            use = batch.only_use(name, others[0])
            if use is not None:
                x = batch.capture.inputs[use]
                s = torch.stack([one[use] for one in columns])
                found[name] = network(ops.ggn_diagonal, use.spec(x))(X=x, S=s).reshape(use.weight_shape)
        rest: dict[str, Tensor] = {}
        for one, other in zip(columns, others, strict=True):
            add_parts(rest, {name: g.square().sum(0) for name, g in batch.gradients(one, other, without=found)}, 1.0)
        return found | rest

    check_roots(loss, fisher, mc_samples)
    targets = Targets(*all_parameters(unwrapped(model), layers))
    return _of_roots(model, targets, loss, data, fisher, mc_samples, generator, batch_axis, parts, shared=True)


@described(SHARED)
def ggn_mini_blocks(
    model: nn.Module,
    loss: Any,
    data: Any,
    *,
    block: str = "filter",
    fisher: Fisher = "type-2",
    layers: Iterable[str] | None = None,
    strict: bool = False,
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    batch_axis: Given = None,
) -> dict[str, Tensor]:
    """Diagonal blocks of the generalised Gauss-Newton matrix of every weight, over all data.

    Args:
        block: "filter": one block per first channel of the weight, [channels, rest, rest]; "kernel": one per pair of
            channels, [c, c', *kernel, *kernel]; "position": one per group and kernel position,
            [groups, *kernel, c·c', c·c'].

    Returns:
        A mapping from parameter names to blocks for weights, and to the diagonal (one entry per channel) for biases.

    Example:
        >>> import torch
        >>> from lensor.curvature import ggn_mini_blocks
        >>> model, data = torch.nn.Conv1d(2, 3, 3, bias=False), (torch.randn(4, 2, 9), torch.randn(4, 3, 7))
        >>> ggn_mini_blocks(model, torch.nn.MSELoss(), data)["weight"].shape
        torch.Size([3, 6, 6])

    Raises:
        TypeError: for a loss, model or data of an unsupported type.
        ValueError: for an unknown choice, an unknown or tied layer, a layer that does not run exactly once, or a model
            that mixes examples.
    """
    require_choice("block", block, ("filter", "kernel", "position"))

    def of_weight(use: Use, x: Tensor, s: Tensor) -> Tensor:
        found = network(ops.ggn_mini_blocks, use.spec(x), block)(X=x, S=s)
        # Omit the kernel axes of size 1 of linear maps with positions and of layers with frames.
        kernel = use.weight_shape[2:]
        front, rest = {
            "filter": (found.shape[:1], found.shape[1:]),
            "kernel": (found.shape[:2], (*kernel, *kernel)),
            "position": (found.shape[:1], (*kernel, *found.shape[-2:])),
        }[block]
        return found.reshape(*front, *rest)

    def parts(batch: Batch, columns: Sequence[Mapping[Any, Any]]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for use in batch.capture.uses:
            s = torch.stack([one[use] for one in columns])
            found[use.weight] = of_weight(use, batch.capture.inputs[use], s)
            if use.bias is not None:
                found[use.bias] = over_positions(s, 3).square().sum((0, 1))
        return found

    check_roots(loss, fisher, mc_samples)
    targets = Targets(layers_of(unwrapped(model), layers, strict))
    return _of_roots(model, targets, loss, data, fisher, mc_samples, generator, batch_axis, parts)


def _of_roots(
    model: nn.Module,
    watched: Targets,
    loss: Any,
    data: Any,
    fisher: Fisher,
    mc_samples: int,
    generator: torch.Generator | None,
    given: Given,
    parts: Callable[[Batch, Sequence[Mapping[Any, Any]]], dict[str, Tensor]],
    shared: bool = False,
) -> dict[str, Tensor]:
    """The sums over all batches of what `parts` computes for some propagated columns, by parameter."""
    model = unwrapped(model)
    refuse_mixing(model)
    found: dict[str, Tensor] = {}
    total = 0.0
    with running(model):
        for inputs, targets in batches(data):
            batch = Batch(model, watched, own(inputs), given, shared=shared)
            root = batch.root(loss, own(targets))
            share = root.normaliser
            total += share
            for columns in batch.propagated(root.of(fisher, mc_samples, generator)):
                with computing(root.f):
                    add_parts(found, parts(batch, columns), share)
    divisor = require_counted(total) if reduction_of(loss) == "mean" else 1.0
    return {name: found[name] / divisor for name in watched.parameters if name in found}
