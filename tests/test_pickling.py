"""What public functions return goes through pickle, copy and torch.save; states that do not fit are refused."""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lensor_bench.results import OK, Found, Machine, Row, Setting
from torch import nn

import lensor
import lensor.nn
import lensor.sampling
from lensor.curvature import Block, EigenFactors, Inverse, KroneckerFactors, ekfac, kfac
from lensor.curvature.operators import Operator
from lensor.inspect.layers import Layer


def by_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "oldest protocol": lambda value: pickle.loads(pickle.dumps(value, 2)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": by_torch,
}


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2), nn.Flatten(), nn.Linear(128, 3))
    return nn.Sequential(*layers).double()


DATA = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(0)).double(), torch.arange(5) % 3


def factors(approx: str = "expand", bias: str = "separate", dtype: torch.dtype = torch.float64) -> KroneckerFactors:
    data = DATA[0].to(dtype), DATA[1]
    return kfac(model().to(dtype), nn.CrossEntropyLoss(), data, approx=approx, bias=bias)  # pyright: ignore


def operators() -> dict[str, Callable[[], Operator]]:
    found: dict[str, Callable[[], Operator]] = {}
    for approx in ("expand", "reduce"):
        for bias in ("separate", "joint"):
            given = approx, bias
            found[f"{approx}, {bias}"] = lambda given=given: factors(*given)
            found[f"{approx}, {bias}, eigen"] = lambda given=given: factors(*given).inverse(0.1)
            found[f"{approx}, {bias}, cholesky"] = lambda given=given: factors(*given).inverse(0.1, "cholesky")
            found[f"{approx}, {bias}, eigh"] = lambda given=given: factors(*given).eigh()
            found[f"{approx}, {bias}, eigh, inverse"] = lambda given=given: factors(*given).eigh().inverse(0.1)
    found["woodbury"] = lambda: factors("reduce", "joint").inverse(0.1, "woodbury")
    found["woodbury, plain"] = lambda: KroneckerFactors(
        {"w": Block(("w",), (2, 6), False, None, torch.randn(1, 3, 6).double(), 2 * torch.eye(2).double()[None], 1)}
    ).inverse(0.1, "woodbury")
    found["ekfac"] = lambda: ekfac(model(), nn.CrossEntropyLoss(), DATA, factors())
    return found


@pytest.mark.parametrize("name", operators())
@pytest.mark.parametrize("way", WAYS)
def test_operators_multiply_the_same(name: str, way: str) -> None:
    found = operators()[name]()
    again = WAYS[way](found)
    vector = torch.randn(3, found.size, generator=torch.Generator().manual_seed(1)).double()
    assert type(again) is type(found)
    assert repr(again) == repr(found)
    assert torch.equal(again @ vector, found @ vector)
    linear = WAYS[way](found.linear_operator())
    assert np.array_equal(linear @ vector[0].numpy(), (found @ vector[0]).numpy())


def test_factors_are_loaded_as_weights_only() -> None:
    found, file = factors("reduce", "joint"), io.BytesIO()
    for value in (found, found.inverse(0.1), found.eigh()):
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        with torch.serialization.safe_globals([KroneckerFactors, Block, Inverse, EigenFactors, *_solvers()]):
            again = torch.load(file, weights_only=True)
        vector = torch.ones(found.size).double()
        assert torch.equal(again @ vector, value @ vector)


def _solvers() -> list[type]:
    from lensor.curvature import inverses as module

    return [module._Eigen, module._Cholesky, module._Woodbury]


def test_a_copy_has_its_own_blocks() -> None:
    found = factors()
    vector = torch.ones(found.size).double()
    expected = found @ vector
    copy.copy(found).ema_(factors().in_convention("curvlinops").in_convention("paper"), 0.0)
    other = copy.copy(found)
    other.ema_(KroneckerFactors({n: b.scaled(2.0, 3.0) for n, b in found.items()}, **found._settings()), 0.5)
    assert torch.equal(found @ vector, expected)
    assert not torch.equal(other @ vector, expected)


@functools.cache
def values() -> dict[str, Any]:
    spec = lensor.ConvSpec(4, 8, (9, 9), 3, stride=2, padding=((0, 1), (2, 1)), padding_mode="circular", groups=2)
    net = lensor.ops.conv(spec)
    layer = Layer("net", "conv", spec, 2)
    row = Row("forward", "lensor", "1", layer, Setting(2, 4, "float32", "cpu", 1), Found(OK), Machine("m", 2, *"123"))
    contraction = lensor.contraction("a b, b c -> a c", "A", "B")
    return {
        "spec": spec,
        "pattern": lensor.IndexPattern(9, 3, stride=2, padding=1, padding_mode="reflect"),
        "network": net,
        "simplified": net.simplify(),
        "trace": net.simplify().trace,
        "sum": net.vjp("W"),
        "contraction": contraction.jvp("A"),
        "drawing": lensor.ops.conv(lensor.ConvSpec(4, 8, (9, 9), 3)).draw(),
        "machine": lensor.machine(),
        "measured": lensor.wisdom.Measured("X[n] -> n", "here", {"greedy": 1e-5}),
        "layer": layer,
        "row": row,
    }


@pytest.mark.parametrize("name", values())
@pytest.mark.parametrize("way", WAYS)
def test_values_are_equal_to_what_they_were(name: str, way: str) -> None:
    value = values()[name]
    again = WAYS[way](value)
    assert again == value
    assert repr(again) == repr(value)


@pytest.mark.parametrize("way", WAYS)
def test_plans_run_the_same(way: str) -> None:
    net = lensor.ops.conv(lensor.ConvSpec(4, 8, (9, 9), 3, padding=1))
    x, w = torch.randn(2, 4, 9, 9), torch.randn(8, 4, 3, 3)
    for operands in ({"X": x, "W": w}, {"X": x.numpy(), "W": w.numpy()}):
        plan = net.plan(**operands)
        expected = plan(**operands)
        again = WAYS[way](plan)
        assert str(again) == str(plan)
        assert np.array_equal(np.asarray(again(**operands)), np.asarray(expected))


def test_hashes_hold_in_another_process(tmp_path: Path) -> None:
    net = lensor.ops.conv(lensor.ConvSpec(4, 8, (9,), 3))
    kept = {net: 1, net.simplify(): 2, net.vjp("W"): 3, lensor.IndexPattern(9, 3): 4, lensor.ConvSpec(1, 1, 9, 3): 5}
    (tmp_path / "kept").write_bytes(pickle.dumps(kept))
    program = (
        "import pickle, sys, lensor\n"
        "kept = pickle.load(open(sys.argv[1], 'rb'))\n"
        "net = lensor.ops.conv(lensor.ConvSpec(4, 8, (9,), 3))\n"
        "keys = net, net.simplify(), net.vjp('W'), lensor.IndexPattern(9, 3), lensor.ConvSpec(1, 1, 9, 3)\n"
        "print(*(kept[key] for key in keys))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert done.stdout == "1 2 3 4 5\n", done.stderr


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_modules_compute_the_same(way: str) -> None:
    x = DATA[0]
    for made in (
        lensor.nn.convert(model()),
        lensor.sampling.convert(model(), {"i1": 1.0}),
        lensor.nn.ConvNd(4, 3, (3, 3), padding="same", padding_mode="reflect").double(),
        lensor.nn.ConvTransposeNd(4, 3, (3, 3), stride=2).double(),
    ):
        expected = made(x)
        assert torch.equal(WAYS[way](made)(x), expected)


# ------------------------------------------------------------------------------------------------ averages and states
def linear_like(groups: int, c: int, d: int) -> KroneckerFactors:
    block = Block(("w",), (4, 1, 3, 3), False, torch.ones(groups, d, d), None, torch.ones(groups, c, c), 4)
    return KroneckerFactors({"w": block}, examples=5)


def test_an_average_of_other_blocks_is_refused() -> None:
    # The weights' shapes are the same, and the factors' shapes could be broadcast.
    dense, depthwise = linear_like(1, 4, 9), linear_like(4, 1, 9)
    before = dense["w"]
    with pytest.raises(ValueError, match=r"block w is .*4 × kron.* in the other factors, expected .*1 × kron"):
        dense.ema_(depthwise, 0.9)
    assert dense["w"] is before
    for one, other, message in (
        (factors(bias="joint"), factors(bias="separate"), "in the other factors, expected"),
        (factors(bias="separate"), factors(bias="joint"), "in the other factors, expected"),
        (
            factors(),
            factors(dtype=torch.float32),
            r"torch\.float32 on cpu in the other factors, expected .*torch\.float64 on cpu",
        ),
        (factors(), KroneckerFactors(dict(factors()), reduction="sum"), "approx, convention or reduction"),
    ):
        with pytest.raises(ValueError, match=message):
            one.ema_(other, 0.9)
    for decay in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"decay is {decay}, expected a number between 0 and 1"):
            factors().ema_(factors(), decay)


def test_an_average_over_other_positions_has_none() -> None:
    one, other = factors(), factors()
    other._blocks["0.weight"] = replace(other["0.weight"], positions=9)
    one.ema_(other, 0.5)
    assert (one["0.weight"].positions, one["4.weight"].positions) == (0, other["4.weight"].positions)
    with pytest.raises(ValueError, match=r"the number of positions of 0\.weight varies"):
        one.in_convention("curvlinops")


def test_damping_that_is_negative_has_no_determinant() -> None:
    for found in (factors(), factors().eigh()):
        with pytest.raises(ValueError, match=r"damping is -0\.1, expected at least 0"):
            found.logdet(-0.1)


def test_states_of_other_models_are_refused() -> None:
    state = factors("reduce", "joint").state_dict()
    assert repr(KroneckerFactors.from_state_dict(state, model())) == repr(factors("reduce", "joint"))
    other = nn.Sequential(nn.Conv2d(4, 4, 5, groups=2))
    with pytest.raises(
        ValueError, match=r"the state has 0\.weight of shape \(4, 2, 3, 3\), expected that of this model: 0\.weight"
    ):
        KroneckerFactors.from_state_dict(state, other)
    with pytest.raises(ValueError, match=r"expected that of this model: no parameter 0\.weight"):
        KroneckerFactors.from_state_dict(state, nn.Linear(3, 2))


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    state = copy.deepcopy(factors("expand", "joint").state_dict())
    change(state)
    return state


def in_block(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state["blocks"]["0.weight"].update(values)


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda state: state.update(version=7), "cannot read state"),
    "no blocks": (lambda state: state.update(blocks=[1]), "cannot read state"),
    "missing": (lambda state: state.pop("outputs"), "outputs is missing"),
    "approx": (lambda state: state.update(approx="extend"), "approx"),
    "convention": (lambda state: state.update(convention="ours"), "convention"),
    "reduction": (lambda state: state.update(reduction="max"), "reduction"),
    "examples": (lambda state: state.update(examples="five"), "examples is 'five'"),
    "no B": (lambda state: state["blocks"]["0.weight"].pop("B"), r"block 0\.weight cannot be read \(KeyError: 'B'\)"),
    "no A": (lambda state: state["blocks"]["0.weight"].pop("A"), "has both A and its root, or neither"),
    "both": (in_block(root=torch.ones(2, 1, 19).double()), "has both A and its root"),
    "B of numbers": (in_block(B=3.0), "has an invalid B, expected a tensor"),
    "integers": (
        in_block(B=torch.ones(2, 2, 2).int()),
        "has an invalid B, expected a tensor of real numbers with three axes",
    ),
    "A not square": (in_block(A=torch.ones(2, 19, 18).double()), r"has A of shape \(2, 19, 18\), expected square"),
    "A of float": (in_block(A=torch.ones(2, 19, 19)), "has A and B with different groups, dtypes"),
    "groups": (in_block(A=torch.ones(1, 19, 19).double()), "has A and B with different groups"),
    "too small": (
        in_block(A=torch.ones(2, 18, 18).double()),
        r"expected factors for a parameter of shape \(4, 2, 3, 3\)",
    ),
    "shape": (in_block(shape=[4, 2, 5, 3]), r"expected factors for a parameter of shape \(4, 2, 5, 3\)"),
    "transposed": (in_block(transposed=True, shape=[4, 3, 6, 1]), "expected factors for a parameter"),
    "names": (in_block(names=["1.weight"]), r"has the parameters \('1\.weight',\)"),
    "twice": (lambda state: state["blocks"]["4.weight"].update(names=["4.weight", "0.bias"]), "contains duplicates"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_states_are_refused_when_they_are_read(name: str) -> None:
    change, message = DAMAGES[name]
    with pytest.raises(ValueError, match=message):
        KroneckerFactors.from_state_dict(changed(change))


def test_what_is_not_a_state_is_refused() -> None:
    for state in (None, [], {}, {"version": 1}, factors()):
        with pytest.raises(ValueError, match="cannot read state"):
            KroneckerFactors.from_state_dict(state)  # pyright: ignore[reportArgumentType]
