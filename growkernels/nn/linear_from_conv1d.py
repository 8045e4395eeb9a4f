"""transformers' Conv1D (GPT-2), a linear layer with its weight transposed, as nn.Linear."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from growkernels.nn.exchange import Places, check_follows, exchange_with_state, obstacle
from growkernels.nn.module_exchange import FIELDS, Exchanged, ModuleExchange
from growkernels.nn.optimizers import Optimizers
from growkernels.nn.records import repeats

TRANSPOSITION = "linear_from_conv1d"  # of this exchange's records


class Transposition(Exchanged):
    """What :func:`linear_from_conv1d` did: the paths exchanged, and why others were not."""

    kind = TRANSPOSITION


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
    return _EXCHANGE.run(model, optimizer, record_only)


def _why_not(model: nn.Module, path: str, module: nn.Module, places: Places) -> str | None:
    return obstacle(module, places, kept=[module._parameters["bias"]])


def _linear(old: nn.Module, optimizer: Optimizer | None) -> nn.Linear:
    weight, bias = old.get_parameter("weight"), old.get_parameter("bias")
    inputs, outputs = weight.shape
    new = nn.Linear(inputs, outputs, device="meta").train(old.training)
    new.weight = nn.Parameter(_transposed(weight.detach()), weight.requires_grad)
    new.bias = bias
    if weight.grad is not None:
        new.weight.grad = _transposed(weight.grad)
    if optimizer is not None:
        parts = {"weight": new.weight}
        exchange_with_state(optimizer, "weight", weight, parts, lambda v: [_transposed(v)])
    return new


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous()


_EXCHANGE = ModuleExchange(
    done=Transposition,
    nothing="no Conv1D of transformers to exchange",
    of_record="exchanges the Conv1D",
    change="transposed",
    check_optimizer=check_follows,
    applies=is_transposed_linear,
    why_not=_why_not,
    changed=lambda module: [module.get_parameter("weight")],
    new=_linear,
)
repeats(TRANSPOSITION, fields=FIELDS)(_EXCHANGE.repeat)
