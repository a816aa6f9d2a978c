"""Products of arrays that are read through index patterns: the Triton kernel, its operator, and the composition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch

import lensor
import lensor.functional as F
from lensor.kernels import load
from lensor.kernels.reading import reads_for
from lensor.kernels.torch import patterns
from lensor.kernels.torch.triton import Launcher, Tile, launch
from lensor.kernels.torch.triton.kernels import pattern_product
from lensor.kernels.torch.triton.tiles import Side, fitting, tiles_for
from lensor.lowering import BY_NAME, FUSED, lower
from lensor.plan.steps import IDENTITY, Axis, PatternProduct, Term
from lensor.runtime import run
from tests.support.cases import BUILDERS, SPECS, assert_close, bound, operands_of
from tests.support.dense import evaluate_dense
from tests.support.pattern_products import CHOSEN, DEVICE, TOLERANCE, kernel_everywhere, product_of

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def steps_of(op: str, spec: str, batch: int = 2) -> Iterator[tuple[PatternProduct, list[torch.Tensor]]]:
    """The pattern products in the plans of an operation, with random operands in double precision."""
    net = bound(BUILDERS[op](SPECS[spec]), batch).simplify()
    generator = torch.Generator().manual_seed(0)
    for strategy in FUSED:
        plan = lower(net, strategy)
        for step in plan.steps:
            if isinstance(step, PatternProduct):
                left, right = (
                    torch.randn(plan.shapes[at], dtype=torch.float64, generator=generator) for at in step.takes
                )
                yield step, [left, left if step.takes[0] == step.takes[1] else right]


def first_step(op: str = "kfac_input_factor", spec: str = "2-d") -> tuple[PatternProduct, list[torch.Tensor]]:
    return next(steps_of(op, spec))


def reference(step: PatternProduct, operands: list[torch.Tensor]) -> np.ndarray:
    return load("numpy").steps[PatternProduct](step)(*[x.double().cpu().numpy() for x in operands])


# ------------------------------------------------------------------------------------------------------------ lowering
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", BUILDERS)
def test_plans_with_pattern_products_are_right(op: str, spec: str) -> None:
    """In NumPy, where the step is defined, and in torch, where it is a composition."""
    net = bound(BUILDERS[op](SPECS[spec]))
    operands = operands_of(net)
    expected = evaluate_dense(net, operands)
    for strategy in FUSED:
        plan = lower(net.simplify(), strategy)
        assert_close(run(plan, operands), expected)
        tensors = {name: torch.from_numpy(array) for name, array in operands.items()}
        assert_close(run(plan, tensors).numpy(), expected)


@pytest.mark.parametrize(
    ("op", "spec"),
    [
        ("kfac_input_factor", "2-d"),
        ("kfac_input_factor", "reflect"),
        ("ggn_diagonal", "1-d"),
        ("conv_weight_vjp", "2-d"),
    ],
)
def test_patches_are_never_stored(op: str, spec: str) -> None:
    plan = lower(bound(BUILDERS[op](SPECS[spec])).simplify(), BY_NAME["patterns"])
    assert [step.name for step in plan.steps if step.name not in ("operand", "reshape")] == ["pattern product"]


def test_a_gram_matrix_is_one_triangle_and_squares_are_summed_in_the_kernel() -> None:
    gram, _ = first_step()
    assert gram.is_gram
    assert "one triangle" in gram.settings()
    diagonal, _ = first_step("ggn_diagonal")
    assert diagonal.squared
    assert diagonal.size(diagonal.squared) == 4  # v and n


def test_a_bound_batch_size_and_a_resized_plan_give_the_same() -> None:
    net = BUILDERS["kfac_input_factor"](SPECS["2-d"])
    with patterns.interpreting():
        for batch in (7, 9, 12):
            x = torch.randn(batch, 4, 7, 6)
            plan = net.plan(X=x)
            known = next(one for one in plan.candidates if one.name == "patterns")
            expected = lower(net.bind(n=batch).simplify(), BY_NAME["patterns"])
            assert (known.flops, known.peak_size) == (expected.flops, expected.peak_size)


# -------------------------------------------------------------------------------------------------------------- kernel
@pytest.mark.parametrize("k", range(4 * len(CHOSEN)))
def test_the_kernel_is_right(k: int) -> None:
    """Hyper-parameters, modes, groups, dtypes, epilogues, layouts; `python -m tests.sweeps.patterns` runs more."""
    product = product_of(1, k)
    assert product.error() <= TOLERANCE[product.dtype], product


@pytest.mark.parametrize("op", ["kfac_input_factor", "ggn_diagonal", "conv_weight_vjp"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single_axes(op: str, dtype: torch.dtype, batch: int) -> None:
    step, operands = first_step(op)
    index = next(at for at in (*step.summed, *step.squared) if step.sizes[at] == 2)
    at = [
        [place for place, axis in enumerate(axes) if any(t.number == index for t in axis.terms)]
        for axes in (step.left, step.right)
    ]
    step = replace(step, sizes=tuple([batch if at == index else size for at, size in enumerate(step.sizes)]))
    small = [x.narrow(places[0], 0, batch) if places else x for x, places in zip(operands, at, strict=True)]
    found = Launcher(step)(*[x.to(DEVICE, dtype) for x in small])
    expected = reference(step, small)
    assert found.shape == expected.shape
    assert_close(found.double().cpu().numpy(), expected, 5e-2)


def test_sums_split_among_programs_are_bit_equal_if_torch_asks_for_it() -> None:
    step, operands = first_step()
    x = operands[0].to(DEVICE, torch.float32)
    launcher = Launcher(step, splits=3)
    torch.use_deterministic_algorithms(True)
    try:
        found = [launcher(x, x) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*found)
    assert not any(one.is_atomic for one in launcher._launches.values())
    assert all(one.splits == 3 for one in launcher._launches.values())
    launcher(x, x)
    assert any(one.is_atomic for one in launcher._launches.values())


def test_every_entry_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    step, operands = first_step("conv_weight_vjp_per_example")
    x, y = (x.to(DEVICE, torch.float32) for x in operands)
    launcher = Launcher(step)
    launcher(x, y)
    (known,) = launcher._launches.values()
    new, poisoned = torch.Tensor.new_empty, []

    def new_empty(self: torch.Tensor, shape: tuple, **options: object) -> torch.Tensor:
        found = new(self, shape, **options)
        if shape == known.tables.shape:
            poisoned.append(found.fill_(torch.nan))
        return found

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    found = known(x, y)
    assert [found] == poisoned
    assert found.isfinite().all()


def test_kernels_that_spill_registers_are_compiled_again_with_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled(NamedTuple):
        n_spills: int
        n_regs: int = 80

    class Kernel:
        limits: ClassVar[list[int | None]] = []

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
            def run(*arguments: object, maxnreg: int | None = None, **options: object) -> Compiled:
                self.limits.append(maxnreg)
                pattern_product[grid](*arguments, **options)
                return Compiled(0 if maxnreg == 96 else 3)

            return run

    monkeypatch.setattr(launch, "_kernel", Kernel())
    step, operands = first_step()
    x = operands[0].to(DEVICE, torch.float32)
    launcher = Launcher(step, splits=3)  # atomic additions: the second launch must not add to the first
    for _ in range(2):
        assert_close(launcher(x, x).cpu().numpy(), reference(step, operands), 1e-5)
    assert Kernel.limits == [None, 80, 96, 96]


def test_other_sizes_and_strides_compile_nothing() -> None:
    """Only options that are constants of the kernel may differ between launches, and sizes are not among them."""
    found = []
    for batch in (2, 3):
        step, operands = next(steps_of("kfac_input_factor", "2-d", batch))
        launcher = Launcher(step)
        x = operands[0].to(DEVICE, torch.float32)
        launcher(x, x)
        found += [one.options for one in launcher._launches.values()]
    assert found[0] == found[1]


def test_many_checked_axes_are_merged() -> None:
    spec = lensor.ConvSpec(1, 1, (3, 4, 2, 3, 2), 2, padding=1)
    net = lensor.ops.kfac_input_factor(spec).bind(n=2).simplify()
    step = next(step for step in lower(net, BY_NAME["patterns"]).steps if isinstance(step, PatternProduct))
    reads = reads_for(step.left, (144, 144, 48, 12, 6, 2, 1), step.sizes, (step.batch, step.rows, step.summed))
    assert len(reads.checks) == 3
    assert any(check.table is not None for check in reads.checks)


def plain(index: int) -> Axis:
    return Axis((Term(index, IDENTITY),))


def test_a_gram_matrix_does_not_use_a_tile_tuned_for_other_products(monkeypatch: pytest.MonkeyPatch) -> None:
    step = PatternProduct((0, 1), (40, 40, 9), (), (0,), (1,), (0, 1), (plain(0), plain(2)), (plain(1), plain(2)))
    monkeypatch.setattr(launch, "_seconds", lambda one, *_: one.tile.columns - one.tile.rows)  # let an oblong tile win
    x, y = torch.randn(2, 40, 9, device=DEVICE)
    with launch.tuning():
        assert_close(Launcher(step)(x, y).cpu().numpy(), (x @ y.mT).cpu().numpy(), 1e-5)
    assert_close(Launcher(replace(step, takes=(0, 0)))(x, x).cpu().numpy(), (x @ x.mT).cpu().numpy(), 1e-5)
    with pytest.raises(ValueError, match=r"32 rows and 16 columns, expected equal numbers"):
        Launcher(replace(step, takes=(0, 0)), Tile(32, 16, 32, 4, 1))(x, x)


def test_rows_and_columns_are_squared_together() -> None:
    step = PatternProduct((0, 1), (4, 5, 7), (), (0,), (1,), (1,), (plain(0), plain(2)), (plain(1), plain(2)))
    with pytest.raises(
        ValueError, match=r"indices \[0\] of rows and columns are squared, expected all of them or none"
    ):
        Launcher(step)


@pytest.mark.parametrize("op", ["kfac_input_factor", "conv_weight_vjp", "ggn_diagonal"])
def test_reads_lie_in_the_operands_in_gaps_too(op: str) -> None:
    """With 12 channels, tiles of 16 rows have gaps; no read that passes the checks is outside an operand."""
    net = bound(BUILDERS[op](lensor.ConvSpec(12, 12, (5, 4), 3, padding=1))).simplify()
    plan = lower(net, BY_NAME["patterns"])
    step = next(step for step in plan.steps if isinstance(step, PatternProduct))
    arrays = [torch.zeros(plan.shapes[at], device=DEVICE) for at in step.takes]
    tables = launch._Tables(step, launch.Setting.of(*arrays), Tile(16, 16, 16, 4, 1))
    assert any(tables.is_uniform)
    for groups, lengths, array in (
        (tables.left, tables.lengths[:3], arrays[0]),
        (tables.right, tables.lengths[3:], arrays[1]),
    ):
        b, r, t, u = (group.cpu().numpy().astype(np.int64) for group in groups)
        total = (
            b[:, :, None, None, None] + r[:, None, :, None, None] + t[:, None, None, :, None] + u[:, None, None, None]
        )
        inside = np.ones(total.shape[1:], bool)
        for coordinates, length in zip(total[1:], lengths, strict=False):
            inside &= (coordinates >= 0) & (coordinates < length)
        assert total[0][inside].min() >= 0
        assert total[0][inside].max() < array.numel()


def test_sizes_that_the_kernel_cannot_count_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 4, 6, 5)
    expected = F.kfac_input_factor(x, 3, padding=1)
    monkeypatch.setattr("lensor.kernels.reading._LARGEST", 2)
    only_fused(monkeypatch)
    with kernel_everywhere() as made:
        assert_close(F.kfac_input_factor(x, 3, padding=1).numpy(), expected.numpy(), 1e-5)
    assert made
    assert not made[0]._launches


def test_tiles_fit_the_product() -> None:
    tiles = tiles_for((8, 0), has_exact_products=False)
    large, few = Side(9, 512, 2), Side(9, 3, 2)
    assert fitting(tiles, large, large, is_gram=True, is_square=False)[0].rows == 128
    best = fitting(tiles, few, few, is_gram=True, is_square=False)[0]
    assert best.rows == best.columns <= 32
    assert all(
        tile.rows * tile.columns <= 64 * 64 for tile in fitting(tiles, large, large, is_gram=False, is_square=True)
    )
    assert tiles_for((7, 5), has_exact_products=False) == tiles_for((9, 0), has_exact_products=True)
    assert Tile(128, 128, 32, 8, 3) not in fitting(tiles, Side(1, 512, 0, True), large, is_gram=False, is_square=False)


# ------------------------------------------------------------------------------------------- composition and operator
@pytest.mark.parametrize("spec", ["1-d", "2-d", "circular", "depthwise"])
@pytest.mark.parametrize("op", ["kfac_input_factor", "conv_weight_vjp", "ggn_diagonal", "ggn_gram"])
def test_the_operator_has_derivatives_and_maps(op: str, spec: str) -> None:
    for step, operands in steps_of(op, spec):
        text, sizes = patterns._text(step), list(step.sizes)
        compose = patterns.Composition(step)
        inputs = [x.clone().requires_grad_() for x in operands]
        if step.takes[0] == step.takes[1]:
            inputs[1] = inputs[0]
        own = inputs[: 1 if inputs[0] is inputs[1] else 2]
        found, expected = torch.ops.lensor.pattern_product(*inputs, text, sizes), compose(*inputs)
        assert_close(found.detach().numpy(), expected.detach().numpy())
        v = torch.randn_like(expected)
        found, expected = (torch.autograd.grad(one, own, v, create_graph=True) for one in (found, expected))
        for one, two in zip(found, expected, strict=True):
            assert_close(one.detach().numpy(), two.detach().numpy())
        twice = [
            torch.autograd.grad(sum((g * g).sum() for g in one), own, retain_graph=True) for one in (found, expected)
        ]
        for one, two in zip(*twice, strict=True):
            assert_close(one.numpy(), two.numpy())
        x, y = (x.detach() for x in inputs)
        for dims in ((0, 0), (0, None), (None, 0), (1, 0)):
            stacked = [
                one if dim is None else torch.stack([one, 2 * one, -one], dim)
                for one, dim in zip((x, y), dims, strict=True)
            ]
            mapped = torch.func.vmap(partial(torch.ops.lensor.pattern_product, step=text, sizes=sizes), dims)(*stacked)
            apart = replace(step, takes=(0, 1))
            each = [
                patterns.Composition(apart)(
                    *[s if dim is None else s.select(dim, at) for s, dim in zip(stacked, dims, strict=True)]
                )
                for at in range(3)
            ]
            assert_close(mapped.numpy(), torch.stack(each).numpy())


def test_the_operator_meets_torchs_checks() -> None:
    step, (x, y) = first_step("conv_weight_vjp")
    arguments = x.requires_grad_(), y.requires_grad_(), patterns._text(step), list(step.sizes)
    torch.library.opcheck(torch.ops.lensor.pattern_product, arguments)


def test_a_composition_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    divided = 0
    for op in ("kfac_input_factor", "conv", "ggn_diagonal", "conv_weight_vjp"):
        for step, operands in steps_of(op, "2-d"):
            whole = patterns.Composition(step)(*operands)
            v = torch.randn_like(whole)
            gradients = [patterns.Composition(step).derivative(place, *operands, v) for place in (0, 1)]
            with monkeypatch.context() as patch:
                patch.setattr(patterns, "_PART", 40)
                parts = patterns.Composition(step)
                divided += len(parts.parts) > 1
                assert_close(parts(*operands).numpy(), whole.numpy())
                for place in (0, 1):
                    assert_close(parts.derivative(place, *operands, v).numpy(), gradients[place].numpy())
    assert divided > 4


# --------------------------------------------------------------------------------------------- as users meet the kernel
def user_calls() -> list:
    x, v = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0)), torch.ones(2, 6, 6, 5)
    return [
        (lambda x, v: F.kfac_input_factor(x, 3, padding=1), x, v),
        (lambda x, v: F.ggn_diagonal(x, (6, 4, 3, 3), v[None], padding=1), x, v),
        (lambda x, v: F.conv_weight_vjp_per_example(x, (6, 4, 3, 3), v, padding=1), x, v),
    ]


@pytest.mark.parametrize("call", user_calls(), ids=["kfac", "ggn", "per example"])
def test_gradients_maps_and_graphs_of_calls_with_the_kernel(call: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    function, x, v = call
    expected = function(x, v)
    weights = torch.randn_like(expected)
    again = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((function(again, v) * weights).sum(), again)
    mapped = torch.func.vmap(function, (0, None))(torch.stack([x, 2 * x]), v)
    with composed_kernel(monkeypatch):
        again = x.clone().requires_grad_()
        (found,) = torch.autograd.grad((function(again, v) * weights).sum(), again)
        assert_close(found.numpy(), gradient.numpy(), 1e-5)
        assert_close(torch.func.vmap(function, (0, None))(torch.stack([x, 2 * x]), v).numpy(), mapped.numpy(), 1e-5)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        again = x.clone().requires_grad_()
        assert_close(compiled(again, v).detach().numpy(), expected.numpy(), 1e-5)
        (found,) = torch.autograd.grad((compiled(again, v) * weights).sum(), again)
        assert_close(found.numpy(), gradient.numpy(), 1e-5)


@pytest.mark.parametrize("call", user_calls(), ids=["kfac", "ggn", "per example"])
def test_calls_run_the_kernel(call: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    function, x, v = call
    expected = function(x, v)
    only_fused(monkeypatch)
    with kernel_everywhere() as made:
        assert_close(function(x.to(DEVICE), v.to(DEVICE)).cpu().numpy(), expected.numpy(), 1e-5)
    assert made


@pytest.mark.parametrize("call", user_calls(), ids=["kfac", "ggn", "per example"])
def test_function_transforms_in_graphs(call: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    function, x, v = call
    tangent = torch.randn_like(x)

    def jvp(x: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(lambda x: function(x, v), (x,), (tangent,))[1]

    def gradient(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda x: function(x, v).square().sum())(x)

    expected = [jvp(x), gradient(x)]
    with composed_kernel(monkeypatch):
        for transformed, wanted in zip((jvp, gradient), expected, strict=True):
            assert_close(transformed(x).numpy(), wanted.numpy(), 1e-5)
            compiled = torch.compile(transformed, backend="aot_eager")
            assert_close(compiled(x).numpy(), wanted.numpy(), 1e-5)


def test_jacobians_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def jacobian(x: torch.Tensor) -> torch.Tensor:
        return torch.func.jacrev(lambda x: F.kfac_input_factor(x, 2))(x)

    x = torch.randn(1, 2, 3, 3)
    expected = jacobian(x)
    with composed_kernel(monkeypatch):
        assert_close(torch.compile(jacobian, backend="aot_eager")(x).numpy(), expected.numpy(), 1e-5)


def test_factors_apply_before_rounding_to_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums exceed the largest number in float16, their means do not."""
    x = torch.ones(16, 1, 80, 80, dtype=torch.float16)
    with composed_kernel(monkeypatch):
        for function in (F.kfac_input_factor, torch.compile(F.kfac_input_factor, backend="aot_eager")):
            assert function(x, 3, padding=1).max() == 6400
        assert torch.func.vmap(lambda x: F.kfac_input_factor(x, 3, padding=1))(x[None]).max() == 6400


def test_autocast_applies_as_to_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 4, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.kfac_input_factor(x, 3, padding=1)
    only_fused(monkeypatch)
    with kernel_everywhere(), torch.autocast("cpu", torch.bfloat16):
        found = F.kfac_input_factor(x, 3, padding=1)
        assert found.dtype == expected.dtype == torch.bfloat16
    assert_close(found.float().numpy(), expected.float().numpy(), 2e-2)


def test_exported_graphs_contain_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    class Factor(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.kfac_input_factor(x, 3, padding=1)

    x = torch.randn(2, 4, 6, 5)
    expected = Factor()(x)
    only_fused(monkeypatch)
    with kernel_everywhere():
        program = torch.export.export(Factor(), (x,))
        assert any("lensor.pattern_product" in str(node.target) for node in program.graph.nodes)
        assert_close(program.module()(x).numpy(), expected.numpy(), 1e-5)


@contextmanager
def composed_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside the `with` block, plans have pattern products as on a GPU, but compositions run them: they are faster."""
    only_fused(monkeypatch)
    monkeypatch.setattr(patterns, "_launcher", patterns.Composition)
    with patterns.interpreting():
        yield
    torch.compiler.reset()


def only_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the planner no other strategies, since a CPU's profile would choose them."""
    monkeypatch.setattr("lensor.lowering.alternatives.STRATEGIES", ())
    monkeypatch.setattr("lensor.lowering.alternatives.FUSED", (BY_NAME["patterns"],))
    monkeypatch.setattr("lensor.planner.families.Target.divisions", lambda *_: [])


# ------------------------------------------------------------------------------------------------------------- on a GPU
@needs_card
def test_calls_on_a_card_do_no_work_on_the_host() -> None:
    """Cached calls neither synchronize nor copy, so a CUDA graph can capture them."""
    calls = [(function, x.cuda(), v.cuda()) for function, x, v in user_calls()]
    for function, x, v in calls:
        expected = function(x, v)
        torch.cuda.set_sync_debug_mode("error")
        try:
            function(x, v)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = function(x, v)
        found.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_close(found.cpu().numpy(), expected.cpu().numpy(), 1e-4)


@needs_card
def test_other_streams() -> None:
    function, x, v = user_calls()[0]
    x, v = x.cuda(), v.cuda()
    expected = function(x, v)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [function(x * k, v) for k in (1, 2)]
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(found[0].cpu().numpy(), expected.cpu().numpy(), 1e-4)
    assert_close(found[1].cpu().numpy(), 4 * expected.cpu().numpy(), 1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_tensors_of_another_card_stay_there() -> None:
    function, x, v = user_calls()[0]
    expected = function(x, v)
    found = function(x.to("cuda:1"), v.to("cuda:1"))
    assert found.device == torch.device("cuda:1")
    assert_close(found.cpu().numpy(), expected.numpy(), 1e-4)
