"""Growth in more than one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from growkernels.distributed.growing import Growing, growing

if TYPE_CHECKING:
    from growkernels.distributed.regrowing import regrow

__all__ = ["Growing", "growing", "regrow"]


def __getattr__(name: str) -> Any:
    # torch's DTensor takes seconds to import, which those who do not shard need not wait for.
    if name == "regrow":
        from growkernels.distributed.regrowing import regrow

        return regrow
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
