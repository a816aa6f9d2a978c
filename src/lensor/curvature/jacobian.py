"""Jacobians of the outputs of single examples with respect to the parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lensor.arguments import described
from lensor.curvature.batch import Batch
from lensor.curvature.batch_axes import Given
from lensor.curvature.capture import computing, own, running, unwrapped
from lensor.curvature.collector import output_axis
from lensor.curvature.described import SHARED
from lensor.curvature.layers import all_parameters, refuse_mixing
from lensor.curvature.watching import Targets


@described(SHARED)
def jacobians(
    model: nn.Module,
    inputs: Any,
    *,
    layers: Iterable[str] | None = None,
    batch_axis: Given = None,
) -> dict[str, Tensor]:
    """The Jacobians of every example's outputs with respect to the trainable parameters.

    This takes one backward pass for each output. Use `empirical_ntk` if you need only products of Jacobians.

    Args:
        model: the model, in evaluation mode or without layers that mix examples; outputs [batch, c].
        inputs: a batch: a tensor, a tuple of arguments or a mapping.
        layers: names of modules whose own parameters are wanted; all trainable parameters unless given.

    Returns:
        A mapping from the name of each parameter to a tensor [batch, c, *parameter_shape].

    Example:
        >>> import torch
        >>> from lensor.curvature import jacobians
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(21, 5))
        >>> {name: tuple(found.shape) for name, found in jacobians(model, torch.randn(4, 2, 9)).items()}
        {'0.weight': (4, 5, 3, 2, 3), '0.bias': (4, 5, 3), '2.weight': (4, 5, 5, 21), '2.bias': (4, 5, 5)}

    Raises:
        TypeError: for a model of an unsupported type, or inputs that the model does not take.
        ValueError: for an unknown layer, a layer that does not run, or a model that mixes examples.
    """
    return jacobians_and_outputs(model, inputs, layers, batch_axis)[0]


def jacobians_and_outputs(
    model: nn.Module, inputs: Any, layers: Iterable[str] | None = None, batch_axis: Given = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The result of `jacobians`, and the outputs [batch, c]."""
    model = unwrapped(model)
    watched = Watched(model, layers, batch_axis)
    with running(model):
        passed = watched.run(own(inputs))
        units = passed.units(range(passed.outputs.shape[1]))
        with computing(passed.outputs):
            columns = [dict(passed.batch.gradients(*one, watched.skipped)) for one in units]
            found = {name: torch.stack([one[name] for one in columns], 1) for name in columns[0]} if columns else {}
            if not columns:
                shapes = {name: watched.targets.parameters[name].shape for name in watched.wanted}
                found = {name: passed.outputs.new_zeros(passed.batch.size, 0, *one) for name, one in shapes.items()}
            return found, passed.outputs.detach()


class Watched:
    """A model and its trainable parameters.

    Args:
        model: the model.
        layers: names of modules whose own parameters are wanted, also frozen ones; all trainable parameters unless
            given.
        given: the batch_axis that the user specified.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str] | None, given: Given) -> None:
        self.model, self.given = model, given
        self.targets = Targets(*all_parameters(model, layers, frozen=False))
        self.wanted = [name for name, one in self.targets.parameters.items() if layers is not None or one.requires_grad]
        self.skipped = set(self.targets.parameters) - set(self.wanted)
        refuse_mixing(model)

    def run(self, inputs: Any, size: int | None = None, whole: bool = True) -> Passed:
        """Run the model with outputs [batch, c].

        Args:
            inputs: the inputs.
            size: the number of examples, if it is known.
            whole: as for `CompleteCapture`.
        """
        try:
            batch = Batch(self.model, self.targets, inputs, self.given, empty=True, shared=True, size=size, whole=whole)
        except TypeError as error:
            if isinstance(inputs, (tuple, list)) and not _takes(self.model, inputs):
                raise TypeError(
                    f"inputs is a {type(inputs).__name__} of {len(inputs)} entries, expected the arguments of the"
                    f" model's forward pass, without targets: {error}"
                ) from error
            raise
        batch.check(batch.returned)
        outputs = batch.outputs
        if outputs.ndim != 2 or len(outputs) != batch.size:
            raise ValueError(f"the model's outputs have shape {tuple(outputs.shape)}, expected [batch, c]")
        output_axis(batch.batch_axes, batch.returned, outputs, batch.size, independent=True)
        return Passed(batch)


class Passed:
    """A batch with outputs [batch, c] after its forward pass."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    @cached_property
    def outputs(self) -> Tensor:
        """The outputs [batch, c]."""
        return self.batch.outputs

    def units(self, places: Sequence[int]) -> list[tuple[dict[Any, Any], dict[str, Tensor]]]:
        """Propagate one unit vector for each of some outputs.

        Returns:
            For each output, the gradients at the outputs of the uses of parameters, and the gradients of every example
            that come from functions other than layers'.
        """
        found = []
        for place in places:
            unit = torch.zeros_like(self.outputs.detach())
            unit[:, place] = 1
            found.append(self.batch.capture.gradients(self.outputs, unit, keep=True))
        with computing(self.outputs):
            return [(one, self.batch.of_functions(one)) for one in found]


def _takes(model: nn.Module, arguments: Sequence[Any]) -> bool:
    """Whether the model's forward pass takes this number of positional arguments."""
    try:
        inspect.signature(model.forward).bind(*arguments)
    except TypeError:
        return False
    return True
