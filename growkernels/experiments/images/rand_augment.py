"""RandAugment for a batch of images that are tensors on any device.

Cubuk et al., "RandAugment" (arXiv 1909.13719), with the operations, the "increasing" strengths and
the spread of strengths that DeiT's recipe names rand-m9-mstd0.5-inc1. Every image has operations
of its own; those that got the same one are handled together. Interpolation is bilinear (the recipe
mixes bilinear and bicubic), and values are not rounded to bytes between operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from growkernels.experiments.images.upload import upload

LEVEL, LEVEL_STD, MAX_LEVEL = 9.0, 0.5, 10.0
LAYERS = 2  # operations drawn for every image, each applied with PROBABILITY
PROBABILITY = 0.5


def rand_augment(images: Tensor, generator: torch.Generator, fill: tuple[float, ...]) -> Tensor:
    """Distort every image in its own way.

    Args:
        images: [N, 3, H, W] floating point, 0 to 255, on any device; changed in place.
        generator: a CPU generator.
        fill: colour [3] of what moves in from outside, 0 to 255.

    Returns:
        ``images``.
    """
    names = list(OPERATIONS)
    colour = _constant(fill, images)
    for _ in range(LAYERS):
        count = len(images)
        which = torch.randint(len(names), (count,), generator=generator, device="cpu")
        used = torch.rand(count, generator=generator, device="cpu") < PROBABILITY
        levels = LEVEL + LEVEL_STD * torch.randn(count, generator=generator, device="cpu")
        levels = levels.clamp(0, MAX_LEVEL) / MAX_LEVEL
        signs = 2.0 * torch.randint(2, (count,), generator=generator, device="cpu") - 1
        groups = [((which == number) & used).nonzero()[:, 0] for number in range(len(names))]
        sizes = [len(group) for group in groups]
        index = torch.cat(groups)
        strengths = torch.stack((levels[index], signs[index])).to(images.dtype)
        there = upload(index, images.device).split(sizes)
        strength = upload(strengths, images.device).split(sizes, dim=1)
        for name, some, (level, sign) in zip(names, there, strength, strict=True):
            if len(some):
                images[some] = OPERATIONS[name](images[some], level, sign, colour)
    return images


# Each takes images [n, 3, H, W], strengths 0 ... 1 [n], signs [n] and the fill colour.
Operation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _constant(values: tuple[float, ...], images: Tensor) -> Tensor:
    """[1, channels, 1, 1], where and what the images are."""
    return upload(torch.tensor(values, dtype=images.dtype, device="cpu"), images.device).view(
        1, -1, 1, 1
    )


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _grey(images: Tensor) -> Tensor:
    weights = _constant((0.299, 0.587, 0.114), images)  # ITU-R 601 luma
    return (images * weights).sum(1, keepdim=True)


def _blend(base: Tensor, images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    factor = (1 + 0.9 * level * sign).clamp_min(0.1)
    return (base + _per_image(factor) * (images - base)).clamp(0, 255)


def _auto_contrast(images: Tensor, *_: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    stretched = (images - low) * (255 / (high - low).clamp_min(1))
    return torch.where(high > low, stretched, images)


def _equalize(images: Tensor, *_: Tensor) -> Tensor:
    """Each channel's values are replaced by their share of the pixels that are not brighter."""
    count, channels, height, width = images.shape
    levels = images.round().long().view(count * channels, -1)
    histogram = torch.zeros(count * channels, 256, device=images.device, dtype=torch.long)
    histogram.scatter_add_(1, levels, torch.ones_like(levels))
    share = histogram.cumsum(1).to(images.dtype) / (height * width)
    first = share.gather(1, levels.amin(1, keepdim=True))
    even = (share.gather(1, levels) - first) / (1 - first).clamp_min(1e-6)
    return torch.where(first < 1, 255 * even, levels.to(images.dtype)).view_as(images)


def _posterize(images: Tensor, level: Tensor, *_: Tensor) -> Tensor:
    step = _per_image(2.0 ** (8 - (4 - (4 * level).floor())))
    return (images / step).floor() * step


def _solarize(images: Tensor, level: Tensor, *_: Tensor) -> Tensor:
    return torch.where(images < _per_image(256 - (256 * level).floor()), images, 255 - images)


def _solarize_add(images: Tensor, level: Tensor, *_: Tensor) -> Tensor:
    lighter = (images + _per_image((110 * level).floor())).clamp_max(255)
    return torch.where(images < 128, lighter, images)


def _saturation(images: Tensor, level: Tensor, sign: Tensor, _: Tensor) -> Tensor:
    return _blend(_grey(images), images, level, sign)


def _contrast(images: Tensor, level: Tensor, sign: Tensor, _: Tensor) -> Tensor:
    return _blend(_grey(images).mean((2, 3), keepdim=True), images, level, sign)


def _brightness(images: Tensor, level: Tensor, sign: Tensor, _: Tensor) -> Tensor:
    return _blend(torch.zeros_like(images), images, level, sign)


def _sharpness(images: Tensor, level: Tensor, sign: Tensor, _: Tensor) -> Tensor:
    """Away from a smoothed copy (weights 1, and 5 in the middle), or towards it; not the border."""
    kernel = images.new_ones(3, 1, 3, 3)
    kernel[:, :, 1, 1] = 5
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel / 13, groups=3)
    return _blend(smooth, images, level, sign)


def _affine(
    matrix: Callable[[Tensor], tuple[Tensor, ...]],
) -> Operation:
    """``matrix`` gives the six entries, row by row, of the map from new to old coordinates."""

    def apply(images: Tensor, level: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
        entries = matrix(level * sign)
        return warp(images, torch.stack(entries, dim=1).view(-1, 2, 3), fill)

    return apply


def warp(images: Tensor, maps: Tensor, fill: Tensor) -> Tensor:
    """Bilinear; ``maps`` [n, 2, 3] takes new to old coordinates, both from -1 to 1 over the image.

    What lies outside is ``fill``, which broadcasts against the images.
    """
    grid = F.affine_grid(maps.float(), list(images.shape), align_corners=False).to(images.dtype)
    moved = F.grid_sample(images - fill, grid, align_corners=False)
    return moved + fill


def _rotation(amount: Tensor) -> tuple[Tensor, ...]:
    angle, zero = amount * math.radians(30), torch.zeros_like(amount)
    return angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero


def _maps(**entries: float) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The identity plus these entries times the amount."""

    def matrix(amount: Tensor) -> tuple[Tensor, ...]:
        one, zero = torch.ones_like(amount), torch.zeros_like(amount)
        identity = {"xx": one, "xy": zero, "x": zero, "yx": zero, "yy": one, "y": zero}
        return tuple(v + amount * entries.get(k, 0.0) for k, v in identity.items())

    return matrix


# TranslateRel moves by up to 0.45 of the image, which is 0.9 in coordinates from -1 to 1.
OPERATIONS: dict[str, Operation] = {
    "auto contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": lambda images, *_: 255 - images,
    "rotate": _affine(_rotation),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize add": _solarize_add,
    "saturation": _saturation,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear x": _affine(_maps(xy=0.3)),
    "shear y": _affine(_maps(yx=0.3)),
    "translate x": _affine(_maps(x=0.9)),
    "translate y": _affine(_maps(y=0.9)),
}
