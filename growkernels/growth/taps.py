"""Hooks on a model's modules, and the recording of ordinary training passes, batch by batch.

A recorder takes what it needs of a module's forward pass, and the gradient of the module's output
when it arrives. One recording is one batch, and one batch is one ordinary backward pass: the sums
that drivers build are those of a first-order gradient that each forward pass receives once. What
else makes a hook fire is told apart here and refused by its cause.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.utils.hooks import RemovableHandle

from growkernels.nn.hooks import DriverHook
from growkernels.nn.wrappers import is_fully_sharded_unit

HIGHER_ORDER = (
    "has a gradient that was taken with create_graph=True (a gradient penalty, a higher-order "
    "gradient, torch.func), so its outputs and their gradients are not all that the loss's second "
    "backward pass depends on. Record with a loss without that term, or leave it out."
)
FORWARD_MODE = (
    "ran in forward-mode differentiation (torch.func.jvp, make_dual), so its outputs and their "
    "gradients are not all that the loss depends on. Record an ordinary forward pass."
)
TRANSFORMED = (
    "ran inside a transform of torch.func or a batched backward pass, which hooks cannot look "
    "into. Record an ordinary backward pass."
)
SEVERAL_PASSES = (
    "got more than one gradient in one recording, from several backward passes: give each batch "
    "its own `with recording()`, add several losses up and call backward() once, and run other "
    "passes (adversarial examples, saliency) outside of it."
)


class Watcher(Protocol):
    """What a Tap reports to."""

    def forward_ran(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward pass of a watched module that records gradients has run."""


class BatchRecorder(Protocol):
    """What records the backward passes of one batch after the other."""

    recording: bool

    def begin(self) -> None:
        """Begin a batch."""

    def finish(self, loss_scale: float) -> None:
        """Count the batch, or say why it cannot be counted; what was counted before is kept."""

    def end(self) -> None:
        """Leave the batch behind, counted or not."""


@contextmanager
def one_batch(recorder: BatchRecorder, loss_scale: float) -> Iterator[None]:
    """A batch that counts if the block and what follows from it succeed."""
    if recorder.recording:
        raise RuntimeError("recording() is already open; close it before the next batch.")
    if not loss_scale > 0:
        raise ValueError(f"loss_scale is {loss_scale}; it must be positive.")
    try:
        try:
            recorder.begin()
            yield
            recorder.finish(loss_scale)
        finally:
            recorder.end()
    finally:  # also where an interrupt keeps end() from running
        recorder.recording = False


class Tap(DriverHook):
    """A forward hook that tells a recorder what ran; nothing in a copied or pickled model."""

    def __init__(self, recorder: Watcher | None = None) -> None:
        self._recorder = None if recorder is None else weakref.ref(recorder)
        self.left_over = recorder is None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Tensor hooks have no place in a compiled graph; the recorder reports what is missing.
        if torch.compiler.is_compiling():
            return
        if self._recorder is None:
            self.vanish(module)
        elif torch.is_grad_enabled() and (recorder := self._recorder()) is not None:
            recorder.forward_ran(module, args, output)

    def __reduce__(self) -> tuple[type[Tap], tuple[()]]:
        return Tap, ()


def watch(recorder: Watcher, modules: Iterable[nn.Module]) -> Callable[[], object]:
    """Put taps on modules until what is returned is called, or the recorder is gone."""
    # fully_shard's own hook, after which the weights are shards again, is behind the tap.
    handles = [
        module.register_forward_hook(Tap(recorder), prepend=is_fully_sharded_unit(module))
        for module in modules
    ]
    for handle in handles:
        weakref.finalize(recorder, handle.remove).atexit = False
    return partial(remove, handles)


def remove(handles: Iterable[RemovableHandle]) -> None:
    """Remove hooks."""
    for handle in handles:
        handle.remove()


class ForwardPass:
    """One forward pass of a watched module, from its end to the arrival of its output's gradient.

    Attributes:
        module: the module.
        kept: what the recorder needs of the pass; None once the gradient has arrived and no other
            can (the graph is not retained), so that nothing outlives the backward pass by it.
        obstacle: why the gradient of this pass is not what a recorder can use, or None.
    """

    def __init__(self, module: nn.Module, output: Tensor, kept: Any) -> None:
        self.module = module
        self.kept: Any = kept
        self.obstacle: str | None = None
        # A checkpointed part runs again inside the backward pass, and reentrant checkpointing
        # starts an inner backward pass then: both passes are the one that is running now.
        self._inside = torch._C._current_graph_task_id()
        if _is_transformed(output):
            self.obstacle = TRANSFORMED
        elif unpack_dual(output).tangent is not None:
            self.obstacle = FORWARD_MODE

    @property
    def recomputed(self) -> bool:
        """Whether it ran inside a backward pass."""
        return self._inside != -1

    @property
    def backward_pass(self) -> int:
        """A number for the backward pass that is running now, the outermost one known."""
        return self._inside if self.recomputed else torch._C._current_graph_task_id()

    def tell(self, recorder: GradientWatcher, output: Tensor) -> None:
        """Report the gradient of the output to the recorder, as long as it lives."""
        alive = weakref.ref(recorder)

        def arrived(grad: Tensor) -> None:
            if torch.is_grad_enabled():  # with create_graph=True hooks run in grad mode
                self.obstacle = HIGHER_ORDER
            elif _is_transformed(grad):
                self.obstacle = TRANSFORMED
            watcher = alive()
            if watcher is not None and watcher.recording:
                watcher.gradient_arrived(self, grad)
            if watcher is None or not torch._C._autograd._get_current_graph_task_keep_graph():
                self.kept = None

        output.register_hook(arrived)


class GradientWatcher(Protocol):
    """What a ForwardPass reports to."""

    recording: bool

    def gradient_arrived(self, forward: ForwardPass, grad: Tensor) -> None:
        """The gradient of a forward pass's output, inside a recording."""


class BackwardPasses:
    """Tells a batch's one gradient of each thing from every other that makes its hook fire."""

    def __init__(self) -> None:
        self._of: dict[object, int] = {}
        self._recomputed = False

    def obstacle(self, forward: ForwardPass) -> str | None:
        """Why the gradient that a forward pass gets now cannot be recorded, or None."""
        self._recomputed = self._recomputed or forward.recomputed
        return forward.obstacle or self._several(forward.module, forward.backward_pass)

    def obstacle_of_weight(self, weight: object, grad: Tensor) -> str | None:
        """The same for a gradient that a weight gets now, which is a sum over its uses."""
        if torch.is_grad_enabled():
            return HIGHER_ORDER
        if _is_transformed(grad):
            return TRANSFORMED
        if self._recomputed:  # each checkpointed part is a backward pass of its own there
            return None
        return self._several(weight, torch._C._current_graph_task_id())

    def _several(self, key: object, backward_pass: int) -> str | None:
        first = self._of.setdefault(key, backward_pass)
        return None if first == backward_pass else SEVERAL_PASSES


def left_out(overflowed: int) -> str:
    """A parenthesis about batches that a loss scale made infinite; nothing if there are none."""
    if not overflowed:
        return ""
    return f" ({overflowed} batches overflowed under their loss scale and were left out)"


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which batches of this dtype are summed up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_transformed(tensor: Tensor) -> bool:
    transforms = torch._C._functorch
    return transforms.is_functorch_wrapped_tensor(tensor) or transforms.is_legacy_batchedtensor(
        tensor
    )
