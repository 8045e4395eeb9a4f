"""What DeiT's recipe does to a batch besides RandAugment: crops, erasing, mixup and CutMix.

All draws come from a CPU generator, so that they do not depend on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from growkernels.experiments.images.upload import upload

ATTEMPTS = 10  # to draw a rectangle that fits


def random_resized_crop_flip(
    images: Tensor,
    size: int,
    generator: torch.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """A random rectangle of every image, stretched to ``size`` × ``size``; every second mirrored.

    Inception's crop (Szegedy et al. 2015): the share of the area is uniform in ``area``, the
    logarithm of width / height in that of ``ratio``; bilinear. The whole image where no rectangle
    fits.

    Args:
        images: [N, C, H, W] floating point, on any device.

    Returns:
        [N, C, size, size], same dtype and device.
    """
    count, _, height, width = images.shape
    shape = (ATTEMPTS, count)
    areas = area[0] + (area[1] - area[0]) * torch.rand(shape, generator=generator, device="cpu")
    low, high = (math.log(r) for r in ratio)
    ratios = (low + (high - low) * torch.rand(shape, generator=generator, device="cpu")).exp()
    # Sides as shares of the image's.
    wide = (areas * ratios * height / width).sqrt()
    tall = (areas / ratios * width / height).sqrt()
    fits = (wide <= 1) & (tall <= 1)
    chosen = fits.byte().argmax(0, keepdim=True)
    wide, tall = (
        torch.where(fits.any(0), side.gather(0, chosen)[0], torch.ones(count, device="cpu"))
        for side in (wide, tall)
    )
    draws = 2 * torch.rand((2, count), generator=generator, device="cpu") - 1
    left, top = draws[0] * (1 - wide), draws[1] * (1 - tall)
    mirror = 1 - 2.0 * torch.randint(2, (count,), generator=generator, device="cpu")
    zero = torch.zeros(count, device="cpu")
    rows = torch.stack((wide * mirror, zero, left, zero, tall, top), dim=1)
    maps = upload(rows.view(-1, 2, 3), images.device)
    grid = F.affine_grid(maps, [count, 1, size, size], align_corners=False).to(images.dtype)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def random_erasing(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Overwrite a rectangle of 2 to 33 % of the area by noise, in ``probability`` of the images.

    Zhong et al., "Random Erasing" (arXiv 1708.04896), every pixel of it a normal number of mean 0
    and variance 1, so the images are normalised ones, [N, C, H, W] on any device; changed in place.
    """
    count, _, height, width = images.shape
    areas = 0.02 + (1 / 3 - 0.02) * torch.rand(count, generator=generator, device="cpu")
    spread = math.log(1 / 0.3)
    ratios = ((2 * torch.rand(count, generator=generator, device="cpu") - 1) * spread).exp()
    tall = (areas * ratios).sqrt().clamp_max(1) * height
    wide = (areas / ratios).sqrt().clamp_max(1) * width
    top = torch.rand(count, generator=generator, device="cpu") * (height - tall)
    left = torch.rand(count, generator=generator, device="cpu") * (width - wide)
    # An image without a rectangle gets an empty one.
    tall = torch.where(
        torch.rand(count, generator=generator, device="cpu") < probability, tall, -1.0
    )
    rows = torch.arange(height, device=images.device).view(1, -1, 1)
    columns = torch.arange(width, device=images.device).view(1, 1, -1)
    top, left, bottom, right = (
        edge.view(-1, 1, 1)
        for edge in upload(torch.stack((top, left, top + tall, left + wide)).round(), images.device)
    )
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    noise_generator = torch.Generator(images.device).manual_seed(seed)
    noise = torch.randn(
        images.shape, generator=noise_generator, device=images.device, dtype=images.dtype
    )
    return torch.where(inside[:, None], noise, images)


def mixup_or_cutmix(
    images: Tensor,
    targets: Tensor,
    generator: torch.Generator,
    mixup: float = 0.8,
    cutmix: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mix every image with the one opposite in the batch, one way and one share for all of them.

    With equal chances the batch is blended (mixup, arXiv 1710.09412) or gets a rectangle of its
    partner (CutMix, arXiv 1905.04899). The share is drawn from Beta(a, a), a = ``mixup`` or
    ``cutmix``.

    Args:
        images: [N, C, H, W] on any device.
        targets: [N, classes] probabilities.

    Returns:
        Mixed images and targets, new tensors.

    Raises:
        ValueError: an ``a`` outside (0, 1].
    """
    blended = bool(torch.rand((), generator=generator, device="cpu") < 0.5)
    share = _beta(mixup if blended else cutmix, generator)
    if blended:
        return images.lerp(images.flip(0), 1 - share), targets.lerp(targets.flip(0), 1 - share)
    height, width = images.shape[2:]
    side = math.sqrt(1 - share)
    middle = torch.rand(2, generator=generator, device="cpu").tolist()
    (top, bottom), (left, right) = (
        (
            round(max(0.0, centre * length - side * length / 2)),
            round(min(length, centre * length + side * length / 2)),
        )
        for centre, length in zip(middle, (height, width), strict=True)
    )
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    exchanged = (bottom - top) * (right - left) / (height * width)
    return mixed, targets.lerp(targets.flip(0), exchanged)


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Targets [N, classes]: 1 - smoothing on the label [N], smoothing shared out evenly."""
    return F.one_hot(labels, classes).float().mul_(1 - smoothing).add_(smoothing / classes)


def _beta(a: float, generator: torch.Generator) -> float:
    """A draw from Beta(a, a): Jöhnk's method (Devroye, Non-Uniform Random Variate Generation)."""
    if not 0 < a <= 1:
        raise ValueError(f"The parameter of mixing is {a}; it must be in (0, 1].")
    while True:
        x, y = (
            torch.rand(2, generator=generator, dtype=torch.float64, device="cpu") ** (1 / a)
        ).tolist()
        if 0 < x + y <= 1:
            return float(x / (x + y))
