"""The torch backend: the steps of plans, their derivatives, and what graphs of compilers need."""

from lensor.kernels.torch.backend import BACKEND

__all__ = ["BACKEND"]
