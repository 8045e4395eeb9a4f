"""The loss that replacing a kernel by its best R-basis form would cost, from one pass.

Replacing W [Cout, K] by W_R, its best approximation of rank R, moves it by D = W_R - W. To second
order the mean loss changes by <g, D> + 1/2 D' F D, where g is the mean gradient and F the Fisher
matrix. For a cross entropy of softmax outputs F is the generalised Gauss-Newton matrix (Martens,
"New insights and perspectives on the natural gradient method", JMLR 21, 2020, section 9): the
Hessian without the curvature of the network itself, which has no definite sign and fades as the
model fits. (The "empirical Fisher", from the gradients of the true labels, vanishes as the model
fits: Kunstner et al., arXiv 1905.12558.) The quadratic form is estimated without a matrix. With
probabilities p, independent random signs e for every sample and class, and s = sqrt(p),
r = s e - p <s, e> has mean zero and covariance diag(p) - p p', the Hessian of the cross entropy.
Sent backwards from the logits of a batch of N samples it gives the gradient G of <r, logits>, and
<G, D>^2 / N has the mean D' F D. (Labels drawn from p in its place have the same mean; but where
the model is sure of itself nearly all draws are then zero and a few are huge.) The products of
different samples cancel in the mean even where batch norm couples the samples, so batch norms do
what they do in training.

That matters: behind a convolution they take out any scale of a channel. Truncating a kernel shrinks
its channels and a Taylor expansion at W would charge for that, though it costs nothing. Where the
gradients show that the loss does not depend on the scale of the channels (<G_c, W_c> = 0), W_R has
its rows scaled to the lengths of W's rows first, which is the same function.

All R come from the same products: W_R = U_R U_R' W with the first R left singular vectors of W,
so <G_c, (W_R)_c> is the sum over k <= R of U_ck (G W' U)_ck, a cumulative sum along k. G W' U has
about as many multiplications as one position of the convolution, so no basis convolution is
computed here, and a batch costs one forward pass and a backward pass for g and for each random r.

The expansion is about the given weights, so the model should have been trained a little. And it is
local: where truncation is far from harmless the prediction is too small, though mostly in the right
order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from growkernels.growth.basis_search.candidates import Ranks
from growkernels.growth.basis_search.model_copy import model_copy
from growkernels.growth.basis_search.sensitivities import Sensitivities
from growkernels.growth.processes import Ranks as Processes

Loss = Callable[[Tensor, Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]

# Gradients of independent random directions have a squared cosine of 1/K with W's rows. Below this
# share of it the loss does not depend on the rows' lengths.
SCALE_FREE = 0.01


def predicted_costs(
    model: nn.Module,
    candidates: Ranks,
    batches: Batches,
    loss_fn: Loss,
    draws: int,
    generator: torch.Generator,
    processes: Processes,
) -> Sensitivities:
    """Costs of all candidates from one pass over ``batches`` of (inputs, targets).

    Of several processes each passes its own batches, and the costs are over all of them.

    The model is copied; batch norms use the batch's statistics, dropout is off. ``loss_fn(logits,
    targets)`` is a cross entropy, a mean over the batch; logits are [N, classes]. Each of the
    ``draws`` for a batch is an independent estimate of the curvature there, whose standard
    deviation is about 1.4 times its mean.

    Raises:
        ValueError: no batches or draws, an error of the model on a batch, logits or a loss of
            another shape, a loss or a weight not finite.
        RuntimeError: a candidate that the loss does not depend on.
    """
    started = time.perf_counter()
    kernels: list[TruncatedKernel] = []
    sizes: list[int] = []
    losses: list[float] = []
    with processes.agreed():
        kernels, sizes, losses = _expanded(model, candidates, batches, loss_fn, draws, generator)
    told = processes.gathered((sizes, losses))
    sizes = [size for theirs, _ in told for size in theirs]
    losses = [loss for _, theirs in told for loss in theirs]
    shares = torch.tensor(sizes, device="cpu").double() / sum(sizes)
    costs: dict[str, dict[int, float]] = {}
    errors: dict[str, dict[int, float]] = {}
    for (path, ranks), kernel in zip(candidates.items(), kernels, strict=True):
        mean, error = _mean_and_error(kernel.loss_changes(processes), shares)
        costs[path] = dict(zip(ranks, mean.tolist(), strict=True))
        errors[path] = dict(zip(ranks, error.tolist(), strict=True))
    return Sensitivities(
        method="taylor",
        costs=costs,
        errors=errors,
        baseline=float(shares @ torch.tensor(losses, device="cpu").double()),
        seconds=sum(processes.gathered(time.perf_counter() - started)),
    )


def _expanded(
    model: nn.Module,
    candidates: Ranks,
    batches: Batches,
    loss_fn: Loss,
    draws: int,
    generator: torch.Generator,
) -> tuple[list[TruncatedKernel], list[int], list[float]]:
    """This process's products with every candidate, its batches' sizes and their losses."""
    if draws < 1:
        raise ValueError(f"draws is {draws}; at least 1 is needed.")
    copied = model_copy(model).eval()
    for module in copied.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    copied.requires_grad_(False)
    weights = [_weight_of(copied, path).requires_grad_() for path in candidates]
    for path, weight in zip(candidates, weights, strict=True):
        if not bool(weight.isfinite().all()):
            raise ValueError(
                f"The weight of layer {path!r} contains NaN or infinity, so there is no nearest "
                "basis convolution; use finite weights."
            )
    kernels = [
        TruncatedKernel(weight, ranks)
        for weight, ranks in zip(weights, candidates.values(), strict=True)
    ]
    sizes: list[int] = []
    losses: list[float] = []
    for inputs, targets in batches:
        with torch.enable_grad():
            try:
                logits = copied(inputs)
            except Exception as error:
                raise ValueError(
                    f"The model raises {type(error).__name__} on a calibration batch "
                    f"({str(error).partition(chr(10))[0]}), with its batch norms in training mode; "
                    "give batches that it trains on."
                ) from error
            _check_logits(logits)
            loss = loss_fn(logits, targets)
            _check_loss(loss)
            gradients = [torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)]
            for _ in range(draws):
                residual = _random_residual(logits, generator)
                gradients.append(
                    torch.autograd.grad(
                        logits, weights, residual, retain_graph=True, allow_unused=True
                    )
                )
        for path, kernel, (first, *second) in zip(
            candidates, kernels, zip(*gradients, strict=True), strict=True
        ):
            if first is None:
                raise RuntimeError(
                    f"The loss does not depend on layer {path!r}, so its sensitivity is not "
                    "defined; leave it out of layers."
                )
            kernel.add(first, second, len(logits))
        sizes.append(len(logits))
        losses.append(float(loss.detach()))
    if not sizes:
        raise ValueError("There are no calibration batches; give at least one (inputs, targets).")
    return kernels, sizes, losses


class TruncatedKernel:
    """One kernel, its best approximations of some ranks, and their products with gradients."""

    def __init__(self, weight: Tensor, ranks: Iterable[int]) -> None:
        matrix = weight.detach().flatten(1).double()
        values, left = torch.linalg.eigh(matrix @ matrix.T)
        self._left = left.flip(1)  # U, of the largest singular value first
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self._projected = (matrix.T @ self._left).to(dtype)  # W' U = V S
        self._at = torch.tensor(list(ranks), device=weight.device) - 1
        parts = self._left.square() * values.flip(0).clamp(min=0)
        lengths = parts.cumsum(1).sqrt()
        kept = lengths[:, self._at]
        self._full_lengths = lengths[:, -1:]
        # A row of which almost nothing is left would be a magnified rounding error.
        self._rescale = torch.where(
            kept > 1e-3 * self._full_lengths, self._full_lengths / kept, 1.0
        )
        self._changes: list[tuple[Tensor, Tensor]] = []  # for W_R as it is, and rescaled
        self._along_rows = matrix.new_zeros(())  # sum of <G_c, W_c>^2
        self._lengths = matrix.new_zeros(())  # sum of |G_c|^2 |W_c|^2
        self._taps = matrix.shape[1]

    def add(self, of_loss: Tensor, of_residuals: Sequence[Tensor], samples: int) -> None:
        """Take the gradients of one batch: of its mean loss, and for its random residuals."""
        plain, rescaled = self._products(of_loss)
        for gradient in of_residuals:
            products = torch.stack(self._products(gradient))
            curvature = products.square() / (2 * samples * len(of_residuals))
            plain, rescaled = plain + curvature[0], rescaled + curvature[1]
        self._changes.append((plain, rescaled))

    def loss_changes(self, processes: Processes) -> Tensor:
        """The second-order change of the mean loss, [batches, ranks], float64 on the CPU.

        The batches are those of all processes, the same numbers on each.
        """
        sums = processes.sum(torch.stack([self._along_rows, self._lengths]))
        scale_free = bool(sums[0] < SCALE_FREE / self._taps * sums[1])
        changes = torch.stack(
            [rescaled if scale_free else plain for plain, rescaled in self._changes]
        ).cpu()
        return torch.cat(processes.gathered(changes))

    def _products(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """<G, D> for every rank, with W_R as it is and with its rows rescaled."""
        matrix = gradient.flatten(1).to(self._projected.dtype)
        products = ((matrix @ self._projected).double() * self._left).cumsum(1)
        full = products[:, -1:]
        truncated = products[:, self._at]
        self._along_rows += full.square().sum()
        squares = matrix.double().square().sum(1, keepdim=True)
        self._lengths += (squares * self._full_lengths.square()).sum()
        return (truncated - full).sum(0), (truncated * self._rescale - full).sum(0)


def _weight_of(model: nn.Module, path: str) -> Tensor:
    conv = model.get_submodule(path)
    assert isinstance(conv, nn.Conv2d)
    return conv.weight


def _random_residual(logits: Tensor, generator: torch.Generator) -> Tensor:
    """r [N, classes] with mean 0 and covariance diag(p) - p p' for every sample."""
    signs = torch.randint(0, 2, logits.shape, generator=generator, device=generator.device) * 2 - 1
    p = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
    rooted = p.sqrt() * signs.to(p.device)
    return (rooted - p * rooted.sum(1, keepdim=True)).to(logits.dtype)


def _mean_and_error(values: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of values [batches, ranks] weighted by shares [batches], and its standard error."""
    mean = shares @ values
    if len(values) < 2:
        return mean, torch.full_like(mean, float("nan"))
    spread = shares.square() @ (values - mean).square()
    return mean, (spread * len(values) / (len(values) - 1)).sqrt()


def _check_logits(logits: object) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"The model returned {given}; method 'taylor' needs logits [N, classes] of a "
            "classifier (method 'train' takes any model)."
        )


def _check_loss(loss: Tensor) -> None:
    if loss.dim() != 0:
        raise ValueError(
            f"loss_fn returned a tensor of shape {list(loss.shape)}; return the mean over the "
            "batch, a scalar."
        )
    if not bool(loss.isfinite()):
        raise ValueError(
            f"The loss of a calibration batch is {loss.item()}; check the model and the data."
        )
