"""Generated images: reproducible, balanced, learnable, mirrored within their class."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from growkernels.experiments.images.synthetic_images import synthetic_images


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("size", "classes"), [(32, 10), (64, 25), (17, 2)])
def test_shapes_and_balance(size: int, classes: int) -> None:
    data = synthetic_images(3 * classes, 2 * classes, seeded(0), size=size, classes=classes)
    assert data.name.startswith("synthetic")
    assert len(set(data.classes)) == classes
    assert data.train_images.shape == (3 * classes, 3, size, size)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.bincount().tolist() == [3] * classes
    assert data.test_labels.bincount().tolist() == [2] * classes


def test_the_generator_decides_everything() -> None:
    first, again, other = (synthetic_images(40, 20, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.train_images, again.train_images)
    assert torch.equal(first.test_labels, again.test_labels)
    assert not torch.equal(first.train_images, other.train_images)
    assert not torch.equal(first.train_images[:20], first.test_images)


def grating_energy(images: Tensor) -> Tensor:
    """Fourier energy [N, 18] per direction (10 degrees each, up to the sign) of mid frequencies."""
    spectrum = torch.fft.fft2(images.float().mean(1)).abs().square()
    frequency = torch.fft.fftfreq(images.shape[-1])
    fy, fx = torch.meshgrid(frequency, frequency, indexing="ij")
    ring = (fx.hypot(fy) > 0.06) & (fx.hypot(fy) < 0.25)
    angle = torch.rad2deg(torch.atan2(fy.abs(), fx.abs()))
    bins = [(ring & ((angle // 10) == i)) for i in range(9)]
    return torch.stack([spectrum[:, b].mean(1) for b in bins], dim=1)


def test_classes_differ_in_more_than_chance_and_mirror_images_keep_theirs() -> None:
    data = synthetic_images(1200, 400, seeded(3), classes=4)
    features = grating_energy(data.train_images).log()
    means = torch.stack([features[data.train_labels == c].mean(0) for c in range(4)])

    def accuracy(images: Tensor) -> float:
        nearest = torch.cdist(grating_energy(images).log(), means).argmin(1)
        return (nearest == data.test_labels).double().mean().item()

    assert 0.4 < accuracy(data.test_images) < 0.98
    assert abs(accuracy(data.test_images.flip(3)) - accuracy(data.test_images)) < 0.05


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"train": 9, "test": 20}, "9 training and 20 test images cannot hold all 10"),
        ({"train": 300, "test": 300, "classes": 201}, "classes is 201"),
        ({"train": 30, "test": 30, "size": 8}, "size is 8"),
    ],
)
def test_bad_sizes_are_one_sentence(arguments: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        synthetic_images(generator=seeded(0), **arguments)
