"""The merits of all candidate positions, as one recorded pass gives them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from growkernels.nn.module_paths import NotedByPath


@dataclass(frozen=True)
class Merits(NotedByPath):
    """Squared gradient norms of the virtual layers (SensLI, arXiv 2311.15995).

    Attributes:
        names: module paths of the positions, in the order of ``values``.
        values: [L] float64 on the CPU; the squared norm of dL/dW averaged over the batches.
        base: the mean of the same norm over the existing weight matrices (the denominator of the
            paper's relative rule, base layers only); NaN when no such weight is trainable.
        snr: [L] float64, or None for fewer than two batches: ||mean||^2 (Frobenius) divided by the
            estimated variance of that mean over the mini-batches; inf where all batches agree.
        batches: number of batches, over all processes.
        norm: which norm ``values`` and ``base`` are.
        overflowed: number of further batches that a loss scale made infinite, and that therefore
            do not count, over all processes.
    """

    names: tuple[str, ...]
    values: Tensor
    base: float
    snr: Tensor | None
    batches: int
    norm: str
    overflowed: int = 0

    @property
    def note(self) -> str | None:
        """A sentence for reports when the comparison is empty, else None."""
        if len(self.names) > 1:
            return None
        return (
            f"There is one candidate position only ({self.names[0]!r}): the largest and the "
            "smallest merit are the same, so the selection rule is not tested."
        )

    def best(self) -> int:
        """Index of the largest merit, the first of equal ones.

        Raises:
            ValueError: a merit is NaN or infinite; the sentence names the positions.
        """
        unusable = [
            repr(name)
            for name, finite in zip(self.names, self.values.isfinite().tolist(), strict=True)
            if not finite
        ]
        if unusable:
            raise ValueError(
                f"The merit at {', '.join(unusable)} is NaN or infinite: the recorded gradients "
                "were. Nothing is inserted; look for the cause in the loss, or record again."
            )
        return int(self.values.argmax())

    def ratio(self) -> float:
        """Largest merit divided by the mean base-layer merit; 0 when both are zero.

        Raises:
            ValueError: a merit is not finite, or there is no base merit to compare with.
        """
        largest = float(self.values[self.best()])
        if not self.base >= 0:
            raise ValueError(
                "There is no base-layer merit to compare with: no existing weight matrix of the "
                "candidates' type is trainable, or its gradient is NaN. Use rule='max'."
            )
        if largest == 0:
            return 0.0
        return largest / self.base if self.base > 0 else float("inf")
