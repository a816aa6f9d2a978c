"""KFAC for models sharded by `fully_shard`: ranks do what one process does with the whole batch, and can be resumed."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensor.curvature import kfac
from lensor.optim import KFAC
from tests.optim import fsdp_ranks
from tests.optim.fsdp_ranks import (
    CASES,
    CE,
    SMALL,
    accumulate,
    batch,
    discard,
    freeze,
    network,
    optimizer_of,
    repeat,
    scale,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:curvature is not supported")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(count: int, folder: Path, name: str, *arguments: Any) -> list[Any]:
    """Start ranks that run a function of `fsdp_ranks`; a server process imports it once and forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.optim.fsdp_ranks"])
    every = [
        context.Process(target=fsdp_ranks.rank, args=(rank, count, str(folder), name, arguments), daemon=True)
        for rank in range(count)
    ]
    for process in every:
        process.start()
    return every


def run(count: int, folder: Path, name: str, *arguments: Any) -> list[dict[str, Any]]:
    """Run a function on ranks, and return what each one returned."""
    processes, end = start(count, folder, name, *arguments), time.monotonic() + 240
    try:
        while any(process.is_alive() for process in processes):
            assert time.monotonic() < end, "the processes hang"
            assert all(process.exitcode in (None, 0) for process in processes)
            time.sleep(0.05)
        assert all(process.exitcode == 0 for process in processes)
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{name} {rank}", weights_only=True) for rank in range(count)]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def require_close(found: dict[str, Tensor], expected: dict[str, Tensor], accuracy: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=accuracy, atol=accuracy, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(
    ("count", "places"),
    [(2, range(len(CASES))), pytest.param(4, range(len(CASES)), marks=pytest.mark.slow)],
    ids=["2 ranks", "4 ranks"],
)
def test_ranks_take_the_steps_of_one_process(count: int, places: range, tmp_path: Path) -> None:
    found = run(count, tmp_path, "equal", places)
    for place in places:
        _, dtype, options = CASES[place]
        model = network(dtype)
        optimizer = optimizer_of(model, options)
        train(model, optimizer, range(4), dtype=dtype)
        for values, _, is_sharded in (one[f"case {place}"] for one in found):
            is_exact = dtype == torch.float64 and "factor_dtype" not in options  # which computes in single precision
            require_close(values, parameters(model), 1e-10 if is_exact else 1e-6)
            assert is_sharded
        owned = [name for one in found for name in one[f"case {place}"][1]]
        assert sorted(owned) == sorted(optimizer.inversion.blocks)


def test_passes_count_as_in_one_process(tmp_path: Path) -> None:
    found = run(2, tmp_path, "passes")
    for name, one in (("accumulate", accumulate), ("discard", discard)):
        for fisher in ("empirical", "type-2"):
            model = network()
            one(model, KFAC(model, CE, **SMALL, accumulation_steps=2 if one is accumulate else 1, fisher=fisher), batch)
            for which in (key for key in found[0] if key.startswith(f"{name} {fisher}")):
                for values in found:
                    require_close(values[which], parameters(model), 1e-10)
    for name, other, options in (("repeat", repeat, {}), ("freeze", freeze, {"inverse_interval": 4})):
        model = network()
        other(model, KFAC(model, CE, **SMALL, **options), batch)
        for values in found:
            require_close(values[name], parameters(model), 1e-10)
    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scale(model, KFAC(model, CE, **SMALL, grad_scaler=scaler), batch)
    assert scaler.get_scale() == 512.0
    for values in found:
        require_close(values["scale"], parameters(model), 1e-6)
    factors = kfac(network(torch.float32), CE, batch(0, dtype=torch.float32), fisher="empirical", bias="joint")
    model = network(torch.float32)
    train(model, KFAC(model, CE, **SMALL, kl_clip=None, momentum=0.0), range(1), dtype=torch.float32)
    start = parameters(network(torch.float32))
    for values in found:
        for name, (a, b) in values["mixed factors"].items():
            assert a.dtype == b.dtype == torch.float32
            assert torch.linalg.norm(a - factors[name].A) < 0.02 * torch.linalg.norm(factors[name].A)
            assert torch.linalg.norm(b - factors[name].B) < 0.05 * torch.linalg.norm(factors[name].B)
        error, step = (
            torch.cat([(values["mixed"][name] - p).flatten() for name, p in one.items()]).norm()
            for one in (parameters(model), start)
        )
        assert error < 0.05 * step


def test_errors_are_raised_on_all_ranks(tmp_path: Path) -> None:
    every = run(2, tmp_path, "errors", str(tmp_path))
    for rank, found in enumerate(every):
        assert "'1.weight' is not sharded, expected fully_shard for the whole model" in found["not sharded"]
        assert "expected one mesh of one dimension" in found["two dimensions"]
        assert "offloaded to the CPU" in found["offloaded"]
        assert "expected the same ranks" in found["group"]
        assert "expected False for a sharded model" in found["staggered"]
        assert "have not been summed over the ranks" in found["not summed"]
        assert found["not finite"].startswith("FloatingPointError")
        assert found["unchanged"]
        assert found["started"]  # the sums of factors, during the backward pass
        assert ("LinAlgError" if rank else "another rank raised an error") in found["one rank"]
        assert found["steps"] == 2
        assert "a state of a sharded model can be loaded on the same number of ranks" in found["other ranks"]
        assert found["other optimizer"].startswith("KeyError")
        assert found["saved by rank"]
    assert sorted(every[0]["uneven"] + every[1]["uneven"]) == ["0.conv.weight", "1.conv.weight", "3.weight", "5.weight"]


@pytest.mark.slow
def test_killed_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    processes, end, last = start(2, tmp_path, "save_for_ever", str(tmp_path)), time.monotonic() + 120, tmp_path / "last"
    try:
        while not (last.exists() and int(last.read_text()) >= 4):
            assert all(process.is_alive() for process in processes)
            assert time.monotonic() < end
            time.sleep(0.01)
        processes[1].kill()
        processes[1].join()
    finally:
        for process in processes:
            process.kill()
    _require_resumed(run(2, tmp_path, "resume", str(tmp_path)))


@pytest.mark.slow
def test_states_without_momentum_are_resumed(tmp_path: Path) -> None:
    _require_resumed(run(2, tmp_path, "without_momentum", str(tmp_path)))


def _require_resumed(every: list[dict[str, Any]]) -> None:
    for found in every:
        assert found["resumed"].keys() == found["expected"].keys()
        for name, value in found["expected"].items():
            assert torch.equal(found["resumed"][name], value)
