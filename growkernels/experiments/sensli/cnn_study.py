"""The study of convolutional networks on images: which trainings it has, and what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from growkernels.experiments.image_study import Graph, ImageStudy, Paths
from growkernels.experiments.images.store import ImageSource, Selection
from growkernels.experiments.run_folder import RunFolder, number
from growkernels.experiments.sensli.cnn_settings import (
    NORM,
    CnnPreset,
    CnnSetting,
    CnnVariant,
    cnn_preset,
)
from growkernels.experiments.sensli.cnn_training import CnnTraining, Nothing
from growkernels.experiments.study import (
    Conclusion,
    Fork,
    Forks,
    Result,
    Results,
    Stretch,
    Training,
    stretches_of,
)

FINAL = "final architecture"


@dataclass(frozen=True)
class Task:
    """What a stretch trains."""

    setting: int
    run: int
    original: tuple[int, ...] | None = None
    """Of a final architecture: the layers that its parent began with."""


def forks_of(variant: CnnVariant) -> Forks:
    begin = Fork(0, "-".join(map(str, variant.layers)))
    return begin, *(Fork(attempt.epoch, attempt.rule) for attempt in variant.attempts)


@dataclass(frozen=True)
class CnnStudy(ImageStudy):
    preset: CnnPreset
    source: ImageSource

    name: ClassVar[str] = "sensli"
    claims: ClassVar[Path] = Path(__file__).with_name("cnn_claims.toml")
    page: ClassVar[str] = "sensli/cnn_page.html"

    def config(self) -> dict[str, Any]:
        settings = [asdict(setting) for setting in self.preset.settings]
        return {"net": "cnn", "data": self.source.about, "settings": settings}

    def graph(self) -> Graph:
        graph: list[Stretch] = []
        paths: Paths = {}
        for index, setting in enumerate(self.preset.settings):
            for run in range(setting.runs):
                variants = {v.name: forks_of(v) for v in setting.variants if v.final_of is None}
                name, bar = f"{setting.name}-run{run}", f"{setting.name:9} {setting.role}"
                stretches, of_run = stretches_of(
                    variants, setting.epochs, name, bar=bar, about=Task(index, run)
                )
                for variant in setting.variants:
                    if variant.final_of is not None:
                        original = setting.variant(variant.final_of)
                        key = f"{name}-{variant.name}"
                        stretches.append(
                            Stretch(
                                key, (Fork(0, FINAL),), 0, setting.epochs,
                                of_run[original.name][-1], bar,
                                about=Task(index, run, original.layers),
                            )
                        )  # fmt: skip
                        of_run[variant.name] = [key]
                graph += stretches
                paths |= {(setting.name, v, run): path for v, path in of_run.items()}
        return graph, paths

    def network(
        self, setting: CnnSetting, run: int, layers: tuple[int, ...], phase: int = 0
    ) -> CnnTraining:
        return CnnTraining(setting, run, self.source.images, self.device, layers, phase)

    def training(self, stretch: Stretch) -> CnnTraining:
        task: Task = stretch.about
        layers, phase = task.original, 1
        if layers is None:
            layers, phase = tuple(map(int, stretch.forks[0].way.split("-"))), 0
        return self.network(self.preset.settings[task.setting], task.run, layers, phase)

    def begin(self, stretch: Stretch, parent: Result | None) -> Training:
        task: Task = stretch.about
        if task.original is not None:
            assert parent is not None
            layers = tuple(parent.measured["layers"])
            setting, new = self.preset.settings[task.setting], layers != task.original
            return self.network(setting, task.run, layers, phase=1) if new else Nothing()
        training = super().begin(stretch, parent)
        if parent is not None and stretch.forked:
            assert isinstance(training, CnnTraining)
            training.attempt(stretch.forks[-1].way, stretch.first)
        return training

    def resume(self, stretch: Stretch, stored: Result) -> Training:
        return Nothing() if stored.state is None else super().resume(stretch, stored)

    def besides(self, measured: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """One record per insertion attempt."""
        merit = measured.get("merit_pass")
        if merit is not None:
            yield _attempt(merit)

    def conclude(self, results: Results, folder: RunFolder) -> Conclusion:
        from growkernels.experiments.sensli.cnn_conclusion import conclude

        return conclude(self, results)


def _attempt(merit: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attempt_before_epoch": merit["epoch"] + 1,
        "rule": merit["rule"],
        "positions": merit["positions"],
        "merits": {n: list(map(number, v)) for n, v in merit["merits"].items()},
        "base": {n: number(v) for n, v in merit["base"].items()},
        "snr": list(map(number, merit["snr"])),
        "decided_by": NORM,
        "inserted": merit["inserted"],
        "reason": merit["reason"],
        "seconds": merit["seconds"],
        "flops": merit["flops"],
    }


def run_cnn(
    preset: str,
    optimizer: str,
    data: Path,
    device: str,
    out: Path,
    resume: bool,
    sizes: CnnPreset | None = None,
    save_seconds: float = 10.0,
) -> Path:
    """Runs the CNN settings on the images in ``data``; returns the path of ``report.html``.

    ``sizes`` replaces what the preset stands for (tests). Raises as ``reproduce_on_images``.
    """
    from growkernels.experiments.image_content import reproduce_on_images

    chosen = sizes or cnn_preset(preset, optimizer)
    return reproduce_on_images(
        lambda source: CnnStudy(chosen, source),
        preset, data, Selection(chosen.train_limit, chosen.test_limit),
        device, out, resume, save_seconds,
    )  # fmt: skip
