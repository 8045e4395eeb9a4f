"""Which layers GradMax and TINY can widen, and how much each new neuron would lower the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from growkernels.growth.neuron_scaling import closed_form
from growkernels.growth.neuron_scaling.candidates import Candidate
from growkernels.growth.neuron_scaling.criteria import Scores
from growkernels.growth.neuron_scaling.cross_sums import CrossSums
from growkernels.growth.neuron_scaling.elementwise import function_of, value_and_slope
from growkernels.growth.neuron_scaling.neuron_rows import has_neurons
from growkernels.growth.neuron_scaling.new_neurons import NewNeurons
from growkernels.growth.neuron_scaling.recording import Recording
from growkernels.growth.neuron_scaling.widenings import BATCH_NORMS, Widening
from growkernels.growth.processes import Ranks
from growkernels.nn.grown_layers import ENDING_IN_RELU


def with_closed_form(
    model: nn.Module, candidates: Sequence[Candidate], left_out: dict[str, str], criterion: str
) -> list[Candidate]:
    """The candidates that can be widened in closed form; the others go to ``left_out``.

    Raises:
        ValueError: none is left.
    """
    kept = []
    for candidate in candidates:
        reason = _obstacle(model, candidate, criterion)
        if reason is None:
            kept.append(candidate)
        else:
            left_out[candidate.name] = reason
    if not kept:
        reasons = "; ".join(f"{c.name!r}: {left_out[c.name]}" for c in candidates)
        raise ValueError(f"No layer can be widened in closed form: {reasons}.")
    return kept


def _obstacle(model: nn.Module, candidate: Candidate, criterion: str) -> str | None:
    widening = candidate.widening
    if widening is None:
        return candidate.why_not_widened or "widen= names no role that it could have"
    if widening.role == "gated":
        return (
            "a gate multiplies its outputs: with both at 0 no gradient would reach new neurons, "
            "and what one of them gains depends on the other, for which there is no closed form"
        )
    if widening.role not in ("fc1", "conv") or widening.readers:
        return "the closed forms are for a layer whose outputs one other layer reads"
    layer, reader = model.get_submodule(candidate.name), model.get_submodule(widening.follower)
    if isinstance(layer, nn.Conv2d) != isinstance(reader, nn.Conv2d):
        return f"it is a {type(layer).__name__}, and {widening.follower!r} is none"
    assert has_neurons(reader)
    if not widening.only_activation:
        return "more than a norm and an activation stands between it and the layer that reads it"
    if reason := _norm_obstacle(model, widening):
        return reason
    f = _function(model, candidate)
    if f is None:
        return "the activation behind it is not known"
    if isinstance(layer, ENDING_IN_RELU) or isinstance(reader, ENDING_IN_RELU):
        return "a ReLU is a part of it, or of the layer that reads it"
    if isinstance(reader, nn.Conv2d) and (
        reader.padding_mode != "zeros" or isinstance(reader.padding, str)
    ):
        return f"{widening.follower!r} pads with something else than a given number of zeros"
    if criterion == "gradmax" or widening.norms:
        return None
    if value_and_slope(f, 0.0)[0] and reader.bias is None:
        return (
            "new neurons behind its activation do not start at 0, and "
            f"{widening.follower!r} has no bias to take that back"
        )
    return None


def _norm_obstacle(model: nn.Module, widening: Widening) -> str | None:
    for name in widening.norms:
        norm = model.get_submodule(name)
        if type(norm) not in BATCH_NORMS:
            return (
                f"{name!r} normalises each sample by itself, by a size that the products over the "
                "batches leave out"
            )
    if len(widening.norms) > 1 or widening.norm_behind_activation:
        return f"{widening.norms[-1]!r} normalises what its activation has made"
    return None


def _function(model: nn.Module, candidate: Candidate) -> Callable[[Tensor], Tensor] | None:
    assert candidate.widening is not None
    traced = candidate.widening.activation
    return function_of(model, traced or candidate.activation, traced is not None)


@torch.no_grad()
def closed_form_scores(
    model: nn.Module,
    candidates: Sequence[Candidate],
    recording: Recording[CrossSums],
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
        assert has_neurons(layer)
        assert has_neurons(reader)
        f = _function(model, candidate)
        assert f is not None
        sums = closed_form.over_ranks(recording.layers[candidate.name], ranks)
        if not sums.rows:
            raise ValueError(
                f"The batches that were recorded for layer {candidate.name!r} are empty; record "
                "batches with samples."
            )
        if not all(bool(v.isfinite().all()) for v in vars(sums).values() if isinstance(v, Tensor)):
            raise ValueError(
                f"The scores of layer {candidate.name!r} are NaN or infinite, because its inputs "
                "or gradients are; nothing can be chosen by them."
            )
        closed = closed_form.gradmax if criterion == "gradmax" else closed_form.tiny
        normed = bool(candidate.widening.norms)
        found, new = closed(sums, batches, layer, reader, f, normed)
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
