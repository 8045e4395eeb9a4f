"""The settings of the SensLI study, as data.

Names follow the scripts of the authors' published code (mathemml/SensLI, folder for FNNs and
ResNets); ``exp12`` is the residual when-to-insert sweep, which only the first arXiv version has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from growkernels.experiments.models.batched import Family

Rule = Literal["max", "min", "random", "only"]


@dataclass(frozen=True)
class Insertion:
    """Before the update of ``epoch``, one layer goes to the position that ``rule`` picks.

    ``only`` stands for any rule where a single position exists. The learning rate is multiplied by
    ``rate_factor`` from then on.
    """

    epoch: int
    rule: Rule
    rate_factor: float = 1.0


@dataclass(frozen=True)
class Variant:
    """One curve of a setting: a network of ``start_hidden`` layers and its insertions."""

    name: str
    start_hidden: int
    insertions: tuple[Insertion, ...] = ()

    @property
    def final_hidden(self) -> int:
        return self.start_hidden + len(self.insertions)


@dataclass(frozen=True)
class Setting:
    """One experiment: data, network, schedule and the variants that are compared.

    ``batch`` is in samples, ``epochs`` counts passes over the training points, ``rate`` is the
    learning rate of plain (stochastic) gradient descent. ``role`` says what it is for.
    """

    name: str
    role: Literal["one or three insertions", "when to insert"]
    family: Family
    width: int
    hidden: int
    batch: int
    rate: float
    epochs: int
    runs: int
    variants: tuple[Variant, ...]
    script: str
    seed: int = 1
    per_class: int = 300
    inner_radius: float = 0.5

    @property
    def train_samples(self) -> int:
        return round(0.75 * 2 * self.per_class)

    @property
    def full_batch(self) -> bool:
        return self.batch >= self.train_samples

    def variant(self, name: str) -> Variant:
        return next(v for v in self.variants if v.name == name)

    def has(self, *names: str) -> bool:
        return set(names) <= {v.name for v in self.variants}

    @property
    def title(self) -> str:
        net = (
            "FNN 2-" + "-".join([str(self.width)] * self.hidden) + "-2"
            if self.family == "feedforward"
            else f"ResNet width {self.width}, {self.hidden} hidden layers"
        )
        steps = "full batch" if self.full_batch else f"batches of {self.batch}"
        return f"{net}, {steps}"


def _inserting(name: str, hidden: int, insertions: tuple[Insertion, ...]) -> Variant:
    # One position leaves nothing to choose: variants that differ only there share their training.
    resolved = tuple(
        replace(insertion, rule="only") if hidden + done == 1 else insertion
        for done, insertion in enumerate(insertions)
    )
    return Variant(name, hidden, resolved)


def _comparison(
    hidden: int, epoch: int, rate_factor: float, later: tuple[int, ...], later_factor: float
) -> tuple[Variant, ...]:
    """Small net, one insertion by each rule, from scratch, and the same with ``later`` epochs."""
    variants = [Variant("small", hidden)]
    rules: tuple[Rule, ...] = ("max", "min", "random")
    for rule in rules:
        variants.append(_inserting(rule, hidden, (Insertion(epoch, rule, rate_factor),)))
    # The authors' code builds the large net by doubling the list of widths: [4,4] -> [4,4,4,4].
    variants += [Variant("scratch_1", hidden + 1), Variant("large", 2 * hidden)]
    if later:
        for rule in rules:
            insertions = (
                Insertion(epoch, rule, rate_factor),
                *(Insertion(more, rule, later_factor) for more in later),
            )
            variants.append(_inserting(f"{rule}_3", hidden, insertions))
        variants.append(Variant("scratch_3", hidden + 1 + len(later)))
    return tuple(variants)


def _sweep(hidden: int, epochs: range, rate_factor: float) -> tuple[Variant, ...]:
    inserted = [
        _inserting(f"insert_{epoch}", hidden, (Insertion(epoch, "max", rate_factor),))
        for epoch in epochs
    ]
    return (Variant("small", hidden), *inserted, Variant("scratch_1", hidden + 1))


_SPACED = (900, 1350)

SETTINGS: tuple[Setting, ...] = (
    Setting(
        "exp2", "one or three insertions", "feedforward", width=5, hidden=1, batch=450, rate=0.2,
        epochs=1850, runs=30, variants=_comparison(1, 450, 1.0, _SPACED, 1.0),
        script="Exp2 (first version: Exp6)",
    ),
    Setting(
        "exp3", "one or three insertions", "residual", width=3, hidden=2, batch=450, rate=0.1,
        epochs=1850, runs=30, variants=_comparison(2, 450, 1.0, _SPACED, 1.0),
        script="Exp3 (first version: Exp11)",
    ),
    Setting(
        "exp6", "one or three insertions", "feedforward", width=4, hidden=2, batch=450, rate=0.2,
        epochs=1850, runs=30, variants=_comparison(2, 450, 1.0, _SPACED, 1.0),
        script="Exp6 (first version: Exp9)",
    ),
    Setting(
        "exp7", "one or three insertions", "residual", width=3, hidden=3, batch=450, rate=0.1,
        epochs=1850, runs=30, variants=_comparison(3, 450, 0.7, _SPACED, 0.7),
        script="Exp7 (first version: Exp14)",
    ),
    Setting(
        "exp4", "one or three insertions", "feedforward", width=5, hidden=1, batch=45, rate=0.01,
        epochs=1850, runs=40, variants=_comparison(1, 450, 1.0, (), 1.0),
        script="Exp4",
    ),
    # The rate doubles once, at the first insertion (0.01 before, 0.02 after).
    Setting(
        "exp8", "one or three insertions", "feedforward", width=10, hidden=2, batch=45, rate=0.01,
        epochs=550, runs=30, variants=_comparison(2, 250, 2.0, (350, 450), 1.0),
        script="Exp8",
    ),
    Setting(
        "exp10", "when to insert", "feedforward", width=5, hidden=1, batch=450, rate=0.2,
        epochs=1850, runs=30, variants=_sweep(1, range(150, 851, 100), 0.8),
        script="Exp10 (first version: Exp8)",
    ),
    Setting(
        "exp11", "when to insert", "feedforward", width=10, hidden=2, batch=45, rate=0.01,
        epochs=1050, runs=30, variants=_sweep(2, range(50, 401, 50), 1.0),
        script="Exp11",
    ),
    Setting(
        "exp12", "when to insert", "residual", width=3, hidden=2, batch=450, rate=0.1,
        epochs=4000, runs=30, variants=_sweep(2, range(150, 851, 100), 0.8),
        script="first version: Exp12",
    ),
)  # fmt: skip


# Initialisations in every setting, which train as one batched network; the paper's preset has the
# paper's, as SETTINGS.
RUNS = {"quick": 12, "desk": 300}


def preset_settings(preset: str) -> tuple[Setting, ...]:
    """The paper's settings in every preset, with more runs or fewer."""
    return tuple(replace(s, runs=RUNS.get(preset, s.runs)) for s in SETTINGS)
