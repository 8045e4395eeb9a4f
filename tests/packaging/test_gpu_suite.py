"""The GPU suite without a GPU: its plan, its time limits, what is on disk at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_suite  # noqa: E402
import timed_command  # noqa: E402
from gpu_suite import Counts, Step, Suite, plan, scratch_folder  # noqa: E402
from suite_table import render  # noqa: E402
from timed_command import Log, run_timed  # noqa: E402

files_with_tests = gpu_suite.tested  # the fixture below replaces it
ABOUT = {
    "device": {"gpu": "Some GPU", "torch": "2.11.0", "cuda": "13.0"},
    "started": "2026-01-01T00:00:00+00:00",
}


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "families", lambda: ["basis_conv", "merit_pass"])
    monkeypatch.setattr(gpu_suite, "tested", lambda: ["basis_conv", "eigen"])
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda program: f"/bin/{program}")


@pytest.mark.parametrize(
    ("only", "names"),
    [
        (
            None,
            "build tests memcheck racecheck ceilings bench:basis_conv bench:merit_pass",
        ),
        ("tests", "build tests memcheck racecheck"),
        ("bench", "build ceilings bench:basis_conv bench:merit_pass"),
        ("basis_conv", "build tests ceilings bench:basis_conv"),
        ("merit_pass", "build ceilings bench:merit_pass"),
        ("eigen", "build tests"),
    ],
)
def test_the_plan_has_the_steps_asked_for(only: str | None, names: str) -> None:
    steps = plan(only, "9.0", Path("scratch"))
    assert [step.name for step in steps] == [name.replace(":", " ") for name in names.split()]
    assert steps[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    tests = [step.command for step in steps if step.name == "tests"]
    if tests:
        names = gpu_suite.tested() if only in (None, "tests") else [only]
        files = [part for part in tests[0] if part.startswith("tests/gpu")]
        assert files == [f"tests/gpu/test_{name}.py" for name in names]
    shares = [step.share for step in steps]
    assert shares[-1] == 1
    assert all(0 < share <= 0.75 for share in shares[:-1])


def test_what_is_compiled_already_is_tested_first() -> None:
    names = files_with_tests()
    assert names[:3] == ["eigen", "eigen_search_space", "virtual_grad"]
    assert len(names) == len(list((ROOT / "tests" / "gpu").glob("test_*.py")))


@pytest.mark.parametrize("plugin", ["xdist", "pytest_timeout"])
def test_plugins_that_keep_a_lost_gpu_from_the_other_tests(
    plugin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"xdist": "-n", "pytest_timeout": "--timeout-method=thread"}
    monkeypatch.setattr(gpu_suite, "find_spec", lambda name: name == plugin or None)
    command = plan("eigen", "9.0", Path())[1].command
    assert [flag for flag in found.values() if flag in command] == [found[plugin]]


def test_an_unknown_part_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no 'basis'.*basis_conv, eigen, merit_pass"):
        plan("basis", "9.0", Path())


def test_without_the_sanitizer_its_steps_are_skipped_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda program: None)
    skipped = [step for step in plan("tests", "9.0", Path()) if step.status == "skipped"]
    assert [step.name for step in skipped] == ["memcheck", "racecheck"]
    assert "not on PATH" in skipped[0].detail["reason"]


def test_outcomes_are_counted_while_tests_run() -> None:
    counts = Counts()
    for line in (
        "collected 3 items",
        "tests/gpu/test_a.py::test_x[a b-1] PASSED [ 33%]",
        "tests/gpu/test_a.py::test_y FAILED    [ 66%]",
        "[gw0] [ 80%] PASSED tests/gpu/test_a.py::test_x[c] ",
        "[gw1] [ 90%] ERROR tests/gpu/test_a.py::test_w ",
        "tests/gpu/test_a.py::test_w ",
        "FAILED tests/gpu/test_a.py::test_y - assert 1 == 2",
    ):
        counts.read(line)
    assert counts.summary() == {
        "passed": 2,
        "failed": 1,
        "error": 1,
        "failed tests": ["tests/gpu/test_a.py::test_y", "tests/gpu/test_a.py::test_w"],
    }


class Clock:
    """Time that passes only where a test says so, however slow the machine is."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timed_command, "time", clock)
    monkeypatch.setattr(gpu_suite, "time", clock)
    return clock


def python(program: str) -> list[str]:
    return [sys.executable, "-u", "-c", program]


def timed(
    tmp_path: Path, program: str, on_poll: Callable[[list[str]], None] = lambda lines: None
) -> tuple[Any, list[str]]:
    """Runs the program within a minute; `on_poll` gets what it has printed so far."""
    lines: list[str] = []
    log = Log(tmp_path / "log.txt")
    outcome = run_timed(
        python(program), 60.0, log, folder=tmp_path, environment={"WORD": "hello"},
        on_line=lines.append, on_poll=lambda: on_poll(lines),
    )  # fmt: skip
    return outcome, lines


@pytest.mark.usefixtures("clock")
def test_a_command_ends_by_itself(tmp_path: Path) -> None:
    outcome, lines = timed(tmp_path, "import os; print(os.environ['WORD']); print('no newline')")
    assert (outcome.status, outcome.returncode, lines) == ("passed", 0, ["hello", "no newline"])
    outcome, lines = timed(tmp_path, "import sys; print('x', file=sys.stderr); sys.exit(3)")
    assert (outcome.status, outcome.returncode, lines) == ("failed", 3, ["x"])
    assert "[failed, exit status 3" in (tmp_path / "log.txt").read_text()


def test_a_command_that_takes_too_long_is_interrupted_and_may_say_what_it_has(
    tmp_path: Path, clock: Clock
) -> None:
    # A shell's background jobs ignore interrupts, and so does what they start.
    program = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n    print('begun')\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('so far')"
    )

    def end_the_minute(lines: list[str]) -> None:
        clock.now = 61.0 if lines else 0.0  # and wait for as long as the end takes

    outcome, lines = timed(tmp_path, program, end_the_minute)
    assert outcome.status == "out of time"
    assert lines == ["begun", "so far"]


def test_a_command_that_ignores_the_interrupt_dies_with_its_children(
    tmp_path: Path, clock: Clock
) -> None:
    # A process starts with the signals ignored that its parent ignores.
    program = (
        "import signal, subprocess, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)'])\n"
        "print(child.pid)\nchild.wait()"
    )

    def pass_time(lines: list[str]) -> None:
        clock.now += 61.0 if lines else 0.0

    outcome, lines = timed(tmp_path, program, pass_time)
    assert outcome.status == "out of time"
    assert outcome.returncode == -signal.SIGKILL
    stat = Path(f"/proc/{lines[0]}/stat")
    deadline = time.monotonic() + 600
    # The orphan's new parent takes it away in its own time.
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the child is still there"
        time.sleep(0.02)


@pytest.mark.usefixtures("clock")
def test_the_log_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_command, "LOG_LIMIT", 1000)
    timed(tmp_path, "print(*range(10000), sep='\\n')")
    assert (tmp_path / "log.txt").stat().st_size <= 1000


CASE = {
    "name": "small", "ceiling_kind": "gemm",
    "summary": {
        "eager": {"seconds": {"median": 3e-4}, "speedup_of_ours": {"median": 3.0}},
        "compiled": {"seconds": {"median": 2e-4}, "speedup_of_ours": {"median": 2.0}},
        "growkernels": {
            "seconds": {"median": 1e-4}, "speedup_of_ours": None, "giga_per_second": 5e5,
            "share_of_ceiling": {"median": 0.7},
        },
    },
}  # fmt: skip


def test_what_was_measured_before_the_end_of_time_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    out = tmp_path / "measured-in-part"
    scratch = scratch_folder(out)
    family = json.dumps({"family": "toy", "cases": [CASE]})
    program = (
        f"import pathlib, time\nfolder = pathlib.Path({str(scratch)!r})\n"
        f"folder.mkdir(parents=True)\n(folder / 'toy.json').write_text({family!r})\n"
        "time.sleep(60)"
    )
    steps = [
        Step("build", python("print('built')"), 0.5),
        Step("tests", python("print('tests/gpu/test_a.py::test_x FAILED'); exit(1)"), 0.5),
        Step("memcheck", [], 0.0, status="skipped", detail={"reason": "no such program"}),
        Step("bench toy", python(program), 0.05),
        Step("bench rest", python("print('rest')"), 1.0),
    ]
    collect = Suite._collect

    def collect_and_pass_time(suite: Suite) -> None:
        collect(suite)
        if suite.benchmarks:
            clock.now = 40.0  # past the 30 s of "bench toy"; no more for the step after it

    monkeypatch.setattr(Suite, "_collect", collect_and_pass_time)
    assert not Suite(out, steps, 600.0, ABOUT).run()
    assert not scratch.exists()
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "results.json", "table.txt"]
    results = json.loads((out / "results.json").read_text())
    assert [step["status"] for step in results["steps"]] == [
        "passed", "failed", "skipped", "out of time", "passed",
    ]  # fmt: skip
    assert results["benchmarks"]["toy"]["cases"] == [CASE]
    table = (out / "table.txt").read_text()
    assert table == render(results) + "\n"
    assert "1 failed" in table
    assert "FAILED tests/gpu/test_a.py::test_x" in table
    assert "no such program" in table
    (row,) = (line for line in table.splitlines() if line.startswith("  small"))
    assert row.split() == [
        "small", "100.0", "us", "500", "TFLOP/s", "70.0", "%", "2.00x", "compiled",
    ]  # fmt: skip


@pytest.mark.usefixtures("clock")
def test_ceilings_are_read_among_other_lines(tmp_path: Path) -> None:
    program = "print('{\"copy\": 3e12}'); print('a warning')"
    assert Suite(tmp_path, [Step("ceilings", python(program))], 60.0, ABOUT).run()
    assert json.loads((tmp_path / "results.json").read_text())["ceilings"] == {"copy": 3e12}


def test_a_test_that_loses_the_gpu_ends_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    conftest = (ROOT / "tests" / "gpu" / "conftest.py").read_text()
    lost = "def lost():\n    raise RuntimeError('CUDA error: an illegal access\\nmore')\n"
    (tmp_path / "conftest.py").write_text(f"{conftest}\n\n{lost}\ntorch.cuda.synchronize = lost\n")
    (tmp_path / "test_toy.py").write_text("def test_a(): pass\n\ndef test_b(): pass\n")
    command = [sys.executable, "-m", "pytest", "-v", str(tmp_path), "-p", "no:cacheprovider"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 1
    assert "lost the GPU (CUDA error: an illegal access)" in finished.stdout
    assert "test_a PASSED" in finished.stdout
    assert "test_b" not in finished.stdout


@pytest.mark.usefixtures("clock")
def test_nothing_runs_after_a_failed_build_or_without_time(tmp_path: Path) -> None:
    build = Step("build", python("exit(1)"), 0.5)
    tests = Step("tests", python("print('ran')"), 0.5)
    assert not Suite(tmp_path, [build, tests], 60.0, ABOUT).run()
    assert (tests.status, tests.detail) == ("not started", {"reason": "the build did not pass"})
    late = Step("bench toy", python("print('ran')"), 1.0)
    assert not Suite(tmp_path, [late], 1.0, ABOUT).run()
    assert (late.status, late.detail) == ("not started", {"reason": "no time was left"})


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = str(ROOT / "tools" / "gpu_suite.py")
    return subprocess.run(
        [sys.executable, program, *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_a_dry_run_rehearses_everything_but_the_build(tmp_path: Path) -> None:
    finished = command("--dry-run", "--out", str(tmp_path))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rehearsed = {step["name"]: step for step in results["steps"]}
    assert rehearsed["tests"]["detail"]["tests"] > 0
    assert rehearsed["sanitized calls"]["status"] == "passed"
    planned = {step["name"]: step for step in results["plan"]}
    assert {"build", "tests", "memcheck", "racecheck"} <= set(planned)
    measured = [name for name in planned if name.startswith("bench ")]
    if measured:
        assert rehearsed["list of cases"]["detail"]["cases"] >= len(measured)
    assert "would run build: TORCH_CUDA_ARCH_LIST=9.0" in finished.stdout
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < 16 * 2**20


def test_without_a_gpu_the_suite_says_what_to_do(tmp_path: Path) -> None:
    finished = command("--out", str(tmp_path))
    assert finished.returncode == 2
    assert "sees no GPU" in finished.stderr
    assert "--dry-run" in finished.stderr
    assert not list(tmp_path.iterdir())
