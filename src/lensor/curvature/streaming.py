"""Norms and weighted sums of the examples' gradients, computed while the backward pass runs.

The gradient at a layer's output is used as soon as it is known. If the gradients of the examples are smaller than the
layer's input and output (few channels, many positions), they are formed and kept. Otherwise, only their norms are
computed, and the input and the gradient at the output are kept, if a weighted sum needs them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lensor import ops
from lensor.curvature.batch import Batch, squared_norms
from lensor.curvature.capture import Use, computing
from lensor.curvature.complete import CompleteCapture
from lensor.curvature.data import over_positions
from lensor.curvature.example_gradients import gradients_of, rows_of, sum_of, zeros_of
from lensor.curvature.functions import FunctionUse
from lensor.curvature.networks import network
from lensor.curvature.pairs import OuterProducts, are_linear, positions, squared_norms_of
from lensor.planner.settings import preferring

_LEAST_BYTES = 1 << 24
"""Plans prefer to need no more memory than a layer's input and output, or than this."""


def preferred(x: Tensor, v: Tensor) -> AbstractContextManager[None]:
    """Prefer plans that need no more memory than a layer's input and the gradient at its output."""
    return preferring(max(_LEAST_BYTES, x.nbytes + v.nbytes))


class Streamed:
    """The gradients of the examples of one batch.

    Args:
        batch: the batch after its forward pass.
        value: the loss.
        is_weighted: whether `weighted_sums` will be called.
    """

    def __init__(self, batch: Batch, value: Tensor, is_weighted: bool) -> None:
        assert isinstance(batch.capture, CompleteCapture)
        self.batch, self.capture, self.names, self._is_weighted = batch, batch.capture, batch.names, is_weighted
        self._wanted = set(self.names)
        self._gradients: dict[str, Tensor] = {}
        self._of_sources: dict[int, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._layers: list[tuple[Use, Tensor]] = []
        self._functions: dict[FunctionUse, list[Tensor | None]] = {}
        self._counts = self._count()
        self._paired = self._find_paired()
        self._products: dict[str, list[OuterProducts]] = {}
        if self.capture.is_single:
            whole = self.capture.whole(value, torch.ones_like(value))
            self._gradients |= {name: whole[name] for name in self.names}
            return
        later = [use for use in self.capture.functions if not self._is_at_once(use)]
        self.capture.propagate(value, bool(later), self._receive)
        with computing(value):
            for name, products in self._products.items():
                self._squares[name] = squared_norms_of(products)
            for use, vectors in self._functions.items():
                self._add_function(use, vectors)
            for name, gradient in self.capture.by_name(self._of_sources, batched=True).items():
                self._add(name, gradient)

    # ------------------------------------------------------------------------------------------------- backward pass
    def _count(self) -> dict[str, int]:
        """The number of uses of each parameter; tensors computed from parameters count for all parameters."""
        found = dict.fromkeys(self.capture.targets.parameters, 0)
        names = self.capture.targets.names
        for use in self.capture.uses:
            found[use.weight] += 1
            if use.bias is not None:
                found[use.bias] += 1
        for use in self.capture.functions:
            for source in use.sources:
                for name in [names[id(source.tensor)]] if id(source.tensor) in names else found:
                    found[name] += 1
        return found

    def _find_paired(self) -> dict[Use | FunctionUse, str]:
        """The uses of weights whose norms come from pairs of positions, with the names of these weights."""
        names, uses = self.capture.targets.names, {name: [] for name in self._wanted}
        for use in self.capture.uses:
            if use.weight in uses:
                uses[use.weight].append(use)
        for use in self.capture.functions:
            for name in {names.get(id(source.tensor), "") for source in use.sources} & uses.keys():
                uses[name].append(use)
        found = {}
        for name, mine in uses.items():
            is_one_layer = len(mine) == 1 and isinstance(mine[0], Use)  # its plans include pairs of positions
            if is_one_layer or len(mine) != self._counts[name] or not mine or not are_linear(mine):
                continue
            counts, parameter = list(map(positions, mine)), self.capture.targets.parameters[name]
            if sum(counts) ** 2 < parameter.numel():
                found |= dict.fromkeys(mine, name)
        return found

    def _is_small(self, entries: int, sources: int) -> bool:
        """Whether the gradients of the examples, of `entries` each, have no more entries than their sources."""
        return self.batch.size * entries <= sources

    def _is_at_once(self, use: FunctionUse) -> bool:
        """Whether the gradients for a function can be formed as soon as the gradient at its output is known."""
        if len(use.outputs) > 1:
            return False
        if use in self._paired:
            return True
        entries = sum(source.tensor.numel() for source in use.sources)
        return not self._is_weighted or self._is_small(entries, use.outputs[0].shape.numel())

    def _receive(self, use: Use | FunctionUse, number: int, v: Tensor) -> None:
        """Take the gradient at an output."""
        if isinstance(use, FunctionUse) and use in self._paired:
            self._products.setdefault(self._paired[use], []).append(OuterProducts.of_embedding(use, v))
            use.leaves.clear()
        elif isinstance(use, Use):
            self._add_layer(use, v)
        elif self._is_at_once(use):
            self.capture.add(self._of_sources, use, use.gradients([v]))
            use.leaves.clear()
        else:
            self._functions.setdefault(use, [None] * len(use.outputs))[number] = v

    def _add_layer(self, use: Use, v: Tensor) -> None:
        x = self.capture.inputs.pop(use)
        if use.bias is not None and use.bias in self._wanted:
            self._add(use.bias, over_positions(v))
        if use.weight not in self._wanted:
            return
        with preferred(x, v):
            if use in self._paired:
                self._products.setdefault(use.weight, []).append(OuterProducts.of_layer(x, v))
                return
            if self._counts[use.weight] > 1 or (
                self._is_weighted and self._is_small(use.weight_size, x.numel() + v.numel())
            ):
                self._add(use.weight, gradients_of(use, x, v))
                return
            self._squares[use.weight] = network(squared_norms, use.spec(x))(X=x, V=v).clamp_min(0)
        if self._is_weighted:
            self.capture.inputs[use] = x
            self._layers.append((use, v))

    def _add_function(self, use: FunctionUse, vectors: list[Tensor | None]) -> None:
        names = self.capture.targets.names
        parts = use.gradients(vectors)
        alone = all(self._counts.get(names.get(id(source.tensor), ""), 2) == 1 for source in use.sources)
        if alone:  # the gradients are not kept
            for source, part in zip(use.sources, parts, strict=True):
                self._squares[names[id(source.tensor)]] = rows_of(part).square().sum(1)
        else:
            self.capture.add(self._of_sources, use, parts)
        if not alone or not self._is_weighted:
            self._functions[use] = []

    def _add(self, name: str, gradient: Tensor) -> None:
        if name in self._wanted:
            known = self._gradients.get(name)
            self._gradients[name] = gradient if known is None else known + gradient

    # ------------------------------------------------------------------------------------------------------- results
    def squares(self) -> dict[str, Tensor]:
        """The squared norm of every example's gradient, [batch], by parameter."""
        found = {name: rows_of(gradient).square().sum(1) for name, gradient in self._gradients.items()}
        found |= self._squares
        parameters = self.capture.targets.parameters
        return {
            name: found[name] if name in found else rows_of(zeros_of(parameters[name], self.batch.size)).sum(1)
            for name in self.names
        }

    def weighted_sums(self, factors: Tensor) -> dict[str, Tensor]:
        """The sums over the examples of their gradients times factors [batch], by parameter."""
        found = {
            name: torch.tensordot(factors.to(gradient.dtype), gradient, 1) for name, gradient in self._gradients.items()
        }
        for use, v in self._layers:
            x, scaled = self.capture.inputs[use], v * factors.to(v.dtype).reshape(-1, *[1] * (v.ndim - 1))
            gradient = network(ops.conv_weight_vjp, use.spec(x))(X=x, V=scaled)
            found[use.weight] = gradient.reshape(use.weight_shape)
        of_sources: dict[int, Tensor] = {}
        for use, vectors in self._functions.items():
            if vectors:
                self.capture.add(of_sources, use, use.weighted_sum(vectors, factors))
        found |= self.capture.by_name(of_sources, batched=False)
        parameters = self.capture.targets.parameters
        for name, products in self._products.items():
            found[name] = sum_of(one.weighted_sum(factors, len(parameters[name])) for one in products)
        return {
            name: found[name] if name in found else zeros_of(parameters[name], self.batch.size).sum(0)
            for name in self.names
        }
