"""Epochs of SGD on images that lie on the device, and the test."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.data.augment import Normalise, random_crop_flip
from growkernels.data.images import ImageData
from growkernels.data.upload import upload
from growkernels.experiments.basis.settings import Recipe
from growkernels.models.resnet import resnet18

EVALUATION_BATCH = 500


class ImageTraining:
    """Training as a recipe says, ``epochs`` long, on the training images of ``data``."""

    def __init__(
        self, recipe: Recipe, epochs: int, data: ImageData, device: torch.device | str
    ) -> None:
        self.recipe = recipe
        self.epochs = epochs
        self.device = torch.device(device)
        self.data = data.to(self.device)
        self.normalise = Normalise(self.device)
        # A smaller last batch is left out, unless it is the only one.
        self.batch = min(recipe.batch, len(data.train_labels))
        self.steps_per_epoch = len(data.train_labels) // self.batch

    def new_network(self, generator: torch.Generator) -> nn.Module:
        """A dense ResNet-18 in channels_last layout."""
        model = resnet18(len(self.data.classes), width=self.recipe.width, generator=generator)
        model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def new_optimizer(self, model: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(
            model.parameters(),
            self.recipe.rate,
            self.recipe.momentum,
            weight_decay=self.recipe.weight_decay,
        )

    def train_epoch(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        generator: torch.Generator,
    ) -> float:
        """One pass over the images, cropped, mirrored and ordered by the generator; mean loss.

        ``epoch`` is counted from 0; it says where on its cosine the learning rate is.
        """
        images = random_crop_flip(self.data.train_images, generator, self.recipe.crop_padding)
        order = upload(torch.randperm(len(images), generator=generator), self.device)
        model.train()
        total = torch.zeros((), device=self.device)
        for step in range(self.steps_per_epoch):
            index = order[step * self.batch : (step + 1) * self.batch]
            for group in optimizer.param_groups:
                group["lr"] = self._rate(epoch * self.steps_per_epoch + step)
            optimizer.zero_grad(set_to_none=True)
            logits = self.logits(model, images[index])
            loss = F.cross_entropy(logits, self.data.train_labels[index])
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return total.item() / self.steps_per_epoch

    def _rate(self, step: int) -> float:
        progress = step / (self.epochs * self.steps_per_epoch)
        return self.recipe.rate * 0.5 * (1 + math.cos(math.pi * progress))

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Of images [N, 3, H, W] uint8, as float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.autocast):
            logits: Tensor = model(self.normalise(images))
        return logits.float()

    @torch.no_grad()
    def test(self, model: nn.Module) -> tuple[float, float]:
        """Mean loss and accuracy (%) on the test images."""
        model.eval()
        loss = torch.zeros((), device=self.device)
        right = torch.zeros((), device=self.device)
        for images, labels in zip(
            self.data.test_images.split(EVALUATION_BATCH),
            self.data.test_labels.split(EVALUATION_BATCH),
            strict=True,
        ):
            logits = self.logits(model, images)
            loss += F.cross_entropy(logits, labels, reduction="sum")
            right += (logits.argmax(1) == labels).sum()
        count = len(self.data.test_labels)
        return loss.item() / count, 100 * right.item() / count
