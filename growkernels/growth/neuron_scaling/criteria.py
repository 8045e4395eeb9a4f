"""What each neuron scores under each criterion; the smallest scores grow first.

g = dL/dO at the layer's output, [rows, n]; x its inputs, [rows, d]; means over the recorded
batches.

* ``"splitting"``: the smallest eigenvalue of S_i = sum_m w[m, i] x_m x_m^T with w = GELU''(0) g,
  GELU''(0) = sqrt(2 / pi) = 0.798. To second order in a, adding GELU(a.x) + a.x to O_i changes the
  loss by 1.5 g_i.(X a) + a.S_i a / 2 + (1.5^2 / 2) a.H_ii a. The first term vanishes at a
  stationary point (it is 1.5 a times dL/dw_i), the last is what the existing neuron could do itself
  (H_ii: the loss's Hessian in w_i); S_i is what only the new nonlinearity adds. It says nothing
  about how several new neurons work together, nor about H_ii.
* ``"s2d"``: the same with w = dL/d act(O) * act''(O) of the neuron's own activation (Wu, Wang and
  Liu 2019): what splitting the neuron into two copies gains. A neuron without an activation
  directly behind it has act'' = 0 and a matrix of zeros, which tells nothing, so such layers (q, k,
  v, proj, fc2) are left out.
* ``"gradient_sum"``: min(sum_j dL/dw_ij, 0), the sum of the neuron's row of the weight gradient. It
  is what the paper's authors' code computes: there S_i is an outer product of ones with that row,
  whose eigenvalues are this sum and zeros. A first-order number; it changes with the sign of an
  input feature, and holds no curvature.
* ``"gradmax"`` and ``"tiny"``: see ``closed_form``.
* ``"magnitude"``: -||w_i||. ``"random"``: -uniform(0, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from growkernels.growth.neuron_scaling.activations import activation_name
from growkernels.growth.neuron_scaling.candidates import Candidate
from growkernels.growth.neuron_scaling.neuron_rows import Layer, current_rows, has_neurons, rows_of
from growkernels.growth.neuron_scaling.new_neurons import NewNeurons
from growkernels.growth.neuron_scaling.recording import Recording
from growkernels.growth.neuron_scaling.samples import LayerSample
from growkernels.growth.processes import Ranks
from growkernels.nn.module_paths import NotedByPath
from growkernels.ops.splitting import splitting_hvp, splitting_hvp_conv2d, splitting_weight
from growkernels.solvers import smallest_eigenpairs, splitting_eigs

CRITERIA = ("splitting", "s2d", "gradient_sum", "magnitude", "random", "gradmax", "tiny")
CURVATURE = ("splitting", "s2d")  # those that come with a direction
DECREASES = ("gradmax", "tiny")  # whose scores are predicted decreases of the loss
RECORDED = (*CURVATURE, "gradient_sum", *DECREASES)  # those that need recorded batches
GELU_CURVATURE = math.sqrt(2 / math.pi)  # GELU''(0) = 2 * the normal density at 0

T = TypeVar("T")


@dataclass(frozen=True)
class Scores(NotedByPath):
    """Every candidate neuron's score; ascending is the order of growth, below 0 is eligible.

    Attributes:
        criterion: which of ``CRITERIA``.
        values: layer -> [n] float64 on the CPU, one number per output.
        directions: layer -> [n, ...] the unit eigenvector that belongs to the value, shaped like
            the layer's weight. Empty for criteria without directions.
        residuals: layer -> [n], ||S v - value v|| / ||S|| of the eigenpairs. Empty as above.
        batches: how many recorded batches the scores are from, over all processes.
        overflowed: how many further ones a loss scale made infinite, which therefore do not count.
        snr: layer -> signal to noise of what ``"gradmax"`` and ``"tiny"`` score by, see
            ``neuron_scaling.closed_form``. Empty for the other criteria.
        starts: layer -> what new neurons start with, in the order of ``values``, for these two.
    """

    criterion: str
    values: dict[str, Tensor]
    directions: dict[str, Tensor] = field(default_factory=dict)
    residuals: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0
    overflowed: int = 0
    snr: dict[str, float] = field(default_factory=dict)
    starts: dict[str, NewNeurons] = field(default_factory=dict)

    def renamed(self, paths: Mapping[str, str]) -> Scores:
        """The scores of these layers alone, under other paths."""

        def moved(table: Mapping[str, T]) -> dict[str, T]:
            return {paths[name]: value for name, value in table.items() if name in paths}

        return replace(
            self,
            values=moved(self.values),
            directions=moved(self.directions),
            residuals=moved(self.residuals),
            snr=moved(self.snr),
            starts=moved(self.starts),
        )

    def decreases(self, step: float) -> dict[str, Tensor]:
        """By how much each neuron is predicted to lower the loss, on one scale for all criteria.

        The assumption: the new neuron's own parameters change by a vector of the norm ``step`` in
        the best direction, all else stays, and the loss follows its first term that is not 0.

        * ``"gradmax"``: a gradient of norm s is there from the start, so the loss falls by s step;
          s is the root of minus the score.
        * ``"splitting"``: the neuron starts at a saddle, along the eigenvector the loss falls by
          -lambda step² / 2 (at a point where the layer's own weights are stationary).
        * ``"tiny"``: incoming and outgoing weights leave 0 together, in a given proportion, and the
          loss falls by minus the score times the scale at which they have the norm ``step``: by
          -score step² / (|a|² + |w|²); behind a batch norm, where w alone is scaled, by
          -score step / |w|. (Beyond what the reader could do itself.)

        So these compare at one step: a larger one favours the saddles. The learning rate times the
        steps until the next growth, or the size of the weights beside, says which is meant.

        Args:
            step: a positive norm.

        Returns:
            Layer -> [n], in the order of ``values``; 0 where the score is not below 0.

        Raises:
            ValueError: a step that is not positive, or a criterion that predicts nothing.
        """
        if not 0 < step < math.inf:
            raise ValueError(f"step is {step}; it must be a positive number.")
        gains = {name: -value.clamp(max=0) for name, value in self.values.items()}
        if self.criterion == "gradmax":
            return {name: gain.sqrt() * step for name, gain in gains.items()}
        if self.criterion == "splitting":
            return {name: gain * step**2 / 2 for name, gain in gains.items()}
        if self.criterion == "tiny":
            return {name: g * self.starts[name].scales(step) for name, g in gains.items()}
        raise ValueError(
            f"Criterion {self.criterion!r} predicts no decrease of the loss; 'splitting', "
            "'gradmax' and 'tiny' do."
        )

    def __str__(self) -> str:
        """One line per layer: how many neurons are eligible, and the lowest score."""
        lines = [f"{self.criterion}, {self.batches} batches"]
        if self.overflowed:
            lines.append(f"{self.overflowed} batches overflowed under their loss scale: left out")
        for layer, values in self.values.items():
            eligible = int((values < 0).sum())
            lowest = f"{values.min().item():.3g}" if len(values) else "none"
            noise = f", signal to noise {self.snr[layer]:.3g}" if layer in self.snr else ""
            lines.append(f"{layer}: {eligible} of {len(values)} eligible, lowest {lowest}{noise}")
        return "\n".join(lines)


def scores(
    model: nn.Module,
    candidates: Sequence[Candidate],
    recording: Recording[LayerSample],
    criterion: str,
    *,
    relu_beta: float | None,
    tol: float,
    iters: int | None,
    generator: torch.Generator | None,
    ranks: Ranks,
) -> Scores:
    """The scores of all candidates, the same bits on every rank."""
    with ranks.agreed():
        _check_recorded(model, candidates, recording, criterion)
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    chooser = torch.Generator("cpu").manual_seed(ranks.first(seed))
    values: dict[str, Tensor] = {}
    directions: dict[str, Tensor] = {}
    residuals: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    counts = torch.tensor([recording.batches, recording.overflowed], device=device)
    batches, overflowed = ranks.sum(counts).tolist()
    for candidate in candidates:
        layer = model.get_submodule(candidate.name)
        assert has_neurons(layer)
        if criterion == "random":
            found = -torch.rand(
                len(rows_of(layer)), generator=chooser, dtype=torch.float64, device="cpu"
            )
        elif criterion == "magnitude":
            found = -current_rows(layer).double().flatten(1).norm(dim=1)
        elif criterion == "gradient_sum":
            sample = recording.layers[candidate.name]
            found = (ranks.sum(sample.gradient_sums.double()) / batches).clamp(max=0)
        else:
            sample = recording.layers[candidate.name]
            weight = _curvature_weight(model, candidate, sample, criterion, relu_beta)
            # Any rank's NaN is every rank's NaN, so that all of them raise.
            _check_finite(ranks.sum(sample.x.double().sum() + weight.double().sum()), candidate)
            found, direction, residual = _eigenpairs(
                layer, sample, weight, tol, iters, chooser, ranks
            )
            found = found / batches
            directions[candidate.name] = direction
            residuals[candidate.name] = residual
        values[candidate.name] = found.to(layer.weight.device)
    ranks.take_first(values, directions, residuals)
    for candidate in candidates:
        _check_finite(values[candidate.name], candidate)
    values = {name: v.cpu() for name, v in values.items()}
    return Scores(criterion, values, directions, residuals, batches, overflowed)


def _check_recorded(
    model: nn.Module,
    candidates: Sequence[Candidate],
    recording: Recording[LayerSample],
    criterion: str,
) -> None:
    for candidate in candidates:
        layer = model.get_submodule(candidate.name)
        if not has_neurons(layer):
            raise RuntimeError(
                f"Layer {candidate.name!r} is a {type(layer).__name__} now: the model was changed "
                "by others. Build a new NeuronScaling for it."
            )
        if criterion in RECORDED and candidate.name not in recording.layers:
            raise RuntimeError(f"Layer {candidate.name!r} has not been recorded.")


def _check_finite(numbers: Tensor, candidate: Candidate) -> None:
    if not bool(numbers.isfinite().all()):
        raise ValueError(
            f"The scores of layer {candidate.name!r} are NaN or infinite, because its inputs, "
            "gradients or weights are; nothing can be chosen by them."
        )


def _curvature_weight(
    model: nn.Module,
    candidate: Candidate,
    sample: LayerSample,
    criterion: str,
    relu_beta: float | None,
) -> Tensor:
    if criterion == "splitting":
        return sample.grad * GELU_CURVATURE
    activation = model.get_submodule(str(candidate.activation))
    name = activation_name(activation)
    if name is None:
        raise RuntimeError(f"Activation {candidate.activation!r} was changed by others.")
    beta = relu_beta if name == "relu" else None
    if name == "softplus":
        beta = float(activation.beta)  # type: ignore[arg-type]
    return splitting_weight(sample.grad, sample.preact, name, beta=beta)


def _eigenpairs(
    layer: Layer,
    sample: LayerSample,
    weight: Tensor,
    tol: float,
    iters: int | None,
    generator: torch.Generator,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest eigenvalue [n], its unit vector shaped like the weight, relative residual [n].

    S is the sum over all ranks, each of which multiplies by its own rows.
    """
    x, shape = sample.x, rows_of(layer).shape
    weight = weight * (sample.seen / max(1, len(x)))
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    start = torch.Generator(x.device).manual_seed(seed)
    if not isinstance(layer, nn.Conv2d) and not ranks.several:
        found = splitting_eigs(x, weight, iters=iters, tol=tol, generator=start)
    else:

        def products(w: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda v: ranks.sum(_times_s(layer, x, w, v))

        found = smallest_eigenpairs(
            products(weight),
            shape[0],
            shape[1:].numel(),
            iters=iters,
            tol=tol,
            generator=start,
            select=lambda neurons: products(weight.index_select(1, neurons)),
            device=x.device,
            dtype=x.dtype,
        )
    values, vectors, residuals = found
    return values[:, 0].double(), vectors[:, 0].reshape(shape), residuals[:, 0].double()


def _times_s(layer: Layer, x: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    """S v for v [n, k, d]."""
    if not isinstance(layer, nn.Conv2d):
        return splitting_hvp(x, weight, v, full_precision=True)
    stride, padding, dilation = (
        cast(tuple[int, int], size) for size in (layer.stride, layer.padding, layer.dilation)
    )
    filters = v.unflatten(-1, layer.weight.shape[1:])
    return splitting_hvp_conv2d(x, weight, filters, stride, padding, dilation).flatten(2)
