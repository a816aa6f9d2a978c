"""What is installed: importing it loads no framework; the distributions are complete, and the README runs with them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

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

README = r"""
import doctest, pathlib, re, sys
sys.path.append(sys.argv[2])
import lensor, torch

assert lensor.__file__.startswith(sys.prefix), lensor.__file__
assert not torch.__file__.startswith(sys.prefix), torch.__file__
runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
text, names = pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"), {"__name__": "__main__"}
for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
    if ">>>" in block:
        runner.run(doctest.DocTestParser().get_doctest(block, names, "README.md", None, 0), clear_globs=False)
        names = runner.test.globs
    else:
        exec(block, names)
print("failed", runner.failures, "of", runner.tries)
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


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the distributions of Lensor and of its benchmarks. The wheels are built from the sdists."""
    dist = tmp_path_factory.mktemp("dist")
    for source in (ROOT, ROOT / "benchmarks"):
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source, cwd=dist)
    return dist


@pytest.fixture(scope="module")
def python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment into which the wheel is installed, without what it needs."""
    folder = tmp_path_factory.mktemp("env")
    (wheel,) = built.glob("lensor-*.whl")
    builder = venv.EnvBuilder(with_pip=False)
    builder.create(folder)
    found = Path(builder.ensure_directories(folder).env_exe)
    run(sys.executable, "-m", "pip", "--python", found, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return found


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with NumPy and opt_einsum of this environment, and nothing else."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in ("numpy", "opt_einsum"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).parent
        for path in (source, source.with_name(f"{name}.libs")):
            if path.exists():
                (folder / path.name).symlink_to(path)
    return folder


def test_distributions_are_complete(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("lensor-*.whl"), built.glob("lensor-*.tar.gz")
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
    others = {"CITATION.cff", "LICENSE", "pyproject.toml", "tests/support/session.py"}
    assert {f"src/{module}" for module in modules} | others <= names
    assert not [name for name in names if ".venv" in name or "__pycache__" in name]


def test_an_index_accepts_the_distributions(built: Path) -> None:
    files = sorted(built.iterdir())
    assert len(files) == 4
    found = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *files, cwd=built)
    assert found.count("PASSED") == 4


def test_wheel_needs_numpy_and_opt_einsum_only(python: Path, packages: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.path.append({str(packages)!r}); PLACE = None\n{SMOKE}"
    assert run(python, "-I", "-c", code, cwd=tmp_path).startswith("installed ")


def test_sdist_installs(built: Path, packages: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("lensor-*.tar.gz")
    unpacked = tmp_path / "from sdist"
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--target", unpacked)
    run(sys.executable, "-m", "pip", "install", *options, sdist, cwd=tmp_path)
    code = f"import sys; PLACE = {str(unpacked)!r}; sys.path += [PLACE, {str(packages)!r}]\n{SMOKE}"
    builder = venv.EnvBuilder(with_pip=False)
    builder.create(tmp_path / "bare")
    bare = Path(builder.ensure_directories(tmp_path / "bare").env_exe)
    assert run(bare, "-I", "-c", code, cwd=tmp_path).startswith("installed ")


def test_readme_runs_with_the_wheel(python: Path, tmp_path: Path) -> None:
    # The packages of this environment follow those of the fresh one. Their .pth files, such as that of the editable
    # installation of Lensor, are not read.
    found = run(python, "-I", "-c", README, ROOT / "README.md", sysconfig.get_path("purelib"), cwd=tmp_path)
    assert re.search(r"failed 0 of \d\d", found), found


def test_versions_agree() -> None:
    project, benchmarks = (
        tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for folder in (ROOT, ROOT / "benchmarks")
    )
    version = project["version"]
    assert benchmarks["version"] == version
    (released,) = re.findall(r"^## \[(\d.*)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[:1]
    assert released[0] == version
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\ndate-released: {released[1]}\n" in citation


def test_table_of_supported_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[1:])
    page = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| (\d[\d.]*) or later \| (\S.*?) \|", page.partition("## Versions")[2], re.M)
    minors = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert rows[0] == ("Python", project["requires-python"].removeprefix(">="), ", ".join(minors))
    assert [name for name, _, _ in rows[1:]] == ["numpy", "opt_einsum", "torch", "triton", "jax", "flax", "equinox"]
    for name, least, tested in rows[1:]:
        assert any(one.split(";")[0] == f"{name}>={least}" for one in needed), name
        assert pinned[name] == tested
