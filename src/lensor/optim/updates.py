"""Updates of parameters: steps along given directions with momentum, and AdamW for parameters without curvature."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from lensor.curvature.inverses import PlusLowRank
from lensor.optim.sharding import local

Group: TypeAlias = Mapping[str, Any]
"""A group of parameters with its options."""

Direction: TypeAlias = Tensor | PlusLowRank
"""The direction of a parameter's step."""

States: TypeAlias = MutableMapping[Tensor, Any]
"""The state of each parameter."""


ADAMW: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
"""Default options of groups that are updated by AdamW."""

each: Any = torch
"""torch, for its functions of lists of tensors, which have no types."""


_WIDE = (torch.float32, torch.float64)

_EPS = torch.finfo(torch.float32).eps


def descend(
    group: Group,
    directions: Mapping[int, Direction],
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
        pairs = list(zip(parameters, found, strict=True))
        factor = 1.0
        if not isinstance(scale, Tensor) and all(_is_wide(p, one) for p, one in pairs):
            factor = scale
        else:  # in half precision, small factors would be rounded
            found = list(each._foreach_mul([formed(one) for one in found], scale))
        rate = group["lr"]
        if group["weight_decay"]:
            each._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        if not group["momentum"]:
            _add(parameters, found, 1.0, -rate * factor)
            continue
        pairs = list(zip(parameters, found, strict=True))
        known = [(p, states[p]["momentum_buffer"], one) for p, one in pairs if "momentum_buffer" in states[p]]
        for p, one in pairs:
            if "momentum_buffer" not in states[p]:
                states[p]["momentum_buffer"] = formed(one) * factor
                _add([p], [states[p]["momentum_buffer"]], 1.0, -rate)
        _advance(known, group["momentum"] if momentum is None else momentum, factor, rate)


def _advance(known: Iterable[tuple[Tensor, Tensor, Direction]], beta: float, alpha: float, rate: float) -> None:
    """Replace buffers by beta · buffer + alpha · direction, and add -rate times the buffers to the parameters.

    Args:
        known: parameters, buffers and directions.
        beta: the momentum.
        alpha: the factor of directions.
        rate: the learning rate.
    """
    alike: dict[tuple[float, float], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for p, buffer, one in known:
        if isinstance(one, PlusLowRank) and buffer.is_contiguous():
            one.add_to(buffer, beta, alpha, with_vector=False)
            alike.setdefault((1.0, alpha * one.scale), []).append((p, buffer, one.vector))
        else:
            alike.setdefault((beta, alpha), []).append((p, buffer, formed(one)))
    for (own_beta, own_alpha), some in alike.items():
        parameters, buffers, directions = map(list, zip(*some, strict=True))
        # without momentum, the fused kernel does not use buffers; its dampening rounds a small factor of directions
        is_exact = abs(1 - (1 - own_alpha) - own_alpha) <= _EPS * abs(own_alpha)
        if own_beta and is_exact and not isinstance(rate, Tensor) and all(_in_one_pass(*one) for one in some):
            options: dict[str, Any] = {"weight_decay": 0.0, "nesterov": False, "maximize": False, "fused": True}
            sgd(parameters, directions, buffers, lr=rate, momentum=own_beta, dampening=1 - own_alpha, **options)
            continue
        _add(buffers, directions, own_beta, own_alpha)
        _add(parameters, buffers, 1.0, -rate)


def _in_one_pass(parameter: Tensor, buffer: Tensor, direction: Tensor) -> bool:
    """Whether torch's fused kernel updates a parameter and its buffer together; it assumes equal strides."""
    three = parameter, buffer, direction
    return parameter.is_contiguous() and all(
        type(one) in (Tensor, nn.Parameter)
        and one.dtype == torch.float32
        and one.device.type == "cpu"
        and one.stride() == parameter.stride()
        for one in three
    )


def _is_wide(parameter: Tensor, direction: Direction) -> bool:
    """Whether a direction has the parameter's dtype, in which small factors are not rounded."""
    dtype = direction.vector.dtype if isinstance(direction, PlusLowRank) else direction.dtype
    return dtype == parameter.dtype and dtype in _WIDE


def formed(direction: Direction) -> Tensor:
    """The direction as a tensor."""
    return direction.formed() if isinstance(direction, PlusLowRank) else direction


def _add(targets: Sequence[Tensor], directions: Sequence[Direction], beta: float, alpha: float) -> None:
    """Replace each target by beta · target + alpha · direction."""
    plain: tuple[list[Tensor], list[Tensor]] = [], []
    for target, one in zip(targets, directions, strict=True):
        if isinstance(one, PlusLowRank) and target.is_contiguous():
            one.add_to(target, beta, alpha)
        else:
            plain[0].append(target)
            plain[1].append(formed(one).to(target.dtype))
    if plain[0] and beta != 1:
        each._foreach_mul_(plain[0], beta)
    if plain[0]:
        each._foreach_add_(*plain, alpha=alpha)


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


_SMALL = 4096
"""Number of entries up to which vectors are joined for an inner product."""


def inner_products(pairs: Iterable[tuple[Direction, Tensor]]) -> Tensor:
    """The sum of the inner products of directions and gradients, which may be on several devices; zero for no pair.

    They are computed in at least single precision, in which products of gradients do not overflow.
    """
    found: list[Tensor] = []
    small: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for one, other in pairs:
        if isinstance(one, PlusLowRank):
            found.append(one.with_vector())
            continue
        dtype = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
        a, b = (x if x.dtype == dtype else x.to(dtype) for x in (local(one).reshape(-1), other.reshape(-1)))
        if a.numel() > _SMALL:
            found.append(torch.dot(a, b))
            continue
        left, right = small.setdefault((dtype, a.device), ([], []))
        left.append(a)
        right.append(b)
    found += [torch.dot(torch.cat(left), torch.cat(right)) for left, right in small.values()]
    return torch.stack([one.to(found[0].device) for one in found]).sum() if found else torch.zeros(())


def _alike(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters by device and dtype."""
    found: dict[Any, list[Tensor]] = {}
    for p in parameters:
        found.setdefault((p.device, p.dtype), []).append(p)
    yield from found.values()
