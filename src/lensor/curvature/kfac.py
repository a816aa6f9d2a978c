"""Kronecker factors of whole models, in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lensor.arguments import described
from lensor.choices import Approx, Bias, FactorFisher, ModelNormalisation, Others, words
from lensor.curvature import compiled
from lensor.curvature.batch_axes import Given
from lensor.curvature.capture import own, running, unwrapped
from lensor.curvature.collector import Collector
from lensor.curvature.compiled import Compile, compiler_of
from lensor.curvature.data import batches
from lensor.curvature.described import SHARED
from lensor.curvature.factors import KroneckerFactors
from lensor.curvature.layers import all_parameters
from lensor.curvature.registry import reduction_of, require_loss
from lensor.errors import require_choice, require_type

_DENSE = 1024
"""The largest number of entries of a parameter whose block is a dense matrix for others="full"."""


@described(SHARED)
def kfac(
    model: nn.Module,
    loss: Any,
    data: Any,
    *,
    approx: Approx = "expand",
    fisher: FactorFisher = "type-2",
    bias: Bias = "separate",
    convention: ModelNormalisation = "paper",
    layers: Iterable[str] | None = None,
    others: Others | None = None,
    strict: bool = False,
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    check_finite: bool = True,
    group: dist.ProcessGroup | None = None,
    batch_axis: Given = None,
    compile: Compile = False,
) -> KroneckerFactors:
    """Kronecker-factored approximation of the generalised Gauss-Newton matrix, in one pass over the data.

    For every group of every convolution, transposed convolution (one to three dimensions, all hyper-parameters) and
    linear layer, kron(B, A) approximates the diagonal block of this matrix for the loss as given, that is, for its mean
    or sum over all data. If a weight is used several times (recurrence, tied layers), its uses count as further
    positions. Other parameters (normalisation, embeddings, attention, weights that other functions use as well) have no
    Kronecker factors. Their blocks are exact: the diagonal of the matrix, or the whole block of a parameter.

    The model does not change: no gradient is accumulated, and normalisation statistics are restored. Calls are
    intercepted inside each layer, so the effects of your hooks are included, whatever their order. A compiled model
    runs uncompiled.

    For training, use `lensor.optim.KFAC`, which reuses your backward pass.

    Args:
        model: the model; its training or evaluation mode is kept.
        loss: `torch.nn.CrossEntropyLoss`, `MSELoss` or `BCEWithLogitsLoss` with reduction "mean" or "sum"; class
            weights, label smoothing, `ignore_index` and `pos_weight` are supported. `TokenCrossEntropyLoss`, and
            losses of your own after `register_loss`, are supported as well.
        data: a pair (inputs, targets) of tensors, or an iterable of pairs, such as a DataLoader. A tuple or mapping of
            inputs is passed as the model's positional or named arguments.
        approx: "expand" treats the positions of a layer as examples, "reduce" sums over them first.
        fisher: "type-2": the exact Hessian of the loss with respect to the outputs, one backward pass per output;
            "mc": sampled from the model's own distribution, unbiased; "empirical": gradients of the loss itself;
            "forward-only": B is the identity, without a backward pass.
        bias: "separate": one block for each bias; "joint": one block for weight and bias, with the bias last in A.
        others: the blocks of parameters without Kronecker factors: "diagonal"; "full" (a dense matrix for a parameter
            of at most 1,024 entries, and the diagonal for a larger one); "skip" (no blocks). Both forms need the
            gradients of single examples, so the examples must not be mixed. "diagonal" unless given, and "skip" for
            fisher="forward-only".
        strict: whether parameters without Kronecker factors raise an error.
        convention: "paper" (A is divided by N, and B of "expand" by O), or the normalisation of a different library:
            see `KroneckerFactors.in_convention`.
        check_finite: whether to raise for factors that are not finite; this synchronises with the device.
        group: torch.distributed ranks that each hold a part of the data; every rank gets the factors for all data.
        batch_axis: axis of the examples in the layers' inputs: an axis, "outer" or "inner" (the examples share the
            first axis with other rows), or a mapping from layer names to these. Unless you specify it, a trial pass
            with a different number of examples determines it, so specify it for a model that cannot run such a pass.
        compile: whether to trace the pass into a graph that is used again for batches of the same shapes, also in later
            calls: "eager" runs torch's operators one after the other, and True compiles them with torch's compiler,
            which takes from seconds to minutes. The loss, the draws and a smaller last batch are not compiled.

    Returns:
        A mapping from the names of weights (and biases, if separate) to their blocks, with `.A` [groups, d, d] and `.B`
        [groups, c_out/groups, c_out/groups]. A block without Kronecker factors has A = 1, and B is the block itself or,
        for a diagonal, has one group per entry. The mapping is also an operator with products, inverses and
        determinants.

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
        TypeError: for a loss, model, data or group of an unsupported type.
        ValueError: for an unknown choice or name, a layer that does not run, a shape that does not fit, a model that
            mixes examples while other parameters have blocks, a weight that other functions use as well with
            others="skip", or bias="joint" for a bias that is not used with its weight.
        FloatingPointError: if a factor is not finite because an input, weight or loss contains NaN or infinity.

    Equation:
        A = 1/N Σ [X][X]ᵀ and B = 1/O Σ s sᵀ (expand), A = 1/N Σ x̄ x̄ᵀ with x̄ the mean patch and B = Σ (s1)(s1)ᵀ
        (reduce); s are columns of the loss Hessian's square root at the layer's output (Martens & Grosse, 2015; Grosse
        & Martens, 2016; Eschenhagen et al., 2023). The sums and means run over the positions of all uses of a weight.
    """
    require_choice("approx", approx, words(Approx))
    require_choice("fisher", fisher, words(FactorFisher))
    require_loss(loss, fisher)
    require_choice("bias", bias, words(Bias))
    require_choice("convention", convention, words(ModelNormalisation))
    if mc_samples < 1:
        raise ValueError(f"mc_samples is {mc_samples}, expected at least 1")
    if group is not None:
        require_type(group, "group", dist.ProcessGroup)
    if others is not None:
        require_choice("others", others, words(Others))
    if fisher == "forward-only" and others not in (None, "skip"):
        raise ValueError(f"others is {others!r}, expected 'skip' for fisher='forward-only', which has no gradients")
    model = unwrapped(model)
    chosen, parameters = all_parameters(model, layers)
    factored = {name for layer in chosen for name in (layer.weight, layer.bias)}
    plain = [name for name in parameters if name not in factored]
    if strict and plain:
        raise ValueError(_without_factors(plain))
    skips = others == "skip" or fisher == "forward-only"
    if skips and not chosen:
        raise ValueError("the model has no convolution, transposed convolution or linear layer, expected at least one")
    dense = _DENSE if others == "full" else 0
    collected = Collector(
        chosen, approx, bias == "joint", fisher, parameters=None if skips else parameters, dense=dense
    )
    options = mc_samples, generator, batch_axis
    compiler = compiler_of(compile)
    with running(model):
        for at, (inputs, targets) in enumerate(batches(data)):
            pair = own(inputs), own(targets)
            if compiler is None:
                collected.add(model, loss, *pair, *options)
            else:
                compiled.add(collected, model, loss, *pair, *options, compiler, is_first=not at)
        factors = collected.factors(str(reduction_of(loss)), group)
    plain = [name for name, block in factors.items() if not block.factored]
    if strict and plain:
        raise ValueError(_without_factors(plain))
    if check_finite:
        factors.check_finite()
    return factors if convention == "paper" else factors.in_convention(convention)


def _without_factors(names: Iterable[str]) -> str:
    return (
        f"the parameters {', '.join(map(repr, names))} have no Kronecker factors, expected calls of convolutions and"
        " linear layers only for strict=True: choose layers with layers="
    )
