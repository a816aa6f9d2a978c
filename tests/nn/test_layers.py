"""Lensor's modules equal torch's, and a converted model is the model it was, computed another way."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import lensor.nn  # noqa: E402
from lensor.nn import ConvNd, ConvTransposeNd, FoldNd, UnfoldNd, convert  # noqa: E402

F = torch.nn.functional
SIZES = {1: (9,), 2: (8, 7), 3: (6, 5, 4)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def double(module: Any) -> Any:
    return module.double()


def assert_same_state(found: Any, expected: Any) -> None:
    found, expected = found.state_dict(), expected.state_dict()
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name


def assert_same_function(found: Any, expected: Any, *inputs: Any, tolerance: float = 1e-10) -> None:
    """The same output and the same gradients of inputs and parameters; both modules in double precision."""
    results = []
    for module in (found, expected):
        arrays = [array.clone().requires_grad_() for array in inputs]
        module.zero_grad()
        output = module(*arrays)
        output = output if isinstance(output, torch.Tensor) else output[0]
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
        (output * weights).sum().backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        results.append((output.detach(), [array.grad for array in arrays], gradients))
    (output, inputs_, gradients), (output2, inputs2, gradients2) = results
    torch.testing.assert_close(output, output2, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inputs_, inputs2, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == gradients2.keys()
    for name in gradients2:
        torch.testing.assert_close(
            gradients[name],
            gradients2[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# ---------------------------------------------------------------------------------------------------------- N-d modules
CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1, "dilation": 2, "groups": 2},
    {"padding": "same", "bias": False},
    {"padding": "valid", "groups": 4},
    {"padding": 1, "padding_mode": "circular", "stride": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "replicate"},
    {"padding": "same", "padding_mode": "circular", "dilation": 2},
]
TRANSPOSED: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
    {"stride": 3, "dilation": 2, "bias": False},
]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("hyper", CONVOLUTIONS, ids=str)
def test_conv_nd_is_torchs_convolution(dims: int, hyper: dict[str, Any]) -> None:
    torch.manual_seed(1)
    expected = double(getattr(torch.nn, f"Conv{dims}d")(4, 8, 3, **hyper))
    torch.manual_seed(1)
    found = double(ConvNd(4, 8, 3, **hyper, dims=dims))
    assert_same_state(found, expected)
    x = torch.randn(2, 4, *SIZES[dims], dtype=torch.double)
    assert_same_function(found, expected, x)
    assert_same_function(found, expected, x[0])


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("hyper", TRANSPOSED, ids=str)
def test_conv_transpose_nd_is_torchs_transposed_convolution(dims: int, hyper: dict[str, Any]) -> None:
    torch.manual_seed(1)
    expected = double(getattr(torch.nn, f"ConvTranspose{dims}d")(4, 8, 3, **hyper))
    torch.manual_seed(1)
    found = double(ConvTransposeNd(4, 8, 3, **hyper, dims=dims))
    assert_same_state(found, expected)
    x = torch.randn(2, 4, *(size // 2 for size in SIZES[dims]), dtype=torch.double)
    assert_same_function(found, expected, x)
    if hyper.get("stride", 1) > 1:
        size = tuple(s + 1 - output for s, output in zip(expected(x).shape[2:], expected.output_padding, strict=True))
        torch.testing.assert_close(found(x, output_size=size), expected(x, output_size=list(size)))
        full = (2, 8, *size)
        torch.testing.assert_close(found(x, full), expected(x, output_size=list(full)))
        with pytest.raises(ValueError, match="output_size"):
            found(x, [1] * dims)


def test_conv_transpose_nd_with_uneven_padding_reaches_an_output_size() -> None:
    layer = ConvTransposeNd(2, 3, (3,), stride=2, padding=((0, 1),))
    x = torch.randn(1, 2, 5)
    assert layer(x).shape == (1, 3, 10)
    assert layer(x, output_size=(11,)).shape == (1, 3, 11)


@pytest.mark.parametrize("dims", [4, 5])
def test_modules_of_four_and_five_dimensions(dims: int) -> None:
    x = torch.randn(2, 4, *(4, 3, 4, 3, 2)[:dims], dtype=torch.double)
    layer = double(ConvNd(4, 6, 2, padding=1, groups=2, dims=dims))
    back = double(ConvTransposeNd(6, 4, 2, padding=1, groups=2, bias=False, dims=dims))
    with torch.no_grad():
        layer.bias.zero_()
        back.weight.copy_(layer.weight)
    y = layer(x)
    assert y.shape == (2, 6, *(size + 1 for size in x.shape[2:]))
    v = torch.randn_like(y)
    torch.testing.assert_close((y * v).sum(), (x * back(v)).sum())
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert (layer.weight.abs() <= (2 * 2**dims) ** -0.5).all()
    unfold, fold = UnfoldNd(2, padding=1, dims=dims), FoldNd(x.shape[2:], 2, padding=1)
    patches = unfold(x)
    product = torch.einsum(
        "ngcl,goc->ngol", patches.reshape(2, 2, -1, patches.shape[-1]), layer.weight.reshape(2, 3, -1)
    )
    torch.testing.assert_close(product.reshape(y.shape), y)
    columns = torch.randn_like(patches)
    torch.testing.assert_close((patches * columns).sum(), (x * fold(columns)).sum())


def test_uneven_padding() -> None:
    layer = double(ConvNd(2, 3, 3, padding=((0, 2), (1, 3)), dims=2))
    x = torch.randn(2, 2, 5, 6, dtype=torch.double)
    expected = F.conv2d(F.pad(x, (1, 3, 0, 2)), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    again = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(again(x), expected)


def test_unfold_and_fold_are_torchs() -> None:
    x = torch.randn(2, 3, 7, 6)
    hyper: dict[str, Any] = {"kernel_size": (3, 2), "dilation": 2, "padding": 1, "stride": 2}
    patches = torch.nn.Unfold(**hyper)(x)
    torch.testing.assert_close(UnfoldNd(**hyper)(x), patches)
    torch.testing.assert_close(UnfoldNd(**hyper)(x[0]), patches[0])
    torch.testing.assert_close(FoldNd((7, 6), **hyper)(patches), torch.nn.Fold((7, 6), **hyper)(patches))
    torch.testing.assert_close(FoldNd((7, 6), **hyper)(patches[0]), torch.nn.Fold((7, 6), **hyper)(patches[0]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ConvNd(2, 3, 3), ("dims", "kernel_size")),
        (lambda: ConvNd(2, 3, (3, 3), dims=3), ("kernel_size", "2 entries", "dims=3")),
        (lambda: ConvNd(2, 3, 3, stride=(1, 2), dims=3), ("stride", "2 entries", "3")),
        (lambda: ConvNd(2, 3, 3, groups=2, dims=2), ("groups",)),
        (lambda: ConvNd(2, 2, 3, stride=2, padding="same", dims=2), ("same", "stride")),
        (lambda: ConvNd(2, 2, 3, padding_mode="mirror", dims=2), ("padding_mode", "mirror")),
        (lambda: ConvTransposeNd(2, 2, 3, padding="same", dims=2), ("padding", "'same'")),
        (lambda: ConvTransposeNd(2, 2, 3, padding_mode="circular", dims=2), ("zeros",)),
        (lambda: UnfoldNd(3), ("dims", "kernel_size")),
        (lambda: FoldNd(5, 3), ("dims", "output_size", "kernel_size")),
        (lambda: FoldNd((5, 5), (3,)), ("kernel_size", "1 entries", "dims=2")),
    ],
)
def test_wrong_settings(make: Callable[[], Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words)):
        make()


def test_modules_show_their_settings() -> None:
    assert repr(ConvNd(2, 4, 3, padding=1, dims=4)) == (
        "ConvNd(2, 4, kernel_size=(3, 3, 3, 3), stride=(1, 1, 1, 1), padding=(1, 1, 1, 1))"
    )
    assert "kernel_size=(2, 2, 2), dilation=(1, 1, 1), padding='same'" in repr(UnfoldNd(2, padding="same", dims=3))
    assert "output_size=(5, 6)" in repr(FoldNd((5, 6), 2))


@pytest.mark.parametrize(
    "module",
    [
        lensor.nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular", dtype=torch.double),
        lensor.nn.ConvTranspose1d(2, 4, 3, stride=2, output_padding=1, dtype=torch.double),
        ConvNd(2, 4, 3, padding="same", groups=2, dims=1, dtype=torch.double),
    ],
    ids=["Conv1d", "ConvTranspose1d", "ConvNd"],
)
def test_second_derivatives(module: Any) -> None:
    def function(x: Any, weight: Any, bias: Any) -> Any:
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    arrays = tuple(array.detach().clone().requires_grad_() for array in (module.weight, module.bias))
    x = torch.randn(1, 2, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *arrays))
    assert torch.autograd.gradgradcheck(function, (x, *arrays))


def test_autocast_computes_in_the_precision_torch_would() -> None:
    for module in (torch.nn.Conv2d(3, 4, 3), torch.nn.ConvTranspose2d(3, 4, 3)):
        converted = convert(module)
        x = torch.randn(2, 3, 6, 6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, found = module(x), converted(x)
            mixed = converted(x.bfloat16())
        assert found.dtype == expected.dtype == mixed.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        found.float().sum().backward()
        assert converted.weight.grad.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------- conversion
class Flat(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return x.flatten(1)


def small_model(dims: int) -> Any:
    """Convolutions of every kind between other layers; for inputs [batch, 3, *SIZES[dims]]."""
    conv, transposed = getattr(torch.nn, f"Conv{dims}d"), getattr(torch.nn, f"ConvTranspose{dims}d")
    norm, pool = getattr(torch.nn, f"BatchNorm{dims}d"), getattr(torch.nn, f"AdaptiveAvgPool{dims}d")
    return torch.nn.Sequential(
        conv(3, 8, 3, padding=1, padding_mode="reflect"),
        norm(8),
        torch.nn.ReLU(),
        conv(8, 8, 3, padding="same", groups=8, bias=False),
        torch.nn.Sequential(conv(8, 12, 1, groups=2), torch.nn.Tanh(), conv(12, 6, 2, stride=2, padding=1)),
        transposed(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        torch.nn.GELU(),
        conv(4, 4, 2, dilation=2, padding=2, padding_mode="circular"),
        conv(4, 6, 2, padding=1, padding_mode="replicate"),
        pool(2),
        Flat(),
        torch.nn.Linear(6 * 2**dims, 5),
    )


def convolutions(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, torch.nn.modules.conv._ConvNd)]


def assert_all_lensor(model: Any) -> None:
    assert convolutions(model)
    for module in convolutions(model):
        assert isinstance(module, (lensor.nn.layers.Convolution, lensor.nn.layers.TransposedConvolution))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_converted_model_is_the_same_function(dims: int) -> None:
    model = double(small_model(dims))
    converted = convert(model)
    assert converted is not model
    assert all(not isinstance(module, lensor.nn.layers.Convolution) for module in model.modules())
    assert_all_lensor(converted)
    for module, original in zip(convolutions(converted), convolutions(model), strict=True):
        assert isinstance(module, type(original))
        assert repr(module) == repr(original)
    assert_same_state(converted, model)
    x = torch.randn(2, 3, *SIZES[dims], dtype=torch.double)
    assert_same_function(converted, model, x)
    assert_same_function(converted.eval(), model.eval(), x)
    model.load_state_dict(converted.state_dict())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_saved_and_copied_models(dims: int) -> None:
    converted = convert(double(small_model(dims))).eval()
    x = torch.randn(2, 3, *SIZES[dims], dtype=torch.double)
    expected = converted(x)
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    buffer.seek(0)
    for again in (
        copy.deepcopy(converted),
        pickle.loads(pickle.dumps(converted)),
        torch.load(buffer, weights_only=False),
    ):
        assert_all_lensor(again)
        assert_same_state(again, converted)
        assert torch.equal(again(x), expected)


def test_conversion_in_place_keeps_the_objects() -> None:
    model = small_model(2)
    modules, parameters = list(model.modules()), list(model.parameters())
    assert convert(model, inplace=True) is model
    assert_all_lensor(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_a_single_convolution_is_a_model() -> None:
    layer = torch.nn.Conv2d(3, 4, 3)
    converted = convert(layer)
    assert type(converted) is lensor.nn.Conv2d
    assert type(layer) is torch.nn.Conv2d
    assert type(convert(layer, inplace=True)) is lensor.nn.Conv2d
    assert type(layer) is lensor.nn.Conv2d
    assert type(convert(layer)) is lensor.nn.Conv2d


def test_mode_dtype_device_and_frozen_parameters_are_kept() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, dtype=torch.bfloat16), torch.nn.Conv2d(4, 2, 1, device="meta"))
    model.eval()
    model[0].weight.requires_grad_(False)
    converted = convert(model)
    assert not converted.training
    assert not converted[0].training
    assert converted[0].weight.dtype == torch.bfloat16
    assert converted[1].weight.device.type == "meta"
    assert not converted[0].weight.requires_grad
    assert converted[0].bias.requires_grad


def test_hooks_are_kept() -> None:
    calls: list[str] = []
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    model[0].register_forward_pre_hook(lambda module, args: calls.append("before"))
    model[0].register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    model[0].register_full_backward_hook(lambda module, grad_input, grad_output: calls.append("backward"))
    converted = convert(model)
    converted(torch.randn(1, 3, 5, 5, requires_grad=True)).sum().backward()
    assert calls == ["before", "Conv2d", "backward"]
    assert type(converted[0]) is lensor.nn.Conv2d


def test_shared_modules_and_tied_weights_stay_shared() -> None:
    shared = torch.nn.Conv2d(4, 4, 3, padding=1)
    tied = torch.nn.Conv2d(4, 4, 3, padding=1)
    tied.weight = shared.weight
    model = double(torch.nn.Sequential(shared, torch.nn.ReLU(), shared, tied))
    converted = convert(model)
    assert converted[0] is converted[2]
    assert converted[3].weight is converted[0].weight
    assert_same_function(converted, model, torch.randn(2, 4, 5, 5, dtype=torch.double))


class Renamed(torch.nn.Conv2d):
    """A subclass that computes as torch does."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 2 * channels, 3, padding=1)
        self.note = "kept"

    def twice(self, x: Any) -> Any:
        return 2 * self(x)


class Standardised(torch.nn.Conv2d):
    """A subclass that computes in a way of its own."""

    def forward(self, x: Any) -> Any:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class OwnConvForward(torch.nn.Conv2d):
    """Another one."""

    def _conv_forward(self, input: Any, weight: Any, bias: Any) -> Any:
        return super()._conv_forward(2 * input, weight, bias)


def test_subclasses_that_compute_as_torch_are_converted() -> None:
    model = double(torch.nn.Sequential(Renamed(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = convert(model)
    assert isinstance(converted[0], Renamed)
    assert isinstance(converted[0], lensor.nn.layers.Convolution)
    assert converted[0].note == "kept"
    x = torch.randn(2, 3, 5, 5, dtype=torch.double)
    assert_same_function(converted, model, x)
    for again in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), convert(converted)):
        assert isinstance(again[0], Renamed)
        assert isinstance(again[0], lensor.nn.layers.Convolution)
        assert torch.equal(again[0].twice(x), 2 * converted(x))


@pytest.mark.parametrize("cls", [Standardised, OwnConvForward])
def test_subclasses_with_a_way_of_their_own_are_left_alone(cls: type) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ModuleDict({"own": cls(4, 4, 3)}))
    with pytest.warns(UserWarning, match=rf"'1\.own' is not converted: {cls.__name__} has its own") as caught:
        converted = convert(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert type(converted[0]) is lensor.nn.Conv2d
    assert type(converted[1]["own"]) is cls


def test_lazy_modules_are_refused_until_they_have_run() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.LazyConv2d(5, 3))
    with pytest.raises(ValueError, match=r"'1' is a lazy LazyConv2d.*run the model once"):
        convert(model, inplace=True)
    assert type(model[0]) is torch.nn.Conv2d
    model(torch.randn(1, 3, 5, 5))
    assert_all_lensor(convert(model))


def test_no_model() -> None:
    with pytest.raises(TypeError, match=r"model has type list, expected torch\.nn\.Module"):
        convert([torch.nn.Conv2d(1, 1, 1)])  # type: ignore[type-var]


def test_a_model_without_convolutions_stays_what_it_is() -> None:
    model = torch.nn.Linear(3, 4)
    x = torch.randn(2, 3)
    assert torch.equal(convert(model)(x), model(x))


# ----------------------------------------------------------------------------------------------------- parametrizations
def parametrized() -> Any:
    conv = torch.nn.Conv2d(3, 4, 3)
    torch.nn.utils.parametrizations.weight_norm(conv)
    torch.nn.utils.parametrizations.spectral_norm(other := torch.nn.ConvTranspose2d(4, 2, 3))
    return double(torch.nn.Sequential(conv, other, torch.nn.utils.parametrizations.weight_norm(Renamed(2)))).eval()


@pytest.mark.parametrize("inplace", [False, True])
def test_parametrizations_are_kept(inplace: bool) -> None:
    model = parametrized()
    expected = copy.deepcopy(model)
    converted = convert(model, inplace=inplace)
    assert_all_lensor(converted)
    for module, cls in zip(converted, (torch.nn.Conv2d, torch.nn.ConvTranspose2d, Renamed), strict=True):
        assert torch.nn.utils.parametrize.is_parametrized(module, "weight")
        assert isinstance(module, cls)
        assert isinstance(module.weight, torch.Tensor)
    assert_same_state(converted, expected)
    x = torch.randn(2, 3, 6, 6, dtype=torch.double)
    assert_same_function(converted, expected, x)
    if not inplace:
        assert all(not isinstance(m, lensor.nn.layers.Convolution) for m in model.modules())
        assert_same_function(model, expected, x)
    again = copy.deepcopy(converted)
    assert_all_lensor(again)
    assert torch.equal(again(x), converted(x))
    before = converted(x)
    for module in converted:
        torch.nn.utils.parametrize.remove_parametrizations(module, "weight")
    assert_all_lensor(converted)
    assert type(converted[0]) is lensor.nn.Conv2d
    torch.testing.assert_close(converted(x), before)
    assert torch.nn.utils.parametrize.is_parametrized(again[0], "weight")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_computed_by_hooks() -> None:
    model = double(torch.nn.Sequential(torch.nn.utils.weight_norm(torch.nn.Conv2d(3, 4, 3))))
    x = torch.randn(2, 3, 5, 5, dtype=torch.double)
    expected = model(x).detach()
    copied = convert(model)
    assert copied[0].weight.grad_fn is not None
    torch.testing.assert_close(copied(x), expected)
    convert(model, inplace=True)
    assert_all_lensor(model)
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        model[0].weight_g.mul_(2)
    model[0].bias.data.zero_()
    expected_weight = (
        model[0].weight_v * model[0].weight_g / model[0].weight_v.flatten(1).norm(dim=1)[:, None, None, None]
    )
    torch.testing.assert_close(model(x), F.conv2d(x, expected_weight))


def test_pruned_models() -> None:
    model = double(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)))
    prune = importlib.import_module("torch.nn.utils.prune")
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    x = torch.randn(2, 3, 5, 5, dtype=torch.double)
    expected = model(x).detach()
    convert(model, inplace=True)
    torch.testing.assert_close(model(x), expected)


# ---------------------------------------------------------------------------------------------------- models people use
def resnet() -> Any:
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck", num_labels=5
    )
    return transformers.ResNetForImageClassification(config)


def convnext() -> Any:
    import transformers

    config = transformers.ConvNextConfig(
        num_stages=2, hidden_sizes=[8, 16], depths=[1, 2], num_labels=5, layer_scale_init_value=0.5
    )
    return transformers.ConvNextForImageClassification(config)


def mobilenet() -> Any:
    import transformers

    config = transformers.MobileNetV2Config(
        depth_multiplier=0.25, min_depth=8, image_size=32, output_stride=32, num_labels=5, finegrained_output=False
    )
    return transformers.MobileNetV2ForImageClassification(config)


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model(pixel_values=x).logits


@pytest.mark.parametrize("make", [resnet, convnext, mobilenet])
def test_models_of_transformers(make: Callable[[], Any]) -> None:
    model = double(Logits(make()).eval())
    converted = convert(model)
    assert_all_lensor(converted)
    assert_same_state(converted, model)
    assert_same_function(converted, model, torch.randn(2, 3, 32, 32, dtype=torch.double), tolerance=1e-9)


def test_a_step_of_training() -> None:
    model = double(small_model(2))
    converted = convert(model)
    x, y = torch.randn(4, 3, *SIZES[2], dtype=torch.double), torch.randint(5, (4,))
    for module in (model, converted):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
    for found, expected in zip(converted.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_memory_format_of_channels_last() -> None:
    model = double(small_model(2))
    converted = convert(model).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, *SIZES[2], dtype=torch.double).to(memory_format=torch.channels_last)
    assert_same_function(converted, model, x)


def test_deterministic_algorithms() -> None:
    converted = convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ConvTranspose2d(4, 2, 3, 2)))
    x = torch.randn(2, 3, 6, 6)
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            converted.zero_grad()
            y = converted(x)
            y.square().sum().backward()
            results.append([y.detach(), *(parameter.grad.clone() for parameter in converted.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_threads_at_once() -> None:
    lensor.clear_caches()
    converted = convert(double(small_model(2))).eval()
    x = torch.randn(8, 3, *SIZES[2], dtype=torch.double)
    expected = [converted(part).detach() for part in x.split(2)]
    lensor.clear_caches()
    with ThreadPoolExecutor(max_workers=2) as pool:
        for found, y in zip(pool.map(converted, x.split(2)), expected, strict=True):
            torch.testing.assert_close(found.detach(), y)


def test_per_example_gradients_by_torch_func() -> None:
    model = double(small_model(1)).eval()
    converted = convert(model)
    x = torch.randn(3, 3, *SIZES[1], dtype=torch.double)

    def gradients(module: Any) -> Any:
        parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
        buffers = dict(module.named_buffers())

        def loss(parameters: Any, example: Any) -> Any:
            return torch.func.functional_call(module, (parameters, buffers), (example[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)

    found, expected = gradients(converted), gradients(model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)
