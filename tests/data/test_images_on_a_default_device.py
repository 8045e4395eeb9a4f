"""Images and points are on the CPU, whatever torch's default device: here one without values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from growkernels.experiments.images.augment import random_crop_flip
from growkernels.experiments.images.mixing import (
    mixup_or_cutmix,
    random_erasing,
    random_resized_crop_flip,
)
from growkernels.experiments.images.rand_augment import rand_augment
from growkernels.experiments.images.spirals import spirals, split
from growkernels.experiments.images.synthetic_images import synthetic_images
from growkernels.experiments.seeds import seeded


@pytest.fixture
def meta() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)  # type: ignore[no-untyped-call]


def made() -> list[Tensor]:
    points = split(*spirals(20), seeded(2))
    data = synthetic_images(12, 6, seeded(3), size=16, classes=3)
    images = data.train_images.float()
    targets = torch.eye(len(data.classes), device="cpu")[data.train_labels]
    mixed, _ = mixup_or_cutmix(images, targets, seeded(4))
    return [
        *vars(points).values(),
        data.train_images,
        random_crop_flip(data.train_images, seeded(5)),
        random_resized_crop_flip(images, 16, seeded(6)),
        random_erasing(images.clone(), 0.5, seeded(7)),
        rand_augment(images.clone(), seeded(8), (1.0, 2.0, 3.0)),
        mixed,
    ]


def test_the_same_values_as_without_one(request: pytest.FixtureRequest) -> None:
    expected = made()
    request.getfixturevalue("meta")
    assert all(map(torch.equal, made(), expected))
