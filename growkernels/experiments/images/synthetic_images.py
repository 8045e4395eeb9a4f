"""Generated images with labels, for runs without a data set: a shape filled with a grating.

An image shows one shape at a random place and size, on a background of colour gradients, stray
gratings and noise. Shape and grating direction name the class (beyond 20 classes, its hue as well);
brightness, contrast, spacing of the grating and everything else are drawn anew for every image. A
mirror image keeps its class.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from growkernels.experiments.images.folders import ImageData

DIRECTIONS = (0, 30, 60, 90)  # degrees, up to the sign: mirroring turns it
MAX_CLASSES = 200
STRAYS = 3
NOISE = 0.08
_CHUNK = 500  # images drawn at a time: bounds the memory


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(-y - 0.75, (y - 0.95) / 2 + x.abs())


# Each is negative inside, for coordinates in units of the shape's half size, y upwards.
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: x.hypot(y) - 0.9,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.8,
    "triangle": _triangle,
    "ring": lambda x, y: (x.hypot(y) - 0.75).abs() - 0.27,
    "cross": lambda x, y: torch.minimum(
        torch.maximum(x.abs() - 0.95, y.abs() - 0.35), torch.maximum(y.abs() - 0.95, x.abs() - 0.35)
    ),
}


def synthetic_images(
    train: int, test: int, generator: torch.Generator, *, size: int = 32, classes: int = 10
) -> ImageData:
    """Draw ``train`` and ``test`` images of ``size`` × ``size`` pixels in equally frequent classes.

    Equal ``generator`` (a CPU generator) states give equal images on one machine. ``name`` of what
    is returned begins with "synthetic".
    Raises ValueError for counts below ``classes``, ``classes`` outside 2 ... 200, ``size`` < 16.
    """
    if not 2 <= classes <= MAX_CLASSES:
        raise ValueError(f"classes is {classes}; synthetic images come in 2 to {MAX_CLASSES}.")
    if min(train, test) < classes:
        raise ValueError(
            f"{train} training and {test} test images cannot hold all {classes} classes; ask more."
        )
    if size < 16:
        raise ValueError(f"size is {size}; synthetic images need at least 16 pixels.")
    parts: list[Tensor] = []
    for count in (train, test):
        order = torch.randperm(count, generator=generator, device="cpu")
        labels = (torch.arange(count, device="cpu") % classes)[order]
        drawn = [_draw(part, classes, size, generator) for part in labels.split(_CHUNK)]
        parts += [torch.cat(drawn), labels]
    names = tuple(_class_name(label, classes) for label in range(classes))
    return ImageData(f"synthetic, {classes} classes", names, *parts)


def _hues(classes: int) -> int:
    return -(-classes // (len(SHAPES) * len(DIRECTIONS)))


def _class_name(label: int, classes: int) -> str:
    shape = list(SHAPES)[label % len(SHAPES)]
    hue = f", hue {label // 20}" if _hues(classes) > 1 else ""
    return f"{shape}, {DIRECTIONS[label % len(DIRECTIONS)]} degrees{hue}"


def _draw(labels: Tensor, classes: int, size: int, generator: torch.Generator) -> Tensor:
    """Images [len(labels), 3, size, size] uint8 of these classes."""
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator, device="cpu")

    axis = (torch.arange(size, device="cpu") + 0.5) / size * 2 - 1
    x, y = axis.view(1, 1, -1), -axis.view(1, -1, 1)
    # The background: one colour at the left end of a random axis, another at the right end.
    angle = uniform(0, 2 * math.pi, 1, 1)
    along = (x * angle.cos() + y * angle.sin()) / 2.9 + 0.5
    ends = uniform(0.15, 0.85, 2, 3, 1, 1)
    image = ends[:, 0] + (ends[:, 1] - ends[:, 0]) * along[:, None]
    softness = 2.0 / size  # edges are about a pixel wide

    def put(shape: Tensor, half: Tensor, direction: Tensor, hue: Tensor, contrast: Tensor) -> None:
        """Lay a grating in a shape over the image; all arguments [count]."""
        nonlocal image
        half, direction = half.view(-1, 1, 1), direction.view(-1, 1, 1)
        room = 1.05 - half
        left = (x - uniform(-1, 1, 1, 1) * room) / half
        up = (y - uniform(-1, 1, 1, 1) * room) / half
        distance = torch.stack([inside(left, up) for inside in SHAPES.values()])
        mask = torch.sigmoid(
            -2 * half / softness * distance[shape, torch.arange(count, device="cpu")]
        )
        waves = uniform(2.2, 4.0, 1, 1) * (1 if size < 48 else 1.5)
        mirrored = uniform(-1, 1, 1, 1).sign()
        phase = (left * direction.cos() + mirrored * up * direction.sin()) * waves * math.pi
        wave = torch.sin(phase + uniform(0, 2 * math.pi, 1, 1)) * contrast.view(-1, 1, 1)
        thirds = torch.arange(3, device="cpu").view(1, 3) / 3
        tint = 0.5 + 0.25 * torch.cos(2 * math.pi * (hue[:, None] - thirds))
        colour = tint[..., None, None] + wave[:, None]
        image = image + mask[:, None] * (colour - image)

    for _ in range(STRAYS):
        put(
            torch.randint(len(SHAPES), (count,), generator=generator, device="cpu"),
            uniform(0.12, 0.26),
            uniform(0, math.pi),
            uniform(0, 1),
            uniform(0.1, 0.35),
        )
    hues = _hues(classes)
    per_hue = len(SHAPES) * len(DIRECTIONS)
    hue = (labels // per_hue + uniform(-0.3, 0.3)) / hues if hues > 1 else uniform(0, 1)
    degrees = torch.tensor(DIRECTIONS, dtype=torch.float32, device="cpu")[labels % len(DIRECTIONS)]
    put(
        labels % len(SHAPES),
        uniform(0.5, 0.85),
        torch.deg2rad(degrees + uniform(-8, 8)),
        hue,
        uniform(0.16, 0.4),
    )
    noise = torch.randn(image.shape, generator=generator, device="cpu")
    return (255 * (image + NOISE * noise)).round_().clamp_(0, 255).to(torch.uint8)
