"""The demo: photographs through CNNs, and the Kronecker factors of every convolution in two ways.

Photographs that scikit-image carries go through CNNs with random weights. For each distinct convolution the
KFAC-expand and KFAC-reduce factors of its input are computed by Lensor and by unfolding and a matrix product; the two
are compared in value, time and memory, and the factor's tensor network is shown before and after simplification.
Importing this package imports torch, transformers and scikit-image when they are first needed.
"""

from examples.demo.run import DemoError, Settings, run

__all__ = ["DemoError", "Settings", "run"]
