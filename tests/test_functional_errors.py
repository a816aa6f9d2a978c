"""Wrong arguments raise before anything is computed, naming the argument, what was found and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest

from lensor import dispatch, functional
from lensor.functional import (
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


def ones(*shape: int, dtype: Any = float) -> Any:
    return numpy.ones(shape, dtype)


X, W = ones(2, 4, 8, 8), ones(6, 4, 3, 3)
V = ones(2, 6, 6, 6)
S = ones(3, 2, 6, 6, 6)

VALUE_ERRORS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    # ranks and shapes
    "input rank": (lambda: conv(ones(4, 8), W), ("input", "(4, 8)", "4 axes", "3 axes")),
    "input rank too high": (lambda: conv(ones(1, 2, 4, 8, 8), W), ("input", "5 axes", "4 axes")),
    "weight rank": (lambda: conv(X, ones(6, 4)), ("weight", "(6, 4)", "at least 3")),
    "channels": (lambda: conv(ones(2, 5, 8, 8), W), ("input", "5 channels", "expected 4", "weight")),
    "channels of groups": (lambda: conv(X, W, groups=2), ("input", "4 channels", "expected 8", "groups=2")),
    "groups divide c_out": (lambda: conv(X, ones(6, 1, 3, 3), groups=4), ("weight", "6 channels", "groups=4")),
    "groups positive": (lambda: conv(X, W, groups=0), ("groups", "0", "positive")),
    "bias": (lambda: conv(X, W, ones(5)), ("bias", "(5,)", "(6,)")),
    "bias rank": (lambda: conv(X, W, ones(6, 1)), ("bias", "(6, 1)", "(6,)")),
    "transposed channels": (lambda: conv_transpose(X, W), ("input", "4 channels", "expected 6", "weight")),
    "transposed groups": (lambda: conv_transpose(X, ones(4, 6, 3, 3), groups=3), ("weight", "4 channels", "groups=3")),
    "transposed bias": (lambda: conv_transpose(X, ones(4, 3, 3, 3), ones(3), groups=2), ("bias", "(3,)", "(6,)")),
    "transposed weight rank": (lambda: conv_transpose(X, ones(4, 3)), ("weight", "(4, 3)", "at least 3")),
    "cotangent": (
        lambda: conv_input_vjp(X.shape, W, ones(2, 6, 6, 5)),
        ("grad_output", "(2, 6, 6, 5)", "(2, 6, 6, 6)"),
    ),
    "cotangent's batch": (lambda: conv_weight_vjp(X, W.shape, ones(3, 6, 6, 6)), ("grad_output", "(2, 6, 6, 6)")),
    "cotangent with a batch": (lambda: conv_weight_vjp(X[0], W.shape, V), ("grad_output", "(6, 6, 6)")),
    "cotangent without a batch": (lambda: conv_weight_vjp(X, W.shape, V[0]), ("grad_output", "(2, 6, 6, 6)")),
    "input_size": (lambda: conv_input_vjp((8, 8), W, V), ("input_size is (8, 8) with 2 entries", "4 entries")),
    "input_size channels": (
        lambda: conv_input_vjp((2, 3, 8, 8), W, V),
        ("input_size is (2, 3, 8, 8) with 3 channels", "expected 4"),
    ),
    "weight_size": (
        lambda: conv_weight_vjp(X, (6, 4), V),
        ("weight_size is (6, 4) with 2 entries", "at least 3 entries"),
    ),
    "weight_size channels": (lambda: conv_weight_vjp(X, (6, 3, 3, 3), V), ("input", "4 channels", "expected 3")),
    "per example unbatched": (
        lambda: conv_weight_vjp_per_example(X[0], W.shape, V[0]),
        ("input", "(4, 8, 8)", "[batch, c_in, *input_size]"),
    ),
    "per example cotangent": (
        lambda: conv_weight_vjp_per_example(X, W.shape, ones(2, 6, 5, 6)),
        ("grad_output", "(2, 6, 5, 6)", "(2, 6, 6, 6)"),
    ),
    "unfold rank": (lambda: unfold(ones(8, 8), (3, 3)), ("input", "(8, 8)", "4 axes")),
    "unfold rank by int": (lambda: unfold(ones(8, 8), 3), ("input", "(8, 8)", "[batch, c_in, *input_size]")),
    "fold rank": (lambda: fold(ones(1, 2, 3, 4), 5, 2), ("input", "4 axes", "3 axes")),
    "fold positions": (lambda: fold(ones(1, 8, 17), (5, 5), (2, 2)), ("input", "17 positions", "expected 16")),
    "fold rows": (lambda: fold(ones(1, 7, 16), (5, 5), (2, 2)), ("input", "7 rows", "multiple of 4", "kernel_size")),
    "factor's groups": (lambda: kfac_input_factor(X, 3, groups=3), ("input", "4 channels", "groups=3")),
    "factor unbatched": (lambda: kfac_input_factor(X[0], (3, 3)), ("input", "(4, 8, 8)", "[batch, c_in, *input_size]")),
    "output factor rank": (lambda: kfac_output_factor(ones(2, 6, 6)), ("grad_output", "3 axes", "[v, batch, c_out")),
    "output factor groups": (lambda: kfac_output_factor(S, 4), ("grad_output", "6 channels", "groups=4")),
    "diagonal's root": (lambda: ggn_diagonal(X, W.shape, V), ("sqrt_ggn", "(2, 6, 6, 6)", "(v, 2, 6, 6, 6)")),
    "diagonal's root shape": (lambda: ggn_diagonal(X, W.shape, S[..., 1:]), ("sqrt_ggn", "(3, 2, 6, 6, 5)")),
    "Gram root": (lambda: ggn_gram(X, W.shape, S[:, :1]), ("sqrt_ggn", "(3, 1, 6, 6, 6)", "(v, 2, 6, 6, 6)")),
    # hyper-parameters
    "stride zero": (lambda: conv(X, W, stride=0), ("stride", "0")),
    "stride length": (lambda: conv(X, W, stride=(1, 1, 1)), ("stride is (1, 1, 1)", "2 entries")),
    "dilation zero": (lambda: conv(X, W, dilation=0), ("dilation", "0")),
    "padding name": (lambda: conv(X, W, padding="full"), ("padding", "'full'", "same", "valid")),
    "padding length": (lambda: conv(X, W, padding=(1, 1, 1)), ("padding is (1, 1, 1)", "2 entries")),
    "same with stride": (lambda: conv(X, W, stride=2, padding="same"), ("same", "stride")),
    "same with one stride": (lambda: unfold(X, 3, stride=(1, 2), padding="same"), ("same", "stride")),
    "padding mode": (lambda: conv(X, W, padding=1, padding_mode="mirror"), ("padding_mode", "'mirror'", "reflect")),
    "reflect": (lambda: conv(X, W, padding=8, padding_mode="reflect"), ("padding", "reflect", "8")),
    "circular": (lambda: conv(X, W, padding=(9, 0), padding_mode="circular"), ("padding", "circular", "9")),
    "kernel zero": (lambda: unfold(X, 0), ("kernel_size", "0")),
    "kernel too large": (lambda: conv(X, ones(6, 4, 9, 3)), ("input", "(8, 8)", "(9, 3)")),
    "dilated kernel too large": (lambda: unfold(X, 3, dilation=4), ("input", "(8, 8)", "(3, 3)")),
    "no positions": (lambda: conv(ones(2, 4, 0, 8), W, padding=2), ("input", "(0, 8)", "at least 1")),
    "factor without positions": (lambda: kfac_input_factor(ones(2, 4, 2, 8), 3), ("input", "(2, 8)")),
    "transposed without positions": (
        lambda: conv_transpose(ones(2, 4, 1), ones(4, 2, 1), padding=1),
        ("input", "(1,)", "output size"),
    ),
    "output_padding": (
        lambda: conv_transpose(X, ones(4, 6, 3, 3), stride=2, output_padding=2),
        ("output_padding", "2", "stride"),
    ),
    "output_padding negative": (
        lambda: conv_transpose(X, ones(4, 6, 3, 3), stride=2, output_padding=-1),
        ("output_padding", "-1"),
    ),
    "output_padding of unfold_transpose": (lambda: unfold_transpose(X, 3, output_padding=1), ("output_padding", "1")),
    "transposed same": (lambda: conv_transpose(X, ones(4, 6, 3, 3), padding="same"), ("padding", "'same'", "ints")),
    "transposed factor same": (lambda: kfac_input_factor(X, 3, transposed=True, padding="same"), ("padding", "'same'")),
    "transposed factor mode": (
        lambda: kfac_input_factor(X, 3, transposed=True, padding=1, padding_mode="circular"),
        ("padding_mode", "circular", "zeros"),
    ),
    # choices
    "approx": (lambda: kfac_input_factor(X, 3, approx="mean"), ("approx", "'mean'", "'expand'", "'reduce'")),
    "approx of output": (lambda: kfac_output_factor(S, approx="mean"), ("approx", "'mean'", "'expand'")),
    "form": (lambda: kfac_input_factor(X, 3, approx="reduce", form="square"), ("form", "'square'", "'root'")),
    "root of expand": (lambda: kfac_input_factor(X, 3, form="root"), ("form='root'", "'expand'", "'reduce'")),
    "convention": (lambda: kfac_input_factor(X, 3, convention="mine"), ("convention", "'mine'", "'paper'")),
    "convention's approx": (
        lambda: kfac_input_factor(X, 3, approx="reduce", convention="backpack"),
        ("convention='backpack'", "'reduce'"),
    ),
    "convention's groups": (
        lambda: kfac_input_factor(X, 3, groups=2, convention="curvlinops"),
        ("convention='curvlinops'", "groups=2"),
    ),
    "factor of an empty batch": (
        lambda: kfac_input_factor(ones(0, 4, 8, 8), 3),
        ("input", "(0, 4, 8, 8)", "empty batch"),
    ),
}

TYPE_ERRORS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "list": (lambda: conv([[[1.0]]], W), ("list",)),
    "integers": (lambda: conv(X.astype(int), W.astype(int)), ("input", "int64", "float")),
    "booleans": (lambda: unfold(X.astype(bool), 3), ("input", "bool", "float")),
    "integer weight": (lambda: conv(X, W.astype(numpy.int32)), ("weight", "int32", "float")),
    "mixed dtypes": (lambda: conv(X, W.astype(numpy.float32)), ("input", "float64", "weight", "float32")),
    "mixed dtype of bias": (lambda: conv(X, W, ones(6, dtype=numpy.float16)), ("bias", "float16", "float64")),
    "mixed cotangent": (
        lambda: conv_weight_vjp(X, W.shape, V.astype(numpy.float32)),
        ("input", "float64", "grad_output", "float32"),
    ),
    "complex input factor": (lambda: kfac_input_factor(X + 0j, 3), ("input", "complex")),
    "complex output factor": (lambda: kfac_output_factor(S + 0j), ("grad_output", "complex")),
    "complex diagonal": (lambda: ggn_diagonal(X + 0j, W.shape, S + 0j), ("input", "complex")),
    "complex Gram": (lambda: ggn_gram(X + 0j, W.shape, S + 0j), ("input", "complex")),
    "groups": (lambda: conv(X, W, groups=1.5), ("groups", "1.5", "integer")),
    "stride": (lambda: conv(X, W, stride=1.5), ("stride", "1.5")),
    "input_size": (lambda: conv_input_vjp(8, W, V), ("input_size", "8", "sequence")),
    "output_size": (lambda: fold(ones(1, 4, 16), (5.0, 5.0), 2), ("output_size", "5.0")),
}


def mentions(words: tuple[str, ...]) -> str:
    """A pattern that matches texts with all the words."""
    return "(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words)


@pytest.mark.parametrize(("call", "words"), VALUE_ERRORS.values(), ids=VALUE_ERRORS)
def test_value_errors(call: Callable[[], Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=mentions(words)):
        call()


@pytest.mark.parametrize(("call", "words"), TYPE_ERRORS.values(), ids=TYPE_ERRORS)
def test_type_errors(call: Callable[[], Any], words: tuple[str, ...]) -> None:
    with pytest.raises(TypeError, match=mentions(words)):
        call()


def test_a_wrong_call_is_wrong_every_time_and_not_remembered() -> None:
    before = len(dispatch._calls)
    for _ in range(2):
        with pytest.raises(ValueError, match="bias"):
            conv(X, W, ones(5))
    assert len(dispatch._calls) == before


def test_the_transposed_pair_takes_no_padding_mode() -> None:
    with pytest.raises(TypeError, match="padding_mode"):
        conv_transpose(X, ones(4, 6, 3, 3), padding_mode="zeros")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="padding_mode"):
        unfold_transpose(X, 3, padding_mode="zeros")  # type: ignore[call-arg]


class TestTorch:
    """What only torch's arrays can get wrong, and where torch itself raises."""

    @pytest.fixture(autouse=True)
    def _torch(self) -> None:
        self.torch = pytest.importorskip("torch")

    def test_two_frameworks(self) -> None:
        with pytest.raises(TypeError, match=mentions(("numpy", "torch"))):
            conv(self.torch.ones(2, 4, 8, 8), W)

    def test_mixed_dtypes(self) -> None:
        x, w = self.torch.ones(2, 4, 8, 8), self.torch.ones(6, 4, 3, 3, dtype=self.torch.bfloat16)
        with pytest.raises(TypeError, match=r"input has dtype float32 and weight has dtype bfloat16"):
            conv(x, w)

    def test_integers(self) -> None:
        x = self.torch.ones(2, 4, 8, 8, dtype=self.torch.int64)
        with pytest.raises(TypeError, match=r"input has dtype int64, expected a floating-point dtype"):
            unfold(x, 3)

    def test_complex_curvature(self) -> None:
        x = self.torch.ones(2, 4, 8, 8, dtype=self.torch.complex64)
        with pytest.raises(TypeError, match="complex64"):
            kfac_input_factor(x, 3)

    def test_mixed_devices(self) -> None:
        x, w = self.torch.ones(2, 4, 8, 8), self.torch.ones(6, 4, 3, 3, device="meta")
        with pytest.raises(ValueError, match=r"input is on device cpu and weight on device meta"):
            conv(x, w)

    @pytest.mark.parametrize(
        ("size", "kernel", "padding", "mode"),
        [
            ((0, 8), (3, 3), 2, "zeros"),
            ((2, 8), (3, 3), 0, "zeros"),
            ((8, 8), (3, 9), 0, "zeros"),
            ((3, 8), (2, 2), 3, "reflect"),
            ((3, 8), (2, 2), (4, 0), "circular"),
        ],
    )
    def test_where_torch_raises(self, size: tuple[int, int], kernel: tuple[int, int], padding: Any, mode: str) -> None:
        module = self.torch.nn.Conv2d(4, 6, kernel, padding=padding, padding_mode=mode)
        x = self.torch.ones(2, 4, *size)
        with pytest.raises(RuntimeError):
            module(x)
        with pytest.raises(ValueError, match=r"input|padding"):
            conv(x, module.weight, module.bias, padding=padding, padding_mode=mode)

    @pytest.mark.parametrize(("padding", "mode"), [(2, "reflect"), (3, "circular"), (7, "replicate")])
    def test_the_limits_are_those_of_torch(self, padding: int, mode: str) -> None:
        module = self.torch.nn.Conv2d(4, 6, 2, padding=padding, padding_mode=mode)
        x = self.torch.ones(2, 4, 3, 3)
        found = conv(x, module.weight, module.bias, padding=padding, padding_mode=mode)
        self.torch.testing.assert_close(found, module(x))


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("good", "bad"),
    [({"stride": 1}, {"stride": 1.0}), ({"groups": 1}, {"groups": True}), ({"padding": (1,)}, {"padding": (1.0,)})],
)
def test_a_good_call_before_hides_no_error(framework: str, good: dict[str, Any], bad: dict[str, Any]) -> None:
    """1, 1.0 and True are equal keys of a cache."""
    torch = pytest.importorskip("torch")
    x, w = numpy.ones((2, 3, 5)), numpy.ones((4, 3, 3))
    arrays = (x, w) if framework == "numpy" else tuple(map(torch.tensor, (x, w)))
    functional.conv(*arrays, **good)
    with pytest.raises(TypeError, match=next(iter(bad))):
        functional.conv(*arrays, **bad)
