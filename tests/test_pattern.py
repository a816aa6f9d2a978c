"""Index patterns against their definition by loops, and against torch's own padding and convolutions."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lensor.pattern import IndexPattern

MODES = ("zeros", "circular", "reflect", "replicate")


def position(pattern: IndexPattern, o: int, k: int) -> int | None:
    """The input position that (o, k) reads, from the definition."""
    size = pattern.input_size
    at = k * pattern.dilation + o * pattern.stride - pattern.padding[0]
    if pattern.padding_mode == "circular":
        return at % size
    if pattern.padding_mode == "replicate":
        return min(max(at, 0), size - 1)
    if pattern.padding_mode == "reflect":
        return abs(at) if at < size else 2 * (size - 1) - at
    return at if 0 <= at < size else None


def loops(pattern: IndexPattern) -> np.ndarray:
    """The pattern by a triple loop."""
    dense = np.zeros((pattern.input_size, pattern.output_size, pattern.kernel_size), bool)
    for i in range(pattern.input_size):
        for o in range(pattern.output_size):
            for k in range(pattern.kernel_size):
                dense[i, o, k] = position(pattern, o, k) == i
    return dense


@st.composite
def patterns(
    draw: st.DrawFn, modes: tuple[str, ...] = MODES, input_size: int | None = None, least: int = -3
) -> IndexPattern:
    """Any pattern that is valid: negative padding and pinned output sizes included."""
    mode = draw(st.sampled_from(modes))
    size = input_size or draw(st.integers(1, 9))
    limit = {"reflect": size - 1, "circular": size}.get(mode, 5)
    side = st.integers(least, limit)
    hyper: dict[str, Any] = {
        "stride": draw(st.integers(1, 5)),
        "padding": (draw(side), draw(side)),
        "dilation": draw(st.integers(1, 4)),
        "padding_mode": mode,
        "output_size": draw(st.none() | st.integers(1, 6)),
    }
    try:
        return IndexPattern(size, draw(st.integers(1, 4)), **hyper)
    except ValueError:
        assume(False)
        raise


# -------------------------------------------------------------------------------------------------------- definition
@given(patterns())
def test_materialize_is_the_definition(pattern: IndexPattern) -> None:
    dense = pattern.materialize()
    assert dense.dtype == bool
    assert np.array_equal(dense, loops(pattern))
    assert pattern.nnz == dense.sum()
    assert pattern.is_zero == (not dense.any())


@given(patterns())
def test_reads(pattern: IndexPattern) -> None:
    reads = pattern.reads()
    assert reads.dtype == np.int64
    assert reads.shape == (pattern.output_size, pattern.kernel_size)
    for o in range(pattern.output_size):
        for k in range(pattern.kernel_size):
            at = position(pattern, o, k)
            assert reads[o, k] == (-1 if at is None else at)


@given(patterns(modes=("zeros",)))
def test_from_reads_finds_the_pattern(pattern: IndexPattern) -> None:
    found = IndexPattern.from_reads(pattern.reads(), pattern.input_size)
    assert found is not None
    assert np.array_equal(found.materialize(), pattern.materialize())


def test_from_reads_says_no() -> None:
    assert IndexPattern.from_reads(np.array([[0, 1], [1, 3]]), 4) is None
    assert IndexPattern.from_reads(np.array([[0], [1], [0]]), 2) is None
    nothing = IndexPattern.from_reads(np.full((3, 2), -1), 4)
    assert nothing is not None
    assert nothing.is_zero


@given(patterns(least=0), st.integers(0, 2**32 - 1))
@example(IndexPattern(5, 3, padding=4, padding_mode="reflect"), 0)
@example(IndexPattern(5, 3, padding=5, padding_mode="circular"), 0)
@example(IndexPattern(5, 3, padding=7, padding_mode="replicate"), 0)
def test_torch_convolution(pattern: IndexPattern, seed: int) -> None:
    torch = pytest.importorskip("torch")
    full = replace(pattern, output_size=None) if _fits(pattern) else None
    assume(full == pattern)
    functional = torch.nn.functional
    generator = np.random.default_rng(seed)
    x, w = generator.standard_normal(pattern.input_size), generator.standard_normal(pattern.kernel_size)
    mode = {"zeros": "constant"}.get(pattern.padding_mode, pattern.padding_mode)
    padded = functional.pad(torch.from_numpy(x)[None, None], pattern.padding, mode=mode)
    expected = functional.conv1d(
        padded, torch.from_numpy(w)[None, None], stride=pattern.stride, dilation=pattern.dilation
    )
    found = np.einsum("i,iok,k->o", x, pattern.materialize(), w)
    np.testing.assert_allclose(found, expected[0, 0].numpy(), atol=1e-12)


def _fits(pattern: IndexPattern) -> bool:
    padded = pattern.input_size + sum(pattern.padding)
    return padded >= pattern.dilation * (pattern.kernel_size - 1) + 1


@given(patterns(modes=("reflect", "replicate")))
def test_negative_padding_crops_as_torch_does(pattern: IndexPattern) -> None:
    torch = pytest.importorskip("torch")
    assume(pattern.input_size + sum(pattern.padding) > 0)
    padding, _ = pattern.split_padding()
    assert padding is not None
    x = np.arange(pattern.input_size, dtype=float)
    found = x @ padding.materialize()[:, :, 0]
    expected = torch.nn.functional.pad(torch.from_numpy(x)[None, None], pattern.padding, mode=pattern.padding_mode)
    assert np.array_equal(found, expected[0, 0].numpy())


def test_what_lies_to_the_right_of_a_pinned_output_is_zero() -> None:
    assert IndexPattern(4, 2, output_size=5).reads().tolist() == [[0, 1], [1, 2], [2, 3], [3, -1], [-1, -1]]
    assert IndexPattern(4, 9, output_size=1).reads().tolist() == [[0, 1, 2, 3, -1, -1, -1, -1, -1]]
    assert IndexPattern(4, 2, output_size=1).reads().tolist() == [[0, 1]]


# ------------------------------------------------------------------------------------------------------------ values
def test_values_are_stored_in_one_form() -> None:
    pattern = IndexPattern(np.int64(9), np.int32(3), np.uint8(2), [np.int64(1), 2], np.int16(1))
    assert pattern == IndexPattern(9, 3, stride=2, padding=(1, 2), output_size=5)
    assert (pattern.padding, pattern.output_size) == ((1, 2), 5)
    assert all(type(getattr(pattern, name)) is int for name in ("input_size", "kernel_size", "stride", "output_size"))
    assert IndexPattern(9, 3, padding=1) == IndexPattern(9, 3, padding=(1, 1))


@given(patterns())
def test_repr_pickle_hash(pattern: IndexPattern) -> None:
    for other in (eval(repr(pattern)), pickle.loads(pickle.dumps(pattern)), replace(pattern)):
        assert other == pattern
        assert hash(other) == hash(pattern)
    assert len(str(pattern)) < 60


def test_repr_has_what_is_not_default() -> None:
    assert repr(IndexPattern(5, 3)) == "IndexPattern(5, 3)"
    assert repr(IndexPattern(5, 3, output_size=3)) == "IndexPattern(5, 3)"
    assert repr(IndexPattern(5, 3, 2, (1, -1), 1, "reflect")) == (
        "IndexPattern(5, 3, stride=2, padding=(1, -1), padding_mode='reflect')"
    )
    assert repr(IndexPattern(5, 3, padding=1, dilation=2, output_size=9)) == (
        "IndexPattern(5, 3, padding=1, dilation=2, output_size=9)"
    )
    assert str(IndexPattern(5, 3, 2, (0, 1), padding_mode="reflect")) == "Π(5→2 K3 S2 P(0,1) reflect)"


def test_frozen() -> None:
    pattern = IndexPattern(5, 3)
    with pytest.raises(FrozenInstanceError):
        pattern.stride = 2  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        pattern.reads()[0, 0] = 1
    pattern.materialize()[:] = False
    assert pattern.materialize().any()
    assert not hasattr(pattern, "__dict__")
    assert [field.name for field in fields(pattern)][:2] == ["input_size", "kernel_size"]


def test_large_tables_of_reads_are_read_only_too() -> None:
    pattern = IndexPattern(300_000, 2, padding=1)
    assert pattern.nnz == 600_000
    assert not pattern.reads().flags.writeable


KINDS = {
    "dense": [(9, 3, 3), (9, 1, 1), (9, 9, 9)],
    "down-sampling": [(9, 1, 2), (9, 2, 3), (10, 1, 2)],
    "general": [(10, 3, 3), (9, 3, 2), (9, 3, 1)],
}


@pytest.mark.parametrize(("kind", "sizes"), [(kind, sizes) for kind, all_sizes in KINDS.items() for sizes in all_sizes])
def test_kinds(kind: str, sizes: tuple[int, int, int]) -> None:
    assert [IndexPattern(*sizes, padding_mode=mode).kind for mode in MODES] == [kind] * 4
    assert IndexPattern(*sizes, padding=(0, 1)).kind == "general"
    assert IndexPattern(*sizes, dilation=2, output_size=2).kind == "general"


def test_kinds_of_pinned_outputs() -> None:
    assert IndexPattern(9, 3, 3, output_size=2).kind == "general"
    assert IndexPattern(9, 2, 3, output_size=2).kind == "down-sampling"
    assert IndexPattern(9, 2, 3, output_size=4).kind == "general"


# ------------------------------------------------------------------------------------------------- leg sums and counts
@given(patterns())
def test_leg_sums(pattern: IndexPattern) -> None:
    dense = loops(pattern)
    for axis in range(3):
        found = pattern.summed((axis,))
        assert found.dtype == np.int64
        assert np.array_equal(found, dense.sum(axis=axis))
    assert np.array_equal(pattern.counts(), dense.sum(axis=(0, 1)))


@given(patterns())
def test_columns_are_equal_where_reads_are(pattern: IndexPattern) -> None:
    if pattern.padding_mode != "zeros" and pattern.normalize().padding_mode != "zeros":
        with pytest.raises(ValueError, match="expected 'zeros'"):
            pattern.columns()
        return
    keys, dense = pattern.columns(), loops(pattern)
    for k, one in enumerate(keys):
        for other, two in enumerate(keys):
            assert (one == two) == np.array_equal(dense[:, :, k], dense[:, :, other])


def test_old_name_of_is_crop() -> None:
    with pytest.warns(DeprecationWarning, match="use is_crop"):
        assert IndexPattern(5, 1).is_selection


@given(patterns())
def test_predicates(pattern: IndexPattern) -> None:
    dense = loops(pattern)
    assert pattern.is_crop == (pattern.kernel_size == 1)
    square = pattern.kernel_size == 1 and pattern.input_size == pattern.output_size
    assert pattern.is_identity == (square and np.array_equal(dense[:, :, 0], np.eye(pattern.input_size)))


# ------------------------------------------------------------------------------------------------------------ algebra
@given(patterns())
def test_swap(pattern: IndexPattern) -> None:
    swapped = pattern.swap()
    assert np.array_equal(swapped.materialize(), loops(pattern).transpose(0, 2, 1))
    assert swapped.swap() == pattern


@given(patterns())
def test_normal_form(pattern: IndexPattern) -> None:
    normal = pattern.normalize()
    assert np.array_equal(normal.materialize(), loops(pattern))
    assert normal.normalize() == normal
    inside = (replace(pattern, padding_mode="zeros").reads() >= 0).all()
    assert normal.padding_mode == ("zeros" if inside else pattern.padding_mode)


def test_equal_patterns_have_equal_normal_forms() -> None:
    seen: dict[tuple[Any, bytes], IndexPattern] = {}
    pairs = 0
    for size in (1, 3, 4, 6):
        for kernel in (1, 2, 3):
            for stride in (1, 2, 3):
                for dilation in (1, 2, 3):
                    for left in range(-3, 4):
                        for output in (1, 2, 4):
                            pattern = IndexPattern(
                                size, kernel, stride, padding=(left, 7), dilation=dilation, output_size=output
                            )
                            valid = pattern.reads() >= 0
                            along_o = output == 1 or (valid.sum(axis=0) >= 2).any()
                            along_k = kernel == 1 or (valid.sum(axis=1) >= 2).any()
                            if not (along_o and along_k) and valid.any():
                                continue
                            key = (size, output, kernel), pattern.reads().tobytes()
                            pairs += key in seen
                            assert seen.setdefault(key, pattern.normalize()) == pattern.normalize()
    assert pairs > 500


@given(st.data())
def test_compose(data: st.DataObject) -> None:
    one = data.draw(patterns())
    two = data.draw(patterns(input_size=one.output_size, least=-1))
    joint = one.compose(two)
    inside = (replace(two, padding_mode="zeros").reads() >= 0).all()
    used = one.normalize().padding_mode != "zeros"
    if joint is None:
        assert not inside or used
        return
    assert inside
    assert not used
    expected = np.einsum("ijk,jol->iokl", loops(one).astype(int), loops(two))
    product, kernels = joint
    assert np.array_equal(np.einsum("iom,mlk->iokl", loops(product).astype(int), loops(kernels)), expected)
    assert product.kernel_size == kernels.input_size
    assert product.dilation == 1


def test_compose_needs_matching_sizes() -> None:
    with pytest.raises(ValueError, match=r"inner.input_size is 4, expected this pattern's output_size=3"):
        IndexPattern(5, 3).compose(IndexPattern(4, 2))


@given(patterns())
def test_split_padding(pattern: IndexPattern) -> None:
    padding, inner = pattern.split_padding()
    assert inner.padding_mode == "zeros"
    if padding is None:
        assert inner == pattern
        return
    assert (padding.is_crop, padding.padding, inner.padding) == (True, pattern.padding, (0, 0))
    product = np.einsum("ij,jok->iok", loops(padding)[:, :, 0].astype(int), loops(inner))
    assert np.array_equal(product, loops(pattern))


@given(patterns())
@example(IndexPattern(9, 3, stride=2, padding=1, dilation=4))
def test_gcd_split(pattern: IndexPattern) -> None:
    parts = pattern.gcd_split()
    g = np.gcd(pattern.stride, pattern.dilation)
    if parts is None:
        trivial = g == 1 or 1 in (pattern.kernel_size, pattern.output_size) or pattern.is_zero
        assert trivial or pattern.normalize().padding_mode != "zeros"
        return
    every, smaller = parts
    assert every.is_crop
    assert (smaller.stride, smaller.dilation) == (pattern.stride // g, pattern.dilation // g)
    product = np.einsum("ij,jok->iok", loops(every)[:, :, 0].astype(int), loops(smaller))
    assert np.array_equal(product, loops(pattern))


# ------------------------------------------------------------------------------------------------------------- errors
VALUE_ERRORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "input_size": ({"input_size": 0}, ("input_size", "0", "positive")),
    "kernel_size": ({"kernel_size": 0}, ("kernel_size", "0", "positive")),
    "stride": ({"stride": -1}, ("stride", "-1", "positive")),
    "dilation": ({"dilation": 0}, ("dilation", "0", "positive")),
    "output_size": ({"output_size": 0}, ("output_size", "0", "positive")),
    "mode": ({"padding_mode": "same"}, ("padding_mode", "'same'", "'reflect'")),
    "sides": ({"padding": (1, 2, 3)}, ("padding is (1, 2, 3)", "3 entries", "(left, right)")),
    "kernel": ({"kernel_size": 8, "padding": (1, 1)}, ("kernel_size=8", "8 positions", "at most 7", "padding=(1, 1)")),
    "cropped": ({"padding": (-1, -2)}, ("kernel_size=3", "3 positions", "at most 2", "input_size=5")),
    "dilated": ({"dilation": 3}, ("kernel_size=3", "dilation=3", "7 positions", "at most 5")),
    "reflect": ({"padding": (0, 5), "padding_mode": "reflect"}, ("reflect", "less than input_size=5", "(0, 5)")),
    "circular": ({"padding": (6, 0), "padding_mode": "circular"}, ("circular", "input_size=5", "(6, 0)")),
    "circular crop": ({"padding": (-1, 2), "padding_mode": "circular"}, ("circular", "crop", "(-1, 2)")),
    "beyond": (
        {"padding": 1, "padding_mode": "reflect", "output_size": 6},
        ("output_size=6", "1 positions outside", "'reflect'", "at most 5"),
    ),
}

TYPE_ERRORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "float": ({"input_size": 5.0}, ("input_size", "5.0", "integer", "float")),
    "bool": ({"stride": True}, ("stride", "True", "integer", "bool")),
    "NumPy bool": ({"stride": np.True_}, ("stride", "integer")),
    "None": ({"kernel_size": None}, ("kernel_size", "None", "integer")),
    "padding": ({"padding": 0.5}, ("padding", "0.5", "integer")),
    "padding's side": ({"padding": (0, "1")}, ("padding[1]", "'1'", "integer")),
    "padding by name": ({"padding": "same"}, ("padding", "'same'", "integer")),
    "output_size": ({"output_size": 2.5}, ("output_size", "2.5", "integer")),
}


@pytest.mark.parametrize(("arguments", "words"), VALUE_ERRORS.values(), ids=VALUE_ERRORS)
def test_value_errors(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        IndexPattern(**{"input_size": 5, "kernel_size": 3, **arguments})
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(("arguments", "words"), TYPE_ERRORS.values(), ids=TYPE_ERRORS)
def test_type_errors(arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(TypeError) as caught:
        IndexPattern(**{"input_size": 5, "kernel_size": 3, **arguments})
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
@pytest.mark.parametrize("padding", [0, 1, 4, 5, 6, 9])
def test_the_limits_of_modes_are_those_of_torch(mode: str, padding: int) -> None:
    torch = pytest.importorskip("torch")
    for sides in ((padding, 0), (0, padding)):
        try:
            torch.nn.functional.pad(torch.ones(1, 1, 5), sides, mode=mode)
        except RuntimeError:
            with pytest.raises(ValueError, match="padding"):
                IndexPattern(5, 2, padding=sides, padding_mode=mode)
        else:
            assert IndexPattern(5, 2, padding=sides, padding_mode=mode).output_size == 4 + padding
