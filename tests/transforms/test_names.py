"""Chains of transforms on random networks whose index names are made to collide, against PyTorch on dense arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lensor
from lensor import NetworkError
from lensor.network import AnyNetwork, Delta, Network, Ones, Operand, Pattern, to_text

NAMES = (
    *("c", "c_", "c__", "c___", "i", "i_", "i__", "ia", "ib", "iab", "iaa", "ca", "cb"),
    *("i_full", "i_full_", "c_full", "i_block", "i_block_", "c_block", "c_block_", "i_c", "c_i", "c_c_", "unit"),
    *("i_pad", "i_every", "i_stride", "i_wide", "i_whole", "pad", "stride", "_", "__"),
)
"""Names that transforms and rules make of one another."""

Operands = dict[str, torch.Tensor]


def dense(net: AnyNetwork, operands: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The value by definition, from arrays alone: differentiable, in double precision."""
    return sum((_term(term, operands) for term in net.terms[1:]), _term(net.terms[0], operands))


def _term(term: Network, operands: Mapping[str, torch.Tensor]) -> torch.Tensor:
    sizes = {index: size for index, size in term.sizes.items() if size is not None}
    number = {index: at for at, index in enumerate(term.sizes)}
    arguments: list[Any] = []
    for node in term.nodes:
        match node:
            case Operand(name):
                array = operands[name]
            case Pattern(pattern):
                array = torch.tensor(pattern.materialize()).double()
            case Delta(indices):
                places = torch.arange(sizes[indices[0]])
                array = torch.zeros([len(places)] * len(indices), dtype=torch.float64)
                array[(places,) * len(indices)] = 1.0
            case Ones(index):
                array = torch.ones(sizes[index], dtype=torch.float64)
        indices = [index for leg in node.legs for index in leg]
        arguments += [array.reshape([sizes[index] for index in indices]), [number[index] for index in indices]]
    arguments += [torch.ones((), dtype=torch.float64), []]
    result = torch.einsum(*arguments, [number[index] for index in term.output_indices])
    shape = [math.prod(sizes[index] for index in leg) for leg in term.output]
    scale = float(term.scale.factor) * math.prod(float(sizes[index]) ** power for index, power in term.scale.powers)
    return result.reshape(shape) * scale


def check(net: AnyNetwork, operands: Operands, expected: torch.Tensor) -> None:
    """The network's value by definition, by its plan, after simplification and after a trip through text."""
    held = {name: operands[name] for name in net.operand_names}
    net.check()
    torch.testing.assert_close(dense(net, held), expected, rtol=1e-9, atol=1e-9, msg=lambda m: f"{net!r}\n{m}")
    simple = net.simplify()
    torch.testing.assert_close(dense(simple, held), expected, rtol=1e-9, atol=1e-9, msg=lambda m: f"{simple!r}\n{m}")
    read = lensor.parse(to_text(net, legend=True))
    assert read == net, f"{net!r} is read as {read!r}"
    torch.testing.assert_close(dense(read, held), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        net(**held) if held else net(), expected if held else expected.numpy(), rtol=1e-9, atol=1e-9
    )


# ------------------------------------------------------------------------------------------------------------ drawing
def draw_network(rng: Random, sizes: dict[str, int], names: Sequence[str], output: Any = None) -> Network:
    """A random network over indices of the pool: operands that may occur twice, deltas, a pattern, groups, a scale."""
    shapes: dict[str, tuple[int, ...]] = {}
    nodes: list[Any] = []
    indices = sorted(sizes)
    for _ in range(rng.randint(1, 4)):
        name = rng.choice(names)
        if name in shapes:  # another occurrence: other indices of the same sizes
            legs = []
            for size in shapes[name]:
                fits = [(i,) for i in sorted(sizes) if sizes[i] == size]
                fits += [(i, j) for i in sorted(sizes) for j in sorted(sizes) if i != j and sizes[i] * sizes[j] == size]
                legs.append(rng.choice(fits))
        else:
            legs = [tuple(rng.sample(indices, rng.randint(1, min(2, len(indices))))) for _ in range(rng.randint(1, 2))]
            shapes[name] = tuple(math.prod(sizes[index] for index in leg) for leg in legs)
        nodes.append(Operand(name, tuple(legs)))
    alike = [(i, j) for i in sorted(sizes) for j in sorted(sizes) if i < j and sizes[i] == sizes[j]]
    if alike and rng.random() < 0.5:
        nodes.append(Delta(rng.choice(alike)))
    if rng.randint(0, 2) == 0:
        nodes.append(Ones(rng.choice(indices)))
    if len(sizes) > 2 and rng.random() < 0.5:
        i, o, k = rng.sample(indices, 3)
        pattern = lensor.IndexPattern(
            sizes[i],
            sizes[k],
            stride=rng.randint(1, 3),
            padding=(rng.randint(-1, 2), 0),
            dilation=rng.randint(1, 2),
            output_size=sizes[o],
        )
        nodes.append(Pattern(pattern, ((i,), (o,), (k,))))
    held = sorted({index for node in nodes for leg in node.legs for index in leg})
    legs = output if output is not None else draw_output(rng, held)
    nodes += [Ones(index) for leg in legs for index in leg if index not in held]  # an output that was asked for
    scale = lensor.Scale(rng.choice([1, 1, 1, 2]) * lensor.Scale().factor)
    return Network.make(nodes, legs, sizes, scale)


def draw_output(rng: Random, held: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    chosen = rng.sample(held, rng.randint(0, min(3, len(held))))
    legs, at = [], 0
    while at < len(chosen):
        length = rng.choice([1, 1, 2])
        legs.append(tuple(chosen[at : at + length]))
        at += length
    return tuple(legs)


def draw_sizes(rng: Random) -> dict[str, int]:
    pool = rng.choice([NAMES[:6], NAMES[:6], NAMES[4:22], NAMES])
    names = rng.sample(pool, rng.randint(2, 6))
    choice = rng.choice([(2,), (3,), (2, 3), (2, 3, 4)])
    return {name: rng.choice(choice) for name in names}


def fill(net: AnyNetwork, operands: Operands) -> None:
    """Arrays for the operands that have none yet."""
    for name, legs in net.operand_legs.items():
        if name not in operands:
            shape = [math.prod(net.sizes[i] or 0 for i in leg) for leg in legs]
            seed = sum(map(ord, name)) + 7 * len(operands)
            operands[name] = torch.tensor(np.random.default_rng(seed).standard_normal(shape)).reshape(shape)


# --------------------------------------------------------------------------------------------------- transforms, drawn
def _unflattened(value: torch.Tensor, net: AnyNetwork) -> torch.Tensor:
    """One axis for each output index."""
    return value.reshape([net.sizes[index] or 0 for index in net.output_indices])


def _regrouped(value: torch.Tensor, output: Sequence[Sequence[str]], sizes: Mapping[str, Any]) -> torch.Tensor:
    return value.reshape([math.prod(sizes[index] for index in leg) for leg in output])


def step_vjp(rng: Random, net: AnyNetwork, operands: Operands) -> tuple[AnyNetwork, torch.Tensor] | None:
    if not net.operand_names:
        return None
    name = rng.choice(net.operand_names)
    vector = f"V{len(operands)}"
    after = net.vjp(name, vector)
    fill_like(operands, vector, dense(net, operands).shape)
    return after, _pulled(net, operands, name, operands[vector])


def _pulled(net: AnyNetwork, operands: Operands, name: str, vector: torch.Tensor) -> torch.Tensor:
    at = operands[name].clone().requires_grad_()
    value = dense(net, {**operands, name: at})
    return torch.autograd.grad(value, at, vector)[0]


def fill_like(operands: Operands, name: str, shape: Sequence[int]) -> None:
    if name not in operands:
        operands[name] = torch.tensor(np.random.default_rng(len(operands)).standard_normal(tuple(shape))).reshape(shape)


def step_jvp(rng: Random, net: AnyNetwork, operands: Operands) -> tuple[AnyNetwork, torch.Tensor] | None:
    if not net.operand_names:
        return None
    name = rng.choice(net.operand_names)
    tangent = f"T{len(operands)}"
    after = net.jvp(name, tangent)
    fill_like(operands, tangent, operands[name].shape)
    rest = {other: array for other, array in operands.items() if other != name}
    expected = torch.func.jvp(lambda array: dense(net, {**rest, name: array}), (operands[name],), (operands[tangent],))[
        1
    ]
    assert isinstance(expected, torch.Tensor)
    return after, expected


def step_jacobian(rng: Random, net: AnyNetwork, operands: Operands) -> tuple[AnyNetwork, torch.Tensor] | None:
    if not net.operand_names:
        return None
    name = rng.choice(net.operand_names)
    if dense(net, operands).numel() * operands[name].numel() > 4000:
        return None
    expected = torch.autograd.functional.jacobian(lambda array: dense(net, {**operands, name: array}), operands[name])
    assert isinstance(expected, torch.Tensor)
    return net.jacobian(name), expected


def step_diagonal(rng: Random, net: AnyNetwork, operands: Operands) -> tuple[AnyNetwork, torch.Tensor] | None:
    pairs = [(i, j) for i in net.output_indices for j in net.output_indices if i != j and net.sizes[i] == net.sizes[j]]
    if not pairs:
        return None
    first, second = rng.choice(pairs)
    value, indices = _unflattened(dense(net, operands), net), list(net.output_indices)
    value = value.diagonal(0, indices.index(first), indices.index(second)).movedim(-1, 0)
    rest = [index for index in indices if index not in (first, second)]
    new = [[i for i in leg if i != second] for leg in net.output if leg != (second,)]
    flat = [index for leg in new for index in leg]
    value = value.permute([[first, *rest].index(index) for index in flat])
    return net.diagonal(first, second), _regrouped(value, new, net.sizes)


def step_block(rng: Random, net: AnyNetwork, operands: Operands) -> tuple[AnyNetwork, torch.Tensor] | None:
    single = [leg[0] for leg in net.output if len(leg) == 1]
    pairs = [
        (i, j) for i in single for j in single if i != j and net.sizes[i] == net.sizes[j] and net.sizes[i] in (2, 4)
    ]
    if not pairs:
        return None
    first, second = rng.choice(pairs)
    value, indices = _unflattened(dense(net, operands), net), list(net.output_indices)
    blocks, places = (net.sizes[first] or 0) // 2, (indices.index(first), indices.index(second))
    for place in sorted(places, reverse=True):
        value = value.unflatten(place, (blocks, 2))
    later = int(places[0] < places[1])
    one, two = places[0] + (1 - later), places[1] + later
    value = value.diagonal(0, one, two).movedim(-1, one if later else one - 1)
    shape = []
    for leg in net.output:
        if first in leg:
            shape += [blocks, 2]
        elif second in leg:
            shape += [2]
        else:
            shape += [math.prod(net.sizes[index] or 0 for index in leg)]
    return net.block_diagonal(first, second, 2), value.reshape(shape)


def step_keep(rng: Random, net: AnyNetwork, operands: Operands) -> tuple[AnyNetwork, torch.Tensor] | None:
    inner = [i for i in sorted(net.sizes) if all(i in term.inner_indices for term in net.terms)]
    inner = [i for i in inner if not any(i in dict(term.scale.powers) for term in net.terms)]
    inner = [i for i in inner if len({term.sizes[i] for term in net.terms}) == 1]
    if not inner or len(net.output) > 4:
        return None
    index = rng.choice(inner)
    place = rng.randint(0, len(net.output))
    parts = [dense(net.select(index, at), operands) for at in range(net.sizes[index] or 0)]
    after = net.keep(index, place)
    torch.testing.assert_close(dense(after, operands).sum(place), dense(net, operands))
    return after, torch.stack(parts, place)


def step_batch(rng: Random, net: AnyNetwork, operands: Operands) -> tuple[AnyNetwork, torch.Tensor] | None:
    if not net.operand_names:
        return None
    chosen = rng.sample(net.operand_names, rng.randint(1, len(net.operand_names)))
    if any(operands[name].ndim > 3 for name in chosen) or len(net.output) > 4:
        return None
    index = rng.choice([name for name in NAMES if name not in net.sizes])
    renamed = {name: f"B{len(operands) + at}" for at, name in enumerate(chosen)}
    for old, new in renamed.items():
        fill_like(operands, new, (2, *operands[old].shape))
    after = net.rename_operands(renamed).batch(index, list(renamed.values()), 2)
    parts = [dense(net, {**operands, **{old: operands[new][at] for old, new in renamed.items()}}) for at in range(2)]
    return after, torch.stack(parts)


def step_substitute(rng: Random, net: AnyNetwork, operands: Operands) -> tuple[AnyNetwork, torch.Tensor] | None:
    if not net.operand_names or sum(len(term.nodes) for term in net.terms) > 8:
        return None
    name = rng.choice(net.operand_names)
    sizes = dict.fromkeys(rng.sample(NAMES, rng.randint(2, 4)), 2)
    free = [index for index in NAMES if index not in sizes]
    legs = []
    for at, size in enumerate(operands[name].shape):
        sizes[free[at]] = size
        legs.append((free[at],))
    other = [f"P{len(operands)}", *(n for n in net.operand_names if operands[n].ndim == 1 and n != name)]
    inside = draw_network(rng, sizes, other[:1], output=()) if not legs else None
    if inside is None:
        own = Operand(other[0], (*legs, tuple(sorted(set(sizes) - {leg[0] for leg in legs}))))
        extra = [Operand(other[0] + "_", ((index,),)) for index in sorted(set(sizes) - {leg[0] for leg in legs})][:1]
        inside = Network.make([own, *extra], legs, sizes)
    fill(inside, operands)
    return net.substitute(name, inside), dense(net, {**operands, name: dense(inside, operands)})


def step_narrow(rng: Random, net: AnyNetwork, operands: Operands) -> tuple[AnyNetwork, torch.Tensor] | None:
    fits = [index for index in net.output_indices if (net.sizes[index] or 0) > 1]
    if not fits:
        return None
    index = rng.choice(fits)
    size = net.sizes[index] or 0
    start = rng.randint(0, size - 1)
    stop = rng.randint(start + 1, size)
    value = _unflattened(dense(net, operands), net)
    value = value.narrow(net.output_indices.index(index), start, stop - start)
    return net.narrow(index, start, stop - start), _regrouped(value, net.output, {**net.sizes, index: stop - start})


def step_select(rng: Random, net: AnyNetwork, operands: Operands) -> tuple[AnyNetwork, torch.Tensor] | None:
    if not net.output_indices:
        return None
    index = rng.choice(net.output_indices)
    at = rng.randint(0, (net.sizes[index] or 0) - 1)
    value = _unflattened(dense(net, operands), net).select(net.output_indices.index(index), at)
    rest = [[i for i in leg if i != index] for leg in net.output if leg != (index,)]
    return net.select(index, at), _regrouped(value, rest, net.sizes)


def step_merge(rng: Random, net: AnyNetwork, operands: Operands) -> tuple[AnyNetwork, torch.Tensor] | None:
    if sum(len(term.nodes) for term in net.terms) > 8 or dense(net, operands).numel() > 60:
        return None
    sizes = {name: rng.choice([2, 3]) for name in rng.sample(NAMES, rng.randint(2, 4))}
    other = draw_network(rng, sizes, [f"M{len(operands)}", f"N{len(operands)}"])
    if rng.random() < 0.5:
        other = other + draw_network(rng, sizes, [f"O{len(operands)}"], other.output)
    fill(other, operands)
    value = torch.tensordot(dense(net, operands), dense(other, operands), 0)
    return net.merge(other), value


def step_add(rng: Random, net: AnyNetwork, operands: Operands) -> tuple[AnyNetwork, torch.Tensor] | None:
    """Plus a network of other names, of the same output sizes leg by leg."""
    names = rng.sample(NAMES, len(NAMES))
    renamed = dict(zip(sorted(net.sizes), names, strict=False))
    if len(renamed) < len(net.sizes):
        return None
    other = net.rename(renamed).rename_operands({name: f"{name}q{len(operands)}" for name in net.operand_names})
    fill(other, operands)
    return net + other, dense(net, operands) + dense(other, operands)


def step_split(rng: Random, net: AnyNetwork, operands: Operands) -> tuple[AnyNetwork, torch.Tensor] | None:
    fits = [i for i in sorted(net.sizes) if net.sizes[i] == 4 and all(i in term.sizes for term in net.terms)]
    free = [name for name in NAMES if name not in net.sizes]
    if not fits or len(free) < 2:
        return None
    index = rng.choice(fits)
    first, second = rng.sample([*free[:4], index], 2)
    return net.split(index, {first: 2, second: 2}), dense(net, operands)


def step_rename(rng: Random, net: AnyNetwork, operands: Operands) -> tuple[AnyNetwork, torch.Tensor] | None:
    count = rng.randint(1, len(net.sizes)) if net.sizes else 0
    names = dict(zip(sorted(net.sizes)[:count], rng.sample(NAMES, count), strict=True))
    after = [names.get(index, index) for index in net.sizes]
    return (net.rename(names), dense(net, operands)) if len(set(after)) == len(after) else None


def step_simplify(rng: Random, net: AnyNetwork, operands: Operands) -> tuple[AnyNetwork, torch.Tensor] | None:
    return net.simplify(), dense(net, operands)


STEPS = {
    step.__name__.removeprefix("step_"): step
    for step in (
        *(step_vjp, step_jvp, step_jacobian, step_diagonal, step_block, step_keep, step_batch, step_substitute),
        *(step_narrow, step_select, step_merge, step_add, step_split, step_rename, step_simplify),
    )
}


# Steps that name output indices: an error says so where the terms of a sum group an axis differently.
BY_NAME = ("block", "diagonal", "narrow", "select", "split")


@given(st.randoms(note_method_calls=False))
@settings(max_examples=100)
def test_chains_of_transforms_keep_indices_apart(rng: Random) -> None:
    sizes = draw_sizes(rng)
    net: AnyNetwork = draw_network(rng, sizes, ["H", "H", "M", "N"])
    operands: Operands = {}
    fill(net, operands)
    for _ in range(rng.randint(1, 3)):
        step = rng.choice(sorted(STEPS))
        if step in BY_NAME and len({term.output for term in net.terms}) > 1:
            continue
        done = STEPS[step](rng, net, operands)
        if done is None:
            continue
        after, expected = done
        if expected.numel() > 3000 or sum(len(term.nodes) for term in after.terms) > 24:
            return
        try:
            check(after, operands, expected)
        except Exception as error:
            error.add_note(f"{step} of {net!r}")
            raise
        net = after


# ------------------------------------------------------------------------------------------------------------ by hand
def test_product_rule_over_names_that_differ_by_underscores() -> None:
    net = lensor.contraction("c c_, d d_, c d, c_ d_ ->", "H", "H", "M", "N")
    rng = np.random.default_rng(0)
    h, m, n = (torch.tensor(rng.standard_normal((3, 3))) for _ in range(3))
    h.requires_grad_()
    expected = torch.autograd.grad(torch.einsum("ab,cd,ac,bd->", h, h, m, n), h)[0]
    torch.testing.assert_close(torch.autograd.grad(net(H=h, M=m, N=n), h)[0], expected)
    v = torch.tensor(2.0, dtype=torch.float64)
    torch.testing.assert_close(net.vjp("H")(H=h.detach(), M=m, N=n, V=v), 2 * expected)
    torch.testing.assert_close(net.jacobian("H")(H=h.detach(), M=m, N=n), expected)


def test_sums_over_other_indices_of_the_names_of_output_indices() -> None:
    """The summed c and c_ of the second term are two indices, whatever the output of the first is called."""
    rng = np.random.default_rng(0)
    a, b, d = (torch.tensor(rng.standard_normal((2, 2))) for _ in range(3))
    first = lensor.contraction("c c_ -> c c_", "A").bind(c=2, c_=2)
    for text in ("c i, c_ j, c c_ -> i j", "c_ i, c j, c_ c -> i j", "c i, c__ j, c c__ -> i j"):
        total = first + lensor.contraction(text, "B", "C", "D").bind(i=2, j=2)
        expected = a + torch.einsum("ki,lj,kl->ij", b, a, d)
        torch.testing.assert_close(total(A=a, B=b, C=a, D=d), expected)


def test_products_of_sums_name_the_indices_of_all_terms_alike() -> None:
    """The text of the output means one index of the other network, whichever term it meets."""
    one = lensor.contraction("c -> c", "A", c=2) + lensor.contraction("c_, c -> c", "B", "C", c=2, c_=2)
    both = one.merge(lensor.contraction("c -> c", "D", c=2), output="c c__")
    rng = np.random.default_rng(0)
    a, b, c, d = (rng.standard_normal(2) for _ in range(4))
    np.testing.assert_allclose(both(A=a, B=b, C=c, D=d), np.outer(a + b.sum() * c, d))
    with pytest.raises(ValueError, match="'c_'"):
        one.merge(lensor.contraction("c -> c", "D", c=2), output="c c_")


def test_output_legs_that_are_split_in_other_ways_share_no_names() -> None:
    one = lensor.contraction("a b -> (a b)", "A", a=2, b=3)
    for text, sizes in (("a b -> (a b)", {"a": 3, "b": 2}), ("a -> a", {"a": 6}), ("b k -> b", {"b": 6, "k": 2})):
        total = one + lensor.contraction(text, "B", **sizes)
        assert not {"a", "b"} & set(total.terms[1].sizes)
        with pytest.raises(ValueError, match=r"'a'|'b'"):
            total.regroup("(b a)")
        shape = [sizes[index] for index in text.split("->")[0].split()]
        a, b = np.arange(6.0).reshape(2, 3), np.arange(math.prod(shape)).reshape(shape) * 1.0
        expected = a.reshape(6) + (b.sum(1) if "k" in sizes else b.reshape(6))
        np.testing.assert_allclose(total(A=a, B=b), expected)
        plan = total.plan(A=a, B=b, max_bytes=2000)
        np.testing.assert_allclose(plan(A=a, B=b), expected)


def test_indices_are_joined_only_on_demand() -> None:
    net = lensor.contraction("c c_ -> c c_", "A", c=2, c_=2)
    for mapping in ({"c": ("x",), "c_": ("x",)}, {"c": ("c_",)}, {"c": ("x", "c_")}):
        with pytest.raises(NetworkError, match=r"would both be named '(x|c_)'"):
            net.relabel(mapping, {"x": 2})
    joined = net.replace(output=[]).relabel({"c": ("c_",)}, join=True)
    assert joined == lensor.contraction("i i ->", "A", i=2)
    with pytest.raises(NetworkError, match="different places or sizes"):
        lensor.Sum((net, net.replace(output=[("c_",), ("c",)])))
    with pytest.raises(NetworkError, match="summed in another"):
        lensor.Sum((net.replace(output=[("c",)]), net.replace(output=[("c_",)])))


def test_ellipses_beside_indices_of_any_name() -> None:
    x, y = np.arange(6.0).reshape(2, 3), np.arange(12.0).reshape(3, 2, 2)
    expected = np.einsum("...a,ab...->...b", x, y.transpose(0, 2, 1))
    found = lensor.einsum("... ellipsis0, ellipsis0 ellipsis1 ... -> ... ellipsis1", x, y.transpose(0, 2, 1))
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("name", ["subscripts", "operands", "net", "self", "sizes"])
def test_indices_and_operands_named_as_arguments_are(name: str) -> None:
    a = np.arange(6.0).reshape(2, 3)
    net = lensor.contraction(f"{name} j -> j", "A", **{name: 2})
    np.testing.assert_allclose(net(A=a), a.sum(0))
    np.testing.assert_allclose(lensor.einsum(f"{name} j -> j", a, **{name: 2}), a.sum(0))
    np.testing.assert_allclose(lensor.contraction("i j -> j", name)(**{name: a}), a.sum(0))
    named: dict[str, Any] = {name: a}
    np.testing.assert_allclose(lensor.contraction("i j -> j", name).plan(**named)(**named), a.sum(0))
