"""Gradients of single examples, and their norms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lensor.arguments import described
from lensor.curvature.batch import Batch
from lensor.curvature.batch_axes import Given
from lensor.curvature.capture import computing
from lensor.curvature.compiled import Compile, on_batch
from lensor.curvature.described import SHARED
from lensor.curvature.streaming import Streamed


@described(SHARED)
def per_example_gradients(
    model: nn.Module,
    loss: Any,
    data: Any,
    *,
    layers: Iterable[str] | None = None,
    strict: bool = False,
    batch_axis: Given = None,
    compile: Compile = False,
) -> dict[str, Tensor]:
    """The gradients of every example's part of the loss; summed over examples, they equal the gradient of the loss.

    Use `per_example_gradient_norms` if you need only the norms.

    Args:
        loss: any callable of (outputs, targets) that is a sum or mean over examples. It receives everything that the
            model returns; torch's own losses receive one tensor, such as `outputs.logits`.
        data: a pair (inputs, targets).
        layers: names of modules whose own parameters are wanted; all trainable parameters, and the frozen ones of
            convolutions and linear layers, unless given.
        strict: has no effect, since all parameters are supported.

    Returns:
        A mapping from the name of each parameter to a tensor [batch, *parameter_shape].

    Example:
        >>> import torch
        >>> from lensor.curvature import per_example_gradients
        >>> model, data = torch.nn.Conv1d(2, 3, 3), (torch.randn(4, 2, 9), torch.randn(4, 3, 7))
        >>> {name: tuple(found.shape) for name, found in per_example_gradients(model, torch.nn.MSELoss(), data).items()}
        {'weight': (4, 3, 2, 3), 'bias': (4, 3)}

    Raises:
        TypeError: for a model or data of an unsupported type.
        ValueError: for an unknown layer, a layer that does not run, or a model that mixes examples.

    Equation:
        `n (g c_in) i, i o k, n (g c_out) o -> n (g c_out) c_in k`.
    """
    return on_batch(_gradients, model, loss, data, layers, batch_axis, compile=compile)


def _gradients(batch: Batch, value: Tensor, _: Any) -> dict[str, Tensor]:
    vectors = batch.capture.gradients(value, torch.ones_like(value), keep=False)
    with computing(value):
        return dict(batch.gradients(vectors, batch.of_functions(vectors)))


@described(SHARED)
def per_example_gradient_norms(
    model: nn.Module,
    loss: Any,
    data: Any,
    *,
    layers: Iterable[str] | None = None,
    strict: bool = False,
    batch_axis: Given = None,
    compile: Compile = False,
) -> dict[str, Tensor]:
    """The Euclidean norm of every example's gradient, for each parameter.

    This needs less memory than `per_example_gradients`: the gradients for convolutions and linear layers are not
    formed, and those for other functions do not have to be kept.

    Args:
        loss: any callable of (outputs, targets) that is a sum or mean over examples. It receives everything that the
            model returns; torch's own losses receive one tensor, such as `outputs.logits`.
        data: a pair (inputs, targets).
        strict: has no effect, since all parameters are supported.

    Returns:
        A mapping from the name of each trainable parameter (or of all in `layers`) to a tensor [batch]. The norm of
        the whole gradient is the square root of the sum of squares over all parameters.

    Example:
        >>> import torch
        >>> from lensor.curvature import per_example_gradient_norms
        >>> model, data = torch.nn.Conv1d(2, 3, 3), (torch.randn(4, 2, 9), torch.randn(4, 3, 7))
        >>> per_example_gradient_norms(model, torch.nn.MSELoss(), data)["weight"].shape
        torch.Size([4])

    Raises:
        TypeError: for a model or data of an unsupported type.
        ValueError: for an unknown layer, a layer that does not run, or a model that mixes examples.
    """
    return on_batch(_norms, model, loss, data, layers, batch_axis, frozen=False, compile=compile)


def _norms(batch: Batch, value: Tensor, _: Any) -> dict[str, Tensor]:
    streamed = Streamed(batch, value, is_weighted=False)
    return {name: square.sqrt() for name, square in streamed.squares().items()}
