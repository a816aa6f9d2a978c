"""Reads CIFAR-100 and CIFAR-10 from the user's folder, in the binary or the Python version that is distributed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from lensor.inspect.errors import CommandError, in_one_line

_FILES = ("cifar-100-binary/train.bin", "cifar-100-python/train", "train.bin", "train")
_PIXELS = 3 * 32 * 32


def cifar100(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images of the training set, uint8 [n, 3, 32, 32], and their fine labels, int64 [n].

    Args:
        folder: folder that contains `cifar-100-binary` or `cifar-100-python`, or is one of them.

    Raises:
        CommandError: if the folder contains neither, or if the file is not CIFAR-100.
    """
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        raise CommandError(f"{folder} has no CIFAR-100 file, expected one of {', '.join(_FILES)}")
    try:
        pictures, labels = _binary(path) if path.suffix == ".bin" else _pickled(path)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # any error that a damaged file causes
        raise CommandError(f"{path} is not CIFAR-100: {in_one_line(error)}") from None
    if len(labels) == 0 or len(labels) != len(pictures) or not (labels.min() >= 0 and labels.max() < 100):
        raise CommandError(f"{path} is not CIFAR-100: expected a label below 100 for each of {len(pictures)} images")
    return pictures.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def cifar10(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images of the training set, uint8 [50000, 3, 32, 32], and their labels, int64 [50000].

    Args:
        folder: folder that contains `cifar-10-batches-bin`, or is this folder.

    Raises:
        CommandError: if the folder does not contain the files, or if they are not CIFAR-10.
    """
    names = [f"data_batch_{at}.bin" for at in range(1, 6)]
    places = [folder / "cifar-10-batches-bin", folder]
    place = next((one for one in places if all((one / name).is_file() for name in names)), None)
    if place is None:
        raise CommandError(f"{folder} has no CIFAR-10 files, expected {names[0]} to {names[-1]}")
    try:
        records = np.concatenate([np.fromfile(place / name, np.uint8).reshape(-1, 1 + _PIXELS) for name in names])
    except (OSError, ValueError) as error:
        raise CommandError(f"{place} is not CIFAR-10: {in_one_line(error)}") from None
    if len(records) == 0 or records[:, 0].max() >= 10:
        raise CommandError(f"{place} is not CIFAR-10: expected a label below 10 for each image")
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


def _binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read records of a coarse label, a fine label and the pixels, one byte each."""
    records = np.fromfile(path, np.uint8).reshape(-1, 2 + _PIXELS)
    return records[:, 2:], records[:, 1]


def _pickled(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        found = _Arrays(file, encoding="bytes").load()
    return np.asarray(found[b"data"], np.uint8).reshape(-1, _PIXELS), np.asarray(found[b"fine_labels"])


class _Arrays(pickle.Unpickler):
    """Reads arrays, lists and dictionaries, and rejects anything else: a pickle may run arbitrary code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda kind, shape, code: np.ndarray(shape, np.dtype(code))
        raise pickle.UnpicklingError(f"the pickle has {module}.{name}, expected arrays, lists and dictionaries")
