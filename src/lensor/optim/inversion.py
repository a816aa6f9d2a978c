"""Damped inverses of Kronecker blocks, shared between processes if there are several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from lensor.choices import Method, StepMethod
from lensor.curvature.block import Block, each_factor
from lensor.curvature.distribution import shares
from lensor.curvature.inverses import RANK, Inverse
from lensor.curvature.operators import Operator


@dataclass(eq=False)
class Inversion:
    """The current inverses of an optimizer's blocks.

    Args:
        method: "cholesky", "eigen", "low-rank", or "woodbury" (for blocks with roots; "cholesky" for others).
        rank: the number of eigenvalues of A that "low-rank" keeps.
        group: the processes that share the work: each inverts some of the blocks and broadcasts the directions.
        ema: the weight of the old factors at an update.
        blocks: the inverted blocks, by name; they may be older than the current factors.
        damping: the damping of each block.
        dtype: the dtype of the inverses; that of the parameters, in at least single precision, unless given.
    """

    method: StepMethod
    rank: int = RANK
    group: dist.ProcessGroup | None = None
    ema: float = 0.95
    blocks: dict[str, Block] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    starts: dict[str, Tensor] = field(default_factory=dict)
    """The vectors that the current inverses started from: those of the previous inverses."""
    solvers: dict[str, Operator] = field(default_factory=dict)
    updates: dict[str, int] = field(default_factory=dict)
    """The number of updates of each inverse, if inverses are updated instead of computed."""

    keeps_factors: ClassVar[bool] = True
    """Whether later inversions need the factors."""
    is_shared: ClassVar[bool] = True
    """Whether the processes of the group share the work."""
    least: ClassVar[torch.dtype] = torch.float32
    """The lowest precision of blocks."""

    @property
    def structure(self) -> str | None:
        """The stored entries of inverses that are updated, as text."""
        return None

    def invert(self, blocks: Mapping[str, Block], damping: Mapping[str, float]) -> None:
        """Invert this process's share of the blocks; the inverses of other blocks are kept.

        Args:
            blocks: the blocks.
            damping: the damping of each block.
        """
        for name, one in self.solvers.items():
            if name in blocks and isinstance(one, Inverse):
                self.starts = self.starts | one.bases()
        self._invert(blocks, damping)

    def restore(
        self,
        blocks: Mapping[str, Block],
        damping: Mapping[str, float],
        starts: Mapping[str, Tensor],
        updates: Mapping[str, int],
    ) -> None:
        """Invert blocks as they were inverted before, from the same vectors."""
        self.keep({})
        self.starts, self.updates = dict(starts), dict(updates)
        self._invert(blocks, damping)

    def _invert(self, blocks: Mapping[str, Block], damping: Mapping[str, float]) -> None:
        self.blocks, self.damping = {**self.blocks, **blocks}, {**self.damping, **damping}
        me = 0 if self._sharing is None else dist.get_rank(self._sharing)
        own = [name for name, rank in self.owners(self.blocks).items() if rank == me]
        kept = self.solvers | self._solved([name for name in own if name in blocks or name not in self.solvers])
        self.solvers = {name: kept[name] for name in own}

    def _solved(self, names: Iterable[str]) -> dict[str, Operator]:
        """The inverses of some blocks, by name."""
        if self.method == "inverse-free":
            raise ValueError("method was set to 'inverse-free', expected it when the optimizer is created")
        asked: dict[tuple[Method, float], dict[str, Block]] = {}
        for name in names:
            block = self.blocks[name]
            method = "cholesky" if self.method == "woodbury" and block.root is None else self.method
            dtype = torch.promote_types(block.B.dtype, self.least)
            wide = block if block.B.dtype == dtype else each_factor(block, partial(Tensor.to, dtype=dtype))
            asked.setdefault((method, self.damping[name]), {})[name] = wide
        found: dict[str, Operator] = {}
        for (method, damping), some in asked.items():
            inverse = Inverse(some, damping, method, self.rank, self.starts, self.dtype)
            found |= {name: inverse.single(name) for name in some}
        return found

    def keep(self, blocks: dict[str, Block]) -> None:
        """Keep the inverses of these blocks, and discard all others."""
        self.blocks = blocks
        self.damping = {name: one for name, one in self.damping.items() if name in blocks}
        self.starts = {name: one for name, one in self.starts.items() if name in blocks}
        self.updates = {name: one for name, one in self.updates.items() if name in blocks}
        self.solvers = {name: one for name, one in self.solvers.items() if name in blocks}

    def directions(self, gradients: Mapping[str, Tensor | None], formed: bool = True) -> dict[str, Any]:
        """The inverse times the gradients, by parameter name; blocks with a missing gradient are omitted.

        Args:
            gradients: the gradients.
            formed: whether all directions are tensors; otherwise, some may be `PlusLowRank`.
        """
        found: dict[str, Any] = {}
        group = self._sharing
        owners = self.owners(self.blocks) if group is not None else {}
        for name, block in self.blocks.items():
            own = {one: g for one in block.names if (g := gradients[one]) is not None}
            if len(own) < len(block.names):
                continue
            dtype = torch.promote_types(block.B.dtype, self.least)
            wide = {one: g if g.dtype == dtype else g.to(dtype) for one, g in own.items()}
            if name in self.solvers:
                solver = self.solvers[name]
                if not formed and group is None and isinstance(solver, Inverse):
                    unformed = solver.unformed(name, wide)
                    if unformed is not None:
                        found |= unformed
                        continue
                solved = solver.block_product(name, wide)
            else:
                solved = {one: torch.empty_like(g) for one, g in wide.items()}
            if group is not None:
                source = dist.get_global_rank(group, owners[name])
                for one in block.names:
                    solved[one] = solved[one].contiguous()
                    dist.broadcast(solved[one], source, group=group)
            found |= {one: solved[one] for one in block.names}
        return found

    @property
    def _sharing(self) -> dist.ProcessGroup | None:
        return self.group if self.is_shared else None

    def owners(self, blocks: Mapping[str, Block]) -> dict[str, int]:
        """The process that inverts each block, chosen to balance the work."""
        ranks = 1 if self._sharing is None else dist.get_world_size(self._sharing)
        return dict(zip(blocks, shares([self.cost(one) for one in blocks.values()], ranks), strict=True))

    def cost(self, block: Block) -> float:
        """The number of multiplications for the inverse of a block."""
        on_a = block.d**3
        if self.method == "low-rank" and 4 * self.rank <= block.d:
            on_a = 2 * self.rank * block.d**2
        return float(block.groups * (on_a + block.B.shape[1] ** 3))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "solvers": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"starts": {}, "updates": {}, **state})  # earlier versions had neither
        self._invert(self.blocks, self.damping)
