"""Surgeries that exchange every module of a kind for another one that computes the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import nn
from torch.optim import Optimizer

from growkernels.nn.compiled import without_compiling_wrapper
from growkernels.nn.exchange import (
    Places,
    check_holds_parameters,
    places_of,
    state_obstacle,
    undone_on_error,
)
from growkernels.nn.optimizers import Optimizers, as_one
from growkernels.nn.record_fields import TEXT, list_of
from growkernels.nn.records import Record, append_record, new_record
from growkernels.nn.wrappers import check_plain_module


@dataclass(frozen=True)
class Exchanged:
    """What an exchange of modules did: the paths exchanged, and why others were not.

    ``record``: the same for ``gk.growth.rebuild`` and ``gk.growth.grow_state``.
    """

    kind: ClassVar[str]

    exchanged: tuple[str, ...]
    skipped: dict[str, str]

    @property
    def record(self) -> Record:
        """Made of JSON's types."""
        return new_record(self.kind, paths=list(self.exchanged))


FIELDS = {"paths": list_of(TEXT)}  # of a record of such an exchange

Done = TypeVar("Done", bound=Exchanged)


@dataclass(frozen=True)
class ModuleExchange(Generic[Done]):
    """One such surgery.

    Attributes:
        done: type of its results.
        nothing: a clause for models without such modules.
        of_record: what a record of it does, as in "the record separates the attention at".
        change: what becomes of parameters and of their state, as in "cannot be cut".
        check_optimizer: raises TypeError where an optimizer cannot take the new parameters.
        applies: whether a module is of the kind.
        why_not: (model, path, module, places of the model) -> a reason to leave it alone, or None.
        changed: the parameters of a module that are not kept.
        new: (module, optimizer) -> the one that takes its place, in the optimizer too.
    """

    done: type[Done]
    nothing: str
    of_record: str
    change: str
    check_optimizer: Callable[[Optimizer], None]
    applies: Callable[[nn.Module], bool]
    why_not: Callable[[nn.Module, str, Any, Places], str | None]
    changed: Callable[[Any], Iterable[nn.Parameter | None]]
    new: Callable[[Any, Optimizer | None], nn.Module]

    def run(self, model: nn.Module, optimizer: Optimizers | None, record_only: bool) -> Done:
        """Exchange all modules of the kind; the surgeries' own functions say what is raised."""
        check_plain_module(model)
        model = without_compiling_wrapper(model)
        optimizer = as_one(optimizer)
        found, skipped = self._find(model, optimizer)
        if not found:
            reasons = "".join(f"; {at!r} is left alone: {why}" for at, why in skipped.items())
            raise ValueError(f"The model has {self.nothing}{reasons}.")
        done = self.done(tuple(found), skipped)
        if record_only:
            return done
        with undone_on_error(model, optimizer):
            self._exchange(model, found, optimizer)
            append_record(model, done.record)
            return done

    def repeat(
        self, model: nn.Module, record: Mapping[str, Any], optimizer: Optimizer | None
    ) -> None:
        """Exchange the modules that a record names; not undone on error."""
        found, skipped = self._find(model, optimizer, record["paths"])
        for path in record["paths"]:
            if path not in found:
                raise ValueError(
                    f"The record {self.of_record} at {path!r}, which this model cannot: "
                    f"{skipped.get(path, 'there is none')}; it belongs to another model."
                )
        self._exchange(model, found, optimizer)

    def _find(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        paths: Collection[str] | None = None,
    ) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """The modules by path (all, or those named), and why others are left alone."""
        if optimizer is not None:
            self.check_optimizer(optimizer)
            check_holds_parameters(model, optimizer)
        places = places_of(model)
        found: dict[str, nn.Module] = {}
        skipped: dict[str, str] = {}
        for path, module in model.named_modules():
            if not self.applies(module) or (paths is not None and path not in paths):
                continue
            if module is model:
                skipped[path] = "it is the model itself, which cannot be exchanged inside itself"
            elif reason := self.why_not(model, path, module, places):
                skipped[path] = reason
            else:
                found[path] = module
        for parameter in (p for module in found.values() for p in self.changed(module)):
            if optimizer is None or parameter is None:
                continue
            if reason := state_obstacle(optimizer, parameter):
                raise ValueError(
                    f"{reason}, which cannot be {self.change}; pass optimizer=None and build a new "
                    "optimizer afterwards."
                )
        return found, skipped

    def _exchange(
        self, model: nn.Module, found: Mapping[str, nn.Module], optimizer: Optimizer | None
    ) -> None:
        for path, module in found.items():
            parent, _, child = path.rpartition(".")
            model.get_submodule(parent)._modules[child] = self.new(module, optimizer)
