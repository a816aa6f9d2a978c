"""The variance of sampled networks, computed as a tensor network for every scheme."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from lensor.choices import Scheme
from lensor.errors import NetworkError, require_choice
from lensor.network import Network, Node, Operand, new_name
from lensor.sampling.schemes import SCHEMES, inclusion, kept_count, require_keep, require_norms


def second_moments(
    size: int, keep: float | Fraction, scheme: Scheme = "bernoulli", *, norms: Tensor | None = None
) -> Tensor:
    """E[z_i z_j] of the factors z by which a scheme multiplies positions (zero for positions that are not kept).

    Args:
        size: number of positions.
        keep: the keep rate, as in `draw`.
        scheme: one of `SCHEMES`.
        norms: for "importance", the norm of each position.

    Returns:
        The moments, [size, size], in float64; the mean of every z_i is 1.

    Example:
        >>> import lensor.sampling
        >>> lensor.sampling.second_moments(2, 0.25)
        tensor([[4., 1.],
                [1., 4.]], dtype=torch.float64)

    Raises:
        ValueError: for a keep rate outside (0, 1], an unknown scheme, or missing norms.

    Equation:
        π_ij / (π_i π_j), with the probabilities π_i of a position and π_ij of a pair.
    """
    require_choice("scheme", scheme, SCHEMES)
    rate = require_keep(keep, "the moments")
    ones, same = torch.ones(size, size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
    if scheme == "bernoulli":
        return ones + same * (1 / float(rate) - 1)
    if scheme == "importance":
        rates = inclusion(require_norms(norms, size), rate)
        return ones + torch.diag(torch.where(rates > 0, 1 / rates.clamp(min=1e-300) - 1, 0.0))
    if not size:
        return ones
    count = kept_count(size, rate)
    if scheme == "fixed":
        pair = (count - 1) / (size - 1) * size / count if size > 1 else 1.0
        return ones * pair + same * (size / count - pair)
    apart = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    runs = (count - apart).clamp(min=0) + (count - (size - apart)).clamp(min=0) * (apart > 0)
    return size / count**2 * runs.double()


def variance(net: Network, moments: Mapping[str, Tensor], **operands: Tensor) -> float:
    """The variance of a sampled network, summed over all entries of its result: E‖ĝ‖² − ‖g‖².

    Args:
        net: the network before sampling.
        moments: the `second_moments` of each sampled index, by index.
        operands: operands of the network.

    Example:
        >>> import torch, lensor.sampling
        >>> net = lensor.contraction("n i, n o -> o i", "X", "V").bind(n=2)
        >>> moments = lensor.sampling.second_moments(2, 0.5)
        >>> one = torch.ones(2, 1, dtype=torch.float64)
        >>> lensor.sampling.variance(net, {"n": moments}, X=one, V=one)
        2.0

    Raises:
        NetworkError: for an unknown index, or a sum of networks.

    Equation:
        Σ M1[i,i'] M2[j,j'] ⟨g_ij, g_i'j'⟩ − ‖g‖², where g_ij is the contribution of positions i, j; for an index of the
        result, only the terms i = i' occur.
    """
    if not isinstance(net, Network):
        raise NetworkError("net is a sum of networks, expected a single network: compute the variance of each term")
    for index in moments:
        if index not in net.sizes:
            raise NetworkError(f"moments has index {index!r}, expected one of {sorted(net.sizes)}")
    used = {*net.sizes}
    inner = {index: new_name(f"{index}_other", used) for index in moments if index in net.inner_indices}
    taken = {*net.operand_names}
    matrices = {index: new_name(f"moments_{index}", taken) for index in moments}
    opened = net
    for index in inner:
        opened = opened.keep(index)
    weighted: list[Node] = [
        Operand(name, ((index,), (inner[index],)) if index in inner else ((index,),))
        for index, name in matrices.items()
    ]
    sizes = {other: net.sizes[index] for index, other in inner.items()}
    output = [leg for leg in opened.output if not set(leg) & inner.keys()]
    one = opened.replace(
        nodes=(*opened.nodes, *weighted), output=(*output, *((other,) for other in inner.values())), sizes=sizes
    )
    square = one.merge(opened.rename(inner), share=one.output_indices, output="")
    weights = {matrices[index]: matrix if index in inner else matrix.diagonal() for index, matrix in moments.items()}
    exact = {name: torch.as_tensor(value).double() for name, value in operands.items()}
    device = next((value.device for value in exact.values()), None)
    given = {**exact, **{name: matrix.to(device) for name, matrix in weights.items()}}
    return float(square(**given)) - float(net(**exact).square().sum())
