"""Trains one variant of the study from one start, epoch by epoch, growing when it is due.

Variants that grow start as the reduced network, so up to the first growth they are the reduced
network: that stretch, the *trunk*, is trained once per run and every grown variant continues it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.data.images import ImageData
from growkernels.experiments.scaling.growing import grow
from growkernels.experiments.scaling.history import Epoch, GrowthStep, History
from growkernels.experiments.scaling.recipe import Batches, build_optimizer, learning_rate
from growkernels.experiments.scaling.settings import Setting, Variant
from growkernels.experiments.seeds import seeded
from growkernels.growth import insertions, rebuild
from growkernels.growth.neuron_scaling import forward_flops
from growkernels.models.deit import DeiT, deit
from growkernels.timing import now

# What a generator is for, so that no two draw the same numbers.
INITIAL_VALUES, TRAINING, DROPPED_PATHS, GROWTH_BATCHES, GROWTH_CHOICE = range(5)
DEIT_S_WIDTH = 384


class ScalingRun:
    """One variant in one run, with a state that can be saved and restored.

    All randomness is a function of (the setting's seed, run, epoch), the same for every variant,
    so a restored run continues exactly as it would have, and variants differ in nothing but what
    is compared.
    """

    def __init__(
        self, setting: Setting, variant: Variant, run: int, data: ImageData, device: str = "cpu"
    ) -> None:
        self.setting = setting
        self.variant = variant
        self.run = run
        self.device = torch.device(device)
        self.batches = Batches(data, setting.recipe, setting.architecture.image_size)
        self.classes = len(data.classes)
        self.model = self._new_model()
        self.optimizer = build_optimizer(setting.recipe, self.model)
        self.history = History(self._flops())

    @property
    def epoch(self) -> int:
        return len(self.history.epochs)

    @property
    def done(self) -> bool:
        return self.epoch == self.setting.epochs

    def step(self) -> None:
        """One epoch: a growth if it is due, then training and test."""
        history, due = self.history, self.setting.growth_epochs(self.variant)
        if self.epoch in due:
            grown = self._grow([e for e in due if e >= self.epoch])
            if grown is not None:
                history.growth.append(grown)
                history.flops = self._flops()
        started = now(self.device)
        loss = self._train_epoch()
        seconds = now(self.device) - started
        due_test = self.setting.tests_after(self.epoch)
        test_loss, top1, top5 = self._test() if due_test else (None, None, None)
        history.epochs.append(Epoch(loss, test_loss, top1, top5, self._parameters(), seconds))

    def _new_model(self) -> DeiT:
        architecture, recipe = self.setting.architecture, self.setting.recipe
        attention, hidden = architecture.widths(self.variant.start)
        model = deit(
            embed=architecture.embed,
            depth=architecture.depth,
            heads=architecture.heads,
            attention_width=attention,
            mlp_width=hidden,
            patch=architecture.patch,
            image_size=architecture.image_size,
            classes=self.classes,
            drop_path=recipe.drop_path,
            generator=seeded(self.setting.seed, self.run, INITIAL_VALUES),
        )
        # DeiT's standard deviation is made for its width of 384; signals keep their size in others.
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight *= (DEIT_S_WIDTH / architecture.embed) ** 0.5
        return model.to(self.device)

    def _parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _flops(self) -> int:
        """Of one image's forward pass."""
        side = self.setting.architecture.image_size
        return forward_flops(self.model, torch.zeros(1, 3, side, side, device=self.device))

    def _seeded(self, purpose: int) -> torch.Generator:
        return seeded(self.setting.seed, self.run, purpose, self.epoch)

    def _grow(self, remaining: list[int]) -> GrowthStep | None:
        """Spends this step's part of the parameters that are still missing.

        As in the authors' code it is proportional to the learning rate of the moment, here scaled
        such that all steps together reach the final size.
        """
        growth, recipe, setting = self.variant.growth, self.setting.recipe, self.setting
        assert growth is not None
        rates = [learning_rate(recipe, setting.epochs, epoch) for epoch in remaining]
        missing = target_parameters(setting, growth.share, self.classes) - self._parameters()
        self._start_training()
        batches = self.batches.training(self._seeded(GROWTH_BATCHES))
        return grow(
            self.model,
            self.optimizer,
            growth,
            list(islice(batches, setting.growth_batches)),
            F.cross_entropy,
            epoch=self.epoch,
            budget=round(missing * rates[0] / sum(rates)),
            rows=setting.growth_rows,
            eligible=setting.eligible,
            generator=self._seeded(GROWTH_CHOICE),
        )

    def _start_training(self) -> None:
        self.model.train()
        # Dropped paths come from the global generator.
        torch.manual_seed(self._seeded(DROPPED_PATHS).initial_seed())

    def _train_epoch(self) -> float:
        recipe = self.setting.recipe
        self._start_training()
        total = torch.zeros((), device=self.device)
        count = self.batches.epoch_images() // min(recipe.batch, self.batches.epoch_images())
        for number, (images, targets) in enumerate(self.batches.training(self._seeded(TRAINING))):
            rate = learning_rate(recipe, self.setting.epochs, self.epoch + number / count)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._loss(images, targets)
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
        return total.item() / count

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        with self._autocast():
            logits = self.model(images)
        return F.cross_entropy(logits.float(), targets)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @torch.no_grad()
    def _test(self) -> tuple[float, float, float]:
        """Mean loss, top-1 and top-5 accuracy in percent."""
        self.model.eval()
        loss, first, five = (torch.zeros((), device=self.device) for _ in range(3))
        count = 0
        for images, labels in self.batches.test():
            with self._autocast():
                logits = self.model(images).float()
            loss += F.cross_entropy(logits, labels, reduction="sum")
            hits = logits.topk(min(5, self.classes)).indices == labels[:, None]
            first += hits[:, 0].sum()
            five += hits.sum()
            count += len(labels)
        return loss.item() / count, 100 * first.item() / count, 100 * five.item() / count

    def state_dict(self) -> dict[str, Any]:
        """Everything :meth:`load_state_dict` needs; loads with ``weights_only=True``.

        A finished run keeps what it measured, not its weights.
        """
        state: dict[str, Any] = {"history": self.history.as_state()}
        if not self.done:
            state["model"] = self.model.state_dict()
            state["optimizer"] = self.optimizer.state_dict()
            state["insertions"] = insertions(self.model)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of this run, or from the trunk of a run that grows."""
        self.history = History.from_state(state["history"])
        if not self.done:
            self.model = self._new_model()
            self.optimizer = build_optimizer(self.setting.recipe, self.model)
            rebuild(self.model, state["insertions"], self.optimizer)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])


def target_parameters(setting: Setting, share: float, classes: int) -> int:
    """Parameters of a network ``share`` of the way from the reduced to the full size."""
    architecture = setting.architecture
    with torch.device("meta"):
        reduced, full = (
            sum(
                p.numel()
                for p in DeiT(
                    embed=architecture.embed,
                    depth=architecture.depth,
                    heads=architecture.heads,
                    attention_width=widths[0],
                    mlp_width=widths[1],
                    patch=architecture.patch,
                    image_size=architecture.image_size,
                    channels=3,
                    classes=classes,
                    drop_path=0.0,
                ).parameters()
            )
            for widths in (architecture.widths(0.0), architecture.widths(1.0))
        )
    return round(reduced + share * (full - reduced))
