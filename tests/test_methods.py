"""Networks, sums and plans have the methods that later stages define, as type checkers see them."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import lensor
from lensor import methods
from lensor.network import Verbs
from lensor.plan import Plan

SOURCE = Path(inspect.getfile(Verbs)).read_text(encoding="utf-8")
STUBS = {
    node.name: node
    for block in ast.walk(ast.parse(SOURCE))
    if isinstance(block, ast.If)
    for node in block.body
    if isinstance(node, ast.FunctionDef)
}
WITHOUT_STUB = {"__str__", "__repr__", "_repr_svg_"}


def parameters(function: ast.FunctionDef) -> list[tuple[str, str, str | None]]:
    """Name, kind and default of every argument but the first."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    found = [
        (one.arg, "positional only" if at < len(arguments.posonlyargs) else "positional", default)
        for at, (one, default) in enumerate(zip(positional, defaults, strict=True))
    ]
    found += [("*" + arguments.vararg.arg, "several", None)] if arguments.vararg else []
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    found += [(one.arg, "keyword", default) for one, default in pairs]
    found += [("**" + arguments.kwarg.arg, "named", None)] if arguments.kwarg else []
    texts = [(name, kind, None if default is None else ast.unparse(default)) for name, kind, default in found]
    return texts[1:]


@pytest.mark.parametrize("name", sorted(set(methods.OF_NETWORKS) - WITHOUT_STUB))
def test_signatures_are_those_of_the_functions(name: str) -> None:
    function = inspect.unwrap(methods.OF_NETWORKS[name])
    source = Path(inspect.getfile(function)).read_text(encoding="utf-8")
    (written,) = [
        node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == function.__name__
    ]
    assert parameters(STUBS[name]) == parameters(written)


def test_every_stub_has_a_function() -> None:
    assert set(STUBS) == set(methods.OF_NETWORKS) - WITHOUT_STUB


@pytest.mark.parametrize("name", sorted(methods.OF_NETWORKS))
def test_methods_are_the_functions_and_have_their_docstrings(name: str) -> None:
    for kind in (lensor.Network, lensor.Sum):
        assert getattr(kind, name) is methods.OF_NETWORKS[name]
        assert inspect.getdoc(getattr(kind, name))


def test_checked_methods_show_their_own_signatures() -> None:
    assert str(inspect.signature(lensor.Network.__call__)) == "(net: 'AnyNetwork', /, **operands: 'Any') -> 'Any'"
    assert str(inspect.signature(Plan.__call__)) == "(self, /, **operands: 'Any') -> 'Any'"
    assert list(inspect.signature(lensor.Network.plan).parameters) == ["net", "effort", "max_bytes", "operands"]


def test_properties_and_methods_of_plans() -> None:
    for name, function in methods.PROPERTIES.items():
        assert inspect.getattr_static(lensor.Network, name).fget is function
    for name, function in methods.OF_PLANS.items():
        assert getattr(Plan, name) is function
