"""The steps of plans, with one file per kind; `Step` defines their interface.

To add a step, define it in one of these files and add a function that runs it to each backend.
"""

from lensor.plan.steps.base import (
    PARALLEL,
    SCATTERED,
    SHORT_RUN,
    Laid,
    Rate,
    Shape,
    Step,
    Strides,
    contiguous,
    with_axis,
)
from lensor.plan.steps.convolution import Convolution
from lensor.plan.steps.moves import Concat, Flip, Gather, Pad, Pick, Read, Stuff, Through
from lensor.plan.steps.patterns import IDENTITY, Axis, PatternProduct, Term
from lensor.plan.steps.products import Gram, MatMul, Multiply
from lensor.plan.steps.sources import Constant, Fill, Identity, Input, Positions
from lensor.plan.steps.sums import Add, AddAt, Multiple, OverlapAdd, Put, ScatterAdd, SumAxes, SumSquares
from lensor.plan.steps.views import Diagonal, Expand, Reshape, Slice, Transpose, Window

__all__ = [
    "IDENTITY",
    "PARALLEL",
    "SCATTERED",
    "SHORT_RUN",
    "Add",
    "AddAt",
    "Axis",
    "Concat",
    "Constant",
    "Convolution",
    "Diagonal",
    "Expand",
    "Fill",
    "Flip",
    "Gather",
    "Gram",
    "Identity",
    "Input",
    "Laid",
    "MatMul",
    "Multiple",
    "Multiply",
    "OverlapAdd",
    "Pad",
    "PatternProduct",
    "Pick",
    "Positions",
    "Put",
    "Rate",
    "Read",
    "Reshape",
    "ScatterAdd",
    "Shape",
    "Slice",
    "Step",
    "Strides",
    "Stuff",
    "SumAxes",
    "SumSquares",
    "Term",
    "Through",
    "Transpose",
    "Window",
    "contiguous",
    "with_axis",
]
