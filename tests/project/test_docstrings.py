"""Every public name tells what it does, shows it, and says what it raises."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from types import ModuleType
from typing import Any

import pytest

import lensor
from lensor import ops
from lensor.network import Verbs
from lensor.planner import wisdom

pytest.importorskip("torch")  # lensor.nn and lensor.distributed need it

PACKAGES = (lensor.curvature, lensor.functional, lensor.nn, lensor.ops, lensor.optim, lensor.sampling)
MODULES = {"lensor": lensor} | {package.__name__: package for package in PACKAGES}

WITHOUT_EXAMPLE = {
    "a module: what it holds has examples": {
        *("lensor.curvature", "lensor.distributed", "lensor.functional", "lensor.nn", "lensor.ops"),
        *("lensor.optim", "lensor.sampling"),
    },
    "a property that its one line describes": {
        *("lensor.ConvSpec.input_shape", "lensor.ConvSpec.ndim", "lensor.ConvSpec.output_shape"),
        *("lensor.Delta.legs", "lensor.Ones.legs"),
        *("lensor.Drawing.crossings", "lensor.Drawing.svg", "lensor.Drawing.tikz"),
        *("lensor.IndexPattern.is_identity", "lensor.IndexPattern.is_crop"),
        *("lensor.Network.canonical_order", "lensor.Plan.operands", "lensor.Plan.shape"),
    },
    "a tuple of names": {"lensor.sampling.SCHEMES"},
    "as the property of Network": {
        f"lensor.Sum.{name}"
        for name in (
            *("canonical", "exact", "operand_legs", "operand_names", "operands", "output", "output_indices"),
            *("output_shape", "sizes", "trace"),
        )
    },
}
"""What needs no example, by the reason."""


def members(owner: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class defines itself."""
    for name, value in vars(owner).items():
        if isinstance(value, (classmethod, staticmethod)):
            value = value.__func__
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, (property, cached_property))):
            yield name, value


def public() -> Iterator[tuple[str, Any]]:
    """Everything public under its full name."""
    for prefix, module in MODULES.items():
        for name in module.__all__:
            yield f"{prefix}.{name}", getattr(module, name)
    for name in lensor.__all__:
        value = getattr(lensor, name)
        if inspect.isclass(value):
            yield from ((f"lensor.{name}.{member}", found) for member, found in members(value))
    yield from ((f"lensor.Network.{name}", found) for name, found in members(Verbs))
    yield "lensor.Network.__call__", vars(Verbs)["__call__"]
    yield "lensor.distributed.evaluate", lensor.distributed.evaluate
    for name in ("entries", "forget", "load", "save"):
        yield f"lensor.wisdom.{name}", getattr(wisdom, name)


def members_of_packages() -> Iterator[tuple[str, Any]]:
    """The public methods and properties of the packages' classes, which the classes' examples show."""
    for package in PACKAGES:
        for name in package.__all__:
            value = getattr(package, name)
            if inspect.isclass(value) and value.__module__.startswith("lensor"):
                yield from ((f"{package.__name__}.{name}.{member}", found) for member, found in members(value))


PUBLIC = dict(public())
DESCRIBED = PUBLIC | dict(members_of_packages())
EXEMPT = {name for names in WITHOUT_EXAMPLE.values() for name in names}


def doc_of(value: Any) -> str:
    """The docstring of a name itself, not one that it inherits."""
    return inspect.cleandoc(value.__doc__ or "")


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_public_name_has_a_docstring(name: str) -> None:
    first = doc_of(DESCRIBED[name]).partition("\n")[0]
    assert first.endswith((".", ":")), first


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - EXEMPT))
def test_a_public_name_has_an_example(name: str) -> None:
    assert re.search(r"^Example:\n+ +>>> ", doc_of(PUBLIC[name]), re.MULTILINE)


@pytest.mark.parametrize("name", sorted(EXEMPT))
def test_an_exemption_is_needed(name: str) -> None:
    value = PUBLIC[name]
    assert isinstance(value, (property, cached_property, ModuleType, tuple))
    assert ">>>" not in doc_of(value)


@pytest.mark.parametrize(
    "name", [name for name in PUBLIC if name.startswith(("lensor.ops.", "lensor.functional."))] + ["lensor.simplify"]
)
def test_a_function_says_what_it_raises(name: str) -> None:
    assert re.search(r"^Raises:\n +\w+(, \w+)*: ", doc_of(PUBLIC[name]), re.MULTILINE)


@pytest.mark.parametrize("name", ops.__all__)
@pytest.mark.parametrize("wrong", [None, "conv", (4, 8, 9, 3)], ids=repr)
def test_an_operation_names_a_wrong_specification(name: str, wrong: Any) -> None:
    message = f"spec is {wrong!r} of type {type(wrong).__name__}, expected a ConvSpec"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        getattr(ops, name)(wrong)


@pytest.mark.parametrize("wrong", [None, "n i -> n", lensor.ConvSpec(1, 1, 5, 3)], ids=repr)
def test_simplify_names_what_is_no_network(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^net is .*, expected a Network or a Sum$"):
        lensor.simplify(wrong)


def test_compose_names_what_is_no_pattern() -> None:
    wrong: Any = (5, 3)
    with pytest.raises(TypeError, match=r"^inner is \(5, 3\) of type tuple, expected an IndexPattern$"):
        lensor.IndexPattern(5, 3).compose(wrong)


@pytest.mark.parametrize("block", ["filters", None, ["filter"]], ids=repr)
def test_mini_block_names_a_wrong_block(block: Any) -> None:
    with pytest.raises(ValueError, match=r"^block is .*, expected one of "):
        ops.ggn_mini_blocks(lensor.ConvSpec(4, 8, 9, 3), block)
