"""The convolutions of fourteen CNNs as data: the paper's nine and five more.

The catalogue has two input sizes per net: one for the paper's census (256² for ImageNet) and one for its timings
(224²). Convolutions of a net with the same hyper-parameters, input size and bias count as one; counted this way, the
census of the nine nets equals the paper's. The data is in `catalogue.csv`, which is written by
`python -m lensor_bench.regenerate`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from lensor.inspect.errors import choose
from lensor.inspect.layers import Layer, parse_sizes, spec_of, without_bias

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Net:
    """A CNN of the catalogue.

    Args:
        name: name in the catalogue.
        factory: import path of the function that creates the net.
        census: input shape for the paper's census, [c_in, *input_size].
        speed: input shape for timings.
        paper: whether the net is one of the paper's nine.
    """

    name: str
    factory: str
    census: Shape
    speed: Shape
    paper: bool = True


def _imagenet(name: str, factory: str, paper: bool = True) -> Net:
    return Net(name, f"torchvision.models:{factory}", (3, 256, 256), (3, 224, 224), paper)


NETS = {
    net.name: net
    for net in (
        Net("3c3d", "lensor_bench.nets:three_c_three_d", (3, 32, 32), (3, 32, 32)),
        Net("2c2d", "lensor_bench.nets:two_c_two_d", (1, 28, 28), (1, 28, 28)),
        Net("all-cnn-c", "lensor_bench.nets:all_cnn_c", (3, 32, 32), (3, 32, 32)),
        _imagenet("alexnet", "alexnet"),
        _imagenet("resnet18", "resnet18"),
        _imagenet("resnext101-32x8d", "resnext101_32x8d"),
        _imagenet("convnext-base", "convnext_base"),
        Net("inceptionv3", "torchvision.models:inception_v3", (3, 299, 299), (3, 299, 299)),
        _imagenet("mobilenetv2", "mobilenet_v2"),
        _imagenet("densenet121", "densenet121", paper=False),
        _imagenet("wide-resnet101-2", "wide_resnet101_2", paper=False),
        _imagenet("resnet50", "resnet50", paper=False),
        _imagenet("vgg19", "vgg19", paper=False),
        _imagenet("efficientnet-b0", "efficientnet_b0", paper=False),
    )
}
"""The nets, by name."""

PAPER = tuple(name for name, net in NETS.items() if net.paper)
"""The names of the paper's nine nets."""


@cache
def _held() -> dict[tuple[str, Shape], tuple[Layer, ...]]:
    held: dict[tuple[str, Shape], list[Layer]] = {}
    text = files("lensor.inspect").joinpath("catalogue.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        key = row["net"], parse_sizes(row["input_shape"])
        held.setdefault(key, []).append(Layer(row["net"], row["name"], spec_of(row), int(row["count"])))
    return {key: tuple(layers) for key, layers in held.items()}


def layers_of(name: str, input_shape: Sequence[int] | None = None) -> tuple[Layer, ...]:
    """The distinct convolutions of a catalogue net, for its timing input by default.

    Example:
        >>> from lensor.inspect.catalogue import layers_of
        >>> [layer.label for layer in layers_of("alexnet")][0]
        'alexnet 3→64 11×11 s4 @224²'
        >>> sum(layer.count for layer in layers_of("resnet18", (3, 256, 256)))
        20

    Raises:
        CommandError: for an unknown net.
        KeyError: for an input shape that is not in the catalogue.
    """
    (name,) = choose("net", [name], NETS)
    return _held()[name, tuple(input_shape or NETS[name].speed)]


def merged(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Merge convolutions that differ only in bias or net; the results have no bias.

    The model name of a merged convolution lists all of its nets, joined by `+`.

    Example:
        >>> from lensor.inspect.catalogue import layers_of, merged
        >>> len(merged([*layers_of("resnet18"), *layers_of("resnet18")])) == len(layers_of("resnet18"))
        True
        >>> merged([*layers_of("resnet18"), *layers_of("resnet50")])[0].model
        'resnet18+resnet50'
    """
    found: dict[object, Layer] = {}
    for layer in layers:
        spec = without_bias(layer.spec)
        known = found.get(spec)
        if known is None:
            found[spec] = Layer(layer.model, layer.name, spec, layer.count)
        else:
            models = "+".join(dict.fromkeys([*known.model.split("+"), layer.model]))
            found[spec] = Layer(models, known.name, spec, known.count + layer.count)
    return tuple(found.values())
