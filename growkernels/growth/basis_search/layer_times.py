"""How long each candidate layer takes on this machine, with its kernel and with basis forms."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from growkernels.growth.basis_search.candidates import Ranks
from growkernels.growth.basis_search.model_copy import model_copy
from growkernels.nn import BasisConv2d
from growkernels.nn.module_paths import NotedByPath
from growkernels.timing import interleaved_seconds


@dataclass(frozen=True)
class LayerTimes(NotedByPath):
    """Seconds of a forward and backward pass on the machine they were measured on.

    Attributes:
        step: of the whole model as it is.
        full: module path -> of the convolution as it is.
        basis: module path -> R -> of its form with R basis filters.
    """

    step: float
    full: Mapping[str, float]
    basis: Mapping[str, Mapping[int, float]]

    def saving(self, path: str, rank: int) -> float:
        """Seconds that a layer's form with R basis filters saves.

        Raises:
            ValueError: a layer or number of basis filters that was not measured.
        """
        if rank not in self.basis.get(path, {}):
            raise ValueError(
                f"The time of layer {path!r} with {rank} basis filters was not measured; name that "
                "layer and fraction in the search."
            )
        return self.full[path] - self.basis[path][rank]

    def step_of(self, plan: Mapping[str, int]) -> float:
        """Predicted seconds of a model converted by the plan: the step less the layers' savings."""
        return self.step - sum(
            self.saving(self.own_path(plan, path), rank) for path, rank in plan.items()
        )


def slowest(times: Sequence[LayerTimes]) -> LayerTimes:
    """The longest time of each, of equal layers on several machines."""
    first = times[0]
    return LayerTimes(
        step=max(t.step for t in times),
        full={path: max(t.full[path] for t in times) for path in first.full},
        basis={
            path: {rank: max(t.basis[path][rank] for t in times) for rank in ranks}
            for path, ranks in first.basis.items()
        },
    )


@dataclass(frozen=True)
class SeenInput:
    """What a layer was given."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool


def measure_layer_times(
    model: nn.Module,
    candidates: Ranks,
    sample: Any,
    rounds: int,
    progress: Callable[[int, int], None] | None,
) -> LayerTimes:
    """Medians over ``rounds`` of forward + backward, everything taking its turn in each round.

    ``sample`` is an input of the model, or a tuple of several; shapes, memory format and dtype of
    each layer's input are those it has then (in training mode, under an open autocast). Layers of
    equal geometry are measured once. The step is that of the whole model with the sum of its output
    as the loss, without the optimizer. Changes nothing in the model; on a busy machine the
    medians are worthless.

    Raises:
        ValueError: rounds below 1, a candidate that the sample does not reach.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least 1 is needed.")
    arguments = sample if isinstance(sample, tuple) else (sample,)
    copied = model_copy(model).train()
    seen = _inputs_seen(copied, candidates, arguments)
    geometries: dict[object, tuple[str, set[int]]] = {}  # -> a layer that has it, R asked for
    geometry_of: dict[str, object] = {}
    for path, ranks in candidates.items():
        conv = copied.get_submodule(path)
        assert isinstance(conv, nn.Conv2d)
        geometry = (seen[path], _describe(conv))
        geometry_of[path] = geometry
        geometries.setdefault(geometry, (path, set()))[1].update(ranks)
    step = "step"
    passes: dict[object, Callable[[], None]] = {step: partial(_pass, copied, arguments)}
    for key, (path, wanted) in geometries.items():
        conv = copied.get_submodule(path)
        assert isinstance(conv, nn.Conv2d)
        x = _like(seen[path], conv.weight.device)
        passes[key, 0] = partial(_pass, conv, (x,))
        for rank in sorted(wanted):
            basis = BasisConv2d.from_conv(conv, rank)
            passes[key, rank] = partial(_pass, basis, (x,))
    device = next(copied.parameters()).device
    times = interleaved_seconds(passes, rounds, device, warm_up=1, progress=progress)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return LayerTimes(
        step=seconds[step],
        full={path: seconds[geometry_of[path], 0] for path in candidates},
        basis={
            path: {rank: seconds[geometry_of[path], rank] for rank in ranks}
            for path, ranks in candidates.items()
        },
    )


def _inputs_seen(
    model: nn.Module, candidates: Ranks, arguments: tuple[Any, ...]
) -> dict[str, SeenInput]:
    seen: dict[str, SeenInput] = {}

    def note(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        seen[path] = SeenInput(tuple(x.shape), x.stride(), dtype, x.requires_grad)

    handles = [
        model.get_submodule(path).register_forward_pre_hook(partial(note, path))
        for path in candidates
    ]
    model(*arguments)
    for handle in handles:
        handle.remove()
    unseen = [path for path in candidates if path not in seen]
    if unseen:
        raise ValueError(
            f"The sample does not reach layer {unseen[0]!r}, so its time cannot be measured; leave "
            "it out of layers."
        )
    return seen


def _describe(conv: nn.Conv2d) -> str:
    return f"{conv}, {conv.weight.dtype}, {conv.weight.stride()}"


def _like(seen: SeenInput, device: torch.device) -> Tensor:
    x = torch.empty_strided(seen.shape, seen.strides, dtype=seen.dtype, device=device)
    values = torch.randn(seen.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return x.copy_(values).requires_grad_(seen.needs_grad)


def _pass(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    output = module(*arguments)
    output.backward(torch.ones_like(output))
    module.zero_grad()
    for argument in arguments:
        if isinstance(argument, Tensor):
            argument.grad = None
