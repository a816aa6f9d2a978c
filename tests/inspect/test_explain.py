"""`lensor explain`: what it says of a model is the networks', the plans' and the measurements', also in a browser."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import lensor
from examples.demo.models import build
from lensor.inspect import CommandError, Layer, errors
from lensor.inspect.explain import Explanation, Timing, explained, totals
from lensor.inspect.exported import exported
from lensor.inspect.operations import OPERATIONS, PAPER_OPERATIONS
from lensor.inspect.page import page
from lensor.inspect.screen import advice, print_screen
from lensor.inspect.table import cells
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
        assert total.flops == sum(one.layer.count * one.plan.flops for one in found if one.operation == total.name)


def test_what_has_no_time_says_why_and_is_not_in_the_total() -> None:
    failed = Timing(2.0, None, "lensor failed: MemoryError: too large")
    found = list(explained(LAYERS, OPS, timings=TIMINGS | {("forward", LAYERS[0].spec): failed}))
    assert found[0].trouble == "lensor failed: MemoryError: too large"
    assert [cell.text for cell in cells(found[0])[-3:]] == ["–"] * 3
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


# ------------------------------------------------------------------------------------------------------------- screen
def screen(found: Sequence[Explanation], width: int) -> list[str]:
    """The rows of the terminal screen."""
    stream = io.StringIO()
    lines = ("net: input", "batch 8, 4 columns of the GGN's root, float32; " + "a processor with a long name, " * 9)
    print_screen(found, lines, Console(file=stream, width=width, legacy_windows=False))
    return stream.getvalue().splitlines()


def made(count: int) -> list[Layer]:
    """Layers whose names are long; each has one input channel more than the one before it."""
    name = "a.very.long.name.of.a.module.that.no.terminal.has.room.for.in.one.line.block{}.conv"
    return [Layer("net", name.format(at), lensor.ConvSpec(at, 8, (6, 6), 3), 2) for at in range(1, count + 1)]


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("ops", [("forward",), PAPER_OPERATIONS, tuple(OPERATIONS)])
@pytest.mark.parametrize(
    ("count", "rest"), [(1, "every plan: --all"), (6, "1 more layer: --all"), (60, "55 more layers: --all")]
)
def test_one_screen_has_room_for_every_model(count: int, rest: str, ops: Sequence[str], width: int) -> None:
    layers = made(count)
    failed = Timing(2.0, None, "lensor failed: " + "a long message " * 20)
    timings = {(name, layer.spec): Timing(2e3, 1e6) for layer in layers for name in ops}
    for timed in (None, timings, timings | {(ops[0], layers[-1].spec): failed}):
        rows = screen(list(explained(layers, ops, timings=timed)), width)
        assert len(rows) <= 24
        assert max(map(len, rows)) <= width
        assert rows[-1].startswith(rest)
        assert sum("a.very.long" in row for row in rows) == min(count, 5)


def test_the_screen_shows_the_layers_that_take_most_time_with_torch_or_with_lensor() -> None:
    layers = [replace(layer, name=f"conv{at}") for at, layer in enumerate(made(7))]
    seconds = [(1.0, 1.0), (0.1, 9.0), (8.0, 0.2), (3.0, 3.0), (4.0, 4.0), (5.0, 5.0), (0.5, 2.8)]  # 25 s in all
    timings = {("forward", layer.spec): Timing(*both) for layer, both in zip(layers, seconds, strict=True)}
    rows = screen(list(explained(layers, ["forward"], timings=timings)), 100)
    shown = [found.groups() for row in rows if (found := re.match(r"(conv\d) ×2, .* (\d+%)", row))]
    assert shown == [("conv1", "36%"), ("conv2", "1%"), ("conv5", "20%"), ("conv4", "16%"), ("conv3", "12%")]


def test_a_narrow_terminal_wraps_the_screen() -> None:
    found = list(explained(made(1), ["forward"]))
    assert screen(found, 30) == screen(found, 80)


def test_a_layer_without_a_time_comes_first_and_says_why() -> None:
    layers = made(7)
    timings = {("forward", layer.spec): Timing(2.0, 1.0) for layer in layers}
    timings["forward", layers[-1].spec] = Timing(2.0, None, "lensor failed: MemoryError: too large")
    rows = screen(list(explained(layers, ["forward"], timings=timings)), 80)
    assert "forward (2 without a time)" in "".join(rows)
    at = next(place for place, row in enumerate(rows) if row.startswith("most time"))
    assert rows[at + 2] == "  forward: lensor failed: MemoryError: too large"


# ------------------------------------------------------------------------------------------------------------- advice
def timed(**ratios: float) -> list[Explanation]:
    """A dense layer with these ratios: torch takes a second for each operation."""
    layer = LAYERS[1]
    timings = {(name, layer.spec): Timing(1.0, ratio) for name, ratio in ratios.items()}
    return list(explained([layer], tuple(ratios), timings=timings))


def test_advice_is_about_the_largest_loss_then_about_the_largest_gain() -> None:
    found = timed(forward=1.2, weight_vjp=3.0, kfac_reduce=0.1)
    assert len(found[1].plan.candidates) > 1
    assert advice(found).startswith('weight_vjp 3.00×: keep torch\'s or try effort="measure"; Π 2 → 0, ')
    found[1] = replace(found[1], plan=replace(found[1].plan, candidates=found[1].plan.candidates[:1]))
    assert advice(found).startswith("weight_vjp 3.00×: keep torch's; ")
    assert advice(timed(forward=1.02, kfac_reduce=0.1)).startswith("kfac_reduce 0.10×: use Lensor's; ")
    assert advice(timed(forward=1.02)).startswith("forward 1.02×: as fast as torch's")


def test_advice_of_a_memory_limit_holds() -> None:
    spec = lensor.ConvSpec(3, 64, (64, 64), 7, stride=2, padding=3)
    (one,) = explained([Layer("net", "conv1", spec, 1)], ["kfac_expand"])
    found = re.fullmatch(
        r"kfac_expand: max_bytes=(\d+) lowers the peak to (\S+) MB, (\S+)× the flops; .*", advice([one])
    )
    assert found is not None
    x = torch.rand(8, *spec.input_shape)
    net = OPERATIONS["kfac_expand"].network(spec)
    with lensor.planning(max_bytes=int(found[1])):
        plan = net.plan(X=x)
    assert float(found[2]) == pytest.approx(plan.peak_size * 4 / 1e6, rel=0.01)
    assert plan.peak_size * 4 <= one.peak_bytes / 2
    assert float(found[3]) == pytest.approx(plan.flops / one.plan.flops, abs=0.01)
    torch.testing.assert_close(plan(X=x), net.plan(X=x)(X=x))


def test_advice_names_no_limit_that_no_plan_meets() -> None:
    (one,) = explained([Layer("net", "conv", lensor.ConvSpec(8, 8, (6, 6), 1), 1)], ["forward"])
    assert advice([one]).startswith("forward: no plan needs less than half of ")
    with lensor.planning(max_bytes=one.peak_bytes // 2), pytest.raises(ValueError, match="max_bytes"):
        one.network.plan(**one.operands)


# ----------------------------------------------------------------------------------------------------------- command
def test_in_the_terminal() -> None:
    found = invoke("explain", "2c2d", *FAST)
    assert found.exit_code == 0, found.output
    assert all(operation in found.output for operation in PAPER_OPERATIONS)
    assert "2 distinct convolutions, 2 in all" in found.output
    assert "batch 1" in found.output


def test_all_prints_every_operation_of_every_convolution() -> None:
    found = invoke("explain", "2c2d", "--no-times", "--all")
    assert found.exit_code == 0, found.output
    for operation in PAPER_OPERATIONS:  # two layers, and the whole model
        assert len(re.findall(rf"│ {operation} +│", found.output)) == 3
    assert "the whole model" in found.output
    assert "2 distinct convolutions, 2 in all" in found.output


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
    assert html.read_text(encoding="utf-8").count('<details class="layer">') == 4


def test_transposed_and_one_dimensional_layers_are_measured() -> None:
    model = "tests.inspect.test_explain:network"
    found = invoke("explain", model, "--input-shape", "3x9x8", *FAST, "--ops", "kfac_expand", "--all")
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
class Bars(HTMLParser):
    """The widths of the bars of each layer, in percent, and the tags that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[dict[str, float]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("class") == "layer":
            self.layers.append({})
        if tag == "rect" and (found.get("width") or "").endswith("%"):
            self.layers[-1][str(found["class"])] = float(str(found["width"])[:-1])
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def bars(text: str) -> list[dict[str, float]]:
    """The widths of the bars of each layer; the page must close every tag."""
    parser = Bars()
    parser.feed(text)
    assert not parser.open
    return parser.layers


def test_page_holds_everything_and_refers_to_nothing() -> None:
    found = list(explained(LAYERS, OPS, timings=TIMINGS))
    text = page(found, "net <1>", "input", ["line & more"])
    assert "net &lt;1&gt;" in text
    assert "line &amp; more" in text
    assert not re.search(r"(src|href)\s*=\s*\"(?!data:)|url\(|@import|https?://|<script", text)
    assert text.count('<tr class="row">') == len(found)
    assert text.count('role="img" width=') == 2 * len(found)  # diagrams before and after
    for one in found:
        assert one.simplified.replace(">", "&gt;") in text
    assert "0.25×" in text


def test_page_has_bars_in_proportion_to_times_and_memory() -> None:
    timings = TIMINGS | {(OPS[0], LAYERS[1].spec): Timing(2.0, 5.5)}
    found = list(explained(LAYERS, OPS, timings=timings))
    first, last = bars(page(found, "net", "input", ["line"]))
    # The first layer runs twice: 8 s and 2 s for both operations, beside 4 s and 6 s.
    assert first == {"time-torch": 100.0, "time-lensor": 25.0, "memory": 100.0}
    peaks = [max(one.peak_bytes for one in found if one.layer == layer) for layer in LAYERS]
    assert last == {"time-torch": 50.0, "time-lensor": 75.0, "memory": round(100 * peaks[1] / peaks[0], 2)}


@pytest.mark.parametrize("count", [1, 6, 60])
def test_page_has_one_bar_for_each_layer_in_order(count: int) -> None:
    found = list(explained(made(count), ["forward"]))
    layers = bars(page(found, "net", "input", ["nothing measured"]))
    assert [layer["time-lensor"] for layer in layers] == [
        round(100 * one.plan.flops / found[-1].plan.flops, 2) for one in found
    ]


def test_page_of_a_layer_without_a_time() -> None:
    found = list(explained(LAYERS, ["forward"], timings={("forward", LAYERS[0].spec): Timing(2.0, 0.5)}))
    first, last = bars(page(found, "net", "input", ["line"]))
    assert first["time-torch"] == 100.0
    assert set(last) == {"memory"}


@pytest.mark.slow
def test_page_of_a_resnet_in_a_browser(browser: Any, tmp_path: Path) -> None:
    html = tmp_path / "resnet.html"
    shape = ("--input-shape", "3x32x32", "--ops", "kfac_reduce,forward")
    done = invoke("explain", "examples.demo.models:resnet18", *shape, *FAST, "--html", str(html))
    assert done.exit_code == 0, done.output
    browser.get(html.as_uri())

    layers = browser.find_elements("css selector", "details.layer")
    assert len(layers) == 11
    for layer in layers:
        time, memory = layer.find_elements("css selector", "svg.bars")
        assert time.rect["y"] == memory.rect["y"]
        assert time.rect["x"] + time.rect["width"] <= memory.rect["x"]
    detail = layers[0].find_element("css selector", ".detail")
    assert not detail.is_displayed()
    layers[0].find_element("css selector", "summary").click()
    assert detail.is_displayed()
    assert "plan:" in detail.text
    assert "before" in detail.text
    assert "after simplification" in detail.text

    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    fetched = [one["params"]["request"]["url"] for one in requests if one["method"] == "Network.requestWillBeSent"]
    assert fetched
    assert not [url for url in fetched if not url.startswith(("file://", "data:"))]
    assert not browser.get_log("browser")
    assert browser.save_screenshot(str(tmp_path / "resnet.png"))
    assert (tmp_path / "resnet.png").stat().st_size > 10_000

    phone = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    width = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width == [390, 390]  # a phone needs no sideways scrolling
