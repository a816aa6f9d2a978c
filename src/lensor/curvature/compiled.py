"""Passes over batches as compiled graphs, which are kept and used again for the same model and batches of equal shapes.

The first batch with new shapes runs uncompiled, with all checks; then its pass is traced and compiled. The checks whose
results depend on the values of targets are repeated for each batch.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lensor.cache import Cache
from lensor.choices import Compiler, words
from lensor.curvature.batch import Batch, only_pair, watched_for_examples
from lensor.curvature.batch_axes import BatchAxes, BatchAxis, Given
from lensor.curvature.capture import Capture, computing, own, running, unwrapped
from lensor.curvature.collector import Added, Collector, Counts
from lensor.curvature.data import one_tensor, size_of
from lensor.curvature.fingerprint import Fingerprint, TooLargeError
from lensor.curvature.layers import outer_level
from lensor.curvature.registry import root_of
from lensor.curvature.traced import Traced
from lensor.curvature.watching import Targets, apart
from lensor.errors import require_choice
from lensor.kernels.torch.tensors import allows_tf32, allows_tf32_convolutions
from lensor.planner.settings import current

_MOST = 32
"""The largest number of graphs that are kept; those that were not used recently are dropped."""

_MOST_OF_ONE = 8
"""The largest number of passes of one kind that are kept for a model; further ones run uncompiled."""

_SEED = 0x5EED_74ACE


@dataclass
class _Factors:
    """A compiled pass for factors, with what was found when it was traced.

    `held` are objects whose addresses are part of its key. `axes` are those of the batch that was traced.
    """

    traced: Traced
    held: list[Any]
    counts: Counts
    axis: BatchAxis
    axes: BatchAxes | None


@dataclass
class _Quantity:
    """A compiled pass for a function of one batch; `outputs` has the shape of the model's outputs, but no values."""

    traced: Traced
    held: list[Any]
    outputs: Tensor | None
    axes: BatchAxes | None


class _Passes:
    """The compiled passes of all models, by keys that begin with the kind of pass and the model's address."""

    def __init__(self) -> None:
        self.known = Cache(maxsize=_MOST, weigh=lambda _: 0)
        self._warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()

    def may_add(self, key: Any, again: Any, model: nn.Module) -> bool:
        """Whether a pass may be compiled; warns if it may not.

        Args:
            key: its key before the uncompiled pass.
            again: its key after the uncompiled pass; None if there is none.
            model: the model.
        """
        if key is None or again is None:
            self._warn(model, "size", "the model or the loss refers to too many values")
        elif key != again:
            self._warn(model, "state", "the pass changes attributes of the model or of the loss")
        elif self.known.count(lambda one: one[:2] == key[:2]) >= _MOST_OF_ONE:
            self._warn(model, key[0], f"{_MOST_OF_ONE} passes of this model with other shapes or states are compiled")
        else:
            return True
        return False

    def has_order(self, made: _Factors | _Quantity, axes: BatchAxes | None, model: nn.Module) -> bool:
        """Whether the examples are in the same order in all layers as in the batch that was traced; warns if not."""
        if made.axes != axes:
            self._warn(model, "order", "the order of the examples in a layer depends on values")
        return made.axes == axes

    def _warn(self, model: nn.Module, what: str, why: str) -> None:
        warned = self._warned.setdefault(model, set())
        if what not in warned:
            warned.add(what)
            warnings.warn(
                f"{why}, expected equal shapes and an unchanged model in calls with compile=: this pass runs"
                " uncompiled",
                stacklevel=outer_level(),
            )

    def add(self, key: Any, model: nn.Module, made: _Factors | _Quantity) -> None:
        """Keep a pass until its model is deleted, or until many others were used."""
        self.known.put(key, made)
        weakref.finalize(model, self.known.drop, key)

    def clear(self) -> None:
        """Drop all passes."""
        self.known.clear()
        self._warned.clear()


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
    """The key of a pass, and objects that it needs: everything on which its graph depends; None if this is too much."""
    hooks = [one for name, one in vars(nn.modules.module).items() if name.startswith("_global_") and one]
    try:
        found = Fingerprint([model, fixed, hooks], [given])
    except TooLargeError:
        return None, []
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


@contextmanager
def _ready_to_trace(model: nn.Module) -> Iterator[None]:
    """Make the functions of a model consist of operators that can be part of a graph, and seed torch's generator.

    The seed is one that no model uses, so that a model that sets its own is found; see `Traced`.
    """
    has_lstm = any(isinstance(module, nn.LSTM) for module in model.modules())  # oneDNN's operator has no workspace
    torch.default_generator.manual_seed(_SEED)
    with torch.backends.mkldnn.flags(enabled=False) if has_lstm else nullcontext():
        yield


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
    """Add one batch to a collector by a compiled pass, or uncompiled if there is none for its shapes; within `running`.

    A pass is compiled for the first batch of the data only, since the last one is often smaller.
    """
    names = [layer.name for layer in collected.layers], list(collected.parameters or ())
    options = collected.approx, collected.joint, collected.fisher == "forward-only", collected.dense, names, given
    key_of = partial(_key, f"factors {compiler}", model, options, inputs)
    key, held = key_of()
    known: _Factors | None = None if key is None else passes.known.get(key)
    found = known
    if found is not None and (collected.approx == "reduce" or collected.parameters is not None):
        axes = Capture.batch_axes_of(
            model, inputs, Targets(collected.layers, collected.parameters), size_of(inputs), given
        )
        found = found if passes.has_order(found, axes, model) else None
    if found is None or not collected.fits(found.counts):
        added = collected.add(model, loss, inputs, targets, mc_samples, generator, given)
        if is_first and known is None and passes.may_add(key, key_of()[0], model):
            passes.add(key, model, _traced(collected, model, inputs, given, added, compiler, held))
        return
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
) -> _Factors:
    """Trace and compile the pass over a batch that was added before."""
    has_columns = collected.fisher != "forward-only"
    counts: list[Counts] = []

    def pass_over(inputs: Any, column: Any) -> tuple[Any, Any]:
        one = collected.empty()
        capture, returned = one.passed(model, inputs, added.axes, given, added.is_recorded)
        capture.check(returned, shared=True)
        outputs = one_tensor(returned)
        batch = size_of(inputs)
        one.count(batch, 1.0)
        one.outputs, detached = outputs.numel() // batch, outputs.detach()
        if has_columns:
            one.add_columns(capture, outputs, iter([column]), 1.0)
        found, forward, backward = one.take()
        counts[:] = [found]
        return (detached, forward), backward if has_columns else ()

    column = torch.ones_like(added.outputs) if has_columns else ()
    with apart(model), _ready_to_trace(model):
        traced = Traced(pass_over, inputs, column, compiler, held)
    return _Factors(traced, held, counts[0], added.axis, added.axes)


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
    trainable = not frozen and layers is None
    compiler = compiler_of(compile)
    model = unwrapped(model)
    pair = only_pair(data)
    with running(model):
        inputs, targets = own(pair)
        what = f"{compute.__qualname__} {compiler}"
        fixed = loss, layers, given, frozen, check is not None
        key_of = partial(_key, what, model, fixed, (inputs, targets, options))
        key, held = key_of() if compiler is not None else (None, [])
        known: _Quantity | None = None if key is None else passes.known.get(key)
        found = known
        watched = watched_for_examples(model, layers, frozen)
        if found is not None:
            axes = Capture.batch_axes_of(model, inputs, watched, size_of(inputs), given)
            found = found if passes.has_order(found, axes, model) else None
        if found is not None:
            if check is not None:
                assert found.outputs is not None
                check(found.outputs, targets)
            return found.traced.run((inputs, targets, options))[0]
        batch = Batch(model, watched, inputs, given, empty=True, shared=True, only_trainable=trainable)
        value = batch.loss(loss, targets)
        if check is not None:
            check(batch.outputs, batch.targets)
        result = compute(batch, value, options)
        if compiler is None or not batch.size or known is not None or not passes.may_add(key, key_of()[0], model):
            return result
        shape = None if check is None else batch.outputs.new_empty(()).expand(batch.outputs.shape)
        axes = batch.batch_axes
        del batch, value

        def pass_over(early: Any, _: Any) -> tuple[Any, Any]:
            inputs, targets, options = early
            one = Batch(
                model, watched, inputs, given, shared=True, only_trainable=trainable, is_checked=True, axes=axes
            )
            return compute(one, one.loss(loss, targets), options), ()

        with apart(model), _ready_to_trace(model):
            made = Traced(pass_over, (inputs, targets, options), (), compiler, held)
        passes.add(key, model, _Quantity(made, held, shape, axes))
    return result
