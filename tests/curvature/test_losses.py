"""Losses of language models, registered losses, and modules of functions, against autograd in double precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from lensor import curvature
from lensor.curvature import FunctionModule, TokenCrossEntropyLoss, check_loss, kfac, register_loss
from lensor.curvature.registry import root_of
from lensor.optim import KFAC

pytestmark = pytest.mark.usefixtures("in_double_precision")

B, T, V = 3, 4, 5


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


def _blocks(model: nn.Module, loss: Any, x: Tensor, y: Any) -> dict[str, Tensor]:
    """The blocks of the GGN of every parameter, by Jacobians and the Hessian of the loss."""
    parameters = {name: one.detach() for name, one in model.named_parameters()}
    f = model(x).detach()
    curved = hessian(lambda out: loss(out, y))(f).reshape(f.numel(), f.numel())
    found = {}
    for name in parameters:
        jacobian = jacrev(lambda one, name=name: functional_call(model, parameters | {name: one}, (x,)))(
            parameters[name]
        ).reshape(f.numel(), -1)
        found[name] = jacobian.T @ curved @ jacobian
    return found


def _check_diagonal(model: nn.Module, loss: Any, x: Tensor, y: Any) -> None:
    expected = _blocks(model, loss, x, y)
    for name, found in curvature.ggn_diagonal(model, loss, (x, y)).items():
        close(found.flatten(), expected[name].diagonal())


# --------------------------------------------------------------------------------------------------- language models
class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mixed, self.last = nn.Embedding(V, 4), nn.Linear(T, T), nn.Linear(4, V)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        return self.last((h + self.mixed(h.mT).mT).tanh())


def _tokens() -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    targets[0, 1:], targets[2, 0] = -100, -100
    return tokens, targets


def _written_out(loss: TokenCrossEntropyLoss, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss as a loop over positions."""
    parts, weights = [], []
    for b in range(B):
        for t in range(T - 1 if loss.shift else T):
            target = int(targets[b, t + 1 if loss.shift else t])
            if target != loss.ignore_index:
                weight = 1.0 if loss.weight is None else loss.weight[target]
                parts.append(-weight * outputs[b, t].log_softmax(0)[target])
                weights.append(torch.as_tensor(weight))
    total = torch.stack(parts).sum()
    return total / torch.stack(weights).sum() if loss.reduction == "mean" else total


TOKENS: dict[str, Callable[[], TokenCrossEntropyLoss]] = {
    "mean": TokenCrossEntropyLoss,
    "shift": lambda: TokenCrossEntropyLoss(shift=True),
    "sum, weights, shift": lambda: TokenCrossEntropyLoss(torch.rand(V) + 0.5, reduction="sum", shift=True),
    "weights": lambda: TokenCrossEntropyLoss(torch.rand(V) + 0.5, ignore_index=2),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_token_losses(kind: str) -> None:
    loss, model, (x, y) = TOKENS[kind](), Language(), _tokens()
    if loss.ignore_index != -100:
        y = y.clamp_min(0)
    outputs = model(x)
    close(loss(outputs, y), _written_out(loss, outputs, y))
    check_loss(loss, outputs, y, samples=4000)
    _check_diagonal(model, loss, x, y)
    gradients = curvature.per_example_gradients(model, loss, (x, y))
    for name, one in zip(gradients, torch.autograd.grad(loss(outputs, y), list(model.parameters())), strict=True):
        close(gradients[name].sum(0), one)
    clipped = curvature.clipped_gradients(model, loss, (x, y), 0.1, reduction="sum")
    norms = torch.stack([one.flatten(1).square().sum(1) for one in gradients.values()]).sum(0).sqrt()
    close(clipped.norms, norms)
    close(clipped.gradients["last.bias"], ((0.1 / norms).clamp_max(1) @ gradients["last.bias"]))


@pytest.mark.parametrize("kind", TOKENS)
def test_token_losses_of_a_linear_model_have_exact_factors(kind: str) -> None:
    """With one position per example, Kronecker factors of expand are those of the cross entropy."""
    loss, (x, y) = TOKENS[kind](), _tokens()
    if loss.ignore_index != -100:
        y = y.clamp_min(0)
    model = Language()
    moved = copy.deepcopy(loss)
    plain = nn.CrossEntropyLoss(moved.weight, ignore_index=moved.ignore_index, reduction=moved.reduction)

    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model(tokens).movedim(-1, 1)

    aligned = loss.aligned(model(x), y)
    for fisher in ("type-2", "empirical", "mc"):
        options: dict[str, Any] = {"fisher": fisher, "others": "skip"}
        found = kfac(model, loss, (x, y), generator=torch.Generator().manual_seed(0), **options)
        expected = kfac(Moved(), plain, (x, aligned), generator=torch.Generator().manual_seed(0), **options)
        for name in ("mixed.weight", "last.weight", "last.bias"):
            close(found[name].A, expected[f"model.{name}"].A)
            close(found[name].B, expected[f"model.{name}"].B)


def test_batches_of_tokens_are_weighted_by_their_targets() -> None:
    loss, model, (x, y) = TokenCrossEntropyLoss(shift=True), Language(), _tokens()
    parts = [(x[:1], y[:1]), (x[1:], y[1:])]
    for call in (curvature.ggn_diagonal, curvature.hessian_diagonal):
        for name, one in call(model, loss, (x, y)).items():
            close(call(model, loss, parts)[name], one)
    whole, divided = (kfac(model, loss, data, others="skip") for data in ((x, y), parts))
    close(divided["last.weight"].B, whole["last.weight"].B)


def test_flattened_tokens_are_rows_of_examples() -> None:
    class Flat(Language):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens).flatten(0, 1)

    (x, y), model = _tokens(), Flat()
    _check_diagonal(model, nn.CrossEntropyLoss(), x, y.flatten())


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        ((B, T, V), (B, V), "targets have shape .*, expected .*, that of the outputs .* without the classes"),
        ((B * T, V), (B * T,), "outputs have shape .*, expected .batch, positions, classes. with shift=True"),
    ],
)
def test_tokens_of_other_shapes(outputs: tuple[int, ...], targets: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenCrossEntropyLoss(shift=True)(torch.randn(outputs), torch.zeros(targets, dtype=torch.long))


def test_clipped_means_need_equal_numbers_of_tokens() -> None:
    x, y = _tokens()
    with pytest.raises(ValueError, match="expected equal ones"):
        curvature.clipped_gradients(Language(), TokenCrossEntropyLoss(), (x, y), 1.0)
    found = curvature.clipped_gradients(Language(), TokenCrossEntropyLoss(shift=True), (x, x), 1.0)
    assert found.norms.shape == (B,)


class _Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits, self.hidden = logits, logits.tanh()


def test_objects_with_logits() -> None:
    class Wrapped(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> _Output:
            return _Output(self.model(tokens))

    loss, model, (x, y) = TokenCrossEntropyLoss(shift=True), Language(), _tokens()
    for call in (curvature.ggn_diagonal, curvature.per_example_gradients, curvature.hessian_diagonal):
        found = call(Wrapped(model), loss, (x, y))
        for name, one in call(model, loss, (x, y)).items():
            close(found[f"model.{name}"], one)


@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical"])
def test_the_optimizer_takes_token_losses(fisher: Any) -> None:
    loss, model, (x, _) = TokenCrossEntropyLoss(shift=True), Language(), _tokens()
    optimizer = KFAC(model, loss, lr=0.01, damping=0.1, fisher=fisher)
    factors = kfac(model, loss, (x, x), fisher=fisher, others="skip")
    before = loss(model(x), x)
    before.backward()
    pending = optimizer.tracker.pending
    assert pending is not None
    if fisher != "mc":
        close(pending.factors("mean")["last.weight"].B, factors["last.weight"].B)
    optimizer.step()
    assert float(loss(model(x), x).detach()) < float(before.detach())


# --------------------------------------------------------------------------------------------------- registered losses
class Poisson(nn.Module):
    """A loss with an option, whose root is a method."""

    def __init__(self, scale: float, reduction: str = "mean") -> None:
        super().__init__()
        self.scale, self.reduction = scale, reduction

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        total = self.scale * (outputs.exp() - targets * outputs).sum()
        return total / self.normaliser(outputs, targets) if self.reduction == "mean" else total

    def root(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        for place in range(outputs.shape[1]):
            column = torch.zeros_like(outputs)
            column[:, place] = (self.scale * outputs[:, place].exp()).sqrt()
            yield column

    def sampler(self, outputs: Tensor, targets: Tensor, generator: torch.Generator | None) -> Tensor:
        rate = outputs.exp()
        return self.scale**0.5 * (rate - torch.poisson(rate, generator=generator))

    def normaliser(self, outputs: Tensor, targets: Tensor) -> float:
        return float(outputs.numel())


register_loss(Poisson, root=Poisson.root, sampler=Poisson.sampler, normaliser=Poisson.normaliser)


def _softplus_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that couples the outputs of an example."""
    return (outputs.exp().sum(1).log() - (outputs * targets).sum(1)).mean()


def _softmax_root(outputs: Tensor, targets: Tensor) -> Tensor:
    p = outputs.softmax(1)
    classes = p.shape[1]
    unit = torch.eye(classes)[:, None]
    return p.sqrt().T[:, :, None] * (unit - p)


register_loss(_softplus_sum, root=_softmax_root, reduction="mean")


def _small() -> tuple[nn.Sequential, Tensor, Tensor]:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.LayerNorm(4), nn.Flatten(), nn.Linear(12, 3))
    return model, torch.randn(4, 2, 5), torch.rand(4, 3)


OWN: dict[str, Any] = {"class": Poisson(0.7), "sum": Poisson(1.3, "sum"), "function": _softplus_sum}


@pytest.mark.parametrize("kind", OWN)
def test_registered_losses(kind: str) -> None:
    loss, (model, x, y) = OWN[kind], _small()
    check_loss(loss, model(x), y, samples=0 if kind == "function" else 4000)
    _check_diagonal(model, loss, x, y)
    factors = kfac(model, loss, (x, y))
    blocks = _blocks(model, loss, x, y)
    close(factors["4.bias"].B[0], blocks["4.bias"])
    close(factors["2.bias"].B.flatten(), blocks["2.bias"].diagonal())
    exact = curvature.ekfac(model, loss, (x, y), factors)
    close(exact.parts["4.bias"][2].sum(), blocks["4.bias"].trace())
    mini = curvature.ggn_mini_blocks(model[3:], loss, (model[:3](x).detach(), y))["4.weight"]
    close(mini.flatten(), torch.stack([blocks["4.weight"].reshape(3, 12, 3, 12)[c, :, c] for c in range(3)]).flatten())
    parts = [(x[:1], y[:1]), (x[1:], y[1:])]
    for call in (curvature.ggn_diagonal, curvature.hessian_diagonal):
        for name, one in call(model, loss, (x, y)).items():
            close(call(model, loss, parts)[name], one)


@pytest.mark.parametrize("kind", OWN)
def test_empirical_fisher_of_registered_losses(kind: str) -> None:
    loss, (model, x, y) = OWN[kind], _small()
    gradients = curvature.per_example_gradients(model, loss, (x, y))
    normaliser = root_of(loss, model(x), y, 4).normaliser
    for name, found in curvature.ggn_diagonal(model, loss, (x, y), fisher="empirical").items():
        close(found, gradients[name].square().sum(0) * normaliser)


def test_rows_of_examples_of_registered_losses() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.tanh()).flatten(0, 1)

    _check_diagonal(Rows(), _softplus_sum, torch.randn(4, 5, 2), torch.rand(20, 3))


def test_the_optimizer_takes_registered_losses() -> None:
    model, x, y = _small()
    model = nn.Sequential(model[0], nn.Flatten(), nn.Linear(12, 3))
    loss = Poisson(1.0)
    optimizer = KFAC(model, loss, lr=0.01, damping=0.1, fisher="empirical")
    before = float(loss(model(x), y).detach())
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    assert float(loss(model(x), y).detach()) < before


def test_bad_roots() -> None:
    model, x, y = _small()

    def square(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.square().sum()

    def twice(outputs: Tensor, targets: Tensor) -> list[Tensor]:
        units = torch.eye(3)[:, None].expand(3, len(outputs), 3)
        return [2 * unit for unit in units]

    with pytest.raises(TypeError, match="loss has type function"):
        kfac(model, square, (x, y))
    register_loss(square, root=lambda f, y: torch.ones(4, 3), reduction="sum")
    with pytest.raises(ValueError, match=r"the root of square has a column of shape \(3,\), expected .* \(4, 3\)"):
        kfac(model, square, (x, y))
    register_loss(square, root=lambda f, y: [1.0], reduction="sum")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="the root of square has a column of type float"):
        kfac(model, square, (x, y))
    with pytest.raises(
        ValueError, match="the loss square was registered without sampler=, expected one for fisher='mc'"
    ):
        kfac(model, square, (x, y), fisher="mc")
    register_loss(square, root=twice, sampler=lambda f, y, g: f[:1], reduction="sum")
    with pytest.raises(ValueError, match=r"the root of square differs from the Hessian by 2 in entry"):
        check_loss(square, model(x), y)
    with pytest.raises(ValueError, match=r"the sampler of square has a column of shape \(1, 3\)"):
        kfac(model, square, (x, y), fisher="mc")
    register_loss(square, root=twice, reduction="mean", normaliser=lambda f, y: -1)
    with pytest.raises(ValueError, match=r"the normaliser of square is -1\.0, expected a finite number of at least 0"):
        kfac(model, square, (x, y))
    register_loss(square, root=twice, reduction="sum", sampler=lambda f, y, g: torch.full_like(f, 3))
    with pytest.raises(ValueError, match="mixes entries"):
        check_loss_of_mixing(model(x), y)
    with pytest.raises(TypeError, match="root has type int, expected a function"):
        register_loss(square, root=1, reduction="sum")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss has type int"):
        register_loss(1)
    with pytest.raises(ValueError, match="reduction is 'None', expected"):
        register_loss(lambda f, y: f.sum())


def check_loss_of_mixing(outputs: Tensor, targets: Tensor) -> None:
    def mixing(f: Tensor, y: Tensor) -> Tensor:
        return f.sum() ** 2

    register_loss(mixing, root=lambda f, y: f[None], reduction="sum")
    check_loss(mixing, outputs, targets)


def test_subclasses_of_registered_losses_are_unknown() -> None:
    class Changed(Poisson):
        pass

    model, x, y = _small()
    with pytest.raises(TypeError, match="loss has type Changed"):
        kfac(model, Changed(1.0), (x, y))


# ------------------------------------------------------------------------------------------------- modules of functions
def _function(parameters: Any, x: Tensor) -> Tensor:
    first, rest = parameters["first"], parameters["rest"]
    h = nn.functional.conv1d(x, first["type"], first["b"]).tanh() * rest[0]
    return nn.functional.linear(h.flatten(1), rest[1])


def test_modules_of_functions() -> None:
    parameters = {
        "first": {"type": torch.randn(3, 2, 2), "b": torch.randn(3)},
        "rest": [torch.randn(4), torch.randn(3, 12)],
    }
    model, (_, x, y) = FunctionModule(_function, parameters), _small()
    assert [name for name, _ in model.named_parameters()] == ["first.type", "first.b", "rest.0", "rest.1"]
    close(model(x), _function(parameters, x))
    _check_diagonal(model, nn.MSELoss(), x, y)
    loss = nn.MSELoss(reduction="sum")
    gradients = curvature.per_example_gradients(model, loss, (x, y))
    jacobians = curvature.jacobians(model, x)
    norms = curvature.per_example_gradient_norms(model, loss, (x, y))
    for n in range(len(x)):
        value = loss(model(x[n : n + 1]), y[n : n + 1])
        slopes = torch.autograd.grad(value, list(model.parameters()))
        for (name, found), slope in zip(gradients.items(), slopes, strict=True):
            close(found[n], slope)
            close(norms[name][n], slope.norm())
    flat = torch.cat([one.flatten(2) for one in jacobians.values()], 2)
    close(curvature.empirical_ntk(model, x), torch.einsum("ncp,mdp->nmcd", flat, flat))
    diagonal = curvature.hessian_diagonal(model, loss, (x, y))
    named = {name: one.detach() for name, one in model.named_parameters()}
    curved = hessian(lambda one: loss(functional_call(model, named | {"rest.0": one}, (x,)), y))(named["rest.0"])
    close(diagonal["rest.0"], curved.diagonal())
    factors, diagonal = kfac(model, loss, (x, y)), curvature.ggn_diagonal(model, loss, (x, y))
    for name, one in factors.diagonal().items():
        assert not factors[name].factored  # there are no layers
        torch.testing.assert_close(one, diagonal[name])


def test_a_function_of_a_model_s_parameters_has_their_names() -> None:
    model, x, y = _small()
    parameters = {name: one.detach() for name, one in model.named_parameters()}
    wrapped = FunctionModule(lambda parameters, x: functional_call(model, parameters, (x,)), parameters)
    for call in (curvature.per_example_gradients, curvature.ggn_diagonal):
        expected = call(model, nn.MSELoss(), (x, y))
        found = call(wrapped, nn.MSELoss(), (x, y))
        assert list(found) == list(expected)
        for name, one in expected.items():
            close(found[name], one)


def test_parameters_share_memory_and_follow_copies() -> None:
    parameters = {"w": torch.randn(3, 2), "steps": torch.tensor(2), "power": 2}
    model = FunctionModule(lambda p, x: (x @ p["w"].T) ** p["power"] * p["steps"], parameters)
    x = torch.randn(4, 2)
    parameters["w"].mul_(2)
    close(model(x), (x @ parameters["w"].T) ** 2 * 2)
    copied = copy.deepcopy(model).float()
    assert copied(x.float()).dtype == torch.float32
    assert list(model.state_dict()) == ["w", "steps"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "parameters contain no tensor"),
        ({"a": torch.ones(1), "a.b": torch.ones(1)}, "expected one"),
        ({"a.b": torch.ones(1), "a": torch.ones(1)}, "expected different names"),
        ({"": torch.ones(1)}, "expected different names"),
    ],
)
def test_names_that_exclude_each_other(parameters: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FunctionModule(lambda p, x: x, parameters)
    with pytest.raises(TypeError, match="function has type int"):
        FunctionModule(1, parameters)  # type: ignore[arg-type]
