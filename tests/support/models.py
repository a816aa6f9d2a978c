"""Random small models as people write them: graphs of layers, most with a trait or two that capturing code trips over.

`Case(seed)` builds one: the model that the library sees, a twin of it for the oracle (same weights, not compiled, not
converted, no checkpoints), a loss, data, and how calls are made. Nothing here uses the library, except for the traits
that convert a model with it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import random
import threading
import types
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

CONVS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
FUNCTIONS = {1: (F.conv1d, F.conv_transpose1d), 2: (F.conv2d, F.conv_transpose2d), 3: (F.conv3d, F.conv_transpose3d)}
OUTPUTS = 24
"""The most numbers that a model gives for an example."""


class Unsuitable(Exception):
    """A draw that is not a model, or not one of the trait that was asked for: the next one is taken."""


# ---------------------------------------------------------------------------------------------------------- the network
@dataclass
class Step:
    """One line of a forward pass."""

    function: Callable[..., Tensor]
    inputs: tuple[int, ...]
    text: str
    checkpointed: bool = False


class Net(nn.Module):
    """A forward pass as a list of steps; every value can be used by any later step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.names: list[str] = []
        self.heads: list[int] = []
        self.pack = "tensor"
        self.plain = False
        self.reentrant = False
        self.only: int | None = None
        self.penalty: Callable[[Net], Tensor] | None = None

    def forward(self, *given: Any, **named: Any) -> Any:
        values = [*given, *(named[name] for name in self.names[len(given) :])]
        if self.only is not None and not self.plain and len(values[0]) != self.only:
            raise RuntimeError(f"this model takes {self.only} examples")
        for step in self.steps:
            arguments = [values[at] for at in step.inputs]
            if step.checkpointed and not self.plain:
                call = functools.partial(step.function, self)
                values.append(checkpoint(call, *arguments, use_reentrant=self.reentrant))
            else:
                values.append(step.function(self, *arguments))
        heads = [values[at] for at in self.heads]
        if self.penalty is not None:
            heads[0] = heads[0] + self.penalty(self)
        return packed(self.pack, heads)


@dataclass
class Heads:
    """A model's outputs as a user's own dataclass."""

    first: Tensor
    rest: list[Tensor]


class HasLogits:
    """A model's outputs as an object with `logits`."""

    def __init__(self, logits: Tensor, rest: list[Tensor]) -> None:
        self.logits, self.rest = logits, rest


Pair = namedtuple("Pair", ["first", "second"])


def packed(kind: str, heads: list[Tensor]) -> Any:
    """Heads as what a model returns."""
    ways: dict[str, Callable[[], Any]] = {
        "tensor": lambda: heads[0],
        "tuple": lambda: tuple(heads),
        "tuple of one": lambda: (heads[0],),
        "list": lambda: list(heads),
        "dict": lambda: {f"head{at}": head for at, head in enumerate(heads)},
        "nested": lambda: {"first": heads[0], "rest": tuple(heads[1:])},
        "dataclass": lambda: Heads(heads[0], heads[1:]),
        "namedtuple": lambda: Pair(heads[0], heads[-1]),
        "logits": lambda: HasLogits(heads[0], heads[1:]),
        "dict with logits": lambda: {"logits": heads[0], "hidden": heads[-1]},
    }
    return ways[kind]()


def unpacked(kind: str, out: Any) -> list[Tensor]:
    """The inverse of `packed`."""
    ways: dict[str, Callable[[], list[Tensor]]] = {
        "tensor": lambda: [out],
        "tuple": lambda: list(out),
        "tuple of one": lambda: list(out),
        "list": lambda: list(out),
        "dict": lambda: [out[f"head{at}"] for at in range(len(out))],
        "nested": lambda: [out["first"], *out["rest"]],
        "dataclass": lambda: [out.first, *out.rest],
        "namedtuple": lambda: [out.first, out.second],
        "logits": lambda: [out.logits, *out.rest],
        "dict with logits": lambda: [out["logits"], out["hidden"]],
    }
    return ways[kind]()


# ---------------------------------------------------------------------------------------------------------- small parts
class Negated(torch.autograd.Function):
    """The identity, with its gradient's sign changed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class StraightThrough(torch.autograd.Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Cubed(torch.autograd.Function):
    """x³ with the gradient written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Scaled(nn.Linear):
    """A linear layer of twice its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


class Outside(nn.Linear):
    """A linear layer that changes its result."""

    def forward(self, input: Tensor) -> Tensor:
        return 1.5 * super().forward(input)


class Called(nn.Linear):
    """A linear layer that changes what calling it means."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return -2 * super().__call__(*arguments, **named)


class Same(nn.Linear):
    """A subclass that changes nothing."""


class Standardised(nn.Conv2d):
    """A convolution with a weight of mean zero."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Inner(nn.Conv2d):
    """A convolution with an inner function of its own."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, torch.tanh(weight), bias)


class Softened(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch.tanh(weight)


class Chain(nn.Sequential):
    """A block with layers of its own."""


def tripled(module: nn.Module, arguments: Any, out: Tensor) -> Tensor:
    return 3 * out


def bent(module: nn.Module, arguments: Any, out: Tensor) -> Tensor:
    return torch.sin(out) + 0.5


def bent_named(module: nn.Module, arguments: Any, named: Any, out: Tensor) -> Tensor:
    return torch.sin(out)


def doubled_in_place(module: nn.Module, arguments: Any, out: Tensor) -> None:
    out.mul_(2.0)


def doubled_input(module: nn.Module, arguments: Any) -> Any:
    return (2 * arguments[0], *arguments[1:])


def lone_input(module: nn.Module, arguments: Any) -> Any:
    return torch.cos(arguments[0])


def doubled_named(module: nn.Module, arguments: Any, named: Any) -> Any:
    return (2 * arguments[0], *arguments[1:]), named


def observing(module: nn.Module, *_: Any) -> None:
    return None


def everywhere(module: nn.Module, arguments: Any, out: Any) -> Any:
    return 2 * out if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) else None


def everywhere_before(module: nn.Module, arguments: Any) -> Any:
    return (1.5 * arguments[0],) if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) else None


# --------------------------------------------------------------------------------------------------------------- losses
@dataclass
class Loss:
    """A loss as it is given to the library, and what it is: a sum over examples divided by a number.

    Args:
        given: any callable of (outputs, targets).
        summed: the sum of the entries of any part of the batch.
        divisor: what the whole batch's sum is divided by.
        known: whether it is exactly one of the losses whose Hessian the library has.
        text: its name.
        unweighted: the divisor if every target counts one, as the optimizer takes it.
    """

    given: Callable[[Any, Any], Tensor]
    summed: Callable[[Any, Any], Tensor]
    divisor: Callable[[Any, Any], float]
    known: bool
    text: str
    unweighted: Callable[[Any, Any], float] | None = None


class Weighted(nn.MSELoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        scale = torch.arange(1.0, input.shape[-1] + 1, dtype=input.dtype, device=input.device)
        found = scale * (input - target) ** 2
        return found.mean() if self.reduction == "mean" else found.sum()


class Focal(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        each = F.cross_entropy(input, target, reduction="none")
        found = (1 - torch.exp(-each)) ** 2 * each
        return found.mean() if self.reduction == "mean" else found.sum()


class Tempered(nn.BCEWithLogitsLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input / 2, target)


class Unchanged(nn.MSELoss):
    """A subclass that changes nothing."""


def loss_of(rng: random.Random, kind: str, classes: int, trait: str | None) -> Loss:
    """A loss of "classes", "values" or "binary", or one with a trait of losses."""
    mean = rng.random() < 0.5
    reduction = "mean" if mean else "sum"

    def entries(out: Tensor, y: Any) -> float:
        return float(out.numel()) if mean else 1.0

    def rows(out: Tensor, y: Any) -> float:
        return float(out.numel() // out.shape[1]) if mean else 1.0

    def numbers(shape: int) -> Tensor:
        return torch.tensor([0.5 + rng.random() for _ in range(shape)], dtype=torch.float64)

    given: Any
    if trait in ("loss is a subclass", "loss is a plain subclass", "loss has a hook", "loss forward replaced"):
        return _odd_loss(rng, kind, reduction, trait, entries, rows)
    if trait == "callable loss":
        return _callable_loss(rng, kind, mean, entries, rows)
    if trait == "other loss":
        given = rng.choice([nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss])(reduction=reduction)
        whole = type(given)(reduction="sum")
        return Loss(given, whole, entries, False, f"{type(given).__name__}({reduction})")
    if kind == "values":
        return Loss(
            nn.MSELoss(reduction=reduction),
            nn.MSELoss(reduction="sum"),
            entries,
            True,
            f"MSELoss({reduction})",
            entries,
        )
    if kind == "binary":
        options: dict[str, Any] = {}
        if rng.random() < 0.4:
            options["pos_weight"] = numbers(classes)
        if rng.random() < 0.3:
            options["weight"] = numbers(classes)
        given = nn.BCEWithLogitsLoss(reduction=reduction, **options)
        summed = nn.BCEWithLogitsLoss(reduction="sum", **options)
        return Loss(given, summed, entries, True, f"BCEWithLogitsLoss({reduction}, {', '.join(options)})", entries)
    options = {}
    if rng.random() < 0.3:
        options["weight"] = numbers(classes)
    if rng.random() < 0.3:
        options["label_smoothing"] = 0.2
    if kind == "classes" and rng.random() < 0.3:
        options["ignore_index"] = rng.choice([0, 1, -100])
    given = nn.CrossEntropyLoss(reduction=reduction, **options)
    summed = nn.CrossEntropyLoss(reduction="sum", **options)

    def counted(out: Tensor, y: Tensor) -> float:
        if not mean:
            return 1.0
        if y.is_floating_point():
            return rows(out, y)
        kept = y[y != options.get("ignore_index", -100)]
        weight = options.get("weight")
        return float(len(kept)) if weight is None else float(weight[kept].sum())

    text = f"CrossEntropyLoss({reduction}{''.join(', ' + name for name in options)})"
    return Loss(given, summed, counted, True, text, rows)


def _odd_loss(rng: random.Random, kind: str, reduction: str, trait: str, entries: Any, rows: Any) -> Loss:
    if trait == "loss is a plain subclass":
        if kind != "values":
            raise Unsuitable
        return Loss(
            Unchanged(reduction=reduction), nn.MSELoss(reduction="sum"), entries, False, f"Unchanged({reduction})"
        )
    if trait == "loss is a subclass":
        made: Any = {"values": Weighted, "classes": Focal, "binary": Tempered}.get(kind)
        if made is None:
            raise Unsuitable
        divisor = rows if kind == "classes" else entries
        return Loss(made(reduction=reduction), made(reduction="sum"), divisor, False, f"{made.__name__}({reduction})")
    made = {"values": nn.MSELoss, "classes": nn.CrossEntropyLoss, "binary": nn.BCEWithLogitsLoss}.get(kind)
    if made is None:
        raise Unsuitable
    loss, whole = made(reduction=reduction), made(reduction="sum")
    divisor = rows if kind == "classes" else entries
    if trait == "loss has a hook":
        way = rng.choice(["output", "input"])
        for one in (loss, whole):
            if way == "output":
                one.register_forward_hook(tripled)
            else:
                one.register_forward_pre_hook(_twice_the_outputs)
        return Loss(loss, whole, divisor, False, f"{made.__name__}({reduction}) with a hook on its {way}")

    def replaced(self: Any, out: Tensor, y: Any) -> Tensor:
        return 2 * made.forward(self, 0.5 * out, y)

    for one in (loss, whole):
        one.forward = types.MethodType(replaced, one)
    return Loss(loss, whole, divisor, False, f"{made.__name__}({reduction}) with another forward")


def _twice_the_outputs(module: nn.Module, arguments: Any) -> Any:
    return (2 * arguments[0], *arguments[1:])


def _callable_loss(rng: random.Random, kind: str, mean: bool, entries: Any, rows: Any) -> Loss:
    reduction = "mean" if mean else "sum"
    if kind == "classes":
        given: Any = functools.partial(F.cross_entropy, reduction=reduction)
        return Loss(
            given, functools.partial(F.cross_entropy, reduction="sum"), rows, False, f"cross_entropy({reduction})"
        )
    if kind == "binary":
        name = F.binary_cross_entropy_with_logits
        given = functools.partial(name, reduction=reduction)
        return Loss(given, functools.partial(name, reduction="sum"), entries, False, f"{name.__name__}({reduction})")
    if kind != "values":
        raise Unsuitable
    if rng.random() < 0.5:
        given = F.mse_loss if mean else functools.partial(F.mse_loss, reduction="sum")
        return Loss(given, functools.partial(F.mse_loss, reduction="sum"), entries, False, f"mse_loss({reduction})")

    def quartic(out: Tensor, y: Tensor) -> Tensor:
        return ((out - y) ** 2 + 0.1 * out**4).sum()

    if mean:
        return Loss(lambda out, y: quartic(out, y) / out.numel(), quartic, entries, False, "lambda, mean")
    return Loss(quartic, quartic, entries, False, "lambda, sum")


# -------------------------------------------------------------------------------------------------------------- values
@dataclass(eq=False)
class Value:
    """A value of the forward pass of the whole batch.

    Its kind: "image" [B, C, *S], "seq" [B, *P, C], "vec" [B, C], "time" [T, B, C], "rows bt" [B·T, C], "rows tb"
    [T·B, C], "frames bt" [B·T, C, *S], "frames tb" [T·B, C, *S].
    """

    at: int
    kind: str
    tensor: Tensor
    time: int = 0
    fresh: bool = False
    """Whether it may be written in place."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def channels(self) -> int:
        return self.shape[1] if self.pictured else self.shape[-1]

    @property
    def pictured(self) -> bool:
        return self.kind in ("image", "frames bt", "frames tb")


# In the middle of a model, at its end, around it, and around calls.
START = ("embedding", "time first in the inputs")
MIDDLE = (
    "tied conv_transpose",
    "tied linear",
    "frozen tied weight",
    "weight beside its layer",
    "bias used elsewhere",
    "module called twice",
    "module called on two values",
    "one parameter, two layers",
    "one module, two names",
    "own parameter",
    "time first, T = B",
    "time first, T ≠ B",
    "rows, batch outermost",
    "rows, time outermost",
    "frames in the batch, batch outermost",
    "frames in the batch, time outermost",
    "loop over time",
    "detach",
    "custom function",
    "layer under no_grad",
    "layer of which nothing is used",
    "layer that does not run",
    "complex layer",
    "forward called directly",
    "functional only",
    "called for each example",
    "called for each half",
    "batch in another order",
    "two views in the batch",
    "each example repeated in the batch",
    "layer with its own forward",
    "in place after positions",
    "unbatched inside vmap",
    "output_size in the call",
)
END = (
    "several outputs",
    "object with logits",
    "one output in a tuple",
    "several outputs, known loss",
    "rows as outputs",
    "rows as outputs, time outermost",
    "time first as outputs",
    "weight penalty",
    "loss is a subclass",
    "loss is a plain subclass",
    "loss has a hook",
    "loss forward replaced",
    "callable loss",
    "other loss",
)
AROUND = (
    "forward hook",
    "forward pre-hook",
    "hook in place",
    "global hook",
    "hook on a block",
    "backward hook",
    "frozen layers",
    "frozen bias",
    "parametrized",
    "old weight_norm",
    "pruned",
    "forward replaced",
    "compiled",
    "compiled part",
    "compiled after the optimizer",
    "converted",
    "sampled",
    "checkpoint",
    "checkpoint, reentrant",
    "dropout in training",
    "batch norm in training",
    "fixed batch size",
    "DataParallel",
    "the model is a layer",
)
CALLS = (
    "keyword inputs",
    "several inputs",
    "input without a batch axis",
    "inputs need gradients",
    "under no_grad",
    "under inference_mode",
    "under autocast",
    "another thread predicts",
    "another thread does the same",
    "half float inputs are views",
)
TRAITS = (*START, *MIDDLE, *END, *AROUND, *CALLS)
COMPILED = ("compiled", "compiled part", "compiled after the optimizer")
RARE = {**dict.fromkeys(COMPILED, 0.4), "another thread predicts": 0.5, "another thread does the same": 0.5}
MORE = {"time first, T = B": 2.0, "several outputs": 2.0, "forward hook": 2.0, "loss is a subclass": 1.5}
OPTIMIZER = (
    "",
    "",
    "trains later",
    "passes between",
    "hook after",
    "two backward passes",
    "closure",
)


class Builder:
    """Draws a model step by step, running it on the whole batch as it grows."""

    def __init__(self, rng: random.Random, traits: list[str]) -> None:
        self.rng, self.traits = rng, traits
        self.net = Net().double()
        self.values: list[Value] = []
        self.done: set[str] = set()
        self.wild = rng.random() < 0.2
        """Whether sizes are any; else of a few, so that models share plans and a sweep is fast."""
        self.batch = rng.randint(2, 5) if self.wild else rng.choice([3, 3, 4])
        self.inputs: Any = None
        self.axes: list[int | None] = []
        self.text: list[str] = []
        self.layers: list[str] = []
        self.idle: list[str] = []

    # ---------------------------------------------------------------------------------------------------------- basics
    def run(
        self, function: Callable[..., Tensor], *values: Value, kind: str, text: str, fresh: bool = False, time: int = 0
    ) -> Value:
        """Add a step."""
        try:
            with torch.no_grad():
                found = function(self.net, *(value.tensor.clone() for value in values))
        except (RuntimeError, ValueError) as error:
            raise Unsuitable(str(error)) from error
        if found.numel() > 3000 or not found.numel():
            raise Unsuitable("size")
        self.net.steps.append(Step(function, tuple(value.at for value in values), text))
        value = Value(len(self.net.names) + len(self.net.steps) - 1, kind, found, time or values[0].time, fresh)
        self.values.append(value)
        self.text.append(text)
        return value

    def register(self, module: nn.Module, nested: bool = False) -> str:
        """Give a module its place in the net."""
        name = f"l{len(self.layers)}"
        with torch.no_grad():
            for parameter in module.parameters():
                if not parameter.is_complex():
                    parameter.copy_(parameter.float())
        module = module.double() if not any(p.is_complex() for p in module.parameters()) else module
        if nested:
            block = nn.Module()
            block.add_module("inner", module)
            self.net.add_module(name, block)
            name = f"{name}.inner"
        else:
            self.net.add_module(name, module)
        self.layers.append(name)
        return name

    def call(self, value: Value, module: nn.Module, kind: str | None = None, text: str = "") -> tuple[Value, str]:
        """Add a module and a step that calls it."""
        name = self.register(module, self.rng.random() < 0.2)
        text = text or f"{name}={_described(module)}"
        fresh = not isinstance(module, nn.Dropout)  # which returns its input in evaluation mode
        return self.run(_calling(name), value, kind=kind or value.kind, text=text, fresh=fresh), name

    def a_conv(self, value: Value, c_out: int | None = None, keep: bool = False) -> nn.Module:
        """A random convolution for an image; one that keeps its size if asked."""
        rng, dims, channels = self.rng, value.tensor.ndim - 2, value.channels
        size = value.shape[2:]
        if not self.wild:
            tame: dict[str, Any] = {
                "bias": rng.random() < 0.7,
                "groups": rng.choice([1, 1, 2 if channels % 2 == 0 else 1]),
            }
            kind = CONVS[dims][0]
            if keep:
                return kind(channels, c_out or 2, 3, padding="same", **{**tame, "groups": 1})
            if rng.random() < 0.4 or min(size) < 3:
                return kind(channels, 2, 3 if min(size) < 3 else 2, padding=1, padding_mode="circular", **tame)
            return kind(channels, c_out or rng.choice([2, 4]), 3, stride=2, padding=1, **tame)
        groups = rng.choice([g for g in (1, 1, 2, 3, channels) if channels % g == 0])
        if c_out is not None and c_out % groups:
            groups = 1
        out = c_out or groups * rng.randint(1, max(1, min(3, 6 // groups)))
        kernel = [rng.randint(1, min(3, s)) for s in size]
        options: dict[str, Any] = {"groups": groups, "bias": rng.random() < 0.7}
        way = rng.random()
        if keep or way < 0.25:
            options |= {"padding": "same", "dilation": [rng.choice([1, 1, 2]) for _ in size]}
        else:
            options |= {
                "stride": [rng.choice([1, 1, 2, 3]) for _ in size],
                "dilation": [rng.choice([1, 1, 1, 2]) for _ in size],
                "padding": "valid" if way < 0.3 else [rng.randint(0, 2) for _ in size],
            }
        if rng.random() < 0.35 and options["padding"] != "valid":
            options["padding_mode"] = rng.choice(["reflect", "replicate", "circular"])
        return CONVS[dims][0](channels, out, kernel, **options)

    def a_transpose(self, value: Value) -> nn.Module:
        rng, dims, channels = self.rng, value.tensor.ndim - 2, value.channels
        if not self.wild:
            return CONVS[dims][1](channels, 2, 2, stride=rng.choice([1, 2]), bias=rng.random() < 0.7)
        groups = rng.choice([g for g in (1, 1, 2, channels) if channels % g == 0])
        stride = [rng.choice([1, 1, 2]) for _ in range(dims)]
        dilation = [rng.choice([1, 1, 2]) for _ in range(dims)]
        return CONVS[dims][1](
            channels,
            groups * rng.randint(1, 2),
            [rng.randint(1, 3 if dims < 3 else 2) for _ in range(dims)],
            stride=stride,
            dilation=dilation,
            padding=[rng.randint(0, 1) for _ in range(dims)],
            output_padding=[rng.choice([0, 0, min(1, max(s, d) - 1)]) for s, d in zip(stride, dilation, strict=True)],
            groups=groups,
            bias=rng.random() < 0.7,
        )

    def a_linear(self, value: Value, out: int | None = None) -> nn.Linear:
        return nn.Linear(
            value.shape[-1], out or (self.rng.randint(2, 5) if self.wild else 4), bias=self.rng.random() < 0.75
        )

    def layer(self, value: Value) -> Value:
        """A random layer that fits."""
        if not value.pictured:
            return self.call(value, self.a_linear(value))[0]
        way = self.rng.random()
        if way < 0.65:
            return self.call(value, self.a_conv(value))[0]
        if way < 0.9 and math.prod(value.shape[2:]) <= 20:
            return self.call(value, self.a_transpose(value))[0]
        return self.call(value, self.a_linear(value))[0]

    def act(self, value: Value, smooth: bool = False) -> Value:
        """A random activation."""
        rng = self.rng
        if value.fresh and not smooth and rng.random() < 0.3:
            ways: dict[str, Callable[[Net, Tensor], Tensor]] = {
                "relu_": lambda net, v: F.relu_(v),
                "add_": lambda net, v: v.add_(0.5),
                "mul_": lambda net, v: v.mul_(0.7),
                "leaky_relu_": lambda net, v: F.leaky_relu_(v, 0.1),
                "clamp_": lambda net, v: v.clamp_(-1.0, 1.0),
            }
            text = rng.choice([*ways, "ReLU(inplace)"])
            if text == "ReLU(inplace)":
                found, _ = self.call(value, nn.ReLU(inplace=True), text=text)
            else:
                found = self.run(ways[text], value, kind=value.kind, text=text, fresh=True)
            self.values.remove(value)
            return found
        names = ["Tanh", "Sigmoid", "Softplus", "SiLU"] + ([] if smooth else ["ReLU", "GELU", "ELU", "LeakyReLU"])
        name = rng.choice(names)
        if rng.random() < 0.5:
            return self.call(value, getattr(nn, name)(), text=name)[0]
        function = getattr(torch, name.lower()) if name in ("Tanh", "Sigmoid") else getattr(F, _snake(name))
        return self.run(lambda net, v: function(v), value, kind=value.kind, text=name.lower())

    # -------------------------------------------------------------------------------------------------- ordinary steps
    def ordinary(self, value: Value) -> Value:
        """One or two ordinary steps."""
        rng = self.rng
        ways = ["layer"] * 5 + ["act"] * 3 + ["residual", "norm", "dropout", "reshape", "concat", "block"]
        if value.pictured:
            ways += ["pool", "pool"]
        if value.kind == "seq" and value.tensor.ndim == 3:
            ways += ["attention"]
        way = rng.choice(ways)
        if way == "layer":
            value = self.layer(value)
            return self.act(value) if rng.random() < 0.7 else value
        if way == "act":
            return self.act(value)
        if way == "residual":
            others = [
                one for one in self.values if one.shape == value.shape and one.kind == value.kind and one is not value
            ]
            if not others:
                return self.keeping(value)
            return self.run(
                lambda net, a, b: a + b, value, rng.choice(others), kind=value.kind, text="residual", fresh=True
            )
        if way == "concat":
            at = 1 if value.pictured else -1
            other = self.act(value, smooth=True)
            return self.run(
                lambda net, a, b: torch.cat([a, b], at), value, other, kind=value.kind, text="cat", fresh=True
            )
        if way == "norm":
            return self.norm(value)
        if way == "dropout":
            return self.call(value, nn.Dropout(0.3), text="Dropout")[0]
        if way == "pool":
            return self.pool(value)
        if way == "attention":
            return self.attention(value)
        if way == "block" and value.pictured:
            inner = Chain(self.a_conv(value, keep=True), nn.Tanh())
            return self.call(value, inner, text="block(conv, tanh)")[0]
        if way == "block":
            width = rng.randint(2, 4)
            inner = Chain(nn.Linear(value.shape[-1], width), nn.ReLU(inplace=rng.random() < 0.5), nn.Linear(width, 3))
            return self.call(value, inner, text="block(linear, relu, linear)")[0]
        return self.reshaped(value)

    def keeping(self, value: Value) -> Value:
        """A layer with a skip connection."""
        module = (
            self.a_conv(value, value.channels, keep=True) if value.pictured else self.a_linear(value, value.shape[-1])
        )
        out, _ = self.call(value, module)
        if out.shape != value.shape:
            raise Unsuitable
        if self.rng.random() < 0.3:
            found = self.run(lambda net, a, b: a.add_(b), out, value, kind=value.kind, text="+= skip", fresh=True)
            self.values.remove(out)
            return found
        return self.run(lambda net, a, b: a + b, out, value, kind=value.kind, text="+ skip", fresh=True)

    def norm(self, value: Value) -> Value:
        rng = self.rng
        affine = rng.random() < 0.5
        if not value.pictured:
            return self.call(value, nn.LayerNorm(value.shape[-1], elementwise_affine=affine))[0]
        channels = value.channels
        if rng.random() < 0.5 and channels * math.prod(value.shape[2:]) > channels:
            groups = rng.choice([g for g in (1, 2, channels) if channels % g == 0])
            return self.call(value, nn.GroupNorm(groups, channels, affine=affine))[0]
        dims = value.tensor.ndim - 2
        module = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](channels, affine=affine)
        module.running_mean.copy_(torch.tensor([rng.gauss(0, 1) for _ in range(channels)]))  # type: ignore[union-attr]
        module.running_var.copy_(torch.tensor([0.5 + rng.random() for _ in range(channels)]))  # type: ignore[union-attr]
        return self.call(value, module.eval())[0]

    def pool(self, value: Value) -> Value:
        rng, dims = self.rng, value.tensor.ndim - 2
        if rng.random() < 0.4:
            size = [rng.randint(1, min(2, s)) for s in value.shape[2:]]
            module = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims]
            return self.call(value, module(size[0] if dims == 1 else tuple(size)))[0]
        kind = rng.choice([nn.MaxPool1d, nn.AvgPool1d]) if dims == 1 else None
        if dims == 2:
            kind = rng.choice([nn.MaxPool2d, nn.AvgPool2d])
        elif dims == 3:
            kind = rng.choice([nn.MaxPool3d, nn.AvgPool3d])
        if min(value.shape[2:]) < 2:
            raise Unsuitable
        return self.call(value, kind(2, stride=rng.choice([1, 2])))[0]  # type: ignore[misc]

    def attention(self, value: Value) -> Value:
        width, depth = value.shape[-1], self.rng.randint(1, 3)
        q, k, v = (self.call(value, nn.Linear(width, depth if at < 2 else 3))[0] for at in range(3))

        def attend(net: Net, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return (a @ b.mT / depth**0.5).softmax(-1) @ c

        return self.run(attend, q, k, v, kind="seq", text="attention", fresh=False)

    def reshaped(self, value: Value) -> Value:
        """The same numbers in another form."""
        rng = self.rng
        if value.kind == "image":
            way = rng.choice(["last", "transposed", "words"])
            if way == "transposed" and value.tensor.ndim > 3:
                return self.run(lambda net, v: v.transpose(2, 3), value, kind="image", text="transpose(2, 3)")
            if way == "last":
                return self.run(lambda net, v: v.movedim(1, -1), value, kind="seq", text="movedim(1, -1)")
            return self.run(lambda net, v: v.flatten(2).mT, value, kind="seq", text="flatten(2).mT")
        if value.kind == "seq":
            return self.run(lambda net, v: v.movedim(-1, 1), value, kind="image", text="movedim(-1, 1)")
        if value.kind == "vec" and value.shape[1] % 2 == 0:
            half = value.shape[1] // 2
            return self.run(
                lambda net, v: v.reshape(len(v), half, 2), value, kind="seq", text=f"reshape(-1, {half}, 2)"
            )
        return self.act(value)

    def unfolded(self, value: Value) -> Value:
        """Back to a kind whose first axis is the batch's."""
        time = value.time
        ways: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
            "rows bt": (lambda net, v: v.reshape(-1, time, v.shape[-1]), "seq"),
            "rows tb": (lambda net, v: v.reshape(time, -1, v.shape[-1]).transpose(0, 1), "seq"),
            "frames bt": (lambda net, v: v.reshape(-1, time, *v.shape[1:]).mean(1), "image"),
            "frames tb": (lambda net, v: v.reshape(time, -1, *v.shape[1:]).transpose(0, 1).sum(1), "image"),
        }
        if value.kind in ways:
            function, kind = ways[value.kind]
            return self.run(function, value, kind=kind, text=f"unfold {value.kind}")
        if value.kind == "time":
            way = self.rng.choice(["mean", "last", "sum", "transpose"])
            if way == "transpose":
                return self.run(lambda net, v: v.transpose(0, 1), value, kind="seq", text="batch first again")
            backs: dict[str, Callable[[Net, Tensor], Tensor]] = {
                "mean": lambda net, v: v.mean(0),
                "last": lambda net, v: v[-1],
                "sum": lambda net, v: v.sum(0),
            }
            return self.run(backs[way], value, kind="vec", text=f"{way} over time")
        return value

    def vector(self, value: Value) -> Value:
        """To [B, C]."""
        value = self.unfolded(value)
        if value.kind == "vec":
            return value
        size = value.tensor[0].numel()
        if value.kind == "image" and (size > 60 or self.rng.random() < 0.3):
            return self.run(lambda net, v: v.flatten(2).mean(2), value, kind="vec", text="mean over positions")
        if size > 60 or (value.kind == "seq" and self.rng.random() < 0.4):
            return self.run(lambda net, v: v.flatten(1, -2).mean(1), value, kind="vec", text="mean over positions")
        return self.run(lambda net, v: v.flatten(1), value, kind="vec", text="flatten")

    def sequence(self, value: Value) -> Value:
        """To [B, T, C]."""
        value = self.unfolded(value)
        if value.kind == "image":
            value = self.run(lambda net, v: v.flatten(2).mT, value, kind="seq", text="flatten(2).mT")
        if value.kind == "vec":
            value, _ = self.call(value, self.a_linear(value, 6))
            value = self.run(lambda net, v: v.reshape(len(v), 3, 2), value, kind="seq", text="reshape(-1, 3, 2)")
        if value.tensor.ndim > 3:
            value = self.run(lambda net, v: v.flatten(1, -2), value, kind="seq", text="flatten(1, -2)")
        return value

    def image(self, value: Value, dims: int | None = None) -> Value:
        """To [B, C, *S]."""
        value = self.unfolded(value)
        if value.kind == "vec":
            value = self.sequence(value)
        if value.kind == "seq":
            value = self.run(lambda net, v: v.movedim(-1, 1), value, kind="image", text="movedim(-1, 1)")
        if dims is not None and value.tensor.ndim - 2 > dims:
            value = self.run(lambda net, v: v.flatten(dims + 1), value, kind="image", text=f"flatten({dims + 1})")
        if dims is not None and value.tensor.ndim - 2 < dims:
            raise Unsuitable
        return value

    # ------------------------------------------------------------------------------------------------- traits in models
    def start(self) -> Value:
        """Inputs."""
        rng, traits = self.rng, self.traits
        batch = self.batch
        generator = torch.Generator().manual_seed(rng.randrange(2**31))

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).double()

        needs = {
            "time first, T = B": "seq",
            "time first, T ≠ B": "seq",
            "rows, batch outermost": "seq",
            "rows, time outermost": "seq",
            "loop over time": "seq",
            "in place after positions": "seq",
            "tied conv_transpose": "image",
            "output_size in the call": "image",
            "frames in the batch, batch outermost": "clip",
            "frames in the batch, time outermost": "clip",
            "dropout in training": "vec",
            "the model is a layer": "vec",
        }
        wanted = next((needs[trait] for trait in traits if trait in needs), None)
        kind = wanted or rng.choice(["image", "image", "image", "seq", "seq", "vec"])
        time = (
            batch
            if "time first, T = B" in traits
            else rng.choice([t for t in ((2, 3, 4, 6) if self.wild else (3, 4)) if t != batch])
        )
        if "time first in the inputs" in traits:
            time = rng.choice([time, batch])
            x = numbers(time, batch, rng.randint(2, 4))
            self.inputs, self.axes, self.net.names = [x], [1], ["x"]
            self.values.append(Value(0, "time", x))
            self.text.append(f"x {[*x.shape]}, time first")
            self.done.add("time first in the inputs")
            return self.values[0]
        if "embedding" in traits:
            x = torch.randint(5, (batch, time), generator=generator)
            self.inputs, self.axes, self.net.names = [x], [0], ["x"]
            self.values.append(Value(0, "words", x))
            self.text.append(f"x {[*x.shape]} of 5 words")
            value, name = self.call(self.values[0], nn.Embedding(5, 3), kind="seq")
            self.done.add("embedding")
            if rng.random() < 0.5:
                self.text.append("a head with the embedding's weight")
                self.traits.append("tied embedding")
                self.done.add("tied embedding")
                value, _ = self.call(value, nn.Linear(3, 3))
                value = self.run(
                    lambda net, v: F.linear(torch.tanh(v), net.get_submodule(name).weight),
                    value,
                    kind="seq",
                    text="F.linear(tanh, embedding)",
                )
            return value
        if not self.wild:
            tame = {"vec": (4,), "seq": (time, 4), "clip": rng.choice([(2, time, 4), (2, time, 4, 4)])}
            x = numbers(batch, *tame.get(kind, rng.choice([(2, 6), (2, 4, 4), (2, 4, 4), (2, 3, 3, 3)])))
        elif kind == "vec":
            x = numbers(batch, rng.randint(2, 6))
        elif kind == "seq":
            x = numbers(batch, time, rng.randint(2, 4))
        elif kind == "clip":
            dims = rng.choice([1, 2, 2])
            x = numbers(batch, rng.randint(1, 3), time, *(rng.randint(3, 5) for _ in range(dims)))
        else:
            dims = rng.choice([1, 2, 2, 2, 3])
            sizes = {1: (4, 8), 2: (3, 6), 3: (2, 4)}[dims]
            x = numbers(batch, rng.randint(1, 4), *(rng.randint(*sizes) for _ in range(dims)))
        self.inputs, self.axes, self.net.names = [x], [0], ["x"]
        self.values.append(Value(0, "image" if kind == "clip" else kind, x))
        self.text.append(f"x {[*x.shape]}")
        value = self.values[0]
        if "several inputs" in traits or "input without a batch axis" in traits:
            shared = "input without a batch axis" in traits
            other = numbers(*x.shape[1:]) if shared else numbers(*x.shape)
            if shared and rng.random() < 0.6:  # the first one
                self.inputs, self.axes, self.net.names = [other, x], [None, 0], ["table", "x"]
            else:
                self.inputs, self.axes, self.net.names = [x, other], [0, None if shared else 0], ["x", "more"]
            self.values = [Value(at, value.kind, one) for at, one in enumerate(self.inputs)]
            self.text[-1] = ", ".join(f"{n} {[*v.shape]}" for n, v in zip(self.net.names, self.inputs, strict=True))
            first, second = self.values
            if not shared and rng.random() < 0.5:
                first, _ = self.call(first, self.a_linear(first, first.shape[-1]))
            value = self.run(lambda net, a, b: a + 0.5 * b, first, second, kind=value.kind, text="a + b/2", fresh=True)
            self.done |= {"several inputs", "input without a batch axis"}
        return value

    def trait(self, value: Value, name: str) -> Value:
        """One of the traits in the middle of a model."""
        method = getattr(self, "_" + "".join(c if c.isalnum() else "_" for c in name).replace("≠", "_"))
        found = method(value)
        self.done.add(name)
        return found

    def _tied_conv_transpose(self, value: Value, frozen: bool = False) -> Value:
        value = self.image(value)
        dims, channels = value.tensor.ndim - 2, value.channels
        options = {"stride": self.rng.choice([1, 2]), "padding": self.rng.choice([0, 1])}
        conv = CONVS[dims][0](channels, self.rng.randint(1, 3), 2, bias=self.rng.random() < 0.5, **options)
        found, name = self.call(value, conv)
        found = self.act(found, smooth=True)
        if frozen:
            conv.weight.requires_grad_(False)
        function = FUNCTIONS[dims][1]
        return self.run(
            lambda net, v: function(v, net.get_submodule(name).weight, None, **options),
            found,
            kind="image",
            text=f"conv_transpose by {name}.weight",
            fresh=True,
        )

    def _tied_linear(self, value: Value, frozen: bool = False) -> Value:
        value = self.sequence(value) if value.pictured else value
        linear = self.a_linear(value)
        found, name = self.call(value, linear)
        found = self.act(found)
        if frozen:
            linear.weight.requires_grad_(False)
        return self.run(
            lambda net, v: F.linear(v, net.get_submodule(name).weight.t()),
            found,
            kind=value.kind,
            text=f"F.linear by {name}.weight.t()",
            fresh=True,
        )

    def _frozen_tied_weight(self, value: Value) -> Value:
        return self._tied_conv_transpose(value, True) if value.kind == "image" else self._tied_linear(value, True)

    def _weight_beside_its_layer(self, value: Value) -> Value:
        factor = self.rng.choice([0.5, 1.0])
        if value.pictured:
            dims = value.tensor.ndim - 2
            found, name = self.call(value, CONVS[dims][0](value.channels, 2, 2, bias=self.rng.random() < 0.5))
            function: Callable[..., Tensor] = FUNCTIONS[dims][0]
        else:
            found, name = self.call(value, self.a_linear(value))
            function = F.linear
        other = self.run(
            lambda net, v: function(torch.sin(factor * v), net.get_submodule(name).weight),
            value,
            kind=value.kind,
            text=f"{function.__name__} by {name}.weight",
        )
        return self.run(lambda net, a, b: a + b, found, other, kind=value.kind, text="+", fresh=True)

    def _bias_used_elsewhere(self, value: Value) -> Value:
        linear = nn.Linear(value.shape[-1], value.shape[-1])
        found, name = self.call(value, linear)
        found = self.act(found, smooth=True)
        return self.run(
            lambda net, v: v * net.get_submodule(name).bias, found, kind=value.kind, text=f"* {name}.bias", fresh=True
        )

    def _same(self, value: Value) -> nn.Module:
        return self.a_conv(value, value.channels, True) if value.pictured else self.a_linear(value, value.shape[-1])

    def _module_called_twice(self, value: Value) -> Value:
        found, name = self.call(value, self._same(value))
        found = self.act(found)
        return self.run(_calling(name), found, kind=value.kind, text=f"{name} again", fresh=True)

    def _module_called_on_two_values(self, value: Value) -> Value:
        module = self.a_conv(value) if value.pictured else self.a_linear(value)
        other = self.run(lambda net, v: torch.sin(v.flip(-1)), value, kind=value.kind, text="sin(flip)")
        a, name = self.call(value, module)
        b = self.run(_calling(name), other, kind=value.kind, text=f"{name} again")
        return self.run(lambda net, a, b: a * b, a, b, kind=value.kind, text="product", fresh=True)

    def _one_parameter__two_layers(self, value: Value) -> Value:
        first, second = self._same(value), None
        second = copy.deepcopy(first)
        second.weight = first.weight
        found, _ = self.call(value, first)
        found = self.act(found)
        return self.call(found, second, text="a layer with the same weight")[0]

    def _one_module__two_names(self, value: Value) -> Value:
        module = self.layer_module(value)
        found, _ = self.call(value, module)
        self.net.add_module("alias", module)
        return found

    def layer_module(self, value: Value) -> nn.Module:
        return self.a_conv(value) if value.pictured else self.a_linear(value)

    def _own_parameter(self, value: Value) -> Value:
        self.net.scale = nn.Parameter(torch.tensor([1.25], dtype=torch.float64))
        value = self.layer(value)
        return self.run(lambda net, v: v * net.scale, value, kind=value.kind, text="* own parameter", fresh=True)

    def _time_first__T___B(self, value: Value) -> Value:
        value = self.sequence(value)
        time = value.shape[1]
        if ("time first, T = B" in self.traits) != (time == self.batch):
            raise Unsuitable
        found = self.run(lambda net, v: v.transpose(0, 1), value, kind="time", text="time first", time=time)
        found, _ = self.call(found, self.a_linear(found))
        return self.act(found)

    def _rows(self, value: Value, outer: str) -> Value:
        value = self.sequence(value)
        time = value.shape[1]
        if outer == "bt":
            found = self.run(lambda net, v: v.flatten(0, 1), value, kind="rows bt", text="[B·T, C]", time=time)
        else:
            found = self.run(
                lambda net, v: v.transpose(0, 1).flatten(0, 1), value, kind="rows tb", text="[T·B, C]", time=time
            )
        found, _ = self.call(found, self.a_linear(found))
        return self.act(found)

    def _rows__batch_outermost(self, value: Value) -> Value:
        return self._rows(value, "bt")

    def _rows__time_outermost(self, value: Value) -> Value:
        return self._rows(value, "tb")

    def _frames(self, value: Value, outer: str) -> Value:
        if value.kind != "image" or value.tensor.ndim < 4:
            raise Unsuitable
        time = value.shape[2]
        if outer == "bt":
            found = self.run(
                lambda net, v: v.transpose(1, 2).flatten(0, 1), value, kind="frames bt", text="[B·T, C, …]", time=time
            )
        else:
            found = self.run(
                lambda net, v: v.movedim(2, 0).flatten(0, 1), value, kind="frames tb", text="[T·B, C, …]", time=time
            )
        found, _ = self.call(found, self.a_conv(found))
        return self.act(found)

    def _frames_in_the_batch__batch_outermost(self, value: Value) -> Value:
        return self._frames(value, "bt")

    def _frames_in_the_batch__time_outermost(self, value: Value) -> Value:
        return self._frames(value, "tb")

    def _loop_over_time(self, value: Value) -> Value:
        value = self.sequence(value)
        a, b = self.register(nn.Linear(value.shape[-1], 3)), self.register(nn.Linear(3, 3))

        def loop(net: Net, v: Tensor) -> Tensor:
            h = v.new_zeros(len(v), 3)
            for x in v.unbind(1):
                h = torch.tanh(net.get_submodule(a)(x) + net.get_submodule(b)(h))
            return h

        return self.run(loop, value, kind="vec", text=f"loop over time with {a}, {b}")

    def _detach(self, value: Value) -> Value:
        found = self.layer(value)
        cut = self.run(lambda net, v: v.detach(), found, kind=found.kind, text="detach")
        if self.rng.random() < 0.6:
            other = self.act(found, smooth=True)
            return self.run(lambda net, a, b: a * b, cut, other, kind=found.kind, text="product", fresh=True)
        return self.layer(cut)

    def _custom_function(self, value: Value) -> Value:
        function = self.rng.choice([Negated, StraightThrough, Cubed])
        found = self.layer(value)
        return self.run(lambda net, v: function.apply(v), found, kind=found.kind, text=function.__name__)

    def _layer_under_no_grad(self, value: Value) -> Value:
        module = self.layer_module(value)
        name = self.register(module)

        def quiet(net: Net, v: Tensor) -> Tensor:
            with torch.no_grad():
                return net.get_submodule(name)(v)

        return self.run(quiet, value, kind=value.kind, text=f"{name}={_described(module)} under no_grad")

    def _layer_of_which_nothing_is_used(self, value: Value) -> Value:
        self.layer(value)
        return self.layer(value)

    def _layer_that_does_not_run(self, value: Value) -> Value:
        name = self.register(self.layer_module(value))
        self.idle.append(name)
        self.text.append(f"{name} does not run")
        return self.layer(value)

    def _complex_layer(self, value: Value) -> Value:
        dims = value.tensor.ndim - 2
        if value.pictured:
            module: nn.Module = CONVS[dims][0](
                value.channels, 2, 2, bias=self.rng.random() < 0.5, dtype=torch.complex128
            )
        else:
            module = nn.Linear(value.shape[-1], 3, bias=self.rng.random() < 0.5, dtype=torch.complex128)
        name = self.register(module)
        back = self.rng.choice(["abs", "real", "square"])

        def function(net: Net, v: Tensor) -> Tensor:
            z = net.get_submodule(name)(torch.complex(v, 0.3 * v.flip(-1)))
            return {"abs": lambda: (z * z.conj()).real.add(0.1).sqrt(), "real": lambda: z.real + z.imag.sin()}.get(
                back, lambda: (z * z).real
            )()

        return self.run(function, value, kind=value.kind, text=f"{name}={_described(module)} complex, {back}")

    def _forward_called_directly(self, value: Value) -> Value:
        module = self.layer_module(value)
        name = self.register(module)
        return self.run(
            lambda net, v: net.get_submodule(name).forward(v),
            value,
            kind=value.kind,
            text=f"{name}={_described(module)}.forward",
        )

    def _functional_only(self, value: Value) -> Value:
        name = self.register(nn.Linear(value.shape[-1], 3))

        def function(net: Net, v: Tensor) -> Tensor:
            module = net.get_submodule(name)
            return F.linear(v, module.weight, module.bias)

        return self.run(function, value, kind=value.kind, text=f"F.linear with {name}'s parameters")

    def _called_for_each_example(self, value: Value) -> Value:
        value = self.unfolded(value)
        module = self.layer_module(value)
        name = self.register(module)
        keep = self.rng.random() < 0.5

        def function(net: Net, v: Tensor) -> Tensor:
            layer = net.get_submodule(name)
            return torch.cat([layer(u) for u in v.split(1)]) if keep else torch.stack([layer(u) for u in v])

        text = f"{name}={_described(module)} for each example{'' if keep else ', unbatched'}"
        return self.run(function, value, kind=value.kind, text=text)

    def _called_for_each_half(self, value: Value) -> Value:
        value = self.unfolded(value)
        module = self.layer_module(value)
        name = self.register(module)

        def function(net: Net, v: Tensor) -> Tensor:
            parts = v.tensor_split(2) if len(v) > 1 else [v]
            return torch.cat([net.get_submodule(name)(u) for u in parts])

        return self.run(function, value, kind=value.kind, text=f"{name}={_described(module)} for each half")

    def _batch_in_another_order(self, value: Value) -> Value:
        value = self.unfolded(value)
        turned = self.run(lambda net, v: v.flip(0), value, kind=value.kind, text="flip(0)")
        found = self.layer(turned)
        self.values = [one for one in self.values if one not in (turned, found)]  # of another order than the rest
        return self.run(lambda net, v: v.flip(0), found, kind=found.kind, text="flip(0)")

    def _two_views_in_the_batch(self, value: Value) -> Value:
        value = self.unfolded(value)
        both = self.run(
            lambda net, v: torch.cat([v, torch.sin(v.flip(-1))]),
            value,
            kind=value.kind,
            text="cat of two views on axis 0",
        )
        found = self.layer(both)
        return self.run(
            lambda net, v: torch.sub(*v.chunk(2)), found, kind=found.kind, text="difference of the views", fresh=True
        )

    def _each_example_repeated_in_the_batch(self, value: Value) -> Value:
        value = self.unfolded(value)
        scale = torch.tensor([1.0, -0.5], dtype=torch.float64)

        def repeat(net: Net, v: Tensor) -> Tensor:
            shape = [1] * (v.ndim - 1)
            return v.repeat_interleave(2, 0) * scale.to(v.dtype).repeat(len(v)).reshape(-1, *shape)

        both = self.run(repeat, value, kind=value.kind, text="repeat_interleave(2, 0), scaled")
        found = self.layer(both)
        return self.run(
            lambda net, v: v.reshape(-1, 2, *v.shape[1:]).mean(1),
            found,
            kind=found.kind,
            text="mean of repeats",
            fresh=True,
        )

    def _layer_with_its_own_forward(self, value: Value) -> Value:
        bias = self.rng.random() < 0.7
        if value.pictured and value.tensor.ndim == 4:
            return self.call(value, self.rng.choice([Standardised, Inner])(value.channels, 2, 2, bias=bias))[0]
        kind = self.rng.choice([Scaled, Outside, Called, Same])
        return self.call(value, kind(value.shape[-1], 3, bias=bias))[0]

    def _in_place_after_positions(self, value: Value) -> Value:
        value = self.sequence(value)
        found, _ = self.call(value, nn.Linear(value.shape[-1], 4))
        if self.rng.random() < 0.5:
            return self.call(found, nn.ReLU(inplace=True))[0]
        return self.run(lambda net, v: v.mul_(0.5).relu_(), found, kind="seq", text="mul_, relu_", fresh=True)

    def _unbatched_inside_vmap(self, value: Value) -> Value:
        value = self.unfolded(value)
        module = self.layer_module(value)
        name = self.register(module)
        return self.run(
            lambda net, v: torch.vmap(net.get_submodule(name))(v),
            value,
            kind=value.kind,
            text=f"vmap of {name}={_described(module)}",
        )

    def _output_size_in_the_call(self, value: Value) -> Value:
        value = self.image(value)
        dims = value.tensor.ndim - 2
        name = self.register(CONVS[dims][1](value.channels, 2, 2, stride=2))
        size = [2 * s + self.rng.choice([0, 1]) for s in value.shape[2:]]
        return self.run(
            lambda net, v: net.get_submodule(name)(v, output_size=size),
            value,
            kind="image",
            text=f"{name} with output_size={size}",
        )


def _calling(name: str) -> Callable[[Net, Tensor], Tensor]:
    return lambda net, v: net.get_submodule(name)(v)


def _snake(name: str) -> str:
    return {"LeakyReLU": "leaky_relu"}.get(name, name.lower())


def _described(module: nn.Module) -> str:
    return repr(module).replace("\n", " ").replace("kernel_size=", "k=")


# ---------------------------------------------------------------------------------------------------------------- cases
@dataclass
class Case:
    """A model with a loss and data, and how the library is called with them.

    Attributes:
        model: what the library gets.
        plain: the oracle's own, of the same parameters' values and names, in float64.
        axes: for each input the axis of its examples, None for an input of all.
        layout: how the outputs hold the examples: "b" first, "bt" and "tb" rows, "time" second.
        traits: what is unusual about it.
        known: whether curvature of the loss is defined by its Hessian that the library has.
        seeded: whether the model draws, so that the seed is set before every pass.
        refuse: functions that have no right answer: any number is wrong.
        skip: functions that nothing is said about.
    """

    seed: int
    model: nn.Module
    plain: nn.Module
    inputs: list[Any]
    names: list[str]
    axes: list[int | None]
    batch: int
    time: int
    targets: Tensor
    layout: str
    pack: str
    loss: Loss
    traits: list[str]
    text: str
    dtype: torch.dtype
    form: str
    idle: list[str]
    seeded: bool = False
    refuse: set[str] = field(default_factory=set)
    skip: set[str] = field(default_factory=set)
    optimizer: str = ""
    layer: str = ""
    rng: random.Random = field(default_factory=random.Random)

    @property
    def ordinary(self) -> bool:
        """Whether nothing about it is unusual."""
        return not self.traits

    def formed(self, inputs: list[Any]) -> Any:
        """Inputs as data holds them."""
        if self.form == "mapping":
            return dict(zip(self.names, inputs, strict=True))
        return inputs[0] if self.form == "tensor" else tuple(inputs)

    def run(self, model: nn.Module, inputs: list[Any]) -> Any:
        """The model on inputs."""
        if self.form == "mapping":
            return model(**dict(zip(self.names, inputs, strict=True)))
        return model(*inputs)

    def example(self, n: int) -> tuple[list[Any], Tensor]:
        """One example alone, in float64."""
        inputs = []
        for one, axis in zip(self.inputs, self.axes, strict=True):
            one = one.detach()
            one = one.double() if one.is_floating_point() else one
            inputs.append(one if axis is None else one.narrow(axis, n, 1).clone())
        return inputs, self.own(self.wide_targets, n)

    @property
    def wide_targets(self) -> Tensor:
        return self.targets.double() if self.targets.is_floating_point() else self.targets

    def own(self, rows: Tensor, n: int) -> Tensor:
        """What of outputs or targets belongs to an example."""
        if self.layout == "bt":
            return rows[n * self.time : (n + 1) * self.time]
        if self.layout == "tb":
            return rows[n :: self.batch]
        return rows.narrow(1 if self.layout == "time" else 0, n, 1)

    @property
    def data(self) -> tuple[Any, Tensor]:
        return self.formed(self.inputs), self.targets

    @contextlib.contextmanager
    def world(self) -> Iterator[None]:
        """What holds for every call, the oracle's as well."""
        handles = []
        if "global hook" in self.traits:
            way = self.seed % 3
            if way == 0:
                handles.append(nn.modules.module.register_module_forward_hook(everywhere))
            elif way == 1:
                handles.append(nn.modules.module.register_module_forward_hook(everywhere, always_call=True))
            else:
                handles.append(nn.modules.module.register_module_forward_pre_hook(everywhere_before))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def situation(self, again: Callable[[], Any] | None = None) -> Iterator[list[str]]:
        """What the library is called within; yields what went wrong beside it."""
        trouble: list[str] = []
        with contextlib.ExitStack() as stack:
            if "under no_grad" in self.traits:
                stack.enter_context(torch.no_grad())
            if "under inference_mode" in self.traits:
                stack.enter_context(torch.inference_mode())
            if "under autocast" in self.traits:
                stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            if self.seeded:
                torch.manual_seed(self.seed)
            if "another thread predicts" in self.traits:
                stack.enter_context(_meanwhile(lambda: self._predict(), trouble))
            if "another thread does the same" in self.traits and again is not None:
                stack.enter_context(_meanwhile(again, trouble))
            yield trouble

    def _predict(self) -> list[Tensor]:
        with torch.no_grad():
            return unpacked(self.pack, self.run(self.model, [one.detach() for one in self.inputs]))


@contextlib.contextmanager
def _meanwhile(call: Callable[[], Any], trouble: list[str]) -> Iterator[None]:
    """Another thread that calls it again and again; its results must be those of a call alone."""
    try:
        alone = call()
    except Exception:  # refused, or not even possible alone
        yield
        return
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                if not _alike(call(), alone):
                    trouble.append("another thread got other numbers")
                    return
            except Exception as error:
                trouble.append(f"another thread got {type(error).__name__}: {str(error)[:80]}")
                return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    if isinstance(a, Mapping):
        return set(a) == set(b) and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b, strict=True))
    return not hasattr(a, "A") or (_alike(a.A, b.A) and _alike(a.B, b.B))


def draw_traits(rng: random.Random) -> list[str]:
    """None, one, two or three."""
    count = rng.choices([0, 1, 2, 3], [25, 45, 20, 10])[0]
    weights = [RARE.get(trait, 1.0) * MORE.get(trait, 1.0) for trait in TRAITS]
    found: list[str] = []
    for trait in rng.choices(TRAITS, weights, k=count):
        if trait not in found and not (trait in CALLS and any(one in CALLS for one in found)):
            found.append(trait)
    return found


def make_case(seed: int, traits: list[str] | None = None) -> Case:
    """Case of a seed: the first draw of it that is a model.

    Args:
        seed: any number.
        traits: these instead of random ones.
    """
    for attempt in range(400):
        text = f"{seed}/{attempt}/{traits}"
        chosen = draw_traits(random.Random(f"{seed}/{traits}")) if traits is None else list(traits)
        if traits is None and attempt >= 100:
            chosen = draw_traits(random.Random(text))
        try:
            return _draw(seed, text, chosen)
        except Unsuitable:
            continue
    raise AssertionError(f"no model of seed {seed} with {traits}")


def _draw(seed: int, text: str, traits: list[str]) -> Case:
    case = _built(seed, text, traits)
    twin = _built(seed, text, traits)
    case.plain = twin.model
    if "the model is a layer" in traits:
        if len(case.model.steps) != 1 or case.model.penalty is not None or case.pack != "tensor":
            raise Unsuitable
        case.model, case.plain = case.model.get_submodule(case.layer), case.plain.get_submodule(case.layer)
    for module in case.plain.modules():
        if isinstance(module, Net):
            module.plain = True
    _check(case)
    _finish(case)
    return case


def _built(seed: int, text: str, traits: list[str]) -> Case:
    """A model with everything that its oracle shares."""
    rng = random.Random(text)
    torch.manual_seed(rng.randrange(2**31))
    builder = Builder(rng, list(traits))
    value = builder.start()
    middle = [trait for trait in traits if trait in MIDDLE]
    rng.shuffle(middle)
    steps = rng.randint(0, 2) if traits else rng.randint(1, 5)
    if "the model is a layer" in traits:
        steps = 0
    fixed = ("time first, T = B", "frames in the batch, batch outermost", "frames in the batch, time outermost")
    if any(trait in fixed for trait in middle):
        middle.sort(key=lambda trait: trait not in fixed)
    else:
        for _ in range(steps):
            value = builder.ordinary(value)
    for trait in middle:
        value = builder.trait(value, trait)
    if "dropout in training" in traits:
        value = builder.act(builder.layer(value))
        value, _ = builder.call(value, nn.Dropout(0.4), text="Dropout in training")
    if "batch norm in training" in traits:
        value = builder.vector(value)
        value = builder.layer(value)
        value, _ = builder.call(value, nn.BatchNorm1d(value.shape[-1]), text="BatchNorm in training")
    for _ in range(0 if "the model is a layer" in traits else rng.randint(0, 2)):
        value = builder.ordinary(value)
    return _ended(seed, rng, builder, value)


def _ended(seed: int, rng: random.Random, builder: Builder, value: Value) -> Case:
    """Heads, loss and targets."""
    traits, net, batch = builder.traits, builder.net, builder.batch
    several = next(
        (t for t in ("several outputs", "object with logits", "several outputs, known loss") if t in traits), ""
    )
    layout, time = "b", 0
    odd = next(
        (t for t in ("rows as outputs", "rows as outputs, time outermost", "time first as outputs") if t in traits), ""
    )
    classes = rng.randint(2, 4) if builder.wild else rng.choice([2, 3])
    form = rng.choice(["vec", "vec", "vec", "seq", "image", "as it is"])
    if (
        several
        or "the model is a layer" in traits
        or "dropout in training" in traits
        or "batch norm in training" in traits
    ):
        form = "vec"
    kind = rng.choice(["classes", "classes", "values", "values", "binary", "probabilities"])
    if "loss is a plain subclass" in traits or "other loss" in traits:
        kind = "values"
    if odd:
        value = builder.sequence(value)
        time = value.shape[1]
        if time < 2 or time > 6:
            raise Unsuitable
        value, _ = builder.call(value, builder.a_linear(value, classes))
        ways: dict[str, tuple[str, Callable[[Net, Tensor], Tensor]]] = {
            "rows as outputs": ("bt", lambda net, v: v.flatten(0, 1)),
            "rows as outputs, time outermost": ("tb", lambda net, v: v.transpose(0, 1).flatten(0, 1)),
            "time first as outputs": ("time", lambda net, v: v.transpose(0, 1)),
        }
        layout, function = ways[odd]
        value = builder.run(function, value, kind="out", text=odd)
        if layout == "time":
            kind = "values"
    elif form == "seq":
        value = builder.sequence(value)
        value, _ = builder.call(value, builder.a_linear(value, classes))
        if kind in ("classes", "probabilities"):
            value = builder.run(lambda net, v: v.mT, value, kind="out", text="classes second")
    elif form == "image" and value.kind == "image":
        dims = value.tensor.ndim - 2
        value, _ = builder.call(value, CONVS[dims][0](value.channels, classes, 1, bias=rng.random() < 0.5))
    elif form == "as it is" and value.kind in ("vec", "image", "seq"):
        kind = "values" if kind in ("classes", "probabilities") or value.kind == "seq" else kind
    else:
        value = builder.vector(value)
        value, _ = builder.call(value, builder.a_linear(value, classes))
    heads = [value]
    if several:
        source = rng.choice([one for one in builder.values if one.kind == "vec" and one is not value] or [value])
        second, _ = builder.call(source, builder.a_linear(source, classes))
        heads.append(second)
    if value.tensor.numel() // batch > OUTPUTS:
        raise Unsuitable
    pack = "tensor"
    if several:
        pack = (
            "logits"
            if several == "object with logits"
            else rng.choice(["tuple", "list", "dict", "nested", "dataclass", "namedtuple", "dict with logits"])
        )
    elif "one output in a tuple" in traits:
        pack = "tuple of one"
    net.heads, net.pack = [one.at for one in heads], pack
    if "weight penalty" in traits:
        names = [n for n, p in net.named_parameters() if not p.is_complex()]
        if not names:
            raise Unsuitable("no parameter")
        name = rng.choice(names)
        net.penalty = lambda net: 0.1 * (dict(net.named_parameters())[name] ** 2).sum()
        builder.text.append(f"+ penalty of {name}")
    trait = next((t for t in traits if t in END and "loss" in t and t != "several outputs, known loss"), None)
    if several:
        kind = "values" if several != "several outputs, known loss" else kind
        trait = None
    shape = tuple(value.shape)
    channels = shape[1] if kind in ("classes", "probabilities") else shape[-1]
    if kind in ("classes", "probabilities") and channels < 2:
        raise Unsuitable
    loss = loss_of(rng, kind, channels, trait)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    if kind == "classes":
        targets = torch.randint(channels, (shape[0], *shape[2:]), generator=generator)
    elif kind == "probabilities":
        targets = torch.randn(shape, generator=generator).double().softmax(1)
    elif kind == "binary":
        targets = torch.randint(2, shape, generator=generator).double()
    else:
        targets = torch.randn(shape, generator=generator).double()
    targets = targets.float().double() if targets.is_floating_point() else targets
    refuse: set[str] = set()
    if several and several != "several outputs, known loss":
        loss = _loss_of_several(rng, pack, len(heads))
    elif several:
        refuse = {"kfac", "ekfac", "ggn_diagonal", "ggn_mini_blocks", "KFAC"}
    missing = [t for t in traits if t in (*START, *MIDDLE) and t not in builder.done]
    if missing:
        raise Unsuitable(str(missing))
    text = f"{'; '.join(builder.text)}; outputs {[*shape]} {pack}, {loss.text}"
    case = Case(
        seed, net, net, builder.inputs, net.names, builder.axes, batch, time, targets, layout, pack, loss, list(traits),
        text, torch.float64, "tensor", builder.idle,
    )  # fmt: skip
    case.refuse, case.rng, case.layer = refuse, rng, builder.layers[0] if builder.layers else ""
    if "unbatched inside vmap" in traits:
        case.skip |= {"kfac", "ekfac", "KFAC"}
    net.eval()
    _around(case, builder)
    return case


def _loss_of_several(rng: random.Random, pack: str, count: int) -> Loss:
    """A loss of everything that a model returns."""
    mean = rng.random() < 0.5

    def summed(out: Any, y: Tensor) -> Tensor:
        heads = unpacked(pack, out)
        return sum(((at + 1) * ((head - y) ** 2).sum() for at, head in enumerate(heads[:count])), y.new_zeros(()))

    def divisor(out: Any, y: Tensor) -> float:
        return float(y.numel()) if mean else 1.0

    return Loss(lambda out, y: summed(out, y) / divisor(out, y), summed, divisor, False, f"lambda of all, {mean=}")


# --------------------------------------------------------------------------------------------------- around the model
def _layers_in(net: nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]


def _around(case: Case, builder: Builder) -> None:
    """Hooks, frozen and parametrized layers, modes: what model and twin share."""
    rng, net, traits = case.rng, builder.net, case.traits
    layers = [(n, m) for n, m in _layers_in(net) if not any(p.is_complex() for p in m.parameters())]
    if not layers:
        raise Unsuitable
    name, layer = rng.choice(layers)
    notes = []
    if "forward hook" in traits:
        hook = rng.choice([tripled, bent])
        layer.register_forward_hook(hook) if rng.random() < 0.7 else layer.register_forward_hook(
            bent_named, with_kwargs=True, always_call=rng.random() < 0.5
        )
        notes.append(f"forward hook on {name}")
    if "forward pre-hook" in traits:
        if rng.random() < 0.4:
            layer.register_forward_pre_hook(doubled_named, with_kwargs=True)
        else:
            layer.register_forward_pre_hook(rng.choice([doubled_input, lone_input]))
        notes.append(f"pre-hook on {name}")
    if "hook in place" in traits:
        layer.register_forward_hook(doubled_in_place)
        notes.append(f"hook that writes into the output of {name}")
    if "hook on a block" in traits:
        blocks = [(n, m) for n, m in net.named_modules() if isinstance(m, Chain) or (n.startswith("l") and m is layer)]
        name, block = rng.choice(blocks)
        block.register_forward_hook(bent)
        block.register_forward_pre_hook(doubled_input)
        notes.append(f"hooks on {name}")
    if "backward hook" in traits:
        layer.register_full_backward_hook(observing)
        if rng.random() < 0.5:
            layer.register_full_backward_pre_hook(observing)
        notes.append(f"backward hook on {name}")
    if "frozen layers" in traits:
        for _, one in rng.sample(layers, rng.randint(1, max(1, len(layers) - 1))):
            one.requires_grad_(False)
            notes.append("frozen layers")
    if "frozen bias" in traits:
        one = rng.choice([m for _, m in layers if m.bias is not None] or [None])
        if one is None:
            raise Unsuitable
        (one.bias if rng.random() < 0.6 else one.weight).requires_grad_(False)
    if "parametrized" in traits:
        way = rng.choice(["weight_norm", "spectral_norm", "own", "orthogonal"])
        if way == "weight_norm":
            parametrizations.weight_norm(layer)
        elif way == "spectral_norm":
            parametrizations.spectral_norm(layer)
        elif way == "orthogonal" and isinstance(layer, nn.Linear):
            parametrizations.orthogonal(layer)
        else:
            parametrize.register_parametrization(layer, "weight", Softened())
        notes.append(f"{way} parametrization of {name}")
    if "old weight_norm" in traits:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (nn.utils.weight_norm if rng.random() < 0.6 else nn.utils.spectral_norm)(layer)
        notes.append(f"hooks of weight_norm or spectral_norm on {name}")
    if "pruned" in traits:
        if not isinstance(layer.weight, nn.Parameter):
            raise Unsuitable("torch prunes parameters alone, not what a parametrization computes")
        prune.l1_unstructured(layer, "weight", amount=0.4)
        notes.append(f"{name} pruned")
    if "forward replaced" in traits:
        kind = type(layer)

        def replaced(self: Any, x: Tensor) -> Tensor:
            return 2 * kind.forward(self, torch.sin(x))

        layer.forward = types.MethodType(replaced, layer)
        notes.append(f"forward of {name} replaced")
    if "checkpoint" in traits or "checkpoint, reentrant" in traits:
        net.reentrant = "checkpoint, reentrant" in traits
        for step in net.steps:
            step.checkpointed = rng.random() < 0.6
    if "fixed batch size" in traits:
        net.only = case.batch
    net.eval()
    if "dropout in training" in traits:
        net.train()
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        case.seeded = True
        case.skip |= {"kfac", "ekfac", "KFAC"}
    if "batch norm in training" in traits:
        net.train()
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        everything = {"per_example_gradients", "per_example_gradient_norms", "ggn_diagonal", "ggn_mini_blocks"}
        case.refuse |= everything | {"ekfac", "empirical_ntk", "hessian_diagonal"}
        case.skip |= {"kfac", "KFAC"}
    case.text = "; ".join([case.text, *notes])


def _check(case: Case) -> None:
    """The loss is the sum of its examples' parts, in torch alone; and the model can be propagated through."""
    try:
        with case.world():
            torch.manual_seed(case.seed)
            whole = case.run(case.plain, case.inputs)
            heads = unpacked(case.pack, whole)
            if not all(bool(head.isfinite().all()) for head in heads):
                raise Unsuitable
            if "batch norm in training" in case.traits:
                return
            lone = (case.pack != "tensor" and case.loss.known) or case.pack == "tuple of one"
            first = heads[0] if lone else whole
            value = case.loss.given(first, case.wide_targets)
            if value.ndim or not bool(value.isfinite()):
                raise Unsuitable
            trainable = [p for p in case.plain.parameters() if p.requires_grad]
            if not trainable:
                raise Unsuitable
            found = torch.autograd.grad(value, trainable, allow_unused=True)
            if all(g is None or not bool(g.any()) for g in found):
                raise Unsuitable
            if any(step.checkpointed for net in case.model.modules() if isinstance(net, Net) for step in net.steps):
                _check_checkpoints(case, lone)
            if case.seeded:
                if "another thread does the same" in case.traits:
                    raise Unsuitable("threads draw from one generator")
                return
            total = case.loss.divisor(first, case.wide_targets)
            parts = []
            for n in range(case.batch):
                inputs, y = case.example(n)
                out = case.run(case.plain, inputs)
                own = unpacked(case.pack, out)
                for a, b in zip(own, heads, strict=True):
                    b = case.own(b, n)
                    if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-9, atol=1e-9):
                        raise Unsuitable("examples depend on each other")
                parts.append(case.loss.summed(own[0] if lone else out, y) / total)
            if not torch.allclose(sum(parts), value, rtol=1e-9, atol=1e-12):
                raise AssertionError(f"{case.seed}: the loss is not the sum of its parts: {case.text}")
            # torch's own gradients differ for one example in BatchNorm3d's evaluation mode with a transposed gradient.
            alone = torch.autograd.grad(sum(parts), trainable, allow_unused=True)
            for one, other in zip(found, alone, strict=True):
                if one is not None and other is not None and not torch.allclose(one, other, rtol=1e-7, atol=1e-10):
                    raise Unsuitable("torch disagrees with itself")
            if case.loss.known and total == 0:
                raise Unsuitable
    except (RuntimeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise Unsuitable(str(error)) from error


def _check_checkpoints(case: Case, lone: bool) -> None:
    """What is recomputed must not have been written into: torch itself cannot propagate through that."""
    out = case.run(case.model, case.inputs)
    value = case.loss.given(unpacked(case.pack, out)[0] if lone else out, case.wide_targets)
    value.backward()
    without = {name for name, p in case.model.named_parameters() if p.requires_grad and p.grad is None}
    if without:  # by reentrant checkpoints of inputs without gradients: torch trains less than the oracle's twin
        case.skip.add("KFAC")
    case.model.zero_grad()


def _finish(case: Case) -> None:
    """What the library sees alone: converted, compiled, wrapped; the form of inputs; the dtype."""
    rng, traits = case.rng, case.traits
    case.form = "tensor" if len(case.inputs) == 1 else "tuple"
    if "keyword inputs" in traits or (len(case.inputs) > 1 and rng.random() < 0.5):
        case.form = "mapping"
    case.optimizer = rng.choice(OPTIMIZER)
    if "compiled after the optimizer" in traits:
        case.optimizer = "compiled after"
    if rng.random() < 0.1 and "complex layer" not in traits:
        case.dtype = torch.float32
        case.model.float()
        case.inputs = [one.float() if one.is_floating_point() else one for one in case.inputs]
        case.targets = case.targets.float() if case.targets.is_floating_point() else case.targets
        case.loss = copy.copy(case.loss)
        if isinstance(case.loss.given, nn.Module):
            case.loss.given = copy.deepcopy(case.loss.given).float()
        case.text += "; float32"
    if "half float inputs are views" in traits:
        case.inputs = [_viewed(one) for one in case.inputs]
    if "inputs need gradients" in traits:
        case.inputs = [one.requires_grad_() if one.is_floating_point() else one for one in case.inputs]
    net: Any = case.model
    computed = "old weight_norm" in traits or "pruned" in traits  # weights that cannot be copied
    if "converted" in traits:
        import lensor.nn

        case.model = lensor.nn.convert(net, inplace=computed)
    if "sampled" in traits:
        import lensor.sampling

        dims = sorted({index for _, m in _layers_in(net) for index in _indices(m)})
        case.model = lensor.sampling.convert(case.model, dict.fromkeys(dims, 1.0), inplace=computed)
    if "compiled part" in traits:
        name, layer = rng.choice([(n, m) for n, m in case.model.named_children()])
        layer.compile(backend="eager") if rng.random() < 0.5 else setattr(
            case.model, name, torch.compile(layer, backend="eager")
        )
    if "compiled" in traits:
        case.model = torch.compile(case.model, backend="eager")
        if rng.random() < 0.5:
            with case.world(), contextlib.suppress(Exception):
                case.run(case.model, case.inputs)
    if "DataParallel" in traits:
        case.model = nn.DataParallel(case.model)


def _viewed(one: Tensor) -> Tensor:
    """The same numbers, strided or expanded."""
    if one.ndim == 4 and one.is_floating_point():
        return one.to(memory_format=torch.channels_last)
    wide = torch.stack([one, one], -1)
    return wide[..., 0]


def _indices(module: nn.Module) -> list[str]:
    if isinstance(module, nn.modules.conv._ConvNd):
        return ["n", *(f"i{at + 1}" for at in range(len(module.kernel_size)))]
    return ["n"]


__all__ = ["COMPILED", "FUNCTIONS", "OPTIMIZER", "TRAITS", "Case", "Loss", "Net", "make_case", "packed", "unpacked"]
