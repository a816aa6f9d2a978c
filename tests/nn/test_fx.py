"""What torch does to models from outside: torch.fx, parametrizations, weight norm, spectral norm and pruning."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import lensor  # noqa: E402
import lensor.functional as F  # noqa: E402
import lensor.nn  # noqa: E402
import lensor.sampling  # noqa: E402

nn, fx, utils = torch.nn, torch.fx, torch.nn.utils
prune = pytest.importorskip("torch.nn.utils.prune")

CONVERT: dict[str, Callable[[Any, bool], Any]] = {
    "nn": lambda model, inplace: lensor.nn.convert(model, inplace=inplace),
    "sampling": lambda model, inplace: lensor.sampling.convert(model, {"n": 0.5}, inplace=inplace),
    "both": lambda model, inplace: lensor.sampling.convert(lensor.nn.convert(model, inplace), {"n": 0.5}, inplace=True),
}


def model() -> Any:
    torch.manual_seed(0)
    parts = [nn.Conv2d(2, 3, 3, bias=True), nn.ReLU(), nn.ConvTranspose2d(3, 2, 3, stride=2), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(162, 3)).double()


def example(batch: int = 4) -> Any:
    return torch.randn(batch, 2, 6, 6, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ torch.fx
class _Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, 3, 3, dtype=torch.double))

    def forward(self, x):  # without types: graphs keep their names, which cannot be pickled
        y = F.conv_transpose(F.conv(x, self.weight, padding=1), self.weight, padding=1)
        y = F.fold(F.unfold(y, 3, padding=1), (6, 6), 3, padding=1)
        y = lensor.sampling.conv(y, self.weight, keep={"n": 0.5}, scheme="fixed")
        return lensor.einsum("n c i j, i o k -> n c o k j", y, lensor.IndexPattern(4, 3))


class _Backwards(nn.Module):
    """Up-sampling to the size of another layer's input."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(2, 3, 3, stride=2), nn.ConvTranspose2d(3, 2, 3, stride=2)
        self.double()

    def forward(self, x):
        return self.up(self.down(x), output_size=x.shape[-2:])


def _patches() -> Any:
    return nn.Sequential(lensor.nn.UnfoldNd(3, padding=1, dims=2), lensor.nn.FoldNd(6, 3, padding=1, dims=2))


def _any_dimension() -> Any:
    layers = (lensor.nn.ConvNd(2, 3, 3, dims=2), lensor.nn.ConvTransposeNd(3, 2, 3, dims=2))
    return nn.Sequential(*layers, lensor.sampling.ReLU()).double()


def _one(make: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: make().double()


TRACED: dict[str, Callable[[], Any]] = {
    **{f"converted, {name}": lambda convert=convert: convert(model(), False) for name, convert in CONVERT.items()},
    "functions": _Functions,
    "output_size": lambda: lensor.nn.convert(_Backwards()),
    "patches": _patches,
    "any dimension": _any_dimension,
    "a layer": _one(lambda: lensor.nn.Conv2d(2, 3, 3)),
    "a sampled layer": _one(lambda: lensor.sampling.Conv2d(2, 3, 3, keep={"n": 0.5})),
    "a sampled linear layer": _one(lambda: lensor.sampling.Linear(6, 3, keep={"n": 0.5})),
    "a ReLU": _one(lensor.sampling.ReLU),
    "an unfolding": _one(lambda: lensor.nn.UnfoldNd(3, dims=2)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", TRACED)
def test_symbolic_tracing(name: str, training: bool) -> None:
    traced = TRACED[name]().train(training)
    graph = fx.symbolic_trace(traced)
    made = [graph, fx.symbolic_trace(graph), copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))]
    made.append(fx.Transformer(graph).transform())
    for batch in (4, 1):
        for found in made:
            close(found(example(batch)), traced(example(batch)))
    graph.graph.lint()
    assert list(graph.state_dict()) == list(traced.state_dict())
    if name.startswith("converted"):
        expected = torch.autograd.grad(traced.eval()(example()).sum(), list(traced.parameters()))
        close(torch.autograd.grad(graph.eval()(example()).sum(), list(graph.parameters())), expected)


def test_layers_are_leaves_as_torch_s() -> None:
    nodes = [(node.op, str(node.target)) for node in fx.symbolic_trace(model()).graph.nodes]
    for convert in CONVERT.values():
        graph = fx.symbolic_trace(convert(model(), False))
        assert [(node.op, str(node.target)) for node in graph.graph.nodes] == nodes
        graph.eval()
        assert not any(module.training for module in graph.modules())
    calls: list[Any] = []
    hooked = lensor.nn.convert(model())
    hooked[0].register_forward_hook(lambda *_: calls.append(1))
    graph = fx.symbolic_trace(hooked)
    assert not calls
    graph(example())
    assert calls == [1]


def test_a_sampled_layer_traced_alone_cannot_keep_its_generator() -> None:
    layer = lensor.sampling.Conv2d(2, 3, 3, keep={"n": 0.5}, generator=torch.Generator())
    with pytest.raises(TypeError, match=r"expected None in a torch.fx graph: .* as a submodule"):
        fx.symbolic_trace(layer)
    fx.symbolic_trace(nn.Sequential(layer))


# ----------------------------------------------------------------------------------------------------- parametrizations
class _Half(nn.Module):
    def forward(self, weight: Any) -> Any:
        return weight * 0.5

    def right_inverse(self, weight: Any) -> Any:
        return weight * 2


def _prune(layer: Any) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.4)
    prune.l1_unstructured(layer, "bias", amount=0.3)


def _prune_twice(layer: Any) -> None:
    prune.ln_structured(layer, "weight", amount=0.4, n=2, dim=0)
    prune.l1_unstructured(layer, "weight", amount=0.4)


APPLY: dict[str, Callable[[Any], Any]] = {
    "parametrization": lambda layer: utils.parametrize.register_parametrization(layer, "weight", _Half()),
    "weight_norm": utils.parametrizations.weight_norm,
    "weight_norm, hook": utils.weight_norm,
    "spectral_norm": utils.parametrizations.spectral_norm,
    "spectral_norm, hook": utils.spectral_norm,
    "orthogonal": utils.parametrizations.orthogonal,
    "prune": _prune,
    "prune twice": _prune_twice,
}


def layers(module: Any) -> Iterator[Any]:
    return (one for one in module.modules() if isinstance(one, (nn.modules.conv._ConvNd, nn.Linear)))


def apply(name: str, module: Any) -> Any:
    torch.manual_seed(2)
    for layer in layers(module):
        APPLY[name](layer)
    return module


def remove(name: str, module: Any) -> None:
    for layer in layers(module):
        if utils.parametrize.is_parametrized(layer):
            utils.parametrize.remove_parametrizations(layer, "weight")
        elif name == "weight_norm, hook":
            utils.remove_weight_norm(layer)
        elif name == "spectral_norm, hook":
            utils.remove_spectral_norm(layer)
        else:
            for tensor in ("weight", "bias") if name == "prune" else ("weight",):
                prune.remove(layer, tensor)


def step(module: Any) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(example()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*Dropping.*:UserWarning")
@pytest.mark.parametrize("name", APPLY)
@pytest.mark.parametrize("how", CONVERT)
def test_what_computes_weights(how: str, name: str) -> None:
    for first, inplace in itertools.product((False, True), (False, True)):
        expected = apply(name, model()).eval()
        plain = apply(name, model()) if first else model()
        found = CONVERT[how](plain, inplace)
        found = (found if first else apply(name, found)).eval()
        assert list(found.state_dict()) == list(expected.state_dict())
        found.load_state_dict(expected.state_dict())
        for layer, one in zip(layers(found), layers(expected), strict=True):
            close(layer.weight, one.weight)
            assert layer.weight.requires_grad == one.weight.requires_grad
        close(found(example()), expected(example()))
        step(found)
        step(expected)
        close(found(example()), expected(example()))
        graph = fx.symbolic_trace(found)
        step(found)
        step(expected)
        close(graph(example()), expected(example()))
        if name in ("parametrization", "weight_norm", "spectral_norm", "orthogonal"):
            close(copy.deepcopy(found)(example()), expected(example()))
        again = CONVERT["nn" if how == "nn" else "sampling"](found, False)
        close(again(example()), expected(example()))
        close(found(example()), expected(example()))  # the copy is one
        remove(name, found)
        remove(name, expected)
        assert list(found.state_dict()) == list(expected.state_dict())
        close(found(example()), expected(example()))
        if not first or inplace:
            assert type(found[0]) is type(CONVERT[how](model(), False)[0])
        if name != "weight_norm":  # of which torch leaves a hook that cannot be pickled
            close(pickle.loads(pickle.dumps(found))(example()), expected(example()))


def test_a_result_that_no_hook_computes_is_not_copied() -> None:
    made = lensor.nn.convert(model())
    weight = made[0].weight
    del made[0].weight
    made[0].weight = weight * 2
    with pytest.raises(ValueError, match=r"'weight' of '0' is the result of a computation.*inplace=True"):
        lensor.nn.convert(made)
