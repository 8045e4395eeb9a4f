"""The basis study as a whole: its folder, killed and resumed, and what users may get wrong."""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_basis_study
from PIL import Image

from growkernels import cli
from growkernels.experiments import basis
from growkernels.experiments.basis.settings import VARIANTS
from growkernels.experiments.basis.study import run_study
from growkernels.experiments.run_folder import RunFolderError

PROGRAM = [sys.executable, str(Path(tiny_basis_study.__file__))]


def kill_when(ready: Callable[[], bool], *arguments: str) -> None:
    """Run the tiny study and kill it at once when something is there."""
    process = subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.DEVNULL)
    while not ready():
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.fixture(scope="module")
def one_core() -> Iterator[None]:
    """One worker process at a time: starting them takes longer than what they do here."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module")
def folders(one_core: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs with the same measured times: killed in the search, one then also in training."""
    once, twice = (tmp_path_factory.mktemp("runs") / name for name in ("once", "twice"))
    kill_when(lambda: lines(once / "state" / "search-trainings.jsonl") > 4, str(once))
    assert not (once / "summary.json").exists()
    shutil.copytree(once, twice)
    states = twice / "state"
    kill_when(lambda: len(list(states.glob("*-run?.pt"))) > 2, str(twice), "--resume")
    assert not (twice / "summary.json").exists()
    # Measured with the first resumption; the other run shall see the same plans and times.
    shutil.copy(states / "step-times.pt", once / "state" / "step-times.pt")
    for folder in (once, twice):
        run_study(tiny_basis_study.settings(), "quick", None, "cpu", folder, True)
    return once, twice


def without_clock(summary: dict[str, Any]) -> dict[str, Any]:
    """Everything in the summary but the seconds that the trainings took, and where they ran."""
    del summary["environment"]
    for method in ("by_training", "by_taylor"):
        del summary["search"][method]["seconds"]
    del summary["search"]["taylor_training_seconds"]
    claims = [claim for claim in summary["claims"] if "costs less than" not in claim["claim"]]
    assert len(claims) == len(summary["claims"]) - 1
    summary["claims"] = claims
    summary["overview"] = summary["overview"].partition(". Of ")[0]
    return summary


def test_killed_twice_and_resumed_ends_with_the_same_numbers(folders: tuple[Path, Path]) -> None:
    once, twice = (
        without_clock(json.loads((folder / "summary.json").read_text())) for folder in folders
    )
    assert once == twice
    records = []
    for folder in folders:
        rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
        records.append([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    assert records[0] == records[1]
    assert len(records[0]) == len(VARIANTS) * 2 * 2


def test_the_folder_holds_what_is_promised(folders: tuple[Path, Path]) -> None:
    out, _ = folders
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["variants"]) == set(VARIANTS)
    dense, everywhere = (summary["variants"][v] for v in ("dense", "everywhere"))
    assert dense["runs"] == 2
    assert everywhere["parameters"] < 0.6 * dense["parameters"]
    assert summary["data"]["name"].startswith("synthetic")
    assert len(summary["search"]["by_training"]["costs"]) == 16
    assert len(summary["search"]["by_taylor"]["costs"]["layer4.1.conv2"]) == 2
    assert set(summary["search"]["rank_correlation"]) == {"0.25", "0.5"}
    assert set(summary["step_times"]) == {"dense", "everywhere", "by_training", "by_taylor"}
    assert len(summary["claims"]) == 8
    assert {p.name for p in (out / "plots").iterdir()} == {
        "time_and_accuracy.png", "plans.png", "sensitivities.png", "training_curves.png"
    }  # fmt: skip
    page = html.unescape((out / "report.html").read_text())
    assert page.count('src="data:image/png;base64,') == 4
    for words in ("Much is small.", "The images are synthetic", "Ours: the Taylor search"):
        assert words in page


def test_a_finished_run_resumes_to_its_report(folders: tuple[Path, Path]) -> None:
    out, _ = folders
    before = (out / "summary.json").read_bytes()
    run_study(tiny_basis_study.settings(), "quick", None, "cpu", out, True)
    assert (out / "summary.json").read_bytes() == before
    with pytest.raises(RunFolderError, match="add --resume"):
        run_study(tiny_basis_study.settings(), "quick", None, "cpu", out, False)
    with pytest.raises(RunFolderError, match="different: preset"):
        run_study(tiny_basis_study.settings(), "paper", None, "cpu", out, True)


def test_what_the_user_may_get_wrong(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--preset is 'fast'"):
        basis.run("fast", None, "cpu", out)
    with pytest.raises(ValueError, match="--preset paper needs images: give --data DIR"):
        basis.run("paper", None, "cpu", out)
    with pytest.raises(ValueError, match="--device abacus cannot be used"):
        basis.run("quick", None, "abacus", out)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(RunFolderError, match="is a file"):  # told before images are looked for
        basis.run("quick", tmp_path / "none", "cpu", out)


def test_bad_data_folders_are_one_sentence_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, corrupt, out = tmp_path / "empty", tmp_path / "corrupt", tmp_path / "out"
    empty.mkdir()
    for split in ("train", "test"):
        for name in ("a", "b"):
            (corrupt / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(corrupt / split / name / "0.png")
    (corrupt / "train" / "a" / "0.png").write_bytes(b"\x89PNG no more")
    for folder, words in ((empty, "holds neither train"), (corrupt, "cannot be read as an image")):
        arguments = ["reproduce", "basis", "--data", str(folder), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["growkernels", *arguments])
        assert cli.main() == 1
        (sentence,) = capsys.readouterr().err.strip().splitlines()
        assert sentence.startswith("growkernels: ")
        assert str(folder) in sentence
        assert words in sentence
        assert not out.exists()
