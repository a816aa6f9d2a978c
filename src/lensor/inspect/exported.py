"""The convolutions of a program that `torch.export` saved.

Such a file is a zip archive: the graph is JSON; weights, constants and sample inputs stand beside it, some of them as
pickles. `torch.export.load` would unpickle those, evaluate the expressions of symbolic sizes and load compiled
libraries, each of which can run any code. Only the graph's JSON is read here. Nothing of the file is unpickled,
evaluated, imported or loaded, and a file that holds more than tensors and plain values is refused.
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
"""ATen's functions, and whether they are transposed; `convolution` and `_convolution` have an argument for it."""

_ANY_CONVOLUTION = re.compile(r"(?:^|_)conv(?:olution)?(?:\d|_|$)")

_RUN_ONCE = (
    *("wrap", "wrap_with_set_grad_enabled", "wrap_with_autocast", "wrap_activation_checkpoint"),
    *("tag_activation_checkpoint", "hints_wrapper", "invoke_subgraph", "strict_mode"),
)
"""Operators that run the graph they are given exactly once."""

_SCHEMA = 8
"""The major version of the graph's JSON."""

_MOST = 2**28
"""Bytes of a graph; those of the largest models take a tenth of it."""

_OLD_GRAPH = "serialized_exported_program.json"


def exported(path: Path) -> tuple[list[Layer], tuple[int, ...]]:
    """The distinct convolutions of an exported program, and the shape of one example of its first input.

    Sizes are those that the program was exported with. Padding by another mode than zeros is a step of its own in such
    programs; the convolution after it has none. Convolutions inside of `torch.no_grad` and autocast blocks count.

    The file is read and not run: no part of it is unpickled or evaluated.

    Args:
        path: a file that `torch.export.save` wrote.

    Raises:
        CommandError: if there is no such file, or it holds something else, or a size of a convolution is not known; if
            it holds pickles of more than tensors and plain values, objects of custom classes or compiled code, which
            could run code when the program is loaded; or if the program runs a convolution inside of control flow.
    """
    if not path.is_file():
        raise CommandError(f"there is no file {path}")
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
    except Exception as error:  # whatever a damaged or foreign file leads to
        raise CommandError(f"{path} is not an exported program: {in_one_line(error)}") from None


# ------------------------------------------------------------------------------------------------------------- archive
def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's files by their paths, without the folder that all of them are in."""
    infos = {info.filename: info for info in archive.infolist()}
    if _OLD_GRAPH in infos:
        return infos
    return {name.partition("/")[2]: info for name, info in infos.items()}


def _graph_member(members: Mapping[str, zipfile.ZipInfo]) -> zipfile.ZipInfo:
    for name in ("models/model.json", _OLD_GRAPH):
        if name in members:
            return members[name]
    found = [name for name in members if name.startswith("models/")]
    raise ValueError(f"it holds no models/model.json{f', found {found[0]}' if found else ''}")


def _text(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.file_size > _MOST:
        raise ValueError(f"{member.filename} has {member.file_size} bytes, expected at most {_MOST}")
    return archive.read(member)


def _refuse_code(path: Path, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> None:
    """Raise for a file whose parts could run code when torch loads it.

    Raises:
        CommandError: with the first such part.
    """
    pickled = _pickled(archive, members)
    for name, member in members.items():
        last = name.rpartition("/")[2]
        holds = ""
        if name.startswith(("extra/", "extra_files/")):  # read as text
            continue
        if name.startswith("data/aotinductor/"):
            holds = "compiled code"
        elif name.startswith("data/constants/") and last.startswith(("custom_obj_", "opaque_obj_")):
            holds = "a pickled object of a custom class"
        elif last.endswith(".pt") or name in pickled:
            holds = _unsafe(archive, member)
        if holds:
            raise CommandError(
                f"{path} could run code when it is loaded: {name} holds {holds}; the file was not loaded. Export the"
                " program with inputs and constants that are tensors and numbers"
            )


def _pickled(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> set[str]:
    """Weights and constants that are pickles by the archive's own tables."""
    found = set()
    for name, member in members.items():
        if re.fullmatch(r"data/(weights|constants)/.*_config\.json", name):
            for payload in json.loads(_text(archive, member))["config"].values():
                if payload.get("use_pickle"):
                    found.add(f"{name.rpartition('/')[0]}/{payload['path_name']}")
    return found


def _unsafe(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
    """What a file of `torch.save` holds beside tensors and plain values; nothing is unpickled."""
    if member.file_size == 0:
        return ""
    if member.compress_type != zipfile.ZIP_STORED:  # torch never compresses; small data may expand to any size
        return "a compressed pickle"
    try:
        with archive.open(member) as file:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception as error:  # a pickle without an archive around it, TorchScript, or damaged
        return f"a pickle that cannot be examined ({in_one_line(error)})"
    return f"a pickle that refers to {', '.join(sorted(names))}" if names else ""


# --------------------------------------------------------------------------------------------------------------- graph
@dataclass(frozen=True)
class _Node:
    """A node of a graph: the operator with its name space, the arguments by name, and what its tensors' sizes are."""

    record: Mapping[str, Any]
    graph: Mapping[str, Any]

    @property
    def operator(self) -> tuple[str, str]:
        """Name space and name, without the overload: ("aten", "conv2d")."""
        parts = str(self.record["target"]).split(".")
        return (parts[2], parts[3]) if parts[:2] == ["torch", "ops"] and len(parts) > 3 else ("", parts[-1])

    @property
    def name(self) -> str:
        outputs = [one["as_tensor"]["name"] for one in self.record["outputs"] if "as_tensor" in one]
        return str(self.record.get("name") or next(iter(outputs), self.record["target"]))

    @property
    def module(self) -> str:
        """The path of the module that it comes from; its own name if that is not known."""
        stack = self.record["metadata"].get("nn_module_stack", "").split(";")[-1]
        return next(iter(_split(stack)[1:2]), "") or self.name

    def argument(self, name: str) -> Any:
        """A number, text, a list of numbers, or None if it is missing or None."""
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
        raise CommandError(f"cannot read the argument {name} of {self.name}, which is given {kind}")

    def _symbolic(self, value: Mapping[str, Any]) -> int:
        return _size(self.graph["sym_int_values"][value["as_name"]] if "as_name" in value else value, self.name)

    def sizes(self, name: str) -> tuple[int, ...] | None:
        """The sizes of a tensor that is an argument, or None where there is none."""
        for one in self.record["inputs"]:
            given = one["arg"].get("as_optional_tensor", one["arg"])
            if one["name"] == name and "as_tensor" in given:
                return _sizes(self.graph, given["as_tensor"]["name"], self.name)
        return None

    def graphs(self) -> list[Mapping[str, Any]]:
        """The graphs that it is given."""
        return [one["arg"]["as_graph"]["graph"] for one in self.record["inputs"] if "as_graph" in one["arg"]]


def _split(text: str) -> list[str]:
    """The parts between commas that are not inside of parentheses or brackets."""
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
    """The nodes of a graph and of those that run inside of it, in order.

    Raises:
        CommandError: for convolutions that run as often as the data say.
    """
    for record in graph["nodes"]:
        node = _Node(record, graph)
        yield node
        for inner in node.graphs():
            for one in _nodes(inner):
                if node.operator[1] not in _RUN_ONCE and _spec(one) is not None:
                    raise CommandError(
                        f"{one.name} is a convolution inside of {node.operator[1]}: how often it runs depends on the"
                        " data, expected a program without control flow around its convolutions"
                    )
                yield one


def _spec(node: _Node) -> ConvSpec | None:
    """The convolution that a node of a graph is, if it is one."""
    space, name = node.operator
    transposed = _CONVOLUTIONS.get(name)
    if space == "aten" and name in ("convolution", "_convolution"):
        transposed = bool(node.argument("transposed"))
    if space != "aten" or transposed is None:
        if space and _ANY_CONVOLUTION.search(name) and "backward" not in name:
            raise CommandError(f"{node.name} is {space}.{name}, a convolution whose hyper-parameters are not read")
        return None
    x, weight = node.sizes("input"), node.sizes("weight")
    if x is None or weight is None or not 3 <= len(weight) <= len(x) + 1:
        raise CommandError(f"cannot read the arguments of {node.name}: its input has sizes {x}, its weight {weight}")
    names = ("stride", "padding", "dilation", "groups", "output_padding")
    given = {key: value for key in names if (value := node.argument(key)) is not None}
    given["bias"] = node.sizes("bias")
    return spec_of(x[2 - len(weight) :], weight, given, transposed)


def _sizes(graph: Mapping[str, Any], tensor: str, name: str) -> tuple[int, ...]:
    return tuple(_size(size, name) for size in graph["tensor_values"][tensor]["sizes"])


def _size(size: Mapping[str, Any], name: str) -> int:
    """A size: a number, or the one that a symbolic size had when the program was exported."""
    number = size.get("as_int")
    if number is None:
        number = ((size.get("as_expr") or {}).get("hint") or {}).get("as_int")
    if not isinstance(number, int) or not 0 <= number < 2**63:
        raise CommandError(f"a size of {name} is not known: export the model with fixed image sizes")
    return number
