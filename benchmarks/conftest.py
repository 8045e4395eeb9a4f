"""Runs cases under pytest-benchmark: interleaved with their opponents, then stored by family."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.case import OURS, Case, Workload, check_agreement
from benchmarks.ceilings import ceiling_probe
from benchmarks.cuda_timing import CudaDevice, GraphTimer, choose_timer
from benchmarks.environment import describe
from benchmarks.families import cases_on
from benchmarks.interleave import RoundRobin, Timer, noise_floor, wall_timer
from benchmarks.peak_memory import measure_here, measure_in_subprocess
from benchmarks.results import CaseResult, FamilyResult, VariantResult
from benchmarks.sources import fingerprint, uncommitted

# (seconds of interleaved rounds per case, fewest rounds, most rounds)
_FULL = (5.0, 5, 41)
_CUDA = (2.0, 5, 41)  # nobody else runs on the GPU, so its times vary less
_QUICK = (3.0, 3, 7)
_SECONDS_PER_GRAPH = 0.002  # more calls would make the graph large, not the time steadier

_printed: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("growkernels")
    group.addoption("--quick", action="store_true", help="few rounds, nothing is stored")
    group.addoption("--device", default="cpu", help="device to measure on: cpu (default) or cuda")
    group.addoption(
        "--results",
        type=Path,
        help="folder to store every case in as soon as it has run",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a family's function once for each of its cases on the chosen device."""
    if "case" in metafunc.fixturenames:
        kind = torch.device(metafunc.config.getoption("--device")).type
        cases = cases_on(kind, metafunc.module)
        metafunc.parametrize("case", cases, ids=lambda case: case.name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for text in _printed:
        terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    chosen = torch.device(pytestconfig.getoption("--device"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device=cuda needs a GPU that this torch can use; none is there")
    return chosen


class Progress:
    """The results of one family so far, in the order of its cases."""

    def __init__(self, family: str, names: list[str], device: torch.device, folder: Path | None):
        self.environment = {
            **describe(device),
            "sources": fingerprint(family, device.type),
            "uncommitted": uncommitted(),
        }
        if not self.environment["uncommitted"]:
            # Results and pages may differ from the commit: they are not measured.
            commit = self.environment["commit"]
            self.environment["commit"] = commit and commit.removesuffix("+")
        self._begun = time.monotonic()
        self._family = family
        self._names = names
        self._folder = folder
        self._results: dict[str, CaseResult] = {}

    def add(self, result: CaseResult) -> None:
        """Take in one result; into a folder that was asked for it is stored at once."""
        self._results[result.name] = result
        if self._folder is not None:
            self.result().store(self._folder)

    def took(self) -> str:
        """How long all of it has taken."""
        return f"{self._family} took {(time.monotonic() - self._begun) / 60:.1f} minutes"

    def result(self) -> FamilyResult:
        names = [name for name in self._names if name in self._results]
        return FamilyResult(self._family, self.environment, [self._results[name] for name in names])

    def where_it_is(self, quick: bool) -> str:
        """Stores a whole family in the usual folder; says what was stored where, or why not."""
        done = f"{len(self._results)} of {len(self._names)} cases"
        if self._folder is not None:
            return f"Stored {done} in {self.result().path(self._folder)}"
        if quick:
            return "Not stored: a quick run has too few rounds."
        if len(self._results) < len(self._names):
            return f"Not stored: only {done} ran to the end."
        return f"Stored in {self.result().store()}"


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Progress]:
    """The family's results so far; printed at the end, and stored when every case ran in full."""
    module = request.module
    names = [case.name for case in cases_on(device.type, module)]
    folder: Path | None = request.config.getoption("--results")
    progress = Progress(module.FAMILY, names, device, folder)
    yield progress
    done = progress.result()
    if not done.cases:
        return
    machine = progress.environment["machine"]
    _printed.append(f"\n{module.FAMILY} on {machine}\n{module.TABLE.plain([done])}")
    if noise := done.noise():
        _printed.append(noise)
    _printed.append(progress.took())
    _printed.append(progress.where_it_is(request.config.getoption("--quick")))


def _choose_timer(
    workload: Workload, device: torch.device
) -> tuple[Timer, Callable[[], str], dict[str, float]]:
    """The timer, how it times, and what `RoundRobin.calibrate` needs to know of it."""
    if device.type == "cpu":
        return wall_timer(), lambda: "wall clock", {}
    timer, description = choose_timer(workload.calls, CudaDevice(device))
    short = isinstance(timer, GraphTimer)
    return timer, description, {"seconds_per_timing": _SECONDS_PER_GRAPH} if short else {}


@pytest.fixture
def compare(
    request: pytest.FixtureRequest,
    benchmark: BenchmarkFixture,
    device: torch.device,
    measured: Progress,
) -> Callable[[Case], None]:
    """Runs one case: agreement of the results, interleaved rounds, peak memory."""

    def run(case: Case) -> None:
        workload = case.prepare(device)
        check_agreement(case, workload)
        # On a GPU here, where torch counts; other processes see nothing of the GPU's memory.
        peaks = measure_here(case, workload, device) if device.type == "cuda" else None
        probe = case.ceiling and ceiling_probe(case.ceiling, case.dtype, device)
        timer, timing, settings = _choose_timer(workload, device)
        if "noise_floor" not in measured.environment:
            ours = workload.calls[OURS]
            measured.environment["noise_floor"] = noise_floor(ours, timer, settings)
        rounds = RoundRobin(workload.calls, case.variants, timer, probe or None)
        quick = request.config.getoption("--quick")
        full = _CUDA if device.type == "cuda" else _FULL
        seconds, fewest, most = _QUICK if quick else full
        if case.seconds is not None and full is _FULL and not quick:
            seconds = case.seconds
        wanted = int(seconds / rounds.calibrate(**settings))
        # pytest-benchmark times ours; its setup step, outside that time, times everyone else.
        benchmark.pedantic(  # type: ignore[no-untyped-call]
            rounds.ours,
            setup=rounds.opponents,
            rounds=min(max(wanted, fewest), most),
            iterations=1,
        )
        flops, traffic = workload.flops, workload.bytes
        del workload
        gc.collect()
        if peaks is None:
            peaks = measure_in_subprocess(request.module.__name__, case)
        result = CaseResult(
            name=case.name,
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            layout=case.layout,
            direction=case.direction,
            flops=flops,
            bytes=traffic,
            ceiling_kind=case.ceiling,
            ceiling=rounds.ceilings,
            baseline=case.baseline,
            timing=timing(),
            variants={
                name: VariantResult(
                    rounds.seconds[name], rounds.calls_per_timing[name], peaks[name]
                )
                for name in case.variants
            },
        )
        benchmark.extra_info.update(
            calls_per_round=rounds.calls_per_timing, variants=result.summary()
        )
        measured.add(result)

    return run
