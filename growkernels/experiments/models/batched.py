"""Many small networks of one shape, trained together as one batched network.

The SensLI study (arXiv 2311.15995) trains dozens of initialisations of networks with some fifty
parameters. One at a time, nearly all of the time is launch overhead; together, every operation is
one batched matrix product over [runs, width, samples]. Forward and backward are written by hand
because the insertion merits need dL/dh at every position, which the backward has anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Family = Literal["feedforward", "residual"]

# W1 of a new residual block is this multiple of the identity (the paper's "v1" initialisation).
RESIDUAL_SCALE = 0.8


@dataclass
class Activations:
    """What a forward pass leaves for the backward: tensors [runs, width, samples]."""

    points: Tensor
    states: list[Tensor]  # h after the first layer and after each block: the candidate positions
    inner: list[Tensor]  # residual family: tanh(W1 h + b) of each block
    logits: Tensor

    def narrow(self, samples: int) -> Activations:
        """The same pass, seen over its first ``samples`` columns only (views)."""
        return Activations(
            self.points[..., :samples],
            [h[..., :samples] for h in self.states],
            [u[..., :samples] for u in self.inner],
            self.logits[..., :samples],
        )


@dataclass
class BatchedNetwork:
    """``runs`` networks of equal shape with separate parameters.

    feedforward: h_0 = relu(W x + b), h_l = relu(W_l h_{l-1} + b_l), logits = W h_H + b.
    residual:    h_0 = tanh(W x + b), h_l = h_{l-1} + W2_l tanh(W1_l h_{l-1} + b_l), same output.

    ``first`` and ``output`` are (weight [runs, out, in], bias [runs, out, 1]); every entry of
    ``blocks`` is (W, b), or (W1, b, W2) for the residual family. Plain tensors, not autograd
    parameters: gradients come from :meth:`backward`.
    """

    family: Family
    first: list[Tensor]
    blocks: list[list[Tensor]]
    output: list[Tensor]

    @property
    def runs(self) -> int:
        return self.first[0].shape[0]

    @property
    def width(self) -> int:
        return self.first[0].shape[1]

    @property
    def hidden(self) -> int:
        """Number of hidden layers, which is also the number of candidate positions."""
        return 1 + len(self.blocks)

    def parameters(self) -> list[Tensor]:
        return [*self.first, *(p for block in self.blocks for p in block), *self.output]

    def forward(self, points: Tensor) -> Activations:
        """``points`` [runs, features, samples] (or with runs expanded) -> all activations."""
        weight, bias = self.first
        if self.family == "feedforward":
            h = torch.baddbmm(bias, weight, points).relu_()
        else:
            h = _tanh_of_affine(weight, bias, points)
        states, inner = [h], []
        for block in self.blocks:
            if self.family == "feedforward":
                h = torch.baddbmm(block[1], block[0], h).relu_()
            else:
                u = _tanh_of_affine(block[0], block[1], h)
                inner.append(u)
                h = torch.baddbmm(h, block[2], u)
            states.append(h)
        logits = torch.baddbmm(self.output[1], self.output[0], h)
        return Activations(points, states, inner, logits)

    def backward(self, pass_: Activations, dlogits: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of all parameters and of the states.

        ``dlogits`` = dL/dlogits [runs, classes, samples]. Returns (gradients in the order of
        :meth:`parameters`, dL/dh at every position [runs, width, samples]).
        """
        states = pass_.states
        g = torch.bmm(self.output[0].mT, dlogits)
        gradients = [torch.bmm(dlogits, states[-1].mT), dlogits.sum(-1, keepdim=True)]
        state_gradients = [g]
        for index in range(len(self.blocks) - 1, -1, -1):
            block, below = self.blocks[index], states[index]
            if self.family == "feedforward":
                a = torch.ops.aten.threshold_backward(g, states[index + 1], 0)
                g = torch.bmm(block[0].mT, a)
                gradients[:0] = [torch.bmm(a, below.mT), a.sum(-1, keepdim=True)]
            else:
                u = pass_.inner[index]
                a = torch.ops.aten.tanh_backward(torch.bmm(block[2].mT, g), u)
                d_out = torch.bmm(g, u.mT)
                g = torch.baddbmm(g, block[0].mT, a)
                gradients[:0] = [torch.bmm(a, below.mT), a.sum(-1, keepdim=True), d_out]
            state_gradients.insert(0, g)
        if self.family == "feedforward":
            a = torch.ops.aten.threshold_backward(g, states[0], 0)
        else:
            a = torch.ops.aten.tanh_backward(g, states[0])
        gradients[:0] = [torch.bmm(a, pass_.points.mT), a.sum(-1, keepdim=True)]
        return gradients, state_gradients

    def descend(self, gradients: Sequence[Tensor], rate: Tensor) -> None:
        """One gradient step in place, with a learning rate per run (``rate`` [runs])."""
        step = rate.view(-1, 1, 1)
        for parameter, gradient in zip(self.parameters(), gradients, strict=True):
            parameter.addcmul_(step, gradient, value=-1)

    def select(self, runs: Tensor) -> BatchedNetwork:
        """A copy of the networks with these indices (int64 [n])."""
        return from_parameters(self.family, [p[runs] for p in self.parameters()])

    def with_insertion(self, positions: Tensor) -> BatchedNetwork:
        """Every run gets one new block behind its own position (int64 [runs], 0 ... hidden-1).

        The new block is the identity: W = I, b = 0 behind a ReLU, or W1 = 0.8 I, b = 0, W2 = 0.
        The function of every network stays the same, bit for bit for the feedforward family.
        Raises ValueError for a position outside the network.
        """
        if positions.shape != (self.runs,) or not bool(
            ((positions >= 0) & (positions < self.hidden)).all()
        ):
            raise ValueError(
                f"positions {positions.tolist()} do not name one hidden layer (0 to "
                f"{self.hidden - 1}) for each of the {self.runs} runs."
            )
        new = identity_block(self.family, self.runs, self.width, self.first[0])
        at = positions.view(-1, 1, 1)
        blocks = []
        for slot in range(self.hidden):
            kept = self.blocks[min(slot, self.hidden - 2)] if self.blocks else new
            moved = self.blocks[slot - 1] if slot else new
            blocks.append(
                [
                    torch.where(at > slot, k, torch.where(at == slot, n, m))
                    for k, n, m in zip(kept, new, moved, strict=True)
                ]
            )
        return BatchedNetwork(
            self.family, [p.clone() for p in self.first], blocks, [p.clone() for p in self.output]
        )


def _tanh_of_affine(weight: Tensor, bias: Tensor, h: Tensor) -> Tensor:
    # tanh(z) = 2 sigmoid(2 z) - 1, the factor 2 folded into the product: on the CPU four times
    # faster than torch.tanh, with an absolute error of about one unit in the last place of 1.
    return torch.baddbmm(bias, weight, h, beta=2, alpha=2).sigmoid_().mul_(2).sub_(1)


def from_parameters(family: Family, parameters: Sequence[Tensor]) -> BatchedNetwork:
    """The network whose :meth:`BatchedNetwork.parameters` are these tensors."""
    size = 2 if family == "feedforward" else 3
    middle = parameters[2:-2]
    blocks = [list(middle[i : i + size]) for i in range(0, len(middle), size)]
    return BatchedNetwork(family, list(parameters[:2]), blocks, list(parameters[-2:]))


def concatenate(networks: Sequence[BatchedNetwork]) -> BatchedNetwork:
    """All runs of several networks of one shape, in this order."""
    columns = zip(*(network.parameters() for network in networks), strict=True)
    return from_parameters(networks[0].family, [torch.cat(column) for column in columns])


def identity_block(family: Family, runs: int, width: int, like: Tensor) -> list[Tensor]:
    """The parameters of a new block that changes nothing, in the dtype and device of ``like``."""
    eye = torch.eye(width, dtype=like.dtype, device=like.device).expand(runs, width, width)
    bias = like.new_zeros(runs, width, 1)
    if family == "feedforward":
        return [eye.clone(), bias]
    return [RESIDUAL_SCALE * eye, bias, like.new_zeros(runs, width, width)]


def initialise(
    family: Family,
    runs: int,
    features: int,
    width: int,
    hidden: int,
    classes: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> BatchedNetwork:
    """Independent random networks with the initialisation of ``torch.nn.Linear``.

    Weights and biases are uniform in +-1/sqrt(fan_in); W2 of a residual block has no bias. Numbers
    are drawn on the CPU from ``generator`` and then moved, so they do not depend on the device.
    """

    def uniform(rows: int, columns: int, fan_in: int) -> Tensor:
        bound = 1.0 / math.sqrt(fan_in)
        values = torch.rand(
            runs, rows, columns, generator=generator, dtype=torch.float64, device="cpu"
        )
        return ((2 * values - 1) * bound).to(device=device, dtype=dtype)

    def linear(rows: int, columns: int) -> list[Tensor]:
        return [uniform(rows, columns, columns), uniform(rows, 1, columns)]

    first = linear(width, features)
    blocks = []
    for _ in range(hidden - 1):
        block = linear(width, width)
        if family == "residual":
            block.append(uniform(width, width, width))
        blocks.append(block)
    return BatchedNetwork(family, first, blocks, linear(classes, width))


def cross_entropy(logits: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of every run, and its gradient.

    ``logits`` and ``one_hot`` [runs, classes, samples] -> (loss [runs], dL/dlogits).
    """
    log_probability = torch.log_softmax(logits, 1)
    samples = logits.shape[-1]
    loss = (log_probability * one_hot).sum((1, 2)).div_(-samples)
    return loss, log_probability.exp_().sub_(one_hot).div_(samples)
