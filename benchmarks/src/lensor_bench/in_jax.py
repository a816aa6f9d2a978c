"""The operations in JAX: Lensor's functions beside the standard ones, both compiled by `jax.jit`.

The standard implementations are those of `jax.lax`: its convolution and the derivatives of it, and for the other
operations `jax.lax.conv_general_dilated_patches` and a matrix product.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from lensor.inspect.errors import CommandError, choose, in_one_line
from lensor.inspect.layers import Layer
from lensor.inspect.operations import STANDARD
from lensor.spec import ConvSpec
from lensor_bench.implementations import IMPLEMENTATIONS, Implementation, call_of
from lensor_bench.measure import Call
from lensor_bench.results import OK, Found
from lensor_bench.run import Bench, Case
from lensor_bench.settings import Settings

_MODES = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}


def _padded(x: Any, spec: ConvSpec) -> Any:
    if spec.transposed:
        raise NotImplementedError("transposed convolutions are not measured in JAX")
    return (
        x if not any(map(any, spec.padding)) else jnp.pad(x, ((0, 0), (0, 0), *spec.padding), _MODES[spec.padding_mode])
    )


def _convolved(x: Any, w: Any, spec: ConvSpec) -> Any:
    padding = spec.padding
    if spec.padding_mode != "zeros":
        x, padding = _padded(x, spec), [(0, 0)] * spec.ndim
    return lax.conv_general_dilated(
        x, w, spec.stride, padding, rhs_dilation=spec.dilation, feature_group_count=spec.groups
    )


def _patches(x: Any, spec: ConvSpec) -> Any:
    """[batch, groups, channels/groups · ΠK, positions]."""
    padding = spec.padding
    if spec.padding_mode != "zeros":
        x, padding = _padded(x, spec), [(0, 0)] * spec.ndim
    found = lax.conv_general_dilated_patches(x, spec.kernel_size, spec.stride, padding, rhs_dilation=spec.dilation)
    return found.reshape(len(x), spec.groups, -1, int(np.prod(spec.output_size)))


def _standard(operation: str, spec: ConvSpec, batch: int) -> Callable[..., Any]:
    """The standard implementation of an operation, as a function of its operands by name."""
    if spec.transposed:
        raise NotImplementedError("transposed convolutions are not measured in JAX")

    def input_vjp(W: Any, V: Any) -> Any:
        like = jax.ShapeDtypeStruct((batch, *spec.input_shape), V.dtype)
        return jax.linear_transpose(lambda x: _convolved(x, W, spec), like)(V)[0]

    def weight_vjp(X: Any, V: Any) -> Any:
        like = jax.ShapeDtypeStruct(spec.weight_shape, X.dtype)
        return jax.linear_transpose(lambda w: _convolved(X, w, spec), like)(V)[0]

    def kfac_expand(X: Any) -> Any:
        found = _patches(X, spec)
        found = found.transpose(1, 2, 0, 3).reshape(spec.groups, found.shape[2], -1)
        return found @ found.swapaxes(1, 2) / batch

    def kfac_reduce(X: Any) -> Any:
        found = _patches(X, spec).mean(3).transpose(1, 2, 0)
        return found @ found.swapaxes(1, 2) / batch

    def per_example_weight_vjp(X: Any, V: Any) -> Any:
        v = V.reshape(batch, spec.groups, spec.out_channels // spec.groups, -1)
        return jnp.einsum("ngol,ngkl->ngok", v, _patches(X, spec)).reshape(batch, *spec.weight_shape)

    def ggn_diagonal(X: Any, S: Any) -> Any:
        s = S.reshape(len(S), batch, spec.groups, spec.out_channels // spec.groups, -1)
        roots = jnp.einsum("vngol,ngkl->vngok", s, _patches(X, spec))
        return jnp.square(roots).sum((0, 1)).reshape(spec.weight_shape)

    ways: dict[str, Callable[..., Any]] = {
        "forward": lambda X, W: _convolved(X, W, spec),
        "input_vjp": input_vjp,
        "weight_vjp": weight_vjp,
        "kfac_expand": kfac_expand,
        "kfac_reduce": kfac_reduce,
        "per_example_weight_vjp": per_example_weight_vjp,
        "ggn_diagonal": ggn_diagonal,
    }
    return ways[operation]


class JaxBench(Bench):
    """A benchmark run in JAX. A call includes waiting for its result; compilation is not measured.

    Args:
        settings: settings of the measurement; JAX uses all cores, so `threads` must be their number.
        layers: the convolutions to measure instead of those of the nets.

    Raises:
        CommandError: for an unknown name, or another number of threads.
    """

    def __init__(self, settings: Settings, layers: Sequence[Layer] | None = None) -> None:
        names = choose("implementation", settings.implementations, ("lensor",))
        if settings.threads != os.cpu_count():
            raise CommandError(f"--threads is {settings.threads}, expected {os.cpu_count()}: JAX uses all cores")
        super().__init__(replace(settings, implementations=("lensor",)), layers)
        wanted = dict.fromkeys((STANDARD, *names))
        self.implementations = tuple(
            [
                replace(IMPLEMENTATIONS[name], package="jax" if name == STANDARD else "lensor", module="jax")
                for name in wanted
            ]
        )
        self.setting = replace(self.setting, device=f"jax {jax.default_backend()}")

    def _measure(self, case: Case, implementations: Sequence[Implementation]) -> dict[str, Found]:
        gc.collect()
        spec, name = case.layer.spec, case.operation.name
        found: dict[str, Found] = {}
        calls: dict[str, Call] = {}
        expected: torch.Tensor | None = None
        operands = {key: jnp.asarray(tensor.numpy()) for key, tensor in self.operands(case).items()}
        for one in dict.fromkeys((self.implementations[0], *implementations)):
            if one.name != STANDARD and expected is None:
                found[one.name] = Found("failed", "the standard implementation has no result to compare with")
                continue
            try:
                run = (
                    _standard(name, spec, self.setting.batch)
                    if one.name == STANDARD
                    else lambda **given: call_of(name, given, spec)()
                )
                compiled = jax.jit(run).lower(**operands).compile()
                result = torch.from_numpy(np.array(compiled(**operands)))
                memory: Any = compiled.memory_analysis()
            except Exception as error:
                status = "refused" if isinstance(error, NotImplementedError) else "failed"
                found[one.name] = Found(status, in_one_line(error))
                continue
            expected = result if one.name == STANDARD else expected
            found[one.name] = self._checked(result, expected, int(memory.temp_size_in_bytes))
            if found[one.name].status == OK:
                calls[one.name] = _waiting(compiled, operands)
        jax.clear_caches()
        return self._timed(calls, found)


def _waiting(compiled: Any, operands: dict[str, Any]) -> Call:
    return lambda: jax.block_until_ready(compiled(**operands))
