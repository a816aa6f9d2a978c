"""Convolutions for models in JAX, and their Kronecker factors.

`conv_general_dilated` and `dot_general` have the arguments of the functions of `jax.lax`, so libraries of layers can
call them; `lensor.integrations.flax` and `lensor.integrations.equinox` contain such layers. `kfac` computes the factors
of a model with these layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer

import lensor.functional as F
from lensor.choices import Approx, FactorFisher, words
from lensor.errors import require_choice
from lensor.kernels.jax import varying

_LOSSES = ("cross_entropy", "mse")

_MARK = "lensor layer"
"""The name of the outputs of layers in jaxprs."""


class Factors(NamedTuple):
    """The Kronecker factors of one parameter.

    Args:
        A: [groups, d, d], of the inputs of the layer.
        B: [groups, c_out / groups, c_out / groups], of the gradients with respect to its outputs.
    """

    A: Any
    B: Any


# --------------------------------------------------------------------------------------------------------------- layers
def conv_general_dilated(
    lhs: Any,
    rhs: Any,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> Any:
    """A convolution with the arguments of `jax.lax.conv_general_dilated`, computed by `lensor.functional.conv`.

    Pass it to layers that accept such a function, for example `flax.nnx.Conv(..., conv_general_dilated=...)`.

    Args:
        lhs: the input.
        rhs: the kernel.
        window_strides: the stride for each dimension.
        padding: "SAME", "SAME_LOWER", "VALID" or a pair of widths for each dimension.
        lhs_dilation: must be 1.
        rhs_dilation: the dilation for each dimension.
        dimension_numbers: the order of the axes, as for `jax.lax`.
        feature_group_count: the number of groups.
        batch_group_count: must be 1.
        precision: must be None or the default: the setting `jax_default_matmul_precision` applies.
        preferred_element_type: None, or the dtype of the input.
        options: must be None or absent.

    Raises:
        ValueError: for an argument that this function does not support, shapes that do not match, negative padding, or
            an empty output.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lensor.integrations.jax import conv_general_dilated
        >>> x, w = jnp.ones((2, 3, 8)), jnp.ones((4, 3, 3))
        >>> conv_general_dilated(x, w, (2,), "SAME").shape
        (2, 4, 4)
    """
    lhs, weight, rhs = jnp.asarray(lhs), rhs, jnp.asarray(rhs)
    dims = lhs.ndim - 2
    supported: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "lhs_dilation": (None if lhs_dilation is None else tuple(lhs_dilation), (None, (1,) * dims)),
        "batch_group_count": (batch_group_count, (1,)),
        "precision": (precision, (None, lax.Precision.DEFAULT, "default")),
        "preferred_element_type": (preferred_element_type, (None, lhs.dtype)),
        **{name: (value, (None,)) for name, value in options.items()},
    }
    for name, (found, expected) in supported.items():
        if found not in expected:
            raise ValueError(f"{name} is {found}, expected {' or '.join(map(str, expected))}")
    if not isinstance(padding, str) and any(np.shape(one) != (2,) for one in padding):
        raise ValueError(f"padding is {padding}, expected 'SAME', 'SAME_LOWER', 'VALID' or a pair for each dimension")
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    x, w = lhs.transpose(numbers.lhs_spec), rhs.transpose(numbers.rhs_spec)
    dilation = (1,) * dims if rhs_dilation is None else tuple(rhs_dilation)
    if isinstance(padding, str):
        require_choice("padding", padding.upper(), ("SAME", "SAME_LOWER", "VALID"))
        spans = [(size - 1) * step + 1 for size, step in zip(w.shape[2:], dilation, strict=True)]
        padding = lax.padtype_to_pads(x.shape[2:], spans, window_strides, padding)
    settings = {
        "stride": tuple(window_strides),
        "padding": tuple([tuple(one) for one in padding]),
        "dilation": dilation,
        "groups": feature_group_count,
    }
    found = _noted(weight, x, F.conv(x, w, **settings), settings | {"kernel_size": w.shape[2:]})
    order = [0] * found.ndim
    for place, axis in enumerate(numbers.out_spec):
        order[axis] = place
    return found.transpose(order)


def dot_general(lhs: Any, rhs: Any, dimension_numbers: Any, precision: Any = None, **options: Any) -> Any:
    """A product with the arguments of `jax.lax.dot_general` that `kfac` recognises as a linear layer.

    Pass it to layers that accept such a function, for example `flax.nnx.Linear(..., dot_general=...)`.

    Args:
        lhs: the input; its last axis is summed.
        rhs: the kernel, [in, out].
        dimension_numbers: which axes are summed and which are shared, as for `jax.lax`.
        precision: as for `jax.lax`.
        options: as for `jax.lax`.

    Example:
        >>> import jax.numpy as jnp
        >>> from lensor.integrations.jax import dot_general
        >>> dot_general(jnp.ones((2, 3)), jnp.ones((3, 4)), (((1,), (0,)), ((), ()))).shape
        (2, 4)
    """
    found = lax.dot_general(lhs, rhs, dimension_numbers, precision=precision, **options)
    (summed_l, summed_r), (shared, _) = dimension_numbers
    if shared or rhs.ndim != 2 or tuple(summed_l) != (lhs.ndim - 1,) or tuple(summed_r) != (0,):
        return found
    return linear(rhs, lhs, found)


def linear(weight: Any, x: Any, result: Any) -> Any:
    """Let `kfac` know that `result` [*, out] is a linear layer's output for `x` [*, in]; use the returned array.

    Args:
        weight: the weight, a leaf of the parameters.
        x: the input; the axes before the last one are positions.
        result: the output.
    """
    rows = x.reshape(1, -1, x.shape[-1]).swapaxes(1, 2)
    outs = result.reshape(1, -1, result.shape[-1]).swapaxes(1, 2)
    found = _noted(weight, rows, outs, {"kernel_size": (1,)})
    return found.swapaxes(1, 2).reshape(result.shape)


# ------------------------------------------------------------------------------------------------------------ recording
class _Use(NamedTuple):
    """A call of a layer."""

    weight: Any
    settings: Mapping[str, Any]
    shape: tuple[int, ...]  # of the output for one example, [c_out, *output_size]
    dtype: Any


class _Tape:
    """The calls of layers while a model runs, in their order; their outputs are changed by `shifts`."""

    def __init__(self, shifts: Sequence[Any] | None = None) -> None:
        self.shifts = shifts
        self.uses: list[_Use] = []
        self.inputs: list[Any] = []

    def noted(self, weight: Any, x: Any, y: Any, settings: Mapping[str, Any]) -> Any:
        if len(x) != 1:
            raise ValueError(
                f"a layer has an input of {len(x)} examples, expected one: apply(params, x) gets one example"
            )
        place = len(self.uses)
        self.uses.append(_Use(weight, settings, y.shape[1:], y.dtype))
        self.inputs.append(x[0])
        return y if self.shifts is None else y + self.shifts[place][None]


_tape: ContextVar[_Tape | None] = ContextVar("lensor.jax.tape", default=None)


def _noted(weight: Any, x: Any, y: Any, settings: Mapping[str, Any]) -> Any:
    tape, y = _tape.get(), checkpoint_name(y, _MARK)
    return y if tape is None else tape.noted(weight, x, y, settings)


def _ran(tape: _Tape, apply: Callable[[Any, Any], Any], params: Any, x: Any) -> Any:
    token = _tape.set(tape)
    try:
        return apply(params, x)
    finally:
        _tape.reset(token)


# -------------------------------------------------------------------------------------------------------------- factors
def kfac(
    apply: Callable[[Any, Any], Any],
    params: Any,
    data: tuple[Any, Any],
    *,
    loss: str = "cross_entropy",
    approx: Approx = "expand",
    fisher: FactorFisher = "type-2",
    key: Any = None,
    mc_samples: int = 1,
) -> dict[str, Factors]:
    """Kronecker-factored approximation of the generalised Gauss-Newton matrix of a model in JAX.

    The factors are those of the mean loss over the data. The layers must be Lensor's: those of
    `lensor.integrations.flax` or `lensor.integrations.equinox`, or any that call `conv_general_dilated` and
    `dot_general` of this module. Parameters of other layers, and biases, have no factors. You can call the function
    inside `jax.jit`, which is much faster than outside of it. Traced classes that are out of range give NaN.

    Args:
        apply: `apply(params, x)` computes the model's outputs, a vector, for one example.
        params: the parameters, any pytree; the layers' weights must be its leaves.
        data: the inputs and targets of all examples, with the examples first.
        loss: "cross_entropy" for targets that are classes, or "mse", the mean over examples and outputs.
        approx: "expand" treats the positions of a layer as examples, "reduce" sums over them first.
        fisher: "type-2": the exact Hessian of the loss with respect to the outputs, with one backward pass for each
            output; "mc": sampled from the model's own distribution; "empirical": the gradients of the loss itself.
        key: a random key, for "mc".
        mc_samples: the number of samples, for "mc".

    Returns:
        The factors for each weight, by its path in `params` (`jax.tree_util.keystr`). Kernels of layers of flax are
        factored like those of torch: d are the input channels of a group times the kernel's positions.

    Raises:
        TypeError: if "mc" is requested without a key, if classes are not integers, if a leaf of the parameters is not
            an array, or if data is not a pair.
        ValueError: if a layer runs several times, or not on the parameters, or inside another transform such as `vmap`,
            `jax.lax.scan` or `jax.checkpoint`; if a layer's weight is used elsewhere, too; if no layer is Lensor's; for
            an unknown choice; or if shapes do not match.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lensor.integrations.jax import conv_general_dilated, kfac
        >>> def apply(params, x):
        ...     return conv_general_dilated(x[None], params["w"], (1, 1), "VALID").mean((0, 2, 3))
        >>> params = {"w": jnp.ones((10, 3, 3, 3))}
        >>> factors = kfac(apply, params, (jnp.ones((4, 3, 8, 8)), jnp.array([1, 5, 0, 3])))
        >>> {name: (found.A.shape, found.B.shape) for name, found in factors.items()}
        {"['w']": ((1, 27, 27), (1, 10, 10))}

    Equation:
        See `lensor.curvature.kfac`.
    """
    require_choice("loss", loss, _LOSSES)
    require_choice("approx", approx, words(Approx))
    require_choice("fisher", fisher, ("type-2", "mc", "empirical"))
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(f"data has type {type(data).__name__}, expected a pair (inputs, targets)")
    if not isinstance(mc_samples, int) or mc_samples < 1:
        raise ValueError(f"mc_samples is {mc_samples}, expected an integer of at least 1")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex)):
            raise TypeError(
                f"the leaf {jax.tree_util.keystr(path)} of params has type {type(leaf).__name__}, expected arrays:"
                " split the model first, for example by equinox.partition(model, equinox.is_array)"
            )
    params, inputs, targets = jax.tree.map(jnp.asarray, (params, *data))
    count = _examples(inputs)
    first = jax.tree.map(lambda leaf: leaf[0], inputs)
    tape = _Tape()
    try:
        jaxpr = jax.make_jaxpr(apply)(params, first).jaxpr
        # If layers are in functions under jax.jit, these run again instead of being taken from JAX's cache.
        everything_runs = jax.disable_jit if _marks(jaxpr) != _marks(jaxpr, inside=False) else nullcontext
        with everything_runs():
            found = jax.eval_shape(lambda: _ran(tape, apply, params, first))
        if not hasattr(found, "shape") or len(found.shape) != 1:
            raise ValueError(f"apply returns {found} for one example, expected a vector")
        _require_all(tape, _marks(jaxpr))

        def one(x: Any, shifts: Sequence[Any]) -> tuple[Any, list[Any]]:
            again = _Tape(shifts)
            with everything_runs():
                return _ran(again, apply, params, x), again.inputs

        leaves = jax.tree.leaves((inputs, params))
        shifts = [varying([jnp.zeros((count, *use.shape), use.dtype), *leaves])[0] for use in tape.uses]
        outputs, backward, read = jax.vjp(lambda shifts: jax.vmap(one)(inputs, shifts), shifts, has_aux=True)
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            "a layer of the model runs inside a transform such as vmap or scan, expected apply(params, x) to compute"
            " the outputs for one example without one"
        ) from error
    names = _names(params, tape.uses)
    _require_once(names, params, jaxpr)
    columns = _columns(outputs, targets, loss, fisher, key, mc_samples)
    (gradients,) = jax.vmap(backward)(varying([columns, outputs])[0])
    factors = {}
    for name, use, x, gradient in zip(names, tape.uses, read, gradients, strict=True):
        groups = use.settings.get("groups", 1)
        factors[name] = Factors(
            F.kfac_input_factor(x, approx=approx, **use.settings), F.kfac_output_factor(gradient, groups, approx=approx)
        )
    return factors


def _examples(inputs: Any) -> int:
    """The number of examples."""
    counts = {leaf.shape[:1] for leaf in jax.tree.leaves(inputs)}
    if len(counts) != 1 or counts & {(), (0,)}:
        shapes = [leaf.shape for leaf in jax.tree.leaves(inputs)]
        raise ValueError(f"inputs have the shapes {shapes}, expected arrays with the same positive number of examples")
    ((count,),) = counts
    return count


def _marks(jaxpr: Any, inside: bool = True) -> int:
    """The number of calls of layers in a jaxpr; with `inside`, including those in the jaxprs inside it."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "name" and equation.params.get("name") == _MARK
        count += sum(map(_marks, _inner(equation))) if inside else 0
    return count


def _inner(equation: Any) -> list[Any]:
    """The jaxprs inside an equation."""
    values = [
        getattr(inner, "jaxpr", inner)
        for value in equation.params.values()
        for inner in (value if isinstance(value, (tuple, list)) else (value,))
    ]
    return [inner for inner in values if hasattr(inner, "eqns")]


def _reads(jaxpr: Any, variable: Any) -> int:
    """The number of equations that read a variable of a jaxpr, also in the functions to which it is passed."""
    count = 0
    for equation in jaxpr.eqns:
        places = [at for at, one in enumerate(equation.invars) if one is variable]
        inner = _inner(equation)
        if places and len(inner) == 1 and len(inner[0].invars) == len(equation.invars):
            count += sum(_reads(inner[0], inner[0].invars[at]) for at in places)
        else:
            count += len(places)
    return count


def _require_once(names: Sequence[str], params: Any, jaxpr: Any) -> None:
    """Raise ValueError if a weight of a layer is also used outside of the layer."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    for (path, _), variable in zip(leaves, jaxpr.invars, strict=False):
        name = jax.tree_util.keystr(path)
        if name in names and (reads := _reads(jaxpr, variable)) != 1:
            raise ValueError(
                f"the weight {name} is read {reads} times by the model, expected once, by its layer: its factors"
                " describe one use"
            )


def _require_all(tape: _Tape, marks: int) -> None:
    """Raise ValueError if some calls of layers were not seen, because JAX had traced a part of the model before."""
    seen = len(tape.uses)
    if not seen or seen != marks:
        raise ValueError(
            f"the model calls {marks} layers of Lensor, and {seen} of them outside of jax.checkpoint and other"
            " functions that JAX has traced before, expected at least one, and all of them outside"
        )


def _names(params: Any, uses: Sequence[_Use]) -> list[str]:
    """The path of each layer's weight in the parameters."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    paths: dict[int, list[str]] = {}
    for path, leaf in leaves:
        paths.setdefault(id(leaf), []).append(jax.tree_util.keystr(path))
    found = [paths.get(id(use.weight), [None]) for use in uses]
    for every in found:
        if len(every) > 1:
            raise ValueError(f"the leaves {every} of params are the same array, expected a different one for each")
    names = [every[0] for every in found]
    if None in names:
        shape = uses[names.index(None)].weight.shape
        raise ValueError(
            f"the weight of shape {shape} of a layer is not a leaf of params, expected apply(params, x) to use the"
            " leaves of params themselves as weights (a layer that casts or masks its weight does not)"
        )
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the layer with weight {name} runs {names.count(name)} times, expected once")
    return [str(name) for name in names]


def _columns(outputs: Any, targets: Any, loss: str, fisher: str, key: Any, mc_samples: int) -> Any:
    """Columns [v, batch, outputs] of a square root of the loss Hessian, for the mean loss."""
    count, size = outputs.shape
    if fisher == "mc" and key is None:
        raise TypeError("key is None, expected a random key for fisher='mc'")
    expected = (count,) if loss == "cross_entropy" else (count, size)
    if targets.shape != expected:
        raise ValueError(f"targets have shape {targets.shape}, expected {expected} for loss={loss!r}")
    if loss == "cross_entropy":
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            raise TypeError(f"targets have dtype {targets.dtype}, expected integers, the numbers of classes")
        if not isinstance(targets, Tracer):
            known = np.asarray(targets)  # inside jax.jit, functions of JAX would trace it
            if known.min() < 0 or known.max() >= size:
                raise ValueError(f"targets are {known.min()} to {known.max()}, expected 0 to {size - 1}")
        else:
            inside = (targets >= 0) & (targets < size)
            outputs = jnp.where(inside[:, None], outputs, jnp.nan)
    if loss == "mse":
        scale = (count * size) ** -0.5
        if fisher == "type-2":
            return jnp.broadcast_to(jnp.eye(size, dtype=outputs.dtype)[:, None] * (2**0.5 * scale), (size, count, size))
        if fisher == "mc":
            return jax.random.normal(key, (mc_samples, count, size), outputs.dtype) * (scale * (2 / mc_samples) ** 0.5)
        return (2 * scale * (outputs - targets))[None]
    p, scale = jax.nn.softmax(outputs), count**-0.5
    if fisher == "type-2":
        roots = jnp.sqrt(p).T[..., None]
        return scale * roots * (jnp.eye(size, dtype=p.dtype)[:, None] - p)
    if fisher == "mc":
        drawn = jax.random.categorical(key, outputs, shape=(mc_samples, count))
        return (p - jax.nn.one_hot(drawn, size, dtype=p.dtype)) * (scale * mc_samples**-0.5)
    return scale * (p - jax.nn.one_hot(targets, size, dtype=p.dtype))[None]
