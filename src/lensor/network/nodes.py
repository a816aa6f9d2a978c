"""The nodes of networks: operands, index patterns, deltas and ones, with a group of indices for each leg."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

from lensor.errors import NetworkError
from lensor.pattern import IndexPattern

Group: TypeAlias = tuple[str, ...]
"""The indices of one leg, slowest first, as in einops; an empty group means an axis of length 1."""

_RESERVED = re.compile(r"δ|delta|Π\d+")


@dataclass(frozen=True, slots=True)
class Operand:
    """An array that you supply by name, with one leg per axis.

    Example:
        >>> import lensor
        >>> x = lensor.Operand("X", (("n",), ("c", "i")))
        >>> x.name, x.legs
        ('X', (('n',), ('c', 'i')))
        >>> print(lensor.Network.make([x], [("n",)], {"n": None, "c": 2, "i": 3}))
        X[n (c i)] -> n

    Raises:
        NetworkError: if the name is not an identifier, or is reserved for deltas or index patterns in the text form.
    """

    name: str
    legs: tuple[Group, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier() or _RESERVED.fullmatch(self.name):
            raise NetworkError(
                f"the name of an operand is {self.name!r}, expected an identifier other than δ and delta, which denote"
                " deltas, and Π1, Π2, ..., which denote index patterns"
            )


@dataclass(frozen=True, slots=True)
class Select(Operand):
    """A selection [i = positions[j]] with legs (i, j), whose positions you supply at run time.

    Transforms and rules treat it as an operand. Its array is an integer vector with one entry per position of the
    second leg; each entry is a position in the first leg. Plans do not depend on the values.

    Example:
        >>> import lensor, numpy as np
        >>> nodes = [lensor.Operand("X", (("n",), ("i",))), lensor.Select("S", (("i",), ("j",)))]
        >>> net = lensor.Network.make(nodes, [("n",), ("j",)], {"n": None, "i": 3, "j": None})
        >>> print(net)
        X[n i] select S[i j] -> n j
        >>> net(X=np.array([[1.0, 2.0, 3.0]]), S=np.array([2, 0]))
        array([[3., 1.]])

    Raises:
        NetworkError: if the name is not a valid operand name, or if the number of legs is not 2.
    """

    def __post_init__(self) -> None:
        Operand.__post_init__(self)
        if len(self.legs) != 2:
            raise NetworkError(
                f"selection {self.name!r} has {len(self.legs)} legs, expected 2: all positions and the selected ones"
            )


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
        """One leg per index."""
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
        """The single leg."""
        return ((self.index,),)


Node: TypeAlias = Operand | Pattern | Delta | Ones


def indices_of(node: Node) -> Iterator[str]:
    """Iterate over the indices of a node, leg by leg, including repetitions."""
    return chain.from_iterable(node.legs)


def _relabel_group(group: Group, mapping: Mapping[str, Group]) -> Group:
    if mapping.keys().isdisjoint(group):
        return group
    return tuple([new for index in group for new in mapping.get(index, (index,))])


def relabel_node(node: Node, mapping: Mapping[str, Group]) -> tuple[Node, ...]:
    """Replace each index of a node by a group of indices; a delta or ones may yield several nodes, or none."""
    if mapping.keys().isdisjoint(indices_of(node)):
        return (node,)
    match node:
        case Operand():
            return (type(node)(node.name, tuple([_relabel_group(leg, mapping) for leg in node.legs])),)
        case Pattern():
            i, o, k = node.legs
            legs = (_relabel_group(i, mapping), _relabel_group(o, mapping), _relabel_group(k, mapping))
            return (Pattern(node.pattern, legs),)
        case Delta():
            groups = [mapping.get(index, (index,)) for index in node.indices]
            if len({len(group) for group in groups}) != 1:
                raise NetworkError(
                    f"the indices {node.indices} of a delta are replaced by {groups}, expected groups of equal length"
                )
            joined = [list(dict.fromkeys(indices)) for indices in zip(*groups, strict=True)]
            return tuple(Delta(tuple(part)) if len(part) > 1 else Ones(part[0]) for part in joined)
        case Ones():
            return tuple(Ones(index) for index in mapping.get(node.index, (node.index,)))


def new_name(base: str, used: set[str]) -> str:
    """Return an unused name, `base` followed by as many `_` as needed, and add it to `used`.

    To generate several names, pass the same set each time.

    Example:
        >>> used = {"c", "c_"}
        >>> new_name("c", used), new_name("c_", used)
        ('c__', 'c___')
    """
    while base in used:
        base += "_"
    used.add(base)
    return base
