"""Simplification rules for index patterns; each docstring states the identity that the rule applies.

Notation: Π(I,K,S,P,D)[i,o,k] = [i = k·D + o·S − P]. A crop is a pattern with kernel size 1, [i = o·S − P]; it slices,
crops, pads or spreads an axis and costs no arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from lensor.affine import Reading, affine, after
from lensor.cache import Cache
from lensor.network import Delta, Group, Network, Node, Ones, Operand, Pattern, Scale, Select, indices_of, relabel_node
from lensor.pattern import IndexPattern
from lensor.simplification.rule import RuleList, rule
from lensor.transforms.indices import contract_deltas, equate


def pattern_nodes(net: Network) -> Sequence[tuple[int, IndexPattern, tuple[Group, Group, Group]]]:
    """A (node, pattern, legs) triple for each index pattern that rules may change.

    If positions of a zeros-mode pattern's leg are selected at run time, the rules do not split the pattern unless it is
    the identity: the plan needs the complete pattern to look up the selected positions. Plans do not read through
    patterns in other padding modes, so rules split these patterns as usual.
    """
    every = net.pattern_nodes
    if not every or not net.selections:
        return every
    chosen = {index for node in net.nodes if isinstance(node, Select) for index in node.legs[0]}
    return [
        (at, pattern, legs)
        for at, pattern, legs in every
        if pattern.padding_mode != "zeros" or pattern.is_identity or chosen.isdisjoint(indices_of(net.nodes[at]))
    ]


def _legs_at(net: Network, at: int) -> tuple[Group, Group, Group]:
    """The legs of the pattern at node `at`."""
    node = net.nodes[at]
    assert isinstance(node, Pattern)
    return node.legs


def swap_nodes(net: Network, drop: Sequence[int], put: Sequence[Node], **parts: object) -> Network:
    """Remove the nodes at `drop`, and insert the nodes `put` at the place of the first removed node."""
    nodes = [node for at, node in enumerate(net.nodes) if at not in drop]
    place = min(drop)
    return net.replace(nodes=(*nodes[:place], *put, *nodes[place:]), **parts)


def only_in(net: Network, group: Group, nodes: Sequence[int]) -> bool:
    """Whether the indices of the group occur only on the listed nodes."""
    holders = net.holders
    return all(holders[index].issubset(nodes) for index in group)


def apart(legs: Sequence[Group]) -> bool:
    """Whether all indices of the legs are different."""
    flat = [index for leg in legs for index in leg]
    return len(flat) == len(set(flat))


def fresh_beside(net: Network, group: Group, what: str) -> str:
    """A name for a new index derived from a group; trailing `_`, which mark copies, stay at the end."""
    base = group[0].rstrip("_") if group else ""
    return net.fresh(f"{base}_{what}{'_' * (len(group[0]) - len(base))}" if group else what)


# ------------------------------------------------------------------------------------------------------ normal forms
@rule("irrelevant parameters normalised", "7, 8")
def normalise(net: Network) -> Network | None:
    """D has no effect if K=1, nor has S if O=1; the right padding follows from O; unused padding modes become zeros."""
    for at, pattern, legs in pattern_nodes(net):
        normal = _normal(pattern)
        if normal != pattern:
            return swap_nodes(net, [at], [Pattern(normal, legs)])
    return None


def normalise_all(net: Network) -> Network:
    """Normalise all patterns at once, which `normalise` does one by one."""
    new = {
        at: Pattern(normal, legs) for at, pattern, legs in pattern_nodes(net) if (normal := _normal(pattern)) != pattern
    }
    return net.replace(nodes=[new.get(at, node) for at, node in enumerate(net.nodes)]) if new else net


def _normal(pattern: IndexPattern) -> IndexPattern:
    return pattern.fitted() or pattern.normalize()


@rule("one output position: kernel and output swapped", "4, 7")
def swap_single_output(net: Network) -> Network | None:
    """Π(I,K,S,P,D)[i,o,k] = Π(I,O,D,P,S)[i,k,o]: for O=1, the swapped pattern is a crop."""
    for at, pattern, (i, o, k) in pattern_nodes(net):
        if pattern.output_size == 1 and pattern.kernel_size > 1:
            return swap_nodes(net, [at], [Pattern(pattern.swap().normalize(), (i, k, o))])
    return None


@rule("one input position: read the other way round", "7")
def swap_single_input(net: Network) -> Network | None:
    """For I=1 and K=1, [0 = o·S − P] is 1 at a single o: replace the pattern by the crop to this position of o."""
    for at, pattern, (i, o, k) in pattern_nodes(net):
        if pattern.input_size == 1 and pattern.is_crop and pattern.output_size > 1 and not k:
            place, count = pattern.span()
            if count == 1:
                size = pattern.output_size
                one_hot = IndexPattern(size, 1, padding=(-place, place + 1 - size), output_size=1)
                return swap_nodes(net, [at], [Pattern(one_hot.normalize(), (o, i, k))])
    return None


@rule("one position of a group: one position of each of its indices", "7")
def split_one_hot(net: Network) -> Network | None:
    """[(a b) = p] = [a = p div B] [b = p mod B]."""
    for at, pattern, (i, o, k) in pattern_nodes(net):
        if len(i) < 2 or o or k or pattern.is_zero:
            continue
        place = pattern.line()[0].offset
        put = []
        for index in reversed(i):
            size = net.sizes[index] or 0
            place, mine = divmod(place, size)
            one_hot = IndexPattern(size, 1, padding=(-mine, mine + 1 - size), output_size=1)
            put.insert(0, Pattern(one_hot.normalize(), ((index,), (), ())))
        return swap_nodes(net, [at], put)
    return None


@rule("pattern at one position of a leg", "8")
def at_one_position(net: Network) -> Network | None:
    """e_a[x] Π[i,x,k] = e_a[x] Π(I,K,1,P−a·S,D)[i,0,k]; the same for the legs k (after a swap) and i (with P+a)."""
    for one, place, x in one_hots(net):
        for at, pattern, legs in pattern_nodes(net):
            if at == one or pattern.padding_mode != "zeros" or legs.count((x,)) != 1 or not apart(legs):
                continue
            leg = legs.index((x,))
            size, left = [pattern.input_size, pattern.output_size, pattern.kernel_size], pattern.padding[0]
            size[leg] = 1
            left += (1, -pattern.stride, -pattern.dilation)[leg] * place
            rest = IndexPattern(size[0], size[2], pattern.stride, (left, 0), pattern.dilation, output_size=size[1])
            new = [() if group == (x,) else group for group in legs]
            return swap_nodes(net, [at], [Pattern(rest.normalize(), (new[0], new[1], new[2]))])
    return None


def one_hots(net: Network) -> Iterator[tuple[int, int, str]]:
    """Iterate over (node, position, index) for each pattern that is 1 at exactly one position of one index."""
    for at, pattern, (x, o, k) in pattern_nodes(net):
        if len(x) == 1 and not o and not k and not pattern.is_zero:
            place = -pattern.padding[0] if pattern.padding_mode == "zeros" else pattern.line()[0].offset
            yield at, place, x[0]


@rule("one position of a shared index: one of each holder's own", "8")
def part_holders(net: Network) -> Network | None:
    """e_a[x] f(x) g(x) = e_a[x] f(x) e_a[y] g(y): operands need not share an index with a fixed position."""
    for one, _, x in one_hots(net):
        places = net.holders[x]
        holders = [at for at in places if at >= 0 and isinstance(net.nodes[at], Operand)]
        tied = -1 in places or any(at != one and at in places for at, _, _ in pattern_nodes(net))
        if len(holders) <= (not tied):
            continue
        at = max(holders)
        y = net.fresh(x)
        own = [new for node in (net.nodes[at], net.nodes[one]) for new in relabel_node(node, {x: (y,)})]
        return swap_nodes(net, [at], own, sizes={y: net.sizes[x]})
    return None


@rule("crop summed over its input: a mask", "16")
def mask(net: Network) -> Network | None:
    """Σ_i [i = o·S − P] is 1 where o reads an input, else 0: replace the crop by the shortest shift with this sum."""
    for at, pattern, (i, o, k) in pattern_nodes(net):
        if not pattern.is_crop or k or not i or not only_in(net, i, [at]) or not apart((i, o)):
            continue
        low, count = pattern.span()
        if not count or pattern.padding_mode != "zeros":
            continue
        if (pattern.input_size, pattern.stride, pattern.padding[0]) == (count, 1, low):
            continue
        shift = IndexPattern(
            count, 1, padding=(low, pattern.output_size - low - count), output_size=pattern.output_size
        )
        name = net.fresh(i[0])
        return swap_nodes(net, [at], [Pattern(shift.normalize(), ((name,), o, ()))], sizes={name: count})
    return None


@rule("pattern that reads nothing: the network is zero", "8")
def zero(net: Network) -> Network | None:
    """A pattern that reads only padding is 0, so the product is 0."""
    if net.scale.factor == 0 or not any(pattern.is_zero for _, pattern, _ in pattern_nodes(net)):
        return None
    nodes: list[Node] = []
    sizes: dict[str, int | None] = {}

    def loose(leg: Group) -> Group:
        """Replace a leg of known size by one new index, since only the size matters."""
        size = net.group_size(leg)
        if size is None or not leg:
            return leg
        name = net.fresh(leg[0], sizes)
        sizes[name] = size
        return (name,)

    for node in net.nodes:
        if isinstance(node, Operand):
            nodes.append(replace(node, legs=tuple(loose(leg) for leg in node.legs)))
        elif isinstance(node, Delta) and net.sizes[node.indices[0]] is None:
            nodes.append(node)  # needed to determine a size
    output = tuple(loose(leg) for leg in net.output)
    held = {index for node in nodes for index in indices_of(node)}
    nodes += [Ones(index) for leg in output for index in leg if index not in held]
    return net.replace(nodes=nodes, output=output, sizes=sizes, scale=Scale(Fraction(0)))


@rule("identity pattern contracted", "1, 7")
def identity(net: Network) -> Network | None:
    """Π[i,o] = δ[i,o] for K=1, S=1, P=0, O=I. K=I, P=0, O=1 has this form after the swap."""
    for at, pattern, (i, o, k) in pattern_nodes(net):
        if not pattern.is_identity or k:
            continue
        rest = swap_nodes(net, [at], [Ones(index) for index in dict.fromkeys((*i, *o))])
        after = equate(rest, o, i)  # keep the index names of the output or kernel leg
        if after is not None:
            return contract_deltas(after)
    return None


# -------------------------------------------------------------------------------------------------------- contractions
@rule("crop composed with a pattern", "23")
def compose_crop(net: Network) -> Network | None:
    """Σ_j Π1[i,j,k] Π2[j,o] = Π(I, K, S1·S2, P1+S1·P2, D1)[i,o,k] if Π2 reads only inside its input; the same for k.

    The rule compares reads to decide whether a single pattern expresses the composition.
    """
    for two, crop, (j, o, unit) in pattern_nodes(net):
        if not crop.is_crop or unit or not j:
            continue
        for one, pattern, (i, positions, kernel) in pattern_nodes(net):
            if one == two or not only_in(net, j, [one, two]) or not apart((i, positions, kernel, o)):
                continue
            if positions == j:
                legs, how = (i, o, kernel), "positions"
            elif kernel == j:
                legs, how = (i, positions, o), "kernel"
            elif kernel == () and len(j) == 1 and positions[:1] == j and len(positions) > 1:
                # The block rule has split the pattern's output positions into (j, within), so restore the pattern.
                legs, how = (i, o, positions[1:]), "blocks"
            elif kernel == o == () and len(j) == 1 and positions[-1:] == j and len(positions) > 1:
                legs, how = (i, positions[:-1], ()), "within"  # one position within the blocks
            else:
                continue
            fitted = _picked(pattern, crop, how)
            if fitted is not None:
                return swap_nodes(net, [one, two], [Pattern(fitted, legs)])
    return None


_composed = Cache(maxsize=4096)


def _picked(pattern: IndexPattern, crop: IndexPattern, how: str) -> IndexPattern | None:
    """Restrict a pattern by a crop of its output, its kernel, the blocks of its output, or positions inside blocks."""

    def make() -> tuple[IndexPattern | None]:
        reading, picked = pattern.reading(), crop.line()
        (outputs, kernels), size, count = reading.shape, crop.input_size, crop.output_size
        rows, columns, outer, stride = reading.rows, reading.columns, reading.outer, pattern.stride
        match how:
            case "positions":
                found = Reading(after(rows, picked), columns, outer, (count, kernels))
            case "kernel":
                found = Reading(rows, after(columns, picked), outer, (outputs, count))
            case "blocks":
                block = outputs // size
                first = after(affine(size, stride * block), picked)
                found = Reading(first, affine(block, stride, columns[0].offset), outer, (count, block))
            case _:
                within = after(affine(size, stride, columns[0].offset), picked)
                found = Reading(affine(outputs // size, stride * size), within, outer, (outputs // size, count))
        return (IndexPattern.from_reads(found, pattern.input_size),)

    return _composed.get_or_make((pattern, crop, how), make)[0]


@rule("padding or cropping composed with a pattern", "8, 23")
def compose_shift(net: Network) -> Network | None:
    """Σ_j Π1[i,j] Π2[j,o,k] = Π(I, K, S2, P1+P2, D2)[i,o,k] if Π1 has stride 1 (it pads or crops).

    If Π1 has a larger stride, the rule does not apply, since the gcd rule produces this form.
    """
    for one, shift, (i, j, unit) in pattern_nodes(net):
        if not shift.is_crop or unit or shift.stride != 1 or not j:
            continue
        for two, pattern, (inputs, o, k) in pattern_nodes(net):
            if one == two or inputs != j or not only_in(net, j, [one, two]) or not apart((i, j, o, k)):
                continue
            if shift.padding_mode != "zeros" and shift.stride == 1 and not pattern.is_crop:
                continue  # padding that was split off its pattern stays separate
            fitted = read_through(shift, pattern) or _in_mode(shift, pattern)
            if fitted is not None:
                return swap_nodes(net, [one, two], [Pattern(fitted, (i, o, k))])
    return None


def read_through(crop: IndexPattern, pattern: IndexPattern) -> IndexPattern | None:
    """The composition of a crop with a pattern on its output, as a zeros-mode pattern, or None."""

    def make() -> tuple[IndexPattern | None]:
        reading = pattern.reading().through(crop.line())
        return (IndexPattern.from_reads(reading, crop.input_size),)

    return _composed.get_or_make((crop, pattern), make)[0]


def _in_mode(shift: IndexPattern, crop: IndexPattern) -> IndexPattern | None:
    """Compose a padding and a crop of its result into one crop with the padding's mode; None if impossible."""
    if shift.padding_mode == "zeros" or not crop.reads_everywhere:
        return None
    left = shift.padding[0] + crop.padding[0]
    right = (crop.output_size - 1) * crop.stride + 1 - shift.input_size - left
    if left < 0 < right:
        return None  # no pattern in this mode crops one side and pads the other
    right = max(right, 0) if left > 0 else right
    return IndexPattern(
        shift.input_size, 1, crop.stride, (left, right), 1, shift.padding_mode, crop.output_size
    ).normalize()


@rule("crop of the input taken into the pattern", "8")
def crop_input(net: Network) -> Network | None:
    """Σ_i C[i,j] Π(I,K,S,P,D)[i,o,k] = Π(J,K,S,P+a,D)[j,o,k] for the crop C[i,j] = [i = j + a]."""
    for one, crop, (i, j, unit) in pattern_nodes(net):
        inside = crop.is_crop and not unit and crop.stride == 1 and crop.reads_everywhere
        if not inside or crop.padding_mode != "zeros" or not i:
            continue
        for two, pattern, (inputs, o, k) in pattern_nodes(net):
            if one == two or inputs != i or not only_in(net, i, [one, two]) or pattern.padding_mode != "zeros":
                continue
            if not apart((i, j, o, k)):
                continue
            longer = pattern.is_crop and pattern.stride == 1 and pattern.output_size > crop.output_size
            if longer and pattern.reads_everywhere:
                continue  # both are crops: compose_crop handles this case
            shorter = IndexPattern(
                crop.output_size,
                pattern.kernel_size,
                stride=pattern.stride,
                padding=(pattern.padding[0] - crop.padding[0], 0),
                dilation=pattern.dilation,
                output_size=pattern.output_size,
            )
            return swap_nodes(net, [one, two], [Pattern(shorter.normalize(), (j, o, k))])
    return None


@rule("two patterns that share two legs", "19")
def two_shared_legs(net: Network) -> Network | None:
    """Π[i,o,k] Π[i,o,k'] = Π[i,o,k] δ[k,k'] for any two shared legs; only for (o,k) in modes other than zeros."""
    found = list(pattern_nodes(net))
    for a, (_one, pattern, legs) in enumerate(found):
        for two, other, others in found[a + 1 :]:
            differ = [place for place in range(3) if legs[place] != others[place]]
            if differ and not any(legs[place] for place in range(3) if place not in differ):
                continue  # vectors without a shared index
            if len(differ) > 1 or (pattern.padding_mode != "zeros" and differ not in ([], [0])):
                continue
            if pattern.normalize() != other.normalize():
                continue
            spare = [Ones(index) for index in dict.fromkeys(index for leg in others for index in leg)]
            rest = swap_nodes(net, [two], spare)
            after = rest if not differ else equate(rest, legs[differ[0]], others[differ[0]])
            if after is not None:
                return contract_deltas(after)
    return None


@rule("pattern and one position of itself", "19")
def with_own_position(net: Network) -> Network | None:
    """Π[i,o,k] Π[i,o,a] = e_a[k] Π[i,o,a]: i and o determine k; the same for a position of o."""
    for two, part, (i, x, unit) in pattern_nodes(net):
        if not part.is_crop or unit or not i or not x or part.padding_mode != "zeros" or part.is_zero:
            continue
        for one, pattern, legs in pattern_nodes(net):
            if one == two or pattern.padding_mode != "zeros" or legs[0] != i or x not in legs[1:]:
                continue
            other = 1 if legs[2] == x else 2
            if not legs[other] or not apart(legs):
                continue
            lines, (wanted,) = (pattern.swap() if other == 1 else pattern).columns(), part.columns()
            if wanted in lines:
                size, place = len(lines), lines.index(wanted)
                one_hot = IndexPattern(size, 1, padding=(-place, place + 1 - size), output_size=1)
                return swap_nodes(net, [one], [Pattern(one_hot.normalize(), (legs[other], (), ()))])
    return None


@rule("leg sum that is constant", "16, 17")
def constant_leg_sum(net: Network) -> Network | None:
    """If a pattern's sum over the legs that no other node carries is constant, replace the sum by a number times ones.

    For example, Σ_i Π = [0 ≤ kD + oS − P < I] is always 1 without padding, so the pattern disappears.
    """
    for at, pattern, legs in pattern_nodes(net):
        loose = [place for place in range(3) if only_in(net, legs[place], [at])]
        if not loose or not apart(legs):
            continue
        value = pattern.constant_sum(loose)
        if value is None:
            continue
        summed = {index for place in loose for index in legs[place]}
        kept = dict.fromkeys(index for leg in legs for index in leg if index not in summed)
        scale = net.scale * Scale(Fraction(value))
        return swap_nodes(net, [at], [Ones(index) for index in kept], scale=scale)
    return None


# ------------------------------------------------------------------------------------------------------ decompositions
@rule("padding mode split from its pattern", "modes")
def split_mode(net: Network) -> Network | None:
    """Π_mode[i,o,k] = Σ_j R[i,j] Π(L,K,S,0,D)[j,o,k], where R pads the input in the pattern's mode."""
    for at, pattern, (i, o, k) in pattern_nodes(net):
        if pattern.padding_mode == "zeros" or pattern.is_crop:
            continue
        if any(only_in(net, leg, [at]) for leg in (o, k)):
            continue  # summed over a leg, the pattern is one matrix in every mode
        if set(i) & set(net.output_indices) and not _scatter_gains(net, at, pattern):
            continue
        padding, inner = pattern.split_padding()
        if padding is None:
            continue
        j = fresh_beside(net, i, "pad")
        put = [Pattern(padding.normalize(), (i, (j,), ())), Pattern(inner.normalize(), ((j,), o, k))]
        return swap_nodes(net, [at], put, sizes={j: inner.input_size})
    return None


def _scatter_gains(net: Network, at: int, pattern: IndexPattern) -> bool:
    """Whether summing patches into the padded input and then folding back the padding is cheaper."""
    _, o, k = _legs_at(net, at)
    if set(net.output_indices) & {*o, *k} or any(
        {*o, *k} & {*a, *b, *c} for n, _, (a, b, c) in pattern_nodes(net) if n != at
    ):
        return False
    inputs, entries = pattern.input_size, pattern.output_size * pattern.kernel_size
    return entries + 2 * inputs * (inputs + sum(pattern.padding)) < 2 * inputs * entries


@rule("common divisor of stride and dilation taken out", "11")
def common_divisor(net: Network) -> Network | None:
    """For g = gcd(S,D) > 1, only i = a + g·j with a = (−P) mod g is read: Π = Π(·,K,S/g,(P+a)/g,D/g)[j,o,k]."""
    for at, pattern, (i, o, k) in pattern_nodes(net):
        if pattern.padding_mode != "zeros":
            continue
        parts = pattern.gcd_split()
        if parts is None:
            continue
        every, inner = parts
        if every.normalize().stride == 1:
            continue  # only one position remains, so this is a shift
        j = fresh_beside(net, i, "every")
        put = [Pattern(every.normalize(), (i, (j,), ())), Pattern(inner.normalize(), ((j,), o, k))]
        return swap_nodes(net, [at], put, sizes={j: inner.input_size})
    return None


@rule("dense or block pattern into regrouping", "6")
def block(net: Network) -> Network | None:
    """For K ≤ S, D=1: pad P on the left, pad or crop to O·S, view as (O, S), take k < K; includes rules 1 to 3."""
    for at, pattern, legs in pattern_nodes(net):
        if _blocks(pattern) and not _spreads(net, pattern, legs):
            return _into_blocks(net, at, pattern, legs)
    return None


@rule("dense or block pattern after the swap into regrouping", "4, 6")
def swapped_block(net: Network) -> Network | None:
    """For O ≤ D, S=1: apply the block rule to the pattern with kernel and output swapped."""
    for at, pattern, (i, o, k) in pattern_nodes(net):
        if pattern.padding_mode == "zeros" and not _blocks(pattern) and _blocks(pattern.swap()):
            if _spreads(net, pattern.swap(), (i, k, o)):
                continue
            return _into_blocks(net, at, pattern.swap(), (i, k, o))
    return None


def _spreads(net: Network, pattern: IndexPattern, legs: tuple[Group, Group, Group]) -> bool:
    """Whether blocks of S positions, of which only K < S are used, would have to be stored in an array."""
    open_ = set(net.output_indices)
    return pattern.kernel_size < pattern.stride and bool(open_ & {*legs[0]}) and bool(open_ & {*legs[1], *legs[2]})


def _blocks(pattern: IndexPattern) -> bool:
    return (
        pattern.padding_mode == "zeros"
        and pattern.kernel_size > 1
        and pattern.output_size > 1
        and pattern.dilation == 1
        and pattern.kernel_size <= pattern.stride
        and not pattern.is_zero
    )


def _into_blocks(net: Network, at: int, pattern: IndexPattern, legs: tuple[Group, Group, Group]) -> Network:
    i, o, k = legs
    stride, positions = pattern.stride, pattern.output_size
    length = positions * stride
    left = pattern.padding[0]
    view = IndexPattern(pattern.input_size, 1, padding=(left, length - pattern.input_size - left), output_size=length)
    if pattern.kernel_size == stride:
        return swap_nodes(net, [at], [Pattern(view.normalize(), (i, (*o, *k), ()))])
    s = fresh_beside(net, k, "stride")
    first = IndexPattern(stride, 1, padding=(0, pattern.kernel_size - stride), output_size=pattern.kernel_size)
    put = [Pattern(view.normalize(), (i, (*o, s), ())), Pattern(first.normalize(), ((s,), k, ()))]
    return swap_nodes(net, [at], put, sizes={s: stride})


PATTERN_RULES: RuleList = (
    normalise,
    swap_single_output,
    swap_single_input,
    split_one_hot,
    at_one_position,
    part_holders,
    zero,
    identity,
    compose_crop,
    compose_shift,
    crop_input,
    two_shared_legs,
    with_own_position,
    constant_leg_sum,
    mask,
)
DECOMPOSITION_RULES: RuleList = (split_mode, common_divisor, block, swapped_block)
