"""The engine, which applies rules phase by phase until none applies, records a trace, and adds like terms of a sum.

A rule fires only if no rule of a previous phase applies, so cheap normal forms (deltas, squeezed indices, normalised
patterns) come before decompositions of patterns. The order within a phase does not matter: tests apply the rules in
random order and compare the results.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from lensor.cache import Cache
from lensor.errors import NetworkError, require_type
from lensor.network import AnyNetwork, Firing, Network, Scale, Sum, sum_of, to_text
from lensor.simplification.patterns import DECOMPOSITION_RULES, PATTERN_RULES, normalise_all
from lensor.simplification.rule import Rule, RuleList
from lensor.simplification.structural import STRUCTURAL_RULES

PHASES: tuple[RuleList, ...] = (STRUCTURAL_RULES, PATTERN_RULES, DECOMPOSITION_RULES)

_LIMIT = 10_000
_simplified = Cache(maxsize=1024)


def simplify(net: AnyNetwork) -> AnyNetwork:
    """Apply all simplification rules; the value stays the same, and the result's `trace` lists the rules that fired.

    The cheapest plan of the result needs no more flops than that of the original network, except for the known gaps in
    `docs/limits.md` (19 of 1,000 random networks).

    Example:
        >>> import lensor
        >>> net = lensor.ops.conv(lensor.ConvSpec(4, 8, (9, 9), kernel_size=3, stride=3)).simplify()
        >>> print(net)
        X[n c_in (o1 k1) (o2 k2)] W[c_out c_in k1 k2] -> n c_out o1 o2
        >>> [firing.rule for firing in net.trace if firing.number == "6"]
        ['dense or block pattern into regrouping', 'dense or block pattern into regrouping']

    Raises:
        TypeError: if `net` is neither a Network nor a Sum.
    """
    require_type(net, "net", Network, Sum)
    return _simplified.get_or_make((net.exact, net.trace), lambda: _collect([apply_rules(term) for term in net.terms]))


def simplify_untraced(net: AnyNetwork) -> AnyNetwork:
    """Simplify a network like `simplify`, but neither record the rules that fire nor keep the result."""
    return _collect([run_phases(normalise_all(term), PHASES) for term in net.terms])


def apply_rules(net: Network, shuffle: random.Random | None = None) -> Network:
    """Apply all phases to one network until no rule applies; with `shuffle`, try the rules in random order."""
    trace = list(net.trace)
    text = ""
    for rule, after in _firings(net, PHASES, shuffle):
        text, before = to_text(after), text or to_text(net)
        trace.append(Firing(rule.name, rule.number, before, text))
        net = after
    return net.replace(trace=tuple(trace)) if text else net


def run_phases(net: Network, phases: Sequence[RuleList]) -> Network:
    """Apply the given phases to one network until no rule applies, without recording them in the trace."""
    for _, after in _firings(net, phases):
        net = after
    return net


def _firings(
    net: Network, phases: Sequence[RuleList], shuffle: random.Random | None = None
) -> Iterator[tuple[Rule, Network]]:
    """Apply rules until none applies; yield each rule and the network after it."""
    for _ in range(_LIMIT):
        fired = _fire_once(net, phases, shuffle)
        if fired is None:
            return
        yield fired
        net = fired[1]
    raise NetworkError(f"simplification did not end after {_LIMIT} steps at {net}")


def _fire_once(net: Network, phases: Sequence[RuleList], shuffle: random.Random | None) -> tuple[Rule, Network] | None:
    """The first rule that applies, and the network after it; None if no rule applies."""
    for phase in phases:
        rules: Sequence[Rule] = shuffle.sample(phase, len(phase)) if shuffle else phase
        for rule in rules:
            after = rule.apply(net)
            if after is not None:
                return rule, after
    return None


def _collect(terms: Sequence[Network]) -> AnyNetwork:
    """Add terms that differ only in a rational factor."""
    if len(terms) == 1:
        return terms[0]
    kept: dict[Network, Network] = {}
    for term in terms:
        unit = term.replace(scale=Scale(powers=term.scale.powers))
        known = kept.get(unit)
        if known is None:
            kept[unit] = term
        else:
            factor = known.scale.factor + term.scale.factor
            firing = Firing("like terms added", "structural", to_text(term), to_text(known))
            kept[unit] = known.replace(
                scale=Scale(factor, known.scale.powers), trace=(*known.trace, *term.trace, firing)
            )
    return sum_of(list(kept.values()))
