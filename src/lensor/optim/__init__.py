"""Optimizers with Kronecker-factored curvature. Importing this package imports torch."""

from lensor.optim.kfac import KFAC

__all__ = ["KFAC"]
