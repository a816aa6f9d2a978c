"""Which axis of a layer's input the examples lie along, found by running the model with another number of them.

Sizes of one pass cannot tell [batch, time, channels] from [time, batch, channels] where both are equal. A second pass
with another batch size can: the axis whose size follows is that of the examples. The passes compute no values (fake
tensors), unless the model cannot run so or has hooks of the user's, which may not see fake tensors. Where an axis holds
several rows for each example, [batch · time, channels] is told from [time · batch, channels] by their values, in two
passes with the examples in different orders.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from lensor.curvature.data import Inputs, outputs_of
from lensor.curvature.graph import tensors_in
from lensor.curvature.watching import Targets, Watch, aside, forgotten, undisturbed
from lensor.nn.calls import LayerCall

Key = tuple[str, int]
"""A call: the weight's name, and how many calls with this weight came before."""

Given = int | str | Mapping[str, int | str] | None
"""What a user says of the examples' axis: an axis, "outer" or "inner", for all layers or by the layers' names."""


@dataclass(frozen=True)
class BatchAxis:
    """Where the examples lie.

    Args:
        axis: the axis.
        rows: how many rows along it belong to each example.
        order: whether the examples are the "outer" or the "inner" of the two that share the axis, if `rows` is not 1;
            None if that is not known.
    """

    axis: int
    rows: int = 1
    order: Literal["outer", "inner"] | None = "outer"

    def first(self, x: Tensor, batch: int) -> Tensor:
        """A tensor with the examples as first axis, and their rows as second one unless it is one each; a view."""
        if self.rows == 1:
            return x.movedim(self.axis, 0)
        if self.order == "inner":
            return x.unflatten(self.axis, (self.rows, batch)).movedim((self.axis + 1, self.axis), (0, 1))
        return x.unflatten(self.axis, (batch, self.rows)).movedim((self.axis, self.axis + 1), (0, 1))


@dataclass(frozen=True)
class Layout:
    """Where the examples lie in every layer's inputs, and in the model's outputs; None where they do not occur.

    Args:
        calls: by call: the input's number of axes, and where the examples lie.
        outputs: for every tensor of the outputs.
    """

    calls: Mapping[Key, tuple[int, BatchAxis | None]]
    outputs: tuple[BatchAxis | None, ...]


class NoLayoutError(ValueError):
    """The model could not be run with another number of examples."""


@dataclass
class _Seen:
    """What one pass has shown."""

    shapes: dict[Key, tuple[int, ...]] = field(default_factory=dict)
    outputs: list[tuple[int, ...]] = field(default_factory=list)
    values: dict[Key, Tensor] = field(default_factory=dict)
    output_values: list[Tensor] = field(default_factory=list)


_DROPOUTS = {
    getattr(nn.functional, name)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
} | {torch.dropout, torch.alpha_dropout, torch.feature_alpha_dropout, torch.feature_dropout}


class _Trial(Watch):
    """Writes down the shapes, and where asked for the values, of the layers' inputs. Nothing is dropped out."""

    def __init__(self, targets: Targets, kept: set[Key]) -> None:
        super().__init__(targets)
        self.seen, self.kept = _Seen(), kept

    def run(self, function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        if function in _DROPOUTS:
            return arguments[0] if arguments else named["input"]
        return function(*arguments, **named)

    def on_layer(self, call: LayerCall, run: Callable[[], Tensor]) -> Tensor:
        name = self.targets.weights[id(call.weight)][0]
        key = name, sum(known == name for known, _ in self.seen.shapes)
        self.seen.shapes[key] = tuple(call.input.shape)
        if key in self.kept:
            self.seen.values[key] = call.input.detach().clone()
        return run()


_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, Layout]] = weakref.WeakKeyDictionary()
_known_lock = threading.Lock()


def find_layout(model: nn.Module, inputs: Inputs, targets: Targets, batch: int) -> Layout:
    """Where the examples lie, from trial passes that are remembered for a model and inputs of one form.

    Args:
        model: the model.
        inputs: what it is called with; tensors whose first axis has `batch` entries are examples.
        targets: the parameters whose calls count.
        batch: the number of examples.

    Raises:
        NoLayoutError: if the model does not run with another number of examples.
        ValueError: if more than one axis follows the number of examples.
    """
    key = _form(model, inputs, targets, batch)
    with _known_lock:
        found = _known.setdefault(model, {}).get(key)
    if found is None:
        with aside():
            found = _Finder(model, inputs, targets, batch).find()
        with _known_lock:
            of_model = _known.setdefault(model, {})
            if len(of_model) >= 64:
                of_model.clear()
            of_model[key] = found
    return found


def _form(model: nn.Module, inputs: Inputs, targets: Targets, batch: int) -> Any:
    """What a layout depends on: the modules and their modes, the layers, the inputs up to their number."""
    modules = tuple(
        (id(module), type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for module in model.modules()
    )

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            shape = tuple(value.shape)
            return (shape[1:], value.dtype) if shape[:1] == (batch,) else (shape, value.dtype, None)
        if isinstance(value, Mapping):
            return tuple((name, part(one)) for name, one in value.items())
        if isinstance(value, (tuple, list)):
            return tuple(map(part, value))
        return repr(value)

    return modules, tuple(targets.parameters), part(inputs)


class _Finder:
    """Trial passes of one model."""

    def __init__(self, model: nn.Module, inputs: Inputs, targets: Targets, batch: int) -> None:
        self.model, self.targets, self.batch = model, targets, batch
        self.inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs

    def find(self) -> Layout:
        one, two, sizes = self._two_passes()
        if list(one.shapes) != list(two.shapes) or len(one.outputs) != len(two.outputs):
            raise NoLayoutError("the model calls other layers for another number of examples")
        calls = {key: (len(shape), _axis(shape, two.shapes[key], sizes, key)) for key, shape in one.shapes.items()}
        outputs = tuple(
            _axis(a, b, sizes, ("the model's outputs", 0)) for a, b in zip(one.outputs, two.outputs, strict=True)
        )
        shared = {key for key, (_, axis) in calls.items() if axis is not None and axis.rows > 1}
        if shared or any(axis is not None and axis.rows > 1 for axis in outputs):
            calls, outputs = self._ordered(calls, outputs, shared)
        return Layout(calls, outputs)

    def _two_passes(self) -> tuple[_Seen, _Seen, tuple[int, int]]:
        """Passes with two numbers of examples: without values if the model can run so."""
        b = max(self.batch, 1)
        trouble: Exception | None = None
        if not _has_hooks(self.model):
            try:
                return self._fake(b), self._fake(2 * b), (b, 2 * b)
            except Exception as error:
                trouble = error
        if self.batch:
            other = b // 2 if b > 3 else 2 * b
            seen = self._real(self._some(b))  # which fails as the model itself does
            try:
                return seen, self._real(self._some(other)), (b, other)
            except Exception as error:
                trouble = error
        raise NoLayoutError(
            f"the model does not run with another number of examples than {self.batch} ({_first_line(trouble)})"
        ) from trouble

    def _fake(self, size: int) -> _Seen:
        """A pass with shapes only."""
        with undisturbed(self.model), _quiet(), FakeTensorMode(allow_non_fake_inputs=True):

            def fake(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                shape = list(value.shape)
                if shape[:1] == [self.batch]:
                    shape[0] = size
                made = torch.empty(shape, dtype=value.dtype, device=value.device)
                return made.requires_grad_() if value.requires_grad else made

            return self._pass(tree_map(fake, self.inputs), set())

    def _some(self, size: int) -> Inputs:
        """The first examples, or all of them twice."""
        return self._each(lambda x: x[:size] if size <= self.batch else torch.cat([x, x])[:size])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        def one(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.shape[:1] == (self.batch,)
            return change(value.detach()).requires_grad_(value.requires_grad) if batched else value

        return tree_map(one, self.inputs)

    def _real(self, inputs: Inputs, kept: set[Key] | None = None) -> _Seen:
        """A pass with values."""
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)), undisturbed(self.model):
            return self._pass(inputs, kept or set(), values=kept is not None)

    def _pass(self, inputs: Inputs, kept: set[Key], values: bool = False) -> _Seen:
        trial = _Trial(self.targets, kept)
        with ExitStack() as stack:
            # Weights that automatic casts keep must not be those of a pass without values.
            stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
            torch.set_autocast_cache_enabled(False)
            stack.enter_context(forgotten(list(self.model.modules())))
            stack.enter_context(trial)
            outputs = outputs_of(self.model, inputs)
        for tensor in tensors_in(outputs):
            trial.seen.outputs.append(tuple(tensor.shape))
            if values:
                trial.seen.output_values.append(tensor.detach().clone())
        return trial.seen

    def _ordered(
        self, calls: dict[Key, tuple[int, BatchAxis | None]], outputs: tuple[BatchAxis | None, ...], shared: set[Key]
    ) -> tuple[dict[Key, tuple[int, BatchAxis | None]], tuple[BatchAxis | None, ...]]:
        """Tell the order of examples and rows that share an axis, by what a change of the examples' order changes."""
        if self.batch < 2:
            return calls, outputs

        def noisy(x: Tensor) -> Tensor:
            return x + torch.randn_like(x) * (0.1 * x.abs().mean() + 0.1) if x.is_floating_point() else x

        for change in (lambda x: x, noisy):
            with torch.random.fork_rng(devices=[]):
                changed = self._each(change)
            mine = _Finder(self.model, changed, self.targets, self.batch)
            try:
                one = mine._real(changed, shared)
                two = mine._real(mine._each(lambda x: x.roll(1, 0)), shared)
            except Exception:
                one = two = None
            calls = {
                key: (ndim, axis and _order(axis, self.batch, one and one.values.get(key), two and two.values.get(key)))
                for key, (ndim, axis) in calls.items()
            }
            pairs = [(None, None)] * len(outputs)
            if one is not None and two is not None:
                pairs = list(zip(one.output_values, two.output_values, strict=True))
            outputs = tuple(axis and _order(axis, self.batch, *pair) for axis, pair in zip(outputs, pairs, strict=True))
            if all(axis is None or axis.order for axis in (*(axis for _, axis in calls.values()), *outputs)):
                break
        return calls, outputs


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging what fails in this thread: a pass with values follows one without that fails."""
    thread, logger = threading.get_ident(), logging.getLogger("torch._subclasses.fake_tensor")

    def elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(elsewhere)


def _order(axis: BatchAxis, batch: int, before: Tensor | None, after: Tensor | None) -> BatchAxis:
    """The axis with the order under which the rows of rolled examples are the rolled rows; None if not exactly one."""
    if axis.rows == 1:
        return axis
    if before is None or after is None or before.shape != after.shape:
        return replace(axis, order=None)
    fits: list[Literal["outer", "inner"]] = []
    for order in ("outer", "inner"):
        there = replace(axis, order=order)
        rolled, found = there.first(before, batch).roll(1, 0).double(), there.first(after, batch).double()
        scale = float(rolled.abs().max())
        accuracy = 1e3 * torch.finfo(before.dtype).eps if before.is_floating_point() else 0.0
        if bool(((rolled - found).abs() <= accuracy * scale).all()):
            fits.append(order)
    return replace(axis, order=fits[0] if len(fits) == 1 else None)


def _axis(one: tuple[int, ...], two: tuple[int, ...], sizes: tuple[int, int], key: Key) -> BatchAxis | None:
    """The axis whose size is proportional to the number of examples."""
    different = [at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
    if len(one) != len(two) or len(different) > 1:
        raise ValueError(
            f"{key[0]} has an input of shape {one} for {sizes[0]} examples and {two} for {sizes[1]}, expected one axis"
            " that follows the number of examples"
        )
    if not different:
        return None
    (axis,) = different
    if one[axis] % sizes[0] or one[axis] // sizes[0] * sizes[1] != two[axis]:
        raise ValueError(
            f"{key[0]} has an input of shape {one} for {sizes[0]} examples and {two} for {sizes[1]}, expected a"
            " multiple of the number of examples"
        )
    return BatchAxis(axis, one[axis] // sizes[0])


def _has_hooks(model: nn.Module) -> bool:
    """Whether hooks of the user's run in a forward pass, which must not see fake tensors."""
    made = nn.modules.module
    if made._global_forward_hooks or made._global_forward_pre_hooks:
        return True
    return any(
        not type(hook).__module__.startswith(("torch.", "lensor."))
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def _first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def given_axis(given: Given, name: str, shape: Sequence[int], batch: int) -> BatchAxis | None:
    """Where a user says that the examples of a layer's input lie; None if nothing is said of this layer.

    Raises:
        ValueError: if it does not fit the shape.
    """
    found = given.get(name) if isinstance(given, Mapping) else given
    if found is None:
        return None
    order: Literal["outer", "inner"] = "inner" if found == "inner" else "outer"
    axis = 0 if isinstance(found, str) else found
    if isinstance(found, bool) or (isinstance(found, str) and found not in ("outer", "inner")):
        raise ValueError(f"batch_axis of {name!r} is {found!r}, expected an axis, 'outer' or 'inner'")
    if not -len(shape) <= axis < len(shape) or not batch or shape[axis] % batch:
        raise ValueError(
            f"batch_axis says that axis {axis} of the input of layer {name!r} has {batch} examples, found shape"
            f" {tuple(shape)}"
        )
    axis %= len(shape)
    return BatchAxis(axis, shape[axis] // batch, order)
