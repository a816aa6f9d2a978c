"""The catalogue: its census is the paper's, its data is what the models have; the extractor; `lensor convs`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import lensor
from lensor.inspect import CommandError, catalogue
from lensor.inspect.catalogue import NETS, PAPER, layers_of, merged
from lensor.inspect.extract import convolutions, import_factory, record
from lensor.inspect.layers import Layer, census
from tests.support.command import invoke

TORCHVISION = Path(sys.prefix) / "torchvision"
"""Where `make peers` puts it: out of the way of what would import it."""

# (total, unique) of each kind at the census input: the paper's table of the nine nets.
CENSUS = {
    "3c3d": {"general": (3, 3)},
    "2c2d": {"general": (2, 2)},
    "all-cnn-c": {"general": (7, 7), "dense": (2, 2)},
    "alexnet": {"general": (5, 5)},
    "resnet18": {"general": (17, 8), "down-sampling": (3, 3)},
    "resnext101-32x8d": {"general": (34, 8), "dense": (67, 8), "down-sampling": (3, 3)},
    "convnext-base": {"general": (36, 4), "dense": (4, 4)},
    "inceptionv3": {"general": (20, 12), "dense": (40, 19), "mixed-dense": (34, 12)},
    "mobilenetv2": {"general": (18, 11), "dense": (34, 19)},
}
SUMS = {"general": (142, 60), "dense": (147, 52), "mixed-dense": (34, 12), "down-sampling": (6, 6)}


# ------------------------------------------------------------------------------------------------------------- census
@pytest.mark.parametrize("name", CENSUS)
def test_census_is_the_paper_s(name: str) -> None:
    assert census(layers_of(name, NETS[name].census)) == CENSUS[name]


def test_census_of_all_nets() -> None:
    assert set(PAPER) == set(CENSUS)
    sums: dict[str, Counter[int]] = {kind: Counter() for kind in SUMS}
    for name in PAPER:
        for kind, numbers in census(layers_of(name, NETS[name].census)).items():
            sums[kind].update(dict(enumerate(numbers)))
    assert {kind: (found[0], found[1]) for kind, found in sums.items()} == SUMS
    assert sum(unique for _, unique in SUMS.values()) == 130


def test_every_net_is_held_for_both_inputs() -> None:
    for name, net in NETS.items():
        one, two = layers_of(name, net.census), layers_of(name)
        # A smaller picture may tell two convolutions apart no longer, never change how many are run.
        assert sum(layer.count for layer in one) == sum(layer.count for layer in two)
        assert {layer.spec.kernel_size for layer in one} == {layer.spec.kernel_size for layer in two}
        for layers in (one, two):
            assert len({layer.spec for layer in layers}) == len(layers)
            assert layers[0].spec.in_channels == net.speed[0]
            assert all(layer.model == name and layer.spec.ndim == 2 for layer in layers)
        assert one[0].spec.input_size[0] - net.census[1] in (0, 1, 2)  # All-CNN-C pads by a module of its own
    assert {name for name, net in NETS.items() if not net.paper} == {
        *("densenet121", "wide-resnet101-2", "resnet50", "vgg19", "efficientnet-b0")
    }


@pytest.mark.slow
def test_data_is_what_the_models_have(tmp_path: Path) -> None:
    """In a process of its own: transformers must not find a torchvision whose compiled part does not load."""
    places = [path for path in (str(TORCHVISION), os.environ.get("PYTHONPATH")) if path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    if not TORCHVISION.exists() and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    command = [sys.executable, "-m", "lensor_bench.regenerate", str(tmp_path / "catalogue.csv")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    held = Path(catalogue.__file__).with_name("catalogue.csv")
    assert (tmp_path / "catalogue.csv").read_text(encoding="utf-8") == held.read_text(encoding="utf-8")


def test_convolutions_of_several_nets_are_merged() -> None:
    one, two = layers_of("resnet18"), layers_of("resnet50")
    together = merged([*one, *two])
    assert len(together) < len(one) + len(two)
    assert sum(layer.count for layer in together) == sum(layer.count for layer in (*one, *two))
    assert {layer.model for layer in together} == {"resnet18", "resnet50", "resnet18+resnet50"}
    assert not any(layer.spec.bias for layer in merged(layers_of("vgg19")))


def test_unknown_net() -> None:
    with pytest.raises(CommandError, match=r"net is 'vgg', expected one of 3c3d, 2c2d, .*efficientnet-b0"):
        layers_of("vgg")


# ---------------------------------------------------------------------------------------------------------- extractor
class Odd(torch.nn.Module):
    """A convolution that runs twice, an unbatched input, keyword arguments, and convolutions of 1 to 3 dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = torch.nn.Conv2d(3, 3, 3, padding="same", padding_mode="circular")
        self.up = torch.nn.ConvTranspose2d(3, 4, 2, stride=2, output_padding=1)
        self.flat = torch.nn.Conv1d(4, 4, 4, padding="same", groups=4, dilation=2)
        self.deep = torch.nn.Conv3d(1, 2, (1, 2, 3), bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(input=self.twice(self.twice(x)))
        x = self.flat(x[0].flatten(1))
        return self.deep(x.reshape(1, 1, 4, -1, 19))


def test_extractor_takes_any_convolution() -> None:
    found = convolutions(Odd, "odd", (3, 9, 9))
    specs = [
        lensor.ConvSpec(3, 3, (9, 9), 3, padding=1, padding_mode="circular", bias=True),
        lensor.ConvSpec(3, 4, (9, 9), 2, stride=2, bias=True, transposed=True, output_padding=1),
        lensor.ConvSpec(4, 4, (361,), 4, padding=((3, 3),), groups=4, dilation=2, bias=True),
        lensor.ConvSpec(1, 2, (4, 19, 19), (1, 2, 3)),
    ]
    assert found == [
        Layer("odd", name, spec, count)
        for name, spec, count in zip(("twice", "up", "flat", "deep"), specs, (2, 1, 1, 1), strict=True)
    ]


def test_extractor_knows_the_output_size_that_a_call_asks_for() -> None:
    class Up(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.ConvTranspose2d(3, 4, 3, stride=3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x, output_size=(16, 17)) + self.up(x)[..., :1, :1]

    asked, plain = convolutions(Up, "up", (3, 5, 5))
    assert (asked.name, asked.spec.output_size, asked.spec.output_padding) == ("up", (16, 17), (1, 2))
    assert (plain.name, plain.spec.output_size, plain.spec.bias) == ("up", (15, 15), True)


def test_extractor_leaves_no_hooks() -> None:
    model = Odd()
    record(model, "odd", torch.zeros(1, 3, 9, 9))
    with pytest.raises(RuntimeError):
        record(model, "odd", torch.zeros(1, 4, 9, 9))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_model_that_needs_values_runs_on_the_cpu() -> None:
    class Picky(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 1, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if float(x.sum()) == 0 else x

    assert len(convolutions(Picky, "picky", (1, 5, 5))) == 1


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nothing", "not an import path, expected pkg.mod:factory"),
        ("no.such.module:f", "cannot import no.such.module: ModuleNotFoundError"),
        ("lensor_bench.nets:vgg", "lensor_bench.nets has no vgg"),
        ("lensor.inspect.catalogue:PAPER", "has type tuple, expected a function or class"),
    ],
)
def test_what_cannot_be_imported(path: str, words: str) -> None:
    with pytest.raises(CommandError, match=words):
        import_factory(path)


def test_what_makes_no_model() -> None:
    with pytest.raises(CommandError, match="made an object of type dict, expected a torch"):
        convolutions(dict, "dict", (3, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(CommandError, match=r"net cannot run on an input of shape \(4, 8, 8\): RuntimeError"):
        convolutions(lambda: torch.nn.Conv2d(3, 3, 3), "net", (4, 8, 8))
    with pytest.raises(CommandError, match=r"the factory net failed: ValueError: invalid literal for int"):
        convolutions(lambda: torch.nn.Conv2d(int("three"), 3, 3), "net", (3, 8, 8))


class _Calls(torch.nn.Module):
    """Convolutions by torch's functions, beside modules, of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.module = torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.module(x)
        h = torch.nn.functional.conv2d(h, h.new_zeros(6, 2, 3, 1), None, 2, padding=(1, 0), groups=2)
        h = torch.conv_transpose2d(h, h.new_zeros(6, 5, 2, 3), h.new_zeros(5), [3], [0, 1], 1, 1, 2)
        z = torch.nn.functional.conv1d(input=y, weight=y.new_zeros(1, 2, 4), padding="same")
        return h.sum() + torch.nn.functional.conv1d(z, z.new_zeros(3, 1, 2), bias=z.new_zeros(3)).sum()


def test_calls_of_functions_are_found_as_modules_are() -> None:
    found = convolutions(_Calls, "net", (3, 8, 8), (2, 10))
    assert [(layer.name, layer.spec, layer.count) for layer in found] == [
        ("module", lensor.ConvSpec(3, 4, (8, 8), 3, padding=1, padding_mode="circular", bias=True), 1),
        ("torch.conv2d", lensor.ConvSpec(4, 6, (8, 8), (3, 1), stride=2, padding=(1, 0), groups=2), 1),
        (
            "torch.conv_transpose2d",
            lensor.ConvSpec(
                *(6, 5, (4, 4), (2, 3)),
                stride=3,
                padding=(0, 1),
                output_padding=1,
                dilation=2,
                transposed=True,
                bias=True,
            ),
            1,
        ),
        ("torch.conv1d", lensor.ConvSpec(2, 1, (10,), 4, padding="same"), 1),
        ("torch.conv1d", lensor.ConvSpec(1, 3, (10,), 2, bias=True), 1),
    ]
    with pytest.raises(
        CommandError, match=r"net cannot run on inputs of shapes \(3, 8, 8\) and \(1, 10\): RuntimeError"
    ):
        convolutions(_Calls, "net", (3, 8, 8), (1, 10))


class _Words(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Embedding(9, 4), torch.nn.Conv1d(7, 2, 3))


DOUBLE = torch.nn.Conv1d(2, 3, 3).double()


def _leave() -> None:
    raise SystemExit(3)


def test_models_of_other_dtypes_and_models_that_are_made_already() -> None:
    (layer,) = convolutions(_Words, "words", (7,))
    assert layer.spec == lensor.ConvSpec(7, 2, (4,), 3, bias=True)
    (layer,) = convolutions(import_factory("tests.inspect.test_catalogue:DOUBLE"), "double", (2, 5))
    assert layer.spec == lensor.ConvSpec(2, 3, (5,), 3, bias=True)
    (layer,) = convolutions(lambda: torch.nn.Conv1d(2, 3, 3).to(torch.complex64), "complex", (2, 5))
    assert layer.spec == lensor.ConvSpec(2, 3, (5,), 3, bias=True)
    with pytest.raises(CommandError, match="the factory leaves failed: SystemExit: 3"):
        convolutions(_leave, "leaves", (2, 5))


# ------------------------------------------------------------------------------------------------------- lensor convs
def test_convs_shows_a_net_of_the_catalogue() -> None:
    result = invoke("convs", "ResNet18")
    assert result.exit_code == 0, result.output
    assert "3→64 7×7 s2 @224²" in result.stdout
    assert "20 convolutions, 11 of them unique" in result.stdout
    result = invoke("convs", "tests.inspect.test_catalogue:_Calls", "--input-shape", "3x8x8", "--input-shape", "2x10")
    assert "5 convolutions, 5 of them unique, for an input of 3x8x8 and 2x10" in result.stdout
    result = invoke("convs", "resnet18", "--input-shape", "3x256x256")
    assert "general: 17 (8), down-sampling: 3 (3)" in result.stdout


def test_convs_of_a_model_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "layers.csv"
    result = invoke("convs", "lensor_bench.nets:all_cnn_c", "--input-shape", "3,32,32", "--csv", str(path))
    assert result.exit_code == 0, result.output
    assert "9 convolutions, 9 of them unique" in result.stdout
    assert path.read_text(encoding="utf-8").startswith("net,input_shape,name,count,kind,")
    assert path.read_text(encoding="utf-8").count("\n") == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["vgg"], "net is 'vgg', expected one of 3c3d,"),
        (["resnet18", "--input-shape", "3x64x64"], "expected 3x256x256 and 3x224x224"),
        (["lensor_bench.nets:all_cnn_c"], "--input-shape"),
        (["lensor_bench.nets:all_cnn_c", "--input-shape", "3xabc"], "'3xabc' is not a shape"),
        (["lensor_bench.nets:all_cnn_c", "--input-shape", "4x32x32"], "cannot run on an input of shape (4, 32, 32)"),
        (["tests.inspect.test_catalogue:_leave", "--input-shape", "3x8x8"], "the factory _leave failed: SystemExit"),
        (["no.module:f", "--input-shape", "3x8x8"], "cannot import no.module: ModuleNotFoundError"),
    ],
)
def test_convs_errors_are_one_line(arguments: list[str], words: str) -> None:
    result = invoke("convs", *arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
