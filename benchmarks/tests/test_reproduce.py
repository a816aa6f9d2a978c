"""`lensor reproduce`: the paper's counts, figures from rows, measuring only what is missing."""

from __future__ import annotations

import csv
import math
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lensor_bench import crs, reproduce
from lensor_bench import sampling as bench_sampling
from lensor_bench.cifar import cifar100
from lensor_bench.results import OK, Found, Machine, Row, Setting, read
from lensor_bench.run import version
from lensor_bench.settings import Settings
from typer.testing import CliRunner

from lensor import cli
from lensor.inspect import CommandError
from lensor.inspect.layers import KINDS
from lensor.inspect.operations import PAPER_OPERATIONS

MACHINE = Machine("some processor", 2, "3.11", "2.6", "0.1")
SETTING = Setting(8, 4, "float32", "cpu", 2)


def rows() -> list[Row]:
    """The network takes twice, the simplified one half, Lensor an eighth of the standard's time and memory."""
    found = []
    factors = {"standard": 1.0, "network": 2.0, "network-simplified": 0.5, "lensor": 0.125}
    for at, layer in enumerate(reproduce.layers(quick=True)):
        for operation in PAPER_OPERATIONS:
            for name, factor in factors.items():
                standard, memory = 1e-3 * (at + 1), 2**20 * (at + 1)
                times = Found(
                    OK,
                    "",
                    0.0,
                    3,
                    factor * standard,
                    factor * standard,
                    standard,
                    standard,
                    int(factor * memory),
                    memory,
                    8,
                )
                found.append(Row(operation, name, "1", layer, SETTING, times, MACHINE))
    return found


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.make_app(), ["reproduce", *arguments])


def table_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_the_census_is_the_paper_s(tmp_path: Path) -> None:
    assert invoke("study", "--out", str(tmp_path)).exit_code == 0
    found = table_of(tmp_path / "study.csv")
    assert len(found) == 9 * len(KINDS)
    assert all(row["convolutions"] == row["paper"] and row["unique"] == row["paper_unique"] for row in found)
    sums = {
        kind: tuple(sum(int(row[what]) for row in found if row["kind"] == kind) for what in ("convolutions", "unique"))
        for kind in KINDS
    }
    assert sums == {"general": (142, 60), "dense": (147, 52), "mixed-dense": (34, 12), "down-sampling": (6, 6)}
    page = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert "| sum |  | 142 (60) | 34 (12) | 147 (52) | 6 (6) | the same |" in page
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_a_census_that_differs_says_what_the_paper_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reproduce.CENSUS, "2c2d", {"general": (3, 2)})
    found = reproduce.study(tmp_path).summary
    assert [row[-1] for row in found if row[0] == "2c2d"] == ["general 3 (2)"]


def test_figures_show_what_was_measured(tmp_path: Path) -> None:
    found = {one.title: one for one in reproduce.write(["runtime", "speedups", "memory"], rows(), [], tmp_path)}
    assert len(found) == 3
    assert all(path.stat().st_size for one in found.values() for path in one.paths)
    medians = {
        (row["operation"], row["kind"], row["implementation"]): row["median"]
        for row in table_of(tmp_path / "runtime.csv")
    }
    assert medians["kfac_reduce", "all", "lensor"] == "0.12"
    assert medians["forward", "dense", "network"] == "2.00"
    best = table_of(tmp_path / "speedups.csv")
    assert len(best) == len(reproduce.layers(quick=True))
    assert {row["lensor, times faster"] for row in best} == {"8.0"}
    largest = table_of(tmp_path / "memory.csv")[0]
    count = len(best)
    assert (largest["standard, MiB"], largest["network, MiB"]) == (f"{count:.3g}", f"{2 * count:.3g}")
    page = (tmp_path / "memory.md").read_text(encoding="utf-8")
    assert f"- `network-simplified`: {count / 2:,.0f} MiB" in page
    assert "- `network`: 0 MiB" in page
    claims = (tmp_path / "runtime.md").read_text(encoding="utf-8")
    assert all(claim in claims for claim in reproduce.CLAIMS.values())


def test_what_has_no_time_is_told(tmp_path: Path) -> None:
    some = rows()
    at = next(at for at, row in enumerate(some) if row.implementation == "network")
    some[at] = replace(some[at], found=Found("failed", "MemoryError: too | large"))
    list(reproduce.write(["runtime"], some, [], tmp_path))
    assert "MemoryError: too ¦ large" in (tmp_path / "runtime.md").read_text(encoding="utf-8")


def test_what_failed_is_not_drawn_as_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = rows()
    failed = [at for at, row in enumerate(some) if (row.operation, row.implementation) == ("kfac_reduce", "network")]
    some[failed[0]] = replace(some[failed[0]], found=Found("failed", "MemoryError"))
    shown: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: shown.append(figure))
    list(reproduce.write(["memory"], some, [], tmp_path))
    values = {line.get_label(): list(line.get_ydata()) for line in shown[0].axes[0].get_lines()}
    assert [sum(math.isnan(value) for value in values[name]) for name in ("standard", "network", "lensor")] == [0, 1, 0]
    assert min(value for value in values["network"] if not math.isnan(value)) > 1


def test_pages_say_what_made_them(tmp_path: Path) -> None:
    list(reproduce.write(["speedups"], rows(), [], tmp_path, " --quick --threads 1"))
    page = (tmp_path / "speedups.md").read_text(encoding="utf-8")
    assert "Made by `lensor reproduce speedups --quick --threads 1`." in page
    assert f"- {len(reproduce.layers(quick=True))} convolutions, 3 to 3 rounds for each" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["crs", "--batch", "3"], "--batch is given for crs, expected runtime, speedups, memory"),
        (["study", "crs", "--device", "tpu"], "--device is given for study, crs, expected runtime, speedups, memory"),
        (["study", "--quick"], "--quick is given for study, expected runtime, speedups, memory, crs"),
        (["runtime", "--cifar", "/data"], "--cifar is given for runtime, expected crs"),
    ],
)
def test_options_that_would_be_ignored_are_refused(arguments: list[str], words: str, tmp_path: Path) -> None:
    found = invoke(*arguments, "--out", str(tmp_path))
    assert found.exit_code == 1
    assert words in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_measured_is_no_figure(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="the results have no time"):
        list(reproduce.write(["memory"], [], [], tmp_path))
    others = [row for row in rows() if row.operation != "kfac_reduce"]
    for name in ("memory", "speedups"):
        with pytest.raises(CommandError, match=f"the results have no time for {name}"):
            list(reproduce.write([name], others, [], tmp_path))


def test_quick_runs_have_every_kind_and_full_ones_every_convolution() -> None:
    assert {layer.spec.kind for layer in reproduce.layers(quick=True)} == set(KINDS)
    assert len(reproduce.layers(quick=False)) == 128
    given = Settings(seconds=1.0, repeats=20)
    quick = reproduce.settings(("forward",), given, quick=True)
    assert (quick.seconds, quick.repeats, quick.operations) == (0.05, 5, ("forward",))
    assert reproduce.settings(("forward",), given, quick=False).seconds == 1.0


def test_figures_and_what_they_need() -> None:
    assert reproduce.figures(["ALL"]) == reproduce.FIGURES
    assert reproduce.needed(["study"]) == ()
    assert reproduce.needed(["memory", "speedups"]) == ("kfac_reduce",)
    assert reproduce.needed(reproduce.FIGURES) == PAPER_OPERATIONS


@pytest.mark.slow
def test_measures_what_is_missing_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = reproduce.layers(quick=True)
    smallest = (min(few, key=lambda layer: layer.spec.in_channels * layer.spec.input_size[0]),)
    monkeypatch.setattr("lensor_bench.commands.reproduce.reproduce_layers", lambda quick: smallest)
    arguments = ["--quick", "--batch", "1", "--seconds", "0", "--threads", "1", "--out", str(tmp_path)]
    assert invoke("memory", *arguments).exit_code == 0
    first = read(tmp_path / reproduce.QUICK_RUNS)
    assert len(first) == 4
    assert invoke("speedups", "memory", *arguments).exit_code == 0
    assert read(tmp_path / reproduce.QUICK_RUNS) == first
    assert invoke("runtime", *arguments).exit_code == 0
    assert len(read(tmp_path / reproduce.QUICK_RUNS)) == 4 * len(PAPER_OPERATIONS)


def test_unknown_figures_are_answered_with_those_there_are() -> None:
    found = invoke("figure9")
    assert found.exit_code == 1
    assert "figure is 'figure9', expected one of study, runtime, speedups, memory, crs, all" in found.stderr


# ---------------------------------------------------------------------------------------------------------------- crs
MADE = crs.Made(**asdict(MACHINE), threads=1)


def crs_points(factor: float = 1.0) -> list[Any]:
    """Errors √(1/p − 1), smaller by a factor for positions."""
    found = []
    for data in (crs.REAL, crs.SYNTHETIC):
        for (indices, scheme), scale in zip(crs.PAPER, (1.0, factor), strict=True):
            for share in crs.Settings().shares:
                for seed in range(2):
                    error = scale * (1 / share - 1) ** 0.5
                    found.append(crs.Point(data, 8, " ".join(indices), scheme, share, seed, error, 1.0, 2.0, MADE))
    return found


def test_the_share_that_is_as_good_is_read_from_the_curves() -> None:
    assert crs.equal_share(crs_points(), crs.REAL) == pytest.approx(0.75)
    # Positions half as far off: √(1/p − 1)/2 = √(1/3) at p = 3/7.
    assert crs.equal_share(crs_points(0.5), crs.SYNTHETIC) == pytest.approx(3 / 7, abs=0.01)
    assert crs.equal_share(crs_points(0.01), crs.REAL) is None


@pytest.mark.slow
def test_sampled_gradients_are_measured_once_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "crs.csv"
    settings = crs.Settings(batch=2, shares=(0.5, 1.0), few=(0.5,), seeds=1, others=1)
    points = list(crs.run(settings, MADE, []))
    assert {point.key for point in points} == crs.wanted_keys(settings)
    assert all(point.error == 0.0 for point in points if point.share == 1.0)
    assert all(point.error > 0.0 for point in points if point.share < 1.0)
    for point in points[:3]:
        crs.append(path, point)
    assert crs.read(path, MADE) == points[:3]
    assert [point.key for point in crs.run(settings, MADE, crs.read(path, MADE))] == [point.key for point in points[3:]]
    for point in points[3:]:
        crs.append(path, point)
    (found,) = reproduce.write(["crs"], [], crs_points(0.5), tmp_path)
    text = (tmp_path / "crs.md").read_text(encoding="utf-8")
    assert "43% of positions are as good as 75 % of channels" in text
    assert (tmp_path / "crs.png").stat().st_size > 10_000
    assert found.summary[0] == crs.HEADINGS


def test_a_foreign_or_damaged_file_of_points_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "crs.csv"
    older = "data,batch,indices,scheme,share,seed,error,seconds,exact_seconds\n"
    for text, message in (
        ("a,b\n1,2\n", "is not a file of"),
        (older, "is not a file of this version of `lensor reproduce crs`: remove it, or specify a different --out"),
        (f"{','.join(crs.HEADER)}\ncrops of pictures,8\n", "is corrupt at line 2"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(CommandError, match=message):
            crs.read(path, MADE)
        assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"threads": 2}, "threads 1, here 2"),
        ({"lensor": "0.2", "torch": "2.7"}, "torch 2.6, here 2.7, lensor 0.1, here 0.2"),
        ({"machine": "another"}, "machine some processor, here another"),
    ],
)
def test_points_measured_with_anything_else_are_not_gone_on_with(
    other: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "crs.csv"
    for point in crs_points()[:2]:
        crs.append(path, point)
    path.write_text(text := path.read_text(encoding="utf-8") + "crops of", encoding="utf-8")
    with pytest.raises(
        CommandError,
        match=rf"crs.csv was measured with a different number of threads.*\({words}\): specify a different --out",
    ):
        crs.read(path, replace(MADE, **other))
    assert path.read_text(encoding="utf-8") == text


def test_the_command_goes_on_with_points_of_the_same_threads_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crs.Settings, "quick", lambda cifar: crs.Settings(2, (0.75,), (), seeds=1, others=0))
    arguments = ["crs", "--quick", "--out", str(tmp_path), "--threads"]
    assert invoke(*arguments, "1").exit_code == 0
    held = (tmp_path / "crs.csv").read_text(encoding="utf-8")
    found = table_of(tmp_path / "crs.csv")
    assert [row["indices"] for row in found] == ["c_in", "i1 i2"] * 2
    for row in found:
        assert (row["threads"], row["torch"], row["lensor"]) == ("1", torch.__version__, version())
        assert row["machine"]
    assert invoke(*arguments, "1").exit_code == 0
    other = invoke(*arguments, "2")
    assert other.exit_code == 1
    assert "threads 1, here 2" in other.stderr
    assert (tmp_path / "crs.csv").read_text(encoding="utf-8") == held


def test_the_picture_says_what_points_were_measured_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: shown.append(figure))
    crs.plot(crs_points(), tmp_path / "crs.png")
    assert shown[0].get_suptitle() == "threads 1; some processor, 2 CPUs; Python 3.11, torch 2.6, lensor 0.1"
    assert "warm" in shown[0].axes[-1].get_xlabel()


def test_the_page_says_what_points_were_measured_with(tmp_path: Path) -> None:
    list(reproduce.write(["crs"], [], crs_points(), tmp_path))
    page = (tmp_path / "crs.md").read_text(encoding="utf-8")
    assert "\n- threads 1; some processor, 2 CPUs; Python 3.11, torch 2.6, lensor 0.1\n" in page
    assert "excludes planning" in page


def test_a_line_that_was_not_finished_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "crs.csv"
    points = crs_points()
    for point in points[:3]:
        crs.append(path, point)
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:-9], encoding="utf-8")
    assert crs.read(path, MADE) == points[:2]
    crs.append(path, points[2])
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.slow
def test_figures_of_sampled_backpropagation_are_written(tmp_path: Path) -> None:
    steps = bench_sampling.steps(2, 0.0, 1, 1)
    assert [row.way for row in steps][:3] == ["torch", "checkpointing", "rectifiers keep a byte"]
    saved = {row.way: row.saved for row in steps}
    assert saved["positions, keep 0.25"] < saved["positions, keep 0.5"] < saved["torch"]
    trained = list(bench_sampling.train(["digits"], 20, 1, 4, 1))
    assert [row[:2] for row in bench_sampling.summary(trained)] == [("digits", k) for k in ("1", "0.5", "0.25")]
    assert bench_sampling.plot(trained, tmp_path / "training.png").stat().st_size > 10_000
    assert len(table_of(bench_sampling.write_csv(trained, tmp_path / "training.csv"))) == len(trained)


def test_sampled_gradients_of_cifar_from_a_folder(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pictures, labels = draw.integers(256, size=(6, 3072), dtype=np.uint8), [3, 99, 0, 7, 7, 41]
    binary, python = tmp_path / "cifar-100-binary", tmp_path / "cifar-100-python"
    binary.mkdir()
    records = [bytes([5, label]) + picture.tobytes() for picture, label in zip(pictures, labels, strict=True)]
    (binary / "train.bin").write_bytes(b"".join(records))
    python.mkdir()
    (python / "train").write_bytes(pickle.dumps({b"data": pictures, b"fine_labels": labels}))
    for folder in (tmp_path, binary, python):
        found, fine = cifar100(folder)
        assert (found.reshape(6, -1) == pictures).all()
        assert fine.tolist() == labels
    settings = crs.Settings(batch=2, shares=(0.5,), few=(), seeds=1, others=0, cifar=tmp_path)
    points = list(crs.run(settings, MADE, []))
    assert {point.key for point in points} == crs.wanted_keys(settings)
    assert sum(point.data == crs.CIFAR for point in points) == 2
    crs.plot(points, tmp_path / "crs.png")
    assert (tmp_path / "crs.png").stat().st_size > 10_000


def test_a_folder_without_cifar_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"has no CIFAR-100 file, expected one of cifar-100-binary/train.bin"):
        cifar100(tmp_path)
    (tmp_path / "train").write_bytes(pickle.dumps({b"data": print}))
    with pytest.raises(CommandError, match=r"is not CIFAR-100: UnpicklingError: the pickle has builtins.print"):
        cifar100(tmp_path)
    (tmp_path / "train").write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1]}))
    with pytest.raises(CommandError, match=r"expected a label below 100 for each of 2 images"):
        cifar100(tmp_path)
    (tmp_path / "train.bin").write_bytes(bytes(3000))
    with pytest.raises(CommandError, match=r"train.bin is not CIFAR-100: ValueError: cannot reshape"):
        cifar100(tmp_path)
