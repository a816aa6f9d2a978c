"""Sums over the ranks of a torch.distributed group."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(collected: Any, group: dist.ProcessGroup) -> None:
    """Replace a Collector's sums by the sums over all ranks, on every rank.

    If all roots together have fewer rows than columns, the ranks concatenate them, as a single process would. Otherwise
    they sum A.

    Args:
        collected: the Collector; changed in place.
        group: the ranks.
    """
    like = collected.like
    _require_alike(collected.form, like, group)
    layers = [*collected.sums.values(), *collected.biases.values()]
    mine = [collected.examples, collected.weight, *(sums.ones for sums in layers)]
    counts = torch.tensor(mine, dtype=torch.float64, device=like.device)
    dist.all_reduce(counts, group=group)
    collected.examples, collected.weight = round(counts[0].item()), float(counts[1])
    for sums, ones in zip(layers, counts[2:].tolist(), strict=True):
        sums.ones = round(ones)
        if sums.positions and sums.positions * collected.examples != sums.ones:
            sums.positions = 0  # it differs between ranks
        elif sums.positions is None:
            sums.positions = 0
        if sums.b is not None:
            dist.all_reduce(sums.b, group=group)
        if sums.roots is None:
            if sums.a is not None:
                dist.all_reduce(sums.a, group=group)
            continue
        root = torch.cat(sums.roots, 1) if sums.roots else None
        rows = 0 if root is None else root.shape[1]
        known = torch.tensor([rows, sums.a is not None], device=like.device)
        every = [torch.zeros_like(known) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, known, group=group)
        formed = any(bool(one[1]) for one in every)
        width = root.shape[2] if root is not None else sums.a.shape[2]
        if not formed and sum(int(one[0]) for one in every) < width:
            assert root is not None
            sums.roots = [_gathered(root, [int(one[0]) for one in every], group)]
            continue
        total = torch.zeros_like(sums.a) if root is None else root.mT @ root
        if sums.a is not None:
            total = total + sums.a
        dist.all_reduce(total, group=group)
        sums.a, sums.roots = total, []
    for values in collected.plain.values():
        dist.all_reduce(values, group=group)


def _require_alike(form: str, like: Tensor, group: dist.ProcessGroup) -> None:
    """Raise ValueError on every rank unless all ranks have blocks of the same form.

    Raises:
        ValueError: if the ranks' models use their weights differently.
    """
    own = zlib.crc32(form.encode())
    both = torch.tensor([own, -own], dtype=torch.int64, device=like.device)
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    if both.tolist() != [own, -own]:
        raise ValueError(
            f"this rank has the sums {form}, and another rank has other ones, expected models that use the same weights"
            " in the same functions on all ranks: leave the layers out with layers="
        )


def _gathered(root: Tensor, rows: list[int], group: dist.ProcessGroup) -> Tensor:
    """The concatenated roots of all ranks, [groups, n, d]; ranks may have different numbers of rows."""
    padded = root.new_zeros((root.shape[0], max(rows), root.shape[2]))
    padded[:, : root.shape[1]] = root
    every = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(every, padded, group=group)
    return torch.cat([one[:, :count] for one, count in zip(every, rows, strict=True)], 1)


def shares(costs: list[float], ranks: int) -> list[int]:
    """Assign pieces of work to ranks: the most expensive first, each to the rank with the least work so far.

    Example:
        >>> from lensor.curvature.distribution import shares
        >>> shares([1.0, 5.0, 3.0, 3.0], 2)
        [0, 0, 1, 1]
    """
    loads, found = [0.0] * ranks, [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda at: (-costs[at], at)):
        rank = loads.index(min(loads))
        found[place], loads[rank] = rank, loads[rank] + costs[place]
    return found
