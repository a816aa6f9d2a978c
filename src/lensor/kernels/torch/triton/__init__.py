"""Triton kernels: pattern products on GPUs. Import this package only if Triton is installed."""

from lensor.kernels.torch.triton.launch import Launcher, tuning
from lensor.kernels.torch.triton.tiles import Tile

__all__ = ["Launcher", "Tile", "tuning"]
