"""Photographs that the scikit-image package contains, which need no download."""

from __future__ import annotations

import numpy as np

PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "retina",
    "hubble_deep_field",
    "immunohistochemistry",
    "stereo_motorcycle",
)


def photograph(name: str, size: int) -> np.ndarray:
    """One photograph: its central square, scaled to [3, size, size], each channel with mean 0 and deviation 1."""
    from skimage import data
    from skimage.transform import resize

    loaded = getattr(data, name)()
    picture = loaded[0] if isinstance(loaded, tuple) else loaded  # a stereo pair and its disparities
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = resize(picture[top : top + side, left : left + side, :3], (size, size), anti_aliasing=True)
    channels = np.moveaxis(np.asarray(square, np.float32), -1, 0)
    mean, deviation = channels.mean((1, 2), keepdims=True), channels.std((1, 2), keepdims=True)
    return (channels - mean) / np.maximum(deviation, 1e-6)


def photographs(count: int, size: int) -> np.ndarray:
    """A batch of photographs [count, 3, size, size]; they repeat after the last one, mirrored every second time."""
    once = [photograph(name, size) for name in PHOTOGRAPHS[:count]]
    batch = []
    for place in range(count):
        round_, at = divmod(place, len(PHOTOGRAPHS))
        picture = once[at] if round_ % 2 == 0 else once[at][:, :, ::-1]
        batch.append(np.roll(picture, 7 * (round_ // 2), axis=1))  # makes all images different
    return np.ascontiguousarray(np.stack(batch))
