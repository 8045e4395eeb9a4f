"""What a benchmark family declares: its cases as data, and the calls each case compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

OURS = "growkernels"

Call = Callable[[], object]
Ceiling = Literal["gemm", "copy"]


@dataclass(frozen=True)
class Workload:
    """The calls of one case, all on the same inputs.

    `calls` maps every variant's name to a function of no arguments. `flops` and `bytes` are the
    work and the compulsory memory traffic of one call of ours; they turn times into rates.
    `tolerance` is the relative difference up to which the variants' results count as equal.
    """

    calls: Mapping[str, Call]
    flops: float
    bytes: float
    tolerance: float


def while_torch_rounds(calls: Mapping[str, Call]) -> dict[str, Call]:
    """The same calls, each while torch may round float32 factors to bfloat16."""
    backends: Any = torch.backends  # torch's stubs do not know the setting
    matmul = backends.mkldnn.matmul

    def under_setting(call: Call) -> object:
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            return call()
        finally:
            matmul.fp32_precision = before

    return {name: partial(under_setting, call) for name, call in calls.items()}


@dataclass(frozen=True)
class Case:
    """One comparison. `opponents` are timed in this order, growkernels last, in every round.

    `ceiling` names what bounds the computation: "gemm" (floating-point rate of `dtype`), "copy"
    (memory rate), or None where launch overhead dominates and no ceiling means anything.
    `baseline` names an opponent on top of which the other variants do something extra; results
    then carry the share of the baseline's time that each of them adds. `seconds` is how long the
    rounds of a full run on a CPU last together, None for the usual time.
    """

    name: str
    shape: str
    dtype: torch.dtype
    layout: str
    direction: str
    opponents: tuple[str, ...]
    build: Callable[[torch.device], Workload]
    ceiling: Ceiling | None = None
    baseline: str | None = None
    seconds: float | None = None

    @property
    def variants(self) -> tuple[str, ...]:
        """All variants in the order in which a round times them."""
        return (*self.opponents, OURS)

    def prepare(self, device: torch.device) -> Workload:
        """Build the workload; raises ValueError where its calls are not the declared variants."""
        torch.compiler.reset()  # each case compiles afresh instead of meeting the recompile limit
        workload = self.build(device)
        if set(workload.calls) != set(self.variants):
            raise ValueError(
                f"case {self.name!r} declares the variants {sorted(self.variants)} but builds "
                f"{sorted(workload.calls)}; make the two agree"
            )
        return workload


def check_agreement(case: Case, workload: Workload) -> None:
    """Call every variant once and compare its result with ours: wrong answers are not timed.

    A result is None (nothing to compare), a tensor, or a list of tensors. Differences are measured
    as max |a - b| / max |b| over each tensor. Raises RuntimeError naming the variant that differs.
    """
    results = {name: _tensors(workload.calls[name]()) for name in case.variants}
    ours = results.pop(OURS)
    for name, theirs in results.items():
        for a, b in zip(theirs, ours, strict=bool(theirs)):
            difference = (a.double() - b.double()).abs().max() / b.double().abs().max()
            if not difference <= workload.tolerance:
                raise RuntimeError(
                    f"case {case.name!r}: {name} and {OURS} differ by {difference:.1e} relative, "
                    f"more than the allowed {workload.tolerance:.0e}; nothing was timed"
                )


def _tensors(result: object) -> list[torch.Tensor]:
    if result is None:
        return []
    if isinstance(result, torch.Tensor):
        return [result.detach().clone()]
    if isinstance(result, (list, tuple)):
        return [tensor.detach().clone() for tensor in result]
    raise TypeError(f"a variant returned {type(result).__name__}; return None, a tensor or a list")
