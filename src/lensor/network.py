"""Tensor networks: nodes with grouped legs, output legs, index sizes and an exact scale.

A network is a sum over all indices that are not in its output of the product of its nodes, times its scale. All of
it is symbolic, immutable and free of any array framework. Index names are labels: two networks that differ only by
names or by the order of their nodes are equal.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from lensor.canonical import canonical_form
from lensor.errors import NetworkError, require_type
from lensor.pattern import IndexPattern

if TYPE_CHECKING:
    from lensor.plan import Plan

Group: TypeAlias = tuple[str, ...]
"""The indices of one leg, slowest first, as in einops; the empty group is an axis of length 1."""


# ---------------------------------------------------------------------------------------------------- the node kinds
_RESERVED = re.compile(r"δ|delta|Π\d+")


@dataclass(frozen=True, slots=True)
class Operand:
    """An array the user supplies by name: one leg for each of its axes.

    Example:
        >>> import lensor
        >>> x = lensor.Operand("X", (("n",), ("c", "i")))
        >>> x.name, x.legs
        ('X', (('n',), ('c', 'i')))
        >>> print(lensor.Network.make([x], [("n",)], {"n": None, "c": 2, "i": 3}))
        X[n (c i)] -> n

    Raises:
        NetworkError: if the name is no identifier, or one that stands for a delta or an index pattern in texts.
    """

    name: str
    legs: tuple[Group, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier() or _RESERVED.fullmatch(self.name):
            raise NetworkError(
                "an operand's name must be an identifier that does not stand for a delta (δ, delta) or an index "
                f"pattern (Π1, Π2, ...), found {self.name!r}"
            )


@dataclass(frozen=True, slots=True)
class Select(Operand):
    """A selection given at run time, [i = positions[j]] with legs (i, j), of which the user supplies the positions.

    It is an operand to every transform and rule. Only its array differs: an integer vector as long as the second leg,
    whose entries are positions in the first; plans read what it selects, and never depend on its values.

    Example:
        >>> import lensor, numpy as np
        >>> nodes = [lensor.Operand("X", (("n",), ("i",))), lensor.Select("S", (("i",), ("j",)))]
        >>> net = lensor.Network.make(nodes, [("n",), ("j",)], {"n": None, "i": 3, "j": None})
        >>> print(net)
        X[n i] select S[i j] -> n j
        >>> net(X=np.array([[1.0, 2.0, 3.0]]), S=np.array([2, 0]))
        array([[3., 1.]])

    Raises:
        NetworkError: for a name that no operand can have, or other than two legs.
    """

    def __post_init__(self) -> None:
        Operand.__post_init__(self)
        if len(self.legs) != 2:
            raise NetworkError(f"a selection has 2 legs, positions and what is selected, found {len(self.legs)}")


@dataclass(frozen=True, slots=True)
class Pattern:
    """An index pattern Π with its legs (i, o, k): 1 where i = k·dilation + o·stride − padding, else 0.

    Example:
        >>> import lensor
        >>> pi = lensor.Pattern(lensor.IndexPattern(5, 3), (("i",), ("o",), ("k",)))
        >>> print(lensor.Network.make([pi], [("o", "k"), ("i",)], {"i": 5, "o": 3, "k": 3}))
        Π1[i o k] -> (o k) i
    """

    pattern: IndexPattern
    legs: tuple[Group, Group, Group]


@dataclass(frozen=True, slots=True)
class Delta:
    """A Kronecker delta: 1 where all its indices are equal, else 0.

    Example:
        >>> import lensor, numpy as np
        >>> nodes = [lensor.Operand("X", (("i",),)), lensor.Delta(("i", "j"))]
        >>> net = lensor.Network.make(nodes, [("i",), ("j",)], {"i": 2, "j": 2})
        >>> print(net)
        X[i] δ[i j] -> i j
        >>> net(X=np.array([3.0, 4.0]))
        array([[3., 0.],
               [0., 4.]])
    """

    indices: tuple[str, ...]

    @property
    def legs(self) -> tuple[Group, ...]:
        """One leg for each index."""
        return tuple((index,) for index in self.indices)


@dataclass(frozen=True, slots=True)
class Ones:
    """A vector of ones.

    Example:
        >>> import lensor, numpy as np
        >>> nodes = [lensor.Operand("X", (("i",),)), lensor.Ones("n")]
        >>> net = lensor.Network.make(nodes, [("n",), ("i",)], {"i": 2, "n": 3})
        >>> print(net)
        X[i] 1[n] -> n i
        >>> net(X=np.array([3.0, 4.0]))
        array([[3., 4.],
               [3., 4.],
               [3., 4.]])
    """

    index: str

    @property
    def legs(self) -> tuple[Group, ...]:
        """The only leg."""
        return ((self.index,),)


Node: TypeAlias = Operand | Pattern | Delta | Ones


def indices_of(node: Node) -> Iterator[str]:
    """All indices of a node, leg by leg, with repetitions."""
    for leg in node.legs:
        yield from leg


def _relabel_group(group: Group, mapping: Mapping[str, Group]) -> Group:
    return tuple(new for index in group for new in mapping.get(index, (index,)))


def relabel_node(node: Node, mapping: Mapping[str, Group]) -> tuple[Node, ...]:
    """The node with each index replaced by a group of indices; a delta or ones may fall into several or vanish."""
    match node:
        case Operand():
            return (replace(node, legs=tuple(_relabel_group(leg, mapping) for leg in node.legs)),)
        case Pattern():
            i, o, k = (_relabel_group(leg, mapping) for leg in node.legs)
            return (replace(node, legs=(i, o, k)),)
        case Delta():
            groups = [mapping.get(index, (index,)) for index in node.indices]
            if len({len(group) for group in groups}) != 1:
                raise NetworkError(f"the indices of a delta must be split alike, got {node.indices} -> {groups}")
            joined = [list(dict.fromkeys(indices)) for indices in zip(*groups, strict=True)]
            return tuple(Delta(tuple(part)) if len(part) > 1 else Ones(part[0]) for part in joined)
        case Ones():
            return tuple(Ones(index) for index in mapping.get(node.index, (node.index,)))


# ---------------------------------------------------------------------------------------------------------- the scale
@dataclass(frozen=True, slots=True)
class Scale:
    """A rational number times integer powers of index sizes, e.g. 1/(N·O²) while the batch size N is unknown.

    A power belongs to the size an index has in this network. Transforms that shorten an index turn its power into a
    number first.

    Example:
        >>> import lensor
        >>> scale = lensor.contraction("n i -> i", "X").scaled("1/2", {"n": -1}).scale
        >>> scale
        Scale(factor=Fraction(1, 2), powers=(('n', -1),))
        >>> scale * lensor.Scale(powers=(("n", 1),))
        Scale(factor=Fraction(1, 2), powers=())
    """

    factor: Fraction = Fraction(1)
    powers: tuple[tuple[str, int], ...] = ()

    def __mul__(self, other: Scale) -> Scale:
        powers = Counter(dict(self.powers))
        for index, power in other.powers:
            powers[index] += power
        return Scale(self.factor * other.factor, tuple(sorted((i, p) for i, p in powers.items() if p)))

    def relabel(self, mapping: Mapping[str, Group]) -> Scale:
        """The scale after each index was replaced by a group whose sizes multiply to its size.

        Example:
            >>> import lensor
            >>> lensor.Scale(powers=(("n", -1),)).relabel({"n": ("g", "m")}).powers
            (('g', -1), ('m', -1))
        """
        scale = Scale(self.factor)
        for index, power in self.powers:
            for new in mapping.get(index, (index,)):
                scale = scale * Scale(powers=((new, power),))
        return scale

    def bind(self, sizes: Mapping[str, int | None]) -> Scale:
        """Turn the powers of indices of known size into numbers.

        Example:
            >>> import lensor
            >>> lensor.Scale(powers=(("n", -1), ("v", 1))).bind({"n": 4, "v": None})
            Scale(factor=Fraction(1, 4), powers=(('v', 1),))

        Raises:
            ValueError: for a negative power of an index of size 0.
        """
        factor, powers = self.factor, []
        for index, power in self.powers:
            size = sizes.get(index)
            if size is None:
                powers.append((index, power))
            elif size == 0 and power < 0:
                raise ValueError(f"the average over index {index!r} is not defined: its size is 0, expected at least 1")
            else:
                factor *= Fraction(size) ** power
        return Scale(factor, tuple(powers))


# ------------------------------------------------------------------------------------------- verbs that come from above
class Verbs:
    """What networks and sums of networks can do; each verb is a function of a layer above, attached by `verb`.

    The layers above (transforms, passes, the planner, evaluation) import this module, never the other way round.
    """

    if TYPE_CHECKING:
        subscripts: str

        # transforms
        def jacobian(self, operand: str) -> Any: ...
        def vjp(self, operand: str, cotangent: str = "V") -> Any: ...
        def jvp(self, operand: str, tangent: str = "T") -> Any: ...
        def batch(self, index: str, operands: Sequence[str], size: int | None = None) -> Any: ...
        def keep(self, index: str, position: int = 0) -> Any: ...
        def diagonal(self, first: str, second: str) -> Any: ...
        def block_diagonal(self, first: str, second: str, block_size: int) -> Any: ...
        def narrow(self, index: str, start: int, length: int) -> Any: ...
        def sample(
            self,
            index: str,
            keep: Any = None,
            *,
            positions: str | None = None,
            weights: str | None = None,
            stored: Sequence[str] = (),
        ) -> Any: ...
        def select(self, index: str, position: int) -> Any: ...
        def slice(self, index: str, start: int, stop: int, step: int = 1) -> Any: ...
        def substitute(self, operand: str, network: Any) -> Any: ...
        def merge(self, other: Any, share: Sequence[str] = (), output: str | None = None) -> Any: ...
        def rename(self, mapping: Mapping[str, str] | None = None, /, **names: str) -> Any: ...
        def rename_operands(self, mapping: Mapping[str, str] | None = None, /, **names: str) -> Any: ...
        def regroup(self, output: str) -> Any: ...
        def group(self, *indices: str) -> Any: ...
        def ungroup(self, index: str) -> Any: ...
        def split(self, index: str, sizes: Mapping[str, int | None]) -> Any: ...
        def bind(self, sizes: Mapping[str, int] | None = None, /, **named: int) -> Any: ...
        def scaled(self, factor: Any, powers: Mapping[str, int] | None = None) -> Any: ...
        def components(self) -> tuple[Network, ...]: ...
        # passes
        def simplify(self) -> Any: ...
        # diagrams
        def draw(self, path: Any = None, *, shade: Any = (), cut: Any = ()) -> Any: ...
        def to_tikz(self) -> str: ...
        # the planner and evaluation
        def plan(self, /, *, effort: str | None = None, **operands: Any) -> Plan: ...
        def __call__(self, /, **operands: Any) -> Any: ...


_F = TypeVar("_F", bound=Callable[..., Any])


def verb(function: _F) -> _F:
    """Make `function(network, ...)` a method of networks and of sums, under its own name."""
    setattr(Verbs, function.__name__, function)
    return function


# -------------------------------------------------------------------------------------------------------- the networks
@dataclass(frozen=True, slots=True)
class Firing:
    """One entry of a trace: which rule fired, and the network before and after it as text."""

    rule: str
    number: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.rule} (rule {self.number}):\n    {self.before}\n  → {self.after}"


@dataclass(frozen=True, eq=False, repr=False)
class Network(Verbs):
    """A tensor network: the product of its nodes, summed over every index that is not in the output.

    Example:
        >>> import lensor
        >>> net = lensor.ops.conv(lensor.ConvSpec(4, 8, input_size=(9,), kernel_size=3, groups=2))
        >>> print(net)
        X[n (g c_in) i1] Π1[i1 o1 k1] W[(g c_out) c_in k1] -> n (g c_out) o1
        >>> net.sizes["o1"], net.sizes["n"]
        (7, None)

    Args:
        nodes: operands, index patterns, deltas and ones.
        output: one group of indices for each axis of the result; every index at most once.
        dimensions: (index, size) pairs, sorted; a size that is None is bound when the network is planned.
        scale: factor in front of the sum.
        trace: which simplifications led here; not part of the network's identity.

    Raises:
        NetworkError: if the parts do not fit together (see `check`).
    """

    nodes: tuple[Node, ...]
    output: tuple[Group, ...]
    dimensions: tuple[tuple[str, int | None], ...]
    scale: Scale = Scale()
    trace: tuple[Firing, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        self.check()

    @staticmethod
    def make(
        nodes: Iterable[Node],
        output: Iterable[Group],
        sizes: Mapping[str, int | None],
        scale: Scale = Scale(),
        trace: tuple[Firing, ...] = (),
    ) -> Network:
        """A network from its parts; `sizes` may hold more indices than the network has.

        Example:
            >>> import lensor
            >>> x = lensor.Operand("X", (("n",), ("i",)))
            >>> print(lensor.Network.make([x], [("i",)], {"n": None, "i": 3, "unused": 5}))
            X[n i] -> i

        Raises:
            NetworkError: if an index has no entry in `sizes`, or the parts do not fit together (see `check`).
            ValueError: if the scale has a negative power of an index of size 0.
        """
        nodes, output = tuple(nodes), tuple(output)
        used = {index for node in nodes for index in indices_of(node)}
        used.update(index for leg in output for index in leg)
        used.update(index for index, _ in scale.powers)
        missing = used - set(sizes)
        if missing:
            raise NetworkError(f"no size given for index {sorted(missing)[0]!r}; sizes are known for {sorted(sizes)}")
        known = tuple(sorted((index, sizes[index]) for index in used))
        return Network(nodes, output, known, scale.bind(sizes), trace)

    # ------------------------------------------------------------------ reading it
    @cached_property
    def sizes(self) -> Mapping[str, int | None]:
        """The size of every index, None where it is bound when planning; a read-only view.

        Example:
            >>> import lensor
            >>> dict(lensor.contraction("n i -> i", "X", i=3).sizes)
            {'i': 3, 'n': None}
        """
        return MappingProxyType(dict(self.dimensions))

    @cached_property
    def operand_legs(self) -> Mapping[str, tuple[Group, ...]]:
        """The legs of the first occurrence of every operand; read-only.

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
        """The places of the nodes that hold each index, −1 for the output; read-only.

        Example:
            >>> import lensor
            >>> net = lensor.contraction("n i, i o -> n o", "X", "W")
            >>> {index: sorted(net.holders[index]) for index in "nio"}
            {'n': [-1, 0], 'i': [0, 1], 'o': [-1, 1]}
        """
        found: dict[str, set[int]] = {index: set() for index in self.sizes}
        for at, node in enumerate(self.nodes):
            for index in indices_of(node):
                found[index].add(at)
        for index in self.output_indices:
            found[index].add(-1)
        return MappingProxyType({index: frozenset(places) for index, places in found.items()})

    @property
    def selections(self) -> frozenset[str]:
        """The names of the operands that are positions, not arrays (see `Select`).

        Example:
            >>> import lensor
            >>> lensor.contraction("n i -> n", "X").sample("i", positions="S").selections
            frozenset({'S'})
        """
        return frozenset(node.name for node in self.nodes if isinstance(node, Select))

    @property
    def operands(self) -> tuple[str | IndexPattern, ...]:
        """Operand names and index patterns in the order of `subscripts`; a delta is "δ", ones are "1".

        The name of a selection S is "select S".

        Example:
            >>> import lensor
            >>> lensor.ops.weight_jacobian(lensor.ConvSpec(2, 3, 5, 3)).operands
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
        """The names of the arrays the network needs, each once, in order of appearance.

        Example:
            >>> import lensor
            >>> lensor.contraction("n i, n j, n k -> i j k", "X", "X", "Y").operand_names
            ('X', 'Y')
        """
        return tuple(self.operand_legs)

    @property
    def output_indices(self) -> tuple[str, ...]:
        """All indices of the output, leg by leg.

        Example:
            >>> import lensor
            >>> lensor.contraction("n i, i o -> (n o)", "X", "W").output_indices
            ('n', 'o')
        """
        return tuple(index for leg in self.output for index in leg)

    @property
    def inner_indices(self) -> tuple[str, ...]:
        """The indices that are summed, in order of appearance.

        Example:
            >>> import lensor
            >>> lensor.contraction("n i, i o -> o", "X", "W").inner_indices
            ('n', 'i')
        """
        open_ = set(self.output_indices)
        return tuple(dict.fromkeys(i for node in self.nodes for i in indices_of(node) if i not in open_))

    def group_size(self, group: Group) -> int | None:
        """The product of the sizes of a group, None if one is unknown.

        Example:
            >>> import lensor
            >>> net = lensor.contraction("n i j -> n (i j)", "X", i=3, j=4)
            >>> net.group_size(("i", "j")), net.group_size(("n", "i"))
            (12, None)

        Raises:
            KeyError: for an index that the network does not have.
        """
        sizes = [self.sizes[index] for index in group]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        """The size of each output leg, None where it is not yet known.

        Example:
            >>> import lensor
            >>> lensor.contraction("n i j -> n (i j)", "X", i=3, j=4).output_shape
            (None, 12)
        """
        return tuple(self.group_size(leg) for leg in self.output)

    # ------------------------------------------------------------------ making others
    def replace(self, **parts: Any) -> Network:
        """A network with some of its parts replaced; sizes may be given as the mapping `sizes`.

        Example:
            >>> import lensor
            >>> net = lensor.contraction("n i -> i", "X", i=3)
            >>> print(net.replace(output=[("n",)]))
            X[n i] -> n
            >>> net.replace(sizes={"n": 2}).sizes["n"]
            2

        Raises:
            NetworkError: if the new parts do not fit together (see `check`).
            TypeError: for a part that networks do not have.
        """
        sizes = {**self.sizes, **parts.pop("sizes", {})}
        parts = {"nodes": self.nodes, "output": self.output, "scale": self.scale, "trace": self.trace} | parts
        return Network.make(sizes=sizes, **parts)

    def relabel(
        self, mapping: Mapping[str, Group], sizes: Mapping[str, int | None] | None = None, *, join: bool = False
    ) -> Network:
        """The network with each index in `mapping` replaced by a group of indices everywhere.

        Different indices stay different, unless `join` says that those that get one name are to become one.

        Example:
            >>> import lensor
            >>> net = lensor.contraction("n i -> i", "X", i=6)
            >>> print(net.relabel({"i": ("a", "b")}, {"a": 2, "b": 3}))
            X[n (a b)] -> (a b)

        Raises:
            NetworkError: if a new index has no size, if two indices would get one name without `join`, or if the
                network that results breaks the grammar (see `check`).
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
                        f"the indices {source[new]!r} and {index!r} would both be named {new!r}; expected names that "
                        "stay apart: to make one index of two, use diagonal, or pass join=True"
                    )
                source[new] = index

    def fresh(self, base: str, taken: Iterable[str] = ()) -> str:
        """A name for a new index: `base`, with as many `_` after it as make it new.

        Several names that are needed at once have to be told of each other, by `taken`.

        Example:
            >>> import lensor
            >>> lensor.contraction("n i -> i", "X").fresh("i", taken=["i_"])
            'i__'
        """
        return new_name(base, {*self.sizes, *taken})

    # ------------------------------------------------------------------ the grammar
    def check(self) -> None:
        """Raise NetworkError unless the parts fit together.

        The grammar: an index is an identifier and has a size, known sizes are not negative; an output index occurs
        once in the output and at least once in a node; the legs of a pattern have its sizes; a delta joins two or more
        different indices of one size; all occurrences of an operand have the same number of axes, and of one size
        where known.

        Example:
            >>> import lensor
            >>> net = lensor.contraction("n i -> i", "X")
            >>> net.check()  # networks are checked when they are made
            >>> try:
            ...     net.replace(output=[("n",), ("n",)])
            ... except lensor.NetworkError as error:
            ...     print(error)
            output index 'n' occurs 2 times in the output, expected once

        Raises:
            NetworkError: naming the first part that breaks the grammar.
        """
        sizes = self.sizes
        held = {index for node in self.nodes for index in indices_of(node)}
        named = Counter(self.output_indices)
        for index in held | set(named):
            if index not in sizes:
                raise NetworkError(f"index {index!r} has no size; sizes are known for {sorted(sizes)}")
        for index, size in sizes.items():
            if not isinstance(index, str) or not index.isidentifier():
                raise NetworkError(f"an index's name must be an identifier, found {index!r}")
            if size is not None and size < 0:
                raise NetworkError(f"index {index!r} has size {size}, expected a size of at least 0")
        for index, times in named.items():
            if times > 1:
                raise NetworkError(f"output index {index!r} occurs {times} times in the output, expected once")
            if index not in held:
                raise NetworkError(f"output index {index!r} occurs in no node; indices of nodes: {sorted(held)}")
        shapes: dict[str, tuple[int | None, ...]] = {}
        kinds: dict[str, type[Operand]] = {}
        for node in self.nodes:
            if isinstance(node, Operand) and kinds.setdefault(node.name, type(node)) is not type(node):
                raise NetworkError(f"operand {node.name!r} is an array in one place and a selection in another")
            match node:
                case Pattern(pattern, legs):
                    found = tuple(self.group_size(leg) for leg in legs)
                    if found != (pattern.input_size, pattern.output_size, pattern.kernel_size):
                        raise NetworkError(f"the legs {legs} of {pattern!r} have sizes {found}")
                case Delta(indices):
                    if len(set(indices)) != len(indices) or len(indices) < 2:
                        raise NetworkError(f"a delta joins two or more different indices, got {indices}")
                    if len({sizes[index] for index in indices}) != 1:
                        raise NetworkError(f"a delta joins indices of one size, got {[(i, sizes[i]) for i in indices]}")
                case Operand(name, legs):
                    shape = tuple(self.group_size(leg) for leg in legs)
                    first = shapes.setdefault(name, shape)
                    same = len(first) == len(shape) and all(
                        a is None or b is None or a == b for a, b in zip(first, shape, strict=True)
                    )
                    if not same:
                        raise NetworkError(f"operand {name!r} occurs with shapes {first} and {shape}")
                case Ones():
                    pass

    # ------------------------------------------------------------------ identity
    @cached_property
    def canonical(self) -> tuple:
        """A key that is the same for all networks that are equal up to names and order.

        Example:
            >>> import lensor
            >>> one, two = lensor.contraction("n i -> i", "X"), lensor.contraction("a b -> b", "X")
            >>> one.canonical == two.canonical, one == two
            (True, True)
        """
        return self._canonical[0]

    @property
    def canonical_order(self) -> Mapping[str, int]:
        """The number of every index in the canonical form; read-only."""
        return MappingProxyType(self._canonical[1])

    @cached_property
    def _canonical(self) -> tuple[tuple, dict[str, int]]:
        return canonical_form(self)

    @cached_property
    def _hash(self) -> int:
        return hash(self.canonical)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Network) and self.canonical == other.canonical

    def __hash__(self) -> int:
        return self._hash

    @property
    def exact(self) -> tuple:
        """A key for this very network, names and order included.

        Example:
            >>> import lensor
            >>> one, two = lensor.contraction("n i -> i", "X"), lensor.contraction("a b -> b", "X")
            >>> one == two, one.exact == two.exact
            (True, False)
        """
        return (self.nodes, self.output, self.dimensions, self.scale)

    @property
    def terms(self) -> tuple[Network, ...]:
        """The network as a sum of one term.

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

    def __add__(self, other: Network | Sum) -> Network | Sum:
        return _added(self, other)

    def __radd__(self, other: int) -> Network | Sum:
        return _added(self, other)


@dataclass(frozen=True, eq=False, repr=False)
class Sum(Verbs):
    """A sum of networks with the same output; a convolution with bias is one, so is a derivative by the product rule.

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
            raise NetworkError(f"a sum has two or more terms, got {len(self.terms)}")
        shapes = [term.output_shape for term in self.terms]
        for shape in shapes[1:]:
            fits = len(shape) == len(shapes[0]) and all(
                a is None or b is None or a == b for a, b in zip(shape, shapes[0], strict=True)
            )
            if not fits:
                raise NetworkError(f"the terms of a sum have one output shape, got {shapes[0]} and {shape}")
        self._require_aligned()

    def _require_aligned(self) -> None:
        """An output index of one term is an index of another only as an output index of its size in the same place."""
        outputs: dict[str, tuple[tuple[int, int], int | None]] = {}
        for term in self.terms:
            for index, place in _places(term).items():
                size = term.sizes[index]
                known, before = outputs.setdefault(index, (place, size))
                if known != place or (size is not None and before is not None and size != before):
                    raise NetworkError(
                        f"output index {index!r} stands in different places or has different sizes in the terms of the "
                        "sum, expected one place and one size: network + another gives them names that fit"
                    )
                outputs[index] = place, before if size is None else size
        for term in self.terms:
            for index in outputs.keys() & term.sizes.keys():
                if index not in term.output_indices:
                    raise NetworkError(
                        f"output index {index!r} of one term of the sum is summed in another: expected different "
                        "names, as network + another gives them"
                    )

    @property
    def output(self) -> tuple[Group, ...]:
        """The output of the first term."""
        return self.terms[0].output

    @property
    def output_indices(self) -> tuple[str, ...]:
        """All indices of the output, leg by leg."""
        return self.terms[0].output_indices

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        """The size of each output leg, None where it is not yet known."""
        return self.terms[0].output_shape

    @property
    def sizes(self) -> Mapping[str, int | None]:
        """The sizes of all indices of all terms, read-only; a size known in one term is known."""
        sizes: dict[str, int | None] = {}
        for term in self.terms:
            for index, size in term.dimensions:
                if sizes.get(index) is None:
                    sizes[index] = size
        return MappingProxyType(sizes)

    @property
    def operand_names(self) -> tuple[str, ...]:
        """The names of the arrays the sum needs, each once, in order of appearance."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.operand_names))

    @property
    def selections(self) -> frozenset[str]:
        """The names of the operands that are positions, not arrays.

        Example:
            >>> import lensor
            >>> net = lensor.ops.conv(lensor.ConvSpec(1, 1, 5, 2, bias=True))
            >>> net.sample("o1", 0.5, positions="S").selections
            frozenset({'S'})
        """
        return frozenset().union(*(term.selections for term in self.terms))

    @property
    def operand_legs(self) -> Mapping[str, tuple[Group, ...]]:
        """The legs of the first occurrence of every operand; read-only."""
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
        """The traces of all terms, one after another."""
        return tuple(firing for term in self.terms for firing in term.trace)

    def check(self) -> None:
        """Raise NetworkError unless every term is well formed and the outputs agree.

        Example:
            >>> import lensor
            >>> lensor.ops.conv(lensor.ConvSpec(1, 1, 5, 2, bias=True)).check()

        Raises:
            NetworkError: naming the first part that breaks the grammar of `Network.check`, or outputs that differ.
        """
        for term in self.terms:
            term.check()
        self.__post_init__()

    @cached_property
    def canonical(self) -> tuple:
        """A key that is the same for all sums that are equal up to names and order."""
        keys = [term.canonical for term in self.terms]
        # A size that one term has may hold for others by name: which indices of which terms share it.
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
        """A key for this very sum, names and order included."""
        return tuple(term.exact for term in self.terms)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Sum) and self.canonical == other.canonical)

    @cached_property
    def _hash(self) -> int:
        return hash(self.canonical)

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        return {"terms": self.terms}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "terms", state["terms"])

    def __add__(self, other: Network | Sum) -> Network | Sum:
        return _added(self, other)

    def __radd__(self, other: int) -> Network | Sum:
        return _added(self, other)


def _added(net: Network | Sum, other: Any) -> Network | Sum:
    if isinstance(other, (Network, Sum)):
        return sum_of((*net.terms, *other.terms))
    if type(other) is int and other == 0:  # where Python's sum starts
        return net
    raise TypeError(
        f"only networks can be added to a network, found {other!r} of type {type(other).__name__}; to multiply by a "
        "number use net.scaled(...), to add one write it as a network of ones, lensor.contraction('i -> i', '1')"
    )


def _places(term: Network) -> dict[str, tuple[int, int]]:
    """The leg of every output index, and its place there."""
    return {index: (leg, at) for leg, group in enumerate(term.output) for at, index in enumerate(group)}


AnyNetwork: TypeAlias = Network | Sum


def sum_of(terms: Sequence[Network]) -> AnyNetwork:
    """The sum of networks, their output indices named as in the first; one term is itself.

    A leg whose indices cannot be those of the first term, because it is grouped or split in another way, keeps indices
    of its own, with names that no other term has. Summed indices give way to output indices of the same name, all of
    one name to one new name, since a name means one index throughout a sum.

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
    """For the output indices of a term those of the first that stand in the same places and may have the same sizes."""
    found: dict[str, str] = {}
    for leg, wanted in zip(term.output, first.output, strict=False):
        sizes = [(term.sizes[one], first.sizes[other]) for one, other in zip(leg, wanted, strict=False)]
        if len(leg) == len(wanted) and all(one == other or None in (one, other) for one, other in sizes):
            found.update(zip(leg, wanted, strict=True))
    return found


def new_name(base: str, used: set[str]) -> str:
    """A name that is not used yet, `base` with as many `_` as it needs; from now on it counts as used.

    Whoever needs several new names at once passes one set for all of them.

    Example:
        >>> used = {"c", "c_"}
        >>> new_name("c", used), new_name("c_", used)
        ('c__', 'c___')
    """
    while base in used:
        base += "_"
    used.add(base)
    return base
