"""Sums of networks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeAlias

from lensor.errors import NetworkError, require_type
from lensor.network.network import Firing, Network
from lensor.network.nodes import Group, new_name
from lensor.network.verbs import Verbs
from lensor.pattern import IndexPattern


@dataclass(frozen=True, eq=False, repr=False)
class Sum(Verbs):
    """A sum of networks with the same output, such as a convolution with bias or a product-rule derivative.

    Example:
        >>> import lensor
        >>> print(lensor.ops.conv(lensor.ConvSpec(1, 1, input_size=5, kernel_size=2, bias=True)))
        X[n (g c_in) i1] Π1[i1 o1 k1] W[(g c_out) c_in k1] + b[(g c_out)] 1[n] 1[o1] -> n (g c_out) o1
    """

    terms: tuple[Network, ...]

    def __post_init__(self) -> None:
        for term in self.terms:
            require_type(term, "a term", Network)
        if len(self.terms) < 2:
            raise NetworkError(f"the number of terms of a sum is {len(self.terms)}, expected at least 2")
        shapes = [term.output_shape for term in self.terms]
        for shape in shapes[1:]:
            fits = len(shape) == len(shapes[0]) and all(
                a is None or b is None or a == b for a, b in zip(shape, shapes[0], strict=True)
            )
            if not fits:
                raise NetworkError(f"the terms of a sum have output shapes {shapes[0]} and {shape}, expected one shape")
        self._require_aligned()

    def _require_aligned(self) -> None:
        """Check that each output index has the same place and size in all terms that contain it."""
        outputs: dict[str, tuple[tuple[int, int], int | None]] = {}
        for term in self.terms:
            for index, place in _places(term).items():
                size = term.sizes[index]
                known, before = outputs.setdefault(index, (place, size))
                if known != place or (size is not None and before is not None and size != before):
                    raise NetworkError(
                        f"output index {index!r} has different places or sizes in the terms of the sum, expected one"
                        " place and one size: add the networks with +, which renames indices"
                    )
                outputs[index] = place, before if size is None else size
        for term in self.terms:
            for index in outputs.keys() & term.sizes.keys():
                if index not in term.output_indices:
                    raise NetworkError(
                        f"output index {index!r} of one term of the sum is summed in another, expected different names:"
                        " add the networks with +, which renames indices"
                    )

    @property
    def output(self) -> tuple[Group, ...]:
        """The output of the first term."""
        return self.terms[0].output

    @property
    def output_indices(self) -> tuple[str, ...]:
        """The indices of all output legs, in order."""
        return self.terms[0].output_indices

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        """The size of each output leg, None if not yet known."""
        return self.terms[0].output_shape

    @property
    def sizes(self) -> Mapping[str, int | None]:
        """Read-only map from each index of any term to its size; a size known in one term is known in the sum."""
        sizes: dict[str, int | None] = {}
        for term in self.terms:
            for index, size in term.dimensions:
                if sizes.get(index) is None:
                    sizes[index] = size
        return MappingProxyType(sizes)

    @property
    def operand_names(self) -> tuple[str, ...]:
        """The names of the arrays in the sum, each once, in order of appearance."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.operand_names))

    @property
    def selections(self) -> frozenset[str]:
        """The names of the operands that are selections, which are vectors of positions.

        Example:
            >>> import lensor
            >>> net = lensor.ops.conv(lensor.ConvSpec(1, 1, 5, 2, bias=True))
            >>> net.sample("o1", 0.5, positions="S").selections
            frozenset({'S'})
        """
        return frozenset().union(*(term.selections for term in self.terms))

    @property
    def operand_legs(self) -> Mapping[str, tuple[Group, ...]]:
        """Read-only map from each operand to the legs of its first occurrence."""
        legs: dict[str, tuple[Group, ...]] = {}
        for term in self.terms:
            for name, found in term.operand_legs.items():
                legs.setdefault(name, found)
        return MappingProxyType(legs)

    @property
    def operands(self) -> tuple[tuple[str | IndexPattern, ...], ...]:
        """The operands of each term, in the order of its subscripts."""
        return tuple(term.operands for term in self.terms)

    @property
    def trace(self) -> tuple[Firing, ...]:
        """The traces of all terms, in order."""
        return tuple(firing for term in self.terms for firing in term.trace)

    def check(self) -> None:
        """Raise NetworkError unless every term is well formed and the outputs match.

        Example:
            >>> import lensor
            >>> lensor.ops.conv(lensor.ConvSpec(1, 1, 5, 2, bias=True)).check()

        Raises:
            NetworkError: if a term violates the grammar of `Network.check`, or if the outputs differ.
        """
        for term in self.terms:
            term.check()
        self.__post_init__()

    @cached_property
    def canonical(self) -> tuple:
        """A key that is equal for all sums that differ only in names and order."""
        keys = [term.canonical for term in self.terms]
        # Terms share index names: record which summed indices of unknown size appear in several terms.
        shared: dict[str, list[tuple[str, int]]] = {}
        texts = [repr(key) for key in keys]
        for term, text in zip(self.terms, texts, strict=True):
            order = term.canonical_order
            for index in term.inner_indices:
                if term.sizes[index] is None:
                    shared.setdefault(index, []).append((text, order[index]))
        ties = sorted(tuple(sorted(places)) for places in shared.values() if len(places) > 1)
        return ("sum", tuple(sorted(keys, key=repr)), tuple(ties))

    @property
    def exact(self) -> tuple:
        """A key for this sum that includes index names and the order of nodes and terms."""
        return tuple(term.exact for term in self.terms)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Sum) and self.canonical == other.canonical)

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(sorted(map(hash, self.terms))))

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        return {"terms": self.terms}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "terms", state["terms"])


def add(net: AnyNetwork, other: Any) -> AnyNetwork:
    """Add two networks with the same output shape; adding 0 is allowed, so that Python's `sum` works.

    Example:
        >>> import lensor
        >>> x = lensor.contraction("n i -> n", "X")
        >>> print(x + lensor.contraction("n -> n", "Y"))
        X[n i] + Y[n] -> n

    Raises:
        NetworkError: if the output shapes differ.
        TypeError: if `other` is neither a network nor 0.
    """
    if isinstance(other, (Network, Sum)):
        return sum_of((*net.terms, *other.terms))
    if type(other) is int and other == 0:  # the start value of Python's sum
        return net
    raise TypeError(
        f"the other summand is {other!r} of type {type(other).__name__}, expected a network: to multiply by a number,"
        " use net.scaled(...); to add a number, write it as a network of ones, lensor.contraction('i -> i', '1')"
    )


def _places(term: Network) -> dict[str, tuple[int, int]]:
    """Map each output index to its leg and its place in the leg."""
    return {index: (leg, at) for leg, group in enumerate(term.output) for at, index in enumerate(group)}


AnyNetwork: TypeAlias = Network | Sum


def sum_of(terms: Sequence[Network]) -> AnyNetwork:
    """Add networks, naming output indices as in the first term; a single term is returned unchanged.

    If a leg is grouped differently from the same leg of the first term, its indices stay separate and are renamed if
    another term uses their names. Summed indices with the name of an output index are also renamed. Since a name
    denotes the same index in all terms, summed indices with the same name are renamed alike.

    Raises:
        NetworkError: if the terms' output shapes differ.
    """
    if len(terms) == 1:
        return terms[0]
    first = terms[0]
    outputs = set(first.output_indices)
    holders = Counter(index for term in terms for index in term.sizes)
    used = set(holders)
    summed: dict[str, str] = {}
    aligned = [first]
    for term in terms[1:]:
        renames = _aligned(term, first)
        for index in term.sizes:
            if index in renames:
                continue
            if index in term.output_indices:
                if holders[index] > 1:
                    renames[index] = new_name(index, used)
            elif index in outputs:
                if index not in summed:
                    summed[index] = new_name(index, used)
                renames[index] = summed[index]
        renames = {old: new for old, new in renames.items() if old != new}
        if renames:
            mapping: dict[str, Group] = {old: (new,) for old, new in renames.items()}
            term = term.relabel(mapping, {new: term.sizes[old] for old, new in renames.items()})
        aligned.append(term)
    return Sum(tuple(aligned))


def _aligned(term: Network, first: Network) -> dict[str, str]:
    """Map the output indices of a term to those in the same places in the first term, if their sizes are compatible."""
    found: dict[str, str] = {}
    for leg, wanted in zip(term.output, first.output, strict=False):
        sizes = [(term.sizes[one], first.sizes[other]) for one, other in zip(leg, wanted, strict=False)]
        if len(leg) == len(wanted) and all(one == other or None in (one, other) for one, other in sizes):
            found.update(zip(leg, wanted, strict=True))
    return found
