"""Damped inverses and eigendecompositions of Kronecker factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

from lensor.choices import Method, words
from lensor.curvature.block import Block, eigh, factor_of_identity, trace_of_input, traces_of
from lensor.curvature.operators import Operator
from lensor.curvature.watching import uncast
from lensor.errors import require_choice
from lensor.kernels.torch.tensors import is_plain

RANK = 256
"""The number of eigenvalues that "low-rank" keeps, unless another one is given."""

_MORE = 16
"""Vectors in a subspace iteration besides those that are kept."""

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]


class EigenFactors(Operator):
    """Blocks as eigendecompositions: Q_B ⊗ Q_A times a diagonal matrix times the transpose of Q_B ⊗ Q_A.

    Args:
        blocks: the blocks.
        parts: Q_A [groups, d, d], Q_B [groups, c, c] and the eigenvalues [groups, c, d] of each block. The matrices may
            be stored in a dtype with lower precision.

    Example:
        >>> import torch
        >>> from lensor.curvature import kfac
        >>> factors = kfac(torch.nn.Linear(3, 2), torch.nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 2)))
        >>> eigen = factors.eigh()
        >>> vector = torch.randn(factors.size)
        >>> torch.allclose(eigen @ vector, factors @ vector, atol=1e-5)
        True
    """

    def __init__(self, blocks: Mapping[str, Block], parts: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__(blocks)
        self.parts = dict(parts)

    def _times(self, name: str, rows: Tensor) -> Tensor:
        q_a, q_b, values = self.parts[name]
        q_a, q_b = q_a.to(rows.dtype), q_b.to(rows.dtype)
        return q_b @ ((q_b.mT @ rows @ q_a) * values) @ q_a.mT

    @property
    def eigenvalues(self) -> dict[str, Tensor]:
        """The eigenvalues of each block, [groups, c, d]: products of an eigenvalue of B and one of A.

        Example:
            >>> import torch
            >>> from lensor.curvature import kfac
            >>> model, data = torch.nn.Linear(3, 2), (torch.randn(5, 3), torch.randn(5, 2))
            >>> kfac(model, torch.nn.MSELoss(), data).eigh().eigenvalues["weight"].shape
            torch.Size([1, 2, 3])
        """
        return {name: values for name, (_, _, values) in self.parts.items()}

    def inverse(self, damping: float) -> EigenFactors:
        """The damped inverse (self + λI)⁻¹.

        Raises:
            TypeError: for a damping that is not a number.
            ValueError: for a damping that is not positive.
        """
        _require_damping(damping)
        parts = {name: (q_a, q_b, 1 / (values + damping)) for name, (q_a, q_b, values) in self.parts.items()}
        return EigenFactors(self._blocks, parts)

    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det with the damping added to the diagonal.

        Raises:
            TypeError: for a damping that is not a number.
            ValueError: for a negative damping.
        """
        require_not_negative(damping)
        return torch.stack([torch.log(values + damping).sum() for _, _, values in self.parts.values()]).sum()

    def trace(self) -> Tensor:
        """The sum of the eigenvalues."""
        return torch.stack([values.sum() for _, _, values in self.parts.values()]).sum()


class Inverse(Operator):
    """The damped inverse of Kronecker factors; see `KroneckerFactors.inverse`.

    Example:
        >>> import torch
        >>> from lensor.curvature import kfac
        >>> factors = kfac(torch.nn.Linear(3, 2), torch.nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 2)))
        >>> inverse, vector = factors.inverse(damping=0.1), torch.randn(factors.size)
        >>> torch.allclose(inverse @ (factors @ vector + 0.1 * vector), vector, atol=1e-4)
        True
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        damping: float,
        method: Method,
        rank: int = RANK,
        starts: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(blocks)
        _require_damping(damping)
        require_choice("method", method, words(Method))
        if rank < 1:
            raise ValueError(f"rank is {rank}, expected at least 1")
        require_storage("dtype", dtype)
        self.damping, self.method, self.rank = damping, method, rank
        self._solvers: dict[str, _Solver] = {}
        several: dict[str, Block] = {}
        for name, block in blocks.items():
            if block.factored and method == "woodbury":
                several[name] = block
                continue
            way = _ONE[method] if block.factored else _Eigen
            with uncast(block.B):
                self._solvers[name] = way.of(name, block, _Request(damping, rank, (starts or {}).get(name)))
        if several:
            with uncast(next(iter(several.values())).B):
                self._solvers |= _Woodbury.of_all(several, damping)
        if dtype is not None:
            self._solvers = {name: one.stored(dtype) for name, one in self._solvers.items()}

    def single(self, name: str) -> Inverse:
        """The inverse of one block."""
        found = copy(self)
        found._blocks, found._solvers = {name: self._blocks[name]}, {name: self._solvers[name]}
        return found

    def unformed(self, name: str, vectors: Mapping[str, Tensor]) -> dict[str, PlusLowRank] | None:
        """The product of one block, as multiples of the vectors plus products of thin matrices.

        Returns:
            None if the product does not have this form, or would not take less time in it.
        """
        block, solver = self._blocks[name], self._solvers[name]
        if not isinstance(solver, _Woodbury) or solver.b is not None or block.groups > 1 or block.transposed:
            return None
        for vector in vectors.values():  # elsewhere, the numbers would have to be read from the device
            if vector.device.type != "cpu" or not is_plain(vector) or not vector.is_contiguous():
                return None
            if vector.dtype != solver.root.dtype or vector.dtype.itemsize < torch.float32.itemsize:
                return None
        with uncast(block.B):
            return solver.unformed(vectors)

    def bases(self) -> dict[str, Tensor]:
        """The vectors from which the "low-rank" inverses of similar blocks can start, by block."""
        return {name: one.basis for name, one in self._solvers.items() if isinstance(one, _LowRank)}

    def _options(self) -> str:
        return f"damping={self.damping}, method={self.method!r}, "

    def _times(self, name: str, rows: Tensor) -> Tensor:
        return self._solvers[name](rows).to(rows.dtype)


@dataclass(frozen=True, eq=False)
class PlusLowRank:
    """The tensor scale · vector + left · right, which is not formed.

    Args:
        vector: a tensor with one row for each of the first axis.
        scale: the number that it is multiplied by.
        left: [rows, rank].
        right: [rank, columns].
        projected: the vector times the transpose of `right`, [rows, rank].
    """

    vector: Tensor
    scale: float
    left: Tensor
    right: Tensor
    projected: Tensor

    def formed(self) -> Tensor:
        """The tensor."""
        return self.add_to(self.vector * self.scale, with_vector=False)

    def with_vector(self) -> Tensor:
        """The inner product of the tensor with `vector`."""
        flat = self.vector.reshape(-1)
        return self.scale * torch.dot(flat, flat) + torch.dot(self.left.reshape(-1), self.projected.reshape(-1))

    def add_to(self, target: Tensor, beta: float = 1.0, alpha: float = 1.0, with_vector: bool = True) -> Tensor:
        """Replace a contiguous tensor by beta · target + alpha · this tensor, and return it."""
        target.view(len(target), -1).addmm_(self.left, self.right, beta=beta, alpha=alpha)
        return target.add_(self.vector, alpha=alpha * self.scale) if with_vector else target


@dataclass(frozen=True, eq=False)
class _Request:
    """What is asked of an inverse: the damping, the rank, and the vectors that an iteration starts from."""

    damping: float
    rank: int
    start: Tensor | None


@dataclass(frozen=True, eq=False)
class _Eigen:
    """Q_B ⊗ Q_A times `over` times the transpose; rows outside Q_A's span are divided by `damping` if it is set."""

    q_a: Tensor
    q_b: Tensor
    over: Tensor
    damping: float | None

    @classmethod
    def of(cls, name: str, block: Block, asked: _Request) -> Self:
        damping = asked.damping
        b, q_b = eigh(block.B)
        b = b.clamp_min(0)
        if block.root is None:
            a, q_a = eigh(block.A)
        else:  # on the orthogonal complement of the root's rows, all eigenvalues are 0
            _, singular, q_at = torch.linalg.svd(block.root, full_matrices=False)
            a, q_a = singular.square(), q_at.mT
        over = 1 / (b[:, :, None] * a.clamp_min(0)[:, None, :] + damping)
        if block.root is None:
            return cls(q_a, q_b, over, None)
        return cls(q_a, q_b, over - 1 / damping, damping)

    def stored(self, dtype: torch.dtype) -> Self:
        """The same with matrices in another dtype, unless the result is a difference of two terms."""
        return self if self.damping is not None else replace(self, q_a=self.q_a.to(dtype), q_b=self.q_b.to(dtype))

    def __call__(self, rows: Tensor) -> Tensor:
        inside = _product(self.q_b.mT, _product(rows, self.q_a)) * self.over
        inside = _product(_product(self.q_b, inside), self.q_a.mT)
        return inside if self.damping is None else inside + rows / self.damping


@dataclass(frozen=True, eq=False)
class _Cholesky:
    """The damped inverses of B and of A; `b` is one number per group if B is a multiple of the identity."""

    a: Tensor
    b: Tensor
    plain: bool

    @classmethod
    def of(cls, name: str, block: Block, asked: _Request) -> Self | _Woodbury:
        on_a, on_b = _factored(block, asked.damping)
        c = _multiple_of_identity(block.B)
        b = _damped_inverse(f"B of {name}", block.B, on_b) if c is None else 1 / (c + on_b)
        if block.root is not None and 2 * block.root.shape[1] < block.d:  # products with the root take less time
            return _Woodbury.through({name: _Rooted(block.root, on_a, b, c is not None)})[name]
        return cls(_damped_inverse(f"A of {name}", block.A, on_a), b, c is not None)

    def stored(self, dtype: torch.dtype) -> Self:
        """The same with matrices in another dtype."""
        return replace(self, a=self.a.to(dtype), b=self.b if self.plain else self.b.to(dtype))

    def __call__(self, rows: Tensor) -> Tensor:
        return _product(rows * self.b if self.plain else _product(self.b, rows), self.a)


class _Rooted(NamedTuple):
    """A root of A, the damping of A, and B's damped inverse, which is a number if B is a multiple of the identity."""

    root: Tensor
    on_a: Tensor | float
    b: Tensor | float
    plain: bool


@dataclass(frozen=True, eq=False)
class _Woodbury:
    """B's damped inverse times A's: `scale` times the identity, plus rootᵀ `inner` root.

    `b` is B's damped inverse, or None if B is a multiple of the identity; its inverse is then part of the other two.
    """

    root: Tensor
    inner: Tensor
    scale: Tensor | float
    b: Tensor | None

    @classmethod
    def of_all(cls, blocks: Mapping[str, Block], damping: float) -> dict[str, Self]:
        """The inverses of several blocks."""
        parts: dict[str, _Rooted] = {}
        for name, block in blocks.items():
            if block.root is None:
                raise ValueError(f"{name} has no root, expected approx='reduce' and fewer examples than rows of A")
            c = _multiple_of_identity(block.B)
            if c is not None:
                parts[name] = _Rooted(block.root, damping / c, 1 / c, True)
            else:
                on_a, on_b = _factored(block, damping)
                parts[name] = _Rooted(block.root, on_a, _damped_inverse(f"B of {name}", block.B, on_b), False)
        return cls.through(parts)

    @classmethod
    def through(cls, parts: Mapping[str, _Rooted]) -> dict[str, Self]:
        """The inverses for roots of A. Small matrices of one size are inverted together."""
        grams: dict[Any, dict[str, Tensor]] = {}
        for name, (root, on_a, _, _) in parts.items():
            kind = name if isinstance(on_a, Tensor) else (on_a, root.shape[:2], root.dtype, root.device)
            grams.setdefault(kind, {})[name] = root @ root.mT
        found = {}
        for some in grams.values():
            first = next(iter(some))
            what = f"the root's Gram matrix of {first}{' or another block' if len(some) > 1 else ''}"
            stacked = torch.stack([*some.values()]) if len(some) > 1 else some[first][None]
            on_a = parts[first].on_a
            inner = _damped_inverse(what, stacked, on_a)
            for name, one in zip(some, inner.unbind(0), strict=True):
                root, on_a, b, plain = parts[name]
                scale = b / on_a if plain else 1 / on_a
                found[name] = cls(root, one * -scale, scale, b if isinstance(b, Tensor) and not plain else None)
        return {name: found[name] for name in parts}

    def stored(self, dtype: torch.dtype) -> Self:
        """The same with B's inverse in another dtype.

        The root keeps its own: the identity times `scale` and the product nearly cancel where A is large, so that
        rounding errors would be larger than the result.
        """
        return self if self.b is None else replace(self, b=self.b.to(dtype))

    def __call__(self, rows: Tensor) -> Tensor:
        inside, scaled = (rows @ self.root.mT) @ self.inner, rows * self.scale
        solved = _plus_product(scaled, inside, self.root)
        return solved if self.b is None else _product(self.b, solved)

    def unformed(self, vectors: Mapping[str, Tensor]) -> dict[str, PlusLowRank]:
        """The product for one group and B = 1, where the last column of the root belongs to a joint bias."""
        root, inner, scale = self.root[0], self.inner[0], float(self.scale)
        rows = [vector.view(len(vector), -1) for vector in vectors.values()]
        roots = root.split([one.shape[1] for one in rows], 1)
        projected = [one @ part.mT for one, part in zip(rows, roots, strict=True)]
        left = (projected[0] if len(projected) == 1 else projected[0] + projected[1]) @ inner
        return {
            name: PlusLowRank(vector, scale, left, part, one)
            for (name, vector), part, one in zip(vectors.items(), roots, projected, strict=True)
        }


@dataclass(frozen=True, eq=False)
class _LowRank:
    """A with its largest eigenvalues, and the mean of the others on the rest of the space.

    The damped inverse of A is `rest` times the identity, plus `inner` on the eigenvectors `q`; `b` is B's damped
    inverse.
    """

    q: Tensor
    inner: Tensor
    rest: Tensor
    b: Tensor
    basis: Tensor

    @classmethod
    def of(cls, name: str, block: Block, asked: _Request) -> Self | _Cholesky | _Woodbury:
        if 4 * asked.rank > block.d:  # products with A's inverse take no longer
            return _Cholesky.of(name, block, asked)
        on_a, on_b = _factored(block, asked.damping)
        values, basis = _largest(block, asked)
        values, q = values[:, -asked.rank :], basis[..., -asked.rank :]
        rest = trace_of_input(block) - values.sum(-1)
        rest = rest.clamp_min(0)[:, None, None] / (block.d - values.shape[-1])
        inner = 1 / (values[:, None] + on_a) - 1 / (rest + on_a)
        return cls(q, inner, 1 / (rest + on_a), _damped_inverse(f"B of {name}", block.B, on_b), basis)

    def stored(self, dtype: torch.dtype) -> Self:
        """The same with matrices in another dtype."""
        basis = self.basis.to(dtype)
        return replace(self, q=basis[..., -self.q.shape[-1] :], b=self.b.to(dtype), basis=basis)

    def __call__(self, rows: Tensor) -> Tensor:
        solved = _plus_product(rows * self.rest, _product(rows, self.q) * self.inner, self.q.mT)
        return _product(self.b, solved)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, in the dtype of the one with the lower precision."""
    if a.dtype != b.dtype:
        dtype = min(a.dtype, b.dtype, key=lambda one: one.itemsize)
        a, b = a.to(dtype), b.to(dtype)
    return a @ b


def _plus_product(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """rows + a b, which may overwrite `rows`."""
    if rows.ndim == 3 and rows.dtype == a.dtype == b.dtype and is_plain(rows) and is_plain(a) and is_plain(b):
        return rows.baddbmm_(a, b)
    return rows + _product(a, b)


def _largest(block: Block, asked: _Request) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of A [groups, k] in ascending order, and their eigenvectors [groups, d, k].

    They are exact if A has a root of few rows. Otherwise, they are those of the Nyström approximation of A on a
    subspace (Halko, Martinsson & Tropp, 2011): the one that is given, or the image of random vectors.
    """
    root = block.root
    if root is not None and root.shape[1] <= 2 * asked.rank:
        values, left = torch.linalg.eigh(root @ root.mT)
        least = torch.finfo(values.dtype).eps * block.d * values.amax(-1, keepdim=True)
        over = torch.where(values > least, values, torch.inf).rsqrt()
        return values.clamp_min(0), root.mT @ (left * over[:, None])
    a, q, count = block.A if root is None else _Gram(root), asked.start, min(asked.rank + _MORE, block.d)
    generator = torch.Generator().manual_seed(0)
    q = None if q is None else q.to(block.B.dtype)
    if q is None or q.shape != (block.groups, block.d, count):
        random = torch.randn(block.d, count, generator=generator)
        q = torch.linalg.qr(a @ random.to(block.B)).Q
    elif count > asked.rank:  # random vectors, because A may have directions that the given subspace lacks
        random = torch.randn(block.d, count - asked.rank, generator=generator).to(block.B).expand(block.groups, -1, -1)
        q = torch.linalg.qr(torch.cat([q[..., -asked.rank :], a @ random], 2)).Q
    image = a @ q
    inside, turn = torch.linalg.eigh(q.mT @ image)
    least = torch.finfo(inside.dtype).eps * count * inside.amax(-1, keepdim=True)
    over = torch.where(inside > least, inside, torch.inf).rsqrt()
    found = torch.linalg.qr(image @ (turn * over[:, None]))  # A is approximately this matrix times its transpose
    values, turn = torch.linalg.eigh(found.R @ found.R.mT)
    return values.clamp_min(0), found.Q @ turn


@dataclass(frozen=True, eq=False)
class _Gram:
    """The matrix rootᵀ root, which is not formed."""

    root: Tensor

    def __matmul__(self, columns: Tensor) -> Tensor:
        return self.root.mT @ (self.root @ columns)


_Solver: TypeAlias = _Eigen | _Cholesky | _Woodbury | _LowRank

_ONE: dict[str, type[_Eigen] | type[_Cholesky] | type[_LowRank]] = {
    "eigen": _Eigen,
    "cholesky": _Cholesky,
    "low-rank": _LowRank,
}
"""The class that inverts one block, by method name; "woodbury" inverts several together."""


def _factored(block: Block, damping: float) -> tuple[Tensor, Tensor]:
    """The damping to add to the diagonals of A and of B, each [groups, 1, 1]."""
    mean_a, mean_b = trace_of_input(block) / block.d, traces_of(block.B) / block.B.shape[1]
    ratio = (mean_a / mean_b).sqrt()
    ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio))[:, None, None]
    return ratio * damping**0.5, damping**0.5 / ratio


def _multiple_of_identity(matrix: Tensor) -> Tensor | float | None:
    """The positive numbers c [groups, 1, 1] whose products with the identity are the matrices; None if they are not."""
    known = factor_of_identity(matrix)
    if known is not None:
        return known if known > 0 else None
    c = matrix[:, :1, :1]
    entries = matrix.diagonal(dim1=-2, dim2=-1)
    if bool((entries == c[..., 0]).all() & (c > 0).all()) and int(matrix.count_nonzero()) == entries.numel():
        return c
    return None


def _damped_inverse(what: str, matrix: Tensor, damping: Tensor | float) -> Tensor:
    damped = matrix.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping[..., 0] if isinstance(damping, Tensor) and damping.ndim else damping)
    damped = damped.mT  # the columns of a matrix are contiguous in LAPACK
    in_place = damped.device.type == "cpu" and is_plain(damped) and not damped.requires_grad
    if in_place:
        lower, info = damped, torch.empty(damped.shape[:-2], dtype=torch.int32)
        torch.linalg.cholesky_ex(damped, out=(lower, info))
    else:
        lower, info = torch.linalg.cholesky_ex(damped)
    if bool(info.any()):
        raise LinAlgError(f"{what} with this damping is not positive definite, expected a larger damping")
    found = torch.cholesky_inverse(lower, out=lower) if in_place else torch.cholesky_inverse(lower)
    return found.mT


def require_storage(name: str, dtype: torch.dtype | None) -> None:
    """Raise unless a dtype can store factors and inverses.

    Raises:
        TypeError: if it is not a floating dtype.
        ValueError: for float16, in which factors overflow.
    """
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{name} is {dtype}, expected a floating dtype such as torch.bfloat16")
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name} is {dtype}, whose range is too small, expected torch.bfloat16, float32 or float64")


def _require_number(damping: float) -> None:
    if not isinstance(damping, (Real, Tensor)):
        raise TypeError(f"damping is {damping!r} of type {type(damping).__name__}, expected a number")


def _require_damping(damping: float) -> None:
    _require_number(damping)
    if not damping > 0 or not math.isfinite(damping):
        raise ValueError(f"damping is {damping}, expected a positive number")


def require_not_negative(damping: float) -> None:
    """Raise for a damping that is negative or not a number."""
    _require_number(damping)
    if not damping >= 0 or not math.isfinite(damping):
        raise ValueError(f"damping is {damping}, expected at least 0")
