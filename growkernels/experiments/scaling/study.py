"""The study of non-uniform scaling: which trainings it has, and what they are.

Variants that grow start as the reduced network, so up to the first growth they are the reduced
network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from growkernels.experiments.images.store import ImageSource, Selection
from growkernels.experiments.run_folder import RunFolder, number
from growkernels.experiments.scaling.settings import SELECTIONS, Setting, Variant, preset_setting
from growkernels.experiments.scaling.training import ScalingTraining, epochs_of
from growkernels.experiments.study import (
    Conclusion,
    Content,
    Fork,
    Forks,
    Result,
    Results,
    Stretch,
    along,
    finished,
    stretches_of,
)


@dataclass(frozen=True)
class ScalingStudy(Content):
    setting: Setting
    source: ImageSource

    name: ClassVar[str] = "scaling"
    claims: ClassVar[Path] = Path(__file__).with_name("claims.toml")
    page: ClassVar[str] = "scaling/page.html"

    @property
    def device(self) -> str:  # type: ignore[override]
        return self.source.device

    def config(self) -> dict[str, Any]:
        return {"data": self.source.about, "setting": asdict(self.setting)}

    def _graph(self) -> tuple[list[Stretch], dict[tuple[str, int], list[str]]]:
        """All stretches, and the path of every variant and run."""
        setting = self.setting
        graph: list[Stretch] = []
        paths: dict[tuple[str, int], list[str]] = {}
        by_epochs: dict[int, dict[str, Forks]] = {}
        for v in setting.variants:
            begins = Fork(0, v.name if v.growth is None else "reduced")
            forks = (begins,) if v.growth is None else (begins, Fork(setting.first_growth, v.name))
            by_epochs.setdefault(self.epochs(v), {})[v.name] = forks
        for run in range(setting.runs):
            for epochs, variants in by_epochs.items():
                stretches, of_run = stretches_of(
                    variants, epochs, f"run{run}", bar=f"run {run + 1}", about=run
                )
                graph += stretches
                paths |= {(name, run): path for name, path in of_run.items()}
        return graph, paths

    def epochs(self, variant: Variant) -> int:
        images = self.source.images
        return epochs_of(self.setting, variant, len(images.classes), len(images.train_labels))

    def stretches(self) -> list[Stretch]:
        return self._graph()[0]

    def _training(self, stretch: Stretch) -> ScalingTraining:
        variant = self.setting.variant(stretch.forks[-1].way)
        setting = replace(self.setting, epochs=self.epochs(variant))
        return ScalingTraining(setting, variant, stretch.about, self.source.images, self.device)

    def begin(self, stretch: Stretch, parent: Result | None) -> ScalingTraining:
        training = self._training(stretch)
        if parent is not None:
            training.load(parent, own=False)
        return training

    def resume(self, stretch: Stretch, stored: Result) -> ScalingTraining:
        training = self._training(stretch)
        training.load(stored, own=True)
        return training

    def records(self, results: Results) -> list[dict[str, Any]]:
        """One record per epoch, and one per growth step with all scores summed up by layer."""
        records: list[dict[str, Any]] = []
        for (variant, run), path in self._graph()[1].items():
            if not finished(results, path):
                continue
            where = {"variant": variant, "run": run}
            curves, steps = along(results, path), {s["epoch"]: s for s in growth(results, path)}
            for epoch in range(len(curves["loss"])):
                if epoch in steps:
                    grown = {"growth_before_epoch": epoch + 1, **_in_short(steps[epoch])}
                    records.append({**where, **grown})
                values = {
                    k: None if v[epoch] is None else number(v[epoch]) for k, v in curves.items()
                }
                records.append({**where, "epoch": epoch + 1, **values})
        return records

    def conclude(self, results: Results, folder: RunFolder) -> Conclusion:
        from growkernels.experiments.scaling.conclusion import conclude

        return conclude(self, results, self._graph()[1], self.records(results))


def growth(results: Results, path: list[str]) -> list[dict[str, Any]]:
    """Every `GrowthStep` on a path, as plain values."""
    return [step for key in path for step in results[key].measured["growth"]]


def _in_short(step: Mapping[str, Any]) -> dict[str, Any]:
    layers = {}
    for name, scores, added in zip(step["layers"], step["scores"], step["added"], strict=True):
        values = torch.tensor(scores, dtype=torch.float64, device="cpu")
        layers[name] = {
            "neurons": len(values),
            "lowest": number(values.min().item()),
            "median": number(values.median().item()),
            "below_zero": int((values < 0).sum()),
            "added": added,
        }
    seconds = {k: v for k, v in step.items() if k.endswith("_seconds")}
    return {
        "budget": step["budget"],
        "parameters": step["parameters"],
        "change": number(step["change"]),
        **seconds,
        "layers": layers,
    }


def run_study(
    preset: str,
    data: Path | None,
    device: str,
    out: Path,
    resume: bool,
    setting: Setting | None = None,
    selection: Selection | None = None,
    save_seconds: float = 20.0,
) -> Path:
    """Trains all variants and returns the path of ``report.html``.

    ``data`` None: generated images. ``setting`` and ``selection`` replace what the preset stands
    for (tests). Raises as ``reproduce_on_images``.
    """
    from growkernels.experiments.image_content import reproduce_on_images

    def build(source: ImageSource) -> ScalingStudy:
        size = source.images.train_images.shape[-1]
        return ScalingStudy(setting or preset_setting(preset, size), source)

    return reproduce_on_images(
        build, preset, data, selection or SELECTIONS[preset], device, out, resume, save_seconds
    )
