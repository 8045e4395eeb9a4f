"""What the study of non-uniform scaling compares, as data, in the sizes of its two presets.

Times are in epochs. The preset ``paper`` has those of the authors' published command (300 epochs,
50 before the first growth, one every 30); ``quick`` has about a tenth of them and three
tenths of the intervals, because every growth makes each later step dearer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from growkernels.experiments.images.store import Selection

# "uniform" widens every layer by the same share; the others are the driver's.
Criterion = Literal["splitting", "s2d", "gradient_sum", "magnitude", "random", "uniform"]
Form = Literal["pair", "gated"]
Direction = Literal["eigenvector", "parent"]

# How far from the reduced to the full network the paper's two results are: 11.0 M, 15.6 M and
# 19.4 M of 21.7 M parameters.
SMALL, LARGE = (15.6 - 11.0) / (21.7 - 11.0), (19.4 - 11.0) / (21.7 - 11.0)
CROPPED = 256  # large images are stored as squares of this size; the network sees 224 of it
INPUT = 224
SYNTHETIC_CLASSES = 5  # with more, so short a training ends before much is learned
FINAL_EPOCHS = 3  # final values are means over so many: one epoch's accuracy is noisier


@dataclass(frozen=True)
class Growth:
    """How a variant grows: ``share`` of the way from the reduced to the full size, in the end.

    ``direction`` is what new neurons start in. It matters in the gated form alone: a pair starts as
    +a and -a, gets the same gradient in both halves, and so depends on the sum alone, which is 0.
    """

    share: float
    interval: int
    criterion: Criterion = "splitting"
    form: Form = "pair"
    direction: Direction = "parent"


@dataclass(frozen=True)
class Variant:
    """One curve: it starts ``start`` of the way from the reduced (0) to the full (1) size.

    ``operations_of`` names a grown variant: this one, which does not grow, is trained by the same
    recipe for as many epochs as that one's operations pay for.
    """

    name: str
    title: str
    start: float = 0.0
    growth: Growth | None = None
    operations_of: str | None = None


@dataclass(frozen=True)
class Architecture:
    """A DeiT for square images of ``image_size`` pixels; reduced to half its inner widths."""

    embed: int
    depth: int
    heads: int
    patch: int
    image_size: int

    def widths(self, share: float) -> tuple[int, int]:
        """Widths of q, k, v and of fc1 between the reduced (0) and the full (1) network.

        As even as can be, with ``share`` of the parameters that lie in between: the attention
        widths are rounded to a multiple of the heads, fc1 makes up for it.
        """
        half, hidden = self.embed // 2, 2 * self.embed
        attention = half + round(half * share / self.heads) * self.heads
        per_feature = 3 * (self.embed + 1) + self.embed  # q, k, v, and proj's column
        per_hidden = 2 * self.embed + 1
        wanted = share * (half * per_feature + hidden * per_hidden)
        return attention, hidden + round((wanted - (attention - half) * per_feature) / per_hidden)


@dataclass(frozen=True)
class Recipe:
    """DeiT's training. ``rate`` is the peak of the learning rate; 0 turns mixing or erasing off.

    ``epoch_images`` are drawn without replacement for every epoch; None: all. Each is shown
    ``repeats`` times in its batch, in different augmentations (repeated augmentation).
    """

    batch: int
    rate: float
    warmup_epochs: float
    smoothing: float = 0.1
    drop_path: float = 0.1
    weight_decay: float = 0.05
    mixup: float = 0.8
    cutmix: float = 1.0
    erasing: float = 0.25
    rand_augment: bool = True
    resized_crops: bool = True
    repeats: int = 3
    epoch_images: int | None = None
    warmup_rate: float = 1e-6
    final_rate: float = 1e-5


@dataclass(frozen=True)
class Setting:
    """The whole study: every variant in ``runs`` runs, which share seeds and batches.

    ``first_growth`` epochs lie before the first growth; ``growth_batches`` of training images are
    looked at for every growth, of which each layer keeps ``growth_rows`` tokens; a layer needs
    ``eligible`` neurons with a score below 0 to grow. Tested are every ``test_every``-th epoch and
    the last ``FINAL_EPOCHS``.
    """

    architecture: Architecture
    recipe: Recipe
    variants: tuple[Variant, ...]
    epochs: int
    first_growth: int
    growth_batches: int
    growth_rows: int
    eligible: int
    runs: int
    test_every: int = 1
    seed: int = 1

    def variant(self, name: str) -> Variant:
        return next(v for v in self.variants if v.name == name)

    def tests_after(self, epoch: int) -> bool:
        """Whether the network is tested after this epoch (counted from 0)."""
        last = epoch >= self.epochs - FINAL_EPOCHS
        return last or (epoch + 1) % self.test_every == 0

    def growth_epochs(self, variant: Variant) -> list[int]:
        """Before which epochs (counted from 0) the variant grows."""
        if variant.growth is None:
            return []
        return list(range(self.first_growth, self.epochs, variant.growth.interval))


SELECTIONS = {
    "quick": Selection(2000, 500, 10, 64, 64, synthetic_classes=SYNTHETIC_CLASSES),
    "desk": Selection(None, None, 10, 64, 64),
    "paper": Selection(None, None, 100, 64, CROPPED),
}

GROWN = ("splitting", "gradient_sum", "magnitude", "random", "uniform")
QUICK = ("reduced", "homogeneous", "even_start", "splitting_large", *GROWN)
DESK = ("reduced", "homogeneous", "homogeneous_matched", "even_start_matched", *GROWN)


def preset_setting(preset: str, stored_size: int) -> Setting:
    """The study in the size of a preset, for images stored at ``stored_size`` pixels."""
    size = INPUT if stored_size == CROPPED else stored_size
    if preset == "quick":
        return Setting(
            architecture=Architecture(embed=64, depth=3, heads=4, patch=size // 4, image_size=size),
            recipe=Recipe(
                batch=32, rate=2e-3, warmup_epochs=2, drop_path=0.0, mixup=0.0, cutmix=0.0,
                erasing=0.0, rand_augment=False, resized_crops=False, repeats=1, epoch_images=256,
            ),
            variants=tuple(v for v in variants((3, 6, 9, 15)) if v.name in QUICK),
            epochs=28,
            first_growth=5,
            growth_batches=4,
            growth_rows=1024,
            eligible=10,
            runs=3,
            test_every=3,
        )  # fmt: skip
    if preset == "desk":  # about four hours on two cores
        return Setting(
            architecture=Architecture(embed=64, depth=3, heads=4, patch=size // 8, image_size=size),
            recipe=Recipe(
                batch=64, rate=2e-3, warmup_epochs=2, drop_path=0.0, mixup=0.0, cutmix=0.0,
                erasing=0.0, rand_augment=False, resized_crops=False, repeats=1,
                epoch_images=12_800,
            ),
            variants=tuple(v for v in variants((2, 4, 6, 10)) if v.name in DESK),
            epochs=32,
            first_growth=5,
            growth_batches=8,
            growth_rows=4096,
            eligible=15,
            runs=6,
            test_every=4,
        )  # fmt: skip
    patch = {INPUT: 16, 64: 8}.get(size, 4)
    return Setting(
        architecture=Architecture(embed=384, depth=12, heads=6, patch=patch, image_size=size),
        # DeiT crops images of up to 32 pixels by shifting alone.
        recipe=Recipe(batch=256, rate=2.5e-4, warmup_epochs=5, resized_crops=size > 32),
        variants=variants((10, 20, 30, 50)),
        epochs=300,
        first_growth=50,
        growth_batches=16,
        growth_rows=16384,
        eligible=60,
        runs=3,
    )


def variants(intervals: Sequence[int]) -> tuple[Variant, ...]:
    """What is compared; ``intervals`` are the four of the paper, of which the third is its best."""
    usual = intervals[2]

    def grown(
        name: str,
        title: str,
        share: float = SMALL,
        interval: int = usual,
        criterion: Criterion = "splitting",
        form: Form = "pair",
        direction: Direction = "parent",
    ) -> Variant:
        return Variant(name, title, growth=Growth(share, interval, criterion, form, direction))

    return (
        Variant("reduced", "reduced, never grown"),
        Variant("homogeneous", "homogeneous, full size from the start", start=1.0),
        Variant("even_start", "evenly reduced, small size from the start", start=SMALL),
        Variant(
            "homogeneous_matched",
            "full size, trained for as many operations as splitting",
            start=1.0,
            operations_of="splitting",
        ),
        Variant(
            "even_start_matched",
            "small size, trained for as many operations as splitting",
            start=SMALL,
            operations_of="splitting",
        ),
        grown("splitting", "grown to the small size by the splitting matrix"),
        grown("splitting_large", "grown to the large size by the splitting matrix", LARGE),
        grown("s2d", "grown by S2D's own matrix", criterion="s2d"),
        grown("gradient_sum", "grown by the sum of gradients", criterion="gradient_sum"),
        grown("magnitude", "grown by magnitude", criterion="magnitude"),
        grown("random", "grown at random", criterion="random"),
        grown("uniform", "every layer grown evenly", criterion="uniform"),
        grown(
            "gated_eigenvector",
            "gated neurons in the eigenvector's direction",
            form="gated",
            direction="eigenvector",
        ),
        grown("gated_parent", "gated neurons in the parent's direction", form="gated"),
        *(
            grown(f"interval_{i}", f"grown every {i} epochs", interval=i)
            for i in intervals
            if i != usual
        ),
    )
