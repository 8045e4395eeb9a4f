"""What growing neurons costs, exactly, while a selection is being put together."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from growkernels.growth.neuron_scaling.candidates import Candidate
from growkernels.growth.same_function import call, evaluating

LAYERS_OF_FORM = {"pair": 2, "single": 1, "gated": 1}


class Ledger:
    """The model's sizes with what was selected so far, and the parameters that more would add.

    A neuron's cost depends on what else grows in the same step: widening v adds a column to
    everything that reads it, the new branches of proj included. So costs are asked and booked one
    after another; the sum of what was booked is the exact number of new parameters.
    """

    def __init__(self, model: nn.Module, form: str, depth: bool) -> None:
        self._model = model
        self._form = form
        self._depth = depth
        self._inputs: dict[str, int] = {}  # base layer -> inputs of one neuron
        self._rows: dict[str, int] = {}  # base layer -> neurons that read those inputs

    def cost(self, candidate: Candidate, neurons: int) -> int:
        """New parameters if this many neurons of the layer were selected next."""
        return self._depth_cost(candidate, neurons) + self._width_cost(candidate, neurons)

    def book(self, candidate: Candidate, neurons: int) -> None:
        """Take them into account from now on."""
        self._look_at(candidate.root)
        if self._depth:
            self._rows[candidate.root] += neurons * LAYERS_OF_FORM[self._form]
        widening = candidate.widening
        if widening is not None:
            self._look_at(widening.follower)
            self._rows[candidate.root] += neurons
            if widening.role == "qk":
                self._rows[widening.follower] += neurons
            else:
                self._inputs[widening.follower] += neurons

    def _depth_cost(self, candidate: Candidate, neurons: int) -> int:
        if not self._depth:
            return 0
        self._look_at(candidate.root)
        each = self._inputs[candidate.root] + self._biases(candidate.name)
        gate = 1 if self._form == "gated" else 0
        return neurons * (LAYERS_OF_FORM[self._form] * each + gate)

    def _width_cost(self, candidate: Candidate, neurons: int) -> int:
        widening = candidate.widening
        if widening is None:
            return 0
        self._look_at(candidate.root)
        self._look_at(widening.follower)
        row = self._inputs[candidate.root] + self._biases(candidate.name)
        if widening.role == "qk":
            other = self._inputs[widening.follower] + self._biases(widening.follower)
        else:
            other = self._rows[widening.follower]
        return neurons * (row + other)

    def _look_at(self, root: str) -> None:
        if root in self._inputs:
            return
        layers = [
            m
            for m in self._model.get_submodule(root).modules()
            if isinstance(m, nn.Linear | nn.Conv2d)
        ]
        self._inputs[root] = layers[0].weight[0].numel()
        self._rows[root] = sum(len(layer.weight) for layer in layers)

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
