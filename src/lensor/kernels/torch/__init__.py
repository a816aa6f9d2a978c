"""The torch backend: steps of plans, derivatives, and support for graph compilers."""

from lensor.kernels.torch.backend import BACKEND

__all__ = ["BACKEND"]
