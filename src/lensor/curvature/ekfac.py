"""Kronecker factors with corrected eigenvalues."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from lensor.choices import Fisher
from lensor.curvature.batch import Batch, check_roots, refuse_mixing
from lensor.curvature.capture import computing, own, running, unwrapped
from lensor.curvature.data import batches, over_positions
from lensor.curvature.factors import KroneckerFactors
from lensor.curvature.inverses import EigenFactors
from lensor.curvature.layers import layers_of
from lensor.curvature.layout import Given
from lensor.curvature.losses import require_counted
from lensor.curvature.watching import Targets


def ekfac(
    model: nn.Module,
    loss: nn.Module,
    data: Any,
    factors: KroneckerFactors,
    *,
    fisher: Fisher = "type-2",
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
    refuse_mixing(model)
    check_roots(loss, fisher, mc_samples)
    total = 0.0
    watched = Targets(chosen)
    with running(model):
        eigen = factors.eigh()
        values = {name: torch.zeros_like(part[2]) for name, part in eigen.parts.items()}
        for inputs, targets in batches(data):
            batch = Batch(model, watched, own(inputs), batch_axis)
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
