"""What layers have shown over the batches so far, and how a batch comes to count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from torch import Tensor, nn

from growkernels.growth.taps import BackwardPasses, ForwardPass, watch

T = TypeVar("T")


@dataclass
class Recording(Generic[T]):
    """Of each layer what was kept over the batches so far.

    ``overflowed``: how many batches were left out because a loss scale made them infinite.
    """

    layers: dict[str, T] = field(default_factory=dict)
    batches: int = 0
    overflowed: int = 0


class LayerRecorder(ABC, Generic[T]):
    """Watches layers of one model; hooks stay on the modules as long as it lives.

    Attributes:
        recording: whether a batch is being recorded.
        kept: the batches so far.
        remove: takes all hooks off the model.
    """

    def __init__(self) -> None:
        self.recording = False
        self.kept: Recording[T] = Recording()
        self.remove: Callable[[], object] = lambda: None
        self._names: dict[nn.Module, str] = {}
        self._batch: dict[str, T] = {}
        self._passes = BackwardPasses()
        self._problems: list[str] = []
        self._closed = False

    def rename(self, paths: Mapping[str, str]) -> None:
        """Follow layers to the paths at which they are now."""
        self._names = {layer: paths[name] for layer, name in self._names.items()}
        layers = {paths[name]: of_layer for name, of_layer in self.kept.layers.items()}
        self.kept = replace(self.kept, layers=layers)

    def close(self) -> None:
        """Take all hooks off the model, for good."""
        self._closed = True
        self.remove()

    def reset(self) -> None:
        """Forget the recorded batches."""
        self.kept = Recording()

    def load(self, kept: Sequence[Recording[T]]) -> None:
        """Go on from what other recorders of such a model have kept, joined."""
        joined: Recording[T] = Recording()
        for other in kept:
            layers = dict(joined.layers)
            for name, of_layer in other.layers.items():
                self._join(layers, name, of_layer)
            batches, overflowed = other.batches, other.overflowed
            joined = Recording(layers, joined.batches + batches, joined.overflowed + overflowed)
        self.kept = joined

    def begin(self) -> None:
        """Start one batch."""
        self.end()  # whatever an interrupt left
        self._problems = []
        self._passes = BackwardPasses()
        self.recording = True

    def end(self) -> None:
        """Stop recording and let go of the batch's tensors, whether it was added or not."""
        self.recording = False
        self._batch = {}

    def finish(self, loss_scale: float) -> None:
        """Add the batch to what is kept.

        Raises:
            RuntimeError: a layer without a gradient, or an input changed in place. The batch is
                dropped, earlier ones are kept.
        """
        for name in self._names.values():
            if name not in self._batch:
                self._problems.append(self._no_gradient(name))
            elif name in self.kept.layers:
                self._compare_sizes(name, self.kept.layers[name], self._batch[name])
        if self._problems:
            raise RuntimeError(self._problems[0])
        finite = all(
            bool(tensor.isfinite().all())
            for of_layer in self._batch.values()
            for tensor in self._of_gradients(of_layer)
        )
        if loss_scale != 1.0 and not finite:  # a GradScaler skips this step too
            self.kept = replace(self.kept, overflowed=self.kept.overflowed + 1)
            return
        layers = dict(self.kept.layers)
        for name, of_layer in self._batch.items():
            self._join(layers, name, self._of_batch(name, of_layer, loss_scale))
        self.kept = replace(self.kept, layers=layers, batches=self.kept.batches + 1)

    @abstractmethod
    def gradient_arrived(self, forward: ForwardPass, grad: Tensor) -> None:
        """Called when the gradient of a watched forward pass has arrived, inside a recording."""

    @abstractmethod
    def _joined(self, old: T, new: T) -> T:
        """Both together."""

    @abstractmethod
    def _of_batch(self, name: str, of_layer: T, loss_scale: float) -> T:
        """What is kept of a layer of a finished batch, for the loss without its scale."""

    @abstractmethod
    def _of_gradients(self, of_layer: T) -> Collection[Tensor]:
        """The tensors that are infinite where the batch overflowed."""

    @abstractmethod
    def _no_gradient(self, name: str) -> str:
        """What is wrong where a layer has shown nothing, as a sentence."""

    def _compare_sizes(self, name: str, old: T, new: T) -> bool:
        """Whether both can be joined; if not, that is a problem of the batch."""
        return True

    def _join(self, layers: dict[str, T], name: str, new: T) -> None:
        layers[name] = self._joined(layers[name], new) if name in layers else new

    def _watch(self, names: Mapping[nn.Module, str], modules: Collection[nn.Module]) -> None:
        """Watch these modules instead; what was recorded of others is forgotten."""
        if not self._closed:
            remove_new = watch(self, modules)  # type: ignore[arg-type]  # subclasses have both calls
            self.remove()
            self.remove = remove_new
        self._names = dict(names)
        self.kept = Recording()
