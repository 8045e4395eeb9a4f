"""The image studies' one loop: an epoch of training, and the test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.experiments import team

EVALUATION_BATCH = 500

Batch = tuple[Tensor, Tensor]


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    rate: Callable[[int], float] | None = None,
    autocast: bool = False,
    by_image: bool = False,
) -> float:
    """The mean loss over the batches, or over their images (``by_image``), in one read.

    ``batches`` are of inputs and targets (labels, or probabilities of classes). ``rate`` gives the
    learning rate of each step, counted from 0; None: it stays. ``autocast`` computes in bfloat16
    where torch holds that to be safe. Processes that have met (`team`) train one network together.
    """
    model.train()
    total = torch.zeros((), device=device)
    weights = 0
    with team.wrapped(model) as called:
        for step, (inputs, targets) in enumerate(batches):
            if rate is not None:
                for group in optimizer.param_groups:
                    group["lr"] = rate(step)
            optimizer.zero_grad(set_to_none=True)
            part, of_part, share = team.part_of(inputs, targets)
            loss = F.cross_entropy(logits_of(called, part, device, autocast), of_part)
            if share != 1:
                loss = loss * share
            loss.backward()
            optimizer.step()
            weight = len(inputs) if by_image else 1
            total += loss.detach() * weight
            weights += weight
    return team.mean(total).item() / weights


def logits_of(model: nn.Module, inputs: Tensor, device: torch.device, autocast: bool) -> Tensor:
    """As float32."""
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        logits: Tensor = model(inputs)
    return logits.float()


@dataclass(frozen=True)
class Test:
    """On all test images: mean loss, and how many were right at first, and among the first five."""

    loss: float
    right: int
    right_of_five: int
    images: int

    @property
    def accuracy(self) -> float:
        return 100 * self.right / self.images

    @property
    def accuracy_of_five(self) -> float:
        return 100 * self.right_of_five / self.images

    @property
    def error(self) -> float:
        return 100 * (self.images - self.right) / self.images


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, autocast: bool = False
) -> Test:
    model.eval()
    loss, first, five = (torch.zeros((), device=device) for _ in range(3))
    count = 0
    for inputs, labels in batches:
        logits = logits_of(model, inputs, device, autocast)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        first += hits[:, 0].sum()
        five += hits.sum()
        count += len(labels)
    return Test(loss.item() / count, int(first.item()), int(five.item()), count)


def in_batches(
    images: Tensor, labels: Tensor, prepare: Callable[[Tensor], Tensor]
) -> Iterator[Batch]:
    """Images and labels, in order, for `evaluate`."""
    parts = images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH)
    for part, its_labels in zip(*parts, strict=True):
        yield prepare(part), its_labels
