"""The study of non-uniform scaling: which trainings it has, and what they are.

Variants that grow start as the reduced network, so up to the first growth they are the reduced
network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from growkernels.experiments.image_study import Graph, ImageStudy, graph_of
from growkernels.experiments.images.store import ImageSource, Selection
from growkernels.experiments.run_folder import RunFolder, number
from growkernels.experiments.scaling.settings import SELECTIONS, Setting, Variant, preset_setting
from growkernels.experiments.scaling.training import ScalingTraining, epochs_of
from growkernels.experiments.study import Conclusion, Fork, Forks, Results, Stretch


@dataclass(frozen=True)
class ScalingStudy(ImageStudy):
    setting: Setting
    source: ImageSource

    name: ClassVar[str] = "scaling"
    claims: ClassVar[Path] = Path(__file__).with_name("claims.toml")
    page: ClassVar[str] = "scaling/page.html"

    @property
    def run_count(self) -> int:
        return self.setting.runs

    def config(self) -> dict[str, Any]:
        setting = asdict(self.setting)
        del setting["runs"]
        return {"data": self.source.about, "setting": setting}

    def graph(self) -> Graph:
        variants: dict[str, tuple[int, Forks]] = {}
        for v in self.setting.variants:
            forks: Forks = (Fork(0, v.name if v.growth is None else "reduced"),)
            if v.growth is not None:
                forks = (*forks, Fork(self.setting.first_growth, v.name))
            variants[v.name] = self.epochs(v), forks
        return graph_of(variants, self.setting.runs, "run {}")

    def epochs(self, variant: Variant) -> int:
        images = self.source.images
        return epochs_of(self.setting, variant, len(images.classes), len(images.train_labels))

    def training(self, stretch: Stretch) -> ScalingTraining:
        variant = self.setting.variant(stretch.forks[-1].way)
        setting = replace(self.setting, epochs=self.epochs(variant))
        return ScalingTraining(setting, variant, stretch.about, self.source.images, self.device)

    def besides(self, measured: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """One record per growth step with all scores summed up by layer."""
        for step in measured["growth"]:
            yield {"growth_before_epoch": step["epoch"] + 1, **_in_short(step)}

    def conclude(self, results: Results, folder: RunFolder) -> Conclusion:
        from growkernels.experiments.scaling.conclusion import conclude

        return conclude(self, results)


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
    runs: int | None = None,
) -> Path:
    """Trains all variants and returns the path of ``report.html``.

    ``data`` None: generated images. ``setting``, ``selection`` and ``runs`` replace what the preset
    stands for. Raises as ``reproduce_on_images``.
    """
    from growkernels.experiments.image_content import reproduce_on_images

    def build(source: ImageSource) -> ScalingStudy:
        size = source.images.train_images.shape[-1]
        chosen = setting or preset_setting(preset, size)
        return ScalingStudy(replace(chosen, runs=runs or chosen.runs), source)

    return reproduce_on_images(
        build, preset, data, selection or SELECTIONS[preset], device, out, resume, save_seconds
    )
