"""Which convolutions can do with few basis filters, and with how many."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn
from torch.nn import functional as F

from growkernels.growth.basis_search import planner
from growkernels.growth.basis_search.candidates import candidate_ranks, saved_weights
from growkernels.growth.basis_search.layer_times import LayerTimes, measure_layer_times, slowest
from growkernels.growth.basis_search.sensitivities import Sensitivities
from growkernels.growth.basis_search.short_trainings import (
    Build,
    Progress,
    ShortTraining,
    Train,
    TrialMap,
    convolutions,
    measured_costs,
)
from growkernels.growth.basis_search.taylor import Batches, Loss, predicted_costs
from growkernels.growth.processes import Group, ranks_of
from growkernels.nn.convert import weights_read_elsewhere
from growkernels.nn.module_paths import ModulePaths, Plan
from growkernels.nn.record_fields import COUNT, by_name, check_state, list_of
from growkernels.nn.wrappers import check_watchable


class BasisSearch:
    """Finds the layers that can be basis convolutions, and the number of basis filters of each.

    ::

        search = BasisSearch(model)
        costs = search.sensitivities("taylor", batches=calibration)    # one pass
        times = search.times(images)                                   # on this machine
        plan = search.plan(costs, times, ratio=0.6)                    # {path: R}
        growkernels.nn.convert(model, plan, optimizer)

    Source: Alekseev et al., "Layer-Specific Optimization: Sensitivity Based Convolution Layers
    Basis Search" (arXiv 2408.06024), for the method ``"train"`` and one R per layer. The method
    ``"taylor"``, several R and the planner are answers to what the paper leaves open. The model is
    never changed.

    Args:
        model: any module.
        fractions: R as shares of a layer's output channels, each in (0, 1).
        layers: module paths of the candidates; None: every convolution without groups that
            has fewer multiplications with basis filters at one of the fractions.
        group: the processes that decide together, each with its own batches and trainings, whose
            results are those of all; every one of them calls the methods. None: those that a
            DistributedDataParallel trains the model on, or the default group.
        sample: an input (a tensor, a tuple of arguments, or a dict of keyword arguments). One pass
            on it shows convolutions whose weights the model reads without calling them; they are
            left out. None: whoever calls ``convert`` vouches that there are none.

    Attributes:
        left_out: {path: a sentence why not} of convolutions that are no candidates.

    Raises:
        TypeError: the model, or a part of it, is compiled, wrapped for data parallelism or sharded.
        ValueError: fractions out of range, nothing found, a layer that is not there or cannot be a
            candidate; the model raises an error on the sample.
    """

    def __init__(
        self,
        model: nn.Module,
        fractions: Sequence[float] = (0.25, 0.5, 0.75),
        layers: Collection[str] | None = None,
        group: Group = None,
        sample: Any = None,
    ) -> None:
        check_watchable(model)
        self.model = model
        self.group = group
        read_elsewhere = {} if sample is None else weights_read_elsewhere(model, sample)
        self._ranks, self.left_out = candidate_ranks(model, fractions, layers, read_elsewhere)
        self._paths = ModulePaths(model)  # what the keys of the ranks are paths of

    def state_dict(self) -> dict[str, Any]:
        """What is searched, for a checkpoint: {"candidates": {path: [R, ...]}}.

        A search keeps nothing else: costs and times are what its methods return, and trainings that
        are done are in the file ``results``.
        """
        candidates = {path: list(ranks) for path, ranks in self.candidates.items()}
        return {"driver": "BasisSearch", "candidates": candidates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Search what another search of such a model did.

        Raises:
            ValueError: a state of something else, or of layers that cannot be candidates here.
        """
        check_state("BasisSearch", state, {"candidates": by_name(list_of(COUNT, least=1))})
        ranks: dict[str, tuple[int, ...]] = {}
        layers = dict(self.model.named_modules())
        for path, wanted in state["candidates"].items():
            layer = layers.get(path)
            if not isinstance(layer, nn.Conv2d) or max(wanted) >= layer.out_channels:
                raise ValueError(
                    f"The state searches {path!r} with up to {max(wanted)} basis filters, which is "
                    "no such convolution here; build the search on the model as it was."
                )
            ranks[path] = tuple(wanted)
        self._ranks, self._paths = ranks, ModulePaths(self.model)

    @property
    def candidates(self) -> dict[str, tuple[int, ...]]:
        """Module path -> the numbers R of basis filters that save multiplications.

        The paths are those at which the layers are now. Of one that is not in the model any more it
        is the last known one.
        """
        paths = {path: self._paths.path_now(self.model, path) or path for path in self._ranks}
        return {paths[path]: ranks for path, ranks in self._ranks.items()}

    @overload
    def sensitivities(
        self,
        method: Literal["taylor"],
        *,
        batches: Batches,
        loss_fn: Loss = ...,
        draws: int = ...,
        generator: torch.Generator | None = None,
    ) -> Sensitivities: ...

    @overload
    def sensitivities(
        self,
        method: Literal["train"],
        *,
        train: Train,
        seeds: Sequence[int] = ...,
        build: Build | None = None,
        results: str | Path | None = None,
        map_trials: TrialMap = ...,
        progress: Progress | None = None,
    ) -> Sensitivities: ...

    def sensitivities(
        self,
        method: str,
        *,
        batches: Batches | None = None,
        loss_fn: Loss = F.cross_entropy,
        draws: int = 4,
        generator: torch.Generator | None = None,
        train: Train | None = None,
        seeds: Sequence[int] = (0,),
        build: Build | None = None,
        results: str | Path | None = None,
        map_trials: TrialMap = map,
        progress: Progress | None = None,
    ) -> Sensitivities:
        """The cost of replacing each candidate alone, for each of its R.

        ``"taylor"`` predicts the increase of the loss for all candidates from one pass over a
        calibration set, from gradients and curvature (``growkernels.growth.basis_search.taylor``
        says which). The model should have been trained a little.

        ``"train"`` trains a copy of the model for every candidate, R and seed, and one for every
        seed without basis convolutions. In all of them the weights and the generator start the
        same. The cost is the loss of quality against the run of the same seed.

        Args:
            method: ``"taylor"`` or ``"train"``; the arguments below belong to one of them.
            batches: taylor: (inputs, class indices or probabilities) on the model's device, best
                a dozen batches or more; of several processes each passes its own. The model's
                output is logits [N, classes].
            loss_fn: taylor: a cross entropy (logits, targets) -> mean over the batch.
            draws: taylor: random vectors per batch that probe the curvature, a backward pass each.
            generator: taylor: draws them; None: one with seed 0.
            train: train: train(model, generator) trains the model in place with data in an order
                taken from the CPU generator, and returns its quality as a float, larger is better
                (an accuracy, or minus a loss); NaN says that the training diverged. Of several
                processes each trains all, and the quality is the mean over them.
            seeds: train: of the generators; several give standard errors.
            build: train: build(generator) returns the model with initial weights drawn from the
                generator, so that seeds differ in them too; None: copies of the model.
            results: train: a JSON Lines file in which each finished training is stored at once. A
                search that was killed continues from it with the same result; keep one file for
                one ``train``, one set of its settings and one process.
            map_trials: train: like ``map``, but free to run trials at the same time and to return
                outcomes in any order, for instance ``multiprocessing.Pool(2).imap_unordered``;
                ``train`` and ``build`` then travel by pickle. As many workers as have the memory
                for one training each.
            progress: train: called with (trainings done, trainings to do).

        Raises:
            ValueError: an unknown method, an argument missing, a results file of another search;
                see also ``predicted_costs`` and ``measured_costs``.
            RuntimeError: a candidate the loss does not depend on; a diverged baseline; a candidate
                that is not in the model any more.
        """
        self._follow()
        ranks = ranks_of(self.model, self.group)
        if method == "taylor":
            if batches is None:
                raise ValueError("Method 'taylor' needs batches=, a calibration set.")
            rng = generator or torch.Generator("cpu").manual_seed(0)
            if ranks.own > 0:  # directions of their own, so that they average out
                seed = torch.randint(2**62, (), generator=rng, device=rng.device)
                rng = torch.Generator(rng.device).manual_seed(int(seed) ^ ranks.own)
            costs = predicted_costs(self.model, self._ranks, batches, loss_fn, draws, rng, ranks)
            return costs.noted(self._paths)
        if method != "train":
            raise ValueError(f"Unknown method {method!r}; choose 'taylor' or 'train'.")
        if train is None:
            raise ValueError("Method 'train' needs train=, a function that trains a model briefly.")
        training = ShortTraining(build or self.model, train, convolutions(self.model))
        file = None if results is None else Path(results)
        paths = self._paths
        costs = measured_costs(training, self._ranks, seeds, file, map_trials, progress, ranks)
        return costs.noted(paths)

    def times(self, sample: Any, rounds: int = 7, progress: Progress | None = None) -> LayerTimes:
        """Measure forward + backward of every candidate, in full and with each R.

        Args:
            sample: an input of the model (a tuple for several arguments) with the batch size,
                memory format and device of the training.
            rounds: in each, everything takes its turn; the times are the medians.
            progress: called with (rounds done, rounds to do).

        Of several processes the times are the slowest one's, which the others wait for.

        Raises:
            ValueError: rounds below 1, a candidate that the sample does not reach.
            RuntimeError: a candidate that is not in the model any more.
        """
        self._follow()
        ranks = ranks_of(self.model, self.group)
        times = None
        with ranks.agreed():
            times = measure_layer_times(self.model, self._ranks, sample, rounds, progress)
        assert times is not None
        return slowest(ranks.gathered(times)).noted(self._paths)

    def plan(
        self,
        sensitivities: Sensitivities,
        times: LayerTimes | None = None,
        *,
        ratio: float | None = None,
        max_cost: float | None = None,
    ) -> Plan:
        """R for every layer worth converting: {module path: R}, for ``growkernels.nn.convert``.

        The plan is a dict that knows its layers: if others renumber the model before it is carried
        out, ``convert`` finds them where they are then. A copy of it is a dict of paths.

        What is saved is measured step time if ``times`` are given, parameters otherwise. Costs of
        layers add up, as if they did not act on one another. The plan is optimal on a grid of
        savings 20000 fine (``growkernels.growth.basis_search.planner``), and a function of its
        arguments alone. Layers that a training found to diverge keep their kernel.

        Args:
            ratio: the target, time or parameters of the converted model relative to the full one,
                in (0, 1); the plan reaches it at least cost.
            max_cost: instead of a ratio, the largest predicted cost; the plan saves most within.

        Raises:
            ValueError: not one of the two targets, one that no plan reaches (the sentence tells
                the best that can be had), a NaN cost, sensitivities or times of other layers.
            RuntimeError: a candidate that is not in the model any more.
        """
        self._follow()
        if (ratio is None) == (max_cost is None):
            raise ValueError("Give either ratio= or max_cost= as the plan's target.")
        options = self._options(sensitivities, times)
        if max_cost is not None:
            if not max_cost >= 0:
                raise ValueError(f"max_cost is {max_cost}; it is a cost from 0 up.")
            return Plan(planner.largest_plan(options, max_cost)).noted(self._paths)
        assert ratio is not None
        if not 0 < ratio < 1:
            raise ValueError(f"ratio is {ratio}; it is a share of the full model's, in (0, 1).")
        total = times.step if times else sum(p.numel() for p in self.model.parameters())
        best = 1 - planner.largest_saving(options) / total
        if ratio < best:
            raise ValueError(
                f"No plan reaches {ratio:.3g} of the full model's "
                f"{'step time' if times else 'parameters'}: with every layer at its most saving "
                f"form it is {best:.3g}; raise ratio, or search more layers or smaller fractions."
            )
        return Plan(planner.cheapest_plan(options, (1 - ratio) * total)).noted(self._paths)

    def _options(
        self, sensitivities: Sensitivities, times: LayerTimes | None
    ) -> dict[str, list[planner.Option]]:
        options: dict[str, list[planner.Option]] = {}
        of_times = {} if times is None else {self._path_of(times, p): p for p in times.full}
        for name, costs in sensitivities.costs.items():
            path = self._path_of(sensitivities, name)
            if path is None or path not in self._ranks:
                raise ValueError(
                    f"The sensitivities name {name!r}, which is not a candidate of this search."
                )
            conv = self.model.get_submodule(path)
            assert isinstance(conv, nn.Conv2d)
            for rank, cost in costs.items():
                if cost != cost:
                    raise ValueError(
                        f"The cost of {rank} basis filters at layer {path!r} is NaN; search again."
                    )
                if times is None:
                    saving: float = saved_weights(conv, rank)
                else:
                    saving = times.saving(of_times.get(path, path), rank)
                options.setdefault(path, []).append(planner.Option(rank, saving, cost))
        return options

    def _path_of(self, result: Sensitivities | LayerTimes, path: str) -> str | None:
        return result.path_now(self.model, path)

    def _follow(self) -> None:
        """See what others changed in the model: follow its layers, or say that it was changed."""
        if self._paths.is_current(self.model):
            return
        ranks: dict[str, tuple[int, ...]] = {}
        for path, layer_ranks in self._ranks.items():
            now = self._paths.path_now(self.model, path)
            if now is None:
                raise RuntimeError(
                    f"Layer {path!r} of the search is not in the model any more: it was changed by "
                    "others, or converted. Build a new BasisSearch for the model as it is."
                )
            ranks[now] = layer_ranks
        self._ranks, self._paths = ranks, ModulePaths(self.model)
