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

**Convolutions.** x are patches, and the reader's output q reads a new channel by the K entries, or
taps, of its kernel at the places p(q, t): z_q gets sum_t w_t f(a.x_p(q, t)). So N stacks
N_t = E[g_q x_p(q, t)ᵀ] to [D K, d], and its singular vectors are kernels: GradMax as Evci et al.
have it for convolutions, where N is cut out of the gradient of an auxiliary kernel of
k1 + k2 - 1 entries; by taps it is exact at borders too, and for any stride. TINY's error has
products of different taps, which no SVD minimises; here |sum_t w_t y_t|² <= K sum_t |w_t y_t|² and
sum_q <= sum over all places bound it by K tr(Wᵀ A S Aᵀ W), with S = sum_p x_p x_pᵀ / outputs of
the reader. That bound is minimised by the same SVD with both sides divided by sqrt(K); the score
is f' l_j² / K. (For K = 1 and stride 1 this is the paper's formula.)

**Activations.** GradMax needs f' != 0 at the start b of A x + b = b: b = 0 but for ReLU-like
functions, whose derivative torch takes as 0 at 0, so that neither A nor W_out would ever get a
gradient. There b = 0.01: every row passes, f' = 1, and the rows part after the first steps. Where
f(b) is not 0 (that, sigmoid, softplus) the reader's bias takes W_out f(b) back, so the function
stays to rounding. TINY's f' at 0 is 1 for ReLU, the derivative of the half that passes.

**GradMax turned round.** Where that start does not exist W_out = 0 keeps the function instead, and
dL/dW_out = E[g f(A x)ᵀ] is what is made large, with f taken as its best linear approximation r y
for y of mean 0 and variance 1, r = E[y f(y)] (1/2 for ReLU): A = the k first right singular vectors
of N times the mean norm c of the layer's incoming weights, and the score is (r c s_j)². That is so

* where the layer has no bias to start beside the kink of a ReLU, and where f(b) is not 0 and the
  reader has no bias, or pads its images, at whose borders its bias would take too much back;
* behind a batch norm, which makes a channel of 0 one whose gradient is 1 / sqrt(eps) times as
  large. It gives every channel variance 1, whatever the norm of a, so with C = Cov[x] the norm that
  counts is a.C a = 1: A = C^(-1/2) times the right singular vectors of N C^(-1/2), x without its
  mean, and the score is (r s_j)². Running statistics start with the mean and variance recorded.

Behind a batch norm TINY too has x without its mean and C in place of S, neurons of variance 1,
a_j = C^(-1/2) u_j and w_j = l_j v_j / K, and r in place of f'.

**Gated MLPs** have no closed form. With both halves at 0 no gradient reaches a new neuron; with one
of them and W_out at 0 the other's gradient is bilinear in x, a tensor without an SVD that were the
best; and with the gate fixed, N is another matrix for each gate.

**Cost.** N of convolutions has as many rows as the reader has weights of one channel, and as many
columns as the layer has of one output; its SVD in float64 takes minutes where both are thousands.
TINY's product of both layers' patches is larger by the reader's inputs: it is for narrow ones.

**Noise.** ``snr`` is |mean|² over the estimated variance of that mean over the batches, for N as a
whole (of TINY with the column of the bias): below 1 the singular vectors are those of noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from growkernels.growth.neuron_scaling.cross_rows import sizes
from growkernels.growth.neuron_scaling.cross_sums import CrossSums
from growkernels.growth.neuron_scaling.elementwise import KINK, value_and_slope
from growkernels.growth.neuron_scaling.neuron_rows import Layer, rows_of
from growkernels.growth.neuron_scaling.new_neurons import NewNeurons
from growkernels.growth.processes import Ranks

RELU_START = 0.01


def start_of(f: Callable[[Tensor], Tensor]) -> float:
    """b: 0, or a little more where the derivative jumps at 0."""
    jump = abs(value_and_slope(f, 0.0)[1] - value_and_slope(f, KINK)[1])
    return RELU_START if jump > 0.1 else 0.0


def linear_part(f: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """E[f(y)] and E[y f(y)] for y of the standard normal distribution."""
    y = torch.linspace(-10, 10, 20001, dtype=torch.float64, device="cpu")
    density = (-y.square() / 2).exp()
    density /= density.sum()
    value = f(y).detach()
    return float((density * value).sum()), float((density * y * value).sum())


def starts_at_zero(f: Callable[[Tensor], Tensor]) -> bool:
    """Whether new neurons of GradMax start at f(b) = 0."""
    return value_and_slope(f, start_of(f))[0] == 0


def is_turned(layer: Layer, reader: Layer, f: Callable[[Tensor], Tensor], normed: bool) -> bool:
    """Whether GradMax has W_out = 0 here instead of A = 0."""
    if normed or (start_of(f) and layer.bias is None):
        return True
    return not starts_at_zero(f) and (reader.bias is None or _pads(reader))


def _pads(reader: Layer) -> bool:
    return isinstance(reader, nn.Conv2d) and any(sizes(reader)[2])


def over_ranks(sums: CrossSums, ranks: Ranks) -> CrossSums:
    """The sums of all processes."""
    numbers = {name: v for name, v in vars(sums).items() if not isinstance(v, Tensor)}
    summed = ranks.sum(sums.cross.new_tensor(list(numbers.values()), dtype=torch.float64))
    totals = dict(zip(numbers, summed.tolist(), strict=True))
    return CrossSums(
        **{n: ranks.sum(v.clone()) for n, v in vars(sums).items() if isinstance(v, Tensor)},
        rows=round(totals["rows"]),
        places=round(totals["places"]),
        squares=totals["squares"],
    )


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
    layer: Layer,
    reader: Layer,
    f: Callable[[Tensor], Tensor],
    normed: bool,
) -> tuple[Tensor, NewNeurons]:
    """Scores [K], ascending, and what K neurons would start with."""
    n = sums.cross.double() / batches
    if is_turned(layer, reader, f, normed):
        return _turned(n, sums, layer, reader, f, normed)
    u, s, _ = torch.linalg.svd(n, full_matrices=False)
    s = _without_rounding(s, sums.cross)
    start = start_of(f)
    value, slope = value_and_slope(f, start)
    c = _mean_norm(rows_of(reader).transpose(0, 1))
    k = _most(layer, len(s))
    outgoing = _as_kernels(c * u[:, :k], reader)
    new = NewNeurons(
        weight=n.new_zeros(k, *rows_of(layer).shape[1:]),
        bias=n.new_full((k,), start),
        outgoing=outgoing,
        reader_bias=-value * _over_taps(outgoing),
    )
    return -((slope * c * s[:k]) ** 2), new


def _turned(
    n: Tensor,
    sums: CrossSums,
    layer: Layer,
    reader: Layer,
    f: Callable[[Tensor], Tensor],
    normed: bool,
) -> tuple[Tensor, NewNeurons]:
    """The same with W_out = 0."""
    c, rank, root = _mean_norm(rows_of(layer)), n.shape[1], torch.eye(n.shape[1]).to(n)
    if normed:
        root, rank = _inverse_root(sums.inputs, sums.places)
        c = 1.0
    _, s, vh = torch.linalg.svd(n @ root, full_matrices=False)
    s = _without_rounding(s, sums.cross)
    k = _most(layer, min(len(s), rank))
    incoming = c * vh[:k] @ root
    outgoing = n.new_zeros(len(rows_of(reader)), k, *reader.weight.shape[2:])
    new = NewNeurons(
        weight=incoming.unflatten(1, rows_of(layer).shape[1:]),
        bias=n.new_zeros(k),
        outgoing=outgoing,
        reader_bias=_over_taps(outgoing),
        **_statistics(incoming, sums, normed),
    )
    return -((linear_part(f)[1] * c * s[:k]) ** 2), new


def tiny(
    sums: CrossSums,
    batches: int,
    layer: Layer,
    reader: Layer,
    f: Callable[[Tensor], Tensor],
    normed: bool,
) -> tuple[Tensor, NewNeurons]:
    """The same of TINY."""
    passed, cross = sums.passed.double() / batches, sums.cross.double() / batches
    hidden, mixed = sums.hidden.double() / sums.rows, sums.mixed.double() / sums.rows
    taps = reader.weight[0, 0].numel()
    delta = -passed @ torch.linalg.pinv(hidden, hermitian=True, rtol=_cutoff(sums.hidden))
    of_reader = delta @ mixed.view(taps, hidden.shape[0], -1)  # [K, D, d]
    rest = -cross - of_reader.transpose(0, 1).flatten(0, 1)
    root, rank = _inverse_root(sums.inputs, sums.places if normed else sums.rows)
    u, s, vh = torch.linalg.svd(root @ rest.T, full_matrices=False)
    s = _without_rounding(s, sums.cross)
    k = _most(layer, min(len(s), rank))
    side = (s[:k] / taps).sqrt()
    incoming, outgoing = (root @ u[:, :k]).T, vh[:k].T * side
    if normed:
        outgoing = outgoing * side
        value, slope = linear_part(f)
    else:
        incoming = incoming * side[:, None]
        value, slope = value_and_slope(f, 0.0)[0], value_and_slope(f, KINK)[1]
    bias = incoming.new_zeros(k)
    if incoming.shape[1] > rows_of(layer)[0].numel():
        incoming, bias = incoming[:, :-1], incoming[:, -1]
    outgoing = _as_kernels(outgoing, reader)
    new = NewNeurons(
        weight=incoming.unflatten(1, rows_of(layer).shape[1:]),
        bias=bias,
        outgoing=outgoing,
        reader_bias=-value * _over_taps(outgoing) * (reader.bias is not None),
        **_statistics(incoming, sums, normed),
    )
    return -slope * s[:k] ** 2 / taps, new


def _inverse_root(products: Tensor, count: int) -> tuple[Tensor, int]:
    """(products / count)^(-1/2), 0 in directions that there are none of, and its rank."""
    values, vectors = torch.linalg.eigh(products.double() / count)
    kept = values > _cutoff(products) * values.max()
    vectors, values = vectors[:, kept], values[kept]
    return vectors / values.sqrt() @ vectors.T, len(values)


def _statistics(incoming: Tensor, sums: CrossSums, normed: bool) -> dict[str, Tensor]:
    """What a batch norm will have seen of new channels."""
    if not normed:
        return {}
    mean = incoming @ (sums.totals.double() / sums.places)
    covariance = sums.inputs.double() / sums.places
    return {"mean": mean, "variance": ((incoming @ covariance) * incoming).sum(1)}


def _as_kernels(outgoing: Tensor, reader: Layer) -> Tensor:
    """[D K, k] as the reader's weights of k channels."""
    kernels: Tensor = outgoing.unflatten(0, (len(rows_of(reader)), -1)).transpose(1, 2)
    return kernels.reshape(*kernels.shape[:2], *reader.weight.shape[2:])


def _over_taps(outgoing: Tensor) -> Tensor:
    """[D, k], the sums of kernels: what a channel of ones gives where nothing is padded."""
    return outgoing[..., None].flatten(2).sum(2)


def _mean_norm(rows: Tensor) -> float:
    return float(rows.detach().double().flatten(1).norm(dim=1).mean()) or 1.0


def _most(layer: Layer, rank: int) -> int:
    """No more than the layer has: a record names new neurons by outputs of it."""
    return min(rank, len(rows_of(layer)))


def _without_rounding(s: Tensor, summed: Tensor) -> Tensor:
    """Singular values, with 0 for those that are rounding: such directions are none."""
    return torch.where(s > _cutoff(summed) * s[:1], s, 0)


def _cutoff(summed: Tensor) -> float:
    """Below this share of the largest, eigenvalues of a sum in this dtype are rounding."""
    return float(torch.finfo(summed.dtype).eps) * max(summed.shape) * 10
