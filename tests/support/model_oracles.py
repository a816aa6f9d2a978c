"""Curvature of a random model by its definitions, example by example, with torch alone: no code of the library.

An example is run alone, so no axis has to be known as the batch's. Layers are recorded by replacing their `forward`,
which sees inputs after all pre-hooks and results before all hooks; a zero that requires gradients is added to every
result, and the layer's parameters are detached inside. A parameter that has a gradient nevertheless is used elsewhere.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.models import FUNCTIONS, Case, packed, unpacked

Rows = dict[str, Tensor]


@dataclass
class Record:
    """What a layer was called with for one example, and the Jacobian of the outputs by its results."""

    patches: list[Tensor] = field(default_factory=list)  # [groups, positions, d] for each call
    marks: list[Tensor] = field(default_factory=list)
    jacobian: Tensor | None = None  # [outputs, groups, positions, channels of a group]
    faithful: bool = True


class Oracle:
    """Everything that is compared, computed when asked for.

    Args:
        case: the model with loss and data.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, case.plain
        self.parameters = dict(self.model.named_parameters())
        self.aliases = dict(self.model.named_parameters(remove_duplicate=False))
        self.trained = [name for name, p in self.parameters.items() if p.requires_grad]

    # ------------------------------------------------------------------------------------------------ single examples
    @contextlib.contextmanager
    def _everything_trains(self) -> Iterator[None]:
        frozen = [p for p in self.parameters.values() if not p.requires_grad and p.is_floating_point()]
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            with self.case.world(), torch.enable_grad():
                yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)

    @cached_property
    def _whole(self) -> tuple[Any, float]:
        """The outputs of the batch without a graph, and what its loss is divided by."""
        case = self.case
        inputs = [one.detach() for one in case.inputs]
        inputs = [one.double() if one.is_floating_point() else one for one in inputs]
        with case.world(), torch.no_grad():
            torch.manual_seed(case.seed)
            out = case.run(self.model, inputs)
        first = unpacked(case.pack, out)[0]
        return out, case.loss.divisor(first if self._lone else out, case.wide_targets)

    @property
    def _lone(self) -> bool:
        """Whether the loss takes the one tensor that is in what the model returns."""
        return self.case.pack != "tensor" and (self.case.loss.known or self.case.pack == "tuple of one")

    @property
    def divisor(self) -> float:
        return self._whole[1]

    def _heads(self, n: int) -> tuple[list[Tensor], Tensor]:
        """An example's outputs with their graph, and its target."""
        case = self.case
        inputs, y = case.example(n)
        if case.seeded:
            torch.manual_seed(case.seed)
            everything = [one.double() if one.is_floating_point() else one for one in case.inputs]
            return [case.own(one, n) for one in unpacked(case.pack, case.run(self.model, everything))], y
        return unpacked(case.pack, case.run(self.model, inputs)), y

    def _part(self, heads: list[Tensor], y: Tensor) -> Tensor:
        """An example's part of the loss."""
        out = heads[0] if self._lone else packed(self.case.pack, heads)
        return self.case.loss.summed(out, y) / self.divisor

    @cached_property
    def gradients(self) -> Rows:
        """[batch, *shape] by parameter."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.parameters}
        with self._everything_trains():
            for n in range(self.case.batch):
                heads, y = self._heads(n)
                parts = torch.autograd.grad(self._part(heads, y), list(self.parameters.values()), allow_unused=True)
                for (name, p), part in zip(self.parameters.items(), parts, strict=True):
                    found[name].append(torch.zeros_like(p) if part is None else part)
        return {name: torch.stack(rows) for name, rows in found.items()}

    @cached_property
    def jacobians(self) -> list[tuple[Rows, Tensor, Tensor]]:
        """For each example the Jacobian [outputs, *shape] by parameter, the loss's Hessian and gradient there."""
        with self._everything_trains():
            return [self._jacobian(n) for n in range(self.case.batch)]

    def _jacobian(self, n: int) -> tuple[Rows, Tensor, Tensor]:
        heads, y = self._heads(n)
        flat = torch.cat([head.reshape(-1) for head in heads])
        rows: dict[str, list[Tensor]] = {name: [] for name in self.parameters}
        for entry in flat:
            parts = torch.autograd.grad(entry, list(self.parameters.values()), retain_graph=True, allow_unused=True)
            for (name, p), part in zip(self.parameters.items(), parts, strict=True):
                rows[name].append(torch.zeros_like(p) if part is None else part)
        curved, slope = self._curvature(heads, y)
        return {name: torch.stack(one) for name, one in rows.items()}, curved, slope

    def _curvature(self, heads: list[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
        """Hessian and gradient of an example's part of the loss by its outputs."""
        shapes = [head.shape for head in heads]

        def part(flat: Tensor) -> Tensor:
            pieces = flat.split([shape.numel() for shape in shapes])
            return self._part([one.reshape(shape) for one, shape in zip(pieces, shapes, strict=True)], y)

        flat = torch.cat([head.detach().reshape(-1) for head in heads]).requires_grad_()
        (slope,) = torch.autograd.grad(part(flat), flat, create_graph=True)
        if not slope.requires_grad:
            return flat.new_zeros(len(flat), len(flat)), slope.detach()
        rows = [torch.autograd.grad(one, flat, retain_graph=True, allow_unused=True)[0] for one in slope]
        zero = torch.zeros_like(flat)
        return torch.stack([zero if row is None else row for row in rows]).detach(), slope.detach()

    # ------------------------------------------------------------------------------------------------------- the GGN
    def quadratic(self, rows: list[Tensor], fisher: str) -> Tensor:
        """Σ over examples of the diagonal of RᵀHR for rows [outputs, ...] of each; empirical: its gradient's square."""
        total: Any = 0
        for (_, curved, slope), one in zip(self.jacobians, rows, strict=True):
            if fisher == "empirical":
                total = total + self.divisor * torch.tensordot(slope.to(one.dtype), one, 1).abs().square()
            else:
                product = (one.conj() * torch.tensordot(curved.to(one.dtype), one, 1)).sum(0)
                total = total + (product.real if product.is_complex() else product)
        return total

    def ggn_diagonal(self, fisher: str = "type-2") -> Rows:
        return {name: self.quadratic([one[0][name] for one in self.jacobians], fisher) for name in self.parameters}

    def blocks(self, rows: list[Tensor], fisher: str) -> Tensor:
        """Σ RᵀHR for rows [outputs, block, entries]: [block, entries, entries]."""
        total: Any = 0
        for (_, curved, slope), one in zip(self.jacobians, rows, strict=True):
            if fisher == "empirical":
                g = torch.tensordot(slope, one, 1)
                total = total + self.divisor * g[:, :, None] * g[:, None, :]
            else:
                total = total + torch.einsum("mbe,mk,kbf->bef", one, curved, one)
        return total

    def mini_blocks(self, name: str, module: nn.Module, block: str, fisher: str) -> list[Tensor]:
        """The blocks of a weight; more than one reading for transposed convolutions."""
        shape = self.parameters[name].shape
        groups = getattr(module, "groups", 1)
        first, second, kernel = shape[0], shape[1], shape[2:]
        k = kernel.numel()
        orders = [False, True] if getattr(module, "transposed", False) else [False]
        found = []
        for swapped in orders:
            rows = [one[0][name].reshape(-1, groups, first // groups, second, k) for one in self.jacobians]
            if swapped:  # output channels first
                rows = [one.transpose(2, 3) for one in rows]
            a, b = rows[0].shape[2:4]
            if block == "filter":
                rows = [one.reshape(len(one), groups * a, b * k) for one in rows]
                found.append(self.blocks(rows, fisher))
            elif block == "kernel":
                rows = [one.reshape(len(one), groups * a * b, k) for one in rows]
                found.append(self.blocks(rows, fisher).reshape(groups * a, b, *kernel, *kernel))
            else:
                rows = [one.permute(0, 1, 4, 2, 3).reshape(len(one), groups * k, a * b) for one in rows]
                found.append(self.blocks(rows, fisher).reshape(groups, *kernel, a * b, a * b))
        return found

    def ntk(self, names: Iterable[str]) -> Tensor:
        """J Jᵀ over some parameters: [n, n', c, c']."""
        j = torch.stack([torch.cat([rows[name].flatten(1) for name in names], 1) for rows, _, _ in self.jacobians])
        return torch.einsum("nap,mbp->nmab", j, j)

    def hessian_entries(self, rng: random.Random, count: int) -> dict[str, tuple[Tensor, Tensor]]:
        """By parameter some flat places and the diagonal of the loss's Hessian there."""
        with self._everything_trains():
            total: Any = 0
            if self.case.seeded:
                torch.manual_seed(self.case.seed)
                inputs = [one.double() if one.is_floating_point() else one for one in self.case.inputs]
                out = unpacked(self.case.pack, self.case.run(self.model, inputs))
                total = self._part(out, self.case.wide_targets)
            else:
                for n in range(self.case.batch):
                    total = total + self._part(*self._heads(n))
            names = [name for name, p in self.parameters.items() if not p.is_complex()]
            parameters = [self.parameters[name] for name in names]
            firsts = torch.autograd.grad(total, parameters, create_graph=True, allow_unused=True)
            found = {}
            for name, p, first in zip(names, parameters, firsts, strict=True):
                places = sorted(rng.sample(range(p.numel()), min(count, p.numel())))
                values = []
                for place in places:
                    second = None
                    if first is not None and first.requires_grad:
                        (second,) = torch.autograd.grad(
                            first.reshape(-1)[place], p, retain_graph=True, allow_unused=True
                        )
                    values.append(p.new_zeros(()) if second is None else second.reshape(-1)[place].detach())
                found[name] = torch.tensor(places), torch.stack(values)
        return found

    # ---------------------------------------------------------------------------------------------------- the factors
    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        """Convolutions and linear layers by their name, with a weight that is a parameter of theirs."""
        found, seen = {}, set()
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and id(module) not in seen:
                own = {key for key, _ in module.named_parameters(recurse=False)}
                if "weight" in own and own <= {"weight", "bias"} and not module.weight.is_complex():
                    found[name] = module
                    seen.add(id(module))
        return found

    @cached_property
    def records(self) -> tuple[list[dict[str, Record]], set[str]]:
        """For each example and layer what it did; and the parameters that are used elsewhere, too."""
        with self._everything_trains():
            return self._recorded()

    def _recorded(self) -> tuple[list[dict[str, Record]], set[str]]:
        every: list[dict[str, Record]] = []
        elsewhere: set[str] = set()
        for n in range(self.case.batch):
            found = {name: Record() for name in self.layers}
            with contextlib.ExitStack() as stack:
                for name, module in self.layers.items():
                    stack.enter_context(_recording(module, found[name]))
                heads, _ = self._heads(n)
            flat = torch.cat([head.reshape(-1) for head in heads])
            marks = [mark for record in found.values() for mark in record.marks]
            parameters = list(self.parameters.values())
            rows = []
            for entry in flat:
                if not entry.requires_grad:
                    rows.append([torch.zeros_like(mark) for mark in marks])
                    continue
                parts = torch.autograd.grad(entry, [*marks, *parameters], retain_graph=True, allow_unused=True)
                rows.append(
                    [torch.zeros_like(m) if p is None else p for p, m in zip(parts[: len(marks)], marks, strict=True)]
                )
                for name, part in zip(self.parameters, parts[len(marks) :], strict=True):
                    if part is not None and bool(part.any()):
                        elsewhere.add(name)
            at = 0
            for name, module in self.layers.items():
                record = found[name]
                pieces = []
                for mark in record.marks:
                    pieces.append(_by_position(module, torch.stack([row[at] for row in rows]), mark))
                    at += 1
                if pieces:
                    record.jacobian = torch.cat(pieces, 2)
            every.append(found)
        return every, elsewhere

    @cached_property
    def plain_layers(self) -> dict[str, nn.Module]:
        """Layers of which each is one call of torch's own function for every example, and of nobody else's weight."""
        records, elsewhere = self.records
        names: dict[int, int] = {}
        for p in self.aliases.values():
            names[id(p)] = names.get(id(p), 0) + 1
        found = {}
        for name, module in self.layers.items():
            prefix = f"{name}." if name else ""
            mine = [f"{prefix}{key}" for key, _ in module.named_parameters(recurse=False)]
            if any(one in elsewhere for one in mine):
                continue
            if all(len(record[name].marks) == 1 and record[name].faithful for record in records):
                found[name] = module
        return found

    def with_same(self, name: str, key: str) -> list[str]:
        """The layers with the same weight or bias as a layer."""
        own = getattr(self.layers[name], key)
        return [other for other, module in self.layers.items() if getattr(module, key) is own]

    def factors(
        self,
        name: str,
        approx: str,
        fisher: str,
        joint: bool,
        trained_bias: bool = True,
        unweighted: bool = False,
        key: str = "weight",
    ) -> tuple[Tensor, Tensor]:
        """A and B of a layer's weight or bias by definition, all its calls and rows of an example being positions."""
        module = self.layers[name]
        bias = module.bias is not None and joint and trained_bias
        a: Any = 0
        b: Any = 0
        divisor = self.unweighted if unweighted else self.divisor
        for record, (_, curved, slope) in zip(self.records[0], self.jacobians, strict=True):
            uses = [record[other] for other in self.with_same(name, key)]
            p = torch.cat([patch for one in uses for patch in one.patches], 1)
            if bias:
                p = torch.cat([p, torch.ones_like(p[..., :1])], 2)
            j = torch.cat([one.jacobian for one in uses if one.jacobian is not None], 2)
            positions = j.shape[2]
            if approx == "reduce":
                p, j = p.mean(1, keepdim=True), j.sum(2, keepdim=True)
                positions = 1
            a = a + torch.einsum("grd,gre->gde", p, p) / self.case.batch
            if fisher == "empirical":
                g = torch.tensordot(slope, j, 1)
                b = b + torch.einsum("grc,grd->gcd", g, g) * divisor / positions
            elif fisher == "forward-only":
                b = torch.eye(j.shape[3], dtype=j.dtype).expand(j.shape[1], -1, -1)
            else:
                b = b + torch.einsum("mgrc,mk,kgrd->gcd", j, curved, j) / positions
        return a, b

    @property
    def unweighted(self) -> float:
        """The divisor if every target counts one."""
        out = self._whole[0]
        assert self.case.loss.unweighted is not None
        return self.case.loss.unweighted(unpacked(self.case.pack, out)[0], self.case.wide_targets)

    def positions(self, name: str, key: str = "weight") -> int:
        """The number of positions of all calls with a layer's weight or bias, for one example."""
        found = [self.records[0][0][other].jacobian for other in self.with_same(name, key)]
        return sum(one.shape[2] for one in found if one is not None)

    def weight_rows(self, name: str, rows: Tensor) -> Tensor:
        """Vectors of a weight's shape as [..., groups, rows of B, rows of A]."""
        return as_rows(self.layers[name], rows)


def as_rows(module: nn.Module, rows: Tensor) -> Tensor:
    """Vectors [m, *weight's shape] as [m, groups, rows of B, rows of A]."""
    shape, groups = rows.shape[1:], getattr(module, "groups", 1)
    found = rows.reshape(len(rows), groups, shape[0] // groups, shape[1], -1)
    if getattr(module, "transposed", False):
        found = found.transpose(2, 3)
    return found.flatten(3)


def dense(a: Tensor, b: Tensor) -> Tensor:
    """kron(B, A) for every group."""
    found = torch.einsum("gij,gkl->gikjl", b, a)
    return found.reshape(len(a), b.shape[1] * a.shape[1], -1)


def from_rows(module: nn.Module, rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `as_rows`, of one vector."""
    groups = rows.shape[0]
    if getattr(module, "transposed", False):
        inner = shape[0] // groups
        return rows.reshape(groups, rows.shape[1], inner, -1).transpose(1, 2).reshape(shape)
    return rows.reshape(shape)


# ------------------------------------------------------------------------------------------------------------ recording
@contextlib.contextmanager
def _recording(module: nn.Module, record: Record) -> Iterator[None]:
    before = vars(module).get("forward")
    inner = module.forward

    def forward(*arguments: Any, **named: Any) -> Tensor:
        own = dict(module._parameters)
        x = arguments[0] if arguments else named["input"]
        for key, p in own.items():
            module._parameters[key] = None if p is None else p.detach().requires_grad_(False)  # type: ignore[assignment]
        try:
            out = inner(*arguments, **named)
            if record.faithful:
                record.faithful = _is_faithful(module, x.detach(), out.detach())
        finally:
            module._parameters.update(own)
        if record.faithful:
            record.patches.append(patches(module, x.detach()))
        mark = torch.zeros_like(out, requires_grad=True)
        record.marks.append(mark)
        return out + mark

    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _is_faithful(module: nn.Module, x: Tensor, out: Tensor) -> bool:
    """Whether a call was torch's own function of the input, weight and bias."""
    with torch.no_grad():
        try:
            expected = _applied(module, x, module.weight, module.bias)  # type: ignore[arg-type]
        except RuntimeError:
            return False
    return expected.shape == out.shape and torch.allclose(expected, out, rtol=1e-9, atol=1e-11)


def _applied(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int | None = None) -> Tensor:
    """The layer's function with another weight."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    dims = len(module.kernel_size)
    groups = module.groups if groups is None else groups
    plain, transposed = FUNCTIONS[dims]
    if module.transposed:
        return transposed(
            x, weight, bias, module.stride, module.padding, module.output_padding, groups, module.dilation
        )
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        return plain(x, weight, bias, module.stride, 0, module.dilation, groups)
    return plain(x, weight, bias, module.stride, module.padding, module.dilation, groups)


def patches(module: Any, x: Tensor) -> Tensor:
    """The rows that a layer's weight is multiplied with, [groups, positions, d]: its function with one-hot weights."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    dims = len(module.kernel_size)
    if x.ndim == dims + 1:
        x = x[None]
    found = []
    k = torch.Size(module.kernel_size).numel()
    for part in x.chunk(module.groups, 1):
        c = part.shape[1]
        eye = torch.eye(c * k, dtype=x.dtype)
        if module.transposed:
            weight = eye.reshape(c * k, c, k).movedim(0, 1).reshape(c, c * k, *module.kernel_size)
        else:
            weight = eye.reshape(c * k, c, *module.kernel_size)
        rows = _applied(module, part, weight, None, 1)
        found.append(rows.flatten(2).mT.flatten(0, 1))
    return torch.stack(found)


def _by_position(module: Any, rows: Tensor, like: Tensor) -> Tensor:
    """Derivatives [outputs, *a result's shape] as [outputs, groups, positions, channels of a group]."""
    if isinstance(module, nn.Linear):
        return rows.reshape(len(rows), 1, -1, rows.shape[-1])
    dims = len(module.kernel_size)
    if like.ndim == dims + 1:
        rows = rows[:, None]
    m, images, channels = rows.shape[:3]
    found = rows.reshape(m, images, module.groups, channels // module.groups, -1)
    return found.permute(0, 2, 1, 4, 3).reshape(m, module.groups, -1, channels // module.groups)
