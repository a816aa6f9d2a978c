"""Diagonals, blocks, per-example gradients and the empirical NTK of whole models, exact for every layer's block."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lensor import ops
from lensor.curvature.capture import Capture, KeptInputs, Use, computing, own, run, running, unwrapped
from lensor.curvature.data import batches, one_tensor, over_positions, size_of
from lensor.curvature.factors import EigenFactors, KroneckerFactors
from lensor.curvature.graph import tensors_in
from lensor.curvature.kfac import output_axis, require_independent
from lensor.curvature.layers import Layer, layers_of
from lensor.curvature.layout import BatchAxis, Given
from lensor.curvature.losses import LossRoot, class_weights, require_counted, require_loss, require_tensor
from lensor.curvature.networks import network
from lensor.curvature.watching import Targets
from lensor.errors import require_choice
from lensor.network import AnyNetwork
from lensor.network.subscripts import format_legs
from lensor.ops.derivatives import weight_vjp
from lensor.spec import ConvSpec

FISHERS = ("type-2", "mc", "empirical")
_AT_ONCE = 8
"""Columns of a root that are propagated and then contracted together."""


class _Batch:
    """One batch after its forward pass: the layers' inputs, and what is propagated back to them."""

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        inputs: Any,
        given: Given,
        *,
        empty: bool = False,
        shared: bool = False,
    ) -> None:
        self.size = size_of(inputs, empty=empty)
        self.layout = Capture.layout_of(model, inputs, targets, self.size, given)
        self.capture = KeptInputs(targets, self.size, self.layout, given)
        self.shared = shared
        self.returned = run(model, inputs, self.capture)

    @property
    def outputs(self) -> Tensor:
        """The outputs as one tensor."""
        return one_tensor(self.returned)

    def check(self, roots: Any) -> None:
        """Raise unless all that the roots depend on is known; see `Capture.check`."""
        self.capture.check(roots, self.shared)

    def root(self, loss: nn.Module, targets: Any) -> LossRoot:
        """The root of the loss's Hessian with respect to the outputs."""
        self.check(self.returned)
        outputs = self.outputs
        with computing(outputs):
            axis = output_axis(self.layout, self.returned, outputs, self.size, independent=True)
            return LossRoot(loss, outputs, targets, self.size, axis)

    def loss(self, loss: Any, targets: Any) -> Tensor:
        """The loss of the outputs: of all that the model returned, or of one tensor for torch's own losses."""
        outputs = self.returned
        if _is_torchs(loss):
            outputs = self.outputs
            require_tensor(targets)
        with torch.enable_grad():
            value = loss(outputs, targets)
        if not isinstance(value, Tensor) or value.ndim:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise ValueError(f"the loss has {found}, expected a number: reduction 'mean' or 'sum'")
        if not value.requires_grad:
            raise ValueError("the loss does not depend on the model's layers: no gradient is recorded")
        self.check(value)
        self._require_apart(loss, value)
        return value

    def _require_apart(self, loss: Any, value: Tensor) -> None:
        """Raise unless every example's outputs are its own, and the loss is a sum over them.

        Raises:
            ValueError: for a model or a loss that mixes examples.
        """
        axes = self.layout.outputs if self.layout is not None else None
        found = [
            (tensor, axis)
            for tensor, axis in zip(tensors_in(self.returned), axes or (), strict=False)
            if axis is not None and tensor.requires_grad
        ]
        for _, axis in found:
            require_independent(axis)
        found = [(tensor, axis) for tensor, axis in found if axis.order is not None]
        if self.size < 2 or not found or _is_torchs(loss):
            return
        if _is_mixing(value, found, self.size):
            raise ValueError(
                "the loss is not a sum or mean over examples: its slope at the outputs of one depends on the outputs of"
                " others, so that no part of it belongs to an example"
            )

    def stacks(self, columns: Iterator[Tensor]) -> Iterator[dict[Use, Tensor]]:
        """Columns at the layers' outputs, [v, batch, channels, *positions], a few at a time."""
        while chunk := list(itertools.islice(columns, _AT_ONCE)):
            found = [self.capture.gradients(self.outputs, column, keep=True) for column in chunk]
            yield {use: torch.stack([one[use] for one in found]) for use in self.capture.uses}

    def weight_gradients(self, uses: Sequence[Use], vectors: Mapping[Use, Tensor]) -> Tensor:
        """A weight's gradient for every example, [batch, *its shape], summed over its uses."""
        return _sum(_gradients(use, self.capture.inputs[use], vectors[use]) for use in uses)

    def bias_gradients(self, uses: Sequence[Use], vectors: Mapping[Use, Tensor]) -> Tensor:
        """A bias's gradient for every example, [batch, channels], summed over its uses."""
        return _sum(over_positions(vectors[use]) for use in uses)

    def ordered(self, weights: dict[str, Tensor], biases: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values by the parameters' names, in the order of the layers."""
        both = weights | biases
        return {name: both[name] for name in self.capture.targets.parameters if name in both}


def _is_mixing(value: Tensor, outputs: Sequence[tuple[Tensor, BatchAxis]], batch: int) -> bool:
    """Whether the Hessian of a loss couples the outputs of different examples, seen by one random direction.

    False for a loss that torch cannot differentiate twice.
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
        curved = torch.autograd.grad(_sum(products), tensors, retain_graph=True, allow_unused=True)
    except RuntimeError:
        return False
    rows = [axis.first(one, batch) for (_, axis), one in zip(outputs, curved, strict=True) if one is not None]
    largest = max((float(one.abs().max()) for one in rows if one.numel()), default=0.0)
    return any(bool((one[1::2].abs() > 1e-5 * largest).any()) for one in rows)


def _is_torchs(loss: Any) -> bool:
    """Whether a loss is one of torch's own modules, which takes one tensor of outputs."""
    return isinstance(loss, nn.Module) and type(loss).__module__.startswith("torch.nn.")


def _sum(parts: Iterable[Tensor]) -> Tensor:
    first, *others = parts
    for one in others:
        first = first + one
    return first


def per_example_gradients(
    model: nn.Module,
    loss: Any,
    data: Any,
    *,
    layers: Iterable[str] | None = None,
    strict: bool = False,
    batch_axis: Given = None,
) -> dict[str, Tensor]:
    """The gradient of every example's part of the loss; over the examples they add up to the gradient of the loss.

    Args:
        model: the model, in evaluation mode or without layers that mix examples.
        loss: any callable of (outputs, targets) that is a sum or mean over examples. It is given all that the model
            returns; torch's own losses one tensor, such as `outputs.logits`.
        data: a pair (inputs, targets).
        layers: names of modules; all known layers unless given.
        strict: whether parametrised layers of other kinds are an error instead of a warning.
        batch_axis: where the examples lie in the layers' inputs, as for `kfac`; found by a trial pass unless given.

    Returns:
        For the name of each weight and bias an array [batch, *its shape].

    Example:
        >>> import torch
        >>> from lensor.curvature import per_example_gradients
        >>> model, data = torch.nn.Conv1d(2, 3, 3), (torch.randn(4, 2, 9), torch.randn(4, 3, 7))
        >>> {name: tuple(found.shape) for name, found in per_example_gradients(model, torch.nn.MSELoss(), data).items()}
        {'weight': (4, 3, 2, 3), 'bias': (4, 3)}

    Raises:
        TypeError: for a model or data of another kind.
        ValueError: for layers that are not known, tied, or do not run once, or a model that mixes examples.

    Equation:
        `n (g c_in) i, i o k, n (g c_out) o -> n (g c_out) c_in k`.
    """
    with _propagated(model, loss, data, layers, strict, batch_axis) as (batch, vectors):
        weights = {name: batch.weight_gradients(uses, vectors) for name, uses in batch.capture.by_parameter().items()}
        biases = {name: batch.bias_gradients(uses, vectors) for name, uses in batch.capture.by_parameter(True).items()}
        return batch.ordered(weights, biases)


def per_example_gradient_norms(
    model: nn.Module,
    loss: Any,
    data: Any,
    *,
    layers: Iterable[str] | None = None,
    strict: bool = False,
    batch_axis: Given = None,
) -> dict[str, Tensor]:
    """The Euclidean norm of every example's gradient, for each parameter; the gradients need not be there at once.

    Args:
        model: the model, in evaluation mode or without layers that mix examples.
        loss: any callable of (outputs, targets) that is a sum or mean over examples. It is given all that the model
            returns; torch's own losses one tensor, such as `outputs.logits`.
        data: a pair (inputs, targets).
        layers: names of modules; all known layers unless given.
        strict: without effect: trained parameters of other kinds of layers are an error unless `layers` is given.
        batch_axis: where the examples lie in the layers' inputs, as for `kfac`; found by a trial pass unless given.

    Returns:
        For the name of each weight and bias that is trained (with `layers`, of all in these) an array [batch]. The norm
        of the whole gradient is the root of the sum of squares over all of them.

    Example:
        >>> import torch
        >>> from lensor.curvature import per_example_gradient_norms
        >>> model, data = torch.nn.Conv1d(2, 3, 3), (torch.randn(4, 2, 9), torch.randn(4, 3, 7))
        >>> per_example_gradient_norms(model, torch.nn.MSELoss(), data)["weight"].shape
        torch.Size([4])

    Raises:
        TypeError: for a model or data of another kind.
        ValueError: for layers that are not known, tied, or do not run once, or a model that mixes examples.
    """
    with _propagated(model, loss, data, layers, strict, batch_axis, complete=True) as (batch, vectors):
        weights: dict[str, Tensor] = {}
        for name, uses in batch.capture.by_parameter().items():
            if len(uses) > 1:
                weights[name] = batch.weight_gradients(uses, vectors).flatten(1).norm(dim=1)
                continue
            (use,) = uses
            x = batch.capture.inputs[use]
            weights[name] = network(_squared_norms, use.spec(x))(X=x, V=vectors[use]).clamp_min(0).sqrt()
        biases = {
            name: batch.bias_gradients(uses, vectors).norm(dim=1)
            for name, uses in batch.capture.by_parameter(True).items()
        }
        found = batch.ordered(weights, biases)
        if layers is None:
            trained = batch.capture.targets.parameters
            found = {name: norm for name, norm in found.items() if trained[name].requires_grad}
        return found


def _gradients(use: Use, x: Tensor, v: Tensor) -> Tensor:
    """A weight's gradients for every example; a linear map is a convolution of another shape."""
    return network(ops.per_example_weight_vjp, use.spec(x))(X=x, V=v).reshape(len(x), *use.weight_shape)


def _squared_norms(spec: ConvSpec) -> AnyNetwork:
    """Σ over the weight of the squared per-example gradients: X, V -> [n]."""
    gradients = weight_vjp(spec).keep("n")
    share = [index for leg in gradients.output for index in leg]
    return gradients.merge(gradients, share=share, output=format_legs((("n",),)))


def ggn_diagonal(
    model: nn.Module,
    loss: nn.Module,
    data: Any,
    *,
    fisher: str = "type-2",
    layers: Iterable[str] | None = None,
    strict: bool = False,
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    batch_axis: Given = None,
) -> dict[str, Tensor]:
    """The diagonal of the generalised Gauss-Newton matrix of the loss over all of the data.

    Args:
        model: the model, in evaluation mode or without layers that mix examples.
        loss: as for `kfac`.
        data: a pair (inputs, targets), or an iterable of pairs.
        fisher: "type-2", "mc" or "empirical", as for `kfac`.
        layers: names of modules; all known layers unless given.
        strict: whether parametrised layers of other kinds are an error instead of a warning.
        mc_samples: draws for each example, for "mc".
        generator: where they are drawn from.
        batch_axis: where the examples lie in the layers' inputs, as for `kfac`; found by a trial pass unless given.

    Returns:
        For the name of each weight and bias an array of its shape.

    Example:
        >>> import torch
        >>> from lensor.curvature import ggn_diagonal
        >>> model, data = torch.nn.Linear(3, 2), (torch.ones(4, 3), torch.zeros(4, 2))
        >>> ggn_diagonal(model, torch.nn.MSELoss(reduction="sum"), data)
        {'weight': tensor([[8.0000, 8.0000, 8.0000],
                [8.0000, 8.0000, 8.0000]]), 'bias': tensor([8.0000, 8.0000])}

    Raises:
        TypeError: for a loss, model or data of another kind.
        ValueError: for choices and layers that are not known, tied, or do not run once, or a model that mixes examples.
    """

    def weights(batch: _Batch, uses: Sequence[Use], stacks: Mapping[Use, Tensor]) -> Tensor:
        if len(uses) == 1:
            (use,) = uses
            x = batch.capture.inputs[use]
            return network(ops.ggn_diagonal, use.spec(x))(X=x, S=stacks[use]).reshape(use.weight_shape)
        columns = range(len(stacks[uses[0]]))
        return _sum(
            batch.weight_gradients(uses, {use: stacks[use][at] for use in uses}).square().sum(0) for at in columns
        )

    return _of_roots(model, loss, data, fisher, layers, strict, mc_samples, generator, batch_axis, weights, shared=True)


def ggn_mini_blocks(
    model: nn.Module,
    loss: nn.Module,
    data: Any,
    *,
    block: str = "filter",
    fisher: str = "type-2",
    layers: Iterable[str] | None = None,
    strict: bool = False,
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    batch_axis: Given = None,
) -> dict[str, Tensor]:
    """Diagonal blocks of every weight's generalised Gauss-Newton matrix over all of the data.

    Args:
        model: the model, in evaluation mode or without layers that mix examples.
        loss: as for `kfac`.
        data: a pair (inputs, targets), or an iterable of pairs.
        block: "filter": one for each first channel of the weight, [channels, rest, rest]; "kernel": one for each pair
            of channels, [c, c', *kernel, *kernel]; "position": one for each group and position of the kernel,
            [groups, *kernel, c·c', c·c'].
        fisher: "type-2", "mc" or "empirical", as for `kfac`.
        layers: names of modules; all known layers unless given.
        strict: whether parametrised layers of other kinds are an error instead of a warning.
        mc_samples: draws for each example, for "mc".
        generator: where they are drawn from.
        batch_axis: where the examples lie in the layers' inputs, as for `kfac`; found by a trial pass unless given.

    Returns:
        For the name of each weight its blocks. A bias has one entry for each channel, its diagonal.

    Example:
        >>> import torch
        >>> from lensor.curvature import ggn_mini_blocks
        >>> model, data = torch.nn.Conv1d(2, 3, 3, bias=False), (torch.randn(4, 2, 9), torch.randn(4, 3, 7))
        >>> ggn_mini_blocks(model, torch.nn.MSELoss(), data)["weight"].shape
        torch.Size([3, 6, 6])

    Raises:
        TypeError: for a loss, model or data of another kind.
        ValueError: for choices and layers that are not known, tied, or do not run once, or a model that mixes examples.
    """
    require_choice("block", block, ("filter", "kernel", "position"))

    def weights(batch: _Batch, uses: Sequence[Use], stacks: Mapping[Use, Tensor]) -> Tensor:
        (use,) = uses
        x = batch.capture.inputs[use]
        found = network(ops.ggn_mini_block, use.spec(x), block)(X=x, S=stacks[use])
        # Without the axes of kernels of size 1: of a linear map with positions, and of frames.
        kernel = use.weight_shape[2:]
        front, rest = {
            "filter": (found.shape[:1], found.shape[1:]),
            "kernel": (found.shape[:2], (*kernel, *kernel)),
            "position": (found.shape[:1], (*kernel, *found.shape[-2:])),
        }[block]
        return found.reshape(*front, *rest)

    return _of_roots(model, loss, data, fisher, layers, strict, mc_samples, generator, batch_axis, weights)


def ekfac(
    model: nn.Module,
    loss: nn.Module,
    data: Any,
    factors: KroneckerFactors,
    *,
    fisher: str = "type-2",
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    batch_axis: Given = None,
) -> EigenFactors:
    """Kronecker factors with corrected eigenvalues: the diagonal of the GGN in the factors' own eigenbasis.

    Args:
        model: the model, in evaluation mode or without layers that mix examples.
        loss: as for `kfac`.
        data: a pair (inputs, targets), or an iterable of pairs.
        factors: of `kfac` for this model.
        fisher: "type-2", "mc" or "empirical", as for `kfac`.
        mc_samples: draws for each example, for "mc".
        generator: where they are drawn from.
        batch_axis: where the examples lie in the layers' inputs, as for `kfac`; found by a trial pass unless given.

    Returns:
        An operator like the factors, with the same eigenvectors.

    Example:
        >>> import torch
        >>> from lensor.curvature import ekfac, kfac
        >>> model, data = torch.nn.Conv1d(2, 3, 3), (torch.randn(4, 2, 9), torch.randn(4, 3, 7))
        >>> factors = kfac(model, torch.nn.MSELoss(), data)
        >>> corrected = ekfac(model, torch.nn.MSELoss(), data, factors)
        >>> corrected.inverse(damping=0.1).size
        21

    Raises:
        TypeError: for a loss, model or data of another kind.
        ValueError: for choices that are not known, layers that do not run once, or a model that mixes examples.

    Equation:
        Λ = Σ_n,v (Q_Bᵀ G Q_A)² with G the gradient of an example's column as rows and columns (George et al., 2018).
    """
    modules = [name.rpartition(".")[0] for name in factors if name.rpartition(".")[2] == "weight"]
    model = unwrapped(model)
    chosen = layers_of(model, modules)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, shape in factors.shapes.items():
        if shapes.get(name) != shape:
            found = shapes.get(name, "no such parameter")
            raise ValueError(f"the factors have a block for {name!r} of shape {shape}, the model has {found}")
    _refuse_mixing(model)
    _check_roots(loss, fisher, mc_samples)
    total = 0.0
    watched = Targets(chosen)
    with running(model):
        eigen = factors.eigh()
        values = {name: torch.zeros_like(part[2]) for name, part in eigen.parts.items()}
        for inputs, targets in batches(data):
            batch = _Batch(model, watched, own(inputs), batch_axis)
            root = batch.root(loss, own(targets))
            total += root.normaliser
            for stacks in batch.stacks(root.of(fisher, mc_samples, generator)):
                with computing(root.f):
                    for use, s in itertools.product(batch.capture.uses, range(len(next(iter(stacks.values()))))):
                        gradients = {use.weight: batch.weight_gradients([use], {use: stacks[use][s]})}
                        if use.bias is not None:
                            gradients[use.bias] = over_positions(stacks[use][s])
                        for name in (one for one in gradients if one in factors):
                            q_a, q_b, _ = eigen.parts[name]
                            turned = q_b.mT @ factors[name].to_rows(gradients) @ q_a
                            values[name] += turned.square().sum(0) * root.normaliser
    share = require_counted(total) if loss.reduction == "mean" else 1.0
    parts = {name: (q_a, q_b, values[name] / share) for name, (q_a, q_b, _) in eigen.parts.items()}
    return EigenFactors(dict(factors), parts)


def empirical_ntk(
    model: nn.Module,
    inputs: Any,
    *,
    layers: Iterable[str] | None = None,
    strict: bool = False,
    batch_axis: Given = None,
) -> Tensor:
    """The empirical neural tangent kernel of a model's outputs, over the parameters that are trained.

    Args:
        model: the model, in evaluation mode or without layers that mix examples; outputs [batch, c].
        inputs: a batch: a tensor, a tuple of arguments or a mapping.
        layers: names of modules; all known layers unless given.
        strict: whether parametrised layers of other kinds are an error instead of a warning.
        batch_axis: where the examples lie in the layers' inputs, as for `kfac`; found by a trial pass unless given.

    Returns:
        [batch, batch, c, c]: J J', with rows of the first example and output, columns of the second.

    Example:
        >>> import torch
        >>> from lensor.curvature import empirical_ntk
        >>> empirical_ntk(torch.nn.Linear(3, 1, bias=False), torch.eye(3)[:2])[:, :, 0, 0]
        tensor([[1., 0.],
                [0., 1.]])

    Raises:
        TypeError: for a model of another kind.
        ValueError: for layers that are not known, tied, or do not run once, or a model that mixes examples.
    """
    model = unwrapped(model)
    targets = Targets(_trained(layers_of(model, layers, strict, shared=True, trainable=True), layers))
    _refuse_mixing(model)
    with running(model):
        batch = _Batch(model, targets, own(inputs), batch_axis, empty=True, shared=True)
        batch.check(batch.returned)
        outputs = batch.outputs
        f = outputs.detach()
        if f.ndim != 2 or len(f) != batch.size:
            raise ValueError(f"the model's outputs have shape {tuple(f.shape)}, expected [batch, c]")
        output_axis(batch.layout, batch.returned, outputs, batch.size, independent=True)
        n, c = f.shape
        units = [torch.zeros_like(f) for _ in range(c)]
        for place, unit in enumerate(units):
            unit[:, place] = 1
        stacked = [batch.capture.gradients(outputs, unit, keep=True) for unit in units]
        with computing(f):
            found = torch.zeros((c * n, c * n), dtype=torch.promote_types(f.dtype, torch.float32), device=f.device)
            for name, uses in batch.capture.by_parameter().items():
                if layers is None and not targets.parameters[name].requires_grad:
                    continue
                s = {use: torch.stack([one[use] for one in stacked]) for use in uses}
                if len(uses) == 1:
                    (use,) = uses
                    found += network(ops.ggn_gram, batch.capture.spec(use))(X=batch.capture.inputs[use], S=s[use])
                    continue
                rows = [batch.weight_gradients(uses, {use: s[use][at] for use in uses}).flatten(1) for at in range(c)]
                found += torch.cat(rows) @ torch.cat(rows).mT
            for uses in batch.capture.by_parameter(True).values():
                flat = _sum(torch.cat([over_positions(one[use]) for one in stacked]) for use in uses)
                found += flat @ flat.mT
        return found.reshape(c, n, c, n).permute(1, 3, 0, 2)


def _trained(found: list[Layer], asked: Iterable[str] | None) -> list[Layer]:
    """The layers with a trained parameter, without biases that are not trained; all layers that were asked for."""
    if asked is not None:
        return found
    biases = [layer.module.bias for layer in found]
    trained = [
        layer if isinstance(bias, Tensor) and bias.requires_grad else replace(layer, bias=None)
        for layer, bias in zip(found, biases, strict=True)
        if any(p.requires_grad for p in layer.module.parameters(recurse=False))
    ]
    if not trained:
        raise ValueError(
            "no parameter of the model's layers requires a gradient: name the layers that count with layers="
        )
    return trained


def hessian_diagonal(
    model: nn.Module,
    loss: nn.Module,
    data: Any,
    *,
    samples: int | None = None,
    layers: Iterable[str] | None = None,
    strict: bool = False,
    generator: torch.Generator | None = None,
    batch_axis: Given = None,
) -> dict[str, Tensor]:
    """The diagonal of the Hessian of the loss by each layer's parameters, exact or estimated.

    A layer is linear in its parameters, so their Hessian is Jᵀ H J with H that of the loss by the layer's output.
    Exact: one product with H for each entry of an output of one example; with `samples`: Hutchinson's estimate at the
    layers' outputs, unbiased, one product with H for each draw and layer.

    Args:
        model: the model, in evaluation mode or without layers that mix examples.
        loss: any loss of (outputs, targets) that can be differentiated twice; for several batches one whose `reduction`
            is "mean", "batchmean" or "sum".
        data: a pair (inputs, targets), or an iterable of pairs; the loss of all is that of each, averaged over examples
            for a mean.
        samples: number of draws; exact unless given.
        layers: names of modules; all known layers unless given.
        strict: whether parametrised layers of other kinds are an error instead of a warning.
        generator: where signs are drawn from.
        batch_axis: where the examples lie in the layers' inputs, as for `kfac`; found by a trial pass unless given.

    Returns:
        For the name of each weight and bias an array of its shape.

    Example:
        >>> import torch
        >>> from lensor.curvature import hessian_diagonal
        >>> model, data = torch.nn.Linear(3, 2, bias=False), (torch.ones(4, 3), torch.zeros(4, 2))
        >>> hessian_diagonal(model, torch.nn.MSELoss(reduction="sum"), data)
        {'weight': tensor([[8., 8., 8.],
                [8., 8., 8.]])}

    Raises:
        TypeError: for a model or data of another kind.
        ValueError: for layers that are not known, tied, or do not run once, a model that mixes examples, or several
            batches for a loss without reduction.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples is {samples}, expected at least 1")
    model = unwrapped(model)
    watched = Targets(layers_of(model, layers, strict))
    _refuse_mixing(model)
    found: dict[str, Tensor] = {}
    total, seen = 0.0, 0
    mean = getattr(loss, "reduction", "mean") in _MEANS
    with running(model):
        for inputs, targets in batches(data):
            seen += 1
            if seen > 1 and not (_is_torchs(loss) and getattr(loss, "reduction", None) in (*_MEANS, "sum")):
                raise ValueError(
                    "several batches need a loss whose reduction is 'mean', 'batchmean' or 'sum', one of torch's own:"
                    " how another one averages is not known"
                )
            inputs, targets = own(inputs), own(targets)
            batch = _Batch(model, watched, inputs, batch_axis)
            share = _share(loss, batch, targets)
            if not share:  # no target counts, and the batch's own loss is 0/0
                continue
            total += share
            value = batch.loss(loss, targets)
            gradients = batch.capture.gradients(value, torch.ones_like(value), keep=True, again=True)
            for use in batch.capture.uses:
                gradient, x = gradients[use], batch.capture.inputs[use]
                for z in _directions(gradient, samples, generator):
                    curved = torch.zeros_like(z)
                    if (
                        gradient.requires_grad
                    ):  # a loss that is linear in the outputs has no Hessian after the last layer
                        curved = batch.capture.gradients(gradient, z, keep=True, only=use)[use]
                    with computing(z):
                        _add(found, _quadratic(use, x, z, curved), share / (samples or 1))
    divisor = require_counted(total) if mean else 1.0
    return {name: value / divisor for name, value in found.items()}


def _quadratic(use: Use, x: Tensor, z: Tensor, curved: Tensor) -> dict[str, Tensor]:
    """Σ over examples of (Jᵀ z) ⊙ (Jᵀ H z), by parameter."""
    found = {use.weight: (_gradients(use, x, z) * _gradients(use, x, curved)).sum(0)}
    if use.bias is not None:
        sides = [over_positions(v) for v in (z, curved)]
        found[use.bias] = (sides[0] * sides[1]).sum(0)
    return found


def _add(found: dict[str, Tensor], parts: dict[str, Tensor], share: float) -> None:
    for name, part in parts.items():
        found[name] = part * share if name not in found else found[name].add_(part, alpha=share)


def _directions(like: Tensor, samples: int | None, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Unit vectors of one example, in all examples at once; or random signs."""
    if samples is not None:
        for _ in range(samples):
            signs = torch.randint(2, like.shape, generator=generator, device=like.device)
            yield (2 * signs - 1).to(like.dtype)
        return
    for place in range(like.shape[1:].numel()):
        unit = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        unit.view(len(unit), -1)[:, place] = 1
        yield unit


_MEANS = ("mean", "batchmean")
"""Reductions that divide by what a batch counts."""


def _share(loss: Any, batch: _Batch, targets: Any) -> float:
    """What a batch counts in the mean over all of the data; 1 for a sum."""
    reduction = getattr(loss, "reduction", "mean")
    if reduction not in _MEANS:
        return 1.0
    if reduction == "batchmean" or not _is_torchs(loss):
        return float(batch.size)
    if type(loss) is nn.NLLLoss:
        counted = targets != loss.ignore_index
        known = targets.where(counted, torch.zeros_like(targets))
        return float((counted if loss.weight is None else loss.weight[known] * counted).sum())
    if type(loss) is nn.CrossEntropyLoss:
        return class_weights(loss, batch.outputs.detach(), targets)[1]
    try:
        require_loss(loss)
    except TypeError:  # torch's other losses have the mean of what they give without a reduction
        single = copy.copy(loss)
        single.reduction = "none"
        with torch.no_grad():
            return float(single(batch.outputs.detach(), targets).numel())
    return LossRoot(loss, batch.outputs, targets, 1).normaliser


@contextmanager
def _propagated(
    model: nn.Module,
    loss: Any,
    data: Any,
    layers: Iterable[str] | None,
    strict: bool,
    given: Given,
    complete: bool = False,
) -> Iterator[tuple[_Batch, dict[Use, Tensor]]]:
    """One batch and the gradients at the outputs of its layers; the block computes with them.

    Args:
        model: the model.
        loss: any callable of outputs and targets.
        data: one pair.
        layers: names of modules.
        strict: whether parametrised layers of other kinds are an error.
        given: where the examples lie.
        complete: whether every parameter that is trained has to be there, unless `layers` is given.
    """
    model = unwrapped(model)
    watched = Targets(layers_of(model, layers, strict, shared=True, trainable=complete))
    _refuse_mixing(model)
    _refuse_hooks(watched)
    pairs = list(itertools.islice(batches(data), 2))
    if len(pairs) > 1:
        raise ValueError("data holds several batches, expected one pair (inputs, targets)")
    ((inputs, targets),) = pairs
    with running(model):
        batch = _Batch(model, watched, own(inputs), given, empty=True, shared=True)
        value = batch.loss(loss, own(targets))
        gradients = batch.capture.gradients(value, torch.ones_like(value), keep=False)
        with computing(value):
            yield batch, gradients


def _of_roots(
    model: nn.Module,
    loss: nn.Module,
    data: Any,
    fisher: str,
    layers: Iterable[str] | None,
    strict: bool,
    mc_samples: int,
    generator: torch.Generator | None,
    given: Given,
    weights: Callable[[_Batch, Sequence[Use], Mapping[Use, Tensor]], Tensor],
    shared: bool = False,
) -> dict[str, Tensor]:
    """What is a sum over columns of the root and over examples, over all of the data; of biases the diagonal."""
    _check_roots(loss, fisher, mc_samples)
    model = unwrapped(model)
    watched = Targets(layers_of(model, layers, strict, shared=shared))
    _refuse_mixing(model)
    found: dict[str, Tensor] = {}
    total = 0.0
    with running(model):
        for inputs, targets in batches(data):
            batch = _Batch(model, watched, own(inputs), given, shared=shared)
            root = batch.root(loss, own(targets))
            share = root.normaliser
            total += share
            for stacks in batch.stacks(root.of(fisher, mc_samples, generator)):
                with computing(root.f):
                    parts = {name: weights(batch, uses, stacks) for name, uses in batch.capture.by_parameter().items()}
                    for name, uses in batch.capture.by_parameter(True).items():
                        parts[name] = _sum(over_positions(stacks[use], 3) for use in uses).square().sum((0, 1))
                    _add(found, parts, share)
    divisor = require_counted(total) if loss.reduction == "mean" else 1.0
    return {name: found[name] / divisor for name in watched.parameters if name in found}


def _check_roots(loss: nn.Module, fisher: str, mc_samples: int) -> None:
    require_loss(loss)
    require_choice("fisher", fisher, FISHERS)
    if mc_samples < 1:
        raise ValueError(f"mc_samples is {mc_samples}, expected at least 1")


def _refuse_hooks(targets: Targets) -> None:
    """Hooks of the user's on parameters change their gradients in a way that is defined for the sum alone."""
    for name, parameter in targets.parameters.items():
        if any(not type(hook).__module__.startswith("lensor.") for hook in (parameter._backward_hooks or {}).values()):
            raise ValueError(
                f"parameter {name!r} has a hook, which changes its gradient and is not defined for those of single"
                " examples: remove it, or leave the layer out with layers="
            )


def _refuse_mixing(model: nn.Module) -> None:
    """Normalisation by statistics of the batch leaves no part of the loss to an example."""
    mixing = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    ]
    if mixing:
        raise ValueError(f"examples are mixed by the statistics of {', '.join(mixing)}: call model.eval() first")
