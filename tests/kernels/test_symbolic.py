"""Symbolic sizes: one graph for all sizes wherever torch's own layer has one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend  # noqa: E402
from torch.export import Dim, export  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

import lensor  # noqa: E402
from lensor import dispatch, sampling  # noqa: E402
from lensor import functional as F  # noqa: E402
from lensor import nn as lensor_nn  # noqa: E402
from lensor.kernels.torch import symbolic as dynamic  # noqa: E402

MODES = ("zeros", "circular", "reflect", "replicate")


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def normal(*size: int, seed: int = 0, dtype: Any = None) -> Any:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(*size, generator=generator, dtype=dtype or torch.float64)


# ------------------------------------------------------------------------------------------- the operations themselves
def random_call(seed: int, dtype: Any) -> dict[str, tuple[tuple, tuple]]:
    """Every operation on one random convolution: the arrays and options of its call."""
    choose = random.Random(seed)
    dims = choose.choice([1, 1, 2, 2, 2, 3, 4])
    most = (9, 7, 5, 4)[dims - 1]
    groups, batch = choose.choice([1, 2]), choose.choice([1, 3])
    kernel = tuple(choose.randint(1, 3 if dims < 4 else 2) for _ in range(dims))
    dilation = tuple(choose.choice([1, 1, 2]) for _ in range(dims))
    stride = tuple(choose.choice([1, 1, 2, 3]) for _ in range(dims))
    sides = tuple(choose.choice([(0, 0), (1, 1), (1, 0), (0, 2), (2, 1)]) for _ in range(dims))
    padding: Any = choose.choice([0, 1, sides, "valid", *(["same"] if set(stride) == {1} else [])])
    mode = choose.choice(MODES)
    size = tuple(d * (k - 1) + choose.randint(3, most) for d, k in zip(dilation, kernel, strict=True))
    options = (stride, padding, dilation, groups, mode)
    x, w = normal(batch, 2 * groups, *size, dtype=dtype), normal(3 * groups, 2, *kernel, dtype=dtype)
    v = F.conv(x, w, None, *options[:-1], padding_mode=mode)
    v = normal(*v.shape, seed=1, dtype=dtype)
    unpaired = padding if not isinstance(padding, str) else 1
    span = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    extra = tuple(choose.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True))
    if any(p + s < 4 for p, s in zip(size, span, strict=True)):
        unpaired = 0
    transposed = normal(2 * groups, 2, *kernel, dtype=dtype)
    patches = F.unfold(x, kernel, dilation, padding, stride, padding_mode=mode)
    unfolding = (kernel, dilation, padding, stride, mode)
    calls: dict[str, tuple[tuple, tuple]] = {
        "_conv": ((x, w, normal(3 * groups, dtype=dtype)), options),
        "_conv_transpose": ((x, transposed, None), (stride, unpaired, extra, groups, dilation)),
        "_unfold": ((x,), unfolding),
        "_fold": ((patches,), (size, *unfolding)),
        "_unfold_transpose": ((x,), (kernel, stride, unpaired, extra, dilation)),
        "_conv_input_vjp": ((w, v), (tuple(x.shape), *options)),
        "_conv_weight_vjp": ((x, v), (tuple(w.shape), *options)),
        "_conv_weight_vjp_per_example": ((x, v), (tuple(w.shape), *options)),
    }
    if not dtype.is_complex:
        s, approx = torch.stack([v, v.sin()]), choose.choice(["expand", "reduce"])
        form = "factor" if approx == "expand" else choose.choice(["factor", "root"])
        convention = (
            "paper" if groups == 2 or form == "root" or approx == "reduce" else choose.choice(["asdl", "paper"])
        )
        plain = (kernel, stride, padding, dilation, groups, approx)
        calls["_kfac_input_factor"] = ((x,), (*plain, False, 0, convention, form, mode))
        calls["_kfac_output_factor"] = ((s,), (groups, approx, convention, mode))
        calls["_ggn_diagonal"] = ((x, s), (tuple(w.shape), choose.choice([True, False]), *options))
        calls["_ggn_gram"] = ((x, s), (tuple(w.shape), *options))
    return calls


def value_and_gradients(function: Callable[..., Any], arrays: tuple, options: tuple) -> list[Any]:
    arrays = tuple(array if array is None else array.clone().requires_grad_() for array in arrays)
    value = function(*arrays, *options)
    wanted = [array for array in arrays if array is not None]
    return [value.detach(), *torch.autograd.grad(value, wanted, normal(*value.shape, seed=2, dtype=value.dtype))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_operations_for_all_sizes_compute_what_plans_compute(seed: int, dtype: Any) -> None:
    for name, (arrays, options) in random_call(seed, dtype).items():
        operation = dispatch._operations[name]

        def planned(*given: Any, operation: Any = operation, count: int = len(arrays)) -> Any:
            return operation(tuple(array for array in given[:count] if array is not None), *given[count:])

        found = value_and_gradients(dynamic.OPERATIONS[name], arrays, options)
        for mine, expected in zip(found, value_and_gradients(planned, arrays, options), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_every_operation_has_a_form_for_all_sizes() -> None:
    assert set(dynamic.OPERATIONS) == set(dispatch._operations)


@pytest.mark.parametrize(
    ("name", "arrays", "options", "message"),
    [
        ("_conv", [(2, 3, 5), (4, 3, 2)], (1, -1, 1, 1, "zeros"), "padding"),
        ("_conv", [(2, 3, 5), (4, 3, 2)], (2, "same", 1, 1, "zeros"), "same"),
        ("_conv", [(2, 3, 5), (4, 3, 2)], (1, 0, 1, 1, "mirror"), "mirror"),
        ("_unfold", [(2, 3, 5)], (2, 0, 0, 1, "zeros"), "dilation"),
        ("_fold", [(2, 6, 4)], ((6,), 2, 1, 0, 1, "zeros"), "positions"),
        ("_fold", [(2, 5, 4)], ((5,), 2, 1, 0, 1, "zeros"), "rows"),
        ("_conv_input_vjp", [(4, 3, 2), (1, 4, 4)], ((2, 3, 5), 1, 0, 1, 1, "zeros"), "grad_output"),
        ("_conv_weight_vjp", [(2, 3, 5), (1, 4, 4)], ((4, 3, 2), 1, 0, 1, 1, "zeros"), "grad_output"),
        ("_conv_weight_vjp_per_example", [(2, 3, 5), (2, 4, 1)], ((4, 3, 2), 1, 0, 1, 1, "zeros"), "grad_output"),
        ("_ggn_gram", [(2, 3, 5), (7, 1, 4, 4)], ((4, 3, 2), 1, 0, 1, 1, "zeros"), "sqrt_ggn"),
        ("_kfac_output_factor", [(7, 2, 3, 4)], (2, "expand", "paper", "zeros"), "groups"),
        ("_kfac_output_factor", [(7, 2, 3, 4)], (1, "kfc", "paper", "zeros"), "approx"),
    ],
)
def test_what_does_not_fit_is_refused_for_all_sizes(name: str, arrays: list, options: tuple, message: str) -> None:
    given = [normal(*shape) for shape in arrays] + [None] * (name == "_conv")
    with pytest.raises(ValueError, match=message):
        dynamic.OPERATIONS[name](*given, *options)


# ----------------------------------------------------------------------------------------------------- exported models
class ToSize(nn.Module):
    """A transposed convolution that is asked for an output size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ConvTranspose2d(2, 3, 3, stride=2)

    def forward(self, x: Any) -> Any:
        return self.layer(x, output_size=(2 * x.shape[2] + 2, 2 * x.shape[3] + 1))


class Chosen(nn.Module):
    """A batch whose size depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x: Any) -> Any:
        return self.layer(x[x.sum((1, 2, 3)) > 0])


MODELS: dict[str, Callable[[], Any]] = {
    **{mode: lambda mode=mode: nn.Conv2d(2, 4, 3, 1, (1, 2), 2, padding_mode=mode) for mode in MODES},
    "same": lambda: nn.Conv2d(2, 4, (3, 2), padding="same"),
    "same, circular": lambda: nn.Conv2d(2, 4, (3, 2), padding="same", padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(2, 4, 3, 2, 1, output_padding=1, groups=2),
    "to a size": ToSize,
    "chosen": Chosen,
    "net": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, groups=4), nn.Flatten(2)
    ).eval(),
}


def operators(program: Any) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if "aten" in str(node.target)}


def exported(model: Any, strict: bool) -> Any:
    sizes = ({0: Dim("b"), 2: Dim("h", min=8), 3: Dim("w", min=8)},)
    return export(model, (torch.randn(5, 2, 10, 11),), dynamic_shapes=sizes, strict=strict)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_exported_with_dynamic_sizes(name: str) -> None:
    """The program is that of torch's layer, operator for operator, and holds for other sizes."""
    torch.manual_seed(0)
    model = MODELS[name]()
    ours = lensor_nn.convert(model)
    both = (False, True) if name in ("same, circular", "chosen") else (False,)
    programs = [exported(ours, strict) for strict in both]
    expected = operators(exported(model, False))
    for program in (*programs, programs[0].run_decompositions()):
        for shape in ((2, 2, 16, 9), (7, 2, 8, 12)):
            x = torch.randn(shape)
            x[0] += 9
            torch.testing.assert_close(program.module()(x), model(x))
    assert [operators(program) for program in programs] == [expected] * len(both)


def test_a_saved_program_needs_torch_only(tmp_path: Any) -> None:
    program = exported(lensor_nn.convert(MODELS["circular"]()), False)
    torch.export.save(program, tmp_path / "model.pt2")
    assert all("lensor" not in str(node.target) for node in torch.export.load(tmp_path / "model.pt2").graph.nodes)


@pytest.mark.parametrize("strict", [False, True])
def test_sizes_that_may_be_fixed_are_not(strict: bool) -> None:
    """With AUTO a size that a layer asked for as a number would become a constant without a word."""
    ours = lensor_nn.convert(MODELS["zeros"]())
    program = export(ours, (torch.randn(5, 2, 10, 11),), dynamic_shapes=({0: Dim.AUTO, 2: Dim.AUTO},), strict=strict)
    x = torch.randn(3, 2, 14, 11)
    torch.testing.assert_close(program.module()(x), ours(x))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_traced() -> None:
    ours = lensor_nn.convert(MODELS["circular"]())
    with torch.no_grad():
        traced = torch.jit.trace(ours, torch.randn(5, 2, 10, 11), check_trace=False)
    x = torch.randn(3, 2, 14, 9)
    torch.testing.assert_close(traced(x), ours(x))


def test_traced_by_make_fx() -> None:
    ours = lensor_nn.convert(MODELS["reflect"]())
    graph = make_fx(lambda x: ours(x), tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.randn(5, 2, 10, 11))
    x = torch.randn(3, 2, 14, 9)
    torch.testing.assert_close(graph(x), ours(x))


# ----------------------------------------------------------------------------------------------------- compiled models
SHAPES = [*((batch, 2, 10, 11) for batch in range(2, 16)), (5, 2, 12, 9), (6, 2, 9, 13), (7, 2, 8, 8)]


def graphs(model: Any, reference: Any, how: str) -> int:
    """How many graphs a model takes for all shapes, its results compared with those of a reference."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True if how == "dynamic" else None)
    for shape in SHAPES:
        x = torch.randn(shape)
        for axis in (0, 2, 3) if how == "marked" else ():
            torch._dynamo.mark_dynamic(x, axis)
        torch.testing.assert_close(compiled(x), reference(x))
    return counter.frame_count


HOW = ("automatic", "dynamic", "marked")


@pytest.mark.parametrize(
    ("name", "how"), [*(("zeros", how) for how in HOW), ("same, circular", "automatic"), ("transposed", "marked")]
)
def test_compiled_into_as_many_graphs_as_torch_s_own(name: str, how: str) -> None:
    model = MODELS[name]().requires_grad_(False)
    assert graphs(lensor_nn.convert(model), model, how) == graphs(model, model, how) <= 3


@pytest.mark.parametrize("how", ["automatic", "marked"])
def test_unfold_is_compiled_into_as_many_graphs_as_torch_s_own(how: str) -> None:
    ours, theirs = lensor_nn.UnfoldNd((3, 2), 2, 1, 2), nn.Unfold((3, 2), 2, 1, 2)
    assert graphs(ours, theirs, how) == graphs(theirs, theirs, how)


def test_fold_is_compiled_into_as_many_graphs_as_torch_s_own() -> None:
    def taken(layer: Any) -> int:
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        for batch in range(2, 13):
            x = torch.randn(batch, 18, 6)
            torch.testing.assert_close(compiled(x), nn.Fold((4, 5), 3)(x))
        return counter.frame_count

    assert taken(lensor_nn.FoldNd((4, 5), 3)) == taken(nn.Fold((4, 5), 3)) == 2


def test_layers_of_four_dimensions_take_one_graph() -> None:
    layers = (
        lensor_nn.ConvNd(2, 3, (2, 1, 1, 2), padding=1, padding_mode="circular"),
        lensor_nn.ConvTransposeNd(3, 2, (2, 1, 2, 1), 2),
    )
    model = nn.Sequential(*layers).requires_grad_(False)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((13, 2, 3, 5, 4, 6), (17, 2, 7, 9, 8, 10)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


def test_gradients_of_a_graph_for_all_sizes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(MODELS["reflect"](), nn.Tanh(), nn.ConvTranspose2d(4, 3, 3, 2, output_padding=1))
    counter = CompileCounterWithBackend("aot_eager")
    ours = lensor_nn.convert(model)
    compiled = torch.compile(ours, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((13, 2, 10, 11), (9, 2, 12, 14), (11, 2, 16, 9)):
        x, y = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
        ours.zero_grad()
        model.zero_grad()
        compiled(x).square().mean().backward()
        model(y).square().mean().backward()
        torch.testing.assert_close(x.grad, y.grad)
        for mine, theirs in zip(ours.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    assert counter.frame_count == 1


def test_autocast_of_a_graph_for_all_sizes() -> None:
    model = MODELS["circular"]().requires_grad_(False)
    compiled = torch.compile(lensor_nn.convert(model), backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((13, 2, 10, 11), (9, 2, 12, 14)):
        x = torch.randn(shape)
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = compiled(x), model(x)
        assert found.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


W = normal(6, 2, 3, 2)
OPTIONS: dict[str, Any] = {"padding": ((1, 0), (1, 1)), "groups": 2, "padding_mode": "circular"}


def cotangent(x: Any) -> Any:
    return F.conv(x, W, **OPTIONS).sin()


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "fold": lambda x: F.fold(F.unfold(x, (3, 2), padding=1).sin(), x.shape[2:], (3, 2), padding=1),
    "unfold_transpose": lambda x: F.unfold_transpose(x, 3, 2, 1, 1),
    "conv_input_vjp": lambda x: F.conv_input_vjp(x.shape, W, cotangent(x), **OPTIONS),
    "conv_weight_vjp": lambda x: F.conv_weight_vjp(x, W.shape, cotangent(x), **OPTIONS),
    "conv_weight_vjp_per_example": lambda x: F.conv_weight_vjp_per_example(x, W.shape, cotangent(x), **OPTIONS),
    "kfac_input_factor": lambda x: F.kfac_input_factor(x, 3, 2, 1, groups=2),
    "kfac_output_factor": lambda x: F.kfac_output_factor(x[None], 2, approx="reduce"),
    "ggn_diagonal": lambda x: F.ggn_diagonal(x, W.shape, cotangent(x)[None], per_example=True, **OPTIONS),
    "ggn_gram": lambda x: F.ggn_gram(x, W.shape, torch.stack([cotangent(x)] * 2), **OPTIONS),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_one_graph_for_all_sizes(name: str) -> None:
    counter = CompileCounter()
    compiled = torch.compile(FUNCTIONS[name], backend=counter, fullgraph=True, dynamic=True)
    for shape in ((13, 4, 10, 11), (9, 4, 12, 14), (11, 4, 16, 9)):
        x = normal(*shape)
        torch.testing.assert_close(compiled(x), FUNCTIONS[name](x))
    assert counter.frame_count == 1


def test_a_memory_limit_holds_for_every_size() -> None:
    """A plan within a limit is for sizes that are numbers: a graph for each, and no export for all."""
    w, counter = normal(4, 2, 3), CompileCounter()
    compiled = torch.compile(lambda x: F.conv(x, w), backend=counter, fullgraph=True)
    with lensor.planning(max_bytes=1 << 20):
        for batch in (5, 6, 7, 8):
            x = normal(batch, 2, 9)
            torch.testing.assert_close(compiled(x), nn.functional.conv1d(x, w))
    assert counter.frame_count == 4


def test_a_network_says_that_it_takes_no_symbols() -> None:
    net = lensor.contraction("n i, n i -> n", "X", "X")
    with pytest.raises(TypeError, match=r"operand 'X' has shape .* symbolic sizes"):
        make_fx(lambda x: net(X=x), tracing_mode="symbolic")(torch.randn(5, 2))


# ------------------------------------------------------------------------------------------------------ sampled layers
def test_sampled_layers_in_evaluation_mode_are_exported_for_all_sizes() -> None:
    model = MODELS["zeros"]()
    sampled = sampling.convert(model, {"i1": 0.5}).eval()
    x = torch.randn(3, 2, 14, 12)
    for strict in (False, True):
        torch.testing.assert_close(exported(sampled, strict).module()(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_sampled_layers_in_training_mode_are_exported_as_their_exact_outputs(strict: bool) -> None:
    model = nn.Sequential(MODELS["zeros"]())
    sampled = sampling.convert(model, {"i1": 0.5, "n": 0.5}, scheme="importance")
    assert sampled[0].training
    x = torch.randn(3, 2, 14, 12)
    torch.testing.assert_close(exported(sampled, strict).module()(x), model(x))


@pytest.mark.parametrize("scheme", ["bernoulli", "importance"])
def test_sampled_layers_are_compiled_once_for_all_sizes(scheme: str) -> None:
    """What surrounds them, that is: they run between two graphs."""
    model = sampling.convert(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()), {"i1": 0.5, "n": 0.5}, scheme=scheme)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for batch in range(2, 16):
        x = torch.randn(batch, 2, 6, 6)
        found = compiled(x)
        torch.testing.assert_close(found, model(x))
        found.sum().backward()
    assert counter.frame_count <= 3
