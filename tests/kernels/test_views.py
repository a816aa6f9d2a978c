"""Results as torch's own: they can be viewed and written in place, and have the same order of axes in memory."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import lensor
import lensor.functional as F
import lensor.nn
import lensor.sampling
from lensor import plan as plans
from lensor.plan import steps as s

torch = pytest.importorskip("torch")
forward_ad = torch.autograd.forward_ad

FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


def layers(seed: int, count: int) -> list[tuple[Any, Any]]:
    """Random convolutions of torch, each with an input."""
    draw, found = random.Random(seed), []
    torch.manual_seed(seed)
    while len(found) < count:
        dims, transposed = draw.choice((1, 2, 2, 3)), draw.random() < 0.4
        options: dict[str, Any] = {
            "kernel_size": tuple(draw.choice((1, 1, 2, 3)) for _ in range(dims)),
            "stride": tuple(draw.choice((1, 2, 3)) for _ in range(dims)),
            "padding": tuple(draw.choice((0, 1)) for _ in range(dims)),
            "groups": draw.choice((1, 1, 2, 4)),
            "bias": draw.random() < 0.5,
            "dtype": draw.choice((torch.float32, torch.float64)),
        }
        if transposed:
            options["padding"] = tuple(
                min(p, k - 1) for p, k in zip(options["padding"], options["kernel_size"], strict=True)
            )
        else:
            options["padding_mode"] = draw.choice(("zeros", "zeros", "circular", "reflect", "replicate"))
        layer = getattr(torch.nn, f"Conv{'Transpose' * transposed}{dims}d")(8, 4, **options)
        shape = (8, *(draw.choice((4, 5, 6)) for _ in range(dims)))
        shape = shape if draw.random() < 0.2 else (draw.choice((1, 1, 2, 3)), *shape)
        found.append((layer, torch.randn(shape, dtype=options["dtype"])))
    return found


def order(x: Any) -> tuple[int, ...]:
    """Strides, as far as memory shows them."""
    return tuple(stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)


def close(found: Any, expected: Any) -> None:
    tolerance = 1e-4 if expected.dtype == torch.float32 else 1e-9
    largest = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("channels_last", ["nothing", "input", "weight", "both"])
@pytest.mark.parametrize("seed", range(2))
def test_results_lie_in_memory_as_torch_s(seed: int, channels_last: str) -> None:
    for layer, x in layers(seed, 40):
        dims = len(layer.kernel_size)
        batched = x.ndim == dims + 2
        if dims in FORMATS and channels_last in ("input", "both") and batched:
            x = x.to(memory_format=FORMATS[dims])
        if dims in FORMATS and channels_last in ("weight", "both"):
            layer = layer.to(memory_format=FORMATS[dims])
        found = []
        for module in (lensor.nn.convert(layer), layer):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            cotangent = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).sin()
            grads = torch.autograd.grad(y, [leaf, *module.parameters()], cotangent, create_graph=True)
            found.append([y, *grads])
        for at, (one, two) in enumerate(zip(*found, strict=True)):
            close(one, two)
            # What a padding does to the gradient of its input is left out: torch's own way depends on the mode.
            if channels_last == "nothing" or at != 1 or layer.padding_mode == "zeros":
                assert order(one) == order(two), (layer, x.shape, x.stride())
        y, *grads = found[0]
        if found[1][0].is_contiguous():
            y.view(1, -1)
        if channels_last == "nothing":
            torch.nn.utils.parameters_to_vector(grads[1:])


def test_the_issue_s_inputs() -> None:
    layer = lensor.nn.convert(torch.nn.Conv2d(16, 8, 1))
    assert layer(torch.randn(1, 16, 7, 7)).view(1, -1).shape == (1, 392)
    model = torch.nn.Sequential(torch.nn.Conv2d(64, 16, 1), torch.nn.ReLU(inplace=True))
    x = torch.randn(8, 64, 28, 28)
    close(lensor.nn.convert(model)(x), model(x))
    close(lensor.nn.convert(model).eval()(x), model(x))


def test_sampled_layers_lie_in_memory_as_torch_s() -> None:
    torch.manual_seed(0)
    made: list[tuple[Any, Any]] = [(torch.nn.Linear(8, 5), torch.randn(shape)) for shape in ((4, 8), (4, 6, 8), (8,))]
    for transposed, kernel, groups, last in itertools.product((False, True), (1, 3), (1, 2), (False, True)):
        layer = getattr(torch.nn, f"Conv{'Transpose' * transposed}2d")(4, 6, kernel, groups=groups)
        x = torch.randn(2, 4, 6, 5)
        if last:
            layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        made.append((layer, x))
    for layer, x in made:
        found = []
        for module in (lensor.sampling.convert(layer, {"n": 0.5}, scheme="fixed"), layer):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            grads = torch.autograd.grad(y.square().sum(), [leaf, module.weight], retain_graph=True)
            found.append([*map(order, (y, *grads)), y.mul_(2).relu_().detach()])
        assert found[0][:3] == found[1][:3]
        close(found[0][3], found[1][3])


# ------------------------------------------------------------------------------------------------------------ in place
def _parameters(module: Any) -> dict[str, Any]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def _written(y: Any) -> Any:
    return y.mul_(2).add_(1).tanh_()


def _by_autograd(module: Any, x: Any) -> Any:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(_written(module(x)).square().sum(), [x, *module.parameters()])


def _twice(module: Any, x: Any) -> Any:
    x = x.clone().requires_grad_()
    y = _written(module(x))
    first = torch.autograd.grad(y.square().sum(), [x, module.weight], create_graph=True)
    for each in first:
        each.mul_(2)
    return [*first, *torch.autograd.grad(sum(each.square().sum() for each in first), [x, module.weight])]


def _without_gradients(module: Any, x: Any) -> Any:
    with torch.no_grad():
        y = _written(module(x))
    if module(x).ndim == len(module.kernel_size) + 2:  # one example is a view for torch, too
        y.mul_(torch.ones((), dtype=x.dtype, requires_grad=True))
    with torch.inference_mode():
        return y.detach(), _written(module(x)).clone()


def _checkpointed(module: Any, x: Any) -> Any:
    x = x.clone().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(lambda x: _written(module(x)), x, use_reentrant=False)
    return torch.autograd.grad(y.square().sum(), [x, module.weight])


def _by_torch_func(module: Any, x: Any) -> Any:
    def loss(parameters: Any, x: Any) -> Any:
        return _written(torch.func.functional_call(module, parameters, x)).square().sum()

    grads = torch.func.grad(loss)(_parameters(module), x)
    for each in grads.values():
        each.mul_(2).view(-1)
    many = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(_parameters(module), torch.stack([x, 2 * x]))
    return [*grads.values(), *many.values(), torch.func.vmap(lambda x: _written(module(x)))(torch.stack([x, -x]))]


def _forward_mode(module: Any, x: Any) -> Any:
    def call(weight: Any) -> Any:
        return _written(torch.func.functional_call(module, {**_parameters(module), "weight": weight}, x))

    weight = module.weight.detach()
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(_written(module(forward_ad.make_dual(x, x + 1))))
    return [*dual, *torch.func.jvp(call, (weight,), (weight + 1,)), torch.func.jacrev(call)(weight)]


USES = [_by_autograd, _twice, _without_gradients, _checkpointed, _by_torch_func, _forward_mode]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__.strip("_"))
def test_results_of_layers_are_written_in_place(use: Callable[[Any, Any], Any]) -> None:
    for layer, x in layers(2, 12):
        for found, expected in zip(use(lensor.nn.convert(layer), x), use(layer, x), strict=True):
            close(found, expected)


CALLS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "conv, 1": (lambda x, w: F.conv(x, w), [(1, 4, 5), (3, 4, 1)]),
    "conv, unbatched": (lambda x, w: F.conv(x, w), [(4, 5), (3, 4, 2)]),
    "conv_transpose": (lambda x, w: F.conv_transpose(x, w, stride=2), [(1, 4, 5, 4), (4, 3, 1, 1)]),
    "unfold": (lambda x: F.unfold(x, 2), [(2, 3, 4, 5)]),
    "unfold, 1": (lambda x: F.unfold(x, (1, 1)), [(2, 3, 4, 5)]),
    "fold": (lambda x: F.fold(x, (4, 5), (1, 1)), [(2, 3, 20)]),
    "fold, dense": (lambda x: F.fold(x, (4, 4), 2, stride=2), [(2, 12, 4)]),
    "unfold_transpose": (lambda x: F.unfold_transpose(x, (2,), 2), [(2, 3, 4)]),
    "conv_input_vjp": (lambda w, v: F.conv_input_vjp((2, 4, 5), w, v), [(3, 4, 1), (2, 3, 5)]),
    "conv_weight_vjp": (lambda x, v: F.conv_weight_vjp(x, (3, 4, 1), v), [(2, 4, 5), (2, 3, 5)]),
    "per example": (lambda x, v: F.conv_weight_vjp_per_example(x, (3, 4, 1), v), [(2, 4, 5), (2, 3, 5)]),
    "kfac_input_factor": (lambda x: F.kfac_input_factor(x, 1), [(2, 4, 5)]),
    "kfac_input_factor, root": (lambda x: F.kfac_input_factor(x, 1, approx="reduce", form="root"), [(2, 4, 1)]),
    "kfac_input_factor, reduce": (lambda x: F.kfac_input_factor(x, 3, approx="reduce"), [(2, 4, 5)]),
    "kfac_output_factor": (lambda v: F.kfac_output_factor(v), [(2, 2, 4, 5)]),
    "ggn_diagonal": (lambda x, v: F.ggn_diagonal(x, (3, 4, 1), v), [(2, 4, 5), (2, 2, 3, 5)]),
    "ggn_gram": (lambda x, v: F.ggn_gram(x, (3, 4, 1), v), [(2, 4, 5), (2, 2, 3, 5)]),
    "einsum, transpose": (lambda x: lensor.einsum("i j -> j i", x), [(3, 4)]),
    "einsum, nothing": (lambda x: lensor.einsum("i j -> i j", x), [(3, 4)]),
    "einsum, scalar": (lambda x: lensor.einsum("-> ", x), [()]),
    "einsum, diagonal": (lambda x: lensor.einsum("i i -> i", x), [(3, 3)]),
    "einsum, product": (lambda x, y: lensor.einsum("i j, j k -> k i", x, y), [(3, 4), (4, 5)]),
    "einsum, repeat": (lambda x: lensor.einsum("i, j -> i", x, torch.ones(1).to(x)), [(4,)]),
    "einsum, join": (lambda x: lensor.einsum("a b c -> (c b) a", x), [(2, 3, 4)]),
    "einsum, pattern": (lambda x: lensor.einsum("i, i o k -> k o", x, lensor.IndexPattern(5, 3)), [(5,)]),
    "einsum, crop": (lambda x: lensor.einsum("n i, i o k -> n k o", x, lensor.IndexPattern(5, 1)), [(2, 5)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_results_of_functions_are_views_of_nothing(name: str) -> None:
    call, shapes = CALLS[name]
    torch.manual_seed(0)
    kinds = [lambda x: x, lambda x: x.clone().requires_grad_()]
    # Operands that are themselves permuted views: what is a copy for others may be a view of them.
    kinds.append(lambda x: x.permute([*range(x.ndim)][::-1]).contiguous().permute([*range(x.ndim)][::-1]))
    for make in kinds:
        operands = [make(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
        before = [operand.detach().clone() for operand in operands]
        found = call(*operands)
        assert found.is_contiguous()
        expected = found.detach().clone()
        found.view(-1)
        found.mul_(2).add_(1)
        for operand, value in zip(operands, before, strict=True):
            assert torch.equal(operand, value)
        assert torch.equal(call(*operands), expected)  # nothing that is kept was written to
        if found.requires_grad:
            grads = torch.autograd.grad(found.sum(), operands, create_graph=True)
            assert all(grad.is_contiguous() for grad in grads)
            for grad in grads:
                grad.mul_(3)
        batch = torch.func.vmap(lambda *operands: call(*operands).mul_(2))(*(torch.stack([x, x]) for x in operands))
        assert torch.allclose(batch[1], 2 * expected)


def test_patterns_alone_are_made_for_the_caller() -> None:
    pattern = lensor.IndexPattern(5, 3)
    first = lensor.einsum("i o k -> k i o", pattern)
    expected = np.array(first)
    first[...] = 7
    assert np.array_equal(lensor.einsum("i o k -> k i o", pattern), expected)


# ----------------------------------------------------------------------------------------------------------- the costs
class _Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts copies."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_)
        return function(*args, **(kwargs or {}))


def test_what_is_new_is_not_copied_again() -> None:
    cases = [*itertools.product((1, 8), ({"kernel_size": 3}, {"kernel_size": 1})), (1, {"kernel_size": 1, "groups": 4})]
    for batch, hyper in cases:
        layer = lensor.nn.convert(torch.nn.Conv2d(16, 8, bias=False, **hyper))
        x = torch.randn(batch, 16, 9, 8)
        layer(x)
        with torch.no_grad(), _Copies() as copies:
            layer(x)
        assert copies.count == 0
    x = torch.randn(4, 16, 9, 8).to(memory_format=torch.channels_last)
    layer = lensor.nn.convert(torch.nn.Conv2d(16, 8, 3)).to(memory_format=torch.channels_last)
    layer(x)
    with torch.no_grad(), _Copies() as copies:
        assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert copies.count == 0


def test_the_last_copy_is_counted() -> None:
    shapes = ((4, 5), (5, 4))
    program = (s.Input((), "X", (4, 5)), s.Transpose((0,), (1, 0)))
    assert plans.Plan("", program, shapes, 1).peak_size == 20
    assert plans.Plan("", program, shapes, 1).bytes == 2 * 20 * 8
    assert plans.Plan("", program, shapes, 0).peak_size == 0


# -------------------------------------------------------------------------------------------------------- what follows
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("fast", ["foreach", "fused"])
def test_a_model_is_trained_as_torch_s(fast: str, channels_last: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 1),
        torch.nn.ReLU(inplace=True),
        torch.nn.Conv2d(8, 8, 3, groups=8, padding=1),
        torch.nn.Hardswish(inplace=True),
        torch.nn.ConvTranspose2d(8, 2, 2, stride=2),
        torch.nn.Dropout(0.0, inplace=True),
    )
    x = torch.randn(1, 4, 6, 6)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    both = [lensor.nn.convert(model), model]
    for module in both:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, **{fast: True})
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1, foreach=True)
            optimizer.step()
    for found, expected in zip(both[0].parameters(), both[1].parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert order(found.grad) == order(expected.grad)
