"""Tasks for training: images of packages, generated textures, and CIFAR-10 from the user's folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lensor_bench.cifar import cifar10

PICTURES = (
    *("astronaut", "brick", "camera", "chelsea", "clock", "coffee", "coins", "grass", "gravel", "hubble_deep_field"),
    *("immunohistochemistry", "moon", "page", "retina", "rocket", "text", "stereo_motorcycle", "cell"),
)
"""Photographs from the scikit-image package."""

_SIDE, _CROPS, _HELD_OUT = 32, 200, 50
_TEXTURES, _TEXTURE_SIDE = 20, 64


@dataclass(frozen=True)
class Task:
    """Images [n, channels, height, width] with labels, and a model.

    Args:
        train: inputs and labels for training.
        validate: inputs and labels for validation.
        model: function that creates the model.
    """

    train: tuple[Tensor, Tensor]
    validate: tuple[Tensor, Tensor]
    model: Callable[[], nn.Module]


def _digits() -> Task:
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]

    def model() -> nn.Module:
        convolutions = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()]
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 10))

    return Task((x[:1400], y[:1400]), (x[1400:], y[1400:]), model)


def _cnn(classes: int) -> nn.Module:
    """A CNN for images of 32²."""
    layers: list[nn.Module] = []
    for c_in, c_out, stride in ((3, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2)):
        layers += [nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, classes))


def _crops() -> Task:
    from skimage import data

    draw = np.random.default_rng(0)
    parts: dict[bool, list[np.ndarray]] = {True: [], False: []}
    labels: dict[bool, list[int]] = {True: [], False: []}
    for label, name in enumerate(PICTURES):
        loaded = getattr(data, name)()
        picture = np.asarray(loaded[0] if isinstance(loaded, tuple) else loaded, np.float32)
        picture = np.repeat(picture[..., None], 3, 2) if picture.ndim == 2 else picture[..., :3]
        picture /= max(float(picture.max()), 1.0)
        cut = int(0.7 * picture.shape[1])
        for training, count, low, high in (
            (True, _CROPS, 0, cut - _SIDE),
            (False, _HELD_OUT, cut, picture.shape[1] - _SIDE),
        ):
            for _ in range(count):
                top, left = draw.integers(picture.shape[0] - _SIDE), draw.integers(low, high)
                parts[training].append(picture[top : top + _SIDE, left : left + _SIDE])
                labels[training].append(label)
    arrays = {key: torch.tensor(np.stack(crops)).movedim(-1, 1).contiguous() for key, crops in parts.items()}
    mean, deviation = arrays[True].mean((0, 2, 3), keepdim=True), arrays[True].std((0, 2, 3), keepdim=True)
    sets = [((arrays[key] - mean) / deviation, torch.tensor(labels[key])) for key in (True, False)]

    return Task(sets[0], sets[1], lambda: _cnn(len(PICTURES)))


def _textures() -> Task:
    """Noise with the spectrum of its class, in a random colour, turned and scaled, below noise of other spectra."""
    draw = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draw))

    spectra = [
        [(uniform(0.08, 0.2), uniform(0.0, math.pi), uniform(0.015, 0.035)) for _ in range(3)] for _ in range(_TEXTURES)
    ]
    vertical, horizontal = torch.fft.fftfreq(_TEXTURE_SIDE)[:, None], torch.fft.fftfreq(_TEXTURE_SIDE)[None]

    def filtered(channels: int, gain: Tensor) -> Tensor:
        noise = torch.randn(channels, _TEXTURE_SIDE, _TEXTURE_SIDE, generator=draw)
        found = torch.fft.ifft2(torch.fft.fft2(noise) * gain).real
        return found / found.std()

    def picture(label: int) -> Tensor:
        turn, zoom = uniform(-0.2, 0.2), uniform(0.85, 1.15)
        power = torch.zeros(_TEXTURE_SIDE, _TEXTURE_SIDE)
        for frequency, angle, width in spectra[label]:
            x, y = (zoom * frequency * one(angle + turn) for one in (math.cos, math.sin))
            for sign in (1, -1):
                distance = (horizontal - sign * x).square() + (vertical - sign * y).square()
                power += torch.exp(-distance / (2 * width**2))
        colour = 0.2 + 0.8 * torch.rand(3, 1, 1, generator=draw)
        smooth = filtered(3, 1 / (0.01 + (horizontal.square() + vertical.square()).sqrt()))
        return 0.6 * colour * filtered(1, power.sqrt()) + smooth + filtered(3, torch.ones(()))

    labels = torch.randint(_TEXTURES, (3600,), generator=draw)
    pictures = torch.stack([picture(label) for label in labels.tolist()])

    def model() -> nn.Module:
        layers: list[nn.Module] = []
        for c_in, c_out, size in ((3, 16, 5), (16, 32, 3), (32, 64, 3)):
            layers += [nn.Conv2d(c_in, c_out, size, 2, padding=size // 2), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, _TEXTURES))

    return Task((pictures[:3000], labels[:3000]), (pictures[3000:], labels[3000:]), model)


TASKS: Mapping[str, Callable[[], Task]] = {"digits": _digits, "crops": _crops, "textures": _textures}


def cifar_task(folder: Path) -> Task:
    """CIFAR-10: 45,000 images for training and 5,000 for validation, with the model of the crops.

    Raises:
        CommandError: if the folder does not contain CIFAR-10.
    """
    pictures, labels = (torch.from_numpy(one) for one in cifar10(folder))
    pictures = pictures.float() / 255
    mean, deviation = pictures.mean((0, 2, 3), keepdim=True), pictures.std((0, 2, 3), keepdim=True)
    x, cut = (pictures - mean) / deviation, len(pictures) * 9 // 10
    return Task((x[:cut], labels[:cut]), (x[cut:], labels[cut:]), lambda: _cnn(10))
