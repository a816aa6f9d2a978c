"""Errors that stop a command."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec

from lensor.inspect.text import printable

_PACKAGES = {
    "backpack": "backpack-for-pytorch",
    "lensor_bench": "lensor-bench",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}
"""Packages whose name differs from the name of their module."""


class CommandError(Exception):
    """An error that stops a command, reported in one line."""


def choose(what: str, asked: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """Select known names, ignoring case, in the order requested; all of them if none are requested.

    Example:
        >>> from lensor.inspect.errors import choose
        >>> choose("net", ["ResNet18"], ["alexnet", "resnet18"])
        ('resnet18',)
        >>> choose("net", ["vgg"], ["alexnet", "resnet18"])
        Traceback (most recent call last):
        lensor.inspect.errors.CommandError: net is 'vgg', expected one of alexnet, resnet18

    Raises:
        CommandError: for an unknown name; the message lists the known ones.
    """
    names = {name.casefold(): name for name in known}
    for name in asked:
        if name.casefold() not in names:
            raise CommandError(f"{what} is {name!r}, expected one of {', '.join(names.values())}")
    return tuple(dict.fromkeys(names[name.casefold()] for name in asked)) or tuple(names.values())


def require(*modules: str) -> None:
    """Raise unless the modules can be imported.

    Raises:
        CommandError: with the names of the packages to install.
    """
    missing = [_PACKAGES.get(name, name) for name in modules if find_spec(name) is None]
    if missing:
        raise CommandError(f"{', '.join(missing)} is not installed: pip install {' '.join(missing)}")


def in_one_line(error: BaseException | None, most: int | None = 200) -> str:
    r"""An error's type and the first line of its message.

    Example:
        >>> from lensor.inspect.errors import in_one_line
        >>> in_one_line(ValueError("no such thing\nmore")), in_one_line(KeyboardInterrupt())
        ('ValueError: no such thing', 'KeyboardInterrupt')
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {printable(lines[0])[:most]}" if lines else type(error).__name__
