"""`lensor conformance`: Lensor is never wrong, other answers are told apart, and the definitions are what they say."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lensor_bench import conformance, definitions
from lensor_bench.commands.conformance import _parts
from lensor_bench.conformance import COLUMNS, NONE, QUANTITIES, REFUSES, RIGHT, WRONG, Cell, Matrix, examine
from lensor_bench.definitions import Case, Convolution
from lensor_bench.libraries import LIBRARIES, Library

from lensor.inspect import CommandError
from tests.support import oracles
from tests.support.command import invoke

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
EVERY = list(dict.fromkeys(conv for column in COLUMNS.values() for conv in column))


@pytest.fixture(scope="module")
def lensors() -> Matrix:
    return examine(LIBRARIES["lensor"])


def library(**ways: Callable[[Case], torch.Tensor]) -> Library:
    return Library("other", "torch", "torch", ways, "hand.", lambda quantity, conv: conv.bias)


def cell(matrix: Matrix, quantity: str, column: str) -> Cell:
    return next(one for one in matrix.cells if (one.quantity, one.column) == (quantity, column))


def refuse(case: Case) -> torch.Tensor:
    if case.conv.groups > 1:
        raise NotImplementedError(f"no groups, found {case.conv.groups}\nsecond line")
    return definitions.DEFINITIONS["forward"](case)


# -------------------------------------------------------------------------------------------------------------- Lensor
def test_lensor_is_right_everywhere(lensors: Matrix) -> None:
    assert set(lensors.counts) == {RIGHT, NONE}
    assert not lensors.wrong()
    assert not lensors.refusals()
    assert not lensors.absent
    assert max(one.error for one in lensors.cells) < 1e-12


@pytest.mark.parametrize(
    "quantity", [pytest.param(one, marks=[pytest.mark.slow] * (one != "forward")) for one in QUANTITIES]
)
def test_lensor_is_right_everywhere_in_jax(quantity: str, lensors: Matrix) -> None:
    found = examine(LIBRARIES["lensor-jax"], [quantity])
    assert [one.status for one in found.cells] == [one.status for one in lensors.cells if one.quantity == quantity]
    assert max(one.error for one in found.cells) < 1e-12


def test_lensor_has_every_cell_that_there_is(lensors: Matrix) -> None:
    empty = {(one.quantity, one.column) for one in lensors.cells if one.status == NONE}
    modes = ("circular", "reflect", "replicate")
    transposed = ("transposed", "output padding", "transposed groups")
    without_bias = set(QUANTITIES) - {"forward", "transposed_forward", "kfac_expand", "kfac_reduce"}
    batched = {"per_example_weight_vjp", "ggn_diagonal"} | {name for name in QUANTITIES if name.startswith("kfac")}
    assert empty == {
        *(("forward", column) for column in transposed),
        *(("transposed_forward", column) for column in ("same", *modes)),
        *((name, column) for name in ("unfold", "fold") for column in ("groups", "depthwise", "combined")),
        *(("fold", column) for column in transposed),
        ("unfold", "transposed groups"),
        *((name, "unbatched") for name in batched),
        *((name, "bias") for name in without_bias),
    }


def test_page_is_up_to_date(lensors: Matrix) -> None:
    page = PAGE.read_text(encoding="utf-8")
    names = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert names == list(LIBRARIES)
    written = conformance.markdown([lensors], "docs/conformance.md")
    heads = [text.partition("## lensor\n")[0].splitlines() for text in (page, written)]
    several = ("    lensor", "with ", *(f"| {name} |" for name in LIBRARIES))  # what tells of all libraries
    kept = [[line for line in head if not line.startswith(several)] for head in heads]
    assert kept[0] == kept[1]
    stale = "docs/conformance.md is stale: run the command that it names"
    assert (
        page.partition("## lensor\n")[2].partition("## ")[0].strip() == written.partition("## lensor\n")[2].strip()
    ), stale
    assert f"    lensor conformance --peer {','.join(LIBRARIES)} --markdown docs/conformance.md\n" in page


@pytest.mark.parametrize("name", [name for name in LIBRARIES if not name.startswith("lensor")])
def test_peers_are_examined(name: str) -> None:
    pytest.importorskip(LIBRARIES[name].module)
    found = examine(LIBRARIES[name], list(LIBRARIES[name].ways))
    assert {one.status for one in found.cells if one.column in ("plain", "stride", "padding")} == {RIGHT}
    assert found.counts[WRONG] + found.counts[REFUSES]


# -------------------------------------------------------------------------------------------------------------- answers
def test_a_broken_implementation_is_wrong() -> None:
    def without_dilation(case: Case) -> torch.Tensor:
        conv = replace(case.conv, dilation=1)
        found = definitions.forward(conv, case.X, case.W, case.b)
        return found[0] if conv.unbatched else found

    found = examine(library(forward=without_dilation), ["forward"])
    assert [one.status for one in found.cells if one.column in ("plain", "dilation")] == [RIGHT, WRONG]
    dilation = cell(found, "forward", "dilation")
    assert dilation.error == math.inf
    assert dilation.having(WRONG)[0].message.startswith("shape (3, 3, 5, 5), expected (3, 3, 3, 4)")
    assert any(row[:2] == ("forward", "dilation") and row[2:4] == ("inf", "3 of 3") for row in found.wrong())


@pytest.mark.parametrize(("change", "error"), [(1e-3, 1e-3), (math.nan, math.inf), (-2.0, 2.0)])
def test_errors_are_relative(change: float, error: float) -> None:
    found = examine(library(fold=lambda case: (1 + change) * definitions.DEFINITIONS["fold"](case)), ["fold"])
    plain = cell(found, "fold", "plain")
    assert plain.status == WRONG
    assert plain.error == pytest.approx(error)


def test_what_raises_refuses() -> None:
    found = examine(library(forward=refuse), ["forward", "fold"])
    groups = cell(found, "forward", "groups")
    assert groups.status == REFUSES
    assert groups.answers[0].message == "NotImplementedError: no groups, found 2"
    assert cell(found, "forward", "plain").status == RIGHT
    assert cell(found, "forward", "bias").status == NONE  # lacked
    assert cell(found, "fold", "plain").status == NONE  # no function
    assert found.absent == "fold"
    message, where = found.refusals()[0]
    assert message == "NotImplementedError: no groups, found 2"
    assert where == "forward: groups, depthwise, combined, unbatched (1 of 3)"
    assert len(found.refusals()) == 1


def test_a_function_that_is_missing_is_no_answer() -> None:
    def way(case: Case) -> torch.Tensor:
        raise ModuleNotFoundError("no such version")

    with pytest.raises(CommandError, match="expected another version: ModuleNotFoundError: no such"):
        examine(library(forward=way), ["forward"])


def test_wrong_weighs_more_than_refused() -> None:
    conv = COLUMNS["plain"][0]
    answers = [
        conformance.Answer(conv, status, error) for status, error in ((RIGHT, 0.0), (REFUSES, 0.0), (WRONG, 0.5))
    ]
    for count, status in ((0, NONE), (1, RIGHT), (2, REFUSES), (3, WRONG)):
        assert Cell("forward", "plain", tuple(answers[:count])).status == status


# ------------------------------------------------------------------------------------------------------------- commands
@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lensor as it must not be."""
    found = replace(LIBRARIES["lensor"], ways={"forward": lambda case: -definitions.expected("forward", case)})
    monkeypatch.setitem(LIBRARIES, "lensor", found)


def test_command_prints_and_writes(tmp_path: Path) -> None:
    page, table = tmp_path / "page.md", tmp_path / "cases.csv"
    found = invoke("conformance", "--quantity", "fold", "--markdown", str(page), "--csv", str(table))
    assert found.exit_code == 0, found.output
    assert "14 right, 0 wrong, 0 refuses, 7 n/a" in found.output
    assert "✓" in found.output
    text = page.read_text(encoding="utf-8")
    assert f"    lensor conformance --peer lensor --quantity fold --markdown {page}\n" in text
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["status"] for row in rows} == {RIGHT, NONE}
    assert {row["hyper_parameter"] for row in rows} == set(COLUMNS)


def test_a_narrow_console_gets_the_table_in_parts() -> None:
    parts = _parts(list(COLUMNS), 40)
    assert [name for part in parts for name in part] == list(COLUMNS)
    assert len(parts) > 3
    assert _parts(["unbatched"], 1) == [["unbatched"]]


@pytest.mark.usefixtures("broken")
def test_exit_status_tells_that_lensor_is_wrong() -> None:
    found = invoke("conformance", "--quantity", "forward")
    assert found.exit_code == 1
    assert found.stderr == "lensor: Lensor is wrong in 18 cells\n"
    assert "wrong: forward, plain: relative error up to 2 in 3 of 3 cases, first 3→4 on 7×6, kernel 3×2" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer", "kfac"], "peer is 'kfac', expected one of lensor, lensor-jax, einconv, backpack, opacus"),
        (
            ["--quantity", "hessian"],
            "quantity is 'hessian', expected one of forward, transposed_forward, input_vjp",
        ),
        (["--quantity", "fold", "--markdown", "/no/such/folder.md"], "cannot write /no/such/folder.md"),
        (["--markdown", "/tmp/f", "--csv", "/tmp/f"], "--markdown and --csv are both /tmp/f, expected different files"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    found = invoke("conformance", *arguments)
    assert found.exit_code == 1
    assert found.stderr.startswith(f"lensor: {message}")
    assert found.stderr.count("\n") == 1


def test_a_peer_of_another_version_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: object) -> None:
        raise ImportError("cannot import name 'gone'")

    monkeypatch.setitem(LIBRARIES, "lensor", replace(LIBRARIES["lensor"], ways={"fold": gone}))
    found = invoke("conformance", "--quantity", "fold")
    assert found.exit_code == 1
    assert "expected another version: ImportError: cannot import name 'gone'" in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_missing_peer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIBRARIES, "opacus", replace(LIBRARIES["opacus"], module="no_such_module"))
    found = invoke("conformance", "--peer", "lensor,opacus")
    assert found.exit_code == 1
    assert found.stderr == "lensor: no_such_module is not installed: pip install no_such_module\n"
    with pytest.raises(CommandError, match="no_such_module"):
        conformance.libraries_of(["opacus"])


# ---------------------------------------------------------------------------------------------------------- definitions
def geometry(conv: Convolution) -> oracles.Geometry:
    names = ("in_channels", "out_channels", "input_size", "kernel_size", "stride", "padding", "dilation", "groups")
    more = ("padding_mode", "bias", "transposed", "output_padding")
    return oracles.Geometry.of({name: getattr(conv, name) for name in (*names, *more)})


@pytest.mark.parametrize("conv", EVERY, ids=str)
def test_definitions_agree_with_plain_loops(conv: Convolution) -> None:
    g, case = geometry(conv), Case.draw(conv)
    x, w, v = case.X.numpy(), case.W.numpy(), case.V.numpy()
    b = None if case.b is None else case.b.numpy()
    assert conv.output_size == g.output_size
    found = {name: torch.from_numpy(array) for name, array in plain(g, x, w, v, b, case.U.numpy()).items()}
    for name, array in found.items():
        torch.testing.assert_close(definitions.DEFINITIONS[name](case), array)


def plain(g: oracles.Geometry, x: Any, w: Any, v: Any, b: Any, u: Any) -> dict[str, Any]:
    each = oracles.plain_per_example_weight_vjp(g, x, v)
    return {
        "forward": oracles.plain_conv(g, x, w, b),
        "input_vjp": oracles.plain_input_vjp(g, w, v),
        "weight_vjp": each.sum(0),
        "per_example_weight_vjp": each,
        "unfold": oracles.plain_patches(g, x).reshape(len(x), -1, math.prod(g.output_size)),
        "fold": oracles.plain_fold(g, u.reshape(len(x), g.in_channels, *g.kernel_size, *g.output_size)),
    }


@pytest.mark.parametrize("conv", [COLUMNS["groups"][1], COLUMNS["combined"][0], COLUMNS["output padding"][0]], ids=str)
def test_curvature_definitions_agree_with_sums_over_examples(conv: Convolution) -> None:
    case, g = Case.draw(conv), geometry(conv)
    x, roots = case.X.numpy(), case.S
    squares = [oracles.plain_per_example_weight_vjp(g, x, root.numpy()) ** 2 for root in roots]
    torch.testing.assert_close(
        definitions.DEFINITIONS["ggn_diagonal"](case), torch.from_numpy(sum(one.sum(0) for one in squares))
    )
    patches = torch.from_numpy(oracles.plain_patches(g, x)).reshape(len(x), conv.groups, -1, math.prod(g.output_size))
    names = ("kfac_expand", "kfac_reduce", "kfac_output_expand", "kfac_output_reduce")
    expand, reduce, output_expand, output_reduce = (definitions.DEFINITIONS[name](case) for name in names)
    width = conv.out_channels // conv.groups
    for group in range(conv.groups):
        mine = patches[:, group]
        torch.testing.assert_close(expand[group], sum(one @ one.T for one in mine) / len(x))
        means = [one.mean(1) for one in mine]
        torch.testing.assert_close(reduce[group], sum(torch.outer(one, one) for one in means) / len(x))
        outs = roots[:, :, group * width : (group + 1) * width].flatten(3).flatten(0, 1)
        torch.testing.assert_close(output_expand[group], sum(one @ one.T for one in outs) / outs.shape[2])
        sums = [one.sum(1) for one in outs]
        torch.testing.assert_close(output_reduce[group], sum(torch.outer(one, one) for one in sums))


def test_operands_are_those_of_the_net() -> None:
    """`V` is the loss's gradient at the convolution's output, `S` a square root of its Hessian there."""
    case = Case.draw(_SMALL)
    y = definitions.forward(case.conv, case.X, case.W).requires_grad_()

    def predict(output: torch.Tensor) -> torch.Tensor:
        return output.sigmoid().flatten(1) @ case.head.T

    loss = (predict(y) - case.target).square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, y)[0], case.V)
    jacobian = torch.autograd.functional.jacobian(predict, y.detach())  # [n, columns, n, c_out, *O]
    for n in range(len(case.X)):
        torch.testing.assert_close(case.S[:, n], math.sqrt(2) * jacobian[n, :, n])


_SMALL = Convolution(in_channels=2, out_channels=2, input_size=(4,), kernel_size=(2,))


def test_a_convolution_says_what_it_is() -> None:
    conv = replace(_SMALL, padding=((1, 2),), stride=2, groups=2, padding_mode="reflect", bias=True, unbatched=True)
    assert str(conv) == "2→2 on 4, kernel 2, stride 2, padding 1+2, groups 2, reflect, bias, unbatched"
    assert len(set(map(str, EVERY))) == len(EVERY)
