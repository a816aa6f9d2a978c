"""What was measured of plans, kept for this process and, if the user says so, in a file.

`planning(effort="measure")` times the candidates of a network once; the times are kept here, so that neither a plan
that was dropped from the cache nor another process has to measure again. A file may hold the times of several
machines, devices and thread counts: each entry says where it was measured and serves only there.

Example:
    >>> import lensor, tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp(), "wisdom.json")
    >>> with lensor.planning(effort="measure"):
    ...     plan = lensor.ops.unfold(lensor.ConvSpec(2, 4, (5,), 3)).plan(X=(3, 2, 5))
    >>> saved = lensor.wisdom.save(path)
    >>> lensor.wisdom.forget()
    >>> lensor.wisdom.load(path) == saved
    True
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensor.cost import processor
from lensor.kernels import Backend
from lensor.network import AnyNetwork
from lensor.notation import to_text

_FORMAT = 1
"""The version of the files; one with another version is not read."""


class WisdomWarning(UserWarning):
    """A file of measured times that could not be used."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The times of a network's candidates.

    Args:
        network: its text.
        where: processor, framework, dtype, device and threads.
        seconds: the shortest time of each strategy that was timed.

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
    """A number that changes whenever something becomes known or is forgotten."""
    return _generation


def key_of(net: AnyNetwork, backend: Backend, kind: Sequence[Any]) -> tuple[str, str]:
    """What identifies a network whose sizes are known, and where it is measured: (key, where)."""
    where = f"{processor()}, {backend.describe(kind)}"
    return hashlib.sha256(f"{net.canonical!r} {where}".encode()).hexdigest(), where


def recall(key: str) -> Mapping[str, float]:
    """The times known under a key, by strategy; empty if none are."""
    found = _known.get(key)
    return {} if found is None else found.seconds


def record(key: str, net: AnyNetwork, where: str, seconds: Mapping[str, float]) -> None:
    """Keep measured times."""
    _update({key: Measured(to_text(net, legend=True), where, {**recall(key), **seconds})})


def forget() -> None:
    """Forget all measured times; files stay as they are, and so do plans until `lensor.clear_caches()`.

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
    """Everything that is known, to look at.

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
    return tuple(_known.values())


def _update(new: Mapping[str, Measured]) -> None:
    global _generation
    with _lock:
        _known.update(new)
        _generation += 1


# --------------------------------------------------------------------------------------------------------------- files
def save(path: str | os.PathLike[str]) -> int:
    """Write what is known into a file, beside what the file holds already; the number of entries in it.

    Other processes may save to and load from the same file at any time: the file is replaced as a whole, and writers
    wait for each other (on systems without file locks the last one wins).

    Args:
        path: the file; its folder must exist.

    Example:
        >>> import lensor, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "wisdom.json")
        >>> lensor.wisdom.save(path) == len(lensor.wisdom.entries())
        True

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(path)
    with _locked(path):
        known = {**(_read(path) if path.exists() else {}), **_known}
        choices = {
            key: {"network": one.network, "where": one.where, "seconds": dict(one.seconds)}
            for key, one in known.items()
        }
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"lensor wisdom": _FORMAT, "measured": choices}, file, indent=1, ensure_ascii=False)
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    return len(known)


def load(path: str | os.PathLike[str]) -> int:
    """Take over the times in a file; the number of entries in it.

    A file that is missing raises; one that is damaged, or of another version, is a `WisdomWarning`, and nothing is
    taken over. Plans that were made by measuring in this process stay as they are.

    Args:
        path: a file that `save` wrote.

    Example:
        >>> import lensor, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "wisdom.json")
        >>> saved = lensor.wisdom.save(path)
        >>> lensor.wisdom.load(path) == saved
        True

    Raises:
        OSError: if it cannot be read.
    """
    found = _read(Path(path))
    _update(found)
    return len(found)


def _read(path: Path) -> dict[str, Measured]:
    try:
        content = json.loads(path.read_bytes().decode())
        if content["lensor wisdom"] != _FORMAT:
            raise ValueError(f"version {content['lensor wisdom']!r}, expected {_FORMAT}")
        return {str(key): _entry(one) for key, one in content["measured"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        reason = f"no entry {problem}" if isinstance(problem, KeyError) else str(problem)
        warnings.warn(f"{path} holds no wisdom that can be read: {reason}", WisdomWarning, stacklevel=3)
        return {}


def _entry(one: Mapping[str, Any]) -> Measured:
    seconds = {str(name): float(time) for name, time in one["seconds"].items()}
    if not all(0 <= time < float("inf") for time in seconds.values()):
        raise ValueError(f"times must be finite and not negative, found {seconds}")
    return Measured(str(one["network"]), str(one["where"]), seconds)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for other writers of a file."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path.with_name(f".{path.name}.lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
