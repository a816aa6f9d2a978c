"""The CNNs of the demo, with random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def resnet18() -> nn.Module:
    """ResNet-18: 3×3 convolutions, an initial 7×7 convolution, and 1×1 convolutions with stride 2 on the shortcuts."""
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"))


def convnext() -> nn.Module:
    """ConvNeXt-tiny: depthwise 7×7 convolutions, and 4×4 and 2×2 convolutions on non-overlapping patches."""
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(ConvNextConfig())


def mobilenet() -> nn.Module:
    """MobileNetV2: 1×1 convolutions and depthwise 3×3 convolutions with strides 1 and 2."""
    from transformers import MobileNetV2Config, MobileNetV2Model

    return MobileNetV2Model(MobileNetV2Config(tf_padding=False))


def inception() -> nn.Module:
    """The first layers of InceptionV3, and the branches of its blocks that split 7×7 kernels into 1×7 and 7×1."""
    start = [_unit(3, 32, 3, stride=2), _unit(32, 64, 3), nn.MaxPool2d(3, 2), _unit(64, 80, 1), _unit(80, 192, 3)]
    branch = [_unit(192, 128, 1), _unit(128, 128, (1, 7), padding=(0, 3)), _unit(128, 192, (7, 1), padding=(3, 0))]
    return nn.Sequential(*start, nn.MaxPool2d(3, 2), *branch, _unit(192, 320, 3, stride=2))


def tiny() -> nn.Module:
    """A few small convolutions, one per kind, for a quick run."""
    return nn.Sequential(
        _unit(3, 8, 3, padding=1),
        _unit(8, 8, 3, padding=1, groups=8),
        _unit(8, 16, 2, stride=2),
        _unit(16, 8, (1, 3), padding=(0, 1)),
        _unit(8, 8, 1, stride=2),
    )


def _unit(*arguments: object, **options: object) -> nn.Module:
    return nn.Sequential(nn.Conv2d(*arguments, **options, bias=False), nn.ReLU())  # type: ignore[arg-type]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "convnext": convnext,
    "inception": inception,
    "mobilenet": mobilenet,
    "tiny": tiny,
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A model in evaluation mode, with random weights that depend only on a seed."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        return MODELS[name]().eval()
    finally:
        torch.random.set_rng_state(state)
