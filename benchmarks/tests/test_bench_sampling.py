"""The numbers of `lensor reproduce crs` and `lensor bench sampling`, made again by other means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lensor_bench import crs
from lensor_bench import sampling as bench
from lensor_bench.measure import Call, Times
from lensor_bench.nets import all_cnn_c
from lensor_bench.training import TASKS
from torch import Tensor, nn
from typer.testing import CliRunner

from lensor import cli, sampling
from lensor.sampling.layers import Sampled

MADE = crs.Made("some processor", 2, "3.11", "2.6", "0.1", threads=1)


# ---------------------------------------------------------------------------------------------------------------- crs
def small() -> nn.Sequential:
    """A network of the kinds of layers that All-CNN-C has."""
    first = (nn.Dropout(0.2), nn.ZeroPad2d(1), nn.Conv2d(3, 8, 3), nn.ReLU())
    last = (nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 10, 1), nn.ReLU())
    return nn.Sequential(*first, *last, nn.AdaptiveAvgPool2d(1), nn.Flatten())


AXES = {"n": 0, "c_in": 1, "i1": 2, "i2": 3}


def masked(x: Tensor, indices: Sequence[str], scheme: str, share: float) -> Tensor:
    """The input of a convolution with positions drawn by torch's generator, times their factors, zeros elsewhere."""
    found = x.detach()
    for index in indices:
        axis, rate = AXES[index], share if len(indices) == 1 else math.sqrt(share)
        norms = x.detach().square().sum([other for other in range(4) if other != axis]).sqrt()
        drawn = sampling.draw(x.shape[axis], rate, scheme, norms=norms)
        factors = torch.zeros(x.shape[axis])
        factors[drawn.positions] = 1 / float(drawn.keep) if drawn.weights is None else drawn.weights.float()
        found = found * factors.reshape([-1 if at == axis else 1 for at in range(4)])
    return found


def by_hand(model: nn.Sequential, x: Tensor, y: Tensor, *how: Any) -> Tensor:
    """The kernels' gradients as one vector; those of inputs of convolutions that are masked, where `how` says so.

    W * X has the value and the input gradient, what is added is zero and has the gradient of W that is wanted.
    """
    kernels = []
    for module in model:  # a module that stands twice is there twice
        if isinstance(module, nn.Conv2d):
            options = (module.stride, module.padding)
            kernels.append(module.weight)
            part = masked(x, *how) if how else x.detach()
            sampled = nn.functional.conv2d(part, module.weight, None, *options)
            exact = nn.functional.conv2d(x, module.weight.detach(), module.bias, *options)
            x = exact + sampled - sampled.detach()
        elif not isinstance(module, nn.Dropout):
            x = module(x)
    return torch.cat([one.flatten() for one in torch.autograd.grad(nn.functional.cross_entropy(x, y), kernels)])


def test_errors_and_times_of_points_are_those_of_the_draws_that_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[Tensor] = []
    gradient = crs._gradient

    def recorded(*arguments: Any) -> Tensor:
        states.append(torch.get_rng_state())
        return gradient(*arguments)

    def timed(calls: Sequence[Call], seconds: float, least: int) -> list[Times]:
        """Three seconds for the exact gradient, one for others."""
        every = [call() for call in calls]
        return [Times((3.0 if float((one - exact).norm() / exact.norm()) < 1e-3 else 1.0,)) for one in every]

    torch.manual_seed(0)
    model = small()
    x, y = torch.randn(6, 3, 12, 12) * torch.linspace(0.2, 2.0, 12), torch.randint(10, (6,))
    exact = by_hand(model, x, y)
    monkeypatch.setattr(crs, "all_cnn_c", small)
    monkeypatch.setattr(crs, "_data", lambda settings: {crs.REAL: lambda count, seed: (x[:count], y[:count])})
    monkeypatch.setattr(crs, "_gradient", recorded)
    monkeypatch.setattr(crs, "interleaved", timed)
    monkeypatch.setattr(crs.Settings, "data", (crs.REAL,))
    points = list(crs.run(crs.Settings(6, (0.6,), (0.6,), seeds=1, others=1), MADE, []))
    assert {(point.indices, point.scheme) for point in points} == {
        (" ".join(indices), scheme) for indices, scheme in (*crs.PAPER, *crs.OTHERS)
    }
    for point, state in zip(points, states[1:], strict=True):  # the first is the exact gradient's
        torch.set_rng_state(state)
        found = by_hand(model, x, y, point.indices.split(), point.scheme, point.share)
        assert point.error == pytest.approx(float((found - exact).norm() / exact.norm()), rel=1e-3)
        assert (point.seconds, point.exact_seconds) == (1.0, 3.0)
        assert crs.table([point])[0][-1] == "0.33"


# ----------------------------------------------------------------------------------------------------- bench sampling
def test_saved_bytes_of_steps_are_those_of_the_shares() -> None:
    """Beside what rectifiers keep whole: each convolution keeps its part, and the positions that were drawn."""
    batch, shapes = 2, []
    model = all_cnn_c()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[1:]))
    model(torch.zeros(batch, 3, 32, 32))
    whole = sum(4 * batch * math.prod(shape) for shape in shapes)
    saved = {row.way: row.saved for row in bench.steps(batch, 0.0, 1, 1)}
    rest = saved["rectifiers keep a byte"] - whole
    for keep in bench.KEEPS:
        rows = [[max(1, round(size * math.sqrt(keep))) for size in shape[1:]] for shape in shapes]
        parts = sum(4 * batch * shape[0] * math.prod(kept) for shape, kept in zip(shapes, rows, strict=True))
        assert saved[f"positions, keep {keep:g}"] == rest + parts + sum(8 * sum(kept) for kept in rows)
        channels = [max(1, round(shape[0] * keep)) for shape in shapes]
        parts = sum(4 * batch * kept * math.prod(shape[1:]) for shape, kept in zip(shapes, channels, strict=True))
        assert saved[f"channels, keep {keep:g}"] == rest + parts + sum(8 * kept for kept in channels)


def test_times_of_gradients_are_over_the_faster_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Tensor] = []
    seconds = [0.004, 0.002, 0.001, 0.003, 0.005]  # torch, Lensor, and three sampled ones

    def timed(calls: Sequence[Call], *_: Any) -> list[Times]:
        results.extend(call() for call in calls)
        return [Times((2 * one, one)) for one in seconds]

    operands: list[Tensor] = []
    whole = bench.conv2d_weight

    def seen(x: Tensor, shape: Sequence[int], v: Tensor, **options: Any) -> Tensor:
        operands[:] = [x, v]
        return whole(x, shape, v, **options)

    monkeypatch.setattr(bench, "LAYERS", ((4, 9),))
    monkeypatch.setattr(bench, "KEEPS", (0.25,))
    monkeypatch.setattr(bench, "interleaved", timed)
    monkeypatch.setattr(bench, "conv2d_weight", seen)
    rows = list(bench.gradients(2, 0.0, 1, 1))
    assert [(row.layer, row.indices, row.keep) for row in rows] == [
        ("4→4 3×3 @9²", indices, 0.25) for indices in ("i1 i2", "i1", "c_in")
    ]
    assert [row.ratio for row in rows] == pytest.approx([0.5, 1.5, 2.5])
    assert [row.milliseconds for row in rows] == pytest.approx([1.0, 3.0, 5.0])
    # What was timed: gradients of a part, of 4 or 5 rows (and columns) of 9 for one half, 2 for a quarter.
    x, v = operands
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    counts: list[dict[str, tuple[int, ...]]] = [{"i1": (4, 5), "i2": (4, 5)}, {"i1": (2,)}, {"c_in": (1,)}]
    for found, kept in zip(results[2:], counts, strict=True):
        part = x
        for index, allowed in kept.items():
            axis = AXES[index]
            size = x.shape[axis]
            rate = 0.5 if len(kept) == 2 else 0.25
            drawn = sampling.draw(size, rate, "fixed", generator=torch.Generator().manual_seed(0)).positions
            assert len(drawn) in allowed
            factors = torch.zeros(size)
            factors[drawn] = size / len(drawn)
            part = part * factors.reshape([-1 if at == axis else 1 for at in range(4)])
        expected = whole(part, (4, 4, 3, 3), v, padding=1)
        if "c_in" in kept:
            drawn = sampling.draw(4, 0.25, "fixed", generator=torch.Generator().manual_seed(0)).positions
            expected = expected[:, drawn]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [0.5, 0.25])
def test_models_that_are_trained_sample_the_share_that_they_name(keep: float) -> None:
    task = TASKS["digits"]()
    model = bench._model(task, keep, 0)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) == 2
    for layer in layers:
        assert isinstance(layer, Sampled)
        assert layer.scheme == "fixed"
        assert layer.keep == pytest.approx({"i1": math.sqrt(keep), "i2": math.sqrt(keep)})
    exact = bench._model(task, 1.0, 0)
    assert not any(isinstance(module, Sampled) for module in exact.modules())
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("what", ["a file", "a file above", "a folder in place of a file"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any) -> Any:
        raise AssertionError("measured before the folder was found to be none")

    monkeypatch.setattr(bench, "steps", measured)
    out = tmp_path / "out"
    if what == "a folder in place of a file":
        (out / "gradients.csv").mkdir(parents=True)
    else:
        out.write_text("", encoding="utf-8")
    folder = out / "below" if what == "a file above" else out
    found = CliRunner().invoke(cli.make_app(), ["bench", "sampling", str(folder)])
    assert found.exit_code == 1
    assert f"cannot write {folder}" in found.stderr.replace("\n", "")
