"""Functions that take parameters: the gradients of single examples with respect to these arguments.

There are three ways. A convolution or linear map is a network. Another function runs again under `torch.func.vmap`,
which gives each example its part of the arguments, if the trial passes found these parts; where `vmap` does not support
the function, it runs on one example after the other. Otherwise, the cotangent is propagated through the recorded graph
once for each example, with zeros for all other examples; this way needs neither the arguments nor a function that can
run on a single example, and is the only one if `batch_axis` was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from lensor import ops
from lensor.curvature.batch_axes import BatchAxis
from lensor.curvature.data import over_positions
from lensor.curvature.networks import network
from lensor.curvature.tracing import attempt, is_traced
from lensor.curvature.watching import widened
from lensor.nn.calls import layer_call


@dataclass(frozen=True)
class Source:
    """A parameter, or a tensor computed from parameters, as an argument of a function.

    Args:
        tensor: the tensor.
        alias: the view of it that the function received, so that gradients for this call can be told from others.
        place: the place among the leaves of the arguments.
    """

    tensor: Tensor
    alias: Tensor
    place: int


@dataclass(frozen=True)
class Output:
    """A result of a function that depends on the examples.

    Args:
        edge: the edge of the graph that leads to it.
        axis: the position of the examples; None if it is unknown.
        shape: its shape.
        dtype: its dtype.
        device: its device.
    """

    edge: GradientEdge
    axis: BatchAxis | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        """Zeros of this shape."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


@dataclass(eq=False)
class FunctionUse:
    """A call of a function with parameters whose results depend on the examples.

    Args:
        function: the function.
        leaves: the leaves of its arguments, detached.
        tree: their structure: positional and named arguments.
        versions: the versions of the leaves that are tensors, by place.
        axes: the positions of the examples in the leaves, by place; None if they are unknown.
        sources: the parameters among the arguments.
        outputs: the results that can be differentiated.
        batch: the number of examples.
        can_rerun: whether the function can be called again with the same result.
    """

    function: Callable[..., Any]
    leaves: list[Any]
    tree: TreeSpec
    versions: Mapping[int, int]
    axes: Mapping[int, BatchAxis] | None
    sources: list[Source]
    outputs: list[Output]
    batch: int
    can_rerun: bool

    @property
    def name(self) -> str:
        """The name of the function."""
        return getattr(self.function, "__name__", str(self.function))

    def gradients(self, cotangents: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients of every example, [batch, *shape] for each source.

        Args:
            cotangents: the gradients with respect to the outputs; None for zero.
        """
        if not self.batch:
            return [source.tensor.new_zeros((0, *source.tensor.shape)) for source in self.sources]
        found = self._of_layer(cotangents) if self.is_unchanged() else None
        if found is None and self.axes is not None and self._can_map(self.axes):
            found = self._mapped(cotangents, self.axes)
        elif found is None and (axes := self._likely_axes()) is not None and self._can_map(axes):
            found = self._mapped(cotangents, axes, is_guess=True)
        return self._masked(cotangents) if found is None else found

    def weighted_sum(self, cotangents: Sequence[Tensor | None], factors: Tensor) -> list[Tensor]:
        """The sum over the examples of their gradients times factors [batch], for each source."""
        parts = []
        for output, v in zip(self.outputs, cotangents, strict=True):
            part = output.zeros() if v is None else v.clone().to(torch.promote_types(v.dtype, factors.dtype))
            if v is not None:
                rows = self._known(output).first(part, self.batch)
                rows *= factors.to(part.dtype).reshape(-1, *[1] * (rows.ndim - 1))
            parts.append(part.to(output.dtype))
        return self._backward(parts)

    # --------------------------------------------------------------------------------------------- networks of layers
    def _of_layer(self, cotangents: Sequence[Tensor | None]) -> list[Tensor] | None:
        """The gradients by networks, if this is a call of a layer whose weight and bias are the only sources."""
        arguments, named = tree_unflatten(self.leaves, self.tree)
        call = layer_call(self.function, arguments, named)
        (output,), (v,) = self.outputs[:1], cotangents[:1]
        if call is None or output.axis is None or v is None or v.is_complex() or self.axes is None:
            return None
        places = {id(self.leaves[source.place]): source for source in self.sources}
        known = [id(one) for one in (call.weight, call.bias) if one is not None]
        x_axis = next((axis for at, axis in self.axes.items() if self.leaves[at] is call.input), None)
        if not set(places) <= set(known) or x_axis is None or x_axis.order is None or output.axis.order is None:
            return None
        x, v = (widened(axis.first(one, self.batch)) for axis, one in ((x_axis, call.input), (output.axis, v)))
        if call.kind == "linear":
            x, v = (one.flatten(1, -2).movedim(-1, 1) if one.ndim > 2 else one for one in (x, v))
        elif output.axis.rows > 1:
            x, v = x.movedim(1, 2), v.movedim(1, 2)
        found = {}
        if id(call.weight) in places:
            spec = call.spec(tuple(x.shape[2:]))
            gradients = network(ops.conv_weight_vjp_per_example, spec)(X=x, V=v)
            found[id(call.weight)] = gradients.reshape(self.batch, *call.weight.shape)
        if call.bias is not None and id(call.bias) in places:
            found[id(call.bias)] = over_positions(v)
        return [found[id(self.leaves[source.place])] for source in self.sources]

    # ------------------------------------------------------------------------------------------------ mapped functions
    def is_unchanged(self) -> bool:
        """Whether the arguments still have the values that the function received."""
        return self.can_rerun and all(self.leaves[at]._version == version for at, version in self.versions.items())

    def _can_map(self, axes: Mapping[int, BatchAxis]) -> bool:
        """Whether the examples' parts of all arguments and results are known."""
        every = [*axes.values(), *[output.axis for output in self.outputs]]
        return self.is_unchanged() and all(axis is not None and axis.order is not None for axis in every)

    def _likely_axes(self) -> dict[int, BatchAxis] | None:
        """The first axes of all arguments that have as many entries as there are examples; None if there are none.

        Without trial passes, the positions of the examples in the arguments are not known. A graph that is being traced
        cannot contain the comparison of results that such a guess needs.
        """
        if self.axes is not None or is_traced():
            return None
        sources = {source.place for source in self.sources}
        axes = {
            at: BatchAxis(0, 1)
            for at, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor) and at not in sources and leaf.ndim and len(leaf) == self.batch
        }
        return axes or None

    @torch.no_grad()
    def _values(self) -> list[Tensor]:
        """The results of the function, which is called again."""
        arguments, named = tree_unflatten(
            [widened(one) if isinstance(one, Tensor) else one for one in self.leaves], self.tree
        )
        return _floating(self.function(*arguments, **named))

    def _mapped(
        self, cotangents: Sequence[Tensor | None], axes: Mapping[int, BatchAxis], is_guess: bool = False
    ) -> list[Tensor] | None:
        """The gradients by the function's own derivative, mapped over the examples; None if it cannot be mapped.

        Args:
            cotangents: the gradients with respect to the outputs; None for zero.
            axes: the positions of the examples in the arguments.
            is_guess: whether `axes` is a guess, which results and gradients for all examples must then confirm.
        """
        places = list(axes)
        given = [_split(widened(self.leaves[at]), axes[at], self.batch) for at in places]
        vs = []
        for output, v in zip(self.outputs, cotangents, strict=True):
            assert output.axis is not None
            vs.append(_split(output.zeros() if v is None else v, output.axis, self.batch))
        weights = [widened(self.leaves[source.place]) for source in self.sources]

        def one(parts: Sequence[Tensor], vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            def run(*sources: Tensor) -> tuple[Tensor, ...]:
                leaves = [widened(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
                for at, part in zip(places, parts, strict=True):
                    leaves[at] = part
                for source, value in zip(self.sources, sources, strict=True):
                    leaves[source.place] = value
                arguments, named = tree_unflatten(leaves, self.tree)
                found = _floating(self.function(*arguments, **named))
                shapes = [tuple(leaf.shape) for leaf in found]
                if shapes != [tuple(vector.shape) for vector in vectors]:
                    raise ValueError("the function returns different shapes for a part of its arguments")
                return tuple(found)

            found, derivative, *_ = torch.func.vjp(run, *weights)
            gradients = derivative(tuple(v.to(y.dtype) for v, y in zip(vectors, found, strict=True)))
            return (*gradients, *found) if is_guess else gradients

        try:
            with attempt():
                values = self._values() if is_guess else None
                found = torch.func.vmap(one, ([at for _, at in given], [at for _, at in vs]))(
                    [part for part, _ in given], [v for v, _ in vs]
                )
        except torch.OutOfMemoryError:
            raise
        except Exception:  # any function of a user or of torch, some of which vmap does not support
            return None if is_guess else self._looped(one, given, vs)
        gradients = list(map(_dense, found[: len(weights)]))
        if values is not None and not (
            self._are_those(values, found[len(weights) :]) and self._add_up(gradients, cotangents)
        ):
            return None
        return gradients

    def _add_up(self, gradients: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> bool:
        """Whether the examples' gradients add up to the gradient of the function, up to rounding.

        Results can agree without this: if a weight is 0, they do not depend on what it is multiplied by.
        """
        every = zip(self.outputs, cotangents, strict=True)
        whole = self._backward([out.zeros() if v is None else v.to(out.dtype) for out, v in every])
        pairs = zip(gradients, whole, strict=True)
        return all(_are_close(own.sum(0), total, own.abs().sum(0)) for own, total in pairs)

    def _are_those(self, values: Sequence[Tensor], parts: Sequence[Tensor]) -> bool:
        """Whether results for all examples at once equal those for each example, up to rounding."""
        for output, value, part in zip(self.outputs, values, parts, strict=True):
            assert output.axis is not None
            whole, at = _split(value, output.axis, self.batch)
            if not _are_close(whole.movedim(at, 0), part, whole):
                return False
        return True

    def _looped(
        self,
        one: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]],
        given: Sequence[tuple[Tensor, int]],
        vs: Sequence[tuple[Tensor, int]],
    ) -> list[Tensor] | None:
        """The same without `vmap`, one example after the other; None if the function cannot run on one example."""
        try:
            with attempt():
                found = [
                    one([part.select(at, n) for part, at in given], [v.select(at, n) for v, at in vs])
                    for n in range(self.batch)
                ]
        except torch.OutOfMemoryError:
            raise
        except Exception:  # as above
            return None
        return [torch.stack(list(map(_dense, parts))) for parts in zip(*found, strict=True)]

    # ---------------------------------------------------------------------------------------------- the recorded graph
    def _masked(self, cotangents: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients by one backward pass through the function for each example."""
        found: list[list[Tensor]] = []
        for example in range(self.batch):
            parts = []
            for output, v in zip(self.outputs, cotangents, strict=True):
                part = output.zeros()
                if v is not None:
                    axis = self._known(output)
                    axis.first(part, self.batch)[example] = axis.first(v, self.batch)[example].to(output.dtype)
                parts.append(part)
            found.append(self._backward(parts))
        return [torch.stack(one) for one in zip(*found, strict=True)]

    def _backward(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The gradients with respect to the sources, for gradients with respect to the outputs."""
        edges, aliases = [output.edge for output in self.outputs], [source.alias for source in self.sources]
        found = torch.autograd.grad(edges, aliases, vectors, retain_graph=True, allow_unused=True)
        return [
            widened(torch.zeros_like(alias) if one is None else _dense(one))
            for alias, one in zip(aliases, found, strict=True)
        ]

    def _known(self, output: Output) -> BatchAxis:
        """The position of the examples in an output.

        Raises:
            ValueError: if it is unknown.
        """
        axis, shape = output.axis, tuple(output.shape)
        if axis is None or axis.order is None:
            raise ValueError(
                f"the function {self.name} takes parameters and returns a tensor of shape {shape}, in which the"
                f" positions of the {self.batch} examples cannot be found: leave the module out with layers="
            )
        return axis


def _are_close(one: Tensor, other: Tensor, scale: Tensor) -> bool:
    """Whether two tensors are equal up to rounding, which is in proportion to the largest entry of `scale`."""
    if not one.numel():
        return True
    most = 1e3 * torch.finfo(one.dtype).eps * scale.abs().amax()
    return bool(((one - other).abs() <= most).all())


def _floating(returned: Any) -> list[Tensor]:
    """The floating-point tensors among a function's results."""
    return [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _dense(gradient: Tensor) -> Tensor:
    """The gradient as a dense tensor; those of embeddings may be sparse."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def _split(x: Tensor, axis: BatchAxis, batch: int) -> tuple[Tensor, int]:
    """A view with one axis more, that of the examples, and its place; the rows of an example stay where they were."""
    if axis.order == "inner":
        return x.unflatten(axis.axis, (axis.rows, batch)), axis.axis + 1
    return x.unflatten(axis.axis, (batch, axis.rows)), axis.axis
