"""Updates of parameters: steps along given directions with momentum, and AdamW for parameters without curvature."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.adamw import adamw

Group: TypeAlias = Mapping[str, Any]
"""A group of parameters with its options."""

States: TypeAlias = MutableMapping[Tensor, Any]
"""The state of each parameter."""


ADAMW: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
"""Default options of groups that are updated by AdamW."""

each: Any = torch
"""torch, for its functions of lists of tensors, which have no types."""


_WIDE = (torch.float32, torch.float64)


def descend(
    group: Group,
    directions: Mapping[int, Tensor],
    scale: float | Tensor,
    states: States,
    momentum: float | None = None,
) -> None:
    """Update a group's parameters along their directions, with momentum and decoupled weight decay.

    Args:
        group: the group; its options `lr`, `momentum` and `weight_decay` are used.
        directions: the direction of a parameter, by its id; the gradient is used if there is none.
        scale: the number that directions are multiplied by; a tensor if it is on a device.
        states: the states; with momentum, they contain "momentum_buffer".
        momentum: the factor of the buffers, in groups with momentum; the group's option unless given.
    """
    for parameters in _alike([p for p in group["params"] if p.grad is not None]):
        found = [g if (one := directions.get(id(p))) is None else one for p in parameters if (g := p.grad) is not None]
        wide = all(one.dtype == p.dtype and one.dtype in _WIDE for one, p in zip(found, parameters, strict=True))
        if isinstance(scale, Tensor) or not wide:  # in half precision, small factors would be rounded
            found, factor = list(each._foreach_mul(found, scale)), 1.0
        else:
            factor = scale
        if group["momentum"]:
            decay = group["momentum"] if momentum is None else momentum
            found, factor = _with_momentum(parameters, found, factor, decay, states), 1.0
        if group["weight_decay"]:
            each._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        found = [one.to(p.dtype) for one, p in zip(found, parameters, strict=True)]
        each._foreach_add_(parameters, found, alpha=-group["lr"] * factor)


def _with_momentum(
    parameters: Sequence[Tensor], directions: Sequence[Tensor], factor: float, momentum: float, states: States
) -> list[Tensor]:
    """Add a multiple of the directions to the parameters' buffers, and return the buffers."""
    pairs = list(zip(parameters, directions, strict=True))
    known = [(states[p]["momentum_buffer"], one) for p, one in pairs if "momentum_buffer" in states[p]]
    if known:
        buffers, added = map(list, zip(*known, strict=True))
        each._foreach_mul_(buffers, momentum)
        each._foreach_add_(buffers, added, alpha=factor)
    for p, one in pairs:
        if "momentum_buffer" not in states[p]:
            states[p]["momentum_buffer"] = one * factor
    return [states[p]["momentum_buffer"] for p in parameters]


def adapt(group: Group, states: States) -> None:
    """Update a group's parameters by AdamW (Loshchilov & Hutter, 2019).

    Args:
        group: the group; its options `lr`, `betas`, `eps` and `weight_decay` are used.
        states: the states; they contain "step", "exp_avg" and "exp_avg_sq", as those of `torch.optim.AdamW`.
    """
    parameters = [p for p in group["params"] if p.grad is not None]
    for p in parameters:
        if "exp_avg" not in states[p]:
            states[p] |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    options = ADAMW | dict(group)
    beta1, beta2 = options["betas"]
    adamw(
        parameters,
        [p.grad for p in parameters if p.grad is not None],
        [states[p]["exp_avg"] for p in parameters],
        [states[p]["exp_avg_sq"] for p in parameters],
        [],
        [states[p]["step"] for p in parameters],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=options["eps"],
        maximize=False,
    )


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """The inner product in at least single precision, in which products of gradients do not overflow."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = (one if one.dtype == dtype else one.to(dtype) for one in (a.reshape(-1), b.reshape(-1)))
    return torch.dot(a, b)


def inner_products(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of the inner products of pairs of tensors, which may be on several devices; zero for no pair."""
    found = [inner_product(a, b) for a, b in pairs]
    return torch.stack([one.to(found[0].device) for one in found]).sum() if found else torch.zeros(())


def _alike(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters by device and dtype."""
    found: dict[Any, list[Tensor]] = {}
    for p in parameters:
        found.setdefault((p.device, p.dtype), []).append(p)
    yield from found.values()
