"""Every operation equals its oracle over the whole matrix of hyper-parameters, backends, dtypes and memory layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from lensor import functional, ops  # noqa: E402
from tests.support import oracles  # noqa: E402
from tests.support.oracles import OPERATIONS, Geometry, draw, make_case, shapes  # noqa: E402
from tests.support.strategies import QUIET, calls, specs  # noqa: E402
from tests.sweeps.operations import BACKENDS, case_of, check, mismatch, run_case  # noqa: E402

LAYOUTS = ("contiguous", "strided", "channels last", "reversed axes", "read backwards")

# The largest error as a part of the largest entry. Operands are small integers, held exactly, so these are a few
# roundings of a sum; a wrong index is off by a good part of the largest entry.
TOLERANCES = {"float32": 1e-5, "float16": 1.5e-2, "bfloat16": 5e-2}
SHORT = [("numpy", "float32"), ("numpy", "float16"), *(("torch", dtype) for dtype in TOLERANCES)]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
few_backends = pytest.mark.parametrize(
    "backend", [pytest.param(one, marks=[pytest.mark.slow] * (one == "jax")) for one in BACKENDS]
)
"""JAX compiles every operation for every shape."""


def some(share: int) -> settings:
    """A part of the profile's number of examples."""
    return settings(max_examples=max(1, settings().max_examples // share), deadline=None, suppress_health_check=QUIET)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Arrays are tiny, and on shared cores torch's threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------- lensor.ops
@every_backend
@pytest.mark.parametrize("op", OPERATIONS)
def test_operation(op: str, backend: str) -> None:
    @given(calls(op))
    @some(6)
    def equals_oracle(call: dict[str, Any]) -> None:
        case = make_case(op, **call)
        problem = check(case, backend)
        assert not problem, f"{case.call}: {problem}"

    equals_oracle()


@pytest.mark.parametrize(("backend", "dtype"), SHORT)
@pytest.mark.parametrize("op", OPERATIONS)
def test_operation_in_short_dtypes(op: str, backend: str, dtype: str) -> None:
    @given(calls(op))
    @some(40)
    def equals_oracle(call: dict[str, Any]) -> None:
        case = make_case(op, **call, dtype=dtype)
        assume(dtype != "float16" or np.abs(case.expected).max() < 2**14)  # far from overflow
        problem = check(case, backend, dtype, TOLERANCES[dtype])
        assert not problem, f"{case.call}: {problem}"

    equals_oracle()


@few_backends
@pytest.mark.parametrize("op", ["conv", "unfold", "fold"])
def test_operation_on_complex_numbers(op: str, backend: str) -> None:
    @given(calls(op))
    @some(6)
    def equals_oracle(call: dict[str, Any]) -> None:
        case = make_case(op, **call, dtype="complex128")
        problem = check(case, backend)
        assert not problem, f"{case.call}: {problem}"

    equals_oracle()


# --------------------------------------------------------------------------------------------------- lensor.functional
def _hyper(spec: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: spec[name] for name in names or ("stride", "padding", "dilation", "groups", "padding_mode")}


def _conv(spec: Mapping[str, Any], a: Mapping[str, Any]) -> Any:
    if spec["transposed"]:
        hyper = _hyper(spec, "stride", "padding", "output_padding", "groups", "dilation")
        return functional.conv_transpose(a["X"], a["W"], a.get("b"), **hyper)
    return functional.conv(a["X"], a["W"], a.get("b"), **_hyper(spec))


def _unfold(spec: Mapping[str, Any], a: Mapping[str, Any]) -> Any:
    kernel = Geometry.of(spec).kernel_size
    if spec["transposed"]:
        hyper = _hyper(spec, "stride", "padding", "output_padding", "dilation")
        return functional.unfold_transpose(a["X"], kernel, **hyper)
    return functional.unfold(a["X"], kernel, **_hyper(spec, "dilation", "padding", "stride", "padding_mode"))


def _fold(spec: Mapping[str, Any], a: Mapping[str, Any]) -> Any:
    g = Geometry.of(spec)
    flat = a["V"].reshape(*a["V"].shape[: a["V"].ndim - g.ndim], -1)
    hyper = _hyper(spec, "dilation", "padding", "stride", "padding_mode")
    return functional.fold(flat, g.input_size, g.kernel_size, **hyper)


def _input_vjp(spec: Mapping[str, Any], a: Mapping[str, Any]) -> Any:
    g = Geometry.of(spec)
    size = (*a["V"].shape[: a["V"].ndim - g.ndim - 1], g.in_channels, *g.input_size)
    return functional.conv_input_vjp(size, a["W"], a["V"], **_hyper(spec))


def _weight_vjp(spec: Mapping[str, Any], a: Mapping[str, Any]) -> Any:
    return functional.conv_weight_vjp(a["X"], Geometry.of(spec).weight_size, a["V"], **_hyper(spec))


def _per_example(spec: Mapping[str, Any], a: Mapping[str, Any]) -> Any:
    return functional.conv_weight_vjp_per_example(a["X"], Geometry.of(spec).weight_size, a["V"], **_hyper(spec))


def _input_factor(spec: Mapping[str, Any], a: Mapping[str, Any], **options: Any) -> Any:
    hyper = _hyper(spec, "stride", "padding", "dilation", "groups", "transposed", "output_padding", "padding_mode")
    return functional.kfac_input_factor(a["X"], Geometry.of(spec).kernel_size, **hyper, **options)


def _output_factor(spec: Mapping[str, Any], a: Mapping[str, Any], **options: Any) -> Any:
    return functional.kfac_output_factor(a["V"], spec["groups"], **options)


def _ggn_diagonal(spec: Mapping[str, Any], a: Mapping[str, Any], **options: Any) -> Any:
    return functional.ggn_diagonal(a["X"], Geometry.of(spec).weight_size, a["S"], **_hyper(spec), **options)


def _ggn_gram(spec: Mapping[str, Any], a: Mapping[str, Any]) -> Any:
    return functional.ggn_gram(a["X"], Geometry.of(spec).weight_size, a["S"], **_hyper(spec))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "conv": _conv,
    "unfold": _unfold,
    "fold": _fold,
    "conv_input_vjp": _input_vjp,
    "conv_weight_vjp": _weight_vjp,
    "conv_weight_vjp_per_example": _per_example,
    "kfac_input_factor": _input_factor,
    "kfac_output_factor": _output_factor,
    "ggn_diagonal": _ggn_diagonal,
    "ggn_gram": _ggn_gram,
}
TAKE_TRANSPOSED = {"conv", "unfold", "kfac_input_factor", "kfac_output_factor"}
"""Those with a function for transposed convolutions, too."""

TAKE_UNBATCHED = ("conv", "unfold", "fold", "conv_input_vjp", "conv_weight_vjp")


def is_function(op: str, call: Mapping[str, Any]) -> bool:
    """Whether there is a function of arrays for it: with a spatial dimension, and no bias in a factor."""
    spec = call["spec"]
    transposed = spec["transposed"] and op not in TAKE_TRANSPOSED
    return len(spec["input_size"]) > 0 and not transposed and "bias" not in call["options"]


def arranged(array: np.ndarray, layout: str, backend: str) -> Any:
    """The same values laid out otherwise in memory; NumPy's cannot be written."""
    match layout:
        case "strided":
            array = np.repeat(array, 2, axis=-1)[..., ::2]
        case "channels last":
            array = np.moveaxis(np.moveaxis(array, 1, -1).copy(), -1, 1) if array.ndim > 1 else array
        case "reversed axes":
            array = np.asfortranarray(array)
        case "read backwards" if backend == "numpy":  # torch has no negative strides
            array = array[..., ::-1].copy()[..., ::-1]
    if backend != "numpy":
        return torch.from_numpy(array) if backend == "torch" else jnp.array(array)
    array = array.view()
    array.flags.writeable = False
    return array


def flat_positions(op: str, spec: Mapping[str, Any], expected: np.ndarray) -> np.ndarray:
    """`functional.unfold` joins the positions, as torch's does."""
    g = Geometry.of(spec)
    return expected.reshape(*expected.shape[: expected.ndim - g.ndim], -1) if op == "unfold" else expected


@every_backend
@pytest.mark.parametrize("op", FUNCTIONS)
def test_function(op: str, backend: str) -> None:
    @given(calls(op).filter(lambda call: is_function(op, call)), st.sampled_from(LAYOUTS))
    @some(6)
    def equals_oracle(call: dict[str, Any], layout: str) -> None:
        case = make_case(op, **call)
        arrays = {name: arranged(array.copy(), layout, backend) for name, array in case.operands.items()}
        found = FUNCTIONS[op](case.spec, arrays, **case.options)
        problem = mismatch(found, flat_positions(op, case.spec, case.expected), backend)
        assert not problem, f"{op} of {layout} arrays, {case.call}: {problem}"
        for name, array in arrays.items():
            np.testing.assert_array_equal(np.asarray(array), case.operands[name], err_msg=f"{name} was changed")
            assert not np.shares_memory(np.asarray(array), np.asarray(found)), f"the result is a view of {name}"

    equals_oracle()


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_function_of_torchs_channels_last(op: str, ndim: int) -> None:
    spec = {**SPEC, "input_size": (5, 6, 4)[:ndim], "bias": op == "conv"}
    case = make_case(op, spec, np.random.default_rng(0))
    memory_format = torch.channels_last if ndim == 2 else torch.channels_last_3d
    arrays = {name: torch.from_numpy(array) for name, array in case.operands.items()}
    for name, tensor in arrays.items():
        if tensor.ndim == ndim + 2:
            arrays[name] = tensor.to(memory_format=memory_format)
    found = FUNCTIONS[op](case.spec, arrays, **case.options)
    assert not mismatch(found, flat_positions(op, spec, case.expected), "torch")


@few_backends
@pytest.mark.parametrize("op", TAKE_UNBATCHED)
def test_function_of_unbatched_arrays(op: str, backend: str) -> None:
    @given(calls(op).filter(lambda call: is_function(op, call)))
    @some(6)
    def equals_oracle(call: dict[str, Any]) -> None:
        case = make_case(op, **{**call, "batch": 1})
        batched = {"X", "V"}
        arrays = {name: array[0] if name in batched else array for name, array in case.operands.items()}
        arrays = {name: arranged(array.copy(), "contiguous", backend) for name, array in arrays.items()}
        found = FUNCTIONS[op](case.spec, arrays)
        expected = flat_positions(op, case.spec, case.expected)
        problem = mismatch(found, expected if op == "conv_weight_vjp" else expected[0], backend)
        assert not problem, f"unbatched {op}, {case.call}: {problem}"

    equals_oracle()


@pytest.mark.parametrize(("backend", "dtype"), SHORT)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_function_in_short_dtypes(op: str, backend: str, dtype: str) -> None:
    @given(calls(op).filter(lambda call: is_function(op, call)))
    @some(40)
    def equals_oracle(call: dict[str, Any]) -> None:
        case = make_case(op, **call, dtype=dtype)
        assume(dtype != "float16" or np.abs(case.expected).max() < 2**14)
        arrays: dict[str, Any] = dict(case.operands)
        if backend == "numpy":
            arrays = {name: array.astype(dtype) for name, array in arrays.items()}
        else:
            arrays = {name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in arrays.items()}
        found = FUNCTIONS[op](case.spec, arrays, **case.options)
        expected = flat_positions(op, case.spec, case.expected)
        problem = mismatch(found, expected, backend, dtype, TOLERANCES[dtype])
        assert not problem, f"{op}, {case.call}: {problem}"

    equals_oracle()


@every_backend
@given(call=calls("kfac_input_factor").filter(lambda call: is_function("kfac_input_factor", call)))
@some(6)
def test_the_reduce_factor_is_the_gram_matrix_of_its_root(backend: str, call: dict[str, Any]) -> None:
    case = make_case("kfac_input_factor", **{**call, "options": {"approx": "reduce"}})
    arrays = {"X": arranged(case.operands["X"], "contiguous", backend)}
    root = _input_factor(case.spec, arrays, approx="reduce", form="root")
    assert tuple(root.shape[:2]) == (case.spec["groups"], call["batch"])
    assert not mismatch(root.mT @ root, case.expected, backend)


# ----------------------------------------------------------------------------------------------------- complex numbers
@few_backends
@pytest.mark.parametrize("op", ["conv", "unfold", "conv_input_vjp", "conv_weight_vjp", "conv_weight_vjp_per_example"])
def test_function_of_complex_numbers_is_autograds(op: str, backend: str) -> None:
    """Gradients conjugate what they are multiplied with, as torch's autograd does."""

    @given(calls(op).filter(lambda call: is_function(op, call) and len(call["spec"]["input_size"]) <= 3))
    @some(6)
    def equals_oracle(call: dict[str, Any]) -> None:
        case = make_case(op, **call, dtype="complex128")
        arrays = {name: arranged(array.copy(), "contiguous", backend) for name, array in case.operands.items()}
        found = FUNCTIONS[op](case.spec, arrays)
        problem = mismatch(found, flat_positions(op, case.spec, case.expected), backend)
        assert not problem, f"{op}, {case.call}: {problem}"

    equals_oracle()


SPEC: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 6,
    "input_size": (5, 6),
    "kernel_size": 3,
    "stride": 2,
    "padding": 1,
    "dilation": 1,
    "groups": 2,
    "padding_mode": "zeros",
    "bias": False,
    "transposed": False,
    "output_padding": 0,
}


@every_backend
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("op", ["kfac_input_factor", "kfac_output_factor", "ggn_diagonal", "ggn_gram"])
def test_curvature_refuses_complex_numbers(op: str, dtype: str, backend: str) -> None:
    sizes = shapes(Geometry.of(SPEC), 2, 2)
    arrays = {name: np.ones(sizes[kind], dtype) for name, kind in OPERATIONS[op].operands.items()}
    arrays = {name: arranged(array, "contiguous", backend) for name, array in arrays.items()}
    with pytest.raises(TypeError, match=dtype):
        FUNCTIONS[op](SPEC, arrays)


# ----------------------------------------------------------------------------------------------------- the checks check
@given(spec=specs(min_ndim=1), seed=st.integers(0, 99))
@some(4)
def test_a_wrong_convolution_is_noticed(spec: dict[str, Any], seed: int) -> None:
    """Input positions shifted by one are told from the right ones in every dtype."""
    g, rng = Geometry.of(spec), np.random.default_rng(seed)
    sizes = shapes(g, 2, 1)
    x, w = draw(rng, sizes["input"], "bfloat16"), draw(rng, sizes["weight"], "bfloat16")
    right, wrong = oracles.conv(g, x, w), oracles.conv(g, np.roll(x, 1, axis=-1), w)
    assume(not np.array_equal(right, wrong))
    for dtype, tolerance in TOLERANCES.items():
        if np.abs(right - wrong).max() > tolerance * max(1.0, np.abs(right).max()):
            assert mismatch(torch.from_numpy(wrong).to(getattr(torch, dtype)), right, "torch", dtype, tolerance)
        assert not mismatch(torch.from_numpy(right).to(getattr(torch, dtype)), right, "torch", dtype, tolerance)


def test_mismatch_names_what_differs() -> None:
    expected = np.arange(6.0).reshape(2, 3)
    off = expected.copy()
    off[1, 2] += 1e-8
    assert not mismatch(expected.copy(), expected, "numpy")
    assert "[1, 2]" in mismatch(off, expected, "numpy")
    assert "nan" in mismatch(expected * np.nan, expected, "numpy")
    assert "shape (3, 2)" in mismatch(expected.T, expected, "numpy")
    assert "float32" in mismatch(expected.astype("float32"), expected, "numpy")
    assert "Tensor" in mismatch(torch.from_numpy(expected), expected, "numpy")


def test_a_case_of_the_sweep_is_determined_by_its_number() -> None:
    first, second = case_of(3, 57), case_of(3, 57)
    assert first[0].call == second[0].call
    assert first[1] == second[1]
    np.testing.assert_array_equal(first[0].expected, second[0].expected)
    assert run_case(3, 57).keys() == {"k", "op", "backend", "seconds"}


def test_old_names_are_deprecated() -> None:
    for old, new in {"weight_vjp": "conv_weight_vjp", "ggn_mini_block": "ggn_mini_blocks"}.items():
        with pytest.warns(DeprecationWarning, match=f"use ops.{new}"):
            assert getattr(ops, old) is getattr(ops, new)
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        ops.weight  # noqa: B018


def test_every_operation_has_an_oracle() -> None:
    known = {name.partition(",")[0] for name in OPERATIONS}
    assert set(ops.__all__) <= known
