"""What a rule is: a name, the number of its identity, and a function that applies it once or returns None."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lensor.network import Network


@dataclass(frozen=True, slots=True)
class Rule:
    """A simplification as data.

    Args:
        name: what it does, in a few words.
        number: its number among the rules of the index-pattern algebra, "structural" for rules of any network.
        apply: the network after one application, or None where the rule does not apply.
    """

    name: str
    number: str
    apply: Callable[[Network], Network | None]


RuleList = tuple[Rule, ...]


def rule(name: str, number: str) -> Callable[[Callable[[Network], Network | None]], Rule]:
    """Make a rule of the function that applies it."""
    return lambda function: Rule(name, number, function)
