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

_FOLDERS = {"lensor-bench": "./benchmarks"}
"""Packages that pip installs from a folder of the repository."""

_ALIASES = {
    "conv": "forward",
    "conv_input_vjp": "input_vjp",
    "conv_weight_vjp": "weight_vjp",
    "conv_weight_vjp_per_example": "per_example_weight_vjp",
    "conv_transpose": "transposed_forward",
}
"""Names in `lensor.functional` of operations and quantities."""


class CommandError(Exception):
    """An error that stops a command, reported in one line."""


def choose(what: str, asked: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """Select known names, ignoring case, in the order requested; all of them if none are requested.

    Operations may also be requested by their names in `lensor.functional`.

    Example:
        >>> from lensor.inspect.errors import choose
        >>> choose("net", ["ResNet18"], ["alexnet", "resnet18"])
        ('resnet18',)
        >>> choose("operation", ["conv_input_vjp"], ["forward", "input_vjp"])
        ('input_vjp',)
        >>> choose("net", ["vgg"], ["alexnet", "resnet18"])
        Traceback (most recent call last):
        lensor.inspect.errors.CommandError: net is 'vgg', expected one of alexnet, resnet18

    Raises:
        CommandError: for an unknown name; the message lists the known ones.
    """
    names = {name.casefold(): name for name in known}
    every = names | {alias: name for alias, name in _ALIASES.items() if name in names}
    for name in asked:
        if name.casefold() not in every:
            raise CommandError(f"{what} is {name!r}, expected one of {', '.join(names.values())}")
    return tuple(dict.fromkeys(every[name.casefold()] for name in asked)) or tuple(names.values())


def require(*modules: str) -> None:
    """Raise unless the modules can be imported.

    Raises:
        CommandError: with the names of the packages to install.
    """
    missing = [_PACKAGES.get(name, name) for name in modules if find_spec(name) is None]
    if missing:
        sources = " ".join(_FOLDERS.get(name, name) for name in missing)
        raise CommandError(f"{', '.join(missing)} is not installed: pip install {sources}")


def in_one_line(error: BaseException | None, most: int | None = 200) -> str:
    r"""An error's type and the first line of its message.

    Example:
        >>> from lensor.inspect.errors import in_one_line
        >>> in_one_line(ValueError("no such thing\nmore")), in_one_line(KeyboardInterrupt())
        ('ValueError: no such thing', 'KeyboardInterrupt')
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {printable(lines[0])[:most]}" if lines else type(error).__name__
