"""Networks, with their nodes, sums, text forms and canonical forms."""

from lensor.network.network import Firing, Network
from lensor.network.nodes import (
    Delta,
    Group,
    Node,
    Ones,
    Operand,
    Pattern,
    Select,
    indices_of,
    new_name,
    relabel_node,
)
from lensor.network.scale import Scale
from lensor.network.subscripts import contraction
from lensor.network.sums import AnyNetwork, Sum, sum_of
from lensor.network.text import parse, to_text
from lensor.network.verbs import Verbs

__all__ = [
    "AnyNetwork",
    "Delta",
    "Firing",
    "Group",
    "Network",
    "Node",
    "Ones",
    "Operand",
    "Pattern",
    "Scale",
    "Select",
    "Sum",
    "Verbs",
    "contraction",
    "indices_of",
    "new_name",
    "parse",
    "relabel_node",
    "sum_of",
    "to_text",
]
