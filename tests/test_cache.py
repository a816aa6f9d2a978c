"""Caches: what they keep, that they are bounded, and whose plans they serve."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lensor
from lensor import IndexPattern, ops
from lensor.cache import Cache, frozen
from tests.support.cases import SPEC, assert_close, bound, live_caches, operands_of, tensors


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
    net = ops.conv_weight_vjp(SPEC)
    operands = operands_of(bound(net))
    plan = net.plan(**operands)
    assert net.plan(**operands) is plan
    assert ops.conv_weight_vjp(SPEC).plan(**operands) is plan
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


def test_entries_can_be_counted_and_dropped() -> None:
    cache = Cache(maxsize=4)
    for at in range(3):
        cache.put((at % 2, at), str(at))
    assert cache.count(lambda key: key[0] == 0) == 2
    before = cache.nbytes
    cache.drop((0, 2))
    cache.drop((5, 5))
    assert cache.count(lambda key: key[0] == 0) == 1
    assert cache.get((0, 2)) is None
    assert 0 < cache.nbytes < before


def test_options_in_keys_keep_texts_of_any_class() -> None:
    class Name(str):
        __slots__ = ()

    assert frozen([1, [2, "same"], None]) == (1, (2, "same"), None)
    assert frozen(Name("same")) == "same"
    x, w = np.ones((1, 2, 5)), np.ones((3, 2, 3))
    assert np.array_equal(lensor.functional.conv(x, w, padding=Name("same")), lensor.functional.conv(x, w, padding=1))
