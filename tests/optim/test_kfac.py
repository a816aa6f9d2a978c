"""KFAC as an optimizer: steps are what the factors say, in every setting, and training can be resumed."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from lensor.curvature import kfac
from lensor.optim import KFAC
from tests.support.digits import descent_loss, digits_loss

CE = nn.CrossEntropyLoss()


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 3)
    ).to(dtype)


def batch(seed: int = 0, count: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 7, 7, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (count,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range, loss: nn.Module = CE) -> list[Tensor]:
    found = []
    for seed in seeds:
        x, y = batch(seed)
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        found.append(value.detach())
    return found


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------------------------- the step
@pytest.mark.parametrize("loss", [CE, nn.CrossEntropyLoss(reduction="sum")], ids=["mean", "sum"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("fisher", ["empirical", "type-2", "forward-only"])
@pytest.mark.parametrize("method", ["cholesky", "eigen", "woodbury"])
def test_first_step_is_the_inverse_times_the_gradient(
    loss: nn.Module, approx: str, bias: str, fisher: str, method: str
) -> None:
    model = network()
    x, y = batch()
    expected_factors = kfac(model, loss, (x, y), approx=approx, fisher=fisher, bias=bias)
    gradients = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    v = dict(zip(dict(model.named_parameters()), gradients, strict=True))
    if method == "woodbury":
        inverses = {
            name: type(expected_factors)({name: block}).inverse(
                0.1, "woodbury" if block.root is not None else "cholesky"
            )
            for name, block in expected_factors.items()
        }
        solved: dict[str, Tensor] = {}
        for inverse in inverses.values():
            solved |= inverse @ {name: v[name] for name in inverse.shapes}
    else:
        solved = expected_factors.inverse(0.1, method) @ v
    before = parameters(model)
    options = {"approx": approx, "fisher": fisher, "bias": bias, "method": method, "kl_clip": None}
    optimizer = KFAC(model, loss, lr=0.3, momentum=0.9, damping=0.1, weight_decay=0.05, **options)
    loss(model(x), y).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        close(p.detach(), before[name] * (1 - 0.3 * 0.05) - 0.3 * solved[name])


def test_momentum_averages_and_intervals() -> None:
    """Five steps by hand, factors every second, inverses every third step."""
    model, by_hand = network(), network()
    optimizer = KFAC(
        model, CE, lr=0.1, momentum=0.8, damping=0.1, ema=0.7, factor_interval=2, inverse_interval=3, kl_clip=1e-3
    )
    train(model, optimizer, range(5))
    factors, inverse, buffers = None, None, {}
    for step in range(5):
        x, y = batch(step)
        gradients = torch.autograd.grad(CE(by_hand(x), y), list(by_hand.parameters()))
        v = dict(zip(dict(by_hand.named_parameters()), gradients, strict=True))
        if step % 2 == 0:
            new = kfac(by_hand, CE, (x, y), fisher="empirical", bias="joint")
            factors = new if factors is None else factors.ema_(new, 0.7)
        if step % 3 == 0:
            assert factors is not None
            inverse = factors.inverse(0.1, "cholesky")
        assert inverse is not None
        solved = inverse @ v
        length = 0.1**2 * sum((solved[name] * v[name]).sum() for name in v)
        clip = min(1.0, (1e-3 / float(length)) ** 0.5)
        assert clip < 1
        with torch.no_grad():
            for name, p in by_hand.named_parameters():
                buffers[name] = 0.8 * buffers.get(name, 0) + clip * solved[name]
                p -= 0.1 * buffers[name]
    for (name, a), b in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)


def test_parameters_without_factors_follow_their_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(100, 3)).double()
    with pytest.warns(UserWarning, match="BatchNorm2d"):
        optimizer = KFAC(model, CE, lr=0.1, momentum=0, kl_clip=None)
    x, y = batch()
    CE(model(x), y).backward()
    before, gradient = model[1].weight.detach().clone(), model[1].weight.grad
    assert gradient is not None
    optimizer.step()
    close(model[1].weight.detach(), before - 0.1 * gradient)


def test_groups_have_options_of_their_own() -> None:
    model, other = network(), network()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[3].parameters(), "damping": 1.0}]
    optimizer = KFAC(model, CE, lr=0.1, damping=0.1, kl_clip=None, params=groups)
    before = parameters(model)
    train(model, optimizer, range(1))
    close(parameters(model)["0.weight"], before["0.weight"])
    single = KFAC(other, CE, lr=0.1, damping=1.0, kl_clip=None)
    train(other, single, range(1))
    close(parameters(model)["3.weight"], parameters(other)["3.weight"])
    scheduler = torch.optim.lr_scheduler.StepLR(single, step_size=1, gamma=0.1)
    scheduler.step()
    assert single.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("fisher", ["empirical", "type-2", "forward-only"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_accumulated_gradients_are_one_batch(fisher: str, approx: str) -> None:
    whole, parts = network(), network()
    options = {"lr": 0.1, "damping": 0.1, "fisher": fisher, "approx": approx}
    one, four = KFAC(whole, CE, **options), KFAC(parts, CE, accumulation_steps=4, **options)
    train(whole, one, range(3))
    for seed in range(3):
        x, y = batch(seed)
        four.zero_grad()
        for part in range(4):
            (CE(parts(x[2 * part : 2 * part + 2]), y[2 * part : 2 * part + 2]) / 4).backward()
        four.step()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def _evaluate(model: nn.Module, y: Tensor) -> None:
    with torch.no_grad():
        model(batch(77)[0])
    model.eval()
    model(batch(78, count=3)[0])
    model.train()


def _train_a_copy(model: nn.Module, y: Tensor) -> None:
    CE(copy.deepcopy(model)(batch(77)[0]), y).backward()


@pytest.mark.parametrize("aside", [_evaluate, _train_a_copy])
def test_what_is_done_between_backward_and_step_collects_nothing(aside: Callable[[nn.Module, Tensor], None]) -> None:
    model, other = network(), network()
    a, b = KFAC(model, CE, damping=0.1), KFAC(other, CE, damping=0.1)
    for seed in range(3):
        x, y = batch(seed)
        for one, optimizer in ((model, a), (other, b)):
            optimizer.zero_grad()
            CE(one(x), y).backward()
            if one is other:
                aside(other, y)
            optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        close(p, q)


def test_a_model_outlives_its_optimizer() -> None:
    model = network()
    first = KFAC(model, CE, damping=0.1)
    train(model, first, range(1))
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    again = KFAC(model, CE, damping=0.1)
    train(model, again, range(1, 3))


def _usual(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    CE(model(x), y).backward()


def _zero_between(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor) -> None:
    value = CE(model(x), y)
    optimizer.zero_grad()
    value.backward()


def _failed_before(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    handle = model[3].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        model(100 * x)
    handle.remove()
    CE(model(x), y).backward()


def _logged_before(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    CE(model(100 * x), y).item()
    CE(model(x), y).backward()


def _given_up_before(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor) -> None:
    CE(model(x * torch.nan), y).backward()
    model.zero_grad()
    CE(model(x), y).backward()


def _two_passes_first(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    parts = [(x[:6], y[:6], 0.75), (x[6:], y[6:], 0.25)]
    sum(CE(model(a), b) * share for a, b, share in parts).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("fisher", ["empirical", "type-2", "forward-only"])
@pytest.mark.parametrize("loop", [_zero_between, _failed_before, _logged_before, _given_up_before])
def test_a_pass_counts_if_its_gradients_are_those_of_the_step(
    loop: Callable[[nn.Module, KFAC, Tensor, Tensor], None], fisher: str
) -> None:
    model, other = network(), network()
    a, b = (KFAC(one, CE, damping=0.1, fisher=fisher) for one in (model, other))
    for seed in range(3):
        x, y = batch(seed)
        _usual(model, a, x, y)
        a.step()
        loop(other, b, x, y)
        b.step()
    assert b.factors is not None
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        close(p, q)


def test_two_forward_passes_may_come_before_one_backward_pass() -> None:
    """With a sum, passes of 6 and 2 examples are one of 8."""
    loss = nn.CrossEntropyLoss(reduction="sum")
    model, other = network(), network()
    a, b = KFAC(model, loss, damping=0.1), KFAC(other, loss, damping=0.1)
    x, y = batch()
    loss(model(x), y).backward()
    (loss(other(x[:6]), y[:6]) + loss(other(x[6:]), y[6:])).backward()
    a.step()
    b.step()
    assert a.factors is not None
    assert b.factors is not None
    for name in a.factors:
        close(a.factors[name].A, b.factors[name].A)
        close(a.factors[name].B, b.factors[name].B)


def test_a_sum_is_accumulated_as_it_is() -> None:
    loss = nn.CrossEntropyLoss(reduction="sum")
    whole, parts = network(), network()
    one, two = KFAC(whole, loss, damping=0.1), KFAC(parts, loss, damping=0.1, accumulation_steps=2)
    for seed in range(3):
        x, y = batch(seed)
        one.zero_grad()
        loss(whole(x), y).backward()
        one.step()
        two.zero_grad()
        for part in (slice(0, 5), slice(5, 8)):
            loss(parts(x[part]), y[part]).backward()
        two.step()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_a_model_that_is_a_layer_has_factors() -> None:
    model = nn.Linear(4, 3)
    optimizer = KFAC(model, CE, fisher="empirical")
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    CE(model(x), y).backward()
    optimizer.step()
    assert optimizer.factors is not None
    expected = torch.cat([x, torch.ones(6, 1)], 1)
    torch.testing.assert_close(optimizer.factors["weight"].A[0], expected.T @ expected / 6)


def test_a_model_with_an_optimizer_is_pickled_and_copied() -> None:
    model = network()
    optimizer = KFAC(model, CE, damping=0.1)
    train(model, optimizer, range(1))
    assert optimizer.factors is not None
    before = optimizer.factors["0.weight"].A.clone()
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        CE(other(batch(7)[0]), batch(7)[1]).backward()
        assert [p.grad is not None for p in other.parameters()] == [True] * 4
    assert optimizer.tracker.pending is None
    assert torch.equal(before, optimizer.factors["0.weight"].A)
    assert "forward" in vars(model)
    assert len(model._forward_hooks) == 1
    del optimizer
    gc.collect()
    assert "forward" not in vars(model)
    assert len(model._forward_hooks) == 0


@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_a_bias_that_is_not_trained_is_none_of_the_block_s(bias: str) -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    optimizer = KFAC(model, CE, bias=bias)
    before = model[0].bias.clone()
    train(model, optimizer, range(2))
    assert optimizer.factors is not None
    assert optimizer.factors["0.weight"].names == ("0.weight",)
    assert "3.weight" in optimizer.factors
    assert torch.equal(before, model[0].bias)
    only = KFAC(model, CE, params=[model[3].weight])
    train(model, only, range(1))
    assert list(only.factors or ()) == ["3.weight"]


def test_steps_without_factors_are_told() -> None:
    model = network().eval()
    optimizer = KFAC(model, CE)
    with pytest.warns(UserWarning, match="no factors were collected"):
        train(model, optimizer, range(1))


def test_layers_where_no_gradient_is_recorded_are_refused() -> None:
    class Frozen(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self[0](x)
            return self[3](self[2](x))

    model = Frozen(*network())
    KFAC(model, CE, fisher="forward-only")
    with pytest.raises(ValueError, match=r"gradients are not recorded .*: 0; leave them out with layers=$"):
        train(model, KFAC(model, CE), range(1))


# ----------------------------------------------------------------------------------------------------- mixed precision
def test_scaled_losses_give_the_same_steps() -> None:
    model, other = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain, scaled = KFAC(model, CE, damping=0.1), KFAC(other, CE, damping=0.1, grad_scaler=scaler)
    train(model, plain, range(4))
    for seed in range(4):
        x, y = batch(seed)
        scaled.zero_grad()
        scaler.scale(CE(other(x), y)).backward()
        scaler.step(scaled)
        scaler.update()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_autocast_keeps_factors_in_single_precision() -> None:
    model, reference = network(torch.float32), network(torch.float32)
    optimizer, exact = (KFAC(one, CE, lr=0.05, damping=0.1) for one in (model, reference))
    for seed in range(5):
        x, y = batch(seed, dtype=torch.float32)
        for one, steps, cast in ((model, optimizer, True), (reference, exact, False)):
            steps.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
                value = CE(one(x), y)
            value.backward()
            steps.step()
    assert optimizer.factors is not None
    assert all(t.dtype == torch.float32 for block in optimizer.factors.values() for t in block.tensors().values())
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert float((a - b).norm()) < 0.05 * float(b.norm())


# --------------------------------------------------------------------------------------------------------- bad batches
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_bad_batches_leave_everything_as_it_was(bad: float, nonfinite: str) -> None:
    model = network()
    optimizer = KFAC(model, CE, damping=0.1, nonfinite=nonfinite)
    train(model, optimizer, range(2))
    before, state = parameters(model), copy.deepcopy(optimizer.state_dict())
    x, y = batch(2)
    x[3, 0, 2, 2] = bad
    optimizer.zero_grad()
    CE(model(x), y).backward()
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match=r"0\.weight.* is not finite, .*: no step was taken"):
            optimizer.step()
    else:
        optimizer.step()
    for name, p in parameters(model).items():
        assert torch.equal(p, before[name])
    assert str(optimizer.state_dict()) == str(state)
    train(model, optimizer, range(3, 4))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def flat(value: Any) -> list[Any]:
    """The leaves of a state, with every entry of its tensors."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in (key, *flat(value[key]))]
    if isinstance(value, list | tuple):
        return [leaf for one in value for leaf in flat(one)]
    return value.flatten().tolist() if isinstance(value, torch.Tensor) else [value]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_clip": None},
        {"fisher": "forward-only", "approx": "reduce", "method": "woodbury", "ema": 0.0},
        {"method": "low-rank", "rank": 2, "stagger": True, "factor_interval": 2, "inverse_interval": 2},
        {"factor_interval": 2, "inverse_interval": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("taken", [1, 2, 3, 4])
def test_a_single_bad_gradient_leaves_everything_as_it_was(bad: float, options: dict[str, Any], taken: int) -> None:
    model = network()
    optimizer = KFAC(model, CE, damping=0.1, nonfinite="skip", **options)
    train(model, optimizer, range(taken))
    before, state = parameters(model), flat(optimizer.state_dict())
    x, y = batch(taken)
    optimizer.zero_grad()
    CE(model(x), y).backward()
    last = list(model.parameters())[-1]
    assert last.grad is not None
    last.grad[-1] = bad
    optimizer.step()
    for name, p in parameters(model).items():
        assert torch.equal(p, before[name])
    assert flat(optimizer.state_dict()) == state


# ------------------------------------------------------------------------------------------------------------ resuming
@pytest.mark.parametrize("fisher", ["empirical", "mc", "forward-only"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_training_goes_on_bit_for_bit(fisher: str, approx: str, tmp_path: Path) -> None:
    options = {"lr": 0.1, "damping": 0.1, "fisher": fisher, "approx": approx, "factor_interval": 2, "seed": 5}
    options |= {"inverse_interval": 3, "method": "woodbury" if approx == "reduce" else "eigen"}
    model = network()
    optimizer = KFAC(model, CE, **options)
    train(model, optimizer, range(4))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    rest = train(model, optimizer, range(4, 9))

    again = network()
    resumed = KFAC(again, CE, **options)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for a, b in zip(train(again, resumed, range(4, 9)), rest, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_goes_on_bit_for_bit_in_half_precision_and_after_a_change_of_damping() -> None:
    model = network(torch.bfloat16)
    optimizer = KFAC(model, CE, damping=0.1, inverse_interval=4)

    def run(net: nn.Module, one: KFAC, seeds: range) -> None:
        for seed in seeds:
            x, y = batch(seed, dtype=torch.bfloat16)
            one.zero_grad()
            CE(net(x), y).backward()
            one.step()

    run(model, optimizer, range(5))
    optimizer.param_groups[0]["damping"] = 0.3  # counts from the next inversion on
    run(model, optimizer, range(5, 6))
    again = copy.deepcopy(model)
    resumed = KFAC(again, CE, damping=0.1, inverse_interval=4)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(model, optimizer, range(6, 11))
    run(again, resumed, range(6, 11))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


KILLED: dict[str, Any] = {
    "lr": 0.1,
    "damping": 0.1,
    "fisher": "mc",
    "seed": 5,
    "factor_interval": 2,
    "inverse_interval": 3,
}


def _saved_steps(file: str) -> None:
    """Train for ever, and save after each step."""
    torch.set_num_threads(1)
    model = network()
    optimizer = KFAC(model, CE, **KILLED)
    for seed in itertools.count():
        train(model, optimizer, range(seed, seed + 1))
        state = {"steps": seed + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, f"{file}.new")
        os.replace(f"{file}.new", file)


def test_a_killed_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    process = mp.get_context("spawn").Process(target=_saved_steps, args=(str(file),), daemon=True)
    process.start()
    end = time.monotonic() + 120
    while not (file.exists() and torch.load(file, weights_only=True)["steps"] >= 4):
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.join()
    saved = torch.load(file, weights_only=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, again = network(), network()
        train(model, KFAC(model, CE, **KILLED), range(saved["steps"] + 5))
        resumed = KFAC(again, CE, **KILLED)
        again.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        train(again, resumed, range(saved["steps"], saved["steps"] + 5))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_states_of_other_optimizers_are_refused() -> None:
    model = network()
    with pytest.raises(KeyError, match="expected a state of lensor"):
        KFAC(model, CE).load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())


# ----------------------------------------------------------------------------------------------------------- processes
class _Shared(nn.Module):
    """A model with a layer that runs twice, a layer with the same weight and another bias, and a normalisation."""

    def __init__(self, is_tied: bool = True) -> None:
        super().__init__()
        self.first, self.twin, self.norm, self.last = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.LayerNorm(4),
            nn.Linear(4, 3),
        )
        if is_tied:
            self.twin.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(torch.tanh(self.first(x.flatten(1)[:, :4])))
        return self.last(self.norm(self.twin(x)))


def _shared() -> nn.Module:
    torch.manual_seed(0)
    return _Shared().double()


def _rank(rank: int, file: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}", world_size=2, rank=rank)
    group = dist.group.WORLD
    assert group is not None
    found = {}
    for approx in ("expand", "reduce"):
        model = network()
        x, y = batch(0, count=10)
        share = slice(0, 4) if rank == 0 else slice(4, 10)
        factors = kfac(model, CE, (x[share], y[share]), approx=approx, group=group)
        found[f"factors {approx}"] = {name: (block.A, block.B) for name, block in factors.items()}
        others = kfac(_shared(), CE, (x[share], y[share]), approx=approx, group=group)
        found[f"others {approx}"] = {name: (block.A, block.B) for name, block in others.items()}
        wrapped = nn.parallel.DistributedDataParallel(model)
        method = "woodbury" if approx == "reduce" else "cholesky"
        optimizer = KFAC(wrapped, CE, lr=0.1, damping=0.1, approx=approx, method=method, group=group)
        for seed in range(4):
            x, y = batch(seed)
            half = slice(4 * rank, 4 * rank + 4)
            optimizer.zero_grad()
            CE(wrapped(x[half]), y[half]).backward()
            optimizer.step()
        found[f"parameters {approx}"] = parameters(model)
        found[f"shared {approx}"] = sorted(optimizer.inversion.solvers)
    try:
        kfac(_Shared(is_tied=rank == 0).double(), CE, batch(0), group=group)
    except ValueError as error:
        found["error"] = str(error)
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.start_processes(_rank, (str(tmp_path / "meet"), str(tmp_path / "found")), nprocs=2, start_method="spawn")
    found = [torch.load(tmp_path / f"found.{rank}", weights_only=True) for rank in range(2)]
    for approx in ("expand", "reduce"):
        whole = kfac(network(), CE, batch(0, count=10), approx=approx)
        others = kfac(_shared(), CE, batch(0, count=10), approx=approx)
        model = network()
        method = "woodbury" if approx == "reduce" else "cholesky"
        train(model, KFAC(model, CE, lr=0.1, damping=0.1, approx=approx, method=method), range(4))
        for one in found:
            for which, blocks in (("factors", whole), ("others", others)):
                assert set(one[f"{which} {approx}"]) == set(blocks)
                for name, (a, b) in one[f"{which} {approx}"].items():
                    torch.testing.assert_close(a, blocks[name].A, rtol=1e-6, atol=1e-9)
                    torch.testing.assert_close(b, blocks[name].B, rtol=1e-6, atol=1e-9)
            for name, p in one[f"parameters {approx}"].items():
                torch.testing.assert_close(p, parameters(model)[name], rtol=1e-6, atol=1e-8)
        shared = [one[f"shared {approx}"] for one in found]
        assert sorted(shared[0] + shared[1]) == ["0.weight", "3.weight"]  # each layer's inverse is with one of them
    assert all("another rank has other ones" in one["error"] for one in found)


# ------------------------------------------------------------------------------------------------------------ training
@pytest.mark.parametrize("fisher", ["empirical", "mc", "forward-only"])
def test_digits_are_learnt_in_fewer_steps(fisher: str) -> None:
    """Against gradient descent at the same number of steps, from the same start."""
    options = {"method": "woodbury", "ema": 0.0, "damping": 0.01} if fisher == "forward-only" else {"damping": 0.1}
    kfac_loss = digits_loss(lambda m: KFAC(m, CE, lr=0.1, fisher=fisher, approx="reduce", **options))
    assert kfac_loss < descent_loss()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping is 0.0 in a group of parameters, expected a positive number"),
        ({"ema": 1.0}, "ema is 1.0, expected"),
        ({"lr": -1.0}, "lr is .*, expected a finite number of at least 0"),
        ({"fisher": "ef"}, "fisher is 'ef', expected one of"),
        ({"method": "lu"}, "method is 'lu', expected one of 'cholesky', 'eigen', 'woodbury'"),
        ({"factor_interval": 0}, "factor_interval is 0, expected a whole number of at least 1"),
        ({"layers": ["nope"]}, "layers has 'nope'"),
        ({"params": [nn.Parameter(torch.ones(3))]}, "params has no parameter of the model"),
        ({"params": [{"params": network().parameters()}]}, "params has no parameter of the model"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFAC(network(), CE, **options)


def test_losses_that_need_targets_are_refused_where_there_are_none() -> None:
    with pytest.raises(ValueError, match="expected 'empirical' for a loss whose Hessian depends on targets"):
        KFAC(network(), nn.CrossEntropyLoss(weight=torch.ones(3)), fisher="mc")
    with pytest.raises(ValueError, match="expected 'empirical' for a loss whose Hessian depends on targets"):
        KFAC(network(), nn.CrossEntropyLoss(ignore_index=0), fisher="type-2")
