"""The whole study in miniature: what it leaves behind, and that killing it changes nothing."""

import html
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_study

from growkernels.experiments import sensli
from growkernels.experiments.run_folder import RunFolderError
from growkernels.experiments.sensli.spirals_study import run_spirals

PROGRAM = [sys.executable, str(Path(tiny_study.__file__))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    subprocess.run([*PROGRAM, str(out)], check=True, capture_output=True)
    return out


def numbers(out: Path) -> dict:
    """Everything in the summary that does not depend on the clock."""
    summary = json.loads((out / "summary.json").read_text())
    for variants in summary["settings"].values():
        for variant in variants.values():
            del variant["seconds"]
    return {key: summary[key] for key in ("overview", "settings", "claims")}


def test_the_folder_holds_what_is_promised(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["settings"]) == {"one", "residual", "batches", "sweep"}
    value = summary["settings"]["residual"]["max_3"]
    assert {"loss_mean", "loss_sem", "error_mean", "error_sem", "runs", "seconds"} <= set(value)
    assert value["runs"] == 4
    assert {c["verdict"] for c in summary["claims"]} <= {
        "holds", "does not hold", "cannot be told"
    }  # fmt: skip
    assert "torch" in summary["environment"]
    config = json.loads((finished / "config.json").read_text())
    assert config["settings"][0]["name"] == "one"
    records = [json.loads(x) for x in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {r["setting"] for r in records} == set(summary["settings"])
    assert any("merits" in r for r in records)
    assert {p.name for p in (finished / "plots").iterdir()} == {
        "loss_one_insertion.png", "loss_three_insertions.png", "merits.png",
        "insertion_times.png", "decision_boundary.png",
    }  # fmt: skip


def test_the_report_is_one_file_that_says_it_all(finished):
    page = html.unescape((finished / "report.html").read_text())
    assert page.count('src="data:image/png;base64,') == 5
    assert not re.search(r'(src|href)="(?!data:)', page)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["overview"] in page
    assert "one candidate position, so max = min = random: no test" in page
    for heading in ("Claims", "Settings", "Where this differs", "Environment", "Run it again"):
        assert f"<h2>{heading}" in page


def test_killed_and_resumed_ends_with_the_same_numbers(finished, tmp_path):
    out = tmp_path / "run"
    for kill in range(2):
        process = subprocess.Popen(
            [*PROGRAM, str(out), "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_checkpoints(out / "state", process, kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "summary.json").exists()
    subprocess.run([*PROGRAM, str(out), "--resume"], check=True, capture_output=True)
    assert numbers(out) == numbers(finished)
    assert sorted_lines(out) == sorted_lines(finished)


def wait_for_checkpoints(states: Path, process: subprocess.Popen, kill: int) -> None:
    """Until a state file was replaced a few times in this process, or it ends by itself."""
    seen = set()
    while len(seen) < 4 + 3 * kill and process.poll() is None:
        seen |= {(p.name, p.stat().st_mtime_ns) for p in states.glob("[a-z]*.pt") if p.exists()}
        time.sleep(0.002)


def sorted_lines(out: Path) -> list[str]:
    # Settings finish in any order.
    return sorted((out / "metrics.jsonl").read_text().splitlines())


def test_a_finished_run_resumes_to_its_report(finished):
    before = (finished / "summary.json").read_bytes()
    report = run_spirals("quick", "cpu", finished, True, tiny_study.settings())
    assert report == finished / "report.html"
    assert (finished / "summary.json").read_bytes() == before


def test_another_configuration_is_refused(finished):
    with pytest.raises(RunFolderError, match="another configuration"):
        run_spirals("quick", "cpu", finished, True, tiny_study.settings(epochs=30))
    with pytest.raises(RunFolderError, match="add --resume"):
        run_spirals("quick", "cpu", finished, False, tiny_study.settings())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("fast", "fc", None, "cpu"), "--preset is 'fast'"),
        (("quick", "rnn", None, "cpu"), "--net is 'rnn'"),
        (("quick", "fc", Path("cifar"), "cpu"), "spirals are generated"),
        (("quick", "fc", None, "abacus"), "--device abacus cannot be used"),
        (("quick", "fc", None, "meta"), "--device meta cannot be used"),
    ],
)
def test_bad_choices_leave_nothing_behind(arguments, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        sensli.run(*arguments, tmp_path / "run")
    assert not (tmp_path / "run").exists()
