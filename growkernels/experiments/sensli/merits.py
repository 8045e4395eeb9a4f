"""The insertion merits of all runs and positions of a batched network, in one call of the op."""

from __future__ import annotations

import torch
from torch import Tensor

import growkernels as gk
from growkernels.experiments.models.batched import RESIDUAL_SCALE, BatchedNetwork, cross_entropy


def position_merits(network: BatchedNetwork, points: Tensor, one_hot: Tensor) -> Tensor:
    """Squared Frobenius norm of dL/dW of the virtual layer, [runs, positions].

    ``points`` [1 or runs, features, samples], ``one_hot`` [classes, samples]. The loss is the mean
    over all samples, which is the paper's mean over mini-batches of equal size. As in the paper's
    code only the weight counts that can have a gradient: W of a feed-forward layer, W2 of a
    residual block. One ordinary forward and backward, then one call for runs x positions.
    """
    activations = network.forward(points.expand(network.runs, -1, -1))
    _, dlogits = cross_entropy(activations.logits, one_hot)
    _, state_gradients = network.backward(activations, dlogits)
    inputs = [h for state in activations.states for h in state.mT.contiguous()]
    grads = [g for gradient in state_gradients for g in gradient.mT.contiguous()]
    if network.family == "feedforward":
        norms = gk.virtual_grad_norms(inputs, grads, "linear_relu")
    else:
        norms = gk.virtual_grad_norms(
            inputs, grads, "residual", activation="tanh", scale=RESIDUAL_SCALE
        )
    return torch.stack(norms.split(network.runs), dim=1)
