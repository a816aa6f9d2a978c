"""Learning rate, momentum and damping that follow the quadratic model of the loss (Martens & Grosse, 2015)."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lensor.optim.passes import Passes
from lensor.optim.quadratic import averaged, quadratic
from lensor.optim.updates import Group, States

_RAISED, _LOWERED = 1 / 4, 3 / 4
"""The damping grows if the ratio of decreases is below the first bound, and decreases above the second."""

_ROUNDING = 8
"""A change of the loss is lost in rounding if it is smaller than this many units in the last place."""


@dataclass(frozen=True)
class Chosen:
    """What a step uses.

    Args:
        scale: the factor of the directions.
        momentum: the factor of the momentum buffers; None for the option of each group.
        damping: the factor of the dampings after the step.
        rejected: whether the parameters stay as they are, because the loss would grow.
        trouble: why the step is an error, or "".
    """

    scale: float | Tensor
    momentum: float | None = None
    damping: float = 1.0
    rejected: bool = False
    trouble: str = ""


@dataclass(eq=False)
class Adaptation:
    """The options of adaptive steps.

    Args:
        lr: whether the step minimises the quadratic model over the direction and the momentum buffer.
        damping: whether the damping is adapted.
        interval: number of steps between changes of the damping.
        decay: the factor of the damping per step, while it decreases.
        bounds: the smallest and the largest damping.
    """

    lr: bool
    damping: bool
    interval: int
    decay: float
    bounds: tuple[float, float]
    ratio: float | None = None
    """The last ratio of the change of the loss to the predicted one. While it is low, every step measures it."""

    def __post_init__(self) -> None:
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f"damping_interval is {self.interval!r}, expected a whole number of at least 1")
        if not 0 < self.decay < 1:
            raise ValueError(f"damping_decay is {self.decay}, expected a number between 0 and 1")
        if len(self.bounds) != 2 or not 0 < self.bounds[0] <= self.bounds[1] < math.inf:
            raise ValueError(f"damping_range is {self.bounds}, expected two positive numbers, the smaller one first")

    def require_in_range(self, damping: float) -> None:
        """Raise ValueError for an initial damping that is out of bounds."""
        low, high = self.bounds
        if self.damping and not low <= damping <= high:
            raise ValueError(f"damping is {damping}, expected a number in damping_range, from {low} to {high}")

    def choose(
        self,
        passes: Passes,
        groups: Sequence[Group],
        names: Mapping[int, str],
        directions: Mapping[int, Tensor],
        scale: float | Tensor,
        states: States,
        steps: int,
        group: dist.ProcessGroup | None,
    ) -> Chosen:
        """Choose the factors of a step.

        Args:
            passes: the passes of the closure.
            groups: the groups of parameters with curvature.
            names: the names of their parameters, by id.
            directions: the direction of a parameter, by id; the gradient is used if there is none.
            scale: the factor of the directions, if it is not adapted.
            states: the states, with the momentum buffers.
            steps: the number of steps so far.
            group: the ranks that train together.
        """
        is_due = (steps + 1) % self.interval == 0
        measures = self.damping and (is_due or self.ratio is None or self.ratio < _RAISED)
        moved = [(one, p) for one in groups if one["lr"] for p in one["params"] if p.grad is not None]
        if not (self.lr or measures) or not moved:
            return Chosen(scale)
        for _, p in moved:
            if id(p) not in names:
                raise ValueError(
                    f"params has a parameter of shape {tuple(p.shape)} that is not one of the model's, expected none"
                    " with adapt_lr or adapt_damping"
                )
        lr = max(one["lr"] for one, _ in moved) if self.lr else 1.0
        spans = self._spans(moved, names, directions, scale, states, lr)
        model = quadratic(
            passes,
            spans,
            {names[id(p)]: p.grad for _, p in moved if p.grad is not None},
            {names[id(p)]: one["damping"] for one, p in moved},
            group,
        )
        best = model.minimum() if self.lr else -torch.ones(1, dtype=torch.float64)
        predicted = model.value(lr * best)
        if not math.isfinite(predicted):
            return Chosen(scale, trouble="the quadratic model of the loss is not finite, expected finite derivatives")
        found = Chosen(-float(best[0]), -float(best[1]) if len(best) > 1 else 0.0) if self.lr else Chosen(scale)
        if not measures:
            return found
        step, coefficients = [], (lr * best).tolist()
        for _, p in moved:
            name = names[id(p)]
            parts = [c * one[name] for c, one in zip(coefficients, spans, strict=True) if name in one]
            step.append((p, sum(parts[1:], parts[0])))
        losses = [torch.tensor(one, dtype=torch.float64) for one in (passes.loss(), passes.loss_after(step))]
        before, after = averaged(losses, group, moved[0][1].device).tolist()
        return self._measured(found, predicted, before, after, passes.precision, is_due)

    def _spans(
        self,
        moved: Sequence[tuple[Group, Tensor]],
        names: Mapping[int, str],
        directions: Mapping[int, Tensor],
        scale: float | Tensor,
        states: States,
        lr: float,
    ) -> list[dict[str, Tensor]]:
        """The directions of the step, of descent: with an adapted learning rate, the buffers are a second one.

        The learning rates of the groups, divided by the largest one, are weights of their parameters.
        """
        found: dict[str, Tensor] = {}
        buffers: dict[str, Tensor] = {}
        for one, p in moved:
            name, direction = names[id(p)], directions.get(id(p), p.grad)
            assert direction is not None
            buffer = states[p].get("momentum_buffer") if one["momentum"] else None
            if self.lr:
                found[name] = direction if one["lr"] == lr else direction * (one["lr"] / lr)
                if buffer is not None:
                    buffers[name] = buffer if one["lr"] == lr else buffer * (one["lr"] / lr)
            else:
                direction = direction * scale if buffer is None else direction * scale + one["momentum"] * buffer
                found[name] = one["lr"] * direction
        return [found, buffers] if buffers else [found]

    def _measured(
        self, found: Chosen, predicted: float, before: float, after: float, precision: float, is_due: bool
    ) -> Chosen:
        """The step with the factor of the damping, from the ratio of the change of the loss to the predicted one.

        Args:
            found: the step.
            predicted: the predicted change of the loss.
            before: the loss before the step.
            after: the loss after the step.
            precision: the relative precision of the loss.
            is_due: whether the damping may decrease in this step.
        """
        if not math.isfinite(before):
            return replace(found, trouble=f"the loss is {before}, expected a finite number: no step was taken")
        lower, rounding = self.decay**self.interval, _ROUNDING * precision * abs(before)
        if not math.isfinite(after):
            after = math.inf
        elif max(abs(predicted), abs(after - before)) <= rounding:
            return found
        self.ratio = (after - before) / predicted if predicted else -math.inf
        if after > before + rounding:
            self.ratio = min(self.ratio, 0.0)  # a fixed learning rate may predict that the loss grows
        if self.ratio < _RAISED:
            return replace(found, damping=1 / lower, rejected=after > before + rounding)
        return replace(found, damping=lower) if self.ratio > _LOWERED and is_due else found

    def rescale(self, groups: Sequence[MutableMapping[str, Any]], factor: float) -> None:
        """Multiply the dampings of groups by a factor, within the bounds."""
        low, high = self.bounds
        for one in groups if factor != 1 else ():
            one["damping"] = min(max(one["damping"] * factor, low), high)
