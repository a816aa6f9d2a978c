"""Torch modules that compute with Lensor, and the conversion of whole models.

`convert(model)` makes the convolutions of any torch model Lensor's; `ConvNd`, `ConvTransposeNd`, `UnfoldNd` and
`FoldNd` have any number of spatial dimensions. Importing this package imports torch.
"""

from lensor.nn.conversion import convert
from lensor.nn.layers import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvNd,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    ConvTransposeNd,
    FoldNd,
    UnfoldNd,
)

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvNd",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "ConvTransposeNd",
    "FoldNd",
    "UnfoldNd",
    "convert",
]
