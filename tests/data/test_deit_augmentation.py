"""RandAugment, crops, erasing and mixing do what their names say, to every image by itself."""

from __future__ import annotations

import colorsys

import numpy
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from growkernels.experiments.images.mixing import (
    mixup_or_cutmix,
    random_erasing,
    random_resized_crop_flip,
    smoothed,
)
from growkernels.experiments.images.rand_augment import OPERATIONS, rand_augment, warp

FILL = torch.tensor([10.0, 20.0, 30.0]).view(1, 3, 1, 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photos(count: int = 4, size: int = 12) -> Tensor:
    return torch.randint(30, 226, (count, 3, size, size), generator=generator(7)).float()


def pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.byte().permute(1, 2, 0).numpy())


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float()


def operate(name: str, images: Tensor, level: float, sign: float = 1.0) -> Tensor:
    count = len(images)
    return OPERATIONS[name](images, torch.full((count,), level), torch.full((count,), sign), FILL)


def test_posterize_solarize_and_invert_agree_with_pillow() -> None:
    images = photos()
    for image, poster, solar, inverted in zip(
        images,
        operate("posterize", images, 0.5),
        operate("solarize", images, 0.5),
        operate("invert", images, 0.5),
        strict=True,
    ):
        assert torch.equal(poster, tensor(ImageOps.posterize(pillow(image), 2)))
        assert torch.equal(solar, tensor(ImageOps.solarize(pillow(image), 128)))
        assert torch.equal(inverted, tensor(ImageOps.invert(pillow(image))))


def test_contrast_is_stretched_and_values_are_spread_evenly() -> None:
    images = photos()
    for image, stretched in zip(images, operate("auto contrast", images, 1), strict=True):
        expected = tensor(ImageOps.autocontrast(pillow(image)))
        assert (stretched - expected).abs().max() <= 1
    even = operate("equalize", images, 1)
    assert even.amin() == 0
    assert even.amax() == 255
    # Ranks stay, and the values are close to uniform: 144 pixels in a channel.
    flat, before = even[0, 0].flatten(), images[0, 0].flatten()
    assert torch.equal(flat[before.argsort(stable=True)], flat.sort().values)
    assert (flat.sort().values - torch.linspace(0, 255, 144)).abs().max() < 12
    grey = torch.full((1, 3, 4, 4), 77.0)
    for name in ("auto contrast", "equalize"):
        assert torch.equal(operate(name, grey, 1), grey)


def test_colour_operations_move_away_from_grey_black_and_mean() -> None:
    images = photos()
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    grey = (images * weights).sum(1, keepdim=True)
    less = operate("saturation", images, 0.5, -1)
    torch.testing.assert_close(less - grey, 0.55 * (images - grey))
    assert colorsys.rgb_to_hsv(*(less[0, :, 0, 0] / 255).tolist())[0] == pytest.approx(
        colorsys.rgb_to_hsv(*(images[0, :, 0, 0] / 255).tolist())[0], abs=1e-4
    )
    darker = operate("brightness", images, 1.0, -1)
    torch.testing.assert_close(darker, 0.1 * images)
    flatter = operate("contrast", images, 0.5, -1)
    mean = grey.mean((1, 2, 3)).view(-1, 1, 1, 1)
    torch.testing.assert_close(flatter, mean + 0.55 * (images - mean))
    smoother = operate("sharpness", images, 0.5, -1)
    assert torch.equal(smoother[:, :, 0], images[:, :, 0])
    rough = [
        (x[:, :, 1:-1, 2:-1] - x[:, :, 1:-1, 1:-2]).square().mean() for x in (images, smoother)
    ]
    assert rough[1] < rough[0]


def test_shapes_are_moved_and_what_is_uncovered_is_filled() -> None:
    images = photos(size=20)
    moved = operate("translate x", images, 0.5)  # 0.5 * 0.45 of 20 pixels: 4.5
    torch.testing.assert_close(
        moved[:, :, :, :15], (images[:, :, :, 4:19] + images[:, :, :, 5:20]) / 2
    )
    assert torch.allclose(moved[:, :, :, 16:], FILL.expand(4, 3, 20, 4))
    quarter = torch.tensor([[[0.0, -1, 0], [1, 0, 0]]]).expand(4, 2, 3)
    torch.testing.assert_close(
        warp(images, quarter, FILL), torch.rot90(images, 1, (2, 3)), rtol=1e-4, atol=1e-2
    )
    for name in ("rotate", "shear x", "shear y", "translate y"):
        torch.testing.assert_close(operate(name, images, 0.0), images, rtol=1e-4, atol=1e-2)
        assert (operate(name, images, 1.0) - images).abs().amax((1, 2, 3)).min() > 10


def test_rand_augment_changes_images_in_their_own_ways_and_repeats_with_its_generator() -> None:
    same = photos(1).expand(64, -1, -1, -1)
    first, again, other = (
        rand_augment(same.clone(), generator(seed), (1.0, 2.0, 3.0)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    unchanged = (first == same).flatten(1).all(1)
    assert 5 < int(unchanged.sum()) < 32  # a quarter, by chance
    assert len({image.numpy().tobytes() for image in first}) > 30


def test_a_resized_crop_of_the_whole_is_the_image_or_its_mirror() -> None:
    images = photos(16)
    whole = random_resized_crop_flip(images, 12, generator(), area=(1, 1), ratio=(1, 1))
    mirrored = 0
    for image, result in zip(images, whole, strict=True):
        flipped = torch.allclose(result, image.flip(-1), atol=1e-3)
        assert flipped or torch.allclose(result, image, atol=1e-3)
        mirrored += flipped
    assert 2 < mirrored < 14


def test_resized_crops_show_windows_of_the_share_and_shape_asked_for() -> None:
    rows = torch.arange(32.0).view(1, 1, 32, 1).expand(200, 1, 32, 32)
    images = torch.cat((rows, rows.mT), dim=1)
    crops = random_resized_crop_flip(images, 16, generator(), area=(0.25, 0.5))
    # The step between neighbours is the window's side over the crop's.
    tall = (crops[:, 0, 8, 8] - crops[:, 0, 7, 8]).abs() / 2
    wide = (crops[:, 1, 8, 8] - crops[:, 1, 8, 7]).abs() / 2
    assert 0.24 < (tall * wide).min() < 0.3
    assert 0.45 < (tall * wide).max() < 0.51
    assert 0.74 < (wide / tall).min() < 0.85
    assert 1.2 < (wide / tall).max() < 1.34
    assert crops[:, 0].amin() >= 0
    assert crops[:, 0].amax() <= 31


def test_erasing_overwrites_one_rectangle_by_noise() -> None:
    images = torch.full((400, 3, 16, 16), 100.0)
    erased = random_erasing(images.clone(), 0.25, generator())
    changed = (erased != images).any(1)
    hit = changed.flatten(1).any(1)
    assert 70 < int(hit.sum()) < 130
    for mask in changed[hit]:
        rows, columns = mask.any(1), mask.any(0)
        assert int(mask.sum()) == int(rows.sum()) * int(columns.sum())
        assert int(mask.sum()) <= 0.42 * 256
    noise = erased[(erased != images)]
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05


def test_mixing_shares_images_and_targets_alike() -> None:
    # Image i has value i everywhere, so that mixtures can be read off.
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 20, 20)
    targets = smoothed(torch.arange(6), 6, 0.0)
    kinds = set()
    for seed in range(20):
        mixed, mixed_targets = mixup_or_cutmix(images, targets, generator(seed))
        assert mixed_targets.sum(1).allclose(torch.ones(6))
        shown = mixed.mean((1, 2, 3))
        expected = mixed_targets @ torch.arange(6.0)
        torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-4)
        values = mixed[0].unique()
        kinds.add("mixup" if len(values) == 1 else "cutmix")
    assert kinds == {"mixup", "cutmix"}
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        mixup_or_cutmix(images, targets, generator(), 2.0, 2.0)


def test_shares_of_mixup_follow_the_beta_distribution() -> None:
    targets = smoothed(torch.arange(2), 2, 0.0)
    image = torch.zeros(2, 1, 1, 1)
    draws = generator(3)
    shares = torch.tensor(
        [float(mixup_or_cutmix(image, targets, draws, 0.8, 0.8)[1][0, 0]) for _ in range(800)]
    )
    shares = shares[(shares != 0) & (shares != 1)]  # one pixel: CutMix takes all or nothing
    assert abs(float(shares.mean()) - 0.5) < 0.05
    assert abs(float(shares.var()) - 1 / (4 * (2 * 0.8 + 1))) < 0.01


def test_smoothed_targets_are_probabilities() -> None:
    targets = smoothed(torch.tensor([2, 0]), 4, 0.1)
    torch.testing.assert_close(targets[0], torch.tensor([0.025, 0.025, 0.925, 0.025]))
    torch.testing.assert_close(targets.sum(1), torch.ones(2))
