"""What a public call may do wrong: say so in one clear sentence, and leave everything as it was."""

from __future__ import annotations

import copy
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import growkernels as gk

PACKAGE = gk.__path__[0]
# How sentences of the ops begin, which are raised in C++.
OP = re.compile(r"(splitting|virtual_grad|basis_conv2d|symmetric_eigs|smallest_eigenpairs)\w*: ")
LONGEST = 1200


class RefusedError(Exception):
    """A call was refused as it may be."""


def check_clear(error: Exception) -> None:
    """Asserts that an error is a sentence that this package wrote for its user."""
    text = str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{last.filename}:{last.lineno}"
    told = f"{type(error).__name__} at {where}: {text}"
    assert type(error) in (ValueError, TypeError, RuntimeError), told
    raised = last.filename.startswith(PACKAGE) and (last.line or "").startswith("raise")
    assert raised or OP.match(text), f"not ours, {told}"
    assert text.strip(), told
    assert "\n" not in text, told
    assert len(text) < LONGEST, told


@contextmanager
def one_call(model: nn.Module | None = None, optimizer: Any = None) -> Iterator[None]:
    """Raises RefusedError for a clear error that changed nothing, AssertionError for any other."""
    before = None if model is None else Everything(model, optimizer)
    try:
        yield
    except RefusedError:
        raise
    except AssertionError as error:
        raise AssertionError(f"an assertion of the package: {error!r}") from error
    except Exception as error:
        check_clear(error)
        if before is not None:
            try:
                before.check_same(Everything(before.model, optimizer))
            except AssertionError as change:
                raise AssertionError(f"after {error!r}: {change}") from error
        raise RefusedError(str(error)) from error


class Everything:
    """All of a model, its gradients, hooks and records, and of its optimizers."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model = model
        modules = dict(model.named_modules(remove_duplicate=False))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.parts: dict[str, Any] = {
            "modules": {path: id(module) for path, module in modules.items()},
            "types": {path: type(module) for path, module in modules.items()},
            "modes": {path: module.training for path, module in modules.items()},
            "hooks": {path: hook_count(module) for path, module in modules.items()},
            "parameters": {name: id(parameter) for name, parameter in parameters.items()},
            "records": gk.growth.insertions(model),
            "optimizers": [
                [(g | {"params": [id(p) for p in g["params"]]}) for g in part.param_groups]
                for part in optimizers_of(optimizer)
            ],
        }
        self.parts["optimizers"] = copy.deepcopy(self.parts["optimizers"])
        self.tensors: dict[str, Tensor] = {}
        for name, value in (*parameters.items(), *model.named_buffers()):
            self.tensors[name] = value.detach().clone()
            if value.grad is not None:
                self.tensors[f"gradient of {name}"] = value.grad.detach().clone()
        for number, part in enumerate(optimizers_of(optimizer)):
            for parameter, state in part.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        self.tensors[f"{number}.{id(parameter)}.{key}"] = value.detach().clone()

    def check_same(self, after: Everything) -> None:
        """Asserts that nothing is different."""
        for what, value in self.parts.items():
            assert after.parts[what] == value, f"{what} changed: {value} to {after.parts[what]}"
        gone = self.tensors.keys() ^ after.tensors.keys()
        assert not gone, f"there are other tensors: {sorted(gone)}"
        for name, tensor in self.tensors.items():
            assert same_bits(tensor, after.tensors[name]), f"{name} changed"


def hook_count(module: nn.Module) -> int:
    return sum(len(v) for k, v in vars(module).items() if "hooks" in k and hasattr(v, "__len__"))


def optimizers_of(optimizer: Any) -> Sequence[Optimizer]:
    if optimizer is None:
        return []
    return optimizer if isinstance(optimizer, list) else [optimizer]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(_bits(a), _bits(b)))


def _bits(tensor: Tensor) -> Tensor:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    if not tensor.is_floating_point():
        return tensor
    return tensor.contiguous().view(integer[tensor.dtype.itemsize])
