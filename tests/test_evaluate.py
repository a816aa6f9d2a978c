"""Evaluation: threads and forks, operands and results, dtypes, sums of squares and empty batches."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import lensor
from lensor import IndexPattern, ops
from lensor.kernels import load
from lensor.lowering import STRATEGIES, candidates, lower
from lensor.plan.steps import SumSquares
from lensor.runtime import run
from tests.support.cases import BUILDERS, SMALL, SPEC, SPECS, assert_close, bound, live_caches, operands_of, tensors
from tests.support.dense import evaluate_dense


# --------------------------------------------------------------------------------------------------- threads and forks
def test_two_threads_at_once() -> None:
    nets = [bound(builder(SPECS[spec])) for builder in list(BUILDERS.values())[::3] for spec in ("1-d", "reflect")]
    cases = [(net, operands_of(net)) for net in nets]
    expected = [evaluate_dense(net, operands) for net, operands in cases]
    threads = 4
    ready = threading.Barrier(threads)

    def work(seed: int) -> float:
        worst = 0.0
        ready.wait()
        for at in np.random.default_rng(seed).permutation(len(cases)):
            net, operands = cases[at]
            arrays: Any = tensors(operands) if seed % 2 else operands
            worst = max(worst, float(np.abs(np.asarray(net(**arrays)) - expected[at]).max()))
            if at % 5 == 0:
                lensor.clear_caches()
        return worst

    lensor.clear_caches()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(threads) as pool:
            assert max(pool.map(work, range(threads), timeout=120)) < 1e-9
    finally:
        sys.setswitchinterval(interval)


def test_one_plan_in_two_threads() -> None:
    net = ops.kfac_input_factor(SPEC)
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((3, 4, 6, 5)) for _ in range(40)]
    plan = net.plan(X=xs[0])
    expected = [evaluate_dense(net, {"X": x}) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(lambda x: plan(X=x), xs), expected, strict=True):
            assert_close(found, wanted)


def test_settings_of_planning_hold_in_their_own_thread() -> None:
    inside, outside = threading.Event(), threading.Event()
    found: list[Any] = []

    def other() -> None:
        inside.wait(30)
        with lensor.planning() as settings:
            found.append(settings.max_bytes)
        outside.set()

    thread = threading.Thread(target=other)
    thread.start()
    with lensor.planning(max_bytes=1234) as settings:
        inside.set()
        outside.wait(30)
        found.append(settings.max_bytes)
    thread.join(30)
    assert found == [None, 1234]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_a_fork_the_child_evaluates() -> None:
    """Another thread holds every lock at the moment of the fork; the child starts with locks of its own."""
    net = ops.conv(SPEC)
    operands = operands_of(bound(net))
    expected = net(**operands)
    caches = live_caches()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        for cache in caches:
            cache._lock.acquire()
        held.set()
        release.wait(60)
        for cache in caches:
            cache._lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(30)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forks with threads
            child = os.fork()
        if child == 0:  # only NumPy: torch's own threads do not survive a fork
            status = 1
            try:
                import signal

                signal.alarm(30)
                again = net(**operands)
                other = ops.conv_weight_vjp(SMALL)
                shapes = operands_of(bound(other))
                fresh = np.abs(other(**shapes) - evaluate_dense(other, shapes)).max() < 1e-10
                lensor.clear_caches()
                status = 0 if fresh and np.array_equal(again, expected) else 2
            finally:
                os._exit(status)
    finally:
        release.set()
        thread.join(30)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert_close(net(**operands), expected, 0)


# ------------------------------------------------------------------------------- nothing is changed, nothing is shared
@pytest.mark.parametrize("spec", ["1-d", "dense", "circular"])
@pytest.mark.parametrize("op", BUILDERS)
def test_operands_stay_and_results_are_one_s_own(op: str, spec: str) -> None:
    """Writing all over a result changes neither operands nor what the next call finds."""
    net = bound(BUILDERS[op](SPECS[spec]))
    operands = operands_of(net)
    before = {name: array.copy() for name, array in operands.items()}
    for array in operands.values():
        array.flags.writeable = False
    first = net(**operands)
    expected = first.copy()
    first[...] = np.nan
    assert_close(net(**operands), expected, 0)
    assert all(np.array_equal(operands[name], before[name]) for name in operands)
    ours = tensors(operands)
    versions = {name: tensor._version for name, tensor in ours.items()}
    result = net(**ours)
    wanted = result.clone()
    result.fill_(np.nan)
    assert_close(net(**ours), wanted, 0)
    assert {name: tensor._version for name, tensor in ours.items()} == versions
    assert all(np.array_equal(ours[name].numpy(), before[name]) for name in ours)


VIEWS = {
    "the operand itself": ("n i -> n i", ["X"]),
    "its transpose": ("n i -> i n", ["X"]),
    "regrouped": ("n i -> (n i)", ["X"]),
    "its diagonal": ("n n -> n", ["X"]),
    "repeated along ones": ("n i, m -> n m i", ["X", "1"]),
    "repeated twice": ("n i, m, l -> m n l i", ["X", "1", "1"]),
    "a crop": ("n i, i o k -> n o", ["X", IndexPattern(3, 1, padding=(-1, -1))]),
    "every other": ("n i, i o k -> n o", ["X", IndexPattern(3, 1, stride=2)]),
    "patches": ("n i, i o k -> n o k", ["X", IndexPattern(3, 2)]),
    "a delta": ("a b -> a b", ["δ"]),
    "ones": ("a, b -> a b", ["1", "1"]),
    "a pattern": ("i o k -> i o k", [IndexPattern(5, 3)]),
    "a pattern's sum": ("i o k -> i k", [IndexPattern(5, 3)]),
    "an axis of length one": ("n i -> n () i", ["X"]),
}


@pytest.mark.parametrize("name", VIEWS)
def test_results_that_could_be_views(name: str) -> None:
    text, nodes = VIEWS[name]
    net = lensor.contraction(text, *nodes)
    net = net.bind({index: 3 for index, size in net.sizes.items() if size is None})
    x = np.arange(9.0).reshape(3, 3)
    operands = {"X": x} if "X" in nodes else {}
    expected = evaluate_dense(net, operands)
    for strategy in STRATEGIES:
        for plan in (lower(net, strategy), lower(net.simplify(), strategy)):
            plan = type(plan)(
                plan.subscripts, plan.steps, plan.shapes, plan.result, plan.name, runner=lensor.evaluate.run
            )
            for _ in range(2):
                found = plan(**operands)
                assert_close(found, expected)
                assert not np.shares_memory(found, x)
                found += 1  # each entry is one of its own
                assert_close(found, expected + 1)
            if operands:
                tensor = torch.tensor(x)
                for _ in range(2):
                    found = plan(X=tensor)
                    assert_close(found, expected)
                    found += 1
                    assert_close(found, expected + 1)
                assert_close(tensor, x, 0)
    for _ in range(2):
        found = net(**operands)
        assert_close(found, expected)
        found += 1
        assert_close(found, expected + 1)
    assert_close(x, np.arange(9.0).reshape(3, 3), 0)


def test_einsum_s_results_are_one_s_own() -> None:
    x, pi = np.arange(6.0).reshape(2, 3), IndexPattern(5, 3)
    for text, operands in [("i j -> i j", [x]), ("i o k -> i o k", [pi]), ("i o k -> o k", [pi]), ("i j -> j i", [x])]:
        first = lensor.einsum(text, *operands)
        expected = first.copy()
        first[...] = -1
        assert_close(lensor.einsum(text, *operands), expected, 0)
    assert_close(x, np.arange(6.0).reshape(2, 3), 0)


def test_operands_of_any_memory_layout() -> None:
    net = bound(ops.ggn_diagonal(SPECS["2-d"]))
    operands = operands_of(net)
    expected = evaluate_dense(net, operands)
    turned = {name: np.asfortranarray(array) for name, array in operands.items()}
    spaced = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in operands.items()}
    backwards = {name: array[::-1].copy()[::-1] for name, array in operands.items()}
    for arrays in (turned, spaced, backwards):
        assert_close(net(**arrays), expected)
    columns = {name: torch.tensor(array).mT.contiguous().mT for name, array in operands.items()}
    assert_close(net(**columns), expected)
    last = torch.tensor(operands["X"]).to(memory_format=torch.channels_last)
    assert_close(net(X=last, S=torch.tensor(operands["S"])), expected)
    once = {name: np.broadcast_to(array[:1], array.shape) for name, array in operands.items()}
    assert_close(net(**once), evaluate_dense(net, once))
    assert_close(
        net(**{n: torch.tensor(a[:1]).expand(a.shape) for n, a in operands.items()}), evaluate_dense(net, once)
    )


# -------------------------------------------------------------------------------------------------------------- dtypes
def test_mixed_and_integer_dtypes_are_refused() -> None:
    net = ops.conv(SPEC)
    operands = operands_of(bound(net))
    x, w = operands["X"], operands["W"]
    with pytest.raises(TypeError, match="float32, expected float64"):
        net(X=x, W=w.astype(np.float32))
    with pytest.raises(TypeError, match="W has dtype complex128, expected float64, the dtype of X"):
        net(X=x, W=w.astype(np.complex128))
    with pytest.raises(TypeError, match="X has dtype int64, expected a floating or complex dtype"):
        net(X=np.ones(x.shape, int), W=w)
    for dtype in (bool, np.uint8, object):
        with pytest.raises(TypeError, match="expected a floating or complex dtype"):
            net(X=np.ones(x.shape, dtype), W=np.ones(w.shape, dtype))
    ours = tensors(operands)
    with pytest.raises(TypeError, match=r"torch\.float32, expected torch\.float64"):
        net(X=ours["X"], W=ours["W"].float())
    for dtype in (torch.int64, torch.bool, torch.uint8):
        with pytest.raises(TypeError, match="expected a floating or complex dtype"):
            net(X=ours["X"].to(dtype), W=ours["W"].to(dtype))
    with pytest.raises(TypeError, match="expected an array of NumPy, torch or JAX"):
        net(X=x.tolist(), W=w)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, np.complex64, np.complex128])
@pytest.mark.parametrize("op", BUILDERS)
def test_results_have_the_operands_dtype(op: str, dtype: Any) -> None:
    net = bound(BUILDERS[op](SPECS["1-d"]))
    rng = np.random.default_rng(1)
    operands = {name: array.astype(dtype) for name, array in operands_of(net).items()}
    if np.issubdtype(dtype, np.complexfloating):
        operands = {
            name: array + 1j * rng.standard_normal(array.shape).astype(dtype) for name, array in operands.items()
        }
        operands = {name: array.astype(dtype) for name, array in operands.items()}
    found = net(**operands)
    assert found.dtype == dtype
    expected = evaluate_dense(net, operands)
    tolerance = {2: 5e-2, 4: 1e-4}.get(np.finfo(dtype).dtype.itemsize, 1e-10)
    assert_close(found, expected.astype(found.dtype), tolerance)
    if dtype is not np.longdouble:
        ours = {name: torch.from_numpy(array.copy()) for name, array in operands.items()}
        result = net(**ours)
        assert result.dtype == next(iter(ours.values())).dtype
        assert_close(result.numpy(), expected.astype(found.dtype), tolerance)


def test_half_precision_of_torch() -> None:
    net = bound(ops.kfac_input_factor(SPECS["2-d"]))
    x = torch.tensor(operands_of(net)["X"])
    found = net(X=x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert_close(found.double(), net(X=x.bfloat16().double()), 5e-2)


# ------------------------------------------------------------------------------------------------------ sums of squares
@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_sums_of_squares(axes: tuple[int, ...], backend: str) -> None:
    x = np.random.default_rng(0).standard_normal((5, 4, 3)).transpose(2, 0, 1)
    array = torch.from_numpy(x) if backend == "torch" else x
    found = load(backend).steps[SumSquares](SumSquares((0,), axes))(array)
    assert_close(found, np.square(x).sum(axes))


def test_sums_of_squares_in_half_precision_lose_no_digits() -> None:
    """Terms of 2.25 to sums of which the nearest numbers are 2 apart."""
    x = torch.full((200, 2), 1.5, dtype=torch.bfloat16)
    found = load("torch").steps[SumSquares](SumSquares((0,), (0,)))(x)
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [450.0, 450.0]


@pytest.mark.parametrize("name", SPECS)
def test_ggn_diagonals_part_by_part(name: str) -> None:
    """Slices are candidates, each right, with one half of the square at a time in memory."""
    net = bound(ops.ggn_diagonal(SPECS[name]))
    operands = operands_of(net)
    expected = evaluate_dense(net, operands)
    sliced = [plan for plan in candidates(net) if "parts" in plan.name]
    assert sliced
    for plan in sliced:
        assert any(isinstance(step, SumSquares) for step in plan.steps)
        for arrays in (operands, {key: torch.from_numpy(array) for key, array in operands.items()}):
            assert_close(run(plan, arrays), expected)
    assert not any("parts" in plan.name for plan in candidates(net, in_parts=False))
    half = net.plan(**{key: array.astype(np.float16) for key, array in operands.items()})
    assert not any("parts" in candidate.name for candidate in half.candidates)


# ------------------------------------------------------------------------------------------------------- empty batches
WITHOUT_BATCH = ("unfolded_kernel", "hessian_backprop")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", [op for op in BUILDERS if op not in WITHOUT_BATCH])
def test_empty_batches(op: str, spec: str) -> None:
    """Sums over nothing are zero; averages over nothing are not defined."""
    net = BUILDERS[op](SPECS[spec])
    unknown = {index: 2 if index in ("v", "w") else 0 for index, size in net.sizes.items() if size is None}
    assert "n" in unknown
    if any(term.scale.powers for term in net.terms):
        x = operands_of(bound(net))["X"]
        with pytest.raises(ValueError, match=r"index .* has size 0, expected at least 1"):
            net.bind(unknown)
        with pytest.raises(ValueError, match=r"index .* has size 0, expected at least 1"):
            net(X=x[:0])
        return
    net = net.bind(unknown)
    operands = operands_of(net)
    assert_close(net(**operands), np.zeros(net.output_shape), 0)
    if operands:
        assert_close(net(**tensors(operands)), np.zeros(net.output_shape), 0)


def test_empty_classes_and_gradients_of_nothing() -> None:
    net = ops.ggn_diagonal(SPEC)
    found = net(X=np.ones((2, 4, 6, 5)), S=np.ones((0, 2, 6, 3, 4)))
    assert_close(found, np.zeros((6, 2, 3, 2)), 0)
    x = torch.zeros(0, 4, 6, 5, dtype=torch.double, requires_grad=True)
    w = torch.ones(6, 2, 3, 2, dtype=torch.double, requires_grad=True)
    ops.conv(SPEC)(X=x, W=w).sum().backward()
    assert_close(w.grad, np.zeros(w.shape), 0)
    assert x.grad is not None
    assert x.grad.shape == x.shape
