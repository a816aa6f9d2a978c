"""The paper's three small CNNs: 3c3d and 2c2d as in DeepOBS, and All-CNN-C; and VGG-11 for small images.

The padding is uneven where TensorFlow's "same" padding is (3×3 max pooling and convolutions with stride 2).
"""

from __future__ import annotations

import torch
from torch import nn


def three_c_three_d(classes: int = 10) -> nn.Module:
    """3c3d for 3×32² images (CIFAR-10): three convolutions, three linear layers.

    Example:
        >>> import torch
        >>> from lensor_bench.nets import three_c_three_d
        >>> three_c_three_d()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    # For even sizes, ceil_mode is equivalent to "same": it adds one position on the right, which the maximum ignores.
    model = nn.Sequential(
        *(nn.Conv2d(3, 64, 5), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Conv2d(64, 96, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, classes)),
    )
    for module in model:
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            _fill(module.bias, 0.0)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            _fill(module.bias, 0.0)
    return model


def two_c_two_d(classes: int = 10) -> nn.Module:
    """2c2d for 1×28² images (Fashion-MNIST): two convolutions, two linear layers.

    Example:
        >>> import torch
        >>> from lensor_bench.nets import two_c_two_d
        >>> two_c_two_d()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 1024), nn.ReLU(), nn.Linear(1024, classes)),
    )
    for module in model:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.05, a=-0.1, b=0.1)
            _fill(module.bias, 0.05)
    return model


def all_cnn_c(classes: int = 100) -> nn.Module:
    """All-CNN-C for 3×32² images (CIFAR-100): nine convolutions; every padding is a separate module.

    Example:
        >>> import torch
        >>> from lensor_bench.nets import all_cnn_c
        >>> all_cnn_c()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """
    both, right = nn.ZeroPad2d(1), nn.ZeroPad2d((0, 1, 0, 1))
    model = nn.Sequential(
        nn.Dropout(0.2),
        *(both, nn.Conv2d(3, 96, 3), nn.ReLU()),
        *(both, nn.Conv2d(96, 96, 3), nn.ReLU()),
        *(right, nn.Conv2d(96, 96, 3, stride=2), nn.ReLU(), nn.Dropout(0.5)),
        *(both, nn.Conv2d(96, 192, 3), nn.ReLU()),
        *(both, nn.Conv2d(192, 192, 3), nn.ReLU()),
        *(right, nn.Conv2d(192, 192, 3, stride=2), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Conv2d(192, 192, 3), nn.ReLU()),
        *(nn.Conv2d(192, 192, 1), nn.ReLU()),
        *(nn.Conv2d(192, classes, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    for module in model:
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            _fill(module.bias, 0.1)
    return model


def vgg11(classes: int = 10) -> nn.Module:
    """VGG-11 for 3×64² images (other sizes from 32 on are pooled to 2²), without normalisation and dropout.

    Example:
        >>> import torch
        >>> from lensor_bench.nets import vgg11
        >>> vgg11()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    layers: list[nn.Module] = []
    channels = 3
    for widths in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    model = nn.Sequential(
        *layers,
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()),
        nn.Linear(512, classes),
    )
    for module in model:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            _fill(module.bias, 0.0)
    return model


def _fill(bias: torch.Tensor | None, value: float) -> None:
    if bias is not None:
        nn.init.constant_(bias, value)
