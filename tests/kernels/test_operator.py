"""Plans as operators of traced graphs: the same results, with the properties that tracing without values expects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lensor import functional, ops
from lensor.kernels.torch import operator
from lensor.kernels.torch.operator import tracing
from lensor.spec import ConvSpec
from tests.support.cases import assert_close
from tests.support.oracles import OPERATIONS, make_case
from tests.support.strategies import QUIET, calls


def traced(function: Any, arrays: list[Tensor], mode: str) -> tuple[torch.fx.GraphModule, list[Any]]:
    with tracing() as plans:
        made = make_fx(function, tracing_mode=mode)(*arrays)
    return made, plans


def plans_in(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in graph.graph.nodes if "lensor.plan" in str(node.target)]


def turned(x: Tensor) -> Tensor:
    """The same tensor, with its axes in the reverse order in memory."""
    back = list(range(x.ndim))[::-1]
    return x.permute(back).contiguous().permute(back)


NAMES = [name for name in OPERATIONS if hasattr(ops, name)]


@settings(suppress_health_check=QUIET, max_examples=10)
@given(st.data())
@pytest.mark.parametrize("name", NAMES)
def test_results_and_their_properties(name: str, data: st.DataObject) -> None:
    """For all hyper-parameters: against loops, and as tracing without values expects them."""
    case = make_case(name, **data.draw(calls(name)))
    arrays = {key: torch.tensor(value) for key, value in case.operands.items()}
    if data.draw(st.booleans()):
        arrays = {key: turned(value) for key, value in arrays.items()}
    kind = data.draw(st.sampled_from([torch.float64, torch.float16, torch.bfloat16]))
    arrays = {key: value.to(kind) if value.is_floating_point() else value for key, value in arrays.items()}

    def function(*values: Tensor) -> Tensor:
        net = getattr(ops, name)(ConvSpec(**case.spec), **case.options)
        return net(**dict(zip(arrays, values, strict=True)), **case.sizes)

    expected = function(*arrays.values())
    if kind is torch.float64:
        assert_close(expected, case.expected)
    for mode in ("real", "fake"):
        made, plans = traced(function, list(arrays.values()), mode)
        assert len(plans_in(made)) == len(plans) == 1
        torch.testing.assert_close(made(*arrays.values()), expected, rtol=0, atol=0, equal_nan=True)
        if mode == "fake":
            known = plans_in(made)[0].meta["val"]
            assert (known.shape, known.dtype) == (expected.shape, expected.dtype)
            assert known.is_contiguous()
            assert expected.is_contiguous()


@pytest.mark.parametrize("dims", [2, 3])
def test_memory_formats(dims: int) -> None:
    form = torch.channels_last if dims == 2 else torch.channels_last_3d
    x = torch.randn(2, 4, *[5] * dims).to(memory_format=form)
    w = torch.randn(6, 4, *[3] * dims)

    def convolve(x: Tensor, w: Tensor) -> Tensor:
        return functional.conv(x, w)

    expected = convolve(x, w)
    made, plans = traced(convolve, [x, w], "fake")
    (node,) = plans_in(made)
    assert plans[0].in_channels_last
    assert node.meta["val"].stride() == expected.stride() == made(x, w).stride()
    torch.testing.assert_close(made(x, w), expected)


def test_transforms_and_gradients_trace_the_steps() -> None:
    """`vmap` and derivatives of steps have no rules for the operator."""
    spec = ConvSpec(3, 2, (5,), 3)
    x, w = torch.randn(4, 2, 3, 5), torch.randn(2, 3, 3)

    def mapped(x: Tensor, w: Tensor) -> Tensor:
        return torch.func.vmap(lambda one: functional.conv(one, w))(x)

    made, _ = traced(mapped, [x, w], "real")
    torch.testing.assert_close(made(x, w), mapped(x, w))

    def derived(x: Tensor, w: Tensor) -> Tensor:
        leaf = w.detach().requires_grad_()
        (found,) = torch.autograd.grad(ops.conv(spec)(X=x, W=leaf).square().sum(), leaf)
        return found

    made, plans = traced(derived, [x[0], w], "real")
    torch.testing.assert_close(made(x[0], w), derived(x[0], w))
    assert len(plans) == 2  # the convolution, and its derivative


def test_plans_are_operators_only_where_a_graph_is_traced() -> None:
    spec, x, w = ConvSpec(3, 2, (5,), 3), torch.randn(4, 3, 5), torch.randn(2, 3, 3)
    with tracing() as plans:
        ops.conv(spec)(X=x, W=w)
    assert not plans
    assert operator._traced is None


def test_a_graph_keeps_its_plans() -> None:
    """The operator refers to plans by numbers, which are gone with the graphs that keep them."""
    spec, x, w = ConvSpec(3, 2, (7,), 5), torch.randn(4, 3, 7), torch.randn(2, 3, 5)
    made, plans = traced(lambda x, w: ops.conv(spec)(X=x, W=w), [x, w], "real")
    assert plans[0].number in operator._plans
    torch.testing.assert_close(made(x, w), ops.conv(spec)(X=x, W=w))
