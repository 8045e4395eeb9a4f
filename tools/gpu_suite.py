"""`make gpu-suite`: build for this GPU, test, check memory, measure; one JSON and a short table.

Works with any Python that has torch, Triton, pytest, pytest-benchmark, cmake and ninja; nothing
is downloaded or installed. Every step has a share of the time, and what it found is on disk
before the next one begins, so a run that is killed leaves what it knew. `--dry-run` rehearses on a
machine without a GPU: it states the plan, collects the tests, lists the cases, builds nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from suite_table import render
from timed_command import Log, run_timed
from toolchain import find_cuda_toolkit

ROOT = Path(__file__).resolve().parent.parent
GPU_TESTS = ROOT / "tests" / "gpu"
SANITIZED = "tests/gpu/sanitized_calls.py"
REHEARSED = "9.0"  # the compute capability that a dry run plans for

# Families in the order in which they are measured while there is time; others follow.
FIRST = ("basis_conv", "splitting", "virtual_grad", "resnet18_step", "splitting_eigs")
# Tests of what the build has compiled need seconds; Triton compiles while its tests run.
TESTED_FIRST = ("virtual_grad", "eigen", "eigen_search_space")
# Side by side: the processor compiles for several, and one that loses the GPU stops no other.
_TESTERS = 6
_TEST_SECONDS = 120
# With pytest -v, and with pytest-xdist's workers.
_OUTCOME = re.compile(r"^(tests/\S+::.+) (PASSED|FAILED|SKIPPED|ERROR)\b")
_OUTCOME_OF_WORKER = re.compile(r"^\[gw\d+\] .*?(PASSED|FAILED|SKIPPED|ERROR) (tests/\S+::.*\S)")
_COLLECTED = re.compile(r"^(\d+) tests? collected")
_MOST_NAMES = 50

_DEVICE = """
import json, torch
found = torch.cuda.is_available()
p = torch.cuda.get_device_properties(0) if found else None
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": p and p.name,
    "capability": p and f"{p.major}.{p.minor}", "multiprocessors": p and p.multi_processor_count,
    "memory_bytes": p and p.total_memory, "cache_bytes": p and p.L2_cache_size}))
"""


@dataclass
class Step:
    """One command of the suite, and what came of it.

    `share` is the part of the time left when it begins that it may take.
    """

    name: str
    command: list[str]
    share: float = 1.0
    environment: dict[str, str] = field(default_factory=dict)
    status: str = "not started"
    seconds: float = 0.0
    detail: dict[str, Any] = field(default_factory=dict)


def families() -> list[str]:
    """The benchmark families that declare cases for a GPU, the most important ones first."""
    files = sorted((ROOT / "benchmarks").glob("*/bench_*.py"), key=lambda path: path.name)
    names = [p.stem.removeprefix("bench_") for p in files if "\nGPU_CASES" in p.read_text()]
    return sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def tested() -> list[str]:
    """What `tests/gpu` has files for, in the order in which they run."""
    names = sorted(path.stem.removeprefix("test_") for path in GPU_TESTS.glob("test_*.py"))
    return sorted(names, key=lambda name: name not in TESTED_FIRST)


def plan(only: str | None, capability: str | None, scratch: Path) -> list[Step]:
    """The steps in order; `only` is None, "tests", "bench" or a family's name.

    `capability` None plans a rehearsal without a GPU. Raises ValueError for another `only`.
    """
    known = sorted({*families(), *tested()})
    if only not in (None, "tests", "bench", *known):
        raise ValueError(
            f"there is no {only!r} to run alone; choose tests, bench or one of {', '.join(known)}"
        )
    rehearsal = capability is None
    python = sys.executable
    weighed: list[tuple[float, Step]] = []
    if chosen := [name for name in tested() if only in (None, "tests", name)]:
        files = [str((GPU_TESTS / f"test_{name}.py").relative_to(ROOT)) for name in chosen]
        flags = ["--collect-only", "-q"] if rehearsal else ["-v", "-rf", "--color=no"]
        if not rehearsal:
            flags += _plugin_flags()
        command = [python, "-m", "pytest", *files, "-p", "no:cacheprovider", *flags]
        weighed.append((6, Step("tests", command)))
    if only in (None, "tests"):
        sanitizers = _sanitizer_steps(rehearsal)
        weighed += [(0 if step.status == "skipped" else 2, step) for step in sanitizers]
    measured = [name for name in families() if only in (None, "bench", name)]
    bench = [python, "-m", "benchmarks", "--device", "cuda"]
    if measured and rehearsal:
        weighed.append((2, Step("list of cases", [*bench, "--list", *measured])))
    elif measured:
        weighed.append((0.5, Step("ceilings", [python, "-m", "benchmarks.ceilings", "cuda"])))
        for name in measured:
            command = [*bench, "--results", str(scratch), name]
            weighed.append((2, Step(f"bench {name}", command)))
    return [*([] if capability is None else [build_step(capability)]), *_shared_out(weighed)]


def _plugin_flags() -> list[str]:
    """For the plugins of pytest that are installed."""
    side_by_side = ["-n", str(_TESTERS)] if find_spec("xdist") else []
    # The thread ends the process: nothing else ends one that waits for a kernel.
    limit = [f"--timeout={_TEST_SECONDS}", "--timeout-method=thread"]
    return [*side_by_side, *(limit if find_spec("pytest_timeout") else [])]


def _shared_out(weighed: list[tuple[float, Step]]) -> list[Step]:
    """The steps with shares by weight.

    A step may take half as much again from those behind it, which may not need theirs, but leaves
    them a quarter of the time; the last one may take all.
    """
    left = sum(weight for weight, _ in weighed)
    for weight, step in weighed:
        step.share = 1.0 if weight == left else min(0.75, 1.5 * weight / left)
        left -= weight
    return [step for _, step in weighed]


def build_step(capability: str) -> Step:
    """Builds the op library in place, for GPUs of this compute capability alone."""
    wishes = {"TORCH_CUDA_ARCH_LIST": capability, "GROWKERNELS_CUDA": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    sources = len(list((ROOT / "csrc").glob("*/cuda*.cu")))
    return Step("build", command, 0.5, wishes, detail={"CUDA sources": sources})


def _sanitizer_steps(rehearsal: bool) -> list[Step]:
    calls = [sys.executable, SANITIZED]
    if rehearsal:
        return [Step("sanitized calls", [*calls, "cpu"])]
    # Without torch's own cache of memory every tensor is an allocation whose end is guarded.
    tools = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {}}
    program = shutil.which("compute-sanitizer")
    if program is None and (toolkit := find_cuda_toolkit()):
        program = shutil.which(toolkit / "bin" / "compute-sanitizer")
    if program is None:
        missing = {"reason": "compute-sanitizer is not on PATH and not in a CUDA toolkit"}
        return [Step(tool, [], status="skipped", detail=missing) for tool in tools]
    return [
        Step(
            tool,
            [program, "--tool", tool, "--error-exitcode", "86", *calls, "cuda"],
            environment=environment,
        )
        for tool, environment in tools.items()
    ]


class Suite:
    """The steps of one run, and the files in `out` that say how far it is."""

    def __init__(self, out: Path, steps: list[Step], seconds: float, about: Mapping[str, Any]):
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.steps = steps
        self.about = dict(about)
        self.deadline = time.monotonic() + seconds
        self.log = Log(out / "log.txt")
        self.scratch = scratch_folder(out)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._seen: dict[Path, float] = {}
        self.benchmarks: dict[str, Any] = {}

    def run(self) -> bool:
        """Whether every step that ran passed."""
        self.save()
        done: list[Step] = []
        for step in self.steps:
            if step.status == "skipped":
                continue
            left = self.deadline - time.monotonic()
            if any(earlier.name == "build" and earlier.status != "passed" for earlier in done):
                step.detail["reason"] = "the build did not pass"
            elif left < 5:
                step.detail["reason"] = "no time was left"
            else:
                self._run(step, step.share * left)
            done.append(step)
            self.save()
        shutil.rmtree(self.scratch, ignore_errors=True)
        return all(step.status in ("passed", "skipped") for step in self.steps)

    def _run(self, step: Step, seconds: float) -> None:
        print(f"{step.name} (at most {seconds:.0f} s) ...", flush=True)
        counts = Counts()
        lines: list[str] = []

        def on_line(line: str) -> None:
            counts.read(line)
            lines.append(line)
            del lines[:-2000]

        outcome = run_timed(
            step.command,
            seconds,
            self.log,
            folder=ROOT,
            environment={"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **step.environment},
            on_line=on_line,
            on_poll=self._collect,
        )
        step.status, step.seconds = outcome.status, round(outcome.seconds, 1)
        step.detail |= counts.summary()
        if step.name == "ceilings" and outcome.status == "passed":
            # Other lines are what libraries say of themselves.
            self.about["ceilings"] = json.loads([line for line in lines if line[:1] == "{"][-1])
        if outcome.status == "failed":
            step.detail["last lines"] = lines[-40:]

    def _collect(self) -> None:
        """Takes in what the benchmarks have stored since the last look."""
        changed = False
        for path in self.scratch.glob("*.json"):
            written = path.stat().st_mtime
            if self._seen.get(path) != written:
                content = json.loads(path.read_text())
                self.benchmarks[content["family"]] = content
                self._seen[path] = written
                changed = True
        if changed:
            self.save()

    def save(self) -> None:
        """Write what is known so far, whole or not at all."""
        steps = [asdict(step) for step in self.steps]
        content = {**self.about, "steps": steps, "benchmarks": self.benchmarks}
        _replace(self.out / "results.json", json.dumps(content, indent=1) + "\n")
        _replace(self.out / "table.txt", render(content) + "\n")


class Counts:
    """Counts what steps print as they go, so a killed one is counted too.

    Outcomes of tests with `pytest -v`, tests collected, benchmark cases listed.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._failed: list[str] = []

    def read(self, line: str) -> None:
        if found := _OUTCOME.match(line):
            self._add_test(found[1], found[2].lower())
        elif found := _OUTCOME_OF_WORKER.match(line):
            self._add_test(found[2], found[1].lower())
        elif found := _COLLECTED.match(line):
            self._add("tests", int(found[1]))
        elif "; against " in line:
            self._add("cases", 1)

    def _add_test(self, name: str, outcome: str) -> None:
        self._add(outcome, 1)
        if outcome in ("failed", "error"):
            self._failed.append(name)

    def _add(self, what: str, number: int) -> None:
        self._counts[what] = self._counts.get(what, 0) + number

    def summary(self) -> dict[str, Any]:
        failed = {"failed tests": self._failed[:_MOST_NAMES]} if self._failed else {}
        return {**self._counts, **failed}


def scratch_folder(out: Path) -> Path:
    """Where the benchmarks store their cases before they are taken into the one file."""
    return ROOT / "build" / f"gpu-suite-{out.resolve().name}"


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def find_device() -> dict[str, Any]:
    """What torch sees. Raises RuntimeError where there is no torch."""
    finished = subprocess.run([sys.executable, "-c", _DEVICE], capture_output=True, text=True)
    if finished.returncode:
        last = finished.stderr.strip().splitlines()[-1:]
        raise RuntimeError(f"{sys.executable} has no working torch ({' '.join(last)})")
    device: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return device


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-suite", description=__doc__)
    parser.add_argument("--only", help="tests, bench or a family's name")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-suite")
    parser.add_argument("--minutes", type=float, default=9.3, help="for everything together")
    parser.add_argument("--dry-run", action="store_true", help="rehearse without a GPU")
    options = parser.parse_args(arguments)
    try:
        device = find_device()
        if device["capability"] is None and not options.dry_run:
            raise RuntimeError(
                f"torch {device['torch']} sees no GPU; run this on a machine with one, or rehearse "
                "it with --dry-run"
            )
        capability = None if options.dry_run else device["capability"]
        steps = plan(options.only, capability, scratch_folder(options.out))
    except (RuntimeError, ValueError) as error:
        print(f"gpu-suite: {error}", file=sys.stderr)
        return 2
    about = {
        "schema": 1,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dry_run": options.dry_run,
        "only": options.only,
        "device": device,
    }
    if options.dry_run:
        about["plan"] = [asdict(step) for step in plan(options.only, REHEARSED, Path("build"))]
    # So that what runs in a step ends too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    suite = Suite(options.out, steps, 60 * options.minutes, about)
    passed = suite.run()
    print((options.out / "table.txt").read_text())
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
