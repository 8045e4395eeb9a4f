"""The SensLI study's fully connected networks as ordinary modules, one network at a time."""

from __future__ import annotations

from torch import Tensor, nn

from growkernels.experiments.models.batched import BatchedNetwork, Family
from growkernels.nn import LinearReLU, ResidualBlock


def fully_connected(
    family: Family, features: int, width: int, hidden: int, classes: int
) -> nn.Sequential:
    """A network of ``hidden`` hidden layers with PyTorch's default initialisation.

    feedforward: linear layers with a ReLU behind each; residual: a linear layer with tanh, then
    ``hidden`` - 1 residual blocks h + W2 tanh(W1 h + b). Both end in a linear layer, input
    [samples, features], output [samples, classes]. Modules 0 ... ``hidden``-1 are the hidden
    layers, so their outputs are the candidate positions.
    """
    if family == "feedforward":
        layers: list[nn.Module] = [
            LinearReLU(features if index == 0 else width, width) for index in range(hidden)
        ]
    else:
        layers = [nn.Sequential(nn.Linear(features, width), nn.Tanh())]
        layers += [ResidualBlock(width) for _ in range(hidden - 1)]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def single_network(network: BatchedNetwork, run: int) -> nn.Sequential:
    """One run of a batched network as a module with its own copy of the parameters."""
    classes, features = network.output[0].shape[1], network.first[0].shape[2]
    module = fully_connected(network.family, features, network.width, network.hidden, classes)
    module.to(device=network.first[0].device, dtype=network.first[0].dtype)
    values: list[Tensor] = [p[run] for p in network.parameters()]
    for parameter, value in zip(module.parameters(), values, strict=True):
        parameter.data.copy_(value.reshape(parameter.shape))
    return module
