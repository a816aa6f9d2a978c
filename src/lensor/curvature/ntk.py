"""The empirical neural tangent kernel, of one or two sets of inputs.

The kernel is J(x) J(x')ᵀ. Each parameter contributes a term. For the weight of a layer with one use, this is a network
of the layer's inputs and of the gradients at its outputs, so that no Jacobian has to be formed. For other parameters,
it is a product of Jacobians, for one parameter after the other.

With a memory limit, the kernel is computed in blocks: some examples and outputs of the first set with some of the
second set, like a blocked matrix product. A block of the first set is run once; the second set is run again for each of
these blocks. The sizes of blocks follow from the sizes of the tensors in a first pass with one example.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lensor.arguments import described
from lensor.curvature.batch_axes import Given
from lensor.curvature.capture import Use, computing, own, running, unwrapped
from lensor.curvature.complete import CompleteCapture
from lensor.curvature.data import known_containers, narrowed, size_of
from lensor.curvature.described import SHARED
from lensor.curvature.example_gradients import rows_of
from lensor.curvature.jacobian import Passed, Watched
from lensor.curvature.networks import example_roots, network
from lensor.network import AnyNetwork
from lensor.pattern import as_integer
from lensor.planner.settings import preferring
from lensor.spec import ConvSpec


@described(SHARED)
def empirical_ntk(
    model: nn.Module,
    inputs: Any,
    other: Any = None,
    *,
    outputs: str | int = "all",
    max_bytes: int | None = None,
    layers: Iterable[str] | None = None,
    strict: bool = False,
    batch_axis: Given = None,
) -> Tensor:
    """The empirical neural tangent kernel of a model's outputs with respect to the trainable parameters.

    This takes one forward pass for each set of inputs, and one backward pass for each output. Use `jacobians` if you
    need the Jacobians themselves.

    Args:
        model: the model, in evaluation mode or without layers that mix examples; outputs [batch, c].
        inputs: a batch: a tensor, a tuple of arguments or a mapping.
        other: a second batch, for the columns of the kernel; `inputs` unless given.
        outputs: "all": the kernel for each pair of outputs; "trace": its sum over pairs of equal outputs, not divided
            by c; an integer: the kernel of this output only, with one backward pass.
        max_bytes: a limit on memory. The kernel is computed in blocks of examples and outputs, as large as the limit
            allows, with a forward pass for each pair of blocks. The limit counts what autograd keeps in the forward
            pass, the gradients at the outputs of layers, Jacobians and intermediate results; it does not count the
            model, the inputs and the result. All examples and outputs are computed at once unless given.
        strict: has no effect, since all parameters are supported.

    Returns:
        [batch, other batch, c, c]: J(inputs) J(other)ᵀ; the first example and the first output form its row, the second
        ones its column. [batch, other batch] for "trace" or a single output.

    Example:
        >>> import torch
        >>> from lensor.curvature import empirical_ntk
        >>> model, x = torch.nn.Linear(3, 2, bias=False), torch.eye(3)
        >>> empirical_ntk(model, x[:2])[:, :, 0, 0]
        tensor([[1., 0.],
                [0., 1.]])
        >>> empirical_ntk(model, x, 3 * x[:1], outputs="trace")
        tensor([[6.],
                [0.],
                [0.]])

    Raises:
        TypeError: for a model of an unsupported type, or inputs that the model does not take.
        ValueError: for an unknown layer, a layer that does not run, a model that mixes examples, an output that does
            not exist, a different number of outputs for `other`, or a limit that is too low for one example and one
            output.

    Equation:
        Θ_nmcd = Σ_p ∂f_nc/∂θ_p ∂f_md/∂θ_p (Jacot et al., 2018).
    """
    if outputs not in ("all", "trace"):
        if isinstance(outputs, str):
            raise ValueError(f"outputs is {outputs!r}, expected 'all', 'trace' or the number of an output")
        outputs = as_integer(outputs, "outputs")
    if max_bytes is not None and as_integer(max_bytes, "max_bytes") < 1:
        raise ValueError(f"max_bytes is {max_bytes}, expected at least 1")
    model = unwrapped(model)
    with running(model):
        sets = [_Set(Watched(model, layers, batch_axis), own(one)) for one in (inputs, other) if one is not None]
        kernel = _Kernel(sets[0], sets[-1], outputs, max_bytes)
        return kernel.computed()


class _Set:
    """A set of inputs, of which some examples at a time are run."""

    def __init__(self, watched: Watched, inputs: Any) -> None:
        self.watched, self.inputs = watched, known_containers(inputs)
        self.size = size_of(self.inputs, empty=True)

    def run(self, start: int, stop: int, whole: bool) -> Passed:
        """Run the examples from `start` to `stop`."""
        if (start, stop) == (0, self.size):
            return self.watched.run(self.inputs, whole=whole)
        return self.watched.run(narrowed(self.inputs, self.size, start, stop), stop - start, whole)


@dataclass
class _Part:
    """Unit vectors at some outputs of some examples, propagated to the uses of parameters.

    Args:
        passed: the examples after their forward pass.
        start: the number of the first example.
        places: the outputs.
        units: the result of `Passed.units` for them.
    """

    passed: Passed
    start: int
    places: range
    units: list[tuple[dict[Any, Any], dict[str, Tensor]]]

    @property
    def examples(self) -> slice:
        """The examples."""
        return slice(self.start, self.start + self.passed.batch.size)

    @property
    def outputs(self) -> slice:
        """The outputs."""
        return slice(self.places.start, self.places.stop)

    def only_use(self, name: str) -> Use | None:
        """As for `Batch.only_use`."""
        return self.passed.batch.only_use(name, self.units[0][1]) if self.units else None

    def of_layer(self, use: Use) -> tuple[Tensor, Tensor]:
        """The input of a use and the gradients at its output, [v, n, c_out, *output_size]."""
        return self.passed.batch.capture.inputs[use], torch.stack([vectors[use] for vectors, _ in self.units])

    def rows(self, done: set[str]) -> Iterator[Tensor]:
        """The Jacobian [v, n, entries] with respect to each parameter that is not done."""
        columns = [self.passed.batch.gradients(*one, done) for one in self.units]
        for parts in zip(*columns, strict=True):
            yield torch.stack([rows_of(gradient) for _, gradient in parts])


class _Kernel:
    """The kernel of two sets of inputs.

    Args:
        rows: the first set.
        columns: the second set; the same object if the kernel is that of one set.
        outputs: as for `empirical_ntk`.
        max_bytes: as for `empirical_ntk`.
    """

    def __init__(self, rows: _Set, columns: _Set, outputs: str | int, max_bytes: int | None) -> None:
        self.rows, self.columns, self.outputs, self.max_bytes = rows, columns, outputs, max_bytes
        self.is_symmetric = rows is columns
        self.examples, self.at_once = max(rows.size, columns.size, 1), 0
        self.preferred: int | None = None
        self.found: Tensor | None = None

    def computed(self) -> Tensor:
        """The kernel."""
        if self.max_bytes is not None and self.rows.size and self.columns.size:
            self._divide(self.max_bytes)
        for one in self._parts(self.rows):
            for two in self._parts(self.columns, one):
                with computing(one.passed.outputs):
                    self._add(one, two)
                del two  # before the next part is computed
            del one
        assert self.found is not None
        return self.found

    def _parts(self, of: _Set, row: _Part | None = None) -> Iterator[_Part]:
        """The parts of a set: all of them, or those that are needed for a part of the first set."""
        first = row.start if row is not None and self.is_symmetric else 0
        for start in range(first, max(of.size, 1), self.examples):
            is_same = row is not None and self.is_symmetric and start == row.start
            if row is not None and is_same:
                passed = row.passed
            else:
                passed = of.run(start, min(start + self.examples, of.size), whole=self.max_bytes is None)
            count = passed.outputs.shape[1]
            if row is not None and count != row.passed.outputs.shape[1]:
                raise ValueError(
                    f"the model has {count} outputs for other, expected {row.passed.outputs.shape[1]}, as for inputs"
                )
            for places in self._places(count):
                if row is None or not is_same or places.start > row.places.start:
                    if row is None or self.outputs != "trace" or places == row.places:
                        yield _Part(passed, start, places, passed.units(places))
                elif places == row.places:
                    yield row
            del passed  # before the next examples are run

    def _places(self, count: int) -> list[range]:
        """The outputs that are propagated together."""
        if isinstance(self.outputs, int):
            if not 0 <= self.outputs < count:
                raise ValueError(f"outputs is {self.outputs}, expected a number from 0 to {count - 1}")
            return [range(self.outputs, self.outputs + 1)]
        step = self.at_once or max(count, 1)
        return [range(start, min(start + step, count)) for start in range(0, max(count, 1), step)]

    def _add(self, one: _Part, two: _Part) -> None:
        """Add the block of two parts to the kernel."""
        block = self._block(one, two)
        if self.found is None:
            c = one.passed.outputs.shape[1]
            shape = (c, c) if self.outputs == "all" else ()
            self.found = block.new_zeros((self.rows.size, self.columns.size, *shape))
        if self.outputs == "all":
            self.found[one.examples, two.examples, one.outputs, two.outputs] = block
            if self.is_symmetric and one is not two:
                self.found[two.examples, one.examples, two.outputs, one.outputs] = block.permute(1, 0, 3, 2)
            return
        self.found[one.examples, two.examples] += block
        if self.is_symmetric and one.start != two.start:
            self.found[two.examples, one.examples] += block.mT

    def _block(self, one: _Part, two: _Part) -> Tensor:
        """The kernel of two parts: [n, m, c, c], or [n, m]."""
        like, is_summed = one.passed.outputs, self.outputs != "all"
        n, m, v, w = one.passed.batch.size, two.passed.batch.size, len(one.places), len(two.places)
        shape = (n, m) if is_summed else (v * n, w * m)
        found = torch.zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        done = set(self.rows.watched.skipped)
        for name in self.rows.watched.wanted:
            use, other = one.only_use(name), two.only_use(name)
            if use is None or other is None:
                continue
            done.add(name)
            (x, s), (spec, others) = one.of_layer(use), (one.passed.batch.capture.spec(use), {})
            if one is two:
                net = network(_gram, spec, spec, is_summed, True)
            else:
                net = network(_gram, spec, two.passed.batch.capture.spec(other), is_summed, False)
                others = dict(zip(("X2", "S2"), two.of_layer(other), strict=True))
            with preferring(self.preferred) if self.preferred is not None else nullcontext():
                found += net(X=x, S=s, **others)
        pairs = ((rows, rows) for rows in one.rows(done))
        for rows, columns in pairs if one is two else zip(one.rows(done), two.rows(done), strict=True):
            if is_summed:
                for row, column in zip(rows, columns, strict=True):
                    found += row.to(found.dtype) @ column.to(found.dtype).mT
            else:
                found += rows.flatten(0, 1).to(found.dtype) @ columns.flatten(0, 1).to(found.dtype).mT
        return found if is_summed else found.reshape(v, n, w, m).permute(1, 3, 0, 2)

    # ---------------------------------------------------------------------------------------------------- memory limit
    def _divide(self, limit: int) -> None:
        """Choose how many examples and outputs are computed at once.

        Raises:
            ValueError: if the limit is too low for one example and one output.
        """
        sizes = [_Sizes.of(one) for one in ([self.rows] if self.is_symmetric else [self.rows, self.columns])]
        count, most = sizes[0].outputs if isinstance(self.outputs, str) else 1, self.examples

        def needed(examples: int, outputs: int) -> int:
            parts = 1 if self.is_symmetric and examples == most else 2
            return max(one.needed(examples, outputs, parts, self.outputs != "all") for one in sizes)

        choices = [(most, count)]
        choices += [(examples, count) for examples in _falling(most)] + [(1, outputs) for outputs in _falling(count)]
        for examples, outputs in choices:
            if needed(examples, outputs) <= limit:
                self.examples, self.at_once = examples, outputs
                self.preferred = limit - needed(examples, outputs) + min(one.term(examples, outputs) for one in sizes)
                return
        raise ValueError(
            f"max_bytes is {limit}, expected at least {needed(1, 1)}, for one example and one output at a time"
        )


@dataclass(frozen=True)
class _Sizes:
    """The bytes that one example needs.

    Args:
        outputs: the number of outputs.
        item: the bytes of one entry of the kernel.
        activations: the bytes that autograd keeps.
        cotangents: the bytes of the gradients at the outputs of all uses, for one output of the model.
        functions: the bytes of the Jacobian of one output with respect to the parameters of other functions.
        rows: the bytes of the Jacobian of one output with respect to the largest parameter that needs it.
        layers: for each weight of which the Jacobian is not needed, the bytes of this Jacobian, the number of positions
            of the layer's output, and the bytes of the gradients at it.
    """

    outputs: int
    item: int
    activations: int
    cotangents: int
    functions: int
    rows: int
    layers: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, inputs: _Set) -> _Sizes:
        """The sizes in a pass with one example."""
        saved = dict[int, int]()

        def save(x: Tensor) -> Tensor:
            saved[x.data_ptr()] = x.nbytes
            return x

        with saved_tensors_hooks(save, lambda x: x):
            passed = inputs.run(0, 1, whole=False)
        capture = passed.batch.capture
        assert isinstance(capture, CompleteCapture)
        model = inputs.watched.model
        for one in (*model.parameters(), *model.buffers()):
            saved.pop(one.data_ptr(), None)
        for x in capture.inputs.values():
            saved[x.data_ptr()] = x.nbytes
        item = torch.promote_types(passed.outputs.dtype, torch.float32).itemsize
        alone, rows = {}, [0]
        for name in inputs.watched.wanted:
            entries = inputs.watched.targets.parameters[name].numel()
            uses = capture.by_parameter().get(name, [])
            if len(uses) == 1 and name not in capture.used:
                spec = capture.spec(uses[0])
                alone[name] = entries * item, math.prod(spec.output_size), uses[0].shape.numel() * item
            else:
                rows.append(entries * item)
        outputs = sum(output.shape.numel() for use in capture.functions for output in use.outputs)
        outputs += sum(use.shape.numel() for use in capture.uses)
        sources = sum(source.tensor.numel() for use in capture.functions for source in use.sources)
        return cls(
            passed.outputs.shape[1],
            item,
            sum(saved.values()),
            outputs * item,
            sources * item,
            max(rows),
            tuple(alone.values()),
        )

    def needed(self, examples: int, outputs: int, parts: int, is_summed: bool) -> int:
        """The bytes that a block needs.

        Args:
            examples: the number of examples in each part.
            outputs: the number of outputs in each part.
            parts: the number of parts, 1 or 2.
            is_summed: whether outputs are summed, or there is only one.
        """
        block = (examples * (1 if is_summed else outputs)) ** 2 * self.item
        held = parts * examples * (self.activations + outputs * (self.cotangents + self.functions))
        passing = 2 * max(examples, 3 if examples > 1 else 1) * self.activations  # a backward or a trial pass
        return held + passing + 3 * block + self.term(examples, outputs)

    def term(self, examples: int, outputs: int) -> int:
        """The bytes for the term of one parameter: two Jacobians, or products over pairs of positions."""
        rows = examples * outputs
        found = [4 * rows * self.rows]
        for weight, positions, cotangents in self.layers:
            pairs = (rows * positions) ** 2 * self.item
            found.append(2 * min(rows * weight, pairs) + 2 * rows * cotangents)
        return max(found)


def _gram(spec: ConvSpec, other: ConvSpec, is_summed: bool, is_same: bool) -> AnyNetwork:
    """The product of the Jacobians of a weight: X, S, X2, S2 -> [(v n), (w m)].

    Args:
        spec: the convolution.
        other: the convolution of X2 and S2; it may have other positions.
        is_summed: whether v and w are the same index and summed: the result is [n, m].
        is_same: whether X2 and S2 are X and S.
    """
    roots, second = example_roots(spec), example_roots(other)
    if not is_same:
        second = second.rename_operands(X="X2", S="S2")
    share = [index for leg in roots.output[2:] for index in leg]
    if is_summed:
        return roots.merge(second.rename(n="m"), share=["v", *share], output="n m")
    return roots.merge(second.rename(v="w", n="m"), share=share, output="(v n) (w m)")


def _falling(count: int) -> Iterator[int]:
    """Numbers from `count` to 1, each about four fifths of the previous one."""
    while count > 1:
        yield count
        count = min(count - 1, -(-count * 4 // 5))
    yield 1
