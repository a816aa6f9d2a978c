"""Accumulates, batch by batch, the sums from which Kronecker factors are formed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lensor import ops
from lensor.choices import Approx, FactorFisher
from lensor.curvature.batch_axes import BatchAxes, BatchAxis, Given
from lensor.curvature.block import Block, factor_of_identity, multiple_of_identity, plain_block
from lensor.curvature.capture import Capture, Use, computing, run
from lensor.curvature.complete import CompleteCapture
from lensor.curvature.data import one_tensor, over_positions, size_of
from lensor.curvature.distribution import Reduction, gather, gather_to_owners
from lensor.curvature.example_gradients import rows_of, sum_of
from lensor.curvature.factors import KroneckerFactors
from lensor.curvature.graph import tensors_in
from lensor.curvature.layers import Layer, refuse_mixing
from lensor.curvature.losses import require_counted
from lensor.curvature.networks import of_one
from lensor.curvature.registry import root_of
from lensor.curvature.structure import DiagonalBlocks
from lensor.curvature.watching import Rewind, Targets
from lensor.spec import ConvSpec


@dataclass
class Sums:
    """The sums for one layer, over all examples: A, or its roots while they have fewer rows than A; B; and positions.

    `positions` is the number of output positions, or 0 if it differs between batches; `ones` is the total number of
    positions over all examples.
    """

    roots: list[Tensor] | None
    a: Tensor | None = None
    b: Tensor | None = None
    positions: int | None = None
    ones: int = 0

    def add_positions(self, positions: int, examples: int) -> None:
        """Record the number of positions per example, for a number of examples."""
        self.positions = positions if self.positions in (None, positions) else 0
        self.ones += positions * examples

    def condense(self) -> None:
        """Form A from the roots as soon as the roots have at least as many rows as columns."""
        if self.roots and sum(root.shape[1] for root in self.roots) >= self.roots[0].shape[2]:
            formed = torch.cat(self.roots, 1)
            formed = formed.mT @ formed
            self.a = formed if self.a is None else self.a.add_(formed)
            self.roots = []

    def merge(self, other: Sums) -> None:
        """Add the sums of another object, which must not be used after this call."""
        self.a = other.a if self.a is None else self.a if other.a is None else self.a.add_(other.a)
        self.b = other.b if self.b is None else self.b if other.b is None else self.b.add_(other.b)
        if self.roots is not None:
            self.roots += other.roots or []
            self.condense()
        self.positions = other.positions if self.positions in (None, other.positions) else 0
        self.ones += other.ones


class Counts(NamedTuple):
    """The state of a collector after a pass, besides the sums.

    Args:
        examples: the number of examples.
        outputs: the number of outputs of an example.
        alike: the weights with the same output factors as biases, by bias.
        positions: for each parameter, the number of output positions and the total number of ones.
        left: the parameters without Kronecker factors.
    """

    examples: int
    outputs: int
    alike: dict[str, str]
    positions: dict[str, tuple[int | None, int]]
    left: frozenset[str]


class Added(NamedTuple):
    """The result of `Collector.add`.

    Args:
        axes: the positions of the examples in the inputs of layers.
        axis: the position of the examples in the outputs.
        outputs: the outputs.
        is_recorded: whether gradients were recorded.
    """

    axes: BatchAxes | None
    axis: BatchAxis
    outputs: Tensor
    is_recorded: bool


class Collector:
    """Collects Kronecker factors batch by batch, and blocks for parameters without Kronecker factors.

    Args:
        layers: the layers.
        approx: "expand" or "reduce".
        joint: whether weight and bias share a block.
        fisher: as for `kfac`; "forward-only" makes B the identity.
        keep_graph: whether to keep the graph for later backward passes by other code.
        parameters: the parameters of these layers and of other modules, in the order of the blocks; those that have no
            Kronecker factors get blocks of their own. Only the layers' parameters get blocks unless given.
        dense: the largest number of entries of a parameter without Kronecker factors whose block is a dense matrix;
            the blocks of larger ones are diagonal.
        constants: the output factors of "forward-only" by parameter, if those of earlier collectors are used again.
        structure: the diagonal blocks of the factors that are computed; the whole factors unless given. Weight and bias
            must not share a block then.
    """

    approx: Approx
    fisher: FactorFisher

    def __init__(
        self,
        layers: list[Layer],
        approx: Approx,
        joint: bool,
        fisher: FactorFisher,
        keep_graph: bool = False,
        parameters: Mapping[str, nn.Parameter] | None = None,
        dense: int = 0,
        constants: dict[str, Tensor] | None = None,
        structure: DiagonalBlocks | None = None,
    ) -> None:
        self.layers, self.approx, self.joint, self.fisher, self.keep_graph = layers, approx, joint, fisher, keep_graph
        self.parameters, self.dense, self.constants = parameters, dense, {} if constants is None else constants
        self.structure = structure
        owned = {name: layer for layer in layers for name in (layer.weight, layer.bias) if name is not None}
        self._layers = {layer.weight: layer for layer in reversed(layers)}
        self._left = set(parameters or ()) - set(owned)
        """The parameters without Kronecker factors."""
        self._order = list(owned) if parameters is None else list(parameters)
        self._clear()

    def _clear(self) -> None:
        """Start anew."""
        self.sums = {
            name: Sums([] if self.approx == "reduce" else None) for name in self._layers if name not in self._left
        }
        self._joined: dict[str, str] = {
            name: layer.bias
            for name, layer in self._layers.items()
            if self.joint and name in self.sums and layer.bias is not None and layer.bias not in self._left
        }
        """The biases that share a block with a weight."""
        owned = {layer.bias for layer in self.layers} - set(self._joined.values()) - self._left
        self.biases = {name: Sums(None) for name in self._order if name in owned}
        self._alike: dict[str, str] = {}
        """The weights with the same output factors as the biases."""
        self.plain: dict[str, Tensor] = {}
        self._roots: dict[str, list[tuple[int, Tensor]]] = {}
        self._uses: dict[str, list[tuple[Use, int]]] = {}
        self._mixed: set[str] = set()
        self.examples, self.outputs = 0, 1
        self.weight = 0.0

    @property
    def form(self) -> str:
        """The sums that there are, as text."""
        factors = {
            name: (one.b is not None, one.a is not None or bool(one.roots))
            for name, one in (self.sums | self.biases).items()
        }
        return f"{factors} {[(name, tuple(one.shape)) for name, one in self.plain.items()]}"

    @property
    def like(self) -> Tensor:
        """One of the sums."""
        found = [one for sums in self.sums.values() for one in (sums.a, sums.b, *(sums.roots or ())) if one is not None]
        return [*found, *self.plain.values()][0]

    def add(
        self,
        model: nn.Module,
        loss: Any,
        inputs: Any,
        targets: Tensor,
        mc_samples: int,
        generator: torch.Generator | None,
        batch_axis: Given = None,
    ) -> Added:
        """Add one batch: a forward pass, and one backward pass to the layers' outputs for each column of the root."""
        batch = size_of(inputs)
        axes = Capture.batch_axes_of(model, inputs, Targets(self.layers, self.parameters), batch, batch_axis)
        if self._left:
            refuse_mixing(model)
        is_recorded = True
        if self.fisher != "forward-only":
            before = Rewind(model) if self.parameters is not None and not self.examples else None
            capture, returned = self.passed(model, inputs, axes, batch_axis)
            while self._leave(capture):
                refuse_mixing(model)
                assert before is not None
                before.restore()
                capture, returned = self.passed(model, inputs, axes, batch_axis)
        else:
            is_recorded, one = False, self.empty()
            try:
                capture, returned = one.passed(model, inputs, axes, batch_axis, is_recorded)
            except RuntimeError:  # the model itself computes gradients
                is_recorded, one = True, self.empty()
                capture, returned = one.passed(model, inputs, axes, batch_axis, is_recorded)
            one.finish(batch)
            self.merge(one)
        capture.check(returned, shared=True)
        self._require_joint(capture)
        outputs = one_tensor(returned)
        with computing(outputs):
            axis = output_axis(axes, returned, outputs, batch, independent=bool(self._left))
            root = root_of(loss, outputs, targets, batch, axis)
        self.count(batch, root.normaliser)
        self.outputs = outputs.numel() // batch
        if self.fisher != "forward-only":
            self.add_columns(capture, outputs, root.of(self.fisher, mc_samples, generator), root.normaliser)
        return Added(axes, axis, outputs.detach(), is_recorded)

    def passed(
        self, model: nn.Module, inputs: Any, axes: BatchAxes | None, given: Given, is_recorded: bool = True
    ) -> tuple[Capture, Any]:
        """Run a forward pass that adds the layers' inputs, and return the capture and what the model returned."""
        watched, batch = Targets(self.layers, self.parameters), size_of(inputs)
        ordered = self.approx == "reduce" or any(name in self._left for name in watched.owners)
        if self.parameters is None:
            capture = Capture(watched, self.add_input, batch, axes, given, ordered=ordered, independent=False)
        else:
            capture = CompleteCapture(
                watched, inputs, batch, axes, given, self._take, ordered, independent=False, whole=False
            )
        return capture, run(model, inputs, capture, record=is_recorded)

    def empty(self) -> Collector:
        """A collector of the same factors that has no sums."""
        options = self.keep_graph, self.parameters, self.dense, self.constants, self.structure
        one = Collector(self.layers, self.approx, self.joint, self.fisher, *options)
        one._left = set(self._left)
        one._clear()
        return one

    def _take(self, use: Use, x: Tensor) -> bool:
        """Add a layer's input, and return whether the gradients of single examples do not need it."""
        if use.weight in self.sums and self._is_own(use):
            self.add_input(use, x)
        else:
            self._mixed |= {use.weight} - self._left
            self._note(use, use.spec(x))
        return use.weight not in self._left

    def _leave(self, capture: Capture) -> bool:
        """Leave out parameters that functions other than their layer's use; return whether a new pass is needed.

        Raises:
            ValueError: if these parameters had factors in previous batches.
        """
        if not isinstance(capture, CompleteCapture):
            return False
        found = ((capture.used | self._mixed) - self._left) & set(self._order)
        if found and self.examples:
            raise ValueError(
                f"the parameter {sorted(found)[0]!r} is used by other functions than in the first batch, expected the"
                " same ones in each batch: leave the layer out with layers="
            )
        self._left |= found
        if found:
            self._clear()
        return bool(found)

    def _require_joint(self, capture: Capture) -> None:
        """Raise ValueError if a bias that shares a block with a weight has other uses."""
        weights, biases = capture.by_parameter(), capture.by_parameter(True)
        for name, bias in self._joined.items():
            if weights.get(name) != biases.get(bias):
                raise _not_joint(name, bias)

    def count(self, batch: int, normaliser: float) -> None:
        """Finish a forward pass, and add the number of examples and the divisor of their mean loss."""
        self.finish(batch)
        self.examples += batch
        self.weight += normaliser

    def finish(self, batch: int) -> None:
        """Add what a forward pass of some examples left: numbers of positions, and roots of A.

        The roots of a layer that ran several times are added up: all its positions share one mean patch.

        Raises:
            ValueError: if a weight and its bias were used together in previous batches, but not in this one.
        """
        for name, used in self._uses.items():
            (self.sums if name in self.sums else self.biases)[name].add_positions(sum(o for _, o in used), batch)
        alike = {name: used[0][0].weight for name, used in self._uses.items() if name in self.biases}
        alike = {name: weight for name, weight in alike.items() if self._uses[name] == self._uses.get(weight)}
        if self.examples and self._uses and alike != self._alike:
            raise ValueError(
                f"the parameters {sorted(dict(alike.items() ^ self._alike.items()))} are used in other calls than in"
                " previous batches, expected the same calls"
            )
        self._alike = alike if self._uses else self._alike
        for name, parts in self._roots.items():
            sums, total = self.sums[name], sum(positions for positions, _ in parts)
            assert sums.roots is not None
            root = parts[0][1] if len(parts) == 1 else sum_of(one * (rows / total) for rows, one in parts)
            if self.structure is not None:
                root = self.structure.split_root(root, math.prod(self._layers[name].weight_shape[2:]))
            sums.roots.append(root)
            sums.condense()
        self._uses, self._roots = {}, {}

    def take(self) -> tuple[Counts, Any, Any]:
        """Remove the sums and return them: counts, sums of the forward pass, and sums of the backward passes."""
        found = self.sums | self.biases
        positions = {name: (one.positions, one.ones) for name, one in found.items()}
        counts = Counts(self.examples, self.outputs, dict(self._alike), positions, frozenset(self._left))
        forward = {name: (one.a, one.roots) for name, one in found.items()}
        backward = {name: one.b for name, one in found.items()}, self.plain
        self._clear()
        return counts, forward, backward

    def fits(self, counts: Counts) -> bool:
        """Whether sums of a pass with these counts can be added: parameters are used as in previous batches."""
        return not self.examples or (counts.left == self._left and counts.alike == self._alike)

    def add_sums(self, counts: Counts, forward: Any, backward: Any, weight: float) -> None:
        """Add what `take` of another collector returned, and the divisor of the mean loss; None for no sums."""
        if not self.examples:
            self._left = set(counts.left)
            self._clear()
        one = self.empty()
        one.examples, one.outputs, one._alike, one.weight = counts.examples, counts.outputs, counts.alike, weight
        factors, one.plain = backward or ({}, {})
        for sums in (one.sums, one.biases):
            for name in sums:
                sums[name] = Sums(forward[name][1], forward[name][0], factors.get(name), *counts.positions[name])
        self.merge(one)

    def merge(self, other: Collector) -> None:
        """Add the sums of another collector for the same layers, which must not be used after this call."""
        self.examples += other.examples
        self.weight += other.weight
        self.outputs, self._alike = other.outputs, other._alike
        for mine, theirs in ((self.sums, other.sums), (self.biases, other.biases)):
            for name, sums in mine.items():
                sums.merge(theirs[name])
        for name, values in other.plain.items():
            self.plain[name] = self.plain[name].add_(values) if name in self.plain else values

    def add_columns(self, capture: Capture, outputs: Tensor, columns: Iterator[Tensor], weight: float) -> None:
        """Propagate each column of the root to the layers' outputs; the last backward pass frees the graph.

        Args:
            capture: the capture of the forward pass.
            outputs: the model's outputs.
            columns: the columns of the root.
            weight: a factor for the sums: the divisor of a mean loss, by which the columns are divided.
        """
        groups = [(self.sums[name], uses) for name, uses in capture.by_parameter().items() if name in self.sums]
        for name, uses in capture.by_parameter(True).items():
            if name in self.biases and name not in self._alike:
                groups.append((self.biases[name], uses))
        column: Tensor | None = next(columns)
        while column is not None:
            following = next(columns, None)
            gradients = capture.gradients(outputs, column, keep=self.keep_graph or following is not None)
            with computing(outputs):
                for sums, uses in groups:
                    self._add_outputs(sums, uses, gradients, weight)
                if self._left:
                    self._add_plain(capture, gradients, weight)
            column = following

    def _add_plain(self, capture: Capture, vectors: Mapping[Any, Any], weight: float) -> None:
        """Add the squares, or outer products, of the gradients of single examples for one column of the root."""
        assert isinstance(capture, CompleteCapture)
        without = set(self._order) - self._left
        for name, gradients in capture.of_examples(vectors, capture.of_functions(vectors), without):
            rows = rows_of(gradients)
            part = rows.mT @ rows if rows.shape[1] <= self.dense else rows.square().sum(0)
            self.plain[name] = self.plain[name].add_(part, alpha=weight) if name in self.plain else part.mul_(weight)

    def _is_own(self, use: Use) -> bool:
        """Whether a use is a call of the layer's own operation."""
        layer = use.layer
        return use.groups == layer.groups and use.call.is_transposed == layer.is_transposed

    def _note(self, use: Use, spec: ConvSpec) -> None:
        """Record a use of a weight and of a bias, and its number of positions."""
        positions = math.prod(spec.output_size)
        for name in (use.weight, use.bias):
            if name in self.sums or name in self.biases:
                self._uses.setdefault(name, []).append((use, positions))

    @torch.no_grad()
    def add_input(self, use: Use, x: Tensor) -> None:
        """Add a layer's input, [batch, channels, *positions]."""
        if not self._is_own(use):
            raise ValueError(
                f"the weight of layer {use.layer.name!r} is used by another kind of operation, expected the layer's own"
            )
        sums, spec = self.sums[use.weight], use.spec(x)
        bias = self._joined.get(use.weight)
        if bias is not None and use.bias != bias:
            raise _not_joint(use.weight, bias)
        joint = bias is not None
        self._note(use, spec)
        if sums.roots is not None:
            root = of_one(ops.kfac_input_root, spec, x)
            if joint:
                root = torch.cat([root, root.new_ones((*root.shape[:2], 1))], 2)
            self._roots.setdefault(use.weight, []).append((math.prod(spec.output_size), root))
            return
        if self.approx == "expand":  # positions count as examples
            x = use.as_examples(x)
            spec = use.spec(x)
        if self.structure is None:
            factor = of_one(ops.kfac_input_factor, spec, x, self.approx, bias=joint)
        else:
            factor = self.structure.input_factor(spec, x)
        sums.a = factor.mul_(len(x)) if sums.a is None else sums.a.add_(factor, alpha=len(x))

    def _add_outputs(self, sums: Sums, uses: Sequence[Use], gradients: Mapping[Use, Tensor], weight: float) -> None:
        """Add one column of the root at the outputs of all uses of a parameter, whose positions count together."""
        if self.approx == "reduce" and len(uses) > 1:
            total = sum_of(over_positions(gradients[use]) for use in uses)
            self._add_factor(sums, total, uses[0].output_spec(total), weight)
            return
        positions = [gradients[use].shape[2:].numel() for use in uses]
        for use, count in zip(uses, positions, strict=True):
            self.add_output(use, gradients[use], weight * (count / sum(positions)), sums)

    @torch.no_grad()
    def add_output(self, use: Use, gradient: Tensor, weight: float, sums: Sums | None = None) -> None:
        """Add one column of the root at a layer's output; to the sums of the layer's weight unless others are given."""
        if self.approx == "expand":
            examples = len(gradient)
            gradient = use.as_examples(gradient)
            weight *= examples / len(gradient)
        self._add_factor(self.sums[use.weight] if sums is None else sums, gradient, use.output_spec(gradient), weight)

    def _add_factor(self, sums: Sums, gradient: Tensor, spec: ConvSpec, weight: float) -> None:
        # The output factor depends on the output only, so use a convolution with kernel size 1.
        spec = spec if self.structure is None else self.structure.output_spec(spec)
        factor = of_one(ops.kfac_output_factor, spec, gradient[None], self.approx)
        sums.b = factor.mul_(weight) if sums.b is None else sums.b.add_(factor, alpha=weight)

    def factors(
        self, reduction: str, group: dist.ProcessGroup | None = None, to_owners: Reduction | None = None
    ) -> KroneckerFactors:
        """The factors over all batches and, if a group is given, over all of its ranks.

        Args:
            reduction: the reduction of the loss.
            group: the ranks.
            to_owners: the ranks and owners, if each rank gets the blocks that it owns only.
        """
        blocks: dict[str, Block] = {}
        if to_owners is not None:
            gather_to_owners(self, to_owners)
        elif group is not None:
            gather(self, group)

        def averaged(b: Tensor) -> Tensor:
            return b.div_(require_counted(self.weight)) if reduction == "mean" else b

        owners = {layer.bias: layer for layer in reversed(self.layers) if layer.bias is not None}
        outer: dict[str, Tensor] = {}
        for name, sums in self.sums.items():
            layer, a, root = self._layers[name], sums.a, None
            if sums.roots:
                root = torch.cat(sums.roots, 1) if len(sums.roots) > 1 else sums.roots[0]
                if a is not None:
                    a.add_(root.mT @ root)
                    root = None
            if a is not None:
                a = a.div_(self.examples)
            if root is not None:
                root = root * self.examples**-0.5
            b = None if sums.b is None else averaged(sums.b)
            if b is None:  # forward only, or no gradient reached the layer
                b = self._constant(name, layer, a if a is not None else root)
            outer[name] = b
            names = (name, self._joined[name]) if name in self._joined else (name,)
            known = a if a is not None else root
            assert known is not None
            found = Block(names, layer.weight_shape, layer.is_transposed, a, root, b, sums.positions or 0)
            blocks[name] = replace(found, parts=(len(known) // layer.groups, len(b) // layer.groups))
        for name, sums in self.biases.items():
            layer = owners[name]
            b = outer.get(self._alike.get(name, "")) if sums.b is None else averaged(sums.b)
            if b is None:  # forward only, or no gradient reached the bias
                b = self._constant(name, layer, self.like)
            mean = sums.ones / self.examples if self.approx == "expand" else 1.0
            # The input of a bias is 1 at every position.
            factor = b.new_full((layer.groups, 1, 1), mean)
            found = Block((name,), (layer.output_channels,), False, factor, None, b, sums.positions or 0)
            blocks[name] = replace(found, parts=(1, len(b) // layer.groups))
        for name, values in self.plain.items():
            blocks[name] = plain_block(name, tuple((self.parameters or {})[name].shape), averaged(values))
        ordered = {name: blocks[name] for name in self._order if name in blocks}
        return KroneckerFactors(ordered, self.approx, self.examples, reduction=reduction, outputs=self.outputs)

    def _constant(self, name: str, layer: Layer, like: Tensor | None) -> Tensor:
        """An output factor without gradients: the identity, or zeros if gradients were expected."""
        assert like is not None
        channels = layer.output_channels // layer.groups
        rows = channels if self.structure is None else self.structure.rows_of_output(channels)
        shape = layer.output_channels // rows, rows, rows
        if self.fisher != "forward-only":
            return like.new_zeros(shape)
        known = self.constants.get(name)
        is_same = known is not None and factor_of_identity(known) == 1 and known.shape == shape
        if known is not None and is_same and (known.dtype, known.device) == (like.dtype, like.device):
            return known
        self.constants[name] = multiple_of_identity(shape[0], rows, 1.0, like)
        return self.constants[name]


def output_axis(
    axes: BatchAxes | None, returned: Any, outputs: Tensor, batch: int, independent: bool = False
) -> BatchAxis:
    """The position of the examples in the model's outputs.

    Args:
        axes: the batch axes of the model, or None if the user specified the batch axis.
        returned: the value that the model returned.
        outputs: the output tensor that the loss takes.
        batch: the number of examples.
        independent: whether each example must be computed independently of the others, in the given order.

    Raises:
        ValueError: if the examples are not along the first axis, or if the order of several rows per example is
            unknown.
    """
    shape = tuple(outputs.shape)
    found = BatchAxis(0, shape[0] // max(batch, 1)) if shape else None
    if axes is not None and axes.outputs is not None:
        places = [at for at, one in enumerate(tensors_in(returned)) if one is outputs]
        found = axes.outputs[places[0]] if places and places[0] < len(axes.outputs) else None
    if found is None or found.axis != 0 or not shape or shape[0] != found.rows * batch:
        raise ValueError(
            f"the model's outputs have shape {shape} for {batch} examples, expected the examples, or equally many rows"
            " for each, in the first axis"
        )
    if independent:
        require_independent(found)
    if found.order is None:
        raise ValueError(
            f"the model's outputs have shape {shape}, with {found.rows} rows for each of {batch} examples in an order"
            " that cannot be found, expected the examples in the first axis"
        )
    return found


def require_independent(axis: BatchAxis) -> None:
    """Raise ValueError unless an example's rows of the outputs depend on that example only."""
    if not axis.independent:
        raise ValueError(
            "the model's outputs have rows of an example that depend on the other examples, on their order or on random"
            " numbers, or are indistinguishable in half precision, expected a model that treats every example alike: if"
            " it does, pass batch_axis=0"
        )


def _not_joint(weight: str, bias: str) -> ValueError:
    return ValueError(
        f"bias is 'joint', but the weight {weight!r} is not always used together with the bias {bias!r}, expected"
        " bias='separate' for this model"
    )
