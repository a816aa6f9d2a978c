"""Specifications against torch's modules: sizes, layouts, padding, and what is refused."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lensor.pattern import IndexPattern
from lensor.spec import ConvSpec

torch = pytest.importorskip("torch")
nn = torch.nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MODES = ("zeros", "circular", "reflect", "replicate")
REFUSED = (ValueError, RuntimeError)


@st.composite
def hyper_parameters(draw: st.DrawFn, transposed: bool) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """(input_size, kernel_size, the rest), in torch's terms; not all of them are valid."""
    ndim = draw(st.integers(1, 3))

    def each(first: int, last: int) -> Any:
        number = st.integers(first, last)
        return draw(number | st.tuples(*[number] * ndim))

    groups = draw(st.integers(1, 3))
    hyper: dict[str, Any] = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "stride": each(1, 3),
        "padding": each(0, 3),
        "dilation": each(1, 3),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        hyper["output_padding"] = each(0, 2)
    else:
        hyper["padding_mode"] = draw(st.sampled_from(MODES))
        if draw(st.booleans()):
            hyper["padding"] = draw(st.sampled_from(("same", "valid")))
        if hyper["padding"] == "same" and draw(st.booleans()):
            hyper["stride"] = 1
    sizes = st.tuples(*[st.integers(1, 7)] * ndim)
    return draw(sizes), draw(st.tuples(*[st.integers(1, 3)] * ndim)), hyper


def check_against_torch(
    size: tuple[int, ...], kernel: tuple[int, ...], hyper: dict[str, Any], transposed: bool
) -> None:
    classes = CONV_TRANSPOSE if transposed else CONV
    channels = hyper.pop("in_channels"), hyper.pop("out_channels")
    try:
        module = classes[len(size)](*channels, kernel, **hyper)
        shape = tuple(module(torch.zeros(1, channels[0], *size)).shape[1:])
        refused = 0 in shape  # which torch lets some transposed convolutions have
    except REFUSED:
        refused = True
    if refused:
        with pytest.raises(ValueError):
            ConvSpec(*channels, size, kernel, transposed=transposed, **hyper)
        return
    spec = ConvSpec(*channels, size, kernel, transposed=transposed, **hyper)
    assert spec.output_shape == shape
    assert spec.input_shape == (channels[0], *size)
    assert spec.weight_shape == tuple(module.weight.shape)
    assert ConvSpec.from_module(module, size) == spec


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(hyper_parameters(transposed=False))
def test_convolutions_as_in_torch(drawn: tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]) -> None:
    check_against_torch(*drawn, transposed=False)


@given(hyper_parameters(transposed=True))
def test_transposed_convolutions_as_in_torch(drawn: tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]) -> None:
    check_against_torch(*drawn, transposed=True)


@given(
    st.sampled_from(MODES),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(("same", 0, 1, 2)),
)
def test_patterns_are_what_the_module_does(mode: str, kernel: int, stride: int, dilation: int, padding: Any) -> None:
    size = 7
    module = nn.Conv1d(
        1, 1, kernel, 1 if padding == "same" else stride, padding, dilation, padding_mode=mode, bias=False
    ).double()
    try:
        spec = ConvSpec.from_module(module, size)
    except ValueError:
        with pytest.raises(REFUSED):
            module(torch.zeros(1, 1, size, dtype=torch.float64))
        return
    basis = torch.eye(size, dtype=torch.float64)[:, None]
    expected = module(basis)[:, 0].detach().numpy()
    weight = module.weight.detach().numpy()[0, 0]
    found = np.einsum("iok,k->io", _summed_pattern(spec.patterns[0]), weight)
    np.testing.assert_allclose(found, expected, atol=1e-14)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2))
def test_transposed_patterns_are_what_the_module_does(
    kernel: int, stride: int, dilation: int, padding: int, extra: int
) -> None:
    size = 4
    module = nn.ConvTranspose1d(1, 1, kernel, stride, padding, extra, dilation=dilation, bias=False).double()
    try:
        spec = ConvSpec.from_module(module, (size,))
    except ValueError:
        with pytest.raises(REFUSED):
            module(torch.zeros(1, 1, size, dtype=torch.float64))
        return
    (pattern,) = spec.patterns
    assert (pattern.input_size, pattern.output_size) == (*spec.output_size, size)
    expected = module(torch.eye(size, dtype=torch.float64)[:, None])[:, 0].detach().numpy()
    weight = module.weight.detach().numpy()[0, 0]
    found = np.einsum("iok,k->oi", _summed_pattern(pattern), weight)
    np.testing.assert_allclose(found, expected, atol=1e-14)


def _summed_pattern(pattern: IndexPattern) -> np.ndarray:
    return pattern.materialize().astype(float)


# ---------------------------------------------------------------------------------------------------------- one form
def test_values_are_stored_in_one_form() -> None:
    spec = ConvSpec(np.int64(4), 8, [28, 30], 3, stride=np.int32(2), padding=[1, (0, 2)], groups=2)
    assert spec.input_size == (28, 30)
    assert (spec.kernel_size, spec.stride, spec.dilation, spec.output_padding) == ((3, 3), (2, 2), (1, 1), (0, 0))
    assert spec.padding == ((1, 1), (0, 2))
    assert all(type(size) is int for size in (spec.in_channels, *spec.stride, *spec.padding[0]))
    assert spec.ndim == 2
    assert spec.output_size == (14, 15)
    assert spec.patterns == (
        IndexPattern(28, 3, stride=2, padding=1),
        IndexPattern(30, 3, stride=2, padding=(0, 2)),
    )


def test_forms_of_padding() -> None:
    def padding(form: Any, *size: int, **hyper: Any) -> tuple:
        return ConvSpec(1, 1, size or (9, 9), 4, padding=form, **hyper).padding

    assert padding(1) == padding((1, 1)) == padding([1, 1]) == padding(((1, 1), (1, 1))) == ((1, 1), (1, 1))
    assert padding((1, 2)) == ((1, 1), (2, 2))
    assert padding(((1, 2), 0)) == ((1, 2), (0, 0))
    assert padding("valid") == ((0, 0), (0, 0))
    assert padding("same") == ((1, 2), (1, 2))
    assert padding("same", dilation=(1, 3)) == ((1, 2), (4, 5))
    assert padding(((1, 2),), 9) == ((1, 2),)
    assert padding((1,), 9) == ((1, 1),)


def test_an_int_is_one_dimension() -> None:
    assert ConvSpec(1, 2, 9, 3) == ConvSpec(1, 2, (9,), (3,))


def test_linear_layer() -> None:
    spec = ConvSpec(3, 5, (), ())
    assert (spec.ndim, spec.output_size, spec.patterns, spec.kind) == (0, (), (), "dense")
    assert (spec.weight_shape, spec.input_shape, spec.output_shape) == ((5, 3), (3,), (5,))
    assert ConvSpec.from_module(nn.Linear(3, 5)) == replace(spec, bias=True)
    assert ConvSpec.from_module(nn.Linear(3, 5, bias=False), ()) == spec


SPECS = [
    ConvSpec(4, 8, (), (), bias=True),
    ConvSpec(4, 8, 9, 3),
    ConvSpec(4, 8, (9,), 3, padding=((1, 2),)),
    ConvSpec(4, 8, (9, 9), (3, 2), stride=(1, 2), padding=(1, 0), padding_mode="reflect", groups=2),
    ConvSpec(4, 8, (9, 9), 3, padding=((1, 0), (1, 0)), dilation=2, bias=True),
    ConvSpec(4, 8, (9, 9), (3, 4), padding="same"),
    ConvSpec(4, 8, (5, 6), 3, stride=2, transposed=True, output_padding=(1, 0)),
    ConvSpec(4, 8, (5, 6, 7, 8), 2),
]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_repr_pickle_hash(spec: ConvSpec) -> None:
    for other in (eval(repr(spec)), pickle.loads(pickle.dumps(spec)), replace(spec)):
        assert other == spec
        assert hash(other) == hash(spec)
        assert other.patterns == spec.patterns


def test_repr_has_what_is_not_default() -> None:
    assert repr(SPECS[1]) == "ConvSpec(4, 8, (9,), 3)"
    assert repr(SPECS[3]) == (
        "ConvSpec(4, 8, (9, 9), (3, 2), stride=(1, 2), padding=(1, 0), groups=2, padding_mode='reflect')"
    )
    assert repr(SPECS[6]) == "ConvSpec(4, 8, (5, 6), 3, stride=2, transposed=True, output_padding=(1, 0))"


def test_frozen() -> None:
    spec = ConvSpec(4, 8, 9, 3)
    with pytest.raises(FrozenInstanceError):
        spec.stride = (2,)  # type: ignore[misc]
    assert not hasattr(spec, "__dict__")


# -------------------------------------------------------------------------------------------------------------- kinds
DENSE, DOWN, GENERAL = (9, 3, 3), (9, 2, 3), (9, 3, 2)  # input size, kernel size, stride


@pytest.mark.parametrize(
    "dims", [dims for n in (1, 2, 3) for dims in itertools.product((DENSE, DOWN, GENERAL), repeat=n)]
)
def test_kinds(dims: tuple[tuple[int, int, int], ...]) -> None:
    size, kernel, stride = zip(*dims, strict=True)
    found = ConvSpec(1, 1, size, kernel, stride).kind
    if all(dim == DENSE for dim in dims):
        assert found == "dense"
    elif all(dim in (DENSE, DOWN) for dim in dims):
        assert found == "down-sampling"
    else:
        assert found == ("general" if all(dim == GENERAL for dim in dims) else "mixed-dense")


def test_kinds_of_the_paper() -> None:
    assert ConvSpec(192, 192, (17, 17), (1, 7), padding=(0, 3)).kind == "mixed-dense"  # InceptionV3
    assert ConvSpec(64, 128, (56, 56), 1, stride=2).kind == "down-sampling"  # ResNet18
    assert ConvSpec(128, 256, (56, 56), 2, stride=2).kind == "dense"  # ConvNeXt
    assert ConvSpec(64, 64, (56, 56), 3, padding=1).kind == "general"
    assert ConvSpec(8, 4, (5, 5), 2, stride=2, transposed=True).kind == "dense"


# -------------------------------------------------------------------------------------------------------- from_module
class Mine(nn.Conv2d):
    """A subclass whose class says nothing of torch."""


class Linear(nn.Module):
    """A class that shares torch's name only."""


def test_from_subclass() -> None:
    module = Mine(2, 4, (3, 2), padding=(1, 0), groups=2, padding_mode="circular")
    expected = ConvSpec(2, 4, (8, 9), (3, 2), padding=(1, 0), groups=2, padding_mode="circular", bias=True)
    assert ConvSpec.from_module(module, (8, 9)) == expected


def test_from_lazy_module() -> None:
    module = nn.LazyConv1d(4, 3, padding="same")
    with pytest.raises(ValueError, match="module is a LazyConv1d whose in_channels is not known yet"):
        ConvSpec.from_module(module, (9,))
    module(torch.zeros(1, 2, 9))
    assert ConvSpec.from_module(module, (9,)) == ConvSpec(2, 4, (9,), 3, padding=1, bias=True)
    linear = nn.LazyLinear(4)
    with pytest.raises(ValueError, match="module is a LazyLinear whose in_features is not known yet"):
        ConvSpec.from_module(linear)
    linear(torch.zeros(1, 3))
    assert ConvSpec.from_module(linear) == ConvSpec(3, 4, (), (), bias=True)
    transposed = nn.LazyConvTranspose2d(4, 3, stride=2, output_padding=1)
    transposed(torch.zeros(1, 2, 5, 5))
    assert ConvSpec.from_module(transposed, (5, 5)) == ConvSpec(
        2, 4, (5, 5), 3, stride=2, bias=True, transposed=True, output_padding=1
    )


@pytest.mark.parametrize(
    "module", [nn.BatchNorm2d(3), nn.Bilinear(2, 2, 2), nn.Unfold(3), Linear(), object(), nn.Conv2d]
)
def test_from_anything_else(module: Any) -> None:
    with pytest.raises(TypeError, match=r"module has type .*, expected a torch.nn.Conv1d to Conv3d, ConvTranspose1d"):
        ConvSpec.from_module(module, (9, 9))


def test_from_module_of_another_dimension() -> None:
    with pytest.raises(ValueError, match=r"input_size is .* entries, expected 2, one per spatial dimension of Conv2d"):
        ConvSpec.from_module(nn.Conv2d(1, 1, 3), 9)
    with pytest.raises(ValueError, match=r"input_size is .* entries, expected 0"):
        ConvSpec.from_module(nn.Linear(1, 1), (9,))


# ------------------------------------------------------------------------------------------------------------- errors
VALUE_ERRORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "input_size": ({"input_size": (9, 0)}, ("input_size[1] is 0", "positive")),
    "kernel_size": ({"kernel_size": 0}, ("kernel_size", "0", "positive")),
    "stride": ({"stride": (1, 0)}, ("stride[1] is 0", "positive")),
    "dilation": ({"dilation": -1}, ("dilation", "-1", "positive")),
    "groups": ({"groups": 0}, ("groups", "0", "positive")),
    "in_channels": ({"in_channels": 0}, ("in_channels", "0", "positive")),
    "groups and in_channels": ({"in_channels": 3, "groups": 2}, ("in_channels", "groups=2", "3")),
    "groups and out_channels": ({"out_channels": 9, "groups": 2}, ("out_channels", "groups=2", "9")),
    "length of kernel_size": ({"kernel_size": (3, 3, 3)}, ("kernel_size is (3, 3, 3)", "2 entries")),
    "length of stride": ({"stride": (1,)}, ("stride is (1,)", "2 entries")),
    "length of padding": ({"padding": (1, 1, 1)}, ("padding is (1, 1, 1)", "2 entries")),
    "length of padding's sides": ({"padding": ((1, 2, 3), 1)}, ("padding", "(left, right)", "(1, 2, 3)")),
    "sides of one dimension": (
        {"input_size": 9, "padding": (1, 2)},
        ("padding is (1, 2)", "1 entry", "((left, right),)"),
    ),
    "negative padding": ({"padding": -1}, ("padding", "-1", "negative")),
    "negative side": ({"padding": ((0, -1), (0, 0))}, ("padding", "-1", "negative")),
    "padding's name": ({"padding": "full"}, ("padding", "'full'", "'same'", "'valid'")),
    "same with stride": ({"padding": "same", "stride": (1, 2)}, ("'same'", "stride=(1, 2)")),
    "kernel": ({"kernel_size": (3, 10)}, ("kernel_size=(3, 10)", "dimension 1", "10 positions", "at most 9")),
    "dilated kernel": ({"dilation": (5, 1)}, ("dimension 0", "dilation=5", "11 positions", "at most 9", "(9, 9)")),
    "padding_mode": ({"padding_mode": "mirror"}, ("padding_mode", "'mirror'", "'reflect'")),
    "reflect": ({"padding": (1, 9), "padding_mode": "reflect"}, ("reflect", "(9, 9)", "input_size=9", "dimension 1")),
    "circular": ({"padding": 10, "padding_mode": "circular"}, ("circular", "(10, 10)", "input_size=9", "dimension 0")),
    "output_padding": ({"output_padding": 1}, ("output_padding", "(1, 1)", "transposed=True")),
    "negative output_padding": ({"transposed": True, "output_padding": -1}, ("output_padding", "-1", "negative")),
    "large output_padding": (
        {"transposed": True, "stride": (2, 3), "output_padding": (2, 2)},
        ("output_padding is (2, 2)", "stride=(2, 3)", "dilation=(1, 1)"),
    ),
    "transposed same": ({"transposed": True, "padding": "same"}, ("padding", "'same'", "transposed")),
    "transposed mode": (
        {"transposed": True, "padding_mode": "circular"},
        ("padding_mode", "'circular'", "'zeros'", "transposed"),
    ),
    "transposed output": (
        {"transposed": True, "input_size": (1, 9), "padding": 2},
        ("output size", "at least 1", "is -1", "dimension 0", "input_size=(1, 9)"),
    ),
    "linear layer's kernel": ({"input_size": ()}, ("kernel_size", "()", "3")),
}

TYPE_ERRORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "input_size": ({"input_size": (9, 9.0)}, ("input_size", "9.0", "integer")),
    "input_size's type": ({"input_size": 9.0}, ("input_size", "9.0", "integer")),
    "kernel_size": ({"kernel_size": None}, ("kernel_size", "None", "integer")),
    "stride": ({"stride": "2"}, ("stride", "'2'", "integer")),
    "channels": ({"in_channels": True}, ("in_channels", "True", "integer", "bool")),
    "groups": ({"groups": 1.5}, ("groups", "1.5", "integer")),
    "padding": ({"padding": (1, 0.5)}, ("padding", "0.5", "integer")),
    "padding's side": ({"padding": ((1, None), 0)}, ("padding", "None", "integer")),
    "output_padding": ({"output_padding": False}, ("output_padding", "False", "integer")),
    "bias": ({"bias": 1}, ("bias", "1", "bool")),
    "bias's name": ({"bias": "yes"}, ("bias", "'yes'", "bool")),
    "transposed": ({"transposed": None}, ("transposed", "None", "bool")),
}


@pytest.mark.parametrize(("arguments", "words"), VALUE_ERRORS.values(), ids=VALUE_ERRORS)
def test_value_errors(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        _spec(arguments)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(("arguments", "words"), TYPE_ERRORS.values(), ids=TYPE_ERRORS)
def test_type_errors(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(TypeError) as caught:
        _spec(arguments)
    assert [word for word in words if word not in str(caught.value)] == []


def _spec(arguments: dict[str, Any]) -> ConvSpec:
    return ConvSpec(**{"in_channels": 4, "out_channels": 8, "input_size": (9, 9), "kernel_size": 3, **arguments})
