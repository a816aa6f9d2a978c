"""The command line of the gallery; `tests/draw/test_draw.py` compares the gallery itself with the one in the docs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples import gallery


def test_the_command_writes_to_the_given_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(folder: Path) -> Iterator[Path]:
        yield folder / "figure-1.svg"

    monkeypatch.setattr(gallery, "write", write)
    gallery.main([str(tmp_path)])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'figure-1.svg'}\n"


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 2), (["--folder"], 2)])
def test_other_arguments_write_nothing(
    arguments: list[str],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        gallery.main(arguments)
    assert caught.value.code == status
    assert "usage: python -m examples.gallery" in "".join(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []
