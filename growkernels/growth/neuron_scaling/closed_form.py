"""New neurons in closed form: GradMax and TINY.

Both add k neurons h_new = f(A x + b) to a layer with inputs x, read with weights W_out [D, k] by
the next layer, whose output z has the gradient g = dL/dz. N = E[g xᵀ] is [D, d].

GradMax (Evci et al., "GradMax: Growing Neural Networks using Gradient Information", 2022): A = 0,
so that the function stays, and W_out = the k first left singular vectors of N, times the mean norm
c of the layer's outgoing weights now. Then dL/dA = f' W_outᵀ N has rows of norm f' c s_j, the
largest that outgoing weights of this norm can give, and a step of size e along them lowers the loss
by e (f' c s_j)² to first order. That is the score.

TINY (Verbockhaven et al., "Growing Tiny Networks: Spotting Expressivity Bottlenecks and Fixing Them
Optimally", 2024): the wished change of z is v = -g per row. What the reader alone can do of it is
dW h, dW = -E[g hᵀ] E[h hᵀ]⁺, and what is left for new neurons is N' = E[x (v - dW h)ᵀ]
= -E[x gᵀ] - E[x hᵀ] dWᵀ. With S = E[x xᵀ] and S^(-1/2) N' = U L Vᵀ they are
a_j = sqrt(l_j) S^(-1/2) u_j and w_j = sqrt(l_j) v_j: the best rank-k approximation of the rest, if
f were the identity. The score is f' l_j², f' = f'(0): by how much they follow the rest,
E[(v - dW h).(f' w_j a_j.x)], which is the first-order decrease of the loss beyond what the reader
does itself. (The loss's whole derivative has the part in dW h too.) dW itself is left to training.
x has a last entry of 1 where the layer has a bias, h where the reader has one.

E is over rows for products without g. dL/dz of a mean over rows carries their number already, so
sums of products with g are divided by the number of batches.

**Activations.** GradMax needs f' != 0 at the start b of A x + b = b: b = 0 but for ReLU-like
functions, whose derivative torch takes as 0 at 0, so that neither A nor W_out would ever get a
gradient. There b = 0.01: every row passes, f' = 1, and the rows part after the first steps. Where
f(b) is not 0 (that, sigmoid, softplus) the reader's bias takes W_out f(b) back, so the function
stays to rounding; a reader without a bias is left out. TINY's f' at 0 is 1 for ReLU, the derivative
of the half that passes.

**Noise.** ``snr`` is |mean|² over the estimated variance of that mean over the batches, for N as a
whole (of TINY with the column of the bias): below 1 the singular vectors are those of noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growkernels.growth.neuron_scaling.cross_sums import CrossSums
from growkernels.growth.neuron_scaling.new_neurons import NewNeurons
from growkernels.growth.processes import Ranks

RELU_START = 0.01
KINK = 1e-6  # beside 0, where a derivative that jumps there has its other value

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "mish": F.mish,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
}
_MODULES = (
    *(nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Mish, nn.ELU, nn.LeakyReLU),
)


def function_of(
    model: nn.Module, activation: str | None, traced: bool
) -> Callable[[Tensor], Tensor] | None:
    """The activation of a candidate (see Widening.activation), or None where it is not known.

    What was seen to act on single elements in a traced pass may be a module of any type.
    """
    if activation is None:
        return lambda z: z
    if activation.startswith("function "):
        return _FUNCTIONS.get(activation.removeprefix("function "))
    module = model.get_submodule(activation)
    trained = next(module.parameters(), None) is not None
    if trained or not (traced or type(module) in _MODULES):
        return None
    return lambda z: module(z.clone())  # some overwrite their input


def value_and_slope(f: Callable[[Tensor], Tensor], at: float) -> tuple[float, float]:
    """f and its derivative."""
    z = torch.tensor(at, dtype=torch.float64, device="cpu").requires_grad_()
    with torch.enable_grad():
        value = f(z)
        (slope,) = torch.autograd.grad(value, z)
    return float(value.detach()), float(slope)


def start_of(f: Callable[[Tensor], Tensor]) -> float:
    """b: 0, or a little more where the derivative jumps at 0."""
    jump = abs(value_and_slope(f, 0.0)[1] - value_and_slope(f, KINK)[1])
    return RELU_START if jump > 0.1 else 0.0


def needs_reader_bias(f: Callable[[Tensor], Tensor]) -> bool:
    """Whether new neurons that start at f(b) would change the function."""
    return value_and_slope(f, start_of(f))[0] != 0


def over_ranks(sums: CrossSums, ranks: Ranks) -> CrossSums:
    """The sums of all processes."""
    parts = (sums.cross, sums.passed, sums.inputs, sums.mixed, sums.hidden)
    numbers = sums.cross.new_tensor([float(sums.rows), sums.squares])
    rows, squares = ranks.sum(numbers).tolist()
    cross, passed, inputs, mixed, hidden = (ranks.sum(part.clone()) for part in parts)
    return CrossSums(cross, passed, inputs, mixed, hidden, round(rows), squares)


def snr(sums: CrossSums, batches: int) -> float:
    """Of the mean of N over the batches; NaN for a single one, inf where all agree."""
    if batches < 2:
        return float("nan")
    mean = float((sums.cross.double() / batches).square().sum())
    variance = (sums.squares / batches - mean) / (batches - 1)
    return mean / variance if variance > 0 else float("inf")


def gradmax(
    sums: CrossSums,
    batches: int,
    layer: nn.Linear,
    reader: nn.Linear,
    f: Callable[[Tensor], Tensor],
) -> tuple[Tensor, NewNeurons]:
    """Scores [K], ascending, and what K neurons would start with."""
    n = sums.cross.double() / batches
    u, s, _ = torch.linalg.svd(n, full_matrices=False)
    s = _without_rounding(s, sums.cross)
    start = start_of(f)
    value, slope = value_and_slope(f, start)
    c = float(reader.weight.detach().double().norm(dim=0).mean()) or 1.0
    k = _most(layer, len(s))
    outgoing = c * u[:, :k]
    new = NewNeurons(
        weight=n.new_zeros(k, layer.in_features),
        bias=n.new_full((k,), start),
        outgoing=outgoing,
        reader_bias=-value * outgoing,
    )
    return -((slope * c * s[:k]) ** 2), new


def tiny(
    sums: CrossSums, batches: int, layer: nn.Linear, f: Callable[[Tensor], Tensor]
) -> tuple[Tensor, NewNeurons]:
    """The same of TINY."""
    passed, cross = sums.passed.double() / batches, sums.cross.double() / batches
    hidden, mixed = sums.hidden.double() / sums.rows, sums.mixed.double() / sums.rows
    delta = -passed @ torch.linalg.pinv(hidden, hermitian=True, rtol=_cutoff(sums.hidden))
    rest = -cross.T - mixed.T @ delta.T
    values, vectors = torch.linalg.eigh(sums.inputs.double() / sums.rows)
    kept = values > _cutoff(sums.inputs) * values.max()
    vectors, values = vectors[:, kept], values[kept]
    root = vectors / values.sqrt() @ vectors.T
    u, s, vh = torch.linalg.svd(root @ rest, full_matrices=False)
    s = _without_rounding(s, sums.cross)
    k = _most(layer, min(len(s), int(kept.sum())))
    incoming = (root @ u[:, :k] * s[:k].sqrt()).T
    outgoing = vh[:k].T * s[:k].sqrt()
    bias = incoming.new_zeros(k)
    if incoming.shape[1] > layer.in_features:
        incoming, bias = incoming[:, :-1], incoming[:, -1]
    value, slope = value_and_slope(f, 0.0)[0], value_and_slope(f, KINK)[1]
    new = NewNeurons(incoming, bias, outgoing, -value * outgoing)
    return -slope * s[:k] ** 2, new


def _most(layer: nn.Linear, rank: int) -> int:
    """No more than the layer has: a record names new neurons by outputs of it."""
    return min(rank, layer.out_features)


def _without_rounding(s: Tensor, summed: Tensor) -> Tensor:
    """Singular values, with 0 for those that are rounding: such directions are none."""
    return torch.where(s > _cutoff(summed) * s[:1], s, 0)


def _cutoff(summed: Tensor) -> float:
    """Below this share of the largest, eigenvalues of a sum in this dtype are rounding."""
    return float(torch.finfo(summed.dtype).eps) * max(summed.shape) * 10
