"""The study of basis convolutions: which trainings it has, and what comes before them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from growkernels.experiments.basis.plans import scaled_plan
from growkernels.experiments.basis.search import Search, run_search
from growkernels.experiments.basis.settings import (
    BASIS_FIRST,
    DENSE,
    DENSE_SHORTER,
    EVERYWHERE,
    FULL_FIRST,
    BasisSettings,
)
from growkernels.experiments.basis.step_timing import StepTime, time_steps
from growkernels.experiments.basis.training import BasisTraining, Plan
from growkernels.experiments.image_study import Graph, ImageStudy, graph_of
from growkernels.experiments.images.store import ImageSource, Selection
from growkernels.experiments.run_folder import RunFolder
from growkernels.experiments.study import Conclusion, Fork, Forks, Results, Stretch
from growkernels.growth.basis_search import SkipSchedule

if TYPE_CHECKING:
    from rich.console import Console

# Skip schedules and the variants whose first epochs they share.
BRANCHES = {BASIS_FIRST: EVERYWHERE, FULL_FIRST: DENSE}


@dataclass(frozen=True)
class BasisStudy(ImageStudy):
    """``search`` and ``step_times`` are there once the study is prepared.

    ``step_times`` holds the variants that are one network throughout.
    """

    settings: BasisSettings
    source: ImageSource
    search: Search | None = None
    step_times: Mapping[str, StepTime] | None = None

    name: ClassVar[str] = "basis"
    claims: ClassVar[Path] = Path(__file__).with_name("claims.toml")
    page: ClassVar[str] = "basis/page.html"

    @property
    def run_count(self) -> int:
        return self.settings.runs

    def config(self) -> dict[str, Any]:
        settings = asdict(self.settings)
        del settings["runs"]
        return {"data": self.source.about, "settings": settings}

    def prepare(self, folder: RunFolder, console: Console) -> BasisStudy:
        from growkernels.experiments.progress import progress_bar

        with progress_bar(console, "trainings") as bars:
            bar = bars.add_task("search: layer times", total=None)

            def searched(done: int, total: int) -> None:
                text = "search by training" if done < total else "search by Taylor expansion"
                bars.update(bar, description=text, completed=done, total=total)

            search = run_search(self.settings, self.source, folder.state, searched)
        with console.status("timing training steps"):
            step_times = folder.state.computed(
                "step-times",
                lambda: {k: asdict(v) for k, v in self._measure_steps(search).items()},
                lambda state: {name: StepTime(**value) for name, value in state.items()},
            )
        return replace(self, search=search, step_times=step_times)

    def _measure_steps(self, search: Search) -> dict[str, StepTime]:
        recipe, timing = self.settings.recipe, self.settings.timing
        plans: dict[str, Plan] = {DENSE: {}}
        for name, plan in search.plans.items():
            if name in self.settings.variants:
                plans[name] = scaled_plan(plan, recipe.width, timing.width)
        return time_steps(plans, timing, recipe, self.source.about["classes"], self.device)

    @property
    def switch(self) -> int:
        """The first epoch of the skip schedules' other form."""
        return round(self.settings.switch * self.settings.epochs)

    def graph(self) -> Graph:
        variants: dict[str, tuple[int, Forks]] = {}
        for name in self.settings.variants:
            forks: Forks = (Fork(0, name),)
            if name in BRANCHES:
                forks = (Fork(0, BRANCHES[name]), Fork(self.switch, name))
            variants[name] = self.epochs(name), forks
        return graph_of(variants, self.settings.runs, "training")

    def epochs(self, variant: str) -> int:
        """How many the variant is trained for; rounded up where a time pays for them."""
        if variant != DENSE_SHORTER:
            return self.settings.epochs
        assert self.step_times is not None
        paid = min(1.0, self.step_times[EVERYWHERE].ratio[1]) * self.settings.epochs
        return math.ceil(paid)

    def plan(self, variant: str) -> Plan:
        """The basis convolutions of a variant; of a skip schedule, where it has any."""
        assert self.search is not None
        if variant in (DENSE, DENSE_SHORTER):
            return {}
        return self.search.plans[EVERYWHERE if variant in BRANCHES else variant]

    def training(self, stretch: Stretch) -> BasisTraining:
        way = stretch.forks[-1].way
        schedule = SkipSchedule(way, self.switch) if way in BRANCHES else SkipSchedule("none")
        settings = replace(self.settings, epochs=self.epochs(way))
        return BasisTraining(
            settings, self.source.images, self.device, stretch.about, schedule, self.plan(way)
        )

    def conclude(self, results: Results, folder: RunFolder) -> Conclusion:
        from growkernels.experiments.basis.conclusion import conclude

        return conclude(self, self.records(results))


def run_study(
    settings: BasisSettings,
    preset: str,
    data: Path | None,
    device: str,
    out: Path,
    resume: bool,
    save_seconds: float = 15.0,
) -> Path:
    """Search, train, time and report; returns the path of ``report.html``.

    Without ``data`` the images are synthetic. Raises as ``reproduce_on_images``.
    """
    from growkernels.experiments.image_content import reproduce_on_images

    selection = Selection(
        settings.train_images,
        settings.test_images,
        synthetic_size=settings.synthetic_size,
        synthetic_classes=settings.synthetic_classes,
    )
    return reproduce_on_images(
        lambda source: BasisStudy(settings, source),
        preset, data, selection, device, out, resume, save_seconds,
    )  # fmt: skip
