"""What keeps a measurement from running."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec


class BenchError(Exception):
    """What keeps a measurement from running, in one line."""


def choose(what: str, asked: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """The known names that were asked for, in the order asked, in any case; all of them if none was.

    Example:
        >>> from lensor.bench.errors import choose
        >>> choose("net", ["ResNet18"], ["alexnet", "resnet18"])
        ('resnet18',)
        >>> choose("net", ["vgg"], ["alexnet", "resnet18"])
        Traceback (most recent call last):
        lensor.bench.errors.BenchError: unknown net 'vgg', expected one of alexnet, resnet18

    Raises:
        BenchError: for a name that is not known; the message lists those that are.
    """
    names = {name.casefold(): name for name in known}
    for name in asked:
        if name.casefold() not in names:
            raise BenchError(f"unknown {what} {name!r}, expected one of {', '.join(names.values())}")
    return tuple(dict.fromkeys(names[name.casefold()] for name in asked)) or tuple(names.values())


def require(*modules: str) -> None:
    """Raise unless modules can be imported.

    Raises:
        BenchError: with the extra that has them.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise BenchError(f"this needs {', '.join(missing)}: install lensor[bench]")
