"""Passes over batches as compiled graphs, which are kept and used again for the same model and batches of equal shapes.

The first batch with new shapes runs uncompiled, with all checks; then its pass is traced and compiled. The checks whose
results depend on the values of targets are repeated for each batch.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lensor.choices import Compiler, words
from lensor.curvature.batch import Batch, only_pair, with_loss
from lensor.curvature.batch_axes import BatchAxis, Given
from lensor.curvature.capture import computing, own, running, unwrapped
from lensor.curvature.collector import Added, Collector, Counts
from lensor.curvature.data import one_tensor, size_of
from lensor.curvature.fingerprint import Fingerprint
from lensor.curvature.layers import all_parameters, outer_level
from lensor.curvature.registry import root_of
from lensor.curvature.traced import Traced
from lensor.curvature.watching import Targets, undisturbed
from lensor.errors import require_choice
from lensor.kernels.torch.tensors import allows_tf32, allows_tf32_convolutions
from lensor.planner.settings import current

_MOST = 32
"""The largest number of graphs that are kept; those that were not used recently are dropped."""

_MOST_OF_ONE = 8
"""The largest number of passes of one kind that are compiled for a model; further ones run uncompiled."""


@dataclass
class _Pass:
    """A compiled pass, and what was found out when it was traced.

    `held` are objects whose addresses are part of its key.
    """

    traced: Traced
    held: list[Any]
    counts: Counts | None = None
    axis: BatchAxis | None = None
    outputs: Tensor | None = None


class _Passes:
    """The compiled passes of all models."""

    def __init__(self) -> None:
        self._known: OrderedDict[Any, _Pass] = OrderedDict()
        self._counts: weakref.WeakKeyDictionary[nn.Module, Counter[str]] = weakref.WeakKeyDictionary()

    def find(self, key: Any) -> _Pass | None:
        """The pass with a key."""
        found = self._known.get(key)
        if found is not None:
            self._known.move_to_end(key)
        return found

    def admits(self, model: nn.Module, what: str) -> bool:
        """Whether another pass of this kind may be compiled for a model; warns for the first one that may not."""
        counts = self._counts.setdefault(model, Counter())
        counts[what] += 1
        if counts[what] == _MOST_OF_ONE + 1:
            warnings.warn(
                f"{_MOST_OF_ONE} passes of this model were compiled, expected equal shapes and an unchanged model in"
                " calls with compile=True: passes for further shapes or states of the model run uncompiled",
                stacklevel=outer_level(),
            )
        return counts[what] <= _MOST_OF_ONE

    def add(self, key: Any, model: nn.Module, made: _Pass) -> None:
        """Keep a pass until its model is deleted, or until many others were used."""
        self._known[key] = made
        weakref.finalize(model, self._known.pop, key, None)
        while len(self._known) > _MOST:
            self._known.popitem(last=False)

    def clear(self) -> None:
        """Drop all passes."""
        self._known.clear()
        self._counts.clear()


passes = _Passes()

Compile = bool | Compiler
"""The argument `compile` of functions: whether, or how, a pass is compiled."""


def compiler_of(compile: Compile) -> Compiler | None:
    """How a pass is compiled; None if it is not.

    Raises:
        ValueError: for an unknown choice.
    """
    if isinstance(compile, bool):
        return "inductor" if compile else None
    require_choice("compile", compile, words(Compiler))
    return compile


def _key(what: str, model: nn.Module, fixed: Any, given: Any) -> tuple[Any, list[Any]]:
    """The key of a pass, and objects that it needs: everything on which its graph depends."""
    hooks = {name: one for name, one in vars(nn.modules.module).items() if name.startswith("_global_") and one}
    found = Fingerprint([model, fixed, hooks], [given])
    kinds = {parameter.device.type for parameter in model.parameters()} | {"cpu"}
    casts = tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in sorted(kinds)
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    )
    settings = (
        casts,
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        allows_tf32(),
        allows_tf32_convolutions(),
        current(),
    )
    return (what, id(model), settings, found.key), found.held


# -------------------------------------------------------------------------------------------------------------- factors
def add(
    collected: Collector,
    model: nn.Module,
    loss: Any,
    inputs: Any,
    targets: Any,
    mc_samples: int,
    generator: torch.Generator | None,
    given: Given,
    compiler: Compiler,
    is_first: bool,
) -> None:
    """Add one batch to a collector by a compiled pass, or uncompiled if there is none for its shapes.

    A pass is compiled for the first batch of the data only, since the last one is often smaller.
    """
    names = [layer.name for layer in collected.layers], list(collected.parameters or ())
    options = collected.approx, collected.joint, collected.fisher == "forward-only", collected.dense, names, given
    key, held = _key(f"factors {compiler}", model, options, inputs)
    found = passes.find(key)
    if found is None:
        with running(model):
            added = collected.add(model, loss, inputs, targets, mc_samples, generator, given)
            if is_first and passes.admits(model, key[0]):
                passes.add(key, model, _traced(collected, model, inputs, given, added, compiler, held))
        return
    assert found.counts is not None
    with torch.inference_mode(False), undisturbed(model):
        (outputs, forward), between = found.traced.run(inputs)
        with computing(outputs):
            root = root_of(loss, outputs, targets, found.counts.examples, found.axis)
            sums: Any = None
            columns = root.of(collected.fisher, mc_samples, generator)
            column = next(columns, None)
            while column is not None:
                following = next(columns, None)
                sums = _plus(sums, found.traced.then(column, between, following is None), root.normaliser)
                column = following
    collected.add_sums(found.counts, forward, sums, root.normaliser)


def _plus(sums: Any, parts: Any, weight: float) -> Any:
    """The sums of the backward passes, and those of another one times a factor."""
    if sums is None:
        return tuple({name: None if b is None else b * weight for name, b in one.items()} for one in parts)
    for one, two in zip(sums, parts, strict=True):
        for name, b in two.items():
            if b is not None:
                one[name].add_(b, alpha=weight)
    return sums


def _traced(
    collected: Collector,
    model: nn.Module,
    inputs: Any,
    given: Given,
    added: Added,
    compiler: Compiler,
    held: list[Any],
) -> _Pass:
    """Trace and compile the pass over a batch that was added before."""
    has_columns = collected.fisher != "forward-only"
    counts: Counts | None = None

    def pass_over(inputs: Any, column: Any) -> tuple[Any, Any]:
        nonlocal counts
        one = collected.empty()
        capture, returned = one.passed(model, inputs, added.axes, given)
        capture.check(returned, shared=True)
        outputs = one_tensor(returned)
        batch = size_of(inputs)
        one.count(batch, 1.0)
        one.outputs, detached = outputs.numel() // batch, outputs.detach()
        if has_columns:
            one.add_columns(capture, outputs, iter([column]), 1.0)
        counts, forward, backward = one.take()
        return (detached, forward), backward if has_columns else ()

    traced = Traced(pass_over, inputs, torch.ones_like(added.outputs) if has_columns else (), compiler)
    return _Pass(traced, held, counts, added.axis)


# ------------------------------------------------------------------------------------------------------- quantities
Compute = Callable[[Batch, Tensor, Any], Any]


def on_batch(
    compute: Compute,
    model: nn.Module,
    loss: Any,
    data: Any,
    layers: Iterable[str] | None,
    given: Given,
    *,
    frozen: bool = True,
    compile: Compile = False,
    options: Any = (),
    check: Callable[[Tensor, Any], None] | None = None,
) -> Any:
    """A function of one batch and its loss, by a compiled pass if `compile`.

    Args:
        compute: a function of the batch, the loss and the options, which returns a tree of tensors.
        model: the model.
        loss: any callable of (outputs, targets).
        data: one pair (inputs, targets).
        layers: names of modules.
        given: the batch_axis that the user specified.
        frozen: as for `all_parameters`.
        compile: whether, or how, the pass is compiled.
        options: other arguments of `compute`; a graph depends on the values of tensors only when it runs.
        check: a function of the outputs (whose values are not used) and the targets that raises for unusable ones.
    """
    layers = None if layers is None else list(layers)

    def uncompiled() -> tuple[Any, Batch]:
        with with_loss(model, loss, data, layers, given, frozen) as (batch, value):
            if check is not None:
                check(batch.outputs, batch.targets)
            return compute(batch, value, options), batch

    compiler = compiler_of(compile)
    if compiler is None:
        return uncompiled()[0]
    model = unwrapped(model)
    inputs, targets = data = own(only_pair(data))
    key, held = _key(f"{compute.__qualname__} {compiler}", model, (loss, layers, given, frozen), (data, options))
    found = passes.find(key)
    if found is not None:
        if check is not None:
            assert found.outputs is not None
            check(found.outputs, targets)
        with torch.inference_mode(False), undisturbed(model):
            return found.traced.run((inputs, targets, options))[0]
    result, batch = uncompiled()
    if not batch.size or not passes.admits(model, key[0]):
        return result
    shape = None if check is None else batch.outputs.new_empty(()).expand(batch.outputs.shape)
    axes = batch.batch_axes
    del batch

    def pass_over(early: Any, _: Any) -> tuple[Any, Any]:
        inputs, targets, options = early
        watched = Targets(*all_parameters(model, layers, frozen))
        trainable = not frozen and layers is None
        one = Batch(model, watched, inputs, given, shared=True, only_trainable=trainable, is_checked=True, axes=axes)
        return compute(one, one.loss(loss, targets), options), ()

    with running(model):
        made = Traced(pass_over, (inputs, targets, options), (), compiler)
    passes.add(key, model, _Pass(made, held, outputs=shape))
    return result
