"""The command for GPUs, run small on a CPU, and the kernels compiled for GPUs that are not there."""

from __future__ import annotations

import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lensor_bench.gpu import PHASES, Row, Run, bounds, multiplying, read, summary

from lensor.kernels.torch.tensors import allows_tf32, allows_tf32_convolutions

CPU = torch.device("cpu")


def small(out: Path) -> Run:
    """A run of one layer, with time for everything."""
    run = Run(out, 60.0, CPU, 2)
    run.layers = run.layers[:1]
    return run


def test_a_run_checks_and_continues_where_it_was(tmp_path: Path) -> None:
    first = list(itertools.islice(small(tmp_path)(), 5))
    assert {row.phase for row in first} == {"check"}
    assert all(row.status == "ok" for row in first), first
    assert {row.way for row in first} >= {"chosen", "patterns"}
    with (tmp_path / "gpu.csv").open("a", encoding="utf-8") as file:
        file.write("check,unfinished")  # a run was killed here
    assert read(tmp_path / "gpu.csv") == first
    again = small(tmp_path)
    assert again.done == {row.key for row in first}
    (row,) = itertools.islice(again(), 1)
    assert row.key[:4] not in {one.key[:4] for one in first[:-1]}


def test_operations_and_candidates_are_timed(tmp_path: Path) -> None:
    run = small(tmp_path)
    run.numbers = ("float32",)
    with torch.no_grad():
        rows = [next(run._operations(lambda: True)), *run._candidates(lambda: len(run.rows) < 1)]
    assert all(row.status == "ok" for row in rows), rows
    timed, *others = rows
    assert all((timed.seconds, timed.standard, timed.estimate))
    assert {"convolution", "windows"} & {row.way for row in others}
    text = summary(rows, "a machine")
    assert "| kfac_expand | float32 | 1 |" in text
    assert "Regret" in text


def test_wrong_and_failed_results_are_listed() -> None:
    rows = [
        Row("check", "forward", "a layer", "float32", "chosen", "wrong", "error 1e-1", 0.1),
        Row("check", "forward", "a layer", "tf32", "chosen"),
    ]
    text = summary(rows, "a machine")
    assert "2 results, 1 right" in text
    assert "| check | forward | a layer | float32 | chosen | wrong | error 1e-1 |" in text


def test_an_operation_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    run = small(tmp_path)
    monkeypatch.setattr(run, "_operands", fail)
    row = next(run._checks(lambda: True))
    assert (row.status, row.message) == ("failed", "RuntimeError: out of memory")


def test_precision_is_set_and_restored() -> None:
    before = allows_tf32(), allows_tf32_convolutions()
    with multiplying("tf32"):
        assert allows_tf32()
        assert allows_tf32_convolutions()
    with multiplying("float32"):
        assert not allows_tf32()
        assert not allows_tf32_convolutions()
    assert (allows_tf32(), allows_tf32_convolutions()) == before


def test_the_phases_share_the_time() -> None:
    assert sum(PHASES.values()) == pytest.approx(1)


def test_bounds_count_one_triangle() -> None:
    found = {(one.operation, one.plan): one for one in bounds(32) if "@56" in one.convolution}
    kfc = found["kfac_expand", "patterns"]
    assert kfc.flops == 576 * 577 * 32 * 56 * 56
    assert kfc.entries == 32 * 64 * 56 * 56 + 576 * 576
    assert kfc.milliseconds["A100", "float32"] == pytest.approx(1e3 * kfc.flops / 19.5e12)
    once = found["kfac_reduce", "patterns, tables first"]
    assert once.milliseconds["A100", "float32"] == pytest.approx(1e3 * once.entries * 4 / 1555e9)


@pytest.mark.parametrize(
    ("capability", "numbers", "instruction"),
    [
        pytest.param(75, "float32", "fma", marks=pytest.mark.slow),
        pytest.param(80, "tf32", "mma", marks=pytest.mark.slow),
        (90, "bfloat16", "wgmma"),
    ],
)
def test_kernels_compile_without_a_gpu(tmp_path: Path, capability: int, numbers: str, instruction: str) -> None:
    out = tmp_path / "compiled.csv"
    options = ["--capability", str(capability), "--numbers", numbers, "--variant", "Gram", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "lensor.cli", "bench", "compiled", *options]
    subprocess.run(command, check=True, timeout=300, env=environment, capture_output=True)
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(int(row["spilled"]) == 0 for row in rows)
    assert any(int(row[instruction]) > 0 for row in rows)  # tiles with few rows use other instructions on sm_90
    assert all(int(row["mma"]) + int(row["wgmma"]) + int(row["fma"]) > 0 for row in rows)
