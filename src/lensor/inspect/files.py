"""The files that commands read and write, with one line for what goes wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from lensor.inspect.errors import CommandError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make one line of what keeps a file or folder from being written.

    Raises:
        CommandError: for an OSError inside.
    """
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from None


def require_regular(path: Path) -> None:
    """Raise for a device, a pipe or a folder in the place of a file that is read and written.

    Raises:
        CommandError: if it is there and something else than a file.
    """
    with writing(path):
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "a device or pipe"
            raise CommandError(f"cannot write {path}: it is {what}, expected a file")


def read_bytes(path: Path) -> bytes:
    """What a file or pipe holds; devices, which may have no end, are not read.

    Raises:
        CommandError: if it cannot be read.
    """
    try:
        if path.is_char_device() or path.is_block_device():
            raise CommandError(f"cannot read {path}: it is a device, expected a file")
        return path.read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror or error}") from None


def refuse_early(path: Path) -> None:
    """Raise for a file that cannot be written, before anything is measured for it; devices and pipes may be."""
    with writing(path):
        if path.is_dir() or not path.parent.is_dir():
            why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise CommandError(f"cannot write {path}: {why}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise CommandError(f"cannot write {path}: permission denied")


def refuse_folder_early(out: Path, names: Sequence[str]) -> None:
    """Make a folder for files of some names, or raise, before anything is measured for them."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    for name in names:
        refuse_early(out / name)
