"""Sampled backpropagation: exact outputs, unbiased weight gradients, their variance, memory and what surrounds them."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.utils.checkpoint import checkpoint

import lensor
import lensor.sampling as sampling
from lensor import evaluate as execute
from lensor.sampling import SCHEMES, Draw
from lensor.sampling.functional import names_of
from tests.support.strategies import specs

Keep = Mapping[str, float]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in double precision that require gradients."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def layer_of(spec: Mapping[str, Any]) -> tuple[nn.Module, tuple[int, ...]]:
    """torch's module for the arguments of a ConvSpec, and the size of its inputs."""
    dims = len(spec["input_size"])
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
    options = {name: spec[name] for name in names} | {"padding_mode": spec["padding_mode"]}
    if spec["transposed"]:
        options["output_padding"] = spec["output_padding"]
    cls = getattr(nn, f"Conv{'Transpose' if spec['transposed'] else ''}{dims}d")
    return cls(**options).double(), (spec["in_channels"], *spec["input_size"])


def draws_of(keep: Keep, sizes: Mapping[str, int], scheme: str, x: Tensor, seed: int) -> dict[str, Draw]:
    """The draws that a layer makes with a generator of this seed, made again."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, rate in keep.items():
        whole = scheme in ("fixed", "blocks") and max(1, round(sizes[name] * rate)) >= sizes[name]
        if rate < 1 and not whole:
            axes = [axis for axis, other in enumerate(sizes) if other != name]
            norms = x.detach().reshape(tuple(sizes.values())).square().sum(axes).sqrt()
            found[name] = sampling.draw(sizes[name], rate, scheme, norms=norms, generator=generator)
    return found


def weighted(x: Tensor, draws: Mapping[str, Draw], sizes: Mapping[str, int]) -> Tensor:
    """The input times the factor of every position: what the sampled gradient is the exact gradient of."""
    flat = x.reshape(tuple(sizes.values()))
    for axis, name in enumerate(sizes):
        if name in draws:
            draw = draws[name]
            factors = torch.zeros(sizes[name], dtype=x.dtype)
            factors[draw.positions] = (
                draw.weights.to(x.dtype) if draw.weights is not None else 1 / float(draw.keep or 1)
            )
            flat = flat * factors.reshape([-1 if at == axis else 1 for at in range(flat.ndim)])
    return flat.reshape(x.shape)


def gradients(output: Tensor, cotangent: Tensor, of: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of the output's product with a cotangent."""
    return torch.autograd.grad(output, of, cotangent)


# ------------------------------------------------------------------------------------------------- against torch's own
def _torch_takes(spec: Mapping[str, Any]) -> bool:
    padding = spec["padding"]
    pairs = not isinstance(padding, (int, str)) and any(not isinstance(entry, int) for entry in padding)
    return not pairs


@settings(max_examples=120)
@given(st.data())
def test_every_layer_is_exact_but_for_its_weight_gradient(data: st.DataObject) -> None:
    spec = data.draw(specs(min_ndim=1).filter(_torch_takes))
    exact, shape = layer_of(spec)
    groups, batch = spec["groups"], data.draw(st.integers(1, 3))
    names = names_of(len(shape) - 1)
    sizes = dict(zip(names, (batch, groups, shape[0] // groups, *shape[1:]), strict=True))
    rate = st.sampled_from((0.2, 0.5, 0.75, 1.0))
    keep = data.draw(st.dictionaries(st.sampled_from(names), rate, min_size=1))
    scheme = data.draw(st.sampled_from(SCHEMES))
    layer = sampling.convert(exact, keep, scheme=scheme, generator=torch.Generator().manual_seed(7))
    x = normal(batch, *shape)
    output = layer(x)
    assert torch.equal(output, exact(x))
    v = normal(*output.shape, seed=1).detach()
    found = gradients(output, v, (x, *layer.parameters()))
    expected = gradients(exact(x), v, (x, *exact.parameters()))
    masked = weighted(x, draws_of(keep, sizes, scheme, x, 7), sizes).detach()
    (expected_weight,) = gradients(exact(masked), v, (exact.weight,))  # type: ignore[arg-type]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], expected_weight, rtol=1e-9, atol=1e-9)
    for one, other in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5), (3, 4, 2, 5), (5,)])
def test_linear_layers_sample_any_axis(shape: tuple[int, ...], scheme: str) -> None:
    exact = nn.Linear(5, 3).double()
    x = normal(*shape)
    names = ("n", *(f"i{axis}" for axis in range(1, len(shape) - 1)), "c_in") if len(shape) > 1 else ("n", "c_in")
    sizes = dict(zip(names, shape if len(shape) > 1 else (1, 5), strict=True))
    keep = dict.fromkeys(names, 0.6)
    layer = sampling.convert(exact, {"": keep}, scheme=scheme, generator=torch.Generator().manual_seed(3))
    v = normal(*exact(x).shape, seed=1).detach()
    assert torch.equal(layer(x), exact(x))
    layer.generator.manual_seed(3)
    found = gradients(layer(x), v, (x, layer.weight, layer.bias))
    (expected,) = gradients(exact(weighted(x, draws_of(keep, sizes, scheme, x, 3), sizes)), v, (exact.weight,))
    torch.testing.assert_close(found[1], expected)
    for one, other in zip((found[0], found[2]), gradients(exact(x), v, (x, exact.bias)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("padding", [((1, 2), (0, 1)), "same", 1])
def test_functional_convolution_takes_what_the_exact_one_takes(padding: Any) -> None:
    x, w, b = normal(2, 4, 6, 5), normal(6, 2, 3, 2), normal(6)
    keep, sizes = {"i1": 0.5, "c_in": 0.5}, {"n": 2, "g": 2, "c_in": 2, "i1": 6, "i2": 5}
    exact = lensor.functional.conv(x, w, b, padding=padding, groups=2)
    v = normal(*exact.shape, seed=1).detach()
    generator = torch.Generator().manual_seed(5)
    found = sampling.conv(x, w, b, padding=padding, groups=2, keep=keep, generator=generator)
    assert torch.equal(found, exact)
    masked = weighted(x, draws_of(keep, sizes, "bernoulli", x, 5), sizes)
    (expected,) = gradients(lensor.functional.conv(masked, w, b, padding=padding, groups=2), v, (w,))
    torch.testing.assert_close(gradients(found, v, (w,))[0], expected)
    alone = sampling.conv(x[0], w, b, padding=padding, groups=2, keep=keep)
    torch.testing.assert_close(alone, exact[0])


def test_functional_transposed_convolution_and_linear_map() -> None:
    x, w = normal(2, 4, 5), normal(4, 3, 3)
    options = {"stride": 2, "padding": 1, "output_padding": 1}
    exact = torch.conv_transpose1d(x, w, None, **options)
    v = normal(*exact.shape, seed=1).detach()
    generator = torch.Generator().manual_seed(2)
    found = sampling.conv_transpose(x, w, **options, keep={"i1": 0.5}, generator=generator)
    torch.testing.assert_close(found, exact)
    sizes = {"n": 2, "g": 1, "c_in": 4, "i1": 5}
    masked = weighted(x, draws_of({"i1": 0.5}, sizes, "bernoulli", x, 2), sizes)
    expected = gradients(torch.conv_transpose1d(masked, w, None, **options), v, (w,))
    torch.testing.assert_close(gradients(found, v, (w,)), expected)
    assert sampling.linear(normal(5), normal(3, 5), keep={"c_in": 0.5}).shape == (3,)


@pytest.mark.parametrize("size", [1, 4])
def test_output_padding_of_a_stride_and_more(size: int) -> None:
    x, w = normal(2, 1, size), normal(1, 2, 3, seed=1)
    hyper = {"stride": 1, "output_padding": 1, "dilation": 2}
    y = sampling.conv_transpose(x, w, **hyper, keep={"n": 0.5}, scheme="importance")
    expected = nn.functional.conv_transpose1d(x, w, **hyper)
    torch.testing.assert_close(y, expected)
    v = normal(*y.shape, seed=2).detach()
    torch.testing.assert_close(gradients(y, v, (x,)), gradients(expected, v, (x,)))


def test_many_channels_of_a_weight_may_be_sampled() -> None:
    """No matrix as large as all channels by all channels."""
    layer = sampling.Linear(2048, 1024, keep={"c_in": 0.5}, scheme="fixed")
    layer(torch.randn(64, 2048)).sum().backward()
    assert layer.weight.grad is not None
    assert int((layer.weight.grad[0] != 0).sum()) == 1024
    net = lensor.contraction("n i, n o -> o i", "X", "V").sample("i", 0.5, stored=["X"]).bind(i_full=512)
    plan = net.plan(X=(4, 256), V=(4, 2), i_positions=(256,))
    assert plan.flops == 2 * 4 * 256 * 2
    assert plan.peak_size <= 2 * 256


def test_counts_that_are_drawn_share_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Any] = []
    choose = execute.choose
    monkeypatch.setattr(execute, "choose", lambda *args: planned.append(0) or choose(*args))
    layer = sampling.Conv2d(2, 3, 3, keep={"i1": 0.5, "i2": 0.5}).double()
    x = normal(1, 2, 40, 40).detach()
    for _ in range(60):
        layer(x).sum().backward()
    assert 0 < len(planned) < 40  # counts scatter by 3.2 around 20: more than 150 pairs are likely ones


def test_one_keeps_every_bit() -> None:
    hidden = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten()]
    exact = nn.Sequential(*hidden, nn.Linear(64, 2))
    model = sampling.convert(exact, {"i1": 1, "i2": 1.0, "c_in": Fraction(1)})
    x = torch.randn(2, 3, 6, 6)
    exact(x).square().sum().backward()
    model(x).square().sum().backward()
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_filter_gets_a_gradient_under_spatial_sampling(scheme: str) -> None:
    layer = sampling.Conv2d(6, 4, 3, padding=1, keep={"i1": 0.25, "i2": 0.25}, scheme=scheme)
    torch.manual_seed(0)
    layer(torch.randn(4, 6, 16, 16)).square().sum().backward()
    assert layer.weight.grad is not None
    assert (layer.weight.grad.abs().sum((2, 3)) > 0).all()
    channels = sampling.Conv2d(6, 4, 3, padding=1, keep={"c_in": 0.5}, scheme="fixed")
    channels(torch.randn(4, 6, 16, 16)).square().sum().backward()
    assert channels.weight.grad is not None
    assert int((channels.weight.grad.abs().sum((0, 2, 3)) > 0).sum()) == 3


# --------------------------------------------------------------------------------------------------- mean and variance
def _every_draw(scheme: str, size: int, keep: float, norms: Tensor) -> Iterator[tuple[float, Draw]]:
    """All draws of a scheme with their probabilities, by the definition of the scheme."""
    count = max(1, round(size * keep))
    if scheme == "fixed":
        every = list(itertools.combinations(range(size), count))
        for positions in every:
            yield 1 / len(every), Draw(torch.tensor(positions), Fraction(count, size))
    elif scheme == "blocks":
        for start in range(size):
            positions = sorted((start + at) % size for at in range(count))
            yield 1 / size, Draw(torch.tensor(positions), Fraction(count, size))
    else:
        rates = [keep] * size if scheme == "bernoulli" else _proportional(norms.tolist(), keep * size)
        for kept in itertools.product((False, True), repeat=size):
            chance = math.prod(rate if one else 1 - rate for rate, one in zip(rates, kept, strict=True))
            at = [place for place, one in enumerate(kept) if one]
            if chance:
                weights = torch.tensor([1 / rates[place] for place in at], dtype=torch.float64)
                yield chance, Draw(torch.tensor(at, dtype=torch.int64), None, weights)


def _proportional(norms: list[float], wanted: float) -> list[float]:
    """Probabilities in proportion to norms, cut at 1, by bisection of the factor."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(1.0, middle * norm) for norm in norms) < wanted else (low, middle)
    return [min(1.0, low * norm) for norm in norms]


@pytest.mark.parametrize("keep", [0.3, 0.5])
@pytest.mark.parametrize("index", ["n", "c_in", "i1", "i2"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_mean_and_variance_over_all_draws_are_exact(scheme: str, index: str, keep: float) -> None:
    x, v = normal(5, 4, 6, 5).detach(), normal(5, 2, 6, 5, seed=1).detach()
    x[:, :, 0] = 3.0  # norms that differ
    axis, whole = {"n": 0, "c_in": 1, "i1": 2, "i2": 3}[index], torch.nn.grad.conv2d_weight
    size = x.shape[axis]
    norms = x.square().sum([other for other in range(4) if other != axis]).sqrt()
    exact, mean, square, chances = whole(x, (2, 4, 3, 3), v, padding=1), torch.tensor(0.0), 0.0, 0.0
    for chance, draw in _every_draw(scheme, size, keep, norms):
        factors = torch.zeros(size, dtype=torch.float64)
        factors[draw.positions] = draw.weights if draw.weights is not None else 1 / float(draw.keep or 1)
        one = whole(x * factors.reshape([-1 if at == axis else 1 for at in range(4)]), (2, 4, 3, 3), v, padding=1)
        mean, square, chances = mean + chance * one, square + chance * float(one.square().sum()), chances + chance
    assert abs(chances - 1) < 1e-9
    torch.testing.assert_close(mean, exact, rtol=1e-6, atol=1e-6)
    net = lensor.ops.conv_weight_vjp(lensor.ConvSpec(4, 2, (6, 5), 3, padding=1))
    moments = {index: sampling.second_moments(size, keep, scheme, norms=norms)}
    predicted = sampling.variance(net, moments, X=x, V=v)
    assert predicted == pytest.approx(square - float(exact.square().sum()), rel=1e-5)


LONG = 1536
"""Positions of the index that is sampled: so many that a few draws tell 2 %."""

GROUPS = 384
"""Convolutions with more groups are slow, so they need more draws."""

ALONG = (("n", (LONG, 2, 3)), ("c_in", (3, LONG, 3)), ("i1", (3, 2, LONG)))
ALONG_LINEAR = (("n", (LONG, 2, 3)), ("i1", (3, LONG, 2)), ("c_in", (3, 2, LONG)))
PLANES = (("n", (LONG, 2, 2, 2)), ("c_in", (2, LONG, 2, 2)), ("i1", (2, 2, LONG, 3)), ("i2", (2, 2, 3, LONG)))
SPACES = (("n", (LONG, 2, 2, 2, 2)), ("i3", (2, 2, 3, 3, LONG)))

SAMPLED: list[tuple[str, Callable[..., nn.Module], tuple[int, ...], str]] = [
    *(("conv1d", sampling.Conv1d, shape, index) for index, shape in ALONG),
    *(("conv2d", sampling.Conv2d, shape, index) for index, shape in PLANES),
    *(("conv3d", sampling.Conv3d, shape, index) for index, shape in SPACES),
    *(("transposed1d", sampling.ConvTranspose1d, shape, index) for index, shape in ALONG),
    *(("transposed2d", sampling.ConvTranspose2d, shape, index) for index, shape in PLANES),
    *(("linear", sampling.Linear, shape, index) for index, shape in ALONG_LINEAR),
    ("groups", sampling.Conv1d, (4, GROUPS, 16), "g"),
    ("transposed groups", sampling.ConvTranspose1d, (4, GROUPS, 16), "g"),
]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("name", "cls", "shape", "index"),
    [pytest.param(*one, id=f"{one[0]}-{one[3]}", marks=[pytest.mark.slow] * (one[3] == "g")) for one in SAMPLED],
)
def test_means_over_draws_are_unbiased(
    name: str, cls: Callable[..., Any], shape: tuple[int, ...], index: str, scheme: str
) -> None:
    """The mean of the gradient along the exact one, over enough draws to tell 0.98 and 1.02 from 1."""
    torch.manual_seed(0)
    options = {"groups": GROUPS} if index == "g" else {}
    inner = shape[-1] if name == "linear" else shape[1]
    outer = GROUPS if index == "g" else 2
    layer = cls(
        inner, outer, *([] if name == "linear" else [1]), bias=False, keep={index: 0.5}, scheme=scheme, **options
    )
    layer, x = layer.double(), torch.exp(0.5 * normal(*shape).detach())
    v = torch.exp(0.5 * normal(*layer(x).shape, seed=1).detach())
    layer.eval()
    (exact,) = gradients(layer(x), v, (layer.weight,))
    layer.train()
    draws = 300 if index == "g" else 75
    along = torch.stack(
        [(gradients(layer(x), v, (layer.weight,))[0] * exact).sum() / exact.square().sum() for _ in range(draws)]
    )
    mean, half = float(along.mean()), 4 * float(along.std()) / math.sqrt(draws)
    assert abs(mean - 1) <= half + 1e-9
    assert min(abs(1.02 * mean - 1), abs(0.98 * mean - 1)) > half


# -------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("scheme", ["bernoulli", "fixed", "blocks"])
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_saved_bytes_are_those_of_the_drawn_part(keep: float, scheme: str) -> None:
    layer = sampling.Conv2d(1, 2, 3, padding=1, keep={"i1": keep, "i2": keep}, scheme=scheme)
    x, total = torch.randn(1, 1, 256, 256), 0.0
    layer.generator = torch.Generator()
    for seed in range(500):
        layer.generator.manual_seed(seed)
        found = sampling.saved_bytes(layer, x)
        draws = draws_of(layer.keep, {"n": 1, "g": 1, "c_in": 1, "i1": 256, "i2": 256}, scheme, x, seed)
        rows, columns = (len(draws[name].positions) for name in ("i1", "i2"))
        positions = 0 if scheme == "blocks" else 8 * (rows + columns)  # of a block, its start and length suffice
        assert found == 4 * rows * columns + positions
        total += (found - positions) / (4 * x.numel())
    assert total / 500 == pytest.approx(keep**2, rel=0.02)


def test_evaluation_keeps_and_draws_nothing() -> None:
    layer, exact = sampling.Conv2d(3, 2, 3, keep={"i1": 0.5}).eval(), nn.Conv2d(3, 2, 3).eval()
    x = torch.randn(2, 3, 8, 8)
    state = torch.get_rng_state()
    with torch.no_grad():
        layer(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert sampling.saved_bytes(layer, x) == sampling.saved_bytes(exact, x) == 4 * x.numel()
    assert torch.equal(torch.get_rng_state(), state)


def test_rectifiers_keep_a_byte_an_entry() -> None:
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    y = sampling.ReLU()(x)
    assert torch.equal(y, torch.relu(x))
    torch.testing.assert_close(gradients(y, x.detach(), (x,)), gradients(torch.relu(x), x.detach(), (x,)))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    part = sampling.convert(model, {"i1": 0.5, "i2": 0.5}, scheme="fixed")
    whole = sampling.convert(model, {"i1": 0.5, "i2": 0.5}, scheme="fixed", activations=False)
    image, hidden, drawn = 4 * 3 * 64, 4 * 8 * 64, 2 * 8 * 8
    assert sampling.saved_bytes(model, x) == 4 * (image + hidden)
    assert sampling.saved_bytes(part, x) == 4 * (image // 4 + hidden // 4) + hidden + drawn
    assert sampling.saved_bytes(whole, x) == 4 * (image // 4 + hidden // 4) + 4 * hidden + drawn


def test_rectifiers_that_write_in_place_still_do() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv1d(2, 2, 3, padding=1).double()

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            return x + self.conv(self.relu(x))  # the sum is of the rectified input

    block, x = Block(), normal(2, 2, 5)
    converted = sampling.convert(block, {"i1": 1.0})
    assert torch.equal(converted(x), block(x))
    assert torch.equal(
        gradients(converted(x), torch.ones_like(x), (x,))[0], gradients(block(x), torch.ones_like(x), (x,))[0]
    )


def test_rectifiers_have_the_gradients_of_torch_s() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0, math.nan], requires_grad=True)
    v = torch.tensor([math.inf, math.nan, 3.0, 4.0])
    (found,), (expected,) = gradients(sampling.ReLU()(x), v, (x,)), gradients(nn.ReLU()(x), v, (x,))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_importance_is_of_norms_of_any_size(scale: float) -> None:
    layer = sampling.Linear(3, 1, keep={"n": 0.5}, scheme="importance", bias=False)
    x = scale * torch.tensor([[1.0, 2.0, 0.5]]).expand(8, 3)
    total = torch.zeros(1, 3)
    for seed in range(400):
        layer.generator = torch.Generator().manual_seed(seed)
        total += torch.autograd.grad(layer(x).sum(), layer.weight)[0] / scale
    torch.testing.assert_close(total / 400, 8 * x[:1] / scale, rtol=0.1, atol=0)  # 3 deviations of a mean are 0.053


def test_importance_s_factors_do_not_overflow_in_half_precision() -> None:
    x = torch.full((100_000, 1), 1e-3)
    x[0] = 1000.0  # the others are kept with probabilities whose inverses are no number of half precision
    layer = sampling.Linear(1, 1, keep={"n": 2e-5}, scheme="importance", bias=False).half()
    for seed in range(8):
        layer.generator = torch.Generator().manual_seed(seed)
        (found,) = torch.autograd.grad(layer(x.half()), layer.weight, torch.full((100_000, 1), 1e-2).half())
        assert 9 < float(found) < 14


def test_importance_keeps_what_is_not_finite() -> None:
    layer = sampling.Conv1d(1, 1, 1, keep={"i1": 0.5}, scheme="importance")
    x = torch.zeros(1, 1, 6)
    x[0, 0, 2] = math.inf
    layer(x).nansum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.isfinite().all()


def test_a_recommended_rate_fits_the_budget() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
    x = torch.randn(4, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    whole = sampling.saved_bytes(sampling.convert(model, {"i1": 1, "i2": 1}), x)
    budget, state = int(0.7 * whole), torch.get_rng_state()
    keep = sampling.recommend(model, x, budget)
    assert torch.equal(torch.get_rng_state(), state)
    for scheme in ("fixed", "blocks"):
        assert sampling.saved_bytes(sampling.convert(model, keep, scheme=scheme), x) <= budget
    more = {name: rate + 1 / 32 for name, rate in keep.items()}
    assert sampling.saved_bytes(sampling.convert(model, more, scheme="fixed"), x) > budget
    assert sampling.recommend(model, x, whole) == {"i1": 1.0, "i2": 1.0}
    with pytest.raises(ValueError, match=r"max_bytes is 1000, expected at least .* at a keep rate of 1/64 for i1, i2"):
        sampling.recommend(model, x, 1000)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# ---------------------------------------------------------------------------------------------------- what surrounds it
def test_second_derivatives_are_those_of_the_sampled_gradient() -> None:
    x, w, v = normal(2, 2, 5, 4), normal(3, 2, 3, 3), normal(2, 3, 3, 2, seed=1)
    sizes = {"n": 2, "g": 1, "c_in": 2, "i1": 5, "i2": 4}
    for scheme in ("bernoulli", "fixed"):
        keep = {"i1": 0.6, "c_in": 0.5}
        generator = torch.Generator().manual_seed(1)
        found = sampling.conv(x, w, keep=keep, scheme=scheme, generator=generator)
        (weight,) = torch.autograd.grad(found, w, v, create_graph=True)
        masked = weighted(x, draws_of(keep, sizes, scheme, x, 1), sizes)
        (expected,) = torch.autograd.grad(torch.conv2d(masked, w), w, v, create_graph=True)
        torch.testing.assert_close(weight, expected)
        for one, other in zip(
            torch.autograd.grad(weight.square().sum(), (x, v)),
            torch.autograd.grad(expected.square().sum(), (x, v)),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("scheme", SCHEMES[:3])
def test_compiled_with_sizes_that_change(scheme: str) -> None:
    model = sampling.convert(nn.Conv1d(3, 4, 3), {"i1": 0.5, "n": 0.5}, scheme=scheme)
    compiled = torch.compile(model, backend="aot_eager")
    for batch in (4, 5, 6):
        x = torch.randn(batch, 3, 12)
        output = compiled(x)
        torch.testing.assert_close(output, nn.functional.conv1d(x, model.weight, model.bias))
        output.sum().backward()


@pytest.mark.parametrize("shape", [(2, 4, 9), (2, 3, 4, 7), ()], ids=str)
def test_modules_leave_inputs_that_do_not_fit_to_torch(shape: tuple[int, ...]) -> None:
    for sampled, exact in (
        (sampling.Conv1d(3, 2, 3, keep={"i1": 0.5}), nn.Conv1d(3, 2, 3)),
        (sampling.ConvTranspose1d(3, 2, 3, keep={"i1": 0.5}), nn.ConvTranspose1d(3, 2, 3)),
        (sampling.Linear(3, 2, keep={"n": 0.5}), nn.Linear(3, 2)),
    ):
        with pytest.raises(RuntimeError) as expected:
            exact(torch.zeros(shape))
        with pytest.raises(RuntimeError) as found:
            sampled(torch.zeros(shape))
        assert str(found.value) == str(expected.value)


def test_variance_of_two_indices_and_of_a_scalar_leg() -> None:
    net = lensor.parse("X[n i] -> n ()").bind(n=2, i=3)
    x = normal(2, 3).detach()
    moments = {"i": sampling.second_moments(3, 0.5)}
    assert sampling.variance(net, moments, X=x) == pytest.approx(float(x.square().sum()))
    net = lensor.parse("X[i j] -> ()").bind(i=2, j=3)
    x = normal(2, 3).detach()
    both = {"i": sampling.second_moments(2, 0.5), "j": sampling.second_moments(3, 0.5)}
    squares = 0.0
    for rows in itertools.product((0, 2), repeat=2):
        for columns in itertools.product((0, 2), repeat=3):
            factors = torch.tensor(rows, dtype=x.dtype)[:, None] * torch.tensor(columns, dtype=x.dtype)
            squares += float((factors * x).sum()) ** 2 / 32
    assert sampling.variance(net, both, X=x) == pytest.approx(squares - float(x.sum()) ** 2)
    half = sampling.variance(net, both, X=x.bfloat16())
    assert half == pytest.approx(sampling.variance(net, both, X=x), rel=0.05)


def test_functional_transforms() -> None:
    layer = sampling.Conv2d(2, 3, 3, keep={"i1": 0.5, "c_in": 0.5}, scheme="fixed").double()
    layer.generator = torch.Generator()
    x = normal(4, 2, 6, 5).detach()
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    layer.generator.manual_seed(0)
    found = torch.func.grad(loss)(parameters, x)
    layer.generator.manual_seed(0)
    layer(x).square().sum().backward()
    torch.testing.assert_close(found["weight"], layer.weight.grad)
    layer.generator.manual_seed(0)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="same")(parameters, x)
    for at in range(4):
        layer.generator.manual_seed(0)
        one = torch.func.grad(loss)(parameters, x[at])
        torch.testing.assert_close(each["weight"][at], one["weight"])


@pytest.mark.parametrize("cls", [sampling.Conv2d, sampling.ConvTranspose2d, sampling.Linear])
def test_autocast(cls: Any) -> None:
    options = {} if cls is sampling.Linear else {"kernel_size": 3}
    keep = {"c_in": 0.5} if cls is sampling.Linear else {"i1": 0.5, "c_in": 0.5}
    layer = cls(8, 4, **options, keep=keep, scheme="fixed", generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 8) if cls is sampling.Linear else torch.randn(4, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        assert output.dtype == torch.bfloat16
        output.float().square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    half, layer.weight.grad = layer.weight.grad, None
    layer.generator.manual_seed(0)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    assert float((half - layer.weight.grad).norm()) < 0.05 * float(layer.weight.grad.norm())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_again(reentrant: bool) -> None:
    layer = sampling.Conv2d(2, 3, 3, keep={"i1": 0.5, "i2": 0.5})
    x = torch.randn(2, 2, 16, 16, requires_grad=True)
    torch.manual_seed(3)
    layer(x).square().sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    torch.manual_seed(3)
    output = checkpoint(layer, x, use_reentrant=reentrant)
    assert isinstance(output, Tensor)
    output.square().sum().backward()
    assert expected is not None
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, expected)


def test_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = sampling.convert(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), {"i1": 0.5, "i2": 0.5}
        )
        return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    model, optimizer = made()
    train(model, optimizer, range(3))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    torch.save(saved, tmp_path / "state.pt")
    train(model, optimizer, range(3, 6))
    again, other = made()
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["random"])
    train(again, other, range(3, 6))
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = sampling.convert(nn.Conv2d(2, 3, 3), {"i1": 0.5, "i2": 0.5})
    wrapped = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(10 + rank)
    wrapped(torch.ones(2, 2, 8, 8) * (1 + rank)).square().sum().backward()
    torch.save(model.weight.grad, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_their_own_draws(tmp_path: Path) -> None:
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    found = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    assert torch.equal(*found)
    total = torch.zeros_like(found[0])
    for rank in range(2):
        torch.manual_seed(0)
        model = sampling.convert(nn.Conv2d(2, 3, 3), {"i1": 0.5, "i2": 0.5})
        torch.manual_seed(10 + rank)
        model(torch.ones(2, 2, 8, 8) * (1 + rank)).square().sum().backward()
        assert model.weight.grad is not None
        total += model.weight.grad / 2
    torch.testing.assert_close(found[0], total)


def test_empty_draws_are_zero() -> None:
    x, w = normal(2, 2, 6), normal(3, 2, 3)
    torch.manual_seed(0)
    v = torch.ones(2, 3, 4, dtype=torch.float64)
    found = [gradients(sampling.conv(x, w, keep={"i1": 0.01}), v, (w,))[0] for _ in range(20)]
    assert sum(not one.any() for one in found) > 10
    assert len(sampling.draw(0, 0.5).positions) == len(sampling.draw(0, 0.5, "fixed").positions) == 0
    nothing = sampling.draw(4, 0.5, "importance", norms=torch.zeros(4))
    assert len(nothing.positions) == 0


@pytest.mark.parametrize("scheme", ["bernoulli", "fixed", "importance", "blocks"])
@pytest.mark.parametrize("keep", [{"n": 0.5}, {"i1": 0.5}, {"n": 0.5, "c_in": 0.5, "i2": 0.5}])
def test_gradients_of_empty_batches_are_zero(keep: dict[str, float], scheme: str) -> None:
    for layer, x in (
        (sampling.Conv2d(3, 4, 3, padding=1, keep=keep, scheme=scheme), torch.randn(0, 3, 6, 6)),
        (sampling.Linear(3, 4, keep={name: rate for name, rate in keep.items() if name != "i2"}, scheme=scheme),
         torch.randn(2, 0, 3)),
    ):  # fmt: skip
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))


def test_models_are_converted_as_a_whole() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(4 * 36, 2))
    model.train()
    converted = sampling.convert(model, {"i1": 0.5, "c_in": 0.5})
    assert type(model[0]) is nn.Conv2d
    assert type(converted[0]) is sampling.Conv2d
    assert converted[1] is converted[3]
    assert isinstance(converted[2], sampling.ReLU)
    assert isinstance(converted[0], nn.Conv2d)
    assert converted[5].keep == {"c_in": 0.5}
    assert converted.state_dict().keys() == model.state_dict().keys()
    named = sampling.convert(model, {"0": {"i1": 0.5}})
    assert type(named[1]) is nn.Conv2d
    assert type(named[0]) is sampling.Conv2d
    for again in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert again[0].keep == {"i1": 0.5, "c_in": 0.5}
        assert type(again[0]) is sampling.Conv2d
    changed = sampling.convert(converted, {"i1": 0.25})
    assert changed[0].keep == {"i1": 0.25}
    assert sampling.convert(model, {"i1": 0.5}, inplace=True) is model
    assert type(model[0]) is sampling.Conv2d
    lensors = sampling.convert(lensor.nn.convert(nn.Conv2d(3, 4, 3)), {"i1": 0.5})
    assert type(lensors) is sampling.Conv2d
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    found = sampling.convert(parametrized, {"i1": 0.5})
    assert isinstance(found, sampling.Conv2d)
    found(torch.randn(1, 3, 8, 8)).sum().backward()


def test_layers_of_their_own_are_left_alone() -> None:
    class Own(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    with pytest.warns(UserWarning, match="'1' is not converted: Own"):
        found = sampling.convert(nn.Sequential(nn.Conv2d(1, 1, 3), Own(1, 1, 3)), {"i1": 0.5})
    assert type(found[1]) is Own


def _converted(keep: Any = None, **options: Any) -> nn.Module:
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Conv1d(1, 1, 3))
    return sampling.convert(model, {"i1": 0.5} if keep is None else keep, **options)


def _recommended(max_bytes: Any = 9, **options: Any) -> dict[str, float]:
    return sampling.recommend(nn.Conv1d(1, 1, 3), torch.ones(1, 1, 5), max_bytes, **options)


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: sampling.Conv2d(1, 1, 3, keep={"i1": 0}), ValueError, "keep of 'i1' is 0, expected a number"),
    (lambda: sampling.Conv2d(1, 1, 3, keep={"i1": 1.5}), ValueError, "keep of 'i1' is 1.5"),
    (lambda: sampling.Conv2d(1, 1, 3, keep={"i1": -0.5}), ValueError, "keep of 'i1' is -0.5"),
    (lambda: sampling.Conv2d(1, 1, 3, keep={"i1": float("nan")}), ValueError, "keep of 'i1' is nan"),
    (lambda: sampling.Conv2d(1, 1, 3, keep={"i1": True}), ValueError, "keep of 'i1' is True"),
    (
        lambda: sampling.Conv2d(1, 1, 3, keep={"i3": 0.5}),
        ValueError,
        "keep has index 'i3', expected indices of the input: n, g",
    ),
    (lambda: sampling.Conv2d(1, 1, 3, keep={"o1": 0.5}), ValueError, "keep has index 'o1'"),
    (lambda: sampling.Conv2d(1, 1, 3, keep=0.5), TypeError, "expected a mapping"),  # type: ignore[arg-type]
    (lambda: sampling.Conv2d(1, 1, 3, keep={"i1": 0.5}, scheme="top"), ValueError, "scheme is 'top'"),
    (lambda: sampling.Conv2d(1, 1, 3, keep={"i1": 0.5}, scheme={"i9": "fixed"}), ValueError, "scheme has index 'i9'"),
    (
        lambda: sampling.linear(torch.ones(2, 3), torch.ones(1, 3, requires_grad=True), keep={"i1": 0.5}),
        ValueError,
        "n, c_in",
    ),
    (lambda: sampling.conv(torch.ones(1, 2, 5), torch.ones(1, 1, 3), keep={"i1": 0.5}), ValueError, "channels"),
    (
        lambda: sampling.conv(np.ones((1, 1, 5)), np.ones((1, 1, 3)), keep={"i1": 0.5}),  # type: ignore[arg-type]
        TypeError,
        "input has type ndarray, expected torch.Tensor",
    ),
    (
        lambda: sampling.conv_transpose(torch.ones(1, 1, 5), np.ones((1, 1, 3)), keep={"i1": 0.5}),  # type: ignore[arg-type]
        TypeError,
        "weight has type ndarray, expected torch.Tensor",
    ),
    (
        lambda: sampling.linear(torch.ones(2, 3), torch.ones(1, 3), np.ones(1), keep={"n": 0.5}),  # type: ignore[arg-type]
        TypeError,
        "bias has type ndarray, expected torch.Tensor",
    ),
    (
        lambda: sampling.linear(torch.ones(2, 4), torch.ones(1, 3), keep={"n": 0.5}),
        ValueError,
        r"input has shape \(2, 4\), expected 3 entries along the last axis for weight of shape \(1, 3\)",
    ),
    (
        lambda: sampling.linear(torch.ones(2, 3), torch.ones(3), keep={"n": 0.5}),
        ValueError,
        r"weight has shape \(3,\), expected \[c_out, c_in\]",
    ),
    (lambda: sampling.conv(torch.ones(1, 1, 5) * 1j, torch.ones(1, 1, 3) * 1j, keep={"i1": 0.5}), TypeError, "complex"),
    (
        lambda: sampling.convert(nn.ReLU(), {"i1": 0.5}),
        ValueError,
        "keep has index 'i1', expected indices of the layers",
    ),
    (
        lambda: sampling.convert(nn.Conv1d(1, 1, 3), {"i2": 0.5}),
        ValueError,
        "keep has index 'i2', expected indices of the layers",
    ),
    (lambda: sampling.convert(nn.Conv1d(1, 1, 3), {"a": {"i1": 0.5}}), ValueError, "keep has layer 'a'"),
    (lambda: sampling.convert(nn.Conv1d(1, 1, 3), {}), TypeError, "expected a mapping"),
    (lambda: sampling.convert(3, {"i1": 0.5}), TypeError, "model has type int"),  # type: ignore[type-var]
    (lambda: sampling.convert(nn.LazyConv2d(1, 3), {"i1": 0.5}), ValueError, "is a lazy LazyConv2d"),
    (lambda: _converted(scheme={"z": "fixed"}), ValueError, "scheme has index 'z', expected indices of the layers"),
    (lambda: _converted(scheme=None), TypeError, "scheme is None"),
    (lambda: _converted(generator=3), TypeError, "generator is 3"),
    (lambda: _converted({"0": {"i1": 0.5}, "1": None}), TypeError, "keep of layer '1' is None"),
    (lambda: _converted({"0": {}}), TypeError, "keep of layer '0' is {}"),
    (lambda: _recommended(indices="i1"), TypeError, "indices is 'i1'"),
    (lambda: _recommended(max_bytes=0.5), TypeError, "max_bytes is 0.5"),
    (lambda: sampling.second_moments(2, 0.5, "importance", norms=torch.tensor([1.0, -1.0])), ValueError, "at least 0"),
    (
        lambda: sampling.draw(4, 0.5, "importance"),
        ValueError,
        "norms are missing, expected one for each of the 4 positions",
    ),
    (lambda: sampling.draw(4, 0.5, "importance", norms=torch.ones(3)), ValueError, r"norms are of shape \(3,\)"),
    (lambda: sampling.draw(2, 0.5, "importance", norms=torch.tensor([1.0, float("nan")])), ValueError, "finite"),
    (lambda: sampling.second_moments(2, 0.5, "top"), ValueError, "scheme is 'top'"),
    (
        lambda: sampling.variance(lensor.contraction("n -> ", "X"), {"q": torch.eye(2)}, X=torch.ones(2)),
        lensor.NetworkError,
        "moments has index 'q', expected one of",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_is_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
