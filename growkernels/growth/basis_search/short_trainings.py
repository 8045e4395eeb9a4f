"""The paper's search: train once per layer with a basis convolution only there, and compare.

Source: Alekseev et al., "Layer-Specific Optimization: Sensitivity Based Convolution Layers Basis
Search" (arXiv 2408.06024).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from growkernels.growth.basis_search.candidates import Ranks
from growkernels.growth.basis_search.model_copy import model_copy
from growkernels.growth.basis_search.results_file import ResultsFile
from growkernels.growth.basis_search.sensitivities import Sensitivities
from growkernels.growth.processes import Ranks as Processes
from growkernels.nn import convert

Train = Callable[[nn.Module, torch.Generator], float]
Build = Callable[[torch.Generator], nn.Module]
Progress = Callable[[int, int], None]  # called with (trainings done, trainings to do)


@dataclass(frozen=True)
class Trial:
    """One short training: with a basis convolution at ``path``, or of the model as it is."""

    path: str | None
    rank: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """Quality that a trial reached (NaN: it diverged) and the seconds it took."""

    trial: Trial
    quality: float
    seconds: float


TrialMap = Callable[[Callable[[Trial], Outcome], Iterable[Trial]], Iterable[Outcome]]


@dataclass(frozen=True)
class ShortTraining:
    """Runs trials; travels to worker processes by pickle if ``train`` and ``source`` do.

    ``source`` is the model whose weights every trial starts from, or a function that builds it;
    ``layers`` are the convolutions of the model that is searched (``convolutions``), of which the
    trials' paths are paths.
    """

    source: nn.Module | Build
    train: Train
    layers: Mapping[str, str]

    def initial_model(self, generator: torch.Generator) -> nn.Module:
        if isinstance(self.source, nn.Module):
            return model_copy(self.source)
        model = self.source(generator)
        if convolutions(model) != self.layers:
            raise ValueError(
                "build() returned a model with other convolutions, or at other paths, than the "
                "model that is searched; build it as it is now, its growth included."
            )
        return model

    def __call__(self, trial: Trial) -> Outcome:
        started = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(trial.seed)
        model = self.initial_model(generator)
        if trial.path is not None:
            convert(model, {trial.path: trial.rank})
        quality = self.train(model, generator)
        if isinstance(quality, bool) or not isinstance(quality, int | float):
            raise TypeError(
                f"train returned {type(quality).__name__}; return the quality as a float, larger "
                "is better (an accuracy, or minus a loss)."
            )
        return Outcome(trial, float(quality), time.perf_counter() - started)


def convolutions(model: nn.Module) -> dict[str, str]:
    """The model's convolutions by path, in words."""
    return {
        path: repr(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def measured_costs(
    training: ShortTraining,
    candidates: Ranks,
    seeds: Sequence[int],
    results: Path | None,
    map_trials: TrialMap,
    progress: Progress | None,
    processes: Processes,
) -> Sensitivities:
    """Costs of all candidates from one training for each of them, its R and a seed.

    Of several processes each does all trainings, and a quality is the mean over them.

    Raises:
        ValueError: no seeds, equal seeds, a results file of another search.
        RuntimeError: a training of the model as it is diverged, or ``map_trials`` left some out.
    """
    own: dict[Trial, Outcome] = {}
    with processes.agreed():
        own = _outcomes(training, candidates, seeds, results, map_trials, progress)
    told = processes.gathered(own)
    outcomes = {
        trial: Outcome(
            trial,
            sum(theirs[trial].quality for theirs in told) / len(told),
            sum(theirs[trial].seconds for theirs in told),
        )
        for trial in own
    }
    return _compare(candidates, seeds, outcomes)


def _outcomes(
    training: ShortTraining,
    candidates: Ranks,
    seeds: Sequence[int],
    results: Path | None,
    map_trials: TrialMap,
    progress: Progress | None,
) -> dict[Trial, Outcome]:
    """This process's outcome of every trial."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds is {tuple(seeds)}; give at least one, all different.")
    trials = [Trial(None, 0, seed) for seed in seeds] + [
        Trial(path, rank, seed)
        for path, ranks in candidates.items()
        for rank in ranks
        for seed in seeds
    ]
    outcomes: dict[Trial, Outcome] = {}
    with closing(ResultsFile(results, _identity(training))) as file:
        for key, (quality, seconds) in file.results.items():
            outcomes[Trial(*key)] = Outcome(Trial(*key), quality, seconds)
        missing = [trial for trial in trials if trial not in outcomes]
        if progress is not None:
            progress(len(trials) - len(missing), len(trials))
        for outcome in map_trials(training, missing):
            trial = outcome.trial
            outcomes[trial] = outcome
            file.add((trial.path, trial.rank, trial.seed), outcome.quality, outcome.seconds)
            if progress is not None:
                progress(sum(trial in outcomes for trial in trials), len(trials))
    left_out = sum(trial not in outcomes for trial in trials)
    if left_out:
        raise RuntimeError(
            f"map_trials returned without {left_out} of the {len(trials)} trainings; it must give "
            "one outcome for each trial, in any order."
        )
    return outcomes


def _compare(
    candidates: Ranks, seeds: Sequence[int], outcomes: dict[Trial, Outcome]
) -> Sensitivities:
    baseline = [outcomes[Trial(None, 0, seed)] for seed in seeds]
    diverged = [outcome.trial.seed for outcome in baseline if not math.isfinite(outcome.quality)]
    if diverged:
        raise RuntimeError(
            f"The model as it is diverged in its training with seed {diverged[0]}, so there is "
            "nothing to compare with; lower the learning rate in train()."
        )
    used = list(baseline)
    costs: dict[str, dict[int, float]] = {}
    errors: dict[str, dict[int, float]] = {}
    for path, ranks in candidates.items():
        costs[path], errors[path] = {}, {}
        for rank in ranks:
            replaced = [outcomes[Trial(path, rank, seed)] for seed in seeds]
            used += replaced
            lost = torch.tensor(
                [b.quality - r.quality for b, r in zip(baseline, replaced, strict=True)],
                device="cpu",
            ).double()
            cost = float(lost.mean())
            costs[path][rank] = cost if math.isfinite(cost) else math.inf
            error = float(lost.std()) / len(seeds) ** 0.5 if len(seeds) > 1 else math.nan
            errors[path][rank] = error
    return Sensitivities(
        method="train",
        costs=costs,
        errors=errors,
        baseline=sum(outcome.quality for outcome in baseline) / len(seeds),
        seconds=sum(outcome.seconds for outcome in used),
    )


def _identity(training: ShortTraining) -> list[object]:
    """What makes results comparable, as far as it can be told: the weights that are started from.

    For a function that builds the model: those it builds with seed 0.
    """
    model = training.initial_model(torch.Generator("cpu").manual_seed(0))
    return [
        [name, torch.hash_tensor(tensor).item() if tensor.numel() else 0]
        for name, tensor in model.state_dict().items()
    ]
