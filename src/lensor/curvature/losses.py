"""Square roots of a loss's Hessian by the model's outputs: exact, sampled, or from the gradients.

With the loss written as Σ_n l_n / Z (Z = 1 for `reduction="sum"`), a root S has one column s of the outputs' shape for
each v, different examples never share an entry, and Σ_v s_v s_vᵀ is the Hessian (or its estimate) of the loss as given.

- Cross entropy with target weights t (one-hot, smoothed, class-weighted or given as probabilities, T = Σ t):
  T (diag(p) − p pᵀ), root √T (√p ⊙ e_c − p √p_c).
- Squared error: 2 I.
- Binary cross entropy with logits: σ(1 − σ), times the entry's weight and, with `pos_weight` w, 1 + (w − 1) y.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lensor.choices import FactorFisher
from lensor.curvature.layout import BatchAxis

"""What may stand for the Hessian of the loss by the outputs."""


class LossRoot:
    """The root of one batch's Hessian.

    Args:
        loss: an nn.CrossEntropyLoss, nn.MSELoss or nn.BCEWithLogitsLoss, with reduction "mean" or "sum".
        outputs: the model's outputs for the batch, with a graph if gradients are asked for.
        targets: the targets; None if they are not at hand and every example counts the same.
        examples: their number.
        axis: where they lie in the outputs; the outputs may have several rows for each, the examples outermost unless
            said otherwise.

    Raises:
        TypeError: for other losses.
        ValueError: for other reductions, or shapes that do not fit.

    Attributes:
        normaliser: Z; zero if no target of the batch counts in a mean.
    """

    def __init__(
        self,
        loss: nn.Module,
        outputs: Tensor,
        targets: Tensor | None,
        examples: int,
        axis: BatchAxis | None = None,
    ) -> None:
        require_loss(loss)
        require_tensor(targets)
        self.loss, self.outputs, self.targets = loss, outputs, targets
        if outputs.ndim == 0 or len(outputs) % examples:
            raise ValueError(
                f"the model returns {tuple(outputs.shape)} for {examples} examples, expected that many rows, or as many"
                " for each example, the examples outermost"
            )
        self._rows = len(outputs) // examples
        self._inner = axis is not None and axis.order == "inner"
        f = outputs.detach()
        self.f = f if f.dtype in (torch.float32, torch.float64) else f.float()
        if isinstance(loss, nn.CrossEntropyLoss):
            self.total, self.normaliser = class_weights(loss, self.f, targets)
        else:
            if targets is not None and targets.shape != outputs.shape:
                raise ValueError(f"targets have shape {tuple(targets.shape)}, outputs {tuple(outputs.shape)}")
            self.total, self.normaliser = None, float(outputs.numel())
        if loss.reduction == "sum":
            self.normaliser = 1.0

    @property
    def _scale(self) -> float:
        """What columns are divided by; a batch of which no target counts has columns of zeros."""
        return self.normaliser**-0.5 if self.normaliser else 0.0

    def columns(self) -> Iterator[Tensor]:
        """The exact root, column by column: one for each entry of an example's outputs, in each of its rows."""
        batch, entries = len(self.f), self.outputs.shape[1:].numel()
        diagonal = None if self.total is not None else self._diagonal_root().reshape(batch, entries)
        for place in range(entries):
            if diagonal is not None:
                column = torch.zeros_like(diagonal)
                column[:, place] = diagonal[:, place]
            else:
                column = self._class_column(place)
            column = (column.reshape(self.f.shape) * self._scale).to(self.outputs.dtype)
            if self._rows == 1:
                yield column
                continue
            for row in range(self._rows):
                examples = len(column) // self._rows
                those = slice(row * examples, (row + 1) * examples) if self._inner else slice(row, None, self._rows)
                alone = torch.zeros_like(column)
                alone[those] = column[those]
                yield alone

    def _class_column(self, place: int) -> Tensor:
        """√T (√p ⊙ e_c − p √p_c) at one position, for class c; zero at the others."""
        assert self.total is not None
        p = self.f.softmax(1).flatten(2) if self.f.ndim > 2 else self.f.softmax(1)[..., None]
        c, position = divmod(place, p.shape[2])
        those = p[..., position]
        root = (self.total.reshape(len(p), -1)[:, position] * those[:, c]).sqrt()
        column = torch.zeros_like(p)
        column[..., position] = -those * root[:, None]
        column[:, c, position] += root
        return column

    def samples(self, count: int, generator: torch.Generator | None) -> Iterator[Tensor]:
        """Gradients for outputs drawn from the model's own distribution: a root in expectation."""
        for _ in range(count):
            if self.total is not None:
                p = self.f.softmax(1).movedim(1, -1)
                drawn = torch.multinomial(p.nan_to_num(1.0).reshape(-1, p.shape[-1]), 1, generator=generator).reshape(
                    p.shape[:-1]
                )
                hot = nn.functional.one_hot(drawn, p.shape[-1]).to(p.dtype)
                column = ((p - hot) * self.total.sqrt()[..., None]).movedim(-1, 1)
            elif isinstance(self.loss, nn.MSELoss):
                noise = torch.randn(self.f.shape, generator=generator, dtype=self.f.dtype, device=self.f.device)
                column = noise * 2**0.5
            else:
                p = self.f.sigmoid()
                hot = torch.bernoulli(p.nan_to_num(0.5), generator=generator)
                column = (p - hot) * self._weights().sqrt()
            yield (column * (self._scale * count**-0.5)).to(self.outputs.dtype)

    def gradient(self) -> Iterator[Tensor]:
        """The gradients of the examples' own losses: one column."""
        assert self.targets is not None
        loss, targets, f = self.loss, self.targets, self.f
        if not self.normaliser:  # where torch's mean is 0/0
            yield torch.zeros_like(self.outputs)
            return
        if f.dtype != self.outputs.dtype:  # half precision cannot count the targets of a mean
            loss = copy.deepcopy(loss).to(f.dtype)
            targets = targets.to(f.dtype) if targets.is_floating_point() else targets
        with torch.enable_grad():
            f = f.detach().requires_grad_()
            (found,) = torch.autograd.grad(loss.forward(f, targets), f)  # which no global hook changes
        yield (found * self.normaliser**0.5).to(self.outputs.dtype)

    def of(self, fisher: FactorFisher, count: int, generator: torch.Generator | None) -> Iterator[Tensor]:
        """The root that a Fisher matrix is made of; nothing for "forward-only"."""
        ways: dict[str, Callable[[], Iterator[Tensor]]] = {
            "type-2": self.columns,
            "mc": lambda: self.samples(count, generator),
            "empirical": self.gradient,
            "forward-only": lambda: iter(()),
        }
        return ways[fisher]()

    def _weights(self) -> Tensor:
        """What each entry of a binary cross entropy counts."""
        found = torch.ones_like(self.f)
        weight, positive = getattr(self.loss, "weight", None), getattr(self.loss, "pos_weight", None)
        if weight is not None:
            found = found * weight
        if positive is not None:
            assert self.targets is not None
            found = found * (1 + (positive - 1) * self.targets)
        return found

    def _diagonal_root(self) -> Tensor:
        """The root of a Hessian that is diagonal: squared error's and binary cross entropy's."""
        if isinstance(self.loss, nn.MSELoss):
            return torch.full_like(self.f, 2**0.5)
        p = self.f.sigmoid()
        return (p * (1 - p) * self._weights()).sqrt()


def require_tensor(targets: Any) -> None:
    """Raise TypeError for targets that torch's losses do not take."""
    if targets is not None and not isinstance(targets, Tensor):
        raise TypeError(f"targets are a {type(targets).__name__}, expected a tensor, as torch's losses take")


def require_counted(total: float) -> float:
    """What a mean over all of the data divides by; ValueError if it is zero."""
    if not total:
        raise ValueError("no target of the data counts: the mean loss is not defined")
    return total


def require_loss(loss: nn.Module) -> None:
    """Raise for a loss whose Hessian is not known.

    Raises:
        TypeError: for other losses.
        ValueError: for other reductions.
    """
    known = (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss)
    if type(loss) not in known or "forward" in vars(loss):
        kind = type(loss).__name__ if not isinstance(loss, known) else f"subclass or a changed {type(loss).__name__}"
        raise TypeError(
            f"loss is a {kind}, expected torch.nn.CrossEntropyLoss, MSELoss or BCEWithLogitsLoss itself: only their"
            " Hessian is known"
        )
    if loss._forward_hooks or loss._forward_pre_hooks or loss._backward_hooks or loss._backward_pre_hooks:
        raise TypeError(f"loss is a {type(loss).__name__} with hooks, whose Hessian is not known")
    if loss.reduction not in ("mean", "sum"):
        raise ValueError(f"loss has reduction={loss.reduction!r}, expected 'mean' or 'sum'")


def class_weights(loss: nn.CrossEntropyLoss, f: Tensor, targets: Tensor | None) -> tuple[Tensor, float]:
    """What each position's log-probabilities count together, [batch, *positions], and what the mean divides by."""
    if f.ndim < 2:
        raise ValueError(f"outputs have shape {tuple(f.shape)}, expected [batch, classes, ...]")
    classes, smoothing = f.shape[1], loss.label_smoothing
    weight = torch.ones(classes, dtype=f.dtype, device=f.device) if loss.weight is None else loss.weight.to(f.dtype)
    if targets is None:
        return f.new_ones((len(f), *f.shape[2:])), float(f[:, 0].numel())
    if targets.is_floating_point():
        if targets.shape != f.shape:
            raise ValueError(f"targets have shape {tuple(targets.shape)}, outputs {tuple(f.shape)}")
        shares = targets * (1 - smoothing) + smoothing / classes
        total = (shares.movedim(1, -1) * weight).sum(-1)
        return total, float(total.numel())
    if targets.shape != (len(f), *f.shape[2:]):
        raise ValueError(f"targets have shape {tuple(targets.shape)}, expected {(len(f), *f.shape[2:])}")
    counted = targets != loss.ignore_index
    wrong = counted & ((targets < 0) | (targets >= classes))
    if bool(wrong.any()):
        raise ValueError(
            f"targets have class {int(targets[wrong][0])}, expected 0 to {classes - 1}"
            + (f" or ignore_index={loss.ignore_index}" if loss.ignore_index != -100 else "")
        )
    targets = targets.long()
    own = weight[targets.where(counted, torch.zeros_like(targets))] * counted
    total = own * (1 - smoothing) + counted * (weight.sum() * smoothing / classes)
    return total, float(own.sum())
