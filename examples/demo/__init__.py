"""The demo: what curvature says of a CNN on handwritten digits, and how fast its factors are for CNNs on photographs.

1. A small CNN learns digits from scikit-learn with KFAC. Its Kronecker factors show which answers are uncertain, and
   which training images contribute to mistakes.
2. Photographs from scikit-image pass through CNNs with random weights. For each distinct convolution, the demo computes
   the KFAC-expand and KFAC-reduce input factors with Lensor, and by unfolding and a matrix product. It compares values,
   times and memory, and shows the factors' tensor networks before and after simplification.

Nothing is downloaded. torch, transformers, scikit-image and scikit-learn are imported on first use.
"""

from examples.demo.run import DemoError, Settings, run

__all__ = ["DemoError", "Settings", "run"]
