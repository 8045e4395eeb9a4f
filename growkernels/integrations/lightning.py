"""Growth inside Lightning's Trainer, by a callback."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from growkernels.growth import insertions, rebuild
from growkernels.integrations.growth_steps import GrowthSteps

KEY = "growkernels"  # of the records in a checkpoint


class Grow(pl.Callback):
    """Records around the trainer's own backward passes, and lets the model grow.

    ::

        grow = gk.integrations.lightning.Grow(gk.growth.Interval(warmup=100, every=50), tau=1.0)
        trainer = lightning.Trainer(callbacks=[grow], ...)

    All optimizers and schedulers of the module go on, in one process and under the strategy "ddp".
    The averaged model of Lightning's WeightAveraging callbacks, and ``copies``, grow along.
    Checkpoints hold the records, so that ``fit(..., ckpt_path=...)``, ``validate`` and ``test``
    make the module grow before they load them. For one backward pass per step, automatic
    optimization or not; sharded strategies are refused.

    Args: see ``growkernels.integrations.growth_steps.GrowthSteps``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.steps = GrowthSteps(*args, **kwargs)
        self._loss = math.inf
        self._step = 0  # the last one that ended

    @property
    def grown(self) -> list[int]:
        """The steps at which the model has grown."""
        return self.steps.grown

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the module grow when a checkpoint is about to be loaded into it.

        Callbacks hear of a checkpoint when the module's states have been loaded already.
        """
        loading = partial(self._load, trainer, pl_module, pl_module.on_load_checkpoint)
        pl_module.on_load_checkpoint = loading  # type: ignore[method-assign]

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_back(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_back(pl_module)
        self._step = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        wrapper = trainer.strategy.model
        assert isinstance(wrapper, nn.Module)
        self.steps.watch(wrapper, pl_module)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        self._loss = float(loss.detach())
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        self.steps.begin_pass(scale)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps.end_pass()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        copies = _averaged(trainer)
        loss = self._loss * trainer.accumulate_grad_batches
        self.steps.end_step(self._step, loss, pl_module, trainer.optimizers, copies)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.steps.abandon_pass()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._take_back(pl_module)
        self.steps.close(waiting=self.steps.waiting)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[KEY] = insertions(self.steps.part(pl_module))

    def state_dict(self) -> dict[str, Any]:
        return self.steps.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps.load_state_dict(state_dict)

    def _load(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, own: Any, checkpoint: Any
    ) -> None:
        records = checkpoint.get(KEY, [])
        for model in (pl_module, *_averaged(trainer), *self.steps.copies):
            part = self.steps.part(model)
            rebuild(part, records[len(insertions(part)) :])
        own(checkpoint)

    @staticmethod
    def _take_back(pl_module: pl.LightningModule) -> None:
        hook = vars(pl_module).get("on_load_checkpoint")
        if isinstance(hook, partial) and isinstance(getattr(hook.func, "__self__", None), Grow):
            del pl_module.on_load_checkpoint


def _averaged(trainer: Any) -> list[nn.Module]:
    """The copies that Lightning's WeightAveraging callbacks keep."""
    averaged = (vars(callback).get("_average_model") for callback in trainer.callbacks)
    return [model.module for model in averaged if isinstance(model, AveragedModel)]
