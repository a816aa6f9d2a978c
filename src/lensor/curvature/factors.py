"""Kronecker factors of a model as a mapping and as a linear operator: products, inverses, determinants, averages."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from lensor.conventions import MODEL_CONVENTIONS
from lensor.curvature.watching import uncast
from lensor.errors import require_choice

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]

Vectors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Block:
    """One block of the curvature: kron(B, A) for every group, of a weight, a bias, or both together.

    Rows are in the row-major order of `[groups, rows of B, rows of A]`. For a convolution that is the weight's own
    order, `g c_out (c_in k)`; for a transposed convolution c_out stands first among a group's channels, too.

    Args:
        names: the parameters, the weight first.
        shape: the first parameter's shape.
        transposed: whether it has the input's channels first.
        formed: A [groups, d, d], or None while its root is kept.
        root: [groups, n, d] with A = rootᵀ root, or None.
        B: [groups, c, c].
        positions: positions of the layer's output; 0 if they differ between batches.

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

    def __repr__(self) -> str:
        return f"Block({', '.join(map(repr, self.names))}, {self.form})"

    @property
    def form(self) -> str:
        """The factors' sizes as text."""
        rows = "" if self.root is None else f", A's root of {self.root.shape[1]} rows"
        return f"{self.groups} × kron(B {self.B.shape[1]}², A {self.d}²){rows}"

    @property
    def A(self) -> Tensor:
        """The input factor, [groups, d, d]; formed anew where its root is kept."""
        if self.formed is not None:
            return self.formed
        assert self.root is not None
        with uncast(self.root):
            return self.root.mT @ self.root

    @property
    def groups(self) -> int:
        """Groups of channels."""
        return len(self.B)

    @property
    def d(self) -> int:
        """Rows of A."""
        known = self.formed if self.formed is not None else self.root
        assert known is not None
        return known.shape[-1]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter."""
        return dict(zip(self.names, (self.shape, (self.groups * self.B.shape[1],)), strict=False))

    def to_rows(self, vectors: Vectors) -> Tensor:
        """Parameters' values as [..., groups, rows of B, rows of A]; axes in front of the shapes are kept."""
        first = vectors[self.names[0]]
        front = first.shape[: first.ndim - len(self.shape)]
        c = self.B.shape[1]
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
        """The inverse of `to_rows`."""
        front, c, found = rows.shape[:-3], self.B.shape[1], {}
        if len(self.names) == 2:
            found[self.names[1]] = rows[..., -1].reshape(*front, self.groups * c)
            rows = rows[..., :-1]
        if self.transposed:
            inner, kernel = self.shape[0] // self.groups, math.prod(self.shape[2:])
            rows = rows.reshape(*front, self.groups, c, inner, kernel).transpose(-3, -2)
        return {self.names[0]: rows.reshape(*front, *self.shape)} | found

    def product(self, rows: Tensor) -> Tensor:
        """kron(B, A) times vectors in the form of rows."""
        rows = self.B @ rows
        if self.formed is not None:
            return rows @ self.formed
        assert self.root is not None
        return (rows @ self.root.mT) @ self.root

    def scaled(self, a: float, b: float) -> Block:
        """A times a number, B times another."""
        return replace(
            self,
            formed=None if self.formed is None else self.formed * a,
            root=None if self.root is None else self.root * a**0.5,
            B=self.B * b,
        )

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name."""
        found = {"A": self.formed, "root": self.root, "B": self.B}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def dense(self) -> Tensor:
        """kron(B, A) for every group: [groups, c·d, c·d]; for tests and small layers."""
        return torch.stack([torch.kron(b, a) for b, a in zip(self.B, self.A, strict=True)])


class Operator(ABC):
    """A symmetric block-diagonal operator on the parameters of a model's layers.

    It takes and gives mappings from parameters' names to tensors of their shapes, with any number of axes in front (a
    matrix–matrix product), or one tensor with all parameters flattened in order in its last axis.

    Args:
        blocks: the blocks by the name of their first parameter.
    """

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        self._blocks = dict(blocks)

    def __repr__(self) -> str:
        count = len(self._blocks)
        return f"{type(self).__name__}({self._options()}{count} block{'s' * (count != 1)})"

    def __copy__(self) -> Self:
        """Another operator on the same tensors; what changes its blocks leaves this one's alone."""
        found = object.__new__(type(self))
        vars(found).update({name: dict(one) if isinstance(one, dict) else one for name, one in vars(self).items()})
        return found

    def _options(self) -> str:
        """What it was made with, for its text."""
        return ""

    @abstractmethod
    def _times(self, name: str, rows: Tensor) -> Tensor:
        """One block times vectors in the form of rows."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, in the order of flat vectors."""
        return {name: shape for block in self._blocks.values() for name, shape in block.shapes.items()}

    @property
    def size(self) -> int:
        """The number of all parameters together."""
        return sum(map(math.prod, self.shapes.values()))

    def __matmul__(self, vectors: Any) -> Any:
        """The product with a vector, or with several.

        Raises:
            TypeError: for what is no tensor nor a mapping of tensors of the factors' dtype.
            KeyError: if a parameter is missing or not known.
            ValueError: if a shape does not fit.
        """
        if isinstance(vectors, Tensor):
            return self.flatten(self @ self.unflatten(vectors))
        self._check(vectors)
        found: dict[str, Tensor] = {}
        for name, block in self._blocks.items():
            with uncast(block.B):
                found |= block.from_rows(self._times(name, block.to_rows(vectors)))
        return {name: found[name] for name in vectors}

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A tensor with all parameters in its last axis as a mapping.

        Raises:
            ValueError: if that axis has another size.
        """
        if vector.shape[-1:] != (self.size,):
            raise ValueError(
                f"the vector has shape {tuple(vector.shape)}, expected {self.size} entries in its last axis"
            )
        parts = vector.split([math.prod(shape) for shape in self.shapes.values()], -1)
        front = vector.shape[:-1]
        return {n: p.reshape(*front, *shape) for (n, shape), p in zip(self.shapes.items(), parts, strict=True)}

    def flatten(self, vectors: Vectors) -> Tensor:
        """The inverse of `unflatten`."""
        self._check(vectors)
        flat = [vectors[name].flatten(vectors[name].ndim - len(shape)) for name, shape in self.shapes.items()]
        return torch.cat(flat, -1)

    def linear_operator(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator` on flat NumPy vectors; of float32 for factors in bfloat16.

        Raises:
            ModuleNotFoundError: if SciPy is not installed.
        """
        from scipy.sparse.linalg import LinearOperator

        like = next(iter(self._blocks.values())).B
        outside = torch.float32 if like.dtype == torch.bfloat16 else like.dtype  # which NumPy has not
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
            raise KeyError(f"missing parameters: {missing}, unknown ones: {more}")
        fronts = set()
        for name, shape in shapes.items():
            if not isinstance(vectors[name], Tensor) or vectors[name].dtype != dtype:
                kind = getattr(vectors[name], "dtype", type(vectors[name]).__name__)
                raise TypeError(f"{name} is of {kind}, expected a tensor of the factors' {dtype}")
            found = tuple(vectors[name].shape)
            cut = len(found) - len(shape)
            if cut < 0 or found[cut:] != shape:
                raise ValueError(f"{name} has shape {found}, expected {shape}, with any axes in front")
            fronts.add(found[:cut])
        if len(fronts) > 1:
            raise ValueError(f"the axes in front of the shapes differ: {sorted(fronts)}")


@dataclass(frozen=True, eq=False)
class _FlatProduct:
    """An operator times flat NumPy vectors, [size] or [size, columns]."""

    operator: Operator
    dtype: torch.dtype
    device: torch.device
    outside: torch.dtype

    def __call__(self, vector: Any) -> Any:
        tensor = torch.as_tensor(vector, dtype=self.dtype, device=self.device)
        columns = tensor.reshape(self.operator.size, -1).mT
        return (self.operator @ columns).mT.reshape(tensor.shape).cpu().to(self.outside).numpy()


class KroneckerFactors(Operator, Mapping[str, Block]):
    """Kronecker factors of a model: a mapping from parameters' names to blocks, and the operator that they make up.

    Made by `lensor.curvature.kfac`. `factors @ v` multiplies, `factors.inverse(damping)` solves.

    Args:
        blocks: the blocks by the name of their first parameter.
        approx: "expand" or "reduce".
        examples: how many examples they come from.
        convention: whose normalisation.
        reduction: of the loss, "mean" or "sum".
        outputs: how many numbers the model gives for an example.

    Example:
        >>> import torch
        >>> from lensor.curvature import kfac
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> data = torch.randn(8, 3), torch.randn(8, 2)
        >>> factors = kfac(model, torch.nn.MSELoss(), data)
        >>> v = {"weight": torch.randn(2, 3)}
        >>> solved = factors.inverse(damping=0.1) @ v
        >>> back = (factors @ solved)["weight"] + 0.1 * solved["weight"]
        >>> torch.allclose(back, v["weight"], atol=1e-4)
        True
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        approx: str = "expand",
        examples: int = 0,
        convention: str = "paper",
        reduction: str = "mean",
        outputs: int = 1,
    ) -> None:
        super().__init__(blocks)
        self.approx, self.examples, self.convention = approx, examples, convention
        self.reduction, self.outputs = reduction, outputs

    def __getitem__(self, name: str) -> Block:
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __repr__(self) -> str:
        lines = [f"  {name}: {block.form}" for name, block in self.items()]
        head = f"KroneckerFactors(approx={self.approx!r}, examples={self.examples}, convention={self.convention!r})"
        return "\n".join([head, *lines])

    def _times(self, name: str, rows: Tensor) -> Tensor:
        return self._blocks[name].product(rows)

    def _with(self, blocks: Mapping[str, Block], **changes: Any) -> KroneckerFactors:
        return KroneckerFactors(blocks, **(self._settings() | changes))

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("approx", "examples", "convention", "reduction", "outputs")}

    # ------------------------------------------------------------------------------------------------------- solving
    def inverse(self, damping: float, method: str = "eigen") -> Inverse:
        """The damped inverse.

        Args:
            damping: λ > 0.
            method: "eigen": (B ⊗ A + λI)⁻¹ exactly, by eigendecompositions (of roots where they are kept); "cholesky":
                (B + √λ/π I)⁻¹ ⊗ (A + π√λ I)⁻¹ with π² = (tr A/d)/(tr B/c) (Martens & Grosse, 2015), by Cholesky
                decompositions; "woodbury": the same with A's inverse by way of its root, and exactly (c A + λI)⁻¹ where
                B is c times the identity.

        Raises:
            ValueError: for a damping that is not positive, an unknown method, or "woodbury" where no root is kept.
            torch.linalg.LinAlgError: if a damped factor is not positive definite in its dtype.
        """
        return Inverse(self._blocks, damping, method)

    def eigh(self) -> EigenFactors:
        """Eigenvectors and eigenvalues of every block."""
        blocks, parts = self._blocks, {}
        for name, block in blocks.items():
            a, q_a = torch.linalg.eigh(block.A)
            b, q_b = torch.linalg.eigh(block.B)
            parts[name] = q_a, q_b, b.clamp_min(0)[..., :, None] * a.clamp_min(0)[..., None, :]
        return EigenFactors(blocks, parts)

    # ------------------------------------------------------------------------------------------------------- numbers
    def trace(self) -> Tensor:
        """The sum of the blocks' traces."""
        found = []
        for block in self.values():
            a = block.root.square().sum((1, 2)) if block.root is not None else _traces(block.A)
            found.append((a * _traces(block.B)).sum())
        return torch.stack(found).sum()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det of all blocks with the damping on the diagonal; -inf for singular ones without it.

        Raises:
            ValueError: for a negative damping.
        """
        _require_not_negative(damping)
        found = []
        for block in self.values():
            b = torch.linalg.eigvalsh(block.B).clamp_min(0)
            if block.root is not None:
                a = torch.linalg.svdvals(block.root).square()
                rest = (block.d - a.shape[1]) * b.numel()
                found.append(rest * torch.log(b.new_tensor(damping)) if rest else b.new_zeros(()))
            else:
                a = torch.linalg.eigvalsh(block.A).clamp_min(0)
            found.append(torch.log(b[:, :, None] * a[:, None, :] + damping).sum())
        return torch.stack(found).sum()

    def diagonal(self) -> dict[str, Tensor]:
        """The diagonal, in the parameters' shapes."""
        found: dict[str, Tensor] = {}
        for block in self.values():
            a = block.root.square().sum(1) if block.root is not None else block.A.diagonal(dim1=1, dim2=2)
            found |= block.from_rows(block.B.diagonal(dim1=1, dim2=2)[:, :, None] * a[:, None, :])
        return found

    def check_finite(self) -> None:
        """Raise if a factor holds NaN or infinity.

        Raises:
            FloatingPointError: with its name.
        """
        for name, block in self.items():
            for which, tensor in block.tensors().items():
                if not bool(tensor.isfinite().all()):
                    raise FloatingPointError(f"factor {which} of {name} is not finite")

    # ------------------------------------------------------------------------------------------------- other versions
    def in_convention(self, convention: str) -> KroneckerFactors:
        """The same factors with another library's normalisation.

        Args:
            convention: "paper", "curvlinops", "singd", "asdl", "nngeometry", "kfac-jax", "kfac-pytorch" or "laplace".
                `docs/conventions.md` has their scales. The product of the factors is the same, but for "kfac-jax" (over
                the positions), "kfac-pytorch" (over their fifth power and N²) and "laplace" (of the summed loss).

        Raises:
            ValueError: for another convention, or one that does not define these factors.
        """
        if convention == "backpack":
            raise ValueError(
                "convention='backpack' has the input factors of approx='expand' and the output factors of"
                " approx='reduce': take both, and A of the one, B of the other (docs/conventions.md)"
            )
        require_choice("convention", convention, tuple(MODEL_CONVENTIONS))
        new, old = MODEL_CONVENTIONS[convention], MODEL_CONVENTIONS[self.convention]
        if self.approx not in new.positions:
            raise ValueError(f"convention={convention!r} does not define factors with approx={self.approx!r}")
        (a, b), (a0, b0) = new.positions[self.approx], old.positions[self.approx]
        varied = [name for name, block in self.items() if block.positions == 0]
        if varied and (a, b) != (a0, b0):
            raise ValueError(f"convention={convention!r} needs one number of positions, which differs in {varied[0]}")
        outputs = float(self.outputs) ** (new.outputs - old.outputs)
        examples = float(self.examples) ** (new.examples[self.reduction] - old.examples[self.reduction])
        blocks = {
            name: block.scaled(
                outputs * float(block.positions or 1) ** (a - a0),
                examples / outputs * float(block.positions or 1) ** (b - b0),
            )
            for name, block in self.items()
        }
        return self._with(blocks, convention=convention)

    def to(self, *arguments: Any, **named: Any) -> KroneckerFactors:
        """On another device, or of another dtype; arguments as of `torch.Tensor.to`."""
        return self._with({name: _each(block, lambda t: t.to(*arguments, **named)) for name, block in self.items()})

    def ema_(self, other: KroneckerFactors, decay: float) -> Self:
        """decay · self + (1 − decay) · other, in place; roots are kept as roots of more rows.

        Raises:
            ValueError: if they are of other parameters or blocks, another approx, convention or reduction, or if the
                decay is not between 0 and 1.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}, expected a number between 0 and 1")
        names = ("approx", "convention", "reduction")
        if self.shapes != other.shapes or any(getattr(self, name) != getattr(other, name) for name in names):
            raise ValueError("an average is of factors of the same parameters, approx, convention and reduction")
        for name, block in self._blocks.items():  # all of them before the first is changed
            _require_alike(name, block, other._blocks.get(name))
        for name, block in self._blocks.items():
            new = other[name]
            b = block.B.mul(decay).add_(new.B, alpha=1 - decay)
            root = formed = None
            if block.root is not None and new.root is not None and block.root.shape[1] + new.root.shape[1] < block.d:
                root = torch.cat([block.root * decay**0.5, new.root * (1 - decay) ** 0.5], 1)
            else:
                formed = block.A.mul(decay).add_(new.A, alpha=1 - decay)
            positions = block.positions if block.positions == new.positions else 0
            self._blocks[name] = replace(block, formed=formed, root=root, B=b, positions=positions)
        return self

    def state_dict(self) -> dict[str, Any]:
        """What `from_state_dict` takes; it can be saved with `torch.save`."""
        blocks = {
            name: {
                "names": list(block.names),
                "shape": list(block.shape),
                "transposed": block.transposed,
                "positions": block.positions,
                **block.tensors(),
            }
            for name, block in self.items()
        }
        return {"version": 1, **self._settings(), "blocks": blocks}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], model: torch.nn.Module | None = None) -> Self:
        """Factors from what `state_dict` gave.

        Args:
            state: the state.
            model: if given, the factors' parameters must be this model's, with its shapes.

        Raises:
            ValueError: for a state of another kind or version, one that is damaged, or one of another model.
        """
        if not isinstance(state, Mapping) or state.get("version") != 1 or not isinstance(state.get("blocks"), Mapping):
            raise ValueError("this is not a state of Kronecker factors that this version reads")
        names = ("approx", "examples", "convention", "reduction", "outputs")
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(f"the state of Kronecker factors is damaged: {missing[0]} is missing")
        require_choice("approx", state["approx"], ("expand", "reduce"))
        require_choice("convention", state["convention"], tuple(MODEL_CONVENTIONS))
        require_choice("reduction", state["reduction"], ("mean", "sum"))
        for name in ("examples", "outputs"):
            if not isinstance(state[name], int) or state[name] < 0:
                raise ValueError(f"the state of Kronecker factors is damaged: {name} is {state[name]!r}")
        blocks = {str(name): _block_of(str(name), one) for name, one in state["blocks"].items()}
        found = cls(blocks, *(state[name] for name in names))
        every = [name for block in blocks.values() for name in block.names]
        if len(set(every)) < len(every):
            raise ValueError(f"the state of Kronecker factors is damaged: parameters occur twice among {every}")
        if model is not None:
            known = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
            for name, shape in found.shapes.items():
                if known.get(name) != shape:
                    there = f"{name} of shape {known[name]}" if name in known else f"no parameter {name}"
                    raise ValueError(f"the state is of another model: it has {name} of shape {shape}, found {there}")
        return found


class EigenFactors(Operator):
    """Q_B ⊗ Q_A times a diagonal times its transpose, for every block.

    Args:
        blocks: the blocks.
        parts: for each Q_A [groups, d, d], Q_B [groups, c, c] and the eigenvalues [groups, c, d].

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
        return q_b @ ((q_b.mT @ rows @ q_a) * values) @ q_a.mT

    def inverse(self, damping: float) -> EigenFactors:
        """(self + λI)⁻¹.

        Raises:
            ValueError: for a damping that is not positive.
        """
        _require_damping(damping)
        parts = {name: (q_a, q_b, 1 / (values + damping)) for name, (q_a, q_b, values) in self.parts.items()}
        return EigenFactors(self._blocks, parts)

    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det with the damping on the diagonal.

        Raises:
            ValueError: for a negative damping.
        """
        _require_not_negative(damping)
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

    def __init__(self, blocks: Mapping[str, Block], damping: float, method: str) -> None:
        super().__init__(blocks)
        _require_damping(damping)
        require_choice("method", method, tuple(_WAYS))
        self.damping, self.method = damping, method
        self._solvers = {}
        for name, block in blocks.items():
            with uncast(block.B):
                self._solvers[name] = _WAYS[method].of(name, block, damping)

    def _options(self) -> str:
        return f"damping={self.damping}, method={self.method!r}, "

    def _times(self, name: str, rows: Tensor) -> Tensor:
        return self._solvers[name](rows)


@dataclass(frozen=True, eq=False)
class _Eigen:
    """Q_B ⊗ Q_A times `over` times the transpose; with `damping` rows outside of Q_A's span are divided by it."""

    q_a: Tensor
    q_b: Tensor
    over: Tensor
    damping: float | None

    @classmethod
    def of(cls, name: str, block: Block, damping: float) -> Self:
        b, q_b = torch.linalg.eigh(block.B)
        b = b.clamp_min(0)
        if block.root is None:
            a, q_a = torch.linalg.eigh(block.A)
        else:  # the complement of the root's rows has the eigenvalue 0
            _, singular, q_at = torch.linalg.svd(block.root, full_matrices=False)
            a, q_a = singular.square(), q_at.mT
        over = 1 / (b[:, :, None] * a.clamp_min(0)[:, None, :] + damping)
        if block.root is None:
            return cls(q_a, q_b, over, None)
        return cls(q_a, q_b, over - 1 / damping, damping)

    def __call__(self, rows: Tensor) -> Tensor:
        inside = self.q_b @ ((self.q_b.mT @ (rows @ self.q_a)) * self.over) @ self.q_a.mT
        return inside if self.damping is None else inside + rows / self.damping


@dataclass(frozen=True, eq=False)
class _Cholesky:
    """The damped inverses of B and of A."""

    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, name: str, block: Block, damping: float) -> Self:
        on_a, on_b = _factored(block, damping)
        return cls(_damped_inverse(f"A of {name}", block.A, on_a), _damped_inverse(f"B of {name}", block.B, on_b))

    def __call__(self, rows: Tensor) -> Tensor:
        return self.b @ rows @ self.a


@dataclass(frozen=True, eq=False)
class _Woodbury:
    """A's damped inverse by way of its root; `b` is B's, or a number for each group where B is plain."""

    root: Tensor
    inner: Tensor
    on_a: Tensor
    b: Tensor
    plain: bool

    @classmethod
    def of(cls, name: str, block: Block, damping: float) -> Self:
        root = block.root
        if root is None:
            raise ValueError(f"{name} has no root: it is kept for approx='reduce' and fewer examples than rows of A")
        c = block.B[:, :1, :1]
        eye = torch.eye(block.B.shape[1], dtype=c.dtype, device=c.device)
        plain = bool((c * eye == block.B).all()) and bool((c > 0).all())
        if plain:
            on_a, b = damping / c, 1 / c
        else:
            on_a, on_b = _factored(block, damping)
            b = _damped_inverse(f"B of {name}", block.B, on_b)
        inner = _damped_inverse(f"the root's Gram matrix of {name}", root @ root.mT, on_a)
        return cls(root, inner, on_a, b, plain)

    def __call__(self, rows: Tensor) -> Tensor:
        solved = (rows - ((rows @ self.root.mT) @ self.inner) @ self.root) / self.on_a
        return solved * self.b if self.plain else self.b @ solved


_WAYS: dict[str, type[_Eigen] | type[_Cholesky] | type[_Woodbury]] = {
    "eigen": _Eigen,
    "cholesky": _Cholesky,
    "woodbury": _Woodbury,
}
"""What solves a block, by the method's name."""


def _factored(block: Block, damping: float) -> tuple[Tensor, Tensor]:
    """What is added to the diagonals of A and of B, [groups, 1, 1]."""
    a = block.root.square().sum((1, 2)) if block.root is not None else _traces(block.A)
    mean_a, mean_b = a / block.d, _traces(block.B) / block.B.shape[1]
    ratio = (mean_a / mean_b).sqrt()
    ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio))[:, None, None]
    return ratio * damping**0.5, damping**0.5 / ratio


def _damped_inverse(what: str, matrix: Tensor, damping: Tensor) -> Tensor:
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    lower, info = torch.linalg.cholesky_ex(matrix + damping * eye)
    if bool(info.any()):
        raise LinAlgError(f"{what} is not positive definite with this damping: take a larger one")
    return torch.cholesky_inverse(lower)


def _require_damping(damping: float) -> None:
    if not damping > 0 or not math.isfinite(damping):
        raise ValueError(f"damping must be positive, found {damping}")


def _require_not_negative(damping: float) -> None:
    if not damping >= 0 or not math.isfinite(damping):
        raise ValueError(f"damping must not be negative, found {damping}")


def _require_alike(name: str, one: Block, other: Block | None) -> None:
    """Raise unless the blocks' factors can be added.

    Raises:
        ValueError: with what differs.
    """

    def text(block: Block | None) -> str:
        return "none" if block is None else f"{block.names}, {block.form}, {block.B.dtype} on {block.B.device}"

    keys = [
        None
        if block is None
        else (block.names, block.transposed, block.B.shape, block.d, block.B.dtype, block.B.device)
        for block in (one, other)
    ]
    if keys[0] != keys[1]:
        raise ValueError(f"an average is of blocks of the same form: {name} is {text(one)} and {text(other)}")


def _block_of(name: str, state: Any) -> Block:
    """The block in a part of a state.

    Raises:
        ValueError: with what is wrong.
    """

    def damaged(what: str) -> ValueError:
        return ValueError(f"the state of Kronecker factors is damaged: block {name} {what}")

    try:
        block = Block(
            tuple(map(str, state["names"])),
            tuple(map(int, state["shape"])),
            bool(state["transposed"]),
            state.get("A"),
            state.get("root"),
            state["B"],
            int(state["positions"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(f"cannot be read ({type(error).__name__}: {error})") from None
    if len(block.names) not in (1, 2) or block.names[0] != name:
        raise damaged(f"is of the parameters {block.names}")
    if (block.formed is None) == (block.root is None):
        raise damaged("has both of A and its root, or none of them")
    which = "A" if block.root is None else "root"
    for key, tensor in (("B", block.B), (which, block.formed if block.root is None else block.root)):
        if not isinstance(tensor, Tensor) or tensor.ndim != 3 or not tensor.is_floating_point():
            raise damaged(f"has {key} that is not a tensor of three axes and real numbers")
        if key != "root" and tensor.shape[1] != tensor.shape[2]:
            raise damaged(f"has {key} of shape {tuple(tensor.shape)}, expected square matrices")
        if (tensor.shape[0], tensor.dtype, tensor.device) != (block.groups, block.B.dtype, block.B.device):
            raise damaged(f"has {key} with other groups, or of another dtype or device, than B")
    c, more = block.B.shape[1], len(block.names) - 1
    fits = math.prod(block.shape) == block.groups * c * (block.d - more)
    if block.transposed:
        fits = fits and len(block.shape) > 1 and block.shape[1] == c and block.shape[0] % block.groups == 0
    if not fits:
        raise damaged(f"has factors {block.form}, which do not fit a parameter of shape {block.shape}")
    return block


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _each(block: Block, function: Any) -> Block:
    return replace(
        block,
        formed=None if block.formed is None else function(block.formed),
        root=None if block.root is None else function(block.root),
        B=function(block.B),
    )
