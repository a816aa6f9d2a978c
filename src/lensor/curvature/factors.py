"""The Kronecker factors of all layers of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from lensor.choices import Approx, Method, ModelNormalisation, words
from lensor.conventions import MODEL_CONVENTIONS
from lensor.curvature.block import (
    Block,
    block_of,
    each_factor,
    eigh,
    eigvalsh,
    require_alike,
    trace_of_input,
    traces_of,
)
from lensor.curvature.inverses import RANK, EigenFactors, Inverse, require_not_negative
from lensor.curvature.operators import Operator
from lensor.curvature.watching import uncast
from lensor.errors import require_choice, require_type


class KroneckerFactors(Operator, Mapping[str, Block]):
    """Kronecker factors of a model: a mapping from parameter names to blocks, and a linear operator.

    `lensor.curvature.kfac` returns them. `factors @ v` multiplies, and `factors.inverse(damping)` solves.

    Args:
        blocks: the blocks, by the name of their first parameter.
        approx: "expand" or "reduce".
        examples: number of examples in the data.
        convention: the library or paper whose normalisation applies.
        reduction: reduction of the loss, "mean" or "sum".
        outputs: number of output entries of the model per example.

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
        approx: Approx = "expand",
        examples: int = 0,
        convention: ModelNormalisation = "paper",
        reduction: str = "mean",
        outputs: int = 1,
    ) -> None:
        super().__init__(blocks)
        self.approx, self.examples, self.convention = approx, examples, convention
        self.reduction, self.outputs = reduction, outputs

    def __getitem__(self, name: str) -> Block:
        if name not in self._blocks and any(own.startswith(f"{name}.") for own in self._blocks):
            own = ", ".join(repr(one) for one in self._blocks if one.startswith(f"{name}."))
            raise KeyError(f"{name!r} is a module, expected the name of a parameter: {own}")
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
    def inverse(
        self, damping: float, method: Method = "eigen", rank: int = RANK, dtype: torch.dtype | None = None
    ) -> Inverse:
        """The damped inverse.

        Args:
            damping: λ > 0.
            method: "eigen": (B ⊗ A + λI)⁻¹ exactly, by eigendecompositions (of the roots where they are stored).
                "cholesky": (B + √λ/π I)⁻¹ ⊗ (A + π√λ I)⁻¹ with π² = (tr A/d)/(tr B/c) (Martens & Grosse, 2015), by
                Cholesky decompositions. "woodbury": the same, with A inverted through its root; exactly (c A + λI)⁻¹
                where B is c times the identity. "low-rank": as "cholesky", with A replaced by its largest eigenvalues
                and the mean of the others on the rest of the space; products take less time than with a dense inverse
                (Puiu, 2022). It is "cholesky" for blocks with fewer than 4 · rank rows. Blocks without Kronecker
                factors are inverted exactly by all methods.
            rank: the number of eigenvalues that "low-rank" keeps.
            dtype: the dtype in which matrices are stored and products computed, such as torch.bfloat16 for half the
                memory; the inverse itself is computed in the dtype of the factors. That of the factors unless given.

        Raises:
            TypeError: for a damping that is not a number, or a dtype that is not floating.
            ValueError: for a damping or rank that is not positive, an unknown method, or "woodbury" without a stored
                root.
            torch.linalg.LinAlgError: if a damped factor is not positive definite in its dtype.
        """
        return Inverse(self._blocks, damping, method, rank, dtype=dtype)

    def eigh(self) -> EigenFactors:
        """The eigenvectors and eigenvalues of every block."""
        blocks, parts = self._blocks, {}
        for name, block in blocks.items():
            a, q_a = eigh(block.A)
            b, q_b = eigh(block.B)
            parts[name] = q_a, q_b, b.clamp_min(0)[..., :, None] * a.clamp_min(0)[..., None, :]
        return EigenFactors(blocks, parts)

    # ------------------------------------------------------------------------------------------------------- numbers
    def trace(self) -> Tensor:
        """The sum of the blocks' traces."""
        found = []
        for block in self.values():
            found.append((trace_of_input(block) * traces_of(block.B)).sum())
        return torch.stack(found).sum()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det of all blocks with the damping added to the diagonal; -inf if a block is singular without it.

        Raises:
            TypeError: for a damping that is not a number.
            ValueError: for a negative damping.
        """
        require_not_negative(damping)
        found = []
        for block in self.values():
            b = eigvalsh(block.B).clamp_min(0)
            if block.root is not None:
                a = torch.linalg.svdvals(block.root).square()
                rest = (block.d - a.shape[1]) * b.numel()
                found.append(rest * torch.log(b.new_tensor(damping)) if rest else b.new_zeros(()))
            else:
                a = eigvalsh(block.A).clamp_min(0)
            found.append(torch.log(b[:, :, None] * a[:, None, :] + damping).sum())
        return torch.stack(found).sum()

    def diagonal(self) -> dict[str, Tensor]:
        """The diagonal, in the shapes of the parameters."""
        found: dict[str, Tensor] = {}
        for block in self.values():
            a = block.root.square().sum(1) if block.root is not None else block.A.diagonal(dim1=1, dim2=2)
            found |= block.from_rows(block.B.diagonal(dim1=1, dim2=2)[:, :, None] * a[:, None, :])
        return found

    def check_finite(self) -> None:
        """Raise if a factor contains NaN or infinity.

        Raises:
            FloatingPointError: if a factor is not finite; the message names the factor.
        """
        for name, block in self.items():
            for which, tensor in block.tensors().items():
                if not bool(tensor.isfinite().all()):
                    raise FloatingPointError(f"factor {which} of {name} is not finite, expected finite entries")

    # ------------------------------------------------------------------------------------------------- other versions
    def in_convention(self, convention: ModelNormalisation) -> KroneckerFactors:
        """The same factors in the normalisation of a different library.

        Args:
            convention: "paper", "curvlinops", "singd", "asdl", "nngeometry", "kfac-jax", "kfac-pytorch" or "laplace".
                `docs/conventions.md` lists their scales. The product of the factors is that of "paper", except for
                "kfac-jax" (divided by the number of positions), "kfac-pytorch" (for a mean loss, divided by N² and by
                the fifth power of the number of positions), "laplace" (for the summed loss), and conventions that
                divide the factors of a summed loss by N.

        Raises:
            ValueError: for an unknown convention, or one that does not define these factors.
        """
        if convention == "backpack":
            raise ValueError(
                "convention is 'backpack', expected one that defines both factors for one approx: 'backpack' takes A"
                " from approx='expand' and B from approx='reduce', so compute both (docs/conventions.md)"
            )
        require_choice("convention", convention, words(ModelNormalisation))
        new, old = MODEL_CONVENTIONS[convention], MODEL_CONVENTIONS[self.convention]
        if self.approx not in new.positions:
            raise ValueError(
                f"convention is {convention!r}, expected one that defines factors for approx={self.approx!r}"
            )
        (a, b), (a0, b0) = new.positions[self.approx], old.positions[self.approx]
        varied = [name for name, block in self.items() if block.positions == 0]
        if varied and (a, b) != (a0, b0):
            raise ValueError(
                f"convention is {convention!r}, expected another: the number of positions of {varied[0]} varies"
            )
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
        """Move to another device or dtype; arguments as for `torch.Tensor.to`."""
        return self._with(
            {name: each_factor(block, lambda t: t.to(*arguments, **named)) for name, block in self.items()}
        )

    def ema_(self, other: KroneckerFactors, decay: float) -> Self:
        """Set to decay · self + (1 − decay) · other, in place; roots are concatenated.

        Raises:
            TypeError: if `other` is not KroneckerFactors.
            ValueError: if the other factors have different parameters, blocks, approx, convention or reduction, or if
                the decay is not between 0 and 1.
        """
        require_type(other, "other", KroneckerFactors)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}, expected a number between 0 and 1")
        names = ("approx", "convention", "reduction")
        if self.shapes != other.shapes or any(getattr(self, name) != getattr(other, name) for name in names):
            raise ValueError("other has different parameters, approx, convention or reduction, expected the same")
        for name, block in self._blocks.items():  # check all blocks before changing the first
            require_alike(name, block, other._blocks.get(name))
        for name, block in self._blocks.items():
            new = other[name]
            b = block.B.mul(decay).add_(new.B, alpha=1 - decay)
            root = formed = None
            if block.root is not None and new.root is not None and block.root.shape[1] + new.root.shape[1] < block.d:
                root = torch.cat([block.root * decay**0.5, new.root * (1 - decay) ** 0.5], 1)
            elif new.root is not None:
                with uncast(new.root):
                    formed = torch.baddbmm(block.A, new.root.mT, new.root, beta=decay, alpha=1 - decay)
            else:
                formed = block.A.mul(decay).add_(new.A, alpha=1 - decay)
            positions = block.positions if block.positions == new.positions else 0
            self._blocks[name] = replace(block, formed=formed, root=root, B=b, positions=positions)
        return self

    def state_dict(self) -> dict[str, Any]:
        """A state for `from_state_dict`; you can save it with `torch.save`."""
        blocks = {
            name: {
                "names": list(block.names),
                "shape": list(block.shape),
                "transposed": block.transposed,
                "positions": block.positions,
                "factored": block.factored,
                **({} if block.parts == (1, 1) else {"parts": list(block.parts)}),
                **block.tensors(),
            }
            for name, block in self.items()
        }
        return {"version": 1, **self._settings(), "blocks": blocks}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], model: torch.nn.Module | None = None) -> Self:
        """Restore factors from a state.

        Args:
            state: the result of `state_dict`.
            model: if given, the factors' parameters must match this model's in name and shape.

        Raises:
            ValueError: if the state has an unknown version, is damaged, or belongs to a different model.
        """
        if not isinstance(state, Mapping) or state.get("version") != 1 or not isinstance(state.get("blocks"), Mapping):
            raise ValueError("cannot read state, expected a state returned by this version's state_dict")
        names = ("approx", "examples", "convention", "reduction", "outputs")
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(f"the state of the Kronecker factors is invalid: {missing[0]} is missing")
        require_choice("approx", state["approx"], ("expand", "reduce"))
        require_choice("convention", state["convention"], words(ModelNormalisation))
        require_choice("reduction", state["reduction"], ("mean", "sum"))
        for name in ("examples", "outputs"):
            if not isinstance(state[name], int) or state[name] < 0:
                raise ValueError(
                    f"the state of the Kronecker factors is invalid: {name} is {state[name]!r}, expected at least 0"
                )
        blocks = {str(name): block_of(str(name), one) for name, one in state["blocks"].items()}
        found = cls(blocks, *(state[name] for name in names))
        every = [name for block in blocks.values() for name in block.names]
        if len(set(every)) < len(every):
            raise ValueError(f"the state of the Kronecker factors is invalid: {every} contains duplicates")
        if model is not None:
            known = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
            for name, shape in found.shapes.items():
                if known.get(name) != shape:
                    there = f"{name} of shape {known[name]}" if name in known else f"no parameter {name}"
                    raise ValueError(f"the state has {name} of shape {shape}, expected that of this model: {there}")
        return found
