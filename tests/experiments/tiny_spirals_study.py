"""A very small spirals study as a program, for the tests that kill and resume it.

python tiny_study.py FOLDER [--resume]
"""

import sys
from pathlib import Path

from growkernels.experiments.sensli.settings import Insertion, Setting, Variant
from growkernels.experiments.sensli.spirals_study import run_spirals


def settings(epochs: int = 60) -> list[Setting]:
    def comparison(name: str, family: str, hidden: int, batch: int) -> Setting:
        variants = [Variant("small", hidden)]
        for rule in ("max", "min", "random"):
            first = Insertion(epochs // 3, "only" if hidden == 1 else rule)
            variants.append(Variant(rule, hidden, (first,)))
            later = Insertion(epochs // 2, rule)
            variants.append(Variant(f"{rule}_3", hidden, (first, later)))
        variants += [Variant("scratch_1", hidden + 1), Variant("large", 2 * hidden)]
        variants.append(Variant("scratch_3", hidden + 2))
        return Setting(
            name, "one or three insertions", family, width=4, hidden=hidden, batch=batch,
            rate=0.2, epochs=epochs, runs=4, variants=tuple(variants), script="none", per_class=60,
        )  # fmt: skip

    times = range(epochs // 5, epochs // 5 * 4, epochs // 10)
    sweep = Setting(
        "sweep", "when to insert", "feedforward", width=4, hidden=1, batch=90, rate=0.2,
        epochs=epochs, runs=4, script="none", per_class=60,
        variants=(
            Variant("small", 1),
            *(Variant(f"insert_{t}", 1, (Insertion(t, "only"),)) for t in times),
            Variant("scratch_1", 2),
        ),
    )  # fmt: skip
    return [
        comparison("one", "feedforward", 1, 90),
        comparison("residual", "residual", 2, 90),
        comparison("batches", "feedforward", 2, 15),
        sweep,
    ]


def run(out: Path, resume: bool) -> Path:
    return run_spirals("quick", "cpu", out, resume, tuple(settings()), save_seconds=0.0)


if __name__ == "__main__":
    run(Path(sys.argv[1]), "--resume" in sys.argv)
