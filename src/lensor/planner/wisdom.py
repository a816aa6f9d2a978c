"""The store of measured times of plans; `lensor.wisdom` is its public module."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from lensor.errors import LensorError
from lensor.kernels import Backend
from lensor.network import AnyNetwork, to_text
from lensor.planner.profile import processor

_FORMAT = 1
"""The version of the file format; files with a different version are not read."""

_MOST = 200
"""Maximum number of characters in the reason for an error, which may quote the file."""


class WisdomWarning(UserWarning):
    """A file of measured times could not be used."""


class WisdomError(LensorError, ValueError):
    """`save` did not change a file because its content is not readable as measured times."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The times of a network's candidates.

    Args:
        network: the text of the network.
        where: processor, framework, dtype, device and number of threads.
        seconds: the shortest time of each timed plan, by its name.

    Example:
        >>> import lensor
        >>> one = lensor.wisdom.Measured("X[n] -> n", "a processor, numpy", {"greedy": 1e-5})
        >>> one.seconds["greedy"]
        1e-05
    """

    network: str
    where: str
    seconds: Mapping[str, float]


_known: dict[str, Measured] = {}
_lock = threading.Lock()
_generation = 0


def generation() -> int:
    """Return a number that changes whenever times are added or forgotten."""
    return _generation


def key_of(net: AnyNetwork, backend: Backend, kind: Sequence[Any]) -> tuple[str, str]:
    """Return the key of a network with known sizes on a backend, and a description of where it is measured."""
    where = f"{processor()}, {backend.describe(kind)}"
    return hashlib.sha256(f"{net.canonical!r} {where}".encode()).hexdigest(), where


def recall(key: str) -> Mapping[str, float]:
    """Return the known times for a key, by name of the plan; empty if there are none."""
    found = _known.get(key)
    return {} if found is None else found.seconds


def record(key: str, net: AnyNetwork, where: str, seconds: Mapping[str, float]) -> None:
    """Store measured times."""
    _update({key: Measured(to_text(net, legend=True), where, {**recall(key), **seconds})})


def forget() -> None:
    """Forget all measured times.

    Files are not changed, and cached plans remain cached until you call `lensor.clear_caches()`.

    Example:
        >>> import lensor
        >>> with lensor.planning(effort="measure"):
        ...     plan = lensor.ops.unfold(lensor.ConvSpec(2, 4, (5,), 3)).plan(X=(3, 2, 5))
        >>> lensor.wisdom.forget()
        >>> lensor.wisdom.entries()
        ()
    """
    with _lock:
        _known.clear()
    _update({})


def entries() -> tuple[Measured, ...]:
    """Return all known times, for inspection.

    Example:
        >>> import lensor
        >>> lensor.wisdom.forget()
        >>> lensor.clear_caches()
        >>> with lensor.planning(effort="measure"):
        ...     plan = lensor.ops.unfold(lensor.ConvSpec(2, 4, (5,), 3)).plan(X=(3, 2, 5))
        >>> (one,) = lensor.wisdom.entries()
        >>> one.network
        'X[n c_in i1] Π1[i1 o1 k1] -> n (c_in k1) o1 where Π1=IndexPattern(5, 3), c_in=2, i1=5, k1=3, n=3, o1=3'
        >>> sorted(one.seconds) == sorted(c.name for c in plan.candidates if c.measured is not None)
        True
    """
    with _lock:
        return tuple(_known.values())


def _update(new: Mapping[str, Measured]) -> None:
    global _generation
    with _lock:
        _known.update(new)
        _generation += 1


# --------------------------------------------------------------------------------------------------------------- files
def save(path: str | os.PathLike[str]) -> int:
    """Add the known times to a file, and return the number of entries in the file.

    Other processes may save to and load from the same file at any time: the file is replaced as a whole, and writers
    wait for each other (on systems without file locks, the last writer wins). If writing fails, for instance because
    the disk is full, the file does not change. If the path is a symbolic link, the link is preserved. The file keeps
    its mode.

    Args:
        path: the file; its folder must exist and allow new files.

    Example:
        >>> import lensor, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "wisdom.json")
        >>> lensor.wisdom.save(path) == len(lensor.wisdom.entries())
        True

    Raises:
        OSError: if the file cannot be written, or is not a regular file.
        WisdomError: if the file's content is not readable as measured times, because it is damaged, has a different
            format version, or belongs to another program. The file does not change.
    """
    path = os.path.realpath(os.fsdecode(path))  # replace the target of a link, not the link
    with _named(path), _locked(path):
        try:
            data, before = _content(path)
            known = _parse(data) if data else {}
        except FileNotFoundError:
            known, before = {}, None
        except _Unreadable as problem:
            raise WisdomError(
                f"{path} is not a readable wisdom file ({problem}), so it was not changed: save to another file, or"
                " remove it"
            ) from None
        with _lock:
            known |= _known
        choices = {
            key: {"network": one.network, "where": one.where, "seconds": dict(one.seconds)}
            for key, one in known.items()
        }
        text = json.dumps({"lensor wisdom": _FORMAT, "measured": choices}, indent=1, ensure_ascii=False)
        # Escape unpaired surrogates, as in JSON.
        _replace(path, text.encode("utf-8", "backslashreplace"), before)
    return len(known)


def load(path: str | os.PathLike[str]) -> int:
    """Load the times stored in a file, and return the number of entries in the file.

    If the file is damaged or has a different format version, a `WisdomWarning` is issued and nothing is loaded. Plans
    that were measured in this process do not change.

    Args:
        path: a file written by `save`.

    Example:
        >>> import lensor, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "wisdom.json")
        >>> saved = lensor.wisdom.save(path)
        >>> lensor.wisdom.load(path) == saved
        True

    Raises:
        OSError: if the file is missing, cannot be read, or is not a regular file.
    """
    path = os.fsdecode(path)
    data, _ = _content(path)
    try:
        found = _parse(data)
    except _Unreadable as problem:
        warnings.warn(f"{path} is not a readable wisdom file: {problem}", WisdomWarning, stacklevel=2)
        return 0
    _update(found)
    return len(found)


class _Unreadable(Exception):
    """The reason why a file's content cannot be used."""


def _content(path: str) -> tuple[bytes, os.stat_result]:
    """Read the content and state of a regular file; reading a pipe or device, for example, might never end.

    Raises:
        OSError: if the file cannot be read, or is not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        state = os.fstat(handle)
        if stat.S_ISDIR(state.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        with open(handle, "rb", closefd=False) as file:
            return file.read(), state
    finally:
        os.close(handle)


def _replace(path: str, data: bytes, before: os.stat_result | None) -> None:
    """Replace a file as a whole: write a new file with the same mode and owner next to it, then rename the new file."""
    name = os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(name, flags, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if before is not None and hasattr(os, "fchown"):
                with suppress(OSError):  # only root may change the owner
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _parse(data: bytes) -> dict[str, Measured]:
    """Parse the entries in a file's content.

    Raises:
        _Unreadable: if the content is not readable as measured times; the message gives the reason.
    """
    try:
        content = json.loads(data.decode())
        if content["lensor wisdom"] != _FORMAT:
            raise ValueError(f"it has version {content['lensor wisdom']!r}, expected {_FORMAT}")
        return {str(key): _entry(one) for key, one in content["measured"].items()}
    except KeyError as problem:
        raise _Unreadable(f"no entry {str(problem)[:_MOST]}") from None
    except RecursionError:
        raise _Unreadable("its JSON is nested too deeply") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as problem:
        raise _Unreadable(str(problem)[:_MOST]) from None


def _entry(one: Mapping[str, Any]) -> Measured:
    seconds = {str(name): float(time) for name, time in one["seconds"].items()}
    if not all(0 <= time < float("inf") for time in seconds.values()):
        raise ValueError(f"the times are {seconds}, expected finite numbers that are not negative")
    return Measured(str(one["network"]), str(one["where"]), seconds)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Make errors for temporary files name the file to be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename == path:
            raise
        raise OSError(error.errno, error.strerror, path) from error


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Lock a file, waiting for other writers."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder, name = os.path.split(path)
    # Do not follow links or truncate the file: in a shared folder, others may have created it.
    flags = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    lock = os.path.join(folder, f".{name}.lock")
    try:
        handle = os.open(lock, flags | os.O_RDWR, 0o666)
    except PermissionError:  # the file belongs to another user
        handle = os.open(lock, flags & ~os.O_CREAT | os.O_RDONLY)
    try:
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
