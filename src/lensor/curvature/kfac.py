"""Kronecker factors of whole models, in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lensor.choices import Approx, Bias, FactorFisher, ModelNormalisation, words
from lensor.curvature.capture import own, running, unwrapped
from lensor.curvature.collector import Collector
from lensor.curvature.data import batches
from lensor.curvature.factors import KroneckerFactors
from lensor.curvature.layers import layers_of
from lensor.curvature.layout import Given
from lensor.curvature.losses import require_loss
from lensor.errors import require_choice


def kfac(
    model: nn.Module,
    loss: nn.Module,
    data: Any,
    *,
    approx: Approx = "expand",
    fisher: FactorFisher = "type-2",
    bias: Bias = "separate",
    convention: ModelNormalisation = "paper",
    layers: Iterable[str] | None = None,
    strict: bool = False,
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    check_finite: bool = True,
    group: dist.ProcessGroup | None = None,
    batch_axis: Given = None,
) -> KroneckerFactors:
    """Kronecker-factored approximation of the generalised Gauss-Newton matrix of a model's loss, in one pass over data.

    For every convolution, transposed convolution (one to three dimensions, all hyper-parameters) and linear layer, and
    every group of its channels: kron(B, A) approximates the diagonal block of the loss as given, with its own mean or
    sum over all of the data. The model is left as it was: no gradient is accumulated, statistics of normalisation are
    put back. Calls of a layer's function are met inside of the layer, so that your hooks count, in any order. A
    compiled model runs as it was written.

    Args:
        model: the model, in training or evaluation mode, which is kept.
        loss: `torch.nn.CrossEntropyLoss`, `MSELoss` or `BCEWithLogitsLoss` with reduction "mean" or "sum"; class
            weights, label smoothing, `ignore_index` and `pos_weight` count.
        data: a pair (inputs, targets) of tensors, or an iterable of pairs, such as a DataLoader. Inputs that are a
            tuple or a mapping are the model's arguments.
        approx: "expand" treats the positions of a layer as examples, "reduce" sums over them first.
        fisher: "type-2": the exact Hessian of the loss by the outputs, one backward pass for each output; "mc": sampled
            from the model's own distribution, unbiased; "empirical": gradients of the loss itself; "forward-only":
            B is the identity, no backward pass at all.
        bias: "separate": a block of its own for each bias; "joint": one block for weight and bias, the bias last in A.
        convention: "paper" (A has the 1/N, expand's B the 1/O), or whose normalisation: see `in_convention` of the
            result.
        layers: names of modules; all known layers unless given.
        strict: whether parametrised layers of other kinds are an error instead of a warning.
        mc_samples: draws for each example, for "mc".
        generator: where they are drawn from.
        check_finite: whether factors that are not finite raise; this waits for the device.
        group: ranks of torch.distributed that have a part of the data each; all get the factors of all of it.
        batch_axis: where the examples lie in the layers' inputs, for models that do not run with another number of
            examples, from which it is found otherwise: an axis, "outer" or "inner" (the examples share the first axis
            with other rows), or a mapping from layers' names to these.

    Returns:
        A mapping from the names of weights (and biases, if separate) to their blocks, with `.A` [groups, d, d] and `.B`
        [groups, c_out/groups, c_out/groups]; products, inverses, determinants and more for all together.

    Example:
        >>> import torch
        >>> from lensor.curvature import kfac
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(72, 10))
        >>> data = torch.randn(4, 3, 5, 5), torch.tensor([1, 5, 0, 3])
        >>> factors = kfac(model, torch.nn.CrossEntropyLoss(), data, approx="reduce")
        >>> factors["0.weight"].A.shape, factors["0.weight"].B.shape
        (torch.Size([1, 27, 27]), torch.Size([1, 8, 8]))
        >>> list(factors)
        ['0.weight', '0.bias', '2.weight', '2.bias']

    Raises:
        TypeError: for a loss, model or data of another kind.
        ValueError: for choices and names that are not known, tied weights, layers that do not run once, shapes that do
            not fit.
        FloatingPointError: if a factor is not finite: an input, weight or loss holds NaN or infinity.

    Equation:
        A = 1/N Σ [X][X]ᵀ and B = 1/O Σ s sᵀ (expand), A = 1/N Σ x̄ x̄ᵀ with x̄ the mean patch and B = Σ (s1)(s1)ᵀ
        (reduce); s are columns of the loss Hessian's square root at the layer's output (Martens & Grosse, 2015; Grosse
        & Martens, 2016; Eschenhagen et al., 2023).
    """
    require_loss(loss)
    require_choice("approx", approx, words(Approx))
    require_choice("fisher", fisher, words(FactorFisher))
    require_choice("bias", bias, words(Bias))
    require_choice("convention", convention, words(ModelNormalisation))
    if mc_samples < 1:
        raise ValueError(f"mc_samples is {mc_samples}, expected at least 1")
    chosen = layers_of(unwrapped(model), layers, strict)
    collected = Collector(chosen, approx, bias == "joint", fisher)
    with running(unwrapped(model)):
        for inputs, targets in batches(data):
            collected.add(unwrapped(model), loss, own(inputs), own(targets), mc_samples, generator, batch_axis)
        factors = collected.factors(str(loss.reduction), group)
    if check_finite:
        factors.check_finite()
    return factors if convention == "paper" else factors.in_convention(convention)
