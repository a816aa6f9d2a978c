"""Kronecker factors of which only diagonal blocks are computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lensor import ops
from lensor.curvature.networks import of_one
from lensor.spec import ConvSpec, known_spec


@dataclass(frozen=True)
class DiagonalBlocks:
    """Diagonal blocks of equal size: of A over the input channels of a group, and of B over its output channels.

    Args:
        size: the largest number of rows of a block, or 1 for diagonals. A block of A otherwise contains all kernel
            positions of its channels, so it has at least that many rows.
    """

    size: int

    def rows_of_input(self, channels: int, kernel: int) -> int:
        """The number of rows of a block of A.

        Args:
            channels: number of input channels of a group.
            kernel: number of kernel positions.

        Example:
            >>> from lensor.curvature.structure import DiagonalBlocks
            >>> [DiagonalBlocks(size).rows_of_input(channels=12, kernel=9) for size in (64, 1)]
            [54, 1]
        """
        return 1 if self.size == 1 else kernel * _divisor(channels, self.size // kernel)

    def rows_of_output(self, channels: int) -> int:
        """The number of rows of a block of B, for the number of output channels of a group."""
        return _divisor(channels, self.size)

    def input_factor(self, spec: ConvSpec, x: Tensor) -> Tensor:
        """The diagonal blocks of the input factor of "expand", [blocks of all groups, rows, rows].

        Blocks over channels are the factor of a convolution with more groups. The diagonal is the sum of the patches of
        the squared input.

        Args:
            spec: the convolution.
            x: the input, [batch, channels, *positions].
        """
        kernel = math.prod(spec.kernel_size)
        rows = self.rows_of_input(spec.in_channels // spec.groups, kernel)
        fine = with_groups(spec, spec.in_channels * kernel // rows if self.size > 1 else spec.in_channels)
        if self.size > 1:
            return of_one(ops.kfac_input_factor, fine, x)
        means = of_one(ops.kfac_input_root, fine, x.square())
        return means.mean(1).mul_(math.prod(spec.output_size)).view(-1, 1, 1)

    def output_spec(self, spec: ConvSpec) -> ConvSpec:
        """The convolution with the diagonal blocks of B as its output factor."""
        return with_groups(spec, spec.out_channels // self.rows_of_output(spec.out_channels // spec.groups))

    def split_root(self, root: Tensor, kernel: int) -> Tensor:
        """The roots of the diagonal blocks, [blocks of all groups, n, rows], of a root of A [groups, n, d].

        Args:
            root: the root.
            kernel: number of kernel positions.
        """
        rows = self.rows_of_input(root.shape[2] // kernel, kernel)
        return root.unflatten(2, (-1, rows)).transpose(1, 2).flatten(0, 1)


def with_groups(spec: ConvSpec, groups: int) -> ConvSpec:
    """A convolution with other groups: its input factor, and with equally many output channels its output factor."""
    outer = spec.out_channels if spec.out_channels % groups == 0 else groups
    return known_spec(
        spec.in_channels,
        outer,
        spec.input_size,
        spec.kernel_size,
        stride=spec.stride,
        padding=spec.padding,
        dilation=spec.dilation,
        groups=groups,
        padding_mode=spec.padding_mode,
        transposed=spec.transposed,
        output_padding=spec.output_padding,
    )


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is at most `most`, and at least 1."""
    return next((one for one in range(min(number, most), 1, -1) if number % one == 0), 1)


def times_blocks(rows: Tensor, matrices: Tensor) -> Tensor:
    """Rows [..., groups, c, d] times block-diagonal matrices, given as blocks [groups · parts, d/parts, d/parts].

    Example:
        >>> import torch
        >>> from lensor.curvature.structure import times_blocks
        >>> rows, blocks = torch.randn(1, 3, 4), torch.randn(2, 2, 2)
        >>> torch.allclose(times_blocks(rows, blocks), rows @ torch.block_diag(*blocks), atol=1e-6)
        True
    """
    groups, size = rows.shape[-3], matrices.shape[-1]
    parts = len(matrices) // groups
    if parts == 1:
        return rows @ matrices
    if size == 1:
        return rows * matrices.view(groups, 1, parts)
    split = rows.unflatten(-1, (parts, size)).transpose(-3, -2)
    return (split @ matrices.unflatten(0, (groups, parts))).transpose(-3, -2).flatten(-2)


def blocks_times(matrices: Tensor, rows: Tensor) -> Tensor:
    """Block-diagonal matrices, given as blocks [groups · parts, c/parts, c/parts], times rows [..., groups, c, d].

    Example:
        >>> import torch
        >>> from lensor.curvature.structure import blocks_times
        >>> rows, blocks = torch.randn(1, 4, 3), torch.randn(2, 2, 2)
        >>> torch.allclose(blocks_times(blocks, rows), torch.block_diag(*blocks) @ rows, atol=1e-6)
        True
    """
    groups, size = rows.shape[-3], matrices.shape[-1]
    parts = len(matrices) // groups
    if parts == 1:
        return matrices @ rows
    if size == 1:
        return rows * matrices.view(groups, parts, 1)
    return (matrices.unflatten(0, (groups, parts)) @ rows.unflatten(-2, (parts, size))).flatten(-3, -2)
