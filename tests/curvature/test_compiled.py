"""Compiled passes: the same numbers as uncompiled ones, whatever has changed since they were traced."""

from __future__ import annotations

import gc
import math
import random
import re
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lensor
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
    return len(compiled.passes.known)


# ------------------------------------------------------------------------------------------------------ random models
_TRAITS = [trait for trait in TRAITS if trait not in COMPILED]


@pytest.mark.parametrize(
    "trait", [trait if at % 8 == 0 else pytest.param(trait, marks=pytest.mark.slow) for at, trait in enumerate(_TRAITS)]
)
def test_random_models(trait: str) -> None:
    """Compiled passes have the same numbers, and are refused only where uncompiled ones are."""
    found = run_case(1000 + TRAITS.index(trait), trait)
    assert {outcome for _, outcome in found} <= {"equal", "refused"}, found


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
every = pytest.mark.parametrize(
    "name", ["norms", "factors", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gradients", "clipped"))]
)


@pytest.mark.slow
@every
def test_by_torchs_compiler(name: str) -> None:
    model, loss, data = network(), nn.CrossEntropyLoss(), batch()
    for _ in range(2):
        require_equal(QUANTITIES[name](model, loss, data), QUANTITIES[name](model, loss, data, compile=True))
    assert count() == 1


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.usefixtures("in_double_precision")
@pytest.mark.parametrize(
    "name",
    ["bert", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name not in ("bert", "gpt2"))],
)
def test_real_models(name: str) -> None:
    model, x, y, loss = MODELS[name]()
    model.eval()
    criterion: nn.Module = nn.CrossEntropyLoss()
    if loss is of_tokens:
        criterion = TokenCrossEntropyLoss(shift=True)
    elif name in ("siamese", "tied", "recurrent"):
        criterion, y = nn.MSELoss(), torch.zeros_like(ran(model, x))
    elif name == "unet":
        y = torch.randint(5, (len(x), *x.shape[2:]))
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


@pytest.mark.parametrize("name", ["norms", "clipped"])
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


def scaled(outputs: Tensor, targets: Tensor) -> Tensor:
    return WORLD["scale"] * WORLD["loss"](outputs, targets) * scaled.power * OPTIONS.power


class Called:
    """A loss without attributes."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.helped(outputs, targets)

    def helped(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets) ** 2).sum() * OPTIONS.power


class Trainer:
    """An object whose method is a loss."""

    def __init__(self) -> None:
        self.log: list[int] = []
        self.weight = 1.0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.weight * ((outputs - targets) ** 2).sum() * self.size

    @property
    def size(self) -> float:
        return OPTIONS.power


OPTIONS = SimpleNamespace(power=1.0)
WORLD: dict[str, Any] = {"scale": 1.0, "loss": nn.MSELoss(reduction="sum")}
scaled.power = 1.0  # type: ignore[attr-defined]


def test_changes_of_other_objects_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Global variables of any kind, attributes of functions, methods that other methods name, queues."""
    monkeypatch.setattr(compiled, "_MOST_OF_ONE", 100)
    model, data, trainer = nn.Linear(3, 2), (torch.randn(4, 3), torch.randn(4, 2)), Trainer()
    queue = deque([1.0])

    def queued(outputs: Tensor, targets: Tensor) -> Tensor:
        return sum(queue) * ((outputs - targets) ** 2).sum()

    losses = [scaled, Called(), trainer.loss, queued]

    def require_right() -> None:
        for loss in losses:
            require_equal(
                per_example_gradient_norms(model, loss, data),
                per_example_gradient_norms(model, loss, data, compile="eager"),
            )

    def set_power(value: float) -> None:
        OPTIONS.power = value

    changes: list[Callable[[], Any]] = [
        lambda: set_power(2.0),
        lambda: setattr(scaled, "power", 3.0),
        lambda: WORLD.update(scale=4.0),
        lambda: WORLD.update(loss=nn.L1Loss(reduction="sum")),
        lambda: setattr(trainer, "weight", 5.0),
        lambda: queue.append(2.0),
    ]
    try:
        require_right()
        for change in changes:
            change()
            require_right()
    finally:
        OPTIONS.power, scaled.power = 1.0, 1.0  # type: ignore[attr-defined]
        WORLD.update(scale=1.0, loss=nn.MSELoss(reduction="sum"))


def test_graphs_are_not_traced_needlessly() -> None:
    model, data, trainer = nn.Linear(3, 2), (torch.randn(4, 3), torch.randn(4, 2)), Trainer()
    for step in range(3):
        trainer.log.append(step)
        per_example_gradient_norms(model, trainer.loss, data, compile="eager")
        per_example_gradient_norms(model, Called(), data, compile="eager")
        handle = model.register_forward_hook(_double)
        per_example_gradient_norms(model, nn.MSELoss(), data, compile="eager")
        handle.remove()
    assert count() == 3


@pytest.mark.parametrize("name", ["gradients", "norms", "clipped"])
def test_one_tensor_in_two_places(name: str) -> None:
    """An auto-encoder takes its inputs as targets; the next batch may not."""
    model, call = nn.Linear(3, 3), QUANTITIES[name]
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    for data in ((x, x), (x, y), (y, y), (y, x)):
        require_equal(call(model, nn.MSELoss(), data), call(model, nn.MSELoss(), data, compile="eager"))
    assert count() == 2


def test_conjugated_and_negated_tensors() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 5, 2)[..., 1][:, :3]
    z = torch.view_as_complex(torch.randn(4, 3, 2))
    for given in (x, z.imag, z.conj().imag, z.real):
        data = given, torch.ones(4, 2)
        norms = partial(QUANTITIES["norms"], model, nn.MSELoss(), data)
        require_equal(norms(), norms(compile="eager"))


def test_objects_with_tensors_are_no_constants() -> None:
    model, data = nn.Linear(3, 2), (torch.randn(4, 3), SimpleNamespace(y=torch.randn(4, 2)))

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        return ((outputs - targets.y) ** 2).sum()

    per_example_gradient_norms(model, loss, data)
    with pytest.raises(TypeError, match="data contains an object of type SimpleNamespace with tensors, expected"):
        per_example_gradient_norms(model, loss, data, compile="eager")


@every
def test_inference_mode(name: str) -> None:
    model, call, data = nn.Linear(3, 2), QUANTITIES[name], (torch.randn(4, 3), torch.randn(4, 2))
    with torch.inference_mode():
        for _ in range(2):
            inside = data[0] * 2, data[1] * 2
            require_equal(call(model, nn.MSELoss(), inside), call(model, nn.MSELoss(), inside, compile="eager"))
    assert count() == 1


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@every
def test_recurrent_layers(name: str, kind: type[nn.Module]) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer: Any = kind(3, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0][:, -1]

    model, call = Last().double(), QUANTITIES[name]
    data = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    for _ in range(2):
        require_equal(call(model, nn.MSELoss(), data), call(model, nn.MSELoss(), data, compile="eager"))
    assert count() == 1


def test_batches_that_use_parameters_in_other_ways() -> None:
    """A graph is not used for a batch whose passes use a weight in other ways than previous batches."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x).mean(1)
            return out + torch.einsum("bti,oi->bo", x, self.layer.weight) if x.shape[1] > 5 else out

    model, loss = Sometimes(), nn.MSELoss()
    short, long = ((torch.randn(4, length, 3), torch.randn(4, 2)) for length in (3, 7))
    for first, second in ((short, long), (long, short)):
        for data in ([first], [second], [second, first]):
            expected = error = None
            try:
                expected = tensors_of(kfac(model, loss, data))
            except ValueError as found:
                error = str(found)
            if error is None:
                require_equal(expected or {}, tensors_of(kfac(model, loss, data, compile="eager")))
            else:
                with pytest.raises(ValueError, match=re.escape(error)):
                    kfac(model, loss, data, compile="eager")


def test_a_maximal_norm_is_an_input() -> None:
    model, loss, data = network(), nn.CrossEntropyLoss(), batch()
    for norm in (0.1, 0.3, 1e9):
        expected, found = (clipped_gradients(model, loss, data, norm, compile=one) for one in (False, "eager"))
        require_equal(expected.gradients, found.gradients)
        torch.testing.assert_close(expected.norms, found.norms)
    assert count() == 1


@every
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_memory_formats_and_dtypes(name: str, kind: torch.dtype) -> None:
    """Images with the channels last, and every other one of a larger batch; depthwise and in three dimensions."""
    flat, deep = (
        network().to(memory_format=torch.channels_last),
        nn.Sequential(nn.Conv3d(3, 6, 2, groups=3), nn.Flatten()),
    )
    deep.append(nn.Linear(6 * 8, 5))
    x, y = batch(8)
    cases = (flat, x.to(memory_format=torch.channels_last)), (deep, x.reshape(8, 3, 4, 4, 4)[:, :, :3, :3, :3])
    for model, inputs in cases:
        call = partial(QUANTITIES[name], model.to(kind), nn.CrossEntropyLoss(), (inputs.to(kind)[::2], y[::2]))
        for _ in range(2):
            expected, found = call(), call(compile="eager")
            for key, one in expected.items():
                assert one.dtype == found[key].dtype
                torch.testing.assert_close(one, found[key], rtol=1e-5, atol=1e-6 * float(one.abs().max()))
    assert count() == 2


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


def test_a_state_goes_on_from_batch_to_batch() -> None:
    """Within a call, the passes of a graph see what previous ones wrote into buffers, as uncompiled ones do."""

    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("total", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.total.add_(1)
            return self.layer(x) + self.total

    model, data = (
        Moving().double(),
        [(torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)) for _ in range(4)],
    )
    call = partial(kfac, model, nn.MSELoss(), data, fisher="empirical", batch_axis=0)
    expected = tensors_of(call())
    for _ in range(2):
        require_equal(expected, tensors_of(call(compile="eager")))
        assert not model.total
    assert count() == 1
    spectral = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 2)).double().train()
    call = partial(kfac, spectral, nn.MSELoss(), data, fisher="empirical", batch_axis=0)
    expected = tensors_of(call())
    for _ in range(2):
        require_equal(expected, tensors_of(call(compile="eager")))


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
    with pytest.warns(UserWarning, match="2 passes of this model with other shapes or states are compiled") as told:
        call(4)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(5)
    assert count() == 2


class Counting(nn.Module):
    """A model that counts its passes, which a graph does not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.count = nn.Linear(3, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.layer(x)


@every
def test_a_model_that_changes_itself_runs_uncompiled(name: str) -> None:
    model, call, data = Counting(), QUANTITIES[name], (torch.randn(4, 3), torch.randn(4, 2))
    call(model, nn.MSELoss(), data, batch_axis=0)
    once = model.count
    with pytest.warns(UserWarning, match="the pass changes attributes of the model or of the loss"):
        call(model, nn.MSELoss(), data, batch_axis=0, compile="eager")
    call(model, nn.MSELoss(), data, batch_axis=0, compile="eager")
    assert (model.count, count()) == (3 * once, 0)


@every
def test_tracing_has_no_effects(name: str) -> None:
    """Attributes and random numbers are as after an uncompiled call."""

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop = nn.Linear(3, 2), nn.Dropout(0.5)
            self.register_buffer("total", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.total.add_(1)
            return self.drop(self.layer(x)) + self.total

    model, call, data = Writing(), QUANTITIES[name], (torch.randn(4, 3), torch.randn(4, 2))
    after = []
    for compile in (False, "eager", "eager"):
        torch.manual_seed(0)
        found = call(model, nn.MSELoss(), data, batch_axis=0, compile=compile)
        after.append((float(model.total), float(torch.rand(())), float(sum(one.sum() for one in found.values()))))
    assert after[1] == pytest.approx(after[0])
    assert after[2] == pytest.approx(after[0])
    assert count() == 1


def test_all_caches_are_cleared() -> None:
    per_example_gradient_norms(network(), nn.CrossEntropyLoss(), batch(), compile="eager")
    model = network()
    per_example_gradient_norms(model, nn.CrossEntropyLoss(), batch(), compile="eager")
    assert count() == 1
    lensor.clear_caches()
    assert count() == 0


def test_several_threads() -> None:
    models, loss, data = [network() for _ in range(4)], nn.CrossEntropyLoss(), batch()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda model: tensors_of(kfac(model, loss, data, compile="eager")), models))
        again = list(pool.map(lambda model: tensors_of(kfac(model, loss, data, compile="eager")), models))
    for model, one, two in zip(models, found, again, strict=True):
        require_equal(tensors_of(kfac(model, loss, data)), one)
        require_equal(one, two)
    assert count() == 4


def test_many_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.passes.known, "maxsize", 2)
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


BUFFER = torch.tensor(1.0)

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
    "dlpack": lambda x: float(np.from_dlpack(x).sum()),
    "text": lambda x: float(f"{x.sum():.3f}"),
    "python's generator": lambda x: random.random(),
    "numpy's generator": lambda x: float(np.random.rand()),
    "generator": lambda x: torch.rand(2, generator=torch.Generator().manual_seed(7)),
    "buffer": lambda x: BUFFER.item(),
    "list of a buffer": lambda x: BUFFER[None].tolist()[0],
    "size from a buffer": lambda x: x[:, : BUFFER.long()].mean(),
    "comparison of a buffer": lambda x: float(torch.equal(BUFFER, BUFFER + 1)) + 1,
    "list of buffers": lambda x: torch.tensor([BUFFER, BUFFER]),
    "array of buffers": lambda x: x.new_tensor([BUFFER, BUFFER]),
    "text of a buffer": lambda x: float(len(str(BUFFER))),
    "split by a buffer": lambda x: x.tensor_split(BUFFER.long().reshape(1), 1)[0].mean(),
    "parameter": lambda x: nn.Parameter(BUFFER * 2, requires_grad=False),
    "slope": lambda x: F.leaky_relu(-x, BUFFER).mean(),
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


class Drawing(nn.Module):
    """A model that sets the state of torch's generator, which a graph does not."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.way = nn.Linear(3, 2), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "checkpoint":
            run = lambda x: F.dropout(self.layer(x), 0.5, True)  # noqa: E731
            out = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
            assert isinstance(out, Tensor)
            return out
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.layer(x) * torch.randn(2)


@pytest.mark.parametrize("way", ["checkpoint", "seed"])
@every
def test_states_of_generators_that_a_model_sets(name: str, way: str) -> None:
    torch.manual_seed(0)
    model, data = Drawing(way), (torch.randn(4, 3), torch.randn(4, 2))
    call = partial(QUANTITIES[name], model, nn.MSELoss(), data, batch_axis=0)
    call()
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="draws from a generator that the model seeds or holds"):
        call(compile="eager")


@pytest.mark.parametrize("kind", ["numpy", "random state", "python"])
def test_generators_of_a_model(kind: str) -> None:
    """Their state changes in each pass, which therefore runs uncompiled."""
    made = {"numpy": np.random.default_rng, "random state": np.random.RandomState, "python": random.Random}[kind]
    draw = (lambda one: one.random()) if kind == "python" else (lambda one: one.normal())
    found = []
    for compile in (False, "eager"):
        generator = made(0)
        model = Choosing(lambda x, g=generator: float(draw(g)))
        model.layer.load_state_dict({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
        data = torch.ones(4, 3), torch.zeros(4, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            norms = [
                per_example_gradient_norms(model, nn.MSELoss(), data, batch_axis=0, compile=compile) for _ in range(4)
            ]
        found.append({f"{at} {name}": one for at, each in enumerate(norms) for name, one in each.items()})
    require_equal(*found)
    assert count() == 0


def _times(x: Tensor) -> Tensor:
    return x * OPTIONS.power


class Base(nn.Module):
    """A model with values that its functions find in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.helper = nn.Linear(3, 2), Helper()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * OPTIONS.power


class Helper:
    """A plain object."""

    def scale(self, x: Tensor) -> Tensor:
        return x * OPTIONS.power

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        return x * OPTIONS.power


class OfItsClass(Base):
    power = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.power


class Picked(Base):
    def __init__(self) -> None:
        super().__init__()
        self.pick = itemgetter(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.pick((1.0, 3.0))


class Inherited(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Helped(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.helper.scale(self.layer(x))


class OfClass(Base):
    def forward(self, x: Tensor) -> Tensor:
        return Helper.of_class(self.layer(x))


class Made(Base):
    def forward(self, x: Tensor) -> Tensor:
        return Helper().scale(self.layer(x))


class ByName(Base):
    def aux(self, x: Tensor) -> Tensor:
        return x * OPTIONS.power

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "aux")(self.layer(x))  # noqa: B009


class Wrapped(Base):
    @torch.enable_grad()
    def forward(self, x: Tensor) -> Tensor:
        return _times(self.layer(x))


@pytest.mark.parametrize("kind", [Base, Inherited, OfItsClass, Picked, Helped, OfClass, Made, ByName, Wrapped])
def test_values_that_functions_find_elsewhere(kind: type[Base]) -> None:
    model, data = kind(), (torch.randn(4, 3), torch.randn(4, 2))
    try:
        for power in (1.0, 3.0):
            OPTIONS.power = OfItsClass.power = power
            if isinstance(model, Picked):
                model.pick = itemgetter(int(power) // 2)
            for _ in range(2):
                require_equal(
                    per_example_gradient_norms(model, nn.MSELoss(), data),
                    per_example_gradient_norms(model, nn.MSELoss(), data, compile="eager"),
                )
    finally:
        OPTIONS.power = OfItsClass.power = 1.0
    assert count() == 2


def _of_object(owner: Any, x: Tensor) -> Tensor:
    return x * owner.power


def test_attributes_that_a_method_reads_elsewhere() -> None:
    class Loss:
        def __init__(self) -> None:
            self.power, self.items, self.other = 1.0, [1.0], 0

        def __getitem__(self, place: int) -> float:
            return self.items[place]

        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return _of_object(self, (outputs - targets) ** 2).sum() * self[0]

    model, data, loss = nn.Linear(3, 2), (torch.randn(4, 3), torch.randn(4, 2)), Loss()
    for change in (lambda: None, lambda: setattr(loss, "power", 2.0), lambda: loss.items.__setitem__(0, 3.0)):
        change()
        loss.other += 1
        require_equal(
            per_example_gradient_norms(model, loss.loss, data),
            per_example_gradient_norms(model, loss.loss, data, compile="eager"),
        )
    assert count() == 3


class _Permuted(nn.Module):
    """A layer whose rows are ordered by examples or by positions, as the value of a buffer says."""

    by_position: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("by_position", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        by_example = torch.arange(n * t)
        rows = torch.where(self.by_position, by_example.view(n, t).t().reshape(-1), by_example)
        found = self.hidden(x.reshape(n * t, -1)[rows]).tanh()
        return self.last(torch.zeros_like(found).index_copy(0, rows, found).view(n, t, -1).mean(1))


@pytest.mark.parametrize("batch_axis", [None, 0])
def test_orders_of_examples_that_depend_on_values_are_not_those_of_the_graph(batch_axis: Any) -> None:
    torch.manual_seed(0)
    model, loss, options = _Permuted().double(), nn.CrossEntropyLoss(), {"compile": "eager", "batch_axis": batch_axis}
    for by_position in (False, False, True, False, True) if batch_axis is None else (False, False):
        model.by_position.fill_(by_position)
        data = torch.randn(6, 5, 4, dtype=torch.float64), torch.arange(6) % 3
        for name, call in QUANTITIES.items():
            named = {"approx": "reduce"} if name == "factors" else {}
            expected = call(model, loss, data, **named)
            compiled.passes._warned.clear()
            warns = pytest.warns(UserWarning, match="the order of the examples") if by_position else nullcontext()
            with warns:
                found = call(model, loss, data, **named, **options)
            require_equal(expected, found)
