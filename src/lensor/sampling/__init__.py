"""Randomised backpropagation: exact outputs and input gradients, weight gradients from a sampled part of the input.

Use `convert(model, keep)` for a whole model, and `conv`, `conv_transpose` and `linear` for single calls.

Importing this package imports torch.
"""

from lensor.sampling.functional import conv, conv_transpose, linear
from lensor.sampling.layers import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Linear,
    ReLU,
    Sampled,
    convert,
)
from lensor.sampling.memory import recommend, saved_bytes
from lensor.sampling.schemes import SCHEMES, Draw, draw
from lensor.sampling.variance import second_moments, variance

__all__ = [
    "SCHEMES",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Draw",
    "Linear",
    "ReLU",
    "Sampled",
    "conv",
    "conv_transpose",
    "convert",
    "draw",
    "linear",
    "recommend",
    "saved_bytes",
    "second_moments",
    "variance",
]
