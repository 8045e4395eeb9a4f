"""What new neurons start with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from growkernels.growth.neuron_scaling.neuron_rows import Layer, current_rows
from growkernels.nn.weights import current_value


@dataclass(frozen=True)
class NewNeurons:
    """Initial values of new neurons of one layer.

    Attributes:
        weight, bias: incoming weights [neurons, ...] and biases [neurons].
        outgoing: weights [outputs of the layer that reads them, neurons], or None: 0.
        reader_bias: what is added to that layer's bias [outputs], so that it computes the same, or
            None: nothing.
        mean, variance: running statistics of a batch norm for them [neurons], or None: unknown.
    """

    weight: Tensor
    bias: Tensor
    outgoing: Tensor | None = None
    reader_bias: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None

    @property
    def normed(self) -> bool:
        """Whether a batch norm follows, to which the size of incoming weights is nothing."""
        return self.variance is not None

    def scales(self, step: float) -> Tensor:
        """[neurons], for each the scale at which what is scaled of it has the norm ``step``."""
        assert self.outgoing is not None
        outgoing = self.outgoing.double().transpose(0, 1).flatten(1).square().sum(1).cpu()
        if self.normed:
            return step / outgoing.sqrt()
        incoming = self.weight.double().flatten(1).square().sum(1) + self.bias.double().square()
        return step**2 / (incoming.cpu() + outgoing)


@torch.no_grad()
def share_of_parents(layer: Layer, outputs: Sequence[int], scale: float) -> NewNeurons:
    """scale * (w_i, b_i) of these outputs; a bias of 0 where the layer has none."""
    weight = current_rows(layer)
    index = torch.tensor(outputs, device=weight.device)
    if layer.bias is None:
        return NewNeurons(weight[index] * scale, weight.new_zeros(len(index)))
    return NewNeurons(weight[index] * scale, current_value(layer, "bias")[index] * scale)
