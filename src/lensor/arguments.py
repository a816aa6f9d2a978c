"""Arguments that many functions share: descriptions, inserted into the docstrings, and operands passed by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def described(shared: Mapping[str, str]) -> Callable[[F], F]:
    """Insert the descriptions of shared arguments into the Args section of a function's docstring.

    Descriptions in the function's own docstring take precedence. Arguments are listed in the order of the signature.

    Args:
        shared: descriptions, keyed by argument name.

    Example:
        >>> from lensor.arguments import described
        >>> @described({"y": "the second summand."})
        ... def add(x, y):
        ...     '''Add two numbers.
        ...
        ...     Args:
        ...         x: the first summand.
        ...     '''
        ...     return x + y
        >>> "y: the second summand." in add.__doc__
        True
    """

    def insert(function: F) -> F:
        lines = (function.__doc__ or "").expandtabs().splitlines()
        start = next(at for at, line in enumerate(lines) if line.strip() == "Args:") + 1
        indent = len(lines[start - 1]) - len(lines[start - 1].lstrip()) + 4
        stop = next((at for at in range(start, len(lines)) if not lines[at].startswith(" " * indent)), len(lines))
        own: dict[str, list[str]] = {}
        name = ""
        for line in lines[start:stop]:
            found = re.match(rf" {{{indent}}}(\w+): ", line)
            if found is not None:
                name = found.group(1)
            own.setdefault(name, []).append(line)
        code = function.__code__
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        texts = [
            own.get(one) or ([f"{' ' * indent}{one}: {shared[one]}"] if one in shared else []) for one in arguments
        ]
        function.__doc__ = "\n".join([*lines[:start], *(line for text in texts for line in text), *lines[stop:]])
        return function

    return insert


def by_name(names: str) -> Callable[[F], F]:
    """Make a method that takes operands by name raise a TypeError with their names if some are given by position.

    The signature that `inspect` and `help` show does not change.

    Args:
        names: the attribute of the method's object that holds the operands' names.

    Example:
        >>> import lensor
        >>> lensor.contraction("n i, i -> n", "X", "w")([[1.0]], [2.0])
        Traceback (most recent call last):
        TypeError: operands are given by position, expected by name: X, w
    """

    def check(method: F) -> F:
        @wraps(method)
        def checked(self: Any, /, *given: Any, **named: Any) -> Any:
            if given:
                raise TypeError(f"operands are given by position, expected by name: {', '.join(getattr(self, names))}")
            return method(self, **named)

        return checked  # type: ignore[return-value]

    return check
