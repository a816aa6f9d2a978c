"""What keeps a measurement from running."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from lensor.bench.text import printable


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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make one line of what keeps a file or folder from being written.

    Raises:
        BenchError: for an OSError inside.
    """
    try:
        yield
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror or error}") from None


def require_regular(path: Path) -> None:
    """Raise for a device, a pipe or a folder in the place of a file that is read and written.

    Raises:
        BenchError: if it is there and something else than a file.
    """
    with writing(path):
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "a device or pipe"
            raise BenchError(f"cannot write {path}: it is {what}, expected a file")


def read_bytes(path: Path) -> bytes:
    """What a file or pipe holds; devices, which may have no end, are not read.

    Raises:
        BenchError: if it cannot be read.
    """
    try:
        if path.is_char_device() or path.is_block_device():
            raise BenchError(f"cannot read {path}: it is a device, expected a file")
        return path.read_bytes()
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror or error}") from None


def in_one_line(error: BaseException | None, most: int | None = 200) -> str:
    r"""An error's type and the first line of its message.

    Example:
        >>> from lensor.bench.errors import in_one_line
        >>> in_one_line(ValueError("no such thing\nmore")), in_one_line(KeyboardInterrupt())
        ('ValueError: no such thing', 'KeyboardInterrupt')
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {printable(lines[0])[:most]}" if lines else type(error).__name__
