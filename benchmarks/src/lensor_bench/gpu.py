"""Everything that a GPU can show in a few minutes: are the kernels right, and how fast are they?

The run has four phases, each with a share of the minutes: check every operation against float64, time the operations
and the standard way, time the candidates, and time whole models. Each finished row is appended to `gpu.csv`, so that a
stopped run continues. On a CPU, all phases run on small operands, with Triton's interpreter.
"""

from __future__ import annotations

import csv
import gc
import math
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lensor
from lensor import ConvSpec
from lensor.curvature.batch import squared_norms
from lensor.evaluate import bind_shapes
from lensor.inspect.catalogue import PAPER, layers_of, merged
from lensor.inspect.errors import in_one_line
from lensor.inspect.layers import Layer
from lensor.inspect.operations import OPERATIONS, Operation
from lensor.kernels import load
from lensor.kernels.torch.patterns import interpreting
from lensor.lowering import FUSED, candidates, lower
from lensor.plan import Plan
from lensor.plan.steps import Input, PatternProduct
from lensor.planner import estimate, profile_of
from lensor.runtime import Runnable
from lensor_bench.measure import extra_bytes, interleaved, relative_error
from lensor_bench.models import curvlinops_factors, image_classifier
from lensor_bench.run import here
from lensor_bench.standard import WAYS

NUMBERS = ("float32", "tf32", "bfloat16")
"""How factors are multiplied: exactly, rounded to TF32, or in half precision."""

_TOLERANCES = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 5e-2}

PHASES = {"check": 0.2, "operation": 0.45, "candidate": 0.15, "model": 0.2}
"""The phases, each with its share of the time; what a phase leaves is for the next ones."""

_POISON = 1 << 28
"""Bytes of NaN that the allocator hands out again, so that an entry that no kernel writes is found."""


class Peak(NamedTuple):
    """What a GPU can do at most: bytes per second, and flops per second for each kind of products."""

    memory: float
    rates: dict[str, float]


PEAKS = {
    "T4": Peak(320e9, {"float32": 8.1e12}),
    "A100": Peak(1555e9, {"float32": 19.5e12, "tf32": 156e12, "bfloat16": 312e12}),
    "H100": Peak(3350e9, {"float32": 67e12, "tf32": 495e12, "bfloat16": 989e12}),
    "H200": Peak(4800e9, {"float32": 67e12, "tf32": 495e12, "bfloat16": 989e12}),
}
"""Published peaks, by a part of the device's name; dense products."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        phase: the phase.
        operation: the operation, or the model.
        convolution: the convolution, or the input shape of the model.
        numbers: how factors were multiplied.
        way: the plan or the library.
        status: "ok", "wrong" or "failed".
        message: why the status is not "ok".
        error: the largest error, relative to the largest entry of the float64 result.
        seconds: median time.
        standard: median time of the standard way, in the same rounds.
        estimate: the planner's estimate in seconds.
        bound: seconds that the device needs at least, for the flops and bytes of the plan, if its peaks are known.
        peak: peak memory in bytes besides operands and result.
        standard_peak: the same for the standard way.
    """

    phase: str
    operation: str
    convolution: str
    numbers: str
    way: str
    status: str = "ok"
    message: str = ""
    error: float | None = None
    seconds: float | None = None
    standard: float | None = None
    estimate: float | None = None
    bound: float | None = None
    peak: int | None = None
    standard_peak: int | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What a resumed run does not measure again."""
        return (self.phase, self.operation, self.convolution, self.numbers, self.way)


_NORMS = Operation("per_example_norms", ("X", "V"), squared_norms)
_OPERATIONS = {**OPERATIONS, _NORMS.name: _NORMS}

_STANDARD: dict[str, Callable[..., torch.Tensor]] = {**WAYS, _NORMS.name: WAYS["weight_vjp"]}
"""The standard way; the norms are compared with one plain weight gradient."""


class Run:
    """A run on one device.

    Args:
        out: the folder for the results.
        minutes: about how long the run takes.
        device: the device.
        batch: the batch size.
    """

    def __init__(self, out: Path, minutes: float, device: torch.device, batch: int) -> None:
        self.path, self.device, self.minutes = out / "gpu.csv", device, minutes
        self.is_small = device.type == "cpu"
        self.batch = 2 if self.is_small else batch
        self.numbers = ("float32", "bfloat16") if self.is_small else NUMBERS
        self.rows = read(self.path) if self.path.exists() else []
        self.done = {row.key for row in self.rows}
        self.layers = _small_layers() if self.is_small else _layers()
        self.peak = next((peak for name, peak in PEAKS.items() if name in here(device).machine), None)

    def __call__(self) -> Iterator[Row]:
        """Run all phases; each row is written before it is yielded."""
        start, share = time.monotonic(), 0.0
        phases = {"check": self._checks, "operation": self._operations, "candidate": self._candidates}
        for name, part in PHASES.items():
            share += part
            until = start + 60 * self.minutes * share
            with interpreting() if self.is_small else nullcontext(), torch.no_grad():
                if name == "model":
                    break
                for row in phases[name](lambda until=until: time.monotonic() < until):
                    yield self._kept(row)
        for row in self._models(lambda: time.monotonic() < start + 60 * self.minutes):
            yield self._kept(row)

    def _kept(self, row: Row) -> Row:
        is_new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            if is_new:
                writer.writeheader()
            writer.writerow(asdict(row))
        self.rows.append(row)
        self.done.add(row.key)
        return row

    def _is_done(self, *key: str) -> bool:
        return any(done[: len(key)] == key for done in self.done)

    # ---------------------------------------------------------------------------------------------------------- phases
    def _cases(self, phase: str, names: Sequence[str]) -> Iterator[tuple[Operation, Layer, str]]:
        for layer in self.layers:
            for name in names:
                for numbers in self.numbers:
                    if not self._is_done(phase, name, layer.label, numbers):
                        yield _OPERATIONS[name], layer, numbers

    def _checks(self, has_time: Callable[[], bool]) -> Iterator[Row]:
        """Each operation, by the plan that is chosen and by the strategies with fused kernels, on poisoned memory."""
        for operation, layer, numbers in self._cases("check", tuple(_OPERATIONS)):
            if not has_time():
                return
            with multiplying(numbers):
                yield from self._check(operation, layer, numbers)

    def _check(self, operation: Operation, layer: Layer, numbers: str) -> Iterator[Row]:
        known = ("check", operation.name, layer.label, numbers)
        try:
            wide = self._operands(operation, layer.spec, torch.float64)
            given = {name: x.to(_dtype(numbers)) for name, x in wide.items()}
            net = bind_shapes(operation.network(layer.spec), {name: tuple(x.shape) for name, x in given.items()})
            expected = self._expected(operation, {name: x.double() for name, x in given.items()}, layer.spec)
            simplified = net.simplify()
            plans = {"chosen": _planned(net, given)}
            plans |= {one.name: lower(simplified, one) for one in FUSED if one.applies(simplified)}
        except Exception as error:
            yield Row(*known, "all", "failed", in_one_line(error))
            return
        for way, plan in plans.items():
            try:
                self._poison()
                found = Runnable(plan, load("torch"))(given)
                error = relative_error(found.double(), expected)
                is_right = error <= _TOLERANCES[numbers]
                yield Row(*known, way, "ok" if is_right else "wrong", "" if is_right else f"error {error:.1e}", error)
            except Exception as error:
                yield Row(*known, way, "failed", in_one_line(error))
        del plans, wide, given, expected
        gc.collect()

    def _expected(self, operation: Operation, given: dict[str, torch.Tensor], spec: ConvSpec) -> torch.Tensor:
        if operation is _NORMS:
            given = self._beside(operation, given, spec)
            return WAYS["per_example_weight_vjp"](given, spec).flatten(1).square().sum(1)
        return WAYS[operation.name](self._beside(operation, given, spec), spec)

    def _poison(self) -> None:
        torch.full((1 << 16 if self.is_small else _POISON // 4,), torch.nan, device=self.device)

    def _operations(self, has_time: Callable[[], bool]) -> Iterator[Row]:
        """Each operation beside the standard way."""
        names = (
            "kfac_expand",
            "kfac_reduce",
            "per_example_norms",
            "ggn_diagonal",
            "weight_vjp",
            "forward",
            "input_vjp",
        )
        for operation, layer, numbers in self._cases("operation", names):
            if not has_time():
                return
            with multiplying(numbers):
                yield self._operation(operation, layer, numbers)

    def _operation(self, operation: Operation, layer: Layer, numbers: str) -> Row:
        known = ("operation", operation.name, layer.label, numbers)
        try:
            given = self._operands(operation, layer.spec, _dtype(numbers))
            net, spec = operation.network(layer.spec), layer.spec
            plan = _planned(net, given)
            run = Runnable(plan, load("torch"))
            beside = self._beside(operation, given, spec)
            calls = [lambda: _STANDARD[operation.name](beside, spec), lambda: run(given)]
            peaks = [extra_bytes(call, self.device)[0] for call in calls]
            standard, own = self._times(calls)
        except Exception as error:
            return Row(*known, "lensor", "failed", in_one_line(error))
        bound, seconds = self._bound(plan, numbers), (own.median, standard.median)
        return Row(*known, plan.name, "ok", "", None, *seconds, self._estimate(plan, given), bound, peaks[1], peaks[0])

    def _candidates(self, has_time: Callable[[], bool]) -> Iterator[Row]:
        """All candidates of some operations, whose times show whether the choice by estimate was right."""
        for operation, layer, numbers in self._cases("candidate", ("kfac_expand", "ggn_diagonal", "weight_vjp")):
            if not has_time():
                return
            with multiplying(numbers):
                yield from self._candidate(operation, layer, numbers)

    def _candidate(self, operation: Operation, layer: Layer, numbers: str) -> Iterator[Row]:
        known = ("candidate", operation.name, layer.label, numbers)
        try:
            given = self._operands(operation, layer.spec, _dtype(numbers))
            backend = load("torch")
            kind = backend.kind(next(iter(given.values())))
            net = bind_shapes(operation.network(layer.spec), {name: tuple(x.shape) for name, x in given.items()})
            plans = candidates(net, in_parts=False, fused=backend.fuses(kind))
            plans = [plan for plan in plans if backend.can_run(plan.steps, kind)]
            runs = [Runnable(plan, backend) for plan in plans]
            times = self._times([lambda run=run: run(given) for run in runs])
        except Exception as error:
            yield Row(*known, "all", "failed", in_one_line(error))
            return
        for plan, taken in zip(plans, times, strict=True):
            own = self._estimate(plan, given), self._bound(plan, numbers)
            yield Row(*known, plan.name, "ok", "", None, taken.median, None, *own)

    def _models(self, has_time: Callable[[], bool]) -> Iterator[Row]:
        """Factors of whole models beside curvlinops, compared with the time of the compiled gradient."""
        sizes = (
            {"resnet18": (2, 3, 32, 32)}
            if self.is_small
            else {"resnet18": (512, 3, 32, 32), "resnet50": (64, 3, 224, 224)}
        )
        for name, shape in sizes.items():
            label = "×".join(map(str, shape))
            if self._is_done("model", name, label) or not has_time():
                continue
            yield from self._model(name, shape, label)

    def _model(self, name: str, shape: tuple[int, ...], label: str) -> Iterator[Row]:
        known = ("model", name, label, "float32")
        try:
            torch.manual_seed(0)
            model = image_classifier(name).to(self.device).eval()
            data = torch.randn(shape, device=self.device), torch.randint(10, shape[:1], device=self.device)
            loss = torch.nn.CrossEntropyLoss()
            compiled = torch.compile(model) if not self.is_small else model

            def gradient() -> torch.Tensor:
                model.zero_grad()
                value = loss(compiled(data[0]), data[1])
                value.backward()
                return value.detach()

            def factors(approx: Any) -> Callable[[], torch.Tensor]:
                def call() -> torch.Tensor:
                    lensor.curvature.kfac(model, loss, data, approx=approx, fisher="empirical", others="skip")
                    return data[0][:0]

                return call

            ways = {"compiled gradient": gradient, "expand": factors("expand"), "reduce": factors("reduce")}
            ways |= curvlinops_factors(model, loss, data)
            failed = {}
            for way, call in list(ways.items()):
                try:
                    call()
                except Exception as error:
                    failed[way] = in_one_line(error)
                    del ways[way]
            peaks = [extra_bytes(call, self.device)[0] for call in ways.values()]
            times = self._times(list(ways.values()), seconds=2.0)
        except Exception as error:
            yield Row(*known, "all", "failed", in_one_line(error))
            return
        for way, taken, peak in zip(ways, times, peaks, strict=True):
            first = times[0].median, peaks[0]
            yield Row(*known, way, "ok", "", None, taken.median, first[0], None, None, peak, first[1])
        for way, message in failed.items():
            yield Row(*known, way, "failed", message)

    # --------------------------------------------------------------------------------------------------------- helpers
    def _operands(self, operation: Operation, spec: ConvSpec, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(repr(spec).encode()))
        options = {"device": self.device, "dtype": torch.float32, "generator": generator}
        shapes = operation.shapes(spec, self.batch, 2)
        return {name: torch.randn(shape, **options).to(dtype) for name, shape in shapes.items()}

    def _beside(self, operation: Operation, given: dict[str, torch.Tensor], spec: ConvSpec) -> dict[str, torch.Tensor]:
        """The operands, and what torch's backward pass needs besides, which exists after a forward pass."""
        like = next(iter(given.values()))
        found = dict(given)
        if "X" not in found:
            found["X"] = like.new_zeros((self.batch, *spec.input_shape))
        if "W" not in found:
            found["W"] = like.new_zeros(spec.weight_shape)
        return found

    def _times(self, calls: Sequence[Callable[[], torch.Tensor]], seconds: float = 0.15) -> list[Any]:
        for call in calls:
            call()
        return interleaved(list(calls), 0.0 if self.is_small else seconds, 3, 30, self.device)

    def _bound(self, plan: Plan, numbers: str) -> float | None:
        """The least seconds for the flops of a plan, and for reading its operands and writing its result."""
        if self.peak is None or numbers not in self.peak.rates:
            return None
        itemsize = 2 if numbers == "bfloat16" else 4
        return max(plan.flops / self.peak.rates[numbers], _entries(plan) * itemsize / self.peak.memory)

    def _estimate(self, plan: Plan, given: dict[str, torch.Tensor]) -> float:
        backend = load("torch")
        kind = backend.kind(next(iter(given.values())))
        return estimate(plan, profile_of(backend, kind), backend.itemsize(kind), backend.dtype(kind))


def _entries(plan: Plan) -> int:
    """The entries of the operands and of the result."""
    return sum(math.prod(step.size) for step in plan.steps if isinstance(step, Input)) + math.prod(plan.shape)


def _planned(net: Any, given: dict[str, torch.Tensor]) -> Plan:
    """The plan that a call with these operands uses."""
    return net.plan(**given)


class Bound(NamedTuple):
    """What a plan with fused kernels needs, and the least milliseconds for it by device and numbers."""

    operation: str
    convolution: str
    plan: str
    flops: int
    entries: int
    milliseconds: dict[tuple[str, str], float]


_BOUNDED = (
    ConvSpec(64, 64, (56, 56), 3, padding=1),
    ConvSpec(256, 256, (14, 14), 3, padding=1),
    ConvSpec(512, 512, (7, 7), 3, padding=1),
)


def bounds(batch: int) -> Iterator[Bound]:
    """The flops and bytes of the plans with fused kernels for three layers of ResNet, which need no GPU to count."""
    for spec in _BOUNDED:
        layer = Layer("resnet", "", spec, 1)
        for name in ("kfac_expand", "kfac_reduce", _NORMS.name, "ggn_diagonal"):
            net = bind_shapes(_OPERATIONS[name].network(spec), _OPERATIONS[name].shapes(spec, batch, 2)).simplify()
            plans = {plan.steps: plan for plan in (lower(net, one) for one in reversed(FUSED) if one.applies(net))}
            for plan in reversed(plans.values()):
                if not any(isinstance(step, PatternProduct) for step in plan.steps):
                    continue
                entries = _entries(plan)
                least = {
                    (device, numbers): 1e3
                    * max(plan.flops / rate, entries * (2 if numbers == "bfloat16" else 4) / peak.memory)
                    for device, peak in PEAKS.items()
                    for numbers, rate in peak.rates.items()
                }
                yield Bound(name, layer.label, plan.strategy, plan.flops, entries, least)


def _dtype(numbers: str) -> torch.dtype:
    return torch.bfloat16 if numbers == "bfloat16" else torch.float32


@contextmanager
def multiplying(numbers: str) -> Iterator[None]:
    """Allow TF32 in products and convolutions inside the `with` block only if it is asked for."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = numbers == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _layers() -> list[Layer]:
    """The convolutions of the paper's nets, those with the most work first; every third first of all."""
    every = merged(layer for net in PAPER for layer in layers_of(net))
    work = sorted(every, key=lambda layer: -math.prod(layer.spec.output_shape) * math.prod(layer.spec.weight_shape[1:]))
    return [layer for start in range(3) for layer in work[start::3]]


def _small_layers() -> list[Layer]:
    specs = [
        ConvSpec(4, 6, (6, 5), 3, padding=1),
        ConvSpec(4, 4, (7, 6), (3, 2), stride=2, padding=1, groups=2),
        ConvSpec(3, 3, (6, 6), 3, padding=1, groups=3, padding_mode="circular"),
    ]
    return [Layer("small", "", spec, 1) for spec in specs]


# ------------------------------------------------------------------------------------------------------------- results
def read(path: Path) -> list[Row]:
    """Read the rows of a file; an unfinished last line is ignored."""
    kinds: dict[str, Callable[[str], Any]] = {
        "str": str,
        "float | None": lambda text: float(text) if text else None,
        "int | None": lambda text: int(text) if text else None,
    }
    with path.open(newline="", encoding="utf-8") as file:
        records = [record for record in csv.DictReader(file) if None not in record.values()]
    return [Row(**{one.name: kinds[str(one.type)](record[one.name]) for one in fields(Row)}) for record in records]


def summary(rows: Sequence[Row], machine: str) -> str:
    """The results as Markdown: wrong results, ratios, shares of the peaks, regret and models."""
    lines = ["# Measurements on a GPU", "", machine, ""]
    checks = [row for row in rows if row.phase == "check"]
    bad = [row for row in rows if row.status != "ok"]
    lines += [f"Checks: {len(checks)} results, {sum(row.status == 'ok' for row in checks)} right.", ""]
    if bad:
        lines += [
            "| phase | operation | convolution | numbers | way | status | message |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [f"| {' | '.join((*row.key, row.status, row.message))} |" for row in bad[:40]] + [""]
    lines += _ratios([row for row in rows if row.phase == "operation" and row.status == "ok"])
    lines += _regrets([row for row in rows if row.phase == "candidate" and row.status == "ok"])
    models = [row for row in rows if row.phase == "model" and row.status == "ok"]
    if models:
        lines += ["| model | input | way | ms | of the compiled gradient | peak MB |", "|---|---|---|--:|--:|--:|"]
        for row in models:
            ratio = (row.seconds or 0) / (row.standard or math.nan)
            lines.append(
                f"| {row.operation} | {row.convolution} | {row.way} | {1e3 * (row.seconds or 0):.1f} | {ratio:.2f} |"
                f" {(row.peak or 0) / 1e6:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.operation, row.numbers), []).append(row)
    return found


def _ratios(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = [
        "Times and peak memory relative to the standard way (median, largest), and the bound by peak rate and bandwidth"
        " relative to the time (median):",
        "",
        "| operation | numbers | layers | time | largest | memory | largest | bound / time |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for (operation, numbers), mine in _groups(rows).items():
        times = [(row.seconds or 0) / (row.standard or math.nan) for row in mine]
        memory = [row.peak / row.standard_peak for row in mine if row.standard_peak and row.peak is not None]
        shares = [row.bound / row.seconds for row in mine if row.bound and row.seconds]
        cells = [f"{statistics.median(times):.2f}", f"{max(times):.2f}"]
        cells += [f"{statistics.median(memory):.2f}", f"{max(memory):.2f}"] if memory else ["", ""]
        cells.append(f"{statistics.median(shares):.0%}" if shares else "")
        lines.append(f"| {operation} | {numbers} | {len(mine)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _regrets(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = [
        "Regret, the time of the plan with the least estimate divided by that of the fastest plan:",
        "",
        "| operation | numbers | layers | median | largest | on | chosen | fastest |",
        "|---|---|--:|--:|--:|---|---|---|",
    ]
    for (operation, numbers), mine in _groups(rows).items():
        layers: dict[str, list[Row]] = {}
        for row in mine:
            layers.setdefault(row.convolution, []).append(row)
        found = []
        for label, one in layers.items():
            chosen = min(one, key=lambda row: row.estimate or math.inf)
            fastest = min(one, key=lambda row: row.seconds or math.inf)
            found.append(((chosen.seconds or 0) / (fastest.seconds or math.nan), label, chosen.way, fastest.way))
        worst = max(found)
        median = statistics.median(one[0] for one in found)
        lines.append(
            f"| {operation} | {numbers} | {len(found)} | {median:.2f} | {worst[0]:.2f} | {' | '.join(worst[1:])} |"
        )
    return [*lines, ""]


__all__ = ["NUMBERS", "PEAKS", "PHASES", "Peak", "Row", "Run", "bounds", "multiplying", "read", "summary"]
