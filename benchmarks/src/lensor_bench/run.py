"""Operations × convolutions × implementations, checked, timed and recorded."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import lensor
from lensor.inspect.catalogue import NETS, PAPER, layers_of, merged
from lensor.inspect.errors import CommandError, choose, in_one_line
from lensor.inspect.layers import KINDS, Layer
from lensor.inspect.operations import OPERATIONS, Operation
from lensor.planner import processor
from lensor_bench.implementations import IMPLEMENTATIONS, STANDARD, Implementation
from lensor_bench.measure import Call, bytes_of, extra_bytes, interleaved, neighbours, relative_error, threads
from lensor_bench.results import OK, Found, Machine, ResultsFile, Row, Setting
from lensor_bench.settings import Settings

TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Maximum difference from the standard's result, divided by its largest entry, by dtype."""

_LEAST = 3
"""Minimum number of rounds for slow calls."""


@dataclass(frozen=True)
class Case:
    """One operation on one convolution."""

    operation: Operation
    layer: Layer


class Bench:
    """A benchmark run: its cases, in order, and their measurement.

    Args:
        settings: settings of the measurement.
        layers: the convolutions to measure instead of those of the nets.

    Raises:
        CommandError: for an unknown name (the message lists the known ones), a peer that is not installed, or a device
            that does not exist.
    """

    def __init__(self, settings: Settings, layers: Sequence[Layer] | None = None) -> None:
        self.operations = choose("operation", settings.operations, OPERATIONS)
        kinds = choose("kind", settings.kinds, KINDS)
        nets = choose("net", settings.nets, NETS) if settings.nets else PAPER
        (dtype,) = choose("dtype", [settings.dtype], TOLERANCES)
        self.setting = Setting(settings.batch, settings.columns, dtype, settings.device, settings.threads)
        self.implementations = _implementations(settings.implementations)
        self.device = _device(settings.device)
        self.settings = settings
        if layers is None:
            layers = merged(layer for net in nets for layer in layers_of(net))
        layers = [layer for layer in layers if layer.spec.kind in kinds][: settings.limit]
        self.cases = [Case(OPERATIONS[name], layer) for layer in layers for name in self.operations]
        self.machine = here(self.device)

    def pending(self, results: ResultsFile) -> list[tuple[Case, tuple[Implementation, ...]]]:
        """The cases with missing rows, each with the implementations for which a row is missing.

        Raises:
            CommandError: if the file has rows from a different version of an implementation.
        """
        versions = {one.name: one.version for one in self.implementations}
        for row in results.rows:
            if row.version != versions.get(row.implementation, row.version):
                raise CommandError(
                    f"{results.path} was measured with {row.implementation} {row.version}, here"
                    f" {versions[row.implementation]}: specify a different --out"
                )
        done = {row.key for row in results.rows}
        found = []
        for case in self.cases:
            able = [one for one in self.implementations if case.operation.name in one.ways]
            missing = tuple(one for one in able if self._row(case, one, Found(OK)).key not in done)
            if missing:
                found.append((case, missing))
        return found

    def run(self, results: ResultsFile) -> Iterator[Case]:
        """Measure and record the missing rows; yields each case before it is measured."""
        with threads(self.settings.threads), _memory_limit(self.device), neighbours(self.settings.neighbours):
            for case, missing in self.pending(results):
                yield case
                results.append(self.measure(case, missing))

    def measure(self, case: Case, implementations: Sequence[Implementation]) -> list[Row]:
        """Measure one case; if an implementation fails or is wrong, its row says so."""
        gc.collect()
        with torch.no_grad():
            found = self._measure(case, implementations)
        return [self._row(case, one, found[one.name]) for one in implementations]

    def _measure(self, case: Case, implementations: Sequence[Implementation]) -> dict[str, Found]:
        spec, name = case.layer.spec, case.operation.name
        found: dict[str, Found] = {}
        calls: dict[str, Call] = {}
        expected: torch.Tensor | None = None
        try:
            operands = self.operands(case)
        except Exception as error:  # out of memory
            return {one.name: _failure(error) for one in implementations}
        for one in dict.fromkeys((IMPLEMENTATIONS[STANDARD], *implementations)):
            if one.name != STANDARD and expected is None:
                found[one.name] = Found("failed", "the standard implementation has no result to compare with")
                continue
            try:
                if one.package == "lensor":
                    lensor.clear_caches()  # so that constants cached earlier also count for this setting
                call = one.ways[name](operands, spec)
                extra, result = extra_bytes(call, self.device)
            except Exception as error:
                found[one.name] = _failure(error)
                continue
            expected = result if one.name == STANDARD else expected
            found[one.name] = self._checked(result, expected, extra)
            if found[one.name].status == OK:
                calls[one.name] = call
            del result
        del expected
        return self._timed(calls, found)

    def operands(self, case: Case) -> dict[str, torch.Tensor]:
        """The operands of a case, with entries that depend only on its convolution."""
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(repr(case.layer.spec).encode()))
        kind = {"device": self.device, "dtype": getattr(torch, self.setting.dtype), "generator": generator}
        shapes = case.operation.shapes(case.layer.spec, self.setting.batch, self.setting.columns)
        return {name: torch.randn(shape, **kind) for name, shape in shapes.items()}

    def _checked(self, result: torch.Tensor, expected: torch.Tensor | None, extra: int) -> Found:
        size = bytes_of(result)
        if expected is None or result.shape != expected.shape:
            shapes = f"shape {tuple(result.shape)}, expected {() if expected is None else tuple(expected.shape)}"
            return Found("wrong", shapes, result_bytes=size)
        error = relative_error(result, expected)
        if error <= TOLERANCES[self.setting.dtype]:
            return Found(OK, "", error, extra_bytes=extra, result_bytes=size)
        return Found("wrong", f"differs by {error:.1e} of the largest entry", error, result_bytes=size)

    def _timed(self, calls: dict[str, Call], found: dict[str, Found]) -> dict[str, Found]:
        if not calls:
            return found
        try:
            for call in calls.values():  # plans may have been evicted from the cache since they were created
                call()
            times = interleaved(
                tuple(calls.values()),
                self.settings.seconds,
                min(_LEAST, self.settings.repeats),
                self.settings.repeats,
                self.device,
            )
        except Exception as error:
            failed = {name: _failure(why) for name, call in calls.items() if (why := _raised(call)) is not None}
            first = next(iter(calls))
            if not failed or first in failed:
                return found | dict.fromkeys(calls, _failure(error))
            return self._timed({name: calls[name] for name in calls if name not in failed}, found | failed)
        first = next(iter(calls))  # the standard implementation: without it, nothing is timed
        standard = times[0]
        for name, mine in zip(calls, times, strict=True):
            found[name] = replace(
                found[name],
                repeats=len(mine.seconds),
                minimum=mine.minimum,
                median=mine.median,
                standard_minimum=standard.minimum,
                standard_median=standard.median,
                standard_extra_bytes=found[first].extra_bytes,
            )
        return found

    def _row(self, case: Case, one: Implementation, found: Found) -> Row:
        return Row(case.operation.name, one.name, one.version, case.layer, self.setting, found, self.machine)


def here(device: torch.device) -> Machine:
    """This machine or its GPU, and the versions of the packages used in the measurements."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    return Machine(name, os.cpu_count() or 1, platform.python_version(), torch.__version__, version())


def version() -> str:
    """The version of Lensor; in a git checkout, also the last commit that changed it."""
    command = ["git", "-C", str(Path(lensor.__file__).parent), "log", "-1", "--format=%h", "--", "."]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = ""
    return f"{lensor.__version__} at commit {found}" if found else lensor.__version__


def _raised(call: Call) -> Exception | None:
    """The exception that a call raises when it runs once more, or None."""
    try:
        call()
    except Exception as error:
        return error
    return None


def _failure(error: Exception) -> Found:
    """The result for an implementation that raised an exception."""
    status = "refused" if isinstance(error, NotImplementedError) else "failed"
    return Found(status, in_one_line(error))


def _implementations(asked: Sequence[str]) -> tuple[Implementation, ...]:
    """The standard implementation and the requested implementations."""
    names = choose("implementation", asked, IMPLEMENTATIONS)
    found = [IMPLEMENTATIONS[name] for name in names]
    for one in found if asked else ():
        if not one.is_installed:
            raise CommandError(f"{one.name} is not installed: pip install {one.package}")
    return tuple(dict.fromkeys((IMPLEMENTATIONS[STANDARD], *(one for one in found if one.is_installed))))


def _device(name: str) -> torch.device:
    known = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    (name,) = choose("device", [name], known)
    if name == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # compute in full float32
    return torch.device(name)


@contextmanager
def _memory_limit(device: torch.device) -> Iterator[None]:
    """On Linux, limit allocations to the free memory, so that a call raises an exception instead of being killed."""
    info = Path("/proc/meminfo")
    if device.type != "cpu" or not info.exists():
        yield
        return
    import resource

    free = next(int(line.split()[1]) for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
    used = next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")
    )
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = (used + free) * 1024
    if before[1] != resource.RLIM_INFINITY:
        limit = min(limit, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
