"""Files that commands read and write, with one-line errors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from lensor.inspect.errors import CommandError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert an OSError raised while the `with` block writes a file or folder to a one-line error.

    Raises:
        CommandError: if the block raises an OSError.
    """
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from None


def require_regular(path: Path) -> None:
    """Raise if the path of a file that is read and written refers to a device, a pipe or a folder.

    Raises:
        CommandError: if the path exists and is not a regular file.
    """
    with writing(path):
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "a device or pipe"
            raise CommandError(f"cannot write {path}: it is {what}, expected a file")


def read_bytes(path: Path) -> bytes:
    """Read the contents of a file or pipe; devices, which may be endless, are rejected.

    Raises:
        CommandError: if the path cannot be read.
    """
    try:
        if path.is_char_device() or path.is_block_device():
            raise CommandError(f"cannot read {path}: it is a device, expected a file")
        return path.read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror or error}") from None


def refuse_early(path: Path) -> None:
    """Raise before any measurement if a file cannot be written; devices and pipes are allowed."""
    with writing(path):
        if path.is_dir() or not path.parent.is_dir():
            why = "it is a folder" if path.is_dir() else f"the folder {path.parent} does not exist"
            raise CommandError(f"cannot write {path}: {why}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise CommandError(f"cannot write {path}: permission denied")


def refuse_folder_early(out: Path, names: Sequence[str]) -> None:
    """Create a folder for files with the given names before any measurement, or raise if this is not possible."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    for name in names:
        refuse_early(out / name)
