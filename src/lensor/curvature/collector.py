"""Accumulates, batch by batch, the sums from which Kronecker factors are formed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lensor import ops
from lensor.choices import Approx, FactorFisher
from lensor.curvature.batch_axes import BatchAxes, BatchAxis, Given
from lensor.curvature.block import Block
from lensor.curvature.capture import Capture, Use, computing, run
from lensor.curvature.data import one_tensor, size_of
from lensor.curvature.distribution import gather
from lensor.curvature.factors import KroneckerFactors
from lensor.curvature.graph import tensors_in
from lensor.curvature.layers import Layer
from lensor.curvature.losses import LossRoot, require_counted
from lensor.curvature.networks import network
from lensor.curvature.watching import Targets


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


class Collector:
    """Collects Kronecker factors batch by batch.

    Args:
        layers: the layers.
        approx: "expand" or "reduce".
        joint: whether weight and bias share a block.
        fisher: as for `kfac`; "forward-only" makes B the identity.
        keep_graph: whether to keep the graph for later backward passes by other code.
    """

    approx: Approx
    fisher: FactorFisher

    def __init__(
        self, layers: list[Layer], approx: Approx, joint: bool, fisher: FactorFisher, keep_graph: bool = False
    ) -> None:
        self.layers, self.approx, self.joint, self.fisher, self.keep_graph = layers, approx, joint, fisher, keep_graph
        self.sums = {layer.weight: Sums([] if approx == "reduce" else None) for layer in layers}
        self.examples, self.outputs = 0, 1
        self.weight = 0.0

    def add(
        self,
        model: nn.Module,
        loss: nn.Module,
        inputs: Any,
        targets: Tensor,
        mc_samples: int,
        generator: torch.Generator | None,
        batch_axis: Given = None,
    ) -> None:
        """Add one batch: a forward pass, and one backward pass to the layers' outputs for each column of the root."""
        batch = size_of(inputs)
        watched = Targets(self.layers)
        axes = Capture.batch_axes_of(model, inputs, watched, batch, batch_axis)
        ordered = self.approx == "reduce"

        def passed(into: Collector, record: bool) -> tuple[Capture, Any]:
            capture = Capture(watched, into.add_input, batch, axes, batch_axis, ordered=ordered, independent=False)
            return capture, run(model, inputs, capture, record=record)

        if self.fisher != "forward-only":
            capture, returned = passed(self, record=True)
        else:
            try:
                one = Collector(self.layers, self.approx, self.joint, self.fisher)
                capture, returned = passed(one, record=False)
            except RuntimeError:  # the model itself computes gradients
                one = Collector(self.layers, self.approx, self.joint, self.fisher)
                capture, returned = passed(one, record=True)
            self.merge(one)
        capture.check(returned)
        outputs = one_tensor(returned)
        with computing(outputs):
            root = LossRoot(loss, outputs, targets, batch, output_axis(axes, returned, outputs, batch))
        self.count(batch, root.normaliser)
        self.outputs = outputs.numel() // batch
        if self.fisher != "forward-only":
            self.add_columns(capture, outputs, root.of(self.fisher, mc_samples, generator), root)

    def count(self, batch: int, normaliser: float) -> None:
        """Add a batch's number of examples and the divisor of its mean loss."""
        self.examples += batch
        self.weight += normaliser

    def merge(self, other: Collector) -> None:
        """Add the sums of another collector for the same layers, which must not be used after this call."""
        self.count(other.examples, other.weight)
        self.outputs = other.outputs
        for name, sums in self.sums.items():
            sums.merge(other.sums[name])

    def add_columns(self, capture: Capture, outputs: Tensor, columns: Iterator[Tensor], root: LossRoot) -> None:
        """Propagate each column of the root to the layers' outputs; the last backward pass frees the graph."""
        weight = root.normaliser if root.loss.reduction == "mean" else 1.0
        column: Tensor | None = next(columns)
        while column is not None:
            following = next(columns, None)
            gradients = capture.gradients(outputs, column, keep=self.keep_graph or following is not None)
            with computing(outputs):
                for use in capture.uses:
                    self.add_output(use, gradients[use], weight)
            column = following

    @torch.no_grad()
    def add_input(self, use: Use, x: Tensor) -> None:
        """Add a layer's input, [batch, channels, *positions]."""
        layer = use.layer
        if use.groups != layer.groups or (use.call.kind == "conv_transpose") != layer.is_transposed:
            raise ValueError(
                f"the weight of layer {layer.name!r} is used by another kind of operation, expected the layer's own"
            )
        sums, spec = self.sums[use.weight], use.spec(x)
        joint = self.joint and layer.bias is not None
        sums.add_positions(math.prod(spec.output_size), len(x))
        if sums.roots is not None:
            root = network(ops.kfac_input_root, spec)(X=x)
            if joint:
                root = torch.cat([root, root.new_ones((*root.shape[:2], 1))], 2)
            sums.roots.append(root)
            sums.condense()
            return
        if self.approx == "expand":  # positions count as examples
            x = use.as_examples(x)
            spec = use.spec(x)
        factor = network(ops.kfac_input_factor, spec, self.approx, bias=joint)(X=x)
        sums.a = factor.mul_(len(x)) if sums.a is None else sums.a.add_(factor, alpha=len(x))

    @torch.no_grad()
    def add_output(self, use: Use, gradient: Tensor, weight: float) -> None:
        """Add one column of the root at a layer's output."""
        sums = self.sums[use.weight]
        if self.approx == "expand":
            examples = len(gradient)
            gradient = use.as_examples(gradient)
            weight *= examples / len(gradient)
        # The output factor depends on the output only, so use a convolution with kernel size 1.
        factor = network(ops.kfac_output_factor, use.output_spec(gradient), self.approx)(V=gradient[None])
        sums.b = factor.mul_(weight) if sums.b is None else sums.b.add_(factor, alpha=weight)

    def factors(self, reduction: str, group: dist.ProcessGroup | None = None) -> KroneckerFactors:
        """The factors over all batches and, if a group is given, over all of its ranks."""
        blocks: dict[str, Block] = {}
        if group is not None:
            gather(self, group)
        for layer in self.layers:
            sums = self.sums[layer.weight]
            a, root = sums.a, None
            if sums.roots:
                root = torch.cat(sums.roots, 1)
                if a is not None:
                    a.add_(root.mT @ root)
                    root = None
            if a is not None:
                a = a.div_(self.examples)
            if root is not None:
                root = root * self.examples**-0.5
            b = sums.b
            if b is not None:
                b = b.div_(require_counted(self.weight)) if reduction == "mean" else b
            if b is None:  # forward only, or no gradient reached the layer
                b = _constant(layer, a if a is not None else root, float(self.fisher == "forward-only"))
            positions = sums.positions or 0
            mean = sums.ones / self.examples
            blocks |= _blocks(layer, a, root, b, self.joint, positions, mean if self.approx == "expand" else 1.0)
        return KroneckerFactors(blocks, self.approx, self.examples, reduction=reduction, outputs=self.outputs)


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


def _constant(layer: Layer, like: Tensor | None, factor: float) -> Tensor:
    """An output factor that is a multiple of the identity."""
    assert like is not None
    c_out = layer.output_channels // layer.groups
    return torch.eye(c_out, dtype=like.dtype, device=like.device).mul_(factor).repeat(layer.groups, 1, 1)


def _blocks(
    layer: Layer, a: Tensor | None, root: Tensor | None, b: Tensor, joint: bool, positions: int, ones: float
) -> dict[str, Block]:
    """The blocks of one layer; `ones` is the input factor of the bias."""
    joint = joint and layer.bias is not None
    names = (layer.weight, layer.bias) if joint and layer.bias is not None else (layer.weight,)
    found = {layer.weight: Block(names, layer.weight_shape, layer.is_transposed, a, root, b, positions)}
    if layer.bias is not None and not joint:
        # The input of a bias is 1 at every position.
        factor = b.new_full((layer.groups, 1, 1), ones)
        shape = (layer.output_channels,)
        found[layer.bias] = Block((layer.bias,), shape, False, factor, None, b, positions)
    return found
