"""Arguments that cannot be meant: what the errors say, and arrays that mean more than their entries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import lensor
import lensor.functional as F
from lensor import NetworkError, SubscriptsError

NET: Any = lensor.contraction("n c i -> n c", "X")
EINSUM: Any = lensor.einsum
A = np.ones((2, 6))
THREE: Any = 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: NET.group(), NetworkError, r"indices is empty, expected the indices .* some of \['n', 'c'\]"),
        (lambda: NET.group("n", "n"), NetworkError, "index 'n' is given 2 times"),
        (lambda: NET.group(["n", "c"]), TypeError, r"output index is \['n', 'c'\] of type list, expected a str"),
        (lambda: NET + 1, TypeError, r"other summand is 1 of type int, expected a network.*scaled"),
        (lambda: 1 + NET, TypeError, "other summand is 1 of type int, expected a network"),
        (lambda: (NET + NET) + A, TypeError, r"(?s)other summand is .* of type ndarray"),
        (lambda: lensor.Sum((NET, THREE)), TypeError, "a term is 3 of type int, expected a Network"),
        (lambda: NET.keep("i", 3), NetworkError, "position is 3, expected 0 <= position <= 2"),
        (lambda: NET.keep("i", -1), NetworkError, "position is -1, expected 0 <= position <= 2"),
        (lambda: NET.scaled("x"), NetworkError, "factor is 'x', expected a finite number"),
        (lambda: NET.scaled(float("inf")), NetworkError, "factor is inf, expected a finite number"),
        (lambda: NET.scaled(1, {"n": 0.5}), TypeError, "the power of 'n' is 0.5 of type float, expected an integer"),
        (lambda: NET.merge(3), TypeError, "other is 3 of type int, expected a Network or a Sum"),
        (lambda: NET.merge(NET, share="n"), TypeError, "share is the str 'n', expected a sequence of names"),
        (lambda: NET.substitute("X", 3), TypeError, "network is 3 of type int, expected a Network or a Sum"),
        (
            lambda: NET.plan(X=[[1.0]]),
            TypeError,
            r"a size in the shape of 'X' is \[1.0\] of type list, expected an integer",
        ),
        (lambda: NET(A), TypeError, r"operands are given by position, expected by name: X$"),
        (lambda: NET.plan(A), TypeError, r"operands are given by position, expected by name: X$"),
        (lambda: (NET + NET)(A, X=A), TypeError, r"operands are given by position, expected by name: X$"),
        (
            lambda: NET.vjp("X").plan(V=(2, 3), i=4)(A),
            TypeError,
            r"operands are given by position, expected by name: V$",
        ),
        (
            lambda: NET.plan(X=(2, 3, 4), q=3),
            TypeError,
            r"operand or index 'q' is unknown, expected one of the operands \['X'\] or the indices \['c', 'i', 'n'\]",
        ),
        (lambda: NET.split("c", 3), TypeError, "sizes is 3 of type int, expected a Mapping"),
        (lambda: lensor.IndexPattern(9, 3).summed(THREE), TypeError, "legs is 3 of type int, expected a Sequence"),
        (lambda: lensor.IndexPattern(9, 3).summed("x"), TypeError, "a leg is 'x' of type str, expected an integer"),  # type: ignore[arg-type]
        (lambda: lensor.IndexPattern(9, 3).summed((5,)), ValueError, r"legs is \(5,\), expected different legs out of"),
        (lambda: lensor.IndexPattern(9, 3).constant_sum((1, 1)), ValueError, r"legs is \(1, 1\), expected different"),
        (
            lambda: lensor.ops.kfac_input_factor(lensor.ConvSpec(2, 2, 9, 3), bias=THREE),
            TypeError,
            "bias is 3 of type int, expected a bool",
        ),
        (lambda: NET.plan(X=3), TypeError, "operand 'X' is 3, expected an array or a shape"),
        (
            lambda: EINSUM(A, "i j -> i"),
            TypeError,
            "subscripts is of type ndarray, expected a str as the first argument",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "suggestion"),
    [
        (lambda: lensor.einsum("ij,jk->ik", A, A.T), "i j, j k -> i k"),
        (lambda: lensor.contraction("ij,jk->ik", "A", "B"), "i j, j k -> i k"),
        (lambda: lensor.einsum("ij->ji", A), "i j -> j i"),
        (lambda: lensor.einsum("ij,ij->ij", A, A), "i j, i j -> i j"),
        (lambda: lensor.einsum("ij,ij->", A, A), "i j, i j -> "),
        (lambda: lensor.einsum("bij, bjk -> bik", A, A), "b i j, b j k -> b i k"),
    ],
)
def test_subscripts_without_spaces(call: Any, suggestion: str) -> None:
    with pytest.raises(SubscriptsError) as caught:
        call()
    assert f"spaces separate indices: if every letter is an index, write {suggestion!r}" in str(caught.value)


def test_subscripts_without_spaces_in_other_places() -> None:
    with pytest.raises(ValueError, match=r"A has 2 axes .* spaces separate indices: 'i j' has 2"):
        lensor.contraction("ij, ij ->", "A", "B")(A=A, B=A)
    with pytest.raises(NetworkError, match=r"'ik' is not in any node.*spaces separate indices"):
        lensor.parse("X[ij] Y[jk] -> ik")
    for text in ("batch time -> batch tim", "n c_in i1 -> n c_out", "n c -> m"):
        with pytest.raises(SubscriptsError) as caught:
            lensor.contraction(text, "X")
        assert "spaces separate" not in str(caught.value)
    np.testing.assert_allclose(lensor.einsum("row column -> column row", A), A.T)


def test_python_sums_of_networks() -> None:
    assert sum([NET, NET, NET]) == NET + NET + NET


class Quantity(np.ndarray):
    """An array with a unit, as several libraries have."""


class Frame:
    """An object that looks like an array."""

    shape, dtype, device, ndim = (2, 2, 6), np.dtype(np.float64), "cpu", 3


def meaningful_arrays() -> dict[str, tuple[Any, str]]:
    base = np.linspace(-1, 1, 24).reshape(2, 2, 6)
    tensor = torch.tensor(base)
    return {
        "masked": (np.ma.masked_greater(base, 0.5), r"masked array, expected one without a mask: x.filled"),
        "masked, nothing": (np.ma.array(base), "masked array"),
        "matrix": (np.matrix(base[0]), "numpy.matrix, a subclass"),
        "unit": (base.view(Quantity), "Quantity, a subclass of NumPy's arrays"),
        "record": (np.zeros((2, 2, 6), [("a", float), ("b", float)]).view(np.recarray), "recarray"),
        "frame": (Frame(), "has type .*Frame, expected an array of NumPy, torch or JAX"),
        "list": (base.tolist(), "has type builtins.list, expected an array of NumPy, torch or JAX"),
        "coo": (tensor.to_sparse(), r"layout torch.sparse_coo, expected a dense one: call x.to_dense\(\)"),
        "csr": (tensor[0].to_sparse_csr(), "layout torch.sparse_csr"),
        "mkldnn": (tensor.float().to_mkldnn(), "layout torch._mkldnn"),
        "nested": (torch.nested.nested_tensor([tensor[0], tensor[1]]), "nested tensor"),
        "jagged": (torch.nested.nested_tensor([tensor[0], tensor[1]], layout=torch.jagged), "nested tensor"),
        "quantized": (torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8), "quantized tensor"),
        "masked tensor": (
            torch.masked.masked_tensor(tensor, tensor < 0.5),
            "masked tensor, expected one without a mask",
        ),
        "float8": (
            tensor.to(torch.float8_e4m3fn),
            "dtype (torch.)?float8_e4m3fn, expected a dtype of at least 16 bits",
        ),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", meaningful_arrays())
def test_arrays_that_mean_more_than_their_entries(name: str) -> None:
    x, message = meaningful_arrays()[name]
    plain = np.ones((2, 2, 6))
    likes = (plain, torch.tensor(plain))
    calls = [
        lambda: F.unfold(x, 3),
        lambda: F.kfac_input_factor(x, 3),
        lambda: F.kfac_output_factor(x),
        lambda: NET(X=x),
        lambda: lensor.einsum("n c i -> n c", x),
    ]
    like = likes[isinstance(x, torch.Tensor)]
    calls += [lambda: F.conv(like, x)] if name != "float8" else []
    for like in likes:
        F.unfold(like, 3)  # what is remembered of plain arrays is not taken for others
    for call in calls:
        with pytest.raises(TypeError, match=message) as caught:
            call()
        assert "masked" not in name or "mask" in str(caught.value)


def test_arrays_that_are_plain() -> None:
    base = np.linspace(-1, 1, 24).reshape(2, 2, 6)
    expected = base.sum(2)
    swapped = base.astype(">f8")
    for x in (swapped, base[::-1][::-1], np.asfortranarray(base), np.broadcast_to(base, (2, 2, 6))):
        np.testing.assert_allclose(NET(X=x), expected)
    for x in (
        torch.tensor(base),
        torch.nn.Parameter(torch.tensor(base)),
        torch.complex(torch.tensor(base), torch.tensor(-base)).conj().imag,
    ):
        np.testing.assert_allclose(NET(X=x).detach().numpy(), expected)


def test_memory_mapped_arrays_are_plain(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "x", np.float64, "w+", shape=(2, 2, 6))
    mapped[:] = 1
    np.testing.assert_allclose(NET(X=mapped), np.full((2, 2), 6.0))
    np.testing.assert_allclose(F.unfold(mapped, 3), F.unfold(np.ones((2, 2, 6)), 3))
