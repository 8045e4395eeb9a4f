"""What the tests know of an op: how it is called, its definition, and samples of its calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sample:
    """The sizes and the other arguments of one call.

    `shapes` are those of all tensors in the order of the call; tensor i has normal numbers times
    `scales[i]`, 1 by default. `name` stands for it in a test's name.
    """

    shapes: tuple[tuple[int, ...], ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    scales: tuple[float, ...] = ()
    name: str = ""

    def __str__(self) -> str:
        if self.name:
            return self.name
        values = [*self.shapes, *self.arguments.values()]
        return " ".join(str(value).replace(" ", "") for value in values)

    def tensors(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        scales = self.scales or (1.0,) * len(self.shapes)
        return [
            (scale * torch.randn(shape, generator=generator)).to(device, dtype)
            for shape, scale in zip(self.shapes, scales, strict=True)
        ]


@dataclass(frozen=True)
class Bad:
    """A call that is refused: with which error, and a pattern of its one sentence."""

    error: type[Exception]
    message: str
    function: Callable[..., object]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]


def refused(
    function: Callable[..., object], error: type[Exception], message: str, *arguments: Any,
    **options: Any,
) -> Bad:  # fmt: skip
    """Of the function called with these arguments."""
    return Bad(error, message, function, arguments, options)


@dataclass(frozen=True)
class Op:
    """An op for the contract tests.

    `function` is the public one, `oracle` the definition, which runs in float64, and `plain` what a
    user would write, in the dtype of the tensors. All three take the tensors of a sample (in two
    lists where `takes_lists`) and its arguments by name. `registered` makes of them the arguments
    of torch.ops.growkernels.NAME.
    """

    name: str
    function: Callable[..., Any]
    oracle: Callable[..., Any]
    plain: Callable[..., Any]
    registered: Callable[[list[Tensor], Mapping[str, Any]], tuple[Any, ...]]
    samples: Sequence[Sample]
    """Every form and odd size: results and gradients in all dtypes."""
    few: Sequence[Sample]
    """Of these every layout."""
    small: Sequence[Sample]
    """Few elements, for second derivatives, torch.func and torch.compile."""
    large: Sequence[Sample]
    """Enough work for several threads and for sums in several parts."""
    empty: Sequence[Sample]
    """With sizes of 0."""
    resized: Callable[[int], Sequence[Sample]]
    """Samples that differ from those for another number in sizes alone: torch.compile, export."""
    drawn: SearchStrategy[Sample]
    bad: Mapping[str, Bad]
    flops: Sequence[tuple[Sample, int, int]]
    """A call, its operations, and those of all of its gradients."""
    takes_lists: bool = False
    convolved: Sequence[Sample] = ()
    """Of which set_conv_algorithm may change how they are computed."""
    float32_results: bool = False
    """Whether results for 16-bit tensors are float32."""
    keeps_layout: bool = False
    """Whether results lie in memory as a tensor does, rather than contiguously."""
    slack: float = 1.0
    """Roundings of the result that its error may have beside twice that of plain torch."""
    gradient_slack: float = 1.0
    summands: Callable[[Sample], int] = field(default=lambda sample: 0)
    """How many samples a result or gradient adds up in an order that plain torch need not share."""
    squares: Callable[[Sample], int] = field(default=lambda sample: 0)
    """How many squares a result of a call adds up by a vendor's float32 dot product, at most."""
    tolerance: Mapping[torch.dtype, float] = field(default_factory=dict)
    """Of the largest value of a result, for any algorithm and layout."""
    promotes: bool = False
    """Whether autocast takes the widest of the dtypes given, rather than its own."""
    poisoned: Sequence[Sample] = ()
    """Of these what NaN and infinity do."""
    spreads: frozenset[int] = frozenset()
    """Tensors in which a number that is not finite may spread further than in plain torch."""
    empty_for_torch: Sequence[Sample] = ()
    """Samples with sizes of 0 that torch's own convolutions refuse."""

    def __str__(self) -> str:
        return self.name

    def dtype(self, given: torch.dtype) -> torch.dtype:
        """Of results for tensors of the given one."""
        return torch.promote_types(given, torch.float32) if self.float32_results else given

    def results(
        self, function: Callable[..., Any], tensors: Sequence[Tensor], sample: Sample
    ) -> list[Tensor]:
        """What the function returns for the sample, as a list."""
        arguments: Sequence[Any] = tensors
        if self.takes_lists:
            half = len(tensors) // 2
            arguments = [list(tensors[:half]), list(tensors[half:])]
        found = function(*arguments, **sample.arguments)
        return [found] if isinstance(found, Tensor) else list(found)

    def with_gradients(
        self,
        function: Callable[..., Any],
        tensors: Sequence[Tensor],
        sample: Sample,
        arrange: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> list[Tensor]:
        """The results, and the gradients of all tensors for fixed random ones of the results."""
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        results = self.results(function, leaves, sample)
        generator = torch.Generator().manual_seed(7)
        weights = [
            # Eighths, which every dtype has.
            arrange((torch.randn(y.shape, generator=generator).mul(8).round() / 8).to(y))
            for y in results
        ]
        gradients = torch.autograd.grad(results, leaves, weights, materialize_grads=True)
        return [*(y.detach() for y in results), *gradients]
