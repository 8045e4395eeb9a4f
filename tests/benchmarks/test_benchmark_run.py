"""A toy family through pytest-benchmark and the memory probe, as `growkernels bench` runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.environment import describe, disturbance, machine_slug
from benchmarks.families import cases_on, family_files, load_family
from benchmarks.peak_memory import measure_in_subprocess
from benchmarks.results import RESULTS, load

CHECKOUT = Path(__file__).resolve().parents[2]
TOY_FAMILY = """
import torch
from benchmarks.case import OURS, Case, Workload
from benchmarks.table import Table

FAMILY = "toy"
TABLE = Table("toy", "toy", ("case", "shape", "opponent", "speed-up", "peak memory", "machine"))


def build(device):
    elements = 64 * 2**18
    calls = {
        "eager": lambda: torch.ones(elements).sum(),
        OURS: lambda: torch.tensor(float(elements)),
    }
    return Workload(calls, flops=1.0, bytes=1.0, tolerance=1e-6)


CASES = [Case("sum", "[64 Mi]", torch.float32, "contiguous", "forward", ("eager",), build)]


def bench_toy(case, compare):
    compare(case)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "bench_toy_family.py"
    path.write_text(TOY_FAMILY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(CHECKOUT)]))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # the benchmarks are no worker's
    return path


def test_peak_memory_counts_the_largest_moment_of_each_variant(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(toy.parent))
    import bench_toy_family

    (case,) = bench_toy_family.CASES
    peaks = measure_in_subprocess("bench_toy_family", case)
    assert peaks["eager"] == pytest.approx(64 * 2**20, abs=2**20)
    assert peaks["growkernels"] is not None
    assert peaks["growkernels"] < 2**20


def _run(toy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    config = CHECKOUT / "benchmarks" / "pytest.ini"
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", str(toy), "-c", str(config)),
            *("-p", "benchmarks.conftest", "-p", "no:cacheprovider"),
            *("--rootdir", str(toy.parent), "--benchmark-only", *arguments),
        ],
        capture_output=True,
        text=True,
        cwd=toy.parent,
        check=False,
    )


def test_what_ran_before_a_failure_is_stored_in_the_folder_asked_for(toy: Path) -> None:
    broken = (
        TOY_FAMILY
        + """
CASES.append(Case("broken", "", torch.float32, "contiguous", "forward", (), lambda device: 1 / 0))
"""
    )
    toy.write_text(broken)
    folder = toy.parent / "results"
    finished = _run(toy, "--quick", "--results", str(folder))
    assert finished.returncode == 1
    (path,) = folder.iterdir()
    assert [case.name for case in load(path).cases] == ["sum"]
    assert f"Stored 1 of 2 cases in {path}" in finished.stdout


def test_a_quick_run_prints_the_table_and_stores_nothing(toy: Path) -> None:
    before = set(RESULTS.glob("*"))
    finished = _run(toy, "--quick")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (row,) = [line for line in finished.stdout.splitlines() if line.startswith("sum ")]
    assert "[64 Mi]" in row
    assert "eager" in row
    assert "×" in row
    assert "Noise floor: one function against itself gave " in finished.stdout
    assert "Not stored: a quick run has too few rounds." in finished.stdout
    assert set(RESULTS.glob("*")) == before


def test_an_unknown_family_is_named_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["virtual_gard"]) == 2
    message = capsys.readouterr().err
    assert "no family 'virtual_gard'" in message
    assert "virtual_grad" in message


def test_a_folder_that_cannot_hold_results_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for folder, reason in ((taken, "is a file"), (taken / "below", "cannot be made")):
        assert main(["virtual_grad", "--quick", "--results", str(folder)]) == 2
        (sentence,) = capsys.readouterr().err.strip().splitlines()
        assert f"{folder} {reason}" in sentence
        assert sentence.endswith("give --results another folder")
    assert taken.read_text() == "mine"


def test_every_family_declares_its_name_cases_and_table() -> None:
    files = family_files()
    assert files
    for name, path in files.items():
        family = load_family(path)
        assert name == family.FAMILY == family.TABLE.family
        assert family.CASES
        for device in ("cpu", "cuda"):
            names = [case.name for case in cases_on(device, family)]
            assert len(set(names)) == len(names)


def test_cases_are_listed_without_running(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["virtual_grad", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    family = load_family(family_files()["virtual_grad"])
    assert len(lines) == len(family.CASES)
    assert lines[0].startswith(f"virtual_grad: {family.CASES[0].name} (")
    assert main(["virtual_grad", "--list", "--device", "cuda"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(cases_on("cuda", family))


def test_a_family_without_cases_for_a_gpu_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load_family(family_files()["merit_pass"])
    monkeypatch.setattr(family, "GPU_CASES", [], raising=False)
    assert main(["merit_pass", "--device", "cuda"]) == 2
    assert "merit_pass has no cases for cuda" in capsys.readouterr().err


def test_benchmarks_without_their_gpu_are_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["virtual_grad", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--device cuda cannot be used here: torch {torch.__version__}" in error


def test_the_environment_is_json_and_names_the_machine() -> None:
    environment = describe(torch.device("cpu"))
    assert json.loads(json.dumps(environment)) == environment
    assert environment["torch"] == torch.__version__
    assert f"{torch.get_num_threads()} threads" in environment["machine"]
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", machine_slug(environment))


def test_a_busy_machine_is_said_to_distort_the_figures() -> None:
    assert disturbance({"load_before": 0.4, "cpus": 2}) is None
    reason = disturbance({"load_before": 1.7, "cpus": 2})
    assert reason is not None
    assert "1.7 of 2 cores" in reason
