"""Settings of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The settings of a run: what it measures, and how.

    Args:
        operations: names of operations; all if empty.
        nets: names of catalogue nets; the paper's if empty.
        implementations: names of implementations besides the standard one; Lensor and the installed peers if empty.
        kinds: kinds of convolutions to measure; all if empty.
        batch: batch size.
        columns: number of columns of the square root of the GGN.
        dtype: dtype of the operands.
        threads: number of torch threads.
        device: "cpu" or "cuda".
        limit: maximum number of convolutions to measure, from the first on.
        repeats: maximum number of rounds.
        seconds: time budget for each implementation, spent in at least three rounds.
        neighbours: number of other processes that keep each core busy meanwhile.
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
    neighbours: int = 0
