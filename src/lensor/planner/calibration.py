"""The profile of each device: built in, or measured by `calibrate` and kept in a folder of the user."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lensor.kernels import Backend, load
from lensor.plan import steps as s
from lensor.planner.devices import typical
from lensor.planner.profile import Machine, Speed, Speeds, processor

_DTYPES = ("float32", "float64", "bfloat16", "float16")
"""The dtypes whose speeds are measured, if the device computes in them at least `_SLOW` times as fast as in
float32."""

_SLOW = 1 / 4
"""Dtypes that are slower than this, relative to float32, are emulated; plans for them are those for float32."""

_BUDGET = 0.06
"""Seconds for each measured call; it runs at least twice."""

_ENOUGH = 2.5
"""After this many seconds, no further dtype is measured."""

_FORMAT = 1
"""The version of the file format; files with a different version are not read."""

_profiles: dict[tuple[str, str, int], Machine] = {}


def machine(device: str | None = None) -> Machine:
    """Return the profile on which estimates for a device are based.

    It is the profile that `calibrate` measured on this device, in this process or earlier, or else the built-in profile
    of a similar device.

    Args:
        device: "cpu", or a device of torch such as "cuda:0"; "cpu" by default.

    Example:
        >>> import lensor
        >>> lensor.machine("cpu").speeds["float32"].products.rate > 1e9
        True
    """
    return profile_of(*_backend_of(device or "cpu"))


def profile_of(backend: Backend | None, kind: Sequence[Any] = ()) -> Machine:
    """The profile for arrays of one kind; for no backend, the built-in profile of two cores."""
    if backend is None:
        return typical("cpu", "", 1)
    key = backend.device(kind)
    found = _profiles.get(key)
    if found is None:
        found = _profiles[key] = _read(key) or typical(*key)
    return found


def calibrate(device: str | None = None) -> Machine:
    """Measure the profile of a device in a few seconds, use it from now on, and keep it for later processes.

    Use it once on each machine where you run the same networks often. Plans that were chosen before do not change. The
    profile is kept in the folder `LENSOR_CACHE_DIR` (by default `~/.cache/lensor`); delete the file to return to the
    built-in profile.

    Args:
        device: "cpu", or a device of torch such as "cuda:0"; "cpu" by default.

    Raises:
        OSError: if the file cannot be written.

    Example:
        >>> import lensor
        >>> lensor.calibrate().memory > 0  # doctest: +SKIP
        True
    """
    backend, kind = _backend_of(device or "cpu")
    key = backend.device(kind)
    found = _measure(backend, device or "cpu", key)
    _write(key, found)
    _profiles[key] = found
    return found


def _backend_of(device: str) -> tuple[Backend, tuple]:
    backend = load("torch" if find_spec("torch") is not None else "numpy")
    return backend, backend.kind(backend.example((1,), "float32", device))


# ---------------------------------------------------------------------------------------------------------- measurement
def _measure(backend: Backend, device: str, key: tuple[str, str, int]) -> Machine:
    def timed(step: s.Step, dtype: str, *shapes: tuple[int, ...]) -> float:
        arrays = [backend.example(shape, dtype, device) for shape in shapes]
        run = backend.steps[type(step)](step)
        return _shortest(lambda: run(*arrays), backend.synchronize)

    def copied(entries: int) -> float:
        """Bytes per second of an elementwise sum of arrays with this many entries."""
        shape = (entries // 1024, 1024)
        return 12 * math.prod(shape) / timed(s.Add((0, 1)), "float32", shape, shape)

    threads, start, single = key[2], time.perf_counter(), 0.0
    small = timed(s.Add((0, 1)), "float32", (8, 8), (8, 8))
    above = timed(s.Add((0, 1)), "float32", (s.PARALLEL + 1024,), (s.PARALLEL + 1024,))
    below = timed(s.Add((0, 1)), "float32", (s.PARALLEL - 1024,), (s.PARALLEL - 1024,))
    similar = typical(*key)
    speeds: dict[str, Speeds] = {}
    plain = s.MatMul((0, 1))
    for dtype in _DTYPES:
        long = timed(plain, dtype, (256, 256), (256, 256))
        if dtype == "float32":
            single = long
        if long <= single / _SLOW and time.perf_counter() - start < _ENOUGH:
            speeds[dtype] = _speeds(lambda step, *shapes, dtype=dtype: timed(step, dtype, *shapes), small, similar)
    return Machine(
        name=processor() if key[0] == "cpu" else key[1],
        threads=threads,
        memory=copied(1 << 24),
        cache=copied(1 << 18),
        cache_bytes=similar.cache_bytes,
        faults=similar.faults,
        call=small,
        barrier=max(above - below, 0.0) if threads > 1 else 0.0,
        speeds=speeds,
    )


def _speeds(timed: Callable[..., float], call: float, similar: Machine) -> Speeds:
    """Measure each speed with a large and a small call."""

    def speed(step: Callable[[int], tuple[s.Step, tuple[int, ...], tuple[int, ...]]], small: int, large: int) -> Speed:
        points = []
        for size in (small, large):
            made, one, two = step(size)
            shape = made.shape([one, two])
            points.append((made.flops([one, two], shape), timed(made, one, two)))
        (few, short), (many, long) = points
        rate = (many - few) / max(long - short, 0.1 * long)
        return Speed(rate, max(short - few / rate - call, 0.0))

    def convolution(kind: str, groups: Callable[[int], int] = lambda c: 1) -> Callable[[int], Any]:
        def made(c: int) -> tuple[s.Step, tuple[int, ...], tuple[int, ...]]:
            g, size = groups(c), (28, 28)
            image, weight = (8, c, *size), (c, c // g, 3, 3)
            shapes = {"forward": (image, weight, image), "input_grad": (image, weight, image)}
            one, two, result = shapes.get(kind, (image, image, weight))
            return s.Convolution((0, 1), kind, (1, 1), (1, 1), (1, 1), g, result), one, two

        return made

    large = 8 if similar.threads == 1 else 1
    return Speeds(
        products=speed(lambda n: (s.MatMul((0, 1)), (n, n), (n, n)), 64, 512 * large),
        batched=speed(lambda n: (s.MatMul((0, 1)), (64, n, n), (64, n, n)), 16, 96 * large),
        forward=speed(convolution("forward"), 8, 64 * large),
        input_grad=speed(convolution("input_grad"), 16, 64 * large),
        weight_grad=speed(convolution("weight_grad"), 8, 64 * large),
        grouped=speed(convolution("forward", lambda c: c // 16), 32, 128 * large),
        depthwise=speed(convolution("forward", lambda c: c), 32, 256 * large),
    )


def _shortest(call: Callable[[], object], synchronize: Callable[[], None]) -> float:
    shortest, spent, runs = math.inf, 0.0, 0
    while runs < 2 or (spent < _BUDGET and runs < 200):
        start = time.perf_counter()
        call()
        synchronize()
        taken = time.perf_counter() - start
        shortest, spent, runs = min(shortest, taken), spent + taken, runs + 1
    return shortest


# ---------------------------------------------------------------------------------------------------------------- files
def _folder() -> Path:
    return Path(os.environ.get("LENSOR_CACHE_DIR") or Path.home() / ".cache" / "lensor")


def _file(key: tuple[str, str, int]) -> Path:
    text = json.dumps([*key, processor() if key[0] == "cpu" else ""])
    return _folder() / f"machine-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _write(key: tuple[str, str, int], profile: Machine) -> None:
    """Write a profile; another process that reads at the same time sees the old file or the new one."""
    record: dict[str, Any] = {one.name: getattr(profile, one.name) for one in fields(Machine)}
    record["speeds"] = {dtype: asdict(speeds) for dtype, speeds in profile.speeds.items()}
    path = _file(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{secrets.token_hex(8)}")
    beside.write_text(json.dumps({"format": _FORMAT, **record}, indent=1), encoding="utf-8")
    os.replace(beside, path)


def _read(key: tuple[str, str, int]) -> Machine | None:
    """The profile that `calibrate` saved for a device; None if it is missing or, with a warning, if it is damaged."""
    try:
        record = json.loads(_file(key).read_text(encoding="utf-8"))
        if record.pop("format") != _FORMAT:
            return None
        speeds = {
            dtype: Speeds(**{name: Speed(float(rate), float(setup)) for name, (rate, setup) in every.items()})
            for dtype, every in record.pop("speeds").items()
        }
        return Machine(**record, speeds=speeds)
    except (FileNotFoundError, RuntimeError):  # no file, or no home directory
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"{_file(key)} is not a profile of lensor.calibrate ({error}): the built-in profile is used instead",
            stacklevel=2,
        )
        return None
