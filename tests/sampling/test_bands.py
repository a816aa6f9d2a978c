"""Blocks of positions: every way to compute their weight gradients, means and variances over all starts, and plans."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lensor
from lensor import evaluate as execute
from lensor import sampling
from lensor.functional import conv as exact_conv
from lensor.sampling import functional, memory
from lensor.sampling.functional import names_of
from tests.support.strategies import specs


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in double precision."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def masked(x: Tensor, starts: dict[int, int], keep: float) -> Tensor:
    """The input with zeros outside the blocks along some axes, times the inverse probabilities."""
    for axis, start in starts.items():
        size = x.shape[axis]
        count = max(1, round(size * keep))
        factors = torch.zeros(size, dtype=x.dtype)
        factors[(start + torch.arange(count)) % size] = size / count
        x = x * factors.reshape([-1 if at == axis else 1 for at in range(x.ndim)])
    return x


@contextmanager
def starting(starts: Sequence[int]) -> Iterator[None]:
    """Draw these starts, in this order."""
    with mock.patch.object(functional, "draw_start", side_effect=starts):
        yield


def _has_bands(spec: Mapping[str, Any]) -> bool:
    """Whether blocks of a layer are bands; the functions have equal padding on both sides of a transposed one."""
    sides = spec["padding"] if isinstance(spec["padding"], tuple) else ()
    even = all(isinstance(side, int) or side[0] == side[1] for side in sides)
    return spec["padding_mode"] == "zeros" and (even or not spec["transposed"])


@settings(max_examples=60)
@given(st.data())
def test_each_way_is_the_exact_gradient_of_the_masked_input(data: st.DataObject) -> None:
    spec = lensor.ConvSpec(**data.draw(specs(min_ndim=1).filter(_has_bands)))
    keep = data.draw(st.sampled_from((0.2, 0.5, 0.75)))
    dims = len(spec.input_size)
    axes = [axis for axis in range(dims) if data.draw(st.booleans())]
    axes = [axis for axis in axes if max(1, round(spec.input_size[axis] * keep)) < spec.input_size[axis]]
    starts = {axis + 2: data.draw(st.integers(0, spec.input_size[axis] - 1)) for axis in axes}
    more = data.draw(st.sampled_from(({}, {"n": 0.5}, {"c_in": 0.5}, {"n": 0.5, "g": 0.5, "c_in": 0.5})))
    rates = {**{f"i{axis + 1}": keep for axis in axes}, **more}
    x, w = normal(2, spec.in_channels, *spec.input_size), normal(*spec.weight_shape, seed=1).requires_grad_()
    options: dict[str, Any] = {"stride": spec.stride, "dilation": spec.dilation, "groups": spec.groups}
    if spec.transposed:
        options |= {"padding": tuple(left for left, _ in spec.padding), "output_padding": spec.output_padding}
    else:
        options["padding"] = spec.padding
    sampled, exact = (
        (sampling.conv_transpose, lensor.functional.conv_transpose) if spec.transposed else (sampling.conv, exact_conv)
    )
    scheme = {name: "blocks" if name.startswith("i") else "fixed" for name in names_of(dims)}
    state = torch.Generator().manual_seed(3)
    whole = masked(x, starts, keep).reshape(2, spec.groups, -1, *spec.input_size)
    for axis, name in enumerate(("n", "g", "c_in")):
        if name in more and max(1, round(whole.shape[axis] / 2)) < whole.shape[axis]:
            drawn = sampling.draw(whole.shape[axis], 0.5, "fixed", generator=state)
            factors = torch.zeros(whole.shape[axis], dtype=x.dtype)
            factors[drawn.positions] = 1 / float(drawn.keep or 1)
            whole = whole * factors.reshape([-1 if at == axis else 1 for at in range(whole.ndim)])
    output = exact(whole.reshape(x.shape), w, None, **options)
    v = normal(*output.shape, seed=2)
    (expected,) = torch.autograd.grad(output, w, v)
    for way in [*itertools.product((False, True), repeat=len(axes)), None]:
        generator = torch.Generator().manual_seed(3)
        with mock.patch.object(functional, "_fastest", lambda *_, way=way: way), starting([*starts.values()]):
            y = sampled(x, w, None, **options, keep=rates, scheme=scheme, generator=generator)
        with mock.patch.object(functional, "_fastest", lambda *_, way=way: way):
            (found,) = torch.autograd.grad(y, w, v)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


CASES: list[tuple[str, nn.Module, tuple[int, ...]]] = [
    ("padded", nn.Conv2d(2, 3, 3, padding=1), (2, 2, 7, 6)),
    ("not padded", nn.Conv2d(2, 3, (3, 2)), (2, 2, 7, 6)),
    ("strided", nn.Conv2d(2, 3, 3, stride=(2, 3), padding=(2, 0)), (2, 2, 8, 7)),
    ("gaps between kernels", nn.Conv2d(2, 3, 1, stride=3), (2, 2, 8, 7)),
    ("dilated groups", nn.Conv2d(4, 2, 3, dilation=2, padding=2, groups=2), (2, 4, 7, 6)),
    ("transposed", nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 2, 5, 6)),
    ("one dimension", nn.Conv1d(2, 3, 4, padding=3), (2, 2, 9)),
    ("three dimensions", nn.Conv3d(1, 2, 2), (2, 1, 4, 3, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize("keep", [0.4, 0.7])
def test_mean_and_variance_over_all_starts_are_exact(layer: nn.Module, shape: tuple[int, ...], keep: float) -> None:
    exact = layer.double()
    x = normal(*shape)
    v = normal(*exact(x).shape, seed=1)
    (expected,) = torch.autograd.grad(exact(x), exact.weight, v)  # type: ignore[arg-type]
    names = [f"i{axis + 1}" for axis in range(len(shape) - 2)]
    sampled: Any = sampling.convert(exact, dict.fromkeys(names, keep), scheme="blocks")
    used = [size for size in shape[2:] if max(1, round(size * keep)) < size]
    mean, square, every = torch.zeros_like(expected), 0.0, [*itertools.product(*(range(size) for size in used))]
    for starts in every:
        with starting(starts):
            (found,) = torch.autograd.grad(sampled(x), sampled.weight, v)
        mean, square = mean + found / len(every), square + float(found.square().sum()) / len(every)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    bilinear = sampled._bilinear(x) if len(shape) < 5 else None
    if bilinear is not None:
        net = bilinear.gradient
        moments = {
            bilinear.indices[name]: sampling.second_moments(size, keep, "blocks")
            for name, size in zip(names, shape[2:], strict=True)
        }
        predicted = sampling.variance(net, moments, X=x, V=v)
        assert predicted == pytest.approx(square - float(expected.square().sum()), rel=1e-6)


@pytest.mark.parametrize("start", [1, 4])
def test_second_derivatives(start: int) -> None:
    x, w, v = (
        one.requires_grad_() for one in (normal(2, 2, 6, 4), normal(3, 2, 3, 3, seed=1), normal(2, 3, 6, 4, seed=2))
    )
    with starting([start]):
        y = sampling.conv(x, w, padding=1, keep={"i1": 0.5}, scheme="blocks")
    (found,) = torch.autograd.grad(y, w, v, create_graph=True)
    (expected,) = torch.autograd.grad(torch.conv2d(masked(x, {2: start}, 0.5), w, padding=1), w, v, create_graph=True)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), (x, v)),
        torch.autograd.grad(expected.square().sum(), (x, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_new_starts_need_no_new_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Any] = []
    choose = execute.choose
    monkeypatch.setattr(execute, "choose", lambda *args: planned.append(0) or choose(*args))
    layer = sampling.Conv2d(2, 3, 3, padding=1, keep={"i1": 0.5, "i2": 0.5}, scheme="blocks")
    x = torch.randn(2, 2, 37, 37)
    monkeypatch.setattr(functional, "_fastest", lambda *_: (False, False))
    for start in range(37):
        with starting([start, start]):
            layer(x).sum().backward()
    assert len(planned) == 2  # bands that wrap around contain the padding once; others do not


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_only_the_block_is_stored_in_the_memory_order_of_the_input(format: torch.memory_format) -> None:
    layer = sampling.Conv2d(3, 2, 3, keep={"i1": 0.5, "i2": 0.25}, scheme="blocks")
    x = torch.randn(2, 3, 16, 16).to(memory_format=format)
    for starts in ((2, 3), (12, 14)):
        with starting(starts):
            assert sampling.saved_bytes(layer, x) == 4 * x.numel() // 8
        kept: list[Tensor] = []
        with starting(starts), torch.autograd.graph.saved_tensors_hooks(partial(_noted, kept), lambda one: one):
            layer(x)
        assert any(one.shape == (2, 3, 8, 4) and one.is_contiguous(memory_format=format) for one in kept)


def _noted(kept: list[Tensor], one: Tensor) -> Tensor:
    kept.append(one)
    return one


def test_blocks_under_vmap() -> None:
    layer = sampling.Conv2d(2, 3, 3, keep={"i1": 0.5}, scheme="blocks").double()
    layer.generator = torch.Generator()
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    x = normal(4, 2, 6, 5)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    layer.generator.manual_seed(0)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="same")(parameters, x)
    for at in range(4):
        layer.generator.manual_seed(0)
        torch.testing.assert_close(each["weight"][at], torch.func.grad(loss)(parameters, x[at])["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_rectifiers_in_chunks(format: torch.memory_format, dtype: torch.dtype) -> None:
    x = torch.randn(7, 40, 33, 33).to(dtype).to(memory_format=format).requires_grad_()
    v = torch.randn(7, 40, 35, 35).to(dtype)[:, :, 1:-1, 1:-1]
    (found,) = torch.autograd.grad(sampling.ReLU()(x), x, v)
    assert torch.equal(found, torch.autograd.grad(torch.relu(x), x, v)[0])


def test_derivatives_of_rectifiers_gradients() -> None:
    x = normal(3, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: sampling.ReLU()(x * x.sin()), (x,))
    found = torch.func.vmap(lambda x, v: torch.func.vjp(sampling.ReLU(), x)[1](v)[0], in_dims=(1, None))(
        x.detach(), torch.ones(3, dtype=torch.float64)
    )
    assert torch.equal(found, (x > 0).double().T)


def test_a_recommended_rate_fits_the_time_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are replaced by ones that grow with the number of stored bytes."""
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), torch.randn(2, 3, 32, 32)
    stored = sampling.saved_bytes
    times = partial(_modelled_time, stored, x)
    monkeypatch.setattr(memory, "_seconds", times)
    monkeypatch.setattr(memory, "_WARM", 0)
    monkeypatch.setattr(memory, "_ROUNDS", 1)
    for budget in (0.3, 0.5, 0.9):
        for scheme in ("fixed", "blocks"):
            keep = sampling.recommend(model, x, max_time=budget, scheme=scheme)
            exact = times(copy.deepcopy(model), x)
            assert times(sampling.convert(model, keep, scheme=scheme), x) <= budget * exact
            more = {name: rate + 1 / 64 for name, rate in keep.items()}
            assert times(sampling.convert(model, more, scheme=scheme), x) > budget * exact
    less = sampling.recommend(model, x, max_bytes=40_000, max_time=0.9)
    assert less == sampling.recommend(model, x, 40_000)
    assert sampling.recommend(model, x, max_time=1.5) == {"i1": 1.0, "i2": 1.0}
    with pytest.raises(ValueError, match=r"max_time is 0.01, expected at least 0.\d\d, the measured time"):
        sampling.recommend(model, x, max_time=0.01)
    with pytest.raises(TypeError, match="expected at least one budget"):
        sampling.recommend(model, x)
    with pytest.raises(ValueError, match="scheme is 'bernoulli'"):
        sampling.recommend(model, x, max_time=0.5, scheme="bernoulli")
    with pytest.raises(TypeError, match="max_time is True"):
        sampling.recommend(model, x, max_time=True)
    with pytest.raises(TypeError, match="max_time is nan"):
        sampling.recommend(model, x, max_time=float("nan"))


def _modelled_time(stored: Any, x: Tensor, model: nn.Module, _: Any) -> float:
    return stored(model, x)


def test_times_are_measured_without_changing_the_model() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(2, 2, 9, 9)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert sampling.recommend(model, x, max_time=1e6) == {"i1": 1.0, "i2": 1.0}
    keep = sampling.recommend(model, x, 10_000, max_time=1e6)
    assert keep == sampling.recommend(model, x, 10_000)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_traced_rectifier_has_no_chunks_of_the_traced_size() -> None:
    layer = sampling.ReLU()
    traced = torch.jit.trace(layer, torch.randn(4, 1 << 17, requires_grad=True), check_trace=False)
    x = torch.randn(9, 1 << 17, requires_grad=True)
    assert torch.equal(traced(x), torch.relu(x))
