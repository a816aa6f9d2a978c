"""The demo: photographs through CNNs, and the Kronecker factors of every convolution in two ways.

Photographs from scikit-image pass through CNNs with random weights. For each distinct convolution, Lensor computes the
KFAC-expand and KFAC-reduce factors of its input, and so does an unfold with a matrix product. The demo compares values,
times and memory, and shows the factor's tensor network before and after simplification. torch, transformers and
scikit-image are imported on first use.
"""

from examples.demo.run import DemoError, Settings, run

__all__ = ["DemoError", "Settings", "run"]
