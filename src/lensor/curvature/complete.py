"""A capture of all parameters: of layers, and of any other function that takes parameters."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lensor.curvature.batch_axes import BatchAxes, BatchAxis, FunctionAxes, Given, given_axis
from lensor.curvature.capture import KeptInputs, Use, computing
from lensor.curvature.data import Inputs, over_positions
from lensor.curvature.example_gradients import sum_of, weight_gradients, zeros_of
from lensor.curvature.flow import Flow, with_examples
from lensor.curvature.functions import FunctionUse, Output, Source
from lensor.curvature.graph import Node, Reached, gradients_for_each, inner_nodes, innermost, tensors_in
from lensor.curvature.tracing import random_draws
from lensor.curvature.watching import Targets, is_use, require_unmapped, widened
from lensor.curvature.writes import results_of, written
from lensor.nn.calls import LayerCall

WHOLE = "whole"
"""The key of the gradients by parameter in the result of `CompleteCapture.gradients` for a single example."""


class _Ear:
    """What hooks on outputs tell: a place in the list of uses, an output's number and its gradient.

    The hooks must not refer to the uses, whose tensors refer to the graph that holds the hooks: such a cycle is never
    freed.
    """

    def __init__(self) -> None:
        self.receive: Callable[[int, int, Tensor], None] | None = None

    def hook(self, place: int, number: int) -> Callable[[Tensor], None]:
        """A hook for an output of the use at a place."""

        def hook(gradient: Tensor) -> None:
            if self.receive is not None:
                self.receive(place, number, gradient)

        return hook


class CompleteCapture(KeptInputs):
    """A capture that also follows the parameters through other functions than those of layers.

    The result of a function of parameters only (a derived tensor) is treated like a parameter: the gradients of single
    examples with respect to it are propagated to the parameters at the end. A function whose result depends on the
    examples is kept as a `FunctionUse`.

    Args:
        targets: the parameters.
        inputs: the inputs of the model.
        batch: the number of examples.
        axes: as for `Capture`.
        given: as for `Capture`.
        take: if given, it receives every input of a layer, and returns whether the input does not have to be kept.
        ordered: as for `Capture`, for the inputs of layers.
        independent: as for `Capture`, for the inputs of layers.
        whole: whether the gradient of a batch of one example may be computed as a whole, without the uses of layers.
    """

    def __init__(
        self,
        targets: Targets,
        inputs: Inputs,
        batch: int,
        axes: BatchAxes | None,
        given: Given,
        take: Callable[[Use, Tensor], bool] | None = None,
        ordered: bool = True,
        independent: bool = True,
        whole: bool = True,
    ) -> None:
        super().__init__(targets, batch, axes, given)
        self.ordered, self.independent, self._take = ordered, independent, take
        self.is_single = whole and batch == 1 and all(one.requires_grad for one in targets.parameters.values())
        """Whether the gradient of the batch is that of its only example, so that no function has to be watched."""
        leaves = tree_leaves(inputs)
        marks = with_examples(leaves, batch)
        examples = [leaf for leaf, mark in zip(leaves, marks, strict=True) if mark]
        self.flow: Flow = Flow(targets.parameters.values(), examples)
        self.functions: list[FunctionUse] = []
        self._derived: dict[int, Tensor] = {}
        self._known: set[Node] = set()
        self._used: set[str] = set()
        self._seen = 0
        self._ear = _Ear()
        self._everything: list[Use | FunctionUse] = []

    # ------------------------------------------------------------------------------------------------------- watching
    def _take_input(self, use: Use, x: Tensor) -> None:
        if self._take is None or not self._take(use, x):
            super()._take_input(use, x)

    @property
    def used(self) -> frozenset[str]:
        """The parameters that functions other than a layer's own used."""
        return frozenset(self._used)

    def on_layer(self, call: LayerCall, run: Callable[[], Tensor]) -> Tensor:
        """Run a layer's function, as a function of parameters only if its input does not depend on the examples."""
        name = self.targets.weights[id(call.weight)][0]
        if self.is_single:
            self._used.add(name)
            return run()
        key = name, self._counts.get(name, -1) + 1
        calls = None if self.batch_axes is None else self.batch_axes.calls
        if calls is None:
            depends = self.flow.comes_from_examples(call.input)
        else:
            depends = key not in calls or calls[key][1] is not None
        if depends:
            out = super().on_layer(call, run)
            self._listen(self.uses[-1], [out] if out.requires_grad else [])
            return out
        self._counts[name] = key[1]
        out = run()
        self._add_derived([call.input, call.weight, call.bias], [out])
        return out

    def on_function(self, function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        """Run a function, and keep it if it takes parameters and returns a result that depends on the examples."""
        if self.is_single:
            self._used |= {
                self.targets.names[id(one)]
                for one in tree_leaves((tuple(arguments), named))
                if id(one) in self.targets.names
            }
            return self.call(function, arguments, named)
        leaves, tree = tree_flatten((tuple(arguments), named))
        if not any(self.flow.comes_from_parameters(leaf) for leaf in leaves):
            return self.call(function, arguments, named)
        axes = self._axes_of(function)
        places = [at for at, leaf in enumerate(leaves) if self._is_source(leaf)]
        if axes is not None:
            depends = any(axis is not None for axis in axes.results) or axes.is_mixing
        else:
            depends = any(self.flow.comes_from_examples(leaf) for leaf in leaves)
        if not places or not depends or not torch.is_grad_enabled():
            result = self.call(function, arguments, named)
            if places:
                self._add_derived(leaves, results_of(function, arguments, named, result))
            self._note_frozen(function, [leaves[at] for at in places], result)
            return result
        for leaf in leaves:
            require_unmapped(leaf, f"the function {getattr(function, '__name__', function)}, which takes parameters,")
        return self._run(function, leaves, tree, places, axes)

    def _run(
        self,
        function: Callable[..., Any],
        leaves: list[Any],
        tree: Any,
        places: Sequence[int],
        axes: FunctionAxes | None,
    ) -> Any:
        """Run a function on views of the parameters, and keep what its gradients need."""
        sources = [Source(leaves[at], leaves[at].view_as(leaves[at]), at) for at in places]
        passed = list(leaves)
        for source in sources:
            passed[source.place] = source.alias
        kept = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        versions = {at: leaf._version for at, leaf in enumerate(kept) if isinstance(leaf, Tensor)}
        arguments, named = tree_unflatten(passed, tree)
        writes = bool(written(function, arguments, named))
        draws = random_draws()
        result = self.call(function, arguments, named)
        self._note_frozen(function, [source.tensor for source in sources], result)
        outputs = results_of(function, arguments, named, result)
        if axes is not None and len(axes.results) != len(outputs):
            raise ValueError(self._differs(function))
        found = [
            Output(get_gradient_edge(out), self._axis_of(out, at, axes, function), out.shape, out.dtype, out.device)
            for at, out in enumerate(outputs)
            if out.requires_grad
        ]
        if not found:
            return result
        if axes is not None and axes.is_mixing:
            raise ValueError(
                f"the function {axes.name} takes the parameter {self._name_of(sources[0].tensor)} and returns a value"
                " that depends on all examples together, expected a model that treats every example alike: leave the"
                " module out with layers="
            )
        can_rerun = not writes and random_draws() == draws
        self.functions.append(
            FunctionUse(
                function,
                kept,
                tree,
                versions,
                None if axes is None else axes.arguments,
                sources,
                found,
                self.batch,
                can_rerun,
            )
        )
        self._listen(self.functions[-1], [out for out in outputs if out.requires_grad])
        self._known |= {source.alias.grad_fn for source in sources}
        self._used |= {
            self.targets.names[key] for source in sources if (key := id(source.tensor)) in self.targets.names
        }
        return result

    def _listen(self, use: Use | FunctionUse, outputs: Sequence[Tensor]) -> None:
        for number, out in enumerate(outputs):
            out.register_hook(self._ear.hook(len(self._everything), number))
        self._everything.append(use)

    def _note_frozen(self, function: Callable[..., Any], sources: Sequence[Tensor], result: Any) -> None:
        """Record that a function uses a frozen parameter of a layer, for which autograd does not record its calls."""
        for source in sources:
            if not source.requires_grad and is_use(function, source, result):
                self._others.setdefault(self.targets.names[id(source)], getattr(function, "__name__", str(function)))

    def _axes_of(self, function: Callable[..., Any]) -> FunctionAxes | None:
        """The positions of the examples for the next function, from the trial passes."""
        place, self._seen = self._seen, self._seen + 1
        known = None if self.batch_axes is None else self.batch_axes.functions
        if known is None:
            return None
        if place >= len(known) or known[place].name != getattr(function, "__name__", str(function)):
            raise ValueError(self._differs(function))
        return known[place]

    def _differs(self, function: Callable[..., Any]) -> str:
        name = getattr(function, "__name__", str(function))
        return (
            f"the function {name} did not occur like this in the trial pass: if the model's passes differ, specify"
            " batch_axis="
        )

    def _axis_of(
        self, out: Tensor, place: int, axes: FunctionAxes | None, function: Callable[..., Any]
    ) -> BatchAxis | None:
        """The position of the examples in a result."""
        name, shape = getattr(function, "__name__", str(function)), tuple(out.shape)
        if self.batch < 2:
            return BatchAxis(0, len(out)) if out.ndim else None
        if axes is not None:
            found = axes.results[place]
        elif isinstance(self.given, Mapping) or self.given is None:
            found = None
        else:
            found = given_axis(self.given, name, shape, self.batch)
        if found is not None and not found.independent:
            raise ValueError(
                f"the function {name} takes parameters and returns a tensor of shape {shape}, in which the rows of an"
                " example depend on the other examples, on their order or on random numbers, expected a model that"
                " treats every example alike: leave the module out with layers="
            )
        return found

    def _is_source(self, leaf: Any) -> bool:
        return id(leaf) in self.targets.names or id(leaf) in self._derived

    def _add_derived(self, leaves: Sequence[Any], results: Sequence[Tensor]) -> None:
        """Record the results of a function of parameters only."""
        sources = [leaf for leaf in leaves if self._is_source(leaf)]
        self._used |= {self.targets.names[id(source)] for source in sources if id(source) in self.targets.names}
        for one in results:
            if one.requires_grad and id(one) not in self.targets.names:
                self._derived[id(one)] = one
                self._known |= inner_nodes(one, leaves, sources)

    def _name_of(self, tensor: Tensor) -> str:
        return repr(self.targets.names.get(id(tensor), "(computed from parameters)"))

    # -------------------------------------------------------------------------------------------------------- checking
    def check(self, roots: Any, shared: bool = False) -> None:
        """Raise unless every use of the parameters is captured.

        Args:
            roots: the ends of the graph: the outputs, or the loss.
            shared: whether layers may run more than once.

        Raises:
            ValueError: if a layer did not run, if a function that cannot be watched used a parameter, or if a function
                other than the layer's used a frozen one.
        """
        self._require_unchanged()
        self._require_running(self._used)
        if self.is_single:
            return
        self._require_alone(self._others)
        self._reached = Reached(tensors_in(roots))
        known = self._known.union(*self._nodes.values())
        for name, parameter in self.targets.parameters.items():
            found: list[Node] = [node for node in self._reached.users(parameter) if node not in known]
            self._require_known(name, found)
        aliases = {source.alias.grad_fn for use in self.functions for source in use.sources}
        groups = [("", (self._known & self._reached.nodes) - aliases)]
        groups += [(use.weight, nodes) for use, nodes in self._kept.items()]
        for name, nodes in groups:
            for node in nodes:
                self._require_known(name, [one for one in self._reached.consumers.get(node, ()) if one not in known])

    def _require_known(self, name: str, strangers: Sequence[Node]) -> None:
        if strangers:
            what = f"parameter {name!r}" if name else "a tensor that was computed from parameters"
            if name in self.targets.owners:
                layer = self.targets.owners[name].name
                what = f"parameter {name!r} of layer {layer!r} is also used outside of the layer: it"
            raise ValueError(
                f"{what} is used by {strangers[0].name()}, which cannot be watched (a custom function of autograd, a"
                " gradient that the model computes, or a part of the loss), expected functions of torch inside the"
                " model: leave the module out with layers="
            )

    # ------------------------------------------------------------------------------------------------------- gradients
    def gradients(
        self, outputs: Tensor, vector: Tensor, keep: bool, again: bool = False, only: Use | None = None
    ) -> dict[Any, Any]:
        """As for `Capture`; the entries of functions are lists of one gradient, or None, for each output."""
        if self.is_single:
            return {WHOLE: self.whole(outputs, vector)}
        return super().gradients(outputs, vector, keep or bool(self.functions), again, only)

    def propagate(self, value: Tensor, keep: bool, receive: Callable[[Use | FunctionUse, int, Tensor], None]) -> None:
        """Propagate the gradient of a number, and pass on each gradient at an output of a use as soon as it is known.

        Args:
            value: the number.
            keep: whether the graph is needed again.
            receive: takes the use, the number of its output, and the gradient: for a layer, as from `gradients`.
        """
        self.require_gradients(self.uses)
        edges = [self._edges[use] for use in self.uses] + self._more_edges()
        ends = innermost([value], {edge.node for edge in edges})
        heard: set[int] = set()

        def received(place: int, number: int, gradient: Tensor) -> None:
            use = self._everything[place]
            heard.add(place)
            self._ear.receive = None  # a backward pass inside of this one is not meant
            with computing(gradient):
                receive(use, number, use.as_convolution(widened(gradient)) if isinstance(use, Use) else gradient)
            self._ear.receive = received

        self._ear.receive = received
        try:
            wanted = [edge for edge in edges if edge.node in ends]
            if wanted:
                self._differentiated(value, wanted, None, keep, False)  # a vector would import sympy
        finally:
            self._ear.receive = None
        for place, use in enumerate(self._everything):
            if place in heard:
                continue
            if isinstance(use, Use):
                self._require_unused(use)
            else:
                self._require_unreached(use)

    def whole(self, outputs: Tensor, vector: Tensor) -> dict[str, Tensor]:
        """The gradient of a batch of one example, [1, *shape] for each parameter."""
        parameters = self.targets.parameters
        found = torch.autograd.grad(
            outputs, list(parameters.values()), vector, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return {
            name: widened(gradient.to_dense() if gradient.is_sparse else gradient)[None]
            for name, gradient in zip(parameters, found, strict=True)
        }

    def _more_edges(self) -> list[GradientEdge]:
        return [output.edge for use in self.functions for output in use.outputs]

    def _more_gradients(self, found: Sequence[Tensor | None]) -> dict[Any, Any]:
        """The gradients at the outputs of functions, by use."""
        rest, result = list(found), {}
        for use in self.functions:
            mine, rest = rest[: len(use.outputs)], rest[len(use.outputs) :]
            if all(one is None for one in mine):
                self._require_unreached(use)
            else:
                result[use] = mine
        return result

    def _require_unreached(self, use: FunctionUse) -> None:
        """Raise if the graph contains a function whose result was replaced: its gradient is then unknown, not zero."""
        reached = self._reached.nodes if self._reached is not None else set()
        if any(source.alias.grad_fn in reached for source in use.sources):
            raise ValueError(
                f"a result of the function {use.name}, which takes the parameter"
                f" {self._name_of(use.sources[0].tensor)}, was replaced, expected a model that uses this result: the"
                " gradient of a replaced result is not available"
            )

    def of_functions(self, vectors: Mapping[Any, Any], factors: Tensor | None = None) -> dict[str, Tensor]:
        """The gradients of every example, [batch, *shape], as far as they come from functions other than layers'.

        Args:
            vectors: the gradients at the outputs of the uses, from `gradients`.
            factors: if given, the result is the sum over the examples of their gradients times these, [*shape].
        """
        found: dict[int, Tensor] = {}
        for use in self.functions:
            if use in vectors:
                parts = use.gradients(vectors[use]) if factors is None else use.weighted_sum(vectors[use], factors)
                self.add(found, use, parts)
        return self.by_name(found, batched=factors is None)

    def of_examples(
        self, vectors: Mapping[Any, Any], others: Mapping[str, Tensor], without: Container[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the gradient of every example, [batch, *shape], for each parameter.

        Args:
            vectors: the gradients at the outputs of the uses.
            others: the result of `of_functions` for these vectors.
            without: names to leave out.
        """
        weights, biases = self.by_parameter(), self.by_parameter(True)
        for name, parameter in self.targets.parameters.items():
            if name in without:
                continue
            if WHOLE in vectors:
                yield name, vectors[WHOLE][name]
                continue
            parts = [others[name]] if name in others else []
            if name in weights:
                parts.append(weight_gradients(self, weights[name], vectors))
            if name in biases:
                parts.append(sum_of(over_positions(vectors[use]) for use in biases[name]))
            yield name, sum_of(parts) if parts else zeros_of(parameter, self.batch)

    def add(self, found: dict[int, Tensor], use: FunctionUse, parts: Sequence[Tensor]) -> None:
        """Add gradients with respect to the sources of a use to a mapping by the sources' identities."""
        for source, gradient in zip(use.sources, parts, strict=True):
            key = id(source.tensor)
            found[key] = found[key] + gradient if key in found else gradient

    def by_name(self, found: Mapping[int, Tensor], batched: bool) -> dict[str, Tensor]:
        """The gradients by parameter, with those of derived tensors propagated to the parameters.

        Args:
            found: gradients by the identity of a parameter or a derived tensor.
            batched: whether they are those of every example, [batch, *shape].
        """
        names = self.targets.names
        named = {names[key]: gradient for key, gradient in found.items() if key in names}
        derived = [(self._derived[key], gradient) for key, gradient in found.items() if key not in names]
        if derived:
            parameters = {name: one for name, one in self.targets.parameters.items() if one.requires_grad}
            through = self._through(derived, list(parameters.values()), batched)
            for name, gradient in zip(parameters, through, strict=True):
                if gradient is not None:
                    named[name] = named[name] + gradient if name in named else gradient
        return named

    def _through(
        self, derived: Sequence[tuple[Tensor, Tensor]], parameters: Sequence[Tensor], batched: bool
    ) -> Sequence[Tensor | None]:
        """Propagate gradients from derived tensors to parameters: those of every example if `batched`."""
        tensors = [tensor for tensor, _ in derived]
        gradients = [gradient.to(tensor.dtype) for tensor, gradient in derived]
        if batched:
            return gradients_for_each(tensors, parameters, gradients)
        return torch.autograd.grad(tensors, parameters, gradients, retain_graph=True, allow_unused=True)
