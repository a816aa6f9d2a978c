"""Cheaper steps of KFAC: inverses of low rank and in half precision, staggered updates, groups without curvature."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lensor.curvature import KroneckerFactors, kfac
from lensor.curvature.inverses import PlusLowRank
from lensor.optim import KFAC
from lensor.optim.checkpoint import WHOLE, unpacked
from lensor.optim.updates import descend

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.filterwarnings("ignore:curvature is not supported for the parameters of 1")
"""The normalisation of the network below."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(54, 3)).double()


def batch(seed: int, count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 7, 7, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        x, y = batch(seed)
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()


def gradients(model: nn.Module, seed: int) -> dict[str, Tensor]:
    x, y = batch(seed)
    found = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def close(a: Any, b: Any, **options: Any) -> None:
    torch.testing.assert_close(a, b, **({"rtol": 1e-9, "atol": 1e-11} | options))


# ------------------------------------------------------------------------------------------------------------ inverses
def damped(block: Any, damping: float, a: Tensor) -> Tensor:
    """(B + √λ/π I) ⊗ (A + π√λ I) of the first group, for a matrix in place of A."""
    c, d = block.B.shape[1], block.d
    ratio = ((block.A[0].trace() / d) / (block.B[0].trace() / c)).sqrt()
    b = block.B[0] + damping**0.5 / ratio * torch.eye(c).double()
    return torch.kron(b, a + ratio * damping**0.5 * torch.eye(d).double())


def layer_factors(approx: str, rows: int, inputs: int = 24) -> tuple[KroneckerFactors, Any]:
    torch.manual_seed(rows)
    x = torch.randn(rows, inputs, dtype=torch.float64) * torch.logspace(0, -2, inputs, dtype=torch.float64)
    found = kfac(nn.Linear(inputs, 3, bias=False).double(), CE, (x, torch.randint(3, (rows,))), approx=approx)
    return found, found["weight"]


@pytest.mark.parametrize(
    ("approx", "rows"), [("reduce", 3), ("reduce", 9), ("reduce", 20), ("expand", 5), ("expand", 40)]
)
@pytest.mark.parametrize("rank", [1, 3, 5, 6])
def test_an_inverse_of_low_rank_has_the_largest_eigenvalues_and_the_mean_of_the_others(
    approx: str, rows: int, rank: int
) -> None:
    found, block = layer_factors(approx, rows)
    values, vectors = torch.linalg.eigh(block.A[0])
    kept = values.clone()
    kept[:-rank] = values[:-rank].mean()
    expected = torch.linalg.inv(damped(block, 0.01, vectors @ kept.diag() @ vectors.T))
    size = found.size
    inverse = (found.inverse(0.01, "low-rank", rank) @ torch.eye(size).double()).T
    # The subspace is found by iteration, for which gaps between eigenvalues decide.
    error = torch.linalg.matrix_norm(inverse - expected, 2) / torch.linalg.matrix_norm(expected, 2)
    exact = rows <= 2 * rank and approx == "reduce"
    assert float(error) < (1e-9 if exact else 0.05)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.sampled_from(["expand", "reduce"]), st.integers(1, 6), st.integers(8, 40))
def test_an_inverse_of_low_rank_is_exact_where_the_rank_suffices(
    rows: int, approx: str, rank: int, inputs: int
) -> None:
    found, block = layer_factors(approx, min(rows, rank), max(inputs, 4 * rank))
    expected = torch.linalg.inv(damped(block, 0.1, block.A[0]))
    got = found.inverse(0.1, "low-rank", rank) @ torch.eye(found.size).double()
    close(got, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_an_iteration_finds_directions_that_its_start_lacks() -> None:
    """Inputs that were zero become the largest ones, and are independent of the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 40, dtype=torch.float64, generator=generator)
    layer, y = nn.Linear(40, 3, bias=False).double(), torch.arange(50) % 3
    before, after = x.clone(), x.clone()
    before[:, 20:] = after[:40, :20] = after[40:, 20:] = 0
    after[:, 20:] *= 10
    inverse = kfac(layer, CE, (before, y)).inverse(0.1, "low-rank", 8)
    factors = kfac(layer, CE, (after, y))
    for _ in range(12):
        inverse = type(inverse)(dict(factors), 0.1, "low-rank", 8, inverse.bases())
    (basis,) = inverse.bases().values()
    largest = torch.linalg.eigh(factors["weight"].A[0]).eigenvectors[:, -8:]
    overlaps = torch.linalg.svdvals(largest.T @ basis[0, :, -8:])
    assert float(overlaps.min()) > 0.99


def test_an_iteration_that_starts_from_the_last_one_comes_closer() -> None:
    found, block = layer_factors("expand", 60, 200)
    values, vectors = torch.linalg.eigh(block.A[0])
    kept = values.clone()
    kept[:-20] = values[:-20].mean()
    expected = torch.linalg.inv(damped(block, 1e-3, vectors @ kept.diag() @ vectors.T))
    errors, inverse = [], found.inverse(1e-3, "low-rank", 20)
    for _ in range(6):
        errors.append(float((inverse @ torch.eye(found.size).double() - expected).norm() / expected.norm()))
        inverse = type(inverse)(dict(found), 1e-3, "low-rank", 20, inverse.bases())
    assert errors[-1] < 1e-3 < errors[0]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("rows", [2, 11, 13, 20])
def test_inverses_through_roots_of_few_rows_are_those_of_the_matrix(rows: int) -> None:
    found, block = layer_factors("reduce", rows)
    assert block.root is not None
    got = found.inverse(0.01, "cholesky") @ torch.eye(found.size).double()
    close(got, torch.linalg.inv(damped(block, 0.01, block.A[0])), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(7, 5),
        nn.Conv1d(4, 6, 3, groups=2, dilation=2),
        nn.Conv2d(4, 4, 3, groups=4, padding="same", padding_mode="circular"),
        nn.Conv3d(2, 3, (2, 1, 3), stride=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_inverses_with_an_identity_as_output_factor_are_those_of_the_matrix(
    approx: Any, rows: int, layer: nn.Module
) -> None:
    own = copy.deepcopy(layer).double()
    channels: Any = getattr(own, "in_channels", 7)
    sides = (channels, *(7,) * (own.weight.ndim - 2))  # type: ignore[operator, union-attr]
    model = nn.Sequential(own, nn.Flatten())
    x = torch.randn(rows, *sides, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = kfac(model, CE, (x, torch.arange(rows) % 3), fisher="forward-only", approx=approx, bias="joint")
    (block,) = found.values()
    rows_of = block.to_rows({name: p.detach() for name, p in own.named_parameters(prefix="0")})
    solved = block.to_rows(
        found.inverse(0.1, "cholesky") @ {n: p.detach() for n, p in own.named_parameters(prefix="0")}
    )
    c, d = block.B.shape[1], block.d
    for group in range(block.groups):
        a, b = block.A[group], block.B[group]
        ratio = ((a.trace() / d) / (b.trace() / c)).sqrt()
        on_a, on_b = ratio * 0.1**0.5, 0.1**0.5 / ratio
        matrix = torch.kron(b + on_b * torch.eye(c).double(), a + on_a * torch.eye(d).double())
        assert torch.equal(b, torch.eye(c).double())
        close(matrix @ solved[group].flatten(), rows_of[group].flatten(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [0, -1])
def test_ranks_are_positive(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank is {rank}, expected"):
        layer_factors("expand", 5)[0].inverse(0.1, "low-rank", rank)
    with pytest.raises(ValueError, match=f"rank is {rank}, expected"):
        KFAC(network(), CE, rank=rank)


# ---------------------------------------------------------------------------------------------- directions, dtypes
def forward_only(model: nn.Module, **options: Any) -> KFAC:
    chosen = {"fisher": "forward-only", "approx": "reduce", "method": "woodbury", "ema": 0.0, "batch_axis": 0}
    return KFAC(model, CE, **(chosen | options))


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"weight_decay": 0.3}, {"kl_clip": None}], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_directions_that_are_not_formed_are_the_inverse_times_the_gradient(
    bias: str, options: dict[str, Any], layout: torch.memory_format
) -> None:
    model = network().to(memory_format=layout)
    trained = list(model.parameters())
    chosen = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.0, "kl_clip": 1e-2} | options
    groups = [{"params": trained[:3]}, {"params": trained[3:], "lr": 0.1}]
    optimizer = forward_only(model, params=groups, damping=0.02, bias=bias, **chosen)
    buffers: dict[str, Tensor] = {}
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for seed in range(3):
        given = gradients(model, seed)
        factors = kfac(model, CE, batch(seed), approx="reduce", fisher="forward-only", bias=bias)
        solved = dict(given)
        for block in factors.values():
            exact = block.dense() + 0.02 * torch.eye(block.d * block.B.shape[1]).double()
            inverse = torch.linalg.inv(damped(block, 0.02, block.A[0]) if block.root is None else exact)
            rows = block.to_rows({one: given[one] for one in block.names})
            solved |= block.from_rows((inverse @ rows.flatten(1)[..., None]).reshape(rows.shape))
        rates = {name: chosen["lr"] if at < 3 else 0.1 for at, name in enumerate(expected)}
        length = sum(rates[name] ** 2 * float((solved[name] * given[name]).sum()) for name in given)
        scale = 1.0 if chosen["kl_clip"] is None else min(1.0, (chosen["kl_clip"] / length) ** 0.5)
        for name in expected:
            buffers[name] = chosen["momentum"] * buffers.get(name, 0.0) + scale * solved[name]
            expected[name] = (1 - rates[name] * chosen["weight_decay"]) * expected[name] - rates[name] * buffers[name]
        train(model, optimizer, range(seed, seed + 1))
        close(dict(model.named_parameters()), expected, rtol=1e-8, atol=1e-10)


def test_directions_of_few_rows_are_not_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = forward_only(model)
    train(model, optimizer, range(2))
    monkeypatch.setattr(KroneckerFactors, "block_product", None)
    formed = []
    monkeypatch.setattr(PlusLowRank, "formed", lambda self: formed.append(self))
    train(model, optimizer, range(2, 4))
    assert not formed
    found = optimizer.inversion.directions({n: p.grad for n, p in model.named_parameters()}, formed=False)
    unformed = {name for name, one in found.items() if isinstance(one, PlusLowRank)}
    assert unformed == {"3.weight", "3.bias", "6.weight", "6.bias"}  # the first convolution has two groups


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("factor", [1.0, 1e-3, 0.3])
@pytest.mark.parametrize("strided", [None, "parameter", "buffer", "direction"])
@pytest.mark.parametrize("low_rank", [False, True])
@torch.no_grad()
def test_updates_are_those_of_gradient_descent_with_momentum(
    momentum: float, factor: float, strided: str | None, low_rank: bool
) -> None:
    torch.manual_seed(0)
    shape = 6, 5, 3, 3

    def tensor(name: str) -> Tensor:
        found = torch.randn(shape)
        return found.to(memory_format=torch.channels_last) if name == strided else found

    p, expected = nn.Parameter(tensor("parameter")), torch.zeros(shape)
    expected.copy_(p.detach())
    states: dict[Tensor, Any] = {p: {}}
    group = {"params": [p], "lr": 0.1, "momentum": momentum, "weight_decay": 0.2}
    buffer = torch.zeros(shape)
    for _ in range(3):
        p.grad = tensor("direction")
        direction: Any = p.grad
        if low_rank and strided is None:
            left, right = torch.randn(6, 2), torch.randn(2, 45)
            direction = PlusLowRank(p.grad, 0.7, left, right, p.grad.reshape(6, -1) @ right.T)
            whole = 0.7 * p.grad + (left @ right).reshape(shape)
            close(direction.with_vector(), (whole * p.grad).sum(), rtol=1e-4, atol=1e-4)
        else:
            whole = p.grad
        if strided == "buffer" and "momentum_buffer" in states[p]:
            states[p]["momentum_buffer"] = states[p]["momentum_buffer"].to(memory_format=torch.channels_last)
        descend(group, {id(p): direction}, factor, states)
        buffer = momentum * buffer + factor * whole
        expected = (1 - 0.1 * 0.2) * expected - 0.1 * buffer
        close(p.detach(), expected, rtol=1e-5, atol=1e-5)
        assert ("momentum_buffer" in states[p]) == (momentum > 0)


@torch.no_grad()
def test_directions_with_small_factors_are_not_rounded() -> None:
    p = nn.Parameter(torch.zeros(4))
    buffer, p.grad = torch.zeros(4), torch.full((4,), 1e20)
    group = {"params": [p], "lr": 1.0, "momentum": 0.5, "weight_decay": 0.0}
    descend(group, {}, 1e-20, {p: {"momentum_buffer": buffer}})
    close(buffer, torch.ones(4))
    close(p.detach(), -torch.ones(4))


@pytest.mark.parametrize("method", ["eigen", "cholesky", "woodbury", "low-rank"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_inverses_in_half_precision_are_those_of_single_precision(method: str, approx: str) -> None:
    if method == "woodbury" and approx == "expand":
        return
    found = layer_factors(approx, 9)[0].to(torch.float32)
    exact, half = (found.inverse(0.1, method, rank=5, dtype=dtype) for dtype in (None, torch.bfloat16))
    vector = torch.randn(4, found.size, generator=torch.Generator().manual_seed(0))
    got, expected = half @ vector, exact @ vector
    assert got.dtype == torch.float32
    assert torch.equal(got, expected) == (method == "eigen" and approx == "reduce")  # which goes through the root
    error = float((got - expected).norm() / expected.norm())
    assert error < 2**-7


@pytest.mark.parametrize("method", ["eigen", "cholesky", "low-rank"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("stagger", [False, True])
def test_factors_and_inverses_in_half_precision_train_alike_and_go_on_bit_for_bit(
    method: str, approx: str, stagger: bool
) -> None:
    half = {"factor_dtype": torch.bfloat16, "inverse_dtype": torch.bfloat16}
    options = {"method": method, "approx": approx, "rank": 4, "damping": 0.1, "lr": 0.05, "factor_interval": 2}
    options |= {"inverse_interval": 3, "batch_axis": 0, "stagger": stagger}
    models = [network().float() for _ in range(3)]
    optimizers = [KFAC(models[0], CE, **options), *(KFAC(model, CE, **options, **half) for model in models[1:])]

    def run(at: int, seeds: range) -> None:
        for seed in seeds:
            x, y = batch(seed)
            optimizers[at].zero_grad()
            CE(models[at](x.float()), y).backward()
            optimizers[at].step()

    for at in range(3):
        run(at, range(5))
    factors = optimizers[1].factors
    assert factors is not None
    assert {tensor.dtype for block in factors.values() for tensor in block.tensors().values()} == {torch.bfloat16}
    models[2].load_state_dict(models[1].state_dict())
    optimizers[2] = KFAC(models[2], CE, **options, **half)
    optimizers[2].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    for at in range(3):
        run(at, range(5, 10))
    assert all(map(torch.equal, models[1].parameters(), models[2].parameters()))
    start, single, bfloat = (
        torch.cat([p.detach().float().flatten() for p in model.parameters()]) for model in (network(), *models[:2])
    )
    assert 0 < float((single - bfloat).norm()) < 0.1 * float((single - start).norm())


@pytest.mark.parametrize(
    ("method", "damping"),
    [("woodbury", 1e-2), ("eigen", 1e-2), ("eigen", 1e-4), ("cholesky", 1e-2), ("cholesky", 1e-4)],
)
def test_inverses_through_roots_in_half_precision_descend(method: Any, damping: float) -> None:
    """Where the curvature is large, the direction is a difference of two terms that nearly cancel."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 128) * torch.logspace(1, -2, 128), torch.randint(10, (64,))
    model = nn.Linear(128, 10)
    factors = kfac(model, CE, (x, y), fisher="forward-only", approx="reduce", bias="joint")
    given = dict(zip(("weight", "bias"), torch.autograd.grad(CE(model(x), y), [*model.parameters()]), strict=True))
    exact = factors.to(torch.float64).inverse(damping, method) @ {name: one.double() for name, one in given.items()}
    found = factors.inverse(damping, method, dtype=torch.bfloat16) @ given
    for name, one in exact.items():
        assert float((found[name] - one).norm()) < 0.1 * float(one.norm())
    assert sum(float((found[name] * one).sum()) for name, one in given.items()) > 0


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_steps_that_ascend_are_not_taken(nonfinite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = KFAC(model, CE, nonfinite=nonfinite)
    train(model, optimizer, range(2))
    before, factors = [p.detach().clone() for p in model.parameters()], optimizer.factors
    monkeypatch.setattr(KFAC, "_length", lambda self, directions: torch.tensor(-1.0))
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="the step and the gradient is -1, expected a positive number"):
            train(model, optimizer, range(2, 3))
    else:
        train(model, optimizer, range(2, 3))
    assert all(map(torch.equal, before, model.parameters()))
    assert optimizer.factors is factors


def test_factors_stay_as_they_were_after_an_error_of_an_inversion(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = KFAC(model, CE)
    train(model, optimizer, range(2))
    factors = optimizer.factors

    def broken(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("not positive definite")

    with monkeypatch.context() as patch:
        patch.setattr("lensor.curvature.inverses._damped_inverse", broken)
        with pytest.raises(torch.linalg.LinAlgError):
            train(model, optimizer, range(2, 3))
    assert optimizer.factors is factors
    train(model, optimizer, range(2, 3))


@pytest.mark.parametrize("name", ["factor_dtype", "inverse_dtype"])
@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.int32, TypeError), ("bf16", TypeError), (torch.float16, ValueError)]
)
def test_dtypes_that_cannot_store_factors_are_refused(name: str, dtype: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"{name} is .*expected"):
        KFAC(network(), CE, **{name: dtype})


# ----------------------------------------------------------------------------------------------------- staggered steps
@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_staggered_layers_are_updated_once_in_each_interval(approx: str, bias: str) -> None:
    """Nine steps by hand, with the slots that the optimizer chose."""
    model, by_hand = network(), network()
    options: dict[str, Any] = {"approx": approx, "bias": bias, "damping": 0.1, "lr": 0.1, "ema": 0.7, "kl_clip": None}
    optimizer = KFAC(model, CE, momentum=0.0, factor_interval=3, inverse_interval=3, stagger=True, **options)
    train(model, optimizer, range(9))
    slots = optimizer.tracker.slots
    assert slots is not None
    layers = {name: slots[name] for name in ("0.weight", "3.weight", "6.weight")}
    assert sorted(layers.values()) == [0, 1, 2]
    factors: dict[str, Any] = {}
    inverses: dict[str, Any] = {}
    for step in range(9):
        grads = gradients(by_hand, step)
        new = kfac(by_hand, CE, batch(step), approx=approx, fisher="empirical", bias=bias, others="skip")
        solved = dict(grads)
        for name, block in new.items():
            slot = layers[name.replace("bias", "weight")]
            if step == 0 or step % 3 == slot:
                one = new._with({name: block})
                factors[name] = one if step == 0 else factors[name].ema_(one, 0.7)
                inverses[name] = factors[name].inverse(0.1, "cholesky")
            solved |= inverses[name] @ {one: grads[one] for one in block.names}
        with torch.no_grad():
            for name, p in by_hand.named_parameters():
                p -= 0.1 * solved[name]
    for (name, a), b in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        close(a, b, rtol=1e-7, msg=name)


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@pytest.mark.parametrize("method", ["cholesky", "low-rank"])
def test_staggered_training_goes_on_bit_for_bit(fisher: str, method: str) -> None:
    options: dict[str, Any] = {"damping": 0.1, "fisher": fisher, "method": method, "rank": 4}
    options |= {"factor_interval": 2, "inverse_interval": 4, "stagger": True}
    model = network()
    optimizer = KFAC(model, CE, **options)
    train(model, optimizer, range(6))
    again = copy.deepcopy(model)
    resumed = KFAC(again, CE, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(6, 15))
    train(again, resumed, range(6, 15))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    both = copy.deepcopy((again, resumed))
    train(again, resumed, range(15, 18))
    train(*both, range(15, 18))
    for a, b in zip(again.parameters(), both[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_layer_that_is_trained_later_gets_factors_at_once() -> None:
    model = network()
    model[3].requires_grad_(False)
    optimizer = KFAC(model, CE, params=model.parameters(), factor_interval=5, inverse_interval=5, stagger=True)
    train(model, optimizer, range(2))
    model[3].requires_grad_(True)
    train(model, optimizer, range(2, 3))
    assert optimizer.factors is not None
    assert "3.weight" in optimizer.factors
    assert "3.weight" in optimizer.inversion.solvers
    assert optimizer.tracker.slots is not None
    slot, before = optimizer.tracker.slots["3.weight"], optimizer.factors["3.weight"].A.clone()
    for at in range(3, 8):
        train(model, optimizer, range(at, at + 1))
        changed = not torch.equal(optimizer.factors["3.weight"].A, before)
        assert changed == (at % 5 == slot), at
        before = optimizer.factors["3.weight"].A.clone()


@pytest.mark.parametrize("ranks", [1, 2])
def test_staggered_updates_are_distributed_by_cost(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each step, every rank has about the same work, although layers differ in cost by a factor of 500."""
    sizes = [8, 64, 64, 8, 8, 8, 64, 64, 8, 8, 8, 64, 64, 8, 8, 64, 64]
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes))).double()
    optimizer = KFAC(model, nn.MSELoss(), stagger=True, factor_interval=2, inverse_interval=2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: ranks)
    x, y = torch.randn(4, sizes[0], dtype=torch.float64), torch.zeros(4, sizes[-1], dtype=torch.float64)
    factors = kfac(model, nn.MSELoss(), (x, y))
    optimizer.inversion.group = cast(Any, object()) if ranks > 1 else None
    optimizer._place(factors)
    slots, owners = optimizer.tracker.slots, optimizer.inversion.owners(factors)
    assert slots is not None
    work: dict[tuple[int, int], float] = {}
    for name, block in factors.items():
        key = slots[name], owners[name]
        work[key] = work.get(key, 0.0) + block.d**3 + block.B.shape[1] ** 3
    assert len(work) == 2 * ranks
    assert max(work.values()) < 1.6 * min(work.values())
    optimizer.inversion.group = None


class _Orders(nn.Module):
    """A layer whose rows are ordered by examples or by positions, as a value says."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last, self.by_position = nn.Linear(4, 4), nn.Linear(4, 3), [False]

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        if self.by_position[0]:
            found = self.hidden(x.transpose(0, 1).reshape(n * t, -1)).tanh().view(t, n, -1).transpose(0, 1)
        else:
            found = self.hidden(x.reshape(n * t, -1)).tanh().view(n, t, -1)
        return self.last(found.mean(1))


@pytest.mark.parametrize("stagger", [False, True])
def test_an_order_of_examples_that_depends_on_values_is_found_in_every_pass(stagger: bool) -> None:
    torch.manual_seed(0)
    model = _Orders().double()
    optimizer = KFAC(model, CE, approx="reduce", ema=0.0, lr=0.0, stagger=stagger)
    for step, size in enumerate([6, 6, 6, 1, 6, 2, 6, 6, 1, 6]):
        x, y = torch.randn(size, 5, 4, dtype=torch.float64), torch.arange(size) % 3
        model.by_position[0] = step % 3 == 2
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
        expected = kfac(model, CE, (x, y), approx="reduce", fisher="empirical", bias="joint")
        assert optimizer.factors is not None
        for name, block in expected.items():
            close(optimizer.factors[name].A, block.A)
            close(optimizer.factors[name].B, block.B)


# --------------------------------------------------------------------------------------------------- parameter groups
@pytest.mark.filterwarnings("error:curvature is not supported")
def test_groups_without_curvature_are_updated_by_adamw() -> None:
    model, by_hand = network(), network()
    normal = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    ours = KFAC(
        model,
        CE,
        lr=0.05,
        damping=0.1,
        kl_clip=1e-3,
        params=[
            {"params": [*model[0].parameters(), *model[3].parameters()]},
            {"params": [*model[1].parameters(), *model[6].parameters()], "use_kfac": False, **normal},
        ],
    )
    assert [layer.name for layer in ours.layers] == ["0", "3"]
    curved = KFAC(
        by_hand, CE, lr=0.05, damping=0.1, kl_clip=1e-3, params=[*by_hand[0].parameters(), *by_hand[3].parameters()]
    )
    adamw = torch.optim.AdamW([*by_hand[1].parameters(), *by_hand[6].parameters()], **normal)
    for seed in range(5):
        train(model, ours, range(seed, seed + 1))
        x, y = batch(seed)
        curved.zero_grad()
        adamw.zero_grad()
        CE(by_hand(x), y).backward()
        curved.step()
        adamw.step()
    for (name, a), b in zip(model.named_parameters(), by_hand.named_parameters(), strict=True):
        close(a, b[1], msg=name)
    again = copy.deepcopy(model)
    names = [{"params": [*again[0].parameters(), *again[3].parameters()]}]
    names.append({"params": [*again[1].parameters(), *again[6].parameters()], "use_kfac": False, "lr": 0.1})
    resumed = KFAC(again, CE, params=names)
    resumed.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(model, ours, range(5, 8))
    train(again, resumed, range(5, 8))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_that_is_not_finite_in_a_group_without_curvature_is_named() -> None:
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "use_kfac": False, "lr": 0.1}]
    optimizer = KFAC(model, CE, params=groups)
    CE(model(batch(0)[0]), batch(0)[1]).backward()
    assert model[1].weight.grad is not None
    model[1].weight.grad[0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"1\.weight"):
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_large_gradients_in_half_precision_are_finite() -> None:
    model = nn.Linear(60, 50).half()
    optimizer = KFAC(model, CE, lr=1e-6, momentum=0.0, kl_clip=None)
    for p in model.parameters():
        p.grad = torch.full_like(p, 30000.0)
    with pytest.warns(UserWarning, match="no factors were collected"):
        optimizer.step()
    assert model.weight.grad is not None
    model.weight.grad[3, 4] = torch.inf
    with pytest.raises(FloatingPointError, match="weight is not finite"):
        optimizer.step()


def test_steps_are_scaled_down_in_half_precision_as_in_single_precision() -> None:
    found = []
    for dtype in (torch.float16, torch.float32):
        model = nn.Linear(6, 5).to(dtype)
        nn.init.zeros_(model.weight)
        optimizer = KFAC(model, CE, lr=1.0, momentum=0.0, kl_clip=1e-3)
        for p in model.parameters():
            p.grad = torch.full_like(p, 3000.0)
        with pytest.warns(UserWarning, match="no factors were collected"):
            optimizer.step()
        found.append(model.weight.detach().float())
    close(found[0], found[1], rtol=2e-3)
    assert float(found[1].abs().max()) > 0


def test_an_optimizer_of_groups_without_curvature_is_adamw() -> None:
    model, by_hand = network(), network()
    ours = KFAC(model, CE, params=[{"params": model.parameters(), "use_kfac": False, "lr": 0.01, "weight_decay": 0.1}])
    train(model, ours, range(4))
    train(by_hand, torch.optim.AdamW(by_hand.parameters(), lr=0.01, weight_decay=0.1), range(4))
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a, b)
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))


@pytest.mark.parametrize("first", [True, False])
def test_groups_change_between_kfac_and_adamw(first: bool) -> None:
    """From then on, the group is updated as by an optimizer that starts at that moment."""
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[3:].parameters(), "use_kfac": first, "lr": 1e-3}]
    ours = KFAC(model, CE, lr=1e-3, ema=0.0, kl_clip=None, params=groups)
    train(model, ours, range(2))
    ours.param_groups[1]["use_kfac"] = not first
    model[0].requires_grad_(False)
    by_hand = copy.deepcopy(model)
    rest = by_hand[3:].parameters()
    if first:
        expected: torch.optim.Optimizer = torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.0)
    else:
        expected = KFAC(by_hand, CE, lr=1e-3, ema=0.0, kl_clip=None, params=rest)
    train(model, ours, range(2, 5))
    train(by_hand, expected, range(2, 5))
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        close(a, b)
    assert not torch.equal(model[6].weight, network()[6].weight)


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_schedulers_of_momentum_change_it_as_for_sgd(name: str) -> None:
    found = []
    for make in (lambda m: KFAC(m, CE, lr=0.1, momentum=0.9), lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9)):
        model = network()
        optimizer: torch.optim.Optimizer = make(model)
        if name == "OneCycleLR":
            scheduler: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6)
        else:
            scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3)
        found.append([])
        for seed in range(4):
            train(model, optimizer, range(seed, seed + 1))
            scheduler.step()
            found[-1].append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
    assert found[0] == found[1]
    assert len(set(found[0])) == 4


def test_gradients_of_several_precisions_are_checked_together() -> None:
    both = nn.ModuleList([nn.Linear(3, 4).half(), nn.Linear(3, 2).double()])
    groups = [{"params": both[1].parameters()}, {"params": both[0].parameters(), "use_kfac": False, "lr": 0.1}]
    optimizer = KFAC(both, nn.MSELoss(), params=groups, nonfinite="skip")
    before = [p.detach().clone() for p in both.parameters()]
    for value, moves in ((float("nan"), False), (1.0, True)):
        for p in both.parameters():
            p.grad = torch.full_like(p, 1.0 if p.dtype == torch.float64 else value)
        optimizer.step()
        assert [not torch.equal(p, old) for p, old in zip(both.parameters(), before, strict=True)] == [moves] * 4


def test_averaged_weights_are_those_of_torch() -> None:
    model, by_hand = network(), network()
    optimizer, other = KFAC(model, CE, damping=0.1), KFAC(by_hand, CE, damping=0.1)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    expected: list[Tensor] = []
    for seed in range(3):
        train(model, optimizer, range(seed, seed + 1))
        averaged.update_parameters(model)
        train(by_hand, other, range(seed, seed + 1))
        now = [p.detach().clone() for p in by_hand.parameters()]
        expected = [0.5 * (a + b) for a, b in zip(expected, now, strict=True)] if expected else now
    for a, b in zip(averaged.parameters(), expected, strict=True):
        close(a, b)


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = KFAC(model, CE)
    CE(model(torch.arange(4)), torch.arange(4) % 2).backward()
    with pytest.raises(TypeError, match=r"the gradient of '0\.weight' is sparse"):
        optimizer.step()


def test_groups_of_adamw_have_their_own_learning_rate() -> None:
    model = network()
    with pytest.raises(ValueError, match="has no lr"):
        KFAC(model, CE, params=[{"params": model.parameters(), "use_kfac": False}], lr=0.1)


def test_distributed_checkpoints_of_new_optimizers_take_no_step() -> None:
    model = network()
    optimizer = KFAC(model, CE, factor_interval=10)
    get_state_dict(model, optimizer)
    assert optimizer.steps == 0
    train(model, optimizer, range(1))
    assert optimizer.factors is not None
    assert all(isinstance(key, Tensor) for key in optimizer.state)


def test_pickles_of_earlier_versions_are_read() -> None:
    """They lack the attributes that the options of later versions need."""
    model = network()
    optimizer = KFAC(model, CE)
    train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.__getstate__())
    for name in ("adaptation", "factor_dtype"):
        del state[name]
    del state["inversion"].updates, state["inversion"].dtype
    del state["tracker"].structure
    state = copy.deepcopy(state)
    old = KFAC.__new__(KFAC)
    old.__setstate__(state)
    train(old.model, old, range(2, 4))
    train(model, optimizer, range(2, 4))
    for one, other in zip(model.parameters(), old.model.parameters(), strict=True):
        assert torch.equal(one, other)
    old.load_state_dict(old.state_dict())


def test_named_parameters_are_accepted_as_by_torch() -> None:
    one, other = network(), network()
    named, plain = KFAC(one, CE, params=one.named_parameters()), KFAC(other, CE)
    train(one, named, range(3))
    train(other, plain, range(3))
    assert named.state_dict()["param_groups"][0]["param_names"] == list(dict(one.named_parameters()))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_states_of_versions_without_groups_are_read() -> None:
    model = network()
    optimizer = KFAC(model, CE)
    train(model, optimizer, range(2))
    plain, own = unpacked(copy.deepcopy(optimizer.state_dict()), WHOLE)
    for group in plain["param_groups"]:
        del group["use_kfac"]
    for name in ("slots", "starts"):
        del own[name]
    state = {**plain, "kfac": own}
    again = copy.deepcopy(model)
    resumed = KFAC(again, CE)
    resumed.load_state_dict(state)
    train(model, optimizer, range(2, 4))
    train(again, resumed, range(2, 4))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("how", ["low-rank", "AdamW", "frozen"])
def test_states_pass_through_distributed_checkpoints(tmp_path: Path, momentum: float, how: str) -> None:
    def made() -> tuple[nn.Module, KFAC]:
        torch.manual_seed(0)
        model = network()
        groups: Any = model.parameters()
        model[0].requires_grad_(how != "frozen")
        if how == "AdamW":
            plain = [model[0].bias, *model[3].parameters()]
            groups = [{"params": [model[0].weight]}, {"params": plain, "use_kfac": False, "lr": 1e-3}]
        options: dict[str, Any] = {"method": "low-rank", "rank": 1} if how == "low-rank" else {"bias": "separate"}
        return model, KFAC(model, CE, momentum=momentum, params=groups, inverse_interval=2, **options)

    model, optimizer = made()
    train(model, optimizer, range(3))
    before = [p.detach().clone() for p in model.parameters()]
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    assert optimizer.steps == 3
    dcp.save(saved, checkpoint_id=tmp_path)
    for a, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(a, b)
    again, resumed = made()
    loaded = dict(zip(("model", "optimizer"), get_state_dict(again, resumed), strict=True))
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(again, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert resumed.steps == 3
    train(model, optimizer, range(3, 6))
    train(again, resumed, range(3, 6))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"betas": (1.0, 0.9)}, "betas is"),
        ({"betas": (0.9,)}, "betas is"),
        ({"eps": -1.0}, "eps is"),
        ({"lr": -1.0}, "lr is"),
    ],
)
def test_bad_groups(group: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        KFAC(model, CE, params=[{"params": model.parameters(), "use_kfac": False, "lr": 0.1, **group}])


def test_layers_of_groups_without_curvature_cannot_be_asked_for() -> None:
    model = network()
    with pytest.raises(ValueError, match="in a group with use_kfac=False"):
        KFAC(model, CE, layers=["0"], params=[{"params": model.parameters(), "use_kfac": False, "lr": 0.1}])


def test_an_optimizer_is_copied_after_a_parameter_has_been_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    loss = nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss, batch_axis=0)
    loss(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
    optimizer.step()
    model[0].weight.requires_grad_(False)
    copied, other = copy.deepcopy((model, optimizer))
    for one, own in ((model, optimizer), (copied, other)):
        own.zero_grad()
        loss(one(torch.ones(8, 4)), torch.arange(8) % 3).backward()
        own.step()
    for p, q in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(p, q)
