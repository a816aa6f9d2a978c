"""Reads the convolutions from a program that `torch.export` saved.

Such a file is a zip archive. The graph is JSON; weights, constants and sample inputs are separate members, some of them
pickles. `torch.export.load` would unpickle them, evaluate expressions for symbolic sizes and load compiled libraries;
each of these steps can run arbitrary code. This module reads the graph's JSON only. It never unpickles, evaluates,
imports or loads anything, and it rejects files that contain more than tensors and plain values.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lensor.inspect.errors import CommandError, in_one_line
from lensor.inspect.extract import spec_of
from lensor.inspect.layers import Layer
from lensor.spec import ConvSpec

_CONVOLUTIONS = {f"conv{dims}d": False for dims in (1, 2, 3)} | {f"conv_transpose{dims}d": True for dims in (1, 2, 3)}
_CONVOLUTIONS["_convolution_mode"] = False
"""ATen's convolution functions, and whether each is transposed; `convolution` and `_convolution` have an argument for
this."""

_ANY_CONVOLUTION = re.compile(r"(?:^|_)conv(?:olution)?(?:\d|_|$)")

_RUN_ONCE = (
    *("wrap", "wrap_with_set_grad_enabled", "wrap_with_autocast", "wrap_activation_checkpoint"),
    *("tag_activation_checkpoint", "hints_wrapper", "invoke_subgraph", "strict_mode"),
)
"""Operators that run their graph exactly once."""

_SCHEMA = 8
"""The supported major version of the graph's JSON schema."""

_MOST = 2**28
"""Maximum size of a graph in bytes; the largest models need a tenth of this."""

_OLD_GRAPH = "serialized_exported_program.json"


def exported(path: Path) -> tuple[list[Layer], tuple[int, ...]]:
    """The distinct convolutions of an exported program, and the shape of one example of its first input.

    Sizes are those at export. For padding modes other than zeros, an exported program pads in a separate step, so the
    convolution itself has no padding. Convolutions inside `torch.no_grad` and autocast blocks are included.

    The file is read but not run: no part of it is unpickled or evaluated.

    Args:
        path: a file that `torch.export.save` wrote.

    Raises:
        CommandError: if the file does not exist, is not an exported program, or lacks a size of a convolution; if it
            contains compiled code, objects of custom classes or pickles of more than tensors and plain values, which
            could run code when the program is loaded; or if a convolution runs inside control flow.
    """
    if not path.is_file():
        raise CommandError(f"{path} does not exist, expected a file written by torch.export.save")
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive)
            _refuse_code(path, archive, members)
            program = json.loads(_text(archive, _graph_member(members)))
        version = program["schema_version"]["major"]
        if version != _SCHEMA:
            raise ValueError(f"its schema has version {version}, expected {_SCHEMA}")
        return _convolutions(program, path.stem)
    except CommandError:
        raise
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # whatever error a damaged or foreign file causes
        raise CommandError(f"{path} is not an exported program: {in_one_line(error)}") from None


# ------------------------------------------------------------------------------------------------------------- archive
def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's members, by path relative to their common folder."""
    infos = {info.filename: info for info in archive.infolist()}
    if _OLD_GRAPH in infos:
        return infos
    return {name.partition("/")[2]: info for name, info in infos.items()}


def _graph_member(members: Mapping[str, zipfile.ZipInfo]) -> zipfile.ZipInfo:
    for name in ("models/model.json", _OLD_GRAPH):
        if name in members:
            return members[name]
    found = [name for name in members if name.startswith("models/")]
    raise ValueError(f"the archive has {found[0] if found else 'no graph'}, expected models/model.json")


def _text(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.file_size > _MOST:
        raise ValueError(f"{member.filename} has {member.file_size} bytes, expected at most {_MOST}")
    return archive.read(member)


def _refuse_code(path: Path, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> None:
    """Raise for a file with parts that could run code when torch loads it.

    Raises:
        CommandError: if there is such a part; the message names the first one.
    """
    pickled = _pickled(archive, members)
    for name, member in members.items():
        last = name.rpartition("/")[2]
        holds = ""
        if name.startswith(("extra/", "extra_files/")):  # torch reads these as text
            continue
        if name.startswith("data/aotinductor/"):
            holds = "compiled code"
        elif name.startswith("data/constants/") and last.startswith(("custom_obj_", "opaque_obj_")):
            holds = "a pickled object of a custom class"
        elif last.endswith(".pt") or name in pickled:
            holds = _unsafe(archive, member)
        if holds:
            raise CommandError(
                f"{path} could run code when loaded: {name} has {holds}, expected tensors and plain values; the file"
                " was not loaded. Export the program with inputs and constants that are tensors and numbers"
            )


def _pickled(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> set[str]:
    """The weights and constants that the archive's tables mark as pickles."""
    found = set()
    for name, member in members.items():
        if re.fullmatch(r"data/(weights|constants)/.*_config\.json", name):
            for payload in json.loads(_text(archive, member))["config"].values():
                if payload.get("use_pickle"):
                    found.add(f"{name.rpartition('/')[0]}/{payload['path_name']}")
    return found


def _unsafe(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
    """The unsafe content of a `torch.save` file, found without unpickling; empty if it is safe."""
    if member.file_size == 0:
        return ""
    if member.compress_type != zipfile.ZIP_STORED:  # torch never compresses; small data may expand to any size
        return "a compressed pickle"
    try:
        with archive.open(member) as file:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception as error:  # a pickle without an archive, TorchScript, or a damaged file
        return f"a pickle that cannot be examined ({in_one_line(error)})"
    return f"a pickle that refers to {', '.join(sorted(names))}" if names else ""


# --------------------------------------------------------------------------------------------------------------- graph
@dataclass(frozen=True)
class _Node:
    """A node of a graph: the operator with its namespace, the arguments by name, and the sizes of the tensors."""

    record: Mapping[str, Any]
    graph: Mapping[str, Any]

    @property
    def operator(self) -> tuple[str, str]:
        """Namespace and name, without the overload: ("aten", "conv2d")."""
        parts = str(self.record["target"]).split(".")
        return (parts[2], parts[3]) if parts[:2] == ["torch", "ops"] and len(parts) > 3 else ("", parts[-1])

    @property
    def name(self) -> str:
        outputs = [one["as_tensor"]["name"] for one in self.record["outputs"] if "as_tensor" in one]
        return str(self.record.get("name") or next(iter(outputs), self.record["target"]))

    @property
    def module(self) -> str:
        """The path of the module that the node comes from; the node's name if the path is unknown."""
        stack = self.record["metadata"].get("nn_module_stack", "").split(";")[-1]
        return next(iter(_split(stack)[1:2]), "") or self.name

    def argument(self, name: str) -> Any:
        """The value of an argument: a number, string or list of numbers; None if the argument is missing or None."""
        found = [one["arg"] for one in self.record["inputs"] if one["name"] == name]
        if not found:
            return None
        ((kind, value),) = found[0].items()
        if kind == "as_none":
            return None
        if kind == "as_sym_int":
            return self._symbolic(value)
        if kind == "as_sym_ints":
            return [self._symbolic(one) for one in value]
        if kind in ("as_int", "as_ints", "as_string", "as_bool", "as_bools"):
            return value
        raise CommandError(f"argument {name} of {self.name} is {kind}, expected a number, string or list of numbers")

    def _symbolic(self, value: Mapping[str, Any]) -> int:
        return _size(self.graph["sym_int_values"][value["as_name"]] if "as_name" in value else value, self.name)

    def sizes(self, name: str) -> tuple[int, ...] | None:
        """The sizes of a tensor argument, or None if the argument is missing."""
        for one in self.record["inputs"]:
            given = one["arg"].get("as_optional_tensor", one["arg"])
            if one["name"] == name and "as_tensor" in given:
                return _sizes(self.graph, given["as_tensor"]["name"], self.name)
        return None

    def graphs(self) -> list[Mapping[str, Any]]:
        """The graphs among the node's arguments."""
        return [one["arg"]["as_graph"]["graph"] for one in self.record["inputs"] if "as_graph" in one["arg"]]


def _split(text: str) -> list[str]:
    """Split text at commas outside parentheses and brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _convolutions(program: Mapping[str, Any], model: str) -> tuple[list[Layer], tuple[int, ...]]:
    graph = program["graph_module"]["graph"]
    found: dict[ConvSpec, Layer] = {}
    for node in _nodes(graph):
        spec = _spec(node)
        if spec is not None:
            known = found.get(spec) or Layer(model, node.module, spec, 0)
            found[spec] = replace(known, count=known.count + 1)
    shape: tuple[int, ...] = ()
    for one in program["graph_module"]["signature"]["input_specs"]:
        given = one.get("user_input", {}).get("arg", {})
        if "as_tensor" in given and not shape:
            name = given["as_tensor"]["name"]
            shape = tuple(_size(size, name) for size in graph["tensor_values"][name]["sizes"][1:])
    return list(found.values()), shape


def _nodes(graph: Mapping[str, Any]) -> Iterator[_Node]:
    """The nodes of a graph and of the graphs nested inside it, in order.

    Raises:
        CommandError: for a convolution in data-dependent control flow.
    """
    for record in graph["nodes"]:
        node = _Node(record, graph)
        yield node
        for inner in node.graphs():
            for one in _nodes(inner):
                if node.operator[1] not in _RUN_ONCE and _spec(one) is not None:
                    raise CommandError(
                        f"{one.name} is a convolution inside of {node.operator[1]}, expected no control flow around"
                        " convolutions: how often it runs depends on the data"
                    )
                yield one


def _spec(node: _Node) -> ConvSpec | None:
    """The convolution that a node computes, or None."""
    space, name = node.operator
    transposed = _CONVOLUTIONS.get(name)
    if space == "aten" and name in ("convolution", "_convolution"):
        transposed = bool(node.argument("transposed"))
    if space != "aten" or transposed is None:
        if space and _ANY_CONVOLUTION.search(name) and "backward" not in name:
            raise CommandError(f"{node.name} is {space}.{name}, expected a convolution with known hyper-parameters")
        return None
    x, weight = node.sizes("input"), node.sizes("weight")
    if x is None or weight is None or not 3 <= len(weight) <= len(x) + 1:
        raise CommandError(
            f"{node.name} has input sizes {x} and weight sizes {weight}, expected those of a convolution"
        )
    names = ("stride", "padding", "dilation", "groups", "output_padding")
    given = {key: value for key in names if (value := node.argument(key)) is not None}
    given["bias"] = node.sizes("bias")
    return spec_of(x[2 - len(weight) :], weight, given, transposed)


def _sizes(graph: Mapping[str, Any], tensor: str, name: str) -> tuple[int, ...]:
    return tuple(_size(size, name) for size in graph["tensor_values"][tensor]["sizes"])


def _size(size: Mapping[str, Any], name: str) -> int:
    """The value of a size; for a symbolic size, its value at export."""
    number = size.get("as_int")
    if number is None:
        number = ((size.get("as_expr") or {}).get("hint") or {}).get("as_int")
    if not isinstance(number, int) or not 0 <= number < 2**63:
        raise CommandError(f"a size of {name} is unknown, expected a number: export the model with fixed image sizes")
    return number
