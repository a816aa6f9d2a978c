"""Curvature of models as people write them: shared weights, several outputs, other axes, hooks, threads, compilers."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lensor.nn
import lensor.sampling
from lensor import curvature
from lensor.curvature import kfac, per_example_gradient_norms, per_example_gradients, trials
from lensor.curvature.layers import layers_of
from lensor.curvature.trials import find_batch_axes
from lensor.curvature.watching import Targets
from lensor.optim import KFAC

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
SUM = nn.CrossEntropyLoss(reduction="sum")


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def by_example(model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Per-example gradients of a summed loss, one example at a time."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(loss(model(x[n : n + 1]), y[n : n + 1]), list(named.values()), materialize_grads=True)
        for n in range(len(x))
    ]
    return {name: torch.stack([row[at] for row in rows]) for at, name in enumerate(named)}


def check_by_example(model: nn.Module, x: Tensor, y: Tensor, loss: Any = SUM) -> None:
    """Gradients, norms, the NTK and the GGN diagonal against loops over examples."""
    want = by_example(model, loss, x, y)
    found, norms = per_example_gradients(model, loss, (x, y)), per_example_gradient_norms(model, loss, (x, y))
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient)
        torch.testing.assert_close(norms[name], gradient.reshape(len(x), -1).norm(dim=1))
    if not isinstance(model(x), Tensor) or model(x).ndim != 2:
        return
    outputs = model(x).shape[1]
    rows = [by_example(model, lambda f, _, c=c: f[:, c].sum(), x, y) for c in range(outputs)]
    jacobian = torch.stack([torch.cat([row[name].reshape(len(x), -1) for name in want], 1) for row in rows], 1)
    torch.testing.assert_close(curvature.empirical_ntk(model, x), torch.einsum("ncp,mdp->nmcd", jacobian, jacobian))
    if loss is SUM:
        p = model(x).detach().softmax(1)
        hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        diagonal = curvature.ggn_diagonal(model, loss, (x, y))
        for name in want:
            one = torch.stack([row[name].reshape(len(x), -1) for row in rows], 1)
            expected = torch.einsum("ncp,ncd,ndp->p", one, hessian, one).reshape(want[name].shape[1:])
            torch.testing.assert_close(diagonal[name], expected)


# ------------------------------------------------------------------------------------- parameters used elsewhere
class Reused(nn.Module):
    """A convolution or linear layer whose weight something else takes, too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer, self.last = how, nn.Conv1d(2, 2, 3, padding=1), nn.Linear(8, 3)
        self.other = nn.Conv1d(2, 2, 3)
        if how == "tied":
            self.other.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        h, weight = torch.tanh(self.layer(x)), self.layer.weight
        if self.how == "twice":
            h = torch.tanh(self.layer(h))
        elif self.how == "function":
            h = F.conv1d(h, weight, padding=1)
        elif self.how == "transposed":
            h = F.conv_transpose1d(h, weight, padding=1)
        elif self.how == "tied":
            h = F.pad(self.other(h), (1, 1))
        elif self.how == "penalty":
            h = h * weight.square().sum()
        elif self.how == "product":
            h = torch.einsum("nci,dck->ndi", h, weight)
        elif self.how == "bias":
            h = h + self.layer.bias[:, None]  # type: ignore[index]
        elif self.how == "detached":
            h = h * weight.detach().sum()
        return self.last(h.flatten(1)[:, :8])


@pytest.mark.parametrize("how", ["twice", "function", "transposed", "tied", "detached", "penalty", "product", "bias"])
def test_calls_of_a_layer_s_function_count_wherever_they_are(how: str) -> None:
    model, x, y = Reused(how).double(), torch.randn(3, 2, 4).double(), torch.tensor([0, 2, 1])
    if how != "tied":
        del model.other
    check_by_example(model, x, y)
    if how != "detached":
        with pytest.raises(ValueError, match=r"shared|tied|another kind|outside of the layer"):
            curvature.ggn_mini_blocks(model, SUM, (x, y))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", ["penalty", "product", "bias"])
def test_other_uses_of_a_parameter_are_refused_by_name(how: str, frozen: bool) -> None:
    model, data = Reused(how).double(), (torch.randn(3, 2, 4).double(), torch.tensor([0, 2, 1]))
    del model.other
    if frozen:
        model.layer.requires_grad_(False)
    name = "layer.bias" if how == "bias" else "layer.weight"
    calls = [partial(kfac, others="skip"), curvature.ggn_mini_blocks]
    if frozen:  # autograd does not record these uses
        calls += [kfac, curvature.hessian_diagonal, curvature.ggn_diagonal, per_example_gradients]
    for call in calls:
        with pytest.raises(ValueError, match=f"parameter '{name}' of layer 'layer' is also used outside of the layer"):
            call(model, SUM, data)
    assert "last.weight" in kfac(model, SUM, data, layers=["last"])


def test_a_weight_used_in_a_function_of_one_s_own_is_refused() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x * weight.sum()

        @staticmethod
        def backward(ctx: Any, v: Tensor) -> Any:
            x, weight = ctx.saved_tensors
            return v * weight.sum(), torch.ones_like(weight) * (v * x).sum()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return Double.apply(self.layer(x), self.layer.weight)

    with pytest.raises(ValueError, match=r"'layer.weight' of layer 'layer' is also used .* by DoubleBackward"):
        per_example_gradients(Model(), CE, (torch.randn(4, 3), torch.tensor([0, 1, 2, 0])))


# ------------------------------------------------------------------------------------------------------ outputs
class Heads(nn.Module):
    def __init__(self, form: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.form = nn.Linear(4, 3), nn.Linear(4, 3), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.a(x), self.b(x))


@pytest.mark.parametrize(
    "form", [lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: {0: a, 1: b}, lambda a, b: {0: (a,), 1: [b]}]
)
def test_several_outputs_reach_the_loss_whole(form: Callable[..., Any]) -> None:
    def loss(out: Any, y: Tensor) -> Tensor:
        first = out[0][0] if isinstance(out[0], tuple) else out[0]
        second = out[1][0] if isinstance(out[1], list) else out[1]
        return ((first - y) ** 2).sum() + ((second + y) ** 4).sum()

    model, x, y = Heads(form).double(), torch.randn(3, 4).double(), torch.randn(3, 3).double()
    check_by_example(model, x, y, loss)
    for call in (kfac, curvature.ggn_diagonal):
        with pytest.raises(TypeError, match=r"output has type (tuple|list|dict) with 2 entries, expected one tensor"):
            call(model, MSE, (x, y))
    optimizer = KFAC(model, MSE)
    with pytest.raises(TypeError, match="with 2 entries, expected one tensor"):
        model(x)
    del optimizer


# --------------------------------------------------------------------------------------------------------- axes
class Rows(nn.Module):
    """Layers that see the examples elsewhere than in the first axis, or share it with time."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer: nn.Module = nn.Conv1d(4, 5, 1) if how.startswith("frames") else nn.Linear(4, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if self.how == "time first":
            return self.last(torch.tanh(self.layer(x.transpose(0, 1))).mean(0))
        rows = x.transpose(0, 1).flatten(0, 1) if "inner" in self.how else x.flatten(0, 1)
        if self.how.startswith("frames"):
            h = torch.tanh(self.layer(rows[:, :, None]))[:, :, 0]
        else:
            h = torch.tanh(self.layer(rows))
        h = h.unflatten(0, (t, b)).transpose(0, 1) if "inner" in self.how else h.unflatten(0, (b, t))
        return self.last(h.mean(1))


@pytest.mark.parametrize("how", ["time first", "rows, outer", "rows, inner", "frames, outer", "frames, inner"])
@pytest.mark.parametrize("time", [1, 3, 5])
def test_the_axis_of_the_examples_is_found(how: str, time: int) -> None:
    model, x, y = Rows(how).double(), torch.randn(3, time, 4).double(), torch.tensor([0, 2, 1])
    check_by_example(model, x, y)
    a, b = (kfac(one, SUM, (x, y), approx="reduce") for one in (model, _batch_first(model)))
    for name in a:
        torch.testing.assert_close(a[name].A.squeeze(), b[name].A.squeeze())
        torch.testing.assert_close(a[name].B, b[name].B)


def _batch_first(model: Rows) -> nn.Module:
    """The same function with the examples first everywhere."""
    other = copy.deepcopy(model)

    def forward(x: Tensor) -> Tensor:
        if isinstance(other.layer, nn.Conv1d):
            return other.last(torch.tanh(other.layer(x.transpose(1, 2))).mean(2))
        return other.last(torch.tanh(other.layer(x)).mean(1))

    other.forward = forward  # type: ignore[method-assign]
    return other


def test_equal_examples_in_an_unknown_order_are_told_apart_by_noise() -> None:
    model, x, y = Rows("rows, inner").double(), torch.ones(3, 4, 4).double(), torch.tensor([0, 2, 1])
    check_by_example(model, x, y)


@pytest.mark.parametrize("how", ["reversed", "centred", "random", "two views", "reversed outputs"])
def test_examples_that_are_mixed_or_reordered_are_refused(how: str) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).tanh()
            if how == "reversed":
                return self.last(h.flip(0)).flip(0)
            if how == "reversed outputs":
                return self.last(h).flip(0)
            if how == "two views":
                return self.last(torch.cat([h, h + 1])).unflatten(0, (2, -1)).mean(0)
            return self.last(h - h.mean(0) if how == "centred" else h + torch.randn_like(h))

    model, x, y = Mixing().double(), torch.randn(4, 4).double(), torch.tensor([0, 2, 1, 0])
    if how == "two views":
        check_by_example(model, x, y)
        return
    calls: list[Callable[[], Any]] = [
        lambda: curvature.ggn_diagonal(model, SUM, (x, y)),
        lambda: curvature.empirical_ntk(model, x),
    ]
    if how != "reversed outputs":  # where a gradient is still that of the example that a layer sees
        calls += [
            lambda: per_example_gradients(model, SUM, (x, y)),
            lambda: per_example_gradient_norms(model, SUM, (x, y)),
        ]
    for call in calls:
        with pytest.raises(ValueError, match=r"rows of an example (that )?depend on the other examples"):
            call()


def test_layers_of_a_table() -> None:
    """A layer whose input does not depend on the examples: all examples share its outputs."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(2, 3), nn.Linear(3, 3)
            self.register_buffer("table", torch.randn(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(x + self.layer(self.table).mean(0)))

    model, data = Table().double(), (torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 0]))
    check_by_example(model, *data)
    with pytest.raises(
        ValueError, match=r"layer 'layer' has an input of shape \(4, 2\) that does not depend on the number"
    ):
        kfac(model, CE, data, others="skip")
    found, diagonal = kfac(model, CE, data), curvature.ggn_diagonal(model, CE, data)
    assert not found["layer.weight"].factored
    torch.testing.assert_close(found.diagonal()["layer.weight"], diagonal["layer.weight"])


def test_a_model_of_one_size_needs_to_be_told() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(x.transpose(0, 1).reshape(3 * 3, 4)).view(3, 3, 5).mean(0))

    model, x, y = Fixed().double(), torch.randn(3, 3, 4).double(), torch.tensor([0, 2, 1])
    with pytest.raises(ValueError, match=r"does not run with a number of examples other than 3 .* batch_axis="):
        per_example_gradients(model, SUM, (x, y))
    other = Rows("rows, inner").double()
    other.load_state_dict(model.state_dict())
    found = per_example_gradients(model, SUM, (x, y), batch_axis={"layer": "inner", "last": 0})
    value = SUM(model(x), y)
    want = torch.autograd.grad(value, model.layer.weight)[0]
    torch.testing.assert_close(found["layer.weight"].sum(0), want)
    with pytest.raises(ValueError, match="batch_axis of 'layer' is 'middle', expected an axis, 'outer' or 'inner'"):
        per_example_gradients(model, SUM, (x, y), batch_axis={"layer": "middle", "last": 0})


def test_a_trial_pass_leaves_the_model_as_it_was() -> None:
    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(4), nn.Linear(4, 3)
            self.seen: list[Tensor] = []
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            self.seen.append(x.detach())
            self.last = x.detach()
            return self.layer(F.dropout(x, 0.5))

    model, data = Recording(), (torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))
    state, before = torch.get_rng_state(), {name: b.clone() for name, b in model.named_buffers()}
    kfac(model, CE, data, layers=["layer"])
    assert [type(one) for one in (*model.seen, model.last)] == [Tensor, Tensor]
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    model(data[0])
    assert torch.equal(after, torch.get_rng_state())  # one pass has drawn numbers


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_trial_passes_of_the_optimizer_leave_statistics_and_draws_alone(approx: str) -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(9, 3))
    other, x = copy.deepcopy(model), torch.randn(4, 2, 5)
    optimizer = KFAC(model, CE, approx=approx)
    state = torch.get_rng_state()
    out = model(x)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    assert torch.equal(out, other(x))
    assert torch.equal(after, torch.get_rng_state())
    for (name, a), (_, b) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    del optimizer


# ------------------------------------------------------------------------------------------------ losses, hooks
def test_subclasses_of_losses_are_not_their_parents() -> None:
    class Weighted(nn.MSELoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return (input.new_tensor([1.0, 10.0]) * (input - target) ** 2).sum()

    model, x, y = nn.Linear(3, 2).double(), torch.randn(6, 3).double(), torch.randn(6, 2).double()
    for call in (kfac, curvature.ggn_diagonal, curvature.ggn_mini_blocks):
        with pytest.raises(TypeError, match="the Hessian of other losses is unknown"):
            call(model, Weighted(), (x, y))
    with pytest.raises(TypeError, match="the Hessian of other losses is unknown"):
        KFAC(model, Weighted())
    changed = nn.MSELoss()
    changed.forward = Weighted().forward  # type: ignore[method-assign]
    with pytest.raises(TypeError, match="the Hessian of other losses is unknown"):
        kfac(model, changed, (x, y))
    check_by_example(model, x, y, Weighted())
    found = curvature.hessian_diagonal(model, Weighted(), (x, y))["weight"]
    hessian = torch.autograd.functional.hessian(lambda w: Weighted()(F.linear(x, w, model.bias), y), model.weight)
    torch.testing.assert_close(found.flatten(), hessian.reshape(6, 6).diagonal())  # type: ignore[union-attr]


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "output": lambda m: m.register_forward_hook(lambda _, args, out: 3 * out),
    "output first": lambda m: m.register_forward_hook(lambda _, args, out: out.tanh(), prepend=True),
    "output always": lambda m: m.register_forward_hook(lambda _, args, out: 3 * out, always_call=True),
    "input": lambda m: m.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "named input": lambda m: m.register_forward_pre_hook(
        lambda _, args, named: ((args[0].sin(),), named), with_kwargs=True
    ),
    "gradient": lambda m: m.register_full_backward_hook(
        lambda _, grads, outs: tuple(g if g is None else 2 * g for g in grads)
    ),
    "every": lambda m: nn.modules.module.register_module_forward_hook(
        lambda one, args, out: 3 * out if one is m else None
    ),
    "every input": lambda m: nn.modules.module.register_module_forward_pre_hook(
        lambda one, args: (2 * args[0],) if one is m else None
    ),
    "whole": lambda m: m.register_forward_hook(lambda _, args, out: out),
}


@pytest.mark.parametrize("place", [0, 2, None])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_the_user_count(hook: str, place: int | None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    handle = HOOKS[hook](model if place is None else model[place])
    x, y = torch.randn(3, 4).double(), torch.tensor([0, 2, 1])
    try:
        check_by_example(model, x, y)
        factors = kfac(model, SUM, (x, y))
        optimizer = KFAC(model, SUM, fisher="type-2", bias="separate", ema=0)
        SUM(model(x), y).backward()
        optimizer.step()
        assert optimizer.factors is not None
        for name in factors:
            torch.testing.assert_close(optimizer.factors[name].B, factors[name].B)
            torch.testing.assert_close(optimizer.factors[name].A, factors[name].A)
    finally:
        handle.remove()


def test_hooks_see_no_fake_tensors() -> None:
    seen: list[type] = []
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].register_forward_hook(lambda _, args, out: seen.append(type(out)))
    per_example_gradients(model, CE, (torch.randn(3, 4), torch.tensor([0, 2, 1])))
    assert set(seen) == {Tensor}


# ----------------------------------------------------------------------------------------------------- in place
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 8), (4, 6, 8), (4, 2, 3, 8)])
@pytest.mark.parametrize("change", ["relu", "mul", "part", "flat"])
def test_in_place_operations_after_a_layer(change: str, shape: tuple[int, ...], bias: bool) -> None:
    class Model(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.inplace = inplace
            self.first = nn.Linear(8, 5, bias=bias)
            self.last = nn.LazyLinear(2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            if change == "relu":
                h = F.relu(h, inplace=self.inplace)
            elif change == "mul":
                h = h.mul_(2) if self.inplace else h * 2
            elif change == "part":
                if self.inplace:
                    h[..., :2].mul_(3)
                else:
                    h = torch.cat([3 * h[..., :2], h[..., 2:]], -1)
            elif self.inplace:
                h.flatten(1).tanh_()
            else:
                h = h.tanh()
            return self.last(h.flatten(1))

    plain, written = Model(False), Model(True)
    x, y = torch.randn(shape).double(), torch.randint(2, (4,))
    for model in (plain.double(), written.double()):
        model(x)
    written.load_state_dict(plain.state_dict())
    a, b = kfac(plain, CE, (x, y)), kfac(written, CE, (x, y))
    for name in a:
        assert a[name].B.norm() > 0
        torch.testing.assert_close(a[name].B, b[name].B)
    check_by_example(written, x, y)


@pytest.mark.parametrize("convert", [lensor.nn.convert, lambda m: lensor.sampling.convert(m, {"n": 1.0})])
def test_converted_and_sampled_models(convert: Callable[[nn.Module], nn.Module]) -> None:
    plain = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=2, padding_mode="circular", groups=2),
        nn.ReLU(),
        nn.ConvTranspose1d(4, 2, 3, stride=2),
        nn.Flatten(),
        nn.Linear(26, 3),
    ).double()
    model, x, y = convert(copy.deepcopy(plain)), torch.randn(3, 2, 4).double(), torch.tensor([0, 2, 1])
    a, b = kfac(plain, CE, (x, y)), kfac(model, CE, (x, y))
    for name in a:
        torch.testing.assert_close(a[name].A, b[name].A)
        torch.testing.assert_close(a[name].B, b[name].B)
    check_by_example(model, x, y)


def test_a_transposed_convolution_may_be_asked_for_a_size() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(1, 1, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x[:, None], output_size=(8,))[:, 0]

    check_by_example(Sized().double(), torch.randn(4, 3).double(), torch.tensor([0, 1, 7, 5]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.first, x, use_reentrant=reentrant))

    model, x, y = Model().double(), torch.randn(3, 4).double().requires_grad_(), torch.tensor([0, 2, 1])
    if reentrant:
        with pytest.raises(ValueError, match=r"gradients are not recorded .*: first.0"):
            per_example_gradients(model, SUM, (x, y))
    else:
        check_by_example(model, x, y)


# -------------------------------------------------------------------------------- complex, modes, empty, more
def test_complex_layers_are_refused_by_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3).to(torch.complex64), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.to(torch.complex64)).abs())

    data = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    for call in (kfac, per_example_gradients, curvature.hessian_diagonal):
        with pytest.raises(ValueError, match="layer 'a' has complex parameters, expected real ones"):
            call(Model(), CE, data)
    assert list(kfac(Model(), CE, data, layers=["b"])) == ["b.weight", "b.bias"]


@pytest.mark.parametrize("mode", ["inference", "no grad", "autocast", "autocast inside"])
def test_modes_of_the_caller(mode: str) -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(9, 3))
    x, y = torch.randn(4, 2, 5), torch.tensor([0, 1, 2, 0])
    want = kfac(model, CE, (x, y))
    modes: dict[str, Any] = {
        "inference": torch.inference_mode,
        "no grad": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu"),
        "autocast inside": lambda: torch.autocast("cpu", torch.float16),
    }
    with modes[mode]():
        data = x.clone(), y.clone()
        found = kfac(model, CE, data)
        quantities = [
            curvature.ggn_diagonal(model, CE, data),
            per_example_gradients(model, CE, data),
            curvature.hessian_diagonal(model, CE, data),
            curvature.ekfac(model, CE, data, found).inverse(0.1) @ {n: torch.ones(s) for n, s in found.shapes.items()},
            found.inverse(0.1, "cholesky") @ {n: torch.ones(s) for n, s in found.shapes.items()},
        ]
        curvature.empirical_ntk(model, data[0])
    for name in want:
        assert found[name].B.dtype == torch.float32
        torch.testing.assert_close(found[name].B, want[name].B, rtol=0.1, atol=0.02)
    assert all(one.dtype == torch.float32 for quantity in quantities for one in quantity.values())
    found.inverse(0.1, "cholesky")


class _InAnotherOrder(nn.Module):
    """A layer that gets frames, or the examples, in another order than the data has them."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))  # [examples, time, 8]
        if self.order == "turned":
            return self.last(self.middle(x.flip(0)).flip(0).mean(1))
        if self.order == "outer":
            return self.last(self.middle(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1))
        rows = self.middle(x.transpose(0, 1).flatten(0, 1))
        return self.last(rows.unflatten(0, (x.shape[1], x.shape[0])).mean(0))


@pytest.mark.parametrize("order", ["turned", "outer", "inner"])
@pytest.mark.parametrize("half", ["autocast", "bfloat16", "float16"])
def test_orders_of_the_examples_in_half_precision(half: str, order: str) -> None:
    torch.manual_seed(3)
    model, x, y = _InAnotherOrder(order), torch.randn(4, 3, 6), torch.tensor([0, 1, 2, 0])
    want = {name: torch.zeros(4, *p.shape) for name, p in model.named_parameters()}
    for n in range(4):
        found = torch.autograd.grad(SUM(model(x[n : n + 1]), y[n : n + 1]), list(model.parameters()))
        for name, gradient in zip(want, found, strict=True):
            want[name][n] = gradient
    casts = torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast")
    if half != "autocast":
        model, x = model.to(getattr(torch, half)), x.to(getattr(torch, half))
    with casts:
        if order == "turned":
            with pytest.raises(ValueError, match="on their order"):
                per_example_gradients(model, SUM, (x, y))
            return
        found = per_example_gradients(model, SUM, (x, y))
    for name, gradient in want.items():
        torch.testing.assert_close(found[name].float(), gradient, rtol=0.1, atol=0.05 * float(gradient.abs().max()))


class _OfBfloat16Only(nn.Sequential):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype != torch.bfloat16:
            raise TypeError("bfloat16 only")
        return super().forward(input)


@pytest.mark.parametrize("kind", [nn.Sequential, _OfBfloat16Only])
def test_examples_too_alike_in_half_precision(kind: type[nn.Sequential]) -> None:
    model = kind(nn.Linear(6, 8), nn.Linear(8, 3)).bfloat16()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)  # its outputs are the bias but for a rounding
    data = torch.randn(4, 6).bfloat16(), torch.tensor([0, 1, 2, 0])
    if kind is _OfBfloat16Only:  # cannot be run in single precision, in which the examples differ
        with pytest.raises(ValueError, match="indistinguishable in half precision"):
            per_example_gradients(model, SUM, data)
    found = per_example_gradients(model, SUM, data, batch_axis=0 if kind is _OfBfloat16Only else None)
    assert found["1.weight"].shape == (4, 3, 8)


@pytest.mark.parametrize("fisher", ["empirical", "mc", "type-2", "forward-only"])
def test_the_optimizer_under_autocast(fisher: str) -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 3))
    optimizer, x, y = KFAC(model, CE, fisher=fisher), torch.randn(4, 2, 5), torch.tensor([0, 1, 2, 0])
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = CE(model(x), y)
        value.backward()
        optimizer.step()
    assert optimizer.factors is not None
    assert {t.dtype for block in optimizer.factors.values() for t in block.tensors().values()} == {torch.float32}


def test_empty_batches_of_per_example_quantities() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randn(0, 2, 5), torch.zeros(0, dtype=torch.long)
    found = per_example_gradients(model, SUM, (x, y))
    assert {name: tuple(g.shape) for name, g in found.items()} == {
        name: (0, *p.shape) for name, p in model.named_parameters()
    }
    assert {tuple(g.shape) for g in per_example_gradient_norms(model, SUM, (x, y)).values()} == {(0,)}
    assert curvature.empirical_ntk(model, x).shape == (0, 0, 3, 3)
    for call in (kfac, curvature.ggn_diagonal, curvature.hessian_diagonal):
        with pytest.raises(ValueError, match="the batch is empty"):
            call(model, CE, (x, y))


def test_norms_are_of_all_parameters() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    data = torch.randn(4, 2, 5).double(), torch.tensor([0, 1, 2, 0])
    check_by_example(model, *data)
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    assert list(per_example_gradient_norms(model, CE, data)) == names
    assert list(per_example_gradient_norms(model, CE, data, layers=["1"])) == names[2:4]
    with pytest.raises(ValueError, match="layers has '2', expected names from '0', '1', '3'"):
        per_example_gradient_norms(model, CE, data, layers=["2"])
    model[1].requires_grad_(False)
    model[0].bias.requires_grad_(False)
    assert list(per_example_gradient_norms(model, CE, data)) == ["0.weight", "3.weight", "3.bias"]


@pytest.mark.parametrize("target", [-1, 3])
def test_targets_out_of_range(target: int) -> None:
    data = torch.randn(2, 4), torch.tensor([0, target])
    for call in (kfac, curvature.ggn_diagonal):
        with pytest.raises(ValueError, match=f"targets have class {target}, expected 0 to 2"):
            call(nn.Linear(4, 3), CE, data)


def test_wrong_channels_name_the_layer() -> None:
    with pytest.raises(ValueError, match="layer '1' cannot be computed: "):
        kfac(nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 2)), MSE, (torch.randn(2, 3), torch.randn(2, 2)))


@pytest.mark.parametrize("block", ["filter", "kernel", "position"])
def test_mini_blocks_of_linear_layers_have_one_shape(block: str) -> None:
    layer = nn.Linear(4, 3)
    two = curvature.ggn_mini_blocks(layer, MSE, (torch.randn(2, 4), torch.randn(2, 3)), block=block)
    three = curvature.ggn_mini_blocks(layer, MSE, (torch.randn(2, 5, 4), torch.randn(2, 5, 3)), block=block)
    assert two["weight"].shape == three["weight"].shape
    assert two["weight"].shape == {"filter": (3, 4, 4), "kernel": (3, 4), "position": (1, 12, 12)}[block]


# ------------------------------------------------------------------------------------------- compilers, threads
def _network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("what", ["whole", "part", "in place", "function"])
def test_compiled_models_have_the_numbers_of_the_model(what: str, first: bool) -> None:
    net, data = _network(), (torch.randn(5, 2, 6, 6), torch.tensor([0, 1, 2, 0, 1]))
    want, gradients = kfac(net, CE, data), per_example_gradients(net, CE, data)
    fast: nn.Module = net
    if what == "whole":
        fast = torch.compile(net, backend="eager")  # type: ignore[assignment]
    elif what == "part":
        fast = nn.Sequential(torch.compile(net[:2], backend="eager"), *net[2:])  # type: ignore[arg-type]
    elif what == "in place":
        net.compile(backend="eager")
    else:
        net.forward = torch.compile(net.forward, backend="eager")  # type: ignore[method-assign]
    if first:
        fast(data[0])
    found = kfac(fast, CE, data)
    assert len(found) == len(want)
    for a, b in zip(found.values(), want.values(), strict=True):
        torch.testing.assert_close(a.A, b.A)
        torch.testing.assert_close(a.B, b.B)
    for a, b in zip(per_example_gradients(fast, CE, data).values(), gradients.values(), strict=True):
        torch.testing.assert_close(a, b)
    fast(data[0])


@pytest.mark.parametrize("order", ["compiled first", "compiled and run first", "optimizer first"])
@pytest.mark.parametrize("what", ["whole", "part", "in place"])
@pytest.mark.parametrize("fisher", ["empirical", "type-2"])
def test_the_optimizer_of_a_compiled_model(fisher: str, what: str, order: str) -> None:
    x, y = torch.randn(8, 4), torch.arange(8) % 3

    def trained(compiled: bool) -> Tensor:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        model = nn.Sequential(inner, nn.Linear(5, 3))
        fast: Any = model
        optimizer = KFAC(model, CE, lr=0.1, fisher=fisher) if order == "optimizer first" else None
        if compiled and what == "whole":
            fast = torch.compile(model, backend="eager")
        elif compiled and what == "part":
            model[0] = torch.compile(inner, backend="eager")  # type: ignore[assignment]
        elif compiled:
            model.compile(backend="eager")
        if order == "compiled and run first":
            CE(fast(x), y).backward()
            model.zero_grad()
        optimizer = optimizer or KFAC(fast, CE, lr=0.1, fisher=fisher)
        for _ in range(3):
            optimizer.zero_grad()
            CE(fast(x), y).backward()
            optimizer.step()
        assert optimizer.factors is not None
        assert len(optimizer.factors) == 2
        return inner[0].weight.detach()

    torch.testing.assert_close(trained(True), trained(False))


def test_threads_do_not_disturb_each_other() -> None:
    """Predictions of one model while its curvature is computed, several times at once."""
    net, x, y = _network().eval(), torch.randn(5, 2, 6, 6), torch.tensor([0, 1, 2, 0, 1])
    want, factors = net(x).detach(), kfac(net, CE, (x, y))
    wrong: list[Any] = []
    done = threading.Event()

    def predict() -> None:
        while not done.is_set():
            try:
                with torch.no_grad():
                    out = net(torch.cat([x, x]))[:5]
                if out.requires_grad or not torch.allclose(out, want, atol=1e-5):
                    wrong.append(out)
            except Exception as error:
                wrong.append(error)

    def curve() -> None:
        for _ in range(10):
            try:
                found = kfac(net, CE, (x, y))
                wrong.extend(name for name in factors if not torch.allclose(found[name].B, factors[name].B, atol=1e-5))
                wrong.extend(name for name in factors if not torch.allclose(found[name].A, factors[name].A, atol=1e-5))
            except Exception as error:
                wrong.append(error)

    predictor, workers = threading.Thread(target=predict), [threading.Thread(target=curve) for _ in range(3)]
    for thread in (predictor, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    predictor.join()
    assert not wrong


# ---------------------------------------------------------------------------------------------------- optimizer
def _factors(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor, aside: Callable[[], Any]) -> Any:
    optimizer.zero_grad()
    CE(model(x), y).backward()
    aside()
    optimizer.step()
    return optimizer.factors


@pytest.mark.parametrize("fisher", ["empirical", "type-2", "forward-only"])
@pytest.mark.parametrize("aside", ["curvature", "saliency", "own graph", "penalty before", "inputs"])
def test_only_the_pass_that_fills_the_gradients_counts(aside: str, fisher: str) -> None:
    def make() -> tuple[nn.Module, KFAC]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        return model, KFAC(model, CE, ema=0, fisher=fisher, kl_clip=None, momentum=0)

    x, y = torch.randn(8, 4).double(), torch.arange(8) % 3
    model, optimizer = make()
    other, plain = make()

    def act() -> None:
        big = (50 * x).requires_grad_()
        if aside == "curvature":
            for call in (kfac, per_example_gradients, curvature.ggn_diagonal):
                call(model, CE, (50 * x, y))
        elif aside == "saliency":
            torch.autograd.grad(CE(model(big), y), big)
        elif aside == "own graph":
            (gradient,) = torch.autograd.grad(CE(model(big), y), big, create_graph=True)
            torch.autograd.grad(gradient.square().sum(), big)
        elif aside == "inputs":
            CE(model(big), y).backward(inputs=[big])
        else:
            torch.autograd.grad(CE(model(big), y), list(model.parameters()))

    a, b = _factors(model, optimizer, x, y, act), _factors(other, plain, x, y, lambda: None)
    for name in b:
        torch.testing.assert_close(a[name].A, b[name].A)
        torch.testing.assert_close(a[name].B, b[name].B)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("how", ["add_param_group", "in the groups"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_parameters_that_begin_to_train_get_factors(ema: float, how: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    options: dict[str, Any] = {"params": list(model.parameters())} if how == "in the groups" else {}
    optimizer = KFAC(model, CE, ema=ema, inverse_interval=3, **options)
    _factors(model, optimizer, x, y, lambda: None)
    assert list(optimizer.factors or ()) == ["2.weight"]
    model[0].requires_grad_(True)
    if not options:
        optimizer.add_param_group({"params": list(model[0].parameters()), "damping": 0.1})
    found = _factors(model, optimizer, x, y, lambda: None)
    assert list(found) == ["0.weight", "2.weight"]
    assert set(optimizer.inversion.solvers) == {"0.weight", "2.weight"}
    with pytest.raises(ValueError, match=r"damping is .*, expected a positive"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "damping": -1.0})


def test_a_layer_that_was_swapped_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = KFAC(model, CE)
    model[0] = nn.Linear(4, 5)
    with pytest.raises(ValueError, match="did not run on the data"):
        model(torch.randn(8, 4))
    del optimizer


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_copies_go_on(how: str, fisher: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer, x, y = KFAC(model, CE, fisher=fisher), torch.randn(8, 4).double(), torch.arange(8) % 3
    for _ in range(2):
        _factors(model, optimizer, x, y, lambda: None)
    pair = (model, optimizer)
    other, copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert copied.model is other
    for _ in range(2):
        _factors(model, optimizer, x, y, lambda: None)
        _factors(other, copied, x, y, lambda: None)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_states_restore_the_draws_and_are_of_one_model() -> None:
    def make(width: int = 5, **options: Any) -> tuple[nn.Module, KFAC]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()
        return model, KFAC(model, CE, **options)

    x, y = torch.randn(8, 4).double(), torch.arange(8) % 3
    model, optimizer = make(fisher="mc", seed=7)
    start = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    _factors(model, optimizer, x, y, lambda: None)
    first = model[0].weight.detach().clone()
    other, second = make(fisher="mc", seed=3)
    _factors(other, second, x, y, lambda: None)
    other.load_state_dict(weights)
    second.load_state_dict(start)
    _factors(other, second, x, y, lambda: None)
    assert torch.equal(first, other[0].weight)
    state = optimizer.state_dict()
    for wrong, message in ((make(6), "another model"), (make(bias="separate"), "another form")):
        with pytest.raises(ValueError, match=message):
            wrong[1].load_state_dict(state)
    with pytest.raises(ValueError, match="approx='expand', expected 'reduce'"):
        make(approx="reduce")[1].load_state_dict(state)


def test_one_block_has_one_damping() -> None:
    model = nn.Linear(4, 3)
    groups = [{"params": [model.weight], "damping": 0.1}, {"params": [model.bias], "damping": 1.0}]
    optimizer = KFAC(model, CE, params=groups)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    with pytest.raises(ValueError, match="share a block and have the dampings"):
        _factors(model, optimizer, x, y, lambda: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_clip": -1}, "kl_clip is -1, expected a positive"),
        ({"lr": float("inf")}, "lr is .*, expected a finite"),
        ({"factor_interval": 1.5}, "factor_interval is .*, expected a whole number"),
        ({"inverse_interval": True}, "inverse_interval is .*, expected a whole number"),
        ({"damping": float("inf")}, "damping is inf in a group"),
    ],
)
def test_numbers_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFAC(nn.Linear(4, 3), CE, **options)


def test_a_group_is_torchs() -> None:
    with pytest.raises(TypeError, match="group is 'x' of type str, expected a ProcessGroup"):
        KFAC(nn.Linear(4, 3), CE, group="x")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- uses and rows that hide from the graph
class _Energy(nn.Module):
    """An energy, and with it the slope of the energy with respect to the inputs."""

    def __init__(self, form: str = "both", convolution: bool = False) -> None:
        super().__init__()
        kind = (lambda a, b: nn.Conv1d(a, b, 1)) if convolution else nn.Linear
        self.first, self.last, self.form, self.convolution = kind(2, 4), kind(4, 1), form, convolution

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        z = x[..., None] if self.convolution else x
        energy = self.last(torch.tanh(self.first(z))).flatten(1)
        (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return torch.cat([energy, -slope], 1) if self.form == "both" else -slope


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("form", ["both", "slope"])
def test_models_that_differentiate_themselves_are_refused(form: str, convolution: bool) -> None:
    model, x = _Energy(form, convolution), torch.randn(5, 2)
    y = torch.randn(5, 3 if form == "both" else 2)
    calls: list[Callable[[], Any]] = [
        lambda: kfac(model, MSE, (x, y)),
        lambda: per_example_gradients(model, MSE, (x, y)),
        lambda: per_example_gradient_norms(model, MSE, (x, y)),
        lambda: curvature.ggn_diagonal(model, MSE, (x, y)),
        lambda: curvature.hessian_diagonal(model, MSE, (x, y)),
        lambda: curvature.empirical_ntk(model, x),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"is also used outside of the layer|was replaced after the layer ran"):
            call()
    model.train()
    optimizer = KFAC(model, MSE)
    with pytest.raises(ValueError, match="is also used outside of the layer"):
        model(x)
    assert optimizer.factors is None


def test_losses_that_differentiate_the_model_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = torch.randn(5, 2).requires_grad_(), torch.randn(5, 1)

    def residual(u: Tensor, y: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return ((slope.sum(1, keepdim=True) + u - y) ** 2).sum()

    for call in (per_example_gradients, per_example_gradient_norms, curvature.hessian_diagonal):
        with pytest.raises(ValueError, match=r"parameter '0\.weight' of layer '0' is also used outside of the layer"):
            call(model, residual, (x, y))


def test_tied_weights_under_autocast() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.e(x)) @ self.e.weight

    model, x = Tied(), torch.randn(5, 6)
    loss = nn.MSELoss(reduction="sum")
    want = by_example(model, loss, x, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = per_example_gradients(model, loss, (x, x))
        with pytest.raises(ValueError, match="used outside of the layer"):
            kfac(model, MSE, (x, x), others="skip")
        assert not kfac(model, MSE, (x, x))["e.weight"].factored
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, rtol=0.05, atol=0.05 * float(gradient.abs().max()))


_AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda o: o - o.mean(0),
    "softmax over the batch": lambda o: o.softmax(0),
    "batch norm": lambda o: F.batch_norm(o, None, None, training=True),
    "another order": lambda o: o.flip(0),
}


@pytest.mark.parametrize("after", list(_AFTER))
def test_examples_mixed_after_the_last_layer_are_refused(after: str) -> None:
    class Mixed(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return _AFTER[after](super().forward(input))

    model, x, y = Mixed(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3), torch.randn(4, 2)
    for loss in (MSE, lambda o, y: ((o - y) ** 2).sum()):
        for call in (per_example_gradients, per_example_gradient_norms, curvature.hessian_diagonal):
            with pytest.raises(ValueError, match="rows of an example that depend on the other examples"):
                call(model, loss, (x, y))


def _contrastive(o: Tensor, y: Tensor) -> Tensor:
    o = F.normalize(o, dim=1)
    return F.cross_entropy(o @ o.detach().mT + o @ o.mT, torch.arange(len(o)))


_WHOLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "root": lambda o, y: F.mse_loss(o, y).sqrt(),
    "logarithm": lambda o, y: F.mse_loss(o, y).log(),
    "explained": lambda o, y: F.mse_loss(o, y, reduction="sum") / ((y - y.mean(0)) ** 2).sum() + o.mean() ** 2,
    "contrastive": _contrastive,
}


@pytest.mark.parametrize("loss", list(_WHOLE))
def test_losses_that_are_no_sum_over_examples_are_refused(loss: str) -> None:
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(7, 3), torch.randn(7, 2)
    for call in (per_example_gradients, per_example_gradient_norms, curvature.hessian_diagonal):
        with pytest.raises(ValueError, match="the loss mixes examples, expected a sum or mean"):
            call(model, _WHOLE[loss], (x, y))


def test_losses_that_are_sums_over_examples_pass() -> None:
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, 3).double(), 0
    losses: list[Callable[[Tensor, Any], Tensor]] = [
        lambda o, _: (o.norm(dim=1) * torch.arange(1, len(o) + 1)).sum() if len(o) == 5 else o.norm() * scale,
        lambda o, _: o.logsumexp(1).sum(),
        lambda o, _: o.sum(),
        lambda o, _: o.abs().sum(),
    ]
    for loss in losses:
        found = per_example_gradients(model, loss, (x, torch.zeros(5)))
        for n in range(5):
            scale = n + 1
            want = torch.autograd.grad(loss(model(x[n : n + 1]), y), list(model.parameters()), allow_unused=True)
            for name, gradient in zip(found, want, strict=True):
                torch.testing.assert_close(found[name][n], gradient)


def test_batch_axes_follow_attributes_and_parameters() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.batch_first = nn.Linear(3, 4), nn.Linear(4, 2), True

        def forward(self, x: Tensor) -> Tensor:
            x = x if self.batch_first else x.transpose(0, 1)
            return self.b(torch.tanh(self.a(x))).sum(1 if self.batch_first else 0)

    model, x, y = Either().double(), torch.randn(4, 4, 3).double(), torch.tensor([0, 1, 0, 1])
    for first in (True, False, True):
        model.batch_first = first
        check_by_example(model, x, y)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.gate = nn.Linear(3, 4), nn.Linear(4, 2), nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            return self.b(h + self.gate * h.mean(0))

    gated = Gated()
    per_example_gradients(gated, SUM, (x[:, 0].float(), y), layers=["a", "b"])
    with torch.no_grad():
        gated.gate.fill_(0.5)
    with pytest.raises(ValueError, match=r"rows of an example (that )?depend on the other examples"):
        per_example_gradients(gated, SUM, (x[:, 0].float(), y), layers=["a", "b"])


class _Ragged(nn.Module):
    """A head on those positions of an example that count."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(3, 4), nn.Linear(4, 2), how

    def forward(self, x: Tensor) -> Tensor:
        h, counts = torch.tanh(self.a(x)), x[..., 0] > 0
        if self.how == "mask":
            rows, owners = h[counts], counts.nonzero()[:, 0]
        else:
            parts = [one[keep] for one, keep in zip(h, counts, strict=True)]
            rows = torch.cat(parts)
            owners = torch.repeat_interleave(torch.arange(len(x)), torch.tensor([len(one) for one in parts]))
        return torch.zeros(len(x), 2).to(x).index_add(0, owners, self.b(rows))


@pytest.mark.parametrize("how", ["mask", "parts"])
def test_rows_by_values_are_right_or_refused(how: str) -> None:
    model, refused = _Ragged(how).double(), 0
    for seed in range(40):
        torch.manual_seed(seed)
        x, y = torch.randn(4, 3, 3).double(), torch.tensor([0, 1, 0, 1])
        counts = (x[..., 0] > 0).sum(1)
        if seed % 2:
            x[..., 0] = torch.tensor([[1.0, 1.0, -1.0]])
            counts = torch.tensor([2, 2, 2, 2])
        try:
            found = per_example_gradients(model, SUM, (x, y))
        except ValueError:
            refused += 1
            assert len(set(counts.tolist())) > 1 or 0 in counts
            continue
        for name, gradient in by_example(model, SUM, x, y).items():
            torch.testing.assert_close(found[name], gradient)
    assert 0 < refused < 40


@pytest.mark.parametrize("what", ["parameter", "attribute", "in a list", "buffer", "own weight", "data"])
def test_trial_passes_leave_what_a_model_writes(what: str) -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.calls = nn.Linear(3, 2), 0
            self.code = nn.Parameter(torch.zeros(3), requires_grad=False)
            self.plain, self.box = torch.zeros(3), [torch.zeros(3)]
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            def update(held: Tensor) -> None:
                held.mul_(0.9).add_(x.detach().mean(0))

            with torch.no_grad():
                if what == "parameter":
                    update(self.code.data)
                elif what == "attribute":
                    update(self.plain)
                elif what == "in a list":
                    update(self.box[0])
                elif what == "buffer":
                    self.count += 1
                elif what == "own weight":
                    self.f.weight *= 0.5
                else:
                    self.code.data = self.code + 1
            return self.f(x)

        def state(self) -> list[Tensor]:
            held = [self.code, self.plain, self.box[0], self.count, self.f.weight]
            return [one.detach().clone() for one in held]  # type: ignore[union-attr]

    x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    model = Writing().eval()
    plain, watched, before = copy.deepcopy(model).train(), copy.deepcopy(model).train(), model.state()
    per_example_gradients(model, CE, (x, y))
    kfac(model, CE, (x, y))
    assert all(torch.equal(a, b) for a, b in zip(model.state(), before, strict=True))
    optimizer = KFAC(watched, CE)
    plain(x)
    watched(x)
    assert all(torch.equal(a, b) for a, b in zip(watched.state(), plain.state(), strict=True))
    assert optimizer.factors is None


def test_inputs_of_which_the_first_has_one_row_are_refused() -> None:
    class Diffusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 2)

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.f(torch.cat([x, t.expand(len(x), 1)], 1))

    model, x, y = Diffusion(), torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    with pytest.raises(ValueError, match=r"first axes of the inputs have sizes \[1, 5\]"):
        kfac(model, CE, ((torch.tensor([[0.3]]), x), y))
    assert kfac(model, CE, ((torch.full((5, 1), 0.3), x), y)).examples == 5


def test_hooks_of_parameters_are_refused_for_single_examples() -> None:
    model, data = nn.Linear(3, 2), (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    optimizer = KFAC(model, CE)  # whose own hooks change nothing
    per_example_gradients(model, CE, data)
    handle = model.weight.register_hook(lambda gradient: gradient * 0.5)
    for call in (per_example_gradients, per_example_gradient_norms):
        with pytest.raises(ValueError, match="parameter 'weight' has a hook"):
            call(model, CE, data)
    kfac(model, CE, data)  # curvature is not a gradient
    handle.remove()
    per_example_gradients(model, CE, data)
    del optimizer


@pytest.mark.parametrize("loss", ["weights", "ignored", "huber", "batchmean"])
def test_hessian_diagonals_of_batches_are_those_of_all_data(loss: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.LogSoftmax(1)).double()
    x, y = torch.randn(7, 3).double(), torch.tensor([0, 1, 2, 0, 1, 1, 2])
    targets: Tensor = y if loss in ("weights", "ignored") else torch.rand(7, 3).double()
    of: nn.Module = {
        "weights": nn.NLLLoss(weight=torch.tensor([0.2, 1.0, 3.0]).double()),
        "ignored": nn.NLLLoss(ignore_index=1),
        "huber": nn.HuberLoss(delta=0.3),
        "batchmean": nn.KLDivLoss(reduction="batchmean"),
    }[loss]
    whole = curvature.hessian_diagonal(model, of, (x, targets))
    parts = curvature.hessian_diagonal(model, of, [(x[:2], targets[:2]), (x[2:], targets[2:])])
    weight = model[0].weight

    def value(w: Tensor) -> Tensor:
        return of(torch.func.functional_call(model, {"0.weight": w}, (x,)), targets)

    want = torch.autograd.functional.hessian(value, weight).reshape(12, 12).diagonal().reshape(4, 3)
    torch.testing.assert_close(whole["0.weight"], want)
    torch.testing.assert_close(parts["0.weight"], want)


# ------------------------------------------------------------------------------------------ training as people train
def _two() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])


def _factors_of(change: Callable[[nn.Module, Tensor, Tensor], Tensor], **options: Any) -> dict[str, Tensor]:
    """Factors after one step with a loss of the caller's."""
    model, x, y = _two()
    optimizer = KFAC(model, CE, ema=0.0, **options)
    change(model, x, y).backward()
    optimizer.step()
    assert optimizer.factors is not None
    assert optimizer.factors.examples == 5
    return {name + key: tensor for name, one in optimizer.factors.items() for key, tensor in one.tensors().items()}


def _plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return CE(model(x), y)


def _with_teacher(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    teacher = {name: 3 * p.detach() for name, p in model.named_parameters()}
    out = model(x)
    taught = torch.func.functional_call(model, teacher, (x,))
    assert not taught.requires_grad
    return CE(out, y) + 0 * F.mse_loss(out, taught)


def _checkpointed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return CE(checkpoint(model, x, use_reentrant=False), y)


def _with_penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(z).sum(), z, create_graph=True)
    return CE(model(x), y) + 0.1 * slope.square().sum()


def _predicted_elsewhere(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.forward(2 * x[:3])  # watched, but not seen by hooks on the outputs
    model.eval()
    assert model(x).shape == (5, 2)
    model.train()
    return _plain(model, x, y)


@pytest.mark.parametrize("fisher", ["empirical", "type-2"])
@pytest.mark.parametrize("change", [_with_teacher, _checkpointed, _with_penalty, _predicted_elsewhere])
def test_factors_are_of_the_passes_that_count(change: Callable[..., Tensor], fisher: str) -> None:
    want, found = _factors_of(_plain, fisher=fisher), _factors_of(change, fisher=fisher)
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


@pytest.mark.parametrize("way", ["before", "between", "zeros", "foreach"])
def test_gradients_that_are_given_up_take_their_factors_with_them(way: str) -> None:
    def change(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        CE(10 * model(5 * x), y).backward()
        out = model(x) if way == "between" else None
        if way == "foreach":
            torch._foreach_zero_([p.grad for p in model.parameters()])  # type: ignore[misc]
        else:
            model.zero_grad(set_to_none=way != "zeros")
        return CE(model(x) if out is None else out, y)

    want, found = _factors_of(_plain), _factors_of(change)
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_a_use_that_begins_later_is_refused() -> None:
    class Warm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.tied = nn.Linear(3, 3), False

        def forward(self, x: Tensor) -> Tensor:
            z = torch.tanh(self.e(x))
            return z @ self.e.weight if self.tied else z

    model, x, y = Warm(), torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    optimizer = KFAC(model, CE)
    CE(model(x), y).backward()
    optimizer.step()
    model.tied = True
    with pytest.raises(ValueError, match=r"'e\.weight' of layer 'e' is also used outside of the layer"):
        model(x)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_under_a_scheduler_step_their_own_model(how: str) -> None:
    model, x, y = _two()
    optimizer = KFAC(model, CE)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    CE(model(x), y).backward()
    optimizer.step()
    scheduler.step()
    pair = (model, optimizer)
    other, copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = [p.detach().clone() for p in (*model.parameters(), *other.parameters())]
    copied.zero_grad()
    CE(other(x), y).backward()
    copied.step()
    now = [*model.parameters(), *other.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(before, now, strict=True)]
    assert moved == [False] * 4 + [True] * 4


def test_a_watched_model_inside_of_torch_func() -> None:
    model, x, y = _two()
    optimizer = KFAC(model, CE)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        return CE(torch.func.functional_call(model, weights, (one[None],)), target[None])

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, y)
    for name, gradient in by_example(model, SUM, x, y).items():
        torch.testing.assert_close(found[name], gradient)
    assert optimizer.factors is None


@pytest.mark.parametrize("way", ["register_hook", "retain_grad", "grad"])
def test_forward_only_of_models_that_need_a_graph(way: str) -> None:
    class Needing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            if way == "register_hook":
                h.register_hook(lambda gradient: None)
            elif way == "retain_grad":
                h.retain_grad()
            else:
                torch.autograd.grad(h.sum(), h)
            return self.b(h)

    data = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    found, want = (kfac(Needing().eval(), CE, data, fisher=fisher) for fisher in ("forward-only", "empirical"))
    assert found.examples == 5
    assert [one.A.shape for one in found.values()] == [one.A.shape for one in want.values()]


def test_targets_and_data_of_other_kinds() -> None:
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    want = kfac(model, CE, (x, y), fisher="empirical")
    found = kfac(model, CE, (x, y.to(torch.uint8)), fisher="empirical")
    assert torch.equal(found["weight"].B, want["weight"].B)
    with pytest.raises(TypeError, match="targets have type list, expected a tensor"):
        kfac(model, CE, (x, [0, 1, 0, 1]))
    with pytest.raises(TypeError, match="targets have type ndarray, expected a tensor"):
        per_example_gradients(model, CE, (x, y.numpy()))
    with pytest.raises(ValueError, match="inputs have type ndarray without a tensor"):
        kfac(model, CE, (x.numpy(), y.numpy()))
    with pytest.raises(ValueError, match="data is a tuple of two pairs"):
        kfac(model, CE, ((x, x), (y, y)))
    other = kfac(nn.Linear(5, 2), CE, (torch.randn(4, 5), y))
    with pytest.raises(
        ValueError, match=r"the factors of 'weight' have shape \(2, 5\), expected that of the model: \(2, 3\)"
    ):
        curvature.ekfac(model, CE, (x, y), other)


def test_another_thread_runs_the_model_while_it_trains() -> None:
    model, x, y = _two()
    want = _factors_of(_plain)
    optimizer = KFAC(model, CE, ema=0.0, lr=0.0)
    stop, errors = threading.Event(), []

    def predict() -> None:
        try:
            while not stop.is_set():
                model(x[:3])  # in training mode, with a graph
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=predict)
    thread.start()
    try:
        for _ in range(60):
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
            assert optimizer.factors is not None
            for name, one in optimizer.factors.items():
                torch.testing.assert_close(one.B, want[name + "B"])
                torch.testing.assert_close(one.A, want[name + "A"])
    finally:
        stop.set()
        thread.join()
    assert not errors


def test_a_forward_pass_between_forward_and_backward() -> None:
    def change(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = model(x)
        model(3 * x[:2])
        return CE(out, y)

    want, found = _factors_of(_plain), _factors_of(change)
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_outputs_in_slots() -> None:
    @dataclasses.dataclass(slots=True)
    class Answer:
        logits: Tensor

    class Reused(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.fc, self.tied = nn.Linear(3, 3), tied

        def forward(self, x: Tensor) -> Answer:
            z = torch.tanh(self.fc(x))
            return Answer(z @ self.fc.weight if self.tied else z)

    for batch in (1, 4):
        data = torch.randn(batch, 3), torch.arange(batch) % 3
        for axis in (None, 0):
            with pytest.raises(ValueError, match="is also used outside of the layer"):
                kfac(Reused(tied=True), CE, data, batch_axis=axis, others="skip")
            found = kfac(Reused(tied=True), CE, data, batch_axis=axis)
            assert [block.factored for block in found.values()] == [False, True]
            kfac(Reused(tied=False), CE, data, batch_axis=axis)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_watched_model_is_exported_and_compiled(mode: str) -> None:
    model, x, _ = _two()
    optimizer = KFAC(model, CE)
    getattr(model, mode)()
    for strict in (True, False):
        program = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), model(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=mode == "eval")(x), model(x))
    del optimizer


def test_layers_that_are_frozen_again_have_no_factors() -> None:
    model, x, y = _two()
    optimizer = KFAC(model, CE)

    def step() -> None:
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()

    step()
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    model(x)
    model.eval()
    step()  # a pass of which no factors are collected
    model.train()
    step()
    assert optimizer.factors is not None
    assert list(optimizer.factors) == ["2.weight"]
    assert torch.equal(model[0].weight, before)
    model[0].requires_grad_(True)
    step()
    assert list(optimizer.factors) == ["0.weight", "2.weight"]


def test_states_of_another_precision_go_on() -> None:
    model, x, y = _two()
    wide = copy.deepcopy(model).double()
    one, two = KFAC(model, CE), KFAC(wide, CE)
    CE(model(x), y).backward()
    one.step()
    two.load_state_dict(one.state_dict())
    wide.load_state_dict(model.state_dict())
    for net, optimizer, inputs in ((model, one, x), (wide, two, x.double())):
        optimizer.zero_grad()
        CE(net(inputs), y).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_attention() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)).eval().double()
    x, y = torch.randn(4, 3, 8).double(), torch.tensor([0, 1, 2, 0])
    check_by_example(model, x, y)
    names = ["0.linear1", "0.linear2", "2"]
    for fisher in ("type-2", "forward-only"):
        assert len(kfac(model, CE, (x, y), fisher=fisher, layers=names)) == 6


@pytest.mark.parametrize("way", ["forward", "forward pre", "backward", "backward pre"])
def test_losses_with_hooks_have_no_known_hessian(way: str) -> None:
    loss, data = nn.CrossEntropyLoss(), (torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    {
        "forward": lambda: loss.register_forward_hook(lambda module, inputs, out: 3 * out),
        "forward pre": lambda: loss.register_forward_pre_hook(lambda module, inputs: None),
        "backward": lambda: loss.register_full_backward_hook(lambda module, before, after: None),
        "backward pre": lambda: loss.register_full_backward_pre_hook(lambda module, after: None),
    }[way]()
    for fisher in ("type-2", "empirical"):
        with pytest.raises(TypeError, match="with hooks"):
            kfac(nn.Linear(3, 3), loss, data, fisher=fisher)


def test_hooks_on_all_modules_do_not_change_the_loss() -> None:
    model, data = nn.Linear(3, 3), (torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    want = kfac(model, CE, data, fisher="empirical")["weight"].B

    def tripled(module: nn.Module, inputs: Any, out: Any) -> Any:
        return 3 * out if isinstance(module, nn.CrossEntropyLoss) else None

    handle = nn.modules.module.register_module_forward_hook(tripled)
    try:
        torch.testing.assert_close(kfac(model, CE, data, fisher="empirical")["weight"].B, want)
    finally:
        handle.remove()


@pytest.mark.parametrize("fisher", ["empirical", "type-2"])
def test_hooks_put_on_the_model_after_the_optimizer_count(fisher: str) -> None:
    def change(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model.register_forward_hook(lambda module, inputs, out: 3 * out)
        return CE(model(x), y)

    found = _factors_of(change, fisher=fisher, bias="separate")
    model, x, y = _two()
    model.register_forward_hook(lambda module, inputs, out: 3 * out)
    for name, one in kfac(model, CE, (x, y), fisher=fisher).items():
        torch.testing.assert_close(found[name + "B"], one.B)


# ------------------------------------------------------------------------------------------------------- trial passes
def test_trial_passes_draw_no_random_numbers() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x + torch.randn_like(x) * random.random() * np.random.rand())

    def drawn(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model, x, y = Noisy(), torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
        optimizer = KFAC(model, CE, lr=0.0, approx="reduce") if watched else torch.optim.SGD(model.parameters(), lr=0.0)
        found = []
        for _ in range(3):
            out = model(x)
            CE(out, y).backward()
            optimizer.step()
            found.append(out.detach())
        return found

    for plain, watched in zip(drawn(False), drawn(True), strict=True):
        assert torch.equal(plain, watched)


def test_batch_axes_that_are_remembered_are_of_one_form() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(4, 4, 3)
    targets = Targets(layers_of(model))
    passes = []
    model.register_forward_hook(lambda module, inputs, out: passes.append(1))

    def axes() -> list[int]:
        found = find_batch_axes(model, x, targets, 4, remember=True).calls
        assert found is not None
        return [axis.axis for _, axis in found.values() if axis is not None]

    assert (axes(), axes()) == ([0, 0], [0, 0])
    assert len(passes) == 2
    model[0].register_forward_hook(lambda module, inputs, out: out.transpose(0, 1))
    assert axes() == [0, 1]
    model.flag = True
    axes()
    model.eval()
    axes()
    assert len(passes) == 8
    for size in range(1, 70):
        find_batch_axes(model, torch.randn(4, size, 3), targets, 4, remember=True)
    assert 0 < len(trials._known[model]) <= 64


def test_trial_passes_leave_the_cache_of_casts_alone() -> None:
    model, data = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=enabled):
            kfac(model, CE, data)
            per_example_gradients(model, CE, data)
            assert torch.is_autocast_cache_enabled() == enabled
            assert torch.is_autocast_enabled("cpu")


def test_faults_of_the_library_are_not_blamed_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **named: Any) -> Any:
        raise MemoryError("no more")

    monkeypatch.setattr(trials._Finder, "_compared", broken)
    with pytest.raises(MemoryError):
        kfac(nn.Linear(3, 2), CE, (torch.randn(4, 3), torch.tensor([0, 1, 0, 1])))


def test_values_written_in_place_after_frozen_layers() -> None:
    frozen, last = nn.Linear(4, 4), nn.Linear(4, 2)
    frozen.requires_grad_(False)
    model = nn.Sequential(frozen, nn.ReLU(inplace=True), nn.LeakyReLU(inplace=True), last)
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1])
    CE(model(x), y).backward()  # which torch can
    with pytest.raises(ValueError, match="leave these out with layers="):
        kfac(model, CE, (x, y))
    assert list(kfac(model, CE, (x, y), layers="3")) == ["3.weight", "3.bias"]


_READS: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "unique": (torch.unique, True),
    "unique along an axis": (lambda x: torch.unique(x[None], dim=1), True),
    "mask": (lambda x: x[x > 0], True),
    "mask of an axis": (lambda x: x[None][:, x > 0], True),
    "nonzero": (lambda x: (x > 0).nonzero(), True),
    "where": (lambda x: torch.where(x > 0), True),
    "where, of two": (lambda x: torch.where(x > 0, x, 0), False),
    "masked_select": (lambda x: x.masked_select(x > 0), True),
    "repeat_interleave": (lambda x: x.repeat_interleave(torch.tensor([1, 2, 0, 1])), True),
    "repeat_interleave, alike": (lambda x: x.repeat_interleave(2), False),
    "bincount": (lambda x: x.long().bincount(), True),
    "packed": (
        lambda x: nn.utils.rnn.pack_padded_sequence(x.view(2, 2, 1), torch.tensor([2, 1]), batch_first=True),
        True,
    ),
    "item": (lambda x: x.sum().item(), True),
    "list": (lambda x: x.tolist(), True),
    "float": (lambda x: float(x.sum()), True),
    "condition": (lambda x: 1 if x.sum() > 0 else 2, True),
    "positions": (lambda x: x[torch.tensor([0, 2])], False),
    "arithmetic": (lambda x: x[1:] + x[:3], False),
}


@pytest.mark.parametrize("read", list(_READS))
def test_functions_whose_shapes_depend_on_values_are_known(read: str) -> None:
    function, expected = _READS[read]

    class Reading(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            function(torch.tensor([1.0, 2.0, 2.0, 0.0]))
            return super().forward(input)

    model = nn.Sequential(Reading(3, 2), nn.Linear(2, 2))
    finder = trials._Finder(model, torch.randn(4, 3), Targets(layers_of(model, ["1"])), 4)
    finder._pass([0, 1])
    assert finder.by_values == expected


@pytest.mark.parametrize("method", ["low-rank", "woodbury", "cholesky", "eigen"])
def test_inverses_are_mapped_over_vectors_without_warnings(method: str) -> None:
    data = torch.randn(3, 40).double(), torch.randn(3, 2).double()
    factors = kfac(nn.Linear(40, 2, bias=False).double(), nn.MSELoss(), data, approx="reduce")
    inverse, vectors = factors.inverse(0.1, method, rank=4), torch.randn(5, 2, 40).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.func.vmap(lambda v: (inverse @ {"weight": v})["weight"])(vectors)
    torch.testing.assert_close(found, torch.stack([(inverse @ {"weight": v})["weight"] for v in vectors]))
    x = vectors[0].clone().requires_grad_()
    (inverse @ {"weight": x})["weight"].sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (inverse @ {"weight": torch.ones_like(x)})["weight"])
