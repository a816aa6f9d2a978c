"""Kronecker factors with corrected eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lensor.arguments import described
from lensor.choices import Fisher
from lensor.curvature.batch import Batch, check_roots
from lensor.curvature.batch_axes import Given
from lensor.curvature.capture import computing, own, running, unwrapped
from lensor.curvature.data import batches
from lensor.curvature.described import SHARED
from lensor.curvature.factors import KroneckerFactors
from lensor.curvature.inverses import EigenFactors
from lensor.curvature.layers import all_parameters, refuse_mixing, require_module
from lensor.curvature.losses import require_counted
from lensor.curvature.networks import example_roots, network
from lensor.curvature.registry import reduction_of
from lensor.curvature.watching import Targets
from lensor.errors import require_type
from lensor.network import AnyNetwork, Network, Operand
from lensor.spec import ConvSpec


@described(SHARED)
def ekfac(
    model: nn.Module,
    loss: Any,
    data: Any,
    factors: KroneckerFactors,
    *,
    fisher: Fisher = "type-2",
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    batch_axis: Given = None,
    basis_dtype: torch.dtype | None = None,
) -> EigenFactors:
    """Kronecker factors with corrected eigenvalues: the GGN's diagonal in the factors' eigenbasis.

    Use this instead of `kfac` alone when you can afford a second pass over the data for a better approximation.

    Args:
        factors: the result of `kfac` for this model.
        basis_dtype: the dtype in which the eigenvectors are stored, such as torch.bfloat16 for half the memory. The
            eigenvalues belong to the rounded vectors, and products use the dtype of the factors. That of the factors
            unless given.

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
        TypeError: for a loss, model, data or factors of an unsupported type, or a dtype that is not floating.
        ValueError: for an unknown choice, factors of another model, a layer that does not run, or a model that mixes
            examples.

    Equation:
        Λ = Σ_n,v (Q_Bᵀ G Q_A)², where G is the weight gradient of one example for one column, as a matrix (George et
        al., 2018).
    """
    require_module(model)
    if basis_dtype is not None and not (isinstance(basis_dtype, torch.dtype) and basis_dtype.is_floating_point):
        raise TypeError(f"basis_dtype is {basis_dtype}, expected a floating dtype such as torch.bfloat16")
    require_type(factors, "factors", KroneckerFactors)
    model = unwrapped(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, shape in factors.shapes.items():
        if name not in shapes:
            raise ValueError(f"factors has {name!r}, expected the factors of this model, which has no such parameter")
        if shapes[name] != shape:
            raise ValueError(f"the factors of {name!r} have shape {shape}, expected that of the model: {shapes[name]}")
    chosen, parameters = all_parameters(model)
    held = {name: parameters[name] for name in shapes if name in factors.shapes and name in parameters}
    missing = set(factors.shapes) - set(held)
    if missing:
        raise ValueError(f"factors has frozen parameters {sorted(missing)}, expected trainable ones")
    layers = [layer for layer in chosen if layer.weight in held or layer.bias in held]
    refuse_mixing(model)
    check_roots(loss, fisher, mc_samples)
    total = 0.0
    watched = Targets(layers, held)
    with running(model):
        eigen = factors.eigh()
        if basis_dtype is not None:
            parts = {name: (a.to(basis_dtype), b.to(basis_dtype), one) for name, (a, b, one) in eigen.parts.items()}
            eigen = EigenFactors(dict(factors), parts)
        values = {name: torch.zeros_like(part[2]) for name, part in eigen.parts.items()}
        for inputs, targets in batches(data):
            batch = Batch(model, watched, own(inputs), batch_axis, shared=True)
            root = batch.root(loss, own(targets))
            total += root.normaliser
            for columns in batch.propagated(root.of(fisher, mc_samples, generator)):
                with computing(root.f):
                    for name, part in _parts(batch, columns, factors, eigen):
                        values[name] += part * root.normaliser
    share = require_counted(total) if reduction_of(loss) == "mean" else 1.0
    parts = {name: (q_a, q_b, values[name].clamp_min(0) / share) for name, (q_a, q_b, _) in eigen.parts.items()}
    return EigenFactors(dict(factors), parts)


def _parts(
    batch: Batch, columns: Sequence[Mapping[Any, Any]], factors: KroneckerFactors, eigen: EigenFactors
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of a block and its eigenvalues' part from one batch and some columns of the root."""
    done: set[str] = set()
    others = [batch.of_functions(one) for one in columns]
    for name, block in factors.items():
        use = batch.only_use(name, others[0]) if len(block.names) == 1 and block.factored else None
        if use is not None:
            x, (q_a, q_b, _) = batch.capture.inputs[use], eigen.parts[name]
            s = torch.stack([one[use] for one in columns])
            yield name, network(_eigenvalues, use.spec(x))(X=x, S=s, Q_A=q_a.to(x.dtype), Q_B=q_b.to(x.dtype))
            done.add(name)
    owners = {one: name for name, block in factors.items() for one in block.names}
    for vectors, rest in zip(columns, others, strict=True):
        waiting: dict[str, Tensor] = {}
        for one, gradients in batch.gradients(vectors, rest, done):
            waiting[one] = gradients
            name = owners[one]
            if all(part in waiting for part in factors[name].names):
                rows = factors[name].to_rows({part: waiting.pop(part) for part in factors[name].names})
                q_a, q_b, _ = eigen.parts[name]
                yield name, (q_b.to(rows.dtype).mT @ rows @ q_a.to(rows.dtype)).square().sum(0)


def _eigenvalues(spec: ConvSpec) -> AnyNetwork:
    """The squares of the gradients of single examples in a basis: X, S, Q_A, Q_B -> [groups, c, d].

    `ggn_diagonal` with Q_A and Q_B at the weight's indices. Whether the patches, the gradients at the output or the
    gradient is multiplied by them first is for the plan.
    """
    roots = example_roots(spec)
    inside, outside = ("c_out", "c_in") if spec.transposed else ("c_in", "c_out")
    rows = [inside, *(index for leg in roots.output[4:] for index in leg)]
    sizes = {index: roots.sizes[index] for index in ("g", outside, *rows)}
    sizes |= {"b": sizes[outside], "a": math.prod(sizes[index] or 0 for index in rows)}
    q_a = (("g",), tuple(rows), ("a",))
    q_b = (("g",), (outside,), ("b",))
    turned = roots.merge(
        Network.make([Operand("Q_A", q_a)], q_a, sizes), share=["g", *rows], output=f"v n g {outside} a"
    )
    turned = turned.merge(Network.make([Operand("Q_B", q_b)], q_b, sizes), share=["g", outside], output="v n g b a")
    return turned.merge(turned, share=["v", "n", "g", "b", "a"], output="g b a")
