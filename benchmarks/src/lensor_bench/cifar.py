"""CIFAR-100 from the user's folder: the files as they are distributed, in their binary or their Python version."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from lensor.inspect.errors import CommandError, in_one_line

_FILES = ("cifar-100-binary/train.bin", "cifar-100-python/train", "train.bin", "train")
_PIXELS = 3 * 32 * 32


def cifar100(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of the training set, uint8 [n, 3, 32, 32], and their fine labels, int64 [n].

    Args:
        folder: that holds `cifar-100-binary`, `cifar-100-python`, or is one of them.

    Raises:
        CommandError: if it holds none of them, or the file is no CIFAR-100.
    """
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        raise CommandError(f"no CIFAR-100 in {folder}: expected one of {', '.join(_FILES)} there")
    try:
        pictures, labels = _binary(path) if path.suffix == ".bin" else _pickled(path)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # whatever a damaged file leads to
        raise CommandError(f"{path} is not CIFAR-100: {in_one_line(error)}") from None
    if len(labels) == 0 or len(labels) != len(pictures) or not (labels.min() >= 0 and labels.max() < 100):
        raise CommandError(f"{path} is not CIFAR-100: expected a label below 100 for each of {len(pictures)} pictures")
    return pictures.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def _binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Records of a coarse label, a fine label and the pixels, a byte each."""
    records = np.fromfile(path, np.uint8).reshape(-1, 2 + _PIXELS)
    return records[:, 2:], records[:, 1]


def _pickled(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        found = _Arrays(file, encoding="bytes").load()
    return np.asarray(found[b"data"], np.uint8).reshape(-1, _PIXELS), np.asarray(found[b"fine_labels"])


class _Arrays(pickle.Unpickler):
    """Reads arrays, lists and dictionaries, and refuses all else: a pickle may run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda kind, shape, code: np.ndarray(shape, np.dtype(code))
        raise pickle.UnpicklingError(f"it holds {module}.{name}")
