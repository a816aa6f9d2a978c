"""Several processes give what one gives, whichever index they share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import lensor
from lensor import ConvSpec, distributed, ops
from lensor.lowering import axis_of, parts_of, sliceable
from tests.support.cases import BUILDERS, SPECS, assert_close, bound, operands_of

CASES = [
    (op, spec)
    for op in ("conv", "conv_weight_vjp", "kfac_input_factor", "kfac_input_factor, reduce", "ggn_diagonal", "ggn_gram")
    for spec in ("1-d", "depthwise", "circular")
]


def work(rank: int, count: int, folder: str) -> None:
    """What each process does: every case by the index that is chosen, the first also by all others."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count)
    found: dict[tuple, Any] = {}
    for op, spec in CASES:
        net = bound(BUILDERS[op](SPECS[spec]), 5)
        arrays = {name: torch.tensor(array) for name, array in operands_of(net).items()}
        found[op, spec, None] = distributed.evaluate(net, **arrays).numpy()
    net = BUILDERS["conv"](SPECS["1-d"])
    arrays = {name: torch.tensor(array) for name, array in operands_of(bound(net, 5)).items()}
    for index in sliceable(bound(net, 5)):
        found["conv", "1-d", index] = distributed.evaluate(net, index=index, **arrays).numpy()
    for arguments, message in (
        ({**arrays, "index": "nothing"}, "expected one that can be split"),
        ({"X": arrays["X"]}, "operand 'W' is missing"),
        ({**arrays, "W": arrays["W"].numpy()}, "operand 'W' has type ndarray, expected torch.Tensor"),
        ({**arrays, "W": arrays["W"].clone().requires_grad_()}, "operand 'W' requires a gradient"),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            distributed.evaluate(net, **arguments)
    np.save(f"{folder}/{rank}.npy", np.array([found], dtype=object), allow_pickle=True)
    dist.destroy_process_group()


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_give_what_one_process_gives(count: int, tmp_path: Path) -> None:
    processes = mp.start_processes(work, (count, str(tmp_path)), count, join=False, start_method="spawn")
    assert processes is not None
    ends = time.monotonic() + 900  # long enough on a machine that is busy with other work, too
    try:
        while not processes.join(timeout=5):  # true once all have ended
            assert time.monotonic() < ends, "the processes hang"
    finally:
        for process in processes.processes:
            process.kill()
    for rank in range(count):
        (found,) = np.load(tmp_path / f"{rank}.npy", allow_pickle=True)
        assert len(found) > len(CASES)
        for (op, spec, _), value in found.items():
            net = bound(BUILDERS[op](SPECS[spec]), 5)
            assert_close(value, net(**operands_of(net)))


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("op", BUILDERS)
def test_parts_of_every_index_make_up_the_whole(op: str, count: int) -> None:
    net = bound(BUILDERS[op](SPECS["1-d"]))
    operands = operands_of(net)
    expected = net(**operands)
    assert sliceable(net)
    for index in sliceable(net):
        values = [part(**operands) for part in parts_of(net, index, count)]
        axis = axis_of(net, index)
        assert_close(sum(values) if axis is None else np.concatenate(values, axis), expected)


def test_a_share_of_the_work_is_a_share_of_the_flops() -> None:
    net = ops.conv_weight_vjp(ConvSpec(8, 8, (16,), 3, padding=1)).bind(n=8)
    operands = operands_of(net)
    whole = net.plan(**operands).flops
    parts = [part.plan(**operands).flops for part in parts_of(net, "n", 4)]
    assert whole / 4 <= max(parts) <= 1.1 * whole / 4


def test_without_a_group() -> None:
    net = lensor.contraction("n i -> i", "X")
    with pytest.raises(RuntimeError, match="no process group is initialised"):
        distributed.evaluate(net, X=torch.ones(2, 3))
