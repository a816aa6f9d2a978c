"""Norms by pairs of positions, for embeddings and tied weights, against loops over the examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lensor.curvature import clipped_gradients, per_example_gradient_norms, per_example_gradients, streaming
from lensor.curvature.example_gradients import zeros_of
from lensor.curvature.functions import FunctionUse

pytestmark = pytest.mark.usefixtures("in_double_precision")

WORDS, WIDTH = 40, 6


class Tokens(nn.Module):
    """A language model of one layer.

    Args:
        padding: the word without a gradient.
        tied: whether the weight of the embedding is that of the last layer as well.
        twice: whether the embedding runs twice.
        time_first: whether the embedding takes words with the positions first.
        functional: whether the embedding is a call of the function with named arguments.
    """

    def __init__(self, padding: int | None, tied: bool, twice: bool, time_first: bool, functional: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH, padding_idx=padding)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)
        if tied:
            self.head.weight = self.embedding.weight
        with torch.no_grad():
            self.embedding.weight.normal_()
        self.twice, self.time_first, self.functional, self.padding = twice, time_first, functional, padding

    def embedded(self, words: Tensor) -> Tensor:
        if self.functional:
            return F.embedding(weight=self.embedding.weight, input=words, padding_idx=self.padding)
        return self.embedding(words)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedded(words.mT).transpose(0, 1) if self.time_first else self.embedded(words)
        if self.twice:
            x = x + self.embedded(words.flip(1)) ** 2
        return self.head(self.middle(x).tanh())


def looped(model: nn.Module, words: Tensor, targets: Tensor) -> list[dict[str, Tensor]]:
    found = []
    for n in range(len(words)):
        value = F.cross_entropy(model(words[n : n + 1]).flatten(0, 1), targets[n], reduction="sum")
        named = dict(model.named_parameters())
        found.append(dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True)))
    return found


def of_tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")


@settings(max_examples=25)
@given(
    st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([None, 3, -1]), st.integers(1, 9),
    st.integers(1, 4), st.sampled_from([None, 0]), st.integers(0, 10**6),
)  # fmt: skip
def test_norms_and_clipped_sums(
    tied: bool,
    twice: bool,
    time_first: bool,
    functional: bool,
    padding: int | None,
    length: int,
    batch: int,
    axis: Any,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = Tokens(padding, tied, twice, time_first and axis is None, functional)
    words, targets = torch.randint(WORDS if seed % 2 else 4, (batch, length)), torch.randint(WORDS, (batch, length))
    expected = looped(model, words, targets)
    squares = {name: torch.stack([one[name].square().sum() for one in expected]) for name in expected[0]}
    for name, found in per_example_gradient_norms(model, of_tokens, (words, targets), batch_axis=axis).items():
        torch.testing.assert_close(found, squares[name].sqrt(), rtol=1e-9, atol=1e-9)
    totals = sum(squares.values()).sqrt()  # type: ignore[union-attr]
    clipped = clipped_gradients(model, of_tokens, (words, targets), 0.7, reduction="sum", batch_axis=axis)
    torch.testing.assert_close(clipped.norms, totals)
    factors = (0.7 / totals).clamp_max(1.0)
    for name, found in clipped.gradients.items():
        torch.testing.assert_close(found, sum(f * one[name] for f, one in zip(factors, expected, strict=True)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision(kind: torch.dtype, tied: bool) -> None:
    """The parts are multiplied and added in single precision; what is left is that of the model's own passes."""
    model = Tokens(None, tied, True, False, False)
    words, targets = torch.randint(4, (4, 5)), torch.randint(WORDS, (4, 5))
    wide = {
        name: found.float() for name, found in per_example_gradient_norms(model, of_tokens, (words, targets)).items()
    }
    found = per_example_gradient_norms(model.to(kind), of_tokens, (words, targets))
    clipped = clipped_gradients(model, of_tokens, (words, targets), 0.7, reduction="sum")
    for name, norms in found.items():
        assert norms.dtype == clipped.gradients[name].dtype == torch.float32
        torch.testing.assert_close(norms, wide[name], rtol=5e-2 if kind is torch.bfloat16 else 1e-2, atol=0)
    torch.testing.assert_close(clipped.norms, sum(one.square() for one in found.values()).sqrt())


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_words_are_not_formed(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a gradient of an example was formed")

    monkeypatch.setattr(FunctionUse, "gradients", refuse)
    monkeypatch.setattr(streaming, "gradients_of", lambda use, x, v: _small(zeros_of(use.call.weight, len(x))))
    model = Tokens(None, tied, False, False, False)
    words = torch.randint(WORDS, (4, 3))
    per_example_gradient_norms(model, of_tokens, (words, words))
    clipped_gradients(model, of_tokens, (words, words), 1.0, reduction="sum")


def _small(gradient: Tensor) -> Tensor:
    assert gradient.shape[1] != WORDS
    return gradient


@pytest.mark.parametrize("option", [{"scale_grad_by_freq": True}, {"sparse": True}])
def test_other_embeddings(option: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(WORDS, WIDTH, **option), nn.Linear(WIDTH, WORDS))
    words = torch.randint(4, (4, 3))
    norms = per_example_gradient_norms(model, of_tokens, (words, words))
    gradients = per_example_gradients(model, of_tokens, (words, words))
    for n, one in enumerate(looped(model, words, words)):
        for name, gradient in one.items():
            if "sparse" in option or name != "0.weight":  # scaled gradients depend on the words of all examples
                torch.testing.assert_close(gradients[name][n], gradient.to_dense())
                torch.testing.assert_close(norms[name][n], gradient.to_dense().norm())


def test_an_embedding_that_writes() -> None:
    model = nn.Sequential(nn.Embedding(WORDS, WIDTH, max_norm=0.5), nn.Linear(WIDTH, WORDS))
    words = torch.randint(WORDS, (4, 3))
    expected = looped(model, words, words)
    norms = per_example_gradient_norms(model, of_tokens, (words, words))
    for n, one in enumerate(expected):
        torch.testing.assert_close(norms["0.weight"][n], one["0.weight"].norm())
