"""The cost of a step of KFAC on several ranks: a model on paper, and measurements on local processes to check it."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lensor.curvature.distribution import shares
from lensor.optim import KFAC

ENTRY = 4
"""Bytes of an entry in single precision."""


@dataclass(frozen=True)
class LayerSize:
    """The size of a layer.

    Args:
        c: number of output channels of a group.
        d: number of inputs of an output: input channels of a group times kernel entries, plus 1 with a joint bias.
        positions: number of output positions of an example.
        groups: number of channel groups.
    """

    c: int
    d: int
    positions: int = 1
    groups: int = 1

    @property
    def inversion(self) -> float:
        """Flops to invert both factors: n³/3 for a Cholesky decomposition, and 2n³/3 for the inverse."""
        return self.groups * (self.c**3 + self.d**3)

    @property
    def factors(self) -> int:
        """Entries of both factors."""
        return self.groups * (self.c**2 + self.d**2)

    @property
    def sent(self) -> int:
        """Entries of both factors that are sent; see `lensor.curvature.distribution.folded`."""
        return self.groups * (self.c * (self.c // 2 + 1) + self.d * (self.d // 2 + 1))

    @property
    def entries(self) -> int:
        """Entries of the weight, and of the bias."""
        return self.groups * self.c * self.d


@dataclass(frozen=True)
class Rates:
    """The speed of one rank.

    Args:
        product: flops per second of a matrix product.
        inversion: flops per second of a Cholesky inversion.
        memory: bytes per second that a copy reads and writes.
        bandwidth: bytes per second that a rank sends while all ranks send.
        latency: seconds from one rank to the next for a short message.
    """

    product: float
    inversion: float
    memory: float
    bandwidth: float
    latency: float


GPU = Rates(product=2e14, inversion=5e12, memory=2e12, bandwidth=4e10, latency=1e-5)
"""Round numbers for a current data-centre GPU with a 400 Gbit/s network; assumed, not measured."""


@dataclass(frozen=True)
class Phase:
    """The cost of one phase of a step for the rank that takes longest.

    Args:
        name: the phase.
        flops: number of floating-point operations.
        touched: bytes that copies and conversions read and write.
        moved: bytes that the rank sends or receives, whichever is more.
        messages: number of messages that wait for each other.
        seconds: estimated time.
    """

    name: str
    flops: float
    touched: float
    moved: float
    messages: int
    seconds: float


def transformer(width: int = 4096, inner: int = 11008, blocks: int = 32, positions: int = 2048) -> list[LayerSize]:
    """The linear layers of a transformer: four projections of the attention and three of the MLP in each block."""
    attention = [LayerSize(width, width, positions)] * 4
    mlp = [LayerSize(inner, width, positions)] * 2 + [LayerSize(width, inner, positions)]
    return (attention + mlp) * blocks


def phases(layers: Sequence[LayerSize], ranks: int, examples: int, rates: Rates, buffer: int = 2**24) -> list[Phase]:
    """The phases of a step in which factors and inverses are updated, with `approx="expand"`, `fisher="empirical"`.

    A sum on one rank goes around a ring: each rank sends the whole buffer once, in parts, and the last part waits for
    one message per rank. Factors are reduced in buffers for one owner, of at most `buffer` bytes or of one factor. To
    fold them and copy them to buffers, each entry is read or written about four times, and six times to unfold and
    average them on the owner; entries of gradients and steps, about four times.

    Args:
        layers: the layers.
        ranks: number of ranks.
        examples: number of examples of a rank.
        rates: the speed of a rank.
        buffer: the size of a buffer at which a sum is started.

    Example:
        >>> from lensor_bench.scaling import GPU, LayerSize, phases
        >>> [phase.name for phase in phases([LayerSize(64, 64)], 8, 32, GPU)]
        ['factors', 'reduction', 'inversion', 'gradients', 'products', 'directions']
    """
    owners = shares([layer.inversion for layer in layers], ranks)

    def most(cost: Callable[[LayerSize], float]) -> float:
        """The largest cost of a rank for the layers that it owns."""
        loads = [0.0] * ranks
        for layer, owner in zip(layers, owners, strict=True):
            loads[owner] += cost(layer)
        return max(loads)

    buffers, filled = 0, dict.fromkeys(owners, 0)
    for layer, owner in zip(layers, owners, strict=True):
        for size in (layer.groups * layer.c**2, layer.groups * layer.d**2):
            filled[owner] += ENTRY * size
            if filled[owner] >= buffer:
                buffers, filled[owner] = buffers + 1, 0
    buffers += sum(size > 0 for size in filled.values())
    others = ranks - 1
    shard = others / ranks

    def computed(name: str, flops: float, rate: float) -> Phase:
        return Phase(name, flops, 0.0, 0.0, 0, flops / rate)

    def sent(name: str, touched: float, moved: float, messages: int) -> Phase:
        if not others:
            return Phase(name, 0.0, 0.0, 0.0, 0, 0.0)
        seconds = touched / rates.memory + moved / rates.bandwidth + messages * rates.latency
        return Phase(name, 0.0, touched, moved, messages, seconds)

    rows = [2.0 * examples * layer.positions * layer.factors for layer in layers]
    own = ENTRY * most(lambda layer: layer.entries)
    folding = 4.0 * ENTRY * sum(layer.factors for layer in layers) + 6.0 * ENTRY * most(lambda layer: layer.factors)
    return [
        computed("factors", sum(rows), rates.product),
        sent("reduction", folding, ENTRY * float(sum(layer.sent for layer in layers)), buffers * others),
        computed("inversion", most(lambda layer: layer.inversion), rates.inversion),
        sent("gradients", 4 * own, shard * own, others),
        computed("products", most(lambda layer: 2.0 * layer.entries * (layer.c + layer.d)), rates.product),
        sent("directions", 4 * own, shard * own, others),
    ]


def memory(layers: Sequence[LayerSize], ranks: int) -> float:
    """The largest number of bytes that a rank stores for factors and inverses."""
    owners = shares([layer.inversion for layer in layers], ranks)
    loads = [0.0] * ranks
    for layer, owner in zip(layers, owners, strict=True):
        loads[owner] += 2.0 * ENTRY * layer.factors
    return max(loads)


def table(
    layers: Sequence[LayerSize],
    ranks: Sequence[int] = (8, 16, 32, 64, 128, 256, 512),
    examples: int = 1,
    rates: Rates = GPU,
) -> str:
    """A table of the estimated milliseconds of each phase, in Markdown.

    Example:
        >>> from lensor_bench.scaling import LayerSize, table
        >>> print(table([LayerSize(1024, 1024, 256)] * 24, [8, 512]))  # doctest: +ELLIPSIS
        | ranks | factors | reduction | inversion | gradients | products | directions | GB per rank |
        |---:|---:|---:|---:|---:|---:|---:|---:|
        | 8 | ...
    """
    lines = []
    for count in ranks:
        found = phases(layers, count, examples, rates)
        if not lines:
            names = ["ranks", *(phase.name for phase in found), "GB per rank"]
            lines = [f"| {' | '.join(names)} |", "|" + "---:|" * len(names)]
        cells = [str(count), *(f"{1e3 * phase.seconds:.3g}" for phase in found), f"{memory(layers, count) / 1e9:.2g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- measurements
def measured(widths: Sequence[int], ranks: int, examples: int, repeats: int = 7) -> tuple[Rates, dict[str, float]]:
    """The speed of local gloo processes with one thread each, and the seconds of each phase.

    Args:
        widths: the widths between the linear layers of the measured model.
        ranks: number of processes.
        examples: number of examples of a process.
        repeats: number of measured steps; the results are medians, of the slowest process in each step.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes: Any = mp
        processes.start_processes(_rank, (ranks, folder, tuple(widths), examples, repeats), ranks, start_method="spawn")
        every = [torch.load(os.path.join(folder, str(rank)), weights_only=True) for rank in range(ranks)]
    rates = Rates(*(statistics.median(one["rates"][at] for one in every) for at in range(5)))
    times = {
        name: statistics.median(max(one["times"][name][step] for one in every) for step in range(repeats))
        for name in every[0]["times"]
    }
    return rates, times


def compared(widths: Sequence[int] = (768,) * 9, ranks: Sequence[int] = (1, 2, 4), examples: int = 256) -> str:
    """A table of the measured milliseconds of each phase divided by the estimated ones, in Markdown."""
    layers = [LayerSize(c, d + 1) for d, c in pairwise(widths)]
    lines = ["| ranks | phase | estimated ms | measured ms | ratio |", "|---:|---|---:|---:|---:|"]
    for count in ranks:
        rates, times = measured(widths, count, examples)
        for phase in phases(layers, count, examples, rates):
            if phase.seconds:
                seconds = times[phase.name]
                cells = [f"{1e3 * phase.seconds:.1f}", f"{1e3 * seconds:.1f}", f"{seconds / phase.seconds:.2f}"]
                lines.append(f"| {count} | {phase.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


class _Clock:
    """Seconds by phase, one entry for each step."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def new_step(self, names: Sequence[str]) -> None:
        for name in names:
            self.times.setdefault(name, []).append(0.0)

    @contextmanager
    def on(self, name: str, together: bool = True) -> Iterator[None]:
        """Add the seconds of the `with` block to a phase, after all ranks have reached it."""
        if together:
            dist.barrier()
        start = time.perf_counter()
        yield
        self.times[name][-1] += time.perf_counter() - start


def _rank(rank: int, ranks: int, folder: str, widths: Sequence[int], examples: int, repeats: int) -> None:
    """Measure one rank, and save the results."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=ranks)
    clock, step = _instrumented(widths, examples)
    step()  # plans and buffers
    clock.times.clear()
    for _ in range(repeats):
        clock.new_step(("factors", "reduction", "inversion", "gradients", "products", "directions"))
        step()
    found = {"rates": _rates(max(widths), ranks), "times": clock.times}
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def _instrumented(widths: Sequence[int], examples: int) -> tuple[_Clock, Callable[[], None]]:
    """A sharded model whose steps add to a clock; sums of factors do not overlap with the backward pass."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from lensor.curvature import distribution
    from lensor.curvature.collector import Collector
    from lensor.optim import sharding

    model: Any = nn.Sequential(*(nn.Linear(d, c) for d, c in pairwise(widths)))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss, batch_axis=0, damping=0.1)
    clock = _Clock()
    clock.new_step(("factors", "reduction", "inversion", "gradients", "products", "directions"))
    tracker: Any = optimizer.tracker
    tracker._start_sums = lambda weight: None

    def timed(owner: Any, name: str, phase: str, together: bool = True) -> None:
        before = getattr(owner, name)

        def run(*arguments: Any, **named: Any) -> Any:
            with clock.on(phase, together):
                return before(*arguments, **named)

        setattr(owner, name, run)

    for name in ("add_input", "add_output"):
        timed(Collector, name, "factors", together=False)
    timed(optimizer, "_summed", "reduction")
    timed(optimizer.inversion, "invert", "inversion")
    timed(optimizer.inversion, "directions", "products", together=False)
    ways, exchanged = iter(()), distribution.exchanged

    def exchange(*arguments: Any) -> Any:
        nonlocal ways
        name = next(ways, None)
        if name is None:
            ways = iter(("directions",))
            name = "gradients"
        with clock.on(name):
            return exchanged(*arguments)

    sharding.exchanged = exchange
    generator = torch.Generator().manual_seed(dist.get_rank())

    def step() -> None:
        x = torch.randn(examples, widths[0], generator=generator)
        y = torch.randint(widths[-1], (examples,), generator=generator)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    return clock, step


def _rates(n: int, ranks: int) -> list[float]:
    """The speed of this rank, while the other ranks measure theirs."""
    a = torch.randn(n, n)
    spd = a @ a.mT + n * torch.eye(n)

    def seconds(call: Callable[[], Any]) -> float:
        found = []
        for _ in range(5):
            dist.barrier()
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    product = 2 * n**3 / seconds(lambda: a @ a)
    inversion = n**3 / seconds(lambda: torch.cholesky_inverse(torch.linalg.cholesky(spd)))
    long, short, other = torch.zeros(2**22), torch.zeros(1), torch.zeros(2**22)
    memory = 2 * long.nbytes / seconds(lambda: other.copy_(long))
    if ranks == 1:
        return [product, inversion, memory, 1.0, 0.0]
    rank = dist.get_rank()

    def around(tensor: torch.Tensor) -> None:
        """Send to the next rank, and receive from the previous one."""
        received = torch.empty_like(tensor)
        work = [dist.isend(tensor, (rank + 1) % ranks), dist.irecv(received, (rank - 1) % ranks)]
        for one in work:
            if one is not None:
                one.wait()

    latency = seconds(lambda: around(short))
    return [product, inversion, memory, long.nbytes / (seconds(lambda: around(long)) - latency), latency]
