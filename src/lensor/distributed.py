"""One network over the ranks of a torch.distributed group: every rank works on its part of one index.

A network is a sum over all its indices, or an array of such sums: restricted to a part of one index it is a network
again, planned on its own, and nothing has to be exchanged but the parts' results.
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
    """Evaluate a network together: every rank of a group calls this, and every rank gets the whole result.

    Args:
        net: the network; the same on every rank.
        group: the ranks, by default all of them.
        index: the index whose parts the ranks work on; by default the one that leaves the fewest flops to a rank.
        operands: the whole operands, the same on every rank: tensors on a device that the group's backend supports. An
            int gives the size of an index that no operand tells.

    Returns:
        What `net(**operands)` returns, up to the order in which a summed index is added up.

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
        TypeError: for operands that are missing, unknown, or no tensors.
        ValueError: if shapes do not fit the network, or the index cannot be worked on in parts.
    """
    if not dist.is_initialized():
        raise RuntimeError("there is no process group: call torch.distributed.init_process_group first")
    arrays, sizes = execute.split_sizes(net, operands)
    require_operands(net.operand_names, arrays)
    for name, array in arrays.items():
        if not isinstance(array, torch.Tensor):
            raise TypeError(f"operand {name!r} must be a torch.Tensor, found {type(array).__name__}")
        if array.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"operand {name!r} requires a gradient, which cannot flow between ranks: use no_grad")
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
    """The index whose parts are worked on; None if the network has none."""
    known = sliceable(net) if arrays else []
    if asked is not None:
        if asked not in known:
            raise ValueError(f"index must be one that can be worked on in parts, found {asked!r}, expected of {known}")
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
    """The whole result from this rank's part, None if it has none."""
    axis = axis_of(net, index)
    # Collectives exchange tensors of one shape: parts are padded to the longest, the last one.
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
