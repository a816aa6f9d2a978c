"""Parsing of einsum-like subscripts, `n (g c) i, i o k -> n o`, into legs and networks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lensor.errors import SubscriptsError
from lensor.network.network import Network
from lensor.network.nodes import Delta, Group, Node, Ones, Operand, Pattern, Select, new_name
from lensor.pattern import IndexPattern, as_integer

# A candidate name extends to the next space or punctuation mark; only identifiers are accepted as names.
_NAME = r"[^\s\d\[\](),+^=./-][^\s\[\](),+^=./-]*"

_TOKEN = re.compile(
    r"\s*(?:(?P<arrow>->)|(?P<ellipsis>\.\.\.)|(?P<mark>[\[\](),+^])|"
    rf"(?P<number>-?\d+(?:/\d+)?)(?![^\s\[\](),+^=./-])|(?P<name>{_NAME}))"
)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    position: int


def _tokenize(text: str, end: int, expected: str) -> list[_Token]:
    """Split the text up to `end` into tokens; error messages list `expected`."""
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
        """Read one leg: a name, `1`, `...` if allowed, or names in parentheses; None if no leg starts here."""
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


@dataclass(frozen=True, slots=True)
class Subscripts:
    """Parsed subscripts: the legs of each operand and of the output."""

    text: str
    operands: tuple[tuple[Group, ...], ...]
    output: tuple[Group, ...]
    starts: tuple[int, ...]


def parse_subscripts(text: str) -> Subscripts:
    """Parse `"n (g c) i, i o k -> n o"`: spaces separate legs, commas separate operands, parentheses enclose groups.

    An index repeated within one operand selects the diagonal. `1` or `()` is an axis of length 1. `...` stands for axes
    shared by all operands that contain `...`.

    Raises:
        SubscriptsError: if the text does not parse, `->` is missing, an index is repeated in the output, or an output
            index does not appear on any operand; a caret marks the place.
    """
    if not isinstance(text, str):
        raise TypeError(f"subscripts is of type {type(text).__name__}, expected a str")
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
                raise SubscriptsError(
                    f"output index {token.text!r} is repeated in the output, expected once", text, token.position
                )
            if token.text not in held:
                raise SubscriptsError(
                    f"output index {token.text!r} is not in the operands, expected one of {sorted(held)}"
                    f"{with_spaces(text)}",
                    text,
                    token.position,
                )
            seen.add(token.text)
    for legs, start in zip(operands, starts, strict=True):
        if sum(leg == ("...",) for leg in legs) > 1:
            raise SubscriptsError("an operand has several '...', expected at most one", text, start)
    if "..." in held and "..." not in seen:
        raise SubscriptsError(
            "'...' is missing from the output, expected there too: its indices are not summed",
            text,
            reader.next.position,
        )
    return Subscripts(text, tuple(operands), output, tuple(starts))


def with_spaces(text: str) -> str:
    """If a text looks like NumPy or torch subscripts, return a hint that shows the text with spaces, else ""."""
    parts = [part.split() for part in re.split(r",|->", text)]
    if not all(len(names) <= 1 and all(name.isalpha() for name in names) for names in parts):
        return ""
    *operands, output = [set("".join(names)) for names in parts]
    if not output.issubset(set().union(*operands)) or all(len(name) <= 1 for names in parts for name in names):
        return ""
    spaced = [" ".join("".join(names)) for names in parts]
    suggestion = f"{', '.join(spaced[:-1])} -> {spaced[-1]}"
    return f"; spaces separate indices: if every letter is an index, write {suggestion!r}"


def expand_ellipsis(parsed: Subscripts, ranks: Sequence[int | None]) -> Subscripts:
    """Replace each `...` by indices for the remaining axes of its operand, aligned at the last axis."""
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
    """Infer the sizes of indices from shapes.

    Args:
        legs_and_shapes: a (name, legs, sizes) triple for each array or pattern; a size may be None; errors use the
            name.
        known: known index sizes.

    Raises:
        ValueError: if an index has conflicting sizes, a group does not divide its axis, or the number of axes is wrong.
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
    """Create a network from subscripts, operand names and index patterns.

    Use `lensor.einsum` to evaluate subscripts on arrays directly.

    Args:
        subscripts: subscripts as in `lensor.einsum`.
        operands: for each operand, a name, an IndexPattern, `"δ"` or `"delta"` (Kronecker delta), or `"1"` (ones).
        sizes: sizes of indices that no pattern determines; missing sizes are determined when the network is planned.

    Example:
        >>> import lensor
        >>> pi = lensor.IndexPattern(5, 3)
        >>> print(lensor.contraction("n c i, i o k -> n (c k) o", "X", pi, c=2))
        X[n c i] Π1[i o k] -> n (c k) o

    Raises:
        SubscriptsError: if the subscripts do not parse.
        NetworkError, ValueError, TypeError: if operands, sizes and subscripts are inconsistent, or if an operand has a
            name that is reserved for index patterns (Π1, Π2, ...).
    """
    parsed = parse_subscripts(subscripts)
    sizes = {index: as_integer(size, f"the size of index {index!r}") for index, size in sizes.items()}
    if len(parsed.operands) != len(operands):
        raise ValueError(
            f"the number of operands is {len(operands)}, expected {len(parsed.operands)} for {subscripts!r}"
        )
    if any("..." in leg for legs in parsed.operands for leg in legs):
        raise SubscriptsError(
            "subscripts of a network contain '...', expected explicit indices: operand names do not determine the"
            " number of axes",
            subscripts,
            subscripts.index("..."),
        )
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
        raise ValueError(f"a size is given for {sorted(unknown)[0]!r}, expected an index of {subscripts!r}")
    inferred = spread_over_deltas(nodes, infer_sizes(shapes, sizes))
    return Network.make(nodes, parsed.output, infer_sizes(shapes, inferred))


def spread_over_deltas(nodes: Sequence[Node], sizes: dict[str, int | None]) -> dict[str, int | None]:
    """Infer the sizes of indices that deltas join to indices of known size."""
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
    """Create a node from its name or pattern and its legs; errors point to position `start` in `text`."""
    if isinstance(operand, IndexPattern):
        if len(legs) != 3:
            raise SubscriptsError(f"an index pattern has {len(legs)} legs, expected 3 (i, o, k)", text, start)
        return Pattern(operand, (legs[0], legs[1], legs[2]))
    if not isinstance(operand, str):
        raise TypeError(f"an operand is of type {type(operand).__name__}, expected a name or an IndexPattern")
    if operand in ("δ", "delta"):
        if any(len(leg) != 1 for leg in legs) or len(legs) < 2:
            raise SubscriptsError(
                f"a delta has legs {format_legs(legs)!r}, expected at least two single indices", text, start
            )
        return Delta(tuple(leg[0] for leg in legs))
    if operand == "1":
        if len(legs) != 1 or len(legs[0]) != 1:
            raise SubscriptsError(f"ones have legs {format_legs(legs)!r}, expected one single index", text, start)
        return Ones(legs[0][0])
    if operand.startswith("select "):
        if len(legs) != 2:
            raise SubscriptsError(f"a selection has {len(legs)} legs, expected 2", text, start)
        return Select(operand.removeprefix("select "), legs)
    if not operand.isidentifier():
        raise SubscriptsError(f"the name of an operand is {operand!r}, expected an identifier", text, start)
    return Operand(operand, legs)


def format_legs(legs: Iterable[Group]) -> str:
    """Format legs as subscripts."""
    return " ".join(leg[0] if len(leg) == 1 else f"({' '.join(leg)})" for leg in legs)
