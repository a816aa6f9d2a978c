"""Modules with sampled weight gradients, and the conversion of models to such modules."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.overrides import handle_torch_function, has_torch_function_variadic

from lensor import nn
from lensor.nn.calls import LayerCall, register_layer_function
from lensor.nn.conversion import copied, with_base
from lensor.nn.layers import Leaf, output_padding_of, typed
from lensor.sampling.functional import (
    BilinearMap,
    Forward,
    Keep,
    Scheme,
    apply,
    conv,
    conv_transpose,
    convolution,
    is_exporting,
    linear,
    linear_map,
    names_of,
    rates_of,
    require_scheme,
    schemes_of,
    spec_of,
)

Model = TypeVar("Model", bound=torch.nn.Module)


class Sampled(Leaf):
    """Mixin that samples the weight gradient in training mode; list it before the module's class.

    Args:
        keep: fraction of positions to keep, by index of the input; other arguments are the module's own.
        scheme: sampling scheme, one of `lensor.sampling.SCHEMES`, or one per index.
        generator: a CPU generator; torch's by default.

    Example:
        >>> import torch, lensor.sampling
        >>> model = lensor.sampling.convert(torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3)), {"i1": 0.5})
        >>> for module in model.modules():
        ...     if isinstance(module, lensor.sampling.Sampled):
        ...         module.set_sampling({"i1": 0.25}, scheme="fixed")
        >>> model[0]
        Conv1d(2, 4, kernel_size=(3,), stride=(1,), keep={'i1': 0.25}, scheme='fixed')
    """

    keep: Keep
    scheme: Scheme
    generator: torch.Generator | None

    def __init__(
        self,
        *args: Any,
        keep: Keep,
        scheme: Scheme = "bernoulli",
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.set_sampling(keep, scheme, generator)

    def set_sampling(self, keep: Keep, scheme: Scheme = "bernoulli", generator: torch.Generator | None = None) -> None:
        """Change the sampling options.

        Raises:
            TypeError: if keep is not a mapping, or generator is not a generator.
            ValueError: for an unknown index or scheme, or a keep rate outside (0, 1].
        """
        rates_of(keep, self._sampled_names())
        schemes_of(scheme, self._sampled_names())
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator is {generator!r}, expected a torch.Generator or None")
        self.keep, self.scheme, self.generator = dict(keep), scheme, generator

    def _sampled_names(self) -> tuple[str, ...]:
        """The names of the indices that can be sampled."""
        raise NotImplementedError

    def _bilinear(self, x: Tensor, output_padding: Sequence[int] | None = None) -> BilinearMap:
        """The map that the module computes for an input with a batch axis."""
        raise NotImplementedError

    def _as_function(self, x: Tensor, weight: Tensor, bias: Tensor | None, *more: Any) -> Tensor:
        """Compute the training-mode output with a function from `lensor.sampling`."""
        raise NotImplementedError

    def _sampling(self) -> dict[str, Any]:
        return {"keep": self.keep, "scheme": self.scheme, "generator": self.generator}

    def _fits(self, x: Tensor) -> bool:
        """Whether an input, with or without a batch axis, has the axes and channels that the module expects."""
        raise NotImplementedError

    def _sample(
        self: Any, forward: Forward, x: Tensor, weight: Tensor, bias: Tensor | None, *more: Any, batched: bool
    ) -> Tensor:
        """Run `forward` with a sampled weight gradient in training mode."""
        if isinstance(x, Proxy):  # torch.fx traces the module as the whole model; otherwise it is a leaf
            return self._as_function(x, weight, bias, *more) if self.training else forward(x, weight, bias)
        if has_torch_function_variadic(x, weight):
            arguments = (self, forward, x, weight, bias, *more)
            return handle_torch_function(sampled_layer, (x, weight), *arguments, batched=batched)
        if not self.training or not self._fits(x) or is_exporting():  # torch raises the error if x does not fit
            return forward(x, weight, bias)
        return self._sample_uncompiled(forward, x, weight, bias, *more, batched=batched)

    @torch.compiler.disable
    def _sample_uncompiled(
        self: Any, forward: Forward, x: Tensor, weight: Tensor, bias: Tensor | None, *more: Any, batched: bool
    ) -> Tensor:
        """Run without tracing: a graph would fix the number of positions, which is random."""
        if not batched:
            return self._sample(
                lambda x, weight, bias: forward(x[0], weight, bias)[None], x[None], weight, bias, *more, batched=True
            )[0]
        bilinear = self._bilinear(x, *more)
        return apply(bilinear, forward, x, weight, bias, self.keep, self.scheme, self.generator)

    def extra_repr(self) -> str:
        """The module's own arguments, followed by the sampling options."""
        keep = {name: float(rate) for name, rate in self.keep.items()}
        return f"{super().extra_repr()}, keep={keep}, scheme={self.scheme!r}"  # type: ignore[misc]


def sampled_layer(
    module: Any, forward: Forward, x: Tensor, weight: Tensor, bias: Tensor | None, *more: Any, batched: bool
) -> Tensor:
    """Compute a sampled layer; torch function modes can override this function like torch's own."""
    return module._sample(forward, x, weight, bias, *more, batched=batched)


def _read_sampled(
    module: Any, forward: Forward, x: Tensor, weight: Tensor, bias: Tensor | None, *more: Any, batched: bool
) -> LayerCall:
    """The call of the exact layer; sampling changes only the weight gradient."""
    if isinstance(module, Linear):
        return LayerCall("linear", x, weight, bias)
    hyper = module.stride, module.padding, module.dilation, module.groups, module.padding_mode
    if isinstance(module, SampledTransposedConvolution):
        return LayerCall("conv_transpose", x, weight, bias, *hyper, output_padding=more[0])
    return LayerCall("conv", x, weight, bias, *hyper)


register_layer_function(sampled_layer, _read_sampled)


def _map(module: Any, x: Tensor, output_padding: Sequence[int] | None = None) -> BilinearMap:
    """The bilinear map of a convolution or, if `output_padding` is given, of a transposed convolution."""
    dims = len(module.kernel_size)
    spec = spec_of(
        module.in_channels,
        module.out_channels,
        tuple(x.shape[-dims:]),
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.padding_mode,
        output_padding,
    )
    return convolution(spec, spec.padding if output_padding is None else tuple(module.padding))


class _OfConvolution(Sampled):
    """Base class of sampled convolutions and transposed convolutions."""

    def _sampled_names(self: Any) -> tuple[str, ...]:
        return names_of(len(self.kernel_size))

    def _fits(self: Any, x: Tensor) -> bool:
        dims = len(self.kernel_size)
        return x.ndim in (dims + 1, dims + 2) and x.shape[-dims - 1] == self.in_channels


class SampledConvolution(_OfConvolution):
    """A convolution with a sampled weight gradient."""

    def _bilinear(self: Any, x: Tensor, output_padding: Sequence[int] | None = None) -> BilinearMap:
        return _map(self, x)

    def _as_function(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *more: Any) -> Tensor:
        options = (self.stride, self.padding, self.dilation, self.groups)
        return conv(x, weight, bias, *options, padding_mode=self.padding_mode, **self._sampling())

    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        batched = input.ndim == len(self.kernel_size) + 2
        return self._sample(super()._conv_forward, input, weight, bias, batched=batched)  # type: ignore[misc]


class SampledTransposedConvolution(_OfConvolution):
    """A transposed convolution with a sampled weight gradient."""

    def _bilinear(self: Any, x: Tensor, output_padding: Sequence[int] | None = None) -> BilinearMap:
        return _map(self, x, tuple(output_padding or self.output_padding))

    def _as_function(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *more: Any) -> Tensor:
        options = (self.stride, self.padding, more[0], self.groups, self.dilation)
        return conv_transpose(x, weight, bias, *options, **self._sampling())

    def forward(self: Any, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Apply the layer; `output_size` is the desired spatial size, which determines `output_padding`."""
        dims = len(self.kernel_size)
        chosen = self.output_padding if output_size is None else output_padding_of(self, input, output_size)
        function = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[dims - 1]

        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return function(x, weight, bias, self.stride, self.padding, chosen, self.groups, self.dilation)

        return self._sample(run, input, self.weight, self.bias, chosen, batched=input.ndim == dims + 2)


class Conv1d(SampledConvolution, torch.nn.Conv1d):
    """`torch.nn.Conv1d` with a sampled weight gradient.

    Example:
        >>> import torch, lensor.sampling
        >>> layer = lensor.sampling.Conv1d(2, 4, 3, keep={"i1": 0.5})
        >>> layer(torch.zeros(1, 2, 9)).shape
        torch.Size([1, 4, 7])
    """


class Conv2d(SampledConvolution, torch.nn.Conv2d):
    """`torch.nn.Conv2d` with a sampled weight gradient.

    Example:
        >>> import torch, lensor.sampling
        >>> lensor.sampling.Conv2d(2, 4, 3, keep={"i1": 0.5, "i2": 0.5}, scheme="fixed")
        Conv2d(2, 4, kernel_size=(3, 3), stride=(1, 1), keep={'i1': 0.5, 'i2': 0.5}, scheme='fixed')
    """


class Conv3d(SampledConvolution, torch.nn.Conv3d):
    """`torch.nn.Conv3d` with a sampled weight gradient.

    Example:
        >>> import torch, lensor.sampling
        >>> layer = lensor.sampling.Conv3d(1, 2, 3, keep={"i1": 0.5})
        >>> layer(torch.zeros(1, 1, 5, 5, 5)).shape
        torch.Size([1, 2, 3, 3, 3])
    """


class ConvTranspose1d(SampledTransposedConvolution, torch.nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with a sampled weight gradient.

    Example:
        >>> import torch, lensor.sampling
        >>> layer = lensor.sampling.ConvTranspose1d(2, 4, 3, keep={"i1": 0.5})
        >>> layer(torch.zeros(1, 2, 7)).shape
        torch.Size([1, 4, 9])
    """


class ConvTranspose2d(SampledTransposedConvolution, torch.nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with a sampled weight gradient.

    Example:
        >>> import torch, lensor.sampling
        >>> layer = lensor.sampling.ConvTranspose2d(2, 4, 2, stride=2, keep={"c_in": 0.5})
        >>> layer(torch.zeros(1, 2, 7, 7)).shape
        torch.Size([1, 4, 14, 14])
    """


class ConvTranspose3d(SampledTransposedConvolution, torch.nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with a sampled weight gradient.

    Example:
        >>> import torch, lensor.sampling
        >>> layer = lensor.sampling.ConvTranspose3d(1, 2, 2, keep={"i1": 0.5})
        >>> layer(torch.zeros(1, 1, 3, 3, 3)).shape
        torch.Size([1, 2, 4, 4, 4])
    """


class Linear(Sampled, torch.nn.Linear):
    """`torch.nn.Linear` with a sampled weight gradient.

    Its indices are n (the first axis), c_in (the last axis), and i1, i2, ... (the axes between them).

    Example:
        >>> import torch, lensor.sampling
        >>> layer = lensor.sampling.Linear(5, 2, keep={"n": 0.5})
        >>> layer(torch.zeros(4, 5)).shape
        torch.Size([4, 2])
    """

    def _sampled_names(self) -> tuple[str, ...]:
        return ("n", *(f"i{axis}" for axis in range(1, _MOST_AXES)), "c_in")

    def _bilinear(self, x: Tensor, output_padding: Sequence[int] | None = None) -> BilinearMap:
        return linear_map(self.in_features, self.out_features, x.ndim)

    def _fits(self, x: Tensor) -> bool:
        return x.ndim > 0 and x.shape[-1] == self.in_features

    def _as_function(self, x: Tensor, weight: Tensor, bias: Tensor | None, *more: Any) -> Tensor:
        return linear(x, weight, bias, **self._sampling())

    @typed
    def forward(self, input: Tensor) -> Tensor:
        """Apply the linear map along the last axis."""
        return self._sample(torch.nn.functional.linear, input, self.weight, self.bias, batched=input.ndim > 1)


_CHUNK = 1 << 18
"""Number of entries for which an array and a mask in its dtype remain in the cache."""


def _in_chunks(x: Tensor) -> int:
    """The number of examples in a chunk; 0 if an array is better handled as a whole."""
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if x.device.type != "cpu" or is_traced or x.ndim == 0 or not x.numel():
        return 0
    return max(1, _CHUNK * len(x) // x.numel())


class _Masked(torch.autograd.Function):
    """An array with zeros where a mask is false.

    On CPUs, masked_fill branches for each entry, which makes it several times slower than the gradient of torch's ReLU.
    The latter needs the mask in the array's dtype, which is made for one chunk of examples at a time.
    """

    @staticmethod
    def forward(x: Tensor, kept: Tensor) -> Tensor:  # type: ignore[override]
        count = _in_chunks(x)
        if not count:
            return x.masked_fill(~kept, 0)
        found = torch.empty_like(x)
        given = torch.empty_like(found[:count])
        for one, mask, result in zip(x.split(count), kept.split(count), found.split(count), strict=True):
            mine = given[: len(one)].copy_(mask)
            torch.ops.aten.threshold_backward.grad_input(one, mine, 0, grad_input=result)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Masked.apply(grads[0], *ctx.saved_tensors), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arrays: Tensor) -> Any:
        given = [
            one[None].expand(info.batch_size, *one.shape) if axis is None else one.movedim(axis, 0)
            for one, axis in zip(arrays, in_dims, strict=True)
        ]
        return _Masked.apply(*given), 0


class _Rectified(torch.autograd.Function):
    """max(x, 0) that stores, in one byte per entry, where the result is not 0, instead of the result itself."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        count = _in_chunks(x)
        if not count:
            found = torch.relu(x)
            return found, found != 0
        found, kept = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
        for one, result, mask in zip(x.split(count), found.split(count), kept.split(count), strict=True):
            torch.clamp_min(one, 0, out=result)
            torch.ne(result, 0, out=mask)
        return found, kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Masked.apply(grads[0], *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arrays: Tensor) -> Any:
        return _Rectified.apply(*arrays), (in_dims[0], in_dims[0])


class ReLU(Leaf, torch.nn.ReLU):
    """`torch.nn.ReLU` that stores one byte per entry for its backward pass, instead of its result.

    Use it before sampled layers: torch's ReLU stores its result, which is the next layer's input, so sampling that
    input would save no memory. Values and gradients are the same; `inplace=True` also writes to the input.

    Example:
        >>> import torch, lensor.sampling
        >>> lensor.sampling.ReLU()(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    @typed
    def forward(self, input: Tensor) -> Tensor:
        """Compute max(input, 0)."""
        if isinstance(input, Proxy) or not (self.training and torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        found: Tensor = _Rectified.apply(input)[0]  # type: ignore[index]
        return input.copy_(found) if self.inplace else found


_SAMPLED: dict[type, type] = {
    torch.nn.Conv1d: Conv1d,
    torch.nn.Conv2d: Conv2d,
    torch.nn.Conv3d: Conv3d,
    torch.nn.ConvTranspose1d: ConvTranspose1d,
    torch.nn.ConvTranspose2d: ConvTranspose2d,
    torch.nn.ConvTranspose3d: ConvTranspose3d,
    torch.nn.Linear: Linear,
}
_MOST_AXES = 64
"""torch's maximum number of axes; how many a linear layer's input has is unknown before the first call."""

_LAYERS = (_ConvNd, torch.nn.Linear)


def convert(
    model: Model,
    keep: Keep | Mapping[str, Keep],
    *,
    scheme: Scheme = "bernoulli",
    generator: torch.Generator | None = None,
    activations: bool = True,
    inplace: bool = False,
) -> Model:
    """Convert a model so that weight gradients of convolutions and linear layers are sampled in training mode.

    Outputs and the gradients of inputs and biases stay exact; parameters and state_dict stay the same. Outputs in
    evaluation mode are unaffected. Each layer samples those indices in `keep` that its input has. A module used in
    several places remains one module.

    Args:
        model: any torch module.
        keep: keep rates by index, for all layers; or a mapping from layer names to keep rates, for these layers only.
            To sample the positions (i1, ...) of a linear layer, name the layer, because the number of its position axes
            depends on its inputs.
        scheme: sampling scheme, one of `lensor.sampling.SCHEMES`, or one per index.
        generator: a CPU generator; torch's by default.
        activations: whether to replace every torch.nn.ReLU by `lensor.sampling.ReLU`, which stores one byte per entry;
            otherwise each torch.nn.ReLU stores its whole result, the next layer's input, for its backward pass.
        inplace: whether to change `model` itself instead of a copy.

    Returns:
        The copy, or `model` itself.

    Example:
        >>> import torch, lensor.sampling
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> lensor.sampling.convert(model, {"i1": 0.5, "i2": 0.5})[0]
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), keep={'i1': 0.5, 'i2': 0.5}, scheme='bernoulli')

    Raises:
        TypeError: if `model` is not a torch module, or keep is not a mapping.
        ValueError: for a keep rate outside (0, 1], an unknown scheme, an index that no layer's input has, an unknown
            layer name, a lazy module, or a model that cannot be copied.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model has type {type(model).__name__}, expected torch.nn.Module")
    if not isinstance(keep, Mapping) or not keep:
        raise TypeError(f"keep is {keep!r}, expected a mapping of indices to rates, e.g. {{'i1': 0.5}}")
    require_scheme(scheme)
    if not inplace:
        model = copied(model)
    layers = dict(_layers(model))
    by_layer = any(isinstance(value, Mapping) for value in keep.values())
    for name, rates in keep.items() if by_layer else ():
        if name not in layers:
            raise ValueError(f"keep has layer {name!r}, expected names from {', '.join(layers)}")
        if not isinstance(rates, Mapping) or not rates:
            raise TypeError(f"keep of layer {name!r} is {rates!r}, expected a mapping of indices to rates")
    known = {index for module in layers.values() for index in _names(module)}
    if not by_layer:
        _require_known("keep", keep, known)
    if isinstance(scheme, Mapping):
        _require_known("scheme", scheme, known.union(*(keep.values() if by_layer else ())))  # type: ignore[arg-type]
    for name, module in layers.items():
        rates: Any = keep.get(name, {}) if by_layer else keep
        mine = {index: rate for index, rate in rates.items() if by_layer or index in _names(module)}
        if mine:
            _convert_layer(name, module, mine, scheme, generator)
    for module in list(model.modules()) if activations else ():
        if type(module) is torch.nn.ReLU:
            module.__class__ = ReLU
    return model


def _require_known(what: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{what} has index {name!r}, expected indices of the layers: {', '.join(sorted(known))}")


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Convolutions and linear layers, each once; a warning names layers whose class overrides the computation."""
    for name, module in model.named_modules():
        if not isinstance(module, _LAYERS):
            continue
        if isinstance(module, LazyModuleMixin):
            raise ValueError(
                f"{name!r} is a lazy {type(module).__name__}, expected an initialised module: run the model once on an"
                " input before you convert it"
            )
        if isinstance(module, Sampled) or _sampled_class(type_before_parametrizations(module)) is not None:
            yield name, module
        else:
            warnings.warn(
                f"{name!r} is not converted: {type(module).__name__} may have its own computation", stacklevel=3
            )


def _sampled_class(cls: type) -> type | None:
    """The sampled class for a layer class of torch or Lensor; None for other classes."""
    base = next((base for base in cls.__mro__ if base in _SAMPLED), None)
    own = base is not None and (cls is base or cls is getattr(nn, base.__name__, None))
    return _SAMPLED[base] if own and base is not None else None


def _names(module: torch.nn.Module) -> tuple[str, ...]:
    """The indices that a layer's input always has; the position axes of a linear layer depend on its inputs."""
    if isinstance(module, torch.nn.Linear):
        return ("n", "c_in")
    assert isinstance(module, _ConvNd)
    return names_of(len(module.kernel_size))


def _convert_layer(
    name: str,
    module: torch.nn.Module,
    keep: Mapping[str, float | Fraction],
    scheme: Scheme,
    generator: torch.Generator | None,
) -> None:
    if not isinstance(module, Sampled):
        new = _sampled_class(type_before_parametrizations(module))
        assert new is not None
        module.__class__ = with_base(type(module), new) if is_parametrized(module) else new
    if not isinstance(scheme, str):
        scheme = {index: value for index, value in scheme.items() if index in _names(module) or index in keep}
    try:
        module.set_sampling(keep, scheme, generator)  # type: ignore[operator]
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from None
