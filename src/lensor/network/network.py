"""Tensor networks: nodes with grouped legs, output legs, index sizes and an exact scale.

A network denotes the product of its nodes, summed over all indices that are not in its output, times its scale. It is
symbolic, immutable and independent of array frameworks. Index names are labels: two networks that differ only in index
names or in the order of their nodes are equal.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from types import MappingProxyType
from typing import Any

from lensor.errors import NetworkError
from lensor.network.canonical import canonical_form, invariant
from lensor.network.nodes import (
    Delta,
    Group,
    Node,
    Ones,
    Operand,
    Pattern,
    Select,
    _relabel_group,
    indices_of,
    new_name,
    relabel_node,
)
from lensor.network.scale import UNIT, Scale
from lensor.network.verbs import Verbs
from lensor.pattern import IndexPattern


@dataclass(frozen=True, slots=True)
class Firing:
    """One entry of a trace: the rule that was applied, and the text of the network before and after it."""

    rule: str
    number: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.rule} (rule {self.number}):\n    {self.before}\n  → {self.after}"


@dataclass(frozen=True, eq=False, repr=False)
class Network(Verbs):
    """A tensor network: the product of its nodes, summed over all indices that are not in the output.

    Example:
        >>> import lensor
        >>> net = lensor.ops.conv(lensor.ConvSpec(4, 8, input_size=(9,), kernel_size=3, groups=2))
        >>> print(net)
        X[n (g c_in) i1] Π1[i1 o1 k1] W[(g c_out) c_in k1] -> n (g c_out) o1
        >>> net.sizes["o1"], net.sizes["n"]
        (7, None)

    Args:
        nodes: operands, index patterns, deltas and ones.
        output: one group of indices per axis of the result; each index at most once.
        dimensions: sorted (index, size) pairs; a size of None is determined when the network is planned.
        scale: factor that multiplies the sum.
        trace: the simplifications that led to this network; not part of its identity.

    Raises:
        NetworkError: if the parts are inconsistent (see `check`).
    """

    nodes: tuple[Node, ...]
    output: tuple[Group, ...]
    dimensions: tuple[tuple[str, int | None], ...]
    scale: Scale = UNIT
    trace: tuple[Firing, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        self.check()

    @staticmethod
    def make(
        nodes: Iterable[Node],
        output: Iterable[Group],
        sizes: Mapping[str, int | None],
        scale: Scale = UNIT,
        trace: tuple[Firing, ...] = (),
    ) -> Network:
        """Create a network from its parts; `sizes` may include indices that the network does not use.

        Example:
            >>> import lensor
            >>> x = lensor.Operand("X", (("n",), ("i",)))
            >>> print(lensor.Network.make([x], [("i",)], {"n": None, "i": 3, "unused": 5}))
            X[n i] -> i

        Raises:
            NetworkError: if an index is missing from `sizes`, or if the parts are inconsistent (see `check`).
            ValueError: if the scale has a negative power of an index of size 0.
        """
        nodes, output = tuple(nodes), tuple(output)
        used = set(chain.from_iterable([leg for node in nodes for leg in node.legs]))
        used.update(*output, dict(scale.powers))
        missing = used.difference(sizes)
        if missing:
            raise NetworkError(
                f"index {sorted(missing)[0]!r} has no entry in sizes, expected one: it has entries for {sorted(sizes)}"
            )
        known = tuple([(index, sizes[index]) for index in sorted(used)])
        return Network(nodes, output, known, scale.bind(sizes), trace)

    # ------------------------------------------------------------------ properties
    @cached_property
    def sizes(self) -> Mapping[str, int | None]:
        """Read-only map from each index to its size; None if the size is determined when the network is planned.

        Example:
            >>> import lensor
            >>> dict(lensor.contraction("n i -> i", "X", i=3).sizes)
            {'i': 3, 'n': None}
        """
        return MappingProxyType(dict(self.dimensions))

    @cached_property
    def operand_legs(self) -> Mapping[str, tuple[Group, ...]]:
        """Read-only map from each operand to the legs of its first occurrence.

        Example:
            >>> import lensor
            >>> dict(lensor.contraction("n (g c) -> n g", "X").operand_legs)
            {'X': (('n',), ('g', 'c'))}
        """
        legs: dict[str, tuple[Group, ...]] = {}
        for node in self.nodes:
            if isinstance(node, Operand):
                legs.setdefault(node.name, node.legs)
        return MappingProxyType(legs)

    @cached_property
    def holders(self) -> Mapping[str, frozenset[int]]:
        """Read-only map from each index to the positions of its nodes in `nodes`, with −1 for the output.

        Example:
            >>> import lensor
            >>> net = lensor.contraction("n i, i o -> n o", "X", "W")
            >>> {index: sorted(net.holders[index]) for index in "nio"}
            {'n': [-1, 0], 'i': [0, 1], 'o': [-1, 1]}
        """
        found: dict[str, frozenset[int]] = dict.fromkeys(self.sizes, frozenset())
        for at, node in enumerate(self.nodes):
            for index in indices_of(node):
                found[index] |= {at}
        for index in self.output_indices:
            found[index] |= {-1}
        return MappingProxyType(found)

    @cached_property
    def pattern_nodes(self) -> tuple[tuple[int, IndexPattern, tuple[Group, Group, Group]], ...]:
        """A (position in `nodes`, pattern, legs) triple for each index pattern.

        Example:
            >>> import lensor
            >>> lensor.contraction("i, i o k -> o k", "X", lensor.IndexPattern(5, 3)).pattern_nodes
            ((1, IndexPattern(5, 3), (('i',), ('o',), ('k',))),)
        """
        return tuple([(at, node.pattern, node.legs) for at, node in enumerate(self.nodes) if isinstance(node, Pattern)])

    @cached_property
    def selections(self) -> frozenset[str]:
        """The names of the operands that are selections, which are vectors of positions (see `Select`).

        Example:
            >>> import lensor
            >>> lensor.contraction("n i -> n", "X").sample("i", positions="S").selections
            frozenset({'S'})
        """
        return frozenset(node.name for node in self.nodes if isinstance(node, Select))

    @property
    def operands(self) -> tuple[str | IndexPattern, ...]:
        """Operand names and index patterns in the order of `subscripts`.

        A delta appears as "δ", ones as "1", and a selection S as "select S".

        Example:
            >>> import lensor
            >>> lensor.ops.conv_weight_jacobian(lensor.ConvSpec(2, 3, 5, 3)).operands
            ('X', IndexPattern(5, 3), 'δ', 'δ')
        """
        names = {Delta: "δ", Ones: "1"}
        return tuple(
            f"select {node.name}"
            if isinstance(node, Select)
            else node.name
            if isinstance(node, Operand)
            else node.pattern
            if isinstance(node, Pattern)
            else names[type(node)]
            for node in self.nodes
        )

    @property
    def operand_names(self) -> tuple[str, ...]:
        """The names of the arrays in the network, each once, in order of appearance.

        Example:
            >>> import lensor
            >>> lensor.contraction("n i, n j, n k -> i j k", "X", "X", "Y").operand_names
            ('X', 'Y')
        """
        return tuple(self.operand_legs)

    @cached_property
    def output_indices(self) -> tuple[str, ...]:
        """The indices of all output legs, in order.

        Example:
            >>> import lensor
            >>> lensor.contraction("n i, i o -> (n o)", "X", "W").output_indices
            ('n', 'o')
        """
        return tuple(chain.from_iterable(self.output))

    @property
    def inner_indices(self) -> tuple[str, ...]:
        """The summed indices, in order of appearance.

        Example:
            >>> import lensor
            >>> lensor.contraction("n i, i o -> o", "X", "W").inner_indices
            ('n', 'i')
        """
        open_ = set(self.output_indices)
        return tuple(dict.fromkeys(i for node in self.nodes for i in indices_of(node) if i not in open_))

    def group_size(self, group: Group) -> int | None:
        """The product of the sizes of a group's indices; None if one of the sizes is unknown.

        Example:
            >>> import lensor
            >>> net = lensor.contraction("n i j -> n (i j)", "X", i=3, j=4)
            >>> net.group_size(("i", "j")), net.group_size(("n", "i"))
            (12, None)

        Raises:
            KeyError: for an index that is not in the network.
        """
        sizes = self.sizes
        found = [size for index in group if (size := sizes[index]) is not None]
        return math.prod(found) if len(found) == len(group) else None

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        """The size of each output leg, None if not yet known.

        Example:
            >>> import lensor
            >>> lensor.contraction("n i j -> n (i j)", "X", i=3, j=4).output_shape
            (None, 12)
        """
        return tuple(self.group_size(leg) for leg in self.output)

    # ------------------------------------------------------------------ new networks
    def replace(self, **parts: Any) -> Network:
        """Create a network with some parts replaced; `sizes` is a mapping that updates the sizes.

        Example:
            >>> import lensor
            >>> net = lensor.contraction("n i -> i", "X", i=3)
            >>> print(net.replace(output=[("n",)]))
            X[n i] -> n
            >>> net.replace(sizes={"n": 2}).sizes["n"]
            2

        Raises:
            NetworkError: if the new parts are inconsistent (see `check`).
            TypeError: for an argument that does not name a part of a network.
        """
        sizes = {**self.sizes, **parts.pop("sizes", {})}
        parts = {"nodes": self.nodes, "output": self.output, "scale": self.scale, "trace": self.trace} | parts
        return Network.make(sizes=sizes, **parts)

    def relabel(
        self, mapping: Mapping[str, Group], sizes: Mapping[str, int | None] | None = None, *, join: bool = False
    ) -> Network:
        """Replace each index in `mapping` by a group of indices everywhere.

        Different indices must stay different, unless `join` is True: then indices with the same new name are
        identified.

        Example:
            >>> import lensor
            >>> net = lensor.contraction("n i -> i", "X", i=6)
            >>> print(net.relabel({"i": ("a", "b")}, {"a": 2, "b": 3}))
            X[n (a b)] -> (a b)

        Raises:
            NetworkError: if a new index has no size, if two indices would have the same name without `join`, or if the
                new network violates the grammar (see `check`).
        """
        if not join:
            self._require_apart(mapping)
        nodes = (new for node in self.nodes for new in relabel_node(node, mapping))
        output = (_relabel_group(leg, mapping) for leg in self.output)
        return self.replace(nodes=nodes, output=output, scale=self.scale.relabel(mapping), sizes=sizes or {})

    def _require_apart(self, mapping: Mapping[str, Group]) -> None:
        source: dict[str, str] = {}
        for index in self.sizes:
            for new in mapping.get(index, (index,)):
                if new in source:
                    raise NetworkError(
                        f"the indices {source[new]!r} and {index!r} would both be named {new!r}, expected different"
                        " names: to identify two indices, use diagonal or pass join=True"
                    )
                source[new] = index

    def fresh(self, base: str, taken: Iterable[str] = ()) -> str:
        """Return an unused index name: `base`, followed by as many `_` as needed.

        If you need several names, pass the previous ones as `taken`.

        Example:
            >>> import lensor
            >>> lensor.contraction("n i -> i", "X").fresh("i", taken=["i_"])
            'i__'
        """
        return new_name(base, {*self.sizes, *taken})

    # ------------------------------------------------------------------ the grammar
    def check(self) -> None:
        """Raise NetworkError unless the parts are consistent.

        The grammar: an index is an identifier and has a size; known sizes are not negative. An output index occurs once
        in the output and at least once in a node. The sizes of a pattern's legs match the pattern. A delta joins at
        least two different indices of the same size. All occurrences of an operand have the same number of axes, and
        the sizes of these axes are equal where known.

        Example:
            >>> import lensor
            >>> net = lensor.contraction("n i -> i", "X")
            >>> net.check()  # networks are checked when they are created
            >>> try:
            ...     net.replace(output=[("n",), ("n",)])
            ... except lensor.NetworkError as error:
            ...     print(error)
            output index 'n' occurs 2 times in the output, expected once

        Raises:
            NetworkError: if a part violates the grammar; the message names the first such part.
        """
        sizes = self.sizes
        held = set(chain.from_iterable([leg for node in self.nodes for leg in node.legs]))
        for index in held.union(self.output_indices).difference(sizes):
            raise NetworkError(
                f"index {index!r} has no entry in dimensions, expected one: it has entries for {sorted(sizes)}"
            )
        if not _are_identifiers(sizes):
            for index in sizes:
                if not isinstance(index, str) or not index.isidentifier():
                    raise NetworkError(f"the name of an index is {index!r}, expected an identifier")
        for index, size in sizes.items():
            if size is not None and size < 0:
                raise NetworkError(f"index {index!r} has size {size}, expected at least 0")
        if len(held.intersection(self.output_indices)) < len(self.output_indices):
            for index, times in Counter(self.output_indices).items():
                if times > 1:
                    raise NetworkError(f"output index {index!r} occurs {times} times in the output, expected once")
                if index not in held:
                    raise NetworkError(f"output index {index!r} is not in any node, expected one of {sorted(held)}")
        self._check_nodes()

    def _check_nodes(self) -> None:
        sizes = self.sizes

        short: dict[Group, int | None] = {(): 1, **{(index,): size for index, size in sizes.items()}}

        def shape_of(legs: Sequence[Group]) -> tuple[int | None, ...]:
            return tuple([short[leg] if leg in short else self.group_size(leg) for leg in legs])

        shapes: dict[str, tuple[int | None, ...]] = {}
        kinds: dict[str, type[Operand]] = {}
        for node in self.nodes:
            if isinstance(node, Operand) and kinds.setdefault(node.name, type(node)) is not type(node):
                raise NetworkError(
                    f"operand {node.name!r} is an array in one place and a selection in another, expected one kind"
                )
            match node:
                case Pattern(pattern, legs):
                    found = shape_of(legs)
                    expected = (pattern.input_size, pattern.output_size, pattern.kernel_size)
                    if found != expected:
                        raise NetworkError(f"the legs {legs} of {pattern!r} have sizes {found}, expected {expected}")
                case Delta(indices):
                    if len(set(indices)) != len(indices) or len(indices) < 2:
                        raise NetworkError(f"a delta has indices {indices}, expected at least two different ones")
                    if len({sizes[index] for index in indices}) != 1:
                        raise NetworkError(
                            f"the indices {indices} of a delta have sizes {[sizes[index] for index in indices]},"
                            " expected one size"
                        )
                case Operand(name, legs):
                    shape = shape_of(legs)
                    first = shapes.setdefault(name, shape)
                    same = first == shape or (
                        len(first) == len(shape)
                        and all(a is None or b is None or a == b for a, b in zip(first, shape, strict=True))
                    )
                    if not same:
                        raise NetworkError(f"operand {name!r} occurs with shapes {first} and {shape}, expected one")
                case Ones():
                    pass

    # ------------------------------------------------------------------ identity
    @cached_property
    def canonical(self) -> tuple:
        """A key that is equal for all networks that differ only in names and order.

        Example:
            >>> import lensor
            >>> one, two = lensor.contraction("n i -> i", "X"), lensor.contraction("a b -> b", "X")
            >>> one.canonical == two.canonical, one == two
            (True, True)
        """
        return self._canonical[0]

    @property
    def canonical_order(self) -> Mapping[str, int]:
        """Read-only map from each index to its number in the canonical form."""
        return MappingProxyType(self._canonical[1])

    @cached_property
    def _canonical(self) -> tuple[tuple, dict[str, int]]:
        return canonical_form(self)

    @cached_property
    def _hash(self) -> int:
        # Cold caches look up many networks that they do not hold, which should not take a canonical form.
        return hash(invariant(self))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Network) and self.canonical == other.canonical

    def __hash__(self) -> int:
        return self._hash

    @property
    def exact(self) -> tuple:
        """A key for this network that includes index names and the order of nodes.

        Example:
            >>> import lensor
            >>> one, two = lensor.contraction("n i -> i", "X"), lensor.contraction("a b -> b", "X")
            >>> one == two, one.exact == two.exact
            (True, False)
        """
        return (self.nodes, self.output, self.dimensions, self.scale)

    @property
    def terms(self) -> tuple[Network, ...]:
        """A tuple that contains only this network, for code that also handles sums.

        Example:
            >>> import lensor
            >>> net = lensor.contraction("n i -> i", "X")
            >>> net.terms == (net,)
            True
        """
        return (self,)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("nodes", "output", "dimensions", "scale", "trace")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)


def _are_identifiers(names: Iterable[Any]) -> bool:
    try:
        return all(map(str.isidentifier, names))
    except TypeError:
        return False
