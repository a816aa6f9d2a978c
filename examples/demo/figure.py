"""What the demo says of the CNN on digits, and its figure."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.demo.digits import Study, nll

LAYER = "2.weight"
"""The parameter whose factors the figure shows."""


def eigenvalues(found: Study) -> dict[str, Tensor]:
    """The eigenvalues of the factors A and B of the second convolution, in descending order."""
    block = found.factors[LAYER]
    return {name: torch.linalg.eigvalsh(one[0]).flip(0) for name, one in (("A", block.A), ("B", block.B))}


def sentences(found: Study) -> Iterable[str]:
    """The results in words."""
    labels, mistakes = found.test[1], found.mistakes
    values = eigenvalues(found)["A"]
    share = int((values.cumsum(0) < 0.9 * values.sum()).sum()) + 1
    before, after = (float(one[mistakes].max(1).values.mean()) for one in (found.plain, found.careful))
    yield f"A CNN learns {len(found.train[1])} digits with lensor.optim.KFAC in {found.seconds:.1f} s."
    yield f"It misreads {int(mistakes.sum())} of {len(labels)} test digits and is {before:.0%} certain of its answers."
    yield f"With the uncertainty of its weights (lensor.curvature.kfac), it is {after:.0%} certain of them."
    before, after = nll(found.plain, labels), nll(found.careful, labels)
    yield f"The negative log-likelihood of the test digits falls from {before:.2f} to {after:.2f}."
    yield f"{share} of the {len(values)} eigenvalues of a convolution's input factor make up 90 % of its trace."


def draw(found: Study, path: Path, columns: int = 8) -> None:
    """Save the figure: eigenvalues, the most uncertain test images, and the training images behind mistakes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(12, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.7], wspace=0.03)
    upper, lower = right.subfigures(2, 1, height_ratios=[1, len(found.queries) + 0.4])
    _eigenvalues(left, found)
    _uncertain(upper, found, columns)
    _harmful(lower, found, columns)
    figure.savefig(path, dpi=110)


def _eigenvalues(figure: Any, found: Study) -> None:
    figure.suptitle("Eigenvalues of a convolution's\nKronecker factors (relative to the largest)", fontsize=11)
    axes = figure.subplots()
    for (name, values), colour in zip(eigenvalues(found).items(), ("#31688e", "#e07b39"), strict=True):
        relative = (values / values[0]).clamp_min(1e-8)
        label = f"{name}, {'input' if name == 'A' else 'output'}: {len(values)}"
        axes.semilogy(range(1, len(values) + 1), relative.numpy(), "o-", color=colour, markersize=3, label=label)
    axes.set_ylim(1e-5, 2)
    axes.set_xlabel("index")
    axes.grid(alpha=0.3)
    axes.legend()


def _uncertain(figure: Any, found: Study, columns: int) -> None:
    figure.suptitle("Most uncertain test digits: answer and certainty (in brackets: of the outputs alone)", fontsize=11)
    certainty, classes = found.careful.max(1)
    for axes, place in zip(figure.subplots(1, columns), certainty.argsort()[:columns].tolist(), strict=True):
        plain = float(found.plain[place].max())
        title = f"{int(classes[place])}?  {float(certainty[place]):.0%} ({plain:.0%})"
        _image(axes, found.test[0][place], title, bool(found.mistakes[place]))


def _harmful(figure: Any, found: Study, columns: int) -> None:
    figure.suptitle("Confident mistakes, and the training digits that contribute most, with their labels", fontsize=11)
    grid = figure.subplots(len(found.queries), columns)
    for row, query, harm in zip(grid, found.queries.tolist(), found.harm, strict=True):
        answer, label = int(found.careful[query].argmax()), int(found.test[1][query])
        _image(row[0], found.test[0][query], f"{answer}?  is {label}", True)
        for axes, place in zip(row[1:], harm.topk(columns - 1).indices.tolist(), strict=True):
            _image(axes, found.train[0][place], str(int(found.train[1][place])), False)


def _image(axes: Any, image: Tensor, title: str, wrong: bool) -> None:
    axes.imshow(image[0].numpy(), cmap="gray_r")
    axes.set_title(title, fontsize=8, color="#b3261e" if wrong else "black", pad=2)
    axes.set_axis_off()
