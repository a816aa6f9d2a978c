"""KFAC without inversions: updates are those of the formulas, their limit is the minimum, and blocks stay blocks."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lensor import ConvSpec, ops
from lensor.curvature import KroneckerFactors, kfac
from lensor.curvature.block import Block
from lensor.curvature.collector import Collector
from lensor.curvature.layers import layers_of
from lensor.curvature.structure import DiagonalBlocks
from lensor.optim import KFAC
from lensor.optim.inverse_free import _stepped, started, updated
from tests.support.digits import descent_loss, digits_loss
from tests.support.strategies import QUIET, Spec, specs

CE = nn.CrossEntropyLoss()
STRUCTURES: list[dict[str, Any]] = [
    {},
    {"structure": "block", "block_size": 20},
    {"structure": "block", "block_size": 3},
    {"structure": "diagonal"},
]


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)]
    return nn.Sequential(*layers).to(dtype)


def batch(seed: int = 0, count: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 7, 7, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (count,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range, dtype: Any = torch.float64) -> list[float]:
    found = []
    for seed in seeds:
        x, y = batch(seed, dtype=dtype)
        optimizer.zero_grad()
        value = CE(model(x), y)
        value.backward()
        optimizer.step()
        found.append(float(value.detach()))
    return found


def close(a: Any, b: Any, **options: Any) -> None:
    torch.testing.assert_close(a, b, **({"rtol": 1e-9, "atol": 1e-11} | options))


# ------------------------------------------------------------------------------------------------------------- by hand
def eye(rows: int) -> Tensor:
    return torch.eye(rows, dtype=torch.float64)


def diagonal_blocks(matrices: Tensor, rows: int) -> Tensor:
    """The diagonal blocks of matrices [groups, n, n], as [blocks of all groups, rows, rows]."""
    found = [one[at : at + rows, at : at + rows] for one in matrices for at in range(0, len(one), rows)]
    return torch.stack(found)


def whole(blocks: Tensor, groups: int) -> Tensor:
    """The block-diagonal matrix of each group."""
    return torch.stack([torch.block_diag(*some) for some in blocks.unflatten(0, (groups, -1))])


def structured(block: Block, size: int | None) -> Block:
    """A block of which the diagonal blocks are kept."""
    if size is None:
        return block
    kernel = math.prod(block.shape[2:]) if len(block.names) == 1 and len(block.shape) > 1 else 1
    form = DiagonalBlocks(size)
    a = diagonal_blocks(block.A, form.rows_of_input(block.d // kernel, kernel))
    b = diagonal_blocks(block.B, form.rows_of_output(block.c))
    parts = len(a) // block.groups, len(b) // block.groups
    return Block(block.names, block.shape, block.transposed, a, None, b, block.positions, parts=parts)


def kronecker(block: Block) -> list[Tensor]:
    """kron(B, A) of each group, as whole matrices."""
    a, b = whole(block.A, block.groups), whole(block.B, block.groups)
    return [torch.kron(*one) for one in zip(b, a, strict=True)]


def objective(roots: Block, block: Block, damping: float) -> Tensor:
    """tr(S (B ⊗ A + λI)) − log det S for S = CCᵀ ⊗ KKᵀ, summed over the groups."""
    total = torch.zeros((), dtype=torch.float64)
    for root, matrix in zip(kronecker(roots), kronecker(block), strict=True):
        square = root @ root.T
        total = total + ((matrix + damping * eye(len(matrix))) * square).sum() - torch.logdet(square)
    return total


def random_block(seed: int, c: int, d: int, groups: int = 1, size: int | None = None, spread: float = 1.0) -> Block:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int) -> Tensor:
        root = torch.randn(groups, 3 * rows, rows, generator=generator, dtype=torch.float64)
        root = root * torch.logspace(0, -spread, rows, dtype=torch.float64)
        return root.mT @ root / (3 * rows)

    whole_block = Block(("w",), (groups * c, d), False, matrix(d), None, matrix(c), 1)
    return structured(whole_block, size)


def random_roots(like: Block, seed: int, scale: float = 1.0) -> Block:
    generator = torch.Generator().manual_seed(seed)
    k, c = (
        scale * eye(one.shape[1]) + 0.2 * torch.randn(one.shape, generator=generator, dtype=torch.float64)
        for one in (like.A, like.B)
    )
    return Block(like.names, like.shape, like.transposed, k, None, c, 1, parts=like.parts)


def by_hand(roots: Block, block: Block, damping: float, weight: float) -> Block:
    """One update with whole matrices: the matrices E are partial traces of (C ⊗ K)ᵀ (B ⊗ A + λI) (C ⊗ K)."""

    def step(roots: Block, of_k: bool) -> Tensor:
        new = []
        for group, matrix in enumerate(kronecker(block)):
            k, c = whole(roots.A, block.groups)[group], whole(roots.B, block.groups)[group]
            both = torch.kron(c, k)
            inner = both.T @ (matrix + damping * eye(len(both))) @ both
            own, other = (len(k), len(c)) if of_k else (len(c), len(k))
            e = torch.zeros(own, own, dtype=torch.float64)
            for i in range(own):
                for j in range(own):
                    for at in range(other):
                        row, column = (at * own + i, at * own + j) if of_k else (i * other + at, j * other + at)
                        e[i, j] += inner[row, column]
            rows = (roots.A if of_k else roots.B).shape[1]
            for at, old in zip(range(0, own, rows), diagonal_blocks((k if of_k else c)[None], rows), strict=True):
                m = (e[at : at + rows, at : at + rows] / other - eye(rows)) / 2
                largest = min(float(m.square().sum()) ** 0.5, float(m.abs().sum(1).max()))
                new.append(old @ (eye(rows) - min(weight, 0.5 / largest) * m))
        return torch.stack(new)

    first = Block(roots.names, roots.shape, roots.transposed, roots.A, None, step(roots, False), 1, parts=roots.parts)
    return Block(first.names, first.shape, first.transposed, step(first, True), None, first.B, 1, parts=first.parts)


# --------------------------------------------------------------------------------------------------------- the updates
@pytest.mark.parametrize("size", [None, 3, 2, 1])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("weight", [0.05, 1.0])
def test_an_update_is_that_of_partial_traces(size: int | None, groups: int, scale: float, weight: float) -> None:
    block = random_block(0, 4, 6, groups, size)
    roots = random_roots(block, 1, scale)
    got, expected = updated(roots, block, 0.1, weight), by_hand(roots, block, 0.1, weight)
    close(got.A, expected.A)
    close(got.B, expected.B)


def test_a_root_of_a_takes_the_place_of_a() -> None:
    block = random_block(0, 3, 8)
    root = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one, other = (
        Block(("w",), (3, 8), False, formed, through, block.B, 1)
        for formed, through in ((root.mT @ root, None), (None, root))
    )
    close(started(one, 0.1).A, started(other, 0.1).A)


@pytest.mark.parametrize("size", [None, 3, 1])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_updates_with_the_same_factors_converge_to_the_minimum(size: int | None, damping: float) -> None:
    block = random_block(3, 4, 6, 2, size)
    roots = started(block, damping)
    for _ in range(100):
        roots = updated(roots, block, damping, 0.5)
    k, c = roots.A.clone().requires_grad_(), roots.B.clone().requires_grad_()
    value = objective(Block(("w",), (8, 6), False, k, None, c, 1, parts=roots.parts), block, damping)
    for gradient, root in zip(torch.autograd.grad(value, [k, c]), (k, c), strict=True):
        assert float((root.detach().mT @ gradient).abs().max()) < 1e-9 * block.d * block.c
    for seed in range(5):  # the minimum among nearby roots of this structure
        assert float(objective(random_roots_near(roots, seed), block, damping)) > float(value.detach()) - 1e-9


def random_roots_near(roots: Block, seed: int) -> Block:
    generator = torch.Generator().manual_seed(seed)
    k, c = (
        one @ (eye(one.shape[1]) + 0.1 * torch.randn(one.shape, generator=generator, dtype=torch.float64))
        for one in (roots.A, roots.B)
    )
    return Block(roots.names, roots.shape, roots.transposed, k, None, c, 1, parts=roots.parts)


def test_with_a_multiple_of_the_identity_the_limit_is_the_inverse() -> None:
    block = random_block(4, 3, 7)
    block = Block(("w",), (3, 7), False, block.A, None, 0.3 * eye(3)[None], 1)
    roots = started(block, 0.05)
    for _ in range(40):
        roots = updated(roots, block, 0.05, 1.0)
    (root,), (matrix,) = kronecker(roots), kronecker(block)
    close(root @ root.T, torch.linalg.inv(matrix + 0.05 * eye(21)), rtol=1e-8, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([None, 3, 2, 1]),
    st.floats(-3, 3),
    st.floats(-8, 3),
    st.floats(-4, 4),
    st.floats(0.01, 1),
)
def test_updates_do_not_increase_the_objective(
    seed: int, size: int | None, scale: float, damping: float, curvature: float, weight: float
) -> None:
    """From any roots, for any factors: steps that would be too long are shortened."""
    block = random_block(seed, 4, 6, 1, size, spread=2.0)
    block = block.scaled(10**curvature, 1.0)
    roots = random_roots(block, seed + 1, 1.0).scaled(10 ** (2 * scale), 1.0)
    values = [float(objective(roots, block, 10**damping))]
    for _ in range(6):
        roots = updated(roots, block, 10**damping, weight)
        values.append(float(objective(roots, block, 10**damping)))
    assert all(math.isfinite(value) for value in values)
    for before, after in itertools.pairwise(values):
        assert after <= before + 1e-9 * (abs(before) + 100)


def test_an_update_averages_inverses_to_first_order() -> None:
    """The error of this is quadratic in the weight."""
    block = random_block(5, 4, 6)
    roots = random_roots(block, 6)
    errors = []
    for weight in (1e-2, 1e-3):
        new = updated(roots, block, 0.1, weight)
        (k,), (old,), (c,) = new.A, roots.A, new.B
        on_a, on_identity = (c.T @ block.B[0] @ c).trace() / 4, 0.1 * (c.T @ c).trace() / 4
        factors = on_a * block.A[0] + on_identity * eye(6)
        expected = (1 - weight) * torch.linalg.inv(old @ old.T) + weight * factors
        errors.append(float((torch.linalg.inv(k @ k.T) - expected).norm()))
    assert 50 < errors[0] / errors[1] < 200


@pytest.mark.parametrize(("structure", "size"), [("dense", None), ("block30diagonal", 30), ("diagonal", 1)])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_updates_are_those_of_singd(structure: str, size: int | None, approx: Any) -> None:
    """From the identity, without momentum. Theirs updates K with the previous C."""
    singd = pytest.importorskip("singd.optim.optimizer")
    torch.manual_seed(0)
    layers = [nn.Conv2d(30, 60, (1, 2), bias=False), nn.Flatten(), nn.Linear(360, 3, bias=False)]
    model, x, y = nn.Sequential(*layers), 10 * torch.randn(9, 30, 3, 3), torch.arange(9) % 3  # theirs has no float64
    factors = kfac(model, CE, (x, y), fisher="empirical", approx=approx, convention="singd")
    theirs = singd.SINGD(
        model,
        damping=0.1,
        alpha1=0.0,
        T=1,
        lr_cov=0.02,
        structures=(structure, structure),
        kfac_approx=approx,
        warn_unsupported=False,
    )
    CE(model(x), y).backward()
    theirs.step()
    block = structured(factors["0.weight"], size)
    k, c = (torch.eye(one.shape[1]).expand_as(one) for one in (block.A, block.B))
    a, b = block.A.diagonal(dim1=1, dim2=2).sum()[None], block.B.diagonal(dim1=1, dim2=2).sum()[None]
    new_c = _stepped(c, block.B, a, torch.tensor([0.1 * 60]), 60, 0.02)
    new_k = _stepped(k, block.A, b, torch.tensor([0.1 * 60]), 60, 0.02)
    accuracy = {"rtol": 1e-5, "atol": 1e-6}
    assert float((new_k - k).abs().max()) > 1e-3
    close(whole(new_c, 1)[0], theirs.Cs["0"].to_dense(), **accuracy)
    close(whole(new_k, 1)[0], theirs.Ks["0"].to_dense(), **accuracy)
    roots = Block(block.names, block.shape, False, k, None, c, 1, parts=block.parts)
    close(new_c, updated(roots, block, 0.1, 0.02).B, **accuracy)


# ------------------------------------------------------------------------------------------------- structured factors
@settings(max_examples=150, deadline=None, suppress_health_check=QUIET)
@given(specs(), st.integers(1, 3), st.integers(1, 30))
def test_structured_factors_are_blocks_of_whole_factors(arguments: Spec, count: int, size: int) -> None:
    spec, form = ConvSpec(**arguments), DiagonalBlocks(size)
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, *spec.input_shape, generator=generator, dtype=torch.float64)
    v = torch.randn(2, count, *spec.output_shape, generator=generator, dtype=torch.float64)
    kernel = math.prod(spec.kernel_size)
    rows = form.rows_of_input(spec.in_channels // spec.groups, kernel)
    assert rows <= max(size, kernel)
    assert rows == 1 or rows % kernel == 0
    factor: Tensor = ops.kfac_input_factor(spec)(X=x)
    close(form.input_factor(spec, x), diagonal_blocks(factor, rows))
    root: Tensor = ops.kfac_input_root(spec)(X=x)
    split = form.split_root(root, kernel)
    reduced: Tensor = ops.kfac_input_factor(spec, "reduce")(X=x)
    close(split.mT @ split / count, diagonal_blocks(reduced, rows))
    rows = form.rows_of_output(spec.out_channels // spec.groups)
    assert rows <= size
    plain = ConvSpec(spec.out_channels, spec.out_channels, spec.output_size, (1,) * spec.ndim, groups=spec.groups)
    for approx in ("expand", "reduce"):
        of_outputs: Tensor = ops.kfac_output_factor(plain, approx)(V=v)
        fine: Tensor = ops.kfac_output_factor(form.output_spec(plain), approx)(V=v)
        close(fine, diagonal_blocks(of_outputs, rows))


class _Shared(nn.Module):
    """Layers of all kinds: with positions, used twice, transposed, without a use of the bias's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv1d(2, 4, 3, groups=2), nn.ConvTranspose1d(4, 6, 2, stride=2, groups=2)
        self.twice, self.last = nn.Linear(6, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(torch.tanh(self.first(x.flatten(2))))).mT
        return self.last(self.twice(torch.tanh(self.twice(h))).mean(1))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["empirical", "type-2", "forward-only"])
@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("kind", [network, lambda: _Shared().double()], ids=["convolutions", "shared"])
def test_structured_factors_of_models_are_blocks_of_whole_factors(
    approx: Any, fisher: Any, size: int, kind: Any
) -> None:
    model = kind()
    expected = kfac(model, CE, batch(), approx=approx, fisher=fisher)
    collected = Collector(layers_of(model), approx, False, fisher, structure=DiagonalBlocks(size))
    collected.add(model, CE, *batch(), 1, None, 0)
    found = collected.factors("mean")
    assert list(found) == list(expected)
    for name, block in found.items():
        blocks = structured(expected[name], size)
        assert block.parts == blocks.parts
        assert block.shapes == expected[name].shapes
        close(block.A, blocks.A)
        close(block.B, blocks.B)
        close(block.dense(), torch.stack(kronecker(blocks)))
        v = {one: torch.randn(2, *shape, dtype=torch.float64) for one, shape in block.shapes.items()}
        rows = block.to_rows(v)
        close(block.product(rows).flatten(-2), torch.einsum("gij,vgj->vgi", block.dense(), rows.flatten(-2)))
        close(block.from_rows(rows)[name], v[name])


# ------------------------------------------------------------------------------------------------------------- the step
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["empirical", "type-2", "forward-only"])
@pytest.mark.parametrize("options", [*STRUCTURES, {"bias": "separate"}], ids=str)
def test_steps_are_products_with_the_squares_of_the_roots(options: dict[str, Any], fisher: Any, approx: Any) -> None:
    """Four steps by hand, with whole factors of which only the blocks count, and new factors in every second step."""
    model, hand = network(), network()
    size = {"dense": None, "diagonal": 1}.get(options.get("structure", "dense"), options.get("block_size"))
    bias: Any = options.get("bias", "joint" if size is None else "separate")
    optimizer = KFAC(
        model,
        CE,
        lr=0.1,
        momentum=0.0,
        damping=0.1,
        kl_clip=None,
        ema=0.7,
        method="inverse-free",
        fisher=fisher,
        approx=approx,
        factor_interval=2,
        **options,
    )
    train(model, optimizer, range(4))
    roots: dict[str, Block] = {}
    for step in range(4):
        x, y = batch(step)
        gradients = torch.autograd.grad(CE(hand(x), y), list(hand.parameters()))
        v = dict(zip(dict(hand.named_parameters()), gradients, strict=True))
        if step % 2 == 0:
            for name, block in kfac(hand, CE, (x, y), fisher=fisher, approx=approx, bias=bias).items():
                one = structured(block, size)
                roots[name] = started(one, 0.1) if step == 0 else updated(roots[name], one, 0.1, 0.5)
        with torch.no_grad():
            for root in roots.values():
                rows = root.to_rows(v)
                matrices = torch.stack([one @ one.T for one in kronecker(root)])
                solved = torch.einsum("gij,gj->gi", matrices, rows.flatten(-2)).view_as(rows)
                for one, direction in root.from_rows(solved).items():
                    hand.get_parameter(one).sub_(direction, alpha=0.1)
    for (name, p), q in zip(model.named_parameters(), hand.parameters(), strict=True):
        close(p, q, rtol=1e-7, msg=name)
    assert optimizer.factors is not None
    assert not optimizer.factors
    assert set(optimizer.inversion.updates.values()) == {2}


def test_updates_have_the_weight_of_an_average_until_ema_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[float] = []

    def noted(roots: Block, block: Block, damping: float, weight: float) -> Block:
        weights.append(weight)
        return updated(roots, block, damping, weight)

    model = nn.Sequential(nn.Flatten(), nn.Linear(98, 3)).double()
    optimizer = KFAC(model, CE, method="inverse-free", ema=0.75)
    train(model, optimizer, range(1))
    monkeypatch.setattr("lensor.optim.inverse_free.updated", noted)
    train(model, optimizer, range(1, 6))
    optimizer.ema = 0.5
    train(model, optimizer, range(6, 7))
    close(torch.tensor(weights), torch.tensor([1 / 2, 1 / 3, 1 / 4, 1 / 4, 1 / 4, 1 / 2]))


class _Largest(TorchDispatchMode):
    """The largest number of entries of a tensor that an operation returns."""

    entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        found = function(*arguments, **(named or {}))
        sizes = [one.untyped_storage().nbytes() // 4 for one in tree_leaves(found) if isinstance(one, Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return found


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("options", [{"structure": "block"}, {"structure": "diagonal"}], ids=str)
def test_the_factors_of_a_wide_layer_are_never_formed(options: dict[str, Any], approx: Any) -> None:
    model = nn.Sequential(nn.Conv2d(512, 64, 3), nn.Flatten(), nn.Linear(256, 3))
    optimizer = KFAC(model, CE, method="inverse-free", approx=approx, batch_axis=0, **options)
    x, y = torch.randn(2, 512, 4, 4), torch.arange(2)
    with _Largest() as largest:
        for _ in range(2):
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
    assert largest.entries <= model[0].weight.numel() < 4608**2 / 50
    stored = sum(one.numel() for block in optimizer.inversion.blocks.values() for one in block.tensors().values())
    assert stored < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("options", STRUCTURES, ids=str)
def test_models_in_half_precision_are_trained(options: dict[str, Any]) -> None:
    model = network(torch.bfloat16)
    optimizer = KFAC(model, CE, damping=0.1, kl_clip=0.01, method="inverse-free", **options)
    values = train(model, optimizer, range(1), torch.bfloat16)
    for _ in range(30):
        values += train(model, optimizer, range(1), torch.bfloat16)
    tensors = [one for block in optimizer.inversion.blocks.values() for one in block.tensors().values()]
    assert all(one.dtype == torch.bfloat16 and bool(one.isfinite().all()) for one in tensors)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert values[-1] < 0.5 * values[0]
    half = network(torch.float16)
    optimizer = KFAC(half, CE, method="inverse-free", **options)
    train(half, optimizer, range(2), torch.float16)
    assert {block.B.dtype for block in optimizer.inversion.blocks.values()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------------ resuming
@pytest.mark.parametrize("options", STRUCTURES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("stagger", [False, True])
def test_training_goes_on_bit_for_bit(options: dict[str, Any], dtype: Any, stagger: bool, tmp_path: Path) -> None:
    options = {"method": "inverse-free", "factor_interval": 2, "stagger": stagger, "damping": 0.1, **options}
    model, again = network(dtype), network(dtype)
    optimizer = KFAC(model, CE, **options)
    train(model, optimizer, range(5), dtype)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    resumed = KFAC(again, CE, **options)
    resumed.load_state_dict(saved["optimizer"])
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    rest = train(model, optimizer, range(5, 11), dtype)
    assert train(again, resumed, range(5, 11), dtype) == rest
    assert train(copied, copied_optimizer, range(5, 11), dtype) == rest
    for a, b, c in zip(model.parameters(), again.parameters(), copied.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("other", [{"method": "cholesky"}, *STRUCTURES[1:]], ids=str)
def test_states_of_other_structures_are_refused(other: dict[str, Any]) -> None:
    model = network()
    one, two = (KFAC(model, CE, **{"method": "inverse-free", **options}) for options in ({}, other))
    train(model, one, range(1))
    with pytest.raises(ValueError, match="the state has the structure of inverses 'dense', expected"):
        two.load_state_dict(one.state_dict())


@pytest.mark.parametrize("options", STRUCTURES, ids=str)
def test_a_bad_gradient_leaves_everything_as_it_was(options: dict[str, Any]) -> None:
    model = network()
    optimizer = KFAC(model, CE, nonfinite="skip", method="inverse-free", **options)
    train(model, optimizer, range(2))
    state, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    x, y = batch(2)
    CE(model(x), y).backward()
    assert model[5].bias.grad is not None
    model[5].bias.grad[0] = torch.nan
    optimizer.step()
    assert str(optimizer.state_dict()) == str(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    train(model, optimizer, range(3, 4))


@pytest.mark.parametrize("options", STRUCTURES[:2], ids=str)
def test_staggered_layers_are_updated_once_in_each_interval(options: dict[str, Any]) -> None:
    model = network()
    optimizer = KFAC(model, CE, method="inverse-free", factor_interval=3, stagger=True, **options)
    train(model, optimizer, range(9))
    slots = optimizer.tracker.slots
    assert slots is not None
    assert sorted(slots[name] for name in ("0.weight", "2.weight", "5.weight")) == [0, 1, 2]
    for name, count in optimizer.inversion.updates.items():
        assert count == (3 if slots[name] == 0 else 4)


# ----------------------------------------------------------------------------------------------------------- processes
def _rank(rank: int, file: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}", world_size=2, rank=rank)
    found = {}
    for place, options in enumerate(STRUCTURES):
        for approx in ("expand", "reduce"):
            model = network()
            wrapped = nn.parallel.DistributedDataParallel(model)
            every: dict[str, Any] = {"method": "inverse-free", "approx": approx, "group": dist.group.WORLD, **options}
            optimizer = KFAC(wrapped, CE, damping=0.1, **every)
            for seed in range(4):
                x, y = batch(seed)
                half = slice(4 * rank, 4 * rank + 4)
                optimizer.zero_grad()
                CE(wrapped(x[half]), y[half]).backward()
                optimizer.step()
            found[f"{place} {approx}"] = {name: p.detach() for name, p in model.named_parameters()}
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.start_processes(_rank, (str(tmp_path / "meet"), str(tmp_path / "found")), nprocs=2, start_method="spawn")
    found = [torch.load(tmp_path / f"found.{rank}", weights_only=True) for rank in range(2)]
    for place, options in enumerate(STRUCTURES):
        for approx in ("expand", "reduce"):
            model = network()
            train(model, KFAC(model, CE, damping=0.1, method="inverse-free", approx=approx, **options), range(4))
            for name, p in model.named_parameters():
                close(found[0][f"{place} {approx}"][name], p.detach(), rtol=1e-7, atol=1e-9)
                assert torch.equal(found[0][f"{place} {approx}"][name], found[1][f"{place} {approx}"][name])


# ------------------------------------------------------------------------------------------------------------ training
@pytest.mark.parametrize("options", [{}, {"structure": "block"}], ids=str)
def test_digits_are_learnt_in_fewer_steps(options: dict[str, Any]) -> None:
    """Against gradient descent at the same number of steps, from the same start."""
    ours = digits_loss(lambda m: KFAC(m, CE, lr=0.1, damping=0.1, approx="reduce", method="inverse-free", **options))
    assert ours < descent_loss()


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "block"}, "structure is 'block' with method='cholesky', expected method='inverse-free'"),
        ({"method": "inverse-free", "structure": "sparse"}, "structure is 'sparse', expected one of 'dense', 'block'"),
        ({"method": "inverse-free", "structure": "block", "block_size": 0}, "block_size is 0, expected a whole number"),
        ({"method": "inverse-free", "block_size": 8}, "block_size is 8 with structure='dense', expected"),
        ({"block_size": 8}, "block_size is 8 with structure='dense', expected"),
        ({"method": "inverse-free", "inverse_interval": 2}, "inverse_interval is 2, expected 1 .* use factor_interval"),
        (
            {"method": "inverse-free", "structure": "diagonal", "bias": "joint"},
            "bias is 'joint' with structure='diagonal', expected 'separate'",
        ),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFAC(network(), CE, **options)


def test_factors_have_no_inverse_without_inversion() -> None:
    factors = kfac(network(), CE, batch())
    assert isinstance(factors, KroneckerFactors)
    method: Any = "inverse-free"
    with pytest.raises(ValueError, match="method is 'inverse-free', expected one of 'cholesky'"):
        factors.inverse(0.1, method)


def test_methods_are_not_changed_later() -> None:
    for method, other in (("inverse-free", "cholesky"), ("cholesky", "inverse-free")):
        model = network()
        optimizer = KFAC(model, CE, method=method)
        optimizer.method = other
        with pytest.raises(ValueError, match=f"method was set to '{other}', expected it when the optimizer is created"):
            train(model, optimizer, range(1))


def test_momentum_of_a_bfloat16_state_gets_the_dtype_of_the_parameters() -> None:
    state, loss = None, nn.CrossEntropyLoss()
    for dtype in (torch.bfloat16, torch.float32):
        model = nn.Linear(4, 3).to(dtype)
        optimizer = KFAC(model, loss, method="inverse-free", batch_axis=0)
        if state is not None:
            optimizer.load_state_dict(state)
        loss(model(torch.randn(8, 4, dtype=dtype)), torch.arange(8) % 3).backward()
        optimizer.step()
        state = optimizer.state_dict()
    assert {one["momentum_buffer"].dtype for one in optimizer.state.values()} == {torch.float32}
