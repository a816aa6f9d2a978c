"""Transforms of networks, with one file for each family: derivatives, composition and batching, sub-tensors, names."""

from lensor.transforms.access import block_diagonal, diagonal, keep, narrow, sample, select, slice
from lensor.transforms.composition import batch, components, merge, substitute
from lensor.transforms.derivatives import jacobian, jvp, vjp
from lensor.transforms.indices import contract_deltas, equate, refine
from lensor.transforms.names import bind, group, regroup, rename, rename_operands, scaled, split, ungroup

__all__ = [
    "batch",
    "bind",
    "block_diagonal",
    "components",
    "contract_deltas",
    "diagonal",
    "equate",
    "group",
    "jacobian",
    "jvp",
    "keep",
    "merge",
    "narrow",
    "refine",
    "regroup",
    "rename",
    "rename_operands",
    "sample",
    "scaled",
    "select",
    "slice",
    "split",
    "substitute",
    "ungroup",
    "vjp",
]
