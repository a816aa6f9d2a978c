"""Implementations of the operations: the standard one, contraction of the unsimplified network, Lensor, and peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

import lensor
from lensor.inspect.operations import OPERATIONS, PAPER_OPERATIONS, STANDARD
from lensor.spec import ConvSpec
from lensor_bench import peers, standard
from lensor_bench.networks import network
from lensor_bench.peers import Way
from lensor_bench.standard import Operands


@dataclass(frozen=True, eq=False)
class Implementation:
    """An implementation of the operations.

    Args:
        name: name of the implementation.
        ways: for each supported operation, a function that prepares the call to time.
        package: name of the package for pip.
        module: name of its Python module.
    """

    name: str
    ways: Mapping[str, Way]
    package: str
    module: str

    @property
    def is_installed(self) -> bool:
        """Whether the package is installed."""
        return find_spec(self.module) is not None

    @property
    def version(self) -> str:
        """The version of the package."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return lensor.__version__ if self.package == "lensor" else "unknown"


def call_of(operation: str, given: Operands, spec: ConvSpec) -> Callable[[], torch.Tensor]:
    """Lensor's function for an operation."""
    if spec.transposed:  # torch's names cover only the forward pass, whereas networks cover all operations
        net = OPERATIONS[operation].network(spec)
        return lambda: net(**given)
    f = lensor.functional
    hyper = (spec.stride, spec.padding, spec.dilation, spec.groups)
    mode, size = spec.padding_mode, spec.weight_shape
    match operation:
        case "forward":
            return lambda: f.conv(given["X"], given["W"], None, *hyper, padding_mode=mode)
        case "input_vjp":
            full = (len(given["V"]), *spec.input_shape)
            return lambda: f.conv_input_vjp(full, given["W"], given["V"], *hyper, padding_mode=mode)
        case "weight_vjp":
            return lambda: f.conv_weight_vjp(given["X"], size, given["V"], *hyper, padding_mode=mode)
        case "per_example_weight_vjp":
            return lambda: f.conv_weight_vjp_per_example(given["X"], size, given["V"], *hyper, padding_mode=mode)
        case "ggn_diagonal":
            return lambda: f.ggn_diagonal(given["X"], size, given["S"], *hyper, padding_mode=mode)
    approx = "reduce" if operation == "kfac_reduce" else "expand"
    return lambda: f.kfac_input_factor(given["X"], spec.kernel_size, *hyper, approx=approx, padding_mode=mode)


def _estimated(operation: str) -> Way:
    return lambda given, spec: call_of(operation, given, spec)


def _measured(operation: str) -> Way:
    def way(given: Operands, spec: ConvSpec) -> Callable[[], torch.Tensor]:
        call = call_of(operation, given, spec)

        def measured() -> torch.Tensor:
            with lensor.planning(effort="measure"):
                return call()

        return measured

    return way


def _standard(operation: str) -> Way:
    way = standard.WAYS[operation]

    def made(given: Operands, spec: ConvSpec) -> Callable[[], torch.Tensor]:
        if operation == "input_vjp":
            given = {**given, "X": standard.kept_input(given["V"], spec)}
        elif operation in ("weight_vjp", "per_example_weight_vjp"):
            given = {**given, "W": standard.kept_weight(given["X"], spec)}
        return lambda: way(given, spec)

    return made


_EVERY = tuple(standard.WAYS)

IMPLEMENTATIONS = {
    found.name: found
    for found in (
        Implementation(STANDARD, {name: _standard(name) for name in _EVERY}, "torch", "torch"),
        Implementation("standard-again", {name: _standard(name) for name in _EVERY}, "torch", "torch"),
        Implementation("lensor", {name: _estimated(name) for name in _EVERY}, "lensor", "lensor"),
        Implementation("lensor-measure", {name: _measured(name) for name in _EVERY}, "lensor", "lensor"),
        Implementation("network", {name: network(name, False) for name in _EVERY}, "lensor", "lensor"),
        Implementation("network-simplified", {name: network(name, True) for name in _EVERY}, "lensor", "lensor"),
        Implementation("einconv", {name: peers.einconv(name) for name in PAPER_OPERATIONS}, "einconv", "einconv"),
        Implementation(
            "einconv-contract", {name: peers.einconv_contract(name) for name in PAPER_OPERATIONS}, "einconv", "einconv"
        ),
        Implementation(
            "backpack",
            {
                "per_example_weight_vjp": peers.backpack_per_example_weight_vjp,
                "ggn_diagonal": peers.backpack_ggn_diagonal,
            },
            "backpack-for-pytorch",
            "backpack",
        ),
        Implementation("opacus", {"per_example_weight_vjp": peers.opacus_per_example_weight_vjp}, "opacus", "opacus"),
    )
}
"""The implementations, by name; the first one is the reference for results and times."""
