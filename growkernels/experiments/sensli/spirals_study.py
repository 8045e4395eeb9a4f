"""The study of fully connected networks on the spirals: a batched training per setting."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from growkernels.experiments.run_folder import RunFolder, number
from growkernels.experiments.sensli.engine import SettingRun, lineages_of
from growkernels.experiments.sensli.settings import Setting, preset_settings
from growkernels.experiments.study import Conclusion, Content, Fork, Result, Results, Stretch

METRICS_EVERY = 25  # epochs


@dataclass(frozen=True)
class SpiralsStudy(Content):
    given: tuple[Setting, ...]
    device: str

    name: ClassVar[str] = "sensli"
    claims: ClassVar[Path] = Path(__file__).with_name("spirals_claims.toml")
    page: ClassVar[str] = "sensli/spirals_page.html"

    def config(self) -> dict[str, Any]:
        return {"net": "fc", "settings": [asdict(setting) for setting in self.given]}

    def stretches(self) -> list[Stretch]:
        """One per setting, whose variants share their pasts within its batched training.

        The curves describe the networks after so many updates, none among them.
        """
        return [
            Stretch(
                setting.name,
                (Fork(0, setting.name),),
                0,
                setting.epochs + 1,
                bar=f"{setting.name:6} {setting.family}",
                cost=_cost(setting),
                about=setting,
            )
            for setting in self.given
        ]

    def begin(self, stretch: Stretch, parent: Result | None) -> SettingRun:
        return SettingRun(stretch.about, self.device)

    def resume(self, stretch: Stretch, stored: Result) -> SettingRun:
        run = SettingRun(stretch.about, self.device)
        run.load(stored.measured)
        return run

    def runs(self, results: Results) -> dict[str, SettingRun]:
        """What is finished, by the settings' names."""
        return {
            stretch.key: self.resume(stretch, results[stretch.key])
            for stretch in self.stretches()
            if stretch.key in results
        }

    def records(self, results: Results) -> list[dict[str, Any]]:
        """One record per variant and METRICS_EVERY epochs, and one per insertion."""
        from growkernels.experiments.statistics import estimate

        records: list[dict[str, Any]] = []
        for name, run in self.runs(results).items():
            for variant in run.setting.variants:
                loss, error = curve(run, variant.name), curve(run, variant.name, "error")
                for epoch in range(0, run.setting.epochs + 1, METRICS_EVERY):
                    mean = estimate(loss[epoch])
                    records.append(
                        {
                            "setting": name,
                            "variant": variant.name,
                            "epoch": epoch,
                            "loss_mean": number(mean.mean),
                            "loss_sem": number(mean.sem),
                            "error_mean": number(estimate(error[epoch]).mean),
                        }
                    )
            for index, (merits, positions, _) in sorted(run.insertions.items()):
                fork = run.lineages[index][-1]
                records.append(
                    {
                        "setting": name,
                        "insertion": fork.way.rule,
                        "epoch": fork.step,
                        "merits": merits.tolist() if bool(merits.isfinite().all()) else None,
                        "positions": positions.tolist(),
                    }
                )
        return records

    def conclude(self, results: Results, folder: RunFolder) -> Conclusion:
        from growkernels.experiments.sensli.spirals_conclusion import conclude

        return conclude(self, self.runs(results))


def _cost(setting: Setting) -> float:
    """Of an epoch: layer evaluations, where small batches cost a fixed overhead more."""
    run = SettingRun(setting)
    layers = sum(
        (end - lineage[-1].step) * (lineage[0].way + len(lineage))
        for lineage, end in zip(run.lineages, run.ends, strict=True)
    )
    weight = 2.0 if setting.family == "residual" else 1.0
    whole = layers * setting.runs * setting.width * weight * (1.0 if setting.full_batch else 3.0)
    return float(whole) / (setting.epochs + 1)


def curve(run: SettingRun, variant: str, quantity: str = "loss") -> Tensor:
    """[epochs + 1, runs] on the CPU; ``quantity`` is "loss" (training) or "error" (test, %)."""
    values: Tensor = getattr(run, quantity)
    path = lineages_of(run.setting.variant(variant))
    result = values[:, run.rows(run.lineages.index(path[0]))].clone()
    for lineage in path[1:]:
        begin = lineage[-1].step
        result[begin:] = values[begin:, run.rows(run.lineages.index(lineage))]
    return result.cpu()


def run_spirals(
    preset: str,
    device: str,
    out: Path,
    resume: bool,
    settings: tuple[Setting, ...] | None = None,
    save_seconds: float = 5.0,
) -> Path:
    """Runs the preset's settings, or these; returns the path of ``report.html``.

    Raises ValueError for a device that is not there, and what ``reproduce`` raises.
    """
    from rich.console import Console

    from growkernels.experiments.devices import usable_device
    from growkernels.experiments.reproduce import reproduce

    content = SpiralsStudy(settings or preset_settings(preset), usable_device(device))
    return reproduce(content, preset, out, resume, Console(), save_seconds)
