"""Long inputs: memory within a small multiple of operands, result and patches; caches bounded in bytes."""

from __future__ import annotations

import gc
import mmap
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lensor_bench.measure import peak_bytes
from torch.nn.functional import conv1d, pad

import lensor
from lensor import ConvSpec, cache
from lensor import functional as F
from lensor.kernels.torch.capture import _constants
from lensor.pattern import PADDING_MODES
from tests.support.cases import assert_close

STATM = Path("/proc/self/statm")

LONG = {  # input size, kernel size, stride, padding, dilation
    "same": (16_000, 3, 1, (1, 1), 1),
    "stride is the kernel, with a remainder": (16_001, 3, 3, (0, 0), 1),
    "kernel of 1 with stride": (16_000, 1, 2, (0, 0), 1),
    "stride is the dilation": (16_000, 3, 2, (2, 2), 2),
    "large kernel": (16_000, 251, 50, (125, 125), 1),
    "stride beyond the kernel": (16_000, 3, 5, (1, 4), 1),
    "causal": (16_000, 4, 1, (9, 0), 3),
}


def patches_of(x: torch.Tensor, case: tuple, mode: str) -> torch.Tensor:
    """[batch, c_in, output_size, kernel_size], by torch."""
    _, kernel, stride, padding, dilation = case
    x = pad(x, padding, mode="constant" if mode == "zeros" else mode)
    return x.unfold(2, dilation * (kernel - 1) + 1, stride)[..., ::dilation]


def functions(
    case: tuple, mode: str, x: torch.Tensor, w: torch.Tensor, v: torch.Tensor
) -> dict[str, tuple[Callable[..., Any], list[torch.Tensor], Callable[[], torch.Tensor]]]:
    """Every function with its arrays and what it should return."""
    size, kernel, stride, padding, dilation = case
    hyper = {"stride": stride, "padding": [padding], "dilation": dilation, "padding_mode": mode}
    n = len(x)

    def derivative(place: int) -> torch.Tensor:
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        padded = pad(leaves[0], padding, mode="constant" if mode == "zeros" else mode)
        return torch.autograd.grad(conv1d(padded, leaves[1], None, stride, 0, dilation), leaves[place], v)[0]

    def per_example() -> torch.Tensor:
        return torch.einsum("ncok,nvo->nvck", patches_of(x, case, mode), v)

    def unfolded() -> torch.Tensor:
        return patches_of(x, case, mode).movedim(3, 2).flatten(1, 2)

    def reduced() -> torch.Tensor:
        rows = patches_of(x, case, mode).mean(2).flatten(1)
        return (rows.mT @ rows / n)[None]

    def expanded() -> torch.Tensor:
        rows = unfolded().movedim(1, 2).flatten(0, 1)
        return (rows.mT @ rows / n)[None]

    def folded() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        columns = patches_of(leaf, case, mode).movedim(3, 2).flatten(1, 2)
        return torch.autograd.grad(columns, leaf, unfolded())[0]

    def of_columns(function: Callable[..., Any], columns: Any, **options: Any) -> Any:
        return function(columns, (size,), kernel, **options)

    return {
        "conv": (lambda x, w: F.conv(x, w, **hyper), [x, w], lambda: conv1d_of(x, w, case, mode)),
        "unfold": (lambda x: F.unfold(x, kernel, **hyper), [x], unfolded),
        "fold": (lambda columns: of_columns(F.fold, columns, **hyper), [unfolded()], folded),
        "input VJP": (lambda w, v: F.conv_input_vjp(tuple(x.shape), w, v, **hyper), [w, v], lambda: derivative(0)),
        "weight VJP": (lambda x, v: F.conv_weight_vjp(x, tuple(w.shape), v, **hyper), [x, v], lambda: derivative(1)),
        "per example": (
            lambda x, v: F.conv_weight_vjp_per_example(x, tuple(w.shape), v, **hyper),
            [x, v],
            per_example,
        ),
        "reduce": (lambda x: F.kfac_input_factor(x, kernel, approx="reduce", **hyper), [x], reduced),
        "expand": (lambda x: F.kfac_input_factor(x, kernel, **hyper), [x], expanded),
        "diagonal": (
            lambda x, v: F.ggn_diagonal(x, tuple(w.shape), v[None], **hyper),
            [x, v],
            lambda: per_example().square().sum(0),
        ),
    }


def conv1d_of(x: torch.Tensor, w: torch.Tensor, case: tuple, mode: str) -> torch.Tensor:
    _, _, stride, padding, dilation = case
    return conv1d(pad(x, padding, mode="constant" if mode == "zeros" else mode), w, None, stride, 0, dilation)


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize(
    ("case", "backend"), [*((case, "numpy") for case in LONG), ("same", "torch"), ("large kernel", "torch")]
)
def test_memory_of_long_inputs(case: str, mode: str, backend: str) -> None:
    """Planned and run, with cold caches: no more than operands, result and patches a few times."""
    torch.manual_seed(0)
    size, kernel, stride, padding, dilation = LONG[case]
    spec = ConvSpec(1, 2, (size,), kernel, stride, [padding], dilation, padding_mode=mode)
    x, w, v = torch.randn(2, 1, size).double(), torch.randn(2, 1, kernel).double(), torch.randn(2, *spec.output_shape)
    lensor.clear_caches()
    for name, (function, arrays, expected) in functions(LONG[case], mode, x, w, v.double()).items():
        if backend == "numpy":
            values = [array.numpy() for array in arrays]
            tracemalloc.start()
            found = function(*values)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            found = torch.from_numpy(found)
        else:
            lensor.clear_caches()
            tracemalloc.start()
            peak, found = peak_bytes(lambda function=function, arrays=arrays: function(*arrays))
            python = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert python < 64e6, name  # of which the profiler takes most
        patches = 2 * 8 * spec.output_size[0] * kernel
        allowed = sum(array.nbytes for array in arrays) + found.nbytes + patches
        assert peak <= 3 * allowed + 3e6, name
        assert_close(found, expected())


def test_the_reduce_factor_of_a_long_input_with_a_large_kernel() -> None:
    """160,000 samples and 1,024 kernel positions: a table of the pattern's sums would take 1.3 GB."""
    x = torch.randn(2, 1, 160_000).double()
    tracemalloc.start()
    peak, found = peak_bytes(lambda: F.kfac_input_factor(x, 1024, 512, approx="reduce"))
    assert tracemalloc.get_traced_memory()[1] < 64e6
    tracemalloc.stop()
    rows = x.unfold(2, 1024, 512).mean(2).flatten(1)
    assert_close(found, (rows.mT @ rows / 2)[None])
    assert peak <= found.nbytes + 4 * x.nbytes


def test_the_gradient_of_a_reduce_factor_has_no_table_either() -> None:
    x = torch.randn(2, 1, 6000, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(1, 101, 101).double()
    rows = x.unfold(2, 101, 1).mean(2).flatten(1)
    (expected,) = torch.autograd.grad(((rows.mT @ rows / 2)[None] * direction).sum(), x)
    factor = F.kfac_input_factor(x, 101, approx="reduce")
    peak, found = peak_bytes(lambda: torch.autograd.grad(factor, x, direction)[0])
    assert_close(found, expected)
    assert peak <= 12 * x.nbytes + 4 * direction.nbytes  # a table takes 50 times as much as x


# ------------------------------------------------------------------------------------------------------------- caches
@pytest.fixture
def narrow_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[cache.Cache]]:
    """All caches, empty, none of which keeps more than 200 kB."""
    lensor.clear_caches()
    caches = list(cache._caches)
    for one in caches:
        monkeypatch.setattr(one, "max_bytes", 200_000)
    yield caches
    lensor.clear_caches()


@pytest.mark.skipif(not STATM.exists(), reason="what a process takes is read where Linux has it")
def test_a_thousand_lengths_leave_bounded_memory(narrow_caches: list[cache.Cache]) -> None:
    """No cache weighs more than it may, and once they are full the process grows no more."""
    before, heaviest = 0, 0
    for size in range(1000, 2000):
        F.unfold(np.ones((1, 1, size)), 3)
        heaviest = max(heaviest, *(one.nbytes for one in narrow_caches))
        if size == 1300:
            gc.collect()
            before = int(STATM.read_text().split()[1])
    gc.collect()
    assert 100_000 < heaviest <= 200_000
    assert max(len(one) for one in narrow_caches) < 1000
    # Without a bound 700 lengths take 15 MB.
    assert (int(STATM.read_text().split()[1]) - before) * mmap.PAGESIZE < 6e6


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_caches_weigh_what_they_keep(backend: str) -> None:
    def call(size: int) -> None:
        x, v = np.ones((2, 1, size)), np.ones((2, 2, size))
        if backend == "numpy":
            F.conv_weight_vjp_per_example(x, (2, 1, 9), v, 1, 4, padding_mode="replicate")
        else:
            y = F.conv(torch.tensor(x, requires_grad=True), torch.ones(2, 1, 9).double(), padding=4)
            y.sum().backward()

    caches = list(cache._caches)
    for size in range(20, 25):
        call(size)
    gc.collect()
    before = sum(one.nbytes for one in caches)
    tracemalloc.start()
    for size in range(3000, 3030):
        call(size)
    gc.collect()
    alive, weighed = tracemalloc.get_traced_memory()[0], sum(one.nbytes for one in caches) - before
    tracemalloc.stop()
    assert weighed > 30 * 3000
    assert alive <= 2 * weighed
    assert weighed / 30 < 400_000


def test_new_lengths_keep_no_positions() -> None:
    """What vmap reads by positions is made where it is read: nothing of the size of patches stays."""
    kept = []
    for size in range(4000, 4004):
        x, v = torch.randn(3, 2, 1, size), torch.randn(3, 2, 4, size)
        function = torch.func.vmap(lambda x, v: F.conv_weight_vjp_per_example(x, (4, 1, 251), v, 1, 125))
        found = function(x, v)
        expected = torch.einsum("anck,anvk->anvc", x[:, :, :, : size - 1], v[..., 1:])[:, :, :, 0]
        assert torch.allclose(found[..., 0, 124], expected, rtol=1e-3, atol=1e-2)
        gc.collect()
        kept.append(sum(one.nbytes for one in cache._caches))
    assert max(np.diff(kept)) < 400_000  # the patches of one length are 251·4000 entries
    assert _constants.nbytes < 1e6


def test_a_value_heavier_than_the_cache_is_not_kept() -> None:
    one = cache.Cache(maxsize=10, max_bytes=1000)
    one.put("a", bytes(300))
    one.put("b", bytes(300))
    assert one.get("a") is not None
    one.put("c", bytes(300))
    assert [key for key in "abc" if one.get(key) is not None] == ["a", "c"]
    assert one.nbytes <= 1000
    assert len(one.get_or_make("d", lambda: bytes(5000))) == 5000
    assert one.get("d") is None
    one.put("a", bytes(10))
    before = one.nbytes
    one.put("a", bytes(10))
    assert one.nbytes == before
    one.clear()
    assert one.nbytes == len(one) == 0


def test_weights_are_those_of_everything_that_is_held() -> None:
    array = np.zeros(10_000)

    class Holder:
        def __init__(self) -> None:
            self.function = lambda: array

    assert cache.weigh(Holder()) >= array.nbytes
    assert cache.weigh([array, array]) < 1.5 * array.nbytes
    assert cache.weigh(torch.zeros(10_000)) >= 40_000
    assert cache.weigh((np, torch, F.conv, ConvSpec)) < 5_000
