"""Trial passes on a few examples, which find the position of the batch in a model's tensors.

The sizes in one pass cannot distinguish [batch, time, channels] from [time, batch, channels] if both sizes are equal.
Two passes can, one with three and one with two of the examples, in a different order: the axis whose size changes is
the axis of the examples, and the values of an example's rows are the same in both passes. The values also distinguish
[batch · time, channels] from [time · batch, channels], and show whether a model mixes examples or changes their
order.
"""

from __future__ import annotations

import copy
import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lensor.curvature.batch_axes import BatchAxes, BatchAxis, FunctionAxes, Key, NoBatchAxisError
from lensor.curvature.data import Inputs, known_containers, outputs_of
from lensor.curvature.flow import Flow, with_examples
from lensor.curvature.graph import tensors_in
from lensor.curvature.watching import (
    Preserving,
    Targets,
    Watch,
    apart,
    aside,
    eagerly,
    require_unmapped,
    uncast,
)
from lensor.curvature.writes import results_of, written
from lensor.nn.calls import LayerCall

_ROUNDINGS, _ROUNDINGS_OF_HALF = 1e3, 12
"""The rows of an example in two passes may differ by this many rounding errors of the largest entry. In half precision,
the bound uses the root mean square instead of the largest entry, because every rounding error counts."""

_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, BatchAxes]] = weakref.WeakKeyDictionary()
_known_lock = threading.Lock()
"""Cache of batch axes by model and form of the inputs, and its lock."""


class _Weights:
    """Vectors with which tensors are contracted: the first entries of one vector per dtype and device."""

    def __init__(self) -> None:
        self._vectors: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, rows: Tensor) -> Tensor:
        """As many weights as the last axis of a tensor has entries."""
        key, count = (rows.dtype, rows.device), rows.shape[-1]
        known = self._vectors.get(key)
        if known is None or len(known) < count:
            places = torch.arange(count, device=rows.device, dtype=rows.dtype)
            known = self._vectors[key] = torch.sin(1.7 * places + 1)
        return known[:count]


@dataclass
class _Seen:
    """A record of one pass: shapes, and tensors contracted with a vector along some axes to save memory."""

    weights: _Weights
    shapes: dict[Key, tuple[int, ...]] = field(default_factory=dict)
    values: dict[Key, Tensor] = field(default_factory=dict)
    accuracies: dict[Key, float] = field(default_factory=dict)
    coarse: set[Key] = field(default_factory=set)
    """The keys of tensors in half precision, where rows of different examples may compare equal."""

    def add(self, key: Key, x: Tensor, whole: bool) -> None:
        """Record a tensor.

        Args:
            key: the tensor's key.
            x: the tensor.
            whole: whether to contract all axes except the first with a vector, instead of the last axis only.
        """
        self.shapes[key] = tuple(x.shape)
        if not x.is_floating_point() or not x.numel():
            return
        rows = x.detach().flatten(1) if whole and x.ndim > 1 else x.detach()
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).nan_to_num(0.0, 0.0, 0.0)  # masks have −inf
        eps = torch.finfo(x.dtype).eps
        if torch.finfo(x.dtype).bits < 32:
            self.coarse.add(key)
            self.accuracies[key] = _ROUNDINGS_OF_HALF * eps * float(rows.square().mean().sqrt())
        else:
            self.accuracies[key] = _ROUNDINGS * eps * float(rows.abs().max())
        if rows.ndim > 1:
            self.accuracies[key] *= rows.shape[-1] ** 0.5
            rows = rows @ self.weights.like(rows)
        self.values[key] = rows


_DROPOUTS = {
    getattr(nn.functional, name)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
} | {torch.dropout, torch.alpha_dropout, torch.feature_alpha_dropout, torch.feature_dropout}


_WITH_DROPOUT: dict[Any, tuple[str, int]] = {
    nn.functional.scaled_dot_product_attention: ("dropout_p", 4),
    nn.functional.multi_head_attention_forward: ("dropout_p", 10),
}
"""Functions with a probability of dropout: the name and position of this argument."""

_RECURRENT = {getattr(torch._VF, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}  # pyright: ignore


def _without_dropout(
    function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]
) -> tuple[Sequence[Any], dict[str, Any]]:
    """The arguments of a function, with zero as the probability of dropout."""
    if function in _WITH_DROPOUT:
        name, place = _WITH_DROPOUT[function]
        if name in named:
            return arguments, named | {name: 0.0}
        return [*arguments[:place], *[0.0 for _ in arguments[place : place + 1]], *arguments[place + 1 :]], named
    if function in _RECURRENT:  # the only number that is not an integer
        return [0.0 if isinstance(one, float) else one for one in arguments], named
    return arguments, named


_BY_VALUES = {
    getattr(torch, name)
    for name in ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount")
} | {
    getattr(Tensor, name)
    for name in ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "item", "tolist")
}


_BY_VALUES |= {getattr(Tensor, f"__{name}__") for name in ("bool", "int", "float", "index")}


_BY_VALUES |= {Tensor.numpy, torch._VF._pack_padded_sequence, torch._VF.unique_dim}  # pyright: ignore
"""Functions for which the values of a tensor determine the shape of the result, or a Python number."""


def _gives_shapes_by_values(function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> bool:
    """Whether the shape of the result, or the control flow that follows, depends on the values of a tensor."""
    if function is torch.Tensor.__getitem__:
        index = arguments[1] if isinstance(arguments[1], tuple) else (arguments[1],)
        return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in index)
    if function in (torch.where, torch.Tensor.where):
        return len(arguments) + len(named) == 1
    if function in (torch.repeat_interleave, torch.Tensor.repeat_interleave):
        return any(isinstance(one, Tensor) for one in (*arguments[1:], *named.values()))
    return function in _BY_VALUES


class _Trial(Watch):
    """Records the layers' inputs, with dropout turned off.

    Args:
        targets: the parameters whose calls are recorded.
        wide: whether to convert half precision to single precision, except for functions that write into a tensor.
        weights: the vectors with which tensors are contracted.
        flow: the dependences of tensors, if the calls of all functions with parameters are recorded.
    """

    def __init__(self, targets: Targets, wide: bool, weights: _Weights, flow: Flow | None = None) -> None:
        super().__init__(targets, flow)
        self.seen, self.wide, self._counts = _Seen(weights), wide, Counter[str]()
        self.functions: list[_Function] = []
        self.by_values = False
        """Whether shapes may depend on values, in which case examples may have different numbers of rows."""

    def call(self, function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        """The result of a function."""
        if function in _DROPOUTS:
            return arguments[0] if arguments else named["input"]
        if _gives_shapes_by_values(function, arguments, named):
            self.by_values = True
        arguments, named = _without_dropout(function, arguments, named)
        if self.wide and not written(function, arguments, named):
            arguments, named = tree_map(_widened, (tuple(arguments), named))
        return function(*arguments, **named)

    def on_layer(self, call: LayerCall, run: Callable[[], Tensor]) -> Tensor:
        """Run and record a layer's function."""
        name = self.targets.weights[id(call.weight)][0]
        with torch.no_grad(), uncast(call.input):
            self.seen.add((name, self._counts[name]), call.input, call.kind != "linear")
        self._counts[name] += 1
        return run()

    def on_function(self, function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        """Run a function, and record its arguments and results if it takes parameters."""
        if self.flow is None:
            return self.call(function, arguments, named)
        leaves = tree_leaves((tuple(arguments), named))
        if not any(self.flow.comes_from_parameters(leaf) for leaf in leaves):
            return self.call(function, arguments, named)
        found = _Function(getattr(function, "__name__", str(function)), len(self.functions))
        self.functions.append(found)
        for at, leaf in enumerate(leaves):
            require_unmapped(leaf, f"the function {found.name}, which takes parameters,")
            if self.flow.comes_from_examples(leaf):
                found.arguments.append(at)
                self._add(found.argument(at), leaf)
        result = self.call(function, arguments, named)
        for at, one in enumerate(results_of(function, arguments, named, result)):
            self._add(found.result(at), one)
            found.results += 1
        return result

    def _add(self, key: Key, x: Tensor) -> None:
        with torch.no_grad(), uncast(x):
            self.seen.add(key, x if x.is_floating_point() or x.is_complex() else x.double(), whole=False)


@dataclass
class _Function:
    """A call of a function that takes parameters: the places of the arguments with examples, and its results."""

    name: str
    place: int
    arguments: list[int] = field(default_factory=list)
    results: int = 0

    def argument(self, at: int) -> Key:
        """The key of an argument."""
        return f"an argument of {self.name} (call {self.place} with parameters)", at

    def result(self, at: int) -> Key:
        """The key of a result."""
        return f"a result of {self.name} (call {self.place} with parameters)", at


def _copied(value: Any) -> Any:
    """A copy of an input object, if it can be copied: the model may write into it."""
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def _is_half(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and torch.finfo(x.dtype).bits < 32


def _widened(x: Any) -> Any:
    return x.float() if _is_half(x) else x


def find_batch_axes(
    model: nn.Module, inputs: Inputs, targets: Targets, batch: int, remember: bool = False
) -> BatchAxes:
    """Determine the position of the examples with trial passes.

    Args:
        model: the model.
        inputs: the inputs of the model; tensors whose first axis has `batch` entries hold examples.
        targets: the parameters whose calls are recorded.
        batch: the number of examples.
        remember: whether to cache the batch axes for later inputs of this form. The axes stay valid while the model's
            attributes do not change, but which example each row belongs to may depend on the values of parameters and
            inputs.

    Raises:
        NoBatchAxisError: if the model does not run with a different number of examples.
        ValueError: if the size of more than one axis depends on the number of examples.
    """
    if batch < 2:
        return BatchAxes(None, None)
    if not remember:
        with aside():
            return _Finder(model, inputs, targets, batch).find()
    key = form_of(model, inputs, targets, batch)
    found = _cached(model, key)
    if found is None:
        with aside():
            found = _Finder(model, inputs, targets, batch).find()
        with _known_lock:
            of_model = _known.setdefault(model, {})
            if len(of_model) >= 64:
                of_model.clear()
            of_model[key] = found
    return found


def needs_trials(model: nn.Module, inputs: Inputs, targets: Targets, batch: int, remember: bool) -> bool:
    """Whether `find_batch_axes` would run the model for these arguments."""
    if batch < 2:
        return False
    return not remember or _cached(model, form_of(model, inputs, targets, batch)) is None


def _cached(model: nn.Module, key: Any) -> BatchAxes | None:
    with _known_lock:
        return _known.setdefault(model, {}).get(key)


_PLAIN = (bool, int, float, str, type(None))


def form_of(model: nn.Module, inputs: Inputs, targets: Targets, batch: int) -> Any:
    """The cache key of batch axes: modules and modes, layers, and the form of the inputs without the batch size."""
    modules = tuple(
        (
            *(id(module), type(module), len(module._forward_hooks), len(module._forward_pre_hooks)),
            *((name, value) for name, value in vars(module).items() if type(value) in _PLAIN),
        )
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


_OUTPUTS = "the model's outputs"


class _Finder:
    """Trial passes of one model."""

    def __init__(self, model: nn.Module, inputs: Inputs, targets: Targets, batch: int) -> None:
        self.model, self.targets, self.batch, self.wide = model, targets, batch, False
        self.by_values = False
        self.weights = _Weights()
        self.functions: list[_Function] = []
        self.inputs = known_containers(inputs)
        if self._are_equal():
            self.inputs = self._noisy()

    def find(self) -> BatchAxes:
        """Find the batch axes of the model.

        Raises:
            NoBatchAxisError: if the model does not run with other numbers of examples.
        """
        choices = [([0, 1], [1, 0, 0])] if self.batch == 2 else [([0, 1, 2], [1, 0])]
        if self.batch > 3:
            choices.append(([0, 1, 2, 3], [1, 0]))
        trouble: Exception | None = None
        for wide in (True, False) if self._in_half_precision() else (False,):
            self.wide = wide
            for one, two in choices:
                try:
                    found = self._compared(one, two)
                    return self._checked(found) if self.by_values else found
                except NoBatchAxisError:
                    raise
                except Exception as error:
                    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _is_own(error):
                        raise
                    trouble = error
        self._pass(list(range(self.batch)))  # raises the model's own error
        raise NoBatchAxisError(
            f"the model does not run with a number of examples other than {self.batch} ({_first_line(trouble)})"
        ) from trouble

    def _in_half_precision(self) -> bool:
        """Whether the model computes in half precision, in which different examples may compare equal."""
        found = [torch.is_autocast_enabled(kind) for kind in self._autocasts()]
        self._each(lambda x: (found.append(_is_half(x)), x)[1])
        return any(found) or any(_is_half(x) for x in (*self.model.parameters(), *self.model.buffers()))

    def _autocasts(self) -> set[str]:
        """The types of the devices that the model uses, without those that do not support autocast."""
        kinds = {tensor.device.type for tensor in self.model.parameters()}
        return {kind for kind in kinds if torch.amp.is_autocast_available(kind)}

    def _compared(self, one: list[int], two: list[int]) -> BatchAxes:
        """Determine the batch axes by comparing two passes."""
        a, b = self._pass(one), self._pass(two)
        if list(a.shapes) != list(b.shapes):
            raise NoBatchAxisError("the model calls different layers for a different number of examples")
        axes = {key: _axis(key, a, b, one, two) for key in a.shapes}
        functions = self.functions
        if any(axis is not None and None in (axis.order, axis.independent) for axis in axes.values()):
            # Batch statistics depend on the set of examples, but not on their order.
            three = [*one[1:], one[0]]
            again, noisy = self._pass(three), _Finder(self.model, self._noisy(), self.targets, self.batch)
            noisy.wide = self.wide
            c, d, e = noisy._pass(one), noisy._pass(three), noisy._pass(two)
            for key, axis in axes.items():
                if axis is not None and axis.independent is None:
                    found = _axis(key, c, e, one, two)
                    axes[key] = axis = replace(axis, independent=found is not None and found.independent is True)
                if axis is not None and axis.order is None:
                    fits = _fits(axis, key, a, again, one, three)
                    if len(fits) != 1:
                        fits = _fits(axis, key, c, d, one, three)
                    axes[key] = replace(axis, order=fits[0] if len(fits) == 1 else None)
        outputs = tuple(axis for key, axis in axes.items() if key[0] == _OUTPUTS)
        of_functions = tuple(_function_axes(one, axes, a, b) for one in functions)
        layers = {name for name, _ in self.targets.weights.values()}
        calls = {key: (len(a.shapes[key]), axis) for key, axis in axes.items() if key[0] in layers}
        return BatchAxes(calls, outputs, of_functions)

    def _checked(self, axes: BatchAxes) -> BatchAxes:
        """Check the axes with passes over all examples.

        Where shapes depend on values, the few examples of the previous passes may have equal numbers of rows by chance.
        To detect this, the model is run on all examples in two different orders, and the results are compared.
        """
        every = list(range(self.batch))
        turned = every[::-1]
        a, b = self._pass(every), self._pass(turned)
        if list(a.shapes) != list(b.shapes):
            raise NoBatchAxisError("the model calls different layers when the examples are reordered")

        def checked(key: Key, axis: BatchAxis | None) -> BatchAxis | None:
            if axis is None or key not in a.shapes:
                return axis
            size = a.shapes[key][axis.axis] if axis.axis < len(a.shapes[key]) else -1
            if size != axis.rows * self.batch or a.shapes[key] != b.shapes[key]:
                raise NoBatchAxisError(
                    f"{key[0]} has a number of rows that depends on the values of the examples: shape {a.shapes[key]}"
                    f" for {self.batch} examples"
                )
            if not axis.independent or axis.order in _fits(axis, key, a, b, every, turned):
                return axis
            return replace(axis, independent=False, order="outer" if axis.rows == 1 else None)

        calls = axes.calls or {}
        outputs = axes.outputs or ()
        functions = [
            replace(
                known,
                arguments={
                    at: there
                    for at, axis in known.arguments.items()
                    if (there := checked(ran.argument(at), axis)) is not None
                },
                results=tuple(checked(ran.result(at), axis) for at, axis in enumerate(known.results)),
            )
            for known, ran in zip(axes.functions or (), self.functions, strict=True)
        ]
        return BatchAxes(
            {key: (ndim, checked(key, axis)) for key, (ndim, axis) in calls.items()},
            tuple(checked((_OUTPUTS, at), axis) for at, axis in enumerate(outputs)),
            tuple(functions),
        )

    def _pass(self, places: list[int]) -> _Seen:
        """Run a pass with some of the examples, without side effects on the model or the random generators."""
        inputs = self._each(lambda x: x[places])
        flow = None
        if self.targets.complete:
            marks = with_examples(tree_leaves(self.inputs), self.batch)
            examples = [leaf for leaf, mark in zip(tree_leaves(inputs), marks, strict=True) if mark]
            flow = Flow(self.targets.parameters.values(), examples)
        trial = _Trial(self.targets, self.wide, self.weights, flow)
        with ExitStack() as stack:
            # Prevent an activation checkpoint around the model from counting the tensors that this pass saves.
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
            stack.enter_context(eagerly())
            stack.enter_context(apart(self.model))
            for kind in self._autocasts() if self.wide else ():
                stack.enter_context(torch.autocast(kind, enabled=False))
            with Preserving(), trial:
                outputs = outputs_of(self.model, inputs)
            self.by_values |= trial.by_values
            self.functions = trial.functions
            for at, tensor in enumerate(tensors_in(outputs)):
                with torch.no_grad(), uncast(tensor):
                    trial.seen.add((_OUTPUTS, at), tensor, whole=False)
        return trial.seen

    def _each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The inputs, with a function applied to the tensors that hold examples."""

        def one(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return _copied(value)
            batched = value.shape[:1] == (self.batch,)
            return change(value.detach()).requires_grad_(value.requires_grad) if batched else value

        return tree_map(one, self.inputs)

    def _are_equal(self) -> bool:
        """Whether the first examples are equal and hence indistinguishable."""
        found: list[bool] = []
        self._each(lambda x: (found.append(bool((x[:3] == x[:1]).all())), x)[1])
        return bool(found) and all(found)

    def _noisy(self) -> Inputs:
        """The inputs with noise added to floating-point tensors."""
        generator = torch.Generator().manual_seed(0)

        def noisy(x: Tensor) -> Tensor:
            if not x.is_floating_point() or not x.numel():
                return x
            noise = torch.randn(x.shape, generator=generator).to(x)
            return x + noise * (0.1 * x.abs().mean() + 0.1)

        return self._each(noisy)


def _fits(
    axis: BatchAxis, key: Key, a: _Seen, b: _Seen, one: list[int], two: list[int]
) -> list[Literal["outer", "inner"]]:
    """The orders for which the rows of each example agree in two passes."""
    if key not in a.values or key not in b.values:
        return ["outer"] if axis.rows == 1 else []
    x, y, accuracy = a.values[key], b.values[key], max(a.accuracies[key], b.accuracies[key])
    if axis.axis >= x.ndim:
        return ["outer"] if axis.rows == 1 else []
    found: list[Literal["outer", "inner"]] = []
    for order in ("outer", "inner") if axis.rows > 1 else ("outer",):
        there = replace(axis, order=order)
        rows, others = there.first(x, len(one)), there.first(y, len(two))
        if bool(((rows[[one.index(place) for place in two]] - others).abs() <= accuracy).all()):
            found.append(order)
    return found


def _function_axes(function: _Function, axes: Mapping[Key, BatchAxis | None], a: _Seen, b: _Seen) -> FunctionAxes:
    """The positions of the examples in the arguments and results of a function."""
    taken = {at: axes[function.argument(at)] for at in function.arguments}
    keys = [function.result(at) for at in range(function.results)]
    results = tuple(axes[key] for key in keys)
    is_mixing = any(
        axis is None and key in a.values and not _are_close(a.values[key], b.values[key], a.accuracies[key])
        for key, axis in zip(keys, results, strict=True)
    )
    return FunctionAxes(function.name, {at: axis for at, axis in taken.items() if axis is not None}, results, is_mixing)


def _are_close(one: Tensor, two: Tensor, accuracy: float) -> bool:
    return bool(((one - two).abs() <= accuracy).all())


def _axis(key: Key, a: _Seen, b: _Seen, one: list[int], two: list[int]) -> BatchAxis | None:
    """The axis whose size is proportional to the number of examples, with its properties."""
    shape, other = a.shapes[key], b.shapes[key]
    different = [at for at, (p, q) in enumerate(zip(shape, other, strict=False)) if p != q]
    what = f"{key[0]} has" if key[0] != _OUTPUTS else "the model's outputs have"
    if len(shape) != len(other) or len(different) > 1:
        raise NoBatchAxisError(
            f"{what} the shape {shape} for {len(one)} examples and {other} for {len(two)}, expected one axis whose size"
            " depends on the number of examples"
        )
    if not different:
        return None
    (axis,) = different
    if shape[axis] % len(one) or shape[axis] // len(one) * len(two) != other[axis]:
        raise NoBatchAxisError(
            f"{what} the shape {shape} for {len(one)} examples and {other} for {len(two)}, expected a multiple of"
            " the number of examples"
        )
    found = BatchAxis(axis, shape[axis] // len(one))
    fits = _fits(found, key, a, b, one, two)
    independent: bool | None = bool(fits)
    if (
        fits
        and key in a.coarse | b.coarse
        and _fits(found, key, a, b, one, two[::-1])
        and not _are_equal(a.values[key])
    ):
        independent = None
    return replace(
        found, order=fits[0] if len(fits) == 1 else "outer" if found.rows == 1 else None, independent=independent
    )


def _are_equal(values: Tensor) -> bool:
    """Whether all values are equal, so that they are consistent with any order of the examples."""
    return bool((values == values.flatten()[:1]).all())


def _is_own(error: Exception) -> bool:
    """Whether an error is a bug in this module, rather than the model's own for a different number of examples."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, (AttributeError, KeyError, NameError)) and frames[-1].filename == __file__


def _first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
