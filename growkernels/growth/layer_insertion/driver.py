"""SensLI: insert the layer whose virtual parameters have the largest gradient (2311.15995)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkernels.growth.layer_insertion.block_copies import BLOCK, block_record, insert_block
from growkernels.growth.layer_insertion.insertion import insert_identity, insertion_record
from growkernels.growth.layer_insertion.merit_norms import NORMS
from growkernels.growth.layer_insertion.merits import Merits
from growkernels.growth.layer_insertion.positions import (
    ALL_KINDS,
    Position,
    find_positions,
    named_positions,
)
from growkernels.growth.layer_insertion.recorder import Recorder
from growkernels.growth.layer_insertion.sums_state import state_of, sums_from
from growkernels.growth.layer_insertion.traced_positions import traced_positions
from growkernels.growth.processes import Group, ranks_of
from growkernels.growth.same_function import (
    check_same_output,
    outputs_in_eval_mode,
    running_once,
)
from growkernels.growth.taps import left_out, one_batch
from growkernels.nn import ResidualBlock
from growkernels.nn.exchange import undone_on_error
from growkernels.nn.module_paths import ModulePaths
from growkernels.nn.optimizers import Optimizers, as_one
from growkernels.nn.record_fields import listed_states
from growkernels.nn.records import Record, append_record, records_of
from growkernels.nn.wrappers import check_plain_module, check_watchable

INITS = ("copy", "fresh")


class LayerInsertion:
    """Merits of every candidate position from ordinary passes, and the insertion itself.

    ::

        inserter = LayerInsertion(model)
        for x, y in batches:                       # one pass, no update
            with inserter.recording():
                loss_fn(model(x), y).backward()
        merits = inserter.merits()
        position = inserter.select(merits)
        if position is not None:
            inserter.insert(position, optimizer)

    The merit of a position is the squared norm of dL/dW of a layer that would be inserted there
    as the identity, for the gradient averaged over the recorded batches (each counts the same, so
    with a loss that is a mean over its batch use batches of one size; drop a smaller last one).
    Such a layer passes dL/dh on unchanged, so h and dL/dh of the model as it is are enough.

    Positions of the kind ``"block"`` are between the blocks of a residual stack. There a copy of
    the block in front is inserted, with what it writes into the residual stream at zero (attention
    and MLP projections, layer scales, or the last norm of a ResNet's block): the identity, whose
    zero parameters have a gradient. The merit is the squared norm of that, from a forward pass of
    the copy alone. It can be larger than that of a single layer for the number of its parameters.

    Positions are followed when others insert, renumber or grow something. Where a module was taken
    away, replaced or widened, what was recorded is of another network, and a sentence says so.

    Gradients accumulate in ``.grad`` as usual: clear them as usual. Between a position's backward
    and the end of ``recording()`` its h and dL/dh stay in memory.

    Args:
        model: any module. Not a wrapper: see Raises.
        positions: None to find them (``find_positions``), or module paths whose outputs are the
            h, or {path: kind} where the kind cannot be inferred.
        norm: ``"frobenius"``, ``"frobenius_scaled"`` or ``"operator"`` (``merit_norms``).
        kinds: keep only the found positions of these kinds, e.g. ``("conv2d_relu",)``.
        activation: of the residual candidates; None: that of the model's ResidualBlocks, or tanh.
        scale: W1 = scale * I in residual candidates (the authors use 0.8).
        group: the processes that decide together; None: those that a DistributedDataParallel trains
            the model on, or the default group.
        sample: an input (a tensor, a tuple of arguments, or a dict of keyword arguments). One pass
            on it shows positions in hand-written forwards, and those between residual blocks; every
            insertion is checked with it. None: positions are told from registered modules.
        zero: with ``sample``, the layers or parameters of a residual block, by their names in it,
            that make it the identity when they are zero, such as ``("attn.proj", "mlp.fc2")``.
            None: those that the pass shows.
        init: of what is not zero in an inserted block: ``"copy"``, that of the block in front, or
            ``"fresh"``, drawn anew by its modules' ``reset_parameters`` and the ``_init_weights``
            of the model, if it has one. Merits are those of the very values.
        seed: of fresh values; the same on all processes.

    Attributes:
        left_out: {path: reason} for modules that look like positions and are none; with ``sample``.

    Raises:
        TypeError: the model, or a part of it, is compiled, wrapped for data parallelism or sharded.
        ValueError: nothing found, a position that is not in the model, an unknown norm or kind.
    """

    def __init__(
        self,
        model: nn.Module,
        positions: Sequence[str] | Mapping[str, str] | None = None,
        *,
        norm: str = "frobenius",
        kinds: Collection[str] | None = None,
        activation: str | None = None,
        scale: float = 0.8,
        group: Group = None,
        sample: Any = None,
        zero: Sequence[str] | None = None,
        init: str = "copy",
        seed: int = 0,
    ) -> None:
        check_watchable(model, sharded=True)
        if norm not in NORMS:
            raise ValueError(f"Unknown norm {norm!r}; choose one of {', '.join(NORMS)}.")
        unknown = set(kinds or ()) - set(ALL_KINDS)
        if unknown:
            raise ValueError(
                f"Unknown kinds {sorted(unknown)}; choose from {', '.join(ALL_KINDS)}."
            )
        if positions is not None and kinds is not None:
            raise ValueError("kinds filters the positions that are found; do not name both.")
        if sample is None and (zero is not None or BLOCK in (kinds or ())):
            raise ValueError(
                "Residual blocks are found, and checked to start as the identity, on an input of "
                "the model; pass sample=."
            )
        if isinstance(zero, str):
            raise TypeError(f"zero is the string {zero!r}; give a list of names in a block.")
        if init not in INITS:
            raise ValueError(f"Unknown init {init!r}; choose 'copy' or 'fresh'.")
        self.model = model
        self.init = init
        self.seed = seed
        self.norm = norm
        self.left_out: dict[str, str] = {}
        self._sample = sample
        self._zero = zero
        self.kinds = kinds
        self.activation = activation or _activation_of_blocks(model)
        self.scale = scale
        self.group = group
        self.reason = "select() has not been called yet."
        self._named = positions is not None
        self._paths = ModulePaths(model)  # what the recorder's positions are paths of
        self._shown = self._paths  # what the names that the user was given last are paths of
        self._recorder = self._watch(self._find() if positions is None else self._take(positions))

    @property
    def positions(self) -> tuple[Position, ...]:
        """The candidate positions, found anew after each insertion.

        Raises:
            RuntimeError: the model was changed by others since, in a way that recorded batches or
                named positions cannot follow.
        """
        self._follow()
        self._shown = self._paths
        return tuple(self._recorder.positions)

    @contextmanager
    def recording(self, loss_scale: float = 1.0) -> Iterator[None]:
        """Record one batch: run its backward pass inside (its forward pass may have run before).

        One recording is one batch with one ordinary backward pass. Several losses are added up
        first; batches whose gradients are accumulated have a recording each.

        Args:
            loss_scale: what the loss was multiplied by, ``scaler.get_scale()`` under a GradScaler;
                merits are those of the unscaled loss. A batch that such a factor makes infinite or
                NaN does not count (``Merits.overflowed``), as its step is skipped.

        Raises:
            RuntimeError: the model was changed by others since earlier batches. At the end of the
                block: a position got no gradient or several, its output was changed in place, or a
                gradient was taken with create_graph=True. The batch is not counted.
        """
        self._follow()
        with one_batch(self._recorder, loss_scale):
            yield

    def merits(self) -> Merits:
        """The merits over all batches recorded since the last insertion or ``reset``.

        With torch.distributed initialised the sums of all ranks are added by one all_reduce, so
        every rank must call this, having recorded at least one batch. What is wrong on one rank is
        raised on all.

        Raises:
            RuntimeError: nothing recorded, or the model was changed by others since.
            ValueError: a position for a ReLU layer has negative outputs.
        """
        ranks = ranks_of(self.model, self.group)
        with ranks.agreed():
            self._check_recorded()
        names = [position.name for position in self._recorder.positions]
        merits = self._recorder.sums.over(ranks).merits(names, self.norm)
        self._shown = self._paths
        return merits.noted(self._paths)

    def _check_recorded(self) -> None:
        self._follow()
        recorder = self._recorder
        if not recorder.sums.recorded:
            raise RuntimeError(
                f"No batches are recorded{left_out(recorder.sums.overflowed)}; run a backward "
                "pass inside `with inserter.recording():`."
            )
        for position in recorder.positions:
            if position.kind not in ("residual", BLOCK) and bool(
                (recorder.sums.samples[position.name] < 0).any()
            ):
                raise ValueError(
                    f"Position {position.name!r} has negative outputs, which an identity layer "
                    "with a ReLU would cut off; name the ReLU behind it, or use kind 'residual'."
                )

    def reset(self) -> None:
        """Forget the recorded batches."""
        self._recorder.reset()

    def select(self, merits: Merits, rule: str = "max", tau: float = 1.0) -> str | None:
        """The position to insert at, or None to decline; ``reason`` says why in a sentence.

        Args:
            merits: from ``merits()``.
            rule: ``"max"``: the largest merit, the first of equal ones. ``"relative"``: the same
                position, but only if merit / mean base-layer merit >= tau (the paper's rule).
            tau: for ``"relative"``.

        Raises:
            ValueError: a merit that is NaN or infinite, an unknown rule, no base merit, or the best
                position is not in the model any more.
        """
        best = merits.best()
        value = float(merits.values[best])
        name = merits.path_now(self.model, merits.names[best])
        if name is None:
            raise ValueError(
                f"The largest merit is that of a module that was at {merits.names[best]!r} and is "
                "not in the model any more: the model was changed in between. Record again."
            )
        if merits.knows(self.model):
            self._shown = ModulePaths(self.model)
        if rule == "max":
            overflowed = left_out(merits.overflowed)
            self.reason = f"{name!r} has the largest merit, {value:.4g}{overflowed}."
            return name
        if rule != "relative":
            raise ValueError(f"Unknown rule {rule!r}; choose 'max' or 'relative'.")
        ratio = merits.ratio()
        accepted = ratio >= tau
        self.reason = (
            f"The largest merit, {value:.4g} at {name!r}, is {ratio:.4g} times the mean "
            f"base-layer merit: {'at least' if accepted else 'declined, below'} tau = {tau:g}"
            f"{left_out(merits.overflowed)}."
        )
        return name if accepted else None

    def insert(
        self, position: str, optimizer: Optimizers | None = None, sample: Any = None
    ) -> nn.Module:
        """Insert the identity layer at a position; the network computes what it did before.

        The new layer is checked to be the identity on the last recorded h (relative error <= 1e-6,
        in float64), and with a ``sample`` the whole network's output before and after. Existing
        parameters and their optimizer state stay; the new parameters join the groups of the
        weights and biases in front of them. If anything fails, model and optimizer are untouched.
        Afterwards the positions are found anew and nothing is recorded.

        Wrap again what held the old model: build a new DistributedDataParallel. What torch.compile
        has made of the model compiles anew at the next call, as often as it grows.

        Args:
            position: one of ``positions``.
            optimizer: the model's optimizer, a list of them, or None.
            sample: an input of the model (a tuple for several arguments, a dict for keyword
                arguments) to check the whole network with, in eval mode; None: that of the driver.

        Returns:
            The new LinearReLU, Conv2dReLU, ResidualBlock or copied block.

        Raises:
            TypeError: a part of the model is wrapped or sharded by now.
            ValueError: not a position, a NaN merit there, or an optimizer of another model.
            RuntimeError: nothing recorded, the model was changed by others since, or the function
                would change. With several processes: what is wrong on one, on all of them; or they
                were given different positions.
        """
        ranks = ranks_of(self.model, self.group)
        joint: Optimizer | None = None
        with ranks.agreed():
            joint = as_one(optimizer)
            check_plain_module(self.model)
            sample = self._sample if sample is None else sample
            place, h = self._recorded_at(position)
        record = self._record_of(place, h)
        before_it = dict(self.model.named_modules(remove_duplicate=False))
        with undone_on_error(self.model, optimizer, self):
            with ranks.agreed(f"insert a layer behind {position!r}"):
                before = None if sample is None else outputs_in_eval_mode(self.model, sample)
                new = self._insert(place, joint, h)
                append_record(self.model, record)
                if before is not None:
                    with running_once(new, place.name):
                        after = outputs_in_eval_mode(self.model, sample)
                    check_same_output(before, after)
                recorder = self._watch(self._positions_after(before_it, place, new))
                paths = ModulePaths(self.model)
            self._recorder.remove()
            self._recorder, self._paths, self._shown = recorder, paths, paths
            return new

    def record(self, position: str) -> Record:
        """What ``insert(position)`` would do, as a record; the model stays as it is.

        ``gk.growth.grow_state`` does it to saved or sharded states, ``gk.growth.rebuild`` to
        another model.

        Raises:
            ValueError: not a position, or a NaN merit there.
            RuntimeError: nothing recorded, or the model was changed by others since.
        """
        return self._record_of(*self._recorded_at(position))

    def state_dict(self) -> dict[str, Any]:
        """What was recorded in this process, as tensors, numbers and strings, for a checkpoint."""
        self._follow()
        return state_of(self._recorder.sums, self._recorder.positions)

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on from what was recorded before, in place of what is recorded here.

        Args:
            state: from ``state_dict`` of a driver with the same arguments on the same model; or
                several, of processes that are one process now: their sum.

        Raises:
            ValueError: a state of other positions.
        """
        states = listed_states("LayerInsertion", state)
        self._follow()
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self._recorder.load(sums_from(states, self._recorder.positions, device))

    def close(self) -> None:
        """Take the hooks off the model."""
        self._recorder.close()

    def _recorded_at(self, position: str) -> tuple[Position, Tensor]:
        """A position to insert at, and the last h recorded there."""
        if self._recorder.recording:
            raise RuntimeError("recording() is still open; insert after its block.")
        self._follow()
        place = self._position(position)
        if not self._recorder.sums.recorded:
            raise RuntimeError(
                "No batches are recorded, so the new layer's width is not known and it cannot be "
                "checked; run one backward pass inside `with inserter.recording():` first."
            )
        if not bool(self._recorder.sums.virtual[position].isfinite().all()):
            raise ValueError(
                f"The gradient recorded at {position!r} is NaN or infinite, so its merit is too; "
                "nothing is inserted."
            )
        h = self._recorder.sums.samples[position]
        if not h.numel():
            raise RuntimeError(
                f"The outputs recorded at {position!r} are empty (shape {list(h.shape)}), so a new "
                "layer cannot be checked there; record a batch with samples."
            )
        return place, h

    def _insert(self, place: Position, optimizer: Optimizer | None, h: Tensor) -> nn.Module:
        if place.kind == BLOCK:
            return insert_block(
                self.model, place.name, place.template, place.zero, optimizer, place.seed
            )
        return insert_identity(
            self.model,
            place,
            optimizer,
            width=_width(place, h),
            activation=self.activation,
            scale=self.scale,
            sample=h,
        )

    def _record_of(self, place: Position, h: Tensor) -> Record:
        if place.kind == BLOCK:
            return block_record(self.model, place.name, place.template, place.zero, place.seed)
        return insertion_record(
            place,
            width=_width(place, h),
            activation=self.activation,
            scale=self.scale,
        )

    def _find(self) -> list[Position]:
        if self._sample is None:
            return find_positions(self.model, self.kinds)
        positions, self.left_out = traced_positions(
            self.model, self._sample, self.kinds, self._zero, self._seed_now()
        )
        return positions

    def _seed_now(self) -> int | None:
        """Another one after each growth, so that no two blocks start alike."""
        return None if self.init == "copy" else self.seed + 7919 * len(records_of(self.model))

    def _take(self, names: Sequence[str] | Mapping[str, str]) -> list[Position]:
        """The positions that the user named."""
        if self._sample is None:
            return named_positions(self.model, names)
        found, self.left_out = traced_positions(
            self.model, self._sample, None, self._zero, self._seed_now()
        )
        return named_positions(self.model, names, found, self.left_out)

    def _watch(self, positions: Sequence[Position]) -> Recorder:
        _refuse_none(positions, self.left_out)
        if self.norm != "frobenius" and any(p.kind == BLOCK for p in positions):
            raise ValueError(
                f"norm={self.norm!r} compares layers of one matrix each, and a block has several; "
                "use 'frobenius', or kinds= without 'block'."
            )
        return Recorder(self.model, positions, activation=self.activation, scale=self.scale)

    def _follow(self) -> None:
        """See what others changed in the model: follow its modules, or say that it was changed."""
        recorder = self._recorder
        if recorder.recording:
            return
        if not recorder.sums.recorded and not self._named:
            current = self._paths.is_current(self.model)
            if current and self._sample is not None:
                return
            positions = self._find()
            if current and positions == recorder.positions:
                return
            _refuse_none(positions, self.left_out)
            recorder.watch(self.model, positions)
        elif self._paths.is_current(self.model):
            return
        else:
            if recorder.sums.recorded:
                difference = self._paths.difference(self.model)
                if difference is not None:
                    raise RuntimeError(
                        f"The model was changed since its batches were recorded: {difference}. "
                        "Call reset(), or build a new LayerInsertion, and record again."
                    )
            now = self._paths.now(self.model)
            for position in recorder.positions:
                if position.name not in now:
                    raise RuntimeError(
                        f"The module that was at position {position.name!r} is not in the model "
                        "any more; build a new LayerInsertion for the model as it is."
                    )
            if recorder.sums.recorded:
                recorder.rename(now)
            else:
                recorder.watch(self.model, [p.renamed(now) for p in recorder.positions])
        self._paths = ModulePaths(self.model)
        if not recorder.sums.recorded:  # no name that was given before can be one to insert at
            self._shown = self._paths

    def _position(self, name: str) -> Position:
        if name is None:
            raise ValueError(f"There is no position to insert at. {self.reason}")
        meant = self._shown.module(name)
        for position in self._recorder.positions:
            if position.name == name and self.model.get_submodule(name) is meant:
                return position
        if meant is not None and self._shown.path_now(self.model, name) != name:
            raise RuntimeError(
                f"The module at {name!r} is not the one that was recorded: the model was changed "
                "in between. Take the position from `positions`, merits() or select() again."
            )
        raise ValueError(
            f"{name!r} is not a candidate position; they are: "
            f"{', '.join(repr(position.name) for position in self._recorder.positions)}."
        )

    def _positions_after(
        self, before: Mapping[str, nn.Module], place: Position, new: nn.Module
    ) -> list[Position]:
        if not self._named:
            return self._find()
        paths = {module: path for path, module in self.model.named_modules()}
        now = {path: paths[module] for path, module in before.items() if module in paths}
        positions = []
        for old in self._recorder.positions:
            here = there = old.renamed(now)
            if old == place and old.relu_called:  # behind that module is a ReLU of its own now
                beside = list(self.model.get_submodule(paths[new].rpartition(".")[0]).children())
                relu = paths[beside[beside.index(new) - 1]]
                here = replace(here, name=relu, relu_called=False)
            positions.append(here)
            if old == place:
                seed = None if there.seed is None else there.seed + 1
                positions.append(replace(there, name=paths[new], seed=seed))
        return positions


def _width(place: Position, h: Tensor) -> int:
    return h.shape[1 if place.kind == "conv2d_relu" else -1]


def _refuse_none(positions: Sequence[Position], left_out: Mapping[str, str]) -> None:
    if not positions and left_out:
        path, reason = next(iter(left_out.items()))
        raise ValueError(
            f"No candidate positions were found: of {path!r}, {reason}"
            + (f", and {len(left_out) - 1} more in left_out" if len(left_out) > 1 else "")
            + ". Name modules whose outputs are the h: positions=['path', ...]."
        )
    if not positions:
        raise ValueError(
            "No candidate positions were found: there is no ReLU behind a Linear or Conv2d in "
            "a Sequential and no ResidualBlock. Name the modules whose outputs are the h: "
            "positions=['path', ...]."
        )


def _activation_of_blocks(model: nn.Module) -> str:
    activations = {m.activation for m in model.modules() if isinstance(m, ResidualBlock)}
    if len(activations) > 1:
        raise ValueError(
            f"The model's residual blocks have different activations ({sorted(activations)}); "
            "pass activation= for the new ones."
        )
    return activations.pop() if activations else "tanh"
