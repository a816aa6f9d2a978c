"""Models whose parameters are sharded by `torch.distributed.fsdp.fully_shard`.

FSDP registers sharded parameters (DTensors) in the modules, and replaces them by whole parameters while a module runs.
A backward pass adds to the `grad` of the whole parameters, and FSDP then sums these gradients over the ranks and moves
them to the sharded parameters. Each layer has one owner: the rank that keeps its factors, inverts them and multiplies.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lensor.curvature.block import Block
from lensor.curvature.distribution import Reduction, exchanged, shares
from lensor.curvature.layers import Layer, layers_of

T = TypeVar("T")


class Sharding:
    """The sharded parameters of a model, and the exchange of factors, gradients and directions between its ranks.

    Args:
        model: the model.
        parts: FSDP's objects for its parameters.
        group: the ranks that the parameters are sharded over.
        asked: the names of the layers with factors, if they were given.
    """

    def __init__(self, model: nn.Module, parts: list[Any], group: dist.ProcessGroup, asked: list[str] | None) -> None:
        self.model, self.group = model, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._groups = parts
        self._parameters: dict[tuple[int, str], Any] = {}
        self._parts: dict[int, Any] = {id(one): part for part in parts for one in part.fsdp_params}
        for one in (one for part in parts for one in part.fsdp_params):
            info = one._module_info
            places = [
                (info.module, info.param_name),
                *zip(info.shared_modules, info.shared_param_names, strict=True),
            ]
            self._parameters |= {(id(module), name): one for module, name in places}
        self.owners = _owners(model, asked, self.size)
        """The rank that owns a layer's weight and bias, by parameter."""
        self.reduction = Reduction(group, self.owners)
        self.blocks: dict[str, tuple[str, ...]] = {}
        """The blocks with factors, on any rank, and their parameters."""
        self.inverted: dict[str, tuple[str, ...]] = {}
        """The blocks with inverses, on any rank, and their parameters."""

    @classmethod
    def of(cls, model: nn.Module, group: dist.ProcessGroup | None, asked: list[str] | None) -> Sharding | None:
        """The sharding of a model; None if its parameters are not sharded.

        Raises:
            ValueError: if the parameters are sharded in a way that is not supported.
        """
        if "torch.distributed.fsdp" not in sys.modules:
            return None
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError("model contains a FullyShardedDataParallel wrapper, expected torch's fully_shard")
        found = {}
        for module in model.modules():
            if isinstance(module, FSDPModule):
                state: Any = module._get_fsdp_state()
                parts = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
                found |= {id(part): part for part in parts if part is not None}
        if not found:
            return None
        parts = list(found.values())
        meshes = {part.mesh_info.mesh for part in parts}
        mesh = meshes.pop()
        if meshes or mesh.ndim != 1:
            raise ValueError(
                "the model's parameters are sharded over several meshes, or over one of several dimensions, expected"
                " one mesh of one dimension"
            )
        if any(one.offload_to_cpu for part in parts for one in part.fsdp_params):
            raise ValueError("the model's parameters are offloaded to the CPU, expected parameters on their device")
        if any(one.is_dtensor for part in parts for one in part.fsdp_params):
            raise ValueError("the model's parameters were DTensors before fully_shard, expected plain tensors")
        own = mesh.get_group()
        if group is not None and dist.get_process_group_ranks(group) != dist.get_process_group_ranks(own):
            raise ValueError("group has other ranks than the mesh of the sharded parameters, expected the same ranks")
        return cls(model, parts, own, asked)

    # ---------------------------------------------------------------------------------------------------------- blocks
    def keep(self, names: Mapping[str, Tensor]) -> None:
        """Forget the blocks of parameters that are no longer trained."""
        self.blocks = {name: some for name, some in self.blocks.items() if all(one in names for one in some)}
        self.inverted = {name: some for name, some in self.inverted.items() if all(one in names for one in some)}

    @contextmanager
    def inverting(self, due: bool) -> Iterator[None]:
        """Invert this rank's blocks in the `with` block; an error on one rank raises errors on all ranks.

        Args:
            due: whether all blocks are inverted, and not only new ones.
        """
        if not due and self.inverted == self.blocks:
            yield
            return
        with self.agreeing():
            yield
        self.inverted = dict(self.blocks)

    # ----------------------------------------------------------------------------------------------------------- state
    @property
    def part(self) -> str:
        """The name of this rank's part of a state."""
        return f"rank {self.rank} of {self.size}"

    def end_step(self) -> None:
        """Free whole parameters, which have old values, for example after an evaluation before the step."""
        for part in self._groups:
            part._to_sharded()

    @property
    def known(self) -> dict[str, Any]:
        """The names of all ranks' blocks, for a state."""
        return {"all_blocks": self.blocks, "all_inverted": self.inverted}

    def restore(self, own: Mapping[str, Any]) -> None:
        """Restore the names of all ranks' blocks from a state."""
        self.blocks = {name: tuple(some) for name, some in own["all_blocks"].items()}
        self.inverted = {name: tuple(some) for name, some in own["all_inverted"].items()}

    # ------------------------------------------------------------------------------------------------------ parameters
    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """As for the model, but with the sharded parameters, whatever is registered at the moment.

        Raises:
            ValueError: if a parameter that requires a gradient is not sharded.
        """
        seen = set()
        for prefix, module in self.model.named_modules():
            for key, registered in module._parameters.items():
                if registered is None:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                known = self._parameters.get((id(module), key))
                if known is None and registered.requires_grad:
                    raise ValueError(f"{name!r} is not sharded, expected fully_shard for the whole model")
                parameter = registered if known is None else known.sharded_param
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield name, parameter

    def whole(self, module: nn.Module, name: str) -> Any:
        """The parameter that a module's calls use; `prepare` must have been called."""
        known = self._parameters.get((id(module), name))
        return getattr(module, name) if known is None else known._unsharded_param

    def is_own(self, layer: Layer) -> bool:
        """Whether the module has the parameter that FSDP gave it."""
        known, now = self._parameters[id(layer.module), "weight"], layer.module.weight
        names = ("sharded_param", "_unsharded_param", "_sharded_post_forward_param")
        return any(now is getattr(known, name, None) for name in names)

    def prepare(self) -> None:
        """Gather each parameter once if this has not happened yet, so that the whole parameters exist."""
        for part in self._groups:
            if all(hasattr(one, "_unsharded_param") for one in part.fsdp_params):
                continue
            part.lazy_init()
            with _gathered([part]):
                pass
        for one in self._parameters.values():  # FSDP does this when it gathers a parameter; hooks are needed earlier
            if one._unsharded_param.requires_grad != one.sharded_param.requires_grad:
                one._unsharded_param.requires_grad_(one.sharded_param.requires_grad)

    # ------------------------------------------------------------------------------------------------------- gradients
    def gradients(self, layer: Layer) -> list[Tensor]:
        """What has been added to the gradient of a layer's weight: not summed over the ranks yet, and sharded."""
        known = self._parameters[id(layer.module), "weight"]
        return _unreduced(known) + ([] if known.sharded_param.grad is None else [known.sharded_param.grad])

    def is_last(self, layer: Layer) -> bool:
        """Whether FSDP sums the gradient of a layer over the ranks in the current backward pass."""
        known = self._parameters[id(layer.module), "weight"]
        return self._parts[id(known)].reduce_grads

    def require_reduced(self) -> None:
        """Raise if there are gradients that have not been summed over the ranks.

        Raises:
            RuntimeError: if there are such gradients.
        """
        if any(_unreduced(one) for one in self._parameters.values()):
            raise RuntimeError(
                "there are gradients that have not been summed over the ranks, expected the last backward pass of a"
                " step after model.set_requires_gradient_sync(True)"
            )

    def clear(self) -> None:
        """Discard gradients that have not been summed over the ranks."""
        for one in self._parameters.values():
            if hasattr(one, "_unsharded_param"):
                one._unsharded_param.grad = one.unsharded_accumulated_grad = None

    # --------------------------------------------------------------------------------------------------------- agreeing
    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank."""
        like = next(iter(self._parameters.values())).device
        found = torch.tensor([int(flag)], dtype=torch.int32, device=like)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return bool(found.item())

    def finite(self, blocks: Mapping[str, Block], like: Tensor) -> Tensor:
        """Whether each block is finite, in the order of all blocks; those that other ranks own count as finite."""
        found = torch.ones_like(like[:1]).repeat(len(self.blocks))
        for at, name in enumerate(self.blocks):
            if name in blocks:
                found[at] = torch.stack([tensor.isfinite().all() for tensor in blocks[name].tensors().values()]).all()
        return found

    def total(self, value: Tensor) -> Tensor:
        """The sum of a value over the ranks."""
        dist.all_reduce(value, group=self.group)
        return value

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Raise an error on all ranks if one of them raises one.

        Raises:
            RuntimeError: on ranks that have no error themselves.
        """
        trouble: Exception | None = None
        try:
            yield
        except Exception as error:
            trouble = error
        failed = self.any(trouble is not None)
        if trouble is not None:
            raise trouble
        if failed:
            raise RuntimeError("another rank raised an error, expected none: see the errors of the other ranks")

    def trial(self, run: Callable[[], T], needed: bool) -> T:
        """Run trial passes on all ranks that need them, with the whole model gathered on all ranks.

        The number of trial passes may differ between ranks, so these passes do not communicate.

        Args:
            run: runs the trial passes, if they are needed.
            needed: whether this rank needs them.
        """
        if not self.any(needed):
            return run()
        with self.agreeing(), _gathered(self._groups), _without_communication(self.model):
            return run()

    # --------------------------------------------------------------------------------------------------------- exchange
    def directions(self, inverse: Callable[[Mapping[str, Any]], dict[str, Tensor]], names: Mapping[str, Tensor]) -> Any:
        """Multiply the gradients by the inverses of the blocks: gather each block on its owner, and return shards.

        Args:
            inverse: multiplies the whole gradients of this rank's blocks by the inverses.
            names: the sharded parameters, by name.

        Returns:
            The shards of the results, by name, as DTensors like the parameters.
        """
        shared: set[str] = set()
        for some in self.inverted.values():
            if all(names[one].grad is not None for one in some):
                shared |= set(some)
        order = [[name for name in names if name in shared and self.owners[name] == rank] for rank in range(self.size)]
        if not any(order):
            return {}
        first = next(names[name] for some in order for name in some)
        dtype = torch.float32
        for name in shared:
            dtype = torch.promote_types(dtype, names[name].dtype)
        like = local(first).new_empty(0, dtype=dtype)
        mine = order[self.rank]
        sent = [[local(names[name].grad).to(dtype) for name in some] for some in order]
        shapes = [[_shard_shape(names[name], rank, self.size) for name in mine] for rank in range(self.size)]
        counts = [sum(shape.numel() for shape in some) for some in shapes]
        pieces = [
            [piece.view(shape) for piece, shape in zip(part.split([s.numel() for s in some]), some, strict=True)]
            for part, some in zip(exchanged(sent, counts, like, self.group), shapes, strict=True)
        ]
        whole: dict[str, Tensor | None] = dict.fromkeys(names)
        for at, name in enumerate(mine):
            whole[name] = torch.cat([some[at] for some in pieces], _axis(names[name]))
        solved = inverse(whole)
        back = [
            [
                part.to(dtype)
                for part in _parts_of([solved[name] for name in mine], [names[name] for name in mine], shapes, rank)
            ]
            for rank in range(self.size)
        ]
        shards = [[local(names[name]) for name in some] for some in order]
        returned = exchanged(back, [sum(one.numel() for one in some) for some in shards], like, self.group)
        found = {}
        for part, some, likes in zip(returned, order, shards, strict=True):
            for name, piece, one in zip(some, part.split([one.numel() for one in likes]), likes, strict=True):
                found[name] = as_shard(piece.view(one.shape), names[name])
        return found


def local(tensor: Any) -> Tensor:
    """This rank's shard of a DTensor; other tensors are returned as they are."""
    return getattr(tensor, "_local_tensor", tensor)


def as_shard(shard: Tensor, like: Any) -> Any:
    """A DTensor with this shard, with the mesh, placements and shape of another one."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _parts_of(
    tensors: Sequence[Tensor], like: Sequence[Any], shapes: Sequence[Sequence[torch.Size]], rank: int
) -> Iterator[Tensor]:
    """The shards of whole tensors that belong to a rank.

    Args:
        tensors: the whole tensors.
        like: sharded parameters of the same shapes.
        shapes: the shapes of the shards, by rank.
        rank: the rank.
    """
    for at, (tensor, parameter) in enumerate(zip(tensors, like, strict=True)):
        axis = _axis(parameter)
        start = sum(some[at][axis] for some in shapes[:rank])
        yield tensor.narrow(axis, start, shapes[rank][at][axis])


def _axis(parameter: Any) -> int:
    """The axis that a parameter is sharded along."""
    (placement,) = parameter.placements
    return placement.dim


def _shard_shape(parameter: Any, rank: int, size: int) -> torch.Size:
    """The shape of a rank's shard of a parameter."""
    shape, axis = list(parameter.shape), _axis(parameter)
    most = -(-shape[axis] // size)
    shape[axis] = max(min(shape[axis], (rank + 1) * most) - rank * most, 0)
    return torch.Size(shape)


def _unreduced(one: Any) -> list[Tensor]:
    """The gradients that FSDP keeps for a parameter until it sums them over the ranks."""
    if not hasattr(one, "_unsharded_param"):
        return []
    return [grad for grad in (one._unsharded_param.grad, one.unsharded_accumulated_grad) if grad is not None]


def _owners(model: nn.Module, asked: list[str] | None, size: int) -> dict[str, int]:
    """The owner of each layer's weight and bias, chosen to balance the inversions.

    The costs include layers that are not trained at the moment, so that layers keep their owners.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = layers_of(model, asked)
    costs = []
    for layer in layers:
        c = layer.output_channels / layer.groups
        d = torch.Size(layer.weight_shape).numel() / layer.output_channels
        costs.append(layer.groups * (d**3 + c**3))
    found = {}
    for layer, rank in zip(layers, shares(costs, size), strict=True):
        found[layer.weight] = rank
        if layer.bias is not None:
            found[layer.bias] = rank
    return found


@contextmanager
def _gathered(groups: Sequence[Any]) -> Iterator[None]:
    """Gather some parameters on all ranks, and free those afterwards that were not gathered before."""
    changed = [one for one in groups if not one.is_unsharded]
    with torch._C.DisableTorchFunction():
        for one in changed:
            one.unshard()
            one.wait_for_unshard()
    try:
        yield
    finally:
        with torch._C.DisableTorchFunction():
            for one in changed:
                one._to_sharded()


@contextmanager
def _without_communication(model: nn.Module) -> Iterator[None]:
    """Replace FSDP's hooks by hooks that convert dtypes only; the parameters must have been gathered."""
    from torch.distributed.fsdp import FSDPModule

    def before(state: Any) -> Callable[..., Any]:
        return lambda module, arguments, named: state._cast_forward_inputs(arguments, named)

    def after(state: Any) -> Callable[..., Any]:
        return lambda module, arguments, out: state._cast_output_dtype(out)

    replaced: list[tuple[Any, int, Any]] = []
    try:
        for module in model.modules():
            if not isinstance(module, FSDPModule):
                continue
            state: Any = module._get_fsdp_state()
            for held, hooks, new in (
                (state._pre_forward_hook_handle, module._forward_pre_hooks, before(state)),
                (state._post_forward_hook_handle, module._forward_hooks, after(state)),
            ):
                for handle in getattr(held, "handles", (held,)):
                    if handle.id in hooks:
                        replaced.append((hooks, handle.id, hooks[handle.id]))
                        hooks[handle.id] = new
        yield
    finally:
        for hooks, key, old in replaced:
            hooks[key] = old
