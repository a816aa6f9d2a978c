"""Regenerate the catalogue: `python -m lensor_bench.regenerate [FILE]`, with torchvision installed.

Any build of torchvision works, such as the one from `pip install --no-deps torchvision`: models run on the meta device,
so none of torchvision's compiled operators is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lensor.inspect import catalogue
from lensor.inspect.catalogue import NETS, Net
from lensor.inspect.extract import convolutions, import_factory
from lensor.inspect.layers import COLUMNS, format_sizes, write_layers

_OPTIONS: dict[str, dict[str, Any]] = {"inceptionv3": {"init_weights": False}}
"""InceptionV3's options: drawing its weights takes a minute, even on the meta device."""


def declare_operators() -> None:
    """Declare the operators that torchvision needs at import, in case its compiled part does not load."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with suppress(RuntimeError):  # already declared
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


_libraries: list[torch.library.Library] = []
"""Keeps the library alive, because its operators disappear with it."""


def factory_of(net: Net) -> Callable[[], Any]:
    """The function that creates a network from the catalogue.

    Raises:
        CommandError: if torchvision is needed and cannot be imported.
    """
    if net.factory.startswith("torchvision"):
        declare_operators()
    return partial(import_factory(net.factory), **_OPTIONS.get(net.name, {}))


def main(path: Path) -> None:
    """Write every net's convolutions to a file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(",".join(COLUMNS) + "\n")
        for net in NETS.values():
            for shape in dict.fromkeys((net.census, net.speed)):
                write_layers(file, convolutions(factory_of(net), net.name, shape), format_sizes(shape))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(catalogue.__file__).with_name("catalogue.csv"))
