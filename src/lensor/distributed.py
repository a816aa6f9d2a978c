"""Evaluation of one network on all ranks of a torch.distributed group: each rank computes its part of one index.

A network restricted to a part of one index is again a network, with its own plan. The ranks exchange only their partial
results.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lensor import evaluate as execute
from lensor.lowering import axis_of, parts_of, sliceable
from lensor.network import AnyNetwork
from lensor.runtime import require_operands


def evaluate(
    net: AnyNetwork, *, group: dist.ProcessGroup | None = None, index: str | None = None, **operands: Any
) -> Any:
    """Evaluate a network on all ranks of a group; every rank must call this function and gets the whole result.

    Use this for a network that is too large or too slow for one device; use `lensor.curvature.kfac` or
    `lensor.optim.KFAC` with `group` for data-parallel curvature.

    Args:
        net: the network; the same on every rank.
        group: the ranks; all ranks by default.
        index: the index to split into parts; by default the index that results in the fewest flops per rank.
        operands: the whole operands, the same on every rank: tensors on a device that the group's backend supports. An
            int gives the size of an index that no operand determines.

    Returns:
        The result of `net(**operands)`, up to the order of summation over a summed index.

    Example:
        >>> import lensor.distributed, tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.distributed.init_process_group("gloo", f"file://{folder}/store", world_size=1, rank=0)
        ...     net = lensor.contraction("n i, n j -> i j", "X", "X")
        ...     print(lensor.distributed.evaluate(net, X=torch.ones(4, 2)))
        ...     torch.distributed.destroy_process_group()
        tensor([[4., 4.],
                [4., 4.]])

    Raises:
        RuntimeError: if there is no process group, or an operand requires a gradient, which cannot flow between ranks.
        TypeError: if an operand is missing, unknown, or not a tensor.
        ValueError: if a shape does not fit the network, or if the index cannot be split.
    """
    if not dist.is_initialized():
        raise RuntimeError("no process group is initialised, expected one: call torch.distributed.init_process_group")
    arrays, sizes = execute.split_sizes(net, operands)
    require_operands(net.operand_names, arrays)
    for name, array in arrays.items():
        if not isinstance(array, torch.Tensor):
            raise TypeError(f"operand {name!r} has type {type(array).__name__}, expected torch.Tensor")
        if array.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"operand {name!r} requires a gradient, expected one that does not: gradients cannot flow between"
                " ranks, so use torch.no_grad"
            )
    whole = execute.bind_shapes(
        net.bind(sizes) if sizes else net, {name: array.shape for name, array in arrays.items()}
    )
    count, rank = dist.get_world_size(group), dist.get_rank(group)
    chosen = _index(whole, count, arrays, index)
    if chosen is None or count == 1:
        return execute.evaluate(whole, arrays)
    parts = parts_of(whole, chosen, count)
    mine = execute.evaluate(parts[rank], arrays) if rank < len(parts) else None
    return _combined(whole, chosen, parts, mine, next(iter(arrays.values())), group)


def _index(net: AnyNetwork, count: int, arrays: dict[str, Any], asked: str | None) -> str | None:
    """The index to split into parts; None if the network has no suitable index."""
    known = sliceable(net) if arrays else []
    if asked is not None:
        if asked not in known:
            raise ValueError(f"index is {asked!r}, expected one that can be split: one of {known}")
        return asked
    if count == 1 or not known:
        return None
    shapes = {name: array.shape for name, array in arrays.items()}
    like = next(iter(arrays.values()))

    def flops(index: str) -> int:
        largest = parts_of(net, index, count)[-1]
        return execute.compile(largest, shapes, like=like).flops

    return min(known, key=flops, default=None)


def _combined(
    net: AnyNetwork,
    index: str,
    parts: list[AnyNetwork],
    mine: torch.Tensor | None,
    like: torch.Tensor,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """The whole result, from the parts of all ranks; this rank's part is None if it has none."""
    axis = axis_of(net, index)
    # Collectives exchange tensors of equal shape, so pad all parts to the size of the longest, which is the last one.
    shape = [size or 0 for size in parts[-1].output_shape]
    padded = like.new_zeros(shape)
    if mine is not None:
        padded[tuple(slice(size) for size in mine.shape)] = mine
    if axis is None:
        dist.all_reduce(padded, group=group)
        return padded
    found = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, padded, group=group)
    lengths = [part.output_shape[axis] or 0 for part in parts]
    return torch.cat([part.narrow(axis, 0, length) for part, length in zip(found, lengths, strict=False)], axis)
