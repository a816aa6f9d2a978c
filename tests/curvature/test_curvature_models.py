"""Curvature of random models, as people write them, against autograd: nothing is silently wrong.

`python -m tests.sweeps.models` draws many more; what stands here is one model of every trait, and some ordinary ones.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lensor import curvature
from tests.support.model_oracles import Oracle
from tests.support.models import COMPILED, TRAITS, make_case
from tests.sweeps import models as model_sweep
from tests.sweeps.models import FUNCTIONS, Result, run_case

KEPT = ("per_example_gradients", "kfac")
"""Functions that are called on every model; two of the others take turns."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(before)


def require_right(results: list[Result]) -> None:
    """No wrong number and no raw error; ordinary models are not refused."""
    bad = [one for one in results if one.outcome in ("WRONG", "crash") or one.text.startswith("an ordinary model")]
    text = "\n".join(f"{one.function}: {one.outcome}, {one.text}" for one in bad)
    assert not bad, f"{text}\nseed {bad[0].seed}, traits {bad[0].traits}: {bad[0].model}"


@pytest.mark.parametrize("seed", range(8))
def test_an_ordinary_model(seed: int) -> None:
    require_right(run_case(seed, trait="-"))


@pytest.mark.parametrize("trait", [trait for trait in TRAITS if trait not in COMPILED])
def test_a_model_with_a_trait(trait: str) -> None:
    seed = TRAITS.index(trait)
    others = [name for name in FUNCTIONS if name not in KEPT]
    require_right(run_case(seed, trait=trait, functions=[*KEPT, *random.Random(seed).sample(others, 2)]))


@pytest.mark.slow
@pytest.mark.parametrize("trait", COMPILED)
def test_a_compiled_model(trait: str) -> None:
    require_right(run_case(TRAITS.index(trait), trait=trait))


@pytest.mark.slow
def test_models_with_any_traits() -> None:
    for seed in range(100, 200):
        require_right(run_case(seed))


# ------------------------------------------------------------------------------------------------- the test is one
def test_the_oracle_is_torchs_own() -> None:
    case = make_case(3, [])
    oracle, named = Oracle(case), dict(case.plain.named_parameters())
    values = {name: p.detach() for name, p in named.items()}
    x, y = case.data

    def loss(values: Any) -> Any:
        return case.loss.given(torch.func.functional_call(case.plain, values, (x,)), y)

    whole = torch.func.grad(loss)(values)
    for name, gradient in oracle.gradients.items():
        torch.testing.assert_close(gradient.sum(0), whole[name], rtol=1e-9, atol=1e-12)
    name = min(values, key=lambda one: values[one].numel())
    full = torch.func.hessian(lambda value: loss(values | {name: value}))(values[name])
    size = values[name].numel()
    places, entries = oracle.hessian_entries(random.Random(0), 4)[name]
    torch.testing.assert_close(full.reshape(size, size).diagonal()[places], entries, rtol=1e-8, atol=1e-12)
    layer = next(iter(oracle.plain_layers))
    weight = f"{layer}.weight"
    values_of = oracle.blocks([one[0][weight].flatten(1)[:, None] for one in oracle.jacobians], "type-2")[0]
    torch.testing.assert_close(values_of.diagonal(), oracle.ggn_diagonal()[weight].flatten())


def _scaled(found: Any) -> Any:
    return {name: (1 + 1e-6) * value for name, value in found.items()}


def _without_one(found: Any) -> Any:
    return dict(list(found.items())[1:])


@pytest.mark.parametrize("fault", [_scaled, _without_one])
@pytest.mark.parametrize(
    "name", ["per_example_gradients", "per_example_gradient_norms", "ggn_diagonal", "hessian_diagonal"]
)
def test_faults_are_found(monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable[[Any], Any]) -> None:
    right = getattr(curvature, name)
    (before,) = [one for one in run_case(3, trait="-", functions=[name]) if one.function == name]
    monkeypatch.setattr(model_sweep.curvature, name, lambda *a, **named: fault(right(*a, **named)))
    (after,) = [one for one in run_case(3, trait="-", functions=[name]) if one.function == name]
    assert (before.outcome, after.outcome) == ("right", "WRONG")


@pytest.mark.parametrize("error", [KeyError, TypeError])
def test_other_errors_are_not_refusals(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        return {}["a key"]

    if error is TypeError:  # a fault inside of the library, as a traceback shows it
        monkeypatch.setattr("lensor.curvature.ggn.refuse_mixing", None)
    else:
        monkeypatch.setattr(model_sweep.curvature, "ggn_diagonal", broken)
    (found,) = [one for one in run_case(3, trait="-", functions=["ggn_diagonal"]) if one.function == "ggn_diagonal"]
    assert found.outcome == "crash"
