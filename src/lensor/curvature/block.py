"""The curvature of one layer: two Kronecker factors and the parameters that they belong to."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lensor.curvature.structure import blocks_times, times_blocks
from lensor.curvature.watching import uncast

Vectors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Block:
    """One block of the curvature: kron(B, A) for every group, for a weight, a bias, or both together.

    Rows are in the row-major order of `[groups, rows of B, rows of A]`. For a convolution this is the order of the
    weight, `g c_out (c_in k)`. For a transposed convolution, c_out also comes first within a group.

    Args:
        names: the parameters, the weight first.
        shape: the shape of the first parameter.
        transposed: whether the weight has the input channels first.
        formed: A [groups, d, d], or None if only its root is stored.
        root: [groups, n, d] with A = rootᵀ root, or None.
        B: [groups, c, c].
        positions: number of spatial positions of the layer's output, over all its uses; 0 if it differs between
            batches.
        factored: whether the block is a Kronecker product; otherwise A is 1, and B is the block itself, or one number
            per group for its diagonal.
        parts: the number of diagonal blocks of A and of B in each group. If it is not 1, only these blocks are stored:
            A has the shape [groups · parts, d/parts, d/parts], and its root and B are stored likewise.

    Example:
        >>> import torch
        >>> from lensor.curvature import kfac
        >>> data = torch.randn(5, 4, 6, 6), torch.randn(5, 2, 4, 4)
        >>> block = kfac(torch.nn.Conv2d(4, 2, 3, groups=2), torch.nn.MSELoss(), data, bias="separate")["weight"]
        >>> block.names, block.A.shape, block.B.shape, block.positions
        (('weight',), torch.Size([2, 18, 18]), torch.Size([2, 1, 1]), 16)
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool
    formed: Tensor | None
    root: Tensor | None
    B: Tensor
    positions: int
    factored: bool = True
    parts: tuple[int, int] = (1, 1)

    def __repr__(self) -> str:
        return f"Block({', '.join(map(repr, self.names))}, {self.form})"

    @property
    def form(self) -> str:
        """The sizes of the factors as text."""
        if not self.factored:
            return f"dense {self.B.shape[1]}²" if self.groups == 1 else f"diagonal of {self.groups} entries"
        rows = "" if self.root is None else f", A's root of {self.root.shape[1]} rows"
        a, b = (f"{count} × " if count > 1 else "" for count in self.parts)
        return f"{self.groups} × kron(B {b}{self.B.shape[1]}², A {a}{self.d // self.parts[0]}²){rows}"

    @property
    def A(self) -> Tensor:
        """The input factor, [groups, d, d]; computed at each access if only its root is stored."""
        if self.formed is not None:
            return self.formed
        assert self.root is not None
        with uncast(self.root):
            return self.root.mT @ self.root

    @property
    def groups(self) -> int:
        """Number of channel groups."""
        return len(self.B) // self.parts[1]

    @property
    def c(self) -> int:
        """Number of rows of B."""
        return self.B.shape[1] * self.parts[1]

    @property
    def d(self) -> int:
        """Number of rows of A."""
        known = self.formed if self.formed is not None else self.root
        assert known is not None
        return known.shape[-1] * self.parts[0]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter."""
        return dict(zip(self.names, (self.shape, (self.groups * self.c,)), strict=False))

    def to_rows(self, vectors: Vectors) -> Tensor:
        """Convert parameter values to [..., groups, rows of B, rows of A]; leading axes are preserved."""
        first = vectors[self.names[0]]
        front = first.shape[: first.ndim - len(self.shape)]
        c = self.c
        if self.transposed:
            inner, kernel = self.shape[0] // self.groups, math.prod(self.shape[2:])
            rows = first.reshape(*front, self.groups, inner, c, kernel).transpose(-3, -2)
            rows = rows.reshape(*front, self.groups, c, inner * kernel)
        else:
            rows = first.reshape(*front, self.groups, c, -1)
        if len(self.names) == 2:
            rows = torch.cat([rows, vectors[self.names[1]].reshape(*front, self.groups, c, 1)], -1)
        return rows

    def from_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """Convert rows back to parameter values: the inverse of `to_rows`."""
        front, c, found = rows.shape[:-3], self.c, {}
        if len(self.names) == 2:
            found[self.names[1]] = rows[..., -1].reshape(*front, self.groups * c)
            rows = rows[..., :-1]
        if self.transposed:
            inner, kernel = self.shape[0] // self.groups, math.prod(self.shape[2:])
            rows = rows.reshape(*front, self.groups, c, inner, kernel).transpose(-3, -2)
        return {self.names[0]: rows.reshape((*front, *self.shape))} | found

    def product(self, rows: Tensor) -> Tensor:
        """Multiply kron(B, A) by vectors in row form."""
        rows = blocks_times(self.B, rows)
        if self.root is None or self.parts[0] > 1:
            return times_blocks(rows, self.A)
        return (rows @ self.root.mT) @ self.root

    def scaled(self, a: float, b: float) -> Block:
        """The block with A times `a` and B times `b`; without Kronecker factors, B times both."""
        if not self.factored:
            return replace(self, B=self.B * (a * b))
        return replace(
            self,
            formed=None if self.formed is None else self.formed * a,
            root=None if self.root is None else self.root * a**0.5,
            B=self.B * b,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the block, by name."""
        found = {"A": self.formed, "root": self.root, "B": self.B}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def dense(self) -> Tensor:
        """kron(B, A) for every group, [groups, c·d, c·d]; for tests and small layers only."""
        a, b = ([torch.block_diag(*some) for some in one.unflatten(0, (self.groups, -1))] for one in (self.A, self.B))
        return torch.stack([torch.kron(*both) for both in zip(b, a, strict=True)])


def require_alike(name: str, one: Block, other: Block | None) -> None:
    """Raise unless the factors of the two blocks can be added to each other.

    Raises:
        ValueError: if the blocks differ; the message states how.
    """

    def text(block: Block | None) -> str:
        return "none" if block is None else f"{block.names}, {block.form}, {block.B.dtype} on {block.B.device}"

    keys = [
        None
        if block is None
        else (block.names, block.transposed, block.factored, block.B.shape, block.d, block.B.dtype, block.B.device)
        for block in (one, other)
    ]
    if keys[0] != keys[1]:
        raise ValueError(f"block {name} is {text(other)} in the other factors, expected {text(one)}")


def block_of(name: str, state: Any) -> Block:
    """Restore a block from its entry in a state.

    Raises:
        ValueError: if the entry is invalid; the message states why.
    """

    def damaged(what: str) -> ValueError:
        return ValueError(f"the state of the Kronecker factors is invalid: block {name} {what}")

    try:
        block = Block(
            tuple(map(str, state["names"])),
            tuple(map(int, state["shape"])),
            bool(state["transposed"]),
            state.get("A"),
            state.get("root"),
            state["B"],
            int(state["positions"]),
            bool(state.get("factored", True)),
            (int(state.get("parts", (1, 1))[0]), int(state.get("parts", (1, 1))[1])),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(f"cannot be read ({type(error).__name__}: {error})") from None
    if len(block.names) not in (1, 2) or block.names[0] != name:
        raise damaged(f"has the parameters {block.names}, expected {name}, alone or followed by a bias")
    if (block.formed is None) == (block.root is None):
        raise damaged("has both A and its root, or neither, expected exactly one of them")
    which = "A" if block.root is None else "root"
    for key, tensor in (("B", block.B), (which, block.formed if block.root is None else block.root)):
        if not isinstance(tensor, Tensor) or tensor.ndim != 3 or not tensor.is_floating_point():
            raise damaged(f"has an invalid {key}, expected a tensor of real numbers with three axes")
        if key != "root" and tensor.shape[1] != tensor.shape[2]:
            raise damaged(f"has {key} of shape {tuple(tensor.shape)}, expected square matrices")
        count = block.groups * block.parts[key == "B"]
        if (tensor.shape[0], tensor.dtype, tensor.device) != (count, block.B.dtype, block.B.device):
            raise damaged(f"has {key} and B with different groups, dtypes or devices, expected the same")
    if not block.factored and (block.formed is None or block.d != 1 or len(block.names) != 1):
        raise damaged(f"has the factors {block.form} and parameters {block.names}, expected A of one row")
    c, more = block.c, len(block.names) - 1
    fits = math.prod(block.shape) == block.groups * c * (block.d - more)
    if block.transposed:
        fits = fits and len(block.shape) > 1 and block.shape[1] == c and block.shape[0] % block.groups == 0
    if not fits:
        raise damaged(f"has the factors {block.form}, expected factors for a parameter of shape {block.shape}")
    return block


def plain_block(name: str, shape: tuple[int, ...], values: Tensor) -> Block:
    """The block of a parameter without Kronecker factors.

    Args:
        name: the parameter.
        shape: its shape.
        values: the block [entries, entries], or its diagonal [entries].
    """
    b = values[:, None, None] if values.ndim == 1 else values[None]
    a = b.new_ones(1, 1, 1).expand(len(b), 1, 1)
    return Block((name,), shape, False, a, None, b, positions=1, factored=False)


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices; matrices with one row need no decomposition."""
    if matrices.shape[-1] == 1:
        return matrices[..., 0], torch.ones_like(matrices)
    values, vectors = torch.linalg.eigh(matrices)
    return values, vectors


def eigvalsh(matrices: Tensor) -> Tensor:
    """Eigenvalues of symmetric matrices."""
    return matrices[..., 0] if matrices.shape[-1] == 1 else torch.linalg.eigvalsh(matrices)


_multiples: dict[int, tuple[weakref.ref[Tensor], int, float]] = {}
"""Known multiples of the identity by id, with their versions when they were made and their factors."""


def multiple_of_identity(groups: int, size: int, factor: float, like: Tensor) -> Tensor:
    """`factor` times the identity for each group, [groups, size, size], with dtype and device of a tensor."""
    found = like.new_zeros(groups, size, size)
    found.diagonal(dim1=-2, dim2=-1).fill_(factor)
    if not found.is_inference():  # such tensors have no versions
        number = id(found)
        _multiples[number] = weakref.ref(found, lambda _: _multiples.pop(number, None)), found._version, factor
    return found


def factor_of_identity(matrices: Tensor) -> float | None:
    """The factor of a result of `multiple_of_identity` that nothing has written into; None for other tensors."""
    known = _multiples.get(id(matrices))
    if known is None or known[0]() is not matrices or matrices._version != known[1]:
        return None
    return known[2]


def traces_of(matrices: Tensor) -> Tensor:
    """The trace of each matrix."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def trace_of_input(block: Block) -> Tensor:
    """The trace of A for each group, which is not formed if its root is stored."""
    return traces_of(block.A) if block.root is None else block.root.square().sum((1, 2))


def each_factor(block: Block, function: Any) -> Block:
    """Apply a function to each tensor of a block."""
    return replace(
        block,
        formed=None if block.formed is None else function(block.formed),
        root=None if block.root is None else function(block.root),
        B=function(block.B),
    )
