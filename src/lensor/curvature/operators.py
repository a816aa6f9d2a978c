"""Linear operators on the parameters of a model: products with named and with flat vectors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from lensor.curvature.block import Block, Vectors
from lensor.curvature.watching import uncast


class Operator(ABC):
    """A symmetric block-diagonal operator on the parameters of a model's layers.

    Operands are mappings from parameter names to tensors with the parameters' shapes, after any number of leading axes
    (for a matrix–matrix product), or one tensor whose last axis contains all parameters, flattened in order.

    Args:
        blocks: the blocks, by the name of their first parameter.
    """

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        self._blocks = dict(blocks)

    def __repr__(self) -> str:
        count = len(self._blocks)
        return f"{type(self).__name__}({self._options()}{count} block{'s' * (count != 1)})"

    def __copy__(self) -> Self:
        """A new operator that shares the tensors; replacing its blocks does not affect the original."""
        found = object.__new__(type(self))
        vars(found).update({name: dict(one) if isinstance(one, dict) else one for name, one in vars(self).items()})
        return found

    def _options(self) -> str:
        """The operator's options, as its repr shows them."""
        return ""

    @abstractmethod
    def _times(self, name: str, rows: Tensor) -> Tensor:
        """Multiply one block by vectors in row form."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, in the order of flat vectors."""
        return {name: shape for block in self._blocks.values() for name, shape in block.shapes.items()}

    @property
    def size(self) -> int:
        """Total number of parameters."""
        return sum(map(math.prod, self.shapes.values()))

    def __matmul__(self, vectors: Any) -> Any:
        """The product with one or several vectors.

        Raises:
            TypeError: for an operand that is neither a tensor nor a mapping of tensors of the factors' dtype.
            KeyError: if a parameter is missing or unknown.
            ValueError: for a shape that does not match the operator.
        """
        if isinstance(vectors, Tensor):
            return self.flatten(self @ self.unflatten(vectors))
        self._check(vectors)
        found: dict[str, Tensor] = {}
        for name in self._blocks:
            found |= self.block_product(name, vectors)
        return {name: found[name] for name in vectors}

    def block_product(self, name: str, vectors: Vectors) -> dict[str, Tensor]:
        """The product of one block with vectors for its parameters, which are not checked."""
        block = self._blocks[name]
        with uncast(block.B):
            return block.from_rows(self._times(name, block.to_rows(vectors)))

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Convert a tensor with all parameters in its last axis to a mapping.

        Raises:
            ValueError: if the last axis has a different size.
        """
        if vector.shape[-1:] != (self.size,):
            raise ValueError(
                f"the vector has shape {tuple(vector.shape)}, expected {self.size} entries in its last axis"
            )
        parts = vector.split([math.prod(shape) for shape in self.shapes.values()], -1)
        front = vector.shape[:-1]
        return {n: p.reshape((*front, *shape)) for (n, shape), p in zip(self.shapes.items(), parts, strict=True)}

    def flatten(self, vectors: Vectors) -> Tensor:
        """Convert a mapping to one tensor with all parameters in its last axis: the inverse of `unflatten`."""
        self._check(vectors)
        flat = [
            vectors[name].reshape(*vectors[name].shape[: vectors[name].ndim - len(shape)], math.prod(shape))
            for name, shape in self.shapes.items()
        ]
        return torch.cat(flat, -1)

    def linear_operator(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator` on flat NumPy vectors; float32 for bfloat16 factors.

        Raises:
            ModuleNotFoundError: if SciPy is not installed.
        """
        from scipy.sparse.linalg import LinearOperator

        like = next(iter(self._blocks.values())).B
        outside = torch.float32 if like.dtype == torch.bfloat16 else like.dtype  # NumPy has no bfloat16
        product = _FlatProduct(self, like.dtype, like.device, outside)
        kind = torch.zeros((), dtype=outside).numpy().dtype
        options: dict[str, Any] = {"matvec": product, "matmat": product, "rmatvec": product, "rmatmat": product}
        return LinearOperator(shape=(self.size, self.size), dtype=kind, **options)  # type: ignore[call-arg]

    def _check(self, vectors: Vectors) -> None:
        if not isinstance(vectors, Mapping):
            kind = type(vectors).__name__
            raise TypeError(f"the vector is of type {kind}, expected a tensor or a mapping from parameters to tensors")
        dtype, shapes = next(iter(self._blocks.values())).B.dtype, self.shapes
        if set(vectors) != set(shapes):
            missing, more = sorted(set(shapes) - set(vectors)), sorted(set(vectors) - set(shapes))
            raise KeyError(f"the vector has missing parameters {missing} and unknown ones {more}, expected none")
        fronts = set()
        for name, shape in shapes.items():
            if not isinstance(vectors[name], Tensor) or vectors[name].dtype != dtype:
                kind = getattr(vectors[name], "dtype", type(vectors[name]).__name__)
                hint = ": it has no gradient, or is frozen" if vectors[name] is None else ""
                raise TypeError(f"{name} is {kind}, expected a tensor of the factors' {dtype}{hint}")
            found = tuple(vectors[name].shape)
            cut = len(found) - len(shape)
            if cut < 0 or found[cut:] != shape:
                raise ValueError(f"{name} has shape {found}, expected {shape} after any leading axes")
            fronts.add(found[:cut])
        if len(fronts) > 1:
            raise ValueError(f"the vector has leading axes {sorted(fronts)}, expected the same for every parameter")


@dataclass(frozen=True, eq=False)
class _FlatProduct:
    """The product of an operator and flat NumPy vectors, [size] or [size, columns]."""

    operator: Operator
    dtype: torch.dtype
    device: torch.device
    outside: torch.dtype

    def __call__(self, vector: Any) -> Any:
        tensor = torch.as_tensor(vector, dtype=self.dtype, device=self.device)
        columns = tensor.reshape(self.operator.size, -1).mT
        return (self.operator @ columns).mT.reshape(tensor.shape).cpu().to(self.outside).numpy()
