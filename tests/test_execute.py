"""Evaluation: caches, threads and forks, what is never changed or shared, plans, errors, dtypes and gradients."""

from __future__ import annotations

import gc
import os
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import lensor
from lensor import ConvSpec, IndexPattern, ops
from lensor.cache import Cache
from lensor.kernels import load
from lensor.lowering import STRATEGIES, candidates, lower
from lensor.plan.steps import Convolution, Gather, SumSquares
from lensor.runtime import run
from tests.cases import BUILDERS, SPECS, assert_close, bound, operands_of
from tests.dense import evaluate_dense

SPEC = ConvSpec(4, 6, (6, 5), (3, 2), stride=(2, 1), padding=(1, 0), groups=2)
SMALL = ConvSpec(2, 2, (5,), 3, stride=2, padding=1, groups=2)


def tensors(operands: dict[str, np.ndarray], **options: Any) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(array, **options) for name, array in operands.items()}


def live_caches() -> list[Cache]:
    return [thing for thing in gc.get_objects() if type(thing) is Cache]


# -------------------------------------------------------------------------------------------------------------- caches
def test_every_cache_is_bounded() -> None:
    caches = live_caches()
    assert caches
    assert all(0 < cache.maxsize <= 4096 for cache in caches)
    for at in range(1, 40):
        net = lensor.contraction("n i, i o k -> n o k", "X", IndexPattern(at + 3, 3, padding=at % 2))
        net(X=np.ones((2, at + 3)))
        net(X=torch.ones(2, at + 3))
        lensor.einsum("i -> i", np.ones(at))
    assert all(len(cache) <= cache.maxsize for cache in caches)
    lensor.clear_caches()
    assert not any(len(cache) for cache in caches)


def test_a_cache_forgets_what_was_used_longest_ago() -> None:
    cache = Cache(maxsize=3)
    for key in "abc":
        cache.put(key, key.upper())
    assert cache.get("a") == "A"
    cache.put("d", "D")
    assert [cache.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    assert len(cache) == 3
    made = []
    assert cache.get_or_make("a", lambda: made.append(1)) == "A"
    assert not made
    with pytest.raises(ZeroDivisionError):
        cache.get_or_make("e", lambda: 1 / 0)
    assert cache.get("e") is None
    cache.clear()
    assert len(cache) == 0


def test_many_different_networks_do_not_fill_memory() -> None:
    caches = {id(cache): cache for cache in live_caches()}
    sizes = {at: cache.maxsize for at, cache in caches.items()}
    lensor.clear_caches()
    try:
        for cache in caches.values():
            cache.maxsize = 5
        for at in range(12):
            pattern = IndexPattern(7 + at, 3, stride=2, padding=1)
            assert_close(lensor.einsum("i, i o k -> o k", np.ones(7 + at), pattern).sum(), pattern.nnz)
        assert all(len(cache) <= 5 for cache in caches.values())
    finally:
        for at, cache in caches.items():
            cache.maxsize = sizes[at]


def test_caches_can_be_cleared() -> None:
    net = ops.conv(SPEC)
    operands = operands_of(bound(net))
    expected = net(**operands)
    net(**tensors(operands))
    lensor.einsum("i o k, i -> o k", SPEC.patterns[0], np.ones(6))
    assert any(len(cache) for cache in live_caches())
    lensor.clear_caches()
    assert all(len(cache) == 0 for cache in live_caches())
    assert_close(net(**operands), expected, 0)
    plan = net.plan(**operands)
    lensor.clear_caches()
    assert_close(plan(**operands), expected, 0)
    assert_close(plan(**tensors(operands)), expected)


def test_plans_are_kept_for_networks_equal_up_to_names() -> None:
    net = ops.weight_vjp(SPEC)
    operands = operands_of(bound(net))
    plan = net.plan(**operands)
    assert net.plan(**operands) is plan
    assert ops.weight_vjp(SPEC).plan(**operands) is plan
    assert net.rename(n="batch", k1="a").plan(**operands) is plan
    assert net.plan(**{name: array[:1] for name, array in operands.items()}) is not plan
    assert net.plan(**{name: array.astype(np.float32) for name, array in operands.items()}) is not plan


def test_a_plan_kept_for_one_network_never_serves_a_similar_one() -> None:
    x, w = np.arange(12.0).reshape(3, 4), np.arange(12.0).reshape(4, 3) / 7
    for text, expected in [
        ("n i, i m -> n m", x @ w),
        ("n i, i m -> m n", (x @ w).T),
        ("n i, i n -> ", (x * w.T).sum()),
    ]:
        for names in (("X", "W"), ("W", "X")):
            net = lensor.contraction(text, *names)
            assert_close(net(**dict(zip(names, (x, w), strict=True))), expected)
    for factor in (1, 2, "1/3"):
        assert_close(
            lensor.contraction("n i, i m -> n m", "X", "W").scaled(factor)(X=x, W=w), x @ w * eval(str(factor))
        )
    # A size that is given by keyword is part of the key.
    ones = lensor.contraction("n, m -> n m", "X", "1")
    assert [ones(X=x[0], m=size).shape for size in (2, 3, 2)] == [(4, 2), (4, 3), (4, 2)]
    # A sum whose terms tell each other sizes by name.
    spread = lensor.contraction("n, m -> n m", "X", "1") + lensor.contraction("n, m -> n m", "1", "Y")
    assert_close(spread(X=x[0], Y=x[:, 0]), x[0][:, None] + x[:, 0])


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
                other = ops.weight_vjp(SMALL)
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


# --------------------------------------------------------------------------------------------------------------- plans
@pytest.mark.parametrize("op", BUILDERS)
def test_plans_print_themselves(op: str) -> None:
    net = bound(BUILDERS[op](SPECS["1-d"]))
    plan = net.plan(**operands_of(net))
    lines = str(plan).splitlines()
    peak = f"peak size {plan.peak_size:,} ({8 * plan.peak_size:,} bytes)"
    assert lines[0] == f"plan: {plan.flops:,} flops, {plan.bytes:,} bytes moved, {peak}, by {plan.name}"
    assert lines[1] == f"  network: {plan.subscripts}"
    assert lines.pop(2) == f"  chosen: {plan.reason}"
    considered = [line for line in lines if line.startswith("  considered: ")]
    assert len(considered) == len(plan.candidates) >= 1
    assert considered[0].startswith(f"  considered: {plan.name}: {plan.flops:,} flops")
    table = lines[2 + len(considered) :]
    assert table[0].split() == ["value", "step", "takes", "shape", "flops", "bytes", "settings"]
    assert len(table) == 1 + len(plan.steps)
    for place, (line, step) in enumerate(zip(table[1:], plan.steps, strict=True)):
        assert line.startswith(f"  %{place} ")
        assert step.name in line
        assert f"{plan.step_flops(place):,}" in line
        assert f"{plan.step_bytes(place):,}" in line
        assert line == line.rstrip()
        assert all(at < place for at in step.takes)
    assert plan.flops == sum(plan.step_flops(place) for place in range(len(plan.steps)))
    assert plan.bytes == sum(plan.step_bytes(place) for place in range(len(plan.steps)))
    assert plan.shape == net.output_shape
    assert set(plan.operands) == set(net.operand_names)


def test_plans_say_why_they_were_chosen() -> None:
    net = ops.conv(SPEC)
    operands = {name: array.shape for name, array in operands_of(bound(net)).items()}
    plan = net.plan(**operands)
    count = len(plan.candidates)
    assert plan.reason == f"the least estimated time of {count} candidates"
    arrays = {name: np.ones(shape) for name, shape in operands.items()}
    assert net.plan(**arrays, effort="measure").reason == f"the least measured time of {count} candidates"
    smallest = min(candidate.peak_size for candidate in plan.candidates)
    assert net.plan(**arrays, max_bytes=8 * smallest).reason.endswith(f"within {8 * smallest:,} bytes")


def test_plans_of_shapes_are_plans_of_arrays() -> None:
    net = ops.conv(SPEC)
    operands = operands_of(bound(net))
    shapes = {name: array.shape for name, array in operands.items()}
    plan = net.plan(**shapes)
    assert_close(plan(**operands), net(**operands))
    assert_close(net.plan(X=operands["X"], W=shapes["W"])(**operands), net(**operands))
    assert net.plan(X=list(shapes["X"]), W=torch.Size(shapes["W"])).steps == plan.steps
    free = lensor.contraction("n i, m -> n m", "X", "1")
    assert free.plan(X=(2, 3), m=4).shape == (2, 4)
    assert free.plan(X=(2, 3), m=np.int64(4)).shape == (2, 4)


def test_flops_of_a_matrix_product() -> None:
    plan = lensor.contraction("n i, i m -> n m", "X", "W").plan(X=(3, 4), W=(4, 5))
    assert plan.flops == 2 * 3 * 4 * 5
    assert plan.peak_size >= 15


ERRORS = [
    (TypeError, "operand 'W' is missing", lambda net, x, w, run: run(X=x)),
    (TypeError, "unknown operand 'Z'", lambda net, x, w, run: run(X=x, W=w, Z=x)),
    (TypeError, "operand 'X' is missing", lambda net, x, w, run: run(Y=x, W=w)),
    (ValueError, "'i1' has size 7", lambda net, x, w, run: run(X=np.ones((2, 4, 7, 5)), W=w)),
    (ValueError, "X has 3 axes .*expected 4", lambda net, x, w, run: run(X=x[0], W=w)),
    (ValueError, "W has 5 axes", lambda net, x, w, run: run(X=x, W=w[None])),
    (ValueError, r"has size 5 in W|'c_out' .* 5|size 5, expected", lambda net, x, w, run: run(X=x, W=w[:5])),
    (ValueError, "size 4, got 5|'c_in' has size", lambda net, x, w, run: run(X=x, W=w, c_in=5)),
]


@pytest.mark.parametrize(("kind", "message", "call"), ERRORS, ids=[case[1] for case in ERRORS])
def test_wrong_operands(kind: type[Exception], message: str, call: Any) -> None:
    net = ops.conv(SPEC)
    x, w = np.ones((2, 4, 6, 5)), np.ones((6, 2, 3, 2))
    with pytest.raises(kind, match=message):
        call(net, x, w, net)
    with pytest.raises(kind, match=message):
        call(net, x, w, net.plan)


def test_an_unknown_size_is_asked_for() -> None:
    net = ops.input_jacobian(SMALL)
    w = np.ones((2, 1, 3))
    for call in (net, net.plan):
        with pytest.raises(ValueError, match=r"no operand tells the size of index 'n': give it as a keyword, n=\.\.\."):
            call(W=w)
        with pytest.raises(ValueError, match="'n' has size unknown, got -1"):
            call(W=w, n=-1)
        with pytest.raises(TypeError):
            call(W=w, n=2.5)
    assert net(W=w, n=2).shape == net.bind(n=2)(W=w).shape == (2, 2, 3, 2, 2, 5)
    assert net(W=w, n=0).shape == (0, 2, 3, 0, 2, 5)


def test_wrong_operands_of_a_plan() -> None:
    net = ops.conv(SPEC)
    operands = operands_of(bound(net))
    x, w = operands["X"], operands["W"]
    plan = net.plan(X=x, W=w)
    with pytest.raises(TypeError, match="operand 'W' is missing"):
        plan(X=x)
    with pytest.raises(TypeError, match="unknown operand 'Z'"):
        plan(X=x, W=w, Z=x)
    with pytest.raises(ValueError, match=r"operand 'X' has shape \(1, 4, 6, 5\), expected \(2, 4, 6, 5\)"):
        plan(X=x[:1], W=w)
    with pytest.raises(TypeError, match="one framework, found numpy and torch"):
        plan(X=x, W=torch.tensor(w))
    with pytest.raises(ValueError, match="effort must be 'estimate', 'measure' or 'remember', found 'guess'"):
        net.plan(X=x, W=w, effort="guess")
    with pytest.raises(ValueError, match="max_bytes is 8, but the smallest plan needs"):
        net.plan(X=x, W=w, max_bytes=8)
    with pytest.raises(ValueError, match="max_bytes must be at least 1, found 0"):
        net.plan(X=x, W=w, max_bytes=0)


def test_measured_plans_give_the_same() -> None:
    net = ops.weight_vjp(SPEC)
    operands = operands_of(bound(net))
    plan = net.plan(effort="measure", **operands)
    assert plan.candidates[0].measured is not None
    assert "measured" in str(plan)
    assert_close(plan(**operands), evaluate_dense(net, operands))
    with lensor.planning(effort="measure"):
        assert net.plan(**operands) is plan
        assert_close(net(**tensors(operands)), evaluate_dense(net, operands))
        gradient = grad(lambda x: net(X=x, V=torch.tensor(operands["V"])).square().sum())(torch.tensor(operands["X"]))
    assert_close(
        gradient,
        grad(lambda x: net(X=x, V=torch.tensor(operands["V"])).square().sum())(torch.tensor(operands["X"])),
    )


@pytest.mark.parametrize("op", ["kfac_input_factor", "ggn_diagonal"])
def test_plans_within_a_memory_limit(op: str) -> None:
    net = bound(BUILDERS[op](ConvSpec(4, 6, (12,), 3, padding=1)), 6)
    operands = operands_of(net)
    expected = evaluate_dense(net, operands)
    smallest = min(lower(net.simplify(), strategy).peak_size for strategy in STRATEGIES)
    limit = 8 * smallest - 1  # none of the candidates fits: an index is worked through part by part
    assert limit >= expected.nbytes
    plan = net.plan(max_bytes=limit, **operands)
    assert 8 * plan.peak_size <= limit
    assert "parts" in plan.name
    assert_close(plan(**operands), expected)
    assert_close(plan(**tensors(operands)), expected)


# -------------------------------------------------------------------------------------------------------------- dtypes
def test_mixed_and_integer_dtypes_are_refused() -> None:
    net = ops.conv(SPEC)
    operands = operands_of(bound(net))
    x, w = operands["X"], operands["W"]
    with pytest.raises(TypeError, match="float32, expected float64"):
        net(X=x, W=w.astype(np.float32))
    with pytest.raises(TypeError, match="W has dtype complex128, expected float64 as X has: one dtype for all"):
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
    with pytest.raises(TypeError, match="expected an array of NumPy or torch, found"):
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
        with pytest.raises(ValueError, match=r"the average over index .* is not defined"):
            net.bind(unknown)
        with pytest.raises(ValueError, match=r"the average over index .* is not defined"):
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


# ----------------------------------------------------------------------------------------------------------- gradients
GRADIENT_CASES = [
    ("conv", "1-d"),
    ("conv", "circular"),
    ("conv", "transposed"),
    ("conv", "down-sampling"),
    ("unfold", "1-d"),
    ("fold", "1-d"),
    ("weight_vjp", "1-d"),
    ("input_vjp", "depthwise"),
    ("kfac_input_factor", "circular"),
    ("kfac_input_factor, reduce", "circular"),
    ("kfac_input_factor, bias", "circular"),
    ("ggn_diagonal", "depthwise"),
    ("hessian_backprop", "depthwise"),
    ("hessian_diagonal_input", "circular"),
    ("kfac_output_factor", "depthwise"),
    ("unfolded_kernel", "depthwise"),
]


@pytest.mark.parametrize(("op", "spec"), GRADIENT_CASES)
def test_gradients_of_first_and_second_order(op: str, spec: str) -> None:
    net = bound(BUILDERS[op](SPECS[spec]), 1)
    ours = tensors(operands_of(net), requires_grad=True)
    names = list(ours)

    def call(*values: torch.Tensor) -> torch.Tensor:
        return net(**dict(zip(names, values, strict=True)))

    result = call(*ours.values())
    assert result.requires_grad
    assert gradcheck(call, tuple(ours.values()), fast_mode=True)
    assert gradgradcheck(call, tuple(ours.values()), fast_mode=True)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_by_every_candidate(spec: str) -> None:
    """Whatever plan is chosen, autograd's gradient is the network's own VJP."""
    for op in ("conv", "weight_vjp", "kfac_input_factor"):
        net = bound(BUILDERS[op](SPECS[spec]))
        operands = operands_of(net)
        cotangent = np.random.default_rng(2).standard_normal(net.output_shape)
        for name in operands:
            given = dict(operands, U=cotangent)
            vjp_ = net.vjp(name, "U")
            expected = evaluate_dense(vjp_, {key: given[key] for key in vjp_.operand_names})
            for strategy in STRATEGIES:
                plan = lower(net.simplify(), strategy)
                plan = type(plan)(
                    plan.subscripts, plan.steps, plan.shapes, plan.result, plan.name, runner=lensor.evaluate.run
                )
                ours = tensors(operands, requires_grad=True)
                (found,) = torch.autograd.grad(plan(**ours), ours[name], torch.tensor(cotangent))
                assert_close(found, expected)


def test_no_gradient_where_none_is_asked_for() -> None:
    net = ops.conv(SPEC)
    ours = tensors(operands_of(bound(net)))
    assert not net(**ours).requires_grad
    ours["W"].requires_grad_()
    with torch.no_grad():
        assert not net(**ours).requires_grad
    with torch.inference_mode():
        inside = net(**ours)
    assert_close(net(**ours).detach(), inside)
    lensor.clear_caches()
    with torch.inference_mode():  # constants made here serve gradients later
        ops.kfac_input_factor(SPEC, "reduce")(X=ours["X"])
        ops.conv(SPECS["circular"])(
            X=torch.ones(2, 2, 6, dtype=torch.double), W=torch.ones(4, 2, 3, dtype=torch.double)
        )
    x = ours["X"].clone().requires_grad_()
    ops.kfac_input_factor(SPEC, "reduce")(X=x).sum().backward()
    assert x.grad is not None
    y = torch.ones(2, 2, 6, dtype=torch.double, requires_grad=True)
    ops.conv(SPECS["circular"])(X=y, W=torch.ones(4, 2, 3, dtype=torch.double)).sum().backward()
    assert y.grad is not None


def conv(x: Any, w: Any) -> Any:
    return torch.nn.functional.conv2d(x, w, None, (2, 1), (1, 0), 1, 2)


def test_function_transforms_over_a_call() -> None:
    net = ops.conv(SPEC)
    ours = tensors(operands_of(bound(net)))
    x, w = ours["X"], ours["W"]

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return net(X=x, W=w)

    def loss(function: Any) -> Any:
        return lambda x, w: function(x, w).pow(3).sum()

    for argument in (0, 1):
        assert_close(grad(loss(call), argument)(x, w), grad(loss(conv), argument)(x, w))
        assert_close(jacrev(call, argument)(x, w), jacrev(conv, argument)(x, w))
        assert_close(jacfwd(call, argument)(x, w), jacfwd(conv, argument)(x, w))
    assert_close(hessian(loss(call), 1)(x, w), hessian(loss(conv), 1)(x, w))
    tangents = (torch.randn_like(x), torch.randn_like(w))
    for found, expected in zip(jvp(call, (x, w), tangents), jvp(conv, (x, w), tangents), strict=True):
        assert_close(found, expected)
    xs, ws = torch.randn(3, *x.shape, dtype=x.dtype), torch.randn(*w.shape, 3, dtype=x.dtype)
    assert_close(vmap(call, (0, None))(xs, w), vmap(conv, (0, None))(xs, w))
    assert_close(vmap(call, (None, -1))(x, ws), vmap(conv, (None, -1))(x, ws))
    assert_close(vmap(call, (0, -1), 1)(xs, ws), vmap(conv, (0, -1), 1)(xs, ws))
    # Gradients of every example, of which vmap is made for.
    one = vmap(grad(lambda w, x: loss(call)(x[None], w)), (None, 0))(w, x)
    assert_close(one, vmap(grad(lambda w, x: loss(conv)(x[None], w)), (None, 0))(w, x))
    # Transforms inside each other.
    inner = vmap(lambda t: jvp(grad(loss(call), 1), (x, w), (torch.zeros_like(x), t))[1])(ws.movedim(-1, 0))
    assert_close(
        inner, vmap(lambda t: jvp(grad(loss(conv), 1), (x, w), (torch.zeros_like(x), t))[1])(ws.movedim(-1, 0))
    )


def test_a_net_inside_a_module() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(6, 2, 3, 2, dtype=torch.double))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.conv(SPEC)(X=x, W=self.weight)

    layer = Layer()
    x = torch.randn(2, 4, 6, 5, dtype=torch.double)
    found = grad(lambda p: functional_call(layer, p, (x,)).square().sum())({"weight": layer.weight.detach()})
    layer(x).square().sum().backward()
    assert_close(found["weight"], layer.weight.grad)
    assert_close(layer.weight.grad, grad(lambda w: conv(x, w).square().sum())(layer.weight.detach()))


def test_complex_gradients_follow_torch() -> None:
    """Gradients through a call are conjugated as torch's are; the network's own VJP is the transpose."""
    net = ops.conv(SMALL)
    rng = np.random.default_rng(3)
    x = torch.tensor(rng.standard_normal((2, 2, 5)) + 1j * rng.standard_normal((2, 2, 5)), requires_grad=True)
    w = torch.tensor(rng.standard_normal((2, 1, 3)) + 1j * rng.standard_normal((2, 1, 3)), requires_grad=True)
    assert gradcheck(lambda x, w: net(X=x, W=w), (x, w), fast_mode=True)


@given(
    size=st.integers(1, 9),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(-2, 8), st.integers(-2, 8)),
    mode=st.sampled_from(["circular", "reflect", "replicate"]),
    backend=st.sampled_from(["numpy", "torch"]),
)
def test_gathers_read_in_runs(size: int, stride: int, padding: tuple[int, int], mode: str, backend: str) -> None:
    longest = {"circular": size, "reflect": size - 1, "replicate": 8}[mode]
    padding = tuple(min(side, longest) for side in padding)
    assume(size + sum(padding) >= 1)
    try:
        pattern = IndexPattern(size, 1, stride, padding=padding, padding_mode=mode)
    except ValueError:
        reject()
    reads = pattern.reads()[:, 0]
    assume((reads >= 0).all())
    step = Gather((0,), 1, pattern)
    spelled = [start + step * at for start, step, length in step.runs() for at in range(length)]
    assert spelled == list(reads)
    x = np.random.default_rng(0).normal(size=(2, size, 3))
    found = load(backend).steps[Gather](step)(torch.tensor(x) if backend == "torch" else x)
    np.testing.assert_array_equal(np.asarray(found), x[:, reads])


@pytest.mark.parametrize("op", BUILDERS)
def test_convolution_steps_have_three_dimensions_at_most(op: str) -> None:
    spec = ConvSpec(
        *(3, 6, (2, 1, 2, 2, 2), (2, 2, 1, 2, 1), (1, 4, 2, 1, 2)),
        dilation=(1, 1, 2, 1, 2),
        groups=3,
        transposed=True,
        output_padding=(0, 2, 0, 0, 1),
    )
    net = bound(BUILDERS[op](spec), 2)
    operands = operands_of(net)
    expected = evaluate_dense(net, operands) if op != "hessian_backprop" else None
    for strategy in STRATEGIES:
        plan = lower(net.simplify(), strategy)
        assert all(len(step.stride) <= 3 for step in plan.steps if isinstance(step, Convolution))
        if expected is not None:
            assert_close(run(plan, tensors(operands)), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_convolutions_take_no_more_memory_than_torch_s(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from lensor_bench.measure import peak_bytes

    spec = ConvSpec(16, 16, (31, 30), 3, stride=2, padding=1, groups=2)
    shapes = (2, *spec.input_shape), spec.weight_shape, (2, *spec.output_shape)
    x, w, v = (torch.randn(shape, dtype=getattr(torch, dtype)) for shape in shapes)
    hyper = ([2, 2], [1, 1], [1, 1], False, [0, 0], 2)
    own = (
        lambda: lensor.functional.conv_input_vjp(x.shape, w, v, 2, 1, 1, 2),
        lambda: lensor.functional.conv_weight_vjp(x, w.shape, v, 2, 1, 1, 2),
    )
    for of, call in enumerate(own):
        asked = [of == 0, of == 1, False]
        with torch.no_grad():
            call()  # plans
            most, expected = peak_bytes(
                lambda asked=asked: torch.ops.aten.convolution_backward(v, x, w, None, *hyper, asked)[asked.index(True)]
            )
            peak, found = peak_bytes(call)
        torch.testing.assert_close(found, expected)
        assert peak <= most
