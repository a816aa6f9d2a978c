"""`lensor explain`: what it says of a model is the networks', the plans' and the measurements', also in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lensor
from examples.demo.models import build
from lensor.inspect import CommandError, Layer, errors
from lensor.inspect.explain import Timing, explained, totals
from lensor.inspect.exported import exported
from lensor.inspect.operations import OPERATIONS, PAPER_OPERATIONS
from lensor.inspect.page import HEADINGS, cells, page
from tests.support.command import invoke

LAYERS = [
    Layer("net", "first", lensor.ConvSpec(3, 8, (12, 12), 3, padding=1), 2),
    Layer("net", "last", lensor.ConvSpec(8, 8, (12, 12), 1), 1),
]
OPS = ("forward", "kfac_reduce")
FAST = ("--batch", "1", "--threads", "1", "--seconds", "0", "--repeats", "1")


TIMINGS = {(name, layer.spec): Timing(2.0, 0.5) for layer in LAYERS for name in OPS}


def network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding="same"),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, padding=1, groups=2),
        torch.nn.Conv2d(8, 8, 3, padding=1, groups=2),
        torch.nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1),
        torch.nn.Flatten(2),
        torch.nn.Conv1d(4, 2, 3, stride=2, bias=False),
    ).eval()


EXPORTED = [
    ("0", lensor.ConvSpec(3, 8, (9, 8), 3, padding=1, bias=True), 1),
    ("2", lensor.ConvSpec(8, 8, (9, 8), 3, padding=1, groups=2, bias=True), 2),
    ("4", lensor.ConvSpec(8, 4, (9, 8), 3, stride=2, output_padding=1, bias=True, transposed=True), 1),
    ("6", lensor.ConvSpec(4, 2, (360,), 3, stride=2), 1),
]


# ------------------------------------------------------------------------------------------------------- what is said
def test_networks_and_plans_are_those_of_the_operations() -> None:
    found = list(explained(LAYERS, OPS, batch=2))
    assert [(one.layer.name, one.operation) for one in found] == [
        (name, operation) for name in ("first", "last") for operation in OPS
    ]
    for one in found:
        operation = OPERATIONS[one.operation]
        shapes = operation.shapes(one.layer.spec, 2, 4)
        assert one.written == str(operation.network(one.layer.spec))
        assert one.plan.shape == operation.network(one.layer.spec).plan(**shapes).shape
        assert one.seconds is None
        assert one.trouble == ""
    dense = next(one for one in found if one.layer.name == "last" and one.operation == "forward")
    assert (dense.written.count("Π"), dense.simplified.count("Π")) == (2, 0)


def test_peak_is_in_bytes_of_the_dtype() -> None:
    (single,) = explained(LAYERS[1:], ["kfac_reduce"])
    (double,) = explained(LAYERS[1:], ["kfac_reduce"], dtype="float64")
    assert single.peak_bytes >= 8 * 8 * 4
    assert double.peak_bytes == 2 * single.peak_bytes


def test_totals_count_layers_as_often_as_they_run() -> None:
    found = list(explained(LAYERS, OPS, timings=TIMINGS))
    for total in totals(found):
        assert total.seconds == (3 * 2.0, 3 * 0.5)
        assert total.ratio == 0.25
        assert total.missing == 0
        assert total.flops == sum(one.layer.count * one.plan.flops for one in found if one.operation == total.operation)


def test_what_has_no_time_says_why_and_is_not_in_the_total() -> None:
    failed = Timing(2.0, None, "lensor failed: MemoryError: too large")
    found = list(explained(LAYERS, OPS, timings=TIMINGS | {("forward", LAYERS[0].spec): failed}))
    assert found[0].trouble == "lensor failed: MemoryError: too large"
    assert [cell.value for cell in cells(found[0])[-3:]] == ["", "", ""]
    forward = totals(found)[0]
    assert (forward.seconds, forward.missing) == ((2.0, 0.5), 2)


# ---------------------------------------------------------------------------------------------------------- exported
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_convolutions_of_an_exported_program(decomposed: bool, dynamic: bool, tmp_path: Path) -> None:
    sizes = ({0: torch.export.Dim("n")},) if dynamic else None
    program = torch.export.export(network(), (torch.zeros(2, 3, 9, 8),), dynamic_shapes=sizes)
    torch.export.save(program.run_decompositions() if decomposed else program, tmp_path / "net.pt2")
    layers, shape = exported(tmp_path / "net.pt2")
    assert shape == (3, 9, 8)
    assert [(layer.name, layer.spec, layer.count) for layer in layers] == EXPORTED
    assert {layer.model for layer in layers} == {"net"}


def test_an_exported_program_has_the_convolutions_of_the_module(tmp_path: Path) -> None:
    model = build("resnet18")
    program = torch.export.export(model, (torch.zeros(1, 3, 64, 64),))
    torch.export.save(program, tmp_path / "resnet.pt2")
    layers, _ = exported(tmp_path / "resnet.pt2")
    known = invoke("convs", str(tmp_path / "resnet.pt2"), "--csv", str(tmp_path / "a.csv"))
    direct = ("examples.demo.models:resnet18", "--input-shape", "3x64x64", "--csv", str(tmp_path / "b.csv"))
    assert known.exit_code == invoke("convs", *direct).exit_code == 0
    a, b = ((tmp_path / name).read_text().splitlines()[1:] for name in ("a.csv", "b.csv"))
    assert [line.split(",")[1:] for line in a] == [line.split(",")[1:] for line in b]
    assert sum(layer.count for layer in layers) == 20


def test_foreign_and_missing_files_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "no.pt2").write_text("not a program")
    with pytest.raises(CommandError, match="is not an exported program"):
        exported(tmp_path / "no.pt2")
    assert not caplog.records
    with pytest.raises(CommandError, match="does not exist, expected a file"):
        exported(tmp_path / "nothing.pt2")


# ----------------------------------------------------------------------------------------------------------- command
def test_in_the_terminal() -> None:
    found = invoke("explain", "2c2d", *FAST)
    assert found.exit_code == 0, found.output
    assert all(operation in found.output for operation in PAPER_OPERATIONS)
    assert "the whole model" in found.output
    assert "batch 1" in found.output


def test_operations_have_their_names_in_functional_too() -> None:
    found = invoke("explain", "2c2d", "--no-times", "--ops", "conv,conv_weight_vjp_per_example")
    assert found.exit_code == 0, found.output
    assert "forward" in found.output
    assert "per_example_weight_vjp" in found.output
    assert "kfac" not in found.output


def test_a_page_needs_networkx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_spec = errors.find_spec
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "networkx" else find_spec(name))
    found = invoke("explain", "2c2d", "--html", str(tmp_path / "page.html"))
    assert found.exit_code == 1
    assert found.stderr == "lensor: networkx is not installed: pip install networkx\n"


def test_of_an_exported_program_without_times(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(network(), (torch.zeros(2, 3, 9, 8),)), tmp_path / "net.pt2")
    html = tmp_path / "net.html"
    found = invoke("explain", str(tmp_path / "net.pt2"), "--no-times", "--html", str(html), "--ops", "forward")
    assert found.exit_code == 0, found.output
    assert "4 distinct convolutions, 5 in all" in found.output
    assert "nothing measured" in found.output
    assert html.read_text(encoding="utf-8").count('<tr class="row">') == 4


def test_transposed_and_one_dimensional_layers_are_measured() -> None:
    model = "tests.inspect.test_explain:network"
    found = invoke("explain", model, "--input-shape", "3x9x8", *FAST, "--ops", "kfac_expand")
    assert found.exit_code == 0, found.output
    assert "transposed" in found.output
    assert "refused" not in found.output
    assert "–" not in found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vgg",), "net is 'vgg', expected one of 3c3d,"),
        (("json:dumps",), "--input-shape is missing"),
        (("json:dumps", "--input-shape", "3x8x8"), "the factory dumps failed: TypeError"),
        (("nowhere.to:find", "--input-shape", "3x8x8"), "cannot import nowhere.to"),
        (("torch.nn:ReLU", "--input-shape", "3x8x8"), "torch.nn:ReLU has no convolution"),
        (("2c2d", "--kinds", "down-sampling"), "2c2d has no convolution of these kinds"),
        (("2c2d", "--ops", "hessian"), "operation is 'hessian', expected one of forward,"),
        (("2c2d", "--device", "tpu"), "device is 'tpu', expected one of cpu"),
        (("2c2d", "--html", "no/such/folder/page.html"), "cannot write no/such/folder/page.html"),
        (("2c2d", "--html", "."), "cannot write .: it is a folder"),
        (("x.pt2", "--input-shape", "3x8x8"), "--input-shape is 3x8x8, expected none"),
        (("x.pt2",), "x.pt2 does not exist, expected a file"),
    ],
)
def test_what_cannot_be_explained_is_told_in_a_line(arguments: tuple[str, ...], message: str) -> None:
    found = invoke("explain", *arguments, *FAST)
    assert found.exit_code == 1
    assert message in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert "Traceback" not in found.output


# -------------------------------------------------------------------------------------------------------------- page
def test_page_holds_everything_and_refers_to_nothing() -> None:
    found = list(explained(LAYERS, OPS, timings=TIMINGS))
    text = page(found, "net <1>", "input", ["line & more"])
    assert "net &lt;1&gt;" in text
    assert "line &amp; more" in text
    assert not re.search(r"(src|href)\s*=\s*\"(?!data:)|url\(|@import|https?://", text)
    assert text.count('<tr class="row">') == len(found)
    assert text.count("<svg") == 2 * len(found)  # before and after
    for one in found:
        assert one.simplified.replace(">", "&gt;") in text
    assert "0.25×" in text


@pytest.mark.slow
def test_page_of_a_resnet_in_a_browser(browser: Any, tmp_path: Path) -> None:
    html = tmp_path / "resnet.html"
    shape = ("--input-shape", "3x32x32", "--ops", "kfac_reduce,forward")
    done = invoke("explain", "examples.demo.models:resnet18", *shape, *FAST, "--html", str(html))
    assert done.exit_code == 0, done.output
    browser.get(html.as_uri())

    at = [name for name, _ in HEADINGS].index("ratio")
    (head,) = browser.find_elements("css selector", f"thead th:nth-child({at + 1})")

    def ratios() -> list[float]:
        column = browser.find_elements("css selector", f"tr.row td:nth-child({at + 1})")
        return [float(cell.get_attribute("data-value")) for cell in column]

    unsorted = ratios()
    assert len(unsorted) == 22
    head.find_element("css selector", "button").click()
    assert ratios() == sorted(unsorted)
    assert head.get_attribute("aria-sort") == "ascending"
    head.find_element("css selector", "button").click()
    assert ratios() == sorted(unsorted, reverse=True)

    detail = browser.find_element("css selector", "tbody .detail")
    assert not detail.is_displayed()
    browser.find_element("css selector", "tbody .open").click()
    assert detail.is_displayed()
    assert "plan:" in detail.text
    assert "Network of the operation" in detail.text
    assert "Simplified network" in detail.text

    browser.find_element("id", "find").send_keys("down-sampling forward")
    shown = [body for body in browser.find_elements("css selector", "tbody") if body.is_displayed()]
    assert len(shown) == 3

    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    fetched = [one["params"]["request"]["url"] for one in requests if one["method"] == "Network.requestWillBeSent"]
    assert fetched
    assert not [url for url in fetched if not url.startswith(("file://", "data:"))]
    assert not browser.get_log("browser")
    assert browser.save_screenshot(str(tmp_path / "resnet.png"))
    assert (tmp_path / "resnet.png").stat().st_size > 10_000

    browser.set_window_size(420, 900)
    width = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]  # a phone needs no sideways scrolling
