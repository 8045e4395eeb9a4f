"""What the processes of torch.distributed share; with one process, what that one has."""

from __future__ import annotations

from torch import Tensor, distributed


def several_processes() -> bool:
    """Whether this process is one of a default process group."""
    return distributed.is_available() and distributed.is_initialized()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The same bits on every rank; `values` may be written to."""
    if several_processes():
        values = values.contiguous()
        distributed.all_reduce(values)
    return values


def from_first_rank(value: int) -> int:
    """The first rank's number."""
    if not several_processes():
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def take_first_ranks(*tables: dict[str, Tensor]) -> None:
    """The first rank's numbers everywhere: weights and rounding may differ, choices may not."""
    if several_processes():
        for table in tables:
            for values in table.values():
                distributed.broadcast(values.contiguous(), src=0)
