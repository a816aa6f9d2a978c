"""Jacobians and the empirical NTK, of two sets of inputs and in blocks, against autograd in double precision."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lensor.curvature import empirical_ntk, jacobians

pytestmark = pytest.mark.usefixtures("in_double_precision")

CLASSES = 3


class Words(nn.Module):
    """An embedding whose weight is also the last linear map, a norm, a recurrent layer, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(CLASSES, 4), nn.LayerNorm(4)
        self.recurrent, self.scale = nn.GRU(4, 4, batch_first=True), nn.Parameter(torch.randn(4))

    def forward(self, words: Tensor) -> Tensor:
        h = self.recurrent(self.norm(self.embedding(words)))[0][:, -1] * self.scale
        return h @ self.embedding.weight.T


class Twice(nn.Module):
    """A convolution that runs twice, a grouped one, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 2, 3, padding=1)
        self.second = nn.Conv1d(2, 4, 2, stride=2, groups=2)
        self.last, self.frozen = nn.Linear(4, CLASSES), nn.Linear(CLASSES, CLASSES).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(self.first(x).tanh())).sigmoid()
        return self.frozen(self.last(h.mean(2)))


def _images(batch: int) -> Tensor:
    return torch.randn(batch, 2, 5, 5)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2),
            nn.GroupNorm(2, 2),
            nn.Flatten(),
            nn.Linear(200, CLASSES),
        ),
        _images,
    ),
    "words": (Words, lambda batch: torch.randint(CLASSES, (batch, 4))),
    "twice": (Twice, lambda batch: torch.randn(batch, 2, 6)),
}


def _jacobian(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The Jacobians with respect to the trainable parameters, by one backward pass for each example and output."""
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for example in x:
        for entry in model(example[None])[0]:
            slopes = torch.autograd.grad(entry, list(parameters.values()), retain_graph=True)
            for name, slope in zip(parameters, slopes, strict=True):
                found[name].append(slope)
    shape = len(x), CLASSES
    return {name: torch.stack(parts).reshape(*shape, *parameters[name].shape) for name, parts in found.items()}


def _flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([one.flatten(2) for one in found.values()], 2)


def _kernel(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("ncp,mdp->nmcd", _flat(_jacobian(model, x)), _flat(_jacobian(model, y)))


def _chosen(kernel: Tensor, outputs: str | int) -> Tensor:
    if isinstance(outputs, int):
        return kernel[:, :, outputs, outputs]
    return kernel if outputs == "all" else kernel.diagonal(dim1=2, dim2=3).sum(2)


def _at_least(model: nn.Module, x: Any, **options: Any) -> int:
    """The lowest limit that is accepted."""
    with pytest.raises(ValueError, match="max_bytes is 1, expected at least") as error:
        empirical_ntk(model, x, max_bytes=1, **options)
    return int(str(error.value).split("at least ")[1].split(",")[0])


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    sizes=st.tuples(st.integers(1, 4), st.none() | st.integers(1, 4)),
    outputs=st.sampled_from(["all", "trace", 0, CLASSES - 1]),
    limit=st.none() | st.floats(1, 30),
)
def test_kernels_are_products_of_jacobians(
    kind: str, sizes: tuple[int, int | None], outputs: str | int, limit: float | None
) -> None:
    make, data = KINDS[kind]
    model, x, y = make(), data(sizes[0]), None if sizes[1] is None else data(sizes[1])
    bound = None if limit is None else int(limit * _at_least(model, x, other=y, outputs=outputs))
    found = empirical_ntk(model, x, y, outputs=outputs, max_bytes=bound)
    torch.testing.assert_close(found, _chosen(_kernel(model, x, x if y is None else y), outputs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_jacobians(kind: str, batch: int) -> None:
    make, data = KINDS[kind]
    model, x = make(), data(batch)
    found, expected = jacobians(model, x), _jacobian(model, x)
    assert list(found) == list(expected)
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-9, atol=1e-11)


def test_jacobians_of_some_layers_and_of_no_example() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    found = jacobians(model, torch.randn(0, 4), layers=["2"])
    assert {name: tuple(one.shape) for name, one in found.items()} == {"2.weight": (0, 2, 2, 3), "2.bias": (0, 2, 2)}
    assert empirical_ntk(model, torch.randn(3, 4), torch.randn(0, 4), max_bytes=1).shape == (3, 0, 2, 2)
    assert empirical_ntk(model, torch.randn(0, 4), torch.randn(3, 4), outputs="trace").shape == (0, 3)


def test_sets_of_different_shapes() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.randn(2, 2, 7), torch.randn(3, 2, 9)
    torch.testing.assert_close(empirical_ntk(model, x, y), _kernel(model, x, y))


def test_named_inputs_and_inputs_that_all_examples_share() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return self.linear(x * table)

    model, x, table = Scaled(), torch.randn(5, 4), torch.randn(4)
    whole = empirical_ntk(model, {"x": x, "table": table})
    torch.testing.assert_close(whole, _kernel(model.linear, x * table, x * table))
    lowest = _at_least(model, {"x": x, "table": table})
    torch.testing.assert_close(empirical_ntk(model, (x, table), max_bytes=lowest), whole)


class _Measured(TorchDispatchMode):
    """Measures the largest tensor that is made, and the most bytes of tensors alive, apart from views."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given_storages = {
            one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in given_storages:
                self._add(one)
        return result

    def _add(self, one: Tensor) -> None:
        storage = one.untyped_storage()
        key, count = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.largest, self.alive = max(self.largest, count), self.alive + count
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._drop, key, count)

    def _drop(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.alive -= count


@pytest.mark.parametrize("outputs", ["all", "trace", 1])
@pytest.mark.parametrize("kind", ["wide", "words"])
def test_a_limit_bounds_the_memory(kind: str, outputs: str | int) -> None:
    batch, classes = 5, 3
    if kind == "wide":
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten()
        ).append(nn.Linear(16 * 64, classes))
        x = torch.randn(batch, 3, 8, 8)
    else:
        model = nn.Sequential(nn.Embedding(200, 16), nn.LayerNorm(16), nn.Flatten(), nn.Linear(128, classes))
        x = torch.randint(200, (batch, 8))
    whole = empirical_ntk(model, x, outputs=outputs)
    lowest = _at_least(model, x, outputs=outputs)
    for limit in (lowest, 4 * lowest):
        with _Measured() as measured:
            found = empirical_ntk(model, x, outputs=outputs, max_bytes=limit)
        assert measured.largest <= max(limit, found.nbytes)
        if limit > lowest:
            assert measured.peak <= limit
        torch.testing.assert_close(found, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": "sum"}, "outputs is 'sum', expected 'all', 'trace' or the number of an output"),
        ({"outputs": 3}, "outputs is 3, expected a number from 0 to 2"),
        ({"outputs": -1}, "outputs is -1, expected a number from 0 to 2"),
        ({"max_bytes": 0}, "max_bytes is 0, expected at least 1"),
        ({"max_bytes": 100}, "max_bytes is 100, expected at least .*, for one example and one output at a time"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        empirical_ntk(nn.Linear(4, 3), torch.randn(2, 4), **options)


def test_sets_with_different_numbers_of_outputs() -> None:
    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).flatten(1)

    with pytest.raises(ValueError, match="the model has 8 outputs for other, expected 6, as for inputs"):
        empirical_ntk(Gram(), torch.randn(2, 3, 2), torch.randn(2, 4, 2))
