"""The cross entropy of language models."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lensor.curvature.losses import LossRoot
from lensor.curvature.registry import register_loss


class TokenCrossEntropyLoss(nn.CrossEntropyLoss):
    """Cross entropy of outputs [batch, positions, classes], with the classes last, as language models return them.

    Use it for any of the functions of `lensor.curvature`. For outputs [batch, classes, ...] and for
    [batch · positions, classes], use `torch.nn.CrossEntropyLoss`. With reduction "mean", the sum is divided by the
    number (or total weight) of the targets that count, as in torch.

    Args:
        weight: the weight of each class.
        ignore_index: targets with this value do not count.
        reduction: "mean" or "sum".
        label_smoothing: as for `torch.nn.CrossEntropyLoss`.
        shift: whether position t predicts the target at position t + 1, as in causal language models that get their own
            inputs as targets. The last position does not count.

    Example:
        >>> import torch
        >>> from lensor.curvature import TokenCrossEntropyLoss, kfac
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10))
        >>> tokens = torch.randint(10, (2, 3))
        >>> factors = kfac(model, TokenCrossEntropyLoss(shift=True), (tokens, tokens))
        >>> factors["1.weight"].A.shape, factors["1.weight"].B.shape
        (torch.Size([1, 4, 4]), torch.Size([1, 10, 10]))

    Raises:
        ValueError: if the shapes of outputs and targets do not match.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        shift: bool = False,
    ) -> None:
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        self.shift = shift

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: the outputs of the model, [batch, positions, classes].
            target: the targets, [batch, positions].
        """
        return super().forward(input.movedim(-1, 1), self.aligned(input, target))

    def aligned(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The target of each position of the outputs: the next one with `shift`, and none for the last position."""
        if outputs.ndim < 2 or targets.shape != outputs.shape[:-1]:
            raise ValueError(
                f"targets have shape {tuple(targets.shape)}, expected {tuple(outputs.shape[:-1])}, that of the outputs"
                f" {tuple(outputs.shape)} without the classes"
            )
        if not self.shift:
            return targets
        if outputs.ndim != 3:
            raise ValueError(
                f"outputs have shape {tuple(outputs.shape)}, expected [batch, positions, classes] with shift=True"
            )
        return torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], self.ignore_index)], 1)

    def _plain(self, outputs: Tensor, targets: Tensor | None, reduction: str = "sum") -> LossRoot:
        """The root of torch's cross entropy for the same outputs with the classes second."""
        loss = nn.CrossEntropyLoss(
            self.weight, ignore_index=self.ignore_index, reduction=reduction, label_smoothing=self.label_smoothing
        )
        aligned = None if targets is None else self.aligned(outputs, targets)
        root = LossRoot(loss, outputs.movedim(-1, 1), aligned, len(outputs))
        if aligned is None and self.shift and root.total is not None:
            root.total[:, -1] = 0
        return root

    def _root(self, outputs: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        for column in self._plain(outputs, targets).columns():
            yield column.movedim(1, -1)

    def _sampled(self, outputs: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return next(self._plain(outputs, targets).samples(1, generator)).movedim(1, -1)

    def _normaliser(self, outputs: Tensor, targets: Tensor | None) -> float | Tensor:
        if targets is None:
            return float(outputs[:, 1:, 0].numel() if self.shift else outputs[..., 0].numel())
        return self._plain(outputs, targets, "mean").normaliser


register_loss(
    TokenCrossEntropyLoss,
    root=TokenCrossEntropyLoss._root,
    sampler=TokenCrossEntropyLoss._sampled,
    normaliser=TokenCrossEntropyLoss._normaliser,
)
