"""What growing neurons costs, exactly, while a selection is being put together."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from growkernels.growth.neuron_scaling.candidates import Candidate
from growkernels.growth.neuron_scaling.neuron_rows import Layer, has_neurons, rows_of
from growkernels.nn.tracing import call, evaluating

UNITS = ("parameters", "flops", "seconds")
PASSES = 7  # of which the median time is taken
LAYERS_OF_FORM = {"pair": 2, "single": 1, "gated": 1}


class Ledger:
    """The model's sizes with what was selected so far, and the parameters that more would add.

    A neuron's cost depends on what else grows in the same step: widening v adds a column to
    everything that reads it, the new branches of proj included. So costs are asked and booked one
    after another; the sum of what was booked is the exact number of new parameters.
    """

    def __init__(
        self, model: nn.Module, form: str, depth: bool, unit: str = "parameters", sample: Any = None
    ) -> None:
        if unit not in UNITS:
            raise ValueError(f"Unknown unit {unit!r}; choose one of {', '.join(UNITS)}.")
        if unit != "parameters" and sample is None:
            raise ValueError(f"A budget of {unit} is measured on an input; pass sample=.")
        self.unit = unit
        self.parameters = 0
        self._prices: dict[str, float] | None = None
        if unit == "flops":
            self._prices = flops_of_weights(model, sample)
        elif unit == "seconds":
            self._prices = seconds_of_weights(model, sample)
        self._model = model
        self._form = form
        self._depth = depth
        self._inputs: dict[str, int] = {}  # base layer -> inputs of one neuron
        self._rows: dict[str, int] = {}  # base layer -> neurons that read those inputs

    def beside(self, form: str, depth: bool) -> Ledger:
        """Of another growth in the same step; each knows sizes that the other's neurons give."""
        other = copy.copy(self)
        other.parameters = 0
        other._form, other._depth = form, depth
        return other

    def cost(self, candidate: Candidate, neurons: int) -> float:
        """What this many neurons of the layer would add if they were selected next."""
        weights, others = self._counts(candidate, neurons)
        if self._prices is None:
            return sum(weights.values()) + others
        return sum(self._prices.get(name, 0.0) * count for name, count in weights.items())

    def book(self, candidate: Candidate, neurons: int) -> None:
        """Take them into account from now on."""
        weights, others = self._counts(candidate, neurons)
        self.parameters += sum(weights.values()) + others
        self._look_at(candidate.root)
        if self._depth:
            self._rows[candidate.root] += neurons * LAYERS_OF_FORM[self._form]
        widening = candidate.widening
        if widening is None:
            return
        self._rows[candidate.root] += neurons
        for other in (*widening.partners, *([widening.follower] if widening.role == "qk" else [])):
            self._look_at(other)
            self._rows[other] += neurons
        for reader in widening.all_readers:
            self._look_at(reader)
            self._inputs[reader] += neurons * self._taps(reader)

    def _counts(self, candidate: Candidate, neurons: int) -> tuple[dict[str, int], int]:
        """New weights of each base layer, and how many other parameters."""
        weights: dict[str, int] = {}
        others = 0
        root, widening = candidate.root, candidate.widening
        self._look_at(root)
        if self._depth:
            layers = LAYERS_OF_FORM[self._form]
            weights[root] = layers * self._inputs[root]
            others += layers * self._biases(candidate.name) + (1 if self._form == "gated" else 0)
        if widening is not None:
            rows = [root, *widening.partners]
            if widening.role == "qk":
                rows.append(widening.follower)
            for name in rows:
                self._look_at(name)
                weights[name] = weights.get(name, 0) + self._inputs[name]
                others += self._biases(candidate.name if name == root else name)
            for reader in widening.all_readers:
                self._look_at(reader)
                columns = self._rows[reader] * self._taps(reader)
                weights[reader] = weights.get(reader, 0) + columns
            for norm in widening.norms:
                others += len(list(self._model.get_submodule(norm).parameters()))
        return {name: neurons * count for name, count in weights.items()}, neurons * others

    def _taps(self, name: str) -> int:
        """Weights of one output of a layer for one of its inputs."""
        weight = self._model.get_submodule(name).weight
        return int(weight[0, 0].numel())  # type: ignore[index]

    def _look_at(self, root: str) -> None:
        if root in self._inputs:
            return
        layers = [m for m in self._model.get_submodule(root).modules() if has_neurons(m)]
        self._inputs[root] = rows_of(layers[0])[0].numel()
        self._rows[root] = sum(len(rows_of(layer)) for layer in layers)

    def _biases(self, name: str) -> int:
        return 0 if self._model.get_submodule(name).bias is None else 1


def forward_flops(model: nn.Module, sample: Any) -> int:
    """Floating point operations of one forward pass, as torch counts them: matrix products and
    convolutions, two operations per multiply-add; attention by its two products.

    Args:
        sample: the model's input (a tuple for several arguments, a dict for keyword arguments); the
            count is for all of it.
    """
    counter = FlopCounterMode(display=False)
    # The fused attention kernels of the CPU are not counted; the plain one is.
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), counter:
        call(model, sample)
    return int(counter.get_total_flops())


def flops_of_weights(model: nn.Module, sample: Any) -> dict[str, float]:
    """Layer -> floating point operations of one forward pass for each of its weights."""
    found: dict[str, float] = {}

    def count(name: str, module: Layer, output: Tensor, seconds: float) -> None:
        found[name] = found.get(name, 0.0) + 2.0 * output.numel() / len(rows_of(module))

    _observe(model, sample, 1, count)
    return found


def seconds_of_weights(model: nn.Module, sample: Any) -> dict[str, float]:
    """Layer -> seconds of one forward pass for each of its weights, as they are measured now.

    A layer's time is taken to grow in proportion to its weights; narrow ones grow for less.
    """
    times: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}

    def note(name: str, module: Layer, output: Tensor, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)
        sizes[name] = sum(p.numel() for p in module.parameters() if p.dim() > 1)

    _observe(model, sample, PASSES, note)
    runs = {name: max(1, len(t) // PASSES) for name, t in times.items()}
    return {
        name: statistics.median(t) * runs[name] / max(1, sizes[name]) for name, t in times.items()
    }


def _observe(
    model: nn.Module,
    sample: Any,
    passes: int,
    note: Callable[[str, Layer, Tensor, float], None],
) -> None:
    """Run the model and take note of every run of a layer: what came out, and how long it took."""
    begun: dict[str, float] = {}
    handles = []
    for name, module in model.named_modules():
        if has_neurons(module) and _is_base(model, name):

            def began(module: nn.Module, args: Any, name: str = name) -> None:
                _wait()
                begun[name] = time.perf_counter()

            def ended(module: Any, args: Any, output: Tensor, name: str = name) -> None:
                _wait()
                note(name, module, output, time.perf_counter() - begun[name])

            handles.append(module.register_forward_pre_hook(began))
            handles.append(module.register_forward_hook(ended))
    try:
        with evaluating(model):
            for _ in range(passes):
                call(model, sample)
    finally:
        for handle in handles:
            handle.remove()


def _is_base(model: nn.Module, name: str) -> bool:
    """Whether a layer is no part of another one's branches."""
    parts = name.split(".")
    return not any(
        has_neurons(model.get_submodule(".".join(parts[:end]))) for end in range(1, len(parts))
    )


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
