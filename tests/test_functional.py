"""The functions of arrays equal torch's own operators, their derivatives, and references made of plain loops."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy
import pytest

torch = pytest.importorskip("torch")

from lensor import dispatch  # noqa: E402
from lensor.functional import (  # noqa: E402
    conv,
    conv_input_vjp,
    conv_transpose,
    conv_weight_vjp,
    conv_weight_vjp_per_example,
    fold,
    ggn_diagonal,
    ggn_gram,
    kfac_input_factor,
    kfac_output_factor,
    unfold,
    unfold_transpose,
)

F = torch.nn.functional


def random(*shape: int, seed: int = 0, dtype: Any = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(seed + 17 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


def assert_close(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    found = torch.from_numpy(found) if isinstance(found, numpy.ndarray) else found
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


class Case(NamedTuple):
    size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    padding_mode: str = "zeros"
    c_in: int = 4
    c_out: int = 6
    batch: int = 2

    @property
    def dims(self) -> int:
        return len(self.size)

    @property
    def hyper(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}

    @property
    def pairs(self) -> list[tuple[int, int]]:
        dilation = (self.dilation,) * self.dims if isinstance(self.dilation, int) else self.dilation
        if self.padding == "valid":
            return [(0, 0)] * self.dims
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, self.kernel_size, strict=True)]
            return [(total // 2, total - total // 2) for total in totals]
        padding = (self.padding,) * self.dims if isinstance(self.padding, int) else self.padding
        return [(p, p) if isinstance(p, int) else p for p in padding]

    @property
    def x(self) -> Any:
        return random(self.batch, self.c_in, *self.size, seed=1)

    @property
    def w(self) -> Any:
        return random(self.c_out, self.c_in // self.groups, *self.kernel_size, seed=2)

    @property
    def b(self) -> Any:
        return random(self.c_out, seed=3)

    def reference(self, x: Any, w: Any, b: Any = None) -> Any:
        """The convolution by torch's pad and convolution."""
        flat = [p for pair in reversed(self.pairs) for p in pair]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = F.pad(x, flat, mode=mode) if any(flat) else x
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        return convolve(x, w, b, self.stride, 0, self.dilation, self.groups)

    def reference_patches(self, x: Any) -> Any:
        """[batch, groups, c_in/groups·ΠK, ΠO] by a convolution with one-hot kernels."""
        patch = math.prod(self.kernel_size)
        kernel = (
            torch.eye(patch, dtype=x.dtype).reshape(patch, 1, *self.kernel_size).repeat(self.c_in, 1, *[1] * self.dims)
        )
        patches = self._replace(groups=self.c_in).reference(x, kernel)
        return patches.reshape(len(x), self.groups, -1, math.prod(patches.shape[2:]))


CASES = {
    "1d": Case((9,), (3,)),
    "1d-all": Case((11,), (3,), stride=2, padding=2, dilation=2, groups=2),
    "1d-uneven": Case((8,), (4,), padding=((1, 3),), stride=3),
    "1d-same-even-kernel": Case((7,), (4,), padding="same"),
    "1d-circular": Case((7,), (3,), padding=2, padding_mode="circular", groups=2),
    "1d-reflect": Case((7,), (3,), padding=3, stride=2, padding_mode="reflect"),
    "1d-replicate": Case((6,), (2,), padding=((4, 1),), dilation=3, padding_mode="replicate"),
    "1d-kernel-is-input": Case((5,), (5,)),
    "1d-down-sampling": Case((9,), (1,), stride=2),
    "2d": Case((6, 5), (3, 2)),
    "2d-dense": Case((6, 8), (3, 2), stride=(3, 2)),
    "2d-dense-remainder": Case((7, 8), (2, 3), stride=(2, 3), groups=2),
    "2d-pointwise": Case((4, 5), (1, 1), groups=2),
    "2d-down-sampling": Case((7, 5), (1, 1), stride=2),
    "2d-all": Case((9, 8), (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 3), groups=2),
    "2d-depthwise": Case((6, 6), (3, 3), padding=1, groups=4, c_out=8),
    "2d-same": Case((5, 6), (2, 3), padding="same", dilation=(1, 2)),
    "2d-valid": Case((5, 6), (2, 3), padding="valid", stride=2),
    "2d-uneven": Case((5, 6), (2, 3), padding=((0, 2), (3, 1)), stride=2),
    "2d-circular": Case((5, 6), (3, 3), padding=(2, 1), padding_mode="circular"),
    "2d-reflect-same": Case((5, 6), (3, 4), padding="same", padding_mode="reflect", groups=2),
    "2d-replicate": Case((4, 5), (2, 3), padding=2, stride=(1, 2), padding_mode="replicate"),
    "2d-gcd": Case((9, 9), (2, 2), stride=2, dilation=4, padding=1),
    "2d-one": Case((1, 1), (3, 3), padding=1, batch=1, c_in=1, c_out=1),
    "3d": Case((4, 5, 3), (2, 3, 1), stride=(2, 1, 1), padding=(1, 0, 1), groups=2),
    "3d-circular": Case((3, 4, 3), (2, 2, 3), padding=1, dilation=(1, 2, 1), padding_mode="circular"),
    "3d-replicate": Case((3, 4, 3), (2, 1, 3), padding=(1, 2, 0), stride=2, padding_mode="replicate"),
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def numbers(case: Case) -> tuple[Any, Any, Any]:
    """A cotangent of the output, and the gradients of input and weight by autograd."""
    x, w = case.x.requires_grad_(), case.w.requires_grad_()
    y = case.reference(x, w)
    v = random(*y.shape, seed=4)
    return v, *torch.autograd.grad(y, (x, w), v)


# ------------------------------------------------------------------------------------------- equality with torch's own
@all_cases
def test_conv(case: Case) -> None:
    x, w, b = case.x, case.w, case.b
    assert_close(conv(x, w, **case.hyper), case.reference(x, w))
    assert_close(conv(x, w, b, **case.hyper), case.reference(x, w, b))
    assert_close(conv(x[0], w, b, **case.hyper), case.reference(x[:1], w, b)[0])


@all_cases
def test_numpy_gives_what_torch_gives(case: Case) -> None:
    x, w, b = (array.numpy() for array in (case.x, case.w, case.b))
    v, grad_x, grad_w = numbers(case)
    y = conv(x, w, b, **case.hyper)
    assert isinstance(y, numpy.ndarray)
    assert_close(y, case.reference(case.x, case.w, case.b))
    assert_close(conv_input_vjp(x.shape, w, v.numpy(), **case.hyper), grad_x)
    assert_close(conv_weight_vjp(x, w.shape, v.numpy(), **case.hyper), grad_w)


@all_cases
def test_vjps(case: Case) -> None:
    v, grad_x, grad_w = numbers(case)
    x, w = case.x, case.w
    assert_close(conv_input_vjp(x.shape, w, v, **case.hyper), grad_x)
    assert_close(conv_weight_vjp(x, w.shape, v, **case.hyper), grad_w)
    each = conv_weight_vjp_per_example(x, w.shape, v, **case.hyper)
    expected = [numbers_of_one(case, x[n : n + 1], v[n : n + 1]) for n in range(case.batch)]
    assert_close(each, torch.stack(expected))


def numbers_of_one(case: Case, x: Any, v: Any) -> Any:
    w = case.w.requires_grad_()
    return torch.autograd.grad(case.reference(x, w), w, v)[0]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_vjps_equal_torch_nn_grad(dims: int) -> None:
    hyper = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
    x, w = random(2, 4, *(8, 7, 6)[:dims]), random(6, 2, *(3, 2, 3)[:dims])
    v = random(*conv(x, w, **hyper).shape)
    by_input = getattr(torch.nn.grad, f"conv{dims}d_input")
    by_weight = getattr(torch.nn.grad, f"conv{dims}d_weight")
    assert_close(conv_input_vjp(x.shape, w, v, 2, 1, 2, 2), by_input(x.shape, w, v, 2, 1, 2, 2))
    assert_close(conv_weight_vjp(x, w.shape, v, 2, 1, 2, 2), by_weight(x, w.shape, v, 2, 1, 2, 2))
    assert_close(conv_input_vjp(list(x.shape[1:]), w, v[0], **hyper), by_input(x[:1].shape, w, v[:1], **hyper)[0])
    assert_close(conv_weight_vjp(x[0], list(w.shape), v[0], **hyper), by_weight(x[:1], w.shape, v[:1], **hyper))


TRANSPOSED = {
    "1d": ((5,), (3,), {}),
    "1d-all": ((5,), (3,), {"stride": 3, "padding": 2, "output_padding": 2, "dilation": 2, "groups": 2}),
    "1d-output-padding-below-dilation": ((5,), (2,), {"output_padding": 1, "dilation": 2}),
    "2d": ((4, 3), (2, 3), {}),
    "2d-dense": ((4, 3), (2, 3), {"stride": (2, 3)}),
    "2d-gaps": ((4, 3), (2, 1), {"stride": 3, "output_padding": (2, 0)}),
    "2d-all": ((4, 3), (3, 2), {"stride": (2, 3), "padding": (2, 1), "output_padding": (1, 2), "groups": 2}),
    "2d-depthwise": ((4, 3), (3, 2), {"stride": 2, "padding": 1, "groups": 4}),
    "3d": ((3, 2, 3), (2, 3, 1), {"stride": (2, 1, 2), "padding": (0, 1, 0), "output_padding": (1, 0, 1), "groups": 2}),
}
all_transposed = pytest.mark.parametrize(("size", "kernel", "hyper"), TRANSPOSED.values(), ids=TRANSPOSED)


@all_transposed
def test_conv_transpose(size: tuple[int, ...], kernel: tuple[int, ...], hyper: dict[str, Any]) -> None:
    groups = hyper.get("groups", 1)
    x, w, b = random(2, 4, *size), random(4, 3, *kernel), random(3 * groups)
    reference = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(size) - 1]
    assert_close(conv_transpose(x, w, **hyper), reference(x, w, **hyper))
    assert_close(conv_transpose(x, w, b, **hyper), reference(x, w, b, **hyper))
    assert_close(conv_transpose(x[0], w, b, **hyper), reference(x[0], w, b, **hyper))
    assert_close(conv_transpose(x.numpy(), w.numpy(), b.numpy(), **hyper), reference(x, w, b, **hyper))


@all_transposed
def test_unfold_transpose_times_weight_is_conv_transpose(
    size: tuple[int, ...], kernel: tuple[int, ...], hyper: dict[str, Any]
) -> None:
    groups = hyper.get("groups", 1)
    others = {name: value for name, value in hyper.items() if name != "groups"}
    x, w = random(2, 4, *size), random(4, 3, *kernel)
    y = conv_transpose(x, w, **hyper)
    patches = unfold_transpose(x, kernel, **others)
    assert patches.shape == (2, 4 * math.prod(kernel), math.prod(y.shape[2:]))
    by_group = patches.reshape(2, groups, 4 // groups, math.prod(kernel), -1)
    product = torch.einsum("ngckl,gcok->ngol", by_group, w.reshape(groups, 4 // groups, 3, -1))
    assert_close(product.reshape(y.shape), y)
    assert_close(unfold_transpose(x[0], kernel, **others), patches[0])
    assert_close(unfold_transpose(x.numpy(), kernel, **others), patches)


def test_conv_transpose_with_uneven_padding_crops() -> None:
    x, w = random(2, 4, 5), random(4, 3, 3)
    full = F.conv_transpose1d(x, w, stride=2)
    assert_close(conv_transpose(x, w, stride=2, padding=((1, 3),)), full[:, :, 1:-3])


@all_cases
def test_unfold_and_its_adjoint_fold(case: Case) -> None:
    hyper = {name: value for name, value in case.hyper.items() if name != "groups"}
    x = case.x
    patches = unfold(x, case.kernel_size, **hyper)
    assert_close(patches, case.reference_patches(x).reshape(patches.shape))
    assert_close(unfold(x[0], case.kernel_size, **hyper), patches[0])
    assert_close(unfold(x.numpy(), case.kernel_size, **hyper), patches)
    v = random(*patches.shape)
    folded = fold(v, case.size, case.kernel_size, **hyper)
    x.requires_grad_()
    assert_close(folded, torch.autograd.grad(case.reference_patches(x).reshape(v.shape), x, v)[0])
    assert_close(fold(v[0], case.size, case.kernel_size, **hyper), folded[0])
    assert_close(fold(v.numpy(), case.size, case.kernel_size, **hyper), folded)


def test_unfold_and_fold_take_what_torch_takes() -> None:
    x = random(2, 3, 7, 6)
    settings: list[dict[str, Any]] = [{}, {"stride": 2}, {"padding": (1, 2), "dilation": 2}, {"stride": (3, 1)}]
    for hyper in settings:
        patches = F.unfold(x, (3, 2), **hyper)
        assert_close(unfold(x, (3, 2), **hyper), patches)
        assert_close(unfold(x[1], (3, 2), **hyper), patches[1])
        assert_close(fold(patches, (7, 6), (3, 2), **hyper), F.fold(patches, (7, 6), (3, 2), **hyper))
        assert_close(fold(patches[1], (7, 6), (3, 2), **hyper), F.fold(patches[1], (7, 6), (3, 2), **hyper))
    assert_close(unfold(x, 3, 1, 1, 2), F.unfold(x, 3, 1, 1, 2))
    square = F.unfold(random(2, 3, 7, 7), 3, 2, 1, 2)
    assert_close(fold(square, 7, 3, 2, 1, 2), F.fold(square, 7, 3, 2, 1, 2))
    single = random(1, 12, 1)
    assert_close(fold(single, 2, 2), F.fold(single, 2, 2))


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_fold_of_unfold_finds_the_dimensions_of_ints(dims: int) -> None:
    x = random(2, 3, *(5,) * dims)
    patches = unfold(x, 2, stride=2)
    assert patches.shape == (2, 3 * 2**dims, 2**dims)
    assert fold(patches, 5, 2, stride=2).shape == x.shape


# ----------------------------------------------------------------------------------------------- four dimensions and up
def nested_conv(x: Any, w: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
    """The definition, one loop for each spatial index."""
    dims = w.ndim - 2
    x = numpy.pad(x, [(0, 0), (0, 0), *padding])
    sizes = [
        (i - d * (k - 1) - 1) // s + 1 for i, k, s, d in zip(x.shape[2:], w.shape[2:], stride, dilation, strict=True)
    ]
    y = numpy.zeros((x.shape[0], w.shape[0], *sizes))
    out, inner = w.shape[0] // groups, w.shape[1]
    for g in range(groups):
        channels, outputs = slice(g * inner, (g + 1) * inner), slice(g * out, (g + 1) * out)
        for o in itertools.product(*map(range, sizes)):
            for k in itertools.product(*map(range, w.shape[2:])):
                at = tuple(o[a] * stride[a] + k[a] * dilation[a] for a in range(dims))
                y[(slice(None), outputs, *o)] += x[(slice(None), channels, *at)] @ w[(outputs, slice(None), *k)].T
    return y


@pytest.mark.parametrize(
    ("size", "kernel", "hyper"),
    [
        ((3, 4, 3, 2), (2, 2, 1, 2), {"stride": (1, 2, 1, 1), "padding": ((1, 0), (0, 1), (0, 0), (1, 1))}),
        ((3, 3, 4, 3), (2, 1, 2, 2), {"dilation": (1, 1, 3, 2), "groups": 2}),
        ((2, 3, 2, 2, 3), (2, 2, 1, 2, 2), {"padding": ((0, 1),) * 5, "stride": (2, 1, 2, 1, 3), "groups": 2}),
        ((4, 2, 4, 2, 2), (2, 2, 2, 1, 2), {"stride": (2, 2, 2, 1, 2)}),
    ],
    ids=["4d", "4d-groups", "5d", "5d-dense"],
)
def test_four_and_five_dimensions(size: tuple[int, ...], kernel: tuple[int, ...], hyper: dict[str, Any]) -> None:
    dims, groups = len(size), hyper.get("groups", 1)
    x, w = random(2, 4, *size).numpy(), random(4, 4 // groups, *kernel).numpy()
    full = {"stride": (1,) * dims, "padding": ((0, 0),) * dims, "dilation": (1,) * dims, "groups": groups} | hyper
    expected = nested_conv(x, w, **full)
    v = random(*expected.shape).numpy()
    settings = {name: full[name] for name in ("stride", "padding", "dilation")}
    assert_close(conv(x, w, **hyper), torch.from_numpy(expected))
    assert_close(conv(torch.from_numpy(x), torch.from_numpy(w), **hyper), torch.from_numpy(expected))
    # The adjoint identities fix every linear map that belongs to the convolution.
    total = numpy.vdot(expected, v)
    assert numpy.vdot(conv_input_vjp(x.shape, w, v, **hyper), x) == pytest.approx(total)
    assert numpy.vdot(conv_weight_vjp(x, w.shape, v, **hyper), w) == pytest.approx(total)
    each = conv_weight_vjp_per_example(x, w.shape, v, **hyper)
    assert numpy.vdot(each.sum(0), w) == pytest.approx(total)
    patches = unfold(x, kernel, **settings).reshape(2, groups, -1, math.prod(expected.shape[2:]))
    product = numpy.einsum("ngcl,goc->ngol", patches, w.reshape(groups, 4 // groups, -1))
    numpy.testing.assert_allclose(product.reshape(expected.shape), expected, atol=1e-10)
    columns = random(2, 4 * math.prod(kernel), patches.shape[-1]).numpy()
    folded = fold(columns, size, kernel, **settings)
    assert numpy.vdot(folded, x) == pytest.approx(numpy.vdot(columns, patches.reshape(columns.shape)))
    back = conv_transpose(v, w, **hyper)
    assert numpy.vdot(nested_conv(back, w, **full), v) == pytest.approx(numpy.vdot(back, back))


# ------------------------------------------------------------------------------------------------------------ curvature
@all_cases
def test_input_factors(case: Case) -> None:
    patches = case.reference_patches(case.x)
    positions = patches.shape[-1]
    mean = patches.mean(-1).transpose(0, 1)
    expand = torch.einsum("ngal,ngbl->gab", patches, patches) / case.batch
    reduce = mean.mT @ mean / case.batch
    for x in (case.x, case.x.numpy()):
        assert_close(kfac_input_factor(x, case.kernel_size, **case.hyper), expand)
        assert_close(kfac_input_factor(x, case.kernel_size, **case.hyper, approx="reduce"), reduce)
        root = kfac_input_factor(x, case.kernel_size, **case.hyper, approx="reduce", form="root")
        assert_close(root, mean / case.batch**0.5)
    if case.groups == 1:
        settings: Any = case.hyper
        found = kfac_input_factor(case.x, case.kernel_size, **settings, convention="curvlinops")
        assert_close(found, expand / positions)


@all_transposed
def test_input_factors_of_transposed_convolutions(
    size: tuple[int, ...], kernel: tuple[int, ...], hyper: dict[str, Any]
) -> None:
    groups = hyper.get("groups", 1)
    others = {name: value for name, value in hyper.items() if name != "groups"}
    x = random(3, 4, *size)
    patches = unfold_transpose(x, kernel, **others)
    patches = patches.reshape(3, groups, -1, patches.shape[-1])
    mean = patches.mean(-1).transpose(0, 1)
    expand = torch.einsum("ngal,ngbl->gab", patches, patches) / 3
    assert_close(kfac_input_factor(x, kernel, **hyper, transposed=True), expand)
    assert_close(kfac_input_factor(x, kernel, **hyper, transposed=True, approx="reduce"), mean.mT @ mean / 3)
    root = kfac_input_factor(x, kernel, **hyper, transposed=True, approx="reduce", form="root")
    assert_close(root, mean / 3**0.5)


@pytest.mark.parametrize("size", [(5,), (4, 3), (2, 3, 2)])
def test_output_factors(size: tuple[int, ...]) -> None:
    v = random(3, 2, 6, *size)
    by_group = v.reshape(3, 2, 2, 3, -1)
    expand = torch.einsum("vngal,vngbl->gab", by_group, by_group) / math.prod(size)
    summed = by_group.sum(-1)
    reduce = torch.einsum("vnga,vngb->gab", summed, summed)
    for array in (v, v.numpy()):
        assert_close(kfac_output_factor(array, 2), expand)
        assert_close(kfac_output_factor(array, 2, approx="reduce"), reduce)


def test_conventions_differ_from_the_paper_by_their_scale() -> None:
    x, v = random(2, 4, 5), random(3, 2, 6, 3)
    a = {approx: kfac_input_factor(x, 3, approx=approx) for approx in ("expand", "reduce")}
    b = {approx: kfac_output_factor(v, approx=approx) for approx in ("expand", "reduce")}
    assert_close(kfac_input_factor(x, 3, convention="singd"), a["expand"] / 3)
    assert_close(kfac_input_factor(x, 3, convention="singd", approx="reduce"), a["reduce"])
    assert_close(kfac_input_factor(x, 3, convention="curvlinops", approx="reduce"), a["reduce"])
    assert_close(kfac_input_factor(x, 3, convention="backpack"), a["expand"])
    assert_close(kfac_input_factor(x, 3, convention="kfac-pytorch"), a["expand"] / 27)
    assert_close(kfac_output_factor(v, convention="curvlinops"), b["expand"] * 3)
    assert_close(kfac_output_factor(v, convention="curvlinops", approx="reduce"), b["reduce"])
    assert_close(kfac_output_factor(v, convention="backpack", approx="reduce"), b["reduce"])
    assert_close(kfac_output_factor(v, convention="kfac-pytorch"), b["expand"] / (2 * 9))
    assert_close(kfac_input_factor(x, 3, convention="asdl"), a["expand"] / 3)
    assert_close(kfac_output_factor(v, convention="asdl"), b["expand"] * 3)
    assert_close(kfac_input_factor(x, 3, convention="kfac-jax"), a["expand"] / 3)
    assert_close(kfac_output_factor(v, convention="kfac-jax"), b["expand"])


@all_cases
def test_ggn_diagonal_and_gram(case: Case) -> None:
    x, w = case.x, case.w
    s = random(3, *case.reference(x, w).shape)
    each = torch.stack([conv_weight_vjp_per_example(x, w.shape, v, **case.hyper) for v in s])
    flat = each.reshape(3 * case.batch, -1)
    for arrays in ((x, s), (x.numpy(), s.numpy())):
        assert_close(ggn_diagonal(arrays[0], w.shape, arrays[1], **case.hyper), each.square().sum((0, 1)))
        found = ggn_diagonal(arrays[0], w.shape, arrays[1], **case.hyper, per_example=True)
        assert_close(found, each.square().sum(0))
        assert_close(ggn_gram(arrays[0], w.shape, arrays[1], **case.hyper), flat @ flat.T)


# ------------------------------------------------------------------------------------------------------ dtypes, layouts
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_complex_numbers(dims: int) -> None:
    dtype = torch.complex128
    x, w = random(2, 4, *(7, 6, 4)[:dims], dtype=dtype), random(6, 2, *(3, 2, 2)[:dims], dtype=dtype)
    x.requires_grad_()
    w.requires_grad_()
    hyper: dict[str, Any] = {"stride": 2, "padding": 1, "groups": 2}
    y = (F.conv1d, F.conv2d, F.conv3d)[dims - 1](x, w, **hyper)
    v = random(*y.shape, dtype=dtype, seed=5)
    grad_x, grad_w = torch.autograd.grad(y, (x, w), v)
    x, w = x.detach(), w.detach()
    for a, b, c in ((x, w, v), (x.numpy(), w.numpy(), v.numpy())):
        assert_close(conv(a, b, **hyper), y.detach())
        assert_close(conv_input_vjp(a.shape, b, c, **hyper), grad_x)
        assert_close(conv_weight_vjp(a, b.shape, c, **hyper), grad_w)
        assert_close(torch.as_tensor(conv_weight_vjp_per_example(a, b.shape, c, **hyper)).sum(0), grad_w)
        patches = torch.as_tensor(unfold(a, w.shape[2:], stride=2, padding=1))
        parts = [torch.as_tensor(unfold(part, w.shape[2:], stride=2, padding=1)) for part in (a.real, a.imag)]
        assert_close(patches, torch.complex(*parts))
    x.requires_grad_()
    w.requires_grad_()
    found = torch.autograd.grad(conv(x, w, **hyper), (x, w), v)
    assert_close(found[0], grad_x)
    assert_close(found[1], grad_w)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)], ids=str
)
def test_other_precisions(dtype: Any, tolerance: float) -> None:
    case = CASES["2d-all"]
    x, w, b = case.x.to(dtype), case.w.to(dtype), case.b.to(dtype)
    v, *_ = numbers(case)
    x64, w64, v64 = x.double(), w.double(), v.to(dtype).double()
    results = {
        "conv": (conv(x, w, b, **case.hyper), conv(x64, w64, b.double(), **case.hyper)),
        "input vjp": (
            conv_input_vjp(x.shape, w, v.to(dtype), **case.hyper),
            conv_input_vjp(x.shape, w64, v64, **case.hyper),
        ),
        "weight vjp": (
            conv_weight_vjp(x, w.shape, v.to(dtype), **case.hyper),
            conv_weight_vjp(x64, w.shape, v64, **case.hyper),
        ),
        "expand": (kfac_input_factor(x, (3, 2), **case.hyper), kfac_input_factor(x64, (3, 2), **case.hyper)),
        "reduce": (
            kfac_input_factor(x, (3, 2), **case.hyper, approx="reduce"),
            kfac_input_factor(x64, (3, 2), **case.hyper, approx="reduce"),
        ),
    }
    for name, (found, expected) in results.items():
        assert found.dtype == dtype, name
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance, name


@pytest.mark.parametrize("name", ["2d", "2d-all", "2d-dense-remainder", "2d-circular", "2d-depthwise"])
def test_any_memory_layout(name: str) -> None:
    case = CASES[name]
    expected = case.reference(case.x, case.w, case.b)
    v, grad_x, grad_w = numbers(case)
    last = case.x.to(memory_format=torch.channels_last), case.w.to(memory_format=torch.channels_last)
    swapped = case.x.transpose(2, 3).contiguous().transpose(2, 3), case.w.transpose(0, 1).contiguous().transpose(0, 1)
    strided = random(4, 8, *case.size)[::2, 1::2], random(*case.w.shape, 2)[..., 1]
    for x, w in (last, swapped):
        assert_close(conv(x, w, case.b, **case.hyper), expected)
        assert_close(conv_input_vjp(x.shape, w, v.mT.contiguous().mT, **case.hyper), grad_x)
        assert_close(conv_weight_vjp(x, w.shape, v.mT.contiguous().mT, **case.hyper), grad_w)
    x, w = strided
    assert not x.is_contiguous()
    assert_close(conv(x, w, **case.hyper), case.reference(x, w))
    assert_close(conv(x.numpy(), w.numpy(), **case.hyper), case.reference(x, w))
    assert_close(conv(x.numpy()[:, ::-1], w.numpy(), **case.hyper), case.reference(x.flip(1), w))
    expanded = random(1, case.c_in, *case.size).expand(3, -1, -1, -1)
    assert_close(conv(expanded, w, **case.hyper), case.reference(expanded, w))


def test_hyper_parameters_may_be_lists() -> None:
    case = CASES["2d-all"]
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in case.hyper.items()}
    expected = case.reference(case.x, case.w)
    for _ in range(2):
        assert_close(conv(case.x, case.w, **lists), expected)
    uneven = [[0, 2], [3, 1]]
    case = CASES["2d-uneven"]
    assert_close(conv(case.x, case.w, stride=[2, 2], padding=uneven), case.reference(case.x, case.w))


def test_arguments_are_not_changed() -> None:
    case = CASES["2d-all"]
    x, w, b = case.x, case.w, case.b
    conv(x, w, b, **case.hyper)
    v, *_ = numbers(case)
    conv_weight_vjp(x, w.shape, v, **case.hyper)
    assert torch.equal(x, case.x)
    assert torch.equal(w, case.w)
    assert torch.equal(b, case.b)


def test_results_own_their_memory() -> None:
    x = random(1, 1, 6, 6)
    for w in (torch.ones(1, 1, 1, 1, dtype=x.dtype), torch.ones(1, 1, 2, 2, dtype=x.dtype)):
        y = conv(x, w, stride=w.shape[-1])
        before = x.clone()
        y += 1
        assert torch.equal(x, before)
    array = x.numpy().copy()
    patches = unfold(array, (2, 2), stride=2)
    patches += 1
    numpy.testing.assert_array_equal(array, x.numpy())


def test_an_empty_batch_gives_what_torch_gives() -> None:
    x, w, b = random(0, 4, 7, 6), random(6, 2, 3, 2), random(6)
    y = F.conv2d(x, w, b, 2, 1, 1, 2)
    v = torch.zeros_like(y)
    for as_array in (lambda t: t, lambda t: t.numpy()):
        assert_close(conv(as_array(x), as_array(w), as_array(b), 2, 1, 1, 2), y)
        assert_close(conv_input_vjp(x.shape, as_array(w), as_array(v), 2, 1, 1, 2), x)
        assert_close(conv_weight_vjp(as_array(x), w.shape, as_array(v), 2, 1, 1, 2), torch.zeros_like(w))
        each = conv_weight_vjp_per_example(as_array(x), w.shape, as_array(v), 2, 1, 1, 2)
        assert each.shape == (0, *w.shape)
        assert_close(unfold(as_array(x), 2), F.unfold(x, 2))
        assert_close(fold(as_array(random(0, 16, 30)), (7, 6), (2, 2)), F.fold(random(0, 16, 30), (7, 6), 2))
        w_t = random(4, 3, 3, 2)
        assert_close(conv_transpose(as_array(x), as_array(w_t), stride=2), F.conv_transpose2d(x, w_t, stride=2))


# --------------------------------------------------------------------------------------------------------- derivatives
def check_gradients(function: Any, *inputs: Any) -> None:
    inputs = tuple(array.clone().requires_grad_() for array in inputs)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


GRADCHECKED = {
    "1d-all": Case((6,), (3,), stride=2, padding=2, dilation=2, groups=2, c_in=2, c_out=2),
    "1d-circular": Case((4,), (3,), padding=2, padding_mode="circular", c_in=2, c_out=1),
    "2d-all": Case((4, 3), (2, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, c_in=2, c_out=2),
    "2d-dense": Case((4, 2), (2, 1), stride=(2, 1), c_in=2, c_out=2),
    "2d-down-sampling": Case((3, 3), (1, 1), stride=2, c_in=2, c_out=2),
    "2d-reflect": Case((3, 3), (2, 2), padding=(1, 2), padding_mode="reflect", c_in=1, c_out=2),
}


@pytest.mark.parametrize("case", GRADCHECKED.values(), ids=GRADCHECKED)
def test_gradients_of_conv(case: Case) -> None:
    check_gradients(lambda x, w, b: conv(x, w, b, **case.hyper), case.x, case.w, case.b)


@pytest.mark.parametrize("case", GRADCHECKED.values(), ids=GRADCHECKED)
def test_gradients_of_derivatives(case: Case) -> None:
    x, w, hyper = case.x, case.w, case.hyper
    v = random(*case.reference(x, w).shape)
    check_gradients(lambda w, v: conv_input_vjp(x.shape, w, v, **hyper), w, v)
    check_gradients(lambda x, v: conv_weight_vjp(x, w.shape, v, **hyper), x, v)
    check_gradients(lambda x, v: conv_weight_vjp_per_example(x, w.shape, v, **hyper), x, v)


def test_gradients_of_the_transposed_pair() -> None:
    x, w, b = random(2, 2, 3), random(2, 2, 3), random(4)
    hyper = {"stride": 2, "padding": 1, "output_padding": 1}
    check_gradients(lambda x, w, b: conv_transpose(x, w, b, groups=2, **hyper), x, w, b)
    check_gradients(lambda x: unfold_transpose(x, (3,), **hyper), x)


def test_gradients_of_unfold_and_fold() -> None:
    x = random(1, 2, 4, 3)
    check_gradients(lambda x: unfold(x, (2, 2), padding=1, stride=2), x)
    check_gradients(lambda x: unfold(x[0], (2, 2), padding=1, padding_mode="circular"), x)
    patches = unfold(x, (2, 2), padding=1, stride=2)
    check_gradients(lambda v: fold(v, (4, 3), (2, 2), padding=1, stride=2), patches)


def test_gradients_of_curvature() -> None:
    x, s = random(2, 2, 4), random(2, 2, 2, 3)
    check_gradients(lambda x: kfac_input_factor(x, 2, groups=2), x)
    check_gradients(lambda x: kfac_input_factor(x, 2, padding=1, approx="reduce"), x)
    check_gradients(lambda x: kfac_input_factor(x, 2, approx="reduce", form="root"), x)
    check_gradients(lambda s: kfac_output_factor(s, 2), s)
    check_gradients(lambda s: kfac_output_factor(s, approx="reduce"), s)
    check_gradients(lambda x, s: ggn_diagonal(x, (2, 2, 2), s), x, s)
    check_gradients(lambda x, s: ggn_gram(x, (2, 1, 2), s, groups=2), x, s)


def test_complex_gradients() -> None:
    x, w = random(1, 2, 4, dtype=torch.complex128), random(2, 1, 2, dtype=torch.complex128)
    check_gradients(lambda x, w: conv(x, w, padding=1, groups=2), x, w)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, w, b = random(2, 4, 5), random(6, 4, 3).requires_grad_(), random(6)
    y = conv(x, w, b)
    assert y.requires_grad
    y.sum().backward()
    assert w.grad is not None
    assert x.grad is None
    with torch.no_grad():
        assert not conv(x, w, b).requires_grad
    with torch.inference_mode():
        assert_close(conv(x, w, b).clone(), y.detach())


# --------------------------------------------------------------------------------------- determinism, threads, caching
def test_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for case in (CASES["2d-all"], CASES["2d-circular"], CASES["1d-replicate"]):
            v, grad_x, grad_w = numbers_without_replicate_autograd(case)
            x, w = case.x, case.w
            first = conv(x, w, **case.hyper), conv_input_vjp(x.shape, w, v, **case.hyper)
            again = conv(x, w, **case.hyper), conv_input_vjp(x.shape, w, v, **case.hyper)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            assert_close(first[1], grad_x)
            assert_close(conv_weight_vjp(x, w.shape, v, **case.hyper), grad_w)
    finally:
        torch.use_deterministic_algorithms(False)


def numbers_without_replicate_autograd(case: Case) -> tuple[Any, Any, Any]:
    """`numbers`, with torch's own modes of padding left free to be non-deterministic."""
    torch.use_deterministic_algorithms(False)
    try:
        return numbers(case)
    finally:
        torch.use_deterministic_algorithms(True)


def test_two_threads_at_once() -> None:
    dispatch._calls.clear()
    cases = [CASES[name] for name in ("1d-all", "2d", "2d-all", "2d-dense", "2d-circular", "3d")] * 4
    expected = [(case.reference(case.x, case.w), numbers(case)) for case in cases]

    def work(case: Case) -> tuple[Any, Any, Any]:
        x, w = case.x.requires_grad_(), case.w.requires_grad_()
        y = conv(x, w, **case.hyper)
        return y.detach(), *torch.autograd.grad(y, (x, w), random(*y.shape, seed=4))

    with ThreadPoolExecutor(max_workers=2) as pool:
        for found, (y, (_, grad_x, grad_w)) in zip(pool.map(work, cases), expected, strict=True):
            assert_close(found[0], y)
            assert_close(found[1], grad_x)
            assert_close(found[2], grad_w)


def test_a_call_is_prepared_once() -> None:
    dispatch._calls.clear()
    x, w = random(2, 4, 9), random(6, 4, 3)
    for stride in (1, 1, (2,), (2,)):
        conv(x, w, stride=stride)
    assert len(dispatch._calls) == 2
    conv(x.float(), w.float())
    conv(x.numpy(), w.numpy())
    conv(x[:1], w)
    assert len(dispatch._calls) == 5
