"""The quadratic model of the loss on the span of a few directions, with the exact Gauss–Newton matrix of the batch.

M(δ) − M(0) = gᵀδ + ½ δᵀ(G + Λ)δ, where Λ contains the damping of each parameter (Martens & Grosse, 2015, section 6.4).
With δ = Σ_i c_i d_i, only gᵀd_i and d_iᵀ(G + Λ)d_j are needed. G = Jᵀ H J, so d_iᵀ G d_j = (J d_i)ᵀ H (J d_j): a pass
of the model in forward mode gives J d_i, and the derivative of the loss gradient with respect to the outputs H J d_i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lensor.optim.passes import Passes
from lensor.optim.updates import inner_products

_DEPENDENT = 1e-6
"""Directions are dependent if the correlation of their lengths has an eigenvalue below this bound."""

_TOLERANCE = 0.1
"""The difference between derivatives of the loss that is explained by rounding, as a fraction of their parts."""


@dataclass(frozen=True, eq=False)
class Quadratic:
    """A quadratic function of the coefficients of some directions, zero at zero.

    Args:
        slopes: the derivatives gᵀd_i at zero, [k].
        curvature: the products d_iᵀ(G + Λ)d_j, [k, k].
    """

    slopes: Tensor
    curvature: Tensor

    def value(self, coefficients: Tensor) -> float:
        """The value for coefficients [k]."""
        return float(self.slopes @ coefficients + 0.5 * coefficients @ self.curvature @ coefficients)

    def minimum(self) -> Tensor:
        """The coefficients [k] of the minimum; of several minima, those with the shortest terms.

        Raises:
            ValueError: if there is no minimum, because the curvature along a direction is negative.
        """
        found = torch.zeros_like(self.slopes)
        if not bool(self.slopes.isfinite().all() and self.curvature.isfinite().all()):
            return found.fill_(torch.nan)
        square = self.curvature.diagonal()
        if bool((square < 0).any()):
            raise ValueError(
                "the quadratic model of the loss has a negative curvature along the step, expected a loss that is"
                " convex in the outputs"
            )
        used = square > 0
        length = square[used].sqrt()
        values, vectors = torch.linalg.eigh(self.curvature[used][:, used] / length / length[:, None])
        kept = values > _DEPENDENT
        vectors = vectors[:, kept]
        found[used] = -(vectors @ (vectors.mT @ (self.slopes[used] / length) / values[kept])) / length
        return found


def quadratic(
    passes: Passes,
    directions: Sequence[Mapping[str, Tensor]],
    gradients: Mapping[str, Tensor],
    damping: Mapping[str, float],
    group: dist.ProcessGroup | None,
) -> Quadratic:
    """The quadratic model of the loss of a closure's passes.

    Args:
        passes: the passes.
        directions: the directions, by parameter name; a parameter that is left out does not move.
        gradients: the gradients of the loss, by parameter name.
        damping: the damping of each parameter, by name.
        group: the ranks whose losses are averaged.

    Raises:
        ValueError: if derivatives are not available, or if gradients, outputs and loss do not belong together.
    """
    count = len(directions)
    found = passes.derivatives(directions)
    slopes = [inner_products((one[name], gradients[name]) for name in one) for one in directions]
    products = [inner_products(zip(a, b, strict=True)) for a in found.products for b in found.tangents]
    lengths = [
        inner_products((damping[name] * a[name], b[name]) for name in a if name in b)
        for a in directions
        for b in directions
    ]
    along = found.tangents[0]
    sizes = inner_products((a.abs(), b.abs()) for a, b in zip(found.gradients, along, strict=True))
    sides = [found.gradients, found.gradients if found.returned is None else found.returned]
    checks = [sizes, *(inner_products(zip(side, along, strict=True)) for side in sides)]
    numbers = averaged([*slopes, *products, *lengths, *checks], group, next(iter(gradients.values())).device)
    slope, product, length, checked = numbers.split([count, count**2, count**2, len(checks)])
    if passes.is_exact:
        _require_consistent(float(slope[0]), *checked.tolist())
    product = product.reshape(count, count)
    return Quadratic(slope, (product + product.T) / 2 + length.reshape(count, count))


def averaged(numbers: Sequence[Tensor], group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """Some numbers as a vector on the CPU, in double precision.

    Args:
        numbers: the numbers.
        group: the ranks over which they are averaged, if there are several.
        device: the device on which they are averaged.
    """
    wide = torch.float32 if device.type == "mps" else torch.float64
    found = torch.stack([one.to(device, wide) for one in numbers])
    if group is not None:
        dist.all_reduce(found, group=group)
        found /= dist.get_world_size(group)
    return found.to("cpu", torch.float64)


def _require_consistent(slope: float, parts: float, at_outputs: float, returned: float) -> None:
    """Raise unless the derivatives of the loss agree, as they are computed in three ways.

    Args:
        slope: gᵀd, with the gradients of the parameters.
        parts: the sum of the absolute values of the parts of the next number.
        at_outputs: the derivative of the loss along the derivative of the outputs.
        returned: the derivative of the loss that the closure returned.

    Raises:
        ValueError: if they differ by more than rounding explains.
    """
    if abs(slope - at_outputs) > _TOLERANCE * parts:
        raise ValueError(
            f"along the step, the gradients give the derivative {slope:.4g} of the loss, and the outputs of the model"
            f" give {at_outputs:.4g}, expected equal ones: the closure must clear the gradients and call backward for a"
            " loss that depends on parameters through the outputs only (no penalty, no clipping of gradients); with"
            " group=, gradients are averaged over the ranks"
        )
    if abs(returned - at_outputs) > _TOLERANCE * parts:
        raise ValueError(
            f"the loss that the closure returned has the derivative {returned:.4g} along the step, and the loss that it"
            f" differentiated has {at_outputs:.4g}, expected the same loss: if it runs several backward passes, it"
            " returns the sum of their losses"
        )
