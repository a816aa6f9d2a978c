"""Conversion of networks to text and back."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from lensor.errors import NetworkError, SubscriptsError
from lensor.network.network import Network
from lensor.network.nodes import Delta, Group, Node, Ones, Operand, Pattern, Select, new_name
from lensor.network.scale import Scale
from lensor.network.subscripts import (
    _NAME,
    _Reader,
    format_legs,
    infer_sizes,
    make_node,
    spread_over_deltas,
    with_spaces,
)
from lensor.network.sums import AnyNetwork, sum_of
from lensor.pattern import IndexPattern, as_integer

# The parts of an entry in a legend; a name may be any token, including a Python keyword.
_ENTRY = re.compile(rf"\s*(?P<name>{_NAME})\s*=\s*")

_SIZE = re.compile(r"-?\d+(?!\w|\.)")

_PATTERN = re.compile(r"IndexPattern\s*\((?:[^()]|\([^()]*\))*\)")


def _pattern_names(terms: Sequence[Network]) -> dict[tuple, str]:
    """Name all patterns Π1, Π2, ...; copies that differ only in trailing `_` of index names share a name."""
    names: dict[tuple, str] = {}
    for term in terms:
        for node in term.nodes:
            if isinstance(node, Pattern):
                names.setdefault(_pattern_key(node), f"Π{len(names) + 1}")
    return names


def pattern_names(terms: Sequence[Network]) -> dict[Pattern, str]:
    """Map each pattern node to its name in the text of these terms."""
    names = _pattern_names(terms)
    return {node: names[_pattern_key(node)] for term in terms for node in term.nodes if isinstance(node, Pattern)}


def _pattern_key(node: Pattern) -> tuple:
    return node.pattern, tuple(tuple(index.rstrip("_") for index in leg) for leg in node.legs)


def _format_scale(scale: Scale) -> list[str]:
    powers = [f"{index}^{power}" for index, power in scale.powers]
    return powers if scale.factor == 1 else [str(scale.factor), *powers]


def _format_term(term: Network, names: Mapping[tuple, str]) -> str:
    parts = _format_scale(term.scale)
    for node in term.nodes:
        match node:
            case Select(name, legs):
                parts.append(f"select {name}[{format_legs(legs)}]")
            case Operand(name, legs):
                parts.append(f"{name}[{format_legs(legs)}]")
            case Pattern(_, legs):
                parts.append(f"{names[_pattern_key(node)]}[{format_legs(legs)}]")
            case Delta():
                parts.append(f"δ[{format_legs(node.legs)}]")
            case Ones():
                parts.append(f"1[{node.index}]")
    return " ".join(parts)


def _tell_apart(terms: Sequence[Network]) -> list[Network]:
    """Rename indices so that each name has the same size in all terms, as a `where` clause requires."""
    used = {index for term in terms for index in term.sizes}
    names: dict[tuple[str, int | None], str] = {}
    seen: set[str] = set()
    apart = []
    for term in terms:
        renamed: dict[str, Group] = {}
        for index, size in term.dimensions:
            if (index, size) not in names:
                names[index, size] = new_name(index, used) if index in seen else index
                seen.add(index)
            if names[index, size] != index:
                renamed[index] = (names[index, size],)
        sizes = {name: term.sizes[index] for index, leg in renamed.items() for name in leg}
        apart.append(term.relabel(renamed, sizes) if renamed else term)
    return apart


def to_text(net: AnyNetwork, legend: bool = False) -> str:
    """Format a network as `X[n i1] Π1[i1 o1 k1] W[k1] -> n o1`, with terms joined by `+`, each preceded by its scale.

    With `legend`, a `where` clause lists all patterns and sizes, so that `parse` can restore the network.
    """
    terms = _tell_apart(net.terms) if legend else net.terms
    names = _pattern_names(terms)
    text = ""
    for at, term in enumerate(terms):
        text += _format_term(term, names)
        last = at == len(terms) - 1
        if last or terms[at + 1].output != term.output:
            text += f" -> {format_legs(term.output)}".rstrip()
        if not last:
            text += " + "
    if legend:
        entries = [f"{name}={key[0]!r}" for key, name in names.items()]
        sizes = {index: size for term in terms for index, size in term.dimensions}
        entries += [f"{index}={size}" for index, size in sorted(sizes.items()) if size is not None]
        text += f" where {', '.join(entries)}" if entries else ""
    return text


def patterns_of(net: AnyNetwork) -> dict[str, IndexPattern]:
    """The index patterns of a network, keyed by their names in its text.

    Example:
        >>> import lensor
        >>> lensor.ops.conv(lensor.ConvSpec(1, 1, (5, 7), 3)).patterns
        {'Π1': IndexPattern(5, 3), 'Π2': IndexPattern(7, 3)}
    """
    return {name: key[0] for key, name in _pattern_names(net.terms).items()}


def _find_legend(text: str) -> tuple[int, int]:
    """Find the end of a network's body and the start of its legend; both are the end of the text if it has no legend.

    Since `where` may also name an index, the legend starts at the first `where` after the last arrow that precedes
    an entry.
    """
    behind = max(text.rfind("->"), 0)
    found = re.compile(rf"(?<!\w)where\s+(?={_NAME}\s*=)").search(text, behind)
    if found is None and "=" in text[behind:]:
        found = re.compile(r"(?<!\w)where(?!\w)").search(text, behind)
    return (len(text), len(text)) if found is None else found.span()


def _read_legend(text: str, at: int) -> tuple[dict[str, int | None], dict[str, IndexPattern]]:
    """Read sizes and patterns from the `name=value` entries in `text[at:]`."""
    sizes: dict[str, int | None] = {}
    patterns: dict[str, IndexPattern] = {}

    def error(reason: object, place: int) -> SubscriptsError:
        place = min(len(text) - len(text[place:].lstrip()), len(text.rstrip()))
        return SubscriptsError(f"cannot read the text after 'where': {reason}", text, place)

    while text[at:].strip():
        head = _ENTRY.match(text, at)
        if head is None:
            raise error("expected name=size or name=IndexPattern(...)", at)
        value = _SIZE.match(text, head.end()) or _PATTERN.match(text, head.end())
        if value is None:
            raise error(f"expected a size or IndexPattern(...) for {head['name']!r}", head.end())
        known = sizes if value.re is _SIZE else patterns
        if head["name"] in known:
            raise error(f"{head['name']!r} occurs twice, expected once", head.start("name"))
        if value.re is _SIZE:
            sizes[head["name"]] = int(value[0])
        else:
            try:
                patterns[head["name"]] = _read_pattern(value[0])
            except (SyntaxError, ValueError, TypeError) as problem:
                raise error(problem, value.start()) from problem
        at = value.end()
        rest = text[at:].lstrip()
        if rest and not rest.startswith(","):
            raise error("expected ',' or the end", at)
        at = len(text) - len(rest) + 1
    return sizes, patterns


def _read_pattern(text: str) -> IndexPattern:
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    arguments = [ast.literal_eval(value) for value in call.args]
    return IndexPattern(*arguments, **{str(word.arg): ast.literal_eval(word.value) for word in call.keywords})


def parse(
    text: str, sizes: Mapping[str, int | None] | None = None, patterns: Mapping[str, IndexPattern] | None = None
) -> AnyNetwork:
    """Parse the text form of a network, the inverse of `str` and `repr`.

    Args:
        text: `X[n i1] Π1[i1 o1 k1] -> n o1 k1`, with terms joined by `+`, optionally with a `where` clause.
        sizes: sizes of indices that neither a pattern nor the `where` clause determines.
        patterns: the index patterns by name; in the text, each of these names denotes its pattern.

    Example:
        >>> import lensor
        >>> net = lensor.parse("1/2 X[n i] Π1[i o k] -> n o", patterns={"Π1": lensor.IndexPattern(5, 2)})
        >>> print(net, net.sizes["o"])
        1/2 X[n i] Π1[i o k] -> n o 4

    Raises:
        SubscriptsError: if the text does not parse; a caret marks the place.
        NetworkError, ValueError: if the parts are inconsistent.
    """
    if not isinstance(text, str):
        raise TypeError(f"text is of type {type(text).__name__}, expected a str")
    end, start = _find_legend(text)
    legend_sizes, legend_patterns = _read_legend(text, start)
    all_sizes = {
        **legend_sizes,
        **{
            index: None if size is None else as_integer(size, f"the size of index {index!r}")
            for index, size in (sizes or {}).items()
        },
    }
    all_patterns = {**legend_patterns, **(patterns or {})}
    reader = _Reader(text, end, "a node such as X[n i], a number, an index name, '1', '(', ')', '+' or '->'")
    pending: list[tuple[list[Node], Scale]] = []
    terms: list[Network] = []
    while True:
        pending.append(_read_term(reader, all_patterns))
        if reader.take("+"):
            continue
        if not reader.take(kind="arrow"):
            raise reader.error("a node, '+' or '->'")
        output = reader.legs()
        for nodes, scale in pending:
            terms.append(_assemble(nodes, output, scale, all_sizes))
        pending = []
        if reader.take("+"):
            continue
        if reader.next.kind != "end":
            raise reader.error("an output index, '+' or the end")
        return sum_of(terms)


def _read_term(reader: _Reader, patterns: Mapping[str, IndexPattern]) -> tuple[list[Node], Scale]:
    nodes: list[Node] = []
    scale = Scale()
    while True:
        token = reader.next
        if token.kind not in ("name", "number"):
            return nodes, scale
        reader.at += 1
        if token.text == "select" and reader.next.kind == "name":
            name = reader.next.text
            reader.at += 1
            if not reader.take("["):
                raise reader.error("'['")
            nodes.append(make_node(f"select {name}", _bracketed(reader), reader.text, token.position))
        elif token.kind == "name" and reader.take("^"):
            power = reader.next
            if power.kind != "number" or "/" in power.text:
                raise reader.error("a whole power")
            reader.at += 1
            scale = scale * Scale(powers=((token.text, int(power.text)),))
        elif reader.take("["):
            legs = _bracketed(reader)
            named = patterns.get(token.text, token.text)
            if isinstance(named, str) and re.fullmatch(r"Π\d+", named):
                raise SubscriptsError(f"no index pattern is given for {named}", reader.text, token.position)
            nodes.append(make_node(named, legs, reader.text, token.position))
        elif token.kind == "number":
            try:
                scale = scale * Scale(Fraction(token.text))
            except ZeroDivisionError:
                raise reader.error("a number", token) from None
        else:
            raise reader.error("'[' or '^'")


def _bracketed(reader: _Reader) -> tuple[Group, ...]:
    legs = reader.legs()
    if not reader.take("]"):
        raise reader.error("an index or ']'")
    return legs


def _assemble(
    nodes: Sequence[Node], output: tuple[Group, ...], scale: Scale, sizes: Mapping[str, int | None]
) -> Network:
    held = {index for node in nodes for leg in node.legs for index in leg} | {index for index, _ in scale.powers}
    shapes = [
        (repr(node.pattern), node.legs, (node.pattern.input_size, node.pattern.output_size, node.pattern.kernel_size))
        if isinstance(node, Pattern)
        else ("a node", node.legs, [None] * len(node.legs))
        for node in nodes
    ]
    known = {index: sizes.get(index) for index in held}
    inferred = infer_sizes(shapes, spread_over_deltas(nodes, infer_sizes(shapes, known)))
    missing = [index for leg in output for index in leg if index not in inferred]
    if missing:
        hint = "; spaces separate indices" if with_spaces(f"{','.join(held)}->{format_legs(output)}") else ""
        raise NetworkError(f"output index {missing[0]!r} is not in any node, expected one of {sorted(held)}{hint}")
    return Network.make(nodes, output, inferred, scale)


def subscripts_of(net: AnyNetwork) -> str:
    """The einsum subscripts for `operands`, with the terms of a sum joined by `+`.

    Example:
        >>> import lensor
        >>> lensor.ops.conv(lensor.ConvSpec(1, 1, 5, 3, bias=True)).subscripts
        'n (g c_in) i1, i1 o1 k1, (g c_out) c_in k1 -> n (g c_out) o1 + (g c_out), n, o1 -> n (g c_out) o1'
    """
    return " + ".join(
        f"{', '.join(format_legs(node.legs) for node in term.nodes)} -> {format_legs(term.output)}".rstrip()
        for term in net.terms
    )


def text_to_parse(net: AnyNetwork) -> str:
    """The `parse` call that restores the network, including all sizes and patterns."""
    return f"parse({to_text(net, legend=True)!r})"
