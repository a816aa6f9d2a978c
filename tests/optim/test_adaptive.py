"""Adaptive steps of KFAC: the quadratic model is that of the dense matrix, and steps and damping follow from it."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from lensor.curvature import kfac, register_loss
from lensor.optim import KFAC
from lensor.optim.passes import Passes
from lensor.optim.quadratic import Quadratic, quadratic

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
pytestmark = pytest.mark.filterwarnings("ignore:curvature is not supported for the parameters of")


def poisson(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.exp() - targets * outputs).sum()


register_loss(poisson, reduction="sum")


class Attention(nn.Module):
    """Attention over the positions, with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.embed(x).flatten(2).mT)
        mixed = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=0.2)
        return self.head((tokens + mixed).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(50, 3)),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.ConvTranspose2d(4, 2, 2), nn.GELU(), nn.Flatten(), nn.Linear(32, 3)
    ),
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3)
    ),
    "dropout": lambda: nn.Sequential(
        nn.Dropout(0.3), nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Dropout(), nn.Linear(36, 3)
    ),
    "attention": Attention,
}


def classes(generator: torch.Generator) -> Tensor:
    return torch.randint(3, (6,), generator=generator)


def numbers(generator: torch.Generator) -> Tensor:
    return torch.rand(6, 3, generator=generator, dtype=torch.float64)


WEIGHTS = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
LOSSES: dict[str, tuple[Any, Callable[[torch.Generator], Tensor]]] = {
    "cross entropy": (CE, classes),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), classes),
    "weights": (nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=0, label_smoothing=0.1), classes),
    "probabilities": (CE, numbers),
    "squares": (MSE, numbers),
    "sum of squares": (nn.MSELoss(reduction="sum"), numbers),
    "binary": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS, weight=WEIGHTS.flip(0)), numbers),
    "registered": (poisson, numbers),
}


def images(seed: int, count: int = 6) -> Tensor:
    return torch.randn(count, 2, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def closure_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Any, parts: Sequence[tuple[Tensor, Tensor]]
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for x, y in parts:
            value = loss(model(x), y) / len(parts)
            value.backward()
            total = total + value
        return total

    return closure


def dense(
    model: nn.Module, loss: Any, parts: Sequence[tuple[Tensor, Tensor]], seed: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The parameters, the gradient and the Gauss–Newton matrix, from Jacobians and Hessians by torch alone."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    shapes = [p.shape for p in named.values()]

    def outputs(flat: Tensor) -> Tensor:
        values = [one.view(shape) for one, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        replaced = dict(zip(named, values, strict=True)) | {k: b.clone() for k, b in model.named_buffers()}
        torch.manual_seed(seed)
        return torch.stack([functional_call(model, replaced, (x,)) for x, _ in parts])

    def total(out: Tensor) -> Tensor:
        return torch.stack([loss(one, y) for one, (_, y) in zip(out, parts, strict=True)]).sum() / len(parts)

    flat = torch.cat([p.flatten() for p in named.values()])
    out = outputs(flat)
    jacobian = torch.autograd.functional.jacobian(outputs, flat).flatten(0, -2)  # pyright: ignore
    hessian = torch.autograd.functional.hessian(total, out).reshape(out.numel(), -1)  # pyright: ignore
    gradient = torch.autograd.functional.jacobian(lambda one: total(outputs(one)), flat)
    return named, gradient, jacobian.T @ hessian @ jacobian  # pyright: ignore


def flat(vector: dict[str, Tensor], named: dict[str, Tensor]) -> Tensor:
    return torch.cat([vector.get(name, torch.zeros_like(p)).flatten() for name, p in named.items()])


def close(a: Any, b: Any, **options: Any) -> None:
    torch.testing.assert_close(a, b, **({"rtol": 1e-8, "atol": 1e-10} | options))


# -------------------------------------------------------------------------------------------------- the quadratic model
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(sorted(LOSSES)),
    st.integers(1, 2),
    st.integers(0, 100),
    st.booleans(),
)
def test_the_quadratic_model_is_that_of_the_dense_matrix(
    kind: str, name: str, count: int, seed: int, partial: bool
) -> None:
    torch.manual_seed(seed)
    model, (loss, targets) = MODELS[kind]().double(), LOSSES[name]
    generator = torch.Generator().manual_seed(seed)
    parts = [(images(seed + part), targets(generator)) for part in range(count)]
    optimizer = KFAC(model, loss, adapt_lr=True, kl_clip=None, accumulation_steps=count)
    named, gradient, matrix = dense(model, loss, parts, seed)
    directions = [{n: torch.randn_like(p) for n, p in named.items()} for _ in range(2)]
    if partial:
        directions[1].pop(next(iter(named)))
    damping = {n: 0.1 * (at + 1) for at, n in enumerate(named)}
    torch.manual_seed(seed)
    passes = Passes(model, closure_of(model, optimizer, loss, parts), optimizer.tracker.replacing, [])
    gradients = {n: p.grad for n, p in model.named_parameters()}
    found = quadratic(passes, directions, gradients, damping, None)  # type: ignore[arg-type]
    rows = torch.stack([flat(one, named) for one in directions])
    levels = flat({n: torch.full_like(p, damping[n]) for n, p in named.items()}, named)
    close(found.slopes, rows @ gradient)
    close(found.curvature, rows @ (matrix + levels.diag()) @ rows.T)
    for name, p in model.named_parameters():
        assert p.grad is gradients[name]


def test_the_minimum_is_below_every_other_value() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 2, 2):
        root = torch.randn(3, size, generator=generator, dtype=torch.float64)
        model = Quadratic(torch.randn(size, generator=generator, dtype=torch.float64), root.T @ root)
        best = model.minimum()
        for step in torch.randn(200, size, generator=generator, dtype=torch.float64):
            assert model.value(best) <= model.value(best + 1e-3 * step) <= model.value(best + step) + 1e-12


def test_the_minimum_along_dependent_directions_is_the_shortest() -> None:
    curvature = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    best = Quadratic(torch.tensor([1.0, 2.0], dtype=torch.float64), curvature).minimum()
    close(best @ torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64))
    zero = Quadratic(torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64))
    assert zero.minimum().tolist() == [0, 0]
    with pytest.raises(ValueError, match="negative curvature along the step, expected a loss that is convex"):
        Quadratic(torch.ones(1, dtype=torch.float64), -torch.ones(1, 1, dtype=torch.float64)).minimum()


# ------------------------------------------------------------------------------------------------------------- the step
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_by_hand(momentum: float) -> None:
    """Four steps with groups of different dampings and learning rates, and with a layer without factors."""
    torch.manual_seed(0)
    model = MODELS["dropout"]().double()
    hand = copy.deepcopy(model)
    groups = [
        {"params": model[1].parameters(), "damping": 0.5, "lr": 0.2},
        {"params": [*model[2].parameters(), *model[5].parameters()], "damping": 0.1, "lr": 0.4},
    ]
    optimizer = KFAC(model, CE, params=groups, momentum=momentum, adapt_lr=True, kl_clip=None, ema=0.0, bias="separate")
    weights = {name: (0.5 if name.startswith("1.") else 1.0) for name, _ in model.named_parameters()}
    damping = {name: (0.5 if name.startswith("1.") else 0.1) for name in weights}
    buffer: dict[str, Tensor] = {}
    for seed in range(4):
        parts = [(images(seed), classes(torch.Generator().manual_seed(seed)))]
        torch.manual_seed(seed)
        optimizer.step(closure_of(model, optimizer, CE, parts))
        named, gradient, matrix = dense(hand, CE, parts, seed)
        torch.manual_seed(seed)
        factors = kfac(hand, CE, parts[0], fisher="empirical", bias="separate", batch_axis=0, layers=["1", "5"])
        pieces = dict(zip(named, gradient.split([p.numel() for p in named.values()]), strict=True))
        delta = {name: piece.view(named[name].shape) for name, piece in pieces.items()}
        for name, block in factors.items():
            delta |= type(factors)({name: block}).inverse(damping[name], "cholesky") @ {name: delta[name]}
        spans = [{name: weights[name] * one for name, one in vector.items()} for vector in (delta, buffer) if vector]
        spans = spans if momentum else spans[:1]
        rows = torch.stack([flat(one, named) for one in spans])
        levels = flat({n: torch.full_like(p, damping[n]) for n, p in named.items()}, named)
        best = torch.linalg.solve(rows @ (matrix + levels.diag()) @ rows.T, rows @ gradient)
        buffer = {name: best[0] * one + (best[1] * buffer[name] if len(best) > 1 else 0) for name, one in delta.items()}
        with torch.no_grad():
            for name, p in hand.named_parameters():
                p -= (0.2 if name.startswith("1.") else 0.4) * buffer[name]
        for a, b in zip(model.parameters(), hand.parameters(), strict=True):
            close(a, b, rtol=1e-6, atol=1e-8)


def least_squares() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(30, 1, generator=generator, dtype=torch.float64)


def test_a_least_squares_problem_is_solved_in_one_step() -> None:
    x, y = least_squares()
    model = nn.Linear(5, 1, bias=False).double()
    options = {"fisher": "forward-only", "approx": "reduce", "adapt_damping": True, "damping_interval": 1}
    optimizer = KFAC(model, MSE, damping=1e-16, adapt_lr=True, kl_clip=None, damping_range=(1e-20, 1), **options)
    before = float(MSE(model(x), y).detach())
    assert optimizer.step(closure_of(model, optimizer, MSE, [(x, y)])).item() == before
    close(model.weight.detach(), torch.linalg.lstsq(x, y).solution.T, rtol=1e-5, atol=1e-6)
    assert optimizer.adaptation is not None
    assert optimizer.adaptation.ratio == pytest.approx(1, abs=1e-6)


def test_one_step_reaches_the_minimum_along_its_direction() -> None:
    """On a quadratic objective, with any direction."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    x, y = images(0, 9).flatten(1)[:, :5], torch.randn(9, 3, dtype=torch.float64)
    optimizer = KFAC(model, MSE, damping=1e-9, adapt_lr=True, kl_clip=None)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(closure_of(model, optimizer, MSE, [(x, y)]))
    gradients = torch.autograd.grad(MSE(model(x), y), list(model.parameters()))
    steps = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    slope = sum((a * b).sum() for a, b in zip(gradients, steps, strict=True))
    assert abs(float(slope)) < 1e-6 * sum(float(one.norm()) for one in steps)


def test_the_learning_rate_multiplies_the_step() -> None:
    found = []
    for lr in (None, 1.0, 0.5):
        torch.manual_seed(0)
        model = MODELS["convolutions"]().double()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = KFAC(model, CE, lr=lr, adapt_lr=True, kl_clip=None)
        optimizer.step(closure_of(model, optimizer, CE, [(images(0), torch.arange(6) % 3)]))
        found.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    close(found[0], found[1], rtol=0, atol=0)
    close([0.5 * one for one in found[0]], found[2])
    assert KFAC(MODELS["linear"](), CE).param_groups[0]["lr"] == 0.1


# ---------------------------------------------------------------------------------------------------------- the damping
def test_the_ratio_counts_the_damping() -> None:
    """For a quadratic objective, the change is (gᵀδ + ½ δᵀGδ), and the model adds ½ λ‖δ‖²."""
    x, y = least_squares()
    model = nn.Linear(5, 1).double()
    _, gradient, matrix = dense(model, MSE, [(x, y)], 0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = KFAC(model, MSE, damping=0.7, adapt_lr=True, adapt_damping=True, kl_clip=None, damping_interval=1)
    optimizer.step(closure_of(model, optimizer, MSE, [(x, y)]))
    step = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    change = gradient @ step + 0.5 * step @ matrix @ step
    assert optimizer.adaptation is not None
    assert optimizer.adaptation.ratio == pytest.approx(float(change / (change + 0.35 * step @ step)), rel=1e-9)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.7 * 0.95)


def test_the_damping_decreases_on_a_quadratic_objective_until_the_bound() -> None:
    x, y = least_squares()
    model = nn.Linear(5, 1).double()
    groups = [{"params": [model.weight], "damping": 1.0}, {"params": [model.bias], "damping": 0.5}]
    options = {"adapt_damping": True, "damping_interval": 2, "damping_decay": 0.5, "damping_range": (0.05, 2.0)}
    optimizer = KFAC(model, MSE, params=groups, adapt_lr=True, kl_clip=None, bias="separate", **options)
    found = []
    for _ in range(8):
        optimizer.step(closure_of(model, optimizer, MSE, [(x, y)]))
        found.append([group["damping"] for group in optimizer.param_groups])
    assert found[:4] == [[1.0, 0.5], [0.25, 0.125], [0.25, 0.125], [0.0625, 0.05]]
    assert found[-1] == [0.05, 0.05]


class Saturated(nn.Module):
    """A function of one weight, which a step along its derivative overshoots."""

    def __init__(self, function: Callable[[Tensor], Tensor], weight: float) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(1, 1, bias=False).double(), function
        nn.init.constant_(self.layer.weight, weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


@pytest.mark.parametrize("adapt_lr", [True, False])
def test_the_damping_grows_where_the_objective_is_not_quadratic(adapt_lr: bool) -> None:
    model = Saturated(torch.tanh, 3.0)
    x, y = torch.ones(4, 1).double(), torch.zeros(4, 1).double()
    optimizer = KFAC(
        model, MSE, lr=1.0, damping=1e-6, kl_clip=None, adapt_lr=adapt_lr, adapt_damping=True, damping_interval=1
    )
    for count in range(1, 4):
        nn.init.constant_(model.layer.weight, 3.0)
        optimizer.step(closure_of(model, optimizer, MSE, [(x, y)]))
        assert optimizer.param_groups[0]["damping"] == pytest.approx(1e-6 * 0.95**-count)


@pytest.mark.parametrize(("weight", "function"), [(-20.0, torch.exp), (3.0, torch.tanh)])
def test_a_step_that_raises_the_loss_is_rejected(weight: float, function: Callable[[Tensor], Tensor]) -> None:
    """The loss after the step is infinite for the exponential function."""
    model = Saturated(function, weight)
    x, y = torch.ones(4, 1).double(), torch.full((4, 1), float(weight < 0)).double()
    optimizer = KFAC(
        model, MSE, damping=1e-16, kl_clip=None, adapt_lr=True, adapt_damping=True, damping_range=(1e-20, 1)
    )
    for count in range(1, 4):  # every step measures the ratio, because it is low
        optimizer.step(closure_of(model, optimizer, MSE, [(x, y)]))
        assert optimizer.param_groups[0]["damping"] == pytest.approx(1e-16 * 0.95 ** (-5 * count))
        assert float(model.layer.weight.detach()) == weight
        assert optimizer.steps == count
    assert optimizer.adaptation is not None
    assert optimizer.adaptation.ratio is not None
    assert optimizer.adaptation.ratio < 0.25


def test_a_converged_loss_leaves_the_damping() -> None:
    """Changes that are lost in rounding say nothing about the damping."""
    x, y = least_squares()
    model = nn.Linear(5, 1).double()
    optimizer = KFAC(
        model,
        MSE,
        damping=1e-3,
        adapt_lr=True,
        adapt_damping=True,
        kl_clip=None,
        damping_interval=1,
        damping_decay=0.999,
    )
    for _ in range(30):
        optimizer.step(closure_of(model, optimizer, MSE, [(x, y)]))
    found = optimizer.param_groups[0]["damping"]
    optimizer.step(closure_of(model, optimizer, MSE, [(x, y)]))
    assert optimizer.param_groups[0]["damping"] == found


# --------------------------------------------------------------------------------------------------------- side effects
class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.layers = nn.Sequential(*MODELS["batch norm"](), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        random.random()
        np.random.rand()
        return self.layers(x)


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]


def test_a_step_has_the_side_effects_of_one_call_of_the_closure() -> None:
    torch.manual_seed(0)
    model = Counting().double()
    plain = copy.deepcopy(model)
    x, y = images(0), torch.arange(6) % 3
    runs: list[Any] = []
    options: dict[str, Any] = {"adapt_lr": True, "adapt_damping": True, "kl_clip": None, "damping_interval": 1}
    for one, more in ((plain, {}), (model, options)):
        optimizer = KFAC(one, CE, batch_axis=0, **more)
        for seed in range(3):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            gradients = []
            closure = closure_of(one, optimizer, CE, [(x, y)])
            if one is plain:
                closure()
                with torch.no_grad():
                    for p, kept in zip(plain.parameters(), model.parameters(), strict=True):
                        p.copy_(kept)
            else:
                optimizer.step(closure)
                gradients = [p.grad for p in one.parameters()]
                assert all(gradient is not None for gradient in gradients)
            runs.append((one.count, states()))
    assert runs[:3] == runs[3:]
    assert int(model.layers[1].num_batches_tracked) == 3


def test_buffers_are_those_of_one_pass() -> None:
    torch.manual_seed(0)
    model = MODELS["batch norm"]().double()
    plain = copy.deepcopy(model)
    optimizer = KFAC(model, CE, adapt_lr=True, adapt_damping=True, kl_clip=None, damping_interval=1)
    optimizer.step(closure_of(model, optimizer, CE, [(images(0), torch.arange(6) % 3)]))
    plain(images(0))
    close(dict(model.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=0)


def run(model: nn.Module, optimizer: KFAC, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        optimizer.step(closure_of(model, optimizer, CE, [(images(seed), classes(torch.Generator().manual_seed(seed)))]))


@pytest.mark.parametrize("adapt_lr", [True, False])
def test_training_goes_on_bit_for_bit(adapt_lr: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS["dropout"]().double()
    other = copy.deepcopy(model)
    options: dict[str, Any] = {"adapt_lr": adapt_lr, "adapt_damping": True, "kl_clip": None, "damping_interval": 2}
    optimizer = KFAC(model, CE, lr=0.7, damping=0.3, **options)
    run(model, optimizer, range(3))
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state")
    again = KFAC(other, CE, lr=0.7, damping=0.3, **options)
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    assert again.param_groups[0]["damping"] != 0.3
    assert again.adaptation is not None
    assert optimizer.adaptation is not None
    assert again.adaptation.ratio == optimizer.adaptation.ratio is not None
    copied, optimizer_copy = copy.deepcopy((model, optimizer))
    for one, its in ((model, optimizer), (other, again), (copied, optimizer_copy)):
        run(one, its, range(3, 6))
    for a, b, c in zip(model.parameters(), other.parameters(), copied.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert optimizer.param_groups[0]["damping"] == again.param_groups[0]["damping"]


def test_groups_of_adamw_do_not_count() -> None:
    """The ratio is that of the parameters with curvature, and the others follow AdamW."""
    torch.manual_seed(0)
    model = MODELS["convolutions"]().double()
    other = copy.deepcopy(model)
    options: dict[str, Any] = {"adapt_lr": True, "adapt_damping": True, "kl_clip": None, "damping_interval": 1}
    plain = {"params": list(model[5].parameters()), "use_kfac": False, "lr": 0.01}
    optimizer = KFAC(model, CE, params=[{"params": [*model[0].parameters(), *model[2].parameters()]}, plain], **options)
    alone = KFAC(other, CE, params=[*other[0].parameters(), *other[2].parameters()], **options)
    adamw = torch.optim.AdamW(other[5].parameters(), lr=0.01, weight_decay=0.0)
    for seed in range(3):
        run(model, optimizer, range(seed, seed + 1))
        other.zero_grad()
        run(other, alone, range(seed, seed + 1))
        adamw.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        close(a, b)
    assert alone.adaptation is not None
    assert optimizer.adaptation is not None
    assert optimizer.adaptation.ratio == pytest.approx(alone.adaptation.ratio, rel=1e-6)


def test_accumulated_passes_are_one_batch() -> None:
    torch.manual_seed(0)
    whole = MODELS["convolutions"]().double()
    parts = copy.deepcopy(whole)
    options: dict[str, Any] = {"adapt_lr": True, "adapt_damping": True, "kl_clip": None, "damping_interval": 1}
    one, two = KFAC(whole, CE, **options), KFAC(parts, CE, accumulation_steps=2, **options)
    for seed in range(3):
        x, y = images(seed), classes(torch.Generator().manual_seed(seed))
        one.step(closure_of(whole, one, CE, [(x, y)]))
        two.step(closure_of(parts, two, CE, [(x[:3], y[:3]), (x[3:], y[3:])]))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        close(a, b, rtol=1e-7, atol=1e-9)


def test_hooks_and_compiled_models_are_part_of_the_closure() -> None:
    torch.manual_seed(0)
    model = MODELS["convolutions"]().double()
    hooked, compiled = copy.deepcopy(model), copy.deepcopy(model)
    hooked.register_forward_hook(lambda module, arguments, out: 2 * out)
    whole = torch.compile(compiled, backend="eager")
    options: dict[str, Any] = {"adapt_lr": True, "adapt_damping": True, "kl_clip": None, "damping_interval": 1}

    def doubled(out: Tensor, y: Tensor) -> Tensor:
        return CE(2 * out, y)

    x, y = images(0), torch.arange(6) % 3
    pairs = ((model, doubled, model), (hooked, CE, hooked), (compiled, doubled, whole))
    for one, loss, called in pairs:
        optimizer = KFAC(one, CE, batch_axis=0, fisher="forward-only", **options)
        optimizer.step(closure_of(called, optimizer, loss, [(x, y)]))
    for a, b, c in zip(model.parameters(), hooked.parameters(), compiled.parameters(), strict=True):
        close(a, b)
        close(a, c)


def test_autocast_is_that_of_the_closure() -> None:
    torch.manual_seed(0)
    model = MODELS["convolutions"]()
    other = copy.deepcopy(model)
    x, y = images(0).float(), torch.arange(6) % 3
    seen = []
    model[0].register_forward_hook(lambda module, arguments, out: seen.append(out.dtype))
    found = []
    for one, enabled in ((model, True), (other, False)):
        optimizer = KFAC(one, CE, adapt_lr=True, adapt_damping=True, kl_clip=None, damping_interval=1, batch_axis=0)
        closure = closure_of(one, optimizer, CE, [(x, y)])

        def cast(closure: Any = closure, enabled: bool = enabled) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled):
                return closure()

        optimizer.step(cast)
        assert optimizer.adaptation is not None
        found.append(optimizer.adaptation.ratio)
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 3  # the closure, the derivative along the direction, and the loss after the step
    assert found[0] == pytest.approx(found[1], rel=0.2)


# ---------------------------------------------------------------------------------------------------- several processes
def _rank(rank: int, file: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}", world_size=2, rank=rank)
    torch.manual_seed(0)
    model = MODELS["convolutions"]().double()
    wrapped = nn.parallel.DistributedDataParallel(model)
    options: dict[str, Any] = {"adapt_lr": True, "adapt_damping": True, "kl_clip": None, "damping_interval": 1}
    optimizer = KFAC(wrapped, CE, damping=0.1, group=dist.group.WORLD, **options)
    ratios = []
    for seed in range(3):
        half = slice(3 * rank, 3 * rank + 3)
        x, y = images(seed)[half], classes(torch.Generator().manual_seed(seed))[half]
        optimizer.step(closure_of(wrapped, optimizer, CE, [(x, y)]))
        assert optimizer.adaptation is not None
        ratios.append(optimizer.adaptation.ratio)
    torch.save((dict(model.named_parameters()), ratios), f"{out}.{rank}")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.start_processes(_rank, (str(tmp_path / "meet"), str(tmp_path / "found")), nprocs=2, start_method="spawn")
    found = [torch.load(tmp_path / f"found.{rank}", weights_only=True) for rank in range(2)]
    torch.manual_seed(0)
    model = MODELS["convolutions"]().double()
    options: dict[str, Any] = {"adapt_lr": True, "adapt_damping": True, "kl_clip": None, "damping_interval": 1}
    optimizer = KFAC(model, CE, damping=0.1, **options)
    run(model, optimizer, range(3))
    assert found[0][1] == found[1][1]
    assert optimizer.adaptation is not None
    assert optimizer.adaptation.ratio == pytest.approx(found[0][1][-1], rel=1e-5)
    for name, p in model.named_parameters():
        assert torch.equal(found[0][0][name], found[1][0][name])
        close(p.detach(), found[0][0][name].detach(), rtol=1e-6, atol=1e-8)


# --------------------------------------------------------------------------------------------------------------- errors
class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Once(torch.autograd.Function):
    """The sum of squares, with a gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x - y)
        return (x - y).square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return 2 * gradients[0] * ctx.saved_tensors[0], None


def _adaptive(model: nn.Module, loss: Any = CE, **options: Any) -> KFAC:
    return KFAC(
        model, loss, **({"adapt_lr": True, "adapt_damping": True, "kl_clip": None, "damping_interval": 1} | options)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_clip": 1e-3}, "kl_clip is 0.001, expected None with adapt_lr=True"),
        ({"damping_interval": 0}, "damping_interval is 0, expected a whole number of at least 1"),
        ({"damping_decay": 1.0}, "damping_decay is 1.0, expected a number between 0 and 1"),
        ({"damping_range": (1.0, 0.1)}, "damping_range is .*, expected two positive numbers, the smaller one first"),
        ({"damping": 1e5}, "damping is 100000.0, expected a number in damping_range, from 1e-07 to 10000.0"),
        ({"grad_scaler": torch.amp.GradScaler("cpu")}, "a GradScaler does not support closures"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _adaptive(MODELS["linear"](), **options)


def test_a_step_needs_a_closure() -> None:
    model = MODELS["linear"]().double()
    optimizer = _adaptive(model)
    CE(model(images(0)), torch.arange(6) % 3).backward()
    with pytest.raises(ValueError, match="step was called without a closure, expected one with adapt_lr"):
        optimizer.step()


def _nothing(model: nn.Module, optimizer: KFAC) -> Any:
    return torch.tensor(1.0)


def _no_loss(model: nn.Module, optimizer: KFAC) -> Any:
    closure_of(model, optimizer, CE, [(images(0), torch.arange(6) % 3)])()


def _penalty(model: nn.Module, optimizer: KFAC) -> Any:
    optimizer.zero_grad()
    value = CE(model(images(0)), torch.arange(6) % 3) + sum(p.square().sum() for p in model.parameters())
    value.backward()
    return value


def _last_part(model: nn.Module, optimizer: KFAC) -> Any:
    optimizer.zero_grad()
    value = None
    for seed in range(2):
        value = CE(model(images(seed)), torch.arange(6) % 3)
        (value / 2).backward()
    return value


def _other_batches(counter: Any) -> Callable[[nn.Module, KFAC], Any]:
    def closure(model: nn.Module, optimizer: KFAC) -> Any:
        return closure_of(model, optimizer, CE, [(images(next(counter)), torch.arange(6) % 3)])()

    return closure


def _other_counts(counter: Any) -> Callable[[nn.Module, KFAC], Any]:
    def closure(model: nn.Module, optimizer: KFAC) -> Any:
        parts = [(images(0), torch.arange(6) % 3)] * (1 + next(counter) % 2)
        return closure_of(model, optimizer, CE, parts)()

    return closure


def _used_gradients(model: nn.Module, optimizer: KFAC) -> Any:
    value = closure_of(model, optimizer, CE, [(images(0), torch.arange(6) % 3)])()
    for p in model.parameters():
        p.grad.mul_(1.0)  # type: ignore[union-attr]
    return value


def _other_backward(model: nn.Module, optimizer: KFAC) -> Any:
    optimizer.zero_grad()
    value = CE(model(images(0)), torch.arange(6) % 3)
    torch.autograd.backward(value)
    return value


@pytest.mark.parametrize(
    ("closure", "error", "message"),
    [
        (_nothing, ValueError, "the closure did not run the model with gradients"),
        (_no_loss, TypeError, "the closure returned an object of type NoneType, expected the loss as a number"),
        (_penalty, ValueError, "expected equal ones: the closure must clear the gradients and call backward"),
        (_last_part, ValueError, "expected the same loss: if it runs several backward passes"),
        (_other_batches(itertools.count()), ValueError, "expected the same batch in every call"),
        (_other_counts(itertools.count()), ValueError, "a closure must do the same in every call"),
        (_other_backward, ValueError, "the closure ran a backward pass by other means than loss.backward"),
        (_used_gradients, AttributeError, "NoneType"),
    ],
)
def test_bad_closures(closure: Callable[[nn.Module, KFAC], Any], error: type[Exception], message: str) -> None:
    torch.manual_seed(0)
    model = MODELS["convolutions"]().double()
    optimizer = _adaptive(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error, match=message):
        optimizer.step(lambda: closure(model, optimizer))
    for p, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, kept)


def _clipped_later(model: nn.Module, optimizer: KFAC) -> Any:
    value = closure_of(model, optimizer, CE, [(images(0), torch.arange(6) % 3)])()
    if optimizer.steps:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    return value


def test_closures_are_checked_at_every_step() -> None:
    torch.manual_seed(0)
    model = MODELS["convolutions"]().double()
    optimizer = _adaptive(model)
    optimizer.step(lambda: _clipped_later(model, optimizer))
    with pytest.raises(ValueError, match="expected equal ones: the closure must clear the gradients"):
        optimizer.step(lambda: _clipped_later(model, optimizer))


def test_an_error_in_a_repetition_leaves_the_factors_as_they_are() -> None:
    torch.manual_seed(0)
    model = MODELS["convolutions"]().double()
    optimizer = _adaptive(model)
    closure, fails = closure_of(model, optimizer, CE, [(images(0), torch.arange(6) % 3)]), itertools.count()

    def failing() -> Any:
        if next(fails):
            raise RuntimeError("no batch")
        return closure()

    optimizer.step(closure)
    before = {name: block.B.clone() for name, block in (optimizer.factors or {}).items()}
    with pytest.raises(RuntimeError, match="no batch"):
        optimizer.step(failing)
    for name, block in (optimizer.factors or {}).items():
        assert torch.equal(block.B, before[name])


def test_models_and_losses_without_derivatives_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 3)).double()
    model.append(type("Reversing", (nn.Module,), {"forward": lambda self, x: Reverse.apply(x)})())
    optimizer = _adaptive(model)
    with pytest.raises(ValueError, match="the model has no derivative in forward mode, which adapt_lr"):
        optimizer.step(closure_of(model, optimizer, CE, [(images(0), torch.arange(6) % 3)]))
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 3)).double()
    optimizer = _adaptive(model, nn.MSELoss(reduction="sum"))
    with pytest.raises(ValueError, match="the loss has no second derivative with respect to the outputs"):
        optimizer.step(closure_of(model, optimizer, Once.apply, [(images(0), torch.zeros(6, 3).double())]))


def test_parameters_outside_of_the_model_are_refused() -> None:
    model, outside = MODELS["linear"]().double(), nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = _adaptive(model, params=[*model.parameters(), outside])
    with pytest.raises(ValueError, match=r"params has a parameter of shape .* that is not one of the model's"):
        optimizer.step(
            closure_of(model, optimizer, lambda out, y: CE(outside * out, y), [(images(0), torch.arange(6) % 3)])
        )


def test_layers_outside_of_the_model_are_refused() -> None:
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 4)
    x, y = torch.randn(16, 6), torch.randint(4, (16,))
    optimizer = KFAC(body, nn.CrossEntropyLoss(), kl_clip=None, adapt_lr=True, batch_axis=0)
    other = torch.optim.SGD(head.parameters(), lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        other.zero_grad()
        value = nn.functional.cross_entropy(head(body(x)), y)
        value.backward()
        return value

    before = [p.detach().clone() for p in body.parameters()]
    with pytest.raises(ValueError, match=r"a tensor of shape \(4,.* not a parameter of the model, expected none"):
        optimizer.step(closure)
    assert all(map(torch.equal, before, body.parameters()))
    head.requires_grad_(False)
    optimizer.step(closure)
    assert not any(map(torch.equal, before, body.parameters()))
