"""Text and networks: einsum-like subscripts, and the text form of a whole network, both ways."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from lensor.errors import NetworkError, SubscriptsError
from lensor.network import (
    AnyNetwork,
    Delta,
    Group,
    Network,
    Node,
    Ones,
    Operand,
    Pattern,
    Scale,
    Select,
    Verbs,
    new_name,
    sum_of,
)
from lensor.pattern import IndexPattern, as_integer

# What may be a name runs up to white space or a mark; only identifiers are names.
_NAME = r"[^\s\d\[\](),+^=./-][^\s\[\](),+^=./-]*"
_TOKEN = re.compile(
    r"\s*(?:(?P<arrow>->)|(?P<ellipsis>\.\.\.)|(?P<mark>[\[\](),+^])|"
    rf"(?P<number>-?\d+(?:/\d+)?)(?![^\s\[\](),+^=./-])|(?P<name>{_NAME}))"
)
# The parts of a legend's entries; the names are any that a token can be, keywords of Python among them.
_ENTRY = re.compile(rf"\s*(?P<name>{_NAME})\s*=\s*")
_SIZE = re.compile(r"-?\d+(?!\w|\.)")
_PATTERN = re.compile(r"IndexPattern\s*\((?:[^()]|\([^()]*\))*\)")


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    position: int


def _tokenize(text: str, end: int, expected: str) -> list[_Token]:
    """The tokens of the text up to `end`; `expected` tells in an error what may stand there."""
    tokens, at = [], 0
    end = len(text[:end].rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            found = re.compile(r"\d\w*|.", re.DOTALL).match(text, at)
            raise SubscriptsError(f"cannot read {found[0] if found else ''!r}, expected {expected}", text, at)
        kind = match.lastgroup or ""
        if kind == "name" and not match[kind].isidentifier():
            raise SubscriptsError(f"cannot read {match[kind]!r}, expected {expected}", text, match.start(kind))
        tokens.append(_Token(kind, match.group(kind), match.start(kind)))
        at = match.end()
    return [*tokens, _Token("end", "", end)]


class _Reader:
    def __init__(self, text: str, end: int, expected: str) -> None:
        self.text, self.tokens, self.at = text, _tokenize(text, end, expected), 0

    @property
    def next(self) -> _Token:
        return self.tokens[self.at]

    def take(self, text: str | None = None, kind: str | None = None) -> _Token | None:
        token = self.next
        if (text is not None and token.text != text) or (kind is not None and token.kind != kind):
            return None
        self.at += 1
        return token

    def error(self, expected: str, token: _Token | None = None) -> SubscriptsError:
        token = token or self.next
        found = "the end" if token.kind == "end" else repr(token.text)
        return SubscriptsError(f"found {found}, expected {expected}", self.text, token.position)

    def group(self, ellipsis: bool) -> Group | None:
        """One leg: a name, `1`, `...` if it may be, or a parenthesis of names; None if no leg starts here."""
        if name := self.take(kind="name"):
            return (name.text,)
        if self.next.kind == "number" and self.next.text == "1":
            self.at += 1
            return ()
        if ellipsis and self.take(kind="ellipsis"):
            return ("...",)
        if not (opening := self.take("(")):
            return None
        names: list[str] = []
        while not self.take(")"):
            if name := self.take(kind="name"):
                names.append(name.text)
            elif self.next.text == "1":
                self.at += 1
            elif self.next.kind == "end":
                raise SubscriptsError("this '(' is never closed", self.text, opening.position)
            else:
                raise self.error("an index name or ')' inside a group")
        return tuple(names)

    def legs(self, ellipsis: bool = False) -> tuple[Group, ...]:
        legs = []
        while (leg := self.group(ellipsis)) is not None:
            legs.append(leg)
        return tuple(legs)


# --------------------------------------------------------------------------------------------------------- subscripts
@dataclass(frozen=True, slots=True)
class Subscripts:
    """Parsed subscripts: the legs of every operand and of the output."""

    text: str
    operands: tuple[tuple[Group, ...], ...]
    output: tuple[Group, ...]
    starts: tuple[int, ...]


def parse_subscripts(text: str) -> Subscripts:
    """Read `"n (g c) i, i o k -> n o"`: legs by spaces, groups in parentheses, operands by commas.

    An index repeated within one operand is its diagonal, `1` or `()` is an axis of length 1, `...` stands for axes
    that all operands with a `...` share.

    Raises:
        SubscriptsError: with a caret under the place that does not parse, for a missing `->`, an index repeated in
            the output, or an output index that no operand holds.
    """
    if not isinstance(text, str):
        raise TypeError(f"subscripts must be a str, found {type(text).__name__}")
    reader = _Reader(text, len(text), "an index name, '1', '...', '(', ')', ',' or '->'")
    operands, starts = [], []
    while True:
        starts.append(reader.next.position)
        operands.append(reader.legs(ellipsis=True))
        if reader.take(","):
            continue
        if reader.take(kind="arrow"):
            break
        raise reader.error("an index, ',' or '->'" if reader.next.kind != "end" else "'->' and the output's indices")
    before = reader.at
    output = reader.legs(ellipsis=True)
    if reader.next.kind != "end":
        raise reader.error("an output index or the end")
    held = {index for legs in operands for leg in legs for index in leg}
    seen: set[str] = set()
    for token in reader.tokens[before:]:
        if token.kind in ("name", "ellipsis"):
            if token.text in seen:
                raise SubscriptsError(f"output index {token.text!r} is repeated in the output", text, token.position)
            if token.text not in held:
                raise SubscriptsError(
                    f"output index {token.text!r} is nowhere present in the operands; they hold {sorted(held)}"
                    f"{with_spaces(text)}",
                    text,
                    token.position,
                )
            seen.add(token.text)
    for legs, start in zip(operands, starts, strict=True):
        if sum(leg == ("...",) for leg in legs) > 1:
            raise SubscriptsError("an operand may have one '...'", text, start)
    if "..." in held and "..." not in seen:
        raise SubscriptsError("'...' must be in the output too: its indices are not summed", text, reader.next.position)
    return Subscripts(text, tuple(operands), output, tuple(starts))


def with_spaces(text: str) -> str:
    """What to add to an error if a text looks like NumPy's or torch's subscripts: the text with spaces."""
    parts = [part.split() for part in re.split(r",|->", text)]
    if not all(len(names) <= 1 and all(name.isalpha() for name in names) for names in parts):
        return ""
    *operands, output = [set("".join(names)) for names in parts]
    if not output.issubset(set().union(*operands)) or all(len(name) <= 1 for names in parts for name in names):
        return ""
    spaced = [" ".join("".join(names)) for names in parts]
    return f"; spaces separate indices: if every letter is one, write {', '.join(spaced[:-1]) + ' -> ' + spaced[-1]!r}"


def expand_ellipsis(parsed: Subscripts, ranks: Sequence[int | None]) -> Subscripts:
    """Replace every `...` by as many indices as the operands' ranks leave for it, aligned at their last axes."""
    extra = {
        at: rank - (len(legs) - 1)
        for at, (legs, rank) in enumerate(zip(parsed.operands, ranks, strict=True))
        if ("...",) in legs and rank is not None
    }
    if not any(("...",) in legs for legs in parsed.operands):
        return parsed
    for at, count in extra.items():
        if count < 0:
            raise SubscriptsError(
                f"operand {at} has {ranks[at]} axes, expected at least {len(parsed.operands[at]) - 1}",
                parsed.text,
                parsed.starts[at],
            )
    most = max(extra.values(), default=0)
    used = {index for legs in parsed.operands for leg in legs for index in leg}
    names = [new_name(f"ellipsis{place}", used) for place in range(most)]

    def expand(legs: tuple[Group, ...], count: int) -> tuple[Group, ...]:
        new: list[Group] = []
        for leg in legs:
            new.extend([(name,) for name in names[most - count :]] if leg == ("...",) else [leg])
        return tuple(new)

    operands = tuple(expand(legs, extra.get(at, 0)) for at, legs in enumerate(parsed.operands))
    return Subscripts(parsed.text, operands, expand(parsed.output, most), parsed.starts)


def infer_sizes(
    legs_and_shapes: Iterable[tuple[str, tuple[Group, ...], Sequence[int | None]]], known: Mapping[str, int | None]
) -> dict[str, int | None]:
    """Sizes of indices from the shapes of what holds them.

    Args:
        legs_and_shapes: (what it is called, its legs, the size of each leg or None).
        known: sizes given beforehand.

    Raises:
        ValueError: if an index has two sizes, a group does not divide its axis, or the number of axes is wrong.
    """
    sizes: dict[str, int | None] = dict(known)
    open_ = []
    for name, legs, shape in legs_and_shapes:
        if len(legs) != len(shape):
            spelled = format_legs(legs)
            letters = " ".join(spelled)
            hint = f"; spaces separate indices: {letters!r} has {len(shape)}" if len(spelled) == len(shape) else ""
            raise ValueError(
                f"{name} has {len(shape)} axes (shape {tuple(shape)}), expected {len(legs)}: {spelled}{hint}"
            )
        open_.extend((name, leg, size) for leg, size in zip(legs, shape, strict=True) if size is not None)
        for leg in legs:
            for index in leg:
                sizes.setdefault(index, None)
    while open_:
        later, progress = [], False
        for name, leg, size in open_:
            unknown = [index for index in leg if sizes[index] is None]
            product = 1
            for index in leg:
                product *= sizes[index] or (0 if sizes[index] == 0 else 1)
            if not unknown:
                if product != size:
                    spelled = f"index {leg[0]!r}" if len(leg) == 1 else f"group {format_legs([leg])}"
                    raise ValueError(f"{spelled} has size {size} in {name}, expected {product} as elsewhere")
                progress = True
            elif len(set(unknown)) == 1 and leg.count(unknown[0]) == 1 and product:
                if size % product:
                    raise ValueError(
                        f"axis {format_legs([leg])} of {name} has size {size}, expected a multiple of {product}"
                    )
                sizes[unknown[0]] = size // product
                progress = True
            else:
                later.append((name, leg, size))
        open_ = later
        if not progress:
            break
    return sizes


def contraction(subscripts: str, /, *operands: str | IndexPattern, **sizes: int) -> Network:
    """The network that subscripts spell, over operand names and index patterns.

    Args:
        subscripts: as `lensor.einsum` takes them.
        operands: for each operand its name, an IndexPattern, `"δ"` or `"delta"` (Kronecker delta), `"1"` (ones).
        sizes: sizes of indices that no pattern tells; the others are bound when the network is planned.

    Example:
        >>> import lensor
        >>> pi = lensor.IndexPattern(5, 3)
        >>> print(lensor.contraction("n c i, i o k -> n (c k) o", "X", pi, c=2))
        X[n c i] Π1[i o k] -> n (c k) o

    Raises:
        SubscriptsError: if they do not parse.
        NetworkError, ValueError, TypeError: if operands, sizes and subscripts do not fit together, or an operand is
            named as index patterns are in texts: Π1, Π2, ...
    """
    parsed = parse_subscripts(subscripts)
    sizes = {index: as_integer(size, f"the size of index {index!r}") for index, size in sizes.items()}
    if len(parsed.operands) != len(operands):
        raise ValueError(f"subscripts name {len(parsed.operands)} operands, found {len(operands)}: {subscripts!r}")
    if any("..." in leg for legs in parsed.operands for leg in legs):
        raise SubscriptsError("'...' needs operands with a known number of axes", subscripts, subscripts.index("..."))
    nodes: list[Node] = []
    shapes = []
    for legs, operand, start in zip(parsed.operands, operands, parsed.starts, strict=True):
        nodes.append(make_node(operand, legs, subscripts, start))
        if isinstance(operand, IndexPattern):
            shapes.append((repr(operand), legs, (operand.input_size, operand.output_size, operand.kernel_size)))
        else:
            shapes.append((operand, legs, [None] * len(legs)))
    unknown = set(sizes) - {index for _, legs, _ in shapes for leg in legs for index in leg}
    if unknown:
        raise ValueError(f"a size is given for {sorted(unknown)[0]!r}, which is no index of {subscripts!r}")
    inferred = spread_over_deltas(nodes, infer_sizes(shapes, sizes))
    return Network.make(nodes, parsed.output, infer_sizes(shapes, inferred))


def spread_over_deltas(nodes: Sequence[Node], sizes: dict[str, int | None]) -> dict[str, int | None]:
    """Sizes with those of indices that deltas join made known by each other."""
    sizes = dict(sizes)
    held: dict[str, list[Delta]] = {}
    for node in nodes:
        if isinstance(node, Delta):
            for index in node.indices:
                held.setdefault(index, []).append(node)
    known = [index for index in held if sizes[index] is not None]
    while known:
        index = known.pop()
        for other in (other for delta in held.pop(index, ()) for other in delta.indices):
            if sizes[other] is None:
                sizes[other] = sizes[index]
                known.append(other)
    return sizes


def make_node(operand: str | IndexPattern, legs: tuple[Group, ...], text: str, start: int) -> Node:
    """A node from what names it and its legs; errors point at `start` in `text`."""
    if isinstance(operand, IndexPattern):
        if len(legs) != 3:
            raise SubscriptsError(f"an index pattern has 3 legs (i, o, k), found {len(legs)}", text, start)
        return Pattern(operand, (legs[0], legs[1], legs[2]))
    if not isinstance(operand, str):
        raise TypeError(f"an operand is a name or an IndexPattern, found {type(operand).__name__}")
    if operand in ("δ", "delta"):
        if any(len(leg) != 1 for leg in legs) or len(legs) < 2:
            raise SubscriptsError("a delta has two or more single indices", text, start)
        return Delta(tuple(leg[0] for leg in legs))
    if operand == "1":
        if len(legs) != 1 or len(legs[0]) != 1:
            raise SubscriptsError("ones have one single index", text, start)
        return Ones(legs[0][0])
    if operand.startswith("select "):
        if len(legs) != 2:
            raise SubscriptsError(f"a selection has 2 legs, found {len(legs)}", text, start)
        return Select(operand.removeprefix("select "), legs)
    if not operand.isidentifier():
        raise SubscriptsError(f"an operand's name must be an identifier, found {operand!r}", text, start)
    return Operand(operand, legs)


# --------------------------------------------------------------------------------------------------------- networks
def format_legs(legs: Iterable[Group]) -> str:
    """Legs as subscripts spell them."""
    return " ".join(leg[0] if len(leg) == 1 else f"({' '.join(leg)})" for leg in legs)


def _pattern_names(terms: Sequence[Network]) -> dict[tuple, str]:
    """Names Π1, Π2, ... for all patterns; copies that differ only by `_` behind their indices share one."""
    names: dict[tuple, str] = {}
    for term in terms:
        for node in term.nodes:
            if isinstance(node, Pattern):
                names.setdefault(_pattern_key(node), f"Π{len(names) + 1}")
    return names


def pattern_names(terms: Sequence[Network]) -> dict[Pattern, str]:
    """The name of every pattern node in the text of these terms."""
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
    """Terms in which a name has one size: a `where` clause can give no more."""
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
    """A network as text: `X[n i1] Π1[i1 o1 k1] W[k1] -> n o1`, terms joined by `+`, a scale in front.

    With `legend`, a `where` clause spells patterns and sizes, so that `parse` needs nothing else.
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
    """The index patterns of a network under the names its text gives them.

    Example:
        >>> import lensor
        >>> lensor.ops.conv(lensor.ConvSpec(1, 1, (5, 7), 3)).patterns
        {'Π1': IndexPattern(5, 3), 'Π2': IndexPattern(7, 3)}
    """
    return {name: key[0] for key, name in _pattern_names(net.terms).items()}


def _find_legend(text: str) -> tuple[int, int]:
    """Where the body of a network's text ends and where its legend starts; the ends of the text if it has none.

    `where` may name an index too, so the legend's is one behind the last arrow that an entry follows.
    """
    behind = max(text.rfind("->"), 0)
    found = re.compile(rf"(?<!\w)where\s+(?={_NAME}\s*=)").search(text, behind)
    if found is None and "=" in text[behind:]:
        found = re.compile(r"(?<!\w)where(?!\w)").search(text, behind)
    return (len(text), len(text)) if found is None else found.span()


def _read_legend(text: str, at: int) -> tuple[dict[str, int | None], dict[str, IndexPattern]]:
    """The sizes and patterns that `name=value` entries of `text` tell, from the position `at` to its end."""
    sizes: dict[str, int | None] = {}
    patterns: dict[str, IndexPattern] = {}

    def error(reason: object, place: int) -> SubscriptsError:
        place = min(len(text) - len(text[place:].lstrip()), len(text.rstrip()))
        return SubscriptsError(f"cannot read what stands behind 'where': {reason}", text, place)

    while text[at:].strip():
        head = _ENTRY.match(text, at)
        if head is None:
            raise error("expected name=size or name=IndexPattern(...)", at)
        value = _SIZE.match(text, head.end()) or _PATTERN.match(text, head.end())
        if value is None:
            raise error(f"expected a size or IndexPattern(...) for {head['name']!r}", head.end())
        known = sizes if value.re is _SIZE else patterns
        if head["name"] in known:
            raise error(f"{head['name']!r} is there twice", head.start("name"))
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
    """Read the text form of a network, the inverse of `str` and `repr`.

    Args:
        text: `X[n i1] Π1[i1 o1 k1] -> n o1 k1`, several terms joined by `+`, optionally a `where` clause.
        sizes: sizes of indices that neither a pattern nor the `where` clause tells.
        patterns: the index patterns by name; any name that stands here is read as a pattern.

    Example:
        >>> import lensor
        >>> net = lensor.parse("1/2 X[n i] Π1[i o k] -> n o", patterns={"Π1": lensor.IndexPattern(5, 2)})
        >>> print(net, net.sizes["o"])
        1/2 X[n i] Π1[i o k] -> n o 4

    Raises:
        SubscriptsError: with a caret under the place that does not parse.
        NetworkError, ValueError: if the parts do not fit together.
    """
    if not isinstance(text, str):
        raise TypeError(f"a network's text must be a str, found {type(text).__name__}")
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
        raise NetworkError(f"output index {missing[0]!r} occurs in no node; indices of nodes: {sorted(held)}{hint}")
    return Network.make(nodes, output, inferred, scale)


def _subscripts(net: AnyNetwork) -> str:
    """The einsum string over `operands`, terms of a sum joined by `+`.

    Example:
        >>> import lensor
        >>> lensor.ops.conv(lensor.ConvSpec(1, 1, 5, 3, bias=True)).subscripts
        'n (g c_in) i1, i1 o1 k1, (g c_out) c_in k1 -> n (g c_out) o1 + (g c_out), n, o1 -> n (g c_out) o1'
    """
    return " + ".join(
        f"{', '.join(format_legs(node.legs) for node in term.nodes)} -> {format_legs(term.output)}".rstrip()
        for term in net.terms
    )


Verbs.__str__ = lambda self: to_text(self)  # type: ignore[assignment]
Verbs.__repr__ = lambda self: f"parse({to_text(self, legend=True)!r})"  # type: ignore[assignment]
Verbs.subscripts = property(_subscripts)  # type: ignore
Verbs.patterns = property(patterns_of)  # type: ignore
