"""Growth under DistributedDataParallel: every process decides alike, and the wrapper goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from growkernels.distributed.same_wrapper import initialise_again, release, why_not_again
from growkernels.growth.layer_insertion import LayerInsertion, Merits
from growkernels.growth.neuron_scaling import NeuronScaling, Selection
from growkernels.growth.processes import Group, Ranks, ranks_of
from growkernels.nn import convert
from growkernels.nn.convert import Conversion
from growkernels.nn.exchange import undone_on_error
from growkernels.nn.optimizers import Optimizers, as_one

T = TypeVar("T")
Driver = LayerInsertion | NeuronScaling


@contextmanager
def growing(
    wrapper: nn.Module,
    optimizer: Optimizers | None = None,
    *,
    group: Group = None,
    driver: Driver | None = None,
) -> Iterator[Growing]:
    """Record and grow a model that DistributedDataParallel trains; the wrapper stays in use.

    ::

        with gk.distributed.growing(ddp, optimizer) as g:
            for x, y in batches:                      # each rank its own
                with g.recording():
                    loss_fn(ddp(x), y).backward()
            g.insert_best(tau=1.0)

    All ranks of the group do the same: the sums are over all of them, so merits and choices are
    those of one process that sees all batches. Ranks may record different numbers of batches
    (every batch counts the same), inside ``no_sync()`` and ``join()`` too; one at least each.
    Decisions and surgeries come after the ``join()``. What fails on one rank, a recording
    included, makes all raise the same sentence at the next decision, and nothing is changed.

    After a surgery the same wrapper object is initialised again with the arguments it had (process
    group, buckets, unused parameters, static graph, gradients as views, mixed precision, stateless
    communication hooks), so whatever holds it holds the grown model; what cannot be read from it,
    or cannot go along, is refused in a sentence before anything changes. Gradients that were
    accumulated stay; new parameters have none yet, so best grow between two optimizer steps.

    Args:
        wrapper: the DistributedDataParallel, or (for code that also runs in one process) a plain
            module.
        optimizer: the model's optimizer, or a list of all of them, or None.
        group: the processes that decide together; None: the wrapper's.
        driver: a LayerInsertion or NeuronScaling of the wrapped module or a part of it; None: a
            LayerInsertion with its defaults, closed at the end.

    Raises:
        TypeError: a compiled wrapper, or a model that a driver refuses.
        ValueError: a driver of another model.
    """
    growth = Growing(wrapper, optimizer, group, driver)
    try:
        yield growth
    finally:
        growth.close()


class Growing:
    """What ``growing`` gives.

    Attributes:
        wrapper: as given.
        model: the module in it.
    """

    def __init__(
        self,
        wrapper: nn.Module,
        optimizer: Optimizers | None,
        group: Group,
        driver: Driver | None,
    ) -> None:
        self.wrapper = wrapper
        if "_orig_mod" in wrapper._modules:
            raise TypeError("The wrapper is compiled; pass the one inside (compiled._orig_mod).")
        self.model = wrapper
        if isinstance(wrapper, DistributedDataParallel):
            self.model = wrapper.module
            group = group or wrapper.process_group
        self._ranks: Ranks = ranks_of(self.model, group)
        self._optimizer = as_one(optimizer)
        self._failure: Exception | None = None
        self._driver = driver
        self._own: LayerInsertion | None = None
        if driver is not None and all(m is not driver.model for m in self.model.modules()):
            raise ValueError(
                "The driver is of another model than the one in the wrapper, and of no part of it."
            )

    @property
    def driver(self) -> Driver:
        """Which records and selects."""
        if self._driver is None:
            self._driver = self._own = LayerInsertion(self.model, group=self._ranks.group)
        return self._driver

    def close(self) -> None:
        """Take the hooks of a driver that was not given off the model."""
        if self._own is not None:
            self._own.close()

    @contextmanager
    def recording(self, loss_scale: float = 1.0) -> Iterator[None]:
        """Record one batch, as the driver's ``recording`` does.

        With several processes a batch that cannot be recorded is reported by the next decision, on
        all of them: until then the others are busy with their own batches.
        """
        ran = False
        try:
            with self.driver.recording(loss_scale):
                yield
                ran = True
        except Exception as error:
            if not (ran and self._ranks.several):
                raise
            self._failure = self._failure or error

    def merits(self) -> Merits:
        """The merits over the batches that all ranks have recorded.

        Raises:
            TypeError: the driver is no LayerInsertion.
            Exception: what made a recording fail on any rank, on all of them.
        """
        inserter = self._inserter()
        self._agree_on_failures()
        return inserter.merits()

    def optimize_with(self, optimizer: Optimizers | None) -> None:
        """From now on surgeries edit this optimizer, or these."""
        self._optimizer = as_one(optimizer)

    def insert_best(
        self, tau: float | None = None, sample: Any = None, *, merits: Merits | None = None
    ) -> str | None:
        """Insert the layer with the largest merit; its position, or None where it is declined.

        Args:
            tau: the least ratio of that merit to the mean base-layer merit; None: any.
            sample: an input of the model to check the whole network with.
            merits: if they were asked for before.

        Raises:
            TypeError: the driver is no LayerInsertion; see also ``change``.
        """
        inserter = self._inserter()
        merits = merits or self.merits()
        if tau is None:
            position = inserter.select(merits)
        else:
            position = inserter.select(merits, "relative", tau)
        if position is not None:
            self.change(lambda _, optimizer: inserter.insert(position, optimizer, sample))
        return position

    def grow_best(
        self,
        budget: int,
        min_eligible: int = 60,
        *,
        init: str = "parent",
        scale: float = 0.2,
        sample: Any = None,
        tol: float = 1e-3,
    ) -> Selection:
        """Grow the neurons with the lowest scores that the budget pays for; which ones.

        Args:
            budget, min_eligible: see ``NeuronScaling.select``.
            init, scale, sample: see ``NeuronScaling.grow``.
            tol: of the scores.

        Raises:
            TypeError: the driver is no NeuronScaling; see also ``change``.
        """
        scaling = self.driver
        if not isinstance(scaling, NeuronScaling):
            raise TypeError("grow_best needs growing(..., driver=NeuronScaling(ddp.module)).")
        self._agree_on_failures()
        chosen = scaling.select(scaling.scores(tol=tol), budget, min_eligible)
        if chosen:
            self.change(
                lambda _, optimizer: scaling.grow(
                    chosen, optimizer, init=init, scale=scale, sample=sample
                )
            )
        return chosen

    def convert(self, plan: Mapping[str, int | float], init: str = "svd") -> Conversion:
        """Exchange layers for basis convolutions or back, as ``growkernels.nn.convert`` does.

        The first rank's weights become all ranks'.
        """
        return self.change(lambda model, optimizer: convert(model, plan, optimizer, init))

    def change(self, surgery: Callable[[nn.Module, Optimizer | None], T]) -> T:
        """Let any surgery, called with model and optimizer, happen on all ranks or on none.

        Raises:
            TypeError: a wrapper that cannot be initialised again.
            Exception: what the surgery raises on any rank, on all of them; nothing is changed.
        """
        wrapper = self.wrapper
        if not isinstance(wrapper, DistributedDataParallel):
            return self._on_all_or_none(surgery)
        with self._ranks.agreed():
            reason = why_not_again(wrapper)
            if reason is not None:
                raise TypeError(reason)
        release(wrapper)
        try:
            return self._on_all_or_none(surgery)
        finally:
            initialise_again(wrapper)

    def _on_all_or_none(self, surgery: Callable[[nn.Module, Optimizer | None], T]) -> T:
        results: list[T] = []
        with undone_on_error(self.model, self._optimizer), self._ranks.agreed():
            results.append(surgery(self.model, self._optimizer))
        return results[0]

    def _inserter(self) -> LayerInsertion:
        if not isinstance(self.driver, LayerInsertion):
            raise TypeError("Merits and insertions need a LayerInsertion as growing's driver.")
        return self.driver

    def _agree_on_failures(self) -> None:
        failure, self._failure = self._failure, None
        with self._ranks.agreed():
            if failure is not None:
                raise failure
