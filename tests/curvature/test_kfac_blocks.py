"""Kronecker factors of weights with several uses, and blocks of parameters without Kronecker factors."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lensor import curvature
from lensor.curvature import ekfac, kfac
from lensor.curvature.ekfac import _eigenvalues
from lensor.curvature.networks import network
from lensor.curvature.ntk import _gram
from lensor.spec import ConvSpec
from tests.support import oracles
from tests.support.oracles import Geometry, draw, shapes
from tests.support.strategies import specs

pytestmark = pytest.mark.usefixtures("in_double_precision")
SUM = nn.MSELoss(reduction="sum")


def jacobian(model: nn.Module, x: Tensor, name: str) -> Tensor:
    """[examples, outputs of one example, entries] for a parameter."""
    rows, parameter = [], dict(model.named_parameters())[name]
    for one in x.split(1):
        out = model(one).flatten()
        parts = [torch.autograd.grad(entry, parameter, retain_graph=True)[0] for entry in out]
        rows.append(torch.stack(parts).reshape(len(out), -1))
    return torch.stack(rows)


def ggn(model: nn.Module, x: Tensor, name: str) -> Tensor:
    """The block of a parameter for a sum of squares, whose Hessian is twice the identity."""
    j = jacobian(model, x, name)
    return 2 * torch.einsum("nci,ncj->ij", j, j)


# --------------------------------------------------------------------------------------------------------- exact cases
class Deep(nn.Module):
    """A deep linear network whose layers run on several positions, or several times."""

    def __init__(self, how: str, is_mean: bool) -> None:
        super().__init__()
        self.how, self.is_mean = how, is_mean
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)
        self.twin = nn.Linear(3, 4)
        if how == "tied":
            self.twin.weight, self.twin.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "positions":
            out = self.second(self.first(x))
        elif self.how == "frames":
            out = self.second(self.first(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        else:
            other = self.twin if self.how == "tied" else self.first
            out = torch.stack([self.second(self.first(x[:, 0])), self.second(other(x[:, 1]))], 1)
        return out.mean(1) if self.is_mean else out.flatten(1)


@pytest.mark.parametrize("bias", ["separate", "joint"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("how", ["positions", "frames", "twice", "tied"])
def test_factors_equal_the_ggn_of_deep_linear_networks(how: str, approx: Any, bias: Any) -> None:
    """Expand is exact if the loss sees each position's output, and reduce if it sees their mean (Eschenhagen, 2023)."""
    torch.manual_seed(0)
    model = Deep(how, is_mean=approx == "reduce")
    if how != "tied":
        del model.twin
    x = torch.randn(5, 2, 3)
    found = kfac(model, SUM, (x, torch.zeros_like(model(x))), approx=approx, bias=bias)
    assert all(block.factored for block in found.values())
    for name, block in found.items():
        if len(block.names) == 1:
            torch.testing.assert_close(block.dense()[0], ggn(model, x, name))
    weight = found["first.weight"]
    if bias == "joint":
        c, d = weight.B.shape[1], weight.d
        dense = weight.dense()[0].reshape(c, d, c, d)[:, :-1, :, :-1].reshape(c * (d - 1), -1)
        torch.testing.assert_close(dense, ggn(model, x, "first.weight"))


class Recurrent(nn.Module):
    """A convolution that runs several times, with a nonlinearity."""

    def __init__(self, steps: int, transposed: bool = False) -> None:
        super().__init__()
        kind = nn.ConvTranspose1d if transposed else nn.Conv1d
        self.steps, self.conv, self.last = steps, kind(4, 4, 3, padding=1, groups=2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = torch.tanh(self.conv(x))
        return self.last(x.sum(2))


def test_one_position_of_one_example_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(3, 2)).double()
    x = torch.randn(1, 2, 4)
    for approx in ("expand", "reduce"):
        found = kfac(model, SUM, (x, torch.zeros(1, 2)), approx=approx)
        for name, block in found.items():
            torch.testing.assert_close(block.dense()[0], ggn(model, x, name))


@given(
    steps=st.integers(1, 3),
    transposed=st.booleans(),
    approx=st.sampled_from(["expand", "reduce"]),
    batch=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_uses_are_further_positions(steps: int, transposed: bool, approx: Any, batch: int, seed: int) -> None:
    """The definition by loops: patches and gradients of all calls, from unfolded inputs and autograd."""
    torch.manual_seed(seed)
    model = Recurrent(steps, transposed)
    x = torch.randn(batch, 4, 5)
    found = kfac(model, SUM, (x, torch.zeros(batch, 2)), approx=approx)["conv.weight"]
    a = torch.zeros(2, 6, 6)
    b = torch.zeros(2, 2, 2)
    for one in x.split(1):
        patches, marks, h = [], [], one
        for _ in range(steps):
            padded = F.pad(h, (1, 1))
            windows = torch.stack([padded[0, :, o : o + 3] for o in range(5)])  # [positions, channels, kernel]
            if transposed:
                windows = windows.flip(2)
            patches.append(windows.unflatten(1, (2, 2)).flatten(2).movedim(1, 0).detach())
            h = model.conv(h)
            marks.append(h)
            h = torch.tanh(h)
        out = model.last(h.sum(2)).flatten()
        p = torch.cat(patches, 1)
        for entry in out:
            parts = torch.autograd.grad(entry, marks, retain_graph=True)
            s = torch.cat([part[0].T for part in parts]).unflatten(1, (2, 2)).movedim(1, 0)  # [groups, positions, c]
            if approx == "reduce":
                s = s.sum(1, keepdim=True)
            b += 2 * torch.einsum("grc,grd->gcd", s, s) / (1 if approx == "reduce" else p.shape[1])
        if approx == "reduce":
            p = p.mean(1, keepdim=True)
        a += torch.einsum("grc,grd->gcd", p, p) / batch
    torch.testing.assert_close(found.A, a)
    torch.testing.assert_close(found.B, b)
    assert found.positions == 5 * steps


def test_siamese_layers_with_biases_of_their_own() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x[:, 0]) - self.b(x[:, 1])

    torch.manual_seed(0)
    model, x = Siamese(), torch.randn(6, 2, 3)
    found = kfac(model, SUM, (x, torch.zeros(6, 4)), approx="reduce")
    assert list(found) == ["a.weight", "a.bias", "b.bias"]
    for name in ("a.bias", "b.bias"):
        torch.testing.assert_close(found[name].dense()[0], ggn(model, x, name))
    forward = kfac(model, SUM, (x, torch.zeros(6, 4)), fisher="forward-only")
    for name, block in forward.items():
        torch.testing.assert_close(block.B, torch.eye(4)[None], msg=name)
    with pytest.raises(ValueError, match=r"'a\.weight' is not always used together with the bias 'a\.bias'"):
        kfac(model, SUM, (x, torch.zeros(6, 4)), bias="joint")


def test_several_batches_of_shared_layers_are_one() -> None:
    torch.manual_seed(0)
    model, x, y = Recurrent(2), torch.randn(7, 4, 5), torch.randn(7, 2)
    for approx in ("expand", "reduce"):
        whole = kfac(model, nn.MSELoss(), (x, y), approx=approx)
        parts = kfac(model, nn.MSELoss(), [(x[:3], y[:3]), (x[3:], y[3:])], approx=approx)
        for name, block in whole.items():
            torch.testing.assert_close(parts[name].A, block.A)
            torch.testing.assert_close(parts[name].B, block.B)


# ------------------------------------------------------------------------------------------- parameters without factors
class Various(nn.Module):
    """A model with parameters of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.last = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 7, bias=False)
        self.tied.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embedding(x))
        h = h + self.scale * self.attention(h, h, h, need_weights=False)[0]
        return self.tied(torch.tanh(self.last(h))).mean(1)


def various() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return Various(), (torch.randint(7, (5, 3)), torch.randint(7, (5,)))


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("batch", [1, 5])
def test_blocks_of_other_parameters_are_exact(fisher: Any, batch: int) -> None:
    model, (x, y) = various()
    loss, data = nn.CrossEntropyLoss(), (x[:batch], y[:batch])
    found = kfac(model, loss, data, fisher=fisher)
    assert list(found) == list(dict(model.named_parameters()))
    assert {name for name, block in found.items() if block.factored} == {"last.weight", "last.bias"}
    diagonal = curvature.ggn_diagonal(model, loss, data, fisher=fisher)
    own = found.diagonal()
    for name, block in found.items():
        if not block.factored:
            torch.testing.assert_close(own[name], diagonal[name])
            assert block.groups == diagonal[name].numel()
    assert list(kfac(model, loss, data, fisher=fisher, others="skip", layers=["last"])) == ["last.weight", "last.bias"]


def test_dense_blocks_of_other_parameters_are_exact() -> None:
    model, (x, _) = various()
    outputs = model(x)
    found = kfac(model, SUM, (x, torch.zeros_like(outputs)), others="full")
    for name in ("norm.weight", "embedding.weight", "scale", "attention.in_proj_weight"):
        torch.testing.assert_close(found[name].dense()[0], ggn(model, x, name))
    assert found["norm.bias"].form == "dense 4²"


@pytest.mark.parametrize("others", ["diagonal", "full"])
def test_operators_with_blocks_of_other_parameters(others: Any) -> None:
    model, data = various()
    found = kfac(model, nn.CrossEntropyLoss(), data, others=others)
    size, damping = found.size, 0.1
    matrix = found @ torch.eye(size)
    torch.testing.assert_close(matrix, matrix.mT)
    exact = torch.linalg.inv(matrix + damping * torch.eye(size))
    torch.testing.assert_close(found.inverse(damping) @ torch.eye(size), exact)
    torch.testing.assert_close(found.logdet(damping), torch.logdet(matrix + damping * torch.eye(size)))
    torch.testing.assert_close(found.trace(), matrix.trace())
    torch.testing.assert_close(found.eigh() @ torch.eye(size), matrix)
    few = data[0][:3], data[1][:3]
    reduced = kfac(model, nn.CrossEntropyLoss(), few, others=others, approx="reduce", bias="joint")
    places = [at for at, block in enumerate(_blocks(reduced)) if not block.factored]
    exact = torch.linalg.inv(reduced @ torch.eye(reduced.size) + damping * torch.eye(reduced.size))
    for method in ("cholesky", "woodbury"):
        solved = reduced.inverse(damping, method) @ torch.eye(reduced.size)
        torch.testing.assert_close(solved[places][:, places], exact[places][:, places])
    again = type(found).from_state_dict(found.state_dict(), model)
    torch.testing.assert_close(again @ torch.eye(size), matrix)
    torch.testing.assert_close(found.ema_(again, 0.5) @ torch.eye(size), matrix)
    torch.testing.assert_close(found.in_convention("curvlinops") @ torch.eye(size), matrix)


def _blocks(found: Any) -> list[Any]:
    """The block of each entry of a flat vector."""
    owners = {name: block for block in found.values() for name in block.names}
    return [owners[name] for name, shape in found.shapes.items() for _ in range(torch.Size(shape).numel())]


@pytest.mark.parametrize("make", [lambda: various(), lambda: _recurrent()], ids=["various", "recurrent"])
@pytest.mark.parametrize("bias", ["separate", "joint"])
@pytest.mark.parametrize("basis", [None, torch.bfloat16])
def test_corrected_eigenvalues_are_the_diagonal_in_the_basis(make: Callable[[], Any], bias: Any, basis: Any) -> None:
    """In the rounded basis, too, if the eigenvectors are stored in half precision."""
    model, data = make()
    loss = nn.CrossEntropyLoss() if not data[1].is_floating_point() else nn.MSELoss()
    factors = kfac(model, loss, data, bias=bias)
    found = ekfac(model, loss, data, factors, basis_dtype=basis)
    names = dict(model.named_parameters())
    j = {}
    for name in names:
        j[name] = jacobian(model, data[0], name)
    outputs = model(data[0]).detach()
    if loss.__class__ is nn.MSELoss:
        hessian = 2 * torch.eye(outputs.shape[1]).expand(len(outputs), -1, -1) / outputs.numel()
    else:
        p = outputs.softmax(1)
        hessian = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(outputs)
    for name, block in factors.items():
        q_a, q_b, values = found.parts[name]
        assert basis in (None, q_a.dtype)
        assert basis in (None, q_b.dtype)
        q_a, q_b = q_a.double(), q_b.double()
        rows = block.to_rows({one: j[one].reshape(*j[one].shape[:2], *block.shapes[one]) for one in block.names})
        turned = q_b.mT @ rows @ q_a
        torch.testing.assert_close(values, torch.einsum("ncgba,ncd,ndgba->gba", turned, hessian, turned))
    vector = torch.randn(found.size)
    exact = ekfac(model, loss, data, factors)
    for one, two in ((found @ vector, exact @ vector), (found.inverse(0.1) @ vector, exact.inverse(0.1) @ vector)):
        assert one.dtype == vector.dtype
        assert (one - two).norm() <= (1e-10 if basis is None else 2e-2) * two.norm()


def test_a_basis_has_a_floating_dtype() -> None:
    model, data = _recurrent()
    with pytest.raises(TypeError, match=r"basis_dtype is torch\.int8, expected a floating dtype"):
        ekfac(model, nn.MSELoss(), data, kfac(model, nn.MSELoss(), data), basis_dtype=torch.int8)


def _recurrent() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, groups=2), nn.BatchNorm1d(4), Recurrent(2, transposed=True))
    return model.eval(), (torch.randn(5, 4, 5), torch.randn(5, 2))


def test_uses_that_change_between_batches_are_refused() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x)
            return out @ self.layer.weight if x.shape[1] == 4 else out

    x = torch.randn(5, 2, 3), torch.randn(5, 4, 3)
    batches = [(one, torch.zeros_like(one)) for one in x]
    with pytest.raises(ValueError, match=r"'layer\.weight' is used by other functions than in the first batch"):
        kfac(Changing(), SUM, batches)
    assert not kfac(Changing(), SUM, batches[::-1])["layer.weight"].factored


def test_a_repeated_first_pass_sees_the_model_as_it_was() -> None:
    """The first forward pass is repeated if it shows that a function uses a weight: buffers, lists and dropout."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.last = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
            self.register_buffer("k", torch.ones(()))
            self.calls: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            k = self.k.clone()
            with torch.no_grad():
                self.k.mul_(2.0)
            self.calls.append(1)
            x = self.a(x) * k * len(self.calls) + F.linear(x, self.a.weight * 0.5)
            return self.last(self.norm(F.dropout(x, 0.5, self.training).tanh()))

    torch.manual_seed(0)
    model, data = Counting(), (torch.randn(6, 4), torch.randint(3, (6,)))
    for is_training in (False, True):
        model.train(is_training)
        torch.manual_seed(5)
        expected = curvature.ggn_diagonal(model, nn.CrossEntropyLoss(), data)
        model.calls.clear()
        torch.manual_seed(5)
        found = kfac(model, nn.CrossEntropyLoss(), data)
        for name in ("a.weight", "norm.weight", "norm.bias"):
            torch.testing.assert_close(found.diagonal()[name], expected[name])
        model.calls.clear()


def test_mixed_examples_are_refused_when_a_weight_turns_out_to_have_no_factors() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.a(x)).tanh() + F.linear(x, self.a.weight * 2)[:, :4])

    data = torch.randn(6, 4), torch.randint(3, (6,))
    for axis in (None, 0):
        with pytest.raises(ValueError, match="mixed by the statistics of norm"):
            kfac(Mixing(), nn.CrossEntropyLoss(), data, batch_axis=axis)


def test_inputs_of_previous_batches_are_freed() -> None:
    """Without the garbage collector: captures must not be in cycles of references."""
    model, alive = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)), []

    def loader() -> Any:
        for _ in range(4):
            x = torch.randn(6, 4)
            alive.append(weakref.ref(x))
            yield x, torch.randint(3, (6,))
            del x
            counts.append(sum(one() is not None for one in alive))

    calls: list[Callable[[Any], Any]] = [
        lambda data: kfac(model, nn.CrossEntropyLoss(), data),
        lambda data: curvature.ggn_diagonal(model, nn.CrossEntropyLoss(), data),
        lambda data: curvature.hessian_diagonal(model, nn.CrossEntropyLoss(), data, samples=1),
    ]
    gc.collect()
    gc.disable()
    try:
        for call in calls:
            counts: list[int] = []
            alive.clear()
            call(loader())
            assert max(counts) <= 2, counts
    finally:
        gc.enable()


def test_layers_with_one_weight_have_the_same_block_by_either_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.b(self.a(x).tanh()).tanh())

    torch.manual_seed(0)
    model, data = Tied(), (torch.randn(6, 4), torch.randint(3, (6,)))
    whole = kfac(model, nn.CrossEntropyLoss(), data)
    for name in ("a", "b"):
        found = kfac(model, nn.CrossEntropyLoss(), data, layers=[name])
        assert list(found) == ["a.weight", f"{name}.bias"]
        for key, block in found.items():
            torch.testing.assert_close(block.dense(), whole[key].dense())


def test_models_without_layers_have_blocks() -> None:
    model, data = nn.LayerNorm(3), (torch.randn(4, 3), torch.randn(4, 3))
    diagonal = curvature.ggn_diagonal(model, nn.MSELoss(), data)
    for name, one in kfac(model, nn.MSELoss(), data).diagonal().items():
        torch.testing.assert_close(one, diagonal[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blocks_of_half_precision_are_single_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(24, 3)).float()
    data = torch.randn(6, 2, 8).float(), torch.randint(3, (6,))
    expected = kfac(model, nn.CrossEntropyLoss(), data)
    found = kfac(copy.deepcopy(model).to(dtype), nn.CrossEntropyLoss(), (data[0].to(dtype), data[1]))
    for name, block in found.items():
        assert block.A.dtype == block.B.dtype == torch.float32
        largest = float(expected[name].dense().abs().max())
        torch.testing.assert_close(block.dense(), expected[name].dense(), rtol=0, atol=0.05 * largest)


# ------------------------------------------------------------------------------------------------------------ networks
@settings(max_examples=40)
@given(spec=specs(), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_networks_of_eigenvalues_and_kernels(spec: dict[str, Any], batch: int, seed: int) -> None:
    """Over all hyper-parameters, against the gradients of single examples by torch's convolutions and autograd."""
    g, rng = Geometry.of(spec), np.random.default_rng(seed)
    sizes = shapes(g, batch, 2)
    x, s = (draw(rng, sizes[name]) for name in ("input", "roots"))
    rows = torch.from_numpy(oracles.ggn_roots(g, x, s)).reshape(2, batch, -1)
    conv, inside, outside = ConvSpec(**spec), g.in_channels // g.groups, g.out_channels // g.groups
    # The weight of a transposed convolution has the input channels first.
    first, second = (inside, outside) if g.transposed else (outside, inside)
    matrices = rows.reshape(2, batch, g.groups, first, second, -1)
    matrices = (matrices.transpose(3, 4) if g.transposed else matrices).flatten(4)
    size = matrices.shape[-1]
    q_a = torch.linalg.qr(torch.randn(g.groups, size, size))[0]
    q_b = torch.linalg.qr(torch.randn(g.groups, outside, outside))[0]
    turned = q_b.mT @ matrices @ q_a
    operands = {"X": torch.from_numpy(x), "S": torch.from_numpy(s)}
    found = network(_eigenvalues, conv)(**operands, Q_A=q_a, Q_B=q_b)
    torch.testing.assert_close(found, turned.square().sum((0, 1)))
    for is_summed in (False, True):
        one = network(_gram, conv, conv, is_summed, True)(**operands)
        two = network(_gram, conv, conv, is_summed, False)(**operands, X2=operands["X"], S2=operands["S"])
        flat = rows.reshape(-1, rows.shape[-1])
        expected = torch.einsum("vnp,vmp->nm", rows, rows) if is_summed else flat @ flat.mT
        torch.testing.assert_close(one, expected)
        torch.testing.assert_close(two, expected)
