"""Torch modules computed by Lensor, and the conversion of whole models.

Use `convert(model)` for an existing torch model: it replaces all convolutions. Use `ConvNd`, `ConvTransposeNd`,
`UnfoldNd` and `FoldNd` for any number of spatial dimensions. Importing this package imports torch.
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
