"""Growth inside the Trainer of Hugging Face's transformers, by a callback."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import AutoConfig, PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from growkernels.growth import insertions, rebuild
from growkernels.growth.layer_insertion import config_before
from growkernels.integrations.growth_steps import GrowthSteps
from growkernels.nn.grown_layers import Branch
from growkernels.nn.wrappers import data_parallel_wrappers

KEY = "growkernels"  # of the records in a model's config, by the path of what has grown

M = TypeVar("M", bound=PreTrainedModel)


def from_pretrained(kind: type[M], folder: str | Path, **settings: Any) -> M:
    """``kind.from_pretrained``, for a model that has grown too.

    By itself transformers builds what the config says, and drops the weights of what has grown.
    Here the records in the config are repeated on what it built, before it loads all weights.
    Between the two transformers calls nothing of others but quantizers, which grown models are not
    fit for (docs/more_than_one_process.md says why); so this is a function.

    Args:
        kind: a model class, or one of the Auto classes.
        folder, settings: of ``kind.from_pretrained``.

    Raises:
        ValueError: weights that do not fit the model and its records.
    """
    config, settings = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **settings)
    mapping = getattr(kind, "_model_mapping", None)
    plain: Any = kind if mapping is None else mapping[type(config)]

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        for records in getattr(config, KEY, {}).values():
            config_before(config, records)
        plain.__init__(self, config, *args, **kwargs)
        for path, records in getattr(config, KEY, {}).items():
            rebuild(self.get_submodule(path), records)

    grown: Any = type(plain.__name__, (plain,), {"__init__": build, "__module__": plain.__module__})
    settings = {"config": config, **settings, "output_loading_info": True}
    model, told = grown.from_pretrained(folder, **settings)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told.get(problem) and getattr(config, KEY, {}):
            raise ValueError(
                f"The weights in {str(folder)!r} are not those of the model that its config and "
                f"records describe: {problem.replace('_', ' ')} {sorted(told[problem])[:3]}."
            )
    for branch in model.modules():
        if isinstance(branch, Branch):  # what is in no file was made on the meta device
            branch.set_outputs(branch.outputs, branch.index.device)
    model.__class__ = plain
    grown_model: M = model
    return grown_model


class Grow(TrainerCallback, ExportableState):
    """Records around the trainer's own backward passes, and lets the model grow.

    ::

        grow = gk.integrations.transformers.Grow(gk.growth.Interval(warmup=100, every=50), tau=1.0)
        trainer = transformers.Trainer(model, arguments, callbacks=[grow], ...)

    The optimizer and the scheduler go on, in one process and under DistributedDataParallel. The
    records are in the model's config, so ``from_pretrained`` of this module rebuilds a saved model.
    To resume, build the model by it from the checkpoint, and call
    ``trainer.train(resume_from_checkpoint=...)``. Sharded models are refused. The loss that a
    trigger sees is the last one that was logged.

    Args: see ``growkernels.integrations.growth_steps.GrowthSteps``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.steps = GrowthSteps(*args, **kwargs)

    @property
    def grown(self) -> list[int]:
        """The steps at which the model has grown."""
        return self.steps.grown

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _check_rebuilt(kwargs["model"])
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved:
            self.steps.load_state_dict(saved["attributes"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin(kwargs["model"], kwargs["optimizer"])

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.end_pass()
        self._begin(kwargs["model"], kwargs["optimizer"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.end_pass()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        loss = float(losses[-1]) if losses else math.inf
        if self.steps.end_step(state.global_step, loss, model, kwargs["optimizer"]):
            setattr(model.config, KEY, {self.steps.module: insertions(self.steps.part(model))})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.close(waiting=self.steps.waiting)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": self.steps.state_dict()}

    def _begin(self, model: nn.Module, optimizer: Any) -> None:
        scaler = getattr(optimizer, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        wrappers = data_parallel_wrappers(model) if self.steps.wants_a_pass else []
        self.steps.watch(next(iter(wrappers), model), model)
        self.steps.begin_pass(scale)


def _check_rebuilt(model: nn.Module) -> None:
    """Raise ValueError for a model that transformers has built without what it had grown by."""
    for path, records in getattr(model.config, KEY, {}).items():
        if len(insertions(model.get_submodule(path))) < len(records):
            raise ValueError(
                f"The model's config says that it has grown {len(records)} times, and the model "
                "has not: it comes from its class' own from_pretrained, which drops what has "
                "grown. Load it by growkernels.integrations.transformers.from_pretrained."
            )
