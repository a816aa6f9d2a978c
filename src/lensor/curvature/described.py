"""Descriptions of arguments that several functions share."""

from __future__ import annotations

SHARED = {
    "model": "the model, in evaluation mode or without layers that mix examples.",
    "loss": "as for `kfac`.",
    "data": "a pair (inputs, targets), or an iterable of pairs.",
    "fisher": '"type-2", "mc" or "empirical", as for `kfac`.',
    "layers": "names of modules; all supported layers unless given.",
    "strict": "whether parametrised layers of unsupported kinds raise an error instead of a warning.",
    "mc_samples": 'number of draws per example, for "mc".',
    "generator": "random generator for the draws.",
    "batch_axis": "axis of the examples in the layers' inputs, as for `kfac`; a trial pass determines it unless given.",
    "compile": "whether, or how, the pass is compiled into a graph for batches of the same shapes, as for `kfac`.",
}
"""Descriptions by the argument's name."""
