"""The example of influence functions: its numbers against dense matrices, and what it shows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from examples.influence import area, digits, influences, main, trained
from lensor.curvature import ekfac, kfac


def test_influences_are_products_with_the_dense_inverse() -> None:
    (images, labels), _ = digits(20)
    model = trained((images, labels), 1).double()
    data = images.double(), labels
    queries = data[0][:3], labels[:3]
    own, others = influences(model, data, queries, 0.01)
    mean = nn.CrossEntropyLoss()
    matrix = ekfac(model, mean, data, kfac(model, mean, data))
    dense = matrix @ torch.eye(matrix.size, dtype=torch.float64)
    inverse = torch.linalg.inv(dense + 0.01 * torch.eye(matrix.size, dtype=torch.float64))
    gradients = []
    for image, label in zip(*data, strict=True):
        value = nn.functional.cross_entropy(model(image[None]), label[None])
        parts = torch.autograd.grad(value, list(model.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    g = torch.stack(gradients)
    torch.testing.assert_close(others, g[:3] @ inverse @ g.mT)
    torch.testing.assert_close(own, (g @ inverse @ g.mT).diagonal())


def test_wrong_labels_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "106 of 1000 labels are wrong"
    found = next(line for line in lines if line.startswith("influence on itself"))
    assert float(found.split()[-2]) > 0.95


def test_the_area_under_the_curve() -> None:
    assert area(torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([True, False, True, False])) == 1.0
