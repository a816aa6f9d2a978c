"""Networks with operands: every operation on a few specs, ready to evaluate by definition."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any

import numpy as np

import lensor
from lensor import ConvSpec, Delta, Sum, ops
from lensor.cache import Cache

SPECS = {
    "1-d": ConvSpec(4, 6, 9, 3, stride=2, padding=1, groups=2),
    "2-d": ConvSpec(4, 4, (7, 6), (3, 2), padding=(1, 0), dilation=(1, 2)),
    "dense": ConvSpec(4, 6, (6, 4), 2, stride=2, groups=2),
    "depthwise": ConvSpec(3, 6, (7,), 3, groups=3),
    "down-sampling": ConvSpec(2, 4, (7, 5), 1, stride=2),
    "circular": ConvSpec(2, 4, (6,), 3, padding=2, padding_mode="circular"),
    "reflect": ConvSpec(2, 2, (5, 6), (3, 3), padding=1, stride=2, padding_mode="reflect"),
    "transposed": ConvSpec(4, 6, (4,), 3, stride=2, padding=1, groups=2, transposed=True, output_padding=1),
    "linear": ConvSpec(4, 3, (), ()),
}

BUILDERS: dict[str, Callable[[ConvSpec], Any]] = {
    **{name: getattr(ops, name) for name in ops.__all__},
    "kfac_input_factor, reduce": lambda spec: ops.kfac_input_factor(spec, "reduce"),
    "kfac_input_factor, bias": lambda spec: ops.kfac_input_factor(spec, "expand", bias=True),
    "kfac_output_factor, reduce": lambda spec: ops.kfac_output_factor(spec, "reduce"),
    "ggn_diagonal, per example": lambda spec: ops.ggn_diagonal(spec, per_example=True),
    "ggn_mini_blocks, kernel": lambda spec: ops.ggn_mini_blocks(spec, "kernel"),
    "ggn_mini_blocks, position": lambda spec: ops.ggn_mini_blocks(spec, "position"),
}


SPEC = ConvSpec(4, 6, (6, 5), (3, 2), stride=(2, 1), padding=(1, 0), groups=2)
"""One convolution in which all sizes differ."""

SMALL = ConvSpec(2, 2, (5,), 3, stride=2, padding=1, groups=2)
"""A convolution for checks that run it often."""


def bound(net: Any, batch: int = 2) -> Any:
    """The network with every unknown size set to `batch`."""
    return net.bind({index: batch for index, size in net.sizes.items() if size is None})


def operands_of(net: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float64 operands for a network whose sizes are known."""
    rng = np.random.default_rng(seed)
    shapes = {}
    for term in net.terms:
        for name, legs in term.operand_legs.items():
            shapes[name] = tuple(term.group_size(leg) for leg in legs)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def live_caches() -> list[Cache]:
    """Every cache of this process."""
    return [thing for thing in gc.get_objects() if type(thing) is Cache]


def tensors(operands: dict[str, np.ndarray], **options: Any) -> dict[str, Any]:
    """The operands as tensors of torch."""
    import torch

    return {name: torch.tensor(array, **options) for name, array in operands.items()}


def assert_close(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Equal shapes, and entries equal up to `tolerance` times the largest expected one."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    if expected.size:
        assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


DRAWN = (
    "conv",
    "conv_transpose",
    "fold",
    "ggn_diagonal",
    "ggn_diagonal, per example",
    "ggn_gram",
    "ggn_mini_blocks",
    "ggn_mini_blocks, kernel",
    "ggn_mini_blocks, position",
    "hessian_backprop",
    "hessian_diagonal_input",
    "hessian_diagonal_weight",
    "conv_input_jacobian",
    "conv_input_jvp",
    "conv_input_vjp",
    "kfac_input_factor",
    "kfac_input_factor, bias",
    "kfac_input_factor, reduce",
    "kfac_input_root",
    "kfac_output_factor",
    "kfac_output_factor, reduce",
    "mixed_second_derivative",
    "conv_weight_vjp_per_example",
    "unfold",
    "unfold_transpose",
    "unfolded_kernel",
    "conv_weight_jacobian",
    "conv_weight_jvp",
    "conv_weight_vjp",
)
"""The operations of random networks: a list, so that a new operation leaves the network of each seed as it is."""


def random_network(seed: int) -> Any:
    """A random operation on a random spec, with random sub-tensor access; all sizes known."""
    from tests.support.strategies import random_spec

    rng, choose = np.random.default_rng(seed), random.Random(seed)
    spec = lensor.ConvSpec(**random_spec(rng, max_ndim=2))
    net = bound(BUILDERS[choose.choice(DRAWN)](spec), choose.choice([1, 2]))
    for _ in range(choose.choice([0, 0, 1, 2])):
        index = choose.choice(sorted(net.output_indices if choose.random() < 0.8 else net.sizes) or [""])
        if index:
            size = net.sizes[index]
            start = choose.randrange(size)
            net = net.slice(index, start, choose.randint(start + 1, size), choose.randint(1, 2))
    return net


def disguised(net: Any, seed: int) -> Any:
    """The same network or sum with other names and other orders of nodes, of a delta's indices and of terms."""
    choose = random.Random(seed)
    names = list(net.sizes)
    new = [f"{choose.choice(['a', 'zz', 'n', 'i1'])}_{at}" for at in range(len(names))]
    choose.shuffle(new)
    terms = []
    for term in net.rename(dict(zip(names, new, strict=True))).terms:
        nodes = [
            Delta(tuple(choose.sample(node.indices, len(node.indices)))) if isinstance(node, Delta) else node
            for node in term.nodes
        ]
        terms.append(term.replace(nodes=choose.sample(nodes, len(nodes)), trace=()))
    choose.shuffle(terms)
    return terms[0] if len(terms) == 1 else Sum(tuple(terms))
