"""One forward pass that captures the layers' inputs and propagates vectors back to the layers' outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map

from lensor.curvature.batch_axes import BatchAxes, BatchAxis, Given, NoBatchAxisError, given_axis, only_axis
from lensor.curvature.data import Inputs, outputs_of
from lensor.curvature.graph import Node, Reached, inner_nodes, leading_to, tensors_in
from lensor.curvature.layers import Layer, require_known_layers
from lensor.curvature.trials import find_batch_axes
from lensor.curvature.watching import Preserving, Targets, Watch, aside, eagerly, uncast, undisturbed, widened
from lensor.curvature.writes import address, written
from lensor.nn.calls import LayerCall
from lensor.spec import ConvSpec, known_spec


@dataclass(eq=False)
class Use:
    """One call of a layer function with the layer's weight.

    Args:
        layer: the layer that owns the weight.
        call: the function's arguments, with an empty tensor in place of the input.
        weight: the weight's name.
        bias: the bias's name, or None if the call has no bias or the bias is not requested.
        batch: the number of examples.
        axis: the position of the examples in the input and output.
        shape: the output's shape.
    """

    layer: Layer
    call: LayerCall
    weight: str
    bias: str | None
    batch: int
    axis: BatchAxis
    shape: torch.Size

    @property
    def is_linear(self) -> bool:
        """Whether the call is a linear map, whose positions are all axes except those of the examples and features."""
        return self.call.kind == "linear"

    @property
    def groups(self) -> int:
        """Number of channel groups."""
        return self.call.groups

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The weight's shape in torch's layout."""
        return tuple(self.call.weight.shape)

    @property
    def weight_size(self) -> int:
        """The number of entries of the weight."""
        return self.call.weight.numel()

    def spec(self, x: Tensor) -> ConvSpec:
        """The convolution that the call computes, for an input [batch, channels, *positions]."""
        return self.call.spec(tuple(x.shape[2:]))

    def output_spec(self, gradient: Tensor) -> ConvSpec:
        """A convolution with the same output and kernel size 1; the output factor does not depend on the kernel."""
        kernel = () if gradient.ndim == 2 else 1
        channels = gradient.shape[1]
        return known_spec(channels, channels, tuple(gradient.shape[2:]), kernel, groups=self.groups)

    def as_examples(self, x: Tensor) -> Tensor:
        """A view of a linear map's input or output that treats every position as an example; the channels come last."""
        return x.movedim(1, -1).flatten(0, -2) if self.is_linear and x.ndim > 2 else x

    def as_convolution(self, x: Tensor) -> Tensor:
        """The input or output in the layout [batch, channels, *positions].

        A linear map has one axis of positions. If the first axis of a convolution holds several rows per example
        (frames), these become a spatial axis before the others.
        """
        x = self.axis.first(x, self.batch)
        if not self.is_linear:
            return x if self.axis.rows == 1 else x.movedim(1, 2)
        if x.ndim == 2:
            return x
        return x.flatten(1, -2).movedim(-1, 1)


OnInput = Callable[[Use, Tensor], None]


class Capture(Watch):
    """Watches one forward pass: reports each layer's input when the layer runs, and can later propagate vectors back.

    Args:
        targets: the parameters whose uses are captured.
        on_input: called with a use and its input [batch, channels, *positions] when the layer runs. Half-precision
            tensors are converted to single precision, here and for `on_output`.
        batch: the number of examples.
        axes: the position of the examples in the layers' inputs, from `Capture.batch_axes_of`.
        given: the batch_axis that the user specified.
        on_output: called with a use and the gradient at its output in every backward pass through the graph.
        ordered: whether the caller needs to know which rows belong to which example.
        independent: whether each example must be computed independently of the others, in the given order.
    """

    def __init__(
        self,
        targets: Targets,
        on_input: OnInput | None,
        batch: int,
        axes: BatchAxes | None,
        given: Given = None,
        on_output: OnInput | None = None,
        ordered: bool = True,
        independent: bool = True,
    ) -> None:
        super().__init__(targets)
        self.on_input, self.batch, self.batch_axes, self.given = on_input, batch, axes, given
        self.on_output, self.ordered, self.independent, self.recorded = on_output, ordered, independent, True
        self.uses: list[Use] = []
        self._edges: dict[Use, GradientEdge] = {}
        self._nodes: dict[Use, set[Node]] = {}
        self._kept: dict[Use, set[Node]] = {}
        self._counts: dict[str, int] = {}
        self._others: dict[str, str] = {}
        self._reached: Reached | None = None

    @staticmethod
    def batch_axes_of(
        model: nn.Module, inputs: Inputs, targets: Targets, batch: int, given: Given, remember: bool = False
    ) -> BatchAxes | None:
        """The batch axes of a model, or None if the user specified the batch axis; see `find_batch_axes`.

        Raises:
            ValueError: if the batch axes cannot be found, or if the user specified one for an unknown layer.
        """
        if isinstance(given, Mapping):
            require_known_layers(given, model)
        elif given is not None:
            return None
        try:
            return find_batch_axes(model, inputs, targets, batch, remember)
        except NoBatchAxisError as error:
            if given is not None:
                return None
            raise ValueError(
                f"the axis of the examples cannot be found: {error}; give it with batch_axis=: an axis, 'outer' or"
                " 'inner' (if the examples share the first axis with other rows), or a mapping from layers to these"
            ) from error

    def by_parameter(self, biases: bool = False) -> dict[str, list[Use]]:
        """A mapping from the name of every weight (or bias) to its uses."""
        found: dict[str, list[Use]] = {}
        for use in self.uses:
            name = use.bias if biases else use.weight
            if name is not None:
                found.setdefault(name, []).append(use)
        return found

    # ------------------------------------------------------------------------------------------------------- watching
    def on_layer(self, call: LayerCall, run: Callable[[], Tensor]) -> Tensor:
        """Run the layer's function, pass its input on, and record the graph node of its output."""
        name, layer = self.targets.weights[id(call.weight)]
        out = run()
        for tensor in (call.input, out):
            if tensor.is_complex():
                raise ValueError(f"layer {layer.name!r} has a complex input or output, expected real ones")
        number = self._counts[name] = self._counts.get(name, -1) + 1
        bias = None if call.bias is None else self.targets.biases.get(id(call.bias))
        x = call.input.detach()
        without = replace(call, input=torch.empty((), dtype=x.dtype, device=x.device))  # a use must not hold the input
        use = Use(layer, without, name, bias, self.batch, self._axis(call, layer, (name, number), out), out.shape)
        parameters = [call.weight] if bias is None or call.bias is None else [call.weight, call.bias]
        self._nodes[use] = inner_nodes(out, (call.input, call.weight, call.bias), parameters)
        self._kept[use] = leading_to(self._nodes[use], parameters) - {out.grad_fn}
        with computing(x):
            self._take_input(use, use.as_convolution(widened(x)))
        if not out.requires_grad and torch.is_grad_enabled():  # everything before this layer is frozen
            out = out.detach().requires_grad_().clone()  # the next function may write into it, but not into a leaf
        elif out._is_view():
            # An in-place write would remove a view from the graph; it does not remove other tensors that share memory.
            out = torch.ops.aten._unsafe_view(out, out.shape)
        if out.requires_grad:
            self._edges[use] = get_gradient_edge(out)
            if self.on_output is not None:
                out.register_hook(_telling(use, self.on_output))
        self.uses.append(use)
        return out

    def _take_input(self, use: Use, x: Tensor) -> None:
        """Receive a layer's input."""
        if self.on_input is not None:
            self.on_input(use, x)

    def _axis(self, call: LayerCall, layer: Layer, key: tuple[str, int], out: Tensor) -> BatchAxis:
        """The position of the examples in the input of a call.

        Raises:
            ValueError: if the position is unknown or impossible for the layer.
        """
        x, batch = call.input, self.batch
        shape = tuple(x.shape)
        found = given_axis(self.given, layer.name, shape, batch)
        if found is None and self.batch_axes is not None and self.batch_axes.calls is None:
            found = only_axis(shape, batch) if x.ndim else None
        elif found is None and self.batch_axes is not None and self.batch_axes.calls is not None:
            if key not in self.batch_axes.calls or self.batch_axes.calls[key][0] != x.ndim:
                raise ValueError(
                    f"layer {layer.name!r} has an input of shape {shape} that did not occur in the trial pass: if the"
                    " model's passes differ, specify batch_axis="
                )
            found = self.batch_axes.calls[key][1]
            if found is None:
                raise ValueError(
                    f"layer {layer.name!r} has an input of shape {shape} that does not depend on the number of"
                    f" examples, expected a batch of {batch} examples: leave the layer out with layers="
                )
        if found is None:
            raise ValueError(f"batch_axis has no axis for the input of layer {layer.name!r}, expected one")
        dims = 1 if call.kind == "linear" else call.dims + 1
        low = 0 if call.kind != "linear" else x.ndim - 2
        if 0 in shape and batch:
            raise ValueError(f"layer {layer.name!r} has an empty input of shape {shape}, expected at least one entry")
        if x.ndim < dims + 1 or not 0 <= found.axis <= low:
            expected = (
                "examples before the features"
                if call.kind == "linear"
                else (f"a batch of {batch} examples first, then channels and {call.dims} spatial axes")
            )
            raise ValueError(f"layer {layer.name!r} has an input of shape {shape}, expected {expected}")
        if shape[found.axis] != found.rows * batch or out.shape[found.axis] != shape[found.axis]:
            raise ValueError(
                f"layer {layer.name!r} has an input of shape {shape}, expected {found.rows} × {batch} examples along"
                f" axis {found.axis}"
            )
        if not found.independent and self.independent:
            raise ValueError(
                f"layer {layer.name!r} has an input in which the rows of an example depend on the other examples, on"
                " their order or on random numbers, or are indistinguishable in half precision, expected a model that"
                " treats every example alike: if it does, give the position of the examples with batch_axis="
            )
        if found.order is None and self.ordered:
            raise ValueError(
                f"layer {layer.name!r} has an input of shape {shape} with {found.rows} rows for each of {batch}"
                " examples, whose order cannot be found: give 'outer' or 'inner' with batch_axis="
            )
        return found

    def on_other(self, name: str, function: str) -> None:
        """Record that another function uses a parameter."""
        self._others.setdefault(name, function)

    # -------------------------------------------------------------------------------------------------------- checking
    def check(self, roots: Any, shared: bool = False) -> None:
        """Raise unless every use of the parameters is captured.

        Args:
            roots: the ends of the graph: the outputs, or the loss.
            shared: whether layers may run more than once.

        Raises:
            ValueError: if a layer did not run, if one ran twice (unless `shared`), or if a function other than the
                layer's own used a parameter.
        """
        others = {name: how for name, how in self._others.items() if not self._has_graph(name)}
        self._reached = Reached(tensors_in(roots))
        known = {node for nodes in self._nodes.values() for node in nodes}
        for name, parameter in self.targets.parameters.items():
            strangers: list[Node] = [node for node in self._reached.users(parameter) if node not in known]
            if strangers:
                others[name] = self._others.get(name) or str(strangers[0].name())
        for use, nodes in self._kept.items():
            # Code outside the layer may use a tensor that the layer's call computed from a parameter (a transpose, a
            # cast).
            for node in nodes:
                strangers = [one for one in self._reached.consumers.get(node, ()) if one not in known]
                if strangers:
                    others.setdefault(use.weight, str(strangers[0].name()))
        self._require_alone(others)
        self._require_running()
        if shared:
            return
        for name, uses in self.by_parameter().items():
            if len(uses) > 1:
                raise ValueError(
                    f"layer {uses[0].layer.name!r} runs twice in one forward pass, or its weight {name!r} is shared,"
                    " which is not supported here"
                )
        for use in self.uses:
            if use.bias != use.layer.bias and (use.layer.bias is not None or use.bias is not None):
                raise ValueError(
                    f"layer {use.layer.name!r} was called with bias {use.bias!r}, expected its own, {use.layer.bias!r}"
                )

    def _require_alone(self, others: Mapping[str, str]) -> None:
        """Raise ValueError if other functions use parameters of layers; `others` contains the names of both."""
        if others:
            name, how = next(iter(others.items()))
            layer = self.targets.owners[name]
            raise ValueError(
                f"parameter {name!r} of layer {layer.name!r} is also used outside of the layer, by {how}, expected"
                f" calls of the layer's own function only: leave the layer out with layers="
            )

    def _require_running(self, used: Iterable[str] = ()) -> None:
        """Raise ValueError if a layer did not run, unless another function used its weight."""
        ran = {use.weight for use in self.uses}.union(used)
        idle = [layer.name for name, layer in self.targets.weights.values() if name not in ran]
        if idle:
            raise ValueError(
                f"these layers did not run on the data of a batch: {_listed(idle)}; leave them out with layers="
            )

    def _has_graph(self, name: str) -> bool:
        """Whether the graph contains uses of a parameter."""
        return self.targets.parameters[name].requires_grad and self.recorded

    def require_gradients(self, uses: Iterable[Use]) -> None:
        """Raise for layers whose output gradients are not available.

        Raises:
            ValueError: if there are such layers; the message names them.
        """
        missing = [use.layer.name for use in uses if use not in self._edges]
        if missing:
            raise ValueError(
                "calls with the weights of these layers ran where gradients are not recorded (torch.no_grad, or a"
                f" checkpoint with use_reentrant=True): {_listed(missing)}; leave them out with layers="
            )

    # ------------------------------------------------------------------------------------------------------- gradients
    def gradients(
        self, outputs: Tensor, vector: Tensor, keep: bool, again: bool = False, only: Use | None = None
    ) -> dict[Use, Tensor]:
        """Propagate a vector at the outputs to the output of every use, as [batch, channels, *positions].

        Args:
            outputs: the model's outputs, or a value computed from them.
            vector: a tensor of the same shape.
            keep: whether the graph is needed again.
            again: whether the result will be differentiated.
            only: the only use to propagate to; all uses unless given.
        """
        uses = self.uses if only is None else [only]
        self.require_gradients(uses)
        edges = [self._edges[use] for use in uses] + (self._more_edges() if only is None else [])
        found = self._differentiated(outputs, edges, vector, keep, again)
        result: dict[Any, Any] = self._more_gradients(found[len(uses) :]) if only is None else {}
        for use, gradient in zip(uses, found[: len(uses)], strict=True):
            if gradient is None:
                self._require_unused(use)
                gradient = vector.new_zeros(use.shape)
            result[use] = use.as_convolution(widened(gradient))
        return result

    def _differentiated(
        self, outputs: Tensor, edges: Sequence[GradientEdge], vector: Tensor | None, keep: bool, again: bool
    ) -> Sequence[Tensor | None]:
        """The gradients at some edges, with errors that name the cause."""
        try:
            return torch.autograd.grad(outputs, edges, vector, retain_graph=keep, create_graph=again, allow_unused=True)
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                raise ValueError(
                    "gradients cannot be propagated to the layers' outputs: the model writes in place into values that"
                    " the gradient needs, which torch allows after frozen layers; leave these out with layers="
                ) from error
            if "use_reentrant" not in str(error):
                raise
            raise ValueError(
                "a part of the model is checkpointed with use_reentrant=True, which does not support gradients of"
                " single tensors: pass use_reentrant=False to torch.utils.checkpoint"
            ) from error

    def _more_edges(self) -> list[GradientEdge]:
        """Edges of the graph besides those of the layers' outputs."""
        return []

    def _more_gradients(self, found: Sequence[Tensor | None]) -> dict[Any, Any]:
        """The entries of `gradients` for these edges."""
        return {}

    def _require_unused(self, use: Use) -> None:
        """Raise if a layer's output was replaced in the graph: its gradient is then unknown, not zero."""
        reached = self._reached.nodes if self._reached is not None else set()
        if self._edges[use].node not in reached and any(node in reached for node in self._nodes[use]):
            raise ValueError(
                f"the output of layer {use.layer.name!r} was replaced after the layer ran, expected a model that uses"
                " this output: the gradient of a replaced output is not available"
            )


class KeptInputs(Capture):
    """A capture that stores the layers' inputs; those that later functions write into are copied before."""

    def __init__(self, targets: Targets, batch: int, axes: BatchAxes | None, given: Given) -> None:
        super().__init__(targets, None, batch, axes, given)
        self.inputs: dict[Use, Tensor] = {}
        self._versions: dict[Use, int] = {}
        self._in_memory: dict[int, list[Use]] = {}

    # A method, not `on_input`: an object that holds its own bound method is freed by the garbage collector only.
    def _take_input(self, use: Use, x: Tensor) -> None:
        self.inputs[use], self._versions[use] = x, x._version
        self._in_memory.setdefault(address(x), []).append(use)

    def call(self, function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        """Call a function and return its result."""
        for tensor in written(function, arguments, named):
            if isinstance(tensor, Tensor):
                for use in self._in_memory.pop(address(tensor), ()):
                    copied = self.inputs[use].clone()
                    self.inputs[use], self._versions[use] = copied, copied._version
        return super().call(function, arguments, named)

    def check(self, roots: Any, shared: bool = False) -> None:
        """As for `Capture`; raises ValueError, too, if code that cannot be watched wrote into a layer's input."""
        super().check(roots, shared)
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        """Raise ValueError if a layer's input has other values than when the layer ran."""
        for use, version in self._versions.items():
            if self.inputs[use]._version != version:
                raise ValueError(
                    f"the input of layer {use.layer.name!r} was changed in place by code that cannot be watched,"
                    " expected functions of torch: leave the layer out with layers="
                )

    def spec(self, use: Use) -> ConvSpec:
        """The convolution that a use computes."""
        return use.spec(self.inputs[use])


@contextmanager
def computing(like: Tensor) -> Iterator[None]:
    """Compute without recording gradients and without casts by `torch.autocast`."""
    with torch.no_grad(), uncast(like):
        yield


def own(inputs: Any) -> Any:
    """Clone tensors created under `torch.inference_mode`, so that gradients can pass through them."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) and x.is_inference() else x, inputs)


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Run a model uncompiled within the `with` block, and restore its tensors afterwards."""
    with torch.inference_mode(False), eagerly(), aside(), undisturbed(model):
        yield


def run(model: nn.Module, inputs: Inputs, capture: Capture, record: bool = True) -> Any:
    """Run the model and return what it returns.

    Args:
        model: the model.
        inputs: the inputs that it is called with.
        capture: the capture that watches the call.
        record: whether gradients are recorded.
    """
    capture.recorded = record
    with torch.set_grad_enabled(record), Preserving(), capture:
        return outputs_of(model, inputs)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and DistributedDataParallel wrappers; parameter names refer to this model."""
    while isinstance(model, nn.Module):
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules and type(model).__name__ == "OptimizedModule":
            model = model._modules["_orig_mod"]  # pyright: ignore[reportAssignmentType]
        else:
            break
    return model


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name or "(the model)" for name in names)


def _telling(use: Use, on_output: OnInput) -> Callable[[Tensor], None]:
    """A tensor hook. It must not refer to the Capture, whose graph holds the hook: such a cycle is never freed."""

    def hook(gradient: Tensor) -> None:
        with computing(gradient):
            on_output(use, use.as_convolution(widened(gradient)))

    return hook
