"""Settings of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a run measures, and how.

    Args:
        operations: names of operations; all if empty.
        nets: names of catalogue nets; the paper's if empty.
        implementations: names besides the standard; Lensor's and the installed peers' if empty.
        kinds: kinds of convolutions; all if empty.
        batch: batch size.
        columns: columns of the square root of the GGN.
        dtype: dtype of the operands.
        threads: threads of torch.
        device: "cpu" or "cuda".
        limit: maximum number of convolutions; the first ones are measured.
        repeats: maximum number of rounds.
        seconds: time for each implementation, in at least three rounds.
    """

    operations: tuple[str, ...] = ()
    nets: tuple[str, ...] = ()
    implementations: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    batch: int = 8
    columns: int = 4
    dtype: str = "float32"
    threads: int = 2
    device: str = "cpu"
    limit: int | None = None
    repeats: int = 20
    seconds: float = 0.3
