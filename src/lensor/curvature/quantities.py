"""Diagonals, blocks, per-example gradients and the empirical NTK of whole models, exact for every layer's block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lensor import ops
from lensor.curvature.capture import (
    Capture,
    Layer,
    batches,
    call,
    layers_of,
    over_positions,
    size_of,
    undisturbed,
)
from lensor.curvature.factors import EigenFactors, KroneckerFactors
from lensor.curvature.losses import LossRoot, require_counted, require_loss
from lensor.curvature.networks import network
from lensor.errors import require_choice
from lensor.network import AnyNetwork
from lensor.notation import format_legs
from lensor.ops.derivatives import weight_vjp
from lensor.spec import ConvSpec

FISHERS = ("type-2", "mc", "empirical")
_AT_ONCE = 8
"""Columns of a root that are propagated and then contracted together."""


class _Batch:
    """One batch after its forward pass: the layers' inputs, and what is propagated back to them."""

    def __init__(self, model: nn.Module, layers: list[Layer], inputs: Any) -> None:
        self.layers, self.inputs = layers, {}
        self.capture = Capture(layers, self._keep, size_of(inputs))
        with undisturbed(model), self.capture.attached(), torch.enable_grad():
            self.outputs = call(model, inputs)
        self.capture.check()

    def _keep(self, layer: Layer, x: Tensor) -> None:
        self.inputs[layer.weight] = x.clone()  # what comes next may write into it

    def stacks(self, columns: Iterator[Tensor]) -> Iterator[dict[str, Tensor]]:
        """Columns at the layers' outputs, [v, batch, channels, *positions], a few at a time."""
        while chunk := list(itertools.islice(columns, _AT_ONCE)):
            found = [self.capture.gradients(self.outputs, column, keep=True) for column in chunk]
            yield {layer.weight: torch.stack([one[layer.weight] for one in found]) for layer in self.layers}

    def spec(self, layer: Layer) -> ConvSpec:
        return layer.spec(self.inputs[layer.weight])


def per_example_gradients(
    model: nn.Module, loss: nn.Module, data: Any, *, layers: Iterable[str] | None = None, strict: bool = False
) -> dict[str, Tensor]:
    """The gradient of every example's part of the loss; over the examples they add up to the gradient of the loss.

    Args:
        model: the model, in evaluation mode or without layers that mix examples.
        loss: any loss of (outputs, targets) that is a sum or mean over examples.
        data: a pair (inputs, targets).
        layers: names of modules; all known layers unless given.
        strict: whether parametrised layers of other kinds are an error instead of a warning.

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
    found: dict[str, Tensor] = {}
    for layer, x, v in _propagated(model, loss, data, layers, strict):
        found[layer.weight] = _gradients(layer, x, v)
        if layer.bias is not None:
            found[layer.bias] = over_positions(v)
    return found


def per_example_gradient_norms(
    model: nn.Module, loss: nn.Module, data: Any, *, layers: Iterable[str] | None = None, strict: bool = False
) -> dict[str, Tensor]:
    """The Euclidean norm of every example's gradient, for each parameter; the gradients need not be there at once.

    Args:
        model: the model, in evaluation mode or without layers that mix examples.
        loss: any loss of (outputs, targets) that is a sum or mean over examples.
        data: a pair (inputs, targets).
        layers: names of modules; all known layers unless given.
        strict: whether parametrised layers of other kinds are an error instead of a warning.

    Returns:
        For the name of each weight and bias an array [batch]; over all of them the root of the sum of squares counts.

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
    found: dict[str, Tensor] = {}
    for layer, x, v in _propagated(model, loss, data, layers, strict):
        found[layer.weight] = network(_squared_norms, layer.spec(x))(X=x, V=v).clamp_min(0).sqrt()
        if layer.bias is not None:
            found[layer.bias] = over_positions(v).norm(dim=1)
    return found


def _gradients(layer: Layer, x: Tensor, v: Tensor) -> Tensor:
    """A weight's gradients for every example; a linear layer is a convolution of another shape."""
    return network(ops.per_example_weight_vjp, layer.spec(x))(X=x, V=v).reshape(len(x), *layer.weight_shape)


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

    def weights(layer: Layer, spec: ConvSpec, x: Tensor, s: Tensor) -> Tensor:
        return network(ops.ggn_diagonal, spec)(X=x, S=s).reshape(layer.weight_shape)

    return _of_roots(model, loss, data, fisher, layers, strict, mc_samples, generator, weights)


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

    def weights(layer: Layer, spec: ConvSpec, x: Tensor, s: Tensor) -> Tensor:
        return network(ops.ggn_mini_block, spec, block)(X=x, S=s)

    return _of_roots(model, loss, data, fisher, layers, strict, mc_samples, generator, weights)


def ekfac(
    model: nn.Module,
    loss: nn.Module,
    data: Any,
    factors: KroneckerFactors,
    *,
    fisher: str = "type-2",
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
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
    chosen = layers_of(model, modules)
    _refuse_mixing(model)
    _check_roots(loss, fisher, mc_samples)
    eigen = factors.eigh()
    values = {name: torch.zeros_like(part[2]) for name, part in eigen.parts.items()}
    total = 0.0
    for inputs, targets in batches(data):
        batch = _Batch(model, chosen, inputs)
        root = LossRoot(loss, batch.outputs, targets, batch.capture.batch)
        total += root.normaliser
        for stacks in batch.stacks(root.of(fisher, mc_samples, generator)):
            with torch.no_grad():
                for layer, s in itertools.product(chosen, range(len(next(iter(stacks.values()))))):
                    v = stacks[layer.weight][s]
                    gradients = {layer.weight: _gradients(layer, batch.inputs[layer.weight], v)}
                    if layer.bias is not None:
                        gradients[layer.bias] = over_positions(v)
                    for name in (one for one in gradients if one in factors):
                        q_a, q_b, _ = eigen.parts[name]
                        turned = q_b.mT @ factors[name].to_rows(gradients) @ q_a
                        values[name] += turned.square().sum(0) * root.normaliser
    share = require_counted(total) if loss.reduction == "mean" else 1.0
    parts = {name: (q_a, q_b, values[name] / share) for name, (q_a, q_b, _) in eigen.parts.items()}
    return EigenFactors(dict(factors), parts)


def empirical_ntk(
    model: nn.Module, inputs: Any, *, layers: Iterable[str] | None = None, strict: bool = False
) -> Tensor:
    """The empirical neural tangent kernel of a model's outputs, over the parameters of its layers.

    Args:
        model: the model, in evaluation mode or without layers that mix examples; outputs [batch, c].
        inputs: a batch: a tensor, a tuple of arguments or a mapping.
        layers: names of modules; all known layers unless given.
        strict: whether parametrised layers of other kinds are an error instead of a warning.

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
    chosen = layers_of(model, layers, strict)
    _refuse_mixing(model)
    batch = _Batch(model, chosen, inputs)
    f = batch.outputs.detach()
    if f.ndim != 2 or len(f) != batch.capture.batch:
        raise ValueError(f"the model's outputs have shape {tuple(f.shape)}, expected [batch, c]")
    n, c = f.shape
    units = [torch.zeros_like(f) for _ in range(c)]
    for place, unit in enumerate(units):
        unit[:, place] = 1
    with torch.no_grad():
        found = f.new_zeros((c * n, c * n))
        stacked = [batch.capture.gradients(batch.outputs, unit, keep=True) for unit in units]
        for layer in chosen:
            s = torch.stack([one.pop(layer.weight) for one in stacked])
            found += network(ops.ggn_gram, batch.spec(layer))(X=batch.inputs[layer.weight], S=s)
            if layer.bias is not None:
                flat = over_positions(s, 3).flatten(0, 1)
                found += flat @ flat.mT
    return found.reshape(c, n, c, n).permute(1, 3, 0, 2)


def hessian_diagonal(
    model: nn.Module,
    loss: nn.Module,
    data: Any,
    *,
    samples: int | None = None,
    layers: Iterable[str] | None = None,
    strict: bool = False,
    generator: torch.Generator | None = None,
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
    chosen = layers_of(model, layers, strict)
    _refuse_mixing(model)
    found: dict[str, Tensor] = {}
    total = 0.0
    for inputs, targets in batches(data):
        if total and getattr(loss, "reduction", None) not in (*_MEANS, "sum"):
            raise ValueError("several batches need a loss whose reduction is 'mean', 'batchmean' or 'sum', found none")
        batch = _Batch(model, chosen, inputs)
        share = _share(loss, batch.outputs, targets)
        if not share:  # no target counts, and the batch's own loss is 0/0
            continue
        total += share
        with torch.enable_grad():
            value = loss(batch.outputs, targets)
            gradients = batch.capture.gradients(value, torch.ones_like(value), keep=True, again=True)
        for layer in chosen:
            gradient, x = gradients[layer.weight], batch.inputs[layer.weight]
            for z in _directions(gradient, samples, generator):
                curved = torch.zeros_like(z)
                if gradient.requires_grad:  # a loss that is linear in the outputs has no Hessian behind the last layer
                    curved = batch.capture.gradients(gradient, z, keep=True, only=layer)[layer.weight]
                with torch.no_grad():
                    _add(found, _quadratic(layer, x, z, curved), share / (samples or 1))
    share = require_counted(total) if getattr(loss, "reduction", "mean") in _MEANS else 1.0
    return {name: value / share for name, value in found.items()}


def _quadratic(layer: Layer, x: Tensor, z: Tensor, curved: Tensor) -> dict[str, Tensor]:
    """Σ over examples of (Jᵀ z) ⊙ (Jᵀ H z), by parameter."""
    found = {layer.weight: (_gradients(layer, x, z) * _gradients(layer, x, curved)).sum(0)}
    if layer.bias is not None:
        sides = [over_positions(v) for v in (z, curved)]
        found[layer.bias] = (sides[0] * sides[1]).sum(0)
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


def _share(loss: nn.Module, outputs: Tensor, targets: Tensor) -> float:
    """What a batch counts in the mean over all of the data; 1 for a sum."""
    if getattr(loss, "reduction", "mean") not in _MEANS:
        return 1.0
    try:
        require_loss(loss)
    except TypeError:
        return float(len(outputs))
    return LossRoot(loss, outputs, targets, 1).normaliser


def _propagated(
    model: nn.Module, loss: nn.Module, data: Any, layers: Iterable[str] | None, strict: bool
) -> Iterator[tuple[Layer, Tensor, Tensor]]:
    """Each layer with its input and the gradient at its output, for one batch."""
    chosen = layers_of(model, layers, strict)
    _refuse_mixing(model)
    pairs = list(itertools.islice(batches(data), 2))
    if len(pairs) > 1:
        raise ValueError("data holds several batches, expected one pair (inputs, targets)")
    ((inputs, targets),) = pairs
    batch = _Batch(model, chosen, inputs)
    with torch.enable_grad():
        value = loss(batch.outputs, targets)
    if value.ndim:
        raise ValueError(f"the loss has shape {tuple(value.shape)}, expected a number: reduction 'mean' or 'sum'")
    gradients = batch.capture.gradients(value, torch.ones_like(value), keep=False)
    with torch.no_grad():
        for layer in chosen:
            yield layer, batch.inputs[layer.weight], gradients[layer.weight]


def _of_roots(
    model: nn.Module,
    loss: nn.Module,
    data: Any,
    fisher: str,
    layers: Iterable[str] | None,
    strict: bool,
    mc_samples: int,
    generator: torch.Generator | None,
    weights: Callable[[Layer, ConvSpec, Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """What is a sum over columns of the root and over examples, over all of the data; of biases the diagonal."""
    _check_roots(loss, fisher, mc_samples)
    chosen = layers_of(model, layers, strict)
    _refuse_mixing(model)
    found: dict[str, Tensor] = {}
    total = 0.0
    for inputs, targets in batches(data):
        batch = _Batch(model, chosen, inputs)
        root = LossRoot(loss, batch.outputs, targets, batch.capture.batch)
        share = root.normaliser
        total += share
        for stacks in batch.stacks(root.of(fisher, mc_samples, generator)):
            with torch.no_grad():
                for layer in chosen:
                    s = stacks[layer.weight]
                    parts = {layer.weight: weights(layer, batch.spec(layer), batch.inputs[layer.weight], s)}
                    if layer.bias is not None:
                        parts[layer.bias] = over_positions(s, 3).square().sum((0, 1))
                    _add(found, parts, share)
    share = require_counted(total) if loss.reduction == "mean" else 1.0
    return {name: value / share for name, value in found.items()}


def _check_roots(loss: nn.Module, fisher: str, mc_samples: int) -> None:
    require_loss(loss)
    require_choice("fisher", fisher, FISHERS)
    if mc_samples < 1:
        raise ValueError(f"mc_samples is {mc_samples}, expected at least 1")


def _refuse_mixing(model: nn.Module) -> None:
    """Normalisation by statistics of the batch leaves no part of the loss to an example."""
    mixing = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    ]
    if mixing:
        raise ValueError(f"examples are mixed by the statistics of {', '.join(mixing)}: call model.eval() first")
