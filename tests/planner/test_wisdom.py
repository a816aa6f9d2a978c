"""Measuring, and what was measured: kept, saved, shared, and never a reason to fail."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lensor
from lensor import ConvSpec, dispatch, ops, planner
from lensor import functional as F
from lensor.planner import measure, wisdom
from tests.support.cases import assert_close, operands_of

NET = ops.conv(ConvSpec(2, 3, (9, 9), 3, padding=1)).bind(n=2)
OPERANDS = operands_of(NET)


_ENTRY = b'{"lensor wisdom": 1, "measured": {"k": {"network": "", "where": "", "seconds": {"a": %}}}}'
"""A file with one entry, whose time is to be put in."""


@pytest.fixture(autouse=True)
def knows_nothing() -> Iterator[None]:
    lensor.clear_caches()
    wisdom.forget()
    yield
    lensor.clear_caches()
    wisdom.forget()


def slowest_of(plan: Any) -> str:
    return max((one for one in plan.candidates if one.measured is not None), key=lambda one: one.measured).name


def prefer(name: str) -> None:
    """Make everything that is known say that one strategy is the fastest."""
    for key, one in list(wisdom._known.items()):
        wisdom.record(key, NET, one.where, {name: 1e-9})


def test_times_are_kept_when_the_plan_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = NET.plan(effort="measure", **OPERANDS)
    (known,) = wisdom.entries()
    assert lensor.parse(known.network) == NET
    assert "numpy" in known.where
    assert "float64" in known.where
    assert known.seconds == {one.name: one.measured for one in plan.candidates if one.measured is not None}
    lensor.clear_caches()
    monkeypatch.setattr(planner, "measure", lambda *_: pytest.fail("measured twice"))
    again = NET.plan(effort="measure", **OPERANDS)
    assert again is not plan
    assert (again.name, again.candidates) == (plan.name, plan.candidates)


def test_remember_never_measures_and_follows_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    by_estimate = NET.plan(**OPERANDS)
    remembered = NET.plan(effort="remember", **OPERANDS)
    assert remembered.name == by_estimate.name
    assert wisdom.entries() == ()
    other = slowest_of(NET.plan(effort="measure", **OPERANDS))
    prefer(other)
    monkeypatch.setattr(planner, "measure", lambda *_: pytest.fail("measured"))
    with lensor.planning(effort="remember"):
        plan = NET.plan(**OPERANDS)
        assert plan.name == other
        assert NET.plan(**OPERANDS) is plan
        assert_close(NET(**OPERANDS), by_estimate(**OPERANDS))


def test_other_dtypes_and_threads_are_other_places() -> None:
    arrays = {name: torch.tensor(array) for name, array in OPERANDS.items()}
    NET.plan(effort="measure", **OPERANDS)
    NET.plan(effort="measure", **arrays)
    NET.plan(effort="measure", **{name: array.float() for name, array in arrays.items()})
    assert len({one.where for one in wisdom.entries()}) == 3
    lensor.clear_caches()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        NET.plan(effort="measure", **arrays)
    finally:
        torch.set_num_threads(before)
    assert len(wisdom.entries()) == 4


def test_a_file_holds_what_several_processes_know(tmp_path: Path) -> None:
    path = tmp_path / "wisdom.json"
    plan = NET.plan(effort="measure", **OPERANDS)
    assert wisdom.save(path) == 1
    wisdom.forget()
    lensor.clear_caches()
    other = ops.unfold(ConvSpec(2, 3, (9, 9), 3)).bind(n=2)
    other.plan(effort="measure", **operands_of(other))
    assert wisdom.save(path) == 2
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".json"] == ["wisdom.json"]
    wisdom.forget()
    lensor.clear_caches()
    assert wisdom.load(path) == 2
    assert NET.plan(effort="remember", **OPERANDS).candidates == plan.candidates


def test_many_processes_save_at_once(tmp_path: Path) -> None:
    path = tmp_path / "wisdom.json"
    program = (
        "import sys, lensor\n"
        "from lensor import ConvSpec, ops\nfrom lensor.planner import wisdom\n"
        "net = ops.unfold(ConvSpec(1, 1, (int(sys.argv[1]),), 3)).bind(n=2)\n"
        "for step in range(20):\n"
        "    wisdom.record(f'{sys.argv[1]} {step}', net, 'here', {'windows': 1.0})\n"
        "    wisdom.save(sys.argv[2])\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, str(size), str(path)]) for size in (5, 6, 7, 8)]
    assert [process.wait(timeout=120) for process in running] == [0] * 4
    assert wisdom.load(path) == 80


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe\x00", "decode"),
        (b"[1, 2]", "list indices"),
        (b"{}", "no entry 'lensor wisdom'"),
        (b'{"lensor wisdom": 99, "measured": {}}', "version 99, expected 1"),
        (b'{"lensor wisdom": 1, "measured": [3]}', "attribute"),
        (b'{"lensor wisdom": 1, "measured": {"k": {"network": "", "where": ""}}}', "no entry 'seconds'"),
        (b'{"lensor wisdom": 1, "measured": {"k": {"network": "", "where": "", "seconds": {"a": "x"}}}}', "convert"),
        (b'{"lensor wisdom": 1, "measured": {"k": {"network": "", "where": "", "seconds": {"a": NaN}}}}', "finite"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"lensor wisdom": 1, "measured": ' + b'{"a":' * 200_000, "nested too deeply"),
        (b'{"lensor wisdom": 1' + b"0" * 5000 + b"}", "limit"),
        (b'{"lensor wisdom": ' + b"9" * 4000 + b"}", "version 999"),
        (_ENTRY.replace(b"%", b"1" + b"0" * 400), "too large"),
        (_ENTRY.replace(b"%", b"-1"), "not negative"),
        (b"# A user's notes\n", "Expecting value"),
        (b'{"version": 3, "layers": []}', "no entry 'lensor wisdom'"),
    ],
)
def test_a_damaged_file_is_a_warning(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "wisdom.json"
    path.write_bytes(content)
    with pytest.warns(wisdom.WisdomWarning, match=f"is not a readable wisdom file: .*{reason}"):
        assert wisdom.load(path) == 0
    assert wisdom.entries() == ()
    NET.plan(effort="measure", **OPERANDS)
    if content:
        with pytest.raises(
            wisdom.WisdomError, match=f"{path} is not a readable wisdom file .*{reason}.*it was not changed"
        ):
            wisdom.save(path)
        assert path.read_bytes() == content
        path.unlink()
    assert wisdom.save(path) == 1
    assert wisdom.load(path) == 1


def test_a_truncated_file_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "wisdom.json"
    NET.plan(effort="measure", **OPERANDS)
    wisdom.save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 37):
        path.write_bytes(whole[:length])
        with pytest.warns(wisdom.WisdomWarning):
            assert wisdom.load(path) == 0


def some_entries() -> int:
    wisdom.record("key", NET, "here", {"windows": 1.0})
    return len(wisdom.entries())


def test_lone_surrogates_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "wisdom.json"
    path.write_bytes(_ENTRY.replace(b"%", b"1").replace(b'"network": ""', rb'"network": "\ud800 \u03a0"'))
    assert wisdom.load(path) == 1
    assert wisdom.save(path) == 1
    wisdom.forget()
    assert wisdom.load(path) == 1
    (one,) = wisdom.entries()
    assert one.network == "\ud800 Π"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_the_mode_of_a_file_stays(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "wisdom.json"
    some_entries()
    before = os.umask(0o022)
    try:
        wisdom.save(path)
        assert path.stat().st_mode & 0o777 == 0o644
        path.chmod(mode)
        wisdom.save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("dangling", [False, True])
def test_a_symbolic_link_stays_one(tmp_path: Path, dangling: bool) -> None:
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "wisdom.json", tmp_path / "link.json"
    number = some_entries()
    if not dangling:
        wisdom.save(target)
    link.symlink_to(target)
    assert wisdom.save(link) == number
    assert link.is_symlink()
    assert target.is_file()
    assert not target.is_symlink()
    assert wisdom.load(link) == number
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".tmp"] == []


def test_what_is_not_a_regular_file_is_an_error_and_stays(tmp_path: Path) -> None:
    some_entries()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), tmp_path / "full", tmp_path / "loop"):
        for act in (wisdom.save, wisdom.load):
            with pytest.raises(OSError, match=path.name):
                act(path)
    assert Path("/dev/full").is_char_device()
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.suffix == ".tmp") == []


def test_a_full_disk_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "wisdom.json"
    number = some_entries()
    wisdom.save(path)
    program = (
        "import resource, signal, sys\n"
        "from lensor import ConvSpec, ops\nfrom lensor.planner import wisdom\n"
        "net = ops.unfold(ConvSpec(1, 1, (5,), 3)).bind(n=2)\n"
        "for step in range(200):\n"
        "    wisdom.record(str(step), net, 'here', {'windows': 1.0})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    wisdom.save(sys.argv[1])\n"
        "except OSError as error:\n"
        "    print(type(error).__name__, error.filename)\n"
    )
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert done.stdout == f"OSError {path}\n", done.stderr
    assert path.read_bytes() == before
    assert wisdom.load(path) == number
    assert {entry.name for entry in tmp_path.iterdir()} == {"wisdom.json", ".wisdom.json.lock"}


def test_a_lock_of_somebody_else_is_not_followed_or_emptied(tmp_path: Path) -> None:
    some_entries()
    (tmp_path / "precious").write_text("data")
    (tmp_path / ".wisdom.json.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"wisdom\.json"):
        wisdom.save(tmp_path / "wisdom.json")
    assert (tmp_path / "precious").read_text() == "data"


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, number, opens = tmp_path / "wisdom.json", some_entries(), os.open
    wisdom.save(path)
    before = path.read_bytes()

    def refuse(name: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_CREAT and not os.path.exists(name):
            raise PermissionError(13, "Permission denied", name)
        return opens(name, flags, *rest, **named)

    monkeypatch.setattr(wisdom.os, "open", refuse)
    with pytest.raises(PermissionError, match=r"/wisdom\.json'"):
        wisdom.save(path)
    assert path.read_bytes() == before
    assert wisdom.load(path) == number


def test_a_missing_file_or_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        wisdom.load(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError):
        wisdom.save(tmp_path / "none" / "wisdom.json")


def test_times_of_strategies_that_are_no_more_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "wisdom.json"
    plan = NET.plan(effort="measure", **OPERANDS)
    wisdom.save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    for one in content["measured"].values():
        one["seconds"] = {"of old": 1e-9}
    path.write_text(json.dumps(content), encoding="utf-8")
    wisdom.forget()
    lensor.clear_caches()
    wisdom.load(path)
    again = NET.plan(effort="measure", **OPERANDS)
    assert again.candidates[0].measured is not None
    assert_close(again(**OPERANDS), plan(**OPERANDS))


def test_compiled_graphs_follow_what_is_known() -> None:
    x = torch.randn(2, 2, 9, 9, dtype=torch.float64)
    w = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    with lensor.planning(effort="measure"):
        expected = F.conv(x, w, padding=1)
        (known,) = wisdom.entries()
        other = max(known.seconds, key=known.seconds.__getitem__)
        prefer(other)
        before = set(vars(dispatch._captured_calls))
        torch._dynamo.reset()
        found = torch.compile(lambda x: F.conv(x, w, padding=1), backend="eager", fullgraph=True)(x)
        (new,) = set(vars(dispatch._captured_calls)) - before
    assert_close(found, expected)
    assert new


class Clock:
    """Runs of plans take the time that it is told, by the place of the plan among all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: list[float], warmup: float = 1.0) -> None:
        self.now, self.runs, made = 0.0, [0] * len(seconds), itertools.count()
        clock = self

        def timed(_: Any, call: Callable[[], Any], kind: Any) -> float:
            start = clock.now
            call()
            return clock.now - start

        class Run:
            def __init__(self, *_: Any) -> None:
                self.at = next(made)

            def __call__(self, _: Any) -> None:
                clock.runs[self.at] += 1
                clock.now += seconds[self.at] * (warmup if clock.runs[self.at] == 1 else 1)

        monkeypatch.setattr("lensor.planner.choice.Runnable", Run)
        monkeypatch.setattr(type(lensor.kernels.load("numpy")), "timed", timed)


@pytest.mark.parametrize("warmup", [1.0, 3.0])
@pytest.mark.parametrize("times", [[1.0], [1.0, 1.1], [2.0, 1.0, 1.2, 1.3], [1.0] * 8, [3.0, 1.0, 20.0, 2.0, 5.0]])
def test_measuring_takes_about_fifty_calls_of_the_fastest(
    monkeypatch: pytest.MonkeyPatch, times: list[float], warmup: float
) -> None:
    clock = Clock(monkeypatch, times, warmup)
    plan = NET.plan(**OPERANDS)
    found = measure([plan] * len(times), [1.0] * len(times), lensor.kernels.load("numpy"), ("numpy", np.dtype(float)))
    first_runs = warmup * sum(times)
    assert clock.now <= first_runs + 50 * min(times) + 1.5 * len(times) * min(times)
    assert found[times.index(1.0)] == pytest.approx(1.0)
    assert all(one is None or one == pytest.approx(time) for one, time in zip(found, times, strict=True))
    assert all(count <= 2 for count, time in zip(clock.runs, times, strict=True) if time > 1.5)
    close = [count for count, time in zip(clock.runs, times, strict=True) if time <= 1.5]
    assert min(close) >= (2 if len(times) > 1 else 1)


def test_candidates_with_a_hopeless_estimate_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, [1.0, 1.0])
    plan = NET.plan(**OPERANDS)
    found = measure([plan] * 2, [1.0, 5.1], lensor.kernels.load("numpy"), ("numpy", np.dtype(float)))
    assert found == [1.0, None]
    assert clock.runs[1] == 0
