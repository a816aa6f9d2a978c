"""The profile of each device: built in, or measured by `calibrate` and kept in a folder of the user."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import secrets
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lensor.kernels import Backend, load
from lensor.plan import Plan
from lensor.plan import steps as s
from lensor.planner.cost import estimate
from lensor.planner.devices import typical
from lensor.planner.profile import Machine, Speed, Speeds, processor
from lensor.runtime import Runnable

_DTYPES = ("float32", "float64", "bfloat16", "float16")
"""The dtypes whose speeds are measured, if the device computes in them at least `_SLOW` times as fast as in
float32."""

_SLOW = 1 / 4
"""Dtypes that are slower than this, relative to float32, are emulated; plans for them are those for float32."""

_BUDGET = 0.06
"""Seconds for each measured call; it runs at least twice."""

_ENOUGH = 2.5
"""After this many seconds, no further dtype is measured."""

_RUN = 32
"""Entries that a measured copy moves together, as many as a row of an image."""

_KEPT = 7 << 20
"""Allocators return the memory of large arrays to the system; those of glibc raise their limit to the largest array
that was freed, up to 32 MiB."""

_SETS = 64
"""Maximum number of sets of operands on which a call is measured in turn."""

_LENGTH = 28
"""The length and width of the images of a large convolution."""

_INSTANT = 1e30
"""A rate, per second, of what takes no time."""

_FORMAT = 2
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
    found = _measure(backend, device or "cpu", key, kind)
    _write(key, found)
    _profiles[key] = found
    return found


def _backend_of(device: str) -> tuple[Backend, tuple]:
    backend = load("torch" if find_spec("torch") is not None else "numpy")
    return backend, backend.kind(backend.example((1,), "float32", device))


# ---------------------------------------------------------------------------------------------------------- measurement
def _measure(backend: Backend, device: str, key: tuple[str, str, int], kind: tuple) -> Machine:
    """Measure each number of a profile by a plan whose estimate depends on it, given those measured before."""
    similar = typical(*key)
    instant = Speeds(*(Speed(_INSTANT) for _ in Speeds.__dataclass_fields__))
    profile = replace(
        similar,
        name=processor() if key[0] == "cpu" else key[1],
        threads=key[2],
        memory=_INSTANT,
        cache=_INSTANT,
        call=0.0,
        barrier=0.0,
        speeds={"float32": instant},
    )

    def timed(plan: Plan, dtype: str = "float32") -> float:
        """The shortest time of a plan on operands that were not used recently, as in a model with many layers.

        The sets of operands, which are used in turn, fill the cache several times, with one entry per byte of it.
        """
        inputs = [step.size for step in plan.steps if isinstance(step, s.Input)]
        sets = min(profile.cache_bytes // sum(map(math.prod, inputs)) + 1, _SETS)
        arrays = [[backend.example(shape, dtype, device) for shape in inputs] for _ in range(sets)]
        every, run = itertools.cycle(arrays), Runnable(plan, backend).unchecked
        return _shortest(lambda: backend.timed(lambda: run(*next(every)), kind))

    def bandwidth(entries: int) -> float:
        """Bytes per second of a copy of an array, without the calls."""
        return 8 * entries / max(timed(_copy(entries)) - estimate(_copy(entries), profile), 1e-9)

    start = time.perf_counter()
    backend.example((_KEPT,), "float32", device)  # from now on, the allocator keeps the memory of smaller arrays
    small = timed(_copy(64))
    profile = replace(profile, call=small / estimate(_copy(64), replace(profile, call=1.0)))
    profile = replace(profile, cache=bandwidth(1 << 19), memory=bandwidth(1 << 22))
    profile = replace(profile, cache=max(profile.cache, profile.memory))
    if profile.threads > 1:
        around = (_copy(size) for size in (s.PARALLEL + 64 * _RUN, s.PARALLEL - 64 * _RUN))
        above, below = (timed(plan) - estimate(plan, profile) for plan in around)
        profile = replace(profile, barrier=max(above - below, 0.0))
    speeds: dict[str, Speeds] = {}
    product = _product(s.MatMul((0, 1)), (256, 256), (256, 256))
    single = timed(product)
    for dtype in _DTYPES:
        late = time.perf_counter() - start > _ENOUGH
        if dtype == "float32" or not (late or _lacks(backend, dtype, device) or timed(product, dtype) > single / _SLOW):
            itemsize = backend.itemsize(backend.kind(backend.example((1,), dtype, device)))
            speeds[dtype] = _speeds(partial(timed, dtype=dtype), partial(_work, profile, itemsize), key[0] != "cpu")
    return replace(profile, speeds=speeds)


def _lacks(backend: Backend, dtype: str, device: str) -> bool:
    """Whether the backend does not compute in a dtype.

    NumPy has no bfloat16, and if a library such as JAX adds it to NumPy, some of NumPy's functions refuse it.
    """
    try:
        backend.check([backend.example((1,), dtype, device)], [dtype])
    except TypeError:
        return True
    return False


def _work(profile: Machine, itemsize: int, plan: Plan) -> tuple[float, float]:
    """The seconds of a plan with one product besides this product, and the flops of the product, relative to its rate.

    `profile` has no speeds yet, so its estimate has everything else.
    """
    step = plan.steps[-1]
    taken = plan.shapes[:-1]
    return estimate(plan, profile, itemsize), step.flops(taken, plan.shape) / step.rate(taken, plan.shape).share


def _copy(entries: int) -> Plan:
    """A plan that copies about this number of entries to other strides, in runs of a length that images have."""
    run = min(_RUN, entries // 4)
    few = max(entries // run // 64, 2)
    many = entries // run // few
    shape, turned, result = (many, few, run), (few, many, run), (few * many, run)
    steps = s.Input((), "x", shape), s.Transpose((0,), (1, 0, 2)), s.Reshape((1,), result)
    return Plan("", steps, (shape, turned, result), 2, "calibration")


def _product(step: s.Step, one: tuple[int, ...], two: tuple[int, ...]) -> Plan:
    """A plan with one step."""
    inputs = s.Input((), "x", one), s.Input((), "y", two)
    return Plan("", (*inputs, step), (one, two, step.shape([one, two])), 2, "calibration")


def _speeds(timed: Callable[[Plan], float], work: Callable[[Plan], tuple[float, float]], is_wide: bool) -> Speeds:
    """Measure each speed with a large and a small call."""
    wide = 8 if is_wide else 1  # GPUs need more work to reach their rates

    def speed(made: Callable[[int], Plan], small: int, large: int) -> Speed:
        points = []
        for size in (small, large):
            plan = made(size)
            beside, flops = work(plan)
            points.append((flops, taken := timed(plan), taken - beside))
        (few, _, short), (many, whole, long) = points
        rate = (many - few) / max(long - short, whole / 2, 1e-9)
        return Speed(rate, max(short - few / rate, 0.0))

    def products(batch: int = 1) -> Callable[[int], Plan]:
        return lambda n: _product(s.MatMul((0, 1)), *[(batch, n, n) if batch > 1 else (n, n)] * 2)

    def convolution(kind: str, channels: int, groups: int = 1) -> Callable[[int], Plan]:
        def made(length: int) -> Plan:
            share = 4 if length < _LENGTH else 1  # a small convolution has fewer channels, too
            c, size = channels * wide // share, (length, length)
            g = 1 if groups == 1 else groups * wide // share
            image, weight = (8, c, *size), (c, c // g, 3, 3)
            shapes = {"forward": (image, weight, image), "input_grad": (image, weight, image)}
            one, two, result = shapes.get(kind, (image, image, weight))
            return _product(s.Convolution((0, 1), kind, (1, 1), (1, 1), (1, 1), g, result), one, two)

        return made

    return Speeds(
        products=speed(products(), 64, 512 * wide),
        batched=speed(products(64), 16, 96 * wide),
        forward=speed(convolution("forward", 64), _LENGTH // 4, _LENGTH),
        input_grad=speed(convolution("input_grad", 64), _LENGTH // 4, _LENGTH),
        weight_grad=speed(convolution("weight_grad", 64), _LENGTH // 4, _LENGTH),
        grouped=speed(convolution("forward", 128, 8), _LENGTH // 4, _LENGTH),
        depthwise=speed(convolution("forward", 256, 256), _LENGTH // 4, _LENGTH),
    )


def _shortest(timed: Callable[[], float]) -> float:
    shortest, spent, runs = math.inf, 0.0, 0
    while runs < 2 or (spent < _BUDGET and runs < 200):
        taken = timed()
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
