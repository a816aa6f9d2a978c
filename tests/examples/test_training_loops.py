"""The example of training loops: all loops end with the same parameters."""

from __future__ import annotations

import pytest
import torch

from examples import training_loops


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_all_loops_end_with_the_same_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pytorch_lightning")
    pytest.importorskip("accelerate")
    found = training_loops.trained(1)
    plain, accuracy, _ = found["torch"]
    assert accuracy > 0.8
    for model, _, _ in found.values():
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a, b)
