"""Names, groups, sizes and scale: transforms that leave the nodes and sums of a network unchanged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from lensor.errors import NetworkError, require_type
from lensor.network import AnyNetwork, Group, Network, Operand, Scale, sum_of
from lensor.network.subscripts import format_legs, parse_subscripts, spread_over_deltas
from lensor.pattern import as_integer
from lensor.transforms._transform import require_index, require_operand, require_size, transform
from lensor.transforms.indices import refine


def rename(net: AnyNetwork, mapping: Mapping[str, str] | None = None, /, **names: str) -> AnyNetwork:
    """Rename indices, given as a mapping or as keywords `old="new"`.

    To rename operands, use `rename_operands`.

    Example:
        >>> import lensor
        >>> print(lensor.contraction("n i -> i", "X").rename(i="pixel"))
        X[n pixel] -> pixel

    Raises:
        NetworkError: if an index is unknown, or if two indices would have the same name.
    """
    names = {**(mapping or {}), **names}
    for old in names:
        require_index(net, old)
    after = [names.get(index, index) for index in net.sizes]
    for new in after:
        if not isinstance(new, str) or not new.isidentifier():
            raise NetworkError(f"the new name of an index is {new!r}, expected an identifier")
        if after.count(new) > 1:
            raise NetworkError(
                f"two indices would be named {new!r}, expected different names: to identify indices, use diagonal"
            )
    return sum_of(
        [
            term.relabel(
                {old: (new,) for old, new in names.items() if old in term.sizes},
                {new: term.sizes[old] for old, new in names.items() if old in term.sizes},
            )
            for term in net.terms
        ]
    )


def rename_operands(net: AnyNetwork, mapping: Mapping[str, str] | None = None, /, **names: str) -> AnyNetwork:
    """Rename operands, given as a mapping or as keywords `old="new"`.

    Example:
        >>> import lensor
        >>> print(lensor.contraction("n i -> i", "X").rename_operands(X="images"))
        images[n i] -> i

    Raises:
        NetworkError: if an operand is unknown, a new name is not a valid operand name, or two operands would have the
            same name.
    """
    names = {**(mapping or {}), **names}
    for old in names:
        require_operand(net, old)
    after = [names.get(name, name) for name in net.operand_names]
    for new in after:
        if not isinstance(new, str) or not new.isidentifier() or after.count(new) > 1:
            raise NetworkError(f"the names of the operands would be {after}, expected different identifiers")
    return sum_of(
        [
            term.replace(
                nodes=[
                    replace(node, name=names.get(node.name, node.name)) if isinstance(node, Operand) else node
                    for node in term.nodes
                ]
            )
            for term in net.terms
        ]
    )


@transform
def regroup(net: Network, output: str) -> Network:
    """Permute and group the output legs as in the subscripts `output`, which contain the same indices.

    To change single legs, use `group` and `ungroup`.

    Example:
        >>> import lensor
        >>> print(lensor.ops.unfold(lensor.ConvSpec(2, 1, 9, 3)).regroup("n o1 (c_in k1)"))
        X[n c_in i1] Π1[i1 o1 k1] -> n o1 (c_in k1)

    Raises:
        SubscriptsError: if the text does not parse, or contains an index that is not an output index.
        NetworkError: if an output index is missing.
    """
    legs = parse_subscripts(f"{format_legs(net.output)} -> {output}").output
    missing = set(net.output_indices) - {index for leg in legs for index in leg}
    if missing:
        raise NetworkError(
            f"output index {sorted(missing)[0]!r} is missing from {output!r}, expected all output indices"
        )
    return net.replace(output=legs)


@transform
def group(net: Network, *indices: str) -> Network:
    """Group output indices into one leg, slowest first, at the place of the first of them.

    Example:
        >>> import lensor
        >>> print(lensor.contraction("n i, n j -> i n j", "X", "Y").group("i", "j"))
        X[n i] Y[n j] -> (i j) n

    Raises:
        NetworkError: if an index is not an output index or is repeated, or if no index is given.
    """
    if not indices:
        raise NetworkError(f"indices is empty, expected the indices of the new leg, some of {[*net.output_indices]}")
    for index in indices:
        require_index(net, index, net.output_indices, "output index")
        if indices.count(index) > 1:
            raise NetworkError(f"index {index!r} is given {indices.count(index)} times, expected different indices")
    legs: list[Group] = []
    for leg in net.output:
        rest = tuple(index for index in leg if index not in indices)
        if indices[0] in leg:
            legs.append(tuple(indices))
        if rest or not leg:
            legs.append(rest)
    return net.replace(output=tuple(legs))


@transform
def ungroup(net: Network, index: str) -> Network:
    """Split the output leg that contains `index` into one leg per index.

    Example:
        >>> import lensor
        >>> print(lensor.contraction("n i, n j -> (i j)", "X", "Y").ungroup("i"))
        X[n i] Y[n j] -> i j

    Raises:
        NetworkError: if `index` is not an output index.
    """
    require_index(net, index, net.output_indices, "output index")
    legs: list[Group] = []
    for leg in net.output:
        legs += [(part,) for part in leg] if index in leg else [leg]
    return net.replace(output=tuple(legs))


@transform
def split(net: Network, index: str, sizes: Mapping[str, int | None]) -> Network:
    """Split an index into a group of new indices, slowest first; one size may be None, to be inferred.

    Example:
        >>> import lensor
        >>> print(lensor.contraction("n c -> c n", "X").bind(c=6).split("c", {"g": 2, "c": None}))
        X[n (g c)] -> (g c) n

    Raises:
        TypeError: if `sizes` is not a mapping, or a size is not an integer.
        NetworkError: if the index is unknown or has no size, a new name is already in use, several sizes are None, or
            the product of the sizes is not the size of the index.
    """
    require_index(net, index)
    require_type(sizes, "sizes", Mapping)
    size = require_size(net, index)
    known = [as_integer(part, f"the size of {name!r}") for name, part in sizes.items() if part is not None]
    holes = len(sizes) - len(known)
    if holes > 1:
        raise NetworkError(f"sizes is {dict(sizes)} with {holes} entries None, expected at most one")
    product = math.prod(known)
    if (holes and (product == 0 or size % product)) or (not holes and product != size):
        raise NetworkError(f"sizes is {dict(sizes)}, expected sizes with the product {size}, the size of {index!r}")
    for name in sizes:
        if name in net.sizes and name != index:
            raise NetworkError(f"index {name!r} exists already, expected a new name: indices are {sorted(net.sizes)}")
    full = {name: size // product if part is None else int(part) for name, part in sizes.items()}
    parts = {(net.fresh(name, full) if name == index else name): part for name, part in full.items()}
    result = refine(net, {index: parts})
    back = {new: (name,) for new, name in zip(parts, full, strict=True) if new != name}
    return result.relabel(back, full) if back else result


def bind(net: AnyNetwork, sizes: Mapping[str, int] | None = None, /, **named: int) -> AnyNetwork:
    """Set the sizes of indices that have none; the sizes are given as a mapping or as keywords.

    Example:
        >>> import lensor
        >>> dict(lensor.contraction("n i -> i", "X").bind(n=3, i=2).sizes)
        {'i': 2, 'n': 3}

    Raises:
        NetworkError: if an index is unknown or already has a different size.
        TypeError: if a size is not an integer.
        ValueError: if an index over which the network averages has size 0.
    """
    given = {
        index: as_integer(size, f"the size of index {index!r}") for index, size in {**(sizes or {}), **named}.items()
    }
    for index, size in given.items():
        require_index(net, index)
        for known in dict.fromkeys(term.sizes[index] for term in net.terms if index in term.sizes):
            if size < 0 or (known is not None and known != size):
                expected = "at least 0" if known is None else known
                raise NetworkError(f"the size of index {index!r} is {size}, expected {expected}")
    terms = []
    for term in net.terms:
        mine = {index: size for index, size in given.items() if index in term.sizes}
        mine = spread_over_deltas(term.nodes, {**term.sizes, **mine})
        terms.append(term.replace(sizes=mine, scale=term.scale.bind(mine)))
    return sum_of(terms)


@transform
def scaled(net: Network, factor: Fraction | int | float | str = 1, powers: Mapping[str, int] | None = None) -> Network:
    """Multiply the network by a rational number and by integer powers of index sizes.

    Example:
        >>> import lensor
        >>> print(lensor.contraction("n i -> i", "X").scaled("1/2", {"n": -1}))
        1/2 n^-1 X[n i] -> i

    Raises:
        NetworkError: if an index is unknown, or if the factor is not a finite number.
        TypeError: if a power is not an integer.
    """
    whole = {index: as_integer(power, f"the power of {index!r}") for index, power in (powers or {}).items()}
    for index in whole:
        require_index(net, index)
    try:
        number = Fraction(factor)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        raise NetworkError(f"factor is {factor!r}, expected a finite number, such as 2, 0.5 or '1/3'") from None
    more = Scale(number, tuple(sorted(whole.items())))
    return net.replace(scale=(net.scale * more).bind(net.sizes))
