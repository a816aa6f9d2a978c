"""The table of simplification rules, each with an example before and after the rule fires, and the example's cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opt_einsum import contract_path, get_symbol

from lensor import ops, plan
from lensor.network import Network, indices_of, parse
from lensor.network.text import patterns_of
from lensor.simplification import PHASES, Rule
from lensor.simplification.examples import CASES, RULE_EXAMPLES, Example
from lensor.spec import ConvSpec

COMMAND = "lensor rules --markdown docs/simplification.md"
BATCH = 8

IDENTITIES = {
    "1": "K=S, P=0, D=1, I a multiple of S: Π regroups i into (o k)",
    "4": "kernel and output swap: Π(I,K,S,P,D)[i,o,k] = Π(I,O,D,P,S)[i,k,o]",
    "6": "K≤S, D=1: pad P on the left, pad or crop to O·S, regroup into (o, S), keep k<K",
    "7": "for O=1 the stride is irrelevant, for K=1 the dilation",
    "8": "padding is a shift",
    "11": "with g = gcd(S,D) only every g-th i is read; the rest is a pattern of S/g and D/g",
    "16": "sums of Π over one leg; 17: over two",
    "19": "two patterns that share two legs: a delta on the third",
    "23": "composition of two patterns",
}


def network_of(example: Example) -> Network:
    """The network of an example, with its batch size bound."""
    if example.spec:
        in_channels, out_channels, input_size, kernel_size = example.spec
        spec = ConvSpec(in_channels, out_channels, (input_size,), kernel_size, **example.hyper)
        net = getattr(ops, example.operation)(spec, *example.arguments)
    else:
        net = parse(example.operation)
    for name, *arguments in example.then:
        net = getattr(net, name)(*arguments)
    return net.bind({index: BATCH for index, size in net.sizes.items() if size is None})


def firings(net: Network) -> Iterator[tuple[Rule, Network, Network]]:
    """Yield (rule, network before, network after) for each step of a simplification, as the engine performs it."""
    while True:
        found = ((rule, rule.apply(net)) for phase in PHASES for rule in phase)
        rule, after = next(((rule, after) for rule, after in found if after is not None), (None, None))
        if rule is None or after is None:
            return
        yield rule, net, after
        net = after


def first_firing(rule: Rule, example: Example) -> tuple[Network, Network]:
    """The network before and after the rule first fires on an example.

    Raises:
        LookupError: if the rule never fires.
    """
    for term in network_of(example).terms:
        for fired, before, after in firings(term):
            if fired is rule:
                return before, after
    raise LookupError(f"rule {rule.name!r} does not fire on {example.code}")


def plan_of(net: Network) -> plan.Plan:
    """The plan for a network whose sizes are all bound."""
    shapes: dict[str, Any] = {name: tuple(map(net.group_size, legs)) for name, legs in net.operand_legs.items()}
    return net.plan(**shapes)


def dense_flops(net: Network) -> int:
    """Flops to contract the unsimplified network, with patterns as arrays, pairwise along opt_einsum's path."""
    total = 0
    for term in net.terms:
        symbols = {index: get_symbol(at) for at, index in enumerate(term.sizes)}
        held = [list(indices_of(node)) for node in term.nodes]
        operands = ",".join("".join(symbols[index] for index in indices) for indices in held)
        subscripts = f"{operands}->{''.join(symbols[index] for index in term.output_indices)}"
        shapes = [tuple(term.sizes[index] for index in indices) for indices in held]
        total += int(contract_path(subscripts, *shapes, shapes=True)[1].opt_cost)
    return total


def _flops(net: Network) -> Iterator[str]:
    yield f"{dense_flops(net):,}"
    yield f"{plan_of(net).flops:,}"


def _cell(net: Network) -> str:
    patterns = "".join(f"<br>{name} = {pattern}" for name, pattern in patterns_of(net).items())
    return f"`{net}`{patterns}"


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def to_markdown() -> str:
    """The text of docs/simplification.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Simplification: the rules, with examples\n"
    yield f"Made by `{COMMAND}`; a test compares this file with the command's output.\n"
    yield (
        "The engine applies the rules of a phase only where no rule of an earlier phase applies, until no rule applies."
        " `net.trace` lists the rules that fired. The numbers are those of the underlying identities, with"
        " Π[i,o,k] = [i = k·D + o·S − P]:\n"
    )
    for number, identity in IDENTITIES.items():
        yield f"- {number}: {identity}"
    yield ""
    yield (
        "In the examples, `Π(I→O K S P D)` gives a pattern's input size, output size, kernel size, stride, padding and"
        " dilation; default values of 1 or 0 are omitted. A pattern of kernel size 1 is a crop (slice or pad), which"
        f" costs no arithmetic. The batch size is {BATCH}. Flops are for the whole example: before, evaluated"
        " unsimplified, with each pattern as an array, pairwise along opt_einsum's path; after, for Lensor's plan."
        "\n"
    )
    for number, phase in enumerate(PHASES, start=1):
        yield f"## Phase {number}: {('structure', 'patterns', 'decompositions')[number - 1]}\n"
        yield _row("rule", "no.", "example", "before it fires", "after", "flops before", "flops after")
        yield _row("---", "---", "---", "---", "---", "---:", "---:")
        for rule in phase:
            example = RULE_EXAMPLES[rule.name]
            before, after = first_firing(rule, example)
            cells = _cell(before), _cell(after), *_flops(network_of(example))
            yield _row(rule.name, rule.number, f"`{example.code}`", *cells)
        yield ""
    yield "## Cases beyond dense and down-sampling\n"
    yield (
        "einconv 0.1 simplifies none of these: convolutions that simplify although their sizes do not divide, their"
        " padding is not 0, or their output index is open. Where a pattern of kernel size over 1 remains, no rule makes"
        " the network cheaper, and the planner chooses how to evaluate it: by views, by a convolution, or as an array."
        " If nothing else needs o, as in KFAC-reduce, the array is summed over o before it is multiplied with X.\n"
    )
    yield _row("case", "network", "simplified", "rules that fired", "flops before", "flops after")
    yield _row("---", "---", "---", "---", "---:", "---:")
    for case, example in CASES.items():
        net = network_of(example)
        simple = net.simplify()
        fired = "; ".join(dict.fromkeys(firing.rule for firing in simple.trace))
        yield _row(case, _cell(net), _cell(simple), fired, *_flops(net))
