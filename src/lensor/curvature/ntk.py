"""The empirical neural tangent kernel."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lensor import ops
from lensor.arguments import described
from lensor.curvature.batch import Batch, refuse_mixing
from lensor.curvature.batch_axes import Given
from lensor.curvature.capture import computing, own, running, unwrapped
from lensor.curvature.collector import output_axis
from lensor.curvature.described import SHARED
from lensor.curvature.example_gradients import rows_of
from lensor.curvature.layers import all_parameters
from lensor.curvature.networks import network
from lensor.curvature.watching import Targets


@described(SHARED)
def empirical_ntk(
    model: nn.Module,
    inputs: Any,
    *,
    layers: Iterable[str] | None = None,
    strict: bool = False,
    batch_axis: Given = None,
) -> Tensor:
    """The empirical neural tangent kernel of a model's outputs with respect to the trainable parameters.

    Args:
        model: the model, in evaluation mode or without layers that mix examples; outputs [batch, c].
        inputs: a batch: a tensor, a tuple of arguments or a mapping.
        strict: has no effect, since all parameters are supported.

    Returns:
        [batch, batch, c, c]: J Jᵀ; the first example and the first output form its row, the second ones its column.

    Example:
        >>> import torch
        >>> from lensor.curvature import empirical_ntk
        >>> empirical_ntk(torch.nn.Linear(3, 1, bias=False), torch.eye(3)[:2])[:, :, 0, 0]
        tensor([[1., 0.],
                [0., 1.]])

    Raises:
        TypeError: for a model of an unsupported type, or inputs that the model does not take.
        ValueError: for an unknown layer, a layer that does not run, or a model that mixes examples.
    """
    with output_units(model, inputs, layers, batch_axis) as (batch, wanted, stacked):
        n, c = batch.outputs.shape
        dtype = torch.promote_types(batch.outputs.dtype, torch.float32)
        found = torch.zeros((c * n, c * n), dtype=dtype, device=batch.outputs.device)
        others = [batch.of_functions(one) for one in stacked]
        skipped = set(batch.capture.targets.parameters) - wanted
        for name in wanted:
            use = batch.only_use(name, others[0])
            if use is not None:
                s = torch.stack([one[use] for one in stacked])
                found += network(ops.ggn_gram, batch.capture.spec(use))(X=batch.capture.inputs[use], S=s)
                skipped.add(name)
        columns = [batch.gradients(one, other, skipped) for one, other in zip(stacked, others, strict=True)]
        for parts in zip(*columns, strict=True):
            rows = torch.cat([rows_of(gradient) for _, gradient in parts]).to(found.dtype)
            found += rows @ rows.mT
        return found.reshape(c, n, c, n).permute(1, 3, 0, 2)


def jacobians(
    model: nn.Module, inputs: Any, layers: Iterable[str] | None = None, batch_axis: Given = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The Jacobians of every example's outputs, [batch, c, *shape] by parameter, and the outputs [batch, c].

    The arguments and errors are those of `empirical_ntk`.
    """
    with output_units(model, inputs, layers, batch_axis) as (batch, wanted, stacked):
        skipped = set(batch.capture.targets.parameters) - wanted
        columns = [dict(batch.gradients(one, batch.of_functions(one), skipped)) for one in stacked]
        found = {name: torch.stack([one[name] for one in columns], 1) for name in columns[0]}
        return found, batch.outputs.detach()


@contextmanager
def output_units(
    model: nn.Module, inputs: Any, layers: Iterable[str] | None, given: Given
) -> Iterator[tuple[Batch, set[str], list[dict[Any, Any]]]]:
    """Run a model with outputs [batch, c] and propagate one unit vector for each of the c outputs.

    Yields the batch, the names of the wanted parameters, and what was propagated, by use of the parameters. Nothing is
    recorded within the `with` block.
    """
    model = unwrapped(model)
    targets = Targets(*all_parameters(model, layers, frozen=False))
    wanted = {name for name, one in targets.parameters.items() if layers is not None or one.requires_grad}
    refuse_mixing(model)
    with running(model):
        try:
            batch = Batch(model, targets, own(inputs), given, empty=True, shared=True)
        except TypeError as error:
            if isinstance(inputs, (tuple, list)) and not _takes(model, inputs):
                raise TypeError(
                    f"inputs is a {type(inputs).__name__} of {len(inputs)} entries, expected the arguments of the"
                    f" model's forward pass, without targets: {error}"
                ) from error
            raise
        batch.check(batch.returned)
        outputs = batch.outputs
        f = outputs.detach()
        if f.ndim != 2 or len(f) != batch.size:
            raise ValueError(f"the model's outputs have shape {tuple(f.shape)}, expected [batch, c]")
        output_axis(batch.batch_axes, batch.returned, outputs, batch.size, independent=True)
        units = [torch.zeros_like(f) for _ in range(f.shape[1])]
        for place, unit in enumerate(units):
            unit[:, place] = 1
        stacked = [batch.capture.gradients(outputs, unit, keep=True) for unit in units]
        with computing(f):
            yield batch, wanted, stacked


def _takes(model: nn.Module, arguments: Sequence[Any]) -> bool:
    """Whether the model's forward pass takes this number of positional arguments."""
    try:
        inspect.signature(model.forward).bind(*arguments)
    except TypeError:
        return False
    return True
