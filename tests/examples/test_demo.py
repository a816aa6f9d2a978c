"""The demo in its quick setting: its files and errors, and its factors and uncertainties against other computations."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from lensor_bench.measure import peak_bytes
from rich.console import Console
from typer.testing import CliRunner

import lensor
from examples.demo import DemoError, Settings, run
from examples.demo.__main__ import app
from examples.demo.digits import Study, careful, digits, harmful, study
from examples.demo.figure import sentences
from examples.demo.layers import network
from examples.demo.measure import Comparison, lensor_factor, standard_factor
from examples.demo.models import MODELS, build
from examples.demo.pictures import PHOTOGRAPHS, photographs
from lensor.inspect.extract import record
from lensor.inspect.layers import Layer


def factor_by_windows(x: np.ndarray, spec: lensor.ConvSpec, approx: str) -> np.ndarray:
    """The factor from NumPy's sliding windows in float64, group by group."""
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *spec.padding])
    spans = [d * (k - 1) + 1 for d, k in zip(spec.dilation, spec.kernel_size, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=(2, 3))
    (s1, s2), (d1, d2) = spec.stride, spec.dilation
    patches = windows[:, :, ::s1, ::s2, ::d1, ::d2]  # n c o1 o2 k1 k2
    factors = []
    for group in np.split(patches, spec.groups, axis=1):
        if approx == "reduce":
            mean = group.mean((2, 3)).reshape(len(x), -1)
            factors.append(sum(np.outer(row, row) for row in mean) / len(x))
        else:
            rows = np.moveaxis(group, 1, 3).reshape(-1, group.shape[1] * group.shape[4] * group.shape[5])
            factors.append(rows.T @ rows / len(x))
    return np.stack(factors)


@pytest.fixture(scope="module")
def layers() -> list[tuple[Layer, torch.Tensor]]:
    return record(build("tiny"), "tiny", torch.from_numpy(photographs(4, 32)))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Comparison], str]:
    out = tmp_path_factory.mktemp("demo") / "reports"
    text = io.StringIO()
    comparisons = run(Settings.quick(out, threads=torch.get_num_threads()), Console(file=text, width=150))
    return out, comparisons, text.getvalue()


@pytest.fixture(scope="module")
def found() -> Study:
    return study(200)


def test_study_ranks_mistakes_and_their_causes(found: Study) -> None:
    assert (found.careful.argmax(1) == found.test[1]).float().mean() > 0.75
    certainty = found.careful.max(1).values[found.mistakes]
    torch.testing.assert_close(found.careful.max(1).values[found.queries], certainty.topk(4).values)
    # Where training images increase the loss most, they have the label of the answer more often than by chance.
    answers = found.careful[found.queries].argmax(1)
    labels = found.train[1][found.harm.topk(7).indices]
    assert (labels == answers[:, None]).float().mean() > 0.3
    lines = list(sentences(found))
    assert lines[1].startswith(f"It misreads {int(found.mistakes.sum())} of 597 test digits")


def test_uncertainty_and_influence_by_dense_matrices() -> None:
    data, _, (images, labels) = digits(20)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, stride=3), torch.nn.ReLU(), torch.nn.Flatten())
    model = model.append(torch.nn.Linear(8, 10)).double()
    train, queries = (data[0].double(), data[1]), (images[:3].double(), labels[:3])
    loss = torch.nn.CrossEntropyLoss(reduction="sum")
    factors = lensor.curvature.kfac(model, loss, train)
    dense = factors @ torch.eye(factors.size, dtype=torch.float64)
    inverse = torch.linalg.inv(dense + 0.5 * torch.eye(factors.size, dtype=torch.float64))

    def gradient(value: torch.Tensor) -> torch.Tensor:
        parts = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        return torch.cat([one.flatten() for one in parts])

    outputs = model(queries[0])
    rows = torch.stack([torch.stack([gradient(one) for one in row]) for row in outputs])
    variances = ((rows @ inverse) * rows).sum(-1)
    expected = (outputs / (1 + torch.pi * variances / 8).sqrt()).softmax(1)
    torch.testing.assert_close(careful(model, queries[0], factors.inverse(0.5)), expected.detach())

    g, z = (
        torch.stack([gradient(loss(model(x[None]), y[None])) for x, y in zip(*data, strict=True)])
        for data in (queries, train)
    )
    expected = -(g @ inverse @ z.mT) / ((z @ inverse) * z).sum(1).sqrt()
    torch.testing.assert_close(harmful(model, queries, train, factors.inverse(0.5)), expected)


def test_report_files_hold_every_comparison(outcome: tuple[Path, list[Comparison], str]) -> None:
    out, comparisons, text = outcome
    with (out / "ratios.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(comparisons) == 10
    assert {row["factor"] for row in rows} == {"expand", "reduce"}
    assert all(float(row["largest_relative_error"]) < 1e-5 for row in rows)
    assert all(float(row["time_ratio_median"]) > 0 and float(row["memory_ratio"]) > 0 for row in rows)
    assert {path.name for path in out.iterdir()} == {"digits.png", "report.md", "ratios.csv", "ratios.png"}
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("digits.png", "ratios.png"))
    assert "misreads" in text
    assert "-m examples.influence" in text.splitlines()[-6]
    report = (out / "report.md").read_text(encoding="utf-8")
    for found in comparisons:
        assert found.layer.label in report
        assert found.layer.label in text
        assert str(network(found.layer, found.approx)) in report
        assert str(network(found.layer, found.approx).simplify()) in report


def test_quick_setting_has_every_kind(layers: list[tuple[Layer, torch.Tensor]]) -> None:
    kinds = {layer.kind for layer, _ in layers}
    assert kinds == {"general", "general, depthwise", "dense", "mixed-dense", "down-sampling"}


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_both_ways_give_the_factor(layers: list[tuple[Layer, torch.Tensor]], approx: str) -> None:
    assert len(layers) == 5
    for layer, x in layers:
        expected = factor_by_windows(x.numpy(), layer.spec, approx)
        for way in (lensor_factor, standard_factor):
            found = way(x, layer.spec, approx).numpy()
            assert found.shape == expected.shape
            error = np.abs(found - expected).max() / np.abs(expected).max()
            assert error < 1e-5, f"{way.__name__}, {layer.label}"


def test_standard_way_pads_unevenly_and_in_other_modes() -> None:
    x = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    for mode in ("zeros", "circular", "reflect", "replicate"):
        spec = lensor.ConvSpec(4, 4, (9, 8), (3, 2), padding=((2, 1), (0, 1)), padding_mode=mode, groups=2)
        for approx in ("expand", "reduce"):
            torch.testing.assert_close(standard_factor(x, spec, approx), lensor_factor(x, spec, approx))


def test_equal_convolutions_are_counted_once() -> None:
    twice = torch.nn.Conv2d(3, 3, 3, padding=1)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1), twice, torch.nn.Conv2d(3, 3, 3))
    found = record(model, "model", torch.zeros(1, 3, 8, 8))
    assert [(layer.name, layer.count) for layer, _ in found] == [("0", 2), ("2", 1)]
    assert not model[0]._forward_hooks


def test_peak_counts_what_is_alive_at_once() -> None:
    x = torch.zeros(256, 1024)  # 1 MiB

    def two_then_one() -> torch.Tensor:
        first = x + 1
        second = first + 1
        del first
        return second + 1

    size = x.numel() * x.element_size()
    peak, result = peak_bytes(two_then_one)
    assert 2 * size <= peak < 2.01 * size
    assert torch.equal(result, torch.full_like(x, 3))
    assert peak_bytes(two_then_one)[0] == peak


def test_photographs_are_real_and_all_different() -> None:
    batch = photographs(len(PHOTOGRAPHS) * 2 + 3, 32)
    assert batch.shape == (len(PHOTOGRAPHS) * 2 + 3, 3, 32, 32)
    assert batch.dtype == np.float32
    np.testing.assert_allclose(batch.mean((2, 3)), 0, atol=1e-4)
    for at, picture in enumerate(batch):
        assert all(np.abs(picture - other).max() > 0.1 for other in batch[:at])


def test_models_have_the_kinds_they_are_there_for() -> None:
    batch = torch.from_numpy(photographs(1, 64))
    found = {layer.kind for name in ("inception", "tiny") for layer, _ in record(build(name), name, batch)}
    assert {"general", "dense", "mixed-dense"} <= found
    kinds = {name: {layer.kind for layer, _ in record(build(name), name, batch)} for name in ("resnet18", "convnext")}
    assert kinds["resnet18"] == {"general", "down-sampling"}
    assert kinds["convnext"] == {"general, depthwise", "dense"}
    assert set(Settings.models) <= set(MODELS)


def test_same_weights_every_time() -> None:
    state = torch.random.get_rng_state()
    one, two = build("tiny"), build("tiny")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(batch=0), ["batch", "0", "at least 1"]),
        (Settings(size=8), ["size", "8", "32"]),
        (Settings(models=("vgg", "tiny")), ["vgg", "resnet18"]),
    ],
)
def test_wrong_settings_are_named(settings: Settings, words: list[str]) -> None:
    with pytest.raises(DemoError) as error:
        run(settings, Console(file=io.StringIO()))
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DemoError, match=r"cannot write to .*file"):
        run(Settings.quick(tmp_path / "file" / "reports"), Console(file=io.StringIO()))


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(DemoError, match=r"matplotlib is not installed: pip install lensor\[demo\]"):
        run(Settings.quick(tmp_path), Console(file=io.StringIO()))


def test_command_passes_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Settings] = []
    monkeypatch.setattr("examples.demo.__main__.run", lambda settings, _: asked.append(settings))
    options = ["--out", str(tmp_path), "--batch", "2", "--model", "convnext", "--seconds", "0.5"]
    for arguments in (["--quick", "--out", str(tmp_path)], [], options):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    expected = Settings(tmp_path, batch=2, models=("convnext",), seconds=0.5)
    assert asked == [Settings.quick(tmp_path), Settings(), expected]


def test_command_s_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["--quick", "--out", str(tmp_path / "file" / "out")])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("lensor: cannot write")
    assert result.stderr.count("\n") == 1
