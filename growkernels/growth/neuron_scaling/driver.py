"""Non-uniform scaling: grow the neurons whose splitting matrices say that it helps (2402.12418)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from growkernels.growth.neuron_scaling import criteria, growth_step, selection
from growkernels.growth.neuron_scaling.candidates import LAYER_TYPES
from growkernels.growth.neuron_scaling.closed_form_scores import closed_form_scores
from growkernels.growth.neuron_scaling.costs import Ledger
from growkernels.growth.neuron_scaling.criteria import CRITERIA, DECREASES, RECORDED, Scores
from growkernels.growth.neuron_scaling.cross_sums import CrossRecorder
from growkernels.growth.neuron_scaling.followed_layers import FollowedLayers, Wishes
from growkernels.growth.neuron_scaling.initial_values import initial_values
from growkernels.growth.neuron_scaling.line_search import best_scale
from growkernels.growth.neuron_scaling.new_neurons import NewNeurons
from growkernels.growth.neuron_scaling.repeating import with_values
from growkernels.growth.neuron_scaling.samples_state import kept_from, state_of
from growkernels.growth.neuron_scaling.selection import Offer, Selection
from growkernels.growth.neuron_scaling.widenings import WIDTHS
from growkernels.growth.processes import Group, ranks_of
from growkernels.growth.same_function import check_same_output, outputs_in_eval_mode
from growkernels.growth.taps import left_out, one_batch
from growkernels.nn.exchange import undone_on_error
from growkernels.nn.grown_layers import FORMS
from growkernels.nn.optimizers import Optimizers, all_step_by, as_one
from growkernels.nn.record_fields import listed_states
from growkernels.nn.records import Record, append_record
from growkernels.nn.weights import weight_parameters
from growkernels.nn.wrappers import check_plain_module, check_watchable

TOLERANCE = 1e-5  # of the largest |output|: wider matrix products round differently


class NeuronScaling:
    """Scores of every neuron from ordinary passes, a choice under a budget, and the growth itself.

    ::

        scaling = NeuronScaling(model)
        for x, y in batches:                       # no update in between
            with scaling.recording():
                loss_fn(model(x), y).backward()
        chosen = scaling.select(scaling.scores(), budget=500_000)
        if chosen:
            scaling.grow(chosen, optimizer)

    **What is added.** Neuron i of a linear layer or convolution computes O_i = w_i.x + b_i. On
    the chosen ones O' = O + GELU(z) + z with z = a+.x + a-.x, two new neurons of opposite weights
    (arXiv 2402.12418, section 2), so z = 0 at first and the network computes what it did. See
    ``growkernels.nn.grown_layers.Branch`` for this form (``"pair"``), for the same with half the
    parameters (``"single"``), and for one in which the initial direction a matters (``"gated"``):
    in the first two it does not, because only a+ + a- = 0 enters the function and its gradients.
    New neurons are candidates themselves in the next step.

    **Criteria.** A score below 0 makes a neuron eligible, the lowest grow first. Formulas are in
    ``neuron_scaling.criteria``, those of GradMax and TINY in ``neuron_scaling.closed_form``.

    * ``"splitting"``: the smallest eigenvalue of the neuron's splitting matrix. Below 0: there is a
      direction of descent that the neuron lacks.
    * ``"s2d"``: the same by the neuron's own activation, where one is directly behind (Wu, Wang and
      Liu 2019); layers without are left out.
    * ``"gradient_sum"``: min(sum_j dL/dw_ij, 0), what the paper's authors' code computes.
    * ``"gradmax"`` (Evci et al. 2022) and ``"tiny"`` (Verbockhaven et al. 2024): minus the decrease
      of the loss, to first order, by new neurons of a linear layer that one linear layer reads, or
      new channels of a convolution that one convolution reads, with at most a batch norm and an
      activation between, in closed form; one score for each singular vector. With
      ``widen=("fc1",)`` or ``("conv",)``, ``depth=False`` and ``grow(init=...)`` of the same name.
      Layers share the whole budget by score per price instead of having equal parts. The noise of
      what they are made of comes with every score (``Scores.snr``).
    * ``"magnitude"``: -||w_i||, the largest neurons first. ``"random"``: -uniform(0, 1).
      Controls; they need no recorded batches.

    Several drivers can share one budget: ``gk.growth.share_budget``.

    **Rows.** S is needed many times over, so a uniform sample of ``rows`` rows is kept per layer
    and scaled up: see ``neuron_scaling.samples``. The gradient sums are exact, those of a loss that
    depends on the weights directly included.

    **Changes by others.** Layers are followed when others insert, renumber or grow something. Where
    a module was taken away, replaced or widened, what was recorded is of another network, and a
    sentence says so.

    **Widening.** Layers whose roles are in ``widen`` also (or, with ``depth=False``, instead) get
    one more neuron for each chosen one, and what reads them new columns: ``"fc1"``, the hidden
    layer of an MLP; ``"v"`` and ``"qk"`` of a growkernels.nn.Attention
    (``gk.nn.separate_attention`` makes those); and with ``sample``, which finds these in a forward
    of any form (with ``depth=False`` in the Conv1D of GPT-2 too), ``"conv"``, the inner convolution
    of a residual block or of a chain, and ``"gated"``, the gate of a gated MLP together with the
    half that it multiplies. Batch, instance and group norms may be between, layer and RMS norms
    directly behind a linear layer. ``neuron_scaling.widenings`` says how the function stays, and
    ``left_out`` why a layer cannot be widened, with ``depth=False``.

    Gradients accumulate in ``.grad`` as usual: clear them as usual.

    Args:
        model: any module. Not a wrapper: see Raises. Layers are found by type. timm's vision
            transformers have q, k and v in one linear layer, which can be grown but not widened;
            torchvision's have all of attention in one module, so only the MLPs are found. After
            ``gk.nn.separate_attention(model)`` both have q, k, v and proj as layers.
        criterion: one of the above.
        layers: paths of layers, or patterns with ``*`` such as ``"blocks.*"``; their branches come
            along. None: all of ``kinds`` but the last linear layer, the classifier.
        kinds: types of layers, of ``"linear"`` and ``"conv2d"`` (groups 1, zero padding).
        form: ``"pair"``, ``"single"`` or ``"gated"``.
        depth: whether chosen neurons get branches.
        widen: roles, see above.
        rows: kept per layer; a convolution keeps images with about as many positions.
        relu_beta: for ``"s2d"`` behind a ReLU, whose second derivative is 0 or infinite: take that
            of log(1 + exp(beta z)) / beta instead. Wu et al. take 3.
        sample: an input of the model (a tuple for several arguments), by which layers to widen are
            found in a forward of any form: see ``growkernels.growth.traced_graph``. None: in
            Sequentials and modules with fc1, act and fc2. It is kept, and run again after growths.
        generator: a CPU generator for the kept rows, the eigensolver's start and ``"random"``;
            None: the global one.
        group: the processes that decide together; None: those that a DistributedDataParallel trains
            the model on, or the default group.

    Raises:
        TypeError: the model, or a part of it, is compiled, wrapped for data parallelism or sharded.
        ValueError: nothing to grow, unknown names, layers with shared weights, a ReLU without
            ``relu_beta`` under ``"s2d"``, a role that no layer fits.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: str = "splitting",
        *,
        layers: Sequence[str] | None = None,
        kinds: Collection[str] = ("linear",),
        form: str = "single",
        depth: bool = True,
        widen: Collection[str] = (),
        rows: int = 4096,
        relu_beta: float | None = None,
        generator: torch.Generator | None = None,
        group: Group = None,
        sample: Any = None,
    ) -> None:
        check_watchable(model, sharded=True)
        _one_of("criterion", [criterion], CRITERIA)
        _one_of("kinds", kinds, LAYER_TYPES)
        _one_of("form", [form], FORMS)
        _one_of("widen", widen, WIDTHS)
        if rows < 1:
            raise ValueError(f"rows is {rows}; at least one row per layer is needed.")
        if relu_beta is not None and not relu_beta > 0:
            raise ValueError(f"relu_beta is {relu_beta}; a softplus needs a positive sharpness.")
        if depth and criterion in DECREASES:
            raise ValueError(
                f"Criterion {criterion!r} chooses new neurons of wider layers; pass depth=False "
                "and widen=('fc1',) or ('conv',)."
            )
        if not depth and not widen:
            raise ValueError("With depth=False name what to widen: widen=('fc1', 'v', 'qk').")
        self.model = model
        self.criterion = criterion
        self.form = form
        self.depth = depth
        self.group = group
        self._relu_beta = relu_beta
        self._generator = generator
        wishes = Wishes(criterion, layers, kinds, widen, depth, rows, relu_beta, generator, sample)
        self._followed = FollowedLayers(model, wishes)

    @property
    def left_out(self) -> dict[str, str]:
        """{path: reason} for layers that look like candidates and are none."""
        return self._followed.left_out

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of the layers whose neurons can be grown, found anew after each growth.

        Raises:
            RuntimeError: the model was changed by others since, in a way that recorded batches or
                named layers cannot follow.
        """
        self._followed.follow()
        return self._followed.names

    @property
    def categories(self) -> dict[str, str]:
        """Layer -> the category that it shares a part of the budget with."""
        self._followed.follow()
        return {candidate.name: candidate.category for candidate in self._followed.candidates}

    @contextmanager
    def recording(self, loss_scale: float = 1.0) -> Iterator[None]:
        """Record one batch: run its backward pass inside (its forward pass may have run before).

        One recording is one batch with one ordinary backward pass; a layer that runs several times
        in it is one layer with more rows. Several losses are added up first; batches whose
        gradients are accumulated have a recording each.

        Args:
            loss_scale: what the loss was multiplied by, ``scaler.get_scale()`` under a GradScaler.
                A batch that such a factor makes infinite or NaN does not count
                (``Scores.overflowed``), as its step is skipped.

        Raises:
            RuntimeError: the model was changed by others since earlier batches. At the end of the
                block: a layer got no gradient or those of several backward passes, its input was
                changed in place, or a gradient was taken with create_graph=True. The batch is not
                counted.
        """
        self._followed.follow()
        with one_batch(self._followed.recorder, loss_scale):
            yield

    def scores(self, *, tol: float = 1e-3, iters: int | None = None) -> Scores:
        """Every candidate neuron's score over all batches recorded since the last growth.

        With torch.distributed initialised S is summed over all ranks (one all_reduce per product)
        and all get the first rank's numbers, so every rank must call this, having recorded at
        least one batch. What is wrong on one rank is raised on all.

        Args:
            tol, iters: of the eigensolver, see ``gk.splitting_eigs``.

        Raises:
            RuntimeError: nothing recorded, or the model was changed by others since.
            ValueError: scores that are NaN or infinite.
        """
        ranks = ranks_of(self.model, self.group)
        with ranks.agreed():
            self._followed.follow()
            recorder = self._followed.recorder
            if self.criterion in RECORDED and not recorder.kept.layers:
                overflowed = left_out(recorder.kept.overflowed)
                raise RuntimeError(
                    f"No batches are recorded{overflowed}; run a backward pass inside "
                    "`with scaling.recording():`."
                )
        candidates = self._followed.candidates
        if isinstance(recorder, CrossRecorder):
            found = closed_form_scores(self.model, candidates, recorder.kept, self.criterion, ranks)
            return found.noted(self._followed.paths)
        scores = criteria.scores(
            self.model,
            candidates,
            recorder.kept,
            self.criterion,
            relu_beta=self._relu_beta,
            tol=tol,
            iters=iters,
            generator=self._generator,
            ranks=ranks,
        )
        return scores.noted(self._followed.paths)

    def reset(self) -> None:
        """Forget the recorded batches."""
        self._followed.recorder.reset()

    def select(
        self,
        scores: Scores,
        budget: float,
        min_eligible: int = 60,
        *,
        unit: str = "parameters",
        sample: Any = None,
        round_to: int | None = None,
    ) -> Selection:
        """The neurons to grow in this step; none if no layer has enough eligible ones.

        The budget is divided evenly among the categories (qkv, proj, fc1, fc2 in a DeiT; by name
        elsewhere) and spent from the lowest score upwards; what the shares leave over goes to the
        best of the rest.

        Args:
            scores: from ``scores()``.
            budget: what the step may add, in ``unit``.
            min_eligible: how many neurons of a layer must be eligible (the paper: 60).
            unit: ``"parameters"``; ``"flops"`` of one forward pass on the sample (two for each
                product of the layers' weights, as ``forward_flops`` counts them); or ``"seconds"``
                of it, in proportion to what each layer takes now.
            sample: an input of the model, for the last two units.
            round_to: widened layers get as many neurons as make their width a multiple of this.

        Raises:
            ValueError: a budget that does not pay for one neuron, or scores of other layers.
        """
        offer = self.offer(
            scores, Ledger(self.model, self.form, self.depth, unit, sample), min_eligible, round_to
        )
        return selection.select(offer, budget)

    def offer(
        self, scores: Scores, ledger: Ledger, min_eligible: int, round_to: int | None
    ) -> Offer:
        """What ``select`` chooses from, in the smallest numbers that the layers can grow by.

        Raises:
            ValueError: scores of other layers.
        """
        if round_to is not None and round_to < 1:
            raise ValueError(f"round_to is {round_to}; widths are multiples of a positive number.")
        self._followed.follow()
        scores = self._followed.now(scores)
        candidates, widths = self._followed.candidates, self._followed.widths()
        return Offer(candidates, scores, ledger, min_eligible, widths, round_to)

    def grow(
        self,
        chosen: Selection,
        optimizer: Optimizers | None = None,
        *,
        init: str = "parent",
        scale: float = 0.2,
        sample: Any = None,
        loss: Callable[[nn.Module], float] | None = None,
    ) -> None:
        """Grow the chosen neurons; the network computes what it did before, but for ``"tiny"``.

        Existing parameters keep their values, ``.grad`` and optimizer state, widened ones too; new
        parameters join the groups of the weights and biases beside them. If anything fails, model
        and optimizer are untouched. Afterwards the candidates are found anew and nothing is
        recorded. ``gk.growth.insertions(model)`` has the record of the growth for checkpoints,
        ``gk.growth.rebuild`` repeats it.

        Wrap again what held the old model: build a new DistributedDataParallel. What torch.compile
        has made of the model compiles anew at the next call, as often as it grows.

        Args:
            chosen: from ``select``.
            optimizer: the model's optimizer, a list of them, or None. Under SGD a ``"single"``
                branch gets gain sqrt(2), else 2, so that it trains like the pair.
            init: ``"parent"`` or ``"eigenvector"``, what new neurons start with (``"single"``
                branches: 0 in any case; in front of a layer or RMS norm: what the norm asks for);
                of neurons that ``"gradmax"`` or ``"tiny"`` chose, that.
            scale: of that start; the authors use 0.2. With ``"tiny"`` of the new neurons' effect;
                ``"gradmax"`` takes the mean norm of the layer's outgoing weights.
            loss: of a model, such as the mean over the recorded batches: with ``"tiny"`` the scale
                is the one that lowers it most, of 4, 2, 1, ... 1/4096, tried on copies.
            sample: an input of the model (a tuple for several arguments) to check with, in eval
                mode, that the output changes by no more than 1e-5 of the largest.

        Raises:
            ValueError: nothing chosen, a choice of other layers, or a start that is not possible.
            TypeError: an optimizer whose state cannot take new parameters, or a part of the model
                that is wrapped or sharded by now.
            RuntimeError: the function would change. With several processes: what is wrong on one,
                on all of them; or they chose differently.
        """
        ranks = ranks_of(self.model, self.group)
        joint: Optimizer | None = None
        with ranks.agreed():
            if init == "tiny" and sample is not None:
                raise ValueError(
                    "init='tiny' changes what the network computes, so there is nothing to check "
                    "on sample=; leave it out."
                )
            if init != "tiny" and loss is not None:
                raise ValueError(f"loss= is for the scale of init='tiny', and init is {init!r}.")
            joint = as_one(optimizer)
            check_plain_module(self.model)
        if loss is not None:

            def grow_copy(twin: nn.Module, scale: float) -> None:
                record, values = self._planned(chosen, joint, init, scale)
                growth_step.apply(twin, record, None, values)

            scale = best_scale(self.model, grow_copy, loss, ranks)
        with ranks.agreed():
            record, values = self._planned(chosen, joint, init, scale)
        neurons = repr(sorted(chosen.neurons.items()))
        doing = f"grow {', '.join(chosen.neurons)} (choice {zlib.crc32(neurons.encode()):x})"
        with undone_on_error(self.model, optimizer, self):
            with ranks.agreed(doing):
                before = None if sample is None else outputs_in_eval_mode(self.model, sample)
                growth_step.apply(self.model, record, joint, values)
                append_record(self.model, record)
                if before is not None:
                    after = outputs_in_eval_mode(self.model, sample)
                    check_same_output(before, after, TOLERANCE)
                followed = self._followed.found_anew()
            self._followed.recorder.remove()
            self._followed = followed

    def record(
        self,
        chosen: Selection,
        optimizer: Optimizers | None = None,
        *,
        init: str = "parent",
        scale: float = 0.2,
    ) -> Record:
        """What ``grow`` would do with these arguments, as a record; the model stays as it is.

        It has the values that new neurons start with where they come from recorded batches
        (``init="eigenvector"``); the record that a grown model keeps has not.
        ``gk.growth.grow_state`` does it to saved or sharded states, ``gk.growth.rebuild`` to
        another model.

        Raises:
            ValueError: nothing chosen, a choice of other layers, or a start that is not possible.
        """
        record, values = self._planned(chosen, as_one(optimizer), init, scale)
        return with_values(record, values)

    def _planned(
        self, chosen: Selection, optimizer: Optimizer | None, init: str, scale: float
    ) -> tuple[Record, Mapping[str, NewNeurons]]:
        """The record of a growth, and what its new neurons start with."""
        if self._followed.recorder.recording:
            raise RuntimeError("recording() is still open; grow after its block.")
        self._followed.follow()
        if not chosen:
            raise ValueError(f"There are no neurons to grow. {chosen.reason}")
        chosen = self._followed.choice_now(chosen)
        candidates = self._followed.candidates
        layers = [self.model.get_submodule(name) for name in chosen.neurons]
        weights = [p for layer in layers for p in weight_parameters(layer)]
        gain = math.sqrt(2) if all_step_by(optimizer, SGD, weights) else 2.0
        gated = self.depth and self.form == "gated"
        must_move = {c.name for c in candidates if gated or c.widening is not None}
        values = initial_values(self.model, chosen, init, scale, must_move)
        record = growth_step.plan(candidates, chosen, self.form, gain, self.depth, init, scale)
        return record, values

    def state_dict(self) -> dict[str, Any]:
        """What was recorded in this process, as tensors, numbers and strings, for a checkpoint.

        The state of a generator that was given is in it too.
        """
        self._followed.follow()
        state = state_of(self._followed.recorder.kept, self.criterion)
        if self._generator is not None:
            state["generator"] = self._generator.get_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on from what was recorded before, in place of what is recorded here.

        Args:
            state: from ``state_dict`` of a driver with the same arguments on the same model; or
                several, of processes that are one process now: a sample of all their rows.

        Raises:
            ValueError: a state of other layers, or for another criterion.
        """
        states = listed_states("NeuronScaling", state)
        self._followed.follow()
        # Of one kind: that of the criterion.
        kept: list[Any] = [kept_from(s, self.criterion, self.layers, self.model) for s in states]
        self._followed.recorder.load(kept)
        if self._generator is not None and "generator" in states[0]:
            self._generator.set_state(states[0]["generator"].cpu())

    def close(self) -> None:
        """Take the hooks off the model.

        A grown layer computes its branches one by one while they are watched, and in one product
        afterwards, which is faster and may differ in the last bits. So a resumed run repeats the
        bits of a first one if both have such a driver on the model, or neither.
        """
        self._followed.recorder.close()


def _one_of(what: str, given: Collection[str], known: Sequence[str]) -> None:
    if isinstance(given, str):
        raise TypeError(f"{what} is the string {given!r}; give a list of names.")
    for name in given:
        if name not in known:
            raise ValueError(f"Unknown {what} {name!r}; choose from {', '.join(known)}.")
