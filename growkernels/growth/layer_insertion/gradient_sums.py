"""Sums over mini-batches of the virtual layers' and the existing weights' gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from growkernels.growth.layer_insertion.merit_norms import squared_norm
from growkernels.growth.layer_insertion.merits import Merits
from growkernels.growth.processes import Ranks


@dataclass
class GradientSums:
    """What the batches recorded so far add up to.

    Attributes:
        virtual: position -> sum over batches of its virtual layer's gradient G.
        second_moments: position -> sum over batches of ||G||^2 (Frobenius), a 0-d tensor.
        base: index of an existing weight -> sum over batches of its gradient.
        samples: position -> some rows of its last h that has any.
        feature_maps: position, or index of an existing convolution -> (H, W) of its last input.
        batches: how many batches.
        loss_scale: the factor the recorded losses were multiplied by (a GradScaler's).
        overflowed: how many batches were left out because such a factor made them infinite.
    """

    virtual: dict[str, Tensor] = field(default_factory=dict)
    second_moments: dict[str, Tensor] = field(default_factory=dict)
    base: dict[int, Tensor] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)
    feature_maps: dict[str | int, tuple[int, int]] = field(default_factory=dict)
    batches: int = 0
    loss_scale: float = 1.0
    overflowed: int = 0

    @property
    def recorded(self) -> bool:
        """Whether there are sums, if only those of other processes' share of a checkpoint: 0."""
        return bool(self.virtual)

    @property
    def finite(self) -> bool:
        """Whether all sums are numbers."""
        tensors = (*self.virtual.values(), *self.base.values())
        return all(bool(total.isfinite().all()) for total in tensors)

    def renamed(self, paths: Mapping[str, str]) -> GradientSums:
        """The same sums for positions that are at other paths now."""
        return replace(
            self,
            virtual={paths[name]: total for name, total in self.virtual.items()},
            second_moments={paths[name]: m for name, m in self.second_moments.items()},
            samples={paths[name]: rows for name, rows in self.samples.items()},
            feature_maps={
                paths[key] if isinstance(key, str) else key: size
                for key, size in self.feature_maps.items()
            },
        )

    def rescaled(self, loss_scale: float) -> GradientSums:
        """The sums for a loss scaled by `loss_scale`."""
        factor = loss_scale / self.loss_scale
        if factor == 1.0:
            return self
        return replace(
            self,
            virtual={name: total * factor for name, total in self.virtual.items()},
            base={index: total * factor for index, total in self.base.items()},
            second_moments={n: m * factor**2 for n, m in self.second_moments.items()},
            loss_scale=loss_scale,
        )

    def with_batch(self, batch: GradientSums) -> GradientSums:
        """The sums with one more batch, at the batch's loss scale.

        Its tensors are made of the batch's own, by adding to them; those of this object are left
        alone, so that it stays whole if anything fails.
        """
        factor = batch.loss_scale / self.loss_scale

        def total(term: Tensor, before: Tensor | None, factor: float) -> Tensor:
            return term if before is None else term.add_(before, alpha=factor)

        base = {i: total(term, self.base.get(i), factor) for i, term in batch.base.items()}
        base.update((i, t * factor) for i, t in self.base.items() if i not in batch.base)
        return GradientSums(
            virtual={n: total(t, self.virtual.get(n), factor) for n, t in batch.virtual.items()},
            second_moments={
                n: total(moment, self.second_moments.get(n), factor**2)
                for n, moment in batch.second_moments.items()
            },
            base=base,
            samples={
                name: rows if rows.numel() else self.samples.get(name, rows)
                for name, rows in batch.samples.items()
            },
            feature_maps={**self.feature_maps, **batch.feature_maps},
            batches=self.batches + 1,
            loss_scale=batch.loss_scale,
            overflowed=self.overflowed,
        )

    def over(self, ranks: Ranks) -> GradientSums:
        """The sums over all ranks, by one all_reduce; self where there is one.

        The same bits on every rank, so that every rank takes the same decision. A weight that got
        a gradient on some ranks alone got none on the others; sizes of images are the first rank's.
        """
        if not ranks.several:
            return self
        own = self.rescaled(1.0)
        tensors = [*own.virtual.values(), *own.second_moments.values(), *own.base.values()]
        shapes = {index: tuple(total.shape) for index, total in own.base.items()}
        wide = any(t.dtype == torch.float64 for t in tensors)
        positions = {name: tuple(total.shape) for name, total in own.virtual.items()}
        told = ranks.gathered((positions, shapes, own.feature_maps, wide))
        if any(theirs != told[0][0] for theirs, *_ in told):
            raise RuntimeError(
                "The ranks recorded other positions or other widths, so their sums cannot be added "
                "up: give all ranks the same model and the same positions."
            )
        base_shapes = {index: shape for _, theirs, *_ in told for index, shape in theirs.items()}
        device = tensors[0].device
        dtype = torch.float64 if any(wide for *_, wide in told) else torch.float32
        base = {
            index: own.base[index]
            if index in own.base
            else torch.zeros(base_shapes[index], dtype=dtype, device=device)
            for index in sorted(base_shapes)
        }
        tensors = [
            *own.virtual.values(),
            *own.second_moments.values(),
            *base.values(),
            torch.tensor([float(own.batches), float(own.overflowed)], device="cpu"),
        ]
        flat = torch.cat([t.to(device, dtype).flatten() for t in tensors])
        pieces = torch.split(ranks.sum(flat), [t.numel() for t in tensors])
        summed = iter([piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)])
        feature_maps = {key: size for _, _, maps, _ in reversed(told) for key, size in maps.items()}
        virtual = {name: next(summed) for name in own.virtual}
        moments = {name: next(summed) for name in own.second_moments}
        total = {index: next(summed) for index in base}
        batches, overflowed = next(summed).tolist()
        return GradientSums(
            virtual=virtual,
            second_moments=moments,
            base=total,
            samples=own.samples,
            feature_maps=feature_maps,
            batches=round(batches),
            overflowed=round(overflowed),
        )

    def merits(self, names: Sequence[str], norm: str) -> Merits:
        """The norms of the means over the batches."""
        mean_factor = 1 / (self.batches * self.loss_scale)

        def mean_norm(total: Tensor, key: str | int, which: str) -> Tensor:
            norm_of_sum = squared_norm(total, which, self.feature_maps.get(key))
            return norm_of_sum.double().cpu() * mean_factor**2

        values = torch.stack([mean_norm(self.virtual[name], name, norm) for name in names])
        base = [mean_norm(total, index, norm) for index, total in self.base.items()]
        snr = None
        if self.batches > 1:
            means = torch.stack([mean_norm(self.virtual[n], n, "frobenius") for n in names])
            moments = torch.stack([self.second_moments[n].double().cpu() for n in names])
            moments /= self.loss_scale**2
            spread = (moments - self.batches * means).clamp(min=0)
            snr = means * self.batches * (self.batches - 1) / spread
        return Merits(
            names=tuple(names),
            values=values,
            base=float(torch.stack(base).mean()) if base else float("nan"),
            snr=snr,
            batches=self.batches,
            norm=norm,
            overflowed=self.overflowed,
        )
