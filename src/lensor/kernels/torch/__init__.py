"""The torch backend: the steps of plans, their derivatives, and support for the graphs of compilers."""

from lensor.kernels.torch.backend import BACKEND

__all__ = ["BACKEND"]
