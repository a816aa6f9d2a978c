"""Norms of gradients that are sums of outer products, by products over pairs of positions.

The gradient of a linear map's weight for one example is Σ_t a_t b_tᵀ over its positions t, with the gradient at the
output a_t and the input b_t. That of an embedding has the same form: a_t is the unit vector of a word, and b_t is the
gradient at the output. If a weight has several such uses (an embedding whose weight is also the last layer of a
language model), their sums are added. The squared norm, Σ_{t,t'} ⟨a_t, a_t'⟩⟨b_t, b_t'⟩, does not need the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from lensor.curvature.capture import Use
from lensor.curvature.functions import FunctionUse
from lensor.curvature.watching import widened
from lensor.evaluate import einsum


@dataclass(frozen=True)
class OuterProducts:
    """The terms a_t b_tᵀ of a gradient for every example.

    Args:
        a: [batch, positions, rows]; or, for unit vectors, the index of the entry that is 1, [batch, positions].
        b: [batch, positions, columns].
    """

    a: Tensor
    b: Tensor

    @property
    def is_index(self) -> bool:
        """Whether `a` has indices of entries."""
        return self.a.ndim == 2

    def weighted_sum(self, factors: Tensor, rows: int) -> Tensor:
        """The sum over the examples of their gradients times factors [batch], [rows, columns]."""
        scaled = self.b * factors.to(self.b.dtype)[:, None, None]
        if self.is_index:
            return scaled.new_zeros((rows, self.b.shape[-1])).index_add_(0, self.a.flatten(), scaled.flatten(0, 1))
        return einsum("n t c, n t f -> c f", self.a, scaled)

    @classmethod
    def of_layer(cls, x: Tensor, v: Tensor) -> OuterProducts:
        """Those of a linear map, from its input and the gradient at its output, [batch, channels, positions]."""
        return cls(_positions_first(v), _positions_first(x))

    @classmethod
    def of_embedding(cls, use: FunctionUse, v: Tensor) -> OuterProducts:
        """Those of an embedding, from the gradient at its output."""
        words, padding = _words(use)
        (output,) = use.outputs
        assert output.axis is not None
        words = output.axis.first(words, use.batch).flatten(1) if words.ndim > 1 else words[:, None]
        b = widened(output.axis.first(v, use.batch)).reshape(*words.shape, v.shape[-1])
        return cls(words, b if padding is None else b * (words != padding)[..., None])


def _positions_first(x: Tensor) -> Tensor:
    return x[:, None] if x.ndim == 2 else x.mT


def are_linear(uses: Sequence[Use | FunctionUse]) -> bool:
    """Whether the gradients for these uses of a weight are sums of outer products."""
    return all(
        use.is_linear and not use.call.inputs_first if isinstance(use, Use) else _is_embedding(use) for use in uses
    )


def _is_embedding(use: FunctionUse) -> bool:
    if use.function is not F.embedding or len(use.outputs) != 1 or len(use.sources) != 1:
        return False
    options = _options(use)
    axis = use.outputs[0].axis
    is_known = axis is not None and axis.order is not None and axis.axis < options["input"].ndim
    plain = options.get("max_norm") is None and not options.get("scale_grad_by_freq")
    return is_known and plain and use.is_unchanged() and options["weight"] is use.leaves[use.sources[0].place]


_ARGUMENTS = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
"""The positional arguments of `torch.nn.functional.embedding`."""


def _options(use: FunctionUse) -> dict[str, Any]:
    """The arguments of an embedding, by name."""
    arguments, named = tree_unflatten(use.leaves, use.tree)
    return dict(zip(_ARGUMENTS, arguments, strict=False)) | named


def _words(use: FunctionUse) -> tuple[Tensor, int | None]:
    """The words, and the one that has no gradient."""
    options = _options(use)
    padding = options.get("padding_idx")
    return options["input"], padding if padding is None or padding >= 0 else padding + len(options["weight"])


def positions(use: Use | FunctionUse) -> int:
    """The number of positions of an example."""
    shape = use.shape if isinstance(use, Use) else use.outputs[0].shape
    return shape.numel() // max(shape[-1] * use.batch, 1)


def squared_norms_of(parts: Sequence[OuterProducts]) -> Tensor:
    """The squared norm of every example's gradient, [batch], for the sum of some parts."""
    total: Tensor | None = None
    for at, one in enumerate(parts):
        for two in parts[: at + 1]:
            term = _product(one, two) * (1 if one is two else 2)
            total = term if total is None else total + term
    assert total is not None
    return total.clamp_min(0)


def _product(one: OuterProducts, two: OuterProducts) -> Tensor:
    """The inner products of two parts, [batch]."""
    if not one.is_index and not two.is_index:
        return einsum("n t c, n s c, n t f, n s f -> n", one.a, two.a, one.b, two.b)
    if one.is_index and two.is_index:
        alike = (one.a[:, :, None] == two.a[:, None]).to(one.b.dtype)
    else:
        words, dense = (one, two) if one.is_index else (two, one)
        rows = words.a[:, None].expand(-1, dense.a.shape[1], -1)
        alike = dense.a.gather(2, rows)
        alike = alike.mT if words is one else alike
    return einsum("n t s, n t f, n s f -> n", alike, one.b, two.b)
