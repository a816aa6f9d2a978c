"""The oracles agree with each other wherever two independent routes exist."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

torch = pytest.importorskip("torch")
F = torch.nn.functional

from tests.support import oracles  # noqa: E402
from tests.support.oracles import OPERATIONS, Geometry, make_case, tensors  # noqa: E402
from tests.support.strategies import MODES, QUIET, calls, fits, random_call, random_spec, specs  # noqa: E402

CASES = 60


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Arrays are tiny, and on shared cores torch's threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def close(found: Any, expected: Any) -> None:
    found, expected = (a.detach().numpy() if isinstance(a, torch.Tensor) else a for a in (found, expected))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11 * max(1.0, np.abs(expected).max(initial=0.0)))


def geometries(seed: int, count: int = CASES, **wanted: Any) -> Iterator[tuple[Geometry, np.random.Generator]]:
    """Random geometries with the wanted attributes."""
    rng = np.random.default_rng(seed)
    while count:
        g = Geometry.of(random_spec(rng))
        if all(getattr(g, name) in (value if isinstance(value, tuple) else (value,)) for name, value in wanted.items()):
            count -= 1
            yield g, rng


def operands(g: Geometry, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An input, a weight and a cotangent for two examples."""
    shapes = oracles.shapes(g, batch=2, v=1)
    x, w, v = (rng.standard_normal(shapes[kind]) for kind in ("input", "weight", "output"))
    return x, w, v


def is_even(g: Geometry) -> bool:
    return all(left == right for left, right in g.padding)


# ------------------------------------------------------------------------------------------------- torch against loops
def test_torch_and_plain_routes_agree() -> None:
    for g, rng in geometries(0, 3 * CASES):
        x, w, v = operands(g, rng)
        b = rng.standard_normal(g.out_channels)
        close(oracles.plain_conv(g, x, w, b), oracles.torch_conv(g, *tensors(x, w, b)))
        close(oracles.plain_input_vjp(g, w, v), oracles.conv_input_vjp(g, w, v))
        close(oracles.plain_per_example_weight_vjp(g, x, v), oracles.conv_weight_vjp_per_example(g, x, v))
        close(oracles.conv_weight_jvp(g, x, w), oracles.plain_conv(g, x, w))
        close(oracles.conv_input_jvp(g, x, w), oracles.plain_conv(g, x, w))


@pytest.mark.parametrize("transposed", [False, True])
def test_torch_modules_agree(transposed: bool) -> None:
    names = {False: "Conv{}d", True: "ConvTranspose{}d"}
    checked = Counter[str]()
    for g, rng in geometries(1, 2 * CASES, transposed=transposed, ndim=(1, 2, 3)):
        if not is_even(g):
            continue
        module_of = getattr(torch.nn, names[transposed].format(g.ndim))
        keywords: dict[str, Any] = {"output_padding": g.output_padding} if transposed else {}
        module = module_of(
            g.in_channels,
            g.out_channels,
            g.kernel_size,
            stride=g.stride,
            padding=tuple(left for left, _ in g.padding),
            dilation=g.dilation,
            groups=g.groups,
            padding_mode=g.padding_mode,
            dtype=torch.float64,
            **keywords,
        )
        x = rng.standard_normal((2, g.in_channels, *g.input_size))
        w, b = module.weight.detach().numpy(), module.bias.detach().numpy()
        assert w.shape == g.weight_size
        close(oracles.conv(g, x, w, b), module(torch.from_numpy(x)))
        checked[g.padding_mode] += 1
    assert set(checked) == ({"zeros"} if transposed else set(MODES))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_same_and_valid_are_torchs(ndim: int) -> None:
    rng = np.random.default_rng(2)
    for padding in ("same", "valid"):
        for kernel, dilation in ((1, 1), (2, 1), (4, 1), (3, 2), (2, 3)):
            spec = {"in_channels": 2, "out_channels": 2, "input_size": (9, 8, 7)[:ndim], "kernel_size": kernel}
            g = Geometry.of({**spec, "dilation": dilation, "padding": padding})
            x, w, _ = operands(g, rng)
            layer = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
            close(oracles.conv(g, x, w), layer(*tensors(x, w), padding=padding, dilation=dilation))


def test_unfold_and_fold_are_torchs() -> None:
    for g, rng in geometries(3, transposed=False, ndim=2, padding_mode="zeros"):
        if not is_even(g):
            continue
        x, _, _ = operands(g, rng)
        keywords = {"dilation": g.dilation, "padding": tuple(left for left, _ in g.padding), "stride": g.stride}
        patches = F.unfold(torch.from_numpy(x), g.kernel_size, **keywords)
        close(oracles.unfold(g, x), patches.reshape(2, -1, *g.output_size))
        v = rng.standard_normal((2, patches.shape[1], *g.output_size))
        flat = torch.from_numpy(v).flatten(2)
        close(oracles.fold(g, v), F.fold(flat, g.input_size, g.kernel_size, **keywords))


def test_unfold_is_a_convolution_with_one_hot_kernels_and_fold_its_gradient() -> None:
    for g, rng in geometries(4):
        patch = prod(g.kernel_size)
        depthwise = Geometry.of({**vars(g), "groups": g.in_channels, "out_channels": g.in_channels * patch})
        one_hot = np.tile(np.eye(patch), (g.in_channels, 1)).reshape(depthwise.weight_size)
        x, _, _ = operands(g, rng)
        close(oracles.unfold(g, x), oracles.conv(depthwise, x, one_hot))
        v = rng.standard_normal((2, g.in_channels * patch, *g.output_size))
        close(oracles.fold(g, v), oracles.conv_input_vjp(depthwise, one_hot, v))


def test_vjps_are_torch_nn_grads() -> None:
    for g, rng in geometries(5, transposed=False, ndim=(1, 2, 3), padding_mode="zeros"):
        if not is_even(g):
            continue
        x, w, v = operands(g, rng)
        settings_ = (g.stride, tuple(left for left, _ in g.padding), g.dilation, g.groups)
        by_input, by_weight = (getattr(torch.nn.grad, f"conv{g.ndim}d_{name}") for name in ("input", "weight"))
        x_, w_, v_ = tensors(x, w, v)
        close(oracles.conv_input_vjp(g, w, v), by_input(x.shape, w_, v_, *settings_))
        close(oracles.conv_weight_vjp(g, x, v), by_weight(x_, w.shape, v_, *settings_))


def test_the_transpose_is_torchs_transposed_convolution() -> None:
    for g, rng in geometries(6, transposed=False, ndim=(1, 2, 3), padding_mode="zeros"):
        every = zip(g.full_size, g.kernel_size, g.stride, g.dilation, strict=True)
        remainder = tuple((length - d * (k - 1) - 1) % s for length, k, s, d in every)
        if not is_even(g):
            continue
        _, w, v = operands(g, rng)
        layer = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[g.ndim - 1]
        padding = tuple(left for left, _ in g.padding)
        expected = layer(*tensors(v, w), None, g.stride, padding, remainder, g.groups, g.dilation)
        close(oracles.conv_transpose(g, v, w), expected)


def test_transposed_patches_times_weight_are_the_transposed_convolution() -> None:
    for g, rng in geometries(7, transposed=False):
        _, w, v = operands(g, rng)
        patches = oracles.unfold_transpose(g, v).reshape(2, g.groups, -1, prod(g.kernel_size), prod(g.input_size))
        matrix = w.reshape(g.groups, g.out_channels // g.groups, g.in_channels // g.groups, -1)
        product = np.einsum("ngfki,gfck->ngci", patches, matrix)
        close(product.reshape(2, g.in_channels, *g.input_size), oracles.conv_transpose(g, v, w))


@pytest.mark.parametrize("ndim", [4, 5])
def test_more_dimensions_are_fewer_where_one_is_trivial(ndim: int) -> None:
    """A dimension of size one with kernel one changes nothing; and VJPs are adjoint to the forward."""
    rng = np.random.default_rng(8)
    for _ in range(CASES // 3):
        spec = random_spec(rng, 3)
        less = Geometry.of(spec)
        extra = ndim - less.ndim
        more = Geometry.of(
            {
                **vars(less),
                "input_size": (1,) * extra + less.input_size,
                "kernel_size": (1,) * extra + less.kernel_size,
                "stride": (2,) * extra + less.stride,
                "padding": ((0, 0),) * extra + less.padding,
                "dilation": (3,) * extra + less.dilation,
                "output_padding": (0,) * extra + less.output_padding,
            }
        )
        x, w, v = operands(less, rng)
        at = (slice(None), slice(None), *[None] * extra)
        close(oracles.conv(more, x[at], w[at]), oracles.conv(less, x, w)[at])
        close(oracles.conv_input_vjp(more, w[at], v[at]), oracles.conv_input_vjp(less, w, v)[at])
        close(oracles.conv_weight_vjp(more, x[at], v[at]), oracles.conv_weight_vjp(less, x, v)[at])
        factor = oracles.kfac_input_factor(less, x, approx="expand")
        close(oracles.kfac_input_factor(more, x[at], approx="expand"), factor)
    for seed in range(CASES // 3):
        spec = random_spec(np.random.default_rng([9, seed]), ndim)
        g = Geometry.of(spec)
        x, w, v = operands(g, rng)
        total = np.vdot(oracles.conv(g, x, w), v)
        close(np.vdot(oracles.conv_input_vjp(g, w, v), x), total)
        close(np.vdot(oracles.conv_weight_vjp(g, x, v), w), total)
        patches = oracles.unfold(g, x)
        values = rng.standard_normal(patches.shape)
        close(np.vdot(oracles.fold(g, values), x), np.vdot(values, patches))


# --------------------------------------------------------------------------------------------- Jacobians and curvature
def test_jacobians_fit_the_products_with_them() -> None:
    for g, rng in geometries(10):
        if not fits(vars(g), "conv_input_jacobian", 2) or not fits(vars(g), "conv_weight_jacobian", 2):
            continue
        x, w, v = operands(g, rng)
        by_weight, by_input = oracles.conv_weight_jacobian(g, x), oracles.conv_input_jacobian(g, w, n=2)
        close(by_weight.reshape(*v.shape, -1) @ w.ravel(), oracles.conv(g, x, w))
        close(by_input.reshape(*v.shape, -1) @ x.ravel(), oracles.conv(g, x, w))
        matrix = oracles.unfolded_kernel(g, w)
        close(by_input.reshape(2, len(matrix), 2, -1)[1, :, 1], matrix)
        close(by_input.reshape(2, len(matrix), 2, -1)[1, :, 0], np.zeros_like(matrix))
        close(matrix @ x.reshape(2, -1).T, oracles.plain_conv(g, x, w).reshape(2, -1).T)
        mixed = oracles.mixed_second_derivative(g, v)
        close(mixed.reshape(*g.weight_size, -1) @ x.ravel(), oracles.conv_weight_vjp(g, x, v))


def test_ggn_is_the_jacobian_sandwich() -> None:
    for g, rng in geometries(11, CASES // 2):
        if not fits(vars(g), "conv_weight_jacobian", 2):
            continue
        x, _, _ = operands(g, rng)
        s = rng.standard_normal(oracles.shapes(g, 2, 3)["roots"])
        jacobian = oracles.conv_weight_jacobian(g, x).reshape(2, prod(s.shape[2:]), -1)
        roots = np.einsum("vno,nop->vnp", s.reshape(3, 2, -1), jacobian)
        close(oracles.ggn_diagonal(g, x, s), (roots**2).sum((0, 1)).reshape(g.weight_size))
        close(oracles.ggn_diagonal(g, x, s, per_example=True).sum(0), oracles.ggn_diagonal(g, x, s))
        close(oracles.ggn_gram(g, x, s), np.einsum("vnp,wmp->vnwm", roots, roots).reshape(6, 6))
        whole = np.einsum("vnp,vnq->pq", roots, roots).reshape(*g.weight_size, *g.weight_size)
        first, second, positions = g.weight_size[0], g.weight_size[1], prod(g.kernel_size)
        flat = whole.reshape(first, second, positions, first, second, positions)
        block = oracles.ggn_mini_blocks(g, x, s, block="filter")
        close(block, np.einsum("abcaef->abcef", flat).reshape(first, second * positions, -1))
        block = oracles.ggn_mini_blocks(g, x, s, block="kernel")
        close(block, np.einsum("abcabf->abcf", flat).reshape(first, second, *g.kernel_size, *g.kernel_size))
        by_group = flat.reshape(g.groups, -1, second, positions, g.groups, first // g.groups, second, positions)
        block = oracles.ggn_mini_blocks(g, x, s, block="position")
        expected = np.einsum("gabkgdek->gkabde", by_group)
        close(block, expected.reshape(g.groups, *g.kernel_size, second * first // g.groups, -1))


def test_kronecker_factors_are_exact_for_one_example_and_one_position() -> None:
    for g, rng in geometries(12, CASES // 2, transposed=False):
        spec = {**vars(g), "kernel_size": g.input_size, "stride": (1,) * g.ndim, "dilation": (1,) * g.ndim}
        g = Geometry.of({**spec, "padding": ((0, 0),) * g.ndim})
        x = rng.standard_normal((1, g.in_channels, *g.input_size))
        s = rng.standard_normal((2, 1, *oracles.shapes(g, 1, 1)["output"][1:]))
        inner, outer = prod(g.weight_size[1:]), g.out_channels // g.groups
        whole = oracles.ggn(g, x, s)[0].reshape(g.groups, outer * inner, g.groups, outer * inner)
        for approx in ("expand", "reduce"):
            a, b = oracles.kfac_input_factor(g, x, approx=approx), oracles.kfac_output_factor(g, s, approx=approx)
            for group in range(g.groups):
                close(whole[group, :, group], np.kron(b[group], a[group]))


def test_factors_by_counting() -> None:
    """Sums over examples and positions, one at a time; the last row is the bias."""
    for g, rng in geometries(13, CASES // 2):
        x, _, v = operands(g, rng)
        patches = oracles.unfold(g, x).reshape(2, g.groups, -1, prod(g.output_size))
        positions = patches.shape[-1]
        for group in range(g.groups):
            rows = [np.append(patches[n, group, :, o], 1.0) for n in range(2) for o in range(positions)]
            expand = np.mean([np.outer(row, row) for row in rows], axis=0) * positions
            close(oracles.kfac_input_factor(g, x, approx="expand", bias=True)[group], expand)
            means = [np.mean(rows[n * positions :][:positions], axis=0) for n in range(2)]
            reduce = np.mean([np.outer(row, row) for row in means], axis=0)
            close(oracles.kfac_input_factor(g, x, approx="reduce", bias=True)[group], reduce)
            close(oracles.kfac_input_factor(g, x, approx="reduce")[group], reduce[:-1, :-1])
            cotangents = v.reshape(2, g.groups, -1, positions)[:, group]
            close(
                oracles.kfac_output_factor(g, v[None], approx="expand")[group],
                np.einsum("nao,nbo->ab", cotangents, cotangents) / positions,
            )
            close(
                oracles.kfac_output_factor(g, v[None], approx="reduce")[group],
                np.einsum("nao,nbp->ab", cotangents, cotangents),
            )


def test_hessians_are_autograds() -> None:
    for g, rng in geometries(14, CASES // 2, ndim=(0, 1, 2)):
        if not fits(vars(g), "hessian_backprop", 1) or not fits(vars(g), "conv_weight_jacobian", 2):
            continue
        x, w, v = operands(g, rng)
        shape = v.shape[1:]
        h = rng.standard_normal((prod(shape), prod(shape)))
        h = h + h.T
        x_, w_, h_ = tensors(x[:1], w, h)

        def loss(at: Any, w_: Any = w_, h_: Any = h_, g: Geometry = g) -> Any:
            y = oracles.torch_conv(g, at, w_).reshape(-1)
            return y @ h_ @ y / 2

        size = (g.in_channels, *g.input_size)
        expected = torch.autograd.functional.hessian(loss, x_).reshape(*size, *size)
        close(oracles.hessian_backprop(g, w, h.reshape(*shape, *shape)), expected)
        diagonal = oracles.hessian_diagonal_input(g, w, v)
        squares = oracles.conv_input_jacobian(g, w, n=2) ** 2
        close(diagonal, np.tensordot(v, squares, v.ndim))
        close(
            oracles.hessian_diagonal_weight(g, x, v), np.tensordot(v, oracles.conv_weight_jacobian(g, x) ** 2, v.ndim)
        )
        # [X]² = [X²], in every mode
        close(oracles.hessian_diagonal_weight(g, x, v), oracles.conv_weight_vjp(g, x**2, v))


# ------------------------------------------------------------------------------------------------------ what is drawn
def test_random_specs_cover_the_matrix() -> None:
    rng = np.random.default_rng(15)
    seen = Counter[str]()
    for _ in range(2000):
        spec = random_spec(rng, 5)
        g = Geometry.of(spec)
        assert g.is_valid, spec
        padding = spec["padding"]
        seen[f"{g.ndim}-d"] += 1
        seen["transposed"] += g.transposed
        seen[g.padding_mode] += any(map(any, g.padding)) and not g.transposed
        seen[padding if isinstance(padding, str) else "numbers"] += 1
        seen["uneven"] += not is_even(g)
        seen["stride"] += any(s > 1 for s in g.stride)
        seen["dilation"] += any(d > 1 and k > 1 for d, k in zip(g.dilation, g.kernel_size, strict=True))
        seen["groups"] += g.groups > 1
        seen["depthwise"] += 1 < g.in_channels == g.groups == g.out_channels
        seen["depthwise with a multiplier"] += 1 < g.in_channels == g.groups < g.out_channels
        seen["output padding"] += any(g.output_padding)
        seen["long output padding"] += any(e >= s for e, s in zip(g.output_padding, g.stride, strict=True))
        seen["bias"] += g.bias
        every = zip(g.kernel_size, g.stride, g.dilation, g.padding, strict=True)
        seen["dense"] += any(k == s > 1 == d and p == (0, 0) for k, s, d, p in every)
        seen["whole"] += any(k == i > 1 for k, i in zip(g.kernel_size, g.input_size, strict=True))
    names = {
        *(f"{n}-d" for n in range(6)),
        "transposed",
        *MODES,
        "same",
        "valid",
        "numbers",
        "uneven",
        "stride",
        "bias",
    }
    names |= {"dilation", "groups", "depthwise", "depthwise with a multiplier", "dense", "whole"}
    names |= {"output padding", "long output padding"}
    assert {name: seen[name] for name in names if seen[name] < 30} == {}


@given(specs(max_ndim=5))
@settings(max_examples=100, deadline=None)
def test_drawn_specs_are_valid(spec: dict[str, Any]) -> None:
    assert Geometry.of(spec).is_valid


@pytest.mark.parametrize("op", OPERATIONS)
def test_cases_are_determined_by_their_seed_and_finite(op: str) -> None:
    first, second = (make_case(op, **random_call(np.random.default_rng([16, 1]), op)) for _ in range(2))
    assert first.call == second.call
    assert np.isfinite(first.expected).all()
    np.testing.assert_array_equal(first.expected, second.expected)


@pytest.mark.parametrize("op", OPERATIONS)
def test_drawn_calls_make_cases(op: str) -> None:
    @given(calls(op))
    @settings(max_examples=5, deadline=None, suppress_health_check=QUIET)
    def check(call: dict[str, Any]) -> None:
        assert np.isfinite(make_case(op, **call).expected).all()

    check()
