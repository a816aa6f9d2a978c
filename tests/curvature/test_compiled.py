"""Compiled passes: the same numbers as uncompiled ones, whatever has changed since they were traced."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lensor.curvature import (
    TokenCrossEntropyLoss,
    clipped_gradients,
    compiled,
    kfac,
    per_example_gradient_norms,
    per_example_gradients,
)
from tests.curvature.test_real_models import MODELS, of_tokens, ran
from tests.support.models import COMPILED, TRAITS
from tests.sweeps.compiled import run_case

FACTOR = 3.0
"""A global variable that a loss below names."""


@pytest.fixture(autouse=True)
def no_passes() -> Iterator[None]:
    compiled.passes.clear()
    yield
    compiled.passes.clear()


def network(**options: Any) -> nn.Sequential:
    norm = nn.BatchNorm2d(8, **options)
    made = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2), nn.Flatten())
    made.append(nn.Linear(4 * 6 * 6, 5))
    with torch.no_grad():
        for buffer in (norm.running_mean, norm.running_var):
            assert buffer is not None
            buffer.uniform_(0.5, 2)
    return made.double().eval()


def batch(examples: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (examples,), generator=generator)


def tensors_of(found: Any) -> dict[str, Tensor]:
    return {f"{name} {kind}": getattr(block, kind) for name, block in found.items() for kind in "AB"}


def require_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert list(one) == list(two)
    for name, values in one.items():
        torch.testing.assert_close(two[name], values, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


def count() -> int:
    return len(compiled.passes._known)


# ------------------------------------------------------------------------------------------------------ random models
@pytest.mark.parametrize("trait", [trait for trait in TRAITS if trait not in COMPILED])
def test_random_models(trait: str) -> None:
    wrong = [one for one in run_case(1000 + TRAITS.index(trait), trait) if one[1].startswith(("WRONG", "crash"))]
    assert not wrong


# -------------------------------------------------------------------------------------------------------- all options
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical", "forward-only"])
@pytest.mark.parametrize("others", ["diagonal", "full", "skip"])
def test_factors_of_several_batches(approx: Any, fisher: Any, others: Any) -> None:
    """The last batch is smaller, and runs uncompiled; the graphs are used again in the next call."""
    if fisher == "forward-only" and others != "skip":
        return
    model, loss = network(), nn.CrossEntropyLoss()
    data = [batch(), batch(seed=1), batch(3, seed=2)]

    def call(compile: Any) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        options = {"approx": approx, "fisher": fisher, "others": others, "generator": generator}
        return tensors_of(kfac(model, loss, data, compile=compile, **options))

    expected = call(False)
    require_equal(expected, call("eager"))
    require_equal(expected, call("eager"))
    assert count() == 1


def test_one_graph_for_all_losses_and_ways_to_sample() -> None:
    model, data = network(), [batch(), batch(seed=1)]
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1)):
        for fisher in ("type-2", "empirical"):
            expected = tensors_of(kfac(model, loss, data, fisher=fisher))
            require_equal(expected, tensors_of(kfac(model, loss, data, fisher=fisher, compile="eager")))
    assert count() == 1


QUANTITIES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "gradients": per_example_gradients,
    "norms": per_example_gradient_norms,
    "clipped": lambda *three, **named: clipped_gradients(*three, 0.1, reduction="sum", **named).gradients,
    "factors": lambda *three, **named: tensors_of(kfac(*three, fisher="empirical", **named)),
}
every = pytest.mark.parametrize("name", QUANTITIES)


@pytest.mark.slow
@every
def test_by_torchs_compiler(name: str) -> None:
    model, loss, data = network(), nn.CrossEntropyLoss(), batch()
    for _ in range(2):
        require_equal(QUANTITIES[name](model, loss, data), QUANTITIES[name](model, loss, data, compile=True))
    assert count() == 1


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.usefixtures("in_double_precision")
@pytest.mark.parametrize("name", ["convnext", "swin", "bert", "gpt2", "wav2vec2", "siamese", "recurrent", "tied"])
def test_real_models(name: str) -> None:
    model, x, y, loss = MODELS[name]()
    model.eval()
    criterion: nn.Module = nn.CrossEntropyLoss()
    if loss is of_tokens:
        criterion = TokenCrossEntropyLoss(shift=True)
    elif name in ("siamese", "tied", "recurrent"):
        criterion, y = nn.MSELoss(), torch.zeros_like(ran(model, x))
    for quantity in ("factors", "clipped"):
        call = QUANTITIES[quantity]
        for _ in range(2):
            require_equal(call(model, criterion, (x, y)), call(model, criterion, (x, y), compile="eager"))
    assert count() == 2


# --------------------------------------------------------------------------------------- what graphs read and depend on
@every
def test_changed_values_are_seen(name: str) -> None:
    """Weights, statistics and targets are inputs of the graph."""
    model, loss, call = network(), nn.CrossEntropyLoss(), QUANTITIES[name]
    call(model, loss, batch(), compile="eager")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(2)
    model[0].weight.data = model[0].weight.data.clone() + 1
    data = batch(seed=3)
    require_equal(call(model, loss, data), call(model, loss, data, compile="eager"))
    assert count() == 1


def _double(module: nn.Module, arguments: Any, out: Tensor) -> Tensor:
    return 2 * out


def _replace(model: nn.Sequential) -> None:
    model[2] = nn.Tanh()


def _freeze(model: nn.Sequential) -> None:
    model[1].weight.requires_grad_(False)


def _train(model: nn.Sequential) -> None:
    model[2] = nn.Dropout(0.0)
    model[2].train()


def _new_parameter(model: nn.Sequential) -> None:
    model[5].weight = nn.Parameter(model[5].weight.detach() * 3)


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "option": lambda model: setattr(model[1], "eps", 0.5),
    "hook": lambda model: model[0].register_forward_hook(_double),
    "module": _replace,
    "frozen": _freeze,
    "mode": _train,
    "parameter": _new_parameter,
    "forward": lambda model: setattr(model[2], "forward", lambda x: x.sigmoid()),
    "stride": lambda model: setattr(model[3], "stride", (1, 1)),
}


@every
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_model_are_seen(name: str, change: str) -> None:
    model, loss, call = network(), nn.CrossEntropyLoss(), QUANTITIES[name]
    call(model, loss, batch(), compile="eager")
    CHANGES[change](model)
    for _ in range(2):
        require_equal(call(model, loss, batch()), call(model, loss, batch(), compile="eager"))


@pytest.mark.parametrize("name", ["gradients", "norms", "clipped"])
def test_changes_of_the_loss_are_seen(name: str) -> None:
    model, call = network(), QUANTITIES[name]
    scale = [1.0]
    torchs, weight = nn.CrossEntropyLoss(reduction="sum"), 1.0

    def captured(outputs: Tensor, targets: Tensor) -> Tensor:
        return weight * scale[0] * torchs(outputs, targets)

    def naming(outputs: Tensor, targets: Tensor) -> Tensor:
        return FACTOR * torchs(outputs, targets)

    for loss in (torchs, captured, naming):
        call(model, loss, batch(), compile="eager")
    scale[0], weight, torchs.label_smoothing = 2.0, 5.0, 0.3
    try:
        globals()["FACTOR"] = 7.0
        for loss in (torchs, captured, naming):
            require_equal(call(model, loss, batch()), call(model, loss, batch(), compile="eager"))
    finally:
        globals()["FACTOR"] = 3.0


def test_a_maximal_norm_is_an_input() -> None:
    model, loss, data = network(), nn.CrossEntropyLoss(), batch()
    for norm in (0.1, 0.3, 1e9):
        expected, found = (clipped_gradients(model, loss, data, norm, compile=one) for one in (False, "eager"))
        require_equal(expected.gradients, found.gradients)
        torch.testing.assert_close(expected.norms, found.norms)
    assert count() == 1


@every
def test_casts_and_precision(name: str) -> None:
    """A graph that was traced under autocast contains its casts, and one that was not is not cast."""
    model, loss, call = network().float(), nn.CrossEntropyLoss(), QUANTITIES[name]
    x, y = batch()
    data = x.float(), y
    for _ in range(2):
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                expected, found = call(model, loss, data), call(model, loss, data, compile="eager")
            for key, one in expected.items():
                torch.testing.assert_close(one, found[key], rtol=1e-4, atol=1e-5 * float(one.abs().max()))
    assert count() == 2


def test_targets_are_checked_each_time() -> None:
    model, loss, (x, y) = network(), nn.CrossEntropyLoss(), batch()
    kfac(model, loss, (x, y), compile="eager")
    with pytest.raises(ValueError, match="targets have class 5, expected 0 to 4"):
        kfac(model, loss, (x, torch.full_like(y, 5)), compile="eager")
    some = torch.where(torch.arange(4) < 2, y, -100)  # ignored targets change the divisor of the mean
    require_equal(tensors_of(kfac(model, loss, (x, some))), tensors_of(kfac(model, loss, (x, some), compile="eager")))
    clipped_gradients(model, loss, (x, y), 1.0, compile="eager")
    with pytest.raises(ValueError, match="the examples have the weights"):
        clipped_gradients(model, loss, (x, some), 1.0, compile="eager")


def test_statistics_stay_as_they_were() -> None:
    model, loss, data = network(momentum=0.5).train(), nn.CrossEntropyLoss(), [batch(), batch(seed=1)]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    expected = tensors_of(kfac(model, loss, data, others="skip", fisher="empirical"))
    for _ in range(2):
        require_equal(expected, tensors_of(kfac(model, loss, data, others="skip", fisher="empirical", compile="eager")))
    require_equal(before, dict(model.named_buffers()))
    assert count() == 1


def test_results_do_not_share_memory() -> None:
    """A second call must not change the result of the first one."""
    model, loss = network(), nn.CrossEntropyLoss()
    for call in QUANTITIES.values():
        call(model, loss, batch(), compile="eager")
        first = call(model, loss, batch(), compile="eager")
        kept = {name: one.clone() for name, one in first.items()}
        call(model, loss, batch(seed=5), compile="eager")
        require_equal(kept, first)
        assert not any(one.requires_grad for one in first.values())


# --------------------------------------------------------------------------------------------------- keeping and errors
def test_graphs_go_with_their_model() -> None:
    for make in (network, lambda: nn.Linear(3, 5).double()):
        model = make()
        gone = weakref.ref(model)
        x = batch()[0] if isinstance(model, nn.Sequential) else torch.randn(4, 3, dtype=torch.float64)
        for call in QUANTITIES.values():
            call(model, nn.CrossEntropyLoss(), (x, batch()[1]), compile="eager")
        assert count() == len(QUANTITIES)
        del model
        gc.collect()
        assert gone() is None
        assert count() == 0


def test_few_graphs_for_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_MOST_OF_ONE", 2)
    model, loss = network(), nn.CrossEntropyLoss()

    def call(examples: int) -> None:
        data = batch(examples)
        require_equal(
            per_example_gradient_norms(model, loss, data),
            per_example_gradient_norms(model, loss, data, compile="eager"),
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(2)
        call(3)
    with pytest.warns(UserWarning, match="2 passes of this model were compiled") as told:
        call(4)
    assert told[0].filename == __file__
    call(5)
    assert count() == 2


def test_many_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_MOST", 2)
    models = [network() for _ in range(3)]
    for model in models:
        per_example_gradient_norms(model, nn.CrossEntropyLoss(), batch(), compile="eager")
    assert count() == 2


class Choosing(nn.Module):
    """A model that depends on the values of its inputs."""

    def __init__(self, factor: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.factor = nn.Linear(3, 2), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.factor(x.detach())


VALUES: dict[str, Callable[[Tensor], Any]] = {
    "condition": lambda x: 1.0 if x.sum() > 0 else 2.0,
    "number": lambda x: float(x.mean()),
    "list": lambda x: x.flatten().tolist()[0],
    "array": lambda x: float(x.numpy().sum()),
    "asarray": lambda x: float(np.asarray(x).sum()),
    "mask": lambda x: x[x > 0].mean(),
    "positions": lambda x: len(torch.nonzero(x)),
    "unique": lambda x: x.unique().mean(),
    "equal": lambda x: torch.equal(x, x + 1) + 1,
}


@every
@pytest.mark.parametrize("value", VALUES)
def test_a_model_that_depends_on_values(name: str, value: str) -> None:
    """A graph cannot contain these values, which would be constants; uncompiled, the pass is right."""
    model, x = Choosing(VALUES[value]), torch.arange(1.0, 13).reshape(4, 3)
    call = partial(QUANTITIES[name], model, nn.MSELoss(), (x, torch.zeros(4, 2)), batch_axis=0)
    call()
    with pytest.raises(ValueError, match="cannot be traced into one graph, expected"):
        call(compile="eager")


def test_an_index_is_not_a_mask() -> None:
    model, x = Choosing(lambda x: x[:, [0, 2]]), torch.randn(4, 3)
    call = partial(QUANTITIES["norms"], model, nn.MSELoss(), (x, torch.zeros(4, 2)))
    for _ in range(2):
        require_equal(call(), call(compile="eager"))
    assert count() == 1


def test_an_unknown_choice() -> None:
    for call in QUANTITIES.values():
        with pytest.raises(ValueError, match="compile is 'fast', expected one of 'inductor', 'eager'"):
            call(network(), nn.CrossEntropyLoss(), batch(), compile="fast")


def test_a_nan_is_found() -> None:
    model, (x, y) = network(), batch()
    kfac(model, nn.CrossEntropyLoss(), (x, y), compile="eager")
    x[0, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError):
        kfac(model, nn.CrossEntropyLoss(), (x, y), compile="eager")
