"""Parameters of any module: gradients per example, norms, clipped sums, GGN diagonals and the NTK, against loops."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lensor import curvature
from lensor.curvature import clipped_gradients, per_example_gradient_norms, per_example_gradients
from lensor.curvature.complete import _Ear
from lensor.curvature.functions import FunctionUse
from tests.curvature.test_curvature_border import SUM, by_example, check_by_example

C, T = 8, 6
"""Channels and positions of the values between the blocks of a model, [batch, T, C]."""


pytestmark = pytest.mark.usefixtures("in_double_precision")


class Parts(nn.Module):
    """A module with parameters of its own and a function of (module, values)."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parameters: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            setattr(self, name, value if isinstance(value, nn.Module) else nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def channels_first(module: nn.Module) -> nn.Module:
    return Parts(lambda self, x: self.inner(x.transpose(1, 2)).transpose(1, 2), inner=module)


def written(self: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 0] = self.first[0]
    out[:, 1:] = x[:, 1:] * self.scale
    out += self.scale
    return out


def attention(self: Any, x: Tensor) -> Tensor:
    return self.inner(x, x, x)[0]


def recurrent(self: Any, x: Tensor) -> Tensor:
    return self.inner(x)[0]


def frames(self: Any, x: Tensor) -> Tensor:
    """All frames of all examples along the first axis, times outermost."""
    rows = self.norm(x.transpose(0, 1).flatten(0, 1) * self.scale[0])
    return rows.unflatten(0, (T, -1)).transpose(0, 1)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(C),
    "layer norm of all": lambda: nn.LayerNorm((T, C)),
    "rms norm": lambda: nn.RMSNorm(C),
    "group norm": lambda: channels_first(nn.GroupNorm(2, C)),
    "batch norm": lambda: channels_first(nn.BatchNorm1d(C)),
    "prelu": lambda: channels_first(nn.PReLU(C)),
    "one prelu": nn.PReLU,
    "bilinear": lambda: Parts(lambda self, x: self.inner(x, x.flip(1)), inner=nn.Bilinear(C, C, C)),
    "attention": lambda: Parts(attention, inner=nn.MultiheadAttention(C, 2, batch_first=True)),
    "attention, biases": lambda: Parts(
        attention, inner=nn.MultiheadAttention(C, 2, batch_first=True, add_bias_kv=True, dropout=0.5)
    ),
    "encoder": lambda: nn.TransformerEncoderLayer(C, 2, C, batch_first=True),
    "lstm": lambda: Parts(recurrent, inner=nn.LSTM(C, C // 2, batch_first=True, bidirectional=True)),
    "gru": lambda: Parts(recurrent, inner=nn.GRU(C, C, batch_first=True)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(C, C)),
    "weight norm of a convolution": lambda: channels_first(
        nn.utils.parametrizations.weight_norm(nn.Conv1d(C, C, 3, padding=1, groups=2))
    ),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(C, C)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(C, C)),
    "scale and shift": lambda: Parts(
        lambda self, x: x * self.scale + self.shift, scale=random(C), shift=random(1, T, C)
    ),
    "transposed product": lambda: Parts(
        lambda self, x: torch.addmm(self.bias, x.reshape(-1, C), self.weight).view(x.shape),
        weight=random(C, C),
        bias=random(C),
    ),
    "einsum": lambda: Parts(lambda self, x: torch.einsum("ntc,tcd->ntd", x, self.weight), weight=random(T, C, C)),
    "class token": lambda: Parts(
        lambda self, x: torch.cat([self.token.expand(len(x), -1, -1), x[:, 1:]], 1), token=random(1, 1, C)
    ),
    "normalised weight": lambda: Parts(
        lambda self, x: F.linear(x, F.normalize(self.weight, dim=1), self.bias * 2), weight=random(C, C), bias=random(C)
    ),
    "table of positions": lambda: Parts(
        lambda self, x: x + self.table[torch.arange(T).flip(0) % 4], table=random(4, C)
    ),
    "network of a table": lambda: Parts(
        lambda self, x: x + self.inner(torch.linspace(0, 1, T)[:, None]),
        inner=nn.Sequential(nn.Linear(1, 4), nn.GELU(), nn.Linear(4, C)),
    ),
    "written": lambda: Parts(written, first=random(1, C), scale=random(C)),
    "tied": lambda: Parts(lambda self, x: torch.tanh(self.inner(x)) @ self.inner.weight, inner=nn.Linear(C, C)),
    "twice": lambda: Parts(lambda self, x: self.inner(torch.tanh(self.inner(x))), inner=nn.LayerNorm(C)),
    "frames": lambda: Parts(frames, norm=nn.LayerNorm(C), scale=random(1, C)),
    "in place": lambda: nn.Sequential(nn.LayerNorm(C), nn.ReLU(inplace=True), nn.Linear(C, C), nn.ReLU(inplace=True)),
    "unused": lambda: Parts(lambda self, x: x, unused=random(3)),
}


def model_of(*names: str) -> nn.Module:
    return nn.Sequential(nn.Linear(3, C), *[BLOCKS[name]() for name in names], nn.Flatten(), nn.Linear(T * C, 3)).eval()


def data_of(batch: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, T, 3), torch.arange(batch) % 3


def test_clipping_does_not_import_the_compiler() -> None:
    code = """
import sys
import torch
from lensor.curvature import clipped_gradients
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(32, 5))
data = torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 2, 3])
clipped_gradients(model, torch.nn.CrossEntropyLoss(), data, max_norm=1.0)
found = {"sympy", "torch._dynamo", "triton"} & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def check_clipped(model: nn.Module, x: Tensor, y: Tensor) -> None:
    want = by_example(model, SUM, x, y)
    norms = torch.stack([gradient.reshape(len(x), -1).square().sum(1) for gradient in want.values()]).sum(0).sqrt()
    most = float(norms.median())
    for reduction in ("sum", "mean"):
        found = clipped_gradients(model, nn.CrossEntropyLoss(reduction=reduction), (x, y), most)
        torch.testing.assert_close(found.norms, norms)
        factors = (most / norms).clamp(max=1) / (len(x) if reduction == "mean" else 1)
        assert list(found.gradients) == [name for name, p in model.named_parameters() if p.requires_grad]
        for name, gradient in found.gradients.items():
            torch.testing.assert_close(gradient, torch.tensordot(factors, want[name], 1))


# ---------------------------------------------------------------------------------------------------------- any module
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:RNN module weights")
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    model, (x, y) = model_of(name), data_of()
    check_by_example(model, x, y)
    check_clipped(model, x, y)


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:RNN module weights")
@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "orthogonal"])
def test_hessian_diagonals_and_factors(name: str) -> None:
    """Entries of the Hessian by differentiating twice, and the diagonals among the blocks of `kfac`."""
    model, (x, y) = model_of(name), data_of(3)
    with sdpa_kernel(SDPBackend.MATH):
        value = SUM(model(x), y)
    parameters = dict(model.named_parameters())
    slopes = torch.autograd.grad(value, list(parameters.values()), create_graph=True, materialize_grads=True)
    found = curvature.hessian_diagonal(model, SUM, (x, y))
    factors, diagonal = curvature.kfac(model, SUM, (x, y)), curvature.ggn_diagonal(model, SUM, (x, y))
    assert list(found) == list(factors) == list(parameters)
    for (key, one), slope in zip(parameters.items(), slopes, strict=True):
        if not factors[key].factored:
            torch.testing.assert_close(factors.diagonal()[key], diagonal[key])
        for at in torch.randperm(one.numel())[:5].tolist():
            (row,) = (
                torch.autograd.grad(
                    slope.reshape(-1)[at], one, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                if slope.requires_grad
                else (torch.zeros_like(one),)
            )
            torch.testing.assert_close(found[key].reshape(-1)[at], row.reshape(-1)[at], rtol=1e-7, atol=1e-9)


def test_hessian_diagonals_of_other_parameters_by_draws_are_unbiased() -> None:
    torch.manual_seed(0)
    model, data = (
        nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)),
        (torch.randn(4, 3), torch.randn(4, 2)),
    )
    exact = curvature.hessian_diagonal(model, nn.MSELoss(), data)
    generator = torch.Generator().manual_seed(0)
    drawn = [curvature.hessian_diagonal(model, nn.MSELoss(), data, samples=1, generator=generator) for _ in range(300)]
    for name in ("1.weight", "1.bias"):
        every = torch.stack([one[name] for one in drawn])
        error = every.std(0) / len(drawn) ** 0.5
        assert bool(((every.mean(0) - exact[name]).abs() < 4.5 * error + 1e-9).all())


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:RNN module weights")
@settings(max_examples=15)
@given(
    st.lists(st.sampled_from(sorted(set(BLOCKS) - {"orthogonal"})), min_size=2, max_size=4),
    st.integers(1, 5),
    st.data(),
)
def test_any_blocks_together(names: list[str], batch: int, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    model, (x, y) = model_of(*names), data_of(batch)
    want, found = by_example(model, SUM, x, y), per_example_gradients(model, SUM, (x, y))
    norms = per_example_gradient_norms(model, SUM, (x, y))
    for name, gradient in want.items():
        bound = 1e-9 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=bound)
        torch.testing.assert_close(norms[name], gradient.flatten(1).norm(dim=1), rtol=1e-7, atol=1e-7)
    check_clipped(model, x, y)


@pytest.mark.parametrize("name", ["attention, biases", "encoder", "lstm"])
def test_random_functions_use_the_recorded_graph(name: str) -> None:
    """Dropout inside functions: the gradients are those of the pass that ran, with its random numbers."""
    model, (x, y) = model_of(name), data_of()
    model.train()
    if name == "lstm":
        model[1].inner = nn.LSTM(C, C, num_layers=2, dropout=0.5, batch_first=True)
    torch.manual_seed(1)
    found = per_example_gradients(model, SUM, (x, y))
    torch.manual_seed(1)
    want = torch.autograd.grad(SUM(model(x), y), list(model.parameters()))
    for gradient, expected in zip(found.values(), want, strict=True):
        torch.testing.assert_close(gradient.sum(0), expected)


def shared_bias(self: Any, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(self.inner(x)), self.weight, self.inner.bias)


def view_and_base(self: Any, x: Tensor) -> Tensor:
    x = x.clone()
    part = x[:, :2]
    part.mul_(self.scale)
    return torch.cat([part, x[:, 2:] + x[:, :1]], 1)


def base_only(self: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :2].mul_(self.scale)
    return x


def filled(self: Any, x: Tensor) -> Tensor:
    out = self.table.repeat(len(x), 1, 1)
    out[:, 1:] = x[:, 1:]
    return out


def masked(self: Any, x: Tensor) -> Tensor:
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    return (x @ x.mT + self.bias.masked_fill(hidden, float("-inf"))).softmax(-1) @ x


SUBTLE: dict[str, Callable[[], nn.Module]] = {
    "shared bias": lambda: Parts(shared_bias, inner=nn.Linear(C, C), weight=random(C, C)),
    "view and base": lambda: Parts(view_and_base, scale=random(C)),
    "base only": lambda: Parts(base_only, scale=random(C)),
    "filled": lambda: Parts(filled, table=random(1, T, C)),
    "masked": lambda: Parts(masked, bias=random(T, T)),
    "temperature": lambda: Parts(lambda self, x: x * self.scale.exp(), scale=torch.tensor(0.3)),
}


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", SUBTLE)
def test_subtle_uses(name: str, batch: int) -> None:
    model = nn.Sequential(nn.Linear(3, C), SUBTLE[name](), nn.Flatten(), nn.Linear(T * C, 3)).eval()
    x, y = data_of(batch)
    check_by_example(model, x, y)
    check_clipped(model, x, y)


def test_empty_batches_and_other_mappings() -> None:
    model, (x, y) = model_of("layer norm", "lstm"), data_of()
    for name, gradient in per_example_gradients(model, SUM, (x[:0], y[:0])).items():
        assert gradient.shape == (0, *model.get_parameter(name).shape)
    want = per_example_gradients(model, SUM, (x, y))
    found = per_example_gradients(model, SUM, (UserDict(input=x), y))
    assert all(torch.equal(found[name], gradient) for name, gradient in want.items())


@pytest.mark.parametrize("dims", [(), (3,), (3, 2)])
def test_empty_batches_of_embeddings(dims: tuple[int, ...]) -> None:
    for options in ({}, {"padding_idx": 1}):
        model = nn.Sequential(nn.Embedding(5, 8, **options), nn.Flatten(), nn.LazyLinear(3))
        words = torch.randint(5, (4, *dims))
        model(words)
        check_by_example(model, words, torch.randint(3, (4,)))
        data = words[:0], torch.zeros(0, dtype=torch.long)
        found = curvature.clipped_gradients(model, SUM, data, max_norm=1.0)
        assert found.norms.shape == (0,)
        assert {name: g.shape for name, g in found.gradients.items()} == {
            n: p.shape for n, p in model.named_parameters()
        }
        assert not any(bool(gradient.any()) for gradient in found.gradients.values())
        assert all(g.shape == (0,) for g in curvature.per_example_gradient_norms(model, SUM, data).values())


class Table(nn.Module):
    """A function with parameters and a constant that has as many rows as there are examples."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, 6))
        self.register_buffer("table", torch.randn(rows, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,bi,bo->no", x, self.table, self.weight)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("name", ["group norm", "table", "embedding", "mixed"])
def test_functions_without_a_trial_pass(name: str, batch: int, zeros: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples are then expected in the first axes of a function's arguments, if its results say nothing else."""
    models = {
        "group norm": lambda: (
            nn.Sequential(nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(12, 3)),
            (4, 3),
        ),
        "table": lambda: (nn.Sequential(Table(batch), nn.Linear(6, 3)), (4,)),
        "embedding": lambda: (nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3)), (3,)),
        "mixed": lambda: (nn.Sequential(nn.LayerNorm(4), Table(batch), nn.LayerNorm(6), nn.Linear(6, 3)), (4,)),
    }
    model, shape = models[name]()
    model = model.double()
    for module in model.modules():
        if zeros and isinstance(module, (Table, nn.GroupNorm)):  # results that say nothing about the arguments
            nn.init.zeros_(module.weight)
    x = torch.randint(7, (batch, *shape)) if name == "embedding" else torch.randn(batch, *shape).double()
    y = torch.randint(3, (batch,))
    traced = curvature.clipped_gradients(model, SUM, (x, y), max_norm=1.0, batch_axis=0, compile="eager")
    for key, gradient in curvature.clipped_gradients(model, SUM, (x, y), max_norm=1.0).gradients.items():
        torch.testing.assert_close(gradient, traced.gradients[key], rtol=1e-9, atol=1e-11)
    passes = []
    single = FunctionUse._masked
    monkeypatch.setattr(FunctionUse, "_masked", lambda use, vs: (passes.append(use.name), single(use, vs))[1])
    found = per_example_gradients(model, SUM, (x, y), batch_axis=0)
    want = by_example(model, SUM, x, y)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, want[key], rtol=1e-9, atol=1e-11)
    assert passes == ["einsum"] * (name in ("table", "mixed"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, (x, y) = model_of("layer norm", "scale and shift", "in place"), data_of()
    want = by_example(model, SUM, x, y)
    own = by_example(model.to(dtype), SUM, x.to(dtype), y)
    found = per_example_gradients(model, SUM, (x.to(dtype), y))
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        largest = float((own[name] - want[name]).norm()) + 0.01 * float(want[name].norm())
        assert float((gradient - want[name]).norm()) <= 1.2 * largest


def test_modules_are_chosen_by_name() -> None:
    model, data = model_of("layer norm", "scale and shift"), data_of()
    assert list(per_example_gradients(model, SUM, data, layers=["1", "2"])) == [
        "1.weight",
        "1.bias",
        "2.scale",
        "2.shift",
    ]
    with pytest.raises(ValueError, match="layers has '3', expected names from '0', '1', '2', '4'"):
        curvature.ggn_diagonal(model, SUM, data, layers=["3"])


def test_statistics_of_the_batch_are_refused() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.last = nn.Parameter(torch.ones(T)), nn.Linear(T * 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            mean = x.mean((0, 2)) * self.scale  # no axis of examples, but another value for each batch
            return self.last((x + mean[:, None]).flatten(1))

    with pytest.raises(ValueError, match=r"depends on all examples together|depend on the other examples"):
        per_example_gradients(Centred(), SUM, data_of())


def test_graphs_are_freed() -> None:
    """Hooks in the graph hold a small object, and the graph must not be part of a cycle with it."""
    model, data = model_of("layer norm", "scale and shift", "twice"), data_of()
    calls: list[Callable[[], Any]] = [
        lambda: per_example_gradients(model, SUM, data),
        lambda: per_example_gradient_norms(model, SUM, data),
        lambda: clipped_gradients(model, SUM, data, 1.0),
        lambda: curvature.kfac(model, SUM, data),
        lambda: curvature.hessian_diagonal(model, SUM, data, samples=1),
    ]
    before = {id(one): one for one in gc.get_objects() if type(one) is _Ear}  # of tests whose errors are still held
    for call in calls:
        call()
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is _Ear and id(one) not in before]


# ------------------------------------------------------------------------------------------------------------- clipping
def test_noise_of_clipped_gradients() -> None:
    model, data = model_of("layer norm"), data_of()
    plain = clipped_gradients(model, SUM, data, 0.5).gradients
    noisy = [
        clipped_gradients(model, SUM, data, 0.5, noise=2.0, generator=torch.Generator().manual_seed(seed)).gradients
        for seed in (1, 1, 2)
    ]
    for name in plain:
        assert torch.equal(noisy[0][name], noisy[1][name])
        assert not torch.equal(noisy[0][name], noisy[2][name])
    noise = torch.cat([(noisy[0][name] - plain[name]).flatten() for name in plain])
    assert abs(float(noise.std()) - 1.0) < 0.15  # 2 · 0.5, over 211 entries
    mean = nn.CrossEntropyLoss()
    one = clipped_gradients(model, mean, data, 0.5, noise=2.0, generator=torch.Generator().manual_seed(1)).gradients
    for name in plain:
        torch.testing.assert_close(one[name], noisy[0][name] / 4)


def test_arguments_of_clipped_gradients() -> None:
    model, data = model_of(), data_of()
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"max_norm is {wrong}, expected a positive finite number"):
            clipped_gradients(model, SUM, data, wrong)
    with pytest.raises(ValueError, match=r"noise is -1\.0"):
        clipped_gradients(model, SUM, data, 1.0, noise=-1.0)
    with pytest.raises(ValueError, match="reduction is None, expected 'sum' or 'mean'"):
        clipped_gradients(model, lambda o, y: F.cross_entropy(o, y), data, 1.0)
    one = clipped_gradients(model, lambda o, y: F.cross_entropy(o, y), data, 1.0, reduction="mean")
    two = clipped_gradients(model, nn.CrossEntropyLoss(), data, 1.0)
    torch.testing.assert_close(one.norms, two.norms)
    model[0].requires_grad_(False)
    assert list(clipped_gradients(model, SUM, data, 1.0).gradients) == ["2.weight", "2.bias"]


def test_means_whose_examples_have_different_weights_are_refused() -> None:
    model, (x, _) = model_of(), data_of()
    some = torch.tensor([0, 1, -100, -100])
    for loss, y in (
        (nn.CrossEntropyLoss(), some),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 10, 0.1])), some % 3),
    ):
        with pytest.raises(ValueError, match="expected equal ones"):
            clipped_gradients(model, loss, (x, y), 1.0)
    check = clipped_gradients(model, nn.CrossEntropyLoss(reduction="sum"), (x, some), 1.0)
    assert check.norms[2:].eq(0).all()
    assert check.gradients["0.weight"].isfinite().all()


def test_small_factors_in_half_precision() -> None:
    model = Parts(lambda self, x: x @ self.weight, weight=random(3, 3)).half()
    x = (10 * torch.randn(4, 3)).half()
    found = clipped_gradients(
        model, lambda out, y: 10 * out.float().square().sum(), (x, torch.zeros(4)), 1e-4, reduction="sum"
    )
    assert 5e-5 < float(found.gradients["weight"].norm()) < 5e-4
