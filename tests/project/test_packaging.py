"""What is installed: importing it loads no framework, and the built distributions hold all of it and no more."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SMOKE = """
import sys
from importlib.metadata import requires, version
from importlib.resources import files

import numpy as np

import lensor

assert lensor.__file__.startswith(PLACE or sys.prefix), lensor.__file__
assert lensor.__version__ == version("lensor")
assert files("lensor").joinpath("py.typed").is_file()
needed = {line.replace("_", "-") for line in requires("lensor") if "extra" not in line}
assert needed == {"numpy>=1.26", "opt-einsum>=3.3"}, needed
spec = lensor.ConvSpec(1, 1, 5, 3, stride=2, padding=1)
x, w = np.arange(5.0).reshape(1, 1, 5), np.arange(1.0, 4.0).reshape(1, 1, 3)
y = lensor.einsum("n c i, i o k, d c k -> n d o", x, spec.patterns[0], w)
assert y.tolist() == [[[3.0, 14.0, 11.0]]], y
print("installed", lensor.__version__)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command; its errors are shown if it fails."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "COV"))}
    found = subprocess.run(command, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_import_loads_no_framework(tmp_path: Path) -> None:
    heavy = ["torch", "jax", "tensorflow", "matplotlib", "scipy", "typer", "rich"]
    code = f"import sys, lensor; print(sorted(set({heavy}) & set(sys.modules)))"
    assert run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT / "src")) == "[]\n"


def test_numpy_arrays_load_no_framework(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, lensor\n"
        "lensor.einsum('i, i o k, k -> o', np.ones(5), lensor.IndexPattern(5, 3), np.ones(3))\n"
        "print('torch' in sys.modules, 'jax' in sys.modules)"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT / "src")) == "False False\n"


def test_build_and_install(tmp_path: Path) -> None:
    # The wheel is built from the sdist.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ROOT, cwd=tmp_path)
    (wheel,), (sdist,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")

    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "lensor").rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert "Description-Content-Type: text/markdown" in metadata
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in metadata
    assert modules | {"lensor/py.typed", "lensor/inspect/catalogue.csv"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lensor"}
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{module}" for module in modules} | {"LICENSE", "pyproject.toml", "tests/support/session.py"} <= names
    assert not [name for name in names if ".venv" in name or "__pycache__" in name]

    # A fresh environment that sees NumPy and opt_einsum of this one, and nothing else.
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("numpy", "opt_einsum"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).parent
        for path in (source, source.with_name(f"{name}.libs")):
            if path.exists():
                (packages / path.name).symlink_to(path)
    builder = venv.EnvBuilder(with_pip=False)
    builder.create(tmp_path / "env")
    python = Path(builder.ensure_directories(tmp_path / "env").env_exe)
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    code = f"import sys; sys.path.append({str(packages)!r}); PLACE = None\n{SMOKE}"
    assert run(python, "-I", "-c", code, cwd=tmp_path).startswith("installed ")

    # The sdist, built by the build backend of this environment.
    unpacked = tmp_path / "from sdist"
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--target", unpacked)
    run(sys.executable, "-m", "pip", "install", *options, sdist, cwd=tmp_path)
    code = f"import sys; PLACE = {str(unpacked)!r}; sys.path += [PLACE, {str(packages)!r}]\n{SMOKE}"
    bare = Path(builder.ensure_directories(tmp_path / "bare").env_exe)
    builder.create(tmp_path / "bare")
    assert run(bare, "-I", "-c", code, cwd=tmp_path).startswith("installed ")
