"""Every parameter of real architectures with random weights: sums against autograd, norms against loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lensor.curvature import (
    TokenCrossEntropyLoss,
    clipped_gradients,
    ekfac,
    ggn_diagonal,
    hessian_diagonal,
    kfac,
    per_example_gradient_norms,
    per_example_gradients,
)
from lensor.optim import KFAC

BATCH, CLASSES = 3, 5
Case = tuple[nn.Module, Any, Tensor, Callable[[Any, Tensor], Tensor]]


pytestmark = pytest.mark.usefixtures("in_double_precision")


def of_classes(out: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(out if isinstance(out, Tensor) else out.logits, y, reduction="sum")


def of_tokens(out: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="sum")


def images(model: Any, size: int = 32) -> Case:
    return model, {"pixel_values": torch.randn(BATCH, 3, size, size)}, torch.arange(BATCH), of_classes


def tokens() -> Tensor:
    return torch.randint(2, 50, (BATCH, 7))


SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def resnet(kind: str, depths: list[int]) -> Case:
    import transformers as t

    config = t.ResNetConfig(
        depths=depths, layer_type=kind, hidden_sizes=[8, 12, 16, 24], embedding_size=8, num_labels=CLASSES
    )
    return images(t.ResNetForImageClassification(config))


def convnext() -> Case:
    import transformers as t

    config = t.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 2], num_stages=2, num_labels=CLASSES)
    return images(t.ConvNextForImageClassification(config))


def mobilenet() -> Case:
    import transformers as t

    config = t.MobileNetV2Config(image_size=32, depth_multiplier=0.1, min_depth=4, num_labels=CLASSES)
    return images(t.MobileNetV2ForImageClassification(config))


def vit() -> Case:
    import transformers as t

    return images(t.ViTForImageClassification(t.ViTConfig(**SMALL, image_size=32, patch_size=8, num_labels=CLASSES)))


def swin() -> Case:
    import transformers as t

    config = t.Swinv2Config(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=4, num_labels=CLASSES
    )
    return images(t.Swinv2ForImageClassification(config), 16)


def bert() -> Case:
    import transformers as t

    model = t.BertForSequenceClassification(
        t.BertConfig(**SMALL, vocab_size=50, max_position_embeddings=10, num_labels=CLASSES)
    )
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return model, {"input_ids": ids, "attention_mask": mask}, torch.arange(BATCH), of_classes


def gpt2() -> Case:
    """A language model whose head is tied to its embedding."""
    import transformers as t

    config = t.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=10, bos_token_id=0, eos_token_id=0)
    ids = tokens()
    return t.GPT2LMHeadModel(config), {"input_ids": ids}, ids, of_tokens


def wav2vec2() -> Case:
    import transformers as t

    config = t.Wav2Vec2Config(
        **SMALL, conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, num_labels=CLASSES, classifier_proj_size=8,
    )  # fmt: skip
    model = t.Wav2Vec2ForSequenceClassification(config)
    return model, {"input_values": torch.randn(BATCH, 200)}, torch.arange(BATCH), of_classes


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1)])
        self.norms = nn.ModuleList([nn.GroupNorm(2, 6), nn.GroupNorm(2, 8)])
        self.up, self.last = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(12, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = F.silu(self.norms[0](self.down[0](x)))
        two = F.silu(self.norms[1](self.down[1](one)))
        return self.last(torch.cat([one, self.up(two)], 1))


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten())
        self.scale = nn.Parameter(torch.ones(4 * 36))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return ((self.body(left) - self.body(right)) * self.scale).square().sum(1)


class Recurrent(nn.Module):
    """A recurrent network whose state is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.norm, self.start = (
            nn.Conv2d(5, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.Parameter(torch.ones(4, 1, 1)),
        )
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = self.start.expand(len(x), 4, *x.shape[-2:])
        for frame in x.unbind(1):
            state = torch.tanh(self.norm(self.cell(torch.cat([frame[:, None], state], 1))))
        return self.last(state.mean((2, 3)))


class Tied(nn.Module):
    """An auto-encoder whose decoder has the weights of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.code = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Linear(6 * 16, 8)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.code(torch.relu(self.encoder(x)).flatten(1)))
        back = F.linear(code, self.code.weight.mT).unflatten(1, (6, 4, 4))
        return F.conv_transpose2d(back, self.encoder.weight, self.bias, 2, 1, 1)


def unet() -> Case:
    targets = torch.randint(CLASSES, (BATCH, 8, 8))
    return UNet(), torch.randn(BATCH, 3, 8, 8), targets, of_classes


def siamese() -> Case:
    pair = {"left": torch.randn(BATCH, 3, 8, 8), "right": torch.randn(BATCH, 3, 8, 8)}
    return Siamese(), pair, torch.rand(BATCH), lambda out, y: (out - y).square().sum()


def recurrent() -> Case:
    return Recurrent(), torch.randn(BATCH, 4, 6, 6), torch.arange(BATCH), of_classes


def tied() -> Case:
    x = torch.randn(BATCH, 3, 8, 8)
    return Tied(), x, x, lambda out, y: (out - y).square().sum()


def ran(model: nn.Module, x: Any) -> Any:
    return model(**x) if isinstance(x, dict) else model(x)


def gradients(case: Case, those: slice) -> dict[str, Tensor]:
    model, x, y, loss = case
    part = {name: value[those] for name, value in x.items()} if isinstance(x, dict) else x[those]
    named = dict(model.named_parameters())
    value = loss(ran(model, part), y[those])
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


MODELS: dict[str, Callable[[], Case]] = {
    "resnet18": lambda: resnet("basic", [2, 2, 2, 2]),
    "resnet50": lambda: resnet("bottleneck", [3, 4, 6, 3]),
    "convnext": convnext,
    "mobilenet": mobilenet,
    "vit": vit,
    "swin": swin,
    "bert": bert,
    "gpt2": gpt2,
    "wav2vec2": wav2vec2,
    "unet": unet,
    "siamese": siamese,
    "recurrent": recurrent,
    "tied": tied,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of(name: str) -> None:
    case = MODELS[name]()
    model, x, y, loss = case
    model.eval()
    whole, found = gradients(case, slice(None)), per_example_gradients(model, loss, (x, y))
    norms = per_example_gradient_norms(model, loss, (x, y))
    clipped = clipped_gradients(model, loss, (x, y), 1e9, reduction="sum").gradients
    assert list(found) == list(norms) == list(clipped) == list(whole)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())

    def close(one: Tensor, two: Tensor) -> None:
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10 * largest)

    for key, gradient in whole.items():
        close(found[key].sum(0), gradient)
        close(clipped[key], gradient)
    for n in range(BATCH):
        for key, gradient in gradients(case, slice(n, n + 1)).items():
            close(norms[key][n], gradient.norm())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_every_parameter_of(name: str) -> None:
    """Diagonals are sums of squared gradients, and corrected eigenvalues keep the trace, for all parameters."""
    model, x, y, loss = MODELS[name]()
    model.eval()
    sum_of_examples: nn.Module = nn.CrossEntropyLoss(reduction="sum")
    if loss is of_tokens:
        sum_of_examples = TokenCrossEntropyLoss(reduction="sum", shift=True)
    elif loss is not of_classes:
        sum_of_examples, y = nn.MSELoss(reduction="sum"), torch.zeros_like(ran(model, x))
    elif name == "unet":
        y = torch.randint(CLASSES, (BATCH, *x.shape[2:]))
    factors = kfac(model, sum_of_examples, (x, y), fisher="empirical")
    squares = {n: g.square().sum(0) for n, g in per_example_gradients(model, sum_of_examples, (x, y)).items()}
    assert set(factors.shapes) == set(squares)
    diagonal = factors.diagonal()
    for block in factors.values():
        if not block.factored:
            torch.testing.assert_close(diagonal[block.names[0]], squares[block.names[0]], rtol=1e-10, atol=0)
    total = torch.stack([one.sum() for one in squares.values()]).sum()
    torch.testing.assert_close(
        ekfac(model, sum_of_examples, (x, y), factors, fisher="empirical").trace(), total, rtol=1e-10, atol=0
    )


def test_linear_layers_of_gpt2_have_the_factors_of_torchs() -> None:
    """`Conv1D` stores its weight as [inputs, outputs]."""
    from transformers.pytorch_utils import Conv1D

    def made(layer: nn.Module) -> nn.Module:
        class Mean(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).mean(1)

        return Mean(layer, nn.Tanh(), nn.Linear(5, 2))

    one, two = made(nn.Linear(3, 5)), made(Conv1D(5, 3))
    state = one.state_dict()
    two.load_state_dict(state | {"0.weight": state["0.weight"].T})
    loss, data = nn.CrossEntropyLoss(), (torch.randn(6, 4, 3), torch.randint(2, (6,)))
    for approx in ("expand", "reduce"):
        for bias in ("separate", "joint"):
            factors = [kfac(model, loss, data, approx=approx, bias=bias) for model in (one, two)]
            for name, block in factors[0].items():
                assert factors[1][name].factored
                torch.testing.assert_close(factors[1][name].A, block.A)
                torch.testing.assert_close(factors[1][name].B, block.B)
            vectors = {name: torch.randn(shape) for name, shape in factors[0].shapes.items()}
            turned = vectors | {"0.weight": vectors["0.weight"].T}
            solved = [f.inverse(0.1) @ v for f, v in zip(factors, (vectors, turned), strict=True)]
            torch.testing.assert_close(solved[1]["0.weight"].T, solved[0]["0.weight"])
    for quantity in (per_example_gradients, ggn_diagonal, hessian_diagonal):
        found = [quantity(model, loss, data) for model in (one, two)]
        torch.testing.assert_close(found[1]["0.weight"].mT, found[0]["0.weight"])
    optimizers = [KFAC(model, loss, lr=0.1, fisher="empirical") for model in (one, two)]
    for model, optimizer in zip((one, two), optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            loss(model(data[0]), data[1]).backward()
            optimizer.step()
    torch.testing.assert_close(two[0].weight.T, one[0].weight)
