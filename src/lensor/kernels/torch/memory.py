"""Memory of tensors: the channels_last memory format, and tensors that only provide a shape."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

from lensor.kernels.torch.tensors import is_plain
from lensor.spec import ConvSpec

_nothing = mmap.mmap(-1, mmap.PAGESIZE, access=mmap.ACCESS_COPY)
"""An address range that is never read or written, and therefore occupies no memory."""


def shape_only(size: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Create a tensor that only provides its shape to torch's convolutions, which would copy an expanded tensor.

    A tensor from the allocator could occupy cached memory that the result could use.
    """
    global _nothing
    if like.device.type != "cpu" or type(like) is not torch.Tensor or torch.compiler.is_compiling():
        return like.new_empty(size)
    count = math.prod(size)
    buffer = _nothing
    if len(buffer) < count * like.element_size():
        buffer = _nothing = mmap.mmap(-1, 2 * count * like.element_size(), access=mmap.ACCESS_COPY)
    return torch.frombuffer(buffer, dtype=like.dtype, count=count).reshape(size) if count else like.new_empty(size)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def format_of(x: torch.Tensor, channels_last: bool) -> torch.memory_format:
    """The memory format for results: channels_last if requested and defined for this number of axes."""
    return _CHANNELS_LAST.get(x.ndim, torch.contiguous_format) if channels_last else torch.contiguous_format


def in_channels_last(x: torch.Tensor) -> torch.Tensor:
    """Convert a tensor to channels_last; return it unchanged under a transform, where its format is unknown."""
    return x.contiguous(memory_format=format_of(x, True)) if is_plain(x) else x


def is_channels_last(arrays: Sequence[torch.Tensor], spec: ConvSpec) -> bool:
    """Whether torch's convolution returns channels_last for this input and weight, or for one of them alone."""
    if torch.compiler.is_compiling() or len(arrays) == 1:
        return any(map(suggests_channels_last, arrays))
    if not all(map(is_plain, arrays)):
        return False  # the format is unknown under a transform
    x, weight = arrays
    padding = [max(sides) for sides in spec.padding]
    if spec.padding_mode == "circular":  # torch first pads the input into row-major order
        x = x.new_empty(x.shape)
    if not suggests_channels_last(x) and not suggests_channels_last(weight):
        return False
    options = (list(spec.stride), padding, list(spec.dilation), spec.transposed, list(spec.output_padding), spec.groups)
    backend = torch._C._select_conv_backend(x, weight, None, *options, None)
    return torch._C._conv_determine_backend_memory_format(x, weight, backend) != torch.contiguous_format


def suggests_channels_last(x: torch.Tensor) -> bool:
    """Whether torch treats an array with 4 or 5 axes as channels_last, resolving ambiguous strides as torch does."""
    strides, sizes = x.stride(), x.shape
    least = 0
    if strides[1] == 0:
        return False
    for axis in (1, *range(x.ndim - 1, 1, -1), 0):
        if sizes[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * max(sizes[axis], 1)
    return True
