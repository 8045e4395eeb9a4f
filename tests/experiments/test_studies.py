"""Every study as a whole: what it leaves behind, and that killing it changes nothing."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny_basis_study
import tiny_cnn_study
import tiny_scaling_study
import tiny_spirals_study
import torch
from PIL import Image
from pool_work import in_this_process

from growkernels import cli
from growkernels.experiments import basis, plots, runner, scaling, sensli
from growkernels.experiments.basis import search
from growkernels.experiments.run_folder import RunFolderError

VERDICTS = {"holds", "does not hold", "cannot be told", "not enough runs"}
# Measured before the trainings, which depend on them: both runs shall see the same.
TIMES = ("layer-times.pt", "step-times.pt")
SEARCH = "search-trainings.jsonl"
TIMED_CLAIMS = ("tenth of the search", "training time", "merit pass", "wall time")
CONCLUSIONS = (
    "basis.conclusion", "scaling.conclusion", "sensli.cnn_conclusion", "sensli.spirals_conclusion",
)  # fmt: skip
HEADINGS = (
    "Claims", "Open questions", "Pictures", "Where this differs", "Run it again", "Environment",
)  # fmt: skip


@dataclass
class Study:
    """A tiny study: its program, the pictures, and words that its page must have."""

    module: Any
    plots: set[str]
    words: tuple[str, ...]
    records: int
    arguments: tuple[Any, ...] = ()
    folders: dict[str, Path] = field(default_factory=dict)

    def run(self, out: Path, resume: bool = True) -> Path:
        return self.module.run(*self.arguments, out, resume)

    def start(self, out: Path) -> subprocess.Popen[bytes] | ForkProcess:
        """In a process with workers of its own; the image studies in a copy of this process.

        A copy has imported everything already, which takes longer than so small a study.
        """
        if self.module is tiny_spirals_study:
            program = [sys.executable, self.module.__file__, *map(str, self.arguments), str(out)]
            return subprocess.Popen([*program, "--resume"], stdout=subprocess.DEVNULL)
        process = get_context("fork").Process(target=self.run, args=(out,))
        with warnings.catch_warnings():  # that this process has threads; none of them holds a lock
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        return process


STUDIES: dict[str, Callable[[], Study]] = {
    "basis": lambda: Study(
        tiny_basis_study,
        {"time_and_accuracy", "plans", "sensitivities", "training_curves", "accuracy_by_time"},
        ("The images are synthetic", "The Taylor search", "half of the filters"),
        records=8 * 2 * 2,
    ),
    "scaling": lambda: Study(
        tiny_scaling_study,
        {"accuracy", "accuracy_by_parameters", "growth_cost", "spectra", "training_loss",
         "where_grown"},
        ("sums each neuron's row", "gate * (GELU", "Reduced (the paper's size"),
        records=15 * 2 * 3,
    ),
    "cnn": lambda: Study(
        tiny_cnn_study,
        {"training_loss", "test_error", "merits", "insertion_times"},
        ("a lossy format", "one vector for all ten runs", "plain SGD"),
        records=(3 * 4 + 3 * 4 + 3 * 4 + 2 * 8) * 2,
    ),
    "spirals": lambda: Study(
        tiny_spirals_study,
        {"loss_one_insertion", "loss_three_insertions", "merits", "insertion_times",
         "decision_boundary"},
        ("one candidate position, so max = min = random: no test", "Where this differs"),
        records=(3 * 10 + 8) * 3,
    ),
}  # fmt: skip


# Trained for as many epochs as another's time or operations pay for.
CONTROLS = ("dense_shorter", "homogeneous_matched", "even_start_matched")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = numpy.random.default_rng(0)
    for split, count in (("train", 14), ("test", 5)):
        for name in ("a", "b", "c"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (16, 16, 3), numpy.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.jpg")
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """One worker process at a time, and here, too, one thread: more is slower for so little."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module", params=STUDIES)
def study(
    request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Study:
    """Run once as a whole, and once killed on the way; that one's pictures are not drawn."""
    study = STUDIES[request.param]()
    if request.param == "cnn":
        study.arguments = (images,)
    whole, killed = (tmp_path_factory.mktemp("runs") / name for name in ("whole", "killed"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (runner, search):
            patch.setattr(module, "run_parts", in_this_process)
        patch.setattr(plots, "DPI", 40)
        # It takes as long as all else that is drawn; test_plots.py has it.
        patch.setitem(plots.STYLE, "figure.constrained_layout.use", False)
        study.run(whole, resume=False)
        share_measured_times(whole, killed)
        kill_at_a_checkpoint(study, killed)
        assert not (killed / "summary.json").exists()
        for name in CONCLUSIONS:
            patch.setattr(f"growkernels.experiments.{name}._plots", lambda evidence: {})
        study.run(killed)
    study.folders = {"whole": whole, "killed": killed}
    return study


def share_measured_times(whole: Path, killed: Path) -> None:
    """What the trainings depend on; and most of the search, which goes on where it stood."""
    for times in TIMES:
        if (whole / "state" / times).exists():
            (killed / "state").mkdir(parents=True, exist_ok=True)
            shutil.copy(whole / "state" / times, killed / "state")
    if (whole / "state" / SEARCH).exists():
        lines = (whole / "state" / SEARCH).read_text().splitlines(keepends=True)
        (killed / "state" / SEARCH).write_text("".join(lines[:-2]))


def kill_at_a_checkpoint(study: Study, out: Path) -> None:
    """Start the study and kill it at once when it has written a state."""
    process = study.start(out)
    seen = set(_states(out))
    while not set(_states(out)) - seen:
        assert _runs(process)
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join() if isinstance(process, ForkProcess) else process.wait()


def _runs(process: subprocess.Popen[bytes] | ForkProcess) -> bool:
    if isinstance(process, ForkProcess):
        return process.is_alive()
    return process.poll() is None


def _states(out: Path) -> Iterator[tuple[str, int]]:
    for path in (out / "state").glob("[a-z]*.pt"):
        if path.name not in ("images.pt", "search-taylor.pt", *TIMES):
            yield path.name, path.stat().st_mtime_ns


def without_clock(value: Any) -> Any:
    """Everything that does not depend on the clock, or on where it ran."""
    if isinstance(value, dict):
        timed = ("second", "environment", "overview", "registration", "time")  # milliseconds too
        kept = {k: without_clock(v) for k, v in value.items() if not any(t in k for t in timed)}
        return {k: v for k, v in kept.items() if k != "claims"} | {
            "claims": [c for c in kept.get("claims", ()) if not _is_timed(c["claim"])]
        }
    return [without_clock(item) for item in value] if isinstance(value, list) else value


def _is_timed(claim: str) -> bool:
    return any(words in claim for words in TIMED_CLAIMS)


def test_killed_and_resumed_ends_with_the_same_numbers(study: Study) -> None:
    summaries, metrics = [], []
    for folder in study.folders.values():
        summaries.append(without_clock(json.loads((folder / "summary.json").read_text())))
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        metrics.append([without_clock(json.loads(line)) for line in lines])
    assert summaries[0] == summaries[1]
    assert metrics[0] == metrics[1]
    epochs = [record for record in metrics[0] if "epoch" in record and "merits" not in record]
    assert len([r for r in epochs if r["variant"] not in CONTROLS]) == study.records


def test_the_folder_holds_what_is_promised(study: Study) -> None:
    out = study.folders["whole"]
    config, summary = (
        json.loads((out / name).read_text()) for name in ("config.json", "summary.json")
    )
    assert (config["experiment"], config["preset"]) == (summary["experiment"], "quick")
    assert {claim["verdict"] for claim in summary["claims"]} <= VERDICTS
    assert len(summary["registration"]["blob"]) == 40
    assert "torch" in summary["environment"]
    assert {path.stem for path in (out / "plots").iterdir()} == study.plots
    assert not (out / "state" / "images.pt").exists()


def test_the_report_stands_alone_and_says_it_all(study: Study) -> None:
    out = study.folders["whole"]
    page = html.unescape((out / "report.html").read_text())
    summary = json.loads((out / "summary.json").read_text())
    assert page.count('src="data:image/png;base64,') == len(study.plots)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.index("This is the quick preset, a tour") < page.index("<h2>Claims")
    assert summary["overview"] in page
    assert "Undefined" not in page
    for words in (*study.words, *(claim["claim"] for claim in summary["claims"])):
        assert words in " ".join(page.split())
    questions = {claim["question"] for claim in summary["claims"] if claim["question"]}
    assert re.findall("<h3>(.*)</h3>", page) == sorted(questions, key=page.index)
    for heading in HEADINGS:
        assert f"<h2>{heading}" in page
    assert page.count("<tr>") == page.count("</tr>")
    assert page.rstrip().endswith("</html>")


def test_a_finished_run_resumes_to_its_report(study: Study) -> None:
    out = study.folders["whole"]
    before = (out / "summary.json").read_bytes()
    assert study.run(out) == out / "report.html"
    assert (out / "summary.json").read_bytes() == before
    with pytest.raises(RunFolderError, match="add --resume"):
        study.run(out, resume=False)


def test_another_configuration_is_refused(study: Study) -> None:
    config = study.folders["killed"] / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"preset": "paper"}))
    with pytest.raises(RunFolderError, match=r"another configuration \(different: preset\)"):
        study.run(study.folders["killed"])


@pytest.mark.parametrize("run", [basis.run, scaling.run])
def test_what_the_user_may_get_wrong(run: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--preset is 'fast'; choose one of quick, desk, paper"):
        run("fast", None, "cpu", out)
    for preset in ("desk", "paper"):
        with pytest.raises(ValueError, match=f"--preset {preset} needs images: give --data DIR"):
            run(preset, None, "cpu", out)
    with pytest.raises(ValueError, match="--device abacus cannot be used"):
        run("quick", None, "abacus", out)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        run("quick", tmp_path / "none", "cpu", out)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(RunFolderError, match="is a file"):  # told before images are looked for
        run("quick", tmp_path / "none", "cpu", out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("fast", "fc", None, "cpu"), "--preset is 'fast'"),
        (("quick", "rnn", None, "cpu"), "--net is 'rnn'"),
        (("quick", "fc", Path("cifar"), "cpu"), "spirals are generated"),
        (("quick", "fc", None, "abacus"), "--device abacus cannot be used"),
        (("quick", "fc", None, "meta"), "--device meta cannot be used"),
        (("quick", "cnn", None, "cpu"), "--net cnn needs images: give --data DIR"),
    ],
)
def test_bad_choices_leave_nothing_behind(
    arguments: tuple[Any, ...], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        sensli.run(*arguments, tmp_path / "run")
    for optimizer, net in (("adam", "cnn"), ("momentum", "fc")):
        with pytest.raises(ValueError, match="--optimizer is"):
            sensli.run("quick", net, None, "cpu", tmp_path / "run", optimizer=optimizer)
    assert not (tmp_path / "run").exists()


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
        for name in ("basis", "scaling"):
            arguments = ["reproduce", name, "--data", str(folder), "--out", str(out)]
            monkeypatch.setattr(sys, "argv", ["growkernels", *arguments])
            assert cli.main() == 1
            (sentence,) = capsys.readouterr().err.strip().splitlines()
            assert sentence.startswith("growkernels: ")
            assert str(folder) in sentence
            assert words in sentence
            assert not out.exists()
