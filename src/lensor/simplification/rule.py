"""Rules: each has a name, the number of an identity, and a function that applies it once or returns None."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from lensor.network import Network


@dataclass(frozen=True, slots=True)
class Rule:
    """A simplification as data.

    Args:
        name: a short description.
        number: number of the identity in the index-pattern algebra, or "structural" for rules that apply to all
            networks.
        apply: function that applies the rule once, or returns None if it does not apply.
    """

    name: str
    number: str
    apply: Callable[[Network], Network | None]

    def __reduce__(self) -> tuple:
        # The decorator replaces the function by the rule, so the function's name in its module refers to the rule.
        return _find, (self.apply.__module__, self.apply.__name__)


def _find(module: str, name: str) -> Rule:
    return getattr(import_module(module), name)


RuleList = tuple[Rule, ...]


def rule(name: str, number: str) -> Callable[[Callable[[Network], Network | None]], Rule]:
    """Turn a function into a rule."""
    return lambda function: Rule(name, number, function)
