"""Every curvature function on random models against autograd.

    python -m tests.sweeps.models [--models 2000] [--seed 0] [--jobs 1] [--only NAME] [--trait TRAIT] [--verbose]

Outcomes: "right"; "refused", with an error that the library raised itself; "WRONG", a number that differs from the
oracle's or a result that is not complete; "crash", any other error. Each wrong one is printed with its seed, with which
`--models 1 --seed SEED` runs it alone. The exit status is 1 if any is wrong, 2 if any crashed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import signal
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

from lensor import curvature
from lensor.optim import KFAC
from tests.support.model_oracles import Oracle, as_rows, dense, from_rows
from tests.support.models import COMPILED, Case, make_case, tripled, unpacked

REFUSALS = (ValueError, TypeError, NotImplementedError)
OUTCOMES = ("right", "refused", "WRONG", "crash", "unchecked")
COMPLETE = (
    "per_example_gradients",
    "per_example_gradient_norms",
    "ggn_diagonal",
    "empirical_ntk",
    "hessian_diagonal",
    "kfac",
)
"""Functions that have to be of every parameter that trains; others may leave out what they warn of."""


@dataclass
class Result:
    """What became of one function on one model."""

    seed: int
    function: str
    outcome: str
    text: str
    traits: tuple[str, ...]
    model: str
    ordinary: bool


def own(layer: str, kind: str = "weight") -> str:
    """The name of a layer's parameter."""
    return f"{layer}.{kind}" if layer else kind


class Wrong(Exception):
    """A result that is not what the oracle says."""


class Unchecked(Exception):
    """A result for which the oracle has no definition."""


# ----------------------------------------------------------------------------------------------------------- comparing
class Check:
    """One model with its oracle, and how it is called.

    Args:
        case: the model.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.oracle = case, Oracle(case)
        self.rng = random.Random(f"calls of {case.seed}")
        self.single = case.dtype == torch.float32
        # Autocast casts single precision to bfloat16, of 8 bits, and leaves float64 alone.
        cast = self.single and "under autocast" in case.traits
        self.tolerance = 5e-2 if cast else 1e-3 if self.single else 1e-8
        self.layers = self._layers()
        self.warned = False

    def _layers(self) -> list[str] | None:
        """Layers to ask for by name, or None for all."""
        case, rng = self.case, self.rng
        if any(trait in case.traits for trait in ("compiled", "compiled part", "DataParallel")):
            return None
        names = [name for name in self.oracle.layers if name not in case.idle]
        mine = {own(name, key) for name in names for key in ("weight", "bias")}
        others = [name for name in self.oracle.trained if name not in mine]
        if names and rng.random() < (0.6 if others else 0.05):
            return names if rng.random() < 0.7 else sorted(rng.sample(names, rng.randint(1, len(names))))
        return None

    @property
    def chosen(self) -> dict[str, Any]:
        return {} if self.layers is None else {"layers": list(self.layers)}

    @property
    def required(self) -> set[str]:
        """Parameters that a result has to hold."""
        if self.layers is None:
            return set(self.oracle.trained)
        mine = {own(name, key) for name in self.layers for key in ("weight", "bias")}
        return mine & set(self.oracle.trained)

    def name(self, found: str) -> str:
        """A parameter's name without what compiling and wrapping put before it."""
        found = found.replace("_orig_mod.", "")
        if found not in self.oracle.aliases and found.startswith("module."):
            found = found.removeprefix("module.")
        if found not in self.oracle.aliases:
            raise Wrong(f"{found} is not a parameter's name")
        target = self.oracle.aliases[found]
        return next(name for name, p in self.oracle.parameters.items() if p is target)

    def close(self, what: str, found: Tensor, expected: Tensor, largest: float, factor: float = 1.0) -> None:
        """Equal shapes, and entries equal up to the tolerance times the largest."""
        if tuple(found.shape) != tuple(expected.shape):
            raise Wrong(f"{what} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
        if not found.numel():
            return
        kind = expected.dtype if expected.is_complex() else torch.float64
        difference = (found.detach().to(kind) - expected.detach()).abs().max()
        own = float(expected.abs().max())
        floor = (0.05 if self.single else 1e-5) * largest + 1e-14
        if not float(difference) <= factor * self.tolerance * max(own, floor):
            raise Wrong(f"{what} is off by {float(difference):.2g}, largest {own:.2g}")

    def rows(self, function: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """A mapping by parameter."""
        if not isinstance(found, Mapping):
            raise Wrong(f"result is a {type(found).__name__}")
        named = {self.name(name): value for name, value in found.items()}
        self.complete(function, set(named))
        largest = max((float(expected[name].abs().max()) for name in named), default=0.0)
        for name, value in named.items():
            self.close(name, value, expected[name], largest, 10.0 if "norms" in function else 1.0)

    def complete(self, function: str, named: set[str]) -> None:
        missing = sorted(self.required - named)
        if not missing:
            return
        mine = {own(name, key) for name in self.oracle.plain_layers for key in ("weight", "bias")}
        if function in COMPLETE or not self.warned or any(name in mine for name in missing):
            raise Wrong(f"no {', '.join(missing)}{' (warned)' if self.warned else ''}")


def differences(names: Iterable[Callable[[], None]]) -> None:
    """Nothing if any of several readings is met, else what the first says."""
    first: Wrong | None = None
    for reading in names:
        try:
            reading()
            return
        except Wrong as error:
            first = first or error
    if first is not None:
        raise first


# ----------------------------------------------------------------------------------------------------------- functions
def _data(check: Check, split: bool = True) -> Any:
    """The batch, or sometimes a loader of two."""
    case, rng = check.case, check.rng
    whole = case.data
    plain = case.layout == "b" and all(axis == 0 for axis in case.axes) and case.loss.known and case.ordinary
    if not (split and plain and rng.random() < 0.25):
        return whole
    cut = rng.randint(1, case.batch - 1)
    parts = []
    for part in (slice(0, cut), slice(cut, None)):
        inputs = case.formed([one[part] for one in case.inputs])
        parts.append((inputs, case.targets[part]))
    return parts


def gradients(check: Check) -> Iterator[Any]:
    case = check.case
    found = yield lambda: curvature.per_example_gradients(case.model, case.loss.given, case.data, **check.chosen)
    check.rows("per_example_gradients", found, check.oracle.gradients)


def norms(check: Check) -> Iterator[Any]:
    case = check.case
    found = yield lambda: curvature.per_example_gradient_norms(case.model, case.loss.given, case.data, **check.chosen)
    expected = {name: rows.flatten(1).abs().square().sum(1).sqrt() for name, rows in check.oracle.gradients.items()}
    check.rows("per_example_gradient_norms", found, expected)


def _fisher(check: Check) -> str:
    return check.rng.choice(["type-2", "type-2", "type-2", "empirical"])


def diagonal(check: Check) -> Iterator[Any]:
    case, data, fisher = check.case, _data(check), _fisher(check)
    found = yield lambda: curvature.ggn_diagonal(case.model, case.loss.given, data, fisher=fisher, **check.chosen)
    check.rows("ggn_diagonal", found, check.oracle.ggn_diagonal(fisher))


def mini_blocks(check: Check) -> Iterator[Any]:
    case, data, fisher, oracle = check.case, _data(check), _fisher(check), check.oracle
    block = check.rng.choice(["filter", "kernel", "position"])
    found = yield lambda: curvature.ggn_mini_blocks(
        case.model, case.loss.given, data, block=block, fisher=fisher, **check.chosen
    )
    named = {check.name(name): value for name, value in found.items()}
    check.complete("ggn_mini_blocks", set(named))
    simple = oracle.ggn_diagonal(fisher)
    largest = max((float(value.abs().max()) for value in simple.values()), default=0.0)
    modules = {own(name): module for name, module in oracle.layers.items()}
    for name, value in named.items():
        if name not in modules:
            if value.shape == simple[name].shape:
                check.close(name, value, simple[name], largest)
            continue
        linear = isinstance(modules[name], nn.Linear)
        readings = oracle.mini_blocks(name, modules[name], block, fisher)

        def met(name: str, value: Tensor, one: Tensor, linear: bool) -> None:
            value = value.reshape(one.shape) if linear and value.numel() == one.numel() else value
            check.close(f"{name} ({block})", value, one, largest)

        differences([lambda one=one: met(name, value, one, linear) for one in readings])  # noqa: B023


def kronecker(check: Check) -> Iterator[Any]:
    case, data, oracle, rng = check.case, _data(check), check.oracle, check.rng
    options: dict[str, Any] = {
        "approx": rng.choice(["expand", "reduce"]),
        "fisher": rng.choice(["type-2", "type-2", "empirical", "forward-only"]),
        "bias": rng.choice(["separate", "joint"]),
    }
    found = yield lambda: curvature.kfac(case.model, case.loss.given, data, **options, **check.chosen)
    compare_factors(check, found, options["approx"], options["fisher"], options["bias"] == "joint", complete=True)
    del oracle


def compare_factors(
    check: Check, found: Mapping[str, Any], approx: str, fisher: str, joint: bool, complete: bool = False
) -> None:
    """Blocks by their definition; `complete` if there have to be blocks of all parameters."""
    oracle = check.oracle
    named = {check.name(name): block for name, block in found.items()}
    held = {check.name(one) for block in found.values() for one in block.names}
    if not complete or fisher != "forward-only":
        check.complete("kfac", held)
    layers = {own(name): name for name in oracle.layers}
    biases = {own(name, "bias"): name for name in oracle.layers}
    for name, block in named.items():
        if complete and not block.factored:
            diagonal = oracle.ggn_diagonal(fisher)[name]
            check.close(f"diagonal of {name}", block.B.reshape(diagonal.shape), diagonal, float(diagonal.abs().max()))
            continue
        if name in layers:
            layer = layers[name]
            within = joint and len(block.names) == 2
            bias = named.get(own(layer, "bias"))
            elsewhere = complete and bias is not None and not bias.factored
            if joint and not within and own(layer, "bias") in oracle.trained and not elsewhere:
                raise Wrong(f"the block of {name} has no bias")
            a, b = _defined(check, layer, approx, fisher, within)
        elif name in biases:
            layer = biases[name]
            a, b = _defined(check, layer, approx, fisher, False, "bias")
            ones = oracle.positions(layer, "bias") if approx == "expand" else 1
            a = torch.full((len(b), 1, 1), float(ones), dtype=torch.float64)
        else:
            raise Wrong(f"a block of {name}, which is not a layer's alone")
        usual = layer in oracle.plain_layers
        if usual and not _debatable(check):
            check.close(f"A of {name} ({approx})", block.A, a, float(a.abs().max()))
            check.close(f"B of {name} ({approx}, {fisher})", block.B, b, _largest_factor(check, approx, fisher))
            continue
        product = dense(block.A.double(), block.B.double())
        expected = dense(a, b)
        note = "" if usual else ", a layer that is used more than once or otherwise"
        check.close(f"product of {name} ({approx}, {fisher}{note})", product, expected, float(expected.abs().max()))


def _debatable(check: Check) -> bool:
    """Whether the positions could be counted in more than one way: frames and repetitions that stand in the batch."""
    words = ("batch", "each", "vmap", "loop")
    return any(any(word in trait for word in words) for trait in check.case.traits)


def _largest_factor(check: Check, approx: str, fisher: str) -> float:
    return max(float(_defined(check, name, approx, fisher, False)[1].abs().max()) for name in check.oracle.plain_layers)


def _defined(
    check: Check, layer: str, approx: str, fisher: str, joint: bool, key: str = "weight"
) -> tuple[Tensor, Tensor]:
    """A and B of a layer's weight, or of its bias."""
    records = check.oracle.records[0]
    layers = check.oracle.with_same(layer, key)
    if any(record[one].jacobian is None or not record[one].faithful for record in records for one in layers):
        raise Unchecked(f"a block of {layer}, whose function something else than the module calls")
    name = own(layer, key)
    if name in check.oracle.records[1]:
        if "weight beside its layer" in check.case.traits:
            raise Unchecked(f"a block of {name}, which another call of the layer's function uses")
        raise Wrong(f"a block of {name}, which is used elsewhere, too")
    return check.oracle.factors(layer, approx, fisher, joint, key=key)


def eigen(check: Check) -> Iterator[Any]:
    case, data, oracle, rng = check.case, _data(check), check.oracle, check.rng
    fisher = _fisher(check)
    options: dict[str, Any] = {"approx": rng.choice(["expand", "reduce"]), "bias": rng.choice(["separate", "joint"])}

    def both() -> Any:
        factors = curvature.kfac(case.model, case.loss.given, data, **options, **check.chosen)
        return factors, curvature.ekfac(case.model, case.loss.given, data, factors, fisher=fisher)

    factors, found = yield both
    check.complete("ekfac", {check.name(one) for block in factors.values() for one in block.names})
    layers = {own(name): name for name in oracle.layers}
    biases = {own(name, "bias"): name for name in oracle.layers}
    for name, (q_a, q_b, values) in found.parts.items():
        block, weight = factors[name], check.name(name)
        q_a, q_b = q_a.double(), q_b.double()
        for which, q, matrix in (("A", q_a, block.A.double()), ("B", q_b, block.B.double())):
            turned = q.mT @ matrix @ q
            rest = turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))
            check.close(
                f"eigenvectors of {which} of {weight}", rest, torch.zeros_like(rest), 1e5 * float(matrix.norm())
            )
        if weight in layers:
            module = oracle.layers[layers[weight]]
            rows = [as_rows(module, one[0][weight]) for one in oracle.jacobians]
            if len(block.names) == 2:
                bias = check.name(block.names[1])
                shape = (*rows[0].shape[:3], 1)
                rows = [
                    torch.cat([r, one[0][bias].reshape(shape)], 3)
                    for r, one in zip(rows, oracle.jacobians, strict=True)
                ]
        elif weight in biases:
            groups = getattr(oracle.layers[biases[weight]], "groups", 1)
            rows = [one[0][weight].reshape(len(one[0][weight]), groups, -1, 1) for one in oracle.jacobians]
        else:
            rows = [one[0][weight].reshape(len(one[0][weight]), -1, 1, 1) for one in oracle.jacobians]
        if not block.factored:
            rows = [one[0][weight].reshape(len(one[0][weight]), -1, 1, 1) for one in oracle.jacobians]
        expected = oracle.quadratic([q_b.mT @ one @ q_a for one in rows], fisher)
        check.close(f"eigenvalues of {weight} ({fisher})", values, expected, float(expected.abs().max()), 10.0)


def ntk(check: Check) -> Iterator[Any]:
    case, oracle = check.case, check.oracle
    found = yield lambda: curvature.empirical_ntk(case.model, case.formed(case.inputs), **check.chosen)
    if check.layers is None:
        readings = [list(oracle.trained), list(oracle.parameters)]
    else:
        mine = {own(name, key) for name in check.layers for key in ("weight", "bias")}
        readings = [[n for n in oracle.trained if n in mine], [n for n in oracle.parameters if n in mine]]
    if any(oracle.parameters[name].is_complex() for name in readings[1]):
        raise Wrong("a kernel of complex parameters")

    def met(names: list[str]) -> None:
        expected = oracle.ntk(names)
        if "object with logits" in case.traits and found.shape[2] < expected.shape[2]:
            raise Unchecked("of an object with logits, the kernel is that of the logits")
        check.close("the kernel", found, expected, float(expected.abs().max()))

    differences([lambda names=names: met(names) for names in readings])


def hessian(check: Check) -> Iterator[Any]:
    case, data = check.case, _data(check)
    found = yield lambda: curvature.hessian_diagonal(case.model, case.loss.given, data, **check.chosen)
    named = {check.name(name): value for name, value in found.items()}
    check.complete("hessian_diagonal", set(named))
    entries = check.oracle.hessian_entries(check.rng, 10)
    largest = max((float(values.abs().max()) for _, values in entries.values()), default=0.0)
    for name, value in named.items():
        if name not in entries:
            raise Wrong(f"{name} is complex")
        if value.shape != check.oracle.parameters[name].shape:
            raise Wrong(f"{name} has shape {tuple(value.shape)}")
        places, expected = entries[name]
        check.close(name, value.reshape(-1)[places], expected, largest)


# ----------------------------------------------------------------------------------------------------------- optimizer
RATE, DAMPING = 0.05, 0.1


def optimizer(check: Check) -> Iterator[Any]:
    case, rng = check.case, check.rng
    options: dict[str, Any] = {
        "approx": rng.choice(["expand", "reduce"]),
        "bias": rng.choice(["separate", "joint"]),
        "fisher": rng.choice(["empirical", "empirical", "empirical", "type-2", "forward-only"]),
    }
    if case.loss.known and getattr(case.loss.given, "weight", None) is not None:
        options["fisher"] = "empirical"
    variant = _variant(check)
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    flags = {name: p.requires_grad for name, p in case.model.named_parameters()}
    modes = {name: module.training for name, module in case.model.named_modules()}
    twin = {name: p.detach().clone() for name, p in case.plain.named_parameters()}
    undo: list[Callable[[], None]] = []
    try:
        made, after = yield lambda: _trained(check, variant, options, undo)
        updates = {check.name(n): after[n] - before[n] for n in before}
        for one in undo:
            one()
        undo.clear()
        text = f"{variant or 'plain loop'}, {', '.join(options.values())}"
        if variant == "hook after":
            _hooked(check, undo, case.plain)
        try:
            expected = _explicit(check, made, options)
        except Wrong as error:
            raise Wrong(f"{error} ({text})") from error
        largest = max(float(update.abs().max()) for update in expected.values())
        if not largest < 1e3:
            raise Unchecked("the steps diverge, so that roundings grow")
        for name, update in expected.items():
            check.close(
                f"step of {name} ({text})", updates[name], update, 100 * largest, 100.0 if not check.single else 5.0
            )
    finally:
        for one in undo:
            one()
        with torch.no_grad():
            for name, p in case.model.named_parameters():
                p.copy_(before[name])
                p.requires_grad_(flags[name])
                p.grad = None
            for name, module in case.model.named_modules():
                module.training = modes[name]
            for name, p in case.plain.named_parameters():
                p.copy_(twin[name])


def _variant(check: Check) -> str:
    """How the training loop is, where it can be so."""
    case = check.case
    variant = case.optimizer
    wrapped = any(t in case.traits for t in ("compiled", "compiled part", "DataParallel"))
    if variant == "hook after" and wrapped:
        return ""
    simple = case.layout == "b" and all(axis == 0 for axis in case.axes) and "fixed batch size" not in case.traits
    if variant == "two backward passes":
        given: Any = case.loss.given
        even = case.batch % 2 == 0 and isinstance(given, (nn.MSELoss, nn.BCEWithLogitsLoss))
        if not (simple and even and case.loss.known):
            return ""
    return variant


def _layer_of(check: Check, model: nn.Module) -> Any:
    names = [name for name in check.oracle.layers if name not in check.case.idle]
    return model.get_submodule(names[check.case.seed % len(names)])


def _hooked(check: Check, undo: list[Callable[[], None]], model: nn.Module) -> None:
    undo.append(_layer_of(check, model).register_forward_hook(tripled).remove)


def _trained(check: Check, variant: str, options: dict[str, Any], undo: list[Callable[[], None]]) -> Any:
    """Two steps of the optimizer in a loop as users write it; the names of factors and the parameters after."""
    case, model = check.case, check.case.model
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.modules.batchnorm._BatchNorm)) or _iterates(module):
            module.eval()
    later: list[nn.Parameter] = []
    if variant == "trains later":
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
        trained = [m for m in layers if m.weight.requires_grad]
        if len(trained) > 1:
            later = [p for p in trained[case.seed % len(trained)].parameters(recurse=False) if p.requires_grad]
        for p in later:
            p.requires_grad_(False)
    settings = {
        **options,
        "lr": RATE,
        "momentum": 0.0,
        "damping": DAMPING,
        "kl_clip": None,
        "method": "eigen",
        "ema": 0.0,
    }
    if variant == "two backward passes":
        settings["accumulation_steps"] = 2
    given: Any = case.loss.given
    made = KFAC(model, given, **settings)
    if later:
        for p in later:
            p.requires_grad_(True)
        made.add_param_group({"params": later})
    if variant == "hook after":
        _hooked(check, undo, model)
    run = model
    if variant == "compiled after":
        run = torch.compile(model, backend="eager")  # type: ignore[assignment]
    inputs = [one.detach().requires_grad_(one.requires_grad) for one in case.inputs]
    for _ in range(2):
        made.zero_grad()

        def backward() -> Tensor:
            value = case.loss.given(_for_loss(case, case.run(run, inputs)), case.targets)
            value.backward()
            return value

        if variant == "closure":

            def closure() -> Tensor:
                made.zero_grad()
                return backward()

            made.step(closure)
            continue
        if variant == "two backward passes":
            for part in (slice(0, case.batch // 2), slice(case.batch // 2, None)):
                out = _for_loss(case, case.run(run, [one[part] for one in inputs]))
                value = case.loss.given(out, case.targets[part])
                (value / 2 if getattr(given, "reduction", "") == "mean" else value).backward()
        else:
            backward()
        if variant == "passes between":
            _others(check, run, inputs)
        made.step()
    factors = {} if made.factors is None else dict(made.factors)
    blocks = {check.name(name): tuple(check.name(one) for one in block.names) for name, block in factors.items()}
    return blocks, {name: p.detach().clone() for name, p in model.named_parameters()}


def _iterates(module: nn.Module) -> bool:
    """Whether a module writes into its buffers in training mode: spectral normalisation."""
    return "_u" in module._buffers or any(name.endswith("_u") for name in module._buffers)


def _for_loss(case: Case, out: Any) -> Any:
    lone = case.pack != "tensor" and (case.loss.known or case.pack == "tuple of one")
    return unpacked(case.pack, out)[0] if lone else out


def _others(check: Check, model: nn.Module, inputs: list[Any]) -> None:
    """Passes that are not those of the step."""
    case = check.case
    way = check.rng.choice(["curvature", "saliency", "penalty", "prediction", "unused", "parameters"])
    if way == "curvature":
        with contextlib.suppress(Exception):
            curvature.per_example_gradients(case.model, case.loss.given, (case.formed(inputs), case.targets))
        return
    moved = [2 * one.detach() if one.is_floating_point() else one for one in inputs]
    if way == "prediction":
        with torch.no_grad():
            case.run(model, moved)
        return
    for one in moved:
        if one.is_floating_point():
            one.requires_grad_()
    value = case.loss.given(_for_loss(case, case.run(model, moved)), case.targets)
    leaves = [one for one in moved if one.requires_grad]
    wanted = [p for p in model.parameters() if p.requires_grad] if way == "parameters" else leaves
    if wanted and way in ("parameters", "saliency", "penalty"):
        with contextlib.suppress(RuntimeError):  # of torch's own: reentrant checkpoints, values that were written over
            torch.autograd.grad(value, wanted, create_graph=way == "penalty", allow_unused=True)


def _explicit(check: Check, blocks: Mapping[str, tuple[str, ...]], options: Mapping[str, str]) -> dict[str, Tensor]:
    """Two steps with dense Kronecker products; each parameter's change."""
    case = check.case
    before = {name: p.detach().clone() for name, p in case.plain.named_parameters()}
    for _ in range(2):
        oracle = Oracle(case)
        alike = oracle.plain_layers
        weights = {own(name): name for name in oracle.layers}
        lacking = [w for w, name in weights.items() if name in alike and w in oracle.trained and w not in blocks]
        if lacking and not check.warned:
            raise Wrong(f"no factors of {', '.join(lacking)}")
        gradient = {name: oracle.gradients[name].sum(0) for name in oracle.trained}
        steps = dict(gradient)
        for name, names in blocks.items():
            if name not in weights:
                continue
            layer = weights[name]
            module = oracle.layers[layer]
            now = Check.__new__(Check)
            now.__dict__.update(check.__dict__, oracle=oracle)
            _defined(now, layer, options["approx"], options["fisher"], False)
            both = len(names) == 2
            loss = case.loss.unweighted is not None
            a, b = oracle.factors(layer, options["approx"], options["fisher"], both, unweighted=loss)
            rows = as_rows(module, gradient[name][None])[0]
            if both:
                rows = torch.cat([rows, gradient[names[1]].reshape(*rows.shape[:2], 1)], 2)
            solved = _solved(a, b, rows)
            if both:
                steps[names[1]] = solved[..., -1].reshape(-1)
                solved = solved[..., :-1]
            steps[name] = from_rows(module, solved, gradient[name].shape)
            bias = own(layer, "bias")
            if bias in blocks and bias in gradient:
                ones = float(oracle.positions(layer)) if options["approx"] == "expand" else 1.0
                one = torch.full((len(b), 1, 1), ones, dtype=b.dtype)
                steps[bias] = _solved(one, b, gradient[bias].reshape(len(b), -1, 1)).reshape(-1)
            elif not both and bias in gradient and layer in alike:
                raise Wrong(f"no factors of {bias}")
        with torch.no_grad():
            for name, step in steps.items():
                oracle.parameters[name].sub_(RATE * step)
    return {name: p.detach() - before[name] for name, p in case.plain.named_parameters()}


def _solved(a: Tensor, b: Tensor, rows: Tensor) -> Tensor:
    """(kron(B, A) + λI)⁻¹ times vectors in the form of rows, group by group."""
    matrices = dense(a, b)
    matrices = matrices + DAMPING * torch.eye(matrices.shape[1], dtype=matrices.dtype)
    return torch.linalg.solve(matrices, rows.reshape(len(rows), -1, 1)).reshape(rows.shape)


FUNCTIONS: dict[str, Callable[[Check], Iterator[Any]]] = {
    "per_example_gradients": gradients,
    "per_example_gradient_norms": norms,
    "ggn_diagonal": diagonal,
    "ggn_mini_blocks": mini_blocks,
    "kfac": kronecker,
    "ekfac": eigen,
    "empirical_ntk": ntk,
    "hessian_diagonal": hessian,
    "KFAC": optimizer,
}


# --------------------------------------------------------------------------------------------------------- one model
def _of_the_library(error: BaseException, case: Case) -> bool:
    """Whether the library raised an error itself, or a model's own loss got the outputs whole and cannot read them."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    last = frame.filename.replace("\\", "/")
    if frame.name == "forward" and last.endswith("/tests/support/models.py"):
        return case.pack != "tensor"
    raised = (frame.line or "").lstrip().startswith("raise")  # not by a fault of the library
    return raised and "/lensor/" in last and "/tests/" not in last and len(str(error)) > 15


def attempt(check: Check, name: str) -> tuple[str, str]:
    """A function's outcome on a model, and what is to be said of it."""
    case = check.case
    steps: Any = FUNCTIONS[name](check)
    try:
        call = next(steps)
        with warnings.catch_warnings(record=True) as told, case.world():
            warnings.simplefilter("always")
            aside = case.situation(call) if name != "KFAC" else contextlib.nullcontext([])
            try:
                with aside as trouble:
                    found = call()
            except REFUSALS as error:
                said = f"{type(error).__name__}: {error}"
                return ("refused" if _of_the_library(error, case) else "crash"), said
            except Exception as error:
                return "crash", f"{type(error).__name__}: {error}"
        check.warned = any("lensor" in str(one.filename) or "curvature" in str(one.message) for one in told) or any(
            "factors" in str(one.message) for one in told
        )
        if trouble:
            return "WRONG", trouble[0]
        if name in case.refuse:
            return "WRONG", "a number where there is none"
        if name in case.skip:
            return "unchecked", ""
        try:
            steps.send(found)
        except StopIteration:
            return "right", ""
        except Wrong as error:
            return "WRONG", str(error)
        except Unchecked as error:
            return "unchecked", str(error)
        except Exception as error:
            if "modified by an inplace operation" in str(error):  # the oracle needs a graph where torch itself has none
                return "unchecked", str(error)
            return "crash", f"the check itself: {''.join(traceback.format_exception(error)[-2:])}"
        raise AssertionError("a check that does not end")
    finally:
        steps.close()


def _state(model: nn.Module) -> dict[str, Any]:
    """What has to be as it was."""
    found: dict[str, Any] = {f"value of {n}": v.detach().clone() for n, v in model.state_dict().items()}
    for name, p in model.named_parameters():
        found[f"requires_grad of {name}"] = p.requires_grad
        found[f"gradient of {name}"] = p.grad
    for name, module in model.named_modules():
        found[f"mode of {name}"] = module.training
        found[f"hooks of {name}"] = (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
        )
        found[f"forward of {name}"] = "forward" in vars(module)
    return found


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    for name, value in before.items():
        now = after.get(name)
        same = (
            torch.equal(value, now)
            if isinstance(value, Tensor) and isinstance(now, Tensor)
            else value is now or value == now
        )
        if not same:
            return name
    return next((name for name in after if name not in before), "")


def run_case(
    seed: int, only: str | None = None, trait: str | None = None, functions: Iterable[str] | None = None
) -> list[Result]:
    """Functions on the model of a seed: all of them, but three of a compiled model, for tracing is slow."""
    case = make_case(seed, None if trait is None else [] if trait == "-" else [trait])
    compiled = any(one in COMPILED for one in case.traits)
    found: list[Result] = []

    def add(name: str, outcome: str, text: str) -> None:
        found.append(Result(seed, name, outcome, text, tuple(case.traits), case.text, case.ordinary))

    try:
        check = Check(case)
        before = _state(case.model)
        names = list(FUNCTIONS if functions is None else functions)
        if "compiled after the optimizer" in case.traits:
            names = ["KFAC"]
        elif compiled and functions is None:
            names = sorted(random.Random(seed).sample(names, 3), key=names.index)
        for name in names if only is None else [only]:
            check.rng = random.Random(f"{name} of {seed}")
            outcome, text = attempt(check, name)
            needs_targets = name == "KFAC" and "Hessian depends on targets" in text
            if outcome == "refused" and case.ordinary and _expected(check, name) and not needs_targets:
                text = f"an ordinary model: {text}"
            add(name, outcome, text)
            changed = _changed(before, _state(case.model))
            if changed.startswith("hooks"):  # of an optimizer that is not collected yet
                gc.collect()
                changed = _changed(before, _state(case.model))
            if changed:
                add("model left as found", "WRONG", f"{changed} after {name}")
                break
        else:
            add("model left as found", "right", "")
    finally:
        if compiled:
            torch._dynamo.reset()
    return found


def _expected(check: Check, name: str) -> bool:
    """Whether an ordinary model has to be computed, not refused."""
    case, oracle = check.case, check.oracle
    mine = {own(name, key) for name in oracle.plain_layers for key in ("weight", "bias")}
    if check.layers is None and name in COMPLETE and not set(oracle.trained) <= mine:
        return False
    if name == "empirical_ntk":
        return len(unpacked(case.pack, oracle._whole[0])[0].shape) == 2
    if name == "KFAC":
        return case.loss.known
    return True


# -------------------------------------------------------------------------------------------------------- many models
LIMIT = 300
"""Seconds after which a model is given up."""


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after a while, where the system can."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: Any) -> None:
        raise TimeoutError(f"no result after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _guarded(arguments: tuple[int, str | None, str | None]) -> list[Result]:
    torch.set_num_threads(1)
    seed, only, trait = arguments
    try:
        with warnings.catch_warnings(), _within(LIMIT):
            warnings.simplefilter("ignore")
            return run_case(seed, only, trait)
    except Exception as error:
        said = "".join(traceback.format_exception(error)[-3:])
        return [Result(seed, "the sweep itself", "crash", said, (), "", False)]


def table(results: list[Result]) -> str:
    """Functions × outcomes."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for one in results:
        counts[one.function][one.outcome] += 1
    width = max(map(len, counts))
    lines = [f"{'':{width}} " + " ".join(f"{one:>9}" for one in OUTCOMES)]
    for name, row in counts.items():
        lines.append(f"{name:{width}} " + " ".join(f"{row[one]:9}" for one in OUTCOMES))
    return "\n".join(lines)


def by_trait(results: list[Result]) -> str:
    """Traits × outcomes, of models with one trait."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for one in results:
        if len(one.traits) <= 1:
            counts[one.traits[0] if one.traits else "(ordinary)"][one.outcome] += 1
    width = max(map(len, counts), default=1)
    lines = [f"{'':{width}} " + " ".join(f"{one:>9}" for one in OUTCOMES)]
    for name, row in sorted(counts.items()):
        lines.append(f"{name:{width}} " + " ".join(f"{row[one]:9}" for one in OUTCOMES))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweeps.models", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--models", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", choices=list(FUNCTIONS), help="one function")
    parser.add_argument("--trait", help="models with this trait alone; '-' for ordinary ones")
    parser.add_argument("--verbose", action="store_true", help="print refusals and models, too")
    parser.add_argument("--show", type=int, default=200, help="wrong ones and crashes to print")
    options = parser.parse_args(arguments)
    started, results = time.monotonic(), []
    work = [(seed, options.only, options.trait) for seed in range(options.seed, options.seed + options.models)]
    shown = 0

    def take(found: list[Result]) -> None:
        nonlocal shown
        model = ""
        results.extend(found)
        for one in found:
            bad = one.outcome in ("WRONG", "crash") or one.text.startswith("an ordinary model")
            if (bad and shown < options.show) or options.verbose:
                shown += 1
                print(f"{one.outcome:8} {one.seed:6} {one.function}: {one.text[:300]}  [{', '.join(one.traits)}]")
                if one.model != model:
                    print(f"                {one.model[:600]}")
                model = one.model
        sys.stdout.flush()

    if options.jobs > 1:
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            for found in pool.map(_guarded, work, chunksize=4):
                take(found)
    else:
        for one in work:
            take(_guarded(one))
    print(by_trait(results), "\n")
    print(table(results))
    outcomes = Counter(one.outcome for one in results)
    print(f"{options.models} models in {time.monotonic() - started:.0f} s")
    return 1 if outcomes["WRONG"] else 2 if outcomes["crash"] else 0


if __name__ == "__main__":
    sys.exit(main())
