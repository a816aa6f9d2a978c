"""One batch after its forward pass, and the checks for quantities that are sums over examples."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lensor import ops
from lensor.choices import Fisher, words
from lensor.curvature.batch_axes import BatchAxes, BatchAxis, Given
from lensor.curvature.capture import Capture, KeptInputs, Use, computing, run
from lensor.curvature.collector import output_axis, require_independent
from lensor.curvature.complete import CompleteCapture
from lensor.curvature.data import batches, known_containers, one_tensor, size_of
from lensor.curvature.example_gradients import sum_of
from lensor.curvature.graph import tensors_in
from lensor.curvature.layers import all_parameters, refuse_mixing
from lensor.curvature.losses import LossRoot, class_weights, require_tensor
from lensor.curvature.registry import reduction_of, registered, require_loss, root_of
from lensor.curvature.watching import Targets
from lensor.errors import require_choice
from lensor.network import AnyNetwork
from lensor.network.subscripts import format_legs
from lensor.spec import ConvSpec

_AT_ONCE = 8
"""Number of columns of a root that are propagated and then contracted together."""


class Batch:
    """One batch after its forward pass: holds the layers' inputs and propagates vectors back to the layers' outputs.

    Args:
        model: the model.
        targets: the parameters.
        inputs: the inputs of the model.
        given: the batch_axis that the user specified.
        empty: whether the batch may be empty.
        shared: whether layers may run more than once.
        whole: as for `CompleteCapture`.
        size: the number of examples, found from the inputs unless given.
        only_trainable: whether the frozen ones of these parameters are not needed; see `names`.
        is_checked: whether the model and the loss were checked with a batch of the same shapes.
        axes: the batch axes of this batch.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        inputs: Any,
        given: Given,
        *,
        empty: bool = False,
        shared: bool = False,
        whole: bool = True,
        size: int | None = None,
        only_trainable: bool = False,
        is_checked: bool = False,
        axes: BatchAxes | None = None,
    ) -> None:
        inputs = known_containers(inputs)
        self.size = size_of(inputs, empty=empty) if size is None else size
        self.targets: Any = None
        self.names = [name for name, one in targets.parameters.items() if one.requires_grad or not only_trainable]
        """The parameters that are needed."""
        self._is_checked = is_checked
        self.batch_axes = axes if is_checked else Capture.batch_axes_of(model, inputs, targets, self.size, given)
        self.capture = (
            CompleteCapture(targets, inputs, self.size, self.batch_axes, given, whole=whole)
            if targets.complete
            else KeptInputs(targets, self.size, self.batch_axes, given)
        )
        self.shared = shared
        self.returned = run(model, inputs, self.capture)

    @property
    def outputs(self) -> Tensor:
        """The model's only output tensor; see `one_tensor`."""
        return one_tensor(self.returned)

    def check(self, roots: Any) -> None:
        """Raise unless every use of the parameters in the graph of the roots was captured; see `Capture.check`."""
        self.capture.check(roots, self.shared)

    def root(self, loss: Any, targets: Any) -> LossRoot:
        """The square root of the loss Hessian with respect to the outputs."""
        self.check(self.returned)
        outputs = self.outputs
        with computing(outputs):
            axis = output_axis(self.batch_axes, self.returned, outputs, self.size, independent=True)
            return root_of(loss, outputs, targets, self.size, axis)

    def loss(self, loss: Any, targets: Any) -> Tensor:
        """The loss of what the model returned; torch's own and registered losses take the one tensor in it."""
        outputs, self.targets = self.returned, targets
        if is_torchs(loss) or registered(loss) is not None:
            outputs = self.outputs
        if is_torchs(loss):
            require_tensor(targets)
        with torch.enable_grad():
            value = loss(outputs, targets)
        if not isinstance(value, Tensor) or value.ndim:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise ValueError(f"the loss has {found}, expected a number: reduction 'mean' or 'sum'")
        if not value.requires_grad:
            raise ValueError("the loss does not depend on the model's layers: no gradient is recorded")
        self.check(value)
        if not self._is_checked:
            self._require_apart(loss, value)
        return value

    def _require_apart(self, loss: Any, value: Tensor) -> None:
        """Raise unless the loss is a sum over examples and each example's outputs depend on that example only.

        Raises:
            ValueError: if the model or the loss mixes examples.
        """
        axes = self.batch_axes.outputs if self.batch_axes is not None else None
        outputs = [one for one in tensors_in(self.returned) if one.requires_grad]
        if axes and all(axis is None for axis in axes) and any(one.ndim for one in outputs):
            raise ValueError(
                f"the model's outputs have shapes {[tuple(one.shape) for one in outputs]}, none of which depends on the"
                f" number of examples, expected outputs for each of {self.size} examples: the first axis of the inputs"
                " must be that of the examples"
            )
        found = [
            (tensor, axis)
            for tensor, axis in zip(tensors_in(self.returned), axes or (), strict=False)
            if axis is not None and tensor.requires_grad
        ]
        for _, axis in found:
            require_independent(axis)
        found = [(tensor, axis) for tensor, axis in found if axis.order is not None]
        if self.size < 2 or not found or is_torchs(loss):
            return
        if _is_mixing(value, found, self.size):
            raise ValueError(
                "the loss mixes examples, expected a sum or mean over examples: its gradient at the outputs of one"
                " example depends on the outputs of others"
            )

    def propagated(self, columns: Iterator[Tensor]) -> Iterator[list[dict[Any, Any]]]:
        """Propagate columns to the outputs of all uses; yield a few at a time."""
        while chunk := list(itertools.islice(columns, _AT_ONCE)):
            yield [self.capture.gradients(self.outputs, column, keep=True) for column in chunk]

    def only_use(self, name: str, others: Mapping[str, Any]) -> Use | None:
        """The only use of a weight, if it has one and no function other than a layer's uses it."""
        uses = self.capture.by_parameter().get(name, [])
        return uses[0] if len(uses) == 1 and name not in others else None

    def of_functions(self, vectors: Mapping[Any, Any]) -> dict[str, Tensor]:
        """The gradients of every example that come from functions other than layers'; see `CompleteCapture`."""
        return self.capture.of_functions(vectors) if isinstance(self.capture, CompleteCapture) else {}

    def gradients(
        self, vectors: Mapping[Any, Any], others: Mapping[str, Tensor], without: Container[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the gradient of every example for each parameter; see `CompleteCapture.of_examples`."""
        assert isinstance(self.capture, CompleteCapture)
        return self.capture.of_examples(vectors, others, without)


def _is_mixing(value: Tensor, outputs: Sequence[tuple[Tensor, BatchAxis]], batch: int) -> bool:
    """Whether the loss Hessian couples the outputs of different examples, tested along one random direction.

    Returns False for a loss that torch cannot differentiate twice.
    """
    tensors = [tensor for tensor, _ in outputs]
    generator = torch.Generator().manual_seed(0)
    try:
        slopes = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
        products = []
        for (tensor, axis), slope in zip(outputs, slopes, strict=True):
            if slope is not None and slope.requires_grad:
                direction = torch.randn(tensor.shape, generator=generator).to(tensor)
                axis.first(direction, batch)[1::2] = 0
                products.append((slope * direction).sum())
        if not products:
            return False
        curved = torch.autograd.grad(sum_of(products), tensors, retain_graph=True, allow_unused=True)
    except RuntimeError:
        return False
    rows = [axis.first(one, batch) for (_, axis), one in zip(outputs, curved, strict=True) if one is not None]
    largest = max((float(one.abs().max()) for one in rows if one.numel()), default=0.0)
    return any(bool((one[1::2].abs() > 1e-5 * largest).any()) for one in rows)


def is_torchs(loss: Any) -> bool:
    """Whether the loss is one of torch's own modules, which take one output tensor."""
    return isinstance(loss, nn.Module) and type(loss).__module__.startswith("torch.nn.")


def add_parts(found: dict[str, Tensor], parts: dict[str, Tensor], share: float) -> None:
    """Add `share` times each part to the tensor with the same name."""
    for name, part in parts.items():
        found[name] = part * share if name not in found else found[name].add_(part, alpha=share)


MEANS = ("mean", "batchmean")
"""Reductions that divide the sum of a batch's losses by a count."""


def share_of(loss: Any, batch: Batch, targets: Any) -> float:
    """The weight of a batch in the mean over all data; 1 for a sum."""
    reduction = reduction_of(loss) or "mean"
    if reduction not in MEANS:
        return 1.0
    if registered(loss) is not None:
        return root_of(loss, batch.outputs, targets, 1).normaliser
    if reduction == "batchmean" or not is_torchs(loss):
        return float(batch.size)
    if type(loss) is nn.NLLLoss:
        counted = targets != loss.ignore_index
        known = targets.where(counted, torch.zeros_like(targets))
        return float((counted if loss.weight is None else loss.weight[known] * counted).sum())
    if type(loss) is nn.CrossEntropyLoss:
        return class_weights(loss, batch.outputs.detach(), targets)[1]
    try:
        require_loss(loss)
    except TypeError:  # torch's other losses average the entries that they return for reduction="none"
        single = copy.copy(loss)
        single.reduction = "none"
        with torch.no_grad():
            return float(single(batch.outputs.detach(), targets).numel())
    return LossRoot(loss, batch.outputs, targets, 1).normaliser


def watched_for_examples(model: nn.Module, layers: Iterable[str] | None, frozen: bool) -> Targets:
    """The parameters whose gradients of single examples are wanted; the arguments are those of `all_parameters`.

    Raises:
        ValueError: if the model mixes examples, or if a parameter has a hook.
    """
    watched = Targets(*all_parameters(model, layers, frozen))
    refuse_mixing(model)
    _refuse_hooks(watched)
    return watched


def only_pair(data: Any) -> tuple[Any, Any]:
    """The inputs and targets of the only batch; ValueError if there are more."""
    pairs = list(itertools.islice(batches(data), 2))
    if len(pairs) > 1:
        raise ValueError("data has several batches, expected one pair (inputs, targets)")
    return pairs[0]


def check_roots(loss: Any, fisher: Fisher, mc_samples: int) -> None:
    """Raise unless the loss Hessian has a square root for these choices."""
    require_choice("fisher", fisher, words(Fisher))
    require_loss(loss, fisher)
    if mc_samples < 1:
        raise ValueError(f"mc_samples is {mc_samples}, expected at least 1")


def _refuse_hooks(targets: Targets) -> None:
    """Raise if a parameter has a hook: the effect of hooks is defined only for the summed gradient."""
    for name, parameter in targets.parameters.items():
        if any(not type(hook).__module__.startswith("lensor.") for hook in (parameter._backward_hooks or {}).values()):
            raise ValueError(
                f"parameter {name!r} has a hook, expected none: the hook's effect on the gradients of single examples"
                " is not defined; remove it, or leave the layer out with layers="
            )


def squared_norms(spec: ConvSpec) -> AnyNetwork:
    """Σ over the weight of the squared per-example gradients: X, V -> [n]."""
    gradients = ops.conv_weight_vjp(spec).keep("n")
    share = [index for leg in gradients.output for index in leg]
    return gradients.merge(gradients, share=share, output=format_legs((("n",),)))
