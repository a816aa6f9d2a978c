"""Every step has a function in each backend."""

from __future__ import annotations

import pytest

from lensor.kernels import load
from lensor.plan import steps as s


def kinds() -> set[type[s.Step]]:
    """The steps that plans are made of: those that the package of steps exports."""
    exported = {value for value in vars(s).values() if isinstance(value, type) and issubclass(value, s.Step)}
    return exported - {s.Step}


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_every_step_has_a_function(backend: str) -> None:
    table = load(backend).steps
    missing = {kind.__name__ for kind in kinds() if kind not in table and not issubclass(kind, s.Input)}
    assert not missing
    assert set(table) <= kinds()
