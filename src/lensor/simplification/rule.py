"""What a rule is: a name, the number of its identity, and a function that applies it once or returns None."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

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

    def __reduce__(self) -> tuple:
        # The decorator puts the rule where its function was, so the rule is found by the function's name.
        return _find, (self.apply.__module__, self.apply.__name__)


def _find(module: str, name: str) -> Rule:
    return getattr(import_module(module), name)


RuleList = tuple[Rule, ...]


def rule(name: str, number: str) -> Callable[[Callable[[Network], Network | None]], Rule]:
    """Make a rule of the function that applies it."""
    return lambda function: Rule(name, number, function)
