"""What each rank of a test with sharded parameters does.

It is a module of its own, so that a server process can import it once and fork the ranks.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lensor.curvature import kfac
from lensor.optim import KFAC

CE = nn.CrossEntropyLoss()


class Block(nn.Module):
    """A convolution with groups and a bias, whose channels ranks cannot share evenly, and a normalisation."""

    def __init__(self, c_in: int, c_out: int, groups: int, norm: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1, groups=groups)
        self.norm = nn.GroupNorm(norm, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.conv(x)))


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(Block(2, 6, 2, 3), Block(6, 5, 1, 1), nn.Flatten(), nn.Linear(80, 7)),
        *(nn.LayerNorm(7), nn.Linear(7, 3, bias=False)),
    ).to(dtype)


def batch(seed: int = 0, count: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (count,), generator=generator)


def share(seed: int, count: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """This rank's examples."""
    x, y = batch(seed, count, dtype)
    each = count // dist.get_world_size()
    mine = slice(each * dist.get_rank(), each * (dist.get_rank() + 1))
    return x[mine], y[mine]


def sharded(dtype: torch.dtype = torch.float64, wrap: str = "blocks", **options: Any) -> Any:
    """The model, sharded as a whole only, or its blocks as well."""
    model = network(dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if wrap == "blocks":
        for module in (model[0], model[1], model[3]):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, gathered from all ranks."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.state_dict().items()
    }


def train(
    model: nn.Module, optimizer: KFAC, seeds: range, data: Callable[..., tuple[Tensor, Tensor]] = batch, **options: Any
) -> None:
    for seed in seeds:
        x, y = data(seed, **options)
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()


def accumulate(
    model: Any, optimizer: KFAC, data: Callable[..., tuple[Tensor, Tensor]], reshard: bool | None = None
) -> None:
    """Two steps of two backward passes each; ranks sum their gradients after the second one only."""
    for step in range(2):
        optimizer.zero_grad()
        for part in range(2):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(part == 1)
            if reshard is not None:
                model.set_reshard_after_backward(reshard or part == 1)
            x, y = data(2 * step + part)
            (CE(model(x), y) / 2).backward()
        optimizer.step()


def discard(
    model: Any, optimizer: KFAC, data: Callable[..., tuple[Tensor, Tensor]], reshard: bool | None = None
) -> None:
    """Steps after gradients that do not count."""
    for step in range(5):
        optimizer.zero_grad()
        x, y = data(10 + step)
        inputs = x.requires_grad_()
        if step == 4:
            torch.autograd.grad(CE(model(inputs), y), [inputs])
        else:
            CE(model(inputs), y).backward()
        if step == 0:
            model.zero_grad()
        elif step == 1:
            model.zero_grad(set_to_none=False)
        elif step == 2:
            for p in model.parameters():
                p.grad = None
        elif step == 3:
            optimizer.zero_grad()
        x, y = data(step)
        CE(model(x), y).backward()
        with torch.no_grad():
            model(data(0)[0])  # FSDP then keeps the whole parameters of the root
        optimizer.step()


def repeat(model: Any, optimizer: KFAC, data: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """More backward passes per step than the optimizer expects, after each of which ranks sum their gradients."""
    for step in range(2):
        optimizer.zero_grad()
        for part in range(2):
            x, y = data(2 * step + part)
            (CE(model(x), y) / 2).backward()
        optimizer.step()


def freeze(model: Any, optimizer: KFAC, data: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Steps with some frozen layers, between steps in which they are trained."""
    for step in range(6):
        model[0].requires_grad_(step not in (2, 3))
        train(model, optimizer, range(step, step + 1), data)


def scale(model: nn.Module, optimizer: KFAC, data: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Steps with scaled losses; one of them is left out because one rank's gradients are not finite."""
    scaler = optimizer.grad_scaler
    for step in range(4):
        x, y = data(step)
        if step == 2:
            x = x * torch.where(torch.arange(len(x)) == 0, torch.inf, 1.0)[:, None, None, None]
        optimizer.zero_grad()
        scaler.scale(CE(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()


SMALL = {"lr": 0.1, "damping": 0.1}
CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("blocks", torch.float64, {"method": "cholesky", "factor_interval": 2, "inverse_interval": 3, "ema": 0.7}),
    ("root", torch.float64, {"method": "eigen", "weight_decay": 0.05, "bias": "separate"}),
    ("blocks", torch.float64, {"method": "woodbury", "approx": "reduce"}),
    ("root", torch.float64, {"approx": "reduce", "fisher": "type-2", "kl_clip": None}),
    ("blocks", torch.float64, {"fisher": "type-2", "bias": "separate"}),
    ("blocks", torch.float64, {"approx": "reduce", "method": "woodbury", "fisher": "forward-only", "ema": 0}),
    ("blocks", torch.float32, {"batch_axis": 0}),
    ("blocks", torch.float64, {"method": "low-rank", "rank": 4, "params": "groups", "inverse_interval": 2}),
    ("blocks", torch.float64, {"factor_dtype": torch.bfloat16, "inverse_dtype": torch.bfloat16, "inverse_interval": 2}),
    ("blocks", torch.float64, {"method": "inverse-free"}),
    ("root", torch.float64, {"method": "inverse-free", "structure": "block", "block_size": 9, "approx": "reduce"}),
]
"""How the model is wrapped, its dtype, and options of the optimizer."""


PASSES = [
    ("accumulate", True, "empirical"),
    ("accumulate", False, "empirical"),
    ("accumulate", None, "type-2"),
    ("discard", None, "empirical"),
    ("discard", False, "type-2"),
]
"""What the passes do, `reshard_after_forward`, and the Fisher matrix."""


def optimizer_of(model: nn.Module, options: dict[str, Any]) -> KFAC:
    """The optimizer; with params="groups", AdamW updates the normalisations."""
    if options.get("params") == "groups":
        curved = [p for name, p in model.named_parameters() if "norm" not in name and not name.startswith("4.")]
        others = [p for p in model.parameters() if all(p is not one for one in curved)]
        options = options | {"params": [{"params": curved}, {"params": others, "use_kfac": False, "lr": 0.01}]}
    return KFAC(model, CE, **SMALL, **options)


def equal(places: range) -> dict[str, Any]:
    """Parameters after some steps, and the blocks that this rank has."""
    found: dict[str, Any] = {}
    for place in places:
        wrap, dtype, options = CASES[place]
        model = sharded(dtype, wrap)
        optimizer = optimizer_of(model, options)
        train(model, optimizer, range(4), share, dtype=dtype)
        states = {type(one) for state in optimizer.state.values() for name, one in state.items() if name != "step"}
        found[f"case {place}"] = whole(model), sorted(optimizer.inversion.blocks), states == {DTensor}
        assert set(optimizer.inversion.solvers) == set(optimizer.inversion.blocks)
    return found


def passes() -> dict[str, Any]:
    """Parameters after passes that accumulate or discard gradients, for several settings of FSDP."""
    found: dict[str, Any] = {}
    for name, reshard, fisher in PASSES:
        run, count = (accumulate, 2) if name == "accumulate" else (discard, 1)
        model = sharded(**({} if reshard is None else {"reshard_after_forward": reshard}))
        run(model, KFAC(model, CE, **SMALL, accumulation_steps=count, fisher=fisher), share, reshard)
        found[f"{name} {fisher} {reshard}"] = whole(model)
    for name, run, options in (("repeat", repeat, {}), ("freeze", freeze, {"inverse_interval": 4})):
        model = sharded()
        run(model, KFAC(model, CE, **SMALL, **options), share)
        found[name] = whole(model)
    model, scaler = sharded(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scale(model, KFAC(model, CE, **SMALL, grad_scaler=scaler), share)
    found["scale"] = whole(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(torch.float32, mp_policy=policy)
    optimizer = KFAC(model, CE, **SMALL, kl_clip=None, momentum=0.0)
    train(model, optimizer, range(1), share, dtype=torch.float32)
    found["mixed"] = whole(model)
    found["mixed factors"] = {name: (block.A, block.B) for name, block in (optimizer.factors or {}).items()}
    return found


def errors(folder: str) -> dict[str, Any]:
    """Errors, which all ranks must raise, and steps that go on afterwards."""
    rank, found = dist.get_rank(), {}

    def note(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    plain = nn.Sequential(fully_shard(nn.Linear(3, 3), mesh=init_device_mesh("cpu", (2,))), nn.Linear(3, 3))
    note("not sharded", lambda: KFAC(plain, CE))
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards"))
    note("two dimensions", lambda: KFAC(fully_shard(network(), mesh=both), CE))
    note("offloaded", lambda: KFAC(sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)), CE))
    alone = [dist.new_group([one]) for one in range(2)][rank]
    note("group", lambda: KFAC(sharded(), CE, group=alone))
    model = sharded()
    optimizer = KFAC(model, CE, **SMALL)
    model.set_requires_gradient_sync(False)
    x, y = share(0)
    CE(model(x), y).backward()
    note("not summed", optimizer.step)
    model.set_requires_gradient_sync(True)
    before = whole(model)
    optimizer.zero_grad()
    bad = x * (float("nan") if rank else 1.0)
    CE(model(bad), y).backward()
    assert optimizer.sharding is not None
    found["started"] = bool(optimizer.sharding.reduction._running)
    note("not finite", optimizer.step)
    model.train(False)
    CE(model(x), y).backward()
    optimizer.zero_grad()
    model.train()
    unchanged = all(torch.equal(p, before[name]) for name, p in whole(model).items())
    found["unchanged"] = unchanged and optimizer.factors is None and optimizer.steps == 0

    def fail(*_: Any) -> None:
        raise torch.linalg.LinAlgError("not positive definite")

    note("staggered", lambda: KFAC(sharded(), CE, stagger=True))
    train(model, optimizer, range(1), share)
    invert, optimizer.inversion.invert = optimizer.inversion.invert, fail if rank else optimizer.inversion.invert
    note("one rank", lambda: train(model, optimizer, range(1, 2), share))
    optimizer.inversion.invert = invert
    train(model, optimizer, range(2, 3), share)
    found["steps"] = optimizer.steps

    state = optimizer.state_dict()
    parts = state["state"][0]["kfac"]
    state["state"][0]["kfac"] = {"rank 0 of 4": b"", "rank 3 of 4": b""}
    note("other ranks", lambda: optimizer.load_state_dict(state))
    state["state"][0] = {key: one for key, one in state["state"][0].items() if key != "kfac"}
    note("other optimizer", lambda: optimizer.load_state_dict(state))
    torch.save({**state, "state": {**state["state"], 0: {**state["state"][0], "kfac": parts}}}, f"{folder}/{rank}.pt")
    again = sharded()
    resumed = KFAC(again, CE, **SMALL)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(torch.load(f"{folder}/{rank}.pt", weights_only=True))
    for one, other in ((model, optimizer), (again, resumed)):
        train(one, other, range(3, 6), share)
    found["saved by rank"] = all(torch.equal(p, whole(model)[name]) for name, p in whole(again).items())

    # Ranks with different numbers of examples, one of which needs no trial pass.
    model = sharded()
    optimizer = KFAC(model, CE, **SMALL, fisher="type-2")
    x, y = batch(0)
    mine = slice(0, 1) if rank == 0 else slice(1, 8)
    expected = kfac(network(), CE, (x, y), fisher="type-2", bias="joint")
    CE(model(x[mine]), y[mine]).backward()
    optimizer.step()
    for name, block in (optimizer.factors or {}).items():
        torch.testing.assert_close(block.A, expected[name].A, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(block.B, expected[name].B, rtol=1e-10, atol=1e-12)
    found["uneven"] = sorted(optimizer.factors or ())
    return found


KILLED: dict[str, Any] = {**SMALL, "fisher": "mc", "seed": 5, "factor_interval": 2, "inverse_interval": 3}


def _state(model: nn.Module, optimizer: KFAC) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def without_momentum(folder: str) -> dict[str, Any]:
    """Steps after a checkpoint, and the same steps without one; parameters have no state of their own."""
    options = {**KILLED, "momentum": 0.0}
    model = sharded()
    optimizer = KFAC(model, CE, **options)
    train(model, optimizer, range(2), share)
    optimizer.zero_grad()
    dcp.save(_state(model, optimizer), checkpoint_id=f"{folder}/state")
    again = sharded()
    resumed = KFAC(again, CE, **options)
    state = _state(again, resumed)
    dcp.load(state, checkpoint_id=f"{folder}/state")
    again.load_state_dict(state["model"])
    set_optimizer_state_dict(again, resumed, state["optimizer"])
    resumed.zero_grad()
    assert _state(again, resumed)["optimizer"].keys()
    assert resumed.steps == optimizer.steps == 2
    for one, other in ((model, optimizer), (again, resumed)):
        train(one, other, range(2, 5), share)
    return {"resumed": whole(again), "expected": whole(model)}


def save_for_ever(folder: str) -> dict[str, Any]:
    """Train for ever, and save after each step."""
    model = sharded()
    optimizer = KFAC(model, CE, **KILLED)
    for step in itertools.count(1):
        train(model, optimizer, range(step - 1, step), share)
        dcp.save(_state(model, optimizer), checkpoint_id=f"{folder}/step {step}")
        if dist.get_rank() == 0:
            Path(f"{folder}/last.new").write_text(str(step))
            os.replace(f"{folder}/last.new", f"{folder}/last")
    raise AssertionError


def resume(folder: str) -> dict[str, Any]:
    """Three steps after the last checkpoint, and the same steps without an interruption."""
    step = int(Path(f"{folder}/last").read_text())
    model = sharded()
    optimizer = KFAC(model, CE, **KILLED)
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=f"{folder}/step {step}")
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert optimizer.steps == step
    train(model, optimizer, range(step, step + 3), share)
    expected = sharded()
    train(expected, KFAC(expected, CE, **KILLED), range(step + 3), share)
    return {"resumed": whole(model), "expected": whole(expected)}


def rank(rank: int, count: int, folder: str, name: str, arguments: tuple[Any, ...]) -> None:
    """Run one of the functions above on one rank, and save what it returns."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="curvature is not supported")
    dist.init_process_group("gloo", f"file://{folder}/meet {name}", rank=rank, world_size=count)
    found = globals()[name](*arguments)
    torch.save(found, f"{folder}/{name} {rank}")
    dist.destroy_process_group()
