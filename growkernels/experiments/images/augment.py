"""Random crops and flips, and normalisation, of images that are tensors on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from growkernels.experiments.images.upload import upload

# Of CIFAR-10's training images, as the SensLI authors' data preparation has them.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2023, 0.1994, 0.2010)


def random_crop_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Shift every image by up to ``padding`` pixels each way (black moves in), mirror every second.

    Args:
        images: [N, C, H, W] of any dtype, on any device.
        generator: a CPU generator, so that the choice does not depend on the device.

    Returns:
        [N, C, H, W] in channels_last layout, same dtype and device.
    """
    count, _, height, width = images.shape
    draws = torch.randint(2 * padding + 1, (2, count), generator=generator, device="cpu")
    flips = torch.randint(2, (count,), generator=generator, device="cpu").bool()
    top, left = upload(draws, images.device)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(upload(flips, images.device)[:, None], columns.flip(0), columns)
    columns = columns + left[:, None]
    rows = torch.arange(height, device=images.device) + top[:, None]
    padded = F.pad(images, (padding, padding, padding, padding)).permute(0, 2, 3, 1)
    which = torch.arange(count, device=images.device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Normalise:
    """(images / 255 - mean) / std per channel, for images on one device.

    [N, C, H, W] uint8 becomes float32 in channels_last layout. ``mean`` and ``std`` [C] are in
    units where white is 1. They are moved to the device once: a copy per batch would make the
    host wait for a GPU.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        mean: tuple[float, ...] = CIFAR10_MEAN,
        std: tuple[float, ...] = CIFAR10_STD,
    ) -> None:
        self.shift = torch.tensor(mean, device=device).view(1, -1, 1, 1) * 255
        self.scale = torch.tensor(std, device=device).view(1, -1, 1, 1) * 255

    def __call__(self, images: Tensor) -> Tensor:
        values = images.to(torch.float32, memory_format=torch.channels_last)
        return values.sub_(self.shift).div_(self.scale)
