"""Helpers for all transforms: applying them to the terms of sums, and checking arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from lensor.errors import NetworkError, require_type
from lensor.network import AnyNetwork, Network, sum_of

P = ParamSpec("P")


def transform(
    function: Callable[Concatenate[Network, P], AnyNetwork],
) -> Callable[Concatenate[AnyNetwork, P], Any]:
    """Turn a transform of networks into one that also applies to each term of a sum."""

    @wraps(function)
    def apply(net: AnyNetwork, *args: P.args, **kwargs: P.kwargs) -> AnyNetwork:
        results = [function(term, *args, **kwargs) for term in net.terms]
        return sum_of([term for result in results for term in result.terms])

    return apply


def require_operand(net: AnyNetwork, name: str) -> None:
    """Raise NetworkError unless `name` is an operand of `net`."""
    if name not in net.operand_names:
        raise NetworkError(f"operand {name!r} is unknown, expected one of {list(net.operand_names)}")


def require_index(net: AnyNetwork, index: str, where: Iterable[str] | None = None, kind: str = "index") -> None:
    """Raise NetworkError unless `index`, a str, is among `where` (by default all indices of `net`)."""
    require_type(index, kind, str)
    among = list(net.sizes if where is None else where)
    if index not in among:
        raise NetworkError(f"{kind} {index!r} is unknown, expected one of {among}")


def require_size(net: AnyNetwork, index: str) -> int:
    """Return the size of an index; raise NetworkError if it is unknown, or if it differs between the terms of a sum."""
    known = dict.fromkeys(term.sizes[index] for term in net.terms if term.sizes.get(index) is not None)
    if len(known) > 1:
        raise NetworkError(f"index {index!r} has sizes {[*known]} in the terms of the sum, expected one size")
    size = net.sizes[index]
    if size is None:
        raise NetworkError(f"index {index!r} has no size yet, expected one: call net.bind({index}=...) first")
    return size
