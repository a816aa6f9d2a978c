"""Roots of damped inverses, which are updated by products of matrices, without an inversion (Lin et al., 2024).

The inverse of B ⊗ A + λI is approximated by S = CCᵀ ⊗ KKᵀ with the smallest

    J = tr(S (B ⊗ A + λI)) − log det S.

Let E = tr(CᵀBC) KᵀAK + λ tr(CᵀC) KᵀK, and let c be the number of rows of B. A change from K to K (I − M), with a small
symmetric M, changes J by −2 tr(M (E − cI)). At the minimum, E = cI, and the second derivative is 4c times the identity
on symmetric matrices, so Newton's method takes M = (E − cI) / 2c. An update with weight w takes w times this step. To
first order, the inverse of KKᵀ is then the average of its old value, with weight 1 − w, and of the new factors' value
(tr(CᵀBC) A + λ tr(CᵀC) I) / c, with weight w. The same holds for C, with A and B exchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lensor.choices import Bias, StepMethod, Structure, words
from lensor.curvature.block import Block, trace_of_input, traces_of
from lensor.curvature.operators import Operator
from lensor.curvature.structure import DiagonalBlocks, blocks_times, times_blocks
from lensor.curvature.watching import uncast
from lensor.errors import require_choice
from lensor.optim.inversion import Inversion

ROWS = 64
"""The largest number of rows of a block, unless another one is given."""

_FIRST = 8
"""The number of steps at the first update."""


def blocks_of(
    method: StepMethod, structure: Structure, block_size: int | None, bias: Bias | None, inverse_interval: int
) -> DiagonalBlocks | None:
    """The diagonal blocks that an optimizer computes; None if it computes whole factors.

    Raises:
        ValueError: for options that do not fit together.
    """
    require_choice("structure", structure, words(Structure))
    if method != "inverse-free" and structure != "dense":
        raise ValueError(f"structure is {structure!r} with method={method!r}, expected method='inverse-free'")
    if block_size is not None:
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise ValueError(f"block_size is {block_size!r}, expected a whole number of at least 1")
        if structure != "block":
            raise ValueError(f"block_size is {block_size} with structure={structure!r}, expected structure='block'")
    if method == "inverse-free" and inverse_interval != 1:
        raise ValueError(
            f"inverse_interval is {inverse_interval}, expected 1 for method='inverse-free', which updates inverses"
            " whenever there are new factors: use factor_interval"
        )
    if structure == "dense":
        return None
    if bias == "joint":
        raise ValueError(f"bias is 'joint' with structure={structure!r}, expected 'separate'")
    return DiagonalBlocks(1 if structure == "diagonal" else ROWS if block_size is None else block_size)


@dataclass(eq=False)
class InverseFree(Inversion):
    """Roots of the inverses of an optimizer's blocks, as blocks with K in place of A and C in place of B.

    Every process of a group updates all roots: products with diagonal blocks take less time than an exchange of
    directions.

    Args:
        size: the largest number of rows of a diagonal block; None for whole matrices.
    """

    size: int | None = None

    keeps_factors: ClassVar[bool] = False
    is_shared: ClassVar[bool] = False
    least: ClassVar[torch.dtype] = torch.bfloat16

    @property
    def structure(self) -> str:
        """The stored entries of the roots, as text."""
        return "dense" if self.size is None else f"blocks of at most {self.size} rows"

    def invert(self, blocks: Mapping[str, Block], damping: Mapping[str, float]) -> None:
        """Update roots with new factors. The first one has weight 1, the n-th one 1/n, but at least 1 − ema.

        Args:
            blocks: the new factors.
            damping: the damping of each block.
        """
        if self.method != "inverse-free":
            raise ValueError(f"method was set to {self.method!r}, expected it when the optimizer is created")
        roots, updates = {}, {}
        for name, block in blocks.items():
            known, count = self.blocks.get(name), self.updates.get(name, 0)
            with uncast(block.B):
                if known is None or _form(known) != _form(block):
                    roots[name], updates[name] = started(block, damping[name]), 1
                else:
                    weight = max(1 - self.ema, 1 / (count + 1))
                    roots[name], updates[name] = updated(known, block, damping[name], weight), count + 1
        self.updates = self.updates | updates
        self._invert(roots, damping)

    def cost(self, block: Block) -> float:
        """The number of multiplications for an update of the roots of a block."""
        return 3.0 * block.groups * (block.d**2 / block.parts[0] ** 2 * block.d + block.c**3 / block.parts[1] ** 2)

    def _solved(self, names: Iterable[str]) -> dict[str, Operator]:
        return {name: Squared({name: self.blocks[name]}) for name in names}


class Squared(Operator):
    """The products CCᵀ ⊗ KKᵀ of roots with their transposes.

    Args:
        blocks: the roots, as blocks with K in place of A and C in place of B.
    """

    def _times(self, name: str, rows: Tensor) -> Tensor:
        block = self._blocks[name]
        k, c = block.A, block.B
        if k.shape[-1] < block.c:  # the square of a root takes less time than one more product with the rows
            rows = times_blocks(rows, _product(k, k.mT))
        else:
            rows = times_blocks(times_blocks(rows, k), k.mT)
        if c.shape[-1] < block.d:
            return blocks_times(_product(c, c.mT), rows)
        return blocks_times(c, blocks_times(c.mT, rows))


def started(block: Block, damping: float) -> Block:
    """The roots after the first update: steps of full weight from the best multiples of the identity.

    Args:
        block: the factors.
        damping: the damping.
    """
    a, b = (one.view(block.groups, -1).sum(1) for one in (trace_of_input(block), traces_of(block.B)))
    scale = (a / block.d * b / block.c + damping).pow(-0.25)
    k, c = (
        torch.eye(rows // parts).to(block.B) * scale.repeat_interleave(parts)[:, None, None]
        for rows, parts in zip((block.d, block.c), block.parts, strict=True)
    )
    found = replace(block, formed=k, root=None, B=c)
    for _ in range(_FIRST):
        found = updated(found, block, damping, 1.0)
    return found


def updated(roots: Block, block: Block, damping: float, weight: float) -> Block:
    """The roots after an update: a step of C, and then one of K. For weights up to 1, no step increases J.

    Args:
        roots: the roots.
        block: the factors.
        damping: the damping.
        weight: the weight of the factors.
    """
    k, c, groups = roots.A, roots.B, block.groups
    image = _product(block.A, k) if block.root is None else block.root.mT @ (block.root @ k)
    new = _stepped(c, _product(block.B, c), _inner(k, image, groups), damping * _inner(k, k, groups), block.d, weight)
    on_a, on_identity = _inner(new, _product(block.B, new), groups), damping * _inner(new, new, groups)
    return replace(roots, formed=_stepped(k, image, on_a, on_identity, block.c, weight), B=new)


def _stepped(root: Tensor, image: Tensor, on_image: Tensor, on_root: Tensor, size: int, weight: float) -> Tensor:
    """root (I − w M) with 2M = rootᵀ (on_image · image + on_root · root) / size − I.

    An eigenvalue e = 1 + 2μ of E / size becomes e (1 − wμ)². Since e ≥ 0, only a large μ can make the step too long: it
    is shortened such that wμ ≤ 1/2 for an upper bound of all μ. Then e − log e does not increase. For e < 1, the new
    value is between e and 1. For e > 1, it is less than e, and at least e/4, and at least e (3 − e)²/4 if e < 2.

    Args:
        root: the blocks of a root.
        image: the product of A (or B) and the root.
        on_image: factor of the image, for each group.
        on_root: factor of the root, for each group.
        size: the number of rows of the other matrix.
        weight: w.
    """
    step = _product(root.mT, image * _each(on_image / size, root) + root * _each(on_root / size, root))
    step.diagonal(dim1=-2, dim2=-1).sub_(1)
    step.mul_(0.5)
    rows = torch.linalg.vector_norm(step, 1, -1, dtype=on_image.dtype)  # sums do not overflow
    largest = torch.minimum(torch.linalg.vector_norm(step, 2, (-2, -1), dtype=on_image.dtype), rows.amax(-1))
    shortened = weight / (2 * weight * largest).clamp_min(1)
    step.mul_(shortened[:, None, None])
    return root - root * step if root.shape[-1] == 1 else torch.baddbmm(root, root, step, alpha=-1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a * b if a.shape[-1] == 1 else a @ b


def _inner(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """tr aᵀb for each group, in at least single precision."""
    return (a * b).view(groups, -1).sum(1, dtype=torch.promote_types(a.dtype, torch.float32))


def _each(factors: Tensor, matrices: Tensor) -> Tensor:
    """The factor of each group for all of its matrices."""
    return factors.to(matrices.dtype).repeat_interleave(len(matrices) // len(factors))[:, None, None]


def _form(block: Block) -> tuple[object, ...]:
    return block.names, block.shape, block.parts, block.B.shape, block.d, block.B.dtype, block.B.device
