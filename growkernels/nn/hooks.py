"""Telling the hooks that a module carries for its user from what growkernels left there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class DriverHook:
    """A hook that one of growkernels' drivers put on a module.

    A copied or pickled model carries it along; what arrives in the copy is a left-over, which has
    no driver, no effect and no right to be kept.
    """

    left_over: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def vanish(self, module: nn.Module) -> None:
        """Leave a module; what torch.jit scripts, for one, may have no hooks."""
        for key, hook in list(module._forward_hooks.items()):
            if hook is self:
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)


def forget_left_overs(model: nn.Module) -> None:
    """Take off all modules of a copy what drivers had put on the model that it is a copy of."""
    for module in model.modules():
        for hook in list(module._forward_hooks.values()):
            if isinstance(hook, DriverHook) and hook.left_over:
                hook.vanish(module)


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """The forward and backward hooks that the module carries, left-overs aside."""
    return [
        hook
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        for hook in hooks.values()
        if not (isinstance(hook, DriverHook) and hook.left_over)
    ]


def is_watched(module: nn.Module) -> bool:
    """Whether a driver of growkernels that still lives has a hook on the module."""
    return any(isinstance(hook, DriverHook) for hook in hooks_of(module))
