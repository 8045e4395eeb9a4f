"""Which layers GradMax and TINY can widen, and how much each new neuron would lower the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from growkernels.growth.neuron_scaling import closed_form
from growkernels.growth.neuron_scaling.candidates import Candidate
from growkernels.growth.neuron_scaling.criteria import Scores
from growkernels.growth.neuron_scaling.cross_sums import Recording
from growkernels.growth.neuron_scaling.new_neurons import NewNeurons
from growkernels.growth.processes import Ranks
from growkernels.nn.grown_layers import ENDING_IN_RELU


def with_closed_form(
    model: nn.Module, candidates: Sequence[Candidate], left_out: dict[str, str]
) -> list[Candidate]:
    """The candidates that can be widened in closed form; the others go to ``left_out``.

    Raises:
        ValueError: none is left.
    """
    kept = []
    for candidate in candidates:
        reason = _obstacle(model, candidate)
        if reason is None:
            kept.append(candidate)
        else:
            left_out[candidate.name] = reason
    if not kept:
        reasons = "; ".join(f"{c.name!r}: {left_out[c.name]}" for c in candidates)
        raise ValueError(f"No layer can be widened in closed form: {reasons}.")
    return kept


def _obstacle(model: nn.Module, candidate: Candidate) -> str | None:
    widening = candidate.widening
    if widening is None:
        return candidate.why_not_widened or "widen= names no role that it could have"
    if widening.norms:
        return (
            f"{widening.norms[0]!r} normalises its outputs, and would scale the gradients of "
            "channels that are 0 by 1 / sqrt(eps)"
        )
    if widening.role != "fc1" or widening.readers:
        return "the closed forms are for a linear layer that one linear layer reads"
    if not widening.only_activation:
        return "more than an activation stands between it and the layer that reads it"
    f = _function(model, candidate)
    if f is None:
        return "the activation behind it is not known"
    layer, reader = model.get_submodule(candidate.name), model.get_submodule(widening.follower)
    if isinstance(layer, ENDING_IN_RELU) or isinstance(reader, ENDING_IN_RELU):
        return "a ReLU is a part of it, or of the layer that reads it"
    if closed_form.needs_reader_bias(f) and not _has_bias(reader):
        return (
            "new neurons behind its activation do not start at 0, and "
            f"{widening.follower!r} has no bias to take that back"
        )
    if closed_form.start_of(f) and not _has_bias(layer):
        return (
            "it has no bias, with which new neurons could start beside the kink of its activation"
        )
    return None


def _has_bias(layer: nn.Module) -> bool:
    return layer._parameters.get("bias") is not None


def _function(model: nn.Module, candidate: Candidate) -> Callable[[Tensor], Tensor] | None:
    assert candidate.widening is not None
    traced = candidate.widening.activation
    return closed_form.function_of(model, traced or candidate.activation, traced is not None)


@torch.no_grad()
def closed_form_scores(
    model: nn.Module,
    candidates: Sequence[Candidate],
    recording: Recording,
    criterion: str,
    ranks: Ranks,
) -> Scores:
    """The scores of all candidates, the same bits on every rank."""
    with ranks.agreed():
        for candidate in candidates:
            if candidate.name not in recording.layers:
                raise RuntimeError(f"Layer {candidate.name!r} has not been recorded.")
    device = next(model.parameters()).device
    counts = torch.tensor([recording.batches, recording.overflowed], device=device)
    batches, overflowed = ranks.sum(counts).tolist()
    values: dict[str, Tensor] = {}
    noise: dict[str, float] = {}
    starts: dict[str, NewNeurons] = {}
    for candidate in candidates:
        assert candidate.widening is not None
        layer = model.get_submodule(candidate.name)
        reader = model.get_submodule(candidate.widening.follower)
        assert isinstance(layer, nn.Linear)
        assert isinstance(reader, nn.Linear)
        f = _function(model, candidate)
        assert f is not None
        sums = closed_form.over_ranks(recording.layers[candidate.name], ranks)
        if not bool(sums.cross.isfinite().all() and sums.hidden.isfinite().all()):
            raise ValueError(
                f"The scores of layer {candidate.name!r} are NaN or infinite, because its inputs "
                "or gradients are; nothing can be chosen by them."
            )
        if criterion == "gradmax":
            found, new = closed_form.gradmax(sums, batches, layer, reader, f)
        else:
            found, new = closed_form.tiny(sums, batches, layer, f)
        values[candidate.name] = found
        noise[candidate.name] = closed_form.snr(sums, batches)
        starts[candidate.name] = _from_first(new, ranks)
    ranks.take_first(values)
    values = {name: value.cpu() for name, value in values.items()}
    return Scores(
        criterion, values, batches=batches, overflowed=overflowed, snr=noise, starts=starts
    )


def _from_first(new: NewNeurons, ranks: Ranks) -> NewNeurons:
    """The first rank's: singular vectors have signs of their own on each."""
    table = {k: v for k, v in vars(new).items() if v is not None}
    ranks.take_first(table)
    return NewNeurons(**table)
