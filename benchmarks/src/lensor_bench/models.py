"""Kronecker factors of whole models: Lensor, curvlinops and BackPACK, compared with a forward and backward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lensor.choices import Approx
from lensor.curvature import KroneckerFactors, kfac
from lensor.curvature.compiled import Compile
from lensor.curvature.layers import Layer, layers_of
from lensor.inspect.errors import choose, in_one_line, require
from lensor_bench.measure import interleaved, peak_bytes
from lensor_bench.measure import threads as using

CLASSES = 10
TOLERANCE = 1e-3
"""Maximum difference from curvlinops' factors in single precision, divided by the largest entry."""


class Logits(nn.Module):
    """A classifier from transformers, wrapped so that it returns only its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The logits of a batch of images."""
        return self.model(x).logits


def _classifier(config: str, **options: Any) -> nn.Module:
    transformers = import_module("transformers")
    model = getattr(transformers, f"{config}ForImageClassification")
    return Logits(model(getattr(transformers, f"{config}Config")(num_labels=CLASSES, **options)))


def image_classifier(name: str) -> nn.Module:
    """A classifier with random weights, by its name in `MODELS`, or "resnet50".

    Raises:
        CommandError: if transformers is not installed.
    """
    require("torch", "transformers")
    return MODELS[name]() if name in MODELS else _classifier("ResNet")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: _classifier("ResNet", hidden_sizes=[64, 128, 256, 512], depths=[2] * 4, layer_type="basic"),
    "convnext-tiny": lambda: _classifier("ConvNext"),
    "mobilenetv2": lambda: _classifier("MobileNetV2", tf_padding=False),
}
"""Models from transformers with random weights."""


@dataclass(frozen=True)
class Measured:
    """One way to compute the factors of a model.

    Args:
        model: name of the model.
        way: the kind of factors, and the library.
        seconds: the shortest total time, or None if the library does not support the model.
        beyond: the total time minus one forward and backward pass.
        peak: peak memory besides model and data, in bytes.
        message: the reason why there is no time, or the difference from curvlinops' factors.
    """

    model: str
    way: str
    seconds: float | None
    beyond: float | None
    peak: int | None
    message: str = ""


def measure(
    names: Sequence[str], batch: int, size: int, seconds: float, repeats: int, threads: int, compiled: bool = False
) -> Iterator[Measured]:
    """Time all ways for each model, interleaved, for the empirical Fisher of the mean cross entropy.

    With `compiled`, passes that are traced or compiled are included; torch's compiler takes minutes for each.

    Raises:
        CommandError: for an unknown model or a missing package.
    """
    require("torch", "transformers")
    with using(threads):
        for name in choose("model", names, MODELS):
            yield from _model(name, batch, size, seconds, repeats, compiled)


def _model(name: str, batch: int, size: int, seconds: float, repeats: int, compiled: bool) -> Iterator[Measured]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    data = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))
    loss = nn.CrossEntropyLoss()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no library supports normalisation layers
        layers = layers_of(model)
    plain = [layer for layer in layers if layer.groups == 1]

    def passes() -> Tensor:
        for p in model.parameters():
            p.grad = None
        value = loss(model(data[0]), data[1])
        value.backward()
        return value.detach()

    def own(
        approx: Approx,
        formed: bool = False,
        some: Sequence[Layer] | None = None,
        axis: int | None = 0,
        compile: Compile = False,
    ) -> Callable[[], Any]:
        names = None if some is None else [layer.name for layer in some]

        def call() -> Any:
            options: dict[str, Any] = {"layers": names, "others": "skip", "batch_axis": axis, "compile": compile}
            found = kfac(model, loss, data, approx=approx, fisher="empirical", **options)
            return {n: block.A for n, block in found.items()} if formed else found

        return call

    ways: dict[str, Callable[[], Any]] = {
        "forward and backward": passes,
        "lensor, expand": own("expand"),
        "lensor, reduce, roots": own("reduce"),
        "lensor, reduce, formed": own("reduce", formed=True),
        # The other libraries assume that the examples are along the first axis.
        "lensor, expand, axis found": own("expand", axis=None),
        "lensor, reduce, axis found": own("reduce", axis=None),
    }
    for approx in _APPROX if compiled else ():
        ways[f"lensor, {approx}, traced"] = own(approx, compile="eager")
        ways[f"lensor, {approx}, compiled"] = own(approx, compile=True)
    failed: dict[str, str] = {}
    if _installed("curvlinops"):
        ways |= {f"curvlinops, {approx}": _curvlinops(model, loss, layers, data, approx) for approx in _APPROX}
    if len(plain) < len(layers):  # curvlinops averages the groups of a layer first, which is less work
        ways["lensor, expand, ungrouped layers"] = own("expand", some=plain)
        if _installed("curvlinops"):
            ways["curvlinops, expand, ungrouped layers"] = _curvlinops(model, loss, plain, data, "expand")
    if _installed("backpack"):
        ways["backpack, KFAC"] = _backpack(MODELS[name], loss, data)
    results, peaks = {}, {}
    for way, call in list(ways.items()):
        try:
            call()
            peaks[way] = peak_bytes(call)[0]
            results[way] = call()
        except Exception as error:  # any error that a library raises for an unsupported model
            failed[way] = in_one_line(error, 120)
            del ways[way]
    messages = {
        f"lensor, {approx}{'' if approx == 'expand' else ', roots'}": _compared(
            results.get(f"lensor, {approx}{'' if approx == 'expand' else ', roots'}"),
            results.get(f"curvlinops, {approx}"),
        )
        for approx in _APPROX
    }
    del results
    times = interleaved([_silent(call) for call in ways.values()], seconds, 3, repeats)
    shortest = {way: found.minimum for way, found in zip(ways, times, strict=True)}
    for way, time in shortest.items():
        beyond = time - shortest["forward and backward"]
        yield Measured(name, way, time, beyond, peaks[way], messages.get(way, ""))
    for way, message in failed.items():
        yield Measured(name, way, None, None, None, message)


_APPROX = ("expand", "reduce")


def _silent(call: Callable[[], Any]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        call()
        return torch.empty(0)

    return run


def _installed(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True


def _curvlinops(
    model: nn.Module, loss: nn.Module, layers: Sequence[Layer], data: tuple[Tensor, Tensor], approx: Approx
) -> Callable[[], Any]:
    parameters = [p for layer in layers for p in layer.module.parameters(recurse=False)]

    def call() -> Any:
        made = import_module("curvlinops").KFACLinearOperator(
            model, loss, parameters, [data], fisher_type="empirical", kfac_approx=approx, check_deterministic=False
        )
        made.compute_kronecker_factors()
        return made

    return call


def curvlinops_factors(
    model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor]
) -> dict[str, Callable[[], Tensor]]:
    """Calls that compute the factors with curvlinops, if it is installed."""
    if not _installed("curvlinops"):
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = layers_of(model)
    return {f"curvlinops, {one}": _silent(_curvlinops(model, loss, layers, data, one)) for one in _APPROX}


def _backpack(make: Callable[[], nn.Module], loss: nn.Module, data: tuple[Tensor, Tensor]) -> Callable[[], Any]:
    @cache
    def extended() -> tuple[Any, Any]:
        backpack = import_module("backpack")
        torch.manual_seed(0)
        return backpack.extend(make().eval(), use_converter=True), backpack.extend(nn.CrossEntropyLoss())

    def call() -> Any:
        model, criterion = extended()
        for p in model.parameters():
            p.grad = None
        with import_module("backpack").backpack(import_module("backpack.extensions").KFAC(mc_samples=1)):
            criterion(model(data[0]), data[1]).backward()
        return [p.kfac for p in model.parameters()]

    return call


def _compared(own: KroneckerFactors | None, theirs: Any) -> str:
    """The largest difference from curvlinops' factors, over the layers with one group, which curvlinops supports."""
    if own is None or theirs is None:
        return ""
    own = own.in_convention("curvlinops")
    worst, count, grouped = 0.0, 0, 0
    for name, block in own.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight":
            continue
        if block.groups > 1:
            grouped += 1
            continue
        for mine, other in (
            (block.A[0], theirs._input_covariances[module]),
            (block.B[0], theirs._gradient_covariances[module]),
        ):
            worst = max(worst, float((mine - other).abs().max() / other.abs().max().clamp_min(1e-30)))
        count += 1
    verdict = "equal to" if worst <= TOLERANCE else "DIFFERS from"
    more = f", {grouped} with groups are not compared" if grouped else ""
    return f"{verdict} curvlinops' in {count} layers, largest difference {worst:.0e}{more}"
