"""Kronecker factors of a step, collected while a model trains.

A forward pass in training mode collects the layers' inputs. A backward pass through it collects the gradients at the
layers' outputs. The forward pass counts as soon as a backward pass adds to the gradient of a layer's weight.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lensor.choices import Approx, FactorFisher
from lensor.curvature.batch_axes import BatchAxes, Given
from lensor.curvature.capture import Capture, Use, computing
from lensor.curvature.collector import Collector, output_axis
from lensor.curvature.data import Arguments, one_tensor, size_of
from lensor.curvature.layers import Layer
from lensor.curvature.registry import reduction_of, root_of
from lensor.curvature.structure import DiagonalBlocks
from lensor.curvature.trials import needs_trials
from lensor.curvature.watching import Targets, depth, eagerly
from lensor.optim.hooks import Instead, OnGradient, attach, move_to_end
from lensor.optim.sharding import Sharding, local


@dataclass(eq=False)
class Tracker:
    """Collects Kronecker factors from the forward and backward passes of a model.

    Args:
        model: the model.
        loss: the minimised loss.
        approx: "expand" or "reduce".
        fisher: "empirical", "mc", "type-2" or "forward-only".
        joint: whether weight and bias share a block.
        factor_interval: number of steps between updates of the factors.
        accumulation_steps: number of backward passes per step.
        mc_samples: number of draws per example, for "mc".
        seed: seed of the draws.
        grad_scaler: the GradScaler in use.
        batch_axis: the axis of the examples in the layers' inputs, if given.
        steps: number of steps so far.
        sharding: the sharding of the model's parameters, if they are sharded.
        structure: the diagonal blocks of the factors that are computed; the whole factors unless given.
    """

    model: nn.Module
    loss: Any
    approx: Approx
    fisher: FactorFisher
    joint: bool
    factor_interval: int
    accumulation_steps: int
    mc_samples: int
    seed: int
    grad_scaler: Any
    batch_axis: Given
    steps: int = 0
    sharding: Sharding | None = None
    structure: DiagonalBlocks | None = None
    slots: dict[str, int] | None = None
    """With staggered updates, the step in each interval at which a layer is updated, by the name of its weight. Layers
    that have no factors yet have none, and are always due."""
    generator: torch.Generator | None = None
    layers: list[Layer] = field(default_factory=list)
    names: dict[str, Tensor] = field(default_factory=dict)
    refresh: Callable[[], None] | None = None
    """Called before each collected pass, because parameters may have been frozen since the previous one."""

    def __post_init__(self) -> None:
        self.pending: Collector | None = None
        self._forget()

    def _forget(self) -> None:
        """Reset the attributes that a copy must not share."""
        self._thread = threading.local()
        self._backward: dict[int, _Backward] = {}
        self._left: dict[str, Any] = {}
        self._accumulated: list[Any] = []
        self._hooked: dict[str, Tensor] = {}
        self._owned: dict[str, Layer] = {}
        self._changed: dict[int, list[str]] = {}
        self._passes = 0
        self._constants: dict[str, Tensor] = {}

    def attach(self) -> None:
        """Follow the model's forward passes until this tracker is deleted."""
        self._handle = attach(self, self.model)

    def watch(self, layers: list[Layer], names: Mapping[str, Tensor]) -> None:
        """Collect factors for these layers.

        Args:
            layers: the layers.
            names: the trained parameters, by name.
        """
        for handle in self._accumulated:
            handle.remove()
        self.layers, self.names = layers, dict(names)
        self._left, self._accumulated, self._hooked = {}, [], {}
        self._owned = {layer.weight: layer for layer in layers}
        if self.sharding is None:
            self._hook()

    def _hook(self) -> None:
        """Hook into the weights that the layers' calls use, unless this has happened already."""
        here: weakref.ref[Tracker] = weakref.ref(self)
        for layer in self.layers:
            weight = self.names[layer.weight]
            if self.sharding is not None:
                weight = self.sharding.whole(layer.module, "weight")
            if self._hooked.get(layer.weight) is weight:
                continue
            self._hooked[layer.weight] = weight
            before, after = (OnGradient(here, layer.weight, call) for call in (Tracker._arrive, Tracker._accumulate))
            self._accumulated += [weight.register_hook(before), weight.register_post_accumulate_grad_hook(after)]

    def is_due(self, weight: str, interval: int) -> bool:
        """Whether a layer is updated in this step, if it is once in each interval."""
        slot = 0 if self.slots is None else self.slots.get(weight, self.steps)
        return (self.steps - slot) % interval == 0

    def due(self) -> list[Layer]:
        """The layers whose factors are updated in this step."""
        return [layer for layer in self.layers if self.is_due(layer.weight, self.factor_interval)]

    def take(self) -> Collector | None:
        """Return the factors collected since the last step, and clear them."""
        self._left.clear()
        pending, self.pending, self._passes = self.pending, None, 0
        return pending

    def discard(self) -> None:
        """Discard the factors collected since the last step."""
        self.take()
        if self.sharding is not None:
            self.sharding.reduction.drop()

    # ---------------------------------------------------------------------------------------------------- forward pass
    @contextmanager
    def replacing(self, instead: Instead) -> Iterator[None]:
        """Call a function instead of the model's forward method, in this thread within the `with` block."""
        self._thread.instead = instead
        try:
            yield
        finally:
            self._thread.instead = None

    def instead(self) -> Instead | None:
        """What to call instead of the model's forward method."""
        return getattr(self._thread, "instead", None)

    def collects(self) -> bool:
        """Whether to collect factors from a forward pass that starts now."""
        if (
            not self.model.training
            or not torch.is_grad_enabled()
            or depth()
            or getattr(self._thread, "inside", False)
            or torch._C._current_graph_task_id() != -1  # a checkpoint reruns the model during the backward pass
        ):
            return False
        if not all(map(self._is_own, self.layers)):
            return False  # the weights were replaced, as by torch.func.functional_call
        if self.refresh is not None:
            self.refresh()
        return bool(self.due())

    def forward(self, forward: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Run the model's forward pass while watching its layers."""
        if self.sharding is not None:
            self.sharding.prepare()
            self._hook()
        inputs, layers = Arguments(arguments, named), self.due()
        batch, targets = size_of(inputs), self._targets(layers)
        layout = self._batch_axes(inputs, batch)
        options: dict[str, Any] = {"constants": self._constants, "structure": self.structure}
        one = _Pass(Collector(layers, self.approx, self.joint, self.fisher, keep_graph=True, **options))
        on_output = partial(_wait, weakref.ref(self), one) if self.fisher == "empirical" else None
        capture = Capture(
            targets,
            one.collected.add_input,
            batch,
            layout,
            self.batch_axis,
            on_output,
            ordered=self.approx == "reduce",
            independent=False,
        )
        self._thread.running, self._thread.inside = None, True
        try:
            with eagerly(), capture:
                out = forward(*arguments, **named)
        finally:
            self._thread.inside = False
        self._thread.running = one, capture, layout
        move_to_end(self.model, self._handle)
        return out

    def _is_own(self, layer: Layer) -> bool:
        """Whether a layer's module has the weight that this tracker follows."""
        if self.sharding is not None:
            return self.sharding.is_own(layer)
        return layer.module.weight is self.names[layer.weight]

    def _targets(self, layers: list[Layer]) -> Targets:
        return Targets(layers) if self.sharding is None else Targets(layers, read=self.sharding.whole)

    def _batch_axes(self, inputs: Arguments, batch: int) -> BatchAxes | None:
        """The position of the examples in the layers' inputs.

        Trial passes find it: for inputs of a new form, and with "reduce" in every pass, because the order of the
        examples in a layer may depend on values.
        """
        targets = self._targets(self.layers)
        remember = self.approx == "expand"  # "expand" treats all rows alike, whichever example they belong to
        find = partial(Capture.batch_axes_of, self.model, inputs, targets, batch, self.batch_axis, remember)
        is_searched = self.batch_axis is None or isinstance(self.batch_axis, Mapping)
        if self.sharding is not None and is_searched:
            return self.sharding.trial(find, needs_trials(self.model, inputs, targets, batch, remember))
        return find()

    def leave(self) -> None:
        """Discard a pass whose outputs never reached the output hook, as after a direct call to `model.forward`."""
        if not depth() and not getattr(self._thread, "inside", False):
            self._thread.running = None

    def after(self, out: Any) -> None:
        """Receive the outputs of the model, after all hooks."""
        running, self._thread.running = getattr(self._thread, "running", None), None
        if running is None:
            return
        one, capture, layout = running
        capture.check(out)
        outputs = one_tensor(out)
        with computing(outputs):
            axis = output_axis(layout, out, outputs, capture.batch)
            root = root_of(self.loss, outputs, None, capture.batch, axis)
        one.normaliser = root.normaliser
        one.collected.count(capture.batch, root.normaliser)
        if self.fisher == "empirical":
            capture.require_gradients(capture.uses)
        elif self.fisher != "forward-only":
            if self.generator is None:
                self.generator = torch.Generator(outputs.device).manual_seed(self.seed)
            columns = root.of(self.fisher, self.mc_samples, self.generator)
            one.collected.add_columns(capture, outputs, columns, root.normaliser)
        if outputs.requires_grad:
            outputs.register_hook(partial(_reach, weakref.ref(self), one))

    # --------------------------------------------------------------------------------------------------- backward pass
    def _running(self) -> _Backward:
        """The running backward pass; it is removed when it ends."""
        task = torch._C._current_graph_task_id()
        found = self._backward.get(task)
        if found is None:
            found = self._backward[task] = _Backward()
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._backward.pop(task, None))
        return found

    def _arrive(self, weight: str) -> None:
        """Handle a gradient just before it is added to a weight's `grad`, unless `torch.autograd.grad` returns it.

        If you discarded the previous gradient (deleted it, or filled it with zeros), this also discards the factors
        that were collected with it.
        """
        left = self._left.get(weight)
        if left is None or self.pending is None:
            return
        found = self._gradients(weight)
        if not found or (left != _versions(found) and not self._any(found)):
            self.discard()

    def _gradients(self, weight: str) -> list[Tensor]:
        """What has been added to the gradient of a weight."""
        if self.sharding is not None:
            return self.sharding.gradients(self._owned[weight])
        gradient = self.names[weight].grad
        return [] if gradient is None else [gradient]

    def _any(self, gradients: list[Tensor]) -> bool:
        """Whether gradients have an entry other than zero, on any rank."""
        found = any(bool(local(one).any()) for one in gradients)
        return found if self.sharding is None else self.sharding.any(found)

    def _leave(self, weights: list[str]) -> None:
        """Record the gradients of some weights, to notice later if you discard them."""
        for weight in weights:
            found = self._gradients(weight) if weight in self._owned else []
            if found:
                self._left[weight] = _versions(found)

    def _accumulate(self, weight: str) -> None:
        """Count the forward passes of a backward pass that added to the gradient of a weight."""
        if self.sharding is None:
            self._leave([weight])
        else:
            self._later(weight)
        found = self._backward.get(torch._C._current_graph_task_id())
        if found is None:
            return
        for one in found.reached:
            self._use(one)
        found.reached.clear()
        for one, use, gradient in found.waiting.pop(weight, ()):
            self._use(one)
            self._add_output(one, use, gradient)
        self._start_sums(weight)

    def _later(self, weight: str) -> None:
        """Record the gradient of a sharded weight at the end of the backward pass, after FSDP has moved it."""
        task = torch._C._current_graph_task_id()
        if task not in self._changed:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(self._end, task))
        self._changed.setdefault(task, []).append(weight)

    def _end(self, task: int) -> None:
        """Finish a backward pass."""
        self._leave(self._changed.pop(task))
        if self.sharding is not None:
            self.sharding.reduction.start()

    def _start_sums(self, weight: str) -> None:
        """Start to sum a layer's factors over the ranks, if no other pass of the step is expected to add to them.

        If one does, they are summed again in the step.
        """
        if self.sharding is None or self.pending is None or self.fisher != "empirical" or self.approx != "expand":
            return
        sums = self.pending.sums.get(weight)
        if sums is None or self._passes < self.accumulation_steps or not self.sharding.is_last(self._owned[weight]):
            return
        for part in ("b", "a"):
            if getattr(sums, part) is not None:
                self.sharding.reduction.add(weight, sums, part)

    def _use(self, one: _Pass) -> None:
        """Count a pass whose gradients belong to the step."""
        if one.used_in is None:
            if self.pending is None:
                self.pending = one.collected
            else:
                self.pending.merge(one.collected)
            self._passes += 1
            one.used_in = self.pending

    def _add_output(self, one: _Pass, use: Use, gradient: Tensor) -> None:
        """Add the gradient at a layer's output from your backward pass, rescaled to a column of the root."""
        if one.used_in is not self.pending or self.pending is None:
            return  # its step has been taken or discarded
        scale = self.grad_scaler.get_scale() if self.grad_scaler is not None else 1.0
        mean = reduction_of(self.loss) == "mean"
        factor = one.normaliser * ((self.accumulation_steps if mean else 1) / scale) ** 2
        with computing(gradient):
            self.pending.add_output(use, gradient, factor * (one.normaliser if mean else 1.0))

    # --------------------------------------------------------------------------------------------------------- copying
    def __getstate__(self) -> dict[str, Any]:
        own = ("_thread", "_backward", "_handle", "_accumulated", "_hooked", "_left", "_changed", "_passes")
        own += ("pending", "refresh", "generator", "_constants")
        state = {key: value for key, value in self.__dict__.items() if key not in own}
        return {**state, "generator": None if self.generator is None else generator_state(self.generator)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; once attached, it follows the model that was copied with it."""
        self.__dict__.update(state)
        self.pending = self.refresh = None
        self.generator = None if state["generator"] is None else generator_from(*state["generator"])
        self._forget()


def _versions(tensors: list[Tensor]) -> list[tuple[int, int, int]]:
    """The identity and versions of each tensor; FSDP writes into shards, and other code into the DTensors."""
    return [(id(one), one._version, local(one)._version) for one in tensors]


def generator_state(generator: torch.Generator) -> tuple[torch.device, Tensor]:
    """The device and the state of a generator."""
    return generator.device, generator.get_state()


def generator_from(device: torch.device, state: Tensor) -> torch.Generator:
    """A generator with a given state."""
    found = torch.Generator(device)
    found.set_state(state)
    return found


@dataclass(eq=False)
class _Pass:
    """A forward pass.

    Args:
        collected: the factors collected from it.
        normaliser: the divisor of its mean loss.
        used_in: the step for which it counts.
        differentiated: whether a backward pass through it is itself differentiated (a gradient penalty), so that it
            never counts.
    """

    collected: Collector
    normaliser: float = 1.0
    used_in: Collector | None = None
    differentiated: bool = False


@dataclass(eq=False)
class _Backward:
    """A running backward pass.

    Args:
        reached: the forward passes that it has gone through.
        waiting: gradients at the layers' outputs, by weight name.
    """

    reached: list[_Pass] = field(default_factory=list)
    waiting: dict[str, list[tuple[_Pass, Use, Tensor]]] = field(default_factory=dict)


def _wait(tracker: weakref.ref[Tracker], one: _Pass, use: Use, gradient: Tensor) -> None:
    """Hold the gradient at a layer's output until the same backward pass adds to the gradient of the weight."""
    found = tracker()
    one.differentiated |= torch.is_grad_enabled()
    if found is not None and not one.differentiated:
        found._running().waiting.setdefault(use.weight, []).append((one, use, gradient))


def _reach(tracker: weakref.ref[Tracker], one: _Pass, gradient: Tensor) -> None:
    """Record that a backward pass goes through the outputs of a forward pass."""
    found = tracker()
    one.differentiated |= torch.is_grad_enabled()
    if found is not None and not one.differentiated:
        found._running().reached.append(one)
