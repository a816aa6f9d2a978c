"""The demo: the Kronecker factors of every convolution of CNNs on photographs, computed in two ways.

Photographs from scikit-image pass through CNNs with random weights. For each distinct convolution, the demo computes
the KFAC-expand and KFAC-reduce input factors with Lensor, and by unfolding and a matrix product. It compares values,
times and memory, and shows the factors' tensor networks before and after simplification. torch, transformers and
scikit-image are imported on first use.
"""

from examples.demo.run import DemoError, Settings, run

__all__ = ["DemoError", "Settings", "run"]
