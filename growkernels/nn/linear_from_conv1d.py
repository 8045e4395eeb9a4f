"""transformers' Conv1D (GPT-2), a linear layer with its weight transposed, as nn.Linear."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from growkernels.nn.compiled import without_compiling_wrapper
from growkernels.nn.exchange import (
    check_follows,
    check_holds_parameters,
    exchange_with_state,
    obstacle,
    places_of,
    state_obstacle,
    undone_on_error,
)
from growkernels.nn.optimizers import Optimizers, as_one
from growkernels.nn.records import Record, append_record, new_record, repeats
from growkernels.nn.wrappers import check_plain_module

TRANSPOSITION = "linear_from_conv1d"  # of this exchange's records


@dataclass(frozen=True)
class Transposition:
    """What :func:`linear_from_conv1d` did: the paths exchanged, and why others were not.

    ``record``: the same for ``gk.growth.rebuild`` and ``gk.growth.grow_state``.
    """

    exchanged: tuple[str, ...]
    skipped: dict[str, str]

    @property
    def record(self) -> Record:
        """Made of JSON's types."""
        return new_record(TRANSPOSITION, paths=list(self.exchanged))


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer with weight [inputs, outputs]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def linear_from_conv1d(
    model: nn.Module, optimizer: Optimizers | None = None, *, record_only: bool = False
) -> Transposition:
    """Exchange each Conv1D of transformers (GPT-2) for the nn.Linear that computes the same.

    What grows neurons or widens layers knows nn.Linear. Weights are transposed, with their
    gradients and the optimizer's state, which keep their places; biases stay the same parameters.
    ``state_dict`` has the same keys, but transposed weights: ``gk.growth.rebuild`` repeats the
    exchange before a checkpoint is loaded, from the model's records (``gk.growth.insertions``).

    On any error model and optimizer are as before.

    Args:
        model: any module, compiled or not; not a DataParallel wrapper.
        optimizer: the model's optimizer, a list of them, or None.
        record_only: say what would be done, and leave model and optimizer as they are.

    Returns:
        The paths exchanged, and {path: reason} of layers that were left alone: those that share
        parameters, or carry hooks.

    Raises:
        TypeError: an optimizer whose state can take no parameter; a model that is none, or has a
            wrapped or sharded part.
        ValueError: nothing to exchange; an optimizer that holds no parameter of the model, or
            whose state is not shaped like its parameter.
    """
    check_plain_module(model)
    model = without_compiling_wrapper(model)
    optimizer = as_one(optimizer)
    found, skipped = _exchangeable(model, optimizer)
    if not found:
        reasons = "".join(f"; {path!r} is left alone: {reason}" for path, reason in skipped.items())
        raise ValueError(f"The model has no Conv1D of transformers to exchange{reasons}.")
    done = Transposition(tuple(found), skipped)
    if record_only:
        return done
    with undone_on_error(model, optimizer):
        _exchange(model, found, optimizer)
        append_record(model, done.record)
        return done


@repeats(TRANSPOSITION)
def repeat_transposition(
    model: nn.Module, record: Mapping[str, Any], optimizer: Optimizer | None
) -> None:
    """Exchange the layers that a record names; not undone on error."""
    found, skipped = _exchangeable(model, optimizer, record["paths"])
    for path in record["paths"]:
        if path not in found:
            raise ValueError(
                f"The record exchanges the Conv1D at {path!r}, which this model cannot: "
                f"{skipped.get(path, 'there is none')}; it belongs to another model."
            )
    _exchange(model, found, optimizer)


def _exchangeable(
    model: nn.Module, optimizer: Optimizer | None, paths: Collection[str] | None = None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    if optimizer is not None:
        check_follows(optimizer)
        check_holds_parameters(model, optimizer)
    places = places_of(model)
    found: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for path, module in model.named_modules():
        if not is_transposed_linear(module) or (paths is not None and path not in paths):
            continue
        reason = obstacle(module, places, kept=[module._parameters["bias"]])
        if module is model:
            reason = "it is the model itself, which cannot be exchanged inside itself"
        if reason is not None:
            skipped[path] = reason
            continue
        found[path] = module
        weight = module.get_parameter("weight")
        if optimizer is not None and (reason := state_obstacle(optimizer, weight)):
            raise ValueError(
                f"{reason}, which cannot be transposed; pass optimizer=None and build a new "
                "optimizer afterwards."
            )
    return found, skipped


def _exchange(
    model: nn.Module, found: Mapping[str, nn.Module], optimizer: Optimizer | None
) -> None:
    for path, old in found.items():
        weight, bias = old.get_parameter("weight"), old.get_parameter("bias")
        inputs, outputs = weight.shape
        new = nn.Linear(inputs, outputs, device="meta").train(old.training)
        new.weight = nn.Parameter(_transposed(weight.detach()), weight.requires_grad)
        new.bias = bias
        if weight.grad is not None:
            new.weight.grad = _transposed(weight.grad)
        parent, _, child = path.rpartition(".")
        model.get_submodule(parent)._modules[child] = new
        if optimizer is not None:
            parts = {"weight": new.weight}
            exchange_with_state(optimizer, "weight", weight, parts, lambda v: [_transposed(v)])


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous()
