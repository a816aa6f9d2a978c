"""The same training with KFAC in three loops: plain torch, Lightning, and accelerate.

    python -m examples.training_loops [--epochs 3]

A small CNN learns the digits of scikit-learn. The optimizer, its learning rate schedule and the order of the examples
are the same, so the loops end with the same parameters. Lightning and accelerate need no changes for KFAC: pass the
module whose forward pass the loop runs, and create the optimizer where any other one would be created.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from lensor.optim import KFAC

LOSS = nn.CrossEntropyLoss()


def digits() -> tuple[DataLoader[Any], tuple[Tensor, Tensor]]:
    """Batches of training images [batch, 1, 8, 8] with labels, in a fixed order, and validation data."""
    found: Any = load_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(found.images / 16.0, dtype=torch.float32)[order, None], torch.tensor(found.target)[order]
    return DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=100), (x[1400:], y[1400:])


def cnn() -> nn.Sequential:
    """The untrained model; its normalisation has no Kronecker factors."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128, 10))


def optimizer_of(model: nn.Module, steps: int) -> tuple[KFAC, LRScheduler]:
    """KFAC for layers, AdamW for normalisation, and a learning rate that falls to zero."""
    plain = [p for one in model.modules() if isinstance(one, nn.GroupNorm) for p in one.parameters()]
    others = [p for p in model.parameters() if all(p is not one for one in plain)]
    groups = [{"params": others}, {"params": plain, "use_kfac": False, "lr": 1e-2}]
    optimizer = KFAC(model, LOSS, params=groups, damping=0.03, kl_clip=1e-2)
    return optimizer, CosineAnnealingLR(optimizer, steps)


def in_torch(model: nn.Module, batches: DataLoader[Any], epochs: int) -> None:
    """Train in a loop of plain torch."""
    optimizer, schedule = optimizer_of(model, epochs * len(batches))
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
            schedule.step()


def in_lightning(model: nn.Module, batches: DataLoader[Any], epochs: int) -> None:
    """Train with Lightning's Trainer."""
    import pytorch_lightning as lightning

    class Digits(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return LOSS(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer, schedule = optimizer_of(self.model, epochs * len(batches))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one worker loads the data
        trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, **quiet)
        trainer.fit(Digits(), batches)


def in_accelerate(model: nn.Module, batches: DataLoader[Any], epochs: int) -> None:
    """Train with accelerate's Accelerator."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer, schedule = optimizer_of(model, epochs * len(batches))
    model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, batches, schedule)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            accelerator.backward(LOSS(model(x), y))
            optimizer.step()
            schedule.step()


LOOPS: dict[str, Callable[[nn.Module, DataLoader[Any], int], None]] = {
    "torch": in_torch,
    "Lightning": in_lightning,
    "accelerate": in_accelerate,
}


def trained(epochs: int) -> dict[str, tuple[nn.Module, float, float]]:
    """The model, its accuracy on the validation images, and the seconds of training, by loop."""
    batches, (x, y) = digits()
    found = {}
    for name, loop in LOOPS.items():
        model, start = cnn(), time.perf_counter()
        loop(model, batches, epochs)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            found[name] = model, float((model.eval()(x).argmax(1) == y).float().mean()), seconds
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Train in all loops, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args(argv)
    print("loop        accuracy  seconds")
    for name, (_, accuracy, seconds) in trained(arguments.epochs).items():
        print(f"{name:10}  {accuracy:8.3f}  {seconds:7.1f}")


if __name__ == "__main__":
    main()
