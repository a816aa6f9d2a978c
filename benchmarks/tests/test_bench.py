"""`lensor bench`: standard ways and peers are right, results files lose nothing, reports say what was found."""

from __future__ import annotations

import csv
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import opt_einsum
import pytest
import torch
from lensor_bench import growth, models, private, steps
from lensor_bench import implementations as implementations_module
from lensor_bench import run as run_module
from lensor_bench.candidates import choices
from lensor_bench.candidates import read as read_candidates
from lensor_bench.candidates import write as write_candidates
from lensor_bench.implementations import IMPLEMENTATIONS, Implementation
from lensor_bench.measure import balanced_orders, bytes_of, extra_bytes, interleaved, neighbours, relative_error
from lensor_bench.optimizers import settings
from lensor_bench.overhead import CASES
from lensor_bench.report import (
    FASTEST,
    Options,
    bounds,
    markdown,
    parse_target,
    physical_limit,
    ratios,
    summaries,
    worst,
)
from lensor_bench.results import HEADER, OK, Found, Machine, ResultsFile, Row, Setting, read
from lensor_bench.run import Bench
from lensor_bench.settings import Settings
from lensor_bench.tasks import cifar_task
from lensor_bench.training import Point, reached
from typer.testing import CliRunner

import lensor
from lensor import cli
from lensor.inspect import CommandError, Layer
from lensor.inspect.layers import KINDS
from lensor.inspect.operations import OPERATIONS, STANDARD
from tests.support.command import invoke
from tests.support.dense import evaluate_dense

CPU = torch.device("cpu")
TINY = Settings(
    nets=("2c2d",), implementations=("lensor",), threads=1, limit=1, batch=1, columns=2, repeats=1, seconds=0.0
)
SPECS = [
    lensor.ConvSpec(4, 6, (9, 8), (3, 2), stride=(2, 1), padding=(1, 0), groups=2),
    lensor.ConvSpec(3, 4, (8, 8), 2, stride=2),
    lensor.ConvSpec(4, 4, (9, 9), 3, padding=2, dilation=2, groups=4),
    lensor.ConvSpec(4, 8, (6, 7), 1, stride=2),
]


def operands(operation: str, spec: lensor.ConvSpec) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = OPERATIONS[operation].shapes(spec, batch=2, columns=3)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


# -------------------------------------------------------------------------------------------------- implementations
OTHER_SPECS = [
    lensor.ConvSpec(2, 2, (7, 6), 3, padding=((2, 1), (0, 1))),
    lensor.ConvSpec(4, 6, 9, 3, stride=2, padding=1, groups=2),
    lensor.ConvSpec(2, 3, (4, 5, 3), 2, stride=(1, 2, 1), padding=1),
    lensor.ConvSpec(4, 6, (4, 3), (3, 2), stride=(2, 3), padding=1, output_padding=1, groups=2, transposed=True),
    lensor.ConvSpec(3, 2, 5, 3, stride=2, padding=2, dilation=2, transposed=True),
]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("spec", [*SPECS, *OTHER_SPECS], ids=str)
def test_standard_ways_are_their_networks(operation: str, spec: lensor.ConvSpec) -> None:
    given = operands(operation, spec)
    found = IMPLEMENTATIONS[STANDARD].ways[operation](given, spec)()
    expected = evaluate_dense(OPERATIONS[operation].network(spec), {name: a.numpy() for name, a in given.items()})
    torch.testing.assert_close(found, torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("name", "operation"),
    [(name, way) for name, one in IMPLEMENTATIONS.items() if name != STANDARD for way in OPERATIONS if way in one.ways],
)
def test_implementations_agree(name: str, operation: str) -> None:
    one = IMPLEMENTATIONS[name]
    if not one.is_installed:
        pytest.skip(f"{one.package} is not installed")
    for spec in [*SPECS, *(OTHER_SPECS if one.package == "lensor" else ())]:
        given = operands(operation, spec)
        torch.testing.assert_close(
            one.ways[operation](given, spec)(), IMPLEMENTATIONS[STANDARD].ways[operation](given, spec)()
        )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_efforts_are_what_the_names_say(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def call() -> torch.Tensor:
        with lensor.planning() as settings:
            seen.append(settings.effort)
        return torch.zeros(())

    monkeypatch.setattr(implementations_module, "call_of", lambda *_: call)
    for name in ("lensor", "lensor-measure"):
        IMPLEMENTATIONS[name].ways[operation]({}, SPECS[0])()
    assert seen == ["estimate", "measure"]


def test_networks_are_contracted_as_they_stand_and_as_the_rules_leave_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[int, ...], ...]] = []
    expression = opt_einsum.contract_expression

    def recorded(equation: str, *operands: Any, constants: list[int]) -> Any:
        asked.append(tuple(tuple(operand.shape) if hasattr(operand, "shape") else operand for operand in operands))
        return expression(equation, *operands, constants=constants)

    monkeypatch.setattr(opt_einsum, "contract_expression", recorded)
    spec = lensor.ConvSpec(4, 8, (6, 7), 1, stride=2)  # 3 × 4 positions are read
    given = operands("forward", spec)
    for name in ("network", "network-simplified"):
        IMPLEMENTATIONS[name].ways["forward"](given, spec)
    whole, simplified = asked
    assert sorted(map(len, whole)) == [3, 3, 5, 5]  # two patterns beside the operands, which have an index for groups
    assert math.prod(max(whole, key=math.prod)) == 2 * 4 * 6 * 7
    assert len(simplified) == 2
    assert math.prod(max(simplified, key=math.prod)) == 2 * 4 * 3 * 4  # the positions that are read, sliced


def test_physical_limit_counts_operands_and_result() -> None:
    spec = lensor.ConvSpec(4, 8, (6, 6), 3)
    flops, moved = physical_limit(OPERATIONS["weight_vjp"], spec, batch=2, columns=1, itemsize=4)
    assert moved == 4 * (2 * 4 * 36 + 2 * 8 * 16 + 8 * 4 * 9)
    assert flops == 2 * 2 * 8 * 16 * 4 * 9


# ---------------------------------------------------------------------------------------------------------- measuring
def test_calls_are_interleaved_and_take_turns() -> None:
    order: list[int] = []

    def call(at: int) -> Callable[[], torch.Tensor]:
        return lambda: order.append(at) or torch.zeros(())  # type: ignore[func-returns-value]

    times = interleaved([call(0), call(1), call(2)], seconds=0.0, least=3, most=5)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert [len(one.seconds) for one in times] == [3, 3, 3]
    assert all(one.minimum <= one.median for one in times)
    assert len(interleaved([call(0)], seconds=60.0, least=1, most=4)[0].seconds) == 4


def test_a_call_that_had_its_time_leaves_and_the_first_stays() -> None:
    def waits(seconds: float) -> Callable[[], torch.Tensor]:
        return lambda: time.sleep(seconds) or torch.zeros(())  # type: ignore[func-returns-value]

    times = interleaved([waits(0.02), waits(0.03), waits(0.0)], seconds=0.05, least=2, most=6)
    assert [len(one.seconds) for one in times] == [6, 2, 6]


@pytest.mark.parametrize("count", range(2, 8))
def test_every_call_comes_after_every_other_one_equally_often(count: int) -> None:
    orders = balanced_orders(count)
    assert all(sorted(order) == list(range(count)) for order in orders)
    pairs = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert set(pairs) == set(itertools.permutations(range(count), 2))
    assert set(pairs.values()) == {1 + count % 2}


def test_extra_bytes_are_beside_the_result_and_count_what_is_kept() -> None:
    x = torch.zeros(1024)
    kept: list[torch.Tensor] = []

    def call() -> torch.Tensor:
        if not kept:
            many = torch.zeros(100 * 1024)  # the first call only, and given back
            kept.append(many[: 2 * 1024].clone())
        return (x + 1) * 2

    extra, result = extra_bytes(call, CPU)
    assert bytes_of(result) == 4096
    assert 0 <= extra - (4096 + 2 * 4096) < 64  # x + 1, what is kept, and a few scalars


def test_memory_limit_makes_an_exception_of_what_does_not_fit() -> None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        pytest.skip("there is no limit on this system")
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    total = int(meminfo.read_text().split()[1]) * 1024
    with run_module._memory_limit(CPU), pytest.raises(RuntimeError):
        torch.empty(total, dtype=torch.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


# ---------------------------------------------------------------------------------------------------------------- runs
def test_ratios_are_over_the_standard_of_the_same_rounds(extra: Callable[..., None]) -> None:
    def late(y: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return y

    extra(late=late, scratch=lambda y: y + torch.zeros(2**20).sum())
    bench = Bench(replace(TINY, operations=("forward",), implementations=("late", "scratch"), repeats=3))
    standard, slow, large = bench.measure(bench.cases[0], bench.implementations)
    assert standard.found.minimum is not None
    assert slow.found.minimum is not None
    assert slow.found.minimum >= 0.05
    assert {one.found.standard_minimum for one in (standard, slow, large)} == {standard.found.minimum}
    assert {one.found.standard_median for one in (standard, slow, large)} == {standard.found.median}
    assert standard.found.minimum < slow.found.minimum
    assert {one.found.standard_extra_bytes for one in (standard, slow, large)} == {standard.found.extra_bytes}
    assert large.found.extra_bytes is not None
    assert standard.found.extra_bytes is not None
    assert large.found.extra_bytes >= 4 * 2**20 - bytes_of(torch.empty(32, 28, 28)) > standard.found.extra_bytes


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4), ("bfloat16", 5e-2)])
def test_what_counts_as_right_is_a_few_roundings(dtype: str, tolerance: float, extra: Callable[..., None]) -> None:
    extra(near=lambda y: y + y.abs().max() * tolerance / 2, far=lambda y: y + y.abs().max() * tolerance * 2)
    bench = Bench(replace(TINY, operations=("forward",), implementations=("near", "far"), dtype=dtype))
    rows = bench.measure(bench.cases[0], bench.implementations)
    assert [row.found.status for row in rows] == [OK, OK, "wrong"]


def test_memory_does_not_depend_on_what_ran_before() -> None:
    layer = Layer("net", "conv", lensor.ConvSpec(4, 4, (16, 16), 5, padding=2), 1)
    found = []
    lensor.clear_caches()
    for names in (("lensor",), ("lensor-measure", "lensor"), ("lensor", "lensor-measure")):
        bench = Bench(replace(TINY, operations=("kfac_reduce",), implementations=names), [layer])
        rows = bench.measure(bench.cases[0], bench.implementations)
        found.append(next(row.found.extra_bytes for row in rows if row.implementation == "lensor"))
    assert len(set(found)) == 1, found


@pytest.fixture
def extra(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Adds implementations made of one function of the standard's result."""

    def add(**ways: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name, change in ways.items():
            monkeypatch.setitem(IMPLEMENTATIONS, name, implementation(name, change))

    def implementation(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Implementation:
        standard = IMPLEMENTATIONS[STANDARD].ways["forward"]
        return Implementation(
            name, {"forward": lambda given, spec: lambda: change(standard(given, spec)())}, "torch", "torch"
        )

    return add


def refuse(_: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("no groups\nsecond line")


def fail(_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of memory")


def test_what_is_wrong_or_fails_is_a_row_and_the_run_goes_on(extra: Callable[..., None], tmp_path: Path) -> None:
    extra(
        twice=lambda y: 2 * y,
        flat=lambda y: y.flatten(),
        nothing=lambda y: y * float("nan"),
        refusing=refuse,
        failing=fail,
        right=lambda y: y * 1.0,
    )
    names = ("twice", "flat", "nothing", "refusing", "failing", "right")
    bench = Bench(replace(TINY, operations=("forward",), implementations=names))
    results = ResultsFile(tmp_path / "r.csv", bench.machine, resume=False)
    assert [case.operation.name for case in bench.run(results)] == ["forward"]
    found = {row.implementation: row.found for row in read(tmp_path / "r.csv")}
    assert {name: one.status for name, one in found.items()} == {
        STANDARD: OK,
        "twice": "wrong",
        "flat": "wrong",
        "nothing": "wrong",
        "refusing": "refused",
        "failing": "failed",
        "right": OK,
    }
    assert "differs by" in found["twice"].message
    assert found["flat"].message == "shape (25088,), expected (1, 32, 28, 28)"
    assert found["refusing"].message == "NotImplementedError: no groups"
    assert found["failing"].message == "RuntimeError: out of memory"
    assert all((one.minimum is not None) == (one.status == OK) for one in found.values())


def test_nothing_is_timed_where_the_standard_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = replace(IMPLEMENTATIONS[STANDARD], ways={"forward": lambda given, spec: lambda: fail(given["X"])})
    monkeypatch.setitem(IMPLEMENTATIONS, STANDARD, broken)
    bench = Bench(replace(TINY, operations=("forward",)))
    results = ResultsFile(tmp_path / "r.csv", bench.machine, resume=False)
    list(bench.run(results))
    assert [row.found.status for row in results.rows] == ["failed", "failed"]
    assert "the standard implementation has no result" in results.rows[1].found.message


@pytest.mark.slow
def test_a_run_measures_every_operation(tmp_path: Path) -> None:
    bench = Bench(TINY)
    results = ResultsFile(tmp_path / "r.csv", bench.machine, resume=False)
    threads = torch.get_num_threads()
    assert [case.operation.name for case in bench.run(results)] == list(OPERATIONS)
    assert torch.get_num_threads() == threads
    rows = read(tmp_path / "r.csv")
    assert [row.key for row in rows] == [row.key for row in results.rows]
    assert [(row.operation, row.implementation) for row in rows] == [
        (name, one) for name in OPERATIONS for one in (STANDARD, "lensor")
    ]
    for row in rows:
        found = row.found
        assert found.status == OK, found
        assert found.minimum
        assert found.standard_minimum
        assert found.extra_bytes is not None
        assert found.result_bytes
        assert row.layer.spec == lensor.ConvSpec(1, 32, (28, 28), 5, padding=2)
        assert row.setting == Setting(1, 2, "float32", "cpu", 1)
        assert row.machine == bench.machine


def test_resume_measures_only_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    one = Bench(replace(TINY, operations=("forward",)))
    list(one.run(ResultsFile(path, one.machine, resume=False)))
    before = path.read_bytes()
    two = Bench(replace(TINY, operations=("forward", "kfac_reduce"), implementations=("lensor", "lensor-measure")))
    list(two.run(ResultsFile(path, two.machine, resume=True)))
    assert path.read_bytes().startswith(before)
    keys = [row.key for row in read(path)]
    assert len(keys) == len(set(keys)) == 6
    after = path.read_bytes()
    list(two.run(ResultsFile(path, two.machine, resume=True)))
    assert path.read_bytes() == after


@pytest.mark.slow
def test_kill_in_mid_run_loses_and_repeats_no_row(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    options = ["--nets", "2c2d,3c3d", "--ops", "forward,weight_vjp,kfac_reduce", "--impl", "lensor"]
    options += ["--batch", "1", "--threads", "1", "--repeats", "2", "--seconds", "0"]
    rows_in_all = 5 * 3 * 2
    command = [sys.executable, "-c", "from lensor.cli import main; main()", "bench", *options, "--out", str(path)]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=dict(os.environ))
    try:
        end = time.monotonic() + 120
        while not (path.exists() and path.read_bytes().count(b"\n") > 6):
            assert time.monotonic() < end
            assert killed.poll() is None
            time.sleep(0.005)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    finished = path.read_bytes()
    finished = finished[: finished.rfind(b"\n") + 1]
    rows = read(path)
    assert 6 <= len(rows) < rows_in_all
    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL, env=dict(os.environ))
    assert path.read_bytes().startswith(finished)
    keys = [row.key for row in read(path)]
    assert len(keys) == len(set(keys)) == rows_in_all


# ------------------------------------------------------------------------------------------------------- results files
HERE = Machine("here", 2, "3.11", "2.6", "0.1")


def row(
    operation: str = "forward",
    implementation: str = "lensor",
    spec: lensor.ConvSpec = SPECS[0],
    minimum: float | None = 1.0,
    standard: float = 2.0,
    extra: int = 100,
) -> Row:
    found = Found(OK, "", 1e-7, 3, minimum, minimum, standard, standard, extra, 200, 50)
    layer = Layer("net+other", "conv", spec, 3)
    return Row(operation, implementation, "1", layer, Setting(8, 4, "float32", "cpu", 2), found, HERE)


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    odd = replace(row(implementation="other"), found=Found("failed", 'RuntimeError: "a, b" failed'))
    uneven = row(spec=lensor.ConvSpec(2, 2, (7, 6), 3, padding=((2, 1), (0, 1))))
    file = ResultsFile(tmp_path / "new" / "r.csv", HERE, resume=False)
    file.append([row(), odd])
    file.append([uneven])
    assert read(file.path) == [row(), odd, uneven]
    again = ResultsFile(file.path, HERE, resume=True)
    assert again.rows == file.rows


def test_a_line_that_was_not_finished_is_no_row(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "r.csv", HERE, resume=False)
    file.append([row()])
    whole = file.path.read_bytes()
    file.append([row(implementation="other")])
    file.path.write_bytes(file.path.read_bytes()[:-30])
    assert read(file.path) == [row()]
    again = ResultsFile(file.path, HERE, resume=True)
    assert file.path.read_bytes() == whole
    again.append([row(implementation="other")])
    assert len(read(file.path)) == 2


def test_a_start_that_was_killed_is_started_again(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(",".join(HEADER).encode()[:40])
    ResultsFile(path, HERE, resume=False).append([row()])
    assert read(path) == [row()]


def test_two_writers_lose_and_repeat_no_row(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    one = ResultsFile(path, HERE, resume=False)
    two = ResultsFile(path, HERE, resume=True)
    two.append([row()])
    with pytest.raises(CommandError, match="was changed by another process; it was left unchanged"):
        one.append([row()])
    assert one.rows == []
    assert read(path) == two.rows == [row()]


def test_a_disk_that_is_full_is_told_in_a_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no full disk on this system")
    file = ResultsFile(tmp_path / "r.csv", HERE, resume=False)
    file.path, file._length = Path("/dev/full"), 0
    with pytest.raises(CommandError, match="cannot write /dev/full: No space left"):
        file.append([row()])
    assert file.rows == []


def test_rows_of_another_version_of_a_peer_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: Callable[..., None]
) -> None:
    extra(peer=lambda y: y)
    bench = Bench(replace(TINY, operations=("forward",), implementations=("peer",)))
    results = ResultsFile(tmp_path / "r.csv", bench.machine, resume=False)
    list(bench.run(results))
    assert bench.pending(results) == []
    older = replace(results.rows[1], version="0.1")
    results.rows[1] = older
    with pytest.raises(
        CommandError, match=rf"measured with peer 0.1, here {re.escape(torch.__version__)}: specify a different --out"
    ):
        bench.pending(results)


def damaged() -> list[bytes]:
    header = (",".join(HEADER) + "\n").encode()
    return [
        b"a,b\n1,2\n",
        b"\x00\xff\xfe binary",
        b"no newline",
        header.replace(b"operation", b"op"),
        header + b"forward,lensor\n",
        header + b"\x00" * 40 + b"\n",
        header + b"x" * 140_000 + b"\n",
    ]


@pytest.mark.parametrize("content", damaged())
def test_damaged_and_foreign_files_are_refused_and_kept(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(content)
    for use in (lambda: read(path), lambda: ResultsFile(path, HERE, resume=True)):
        with pytest.raises(CommandError, match="it was left unchanged"):
            use()
    assert path.read_bytes() == content


def test_damage_is_told_by_its_line(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "r.csv", HERE, resume=False)
    file.append([row(), row(implementation="other")])
    text = file.path.read_text(encoding="utf-8")
    for old, new in (("general", "dense"), ("9x8", "9x"), (",3,1,1,", ",x,1,1,"), (",ok,", ",okk,")):
        assert old in text
        file.path.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(CommandError, match="corrupt at line 2"):
            read(file.path)
    file.path.write_text(text + text.splitlines(keepends=True)[1], encoding="utf-8")
    with pytest.raises(CommandError, match=r"corrupt at line 4 \(the measurement occurs in an earlier line"):
        read(file.path)
    with pytest.raises(ValueError, match=r"minimum is -1.0, expected at least 0"):
        Found(OK, minimum=-1.0)


def test_nothing_to_measure_is_told_before_a_file_is_made(tmp_path: Path) -> None:
    asked = ("bench", "--nets", "3c3d", "--kinds", "down-sampling", "--out", str(tmp_path / "r.csv"))
    found = CliRunner().invoke(cli.make_app(), list(asked))
    assert found.exit_code == 1
    assert "the nets have no convolution of these kinds" in found.stderr
    assert not (tmp_path / "r.csv").exists()


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "r.csv", HERE, resume=False)
    file.append([row()])
    with pytest.raises(CommandError, match="exists: continue it with --resume"):
        ResultsFile(file.path, HERE, resume=False)
    with pytest.raises(CommandError, match=r"another machine .*\(torch 2.6, here 2.7\)"):
        ResultsFile(file.path, replace(HERE, torch="2.7"), resume=True)
    assert read(file.path) == [row()]


# -------------------------------------------------------------------------------------------------------------- reports
def some_rows() -> list[Row]:
    general, dense = SPECS[0], SPECS[1]
    rows = []
    for spec, factor in ((general, 0.5), (dense, 2.0)):
        rows += [row(implementation=STANDARD, spec=spec, minimum=2.0, extra=200), row(spec=spec, minimum=2.0 * factor)]
        rows += [row(implementation="einconv", spec=spec, minimum=8.0 * factor)]
    failed = row("kfac_reduce", spec=general, minimum=None)
    return [*rows, row("kfac_reduce", STANDARD, general), replace(failed, found=Found("failed", "a | b"))]


def test_summaries_are_ratios_by_operation_and_kind() -> None:
    options = Options(targets=tuple(map(parse_target, ("forward=1.3", "forward:dense=1", "kfac_reduce:general=9"))))
    found = {(one.operation, one.kind, one.implementation): one for one in summaries(some_rows(), options)}
    assert found["forward", "all", "lensor"].cells[3:] == ("2", "0.50", "1.25", "2.00", "1.30 ✓", "0.50")
    assert found["forward", "general", "lensor"].cells[3:] == ("1", "0.50", "0.50", "0.50", "", "0.50")
    assert found["forward", "dense", "lensor"].cells[7] == "1.00 ✗"
    assert found["forward", "dense", "einconv"].cells[6:8] == ("8.00", "")
    assert found["kfac_reduce", "general", "lensor"].cells[3:] == ("0 (+1 without)", "–", "–", "–", "9.00 ✗", "–")
    assert {kind for _, kind, _ in found} <= {"all", *KINDS}
    assert not any(name == STANDARD for _, _, name in found)


def test_ratios_against_others() -> None:
    rows = some_rows()
    against = {
        (one.row.layer.spec.kind, one.row.implementation): one.value
        for one in ratios(rows, Options("einconv")).values()
    }
    assert against["general", "lensor"] == 0.25
    fastest = {
        (one.row.operation, one.row.layer.spec.kind): one.value
        for one in ratios(rows, Options(FASTEST)).values()
        if one.row.implementation == "lensor"
    }
    assert fastest == {("forward", "general"): 0.5, ("forward", "dense"): 2.0}
    slack = ratios(rows, Options(slack=3.0))
    assert max(one.value for one in slack.values() if one.row.implementation == "lensor") == 1.0
    with pytest.raises(CommandError, match="implementation is 'opacus', expected one of einconv, lensor, standard"):
        ratios(rows, Options("opacus"))


def test_rows_of_two_sittings_are_compared_by_way_of_the_standard() -> None:
    later = row(implementation="einconv", minimum=4.0, standard=4.0)  # the machine was half as fast
    rows = [row(implementation=STANDARD, minimum=2.0), row(minimum=1.0), later]
    (found,) = [one.value for one in ratios(rows, Options("einconv")).values() if one.row.implementation == "lensor"]
    assert found == 0.5


def test_slower_rows_of_a_later_sitting_stay_slower() -> None:
    later = row(minimum=1.5, standard=0.5)  # the machine was four times as fast
    (found,) = [one.value for one in ratios([row(implementation=STANDARD, minimum=2.0), later], Options()).values()][1:]
    assert found == 3.0
    with pytest.raises(CommandError, match="implementation is 'Standard', expected one of"):
        ratios([later], Options("Standard"))


def test_markdown_has_the_worst_cases_with_their_limits() -> None:
    rows = some_rows()
    text = markdown(rows, Options(), ["times.png"])
    assert [ratio.value for ratio in worst(rows, Options())] == [2.0, 0.5]
    flops, moved = physical_limit(OPERATIONS["forward"], SPECS[1], 8, 4, 4)
    line = next(line for line in text.splitlines() if "3→4 2×2 s2 @8²" in line)
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:6] == ["forward", "lensor", "net+other", "3→4 2×2 s2 @8²", "dense", "2.00"]
    assert [float(cell) for cell in cells[7:9]] == pytest.approx([flops / 1e6, moved / 1e6], rel=1e-2)
    assert "![times.png](times.png)" in text
    assert "a ¦ b" in text
    assert "counts as equal" not in text
    assert "at most 7 µs counts as equal" in markdown(rows, Options(slack=7e-6))
    assert "batch 8, 4 columns" in text


@pytest.mark.parametrize("text", ["forward", "forward=x", "nothing=1", "forward:odd=1"])
def test_targets_that_make_no_sense(text: str) -> None:
    with pytest.raises(CommandError, match="expected"):
        parse_target(text)


# --------------------------------------------------------------------------------------------------------- command line
def test_bench_and_its_report(tmp_path: Path) -> None:
    file, folder = tmp_path / "r.csv", tmp_path / "report"
    run = ["bench", "--nets", "2C2D", "--ops", "forward", "--ops", "kfac_reduce", "--impl", "lensor", "--limit", "1"]
    result = invoke(*run, "--batch", "1", "--threads", "1", "--repeats", "1", "--seconds", "0", "--out", str(file))
    assert result.exit_code == 0, result.output
    assert "4 rows in" in result.stdout
    assert "kfac_reduce" in result.stdout
    result = invoke("bench", "report", str(file), "--out", str(folder), "--target", "forward=100")
    assert result.exit_code == 0, result.output
    assert "✓" in result.stdout
    assert {path.name for path in folder.iterdir()} == {"report.md", "times.png", "memory.png"}
    assert (folder / "times.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nets", "vgg"], "net is 'vgg', expected one of 3c3d, 2c2d,"),
        (["--ops", "backward"], "operation is 'backward', expected one of forward, input_vjp,"),
        (["--impl", "jax"], "implementation is 'jax', expected one of standard, standard-again, lensor,"),
        (["--kinds", "odd"], "kind is 'odd', expected one of general, mixed-dense, dense, down-sampling"),
        (["--dtype", "int8"], "dtype is 'int8', expected one of float64, float32"),
        (["--device", "tpu"], "device is 'tpu', expected one of cpu"),
        (["report", "no-such-file.csv"], "cannot read no-such-file.csv: No such file"),
        (["report", "README.md"], "README.md is not a results file"),
        (["report", "r.csv", "--roof", "1", "2"], "--roof requires --out"),
        (["report", "r.csv", "--roof", "0", "2", "--out", "o"], "--roof is 0 2, expected two positive numbers"),
        (["--ops", "forward", "growth", "out"], "--ops before growth is ignored: give options after the command"),
        (["models", "--csv", "."], "cannot write .: it is a folder"),
        (["private", "--csv", "."], "cannot write .: it is a folder"),
        (["private", "--max-norm", "0"], "--max-norm is 0, expected a positive number"),
    ],
)
def test_bench_errors_are_one_line(arguments: list[str], words: str) -> None:
    result = invoke("bench", *arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_interruption_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "measure", interrupt)
    result = invoke("bench", "--nets", "2c2d", "--threads", "1", "--out", str(tmp_path / "r.csv"))
    assert result.exit_code == 1
    assert "continue with --resume" in result.stderr
    assert read(tmp_path / "r.csv") == []


def test_peers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, "peer", Implementation("peer", {}, "some-peer", "no_such_module"))
    assert "peer" not in {one.name for one in Bench(TINY).implementations}
    with pytest.raises(CommandError, match=r"peer is not installed: pip install some-peer"):
        Bench(replace(TINY, implementations=("peer",)))


def test_bounds_are_the_larger_of_flops_and_bytes_over_their_rates() -> None:
    spec = lensor.ConvSpec(4, 8, (6, 6), 3)
    one = replace(row("weight_vjp", spec=spec, minimum=0.5, standard=2.0), setting=Setting(2, 1, "float32", "cpu", 1))
    flops, moved = 2 * 2 * 8 * 16 * 4 * 9, 4 * (2 * 4 * 36 + 2 * 8 * 16 + 8 * 4 * 9)
    assert "| weight_vjp | general | lensor | 1 | 0.50 | 0.25 |" in bounds([one], (flops, 2 * moved))
    assert "| weight_vjp | general | lensor | 1 | 2.00 | 0.25 |" in bounds([one], (flops, moved / 4))
    standard = row("weight_vjp", STANDARD, spec, minimum=2.0)
    assert "Bounds on the times" in markdown([standard, one], Options(roof=(1.0, 1.0)))


def test_relative_error_is_over_the_largest_entry() -> None:
    assert relative_error(torch.tensor([1.0, 4.5]), torch.tensor([1.0, 4.0])) == 0.125


@pytest.mark.slow
def test_overhead_of_every_function() -> None:
    found = CliRunner().invoke(cli.make_app(), ["bench", "overhead", "--seconds", "0"])
    assert found.exit_code == 0, found.output
    rows = [line for line in found.output.splitlines() if "│" in line]
    assert len(rows) == 2 * len(CASES)
    assert {row.split("│")[1].strip() for row in rows} == set(CASES)


def test_neighbours_run_within_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    start = subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda *given: started.append(start(*given)) or started[-1])
    with neighbours(1):
        assert len(started) == os.cpu_count()
        assert all(process.poll() is None for process in started)
    assert all(process.poll() is not None for process in started)


def test_candidates_are_measured_and_read_again(tmp_path: Path) -> None:
    out = tmp_path / "candidates.csv"
    arguments = ["bench", "candidates", str(out), "--ops", "ggn_diagonal", "--limit", "1", "--seconds", "0"]
    found = CliRunner().invoke(cli.make_app(), arguments)
    assert found.exit_code == 0, found.output
    rows = read_candidates(out)
    assert len({row.plan for row in rows}) == len(rows) > 1
    assert all(min(row.calls, row.flops, row.nbytes, row.estimate, row.seconds, row.standard) > 0 for row in rows)
    (choice,) = choices(rows)
    assert choice.regret >= 1
    write_candidates(tmp_path / "again.csv", rows)
    assert (tmp_path / "again.csv").read_text() == out.read_text()
    out.write_text("operation\n", encoding="utf-8")
    with pytest.raises(CommandError, match="has the columns"):
        read_candidates(out)


def test_planning_of_an_operation_and_the_memory_kept() -> None:
    found = CliRunner().invoke(
        cli.make_app(), ["bench", "planning", "--ops", "forward", "--limit", "1", "--shapes", "20"]
    )
    assert found.exit_code == 0, found.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in found.output.splitlines() if "│" in line]
    (times,) = (row for row in rows if row[0] == "forward")
    cold, _, second, _, third, _ = map(float, times[1:])
    assert cold > second > third > 0
    kept = [[float(cell.replace(",", "")) for cell in row] for row in rows if row[0] != "forward"]
    assert [shapes for shapes, *_ in kept] == [*range(0, 21, 2)]
    assert all(0 < caches < 64 for _, caches, _ in kept[1:])


def test_planning_without_shapes_prints_times_only() -> None:
    found = CliRunner().invoke(
        cli.make_app(), ["bench", "planning", "--ops", "forward", "--limit", "1", "--shapes", "0"]
    )
    assert found.exit_code == 0, found.output
    assert "shapes" not in found.output


@pytest.mark.parametrize("name", CASES)
def test_overhead_compares_calls_that_do_the_same(name: str) -> None:
    case = CASES[name]
    arrays = {operand: torch.randn(shape, dtype=torch.float64) for operand, shape in case.shapes.items()}
    found = case.function(*arrays.values())
    torch.testing.assert_close(found, case.network(**arrays).reshape(found.shape))


# ------------------------------------------------------------------------------------------------------------- growth
def test_growth_varies_one_size_at_a_time() -> None:
    cases = [(one.batch, layer.spec) for one, layers in growth.sittings(TINY) for layer in layers]
    assert len(cases) == len(set(cases)) == sum(len(axis.values) - 1 for axis in growth.AXES) + 1
    assert sum(spec == growth.BASE for _, spec in cases) == len(growth.AXES[0].values)


@pytest.mark.slow
def test_growth_measures_plots_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = tuple(
        replace(axis, values=values)
        for axis, values in zip(growth.AXES, ((1, 8), (7, 28), (8, 64), (1, 3)), strict=True)
    )
    monkeypatch.setattr(growth, "AXES", axes)
    arguments = ["bench", "growth", str(tmp_path), "--ops", "kfac_reduce", "--seconds", "0", "--repeats", "1"]
    assert invoke(*arguments).exit_code == 0
    rows = read(tmp_path / "growth.csv")
    assert len(rows) == 2 * 5
    assert all(row.found.status == OK for row in rows)
    for axis in axes:
        mine = [row for row in growth.along(rows, axis) if row.implementation == "lensor"]
        assert [axis.of(row) for row in mine] == list(axis.values)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert " exists: continue it" in invoke(*arguments).output
    shown: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: shown.append(figure))
    other = replace(
        rows[1], setting=replace(rows[1].setting, dtype="float64"), found=replace(rows[1].found, minimum=9.0)
    )
    names = [f"way {number}" for number in range(6)]
    many = [replace(row, implementation=name) for name in names for row in rows if row.implementation == "lensor"]
    growth.plot([*rows, *many, other], {row.setting for row in rows}, tmp_path / "other.png")
    axes_of = shown[0].axes
    assert [axis.get_ylabel().partition(",")[0] for axis in (axes_of[0], axes_of[4])] == [
        "shortest time",
        "memory besides operands and result",
    ]
    for column, axis in enumerate(axes):
        mine = [row for row in growth.along(rows, axis) if row.implementation == "lensor"]
        time_line, memory_line = (panel.get_lines()[1] for panel in (axes_of[column], axes_of[4 + column]))
        assert list(time_line.get_ydata()) == [1e3 * (row.found.minimum or 0) for row in mine]
        assert list(memory_line.get_ydata()) == pytest.approx(
            [(row.found.extra_bytes or math.nan) / 2**20 for row in mine], nan_ok=True
        )
        assert len({line.get_linestyle() for line in axes_of[column].get_lines()[:4]}) == 4
        assert len(axes_of[column].get_lines()) == 8
    assert invoke(*arguments, "--resume").exit_code == 0
    assert read(tmp_path / "growth.csv") == rows


def test_growth_without_times_is_told(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no row"):
        growth.plot([], (), tmp_path / "growth.png")


# ------------------------------------------------------------------------------------------------- models and training
def test_factors_of_whole_models_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Small(torch.nn.Sequential):
        pass

    def small() -> torch.nn.Module:
        layers = (torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1))
        return Small(*layers, torch.nn.Flatten(), torch.nn.Linear(4, models.CLASSES))

    monkeypatch.setattr(models, "MODELS", {"small": small})
    table = tmp_path / "models.csv"
    fast = ("--batch", "2", "--size", "32", "--threads", "1", "--repeats", "1", "--seconds", "0")
    found = invoke("bench", "models", "small", *fast, "--csv", str(table))
    assert found.exit_code == 0, found.output
    lines = table.read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0] for line in lines[1:5]] == ["small"] * 4
    assert "DIFFERS" not in table.read_text(encoding="utf-8")
    unknown = invoke("bench", "models", "vgg", *fast)
    assert unknown.exit_code == 1
    assert "model is 'vgg', expected one of small" in unknown.stderr


def test_factors_are_compared_with_those_of_curvlinops() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 9, 5))
    data = torch.randn(2, 3, 5, 5), torch.tensor([1, 3])
    own = lensor.curvature.kfac(model, torch.nn.CrossEntropyLoss(), data, fisher="empirical")
    theirs = own.in_convention("curvlinops")
    blocks = {name.rpartition(".")[0]: block for name, block in theirs.items() if name.endswith("weight")}
    fake = SimpleNamespace(
        _input_covariances={name: block.A[0].clone() for name, block in blocks.items()},
        _gradient_covariances={name: block.B[0].clone() for name, block in blocks.items()},
    )
    assert models._compared(own, fake).startswith("equal to curvlinops' in 2 layers, largest difference 0e+00")
    fake._gradient_covariances["2"][0, 0] *= 1.1
    assert models._compared(own, fake).startswith("DIFFERS from curvlinops' in 2 layers")


def test_clipped_gradients_of_whole_models_are_checked_and_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def small(normalized: bool) -> torch.nn.Module:
        torch.manual_seed(0)
        norm = torch.nn.BatchNorm2d(4) if normalized else torch.nn.Identity()
        layers = (torch.nn.Conv2d(3, 4, 3, stride=2), norm, torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1))
        return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4, models.CLASSES))

    makers = {
        "plain": lambda: small(normalized=False),
        "frozen": lambda: private.frozen_normalization(small(normalized=True)),
        "normalized": lambda: small(normalized=True),
    }
    monkeypatch.setattr(private, "PRIVATE_MODELS", makers)
    found = list(private.measure([], batch=3, size=32, max_norm=0.5, rounds=1, threads=1))
    ways = ["SGD, not clipped", "Lensor"]
    if private.find_spec("opacus") is not None:
        ways += ["Opacus, hooks", "Opacus, ghost", "Opacus, ghost, Lensor"]
    assert [(one.model, one.way) for one in found] == [(name, way) for name in makers for way in ways]
    refused = {(one.model, one.way) for one in found if one.seconds is None}
    assert refused == {("normalized", way) for way in ways[2:]}
    for one in found:
        assert (one.difference or 0.0) < 1e-5, one
        assert one.seconds is None or min(one.seconds, one.ratio or 0.0, one.peak or 0) > 0, one
    table = tmp_path / "private.csv"
    fast = ("--batch", "2", "--size", "32", "--threads", "1", "--repeats", "1")
    run = invoke("bench", "private", "plain", *fast, "--csv", str(table))
    assert run.exit_code == 0, run.output
    assert len(table.read_text(encoding="utf-8").splitlines()) == 1 + len(ways)
    unknown = invoke("bench", "private", "vgg", *fast)
    assert unknown.exit_code == 1
    assert "model is 'vgg', expected one of plain, frozen, normalized" in unknown.stderr


def test_different_sums_are_reported() -> None:
    with pytest.raises(ValueError, match="1 parameters have gradients, expected 2"):
        private.difference({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(3)})
    assert private.difference({"a": torch.tensor([1.0, 4.0])}, {"a": torch.tensor([2.0, 4.0])}) == 0.25


def test_training_is_tuned_run_and_plotted(tmp_path: Path) -> None:
    arguments = ("--tasks", "digits", "--steps", "10", "--seeds", "1", "--batch", "8", "--threads", "1")
    found = invoke("bench", "training", str(tmp_path), *arguments)
    assert found.exit_code == 0, found.output
    names = ("SGD", "AdamW", "Muon", "SINGD", "KFAC, reduce", "KFAC, forward-only")
    assert all(name in found.output for name in names)
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert len((tmp_path / "training.csv").read_text(encoding="utf-8").splitlines()) >= 1 + 8 * 2
    unknown = invoke("bench", "training", str(tmp_path), "--tasks", "mnist")
    assert unknown.exit_code == 1
    assert "task is 'mnist', expected one of digits, crops" in unknown.stderr


def test_steps_to_an_accuracy_are_counted_from_the_first_validation_there() -> None:
    def points(name: str, seed: int, accuracies: list[float]) -> list[Point]:
        return [Point("task", name, "lr", seed, 10 * at, 0.5 * at, 1.0, one) for at, one in enumerate(accuracies)]

    every = [
        *(points("AdamW", 0, [0.1, 0.5, 0.8, 0.6]) + points("AdamW", 1, [0.1, 0.5, 0.6, 0.7])),
        *(points("KFAC", 0, [0.1, 0.7, 0.9]) + points("KFAC", 1, [0.1, 0.7, 0.6])),
        *(points("SGD", 0, [0.1, 0.2, 0.3]) + points("SGD", 1, [0.1, 0.2, 0.7])),
    ]
    adamw, kfac, sgd = reached(every, "task")
    assert adamw == ("AdamW", "lr", "0.700", "2/2", "20", "1.00", "1.00", "50.0")
    assert kfac == ("KFAC", "lr", "0.750", "2/2", "10", "0.50", "0.50", "50.0")
    assert sgd == ("SGD", "lr", "0.500", "1/2", "–", "–", "–", "50.0")


def test_muon_updates_the_kernels_themselves() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, _, last = settings()["Muon"]["lr=0.02, half"].started(model, 100)
    assert last == 50
    x, y = torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name
    by_hand = torch.nn.Parameter(before["0.weight"].flatten(1).clone())
    assert model[0].weight.grad is not None
    by_hand.grad = model[0].weight.grad.flatten(1)
    lr = optimizer.parts[0].param_groups[0]["lr"]
    torch.optim.Muon([by_hand], lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    torch.testing.assert_close(model[0].weight.flatten(1), by_hand)


def test_cifar10_is_a_task_where_it_is(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    records = draw.integers(0, 256, (100, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    for at in range(5):
        records[20 * at : 20 * at + 20].tofile(tmp_path / f"data_batch_{at + 1}.bin")
    task = cifar_task(tmp_path)
    assert task.train[0].shape == (90, 3, 32, 32)
    assert task.validate[1].tolist() == records[90:, 0].tolist()
    assert task.model()(task.train[0][:2]).shape == (2, 10)
    with pytest.raises(CommandError, match="has no CIFAR-10 files"):
        cifar_task(tmp_path / "none")


def test_steps_are_timed_beside_gradient_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    def small() -> torch.nn.Module:
        layers = (torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1))
        return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4, models.CLASSES))

    monkeypatch.setattr(steps, "SETUPS", {"small": steps.Setup(small, 4, 8)})
    found = list(steps.measure(["small"], seconds=0.0, repeats=1, threads=1))
    assert [one.optimizer for one in found] == ["SGD", *steps.OPTIMIZERS]
    assert found[0].ratio == 1.0
    assert all(one.seconds > 0 and one.ratio == pytest.approx(one.seconds / found[0].seconds) for one in found)
    unknown = invoke("bench", "steps", "vgg")
    assert unknown.exit_code == 1
    assert "model is 'vgg', expected one of small" in unknown.stderr


def test_headline_figures_are_named_and_plotted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    factors = [models.Measured("resnet18", way, 2.0, beyond, 0, "") for way, beyond in headline_ways()]
    clipped = [private.Measured("resnet18-frozen-norm", "Opacus, ghost", None, None, None, None, None, "not installed")]
    taken = [
        steps.StepTime("resnet18", "SGD", 1.0, 1.0, 1.0),
        steps.StepTime("resnet18", "KFAC, forward-only", 1, 1.1, 1),
    ]
    for module, found in ((models, factors), (private, clipped), (steps, taken)):
        monkeypatch.setattr(module, "measure", lambda *_, found=found: iter(found))
    shown = invoke("bench", "headline", str(tmp_path))
    assert shown.exit_code == 0, shown.output
    rows = list(csv.reader((tmp_path / "headline.csv").open(encoding="utf-8")))
    assert [row[1:] for row in rows[1:]] == [
        ["Lensor", "0.5"],
        ["curvlinops", "1.5"],
        ["SGD", "1.0"],
        ["KFAC, forward-only", "1.1"],
    ]
    assert (tmp_path / "headline.png").stat().st_size > 10_000


def headline_ways() -> list[tuple[str, float]]:
    return [("forward and backward", 0.0), ("lensor, expand", 0.5), ("curvlinops, expand", 1.5)]
