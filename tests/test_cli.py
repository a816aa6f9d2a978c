"""The command line, and the pages of the documentation that it makes or that can be checked against the library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lensor
from lensor import cli
from lensor.inspect import rules
from lensor.simplification import PHASES
from lensor.simplification.examples import CASES, RULE_EXAMPLES, Example
from tests.support.command import invoke
from tests.support.dense import evaluate_dense

DOCS = Path(__file__).parents[1] / "docs"


# ------------------------------------------------------------------------------------------------------------ commands
def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout == f"lensor {lensor.__version__}\n"


def test_help_names_the_commands() -> None:
    for arguments in (["--help"], []):
        result = invoke(*arguments)
        for name in ("convs", "explain", "rules", "bench", "reproduce", "conformance"):
            assert name in result.output


def test_without_benchmarks_their_commands_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = cli.find_spec
    for module in ("lensor.cli", "lensor.inspect.commands", "lensor.inspect.errors"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None if name == "lensor_bench" else find_spec(name))
    assert "conformance" not in invoke("--help").output
    for command in ("bench", "reproduce", "conformance"):
        result = invoke(command, "--out", "anywhere")
        assert result.exit_code == 1
        assert result.stderr == f"lensor: {command} is a command of lensor-bench: pip install ./benchmarks\n"
    plain = invoke("explain", "2c2d", "--ops", "forward")
    assert plain.exit_code == 0, plain.output
    assert "nothing measured" in plain.output
    timed = invoke("explain", "2c2d", "--times")
    assert timed.exit_code == 1
    assert timed.stderr == "lensor: lensor-bench is not installed: pip install ./benchmarks\n"


@pytest.mark.parametrize("name", ["demo", "gallery"])
def test_former_commands_name_the_examples(name: str) -> None:
    result = invoke(name, "--quick")
    assert result.exit_code == 1
    assert result.stderr == f"lensor: {name} is not a command, but an example: python -m examples.{name}\n"
    assert name not in invoke("--help").output


def test_errors_are_one_line(tmp_path: Path) -> None:
    result = invoke("rules", "--markdown", str(tmp_path / "no" / "such" / "folder.md"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("lensor: cannot write")
    assert result.stderr.count("\n") == 1


def test_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['typer'] = None; from lensor.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 1
    assert result.stderr.startswith('lensor: typer is not installed: install the extra "cli"')
    assert result.stderr.count("\n") == 1


def test_rules_prints_what_it_writes(tmp_path: Path) -> None:
    assert invoke("rules", "--markdown", str(tmp_path / "rules.md")).exit_code == 0
    assert invoke("rules").stdout == (tmp_path / "rules.md").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- pages
def test_simplification_page_is_up_to_date() -> None:
    page = (DOCS / "simplification.md").read_text(encoding="utf-8")
    assert rules.to_markdown() == page, f"docs/simplification.md is stale: run `{rules.COMMAND}`"


def test_every_rule_has_an_example() -> None:
    assert set(RULE_EXAMPLES) == {rule.name for phase in PHASES for rule in phase}


@pytest.mark.parametrize("example", [*RULE_EXAMPLES.values(), *CASES.values()], ids=lambda example: example.code)
def test_examples_simplify_to_the_same_value(example: Example) -> None:
    net = rules.network_of(example)
    rng = np.random.default_rng(0)
    operands = {
        name: rng.standard_normal([net.group_size(leg) or 0 for leg in legs]) for name, legs in net.operand_legs.items()
    }
    expected = evaluate_dense(net, operands)
    np.testing.assert_allclose(net(**operands), expected, rtol=1e-10, atol=1e-10)
    assert rules.plan_of(net).flops <= rules.dense_flops(net)


def test_firings_are_those_of_the_engine() -> None:
    for example in RULE_EXAMPLES.values():
        net = rules.network_of(example)
        fired = [(rule.name, str(before), str(after)) for rule, before, after in rules.firings(net)]
        assert fired == [(firing.rule, firing.before, firing.after) for firing in net.simplify().trace]


def test_operations_page_shows_the_networks() -> None:
    spec = lensor.ConvSpec(4, 6, 9, 3, groups=2)
    shown = {}
    for line in (DOCS / "operations.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().strip("`") for cell in line.split("|")[1:-1]]
        if len(cells) == 5 and hasattr(lensor.ops, cells[0]):
            shown[cells[0]] = cells[3]
            function = cells[4].partition("(")[0]
            assert not function or hasattr(lensor.functional, function)
    assert shown == {name: str(getattr(lensor.ops, name)(spec)) for name in lensor.ops.__all__}
