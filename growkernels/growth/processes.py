"""What several processes of torch.distributed decide together; with one, what that one decides.

Processes hold copies of one model, see different batches, and must take the same decisions: sums
are over all of them, choices are the first one's, and what fails on one fails on all, by the same
sentence, instead of leaving the others to wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

from torch import Tensor, distributed, nn

from growkernels.nn.wrappers import data_parallel_wrappers

T = TypeVar("T")
Group: TypeAlias = "distributed.ProcessGroup | None"

_RAISED = {error.__name__: error for error in (OSError, RuntimeError, TypeError, ValueError)}


class Ranks:
    """The processes of one group.

    Args:
        group: None: the default group, or this process alone where there is none.

    Raises:
        ValueError: this process is not in the group.
    """

    def __init__(self, group: Group = None) -> None:
        self.group = group
        self.several = distributed.is_available() and distributed.is_initialized()
        if self.several and distributed.get_rank(group) < 0:
            raise ValueError(
                "This process is not in the given group, so it has no part in the group's "
                "decisions; call on the group's own ranks alone."
            )

    @property
    def number(self) -> int:
        """How many they are."""
        return distributed.get_world_size(self.group) if self.several else 1

    @property
    def own(self) -> int:
        """Which of them this process is."""
        return distributed.get_rank(self.group) if self.several else 0

    def sum(self, values: Tensor) -> Tensor:
        """The same bits on every rank; `values` may be written to."""
        if self.several:
            values = values.contiguous()
            distributed.all_reduce(values, group=self.group)
        return values

    def gathered(self, value: T) -> list[T]:
        """Every rank's small value, in the order of ranks."""
        if not self.several:
            return [value]
        values: list[T | None] = [None] * self.number
        distributed.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    def first(self, value: int) -> int:
        """The first rank's number."""
        if not self.several:
            return value
        box = [value]
        distributed.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def take_first(self, *tables: dict[str, Tensor]) -> None:
        """The first rank's numbers everywhere: weights and rounding may differ, choices may not."""
        if self.several:
            for table in tables:
                for name, values in table.items():
                    table[name] = values.contiguous()
                    distributed.broadcast(table[name], group=self.group, group_src=0)

    @contextmanager
    def agreed(self, doing: str = "") -> Iterator[None]:
        """If the block raises on one rank, all raise that; it must hold no other collective.

        Args:
            doing: what is about to be done, which must be the same on all ranks.

        Raises:
            OSError, RuntimeError, TypeError, ValueError: the first failing rank's, the same on all
                (RuntimeError, where it is of none of these kinds); or RuntimeError: the ranks are
                about to do different things.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if not self.several:
                raise
            failure = error
        if not self.several:
            return
        own = None if failure is None else _kind_and_sentence(failure)
        told = self.gathered((own, doing))
        for rank, (failed, _) in enumerate(told):
            if failed is not None:
                kind = _RAISED[failed[0]]
                sentence = (
                    failed[1]
                    if failed[1].startswith("On rank ")
                    else (f"On rank {rank} of {self.number}: {failed[1]}")
                )
                raise kind(sentence) from failure
        for rank, (_, other) in enumerate(told):
            if other != told[0][1]:
                raise RuntimeError(
                    f"Rank 0 is about to {told[0][1]}, and rank {rank} to {other}: give all ranks "
                    "the same arguments, from scores that all have computed together."
                )


def _kind_and_sentence(failure: Exception) -> tuple[str, str]:
    """What travels to the other ranks, whose Python may not know the failure's own type."""
    for name, kind in _RAISED.items():
        if isinstance(failure, kind):
            return name, str(failure)
    return RuntimeError.__name__, f"{type(failure).__name__}: {failure}"


def ranks_of(model: nn.Module, group: Group = None) -> Ranks:
    """The given group's, or those that a DistributedDataParallel trains this model on.

    Raises:
        ValueError: none is given, and several wrappers of the model know different groups.
    """
    if group is not None:
        return Ranks(group)
    groups = {wrapper.process_group for wrapper in data_parallel_wrappers(model)}
    if len(groups) > 1:
        raise ValueError(
            "The model is in several DistributedDataParallel wrappers of different process groups; "
            "say by group= which of them decide together."
        )
    return Ranks(groups.pop() if groups else None)
