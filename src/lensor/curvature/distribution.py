"""Sums over the ranks of a torch.distributed group."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
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


def gather_to_owners(collected: Any, reduction: Reduction) -> None:
    """Replace a Collector's sums by the sums over all ranks, each on one rank only; remove them from the other ranks.

    The ranks exchange one vector of counts, and reduce one buffer for each owner. Roots are concatenated on the owner
    if all of them together have fewer rows than columns.

    Args:
        collected: the Collector; changed in place.
        reduction: the ranks and owners; it may already have started with sums that have not changed since.

    Raises:
        ValueError: if the ranks' models use their weights differently.
    """
    group, owners = reduction.group, reduction.owners
    size, me = dist.get_world_size(group), dist.get_rank(group)
    layers: dict[str, Any] = {**collected.sums, **collected.biases}
    roots = {name: torch.cat(one.roots, 1) if one.roots else None for name, one in layers.items()}
    mine: list[float] = [zlib.crc32(collected.form.encode()), collected.examples, collected.weight]
    for name, one in layers.items():
        root = roots[name]
        mine += [one.ones, 0 if root is None else root.shape[1], one.a is not None]
    counts = torch.tensor(mine, dtype=torch.float64, device=collected.like.device)
    gathered = [torch.empty_like(counts) for _ in range(size)]
    dist.all_gather(gathered, counts, group=group)
    every = torch.stack(gathered).tolist()
    if any(one[0] != mine[0] for one in every):
        raise _unlike(collected.form)
    collected.examples = round(sum(one[1] for one in every))
    collected.weight = sum(one[2] for one in every)
    joined: list[tuple[str, list[int]]] = []
    for at, (name, one) in enumerate(layers.items()):
        ones, rows, formed = ([line[3 + 3 * at + which] for line in every] for which in range(3))
        one.ones, root = round(sum(ones)), roots[name]
        if not one.positions or one.positions * collected.examples != one.ones:
            one.positions = 0  # unknown, or different between ranks
        parts = ["b"] if one.b is not None else []
        if one.roots is not None:
            width = root.shape[2] if root is not None else one.a.shape[2]
            if not any(formed) and sum(rows) < width:
                joined.append((name, [round(count) for count in rows]))
            else:
                if root is not None:
                    one.a = root.mT @ root if one.a is None else one.a.add_(root.mT @ root)
                one.roots = []
        for part in [*parts, *(["a"] if one.a is not None else [])]:
            reduction.add(name, one, part)
    reduction.finish()
    _join(layers, roots, joined, owners, group)
    for kind in ("sums", "biases"):
        setattr(collected, kind, {name: one for name, one in getattr(collected, kind).items() if owners[name] == me})


class Reduction:
    """Sums of symmetric matrices over all ranks, each on its owner; they can start before all matrices are complete.

    All ranks must start the same sums in the same order. About half of the entries of a matrix are sent.

    Args:
        group: the ranks.
        owners: the rank that gets the sums of a parameter, by the parameter's name.
        size: the number of bytes of matrices for one owner at which a sum is started.
    """

    def __init__(self, group: dist.ProcessGroup, owners: Mapping[str, int], size: int = 2**24) -> None:
        self.group, self.owners, self.size = group, owners, size
        self._waiting: dict[tuple[int, torch.dtype], list[tuple[Any, str]]] = {}
        self._running: list[tuple[int, list[tuple[Any, str, Tensor, int]], Tensor, Any]] = []

    def add(self, name: str, one: Any, part: str) -> None:
        """Add an attribute of an object to the tensors that are summed, unless it has been added with the same values.

        Args:
            name: the parameter that it belongs to.
            one: the object.
            part: the name of the attribute.
        """
        tensor = getattr(one, part)
        for _, parts, _, _ in self._running:
            for known, which, earlier, version in parts:
                if known is one and which == part and earlier is tensor and version == tensor._version:
                    return
        key = self.owners[name], tensor.dtype
        waiting = self._waiting.setdefault(key, [])
        if any(known is one and which == part for known, which in waiting):
            return
        waiting.append((one, part))
        if sum(getattr(one, part).nbytes for one, part in waiting) >= self.size:
            self._start(key)

    def start(self) -> None:
        """Start the sums of all tensors that have been added."""
        for key in list(self._waiting):
            self._start(key)

    def _start(self, key: tuple[int, torch.dtype]) -> None:
        owner, parts = key[0], [(one, part, getattr(one, part)) for one, part in self._waiting.pop(key)]
        flat = torch.cat([folded(tensor).flatten() for _, _, tensor in parts])
        work = dist.reduce(flat, dist.get_global_rank(self.group, owner), group=self.group, async_op=True)
        self._running.append((owner, [(*one, one[2]._version) for one in parts], flat, work))

    def finish(self) -> None:
        """Start what has not been started, wait, and set the attributes to the sums on their owner.

        If a tensor has changed since its sum was started, it must have been added again.
        """
        self.start()
        me = dist.get_rank(self.group)
        for owner, parts, flat, work in self._running:
            work.wait()
            if owner != me:
                continue
            pieces = flat.split(
                [len(tensor) * tensor.shape[1] * (tensor.shape[1] // 2 + 1) for _, _, tensor, _ in parts]
            )
            for (one, part, tensor, version), piece in zip(parts, pieces, strict=True):
                if getattr(one, part) is tensor and tensor._version == version:
                    setattr(one, part, unfolded(piece.view(len(tensor), tensor.shape[1], -1)))
        self._running = []

    def drop(self) -> None:
        """Forget all sums."""
        self._waiting = {}
        for _, _, _, work in self._running:
            work.wait()
        self._running = []


def folded(matrices: Tensor) -> Tensor:
    """The entries of symmetric matrices [groups, n, n], each of them once or twice, as [groups, n, n // 2 + 1].

    With k = n // 2 + 1, these are the first k columns. Above the diagonal, their first k rows would repeat other
    values; they contain the upper triangle of the last n − k rows and columns instead.

    Example:
        >>> import torch
        >>> from lensor.curvature.distribution import folded, unfolded
        >>> matrix = torch.tensor([[[1., 2, 3], [2, 4, 5], [3, 5, 6]]])
        >>> folded(matrix)
        tensor([[[1., 6.],
                 [2., 4.],
                 [3., 5.]]])
        >>> torch.equal(unfolded(folded(matrix)), matrix)
        True
    """
    n = matrices.shape[1]
    k = n // 2 + 1
    found = matrices[:, :, :k].clone()
    found[:, :k].tril_()
    found[:, : n - k, 1 : n - k + 1] += matrices[:, k:, k:].triu()
    return found


def unfolded(found: Tensor) -> Tensor:
    """The symmetric matrices with some folded entries: the inverse of `folded`."""
    n, k = found.shape[1:]
    matrices = found.new_empty(len(found), n, n)
    matrices[:, :k, :k] = found[:, :k].tril() + found[:, :k].tril(-1).mT
    matrices[:, k:, :k], matrices[:, :k, k:] = found[:, k:], found[:, k:].mT
    last = found[:, : n - k, 1 : n - k + 1]
    matrices[:, k:, k:] = last.triu() + last.triu(1).mT
    return matrices


def _join(
    layers: Mapping[str, Any],
    roots: Mapping[str, Tensor | None],
    joined: list[tuple[str, list[int]]],
    owners: Mapping[str, int],
    group: dist.ProcessGroup,
) -> None:
    """Concatenate the roots of all ranks on the owner of each layer.

    Args:
        layers: the sums of the layers.
        roots: the root of this rank, by layer.
        joined: the layers, each with the number of rows on each rank.
        owners: the rank that gets the roots, by layer.
        group: the ranks.
    """
    if not joined:
        return
    size, me = dist.get_world_size(group), dist.get_rank(group)
    like = next(root for root in roots.values() if root is not None)
    sent = [
        [root for name, _ in joined if owners[name] == rank and (root := roots[name]) is not None]
        for rank in range(size)
    ]
    mine = [(name, rows) for name, rows in joined if owners[name] == me]
    per_row = {name: root.shape[0] * root.shape[2] for name, _ in mine if (root := roots[name]) is not None}
    received = [[rows[rank] * per_row[name] for name, rows in mine] for rank in range(size)]
    flat = exchanged(sent, [sum(counts) for counts in received], like, group)
    pieces = [part.split(counts) for part, counts in zip(flat, received, strict=True)]
    for at, (name, rows) in enumerate(mine):
        root = roots[name]
        assert root is not None
        parts = [pieces[rank][at].view(root.shape[0], rows[rank], root.shape[2]) for rank in range(size)]
        layers[name].roots = [torch.cat(parts, 1)]


def exchanged(
    sent: Sequence[Sequence[Tensor]], counts: list[int], like: Tensor, group: dist.ProcessGroup
) -> list[Tensor]:
    """Send some tensors to each rank; return the flat entries that each rank sent to this one.

    Args:
        sent: the tensors for each rank.
        counts: the number of entries that arrive from each rank.
        like: a tensor with the dtype and device of the entries.
        group: the ranks.
    """
    parts = [torch.cat([one.flatten() for one in some]) if some else like.new_empty(0) for some in sent]
    received = like.new_empty(sum(counts))
    dist.all_to_all_single(received, torch.cat(parts), counts, [len(part) for part in parts], group=group)
    return list(received.split(counts))


def _unlike(form: str) -> ValueError:
    return ValueError(
        f"this rank has the sums {form}, and another rank has other ones, expected models that use the same weights"
        " in the same functions on all ranks: leave the layers out with layers="
    )


def _require_alike(form: str, like: Tensor, group: dist.ProcessGroup) -> None:
    """Raise ValueError on every rank unless all ranks have blocks of the same form.

    Raises:
        ValueError: if the ranks' models use their weights differently.
    """
    own = zlib.crc32(form.encode())
    both = torch.tensor([own, -own], dtype=torch.int64, device=like.device)
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    if both.tolist() != [own, -own]:
        raise _unlike(form)


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
