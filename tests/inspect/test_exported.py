"""Files of `torch.export`: read without running anything of them, and refused where loading them could run code."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lensor
from lensor.inspect import CommandError
from lensor.inspect.exported import exported
from tests.support.command import invoke

Members = dict[str, bytes]


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(3, 4, 3, bias=False)
        self.blocks = nn.ModuleDict({"first": nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 2, 2, 2))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        return nn.functional.conv2d(self.blocks["first"](x), torch.ones(3, 2, 1, 1), None, (2, 2))


def saved(path: Path, model: nn.Module | None = None, size: int = 9, dynamic: bool = False) -> Path:
    shapes = ({0: torch.export.Dim("n")},) if dynamic else None
    model = Blocks() if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(model, (torch.zeros(2, 3, size, size),), dynamic_shapes=shapes), path)
    return path


def members(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write(path: Path, found: Members, compression: int = zipfile.ZIP_STORED, folder: str = "net/") -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in found.items():
            archive.writestr(folder + name, data)
    return path


def by_torch(value: Any, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Members:
    return members(saved(tmp_path_factory.mktemp("exported") / "net.pt2", dynamic=True))


# ---------------------------------------------------------------------------------------------------- what is read
def test_blocks_without_gradients_and_functions_count(tmp_path: Path) -> None:
    layers, shape = exported(saved(tmp_path / "net.pt2"))
    assert shape == (3, 9, 9)
    assert [(one.name, one.spec) for one in layers] == [
        ("frozen", lensor.ConvSpec(3, 4, (9, 9), 3)),
        ("blocks.first.0", lensor.ConvSpec(4, 4, (7, 7), 1, bias=True)),
        ("blocks.first.1", lensor.ConvSpec(4, 2, (7, 7), 2, stride=2, bias=True, transposed=True)),
        (layers[-1].name, lensor.ConvSpec(2, 3, (14, 14), 1, stride=2)),
    ]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.conv(x), lambda x: x.clone(), (x,))


def test_convolutions_in_control_flow_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="convolution inside of cond, expected no control flow"):
        exported(saved(tmp_path / "net.pt2", Branches()))


def test_the_older_format_is_read(tmp_path: Path, harmless: Members) -> None:
    old = {
        "serialized_exported_program.json": harmless["models/model.json"],
        **{f"serialized_{name}.pt": by_torch({}) for name in ("state_dict", "constants", "example_inputs")},
        "version": b"8.8",
    }
    new = exported(write(tmp_path / "net.pt2", harmless))
    assert exported(write(tmp_path / "net.pt2", old, folder="")) == new
    for name in ("state_dict", "constants", "example_inputs"):
        evil = old | {f"serialized_{name}.pt": by_torch({"x": Payload(tmp_path / "ran")})}
        with pytest.raises(CommandError, match=f"serialized_{name}.pt has a pickle that refers to .*open"):
            exported(write(tmp_path / "net.pt2", evil, folder=""))
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------- what could run code
def _config(found: Members, kind: str, payload: dict[str, Any]) -> Members:
    name = f"data/{kind}/model_{kind}_config.json"
    config = json.loads(found[name])
    config["config"]["more"] = payload
    return {name: json.dumps(config).encode()}


def _flagged(found: Members, kind: str, name: str, data: bytes) -> Members:
    payload = {"path_name": name, "is_param": True, "use_pickle": True, "tensor_meta": None}
    return _config(found, kind, payload) | {f"data/{kind}/{name}": data}


Attack = Callable[[Members, Any], Members]
ATTACKS: dict[str, tuple[Attack, str]] = {
    "sample inputs": (lambda _, evil: {"data/sample_inputs/model.pt": by_torch(((evil,), {}))}, "refers to .*open"),
    "sample inputs, a raw pickle": (
        lambda _, evil: {"data/sample_inputs/model.pt": pickle.dumps(evil)},
        "cannot be examined",
    ),
    "sample inputs, torch's format before 1.6": (
        lambda _, evil: {"data/sample_inputs/model.pt": by_torch(((evil,), {}), zipped=False)},
        "cannot be examined",
    ),
    "weights of old": (lambda _, evil: {"data/weights/model.pt": by_torch({"w": evil})}, "refers to .*open"),
    "constants of old": (lambda _, evil: {"data/constants/model.pt": by_torch({"w": evil})}, "refers to .*open"),
    "a pickled weight": (
        lambda found, evil: _flagged(found, "weights", "weight_9", by_torch(evil)),
        "weight_9 has a pickle that refers to .*open",
    ),
    "a pickled constant": (
        lambda found, evil: _flagged(found, "constants", "tensor_9", by_torch(evil)),
        "tensor_9 has a pickle that refers to .*open",
    ),
    "an opaque object": (
        lambda found, evil: _flagged(found, "constants", "opaque_obj_0", pickle.dumps(evil)),
        "opaque_obj_0 has a pickled object of a custom class",
    ),
    "an object of a custom class": (
        lambda found, evil: _flagged(found, "constants", "custom_obj_0", by_torch(evil)),
        "custom_obj_0 has a pickled object of a custom class",
    ),
    "another model": (
        lambda found, evil: {
            "models/other.json": found["models/model.json"],
            "data/sample_inputs/other.pt": by_torch(((evil,), {})),
        },
        "other.pt has a pickle that refers to .*open",
    ),
    "a compiled library": (lambda _, evil: {"data/aotinductor/model/x.so": b"\x7fELF"}, "has compiled code"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_could_run_code_is_not_loaded(name: str, tmp_path: Path, harmless: Members) -> None:
    attack, message = ATTACKS[name]
    ran = tmp_path / "ran"
    path = write(tmp_path / "net.pt2", harmless | attack(harmless, Payload(ran)))
    with pytest.raises(CommandError, match=f"{path} could run code when loaded: .*{message}"):
        exported(path)
    for command in ("convs", "explain"):
        found = invoke(command, str(path))
        assert found.exit_code == 1
        assert "could run code when loaded" in found.stderr
        assert len(found.stderr.strip().splitlines()) == 1
    assert not ran.exists()


def test_the_payload_of_these_tests_runs_where_it_is_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()


def test_expressions_of_sizes_are_not_evaluated(tmp_path: Path, harmless: Members) -> None:
    program, ran = json.loads(harmless["models/model.json"]), tmp_path / "ran"
    changed = 0

    def replace(value: Any) -> None:
        nonlocal changed
        if isinstance(value, dict):
            if "expr_str" in value:
                value["expr_str"] = f"open({str(ran)!r}, 'w')"
                changed += 1
            for one in value.values():
                replace(one)
        elif isinstance(value, list):
            for one in value:
                replace(one)

    replace(program)
    assert changed
    expected = exported(write(tmp_path / "net.pt2", harmless))
    path = write(tmp_path / "net.pt2", harmless | {"models/model.json": json.dumps(program).encode()})
    assert exported(path) == expected
    assert not ran.exists()


def test_compressed_pickles_are_not_expanded(tmp_path: Path, harmless: Members) -> None:
    path = write(tmp_path / "net.pt2", harmless, zipfile.ZIP_DEFLATED)
    with pytest.raises(CommandError, match="a compressed pickle"):
        exported(path)


# --------------------------------------------------------------------------------------------------- damaged files
DAMAGES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "Expecting value"),
    "no JSON": (b"\x00\xff", "Error"),
    "a list": (b"[1]", "TypeError"),
    "deep": (b"[" * 200_000, "RecursionError"),
    "another version": (b'{"schema_version": {"major": 99}}', "its schema has version 99, expected 8"),
    "huge numbers": (b'{"schema_version": {"major": 1' + b"0" * 5000 + b"}}", "limit"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_programs_are_told_in_a_line(name: str, tmp_path: Path, harmless: Members) -> None:
    data, message = DAMAGES[name]
    path = write(tmp_path / "net.pt2", harmless | {"models/model.json": data})
    with pytest.raises(CommandError, match=f"is not an exported program: .*{message}"):
        exported(path)
    assert len(invoke("convs", str(path)).stderr.strip().splitlines()) == 1


def test_truncated_files_and_missing_entries(tmp_path: Path, harmless: Members) -> None:
    whole = write(tmp_path / "net.pt2", harmless).read_bytes()
    for length in range(0, len(whole), len(whole) // 23):
        (tmp_path / "cut.pt2").write_bytes(whole[:length])
        with pytest.raises(CommandError, match="is not an exported program"):
            exported(tmp_path / "cut.pt2")
    program = json.loads(harmless["models/model.json"])
    for key in ("graph_module", "schema_version"):
        cut = json.dumps({name: value for name, value in program.items() if name != key}).encode()
        with pytest.raises(CommandError, match=f"is not an exported program: KeyError: '{key}'"):
            exported(write(tmp_path / "net.pt2", harmless | {"models/model.json": cut}))
    with pytest.raises(CommandError, match=r"the archive has models/x\.json, expected models/model\.json"):
        exported(write(tmp_path / "net.pt2", {"models/x.json": b"{}"}))


def test_sizes_that_are_not_known_are_an_error(tmp_path: Path, harmless: Members) -> None:
    for size in ({"as_int": -3}, {"as_int": 10**30}, {"as_int": "7"}, {"as_expr": {"expr_str": "s0", "hint": None}}):
        program = json.loads(harmless["models/model.json"])
        for one in program["graph_module"]["graph"]["tensor_values"].values():
            one["sizes"] = [size] * len(one["sizes"])
        path = write(tmp_path / "net.pt2", harmless | {"models/model.json": json.dumps(program).encode()})
        with pytest.raises(CommandError, match=r"a size of .* is unknown"):
            exported(path)
