"""DeiT's training recipe: learning rate, parameter groups, and the batches of an epoch.

Touvron et al., arXiv 2012.12877. All random choices come from one generator per epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from growkernels.experiments.image_training import in_batches
from growkernels.experiments.images.augment import Normalise, random_crop_flip
from growkernels.experiments.images.folders import ImageData
from growkernels.experiments.images.mixing import (
    mixup_or_cutmix,
    random_erasing,
    random_resized_crop_flip,
    smoothed,
)
from growkernels.experiments.images.rand_augment import rand_augment
from growkernels.experiments.images.upload import upload
from growkernels.experiments.scaling.settings import Recipe

# Of ImageNet's training images, the usual values.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = (255 * MEAN[0], 255 * MEAN[1], 255 * MEAN[2])


def learning_rate(recipe: Recipe, epochs: int, epoch: float) -> float:
    """Linear warm-up, then a cosine from ``rate`` to ``final_rate`` over all epochs."""
    if epoch < recipe.warmup_epochs:
        return recipe.warmup_rate + (recipe.rate - recipe.warmup_rate) * (
            epoch / recipe.warmup_epochs
        )
    falling = 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    return recipe.final_rate + (recipe.rate - recipe.final_rate) * falling


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.AdamW:
    """AdamW; vectors, the class token and the positions are not decayed."""
    undecayed: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
        (undecayed if plain else decayed).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": undecayed, "weight_decay": 0.0},
            {"params": decayed, "weight_decay": recipe.weight_decay},
        ],
        lr=recipe.rate,
        fused=True,  # grown networks have hundreds of small parameters
    )


class Batches:
    """Augmented, normalised batches of training images, and plain ones of test images."""

    def __init__(self, data: ImageData, recipe: Recipe, image_size: int) -> None:
        self.data = data
        self.recipe = recipe
        self.image_size = image_size
        self.normalise = Normalise(data.train_images.device, MEAN, STD)

    def epoch_images(self) -> int:
        """How many images an epoch shows; its last batch is dropped where it would be smaller."""
        count = self.recipe.epoch_images or len(self.data.train_labels)
        batch = min(self.recipe.batch, count)
        return count // batch * batch

    def training(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of images [batch, 3, S, S] float32 and targets [batch, classes]."""
        recipe, count = self.recipe, self.epoch_images()
        distinct = -(-count // recipe.repeats)
        order = torch.randperm(len(self.data.train_labels), generator=generator, device="cpu")[
            :distinct
        ]
        order = order.repeat_interleave(recipe.repeats)[:count]
        for index in order.split(min(recipe.batch, count)):
            yield self._augmented(upload(index, self.data.train_labels.device), generator)

    def _augmented(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        recipe, size = self.recipe, self.image_size
        images = self.data.train_images[index]
        targets = smoothed(self.data.train_labels[index], len(self.data.classes), recipe.smoothing)
        if recipe.resized_crops:
            images = random_resized_crop_flip(images.float(), size, generator)
        else:
            images = random_crop_flip(images, generator, padding=size // 8)
        if recipe.rand_augment:
            images = rand_augment(images.float(), generator, FILL)
        images = self.normalise(images)
        if recipe.erasing:
            images = random_erasing(images, recipe.erasing, generator)
        if recipe.mixup and len(images) > 1:
            images, targets = mixup_or_cutmix(
                images, targets, generator, recipe.mixup, recipe.cutmix
            )
        return images, targets

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The middle of every test image, and labels."""
        margin = (self.data.test_images.shape[-1] - self.image_size) // 2
        window = slice(margin, margin + self.image_size)
        return in_batches(
            self.data.test_images,
            self.data.test_labels,
            lambda images: self.normalise(images[:, :, window, window]),
        )
