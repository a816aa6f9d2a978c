"""Kronecker factors with corrected eigenvalues."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from lensor.arguments import described
from lensor.choices import Fisher
from lensor.curvature.batch import Batch, check_roots, refuse_mixing
from lensor.curvature.batch_axes import Given
from lensor.curvature.capture import computing, own, running, unwrapped
from lensor.curvature.data import batches, over_positions
from lensor.curvature.described import SHARED
from lensor.curvature.factors import KroneckerFactors
from lensor.curvature.inverses import EigenFactors
from lensor.curvature.layers import layers_of, require_module
from lensor.curvature.losses import require_counted
from lensor.curvature.watching import Targets
from lensor.errors import require_type


@described(SHARED)
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
    """Kronecker factors with corrected eigenvalues: the GGN's diagonal in the factors' eigenbasis.

    Use this instead of `kfac` alone when you can afford a second pass over the data for a better approximation.

    Args:
        factors: the result of `kfac` for this model.

    Returns:
        An operator with the eigenvectors of the factors and corrected eigenvalues.

    Example:
        >>> import torch
        >>> from lensor.curvature import ekfac, kfac
        >>> model, data = torch.nn.Conv1d(2, 3, 3), (torch.randn(4, 2, 9), torch.randn(4, 3, 7))
        >>> factors = kfac(model, torch.nn.MSELoss(), data)
        >>> corrected = ekfac(model, torch.nn.MSELoss(), data, factors)
        >>> corrected.inverse(damping=0.1).size
        21

    Raises:
        TypeError: for a loss, model, data or factors of an unsupported type.
        ValueError: for an unknown choice, factors of another model, a layer that does not run exactly once, or a model
            that mixes examples.

    Equation:
        Λ = Σ_n,v (Q_Bᵀ G Q_A)², where G is the weight gradient of one example for one column, as a matrix (George et
        al., 2018).
    """
    require_module(model)
    require_type(factors, "factors", KroneckerFactors)
    model = unwrapped(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, shape in factors.shapes.items():
        if name not in shapes:
            raise ValueError(f"factors has {name!r}, expected the factors of this model, which has no such parameter")
        if shapes[name] != shape:
            raise ValueError(f"the factors of {name!r} have shape {shape}, expected that of the model: {shapes[name]}")
    chosen = layers_of(model, [name.rpartition(".")[0] for name in factors if name.rpartition(".")[2] == "weight"])
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
            for columns in batch.propagated(root.of(fisher, mc_samples, generator)):
                with computing(root.f):
                    for use, vectors in itertools.product(batch.capture.uses, columns):
                        gradients = {use.weight: batch.weight_gradients([use], vectors)}
                        if use.bias is not None:
                            gradients[use.bias] = over_positions(vectors[use])
                        for name in (one for one in gradients if one in factors):
                            q_a, q_b, _ = eigen.parts[name]
                            turned = q_b.mT @ factors[name].to_rows(gradients) @ q_a
                            values[name] += turned.square().sum(0) * root.normaliser
    share = require_counted(total) if loss.reduction == "mean" else 1.0
    parts = {name: (q_a, q_b, values[name] / share) for name, (q_a, q_b, _) in eigen.parts.items()}
    return EigenFactors(dict(factors), parts)
