"""Training with basis convolutions in only some of the epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from growkernels.nn import BasisConv2d, Conversion, convert

ORDERS = ("basis_first", "full_first", "none")


@dataclass(frozen=True)
class SkipSchedule:
    """Which epochs train basis convolutions and which full kernels.

    ::

        schedule = SkipSchedule("full_first", switch_epoch=5)
        for epoch in range(epochs):
            schedule.switch(epoch, model, plan, optimizer)
            train_one_epoch(model, optimizer)

    The form is a function of the epoch alone. To resume, build the model, call ``switch`` with the
    epoch to go on with (or the last finished one, if the checkpoint was written before that
    epoch's switch), then load the states.

    Args:
        order: ``"basis_first"``: basis convolutions before ``switch_epoch``, full kernels from
            there on. ``"full_first"``: the other way round. ``"none"``: basis convolutions in all
            epochs. (Alekseev et al., arXiv 2408.06024, train with "skipping"; which order they
            mean is not clear, hence both.)
        switch_epoch: the first epoch, counted from 0, in the other form.

    Raises:
        ValueError: an unknown order, a negative epoch, or an epoch for ``"none"``.
    """

    order: str
    switch_epoch: int = 0

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"Unknown order {self.order!r}; choose one of {', '.join(ORDERS)}.")
        if self.switch_epoch < 0:
            raise ValueError(f"switch_epoch is {self.switch_epoch}; epochs are counted from 0.")
        if self.order == "none" and self.switch_epoch != 0:
            raise ValueError(
                f"switch_epoch is {self.switch_epoch}, but order 'none' never switches; leave it "
                "out or choose another order."
            )

    def basis_in(self, epoch: int) -> bool:
        """Whether this epoch trains basis convolutions."""
        if self.order == "none":
            return True
        return (epoch < self.switch_epoch) == (self.order == "basis_first")

    def switch(
        self,
        epoch: int,
        model: nn.Module,
        plan: Mapping[str, int | float],
        optimizer: Optimizer | None = None,
    ) -> Conversion | None:
        """Before an epoch: give the plan's layers the form this epoch trains; None if they have it.

        To basis form the kernels are approximated (best of rank R); to full form the function stays
        the same to rounding. ``growkernels.nn.convert`` does it and says what becomes of the
        optimizer's state and what it raises; on an error nothing is changed.
        """
        wanted = self.basis_in(epoch)
        modules = dict(model.named_modules())
        pending: dict[str, int | float] = {}
        for path, filters in plan.items():
            layer = modules.get(path)
            if isinstance(layer, BasisConv2d) and not wanted:
                pending[path] = layer.out_channels
            elif not isinstance(layer, BasisConv2d) and wanted:
                pending[path] = filters
        return convert(model, pending, optimizer) if pending else None
