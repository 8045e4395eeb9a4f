"""What a growth did to the training: numbers of new against old parameters, step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkernels.growth.layer_insertion import Merits
from growkernels.growth.neuron_scaling import Scores
from growkernels.nn.new_entries import NewSince


class Monitor:
    """Logs every step of an optimizer into plain dicts of floats, for TensorBoard or any logger.

    ::

        monitor = gk.growth.Monitor(model, optimizer)      # before the growth
        ...
        loss.backward()
        optimizer.step()
        for name, value in monitor.values.items():
            writer.add_scalar(name, value, monitor.steps)

    New is what was not in the model when the monitor was made: parameters, and the new rows and
    columns of widened ones. The values after a step are

    * ``"gradient_norm/new"``, ``"gradient_norm/old"``: Frobenius norms of the gradients that the
      step used, over all entries that the optimizer holds; ``"gradient_rms/..."``: the same over
      the root of their number, which compares few entries with many.
    * ``"update_norm/..."``, ``"update_rms/..."``: the same of how the step changed the parameters.
    * ``"parameters/new"``, ``"parameters/old"``: how many entries.
    * ``"width/PATH"``: outputs of each linear layer and convolution that has another number of them
      than at first, or is new.
    * ``"merit/POSITION"``, ``"eigenvalue/LAYER"``, ``"score/LAYER"``, ``"eligible/LAYER"``: what
      was last given to ``note``.

    A step costs a copy of the parameters, which lives as long as the step.

    Args:
        model: as it is before the growth. It and the optimizer stay the caller's: the monitor puts
            hooks on the optimizer alone.
        optimizer: whose steps are logged.
        every: log one step in so many.

    Attributes:
        values: after the last logged step.
        history: all of them, in order, each with its ``"step"``.
        steps: how many steps the optimizer has made since.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, every: int = 1) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}; pass the model's torch.optim "
                "optimizer, whose steps shall be logged."
            )
        if every < 1:
            raise ValueError(f"every is {every}; log every step (1) or one in so many.")
        self.values: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.steps = 0
        self._model = model
        self._every = every
        self._noted: dict[str, float] = {}
        self._widths = widths(model)
        self._new = NewSince(model)
        self._before: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._begins),
            optimizer.register_step_post_hook(self._ended),
        ]

    def note(self, found: Merits | Scores) -> dict[str, float]:
        """Log a driver's ``merits()`` or ``scores()`` from the next step on, and return them.

        Of merits each position's; of scores each layer's lowest, and how many are eligible.

        Raises:
            TypeError: something else.
        """
        if isinstance(found, Merits):
            noted = {
                f"merit/{name}": value
                for name, value in zip(found.names, found.values.tolist(), strict=True)
            }
        elif isinstance(found, Scores):
            kind = "eigenvalue" if found.directions else "score"
            noted = {f"{kind}/{name}": float(v.min()) for name, v in found.values.items() if len(v)}
            noted |= {f"eligible/{name}": float((v < 0).sum()) for name, v in found.values.items()}
        else:
            raise TypeError(
                f"note() was given a {type(found).__name__}; pass what a driver's merits() or "
                "scores() returned."
            )
        kinds = {name.partition("/")[0] for name in noted}
        kept = {k: v for k, v in self._noted.items() if k.partition("/")[0] not in kinds}
        self._noted = {**kept, **noted}
        return noted

    def close(self) -> None:
        """Take the hooks off the optimizer; what was logged stays."""
        for handle in self._handles:
            handle.remove()
        self._before = []

    def _begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._before = []
        if self.steps % self._every == 0:
            self._before = [
                (parameter, parameter.detach().clone(), self._new.mask(parameter))
                for group in optimizer.param_groups
                for parameter in group["params"]
            ]

    @torch.no_grad()
    def _ended(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1
        if not self._before:
            return
        sums = {f"{what}/{age}": 0.0 for what in ("gradient", "update") for age in ("new", "old")}
        entries = {"new": 0, "old": 0}
        for parameter, before, mask in self._before:
            new = 0 if mask is None else int(mask.sum())
            entries["new"] += new
            entries["old"] += parameter.numel() - new
            for what, tensor in (("gradient", parameter.grad), ("update", parameter - before)):
                if tensor is None:
                    continue
                of_all, of_new = _squares(tensor), 0.0
                if mask is not None:
                    of_new = _squares(tensor[mask])
                sums[f"{what}/new"] += of_new
                sums[f"{what}/old"] += of_all - of_new if new < parameter.numel() else 0.0
        self._before = []
        self.values = {}
        for name, total in sums.items():
            what, age = name.split("/")
            self.values[f"{what}_norm/{age}"] = max(total, 0.0) ** 0.5
            self.values[f"{what}_rms/{age}"] = (max(total, 0.0) / max(entries[age], 1)) ** 0.5
        self.values.update({f"parameters/{age}": float(n) for age, n in entries.items()})
        for path, width in widths(self._model).items():
            if self._widths.get(path) != width:
                self.values[f"width/{path}"] = float(width)
        self.values.update(self._noted)
        self.history.append({"step": float(self.steps), **self.values})


def widths(model: nn.Module) -> dict[str, int]:
    """The number of outputs of every linear layer and convolution, by path."""
    return {
        path: len(module.weight)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def _squares(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
