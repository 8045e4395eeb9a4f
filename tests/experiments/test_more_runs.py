"""Runs that are added to a finished study, and the stored trainings that they are added to."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from pool_work import in_this_process
from tiny_scaling_study import SELECTION, setting

from benchmarks.claims_table import REPRODUCTIONS
from benchmarks.store_reproduction import store
from growkernels.experiments import plots, runner
from growkernels.experiments.run_folder import RunFolderError
from growkernels.experiments.scaling.study import run_study

SCALING = next(r for r in REPRODUCTIONS if r.name == "scaling")


def train(out: Path, runs: int) -> None:
    run_study("desk", None, "cpu", out, True, setting(), SELECTION, runs=runs)


def measured(out: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if "seconds" not in k} for record in records]


def test_runs_are_added_where_the_first_were_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "run_parts", in_this_process)
    monkeypatch.setattr(plots, "DPI", 40)
    first, moved, whole = (tmp_path / name for name in ("first", "moved", "whole"))
    train(first, 1)
    summary = json.loads((first / "summary.json").read_text())
    for part in ("environment", "registration"):
        summary[part]["commit"] = "cafe"  # as of a clean checkout
    (first / "summary.json").write_text(json.dumps(summary))
    stored = store(first, tmp_path / "docs")
    with tarfile.open(stored / "trainings.tar.xz") as archive:
        archive.extractall(moved, filter="data")
    assert not any(path.stat().st_size > 30_000 for path in (moved / "state").iterdir())

    train(moved, 2)
    train(whole, 2)
    assert measured(moved) == measured(whole)
    summary = json.loads((moved / "summary.json").read_text())
    assert summary["runs"] == 2
    assert [(part["runs"], part["environment"]["commit"]) for part in summary["earlier"]] == [
        (1, "cafe")
    ]
    assert "Of the 2 runs the first 1 were finished on" in (moved / "report.html").read_text()
    assert json.loads((whole / "summary.json").read_text())["earlier"] == []
    (stored / "summary.json").write_bytes((moved / "summary.json").read_bytes())
    assert "Of the 2 runs the first 1 were finished at commit `cafe` on" in SCALING.markdown(
        tmp_path / "docs"
    )
    with pytest.raises(RunFolderError, match="holds 2 runs of every variant, and --runs asks"):
        train(moved, 1)
