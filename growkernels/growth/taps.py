"""Hooks on a model's modules, and the recording of ordinary training passes, batch by batch."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn


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
        """Count the batch, or say why it cannot be counted."""

    def end(self) -> None:
        """Leave the batch behind, counted or not."""


@contextmanager
def one_batch(recorder: BatchRecorder, loss_scale: float) -> Iterator[None]:
    """A batch that counts if the block and what follows from it succeed."""
    if recorder.recording:
        raise RuntimeError("recording() is already open; close it before the next batch.")
    if not loss_scale > 0:
        raise ValueError(f"loss_scale is {loss_scale}; it must be positive.")
    recorder.begin()
    try:
        yield
        recorder.finish(loss_scale)
    finally:
        recorder.end()


class Tap:
    """A forward hook that a copied or pickled model carries along without effect."""

    def __init__(self, recorder: Watcher | None = None) -> None:
        self._recorder = None if recorder is None else weakref.ref(recorder)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Tensor hooks have no place in a compiled graph; the recorder reports what is missing.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        recorder = None if self._recorder is None else self._recorder()
        if recorder is not None:
            recorder.forward_ran(module, args, output)

    def __reduce__(self) -> tuple[type[Tap], tuple[()]]:
        return Tap, ()
