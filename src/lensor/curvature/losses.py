"""Square roots of the loss Hessian with respect to the model outputs: exact, sampled, or from the gradients.

The loss is Σ_n l_n / Z, with Z = 1 for `reduction="sum"`. A root S has one column s_v of the outputs' shape for each v.
The examples use disjoint entries, and Σ_v s_v s_vᵀ is the Hessian (or an estimate) of the loss as given.

- Cross entropy with target weights t (one-hot, smoothed, class-weighted or given as probabilities, T = Σ t):
  T (diag(p) − p pᵀ), root √T (√p ⊙ e_c − p √p_c).
- Squared error: 2 I.
- Binary cross entropy with logits: σ(1 − σ), times the entry's weight and, with `pos_weight` w, 1 + (w − 1) y.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lensor.choices import FactorFisher
from lensor.curvature.batch_axes import BatchAxis


class LossRoot:
    """A square root of the loss Hessian of one batch.

    Args:
        loss: an nn.CrossEntropyLoss, nn.MSELoss or nn.BCEWithLogitsLoss, with reduction "mean" or "sum".
        outputs: the model's outputs for the batch, with a graph if gradients are requested.
        targets: the targets; None if they are not available, in which case every example has the same weight.
        examples: number of examples.
        axis: position of the examples in the outputs. Outputs may have several rows per example; the examples are
            outermost by default.

    Raises:
        TypeError: for an unsupported loss.
        ValueError: for an unsupported reduction, or a shape that does not match the outputs.

    Attributes:
        normaliser: Z; zero if no target in the batch contributes to the mean.
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
        self.loss, self.targets = loss, targets
        self._divide(outputs, examples, axis)
        if isinstance(loss, nn.CrossEntropyLoss):
            self.total, self.normaliser = class_weights(loss, self.f, targets)
        else:
            if targets is not None and targets.shape != outputs.shape:
                raise ValueError(f"targets have shape {tuple(targets.shape)}, expected {tuple(outputs.shape)}")
            self.total, self.normaliser = None, float(outputs.numel())
        if loss.reduction == "sum":
            self.normaliser = 1.0

    def _divide(self, outputs: Tensor, examples: int, axis: BatchAxis | None) -> None:
        """Find the rows of the outputs that belong to each example."""
        self.outputs = outputs
        if outputs.ndim == 0 or len(outputs) % examples:
            raise ValueError(
                f"the model's outputs have shape {tuple(outputs.shape)} for {examples} examples, expected the examples,"
                " or equally many rows for each, in the first axis"
            )
        self._rows = len(outputs) // examples
        self._inner = axis is not None and axis.order == "inner"
        f = outputs.detach()
        self.f = f if f.dtype in (torch.float32, torch.float64) else f.float()

    @property
    def _scale(self) -> float:
        """The scale of the columns; zero for a batch whose targets are all ignored."""
        return self.normaliser**-0.5 if self.normaliser else 0.0

    def columns(self) -> Iterator[Tensor]:
        """The columns of the exact root: one for each entry of one example's outputs."""
        batch, entries = len(self.f), self.outputs.shape[1:].numel()
        diagonal = None if self.total is not None else self._diagonal_root().reshape(batch, entries)
        for place in range(entries):
            if diagonal is not None:
                column = torch.zeros_like(diagonal)
                column[:, place] = diagonal[:, place]
            else:
                column = self._class_column(place)
            yield from self._by_rows((column.reshape(self.f.shape) * self._scale).to(self.outputs.dtype))

    def _by_rows(self, column: Tensor) -> Iterator[Tensor]:
        """Divide a column into one for each row of an example: their losses are added, so they share no column."""
        if self._rows == 1:
            yield column
            return
        for row in range(self._rows):
            examples = len(column) // self._rows
            those = slice(row * examples, (row + 1) * examples) if self._inner else slice(row, None, self._rows)
            alone = torch.zeros_like(column)
            alone[those] = column[those]
            yield alone

    def _class_column(self, place: int) -> Tensor:
        """√T (√p ⊙ e_c − p √p_c) at one position, for class c; zero at the other positions."""
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
        """Gradients for outputs sampled from the model's own distribution: a root in expectation."""
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
        """The gradients of the examples' losses, in one column."""
        assert self.targets is not None
        loss, targets, f = self.loss, self.targets, self.f
        if not self.normaliser:  # torch's mean would be 0/0
            yield torch.zeros_like(self.outputs)
            return
        if f.dtype != self.outputs.dtype:  # half precision cannot represent the number of targets in a mean
            loss = copy.deepcopy(loss).to(f.dtype)
            targets = targets.to(f.dtype) if targets.is_floating_point() else targets
        with torch.enable_grad():
            f = f.detach().requires_grad_()
            (found,) = torch.autograd.grad(loss.forward(f, targets), f)  # global hooks do not change forward()
        yield (found * self.normaliser**0.5).to(self.outputs.dtype)

    def of(self, fisher: FactorFisher, count: int, generator: torch.Generator | None) -> Iterator[Tensor]:
        """The columns of the root for a choice of `fisher`; none for "forward-only"."""
        ways: dict[str, Callable[[], Iterator[Tensor]]] = {
            "type-2": self.columns,
            "mc": lambda: self.samples(count, generator),
            "empirical": self.gradient,
            "forward-only": lambda: iter(()),
        }
        return ways[fisher]()

    def _weights(self) -> Tensor:
        """The weight of each entry in a binary cross entropy."""
        found = torch.ones_like(self.f)
        weight, positive = getattr(self.loss, "weight", None), getattr(self.loss, "pos_weight", None)
        if weight is not None:
            found = found * weight
        if positive is not None:
            assert self.targets is not None
            found = found * (1 + (positive - 1) * self.targets)
        return found

    def _diagonal_root(self) -> Tensor:
        """The root of a diagonal Hessian, for the squared error or the binary cross entropy."""
        if isinstance(self.loss, nn.MSELoss):
            return torch.full_like(self.f, 2**0.5)
        p = self.f.sigmoid()
        return (p * (1 - p) * self._weights()).sqrt()


def require_tensor(targets: Any) -> None:
    """Raise TypeError for targets that torch's losses do not accept."""
    if targets is not None and not isinstance(targets, Tensor):
        raise TypeError(f"targets have type {type(targets).__name__}, expected a tensor for torch's losses")


def require_counted(total: float) -> float:
    """Return the divisor of a mean over all data; ValueError if it is zero."""
    if not total:
        raise ValueError("the data has no target that counts, expected at least one: the mean loss is undefined")
    return total


def _hint(loss: Any) -> str:
    """What to do about an unsupported loss."""
    functions = {
        nn.functional.cross_entropy: "CrossEntropyLoss",
        nn.functional.mse_loss: "MSELoss",
        nn.functional.binary_cross_entropy_with_logits: "BCEWithLogitsLoss",
    }
    if isinstance(loss, (Tensor, Mapping, Sequence, DataLoader)):
        return "the arguments are model, loss and data, in this order"
    if isinstance(loss, FunctionType) and loss in functions:
        return f"pass torch.nn.{functions[loss]}() instead of the function"
    return "the Hessian of other losses is unknown, unless you pass it to lensor.curvature.register_loss"


def require_loss(loss: nn.Module) -> None:
    """Raise for a loss whose Hessian is unknown.

    Raises:
        TypeError: for an unsupported loss.
        ValueError: for an unsupported reduction.
    """
    known = (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss)
    if type(loss) not in known or "forward" in vars(loss):
        kind = (
            type(loss).__name__
            if not isinstance(loss, known)
            else f"{type(loss).__name__}, and is a subclass or a changed instance of a supported loss"
        )
        raise TypeError(
            f"loss has type {kind}, expected torch.nn.CrossEntropyLoss, MSELoss or BCEWithLogitsLoss itself:"
            f" {_hint(loss)}"
        )
    if loss._forward_hooks or loss._forward_pre_hooks or loss._backward_hooks or loss._backward_pre_hooks:
        raise TypeError(
            f"loss is a {type(loss).__name__} with hooks, expected one without: hooks may change the Hessian"
        )
    if loss.reduction not in ("mean", "sum"):
        raise ValueError(f"loss has reduction={loss.reduction!r}, expected 'mean' or 'sum'")


def class_weights(loss: nn.CrossEntropyLoss, f: Tensor, targets: Tensor | None) -> tuple[Tensor, float]:
    """The total weight of each position's log-probabilities, [batch, *positions], and the divisor of the mean."""
    if f.ndim < 2:
        raise ValueError(f"outputs have shape {tuple(f.shape)}, expected [batch, classes, ...]")
    classes, smoothing = f.shape[1], loss.label_smoothing
    if loss.weight is not None and loss.weight.shape != (classes,):
        raise ValueError(
            f"the weight of the loss has shape {tuple(loss.weight.shape)}, expected {(classes,)}: one entry per class"
        )
    weight = torch.ones(classes, dtype=f.dtype, device=f.device) if loss.weight is None else loss.weight.to(f.dtype)
    if targets is None:
        return f.new_ones((len(f), *f.shape[2:])), float(f[:, 0].numel())
    if targets.is_floating_point():
        if targets.shape == (len(f), *f.shape[2:]):
            raise TypeError(
                f"targets have dtype {targets.dtype} and shape {tuple(targets.shape)}, expected integer class indices"
                f" (call targets.long()), or class probabilities of shape {tuple(f.shape)}"
            )
        if targets.shape != f.shape:
            raise ValueError(f"targets have shape {tuple(targets.shape)}, expected {tuple(f.shape)}")
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
