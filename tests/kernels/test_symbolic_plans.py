"""Plans in graphs with symbolic sizes of open indices: right for all sizes, and one graph for all of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch._C._functorch import is_functorch_wrapped_tensor  # noqa: E402
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend  # noqa: E402
from torch.export import Dim, export  # noqa: E402

from lensor import ConvSpec, ops  # noqa: E402
from lensor import functional as F  # noqa: E402
from lensor.kernels.torch import capture, symbolic  # noqa: E402

MODES = ("zeros", "circular", "reflect", "replicate")
BATCHES = (5, 2, 9, 32, 81)
NAMES = (
    "unfold",
    "fold",
    "unfold_transpose",
    "conv_input_vjp",
    "conv_weight_vjp",
    "conv_weight_vjp_per_example",
    "kfac_input_factor",
    "kfac_output_factor",
    "ggn_diagonal",
    "ggn_gram",
)


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compositions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operations that ran without a plan."""
    used: list[str] = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            used.append(name)
            return function(*arguments)

        return call

    for name, function in [*symbolic.OPERATIONS.items()]:
        monkeypatch.setitem(symbolic.OPERATIONS, name, recorded(name, function))
    return used


def normal(*size: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(*size, generator=generator, dtype=torch.float64)


class Case:
    """Every operation on one random convolution, as functions of arrays with any batch size."""

    def __init__(self, seed: int) -> None:
        choose = random.Random(seed)
        dims = choose.choice([1, 1, 2, 2, 2, 3])
        most = (9, 6, 3)[dims - 1]
        self.groups = groups = choose.choice([1, 1, 2])
        self.kernel = kernel = tuple(choose.randint(1, 3) for _ in range(dims))
        self.dilation = dilation = tuple(choose.choice([1, 1, 2]) for _ in range(dims))
        self.stride = stride = tuple(choose.choice([1, 1, 2]) for _ in range(dims))
        sides = tuple(choose.choice([(0, 0), (1, 1), (1, 0), (0, 2)]) for _ in range(dims))
        self.padding: Any = choose.choice([0, 1, sides])
        self.mode: Any = choose.choice(MODES)
        self.size = tuple(d * (k - 1) + choose.randint(3, most) for d, k in zip(dilation, kernel, strict=True))
        self.approx: Any = choose.choice(["expand", "reduce"])
        self.per_example = choose.choice([True, False])
        self.weight = (3 * groups, 2, *kernel)
        self.options: dict[str, Any] = {
            "stride": stride,
            "padding": self.padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": self.mode,
        }

    def x(self, batch: int) -> Any:
        return normal(batch, 2 * self.groups, *self.size)

    def w(self) -> Any:
        return normal(*self.weight)

    def v(self, batch: int) -> Any:
        return normal(*F.conv(self.x(batch), self.w(), **self.options).shape, seed=1)

    def s(self, batch: int, columns: int = 3) -> Any:
        v = self.v(batch)
        return torch.stack([v * (at + 1) for at in range(columns)])

    def calls(self) -> dict[str, tuple[Callable[..., Any], Callable[[int], tuple]]]:
        """For each operation, the function, and its arrays for a batch size."""
        kernel, size, weight, o = self.kernel, self.size, self.weight, self.options
        patches = {name: o[name] for name in ("stride", "padding", "dilation", "padding_mode")}
        spread = {name: o[name] for name in ("stride", "dilation")}
        factor = {**o, "approx": self.approx}
        per_example = self.per_example

        def input_vjp(w: Any, v: Any) -> Any:
            return F.conv_input_vjp((v.shape[0], 2 * self.groups, *size), w, v, **o)

        def both(batch: int) -> tuple:
            return self.x(batch), self.v(batch)

        def stacked(batch: int) -> tuple:
            return self.x(batch), self.s(batch)

        return {
            "unfold": (lambda x: F.unfold(x, kernel, **patches), lambda n: (self.x(n),)),
            "fold": (lambda x: F.fold(x, size, kernel, **patches), lambda n: (F.unfold(self.x(n), kernel, **patches),)),
            "unfold_transpose": (lambda x: F.unfold_transpose(x, kernel, **spread), lambda n: (self.x(n),)),
            "conv_input_vjp": (input_vjp, lambda n: (self.w(), self.v(n))),
            "conv_weight_vjp": (lambda x, v: F.conv_weight_vjp(x, weight, v, **o), both),
            "conv_weight_vjp_per_example": (lambda x, v: F.conv_weight_vjp_per_example(x, weight, v, **o), both),
            "kfac_input_factor": (lambda x: F.kfac_input_factor(x, kernel, **factor), lambda n: (self.x(n),)),
            "kfac_output_factor": (
                lambda s: F.kfac_output_factor(s, self.groups, approx=self.approx),
                lambda n: (self.s(n),),
            ),
            "ggn_diagonal": (lambda x, s: F.ggn_diagonal(x, weight, s, per_example=per_example, **o), stacked),
            "ggn_gram": (lambda x, s: F.ggn_gram(x, weight, s, **o), stacked),
        }


def axes_of_examples(name: str, arrays: Sequence[Any]) -> Iterator[tuple[Any, int]]:
    """The arrays with a batch axis, and the axis."""
    for array in arrays:
        if array is arrays[0] and name == "conv_input_vjp":
            continue
        stack = name == "kfac_output_factor" or (name.startswith("ggn") and array is arrays[1])
        yield array, int(stack)


def marked(name: str, arrays: Sequence[Any]) -> Sequence[Any]:
    """The arrays, with a batch size that is symbolic in graphs."""
    for array, axis in axes_of_examples(name, arrays):
        torch._dynamo.mark_dynamic(array, axis)
    return arrays


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NAMES)
def test_one_graph_of_a_plan_is_right_for_all_batch_sizes(name: str, seed: int, compositions: list[str]) -> None:
    function, arrays = Case(2 * NAMES.index(name) + seed).calls()[name]
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for batch in BATCHES:
        given = arrays(batch)
        torch.testing.assert_close(compiled(*marked(name, given)), function(*given), rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1
    assert not compositions


@pytest.mark.parametrize("name", ["unfold", "fold", "conv_input_vjp", "kfac_input_factor", "ggn_gram", "ggn_diagonal"])
def test_gradients_of_a_graph_for_all_batch_sizes(name: str) -> None:
    function, arrays = Case(3).calls()[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for batch in (5, 2, 33):
        given, same = ([array.requires_grad_() for array in arrays(batch)] for _ in range(2))
        found, expected = compiled(*marked(name, given)), function(*same)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        gradients = [torch.autograd.grad(value.sin().sum(), of) for value, of in ((found, given), (expected, same))]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)
    assert counter.frame_count == 1


def factor(x: Any) -> Any:
    return F.kfac_input_factor(x, 3, padding=1)


def by_loops(x: Any) -> Any:
    """The factor of a 3×3 convolution with padding 1, as sums over examples and positions."""
    x, total = nn.functional.pad(x, (1, 1, 1, 1)), 0
    for example in x:
        for i in range(x.shape[2] - 2):
            for j in range(x.shape[3] - 2):
                patch = example[:, i : i + 3, j : j + 3].flatten()
                total = total + torch.outer(patch, patch)
    return total[None] / len(x)


def test_a_factor_has_the_steps_of_its_plan(compositions: list[str]) -> None:
    graphs: list[Any] = []

    def kept(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(factor, backend=kept, fullgraph=True)
    for batch in BATCHES:
        x = normal(batch, 4, 14, 14)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), by_loops(x), rtol=1e-9, atol=1e-9)
    (graph,) = graphs
    assert ops.kfac_input_factor(ConvSpec(4, 4, (14, 14), 3, padding=1)).plan(X=normal(32, 4, 14, 14)).name == "lags"
    assert "convolution_backward" in graph.code
    assert not compositions


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["kfac_input_factor", "ggn_diagonal", "fold"])
def test_exported_for_all_batch_sizes(name: str, strict: bool, compositions: list[str], tmp_path: Any) -> None:
    function, arrays = Case(1).calls()[name]

    class Model(nn.Module):
        def forward(self, *given: Any) -> Any:
            return function(*given)

    given, batch = arrays(5), Dim("batch")
    sizes = tuple({axis: batch} for _, axis in axes_of_examples(name, given))
    torch.export.save(export(Model(), given, dynamic_shapes=(sizes,), strict=strict), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for count in BATCHES:
        torch.testing.assert_close(program(*arrays(count)), function(*arrays(count)), rtol=1e-9, atol=1e-9)
    assert not compositions


@pytest.mark.parametrize("name", ["kfac_output_factor", "ggn_diagonal", "ggn_gram"])
def test_batch_and_columns_may_both_be_symbolic(name: str, compositions: list[str]) -> None:
    case = Case(2)
    function, arrays = case.calls()[name]
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for batch, columns in ((5, 3), (4, 4), (2, 9), (33, 2)):
        given = (*arrays(batch)[:-1], case.s(batch, columns))
        torch._dynamo.mark_dynamic(given[-1], 0)
        torch.testing.assert_close(compiled(*marked(name, given)), function(*given), rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1
    assert not compositions


@pytest.mark.parametrize(
    ("function", "size", "axes"),
    [
        (factor, (5, 4, 9, 9), (0, 1)),
        (factor, (5, 4, 9, 9), (0, 2)),
        (lambda x: F.kfac_input_factor(x, 3, approx="reduce", form="root"), (5, 4, 9, 9), (0,)),
        (lambda x: F.conv(x, torch.ones(3, 4, 2, 2, dtype=x.dtype)), (5, 4, 9, 9), (0,)),
    ],
    ids=["channels", "positions", "root", "layer"],
)
def test_compositions_run_if_there_is_no_plan(
    function: Callable[..., Any], size: tuple, axes: tuple, compositions: list[str]
) -> None:
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    for more in (0, 3):
        x = normal(*(length + more if axis in axes else length for axis, length in enumerate(size)))
        for axis in axes:
            torch._dynamo.mark_dynamic(x, axis)
        torch.testing.assert_close(compiled(x), function(x))
    assert len(set(compositions)) == 1


@pytest.mark.parametrize("dtype", [torch.complex128, torch.int64])
def test_dtypes_that_eager_calls_refuse_are_refused(dtype: Any) -> None:
    x = torch.ones(5, 4, 8).to(dtype)
    torch._dynamo.mark_dynamic(x, 0)
    for function in (lambda x: F.kfac_input_factor(x, 3), lambda x: F.kfac_input_factor(x, 3, approx="reduce")):
        with pytest.raises(TypeError):
            function(x)
        with pytest.raises(Exception, match=r"TypeError|dtype|complex"):
            torch.compile(function, backend="eager", fullgraph=True)(x)


def test_gradients_of_an_input_gradient_keep_the_batch_size_symbolic() -> None:
    """torch's derivative of a convolution's input gradient would fix the batch size if the plan contained one."""
    spec = ConvSpec(6, 6, (8, 8), 3, stride=2, padding=1, dilation=2, groups=3)
    w = torch.randn(6, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(
        lambda w, v: F.conv_input_vjp((len(v), 6, 8, 8), w, v, 2, 1, 2, 3), backend=counter, fullgraph=True
    )
    for batch in (5, 2, 9):
        v = torch.randn(batch, 6, *spec.output_size, dtype=torch.float64, requires_grad=True)
        torch._dynamo.mark_dynamic(v, 0)
        expected = F.conv_input_vjp((batch, 6, 8, 8), w, v, 2, 1, 2, 3)
        found = function(w, v)
        torch.testing.assert_close(found, expected)
        for one, two in zip(
            torch.autograd.grad(found.square().sum(), (w, v)),
            torch.autograd.grad(expected.square().sum(), (w, v)),
            strict=True,
        ):
            torch.testing.assert_close(one, two)
    assert counter.frame_count == 1


def test_batch_sizes_that_differ_are_refused() -> None:
    compiled = torch.compile(lambda x, v: F.conv_weight_vjp(x, (3, 4, 3), v), backend="eager", fullgraph=True)
    x, v = marked("conv_weight_vjp", (normal(5, 4, 9), normal(6, 3, 7)))
    with pytest.raises(Exception, match="grad_output has shape"):
        compiled(x, v)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_half_precision_for_all_batch_sizes(dtype: Any, tolerance: float) -> None:
    compiled = torch.compile(factor, backend="eager", fullgraph=True)
    for batch in (5, 40):
        x = normal(batch, 4, 9, 9).to(dtype)
        torch._dynamo.mark_dynamic(x, 0)
        found = compiled(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), by_loops(x.double()), rtol=tolerance, atol=tolerance)


def diagonals(x: Any, s: Any) -> Any:
    return torch.func.vmap(lambda one: F.ggn_diagonal(x, (3, 4, 3, 3), one, padding=1))(s)


def derivative(x: Any) -> Any:
    return torch.func.grad(lambda x: factor(x).sin().sum())(x)


def tangent(x: Any) -> Any:
    return torch.func.jvp(factor, (x,), (x.cos(),))[1]


@pytest.mark.parametrize("function", [diagonals, derivative, tangent])
def test_transforms_for_all_batch_sizes(function: Callable[..., Any]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for batch in (5, 2, 33):
        given = [normal(batch, 4, 9, 9), *([normal(2, 3, batch, 3, 9, 9)] if function is diagonals else [])]
        for array, axis in zip(given, (0, 2), strict=False):
            torch._dynamo.mark_dynamic(array, axis)
        torch.testing.assert_close(compiled(*given), function(*given), rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1


def test_constants_captured_under_a_transform_are_plain_tensors() -> None:
    x = normal(5, 4, 9, 9)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(derivative, backend="aot_eager", fullgraph=True)(x)
    assert not any(map(is_functorch_wrapped_tensor, vars(capture._captured).values()))
