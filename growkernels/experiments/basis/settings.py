"""What the basis-convolution study trains and measures, as data.

The paper (Alekseev et al., arXiv 2408.06024) names ResNet-18, CIFAR-10, SGD and cosine annealing.
The fraction of basis filters, epochs, batch, learning rate, the selected layers and the lengths of
its skip schedules could not be found; what stands here in their place is the common recipe for this
network and data set, and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# The variants of the final trainings. The schedules use the plan of "everywhere" in their part;
# "dense_shorter" is trained, by the same recipe, for as many epochs as the time of "everywhere"
# pays for. "one_fraction" has layers chosen by Taylor, as "by_taylor" has, but all with the same
# fraction, and "by_chance" such layers drawn at random; all save the same time.
DENSE, EVERYWHERE, BY_TRAINING, BY_TAYLOR = "dense", "everywhere", "by_training", "by_taylor"
BASIS_FIRST, FULL_FIRST, DENSE_SHORTER = "basis_first", "full_first", "dense_shorter"
ONE_FRACTION, BY_CHANCE = "one_fraction", "by_chance"
COMPARED = (DENSE, EVERYWHERE, BY_TRAINING, BY_TAYLOR, BASIS_FIRST, FULL_FIRST)
CONTROLS = (DENSE_SHORTER, ONE_FRACTION, BY_CHANCE)


@dataclass(frozen=True)
class Recipe:
    """How every network of a study is trained: SGD, one cosine from ``rate`` to 0 over the steps.

    ``width`` is the number of channels of ResNet-18's first stage, ``batch`` is in images, a
    smaller last batch is left out. ``crop_padding`` is how far augmentation moves an image.
    """

    width: int
    batch: int
    rate: float
    momentum: float
    weight_decay: float
    crop_padding: int
    autocast: bool = False


@dataclass(frozen=True)
class StepTiming:
    """The network whose training steps and layers are timed: ``image_size`` pixels a side.

    In each of the ``rounds`` every variant (``layer_rounds``: every layer) takes its turn.
    """

    width: int
    batch: int
    image_size: int
    rounds: int
    layer_rounds: int


@dataclass(frozen=True)
class BasisSettings:
    """One study.

    ``fraction`` of the filters is the basis wherever the paper's method puts one; the other
    method also chooses among ``fractions``. The search trains each candidate layer for
    ``search_epochs`` from each of ``search_runs`` starts and judges by ``validation_images`` taken
    from the training images; the other method sees ``calibration_images``. The plans of both save
    at least ``kept_saving`` of the time that basis convolutions everywhere save. A skip schedule
    changes over after ``switch`` of the epochs.
    """

    recipe: Recipe
    timing: StepTiming
    epochs: int
    runs: int
    search_epochs: int
    search_runs: int
    validation_images: int
    calibration_images: int
    train_images: int | None
    test_images: int | None
    synthetic_size: int = 32
    synthetic_classes: int = 5
    fraction: float = 0.5
    fractions: tuple[float, ...] = (0.25, 0.5, 0.75)
    kept_saving: float = 0.5
    switch: float = 0.5
    seed: int = 1
    variants: tuple[str, ...] = COMPARED + CONTROLS


def preset_settings(preset: str, synthetic: bool, autocast: bool) -> BasisSettings:
    """The study in the size of a preset; ``synthetic`` says that there is no data set."""
    if preset == "paper":
        return BasisSettings(
            Recipe(64, 128, 0.1, 0.9, 5e-4, crop_padding=4, autocast=autocast),
            StepTiming(width=64, batch=128, image_size=32, rounds=30, layer_rounds=10),
            epochs=100, runs=5, search_epochs=15, search_runs=2, validation_images=5000,
            calibration_images=5000, train_images=None, test_images=None,
        )  # fmt: skip
    if preset == "desk":  # with autocast on AMX about four hours on two cores, else twice as long
        return BasisSettings(
            Recipe(16, 64, 0.08, 0.9, 5e-4, crop_padding=4, autocast=autocast),
            StepTiming(width=64, batch=64, image_size=32, rounds=10, layer_rounds=5),
            epochs=10, runs=10, search_epochs=3, search_runs=1, validation_images=2000,
            calibration_images=2000, train_images=20_000, test_images=None,
        )  # fmt: skip
    quick = BasisSettings(
        Recipe(8, 16, 0.03, 0.9, 5e-4, crop_padding=3, autocast=autocast),
        StepTiming(width=64, batch=32, image_size=32, rounds=5, layer_rounds=3),
        epochs=5, runs=3, search_epochs=2, search_runs=1, validation_images=500,
        calibration_images=512, train_images=1500, test_images=1000, synthetic_size=24,
        variants=COMPARED,
    )  # fmt: skip
    if synthetic:
        return quick
    # Natural images need more of everything to learn anything.
    return replace(quick, epochs=6, search_epochs=3, train_images=4000)
