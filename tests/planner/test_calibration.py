"""Profiles: built in for typical devices, measured on request and kept for later processes."""

from __future__ import annotations

import json
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import lensor
from lensor.kernels import load
from lensor.plan import Plan
from lensor.planner import Machine, Speed, Speeds, calibration, estimate, profile_of
from lensor.planner.devices import GPUS, MANY_CORES, NUMPY, TWO_CORES, typical


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own; profiles that the test measures are forgotten afterwards."""
    monkeypatch.setenv("LENSOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "_profiles", {})
    monkeypatch.setattr(calibration, "_BUDGET", 1e-4)
    return tmp_path / "cache"


def kept(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


@pytest.mark.parametrize("profile", [TWO_CORES, NUMPY, MANY_CORES, *GPUS.values()], ids=lambda profile: profile.name)
def test_built_in_profiles_are_plausible(profile: Machine) -> None:
    assert 0 < profile.memory < profile.cache
    assert profile.threads > 1 or profile.barrier == 0
    for dtype, speeds in profile.speeds.items():
        products = profile.speeds["tf32" if "tf32" in dtype else dtype].products
        for kind in Speeds.__dataclass_fields__:
            assert 0 < getattr(speeds, kind).rate <= products.rate
    assert profile.speeds_of("complex64") == profile.speeds["float32"]
    assert profile.name in str(profile)
    assert pickle.loads(pickle.dumps(profile)) == profile


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (("cpu", "", 1), "two-core CPU"),
        (("cpu", "", 2), "two-core CPU"),
        (("cpu", "", 64), "many-core CPU"),
        (("cpu", "NumPy", 2), "NumPy on a CPU"),
        (("cuda", "Tesla T4", 1), "T4"),
        (("cuda", "NVIDIA A100-SXM4-80GB", 1), "A100"),
        (("cuda", "NVIDIA H200", 1), "H100"),
        (("cuda", "NVIDIA GeForce RTX 4090", 1), "A100"),
    ],
)
def test_a_device_has_the_profile_of_a_similar_one(device: tuple[str, str, int], name: str) -> None:
    assert typical(*device).name == name


def test_calibration_is_kept_for_later_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = lensor.machine("cpu")
    assert before in (TWO_CORES, MANY_CORES)
    found = lensor.calibrate("cpu")
    assert lensor.machine("cpu") is found
    for speed in (found.memory, found.cache, found.call, *(one.products.rate for one in found.speeds.values())):
        assert 0 < speed < math.inf
    monkeypatch.setattr(calibration, "_profiles", {})  # as in a later process
    again = lensor.machine("cpu")
    assert again is not found
    assert again == found


def test_numpy_is_calibrated_without_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "find_spec", lambda name: None)
    found = lensor.calibrate()
    assert "bfloat16" not in found.speeds
    assert lensor.machine() is found


def test_numpy_is_calibrated_for_its_own_dtypes() -> None:
    """JAX adds bfloat16 to NumPy, whose einsum refuses it."""
    pytest.importorskip("ml_dtypes")
    assert calibration._lacks(load("numpy"), "bfloat16", "cpu")
    assert not any(calibration._lacks(load("numpy"), dtype, "cpu") for dtype in ("float16", "float32", "float64"))


def test_the_smallest_copy_is_a_copy() -> None:
    for entries in (64, 1 << 15, 1 << 20):
        plan = calibration._copy(entries)
        assert plan.layouts[plan.result].copied
        assert math.prod(plan.shape) == entries


def test_calibration_takes_seconds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_BUDGET", 0.06)
    calls = []
    monkeypatch.setattr(calibration, "_shortest", lambda timed: calls.append(timed()) or 1e-3)
    lensor.calibrate()
    assert len(calls) * 0.06 <= 5  # each runs for its budget


def test_the_estimates_of_measured_plans_are_their_times(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If every plan takes as long as a profile says, calibration finds this profile."""
    single = TWO_CORES.speeds["float32"]
    kinds = {kind: Speed(getattr(single, kind).rate, 5e-6) for kind in Speeds.__dataclass_fields__}
    expected = replace(TWO_CORES, speeds={"float32": Speeds(**kinds)})

    class Run:
        def __init__(self, plan: Plan, backend: object) -> None:
            self.unchecked = lambda *arrays: plan

    monkeypatch.setattr(type(load("torch")), "device", lambda self, kind: ("cpu", "", 2))
    monkeypatch.setattr(calibration, "Runnable", Run)
    monkeypatch.setattr(type(load("torch")), "timed", lambda self, call, kind: estimate(call(), expected))
    monkeypatch.setattr(calibration, "_shortest", lambda timed: timed())
    found = lensor.calibrate("cpu")
    for name in ("memory", "cache", "call", "barrier"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=0.05), name
    for kind, speed in kinds.items():
        measured: Speed = getattr(found.speeds["float32"], kind)
        assert measured.rate == pytest.approx(speed.rate, rel=0.05), kind
        assert measured.setup == pytest.approx(speed.setup, rel=0.3, abs=2e-6), kind


def test_processes_may_write_at_the_same_time(folder: Path) -> None:
    key = ("cpu", "", 2)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: calibration._write(key, TWO_CORES), range(40)))
        found = list(pool.map(lambda _: calibration._read(key), range(40)))
    assert found == [TWO_CORES] * 40
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "value"), [("memory", 0.0), ("memory", -1.0), ("call", -1e-6), ("cache", math.inf), ("barrier", math.nan)]
)
def test_a_profile_has_plausible_numbers(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} is {value}, expected a .* finite number"):
        replace(TWO_CORES, **{name: value})


def test_a_profile_has_plausible_speeds() -> None:
    single = TWO_CORES.speeds["float32"]
    with pytest.raises(ValueError, match=r"the rate of batched in float32 is 0.0, expected a positive"):
        replace(TWO_CORES, speeds={"float32": replace(single, batched=Speed(0.0))})
    with pytest.raises(ValueError, match=r"speeds has the dtypes \['float64'\], expected at least float32"):
        replace(TWO_CORES, speeds={"float64": single})


def test_numpy_has_one_device() -> None:
    with pytest.raises(ValueError, match="device is 'cuda:0', expected 'cpu'"):
        load("numpy").example((1,), "float32", "cuda:0")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 2, "name": "x", "speeds": {}}'])
def test_a_damaged_file_is_not_used(folder: Path, text: str) -> None:
    key = ("cpu", "", 2)
    calibration._write(key, TWO_CORES)
    kept(folder).write_text(text, encoding="utf-8")
    with pytest.warns(UserWarning, match="the built-in profile is used instead"):
        assert calibration._read(key) is None


def test_a_file_of_another_version_is_left_alone(folder: Path) -> None:
    key = ("cpu", "", 2)
    calibration._write(key, TWO_CORES)
    record = json.loads(kept(folder).read_text(encoding="utf-8"))
    kept(folder).write_text(json.dumps({**record, "format": 0}), encoding="utf-8")
    assert calibration._read(key) is None


def test_the_same_profile_gives_the_same_plans(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load("torch")
    kind = backend.kind(backend.example((1,), "float32", "cpu"))
    assert profile_of(backend, kind) is profile_of(backend, kind)
    assert profile_of(None) is TWO_CORES
    net = lensor.ops.kfac_input_factor(lensor.ConvSpec(64, 64, (28, 28), 3, padding=1))
    plans = []
    for barrier in (1e-6, 1e-6, 1.0):
        profile = replace(TWO_CORES, barrier=barrier)
        monkeypatch.setattr(calibration, "_profiles", {backend.device(kind): profile})
        lensor.clear_caches()
        plans.append(net.plan(X=backend.example((8, 64, 28, 28), "float32", "cpu")))
    assert plans[0].steps == plans[1].steps
    # If barriers are dear, few calls are better than few flops.
    assert [plan.strategy for plan in plans] == ["lags", "lags", "windows"]
