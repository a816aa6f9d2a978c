"""Functions that are traced into a graph of torch's operators and compiled.

The graph is divided into two parts. The second part contains what depends on the `late` arguments, so that it can run
several times for one run of the first part: backward passes for several vectors after one forward pass.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lensor.choices import Compiler
from lensor.curvature.graph import tensors_in
from lensor.curvature.tracing import draws, untraced
from lensor.curvature.watching import preserve
from lensor.kernels.torch.operator import tracing


def _by_inductor(graph: fx.GraphModule, examples: list[Any]) -> Any:
    return torch._inductor.compile(graph, examples)


_COMPILERS: dict[Compiler, Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]] = {
    "inductor": _by_inductor,
    "eager": lambda graph, _: graph,
}


class Traced:
    """A function as a compiled graph, which is traced and run within `undisturbed`.

    Args:
        function: a function of two trees of tensors that returns two trees of tensors, the first of which does not
            depend on the second argument. Parameters and other tensors that it reads become inputs of the graph, so
            that it sees later changes of their values.
        early: the first argument.
        late: the second argument.
        compiler: how the graph runs.
        known: objects that exist before; parameters that are not among them were made in the pass, from values.

    Raises:
        ValueError: if the function cannot be traced, for example because it depends on the values of tensors.
    """

    def __init__(
        self,
        function: Callable[[Any, Any], tuple[Any, Any]],
        early: Any,
        late: Any = (),
        compiler: Compiler = "inductor",
        known: Iterable[Any] = (),
    ) -> None:
        late = tree_map(_contiguous, late)
        given, tree = tree_flatten((early, late))
        places = [at for at, leaf in enumerate(given) if isinstance(leaf, Tensor)]
        count = sum(isinstance(leaf, Tensor) for leaf in tree_flatten(early)[0])
        self._trees: list[Any] = []
        self._sizes: list[int] = []
        self._strides: list[tuple[int, ...]] = []

        def flat(*tensors: Tensor) -> list[Tensor]:
            leaves = list(given)
            for at, tensor in zip(places, tensors, strict=True):
                leaves[at] = tensor
            parts = [tree_flatten(part) for part in function(*tree_unflatten(leaves, tree))]
            self._trees = [tree for _, tree in parts]
            self._sizes = [len(leaves) for leaves, _ in parts]
            return [leaf for leaves, _ in parts for leaf in leaves]

        # One tensor in two places of the arguments must become two inputs.
        tensors: list[Any] = [_plain(given[at]).detach().requires_grad_(given[at].requires_grad) for at in places]
        _require_known(given)
        with tracing() as self._plans:
            made = _graph_of(flat, tensors)
        first, second, self._kept, self._written = _divided(made, count, self._sizes[0])
        ids = set(map(id, known))
        if any(isinstance(one, torch.nn.Parameter) and id(one) not in ids for kept in self._kept for one in kept):
            raise ValueError(
                "the pass cannot be traced into one graph, expected a forward pass that makes no parameters"
            )
        preserve(self._written)
        with _plainly([*tensors, *self._kept[0]]):
            inputs = [*tensors[:count], *self._kept[0]]
            found = list(_checked(first, inputs))
            self._run = _COMPILERS[compiler](first, inputs)
            if self._sizes[1]:
                between = found[self._sizes[0] :]
                self._strides = [one.stride() for one in between]
                inputs = [*tensors[count:], *self._kept[1], *between]
                _checked(second, inputs)
                if compiler == "eager":
                    self._then = _releasing(second, len(between))
                else:
                    self._then = _unpacked(_COMPILERS[compiler](second, inputs))

    def run(self, early: Any) -> tuple[Any, list[Tensor]]:
        """The first tree, and the tensors that `then` needs."""
        tensors = [_plain(leaf) for leaf in tree_flatten(early)[0] if isinstance(leaf, Tensor)]
        preserve(self._written)
        with _plainly([*tensors, *self._kept[0]]):
            found = list(self._run(*tensors, *self._kept[0]))
        size = self._sizes[0]
        between = [_in_format(*one) for one in zip(found[size:], self._strides, strict=True)]
        return tree_unflatten(found[:size], self._trees[0]), between

    def then(self, late: Any, between: list[Tensor], is_last: bool = True) -> Any:
        """The second tree; the last call may release tensors that it does not need any more, and empties the list."""
        tensors = [leaf.contiguous() for leaf in tree_flatten(late)[0] if isinstance(leaf, Tensor)]
        given = [*tensors, *self._kept[1]]
        with _plainly(given):
            found = list(self._then(*given, between if is_last else list(between)))
        if is_last:
            between.clear()
        return tree_unflatten(found, self._trees[1])


def _unpacked(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes its last arguments as a list."""
    return lambda *given: run(*given[:-1], *given[-1])


def _clear(held: list[Tensor]) -> None:
    held.clear()


def _releasing(graph: fx.GraphModule, count: int) -> fx.GraphModule:
    """The same graph with its last inputs as a list, which it empties, so that each is released after its last use."""
    made = fx.Graph()
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    copies = {node: made.placeholder(node.name) for node in inputs[: len(inputs) - count]}
    held = made.placeholder("held")
    for at, node in enumerate(inputs[len(inputs) - count :]):
        copies[node] = made.call_function(operator.getitem, (held, at))
    made.call_function(_clear, (held,))
    made.output(made.graph_copy(graph.graph, copies))
    return fx.GraphModule(torch.nn.Module(), made)


def _graph_of(function: Callable[..., list[Tensor]], tensors: Sequence[Tensor]) -> fx.GraphModule:
    """Trace a function of tensors.

    It runs on the tensors, so that the graph has their memory formats. If the function depends on values, it runs on
    tensors without values, for which libraries have other ways; then the memory formats of all values are checked.

    Raises:
        ValueError: if the function depends on values in any case, or if a memory format would be wrong.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # imports the compiler's modules

    states = _states()

    def watched(*arguments: Tensor) -> list[Tensor]:
        with _WithoutValues(), _WithoutReads():
            return function(*arguments)

    try:
        made = make_fx(watched)(*tensors)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model may do anything that torch cannot trace
        if _READS not in str(error):
            raise _not_traced(error) from error
        try:
            made = make_fx(watched, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
            if any(draws(node.target, node.args, node.kwargs) for node in made.graph.nodes):
                raise ValueError("random numbers in a pass that reads values")
            with _plainly(tensors):
                _WithFormats(made).run(*tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as other:  # a model or library may do anything with tensors without values
            raise _not_traced(error) from other
    if states != _states():
        raise ValueError(
            "the pass cannot be traced into one graph, expected random numbers of torch only: those of Python and NumPy"
            " would be constants"
        )
    for node in made.graph.nodes:
        if torch.Tag.data_dependent_output in getattr(node.target, "tags", ()) or _has_unknown_size(node):
            raise ValueError(
                "the pass cannot be traced into one graph, expected results whose sizes do not depend on the values of"
                f" tensors, and no values as numbers: {node.target}"
            )
    return made


def _not_traced(error: Exception) -> ValueError:
    return ValueError(
        "the pass cannot be traced into one graph, expected a model and a loss that do not depend on the values of"
        f" tensors: {error}"
    )


_READS = "get value out of a tracing tensor"
"""The beginning of torch's message for functions that read values."""


class _WithoutValues(TorchFunctionMode):
    """Raises RuntimeError, as torch does while it traces, for functions that read values unseen by torch."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Sequence[Any] = (), named: Any = None
    ) -> Any:
        """Handle one call."""
        given = (*arguments, *(named or {}).values())
        if function in _READING or (function in _MAKING and any(map(_holds_tensors, given))):
            raise RuntimeError(f"{function.__name__} would {_READS}")
        return function(*arguments, **(named or {}))


_READING = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__repr__, Tensor.__format__}
_READING |= {torch.tensor_split, Tensor.tensor_split}

_MAKING = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
"""Functions that read tensors in lists."""


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(one, Tensor) or _holds_tensors(one) for one in value)


class _WithoutReads(TorchDispatchMode):
    """Raises RuntimeError for functions that read values, of any tensor, or that draw from other generators."""

    def __init__(self) -> None:
        super().__init__()
        self.state = self._state()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Sequence[Any] = (), named: Any = None) -> Any:
        """Handle one call."""
        named = named or {}
        if torch.Tag.data_dependent_output in function.tags:
            raise RuntimeError(f"{function} would {_READS}")
        if not draws(function, arguments, named):
            return function(*arguments, **named)
        # A model may set the state of the generator, which a graph would not do.
        if named.get("generator") is not None or self.state != self._state():
            raise RuntimeError(f"{function} draws from a generator that the model seeds or holds")
        result = function(*arguments, **named)
        self.state = self._state()
        return result

    @staticmethod
    def _state() -> bytes:
        with untraced(), torch._C.DisableTorchFunction():
            return torch.get_rng_state().numpy().tobytes()


def _states() -> tuple[Any, ...]:
    """The states of the random generators of Python and NumPy."""
    found: Any = np.random.get_state()
    return random.getstate(), found[1].tobytes(), found[2:]


def _has_unknown_size(node: fx.Node) -> bool:
    """Whether the size of a result depends on values: selections by a mask, positions of nonzero entries."""
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target is not torch.ops.aten.index.Tensor:
        return True
    indices: Any = node.args[1]
    kinds = [one.meta.get("val", one.meta.get("tensor_meta")) for one in indices if one is not None]
    return any(kind is None or kind.dtype in (torch.bool, torch.uint8) for kind in kinds)


class _WithFormats(fx.Interpreter):
    """Runs a graph and raises RuntimeError for a value whose memory format differs from the one while tracing."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        found, expected = super().run_node(n), n.meta.get("val")
        if isinstance(found, Tensor) and isinstance(expected, Tensor):
            pairs = zip(found.shape, found.stride(), expected.stride(), strict=True)
            if any(size > 1 and one != two for size, one, two in pairs):
                raise RuntimeError(f"the result of {n.target} has strides {found.stride()}, not {expected.stride()}")
        return found


def _in_format(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor with these strides, which a compiled graph may have changed; a copy only if it has others."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor with the values that its memory has, not negated or conjugated ones, which a compiler would use."""
    return tensor.resolve_conj().resolve_neg()


def _require_known(leaves: Iterable[Any]) -> None:
    """Raise TypeError for objects with tensors, which would be constants of a graph."""
    for leaf in leaves:
        if not isinstance(leaf, Tensor) and next(tensors_in(leaf), None) is not None:
            raise TypeError(
                f"data contains an object of type {type(leaf).__name__} with tensors, expected tensors in tuples, lists"
                " and dictionaries for compile="
            )


def _checked(graph: fx.GraphModule, given: Sequence[Tensor]) -> Any:
    """Run a graph that was just traced."""
    try:
        return graph(*given)
    except (RuntimeError, TypeError) as error:
        raise _not_traced(error) from error


def _contiguous(leaf: Any) -> Any:
    return leaf.contiguous() if isinstance(leaf, Tensor) else leaf


@contextmanager
def _plainly(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Run a graph without recording gradients, and without casts by `torch.autocast`, which it contains already."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in {tensor.device.type for tensor in tensors}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class _Parts(NamedTuple):
    """A graph in two parts.

    The inputs of each part are its arguments and its `kept` tensors. Those of the second part also are values of the
    first part, which the first part returns after its results.

    Args:
        first: the first part.
        second: the second part, which begins where a late argument is used first.
        kept: for each part, the tensors of the traced module that it takes.
        written: the tensors of the traced module into which the graph writes.
    """

    first: fx.GraphModule
    second: fx.GraphModule
    kept: tuple[list[Tensor], list[Tensor]]
    written: list[Tensor]


def _divided(made: fx.GraphModule, early: int, size: int) -> _Parts:
    """Divide a graph.

    Args:
        made: the graph.
        early: the number of arguments of the first part.
        size: the number of results of the first part.

    Raises:
        ValueError: if the parts depend on each other in other ways than by values of the first part.
    """
    made.graph.eliminate_dead_code()
    nodes = list(made.graph.nodes)
    arguments = [node for node in nodes if node.op == "placeholder"]
    (output,) = [node for node in nodes if node.op == "output"]
    results: Any = output.args[0]
    is_late = set(arguments[early:])
    begun = False
    for node in nodes:
        begun = begun or (node.op == "call_function" and not is_late.isdisjoint(node.all_input_nodes))
        if begun and node.op == "call_function":
            is_late.add(node)
    written = _require_apart(made, nodes, is_late)
    first, second = _Part(arguments[:early], results[:size]), _Part(arguments[early:], results[size:])
    for node in nodes:
        if node.op == "call_function":
            (second if node in is_late else first).body.append(node)
    kept = first.take_attributes(made), second.take_attributes(made)
    between = [node for node in nodes if node in second.needed and node not in second.copies and node not in is_late]
    second.take(between)
    return _Parts(first.graph_with(between), second.graph_with([]), kept, written)


class _Part:
    """A part of a graph, while it is made.

    Args:
        arguments: its arguments.
        results: its results.
    """

    def __init__(self, arguments: Sequence[fx.Node], results: Sequence[fx.Node | None]) -> None:
        self.graph, self.results = fx.Graph(), results
        self.body: list[fx.Node] = []
        self.copies: dict[fx.Node, fx.Node] = {}
        self.take(arguments)

    def take(self, nodes: Iterable[fx.Node]) -> None:
        """Make nodes of the whole graph inputs of this part."""
        for node in nodes:
            self.copies[node] = self.graph.placeholder(node.name)

    @property
    def needed(self) -> set[fx.Node]:
        """The nodes that functions of this part take, and its results."""
        return {one for node in self.body for one in node.all_input_nodes} | set(filter(None, self.results))

    def take_attributes(self, made: fx.GraphModule) -> list[Tensor]:
        """Make tensors of the traced module inputs; return them."""
        found: dict[Any, fx.Node] = {}
        for node in made.graph.nodes:
            if node.op == "get_attr" and node in self.needed:
                if node.target not in found:
                    found[node.target] = self.graph.placeholder(node.name)
                self.copies[node] = found[node.target]
        return [getattr(made, str(target)) for target in found]

    def graph_with(self, more: Sequence[fx.Node]) -> fx.GraphModule:
        """The graph of this part; it returns some nodes after its results."""
        for node in self.body:
            self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        self.graph.output(tuple(None if one is None else self.copies[one] for one in (*self.results, *more)))
        return fx.GraphModule(torch.nn.Module(), self.graph)


def _require_apart(made: fx.GraphModule, nodes: Sequence[fx.Node], is_late: Set[fx.Node]) -> list[Tensor]:
    """Raise ValueError if a part writes into what the other needs; return the tensors into which the graph writes."""
    written, owners = _written(nodes)
    memory = {_address(made, node): by for node, by in written.items() if node.op == "get_attr"}
    for node in is_late:
        for one in node.all_input_nodes:
            owner: Any = owners.get(one, one)
            if owner.op == "get_attr" and _address(made, owner) in memory:
                raise ValueError(
                    "the pass cannot be compiled: its backward pass needs a tensor of the model into which the forward"
                    f" pass writes with {memory[_address(made, owner)].target}"
                )
    for node, by in written.items():
        if by in is_late and node not in is_late and node.op == "call_function":
            raise ValueError(f"the pass cannot be compiled: its backward pass writes with {by.target}")
        if node.op == "placeholder":
            raise ValueError(f"the pass cannot be compiled: it writes into its inputs with {by.target}")
    return [getattr(made, str(node.target)) for node in written if node.op == "get_attr"]


def _address(made: fx.GraphModule, node: fx.Node) -> int:
    """The address of the memory of a tensor of the traced module."""
    return getattr(made, str(node.target)).untyped_storage().data_ptr()


def _written(nodes: Iterable[fx.Node]) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]]:
    """The values into whose memory a graph writes, with the last function that does; and the owner of shared memory."""
    owners: dict[fx.Node, fx.Node] = {}
    found: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        named = [
            (argument, node.args[at] if at < len(node.args) else node.kwargs.get(argument.name))
            for at, argument in enumerate(schema.arguments)
        ]
        for argument, given in named:
            if argument.alias_info is None:
                continue
            for one in given if isinstance(given, (list, tuple)) else [given]:
                if isinstance(one, fx.Node):
                    owner = owners.get(one, one)
                    owners[node] = owner  # the result shares memory with the argument
                    if argument.alias_info.is_write:
                        found[owner] = node
    return found, owners
