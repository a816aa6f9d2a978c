"""Gram matrices of patches as convolutions of a tensor with itself: two patterns that share a leg become lags."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from lensor.network import AnyNetwork, Group, Network, Node, Pattern, Scale, sum_of
from lensor.pattern import IndexPattern
from lensor.simplification.patterns import apart, fresh_beside, only_in

_MOST_TERMS = 48
"""Maximum number of terms into which a network is rewritten; with more, the products at the borders dominate."""

Legs = tuple[Group, Group, Group]


@dataclass(frozen=True, slots=True)
class _Twins:
    """Two equal patterns Π[i,o,k] and Π[j,o,l] of stride 1 and in zeros mode, whose shared leg o is summed."""

    first: int
    second: int
    pattern: IndexPattern
    legs: Legs
    copy: Legs

    @property
    def reach(self) -> int:
        """The largest lag, D(K−1)."""
        return self.pattern.dilation * (self.pattern.kernel_size - 1)

    @property
    def whole(self) -> IndexPattern:
        """The pattern with all output positions that read an input position."""
        size, kernel = self.pattern.input_size, self.pattern.kernel_size
        return IndexPattern(size, kernel, 1, self.reach, self.pattern.dilation)

    def excess(self) -> list[int]:
        """The output positions that `whole` has in addition, numbered as those of the pattern."""
        left, positions = self.pattern.padding[0], self.pattern.output_size
        every = range(left - self.reach, left + self.pattern.input_size)
        return [o for o in every if not 0 <= o < positions]


def lags(net: AnyNetwork) -> AnyNetwork:
    """Rewrite pairs of patterns that share a leg as one pattern of lags, minus corrections at the borders (rule 20).

    If all output positions that read an input position are included, two kernel positions are connected by their lag
    only: Σ_o Π[i,o,k] Π[j,o,l] = [j − i = (l−k)·D] = Σ_m Λ[j,i,m] T[l,m,k] with the lags m = l − k + K − 1. The product
    over the positions that the pattern lacks is subtracted. Each of these positions reads few inputs, so each term is
    thin. The dual (with a shared leg k) has this form once the legs o and k are exchanged. With more than 48 terms, the
    network itself is returned.

    Example:
        >>> import lensor
        >>> net = lensor.contraction("n i, i o k, n j, j o l -> k l", "X", p := lensor.IndexPattern(9, 3), "X", p)
        >>> for term in lags(net).terms:
        ...     print(term.scale.factor, term.subscripts)
        1 n i, n j, j i i_lag, l i_lag k -> k l
        -1 n i, n j, i () (), k () (), j () (), l () () -> k l
        -1 n i, n j, i o_ (), k o_ (), j o__ (), l o__ () -> k l
        -1 n i, n j, i o_ (), k o_ (), j o__ (), l o__ () -> k l
        -1 n i, n j, i () (), k () (), j () (), l () () -> k l
    """
    pairs = [_pairs(term) for term in net.terms]
    terms = [piece for term, mine in zip(net.terms, pairs, strict=True) for piece in _rewritten(term, mine)]
    return sum_of(terms) if any(pairs) and len(terms) <= _MOST_TERMS else net


def has_lags(net: AnyNetwork) -> bool:
    """Whether `lags` may rewrite the network."""
    return any(_pairs(term) for term in net.terms)


def _rewritten(term: Network, pairs: list[_Twins]) -> list[Network]:
    if not pairs:
        return [term]
    found = [_with(term, pairs, [_lagged(term, pair) for pair in pairs])]
    for at, pair in enumerate(pairs):
        for o in pair.excess():
            line = _line(term, pair, o)
            if line is not None:
                before = [_unchanged(term, other) for other in pairs[:at]]
                after = [_completed(term, other) for other in pairs[at + 1 :]]
                found.append(_with(term, pairs, [*before, line, *after], Fraction(-1)))
    return found


_Part = tuple[list[Node], dict[str, int]]
"""The nodes that replace two patterns, and the sizes of their new indices."""


def _with(term: Network, pairs: list[_Twins], parts: list[_Part], factor: Fraction = Fraction(1)) -> Network:
    gone = {at for pair in pairs for at in (pair.first, pair.second)}
    nodes = [node for at, node in enumerate(term.nodes) if at not in gone]
    sizes = {index: size for _, new in parts for index, size in new.items()}
    return term.replace(
        nodes=[*nodes, *(node for new, _ in parts for node in new)],
        sizes=sizes,
        scale=term.scale.bind(term.sizes) * Scale(factor),
    )


def _lagged(term: Network, pair: _Twins) -> _Part:
    """Λ[j,i,m] T[l,m,k]."""
    (i, _, k), (j, _, last), pattern = pair.legs, pair.copy, pair.pattern
    size, kernel = pattern.input_size, pattern.kernel_size
    m = fresh_beside(term, i, "lag")
    lag = IndexPattern(size, 2 * kernel - 1, 1, pair.reach, pattern.dilation)
    toeplitz = IndexPattern(kernel, kernel, 1, kernel - 1)
    return [Pattern(lag, (j, i, (m,))), Pattern(toeplitz, (last, (m,), k))], {m: 2 * kernel - 1}


def _line(term: Network, pair: _Twins, o: int) -> _Part | None:
    """Π[i,o,k] Π[j,o,l] at one output position o, restricted to kernel positions that read an input; None if none do.

    At one position the pattern is a crop of i to the kernel positions, followed by a crop of k.
    """
    pattern = pair.pattern
    start, step = o - pattern.padding[0], pattern.dilation
    reads = [k for k in range(pattern.kernel_size) if 0 <= start + k * step < pattern.input_size]
    if not reads:
        return None
    nodes: list[Node] = []
    sizes: dict[str, int] = {}
    low, count = reads[0], len(reads)
    for i, _, k in (pair.legs, pair.copy):
        group: Group = ()
        if count > 1:
            group = (term.fresh(pair.legs[1][0], sizes),)
            sizes[group[0]] = count
        nodes.append(_crop(pattern.input_size, start + low * step, step, count, (i, group)))
        nodes.append(_crop(pattern.kernel_size, low, 1, count, (k, group)))
    return nodes, sizes


def _crop(size: int, start: int, step: int, count: int, legs: tuple[Group, Group]) -> Pattern:
    crop = IndexPattern(size, 1, step, (-start, start + (count - 1) * step + 1 - size), output_size=count)
    return Pattern(crop.normalize(), (*legs, ()))


def _unchanged(term: Network, pair: _Twins) -> _Part:
    return [term.nodes[pair.first], term.nodes[pair.second]], {}


def _completed(term: Network, pair: _Twins) -> _Part:
    """The two patterns with all output positions that read an input position."""
    o = fresh_beside(term, pair.legs[1], "whole")
    nodes: list[Node] = [Pattern(pair.whole, (i, (o,), k)) for i, _, k in (pair.legs, pair.copy)]
    return nodes, {o: pair.whole.output_size}


def _pairs(term: Network) -> list[_Twins]:
    """Pairs of patterns that differ in all indices, so that each rewriting leaves the others possible."""
    nodes = [at for at, node in enumerate(term.nodes) if isinstance(node, Pattern)]
    found: list[_Twins] = []
    for one, two in itertools.combinations(nodes, 2):
        if any(at in (pair.first, pair.second) for pair in found for at in (one, two)):
            continue
        found += itertools.islice(_twins(term, one, two), 1)
    return found


def _twins(term: Network, one: int, two: int) -> Iterator[_Twins]:
    first, second = term.nodes[one], term.nodes[two]
    assert isinstance(first, Pattern)
    assert isinstance(second, Pattern)
    if first.pattern != second.pattern or first.pattern.padding_mode != "zeros" or first.pattern.is_crop:
        return
    for exchanged in (False, True):
        (i, o, k), (j, p, last) = first.legs, second.legs
        pattern = first.pattern
        if exchanged:
            pattern, o, k, p, last = pattern.swap(), k, o, last, p
        if o != p or not all((i, o, k, j, last)) or not apart((i, o, k, j, last)) or not only_in(term, o, (one, two)):
            continue
        if pattern.stride == 1 and pattern.kernel_size <= pattern.output_size and o[0] not in term.output_indices:
            yield _Twins(one, two, pattern, (i, o, k), (j, o, last))
