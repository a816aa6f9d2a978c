"""`lensor bench --framework jax`, small."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from lensor_bench.in_jax import JaxBench
from lensor_bench.results import OK, ResultsFile
from lensor_bench.settings import Settings

from lensor import ConvSpec
from lensor.inspect import CommandError
from lensor.inspect.layers import Layer
from lensor.inspect.operations import OPERATIONS

SETTINGS = Settings(batch=2, columns=2, threads=os.cpu_count() or 1, repeats=1, seconds=0.0)


def measured(spec: ConvSpec, folder: Path) -> list:
    bench = JaxBench(SETTINGS, [Layer("a model", "a layer", spec, 1)])
    results = ResultsFile(folder / "bench.csv", bench.machine, False)
    assert len(list(bench.run(results))) == len(OPERATIONS)
    return results.rows


@pytest.mark.parametrize("mode", ["zeros", pytest.param("circular", marks=pytest.mark.slow)])
def test_lensor_agrees_with_the_standard_implementations(mode: str, tmp_path: Path) -> None:
    rows = measured(
        ConvSpec(4, 6, (7, 6), (3, 2), stride=(2, 1), padding=(1, 1), groups=2, padding_mode=mode), tmp_path
    )
    assert {(row.operation, row.implementation) for row in rows} == {
        (name, way) for name in OPERATIONS for way in ("standard", "lensor")
    }
    assert all(row.found.status == OK for row in rows), rows
    assert all(row.setting.device == "jax cpu" for row in rows)


@pytest.mark.slow
def test_transposed_convolutions_and_other_threads_are_refused(tmp_path: Path) -> None:
    rows = measured(ConvSpec(2, 2, (4,), 3, transposed=True), tmp_path)
    assert all(row.found.status in ("refused", "failed") for row in rows)
    with pytest.raises(CommandError, match="JAX uses all cores"):
        JaxBench(replace(SETTINGS, threads=SETTINGS.threads + 1))
